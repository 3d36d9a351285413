"""
scripts/walkthrough.py on a tiny run, as a program and as a notebook's cells: every assert in it holds, and it ends with
the sentence that eval.py writes.

    python -m pytest tests/test_walkthrough.py
"""
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

from data import Clips
from eval import load_model, translate

WALK = ["-m", "scripts.walkthrough"]


def walk(folder, *command, hide=()):
    """Run python with these arguments in a folder; the packages in `hide` cannot be imported."""
    path = folder / "hidden"
    path.mkdir(exist_ok=True)
    for name in hide:
        (path / f"{name}.py").write_text("raise ImportError")
    places = os.pathsep.join([str(path)] * bool(hide) + [str(ROOT)])
    env = {**os.environ, "PYTHONPATH": places, "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True,
                          encoding="utf-8", timeout=120)


def expected(ckpt, clip, eos_id=None, **how):
    """What eval.py writes, its tokens, and the reference."""
    sllama, tokenizer, cfg = load_model(str(ckpt), device="cpu")
    clips = Clips(cfg, "test")
    if eos_id is not None:
        tokenizer.eos_ids = [eos_id]
    decode, tokens = tokenizer.decode, []
    tokenizer.decode = lambda ids: tokens.extend(ids) or decode(ids)
    sentence = translate(sllama, [clips.features(clip)], tokenizer, warn=False, **how)[0]
    return as_printed(sentence), tokens, clips.rows[clip]["text"]


def as_printed(sentence):
    """
    A model that has learnt little may write any byte, and a carriage return ends a line where a program's output is
    read.
    """
    return sentence.replace("\r\n", "\n").replace("\r", "\n")


def an_ending(run, clip, **how):
    """
    A token that as EOS makes the model end its sentence, whatever little it has learnt: its own EOS if it has learnt
    that, else one of those it writes, from the middle of the sentence back to the first. With that one even the empty
    sentence is an ending.
    """
    _, tokens, _ = expected(run, clip, **how)
    if len(tokens) < how["max_new_tokens"]:
        return load_model(str(run), device="cpu")[1].eos_id
    ends = lambda i: len(expected(run, clip, i, **how)[1]) < how["max_new_tokens"]
    return next(filter(ends, tokens[len(tokens) // 2::-1]))


@pytest.mark.long
def test_program(both_stages):
    how = dict(beam=3, length_penalty=0.5, max_new_tokens=12)
    ckpt = both_stages / "ends"
    shutil.copytree(both_stages / "out/toy/sft/last", ckpt)
    state = json.loads((ckpt / "state.json").read_text())
    state["config"]["eos_id"] = an_ending(both_stages / "out/toy/sft", 1, **how)
    (ckpt / "state.json").write_text(json.dumps(state))
    sentence, _, reference = expected(ckpt, 1, **how)
    done = walk(both_stages, *WALK, f"ckpt={ckpt}", "clip=1", *(f"{k}={v}" for k, v in how.items()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert f"model:     {sentence}\nreference: {reference}\n" in done.stdout and "   done: " in done.stdout
    assert f"this clip     {sentence}\n" in done.stdout
    titles = [line.split(".")[0] for line in done.stdout.splitlines() if line.startswith("## ")]
    assert titles == [f"## {n}" for n in range(11)]  # the prose is printed
    assert "\n. # # # # # # # # # . " in done.stdout  # the band
    pictures = re.findall(r"^\[(.*\.png)\]$", done.stdout, re.M)
    assert len(pictures) == (5 if importlib.util.find_spec("matplotlib") else 0)
    assert all((both_stages / f).exists() for f in pictures)


def cells_of(**changes):
    """The walkthrough's cells, with these values on its page one."""
    source = (ROOT / "scripts" / "walkthrough.py").read_text(encoding="utf-8")
    for name, value in changes.items():
        source, n = re.subn(rf"^{name} = \w+", f"{name} = {value}", source, flags=re.M)
        assert n == 1
    return re.split(r"^# %%(?: \[markdown\])?$", source, flags=re.M)


@pytest.mark.long
def test_cells_without_matplotlib(both_stages):
    """A notebook has no command line and no __file__, its cells share their names, and page one is edited in place."""
    cells = cells_of(max_new_tokens=12)
    (both_stages / "cells.py").write_text(
        f"cells = {cells!r}\nnames = dict(get_ipython=None)\nfor cell in cells:\n    exec(cell, names)\n")
    done = walk(both_stages, "cells.py", "-f", "kernel.json", hide=["matplotlib"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    sentence, _, reference = expected(both_stages / "out/toy/sft", 23 % 4, max_new_tokens=12)
    assert f"model:     {sentence}\nreference: {reference}\n" in done.stdout and "## " not in done.stdout
    assert "█" in done.stdout and ".png" not in done.stdout


def test_a_notebook_beside_it_finds_the_project():
    """VS Code and Jupyter start in the folder of the file."""
    first = next(cell for cell in cells_of() if "import torch" in cell)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", f"exec({first!r}, dict(get_ipython=None))"]
    done = subprocess.run(command, cwd=ROOT / "scripts", env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_nothing_to_walk_through(tmp_path):
    """No checkpoint: one line that names the two commands."""
    done = walk(tmp_path, *WALK)
    assert done.returncode == 1 and not done.stdout
    said = (r"walkthrough.py: out/toy/sft: holds no checkpoint.*; "
            "python train.py stage=align && python train.py stage=sft makes .*")
    assert re.fullmatch(said, done.stderr.strip())
