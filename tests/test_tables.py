"""
scripts/tables.py: every row is one command that train.py understands, the paper's figures are the paper's, and a few
rows run end to end.

    python -m pytest tests/test_tables.py
"""
import csv
import json
import os
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT

from lib.configurator import configure
from lib.program import BadInput
from lib.scores import bleu
from scripts import tables

EVERY = [(n, row) for n, rows in tables.ROWS.items() for row in rows]


@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.parametrize("setting", tables.SETTINGS)
def test_every_row_is_a_command(monkeypatch, setting, stage):
    monkeypatch.chdir(ROOT)
    cfg = SimpleNamespace(setting=setting, data_dir="data", out_dir="out")
    base = None
    for _, row in EVERY:
        name, args = tables.arguments(row, cfg, stage)
        overrides = tables.overrides_of(row, stage)
        got = configure("train.py", [*args, f"stage={stage}"], stages=("align", "sft"))
        assert all(getattr(got, k) == v for k, v in overrides.items()) and got.dataset == name
        if not row[3] and row[1] == "7B" and row[2] == tables.PHOENIX:
            base = base or got
            assert got == base  # the row that stands in seven tables is one run
        assert os.path.exists(os.path.dirname(got.llm)) or got.llm.startswith(("weights/", "data/"))
    assert base.window == 8 and base.lora_rank == 8 and base.adaptor == "mlp"
    assert stage == "align" or base.train_embeddings


def test_rows_that_share_a_run():
    rows = {label: row for n in (4, 8) for row in tables.ROWS[n] for label in [(n, row[0])]}
    keys = lambda stage: [tables.key_of(row, stage) for (n, _), row in rows.items() if n == 8]
    assert len(set(keys("align"))) == 1 and len(set(keys("sft"))) == 4
    same = rows[4, "7B, adaptor, word embeddings, LoRA"], rows[8, "LoRA rank 8"]
    assert [tables.key_of(row, "sft") for row in same] == ["7B", "7B"]


@pytest.mark.parametrize("setting, epochs", [("toy", 17), ("paper", 5)])
def test_the_row_without_an_alignment_stage(monkeypatch, setting, epochs):
    """One step of it, then a second stage as long as both, in which the local transformer learns as well."""
    monkeypatch.chdir(ROOT)
    row = next(row for row in tables.ROWS[4] if "max_steps" in row[3])
    cfg = SimpleNamespace(setting=setting, data_dir="data", out_dir="out")
    align, sft = (configure("train.py", [*tables.arguments(row, cfg, s)[1], f"stage={s}"], stages=("align", "sft"))
                  for s in ("align", "sft"))
    assert (align.max_steps, align.epochs + sft.epochs) == (1, epochs + align.epochs)
    assert sft.max_steps == -1 and sft.train_ltn and sft.epochs == epochs
    assert tables.key_of(row, "align") != "7B"


def test_seeds():
    """Three of each row of 7B in five of the toy's tables, and so wherever else that row stands; seeds= wins."""
    at = lambda setting, seeds=0: {
        (n, row[0]): len(tables.seeds_of(row, SimpleNamespace(setting=setting, seeds=seeds))) for n, row in EVERY}
    assert set(at("paper").values()) == {1} and set(at("toy", 5).values()) == {5}
    several = {row for row, n in at("toy").items() if n == 3}
    assert {n for n, _ in several} == {1, 2, 3, 4, 5, 6, 8, 9} and len(several) == 22
    assert not any("13B" in label for _, label in several) and (5, "Inception (GoogLeNet)") in several


def test_figures_are_the_papers():
    paper = ROOT.parent / "shared" / "paper" / "sl-llama.txt"
    if not paper.exists():
        pytest.skip("the paper's text is not beside the repository")
    text = paper.read_text()
    start = {n: m.end() for n in range(1, 10) for m in re.finditer(rf"^\**Table {n}\**\s*$", text, re.M)}
    for n, row in EVERY:
        figures = [float(x) for x in re.findall(r"\d+\.?\d*", text[start[n]:start[n] + 900])]
        data = row[4]
        if "max_steps" in row[3]:  # our own row
            assert data == ()
            continue
        beside = any(figures[i:i + 2] == list(data) for i in range(len(figures)))
        apart = n == 1 and data[0] in figures and data[1] in figures
        assert beside or apart or row[0].startswith("Inception"), row
    assert {n: len(rows) for n, rows in tables.ROWS.items()} == {1: 2, 2: 2, 3: 6, 4: 7, 5: 8, 6: 8, 7: 10, 8: 4, 9: 4}


REFS = ["am tag regnet es im norden und süden", "heute scheint am rhein die sonne wieder lange",
        "morgen gibt es in den alpen später nebel", "am abend weht an der küste oft der wind"] * 15


def scored(folder, bleu4, wrong=0, rouge=50.0, lang="de"):
    """A run's folder with its scores, and hypotheses of which every `wrong`-th is wrong."""
    os.makedirs(folder)
    with open(f"{folder}/scores.json", "w") as f:
        json.dump({"bleu": [bleu4 + 3, bleu4 + 2, bleu4 + 1, bleu4], "rouge": rouge, "lang": lang}, f)
    with open(f"{folder}/hyps.jsonl", "w") as f:
        for i, ref in enumerate(REFS):
            hyp = "nichts davon" if wrong and i % wrong == 0 else ref
            f.write(json.dumps({"name": str(i), "hyp": hyp, "ref": ref}) + "\n")
    return str(folder)


def test_write(tmp_path):
    cfg = SimpleNamespace(setting="toy", to=str(tmp_path))
    runs = iter(range(99))
    home = lambda bleu4, wrong=0: scored(tmp_path / str(next(runs)), bleu4, wrong)
    homes = [[home(60, 2), home(62, 2)], [home(70)], [home(90)], None, [home(80.0, 3)], [home(80.2, 3)]]
    text = tables.write(3, homes, cfg)
    assert "| 7B, linear | 40.63 | 18.48 | 50.00 ± 0.00 | **61.00 ± 1.41** | hard toy" in text
    assert "| 13B, linear | 41.59 | 20.42 | failed | failed |" in text
    lines = [line for line in text.splitlines() if line.startswith("- ")]
    assert re.fullmatch(r"- GELU beats a linear layer \(7B\): paper 20.86 against 18.48, here with one seed agrees "
                        r"\(\+\d+.\d\d, p = 0.000 over clips\)", lines[0])
    # nothing between them, and a row that failed proves nothing
    assert "here with one seed cannot be told (+0.00" in lines[1] and "cannot be told" in lines[2] and len(lines) == 3
    rows = list(csv.DictReader(open(tmp_path / "table3.csv")))
    assert rows[2]["bleu1"] == "93.00" and rows[3]["bleu4"] == "failed" and (tmp_path / "table3.md").read_text() == text
    assert "published: ROUGE 48.90, BLEU-4 22.52" in tables.write(1, [[home(1)], [home(2)]], cfg)


def test_a_table_of_which_nothing_can_be_told_says_so_first(tmp_path):
    cfg = SimpleNamespace(setting="toy", to=str(tmp_path))
    same = [[scored(tmp_path / str(i), 50, 2)] for i in range(8)]
    for number in (8, 9):
        text = tables.write(number, same[:len(tables.ROWS[number])], cfg).splitlines()
        assert text[2] == "**Nothing here can be told from chance.**"
    text = tables.write(5, same, cfg)  # its backbones have learnt nothing: no figures
    assert "| ViT-B/16 | 38.04 | 18.36 | ran |  | hard toy" in text and "50.00" not in text and "that each row" in text
    assert "50.00" in tables.write(5, same, SimpleNamespace(setting="paper", to=str(tmp_path)))


CLAIMED = {  # what the paper says of its rows: the better one, the worse one, their BLEU-4
    1: [("SL-LLaMA 13B", "SL-LLaMA 7B", 23.73, 20.86)],
    2: [("SL-LLaMA 13B", "SL-LLaMA 7B", 13.42, 11.77)],
    3: [("7B, MLP with GELU", "7B, linear", 20.86, 18.48),
        ("7B, MLP with GELU", "7B, MLP without activation", 20.86, 18.06),
        ("13B, MLP with GELU", "13B, linear", 23.73, 20.42),
        ("13B, MLP with GELU", "13B, MLP without activation", 23.73, 19.74)],
    4: [("7B, adaptor, word embeddings, LoRA", "7B, adaptor and word embeddings", 20.86, 16.12),
        ("13B, adaptor, word embeddings, LoRA", "13B, adaptor and word embeddings", 23.73, 16.42)],
    5: [],
    6: [(f"{row}, with the local transformer", f"{row}, without the local transformer", a, b) for row, a, b in (
        ("7B, PHOENIX-2014T", 20.86, 19.27), ("7B, CSL-Daily", 11.77, 11.42), ("13B, PHOENIX-2014T", 23.73, 21.43),
        ("13B, CSL-Daily", 13.42, 13.34))],
    7: [],
    8: [("LoRA rank 8", "LoRA rank 4", 20.86, 18.48)],
    9: [("window 8", f"window {w}", 20.86, b) for w, b in ((4, 19.64), (12, 20.02), (16, 19.42))],
}


@pytest.mark.parametrize("number", tables.ROWS)
def test_every_claim_compares_the_rows_that_it_names(tmp_path, monkeypatch, number):
    """Each row has hypotheses of its own: a claim's line tells which two it has looked at, and who won."""
    labels = [row[0] for row in tables.ROWS[number]]
    homes = [[scored(tmp_path / str(i), 0)] for i in range(len(labels))]
    seen = []
    monkeypatch.setattr(tables, "read_hyps", lambda path: labels[int(path.split("/")[-2])])
    monkeypatch.setattr(tables, "judge", lambda better, worse, lang: seen.append((*better, *worse)) or (1.0, 0.0, None))
    text = tables.write(number, homes, SimpleNamespace(setting="paper", to=str(tmp_path / "tables")))
    claimed = CLAIMED[number] + ([("7B, adaptor, word embeddings, LoRA", labels[6])] if number == 4 else [])
    assert seen == [row[:2] for row in claimed]
    found = re.findall(r"^- .*: paper ([\d.]+) against ([\d.]+), here with one seed agrees ", text, re.M)
    assert [tuple(map(float, line)) for line in found] == [row[2:] for row in claimed if len(row) > 2]


def hyps(wrong):
    """{clip: (hypothesis, reference)}, those in `wrong` without their last word."""
    return {str(i): (ref.rsplit(" ", 1)[0] if i in wrong else ref, ref) for i, ref in enumerate(REFS)}


def test_judged_over_clips():
    """Sentence by sentence: BLEU-4 of the files, a tie, the other direction, one clip that proves nothing."""
    perfect, some, one = hyps([]), hyps(range(0, 60, 3)), hyps([7])
    texts = lambda run: list(zip(*run.values()))
    gap = 100 - bleu(*texts(some), "de")[3]
    found, over_clips, over_seeds = tables.judge([perfect], [some], "de")
    assert found == pytest.approx(gap) and over_clips == 0 and over_seeds is None
    assert tables.verdict(found, over_clips, over_seeds).startswith("with one seed agrees")
    found, over_clips, _ = tables.judge([some], [perfect], "de")
    assert found == pytest.approx(-gap) and over_clips == 0
    assert tables.verdict(found, over_clips, None).startswith("with one seed disagrees")
    assert tables.judge([some], [some], "de")[1] == 1
    found, over_clips, _ = tables.judge([perfect], [one], "de")  # it is not drawn in (59/60)^60 of the samples
    assert found > 0 and over_clips == pytest.approx(0.365, abs=0.05)
    assert tables.verdict(found, over_clips, None).startswith("with one seed cannot be told")


def test_judged_over_seeds():
    """Three runs that all beat three others are the best of 20 ways to deal the six; two of three are not enough."""
    good, bad = [hyps(range(n)) for n in (1, 2, 3)], [hyps(range(n)) for n in (20, 22, 24)]
    found, over_clips, over_seeds = tables.judge(good, bad, "de")
    assert over_clips == 0 and over_seeds == pytest.approx(1 / 20)
    assert tables.verdict(found, over_clips, over_seeds).startswith("agrees")
    assert tables.judge(bad, good, "de")[2] == pytest.approx(1 / 20)
    mixed = tables.judge([good[0], good[1], bad[2]], [bad[0], bad[1], good[2]], "de")
    assert mixed[2] > 0.05 and tables.verdict(*mixed).startswith("cannot be told")
    assert tables.judge(good, bad[:1], "de")[2] is None  # one against one


def test_put_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{tables.MARKS[0]}\nold\n{tables.MARKS[1]}\nafter\n")
    for text in ("## Table 1\n", "new\n"):
        tables.put_into(str(page), text)
    assert page.read_text() == f"before\n{tables.MARKS[0]}\n\nnew\n\n{tables.MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(BadInput, match="page.md: has no lines"):
        tables.put_into(str(page), "new")


class Recorder:
    """Stands in for tables.run: notes each command, and does of it what the next one looks for."""

    def __init__(self):
        self.commands, self.fails = [], ""

    def __call__(self, command, log, cfg, beside=0):
        self.commands.append(command)
        if self.fails and self.fails in command:
            raise BadInput(f"{self.fails} went wrong")
        if command[0] == "eval.py":
            home = command[1].removeprefix("ckpt=")
            os.makedirs(home, exist_ok=True)
            with open(os.path.join(home, "scores.json"), "w") as f:
                json.dump({"bleu": [4, 3, 2, 1], "rouge": 5, "lang": "de"}, f)
            with open(os.path.join(home, "hyps.jsonl"), "w") as f:
                f.writelines(json.dumps({"name": str(i), "hyp": "ein wort", "ref": "zwei wörter"}) + "\n" for i in "ab")


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """
    A function of arguments: tables.main() with every command noted and none run -> those of train.py as dicts, and
    those of eval.py.
    """
    monkeypatch.chdir(ROOT)
    run = Recorder()
    monkeypatch.setattr(tables, "run", run)

    def call(*args, fails=""):
        run.commands.clear()
        run.fails = fails
        where = [f"out_dir={tmp_path}/out", f"to={tmp_path}/tables"]
        monkeypatch.setattr("sys.argv", ["tables.py", *where, "jobs=1", *args])
        tables.main()
        trained = [dict(a.split("=", 1) for a in c[1:] if "=" in a) | {"configs": [a for a in c[1:] if "=" not in a]}
                   for c in run.commands if c[0] == "train.py"]
        return trained, [c[1] for c in run.commands if c[0] == "eval.py"]

    return call


def test_rows_that_differ_in_sft_alone_share_their_align_run(recorded, tmp_path):
    """Tables 4 and 8: what learns in the second stage, and LoRA's rank, ask for no first stage of their own."""
    trained, scored = recorded("table=4", "setting=paper", "seeds=2")
    stages = [(c["stage"], c["seed"], c["configs"][0]) for c in trained]
    assert sorted(s for s in stages if s[0] == "align") == [
        ("align", str(s), f"config/phoenix14t_{n}.py") for s in (1337, 1338) for n in ("13b", "7b", "7b")
    ]  # the row without an alignment has one of a single step
    assert len([s for s in stages if s[0] == "sft"]) == len(set(scored)) == 14
    for c in trained:
        sft = c["stage"] == "sft"
        assert ("freeze_llm" in c) <= sft and ("train_embeddings" in c) <= sft and c["resume"] == "true"
        if sft:
            size = c["configs"][0].removeprefix("config/phoenix14t_").removesuffix(".py").upper()
            size += ",max_steps=1" * ("train_ltn" in c)
            assert c["init_from"] == f"{tmp_path}/out/phoenix14t/tables/paper/{size}/{c['seed']}/align"
            assert c["run"].endswith(f"/{c['seed']}")
            assert f"ckpt={tmp_path}/out/phoenix14t/{c['run']}/sft" in scored
    learns = {(c.get("freeze_llm"), c.get("train_embeddings")) for c in trained if c["stage"] == "sft"}
    assert learns == {("True", "False"), ("True", None), (None, None)}
    trained, scored = recorded("table=8", "setting=paper", "seeds=2")
    # rank 8 is Table 4's best row, and scored already
    ranks = sorted(c["lora_rank"] for c in trained if c["stage"] == "sft")
    assert ranks == sorted(["4", "16", "32"] * 2) and len(scored) == 6
    assert sum(c["stage"] == "align" for c in trained) == 2  # train.py itself sees that they are done
    assert "5.00" in (tmp_path / "tables/table4.md").read_text()
    assert "± 0.00" in (tmp_path / "tables/tables.md").read_text()


def test_rows_that_differ_before_sft_have_an_align_run_of_their_own(recorded):
    trained, _ = recorded("table=9", "setting=paper")
    for stage in ("align", "sft"):
        assert [c.get("window") for c in trained if c["stage"] == stage] == ["4", None, "12", "16"]
    assert len({c["run"] for c in trained}) == len({c.get("init_from") for c in trained if c["stage"] == "sft"}) == 4
    trained, _ = recorded("table=6", "setting=paper")
    assert [(c["configs"][0], c.get("ltn")) for c in trained if c["stage"] == "align"] == [
        (f"config/{data}_{size}.py", ltn) for size in ("7b", "13b") for data in ("phoenix14t", "csl_daily")
        for ltn in ("False", None)]


def test_a_row_that_fails_loses_no_other(recorded, tmp_path):
    with pytest.raises(BadInput, match="^1 runs failed: lora_rank=16 went wrong"):
        recorded("table=8", "setting=paper", fails="lora_rank=16")
    lines = (tmp_path / "tables/table8.md").read_text().splitlines()
    cells = [line.split("|")[5].strip() for line in lines if line.startswith("| LoRA")]
    assert cells == ["**1.00**", "**1.00**", "failed", "**1.00**"]


def test_the_page_of_the_tables(recorded, tmp_path):
    """All nine between its marks; where a row fails the page stays as it was."""
    page = tmp_path / "page.md"
    page.write_text("\n".join(("before", *tables.MARKS, "after")))
    recorded(f"page={page}", "setting=paper")
    text = page.read_text()
    assert re.findall(r"^## Table (\d)", text, re.M) == list("123456789") and "| window 8 | " in text
    assert text.startswith("before\n") and text.endswith("\nafter")
    with pytest.raises(BadInput, match="runs failed"):
        recorded(f"page={page}", "setting=paper", "table=9", f"out_dir={tmp_path}/again", fails="window=16")
    assert page.read_text() == text


@pytest.mark.long
def test_end_to_end(home, tmp_path, monkeypatch, capsys):
    """
    Two rows that share an align run and one that cannot run: the others are not lost, and a second call runs only that
    one again.
    """
    for stage in ("align", "sft"):
        monkeypatch.setitem(tables.SETTINGS["toy"], stage, ["max_clips=6", "epochs=1", "batch_size=3", "eval_every=-1"])
    monkeypatch.setitem(tables.SETTINGS["toy"], tables.PHOENIX, ["toy", "dataset=toy"])
    monkeypatch.setitem(tables.SETTINGS["toy"], "clips", [])
    monkeypatch.setitem(tables.ROWS, 8, [("eight", "7B", tables.PHOENIX, {}, (1, 2)),
                                         ("four", "7B", tables.PHOENIX, {"lora_rank": 4}, (3, 4)),
                                         ("none", "7B", tables.PHOENIX, {"lora_rank": -1}, (5, 6))])
    where = [f"data_dir={home}/data", f"out_dir={tmp_path}/out", f"to={tmp_path}/tables"]
    monkeypatch.setattr("sys.argv", ["tables.py", "table=8", "seeds=1", *where])
    ran = []

    def run(command, *args, real=tables.run):
        ran.append(command)
        return real(command, *args)

    monkeypatch.setattr(tables, "run", run)
    for again in (False, True):
        ran.clear()
        with pytest.raises(Exception, match="1 runs failed.*lora_rank=-1: must be at least 0"):
            tables.main()
        programs = [c[0] for c in ran if c[0] != "-m"]
        assert programs.count("eval.py") == (0 if again else 2)
        text = (tmp_path / "tables" / "table8.md").read_text()
        assert re.search(r"\| eight \| 1 \| 2 \| \d+\.\d\d \| \*\*\d+\.\d\d\*\* \| hard toy", text)
        assert "| none | 5 | 6 | failed |" in text
    runs = sorted(os.listdir(tmp_path / "out" / "toy" / "tables" / "toy"))
    assert runs == ["7B", "7B,lora_rank=-1", "7B,lora_rank=4"] or runs == ["7B", "7B,lora_rank=4"]
    config = json.load(open(tmp_path / "out/toy/tables/toy/7B,lora_rank=4/1337/sft/config.json"))
    assert config["lora_rank"] == 4 and config["init_from"].endswith("tables/toy/7B/1337/align")
