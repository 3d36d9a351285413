"""
scripts/tables.py: every row is one command that train.py understands, the paper's figures are the paper's, and a few rows run end to end.

    python -m pytest tests/test_tables.py
"""
import csv
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import eval as evaluation
import train
from config import configure
from scripts import faults, tables, toy

ROOT = Path(__file__).resolve().parents[1]
EVERY = [(n, row) for n, rows in tables.ROWS.items() for row in rows]


@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.parametrize("setting", tables.SETTINGS)
def test_every_row_is_a_command(monkeypatch, setting, stage):
    monkeypatch.chdir(ROOT)
    cfg = SimpleNamespace(setting=setting, data_dir="data", out_dir="out")
    base = None
    for _, row in EVERY:
        name, args = tables.arguments(row, cfg, stage)
        overrides = {k: v for k, v in row[3].items() if stage == "sft" or k not in tables.SFT_ALONE}
        got = configure("train.py", [*args, f"stage={stage}"], stages=("align", "sft"))
        assert all(getattr(got, k) == v for k, v in overrides.items()) and got.dataset == name
        if not row[3] and row[1] == "7B" and row[2] == tables.PHOENIX:
            base = base or got
            assert got == base  # the row that stands in seven tables is one run
        assert os.path.exists(os.path.dirname(got.llm)) or got.llm.startswith(("weights/", "data/"))
    assert base.window == 8 and base.lora_rank == 8 and base.adaptor == "mlp" and (stage == "align" or base.train_embeddings)


def test_rows_that_share_a_run():
    rows = {label: row for n in (4, 8) for row in tables.ROWS[n] for label in [(n, row[0])]}
    keys = lambda stage: [tables.key_of(row, stage) for (n, _), row in rows.items() if n == 8]
    assert len(set(keys("align"))) == 1 and len(set(keys("sft"))) == 4
    assert tables.key_of(rows[4, "7B, adaptor, word embeddings, LoRA"], "sft") == tables.key_of(rows[8, "LoRA rank 8"], "sft") == "7B"


def test_figures_are_the_papers():
    paper = ROOT.parent / "shared" / "paper" / "sl-llama.txt"
    if not paper.exists():
        pytest.skip("the paper's text is not beside the repository")
    text = paper.read_text()
    start = {n: m.end() for n in range(1, 10) for m in re.finditer(rf"^\**Table {n}\**\s*$", text, re.M)}
    for n, row in EVERY:
        figures = [float(x) for x in re.findall(r"\d+\.?\d*", text[start[n]:start[n] + 900])]
        data = row[4]
        assert any(figures[i:i + 2] == list(data) for i in range(len(figures))) or (n == 1 and data[0] in figures and data[1] in figures) or row[0].startswith("Inception"), row
    assert {n: len(rows) for n, rows in tables.ROWS.items()} == {1: 2, 2: 2, 3: 6, 4: 6, 5: 8, 6: 8, 7: 10, 8: 4, 9: 4}


def test_write(tmp_path):
    score = lambda b: {"bleu": [b + 3, b + 2, b + 1, b], "rouge": b + 9.0}
    cfg = SimpleNamespace(setting="toy", to=str(tmp_path))
    text = tables.write(3, [[score(60), score(62)], [score(70)], [score(90)], None, [score(80.0)], [score(80.2)]], cfg)
    assert "| 7B, linear | 40.63 | 18.48 | 70.00 ± 1.41 | **61.00 ± 1.41** | toy" in text and "| 13B, linear | 41.59 | 20.42 | failed | failed |" in text
    assert "GELU beats a linear layer (7B): paper 20.86 against 18.48, here 90.00 against 61.00: agrees" in text
    assert "no difference" in text.splitlines()[-1] and "linear layer (13B)" not in text  # a row that failed proves nothing
    rows = list(csv.DictReader(open(tmp_path / "table3.csv")))
    assert rows[2]["bleu1"] == "93.00" and rows[3]["bleu4"] == "failed" and (tmp_path / "table3.md").read_text() == text
    assert "published: ROUGE 48.90, BLEU-4 22.52" in tables.write(1, [[score(1)], [score(2)]], cfg)


@pytest.mark.long
def test_end_to_end(home, tmp_path, monkeypatch, capsys):
    """Two rows that share an align run and one that cannot run: the others are not lost, and a second call runs only that one again."""
    for stage in ("align", "sft"):
        monkeypatch.setitem(tables.SETTINGS["toy"], stage, ["max_clips=6", "epochs=1", "batch_size=3", "eval_every=-1"])
    monkeypatch.setitem(tables.ROWS, 8, [("eight", "7B", tables.PHOENIX, {}, (1, 2)), ("four", "7B", tables.PHOENIX, {"lora_rank": 4}, (3, 4)),
                                         ("none", "7B", tables.PHOENIX, {"lora_rank": 0}, (5, 6))])
    monkeypatch.setattr("sys.argv", ["tables.py", "table=8", f"data_dir={home}/data", f"out_dir={tmp_path}/out", f"to={tmp_path}/tables"])
    ran = []

    def run(command, *args, real=tables.run):
        """A process for each, as tables.run has it, but forked from this one, which has imported all that they need. The one that fails is started as always."""
        def job():
            sys.argv = command[1:] if command[0] == "-m" else command
            {"train.py": train.main, "eval.py": evaluation.main, "scripts.toy": toy.main}[sys.argv[0]]()

        ran.append(command)
        if "lora_rank=0" in command or sys.platform == "darwin":  # there torch computes no gradients in a forked process
            return real(command, *args)
        code, said = faults.forked(job, 100)
        assert code == 0, said

    monkeypatch.setattr(tables, "run", run)
    for again in (False, True):
        ran.clear()
        with pytest.raises(Exception, match="1 runs failed.*lora_rank=0: must be at least 1"):
            tables.main()
        programs = [c[0] for c in ran if c[0] != "-m"]
        assert programs.count("eval.py") == (0 if again else 2)
        text = (tmp_path / "tables" / "table8.md").read_text()
        assert re.search(r"\| eight \| 1 \| 2 \| \d+\.\d\d \| \*\*\d+\.\d\d\*\* \| toy", text) and "| none | 5 | 6 | failed |" in text
    runs = sorted(os.listdir(tmp_path / "out" / "toy" / "tables" / "toy"))
    assert runs == ["7B", "7B,lora_rank=0", "7B,lora_rank=4"] or runs == ["7B", "7B,lora_rank=4"]
    config = json.load(open(tmp_path / "out/toy/tables/toy/7B,lora_rank=4/1337/sft/config.json"))
    assert config["lora_rank"] == 4 and config["init_from"].endswith("tables/toy/7B/1337/align")
