"""
What goes wrong on purpose: kills, signals, disks that fail, damaged and hostile files, numbers that are not finite,
too little memory.

    python -m pytest tests/test_faults.py          # a few of each; python -m scripts.faults runs thousands
"""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from eval import load_model
from lib import checkpoint
from lib.checkpoint import Run, find_checkpoint
from lib.files import whole, whole_folder
from lib.program import BadInput, Signals, launch, leave
from model import SLLaMA
from scripts import faults

LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                           reason="a run's processes and memory are read from Linux's /proc")


@pytest.fixture
def run(train_here):
    """A function of (name, *args): an align run without a look at dev, in this process -> its folder."""
    return lambda out, *args: train_here(out, "eval_every=-1", *args) / "align"


@pytest.fixture(scope="module")
def reference(home):
    """
    Both stages of a run that nobody kills, where scripts.faults looks for them; made in this process, which is
    quicker than two starts.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for stage in ("align", "sft"):
            patch.setattr(sys, "argv", ["train.py", *faults.wanted(home, stage, "whole1")])
            train.main()


def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


# ---------------------------------------------------------------------------------------------------------------------
# Kills and signals

@LINUX
@pytest.mark.long
def test_a_killed_run_goes_on_exactly(home, reference):
    """
    SIGKILL at a random moment; many times, in both stages, with two processes and of extraction too:
    python -m scripts.faults.
    """
    what, differs = faults.killed_run(home, "sft", 1, random.Random(4))  # after the second step or so
    print(what)
    assert not differs, (what, differs)


def stop(home, out, number, whom, processes):
    """Signal a run after its second step -> (exit code, output, seconds it took to end)."""
    p = faults.start(home, "train.py", f"out_dir={out}", *SMALL, "eval_every=-1", "epochs=400", processes=processes)
    log = home / out / "toy" / "align" / "log.jsonl"
    faults.wait_for(p, lambda: log.read_bytes().count(b"\n") if log.exists() else 0, 2, random.Random(0))
    began = time.time()
    os.kill(p.pid if whom == "parent" else faults.children(p.pid)[-1], number)
    said = p.communicate(timeout=60)[0]
    return p.returncode, said, time.time() - began


@LINUX
@pytest.mark.long
def test_a_second_writer_is_refused_and_processes_without_their_torchrun_end(home, run):
    """SIGKILL to torchrun alone, as a scheduler sends it: its processes live on, and the run's folder is theirs."""
    p = faults.start(home, "train.py", "out_dir=held", *SMALL, "eval_every=-1", "save_every=-1", "epochs=400",
                     processes=2)
    folder = home / "held" / "toy" / "align"
    steps = lambda: log(folder)[-1]["step"] if (folder / "log.jsonl").exists() and log(folder) else 0
    faults.wait_for(p, steps, 2, random.Random(0))
    below = faults.children(p.pid)
    with pytest.raises(BadInput, match=f"{folder}: is held by process ({'|'.join(map(str, below))}) on "):
        run("held", "resume=true")
    leave()
    for pid in below:
        os.kill(pid, signal.SIGSTOP)  # so that the step in which they can notice it is the next
    before = steps()
    os.kill(p.pid, signal.SIGKILL)
    p.wait()
    for pid in below:
        os.kill(pid, signal.SIGCONT)
    said = p.stdout.read()  # until both have ended
    # whoever comes first; the other may have lost it by then
    assert re.search("^train.py: (process 1: )?torchrun is gone", said, re.M) and "Traceback" not in said, said
    assert not (folder / "last").exists() and steps() <= before + 1
    assert run("held", "resume=true", "epochs=400", "max_steps=1") == folder  # it is free again


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("number, whom", [(signal.SIGINT, "parent"), (signal.SIGTERM, "worker")])
def test_a_signal_to_torchrun_or_one_of_its_processes_stops_all_after_the_same_step(home, number, whom):
    """The exit code is torchrun's own."""
    ended, said, took = stop(home, f"signal{number}{whom}", number, whom, 2)
    assert ended == 1 and took < 30, (took, said)  # after 30 torchrun kills who has not ended
    (line,) = [line for line in said.splitlines() if "stopped by" in line]
    folder = home / f"signal{number}{whom}" / "toy" / "align"
    step = json.load(open(folder / "last" / "state.json"))["step"]
    assert line.startswith(f"train.py: stopped by {signal.Signals(number).name} after step {step}, saved in ")
    assert "to go on: torchrun --nproc_per_node=2 " in line and line.endswith("resume=true")
    assert [e["step"] for e in log(folder)] == [*range(1, step + 1)]
    assert load_file(folder / "last" / "optimizer.safetensors")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step(run, home, monkeypatch, capsys, number):
    def micro_batch(*args, calls=[], real=train.micro_batch):
        # while step 4 is made ready: three have been taken
        calls.append(os.kill(os.getpid(), number) if len(calls) == 3 else 0)
        return real(*args)

    unhurt, real = run(f"unhurt{number}"), train.micro_batch
    with monkeypatch.context() as m, pytest.raises(SystemExit) as stopped:
        m.setattr(train, "micro_batch", micro_batch)
        run(f"stopped{number}")
    folder = home / f"stopped{number}" / "toy" / "align"
    said = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 128 + number and said.endswith(" resume=true")
    assert said.startswith(f"train.py: stopped by {signal.Signals(number).name} after step ")
    assert json.load(open(folder / "last" / "state.json"))["step"] == len(log(folder)) == 3
    capsys.readouterr()
    with monkeypatch.context() as m, pytest.raises(SystemExit):
        m.setattr(train, "micro_batch", lambda *args: os.kill(os.getpid(), number) or real(*args))
        run(f"stopped{number}", "resume=true")
    assert capsys.readouterr().err.splitlines()[-1].count("resume=true") == 1  # one is enough
    assert not faults.same_run(unhurt, run(f"stopped{number}", "resume=true"))


def test_a_second_ctrl_c_ends_at_once_but_not_within_a_second(monkeypatch):
    """A scheduler signals every process, and torchrun passes on what it has got: within a second that is one wish."""
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    asked = Signals()
    for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        os.kill(os.getpid(), number)
    assert len(asked) == 3
    asked[0] = signal.SIGINT, time.time() - 2
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(SystemExit, match="130"):
        os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_while_the_dev_set_is_decoded(run, home, monkeypatch):
    """The step is kept, and the resumed run decodes first: the same log and the same best/ as without the signal."""
    args = ["eval_every=2", "max_steps=5"]
    unhurt = run("unhurt", *args)
    real, calls = train.translate, []
    with monkeypatch.context() as m:
        def translate(*a, **k):
            calls.append(os.kill(os.getpid(), signal.SIGINT) if len(calls) == 1 else 0)  # in the second evaluation
            return real(*a, **k)
        m.setattr(train, "translate", translate)
        with pytest.raises(SystemExit) as stopped:
            run("decoding", *args)
    lines = lambda entries: [(e["step"], "dev_loss" in e) for e in entries]
    taken = [(1, False), (2, False), (2, True), (3, False), (4, False)]
    assert stopped.value.code == 130 and lines(log(home / "decoding" / "toy" / "align")) == taken
    shutil.copytree(home / "decoding", home / "owed")
    owed = log(run("owed", "max_steps=5", "resume=true"))  # eval_every=-1 now: the step that waits for scores has none
    assert lines(owed) == [*taken, (5, False)]
    hurt = run("decoding", *args, "resume=true")
    assert not faults.same_run(unhurt, hurt)


# How dev is looked at; the last look is after step 4, the last. Without decoding best/ goes by dev loss
LOOKS = [["eval_every=4"], ["eval_every=2"], ["eval_every=2", "eval_clips=0"]]


class Killed(BaseException):
    """The end of a process that the tests live in."""


@pytest.fixture
def looked(run):
    """A function of (out, look, more words): four steps with a look at dev after the last -> the run's folder."""
    return lambda out, look, *words: run(out, "max_steps=4", *look, *words)


def stop_in_the_last_look(patch, look):
    """SIGTERM while the dev clips of step 4 are scored: as they are decoded, else as their loss is computed."""
    name, n, calls = "micro_batch" if "eval_clips=0" in look else "translate", 4 // int(look[0][-1]), []

    def scoring(*args, real=getattr(train, name), **more):
        if name == "translate" or args[0].split == "dev":
            calls.append(len(calls) + 1)
            if calls[-1] == n:
                os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **more)

    patch.setattr(train, name, scoring)


def kill_before(patch, moment):
    """After the look at step 4: before its scores are logged, before anything is saved, or before last/ is."""
    def log(self, entry, *sentences, real=Run.log):
        if moment == "log" and entry["step"] == 4 and "dev_loss" in entry:
            raise Killed
        real(self, entry, *sentences)

    def save(self, name, model, optimizer, at, *args, real=Run.save, **more):
        if at.scored == 4 and moment in ("save", name):
            raise Killed
        return real(self, name, model, optimizer, at, *args, **more)

    patch.setattr(Run, "log", log)
    patch.setattr(Run, "save", save)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def is_as_unhurt(folder, unhurt):
    """Each step once in the log, its scores once and behind it, the best of them in last/ and best/, as in unhurt."""
    looks = [e["step"] for e in log(unhurt) if "dev_loss" in e]
    want = [(step, scored) for step in range(1, 5) for scored in (False, True)[:1 + (step in looks)]]
    assert looks[-1] == 4 and [(e["step"], "dev_loss" in e) for e in log(folder)] == want
    scores = [e["dev_bleu"][3] if "dev_bleu" in e else -e["dev_loss"] for e in log(folder) if "dev_loss" in e]
    states = [json.load(open(folder / place / "state.json")) for place in ("last", "best")]
    assert [state["best"] for state in states] == [max(scores)] * 2
    assert (states[0]["step"], states[0]["scored"], states[1]["step"]) == (4, 4, looks[scores.index(max(scores))])
    assert not faults.same_run(unhurt, folder)


def goes_on(looked, monkeypatch, out, look, unhurt):
    """Resumed a run is as one that nobody has hurt; and resumed once more it does nothing."""
    folder = looked(out, look, "resume=true")
    is_as_unhurt(folder, unhurt)
    before = files_of(folder)
    with monkeypatch.context() as m:
        m.setattr(train, "evaluate", lambda *args: pytest.fail("scored again"))
        m.setattr(Run, "save", lambda *args, **more: pytest.fail("saved again"))
        looked(out, look, "resume=true")
    assert files_of(folder) == before


@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
def test_a_stop_while_the_dev_set_is_scored_after_the_last_step(looked, home, monkeypatch, look):
    """Nothing is left to do but the scores: the resumed run owes them, and everything that follows from them."""
    unhurt, folder = looked("whole", look), home / "scoring" / "toy" / "align"
    is_as_unhurt(unhurt, unhurt)
    with monkeypatch.context() as m, pytest.raises(SystemExit, match="143"):
        stop_in_the_last_look(m, look)
        looked("scoring", look)
    state = json.load(open(folder / "last" / "state.json"))
    (*_, line) = log(folder)
    assert state["step"] == line["step"] == 4 > state["scored"] and "loss" in line and "dev_loss" not in line
    goes_on(looked, monkeypatch, "scoring", look, unhurt)


@pytest.mark.parametrize("stopped", [True, False], ids=["of a stopped run", "of a run"])
@pytest.mark.parametrize("look", LOOKS, ids=" ".join)
@pytest.mark.long
def test_a_kill_between_the_scores_and_the_save(looked, home, monkeypatch, look, stopped):
    """Killed and resumed, again and again: before the scores are in the log, before best/, before last/ has them."""
    unhurt, words = looked("whole", look), ["save_every=1"]
    if stopped:
        with monkeypatch.context() as m, pytest.raises(SystemExit):
            stop_in_the_last_look(m, look)
            looked("killed", look)
        words = ["resume=true"]
    for moment in ("log", "save", "last"):
        with monkeypatch.context() as m, pytest.raises(Killed):
            kill_before(m, moment)
            looked("killed", look, *words)
        leave()
        words = ["resume=true"]
        state = json.load(open(home / "killed" / "toy" / "align" / "last" / "state.json"))
        assert state["step"] == 3 + stopped and state["scored"] < 4
    goes_on(looked, monkeypatch, "killed", look, unhurt)


def two_machines(home, *args, second=()):
    """Two torchruns of a process each, which meet at a port. second: arguments of that one. -> [(exit code, said)]"""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}"]
    command = [sys.executable, "-m", "torch.distributed.run", *meet, f"{ROOT}/train.py", *args]
    both = [subprocess.Popen([*command, *more], cwd=home, env=faults.ENV, text=True, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT) for more in ((), second)]
    said = [p.communicate(timeout=240)[0] for p in both]
    return [(p.returncode, text) for p, text in zip(both, said)]


@pytest.mark.long
def test_two_machines(home, run):
    """They train as one process does; where one lacks the data or the checkpoint it says so, and the other ends too."""
    args = [*SMALL, "eval_every=-1", "max_steps=2"]
    lacks = [], ["backbone=absent"], [f"init_from={home}/absent"]
    with ThreadPoolExecutor(3) as pool:  # all at once: much of it is waiting for one another
        pairs = [pool.submit(two_machines, home, f"out_dir=two{n}", *args, second=what) for n, what in enumerate(lacks)]
        well, *ended = (pair.result() for pair in pairs)
    assert [code for code, _ in well] == [0, 0]
    one, two = (log(folder) for folder in (run("one", "max_steps=2"), home / "two0" / "toy" / "align"))
    assert [e["loss"] for e in two] == pytest.approx([e["loss"] for e in one], rel=1e-5)
    for both in ended:
        assert all(code for code, _ in both) and sum("/absent" in said for _, said in both) == 1


@pytest.mark.long
def test_a_dead_process_ends_the_run_with_its_own_error(home):
    """Process 1 finds something wrong in the middle; process 0 must neither wait for it nor speak first."""
    (home / "dies.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import train
from lib.program import BadInput, launch, rank
real = train.micro_batch
def micro_batch(*args, calls=[]):
    calls.append(1)
    if rank() == 1 and len(calls) == 3:
        raise BadInput("clip 00007: is upside down")
    return real(*args)
train.micro_batch = micro_batch
launch(train.main)
""")
    began = time.time()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "dies.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, "out_dir=dead", *SMALL, "eval_every=-1"], cwd=home, env=env,
                          capture_output=True, text=True, timeout=120)
    ours = [line for line in done.stderr.splitlines() if line.startswith("dies.py: ")]
    assert done.returncode and ours == ["dies.py: process 1: clip 00007: is upside down"], done.stderr
    assert time.time() - began < 90


def test_a_process_that_was_told_to_end_does_not_speak_of_a_partner_it_has_lost(monkeypatch, capsys):
    """The partner's end and torchrun's SIGTERM come at the same time, and in either order."""
    def main():
        Signals()
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits for {seconds} s"))
    with pytest.raises(SystemExit, match="1"):
        launch(main)
    assert not capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Saves

@pytest.mark.parametrize("fault, keep", [("kill", 1), (28, 3)])
@pytest.mark.long
def test_a_fault_at_every_call_of_a_save(home, monkeypatch, fault, keep):
    monkeypatch.setattr(checkpoint, "dist", checkpoint.dist)  # faulty_saves puts another in its place
    ended = faults.faulty_saves(home, fault, keep)
    print(f"{len(ended)} saves")
    assert len(ended) > 15 and all(between in (1, 2) and after == 3 for *_, between, after in ended), ended
    assert {between for *_, between, _ in ended} == {1, 2}


def test_a_kill_between_two_renames_does_not_cost_the_older_one(home, monkeypatch):
    monkeypatch.setattr(checkpoint.dist, "all_reduce", lambda t: None)
    place = home / "renamed"
    faults.save(place, 1)
    os.rename(place / "last", place / "last.1")
    monkeypatch.setattr(os, "rename", lambda *a: (_ for _ in ()).throw(OSError(5, "Input/output error")))
    assert not faults.save(place, 2) and faults.saved_step(place) == 1


def test_keep(run):
    folder = run("keep", "save_every=1", "keep=3", "max_steps=5")
    steps = {p.name: json.load(open(p / "state.json"))["step"] for p in folder.iterdir() if p.is_dir()}
    assert steps == {"last": 5, "last.1": 4, "last.2": 3}
    run("keep", "save_every=1", "keep=3", "max_steps=6", "resume=true")
    assert json.load(open(folder / "last.2" / "state.json"))["step"] == 4
    assert find_checkpoint(str(folder / "last.2")).endswith("last.2")


def test_a_full_disk_does_not_stop_the_run_before_its_end(run, home, monkeypatch, capsys):
    real = checkpoint.save_file

    def full(tensors, path, **more):
        if steps[0] <= len(log(home / "disk" / "toy" / "align")) <= steps[1]:
            raise OSError(28, "No space left on device")
        real(tensors, path, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    steps = (2, 3)
    folder = run("disk", "save_every=1", "max_steps=4")
    said = capsys.readouterr().err
    assert said.count("No space left") == 2 and f"{folder}/last: the checkpoint of step 2 could not be written" in said
    assert json.load(open(folder / "last" / "state.json"))["step"] == 4 and not (folder / "last.part").exists()
    assert load_file(folder / "last" / "vision.safetensors")
    steps = (6, 9)
    with pytest.raises(BadInput, match="disk/toy/align/last"):
        run("disk", "save_every=1", "max_steps=6", "resume=true")
    assert json.load(open(folder / "last" / "state.json"))["step"] == 5  # nothing that was saved is lost


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(run, home, monkeypatch, capsys):
    """A small one: while others fill it a save fails and the run goes on; a run that begins then says where."""
    disk, real, steps = home / "small", train.micro_batch, []
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a disk")

    def fill():
        with contextlib.suppress(OSError), open(disk / "others", "wb", 0) as f:
            for _ in range(1000):
                f.write(bytes(10**4))

    def micro_batch(*args):
        steps.append(1)
        if len(steps) == 2:
            fill()
        if len(steps) == 3:
            (disk / "others").unlink()
        return real(*args)

    monkeypatch.setattr(train, "micro_batch", micro_batch)
    try:
        folder = run("small", "save_every=1", "max_steps=3")
        said = capsys.readouterr().err
        assert "the checkpoint of step 2 could not be written (" in said and "the run goes on" in said
        assert json.load(open(folder / "last" / "state.json"))["step"] == 3 and not (folder / "last.part").exists()
        fill()
        with pytest.raises(OSError, match=f"No space left on device: '{folder}/"):
            run("small", "save_every=1", "max_steps=4", "resume=true")
        leave()
        assert load_file(folder / "last" / "vision.safetensors")
        (disk / "others").unlink()
        run("small", "save_every=1", "max_steps=4", "resume=true")
        assert json.load(open(folder / "last" / "state.json"))["step"] == 4
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_folder_that_cannot_be_written_is_noticed_before_the_model_is_loaded(run, home, monkeypatch):
    (home / "file").write_text("")
    monkeypatch.setattr(SLLaMA, "load", lambda *a: pytest.fail("the model was loaded"))
    with pytest.raises(OSError, match="file"):
        run("file")


@pytest.mark.parametrize("umask, mode", [(0o002, 0o664), (0o022, 0o644), (0o077, 0o600)])
def test_files_of_a_folder_follow_the_umask(tmp_path, umask, mode):
    """A group shares a data folder; safetensors would write for the owner alone."""
    before = os.umask(umask)
    try:
        with whole_folder(str(tmp_path / "a")) as part:
            save_file({"x": torch.zeros(2)}, f"{part}/x.safetensors")
            (tmp_path / "a.part" / "state.json").write_text("{}")
    finally:
        os.umask(before)
    assert {f.name: f.stat().st_mode & 0o777 for f in (tmp_path / "a").iterdir()} == {
        "x.safetensors": mode, "state.json": mode}


def test_whole_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with contextlib.suppress(RuntimeError), whole(str(path)) as f:
        f.write("new")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers and memory

def test_steps_that_are_not_finite(run, home, monkeypatch, capsys):
    real = SLLaMA.forward
    bad, calls = {3}, []

    def forward(self, batch):
        calls.append(1)
        loss, n = real(self, batch)
        return (loss * float("nan") if len(calls) in bad else loss), n

    monkeypatch.setattr(SLLaMA, "forward", forward)
    folder = run("nan", "max_steps=5", "max_skips=2")
    said = capsys.readouterr().out
    assert said.count("the step is skipped; its clips: 0") == 1
    assert json.load(open(folder / "last" / "state.json"))["skipped"] == 1
    bad |= {2, 3, 4}
    calls.clear()
    with pytest.raises(BadInput, match=r"max_skips=2 .* clips .* checkpoint of step 2"):
        run("nan2", "max_skips=2", "save_every=1")
    # the first of them was skipped and counted
    assert json.load(open(home / "nan2" / "toy" / "align" / "last" / "state.json"))["step"] == 2


def test_a_run_that_fails_before_it_has_saved(run, home, monkeypatch):
    real = SLLaMA.forward
    monkeypatch.setattr(SLLaMA, "forward", lambda self, batch: (real(self, batch)[0] * float("nan"), 1))
    with pytest.raises(BadInput, match=r"max_skips=2 .* clips .*; there is no checkpoint yet"):
        run("nan3", "max_skips=2")
    assert not (home / "nan3" / "toy" / "align" / "last").exists()


def test_a_run_whose_first_step_was_skipped_goes_on(run, monkeypatch):
    with monkeypatch.context() as m:
        real = SLLaMA.forward
        m.setattr(SLLaMA, "forward", lambda self, batch: (real(self, batch)[0] * float("inf"), 1))
        run("skipped", "max_steps=1")
    folder = run("skipped", "max_steps=2", "resume=true")
    assert [e["step"] for e in log(folder)] == [1, 2] and load_file(folder / "last" / "optimizer.safetensors")


def test_out_of_memory_says_what_lowers_it(run, monkeypatch):
    def forward(self, batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(SLLaMA, "forward", forward)
    said = (r"step 1: out of memory with 6 clips of \d+ frames, \d+ tokens .*grad_accum=.*batch_size=.*"
            "activation_checkpointing=true.*max_frames=")
    with pytest.raises(BadInput, match=said):
        run("memory")


def test_out_of_memory_on_dev_says_what_lowers_it(run, monkeypatch):
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(evaluation, "generate", generate)
    with pytest.raises(BadInput, match=r"decoding: out of memory with \d clips of up to \d+ frames.*eval_every=-1"):
        run("memory", "max_steps=1", "eval_every=1")


@pytest.fixture(scope="module")
def random_llm(home):
    """A LLaMA of 47 million random numbers."""
    sizes = dict(dim=512, n_layers=10, n_heads=8, n_kv_heads=4, head_dim=64, hidden_dim=1408, vocab_size=32000)
    faults.random_llm(home / "random", home / "data" / "toy" / "llm" / "tokenizer.model", **sizes)
    return home / "random"


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("env", [{}, {"MALLOC_MMAP_THRESHOLD_": "131072"}],
                         ids=["as it is", "glibc gives back what is free"])
def test_the_estimate_is_what_a_run_then_holds(home, random_llm, env):
    """Peak of the anonymous memory above the imported program's."""
    said, held = faults.peak(home, f"llm={random_llm}", "max_steps=1", "batch_size=16", "eval_every=-1", **env)
    print(f"estimate {said:.3f} GB, held {held:.3f} GB")
    assert abs(said - held) < 0.15 * held


# ---------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.long
def test_damaged_files(home, reference):
    count, bad = faults.corruptions(home, 48, seed=0)
    print(dict(count))
    assert not bad and count["refused"] > 20 and count.total() == 48


def test_hostile_files(home):
    for what, code, said in faults.hostile(home):
        assert code == 1 and not faults.verdict(code, said) and len(said.strip().splitlines()) == 1, (what, code, said)


@pytest.mark.parametrize("stage, change, word", [
    ("sft", "window=4", "window"), ("sft", "ltn_dim=64", "ltn_dim"), ("sft", "backbone=googlenet", "googlenet"),
    ("align", "lora_rank=4", "lora_rank"), ("align", "adaptor=linear", "adaptor"),
    ("align", "llm={home}/other", "llm=")])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(run, home, stage, change, word):
    if not (home / "fit").exists():
        run("fit", "max_steps=1")
        shutil.copytree(home / "data" / "toy" / "llm", home / "other")
    with pytest.raises(BadInput, match=word):
        run("fit", f"stage={stage}", change.format(home=home), "max_steps=2", *["resume=true"] * (stage == "align"))


def test_a_checkpoint_of_an_unknown_adaptor_is_refused(run):
    """Of the same weights: nothing else in it would tell."""
    last = run("conv", "max_steps=1") / "last"
    state = json.load(open(last / "state.json"))
    for key, value in (("adaptor", "conv"), ("ltn_layers", 10**6), ("window", 2**40), ("window", -1), ("merge", 0),
                       ("dropout", 1.0), ("llm_dropout", -0.5)):  # sizes that no model has, too
        (last / "state.json").write_text(json.dumps(state | {"config": state["config"] | {key: value}}))
        with pytest.raises(BadInput, match=f"{key}={value}"):
            load_model(str(last), "cpu")


@pytest.mark.parametrize("way", ["resume", "init_from", "the align run beside it", "load_model"])
def test_a_checkpoint_of_other_code_is_announced_in_one_line(run, home, capsys, way):
    """A change in code is no variable, so no name refuses it. Where the code is the same, nothing is said."""
    out = f"code-{way[:4]}"
    last = run(out, "max_steps=1") / "last"
    read = {"resume": lambda: run(out, "max_steps=1", "resume=true"),
            "init_from": lambda: run("code-other", "max_steps=1", f"init_from={last}"),
            "the align run beside it": lambda: run(out, "max_steps=1", "stage=sft"),
            "load_model": lambda: load_model(str(last.parent), "cpu")}[way]

    def said():
        capsys.readouterr()
        read()
        return [line for line in capsys.readouterr().err.splitlines() if "other code" in line or ".py" in line]

    assert said() == []
    state = json.load(open(last / "state.json"))
    files = {f"{name}.py" for name in ("train", "eval", "model", "lora", "data")}
    assert state["code"].keys() == files | {f"lib/{path.name}" for path in (ROOT / "lib").glob("*.py")}
    line = f"{last}: was written by other code than this; what differs: "
    without = {name: digest for name, digest in state["code"].items() if name != "lib/tensors.py"}
    for code, what in ((state["code"] | {"model.py": "0" * 12}, "model.py"), (without, "lib/tensors.py"),
                       (without | {"train.py": "", "lib/gone.py": "0" * 12}, "lib/gone.py, lib/tensors.py, train.py")):
        (last / "state.json").write_text(json.dumps(state | {"code": code}))
        assert said() == [line + what]
    if way == "resume":  # what goes on is this code's
        run(out, "max_steps=2", "resume=true")
        assert json.load(open(last / "state.json"))["code"] == state["code"] and said() == []
    del state["code"]  # a checkpoint from before it was noted
    (last / "state.json").write_text(json.dumps(state))
    assert said() == []


def test_another_data_set_under_the_same_name_is_refused(run, home):
    llm = f"llm={home}/data/toy/llm"
    run("moved", "max_steps=1", llm)
    shutil.copytree(home / "data" / "toy", home / "fewer" / "toy")
    lines = open(home / "fewer" / "toy" / "train.jsonl").readlines()
    (home / "fewer" / "toy" / "train.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(BadInput, match="20 clips .* has 19 clips"):
        run("moved", f"data_dir={home}/fewer", llm, "max_steps=2", "resume=true")


def test_features_that_are_not_finite_are_named(run, home):
    shutil.copytree(home / "data" / "toy", home / "nanset" / "toy")
    path = home / "nanset" / "toy" / "toycnn" / "train.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = float("nan")
    save_file(tensors, path)
    with pytest.raises(BadInput, match="train.safetensors: .*not finite"):
        run("nanset", f"data_dir={home}/nanset")
