"""
walkthrough.py on a tiny run, as a program and as a notebook's cells: every assert in it holds, and it ends with the sentence that eval.py writes.

    python -m pytest tests/test_walkthrough.py
"""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

import train
from data import Clips
from eval import load_model, translate
from scripts import toy

ROOT = Path(__file__).resolve().parents[1]
WALK = str(ROOT / "walkthrough.py")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a toy of a few clips in data/ and both stages of a run on it in out/."""
    home = tmp_path_factory.mktemp("home")
    toy.build(str(home / "data"), n_train=8, n_dev=2, n_test=3, text_steps=3, text_batch=8)
    small = ["ltn_dim=32", "ltn_heads=2", "batch_size=4", "epochs=2", "eval_every=-1", "warmup=1"]
    with pytest.MonkeyPatch.context() as patch:
        for stage in ("align", "sft"):
            patch.setattr(sys, "argv", ["train.py", f"stage={stage}", f"data_dir={home}/data", f"out_dir={home}/out", *small])
            train.main()
            if dist.is_initialized():
                dist.destroy_process_group()
    return home


def walk(folder, *command, hide=()):
    """Run python with these arguments in a folder; the packages in `hide` cannot be imported."""
    path = folder / "hidden"
    path.mkdir(exist_ok=True)
    for name in hide:
        (path / f"{name}.py").write_text("raise ImportError")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path)] * bool(hide) + [str(ROOT)]), "MPLBACKEND": "Agg", "PYTHONIOENCODING": "utf-8"}
    return subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8", timeout=120)


def expected(home, clip, **how):
    sllama, tokenizer, cfg = load_model(str(home / "out/toy/sft"), device="cpu")
    clips = Clips(cfg.data_dir, cfg.dataset, cfg.backbone, "test")
    return translate(sllama, [clips.features(clip)], tokenizer, warn=False, **how)[0], clips.rows[clip]["text"]


def test_program_without_matplotlib(home):
    done = walk(home, WALK, "clip=1", "beam=3", "length_penalty=0.5", "max_new_tokens=12", hide=["matplotlib"])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    sentence, reference = expected(home, 1, beam=3, length_penalty=0.5, max_new_tokens=12)
    assert f"model:     {sentence}\nreference: {reference}\n" in done.stdout
    assert f"this clip     {sentence}\n" in done.stdout
    assert [line[:6] for line in done.stdout.splitlines() if line.startswith("## ")] == [f"## {n}. "[:6] for n in range(11)]  # the prose is printed
    assert "█" in done.stdout and not (home / "out/walkthrough").exists()
    assert "\n. # # # # # # # # # . " in done.stdout  # the band


def test_cells(home):
    """A notebook has no command line and no __file__, its cells share their names, and page one is edited in place."""
    source = Path(WALK).read_text(encoding="utf-8").replace("max_new_tokens = 200", "max_new_tokens = 12")
    cells = re.split(r"^# %%(?: \[markdown\])?$", source, flags=re.M)
    (home / "cells.py").write_text(f"cells = {cells!r}\nnames = dict(get_ipython=None)\nfor cell in cells:\n    exec(cell, names)\n")
    done = walk(home, "cells.py", "-f", "kernel.json")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    sentence, reference = expected(home, 23 % 3, max_new_tokens=12)
    assert f"model:     {sentence}\nreference: {reference}\n" in done.stdout and "## " not in done.stdout


def test_pictures(home):
    if not importlib.util.find_spec("matplotlib"):
        pytest.skip("matplotlib is not installed")
    done = walk(home, WALK, "max_new_tokens=3", "to=pictures")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    names = {f.name for f in (home / "pictures").iterdir()}
    assert names == {f"{n}.png" for n in ("1_clip", "2_features", "3_band", "9_look", "9_frames")} and all(f"/{n}]" in done.stdout for n in names)


@pytest.mark.parametrize("stage", ["sft", "align"])
def test_nothing_to_walk_through(home, tmp_path, stage):
    """No checkpoint, or one without a LoRA: one line that names the two commands."""
    ckpt = [] if stage == "sft" else [f"ckpt={home}/out/toy/align"]
    done = walk(tmp_path, WALK, *ckpt)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("walkthrough.py: ") and "python train.py stage=align && python train.py stage=sft" in last
    assert ("holds no checkpoint" if stage == "sft" else "stage=sft;") in last
