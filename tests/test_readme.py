"""
What the README says of the code: each of its commands runs, in its order and on next to nothing, and its line counts are right.

    python -m pytest tests/test_readme.py
"""
import ast
import io
import re
import runpy
import shlex
import signal
import sys
import tokenize
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import SMALL
from safetensors.numpy import save_file
from test_data import shades, write_image
from test_readers import make_csl, make_phoenix, make_slt, write_pickle
from test_train import in_processes

import config
from config import configure
from model import GoogLeNet
from scripts.toy import write_mp4
from video import read_video

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [c.strip() for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines() for c in line.split("#")[0].split("&&")]
STAGES = {"train.py": ("align", "sft")}


def lines_of_code(path):
    """Lines that hold code: no blank ones, no comments, no docstrings."""
    source, lines = path.read_text(encoding="utf-8"), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", ["train.py", "model.py", "lora.py", "data.py", "eval.py"])
def test_line_counts(name):
    said = int(re.search(rf"`{re.escape(name)}` \|.*\| (\d+) \|", README)[1])
    assert abs(said - lines_of_code(ROOT / name)) <= 0.03 * said


@pytest.mark.parametrize("command", [c for c in COMMANDS if re.search(r"\b(train|eval|data|lora)\.py", c)])
def test_commands_are_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = shlex.split(command)
    at = next(i for i, w in enumerate(words) if w.endswith(".py"))
    args = [w for w in words[at + 1:] if w not in ("merge", "help")]
    configure(words[at], args, stages=STAGES.get(words[at], ()))

# ---------------------------------------------------------------------------------------------------------------------
# The commands of the README are run, on next to nothing

OTHERS = r"(python3 -m venv|\. \.venv/|pip install|python -m pytest)\b"  # not ours, or this very program
OURS = [c for c in COMMANDS if c and not re.match(OTHERS, c)]
# these two really under torchrun, the others in this process
TORCHRUN = [next((c for c in OURS if re.match(rf"torchrun \S+ {name}", c)), "") for name in ("train.py", "eval.py")]
TRAIN = [*SMALL, "epochs=1"]
RULES = {  # what the command looks like, the first that fits: words that make it short, the file that it leaves, what it says
    r"train\.py help$": ([], "", r"^window = 8 +frames.*paper: 8"),
    r"train\.py .*estimate=true": (TRAIN, "", r"^  in all +\d+\.\d\d GB$"),
    r"train\.py": (TRAIN, "{out_dir}/{dataset}/{run}/{stage}/last/state.json", r"^learns: .* in all"),
    r"eval\.py .*video=": (["max_new_tokens=8"], "", r"\A.*\n\Z"),  # the sentence and nothing else
    r"eval\.py .*against=": ([], "", "95 %"),
    r"eval\.py .*control=": (["max_new_tokens=8"], "", "^CONTROL shuffle "),
    r"eval\.py": (["max_new_tokens=8"], "", "BLEU-4"),
    r"data\.py dataset=mine": ([], "{data_dir}/{dataset}/{backbone}/test.safetensors", "^test "),
    r"data\.py": (["workers=0"], "{data_dir}/{dataset}/{backbone}/test.safetensors", "^test "),
    r"lora\.py merge": ([], "{to}/model.safetensors", "merged in"),
    r"walkthrough\.py": (["max_new_tokens=8"], "", "^reference: "),
    r"scripts\.report": (["clips=2"], "out/toy/sft/report.html", "report.html"),
    r"scripts\.gguf_to_hf": (["file=tiny.gguf"], "{to}/model.safetensors", ""),
}


@pytest.fixture(scope="module")
def there(home):
    """What the README takes for granted, under the names that it uses: a toy (of 28 clips), FOLDER, FEATS, LLAMA, GoogLeNet's weights, clip.mp4."""
    (home / "config").symlink_to(ROOT / "config")
    (home / "LLAMA").symlink_to(home / "data" / "toy" / "llm")
    folder = home / "FOLDER"
    torch.save(GoogLeNet().state_dict(), home / "googlenet-1378be20.pth")

    def clip(number, path):
        """The first eight frames of a clip of the toy, all together one batch for GoogLeNet."""
        write_mp4(str(home / path), read_video(str(home / "data" / "toy" / "clips" / f"{number:05}.mp4"))[:8])

    clip(22, "clip.mp4"), clip(23, "data/toy/clips/01100.mp4")
    # FOLDER is all data sets in one: neccam's pickles, which hold alignments too, PHOENIX-2014T's and CSL-Daily's frames, own clips
    made = make_slt(folder)
    for split, entries in made.items():
        for e in entries:
            e["alignments"] = {f"pami{i}": " ".join("7" * len(e["sign"])) for i in range(3)}
        write_pickle(folder / f"phoenix14t.pami0.{split}", entries)
    features = {split: {e["name"].removeprefix(split + "/"): e["sign"].numpy() for e in entries} for split, entries in made.items()}
    make_phoenix(folder, {split: dict.fromkeys(names, "regen") for split, names in features.items()})
    for image in make_csl(folder).glob("sentence/frames_512x512/*/*.jpg"):
        write_image(image, shades(50)[0])
    for i, split in enumerate(("train", "train", "dev", "test")):
        clip(i, f"FOLDER/{i:05}.mp4")
        with open(folder / "clips.tsv", "a") as f:
            f.write("file\ttext\tsplit\n" * (i == 0) + f"{i:05}.mp4\train is coming\t{split}\n")
    for split, arrays in features.items():
        (home / "FEATS" / split).mkdir(parents=True)
        save_file(arrays, home / "FEATS" / f"{split}.safetensors")
        for name, x in arrays.items():
            np.save(home / "FEATS" / split / f"{name}.npy", x)
    return home


@pytest.fixture(scope="module")
def ran():
    """The commands that have been run."""
    return []


def run(command, home, monkeypatch, capsys):
    """Run a command of the README in this folder; its rule says what must come of it."""
    words = re.sub(r"^(torchrun --nproc_per_node=2|python -m|python) ", "", command)
    rule = next((rule for pattern, rule in RULES.items() if re.match(pattern, words)), None)
    assert rule, f"no rule says how a test can run `{command}`: add one to RULES"
    more, leaves, says = rule
    program, *words = shlex.split(words) + more
    if program == "scripts.gguf_to_hf":
        from test_gguf import tiny_hf, write  # skips where gguf or tokenizers is not installed
        write(home / "tiny.gguf", tiny_hf(vocab_size=261))
    path = ROOT / (program if program.endswith(".py") else program.replace(".", "/") + ".py")
    monkeypatch.chdir(home)
    if command in TORCHRUN:
        said = in_processes(2, home, "", *words, program=path).stdout
    else:
        monkeypatch.setattr(sys, "argv", [str(path), *words])
        monkeypatch.setattr(config, "launch", lambda main: main())  # the real one ends the process with an error
        capsys.readouterr()
        try:
            with torch.enable_grad():  # and as before at the end: walkthrough.py turns gradients off
                runpy.run_path(str(path), run_name="__main__")
        except SystemExit as e:
            assert not e.code, capsys.readouterr().err
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
            if dist.is_initialized():
                dist.destroy_process_group()
        said = capsys.readouterr().out
    assert re.search(says, said, re.M), said
    if leaves:
        cfg = configure(str(path), [w for w in words if w != "merge"], stages=STAGES.get(program, ()))
        assert (home / leaves.format(**vars(cfg))).exists()


@pytest.mark.filterwarnings("ignore:__array__")  # what matplotlib says of tensors
@pytest.mark.parametrize("number", range(len(OURS)), ids=OURS)
def test_commands_run(number, there, ran, monkeypatch, capsys):
    """Those that stand before it and were left out (-k, -m) are run first: most need what the earlier ones have made."""
    while len(ran) <= number:
        ran.append(OURS[len(ran)])
        try:
            run(ran[-1], there, monkeypatch, capsys)
        except pytest.skip.Exception:
            if len(ran) == number + 1:
                raise
