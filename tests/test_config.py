"""
The key=value rule on a small program, on every file in config/ and on every program's command line.

    python -m pytest tests/test_config.py
"""
import errno
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lib.configurator import configure, read_literals
from lib.files import whole
from lib.program import BadInput, Pace, Progress, launch, rank, world

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {name: [name] for name in ("train.py", "eval.py", "data.py", "lora.py")}
PROGRAMS |= {f"scripts/{name}.py": ["-m", f"scripts.{name}"] for name in ("toy", "small_llm")}

PAGE = '''"""
A program that does nothing.
"""
import math

stage = "one"  # which of the two
mode = "fast"  # fast or slow
rate = 0.5  # a float
count = 3  # an int
flag = False  # a bool
text = "hello"  # a text, with a "#" in its comment
most = -1  # a number, -1 = any
LIMIT = 7  # no variable
computed = math.pi  # no literal
one = {
    "lr": 1e-3,  # peak
    "epochs": 10,  # (paper: 3)
}
two = {
    "lr": 1e-4,
    "epochs": 5,  # (paper: 2)
}
'''


@pytest.fixture
def call(tmp_path):
    """Arguments -> configuration of the small program, as a dict."""
    program = tmp_path / "program.py"
    program.write_text(PAGE)
    choices = {"mode": ("fast", "slow"), "stage": ("one", "two")}

    def call(*args, **ranges):
        return vars(configure(str(program), [str(a) for a in args], choices, stages=("one", "two"), **ranges))
    return call


@pytest.fixture
def file(tmp_path):
    """Lines -> path of a config file that holds them."""
    def write(source, name="settings.py"):
        path = tmp_path / name
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
        return path
    return write


def refused(capsys, call, *args, **ranges):
    """The one line on stderr of a command line that ends with exit code 2."""
    with pytest.raises(SystemExit) as e:
        call(*args, **ranges)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("program.py: ")
    return err


# ---- values

def test_defaults(call):
    assert call() == {"stage": "one", "mode": "fast", "rate": 0.5, "count": 3, "flag": False, "text": "hello",
                      "most": -1, "lr": 1e-3, "epochs": 10}


@pytest.mark.parametrize("arg, key, value", [
    ("rate=1", "rate", 1.0), ("rate=1e-4", "rate", 1e-4), ("rate=-1", "rate", -1.0),
    ("count=1e3", "count", 1000), ("count=4", "count", 4), ("count=4.0", "count", 4), ("count=-1", "count", -1),
    ("flag=true", "flag", True), ("flag=True", "flag", True), ("flag=1", "flag", True), ("flag=false", "flag", False),
    ("flag=0", "flag", False), ("text=", "text", ""), ("text=b=c", "text", "b=c"), ("text=1", "text", "1"),
    ("text=true", "text", "true"), ("text=x.py", "text", "x.py"), ("text=a, b = 'c'", "text", "a, b = 'c'"),
    ("text=-2", "text", "-2"), ("--count=4", "count", 4), ("--text=--x", "text", "--x"), ("mode=slow", "mode", "slow"),
    ("lr=1", "lr", 1.0)])
def test_takes_the_defaults_type(call, arg, key, value):
    got = call(arg, minus_one=("rate", "count"))[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("ranges, key, least, below", [
    ({}, "count", 0, -1), ({}, "rate", 0.0, -1e-9), ({}, "lr", 0.0, -1.0),  # a number is not negative ...
    ({}, "most", -1, -2), ({"minus_one": ["count"]}, "count", -1, -2),  # ... but where -1 says never, or all
    ({"positive": ["count"]}, "count", 1, 0), ({"positive": ["epochs"]}, "epochs", 1, 0)])
def test_the_least_that_a_number_may_be(call, file, capsys, ranges, key, least, below):
    """On the command line and in a file, whose value the command line may overrule."""
    settings = file(f"one = {{{key!r}: {below}}}")
    for where in (f"{key}={below}", settings):
        said = refused(capsys, call, where, **ranges)
        assert said == f"program.py: {key}={below}: must be at least {least:g}\n"
        assert call(where, f"{key}={least}", **ranges)[key] == least


def test_a_share_is_less_than_1(call, capsys):
    for value in (0, 0.5, 0.999):
        assert call(f"rate={value}", shares=["rate"])["rate"] == value
    for value in (1.0, 2.0, -0.1):
        said = refused(capsys, call, f"rate={value}", shares=["rate"])
        assert f"rate={value}: must be at least 0 and less than 1\n" in said


def test_help_is_said_whatever_the_numbers_are(call, capsys):
    with pytest.raises(SystemExit) as e:
        call("help", "count=-5")
    assert e.value.code == 0 and "count = -5 " in capsys.readouterr().out


@pytest.mark.parametrize("arg, key", [
    ("count=-1.5", "count"), ("count=1.5", "count"), ("count=many", "count"), ("count=", "count"),
    ("count=nan", "count"), ("count=inf", "count"), ("count=1e999", "count"), ("rate=fast", "rate"),
    ("rate=nan", "rate"), ("rate=inf", "rate"), ("rate=-inf", "rate"), ("rate=true", "rate"),
    ("flag=yes", "flag"), ("flag=2", "flag"), ("flag=", "flag"), ("mode=slo", "mode"), ("stage=three", "stage"),
    ("epochs=x", "epochs")])
def test_bad_value_names_the_variable(call, capsys, arg, key):
    assert f"{key}: " in refused(capsys, call, arg)


def test_choices_are_listed(call, capsys):
    assert "fast, slow" in refused(capsys, call, "mode=slo")


@pytest.mark.parametrize("arg, near", [("conut=3", "count"), ("Rate=1", "rate"), ("--txt=a", "text"),
                                       ("epoch=3", "epochs")])
def test_unknown_key_names_the_nearest(call, capsys, arg, near):
    err = refused(capsys, call, arg)
    assert arg.removeprefix("--").split("=")[0] in err and f"did you mean {near}" in err


@pytest.mark.parametrize("arg", ["xyzzy=1", "LIMIT=1", "computed=1", "one=1", "=1", "word", "--flag", ""])
def test_other_words_are_refused(call, capsys, arg):
    refused(capsys, call, arg)


def test_version(call, capsys):
    with pytest.raises(SystemExit) as end:
        call("count=3", "--version")
    assert end.value.code == 0 and re.fullmatch(r"SL-LLaMA \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_words_of_another_process_are_said_once(call, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")  # under torchrun the first process speaks for all
    with pytest.raises(SystemExit):
        call("conut=3")
    assert capsys.readouterr().err == ""


# ---- config files, stages and their order

def test_order(call, file, capsys):
    settings = file('"""A setting."""\nrate = 1\ncount = 4  # ours\ntwo = {"lr": 2, "epochs": 7}\n')
    assert call(settings) == call() | {"rate": 1.0, "count": 4}  # stage two's dict does not touch stage one
    two = call(settings, "stage=two")
    assert (two["rate"], two["count"], two["lr"], two["epochs"]) == (1.0, 4, 2.0, 7) and type(two["lr"]) is float
    assert call("count=5", settings)["count"] == 5  # wherever it stands, the command line wins
    assert call(settings, "stage=two", "epochs=9")["epochs"] == 9
    assert call(settings, file("count = 6", "more.py"))["count"] == 6  # of two files the later
    assert call(file('stage = "two"'))["epochs"] == 5
    assert not capsys.readouterr().err


def test_stage_dict_wins_over_a_files_own_line_and_says_so(call, file, capsys):
    settings = file("epochs = 99")
    assert call(settings)["epochs"] == 10
    assert "settings.py: epochs = 99 gives way" in capsys.readouterr().err
    assert call(settings, "epochs=98")["epochs"] == 98
    assert not capsys.readouterr().err


@pytest.mark.parametrize("line", [
    "import os", "print(1)", "count = int(4)", "for i in (1, 2): count = i", "if True: count = 4", "count += 1",
    "count: int = 4", "count = rate = 4", "count, rate = 4, 1", "def f(): pass", "count = 4 if True else 5",
    "text = f'{1}'", "text = text", "one['lr'] = 1", "one = dict(lr=1)", "two = {[]: 1}", "del count", "(lambda: 0)()"])
def test_config_file_is_read_not_executed(call, file, tmp_path, line):
    made = tmp_path / "made"
    with pytest.raises(BadInput) as e:
        call(file(f"count = 4\n{line}\nrate = [open({str(made)!r}, 'w')][0]\n"))
    assert "settings.py:2: " in str(e.value) and "\n" not in str(e.value)
    assert not made.exists()


@pytest.mark.parametrize("source, says", [("count = 4\nrate = = 1\n", "line 2"), (b"text = '\xff'\n", "settings.py"),
                                          (b"text = '\0'\n", "settings.py")])
def test_config_file_that_is_no_python(call, file, source, says):
    with pytest.raises(BadInput) as e:
        call(file(source))
    assert "settings.py" in str(e.value) and says in str(e.value)


def test_config_file_that_is_absent(call, tmp_path):
    with pytest.raises(BadInput, match="absent.py"):
        call(tmp_path / "absent.py")


@pytest.mark.parametrize("source, says", [
    ("conut = 4", "did you mean count"), ("count = 1.5", "count: "), ("count = True", "count: "),
    ("text = 4", "text: "), ("rate = '1x'", "rate: "), ("count = None", "count: "), ("flag = 'perhaps'", "flag: "),
    ("mode = 'slo'", "mode: "), ("LIMIT = 4", "LIMIT"), ("two = 4", "two: "), ("two = {1: 4}", "two: "),
    ("two = {'epcohs': 4}", "two: unknown variable epcohs, did you mean epochs"),
    ("two = {'epochs': 'x'}", "two: epochs: "), ("count = {}", "count: ")])
def test_config_files_values_are_checked(call, capsys, file, source, says):
    err = refused(capsys, call, file(source))
    assert "settings.py: " in err and says in err


# ---- help

def test_help(call, file, capsys):
    with pytest.raises(SystemExit) as e:
        call("help", file("count = 4"), "rate=2")
    out, err = capsys.readouterr()
    assert e.value.code == 0 and not err
    assert out.startswith("A program that does nothing.")
    lines = {line.split(" = ")[0]: line for line in out.splitlines() if " = " in line}
    assert lines.keys() == call().keys()
    for key, value, comment in (("count", "4", "an int"), ("rate", "2.0", "a float"), ("epochs", "10", "(paper: 3)"),
                                ("text", "'hello'", 'a text, with a "#" in its comment')):
        assert lines[key].startswith(f"{key} = {value} ") and lines[key].endswith(" " + comment)


def test_help_shows_the_chosen_stages_values_and_comments(call, capsys):
    with pytest.raises(SystemExit):
        call("--help", "stage=two")
    out = capsys.readouterr().out
    assert "epochs = 5 " in out and "(paper: 2)" in out and "(paper: 3)" not in out
    assert "lr = 0.0001 " in out


# ---- the real files and programs

CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py"))


@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_fits_train(name, stage, capsys):
    path = ROOT / "config" / name
    args = [str(path), f"stage={stage}"]
    cfg = vars(configure(str(ROOT / "train.py"), args, stages=("align", "sft")))
    assert cfg["stage"] == stage
    said = {k: v for k, (v, _) in read_literals(str(path), strict=True).items()}
    for key, value in ({k: v for k, v in said.items() if k not in ("align", "sft")} | said.get(stage, {})).items():
        assert cfg[key] == value, key
    assert not capsys.readouterr().err  # no line of it is without effect


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.long
def test_programs_help(name):
    """
    It ends well, has nothing to say on stderr but what Python was told to, and waits for no package that it does not
    need.
    """
    done = subprocess.run([sys.executable, "-X", "importtime", *PROGRAMS[name], "help"], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    beside = done.stderr.splitlines()
    assert done.returncode == 0 and all(line.startswith("import time:") for line in beside), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in beside}
    assert "torch" in imported
    if name in ("train.py", "eval.py", "data.py"):
        assert not imported & {"av", "sacrebleu", "sentencepiece", "tokenizers", "transformers", "torchvision", "timm"}
    stages = ("align", "sft") if name == "train.py" else ()
    page = read_literals(str(ROOT / name))
    comments = {k: word for k, (_, word) in page.items() if k not in stages}
    comments |= {k: word for s in stages[:1] for k, word in page[s][1].items()}
    for key in [k for k in page if k not in stages] + [k for s in stages for k in page[s][0]]:
        (line,) = [li for li in done.stdout.splitlines() if li.startswith(key + " = ")]
        assert line.endswith(comments[key]) and comments[key], key


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_unknown_key(name, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [name, "xyzzy=1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith(Path(name).name + ": ") and "xyzzy" in err


@pytest.mark.parametrize("name", ["phoenix14t", "csl_daily"])
def test_the_large_setting_is_the_small_one_with_another_llm(name):
    """
    The paper's 13B rows differ from its 7B rows in the LLM alone; checkpointing changes the memory and not the
    numbers.
    """
    small, large = (
        {k: v for k, (v, _) in read_literals(str(ROOT / "config" / f"{name}_{size}.py"), strict=True).items()}
        for size in ("7b", "13b"))
    assert large == small | {"llm": "weights/llama-2-13b", "activation_checkpointing": True}
    assert small["llm"] == "weights/llama-2-7b"
    assert (small["dataset"], small["language"]) == (name, {"phoenix14t": "German", "csl_daily": "Chinese"}[name])


# ---- files in full or not at all

@pytest.fixture
def disk(monkeypatch):
    """What reaches the disk, in order: ("sync", path, bytes) and ("rename", from, to)."""
    done, fsync, replace = [], os.fsync, os.replace
    synced = lambda f: done.append(("sync", os.readlink(f"/proc/self/fd/{f}"), os.fstat(f).st_size)) or fsync(f)
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append(("rename", a, b)) or replace(a, b))
    return done


def test_a_file_outlives_a_power_cut(tmp_path, disk):
    """All its bytes are on the disk before it takes its name, and the name is on the disk before anybody goes on."""
    path = str(tmp_path / "a.txt")
    with whole(path) as f:
        f.write("für alle")
        assert not os.path.exists(path)  # nobody sees half a file
    part = path + ".part"
    assert [d[:2] for d in disk] == [("sync", part), ("rename", part), ("sync", str(tmp_path))]
    assert disk[0][2] == len("für alle".encode()) and disk[1][2] == path
    assert open(path, encoding="utf-8").read() == "für alle" and os.listdir(tmp_path) == ["a.txt"]


def test_a_file_in_the_working_folder(tmp_path, disk, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with whole("a.bin", "wb") as f:
        f.write(b"\xff")
    assert (tmp_path / "a.bin").read_bytes() == b"\xff" and disk[-1][:2] == ("sync", str(tmp_path))


@pytest.mark.parametrize("trouble", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, trouble):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(trouble)), whole(str(path)) as f:
        f.write("new")
        raise trouble
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]  # and a full disk has its room back


# ---- what a program says while it runs, and how it ends

class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand: clock[0] = seconds."""
    now = [1000.0]
    monkeypatch.setattr(time, "time", lambda: now[0])
    return now


def test_progress_in_a_log_file(clock, capsys):
    """A line every ten seconds, with rate and time left by rule of three; the last one whenever it comes."""
    show = Progress("features", 40)
    for at, done in ((1009, 9), (1010, 10), (1015, 15), (1019.9, 19), (1020, 20), (1021, 40)):
        clock[0] = at
        show(done)
    assert capsys.readouterr().err.splitlines() == [
        "features: 10/40, 1.00 clips/s, 30 s left",
        "features: 20/40, 1.00 clips/s, 20 s left",
        "features: 40/40, 1.90 clips/s, 0 s left",
    ]
    show = Progress("epoch", 2.0)
    clock[0] += 20
    show(0.5, 5000, "tokens")
    show(2.0, 250, "tokens")
    show(0)
    assert capsys.readouterr().err.splitlines() == [
        "epoch: 0.50/2.00, 250 tokens/s, 60 s left",
        "epoch: 2.00/2.00, 12 tokens/s, 0 s left",
    ]


def test_progress_of_nothing_yet(clock, capsys):
    show = Progress("clips", 3)
    clock[0] += 10
    show(0)
    assert capsys.readouterr().err == "clips: 0/3, 0.00 clips/s, 30 s left\n"


def test_progress_on_a_terminal(clock, monkeypatch):
    """One line that is written over, five times a second at most, and only its end ends it."""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    show = Progress("clips", 4)
    for at, done in ((1000.1, 1), (1000.25, 2), (1000.4, 3), (1002, 4)):
        clock[0] = at
        show(done)
    first, second = screen.getvalue().split("\r")[1:]
    assert first == "clips: 2/4, 8.00 clips/s, 0 s left".ljust(78)
    assert second == "clips: 4/4, 2.00 clips/s, 0 s left".ljust(78) + "\n"


def test_the_pace_is_that_since_the_last_line():
    pace = Pace()
    for seconds, tokens in ((2.0, 100), (4.0, 500)):
        pace.append((seconds, tokens))
    assert pace.so_far() == {"tokens_per_s": 100, "step_s": 3.0}
    pace.append((0.5, 10))
    assert pace.so_far() == {"tokens_per_s": 20, "step_s": 0.5}


def test_the_pace_says_what_a_gpu_has_held(monkeypatch):
    pace = Pace([(0.5, 10)])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 15_934_000_000)
    assert pace.so_far() == {"tokens_per_s": 20, "step_s": 0.5, "gpu_gb": 15.93}


def test_progress_of_another_process_is_silent(clock, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    Progress("clips", 1)(1)
    assert capsys.readouterr().err == ""


class End(BaseException):
    """os._exit, as far as a test can bear it."""


@pytest.fixture
def ends(monkeypatch, capsys):
    """A function of what main() does and of the environment -> (exit code or None, lines on stderr, seconds slept)."""
    slept = []

    def leave(code):
        raise End(code)

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(sys, "argv", ["/somewhere/train.py"])

    def call(what, **env):
        def main():
            if what:
                raise what

        slept.clear()
        with monkeypatch.context() as m:
            for key, value in env.items():
                m.setenv(key, value)
            try:
                launch(main)
                code = None
            except End as e:
                code = e.args[0]
        return code, capsys.readouterr().err.splitlines(), sum(slept)

    return call


def test_how_a_program_ends(ends):
    """
    What the user can mend is one line; a mistake of ours has its traceback before the line; each with the exit code
    that shells expect.
    """
    assert ends(None) == (None, [], 0)
    assert ends(BadInput("llm=x: is\nabsent")) == (1, ["train.py: llm=x: is absent"], 0)
    code, (line,), _ = ends(FileNotFoundError(2, "No such file or directory", "x.txt"))
    assert code == 1 and line == "train.py: [Errno 2] No such file or directory: 'x.txt'"
    assert ends(KeyboardInterrupt()) == (130, ["train.py: interrupted; what was saved is there"], 0)
    for mistake, said in ((KeyError("lr"), "train.py: KeyError: 'lr'"),
                          (RuntimeError("Connection refused"), "train.py: RuntimeError: Connection refused")):
        code, lines, slept = ends(mistake)
        assert code == 1 and lines[0].startswith("Traceback") and lines[-1] == said and not slept
    with pytest.raises(SystemExit):
        ends(SystemExit(2))


def test_how_a_program_ends_under_torchrun(ends):
    """The process that went wrong speaks first; one that merely lost it waits for that, and says so."""
    assert ends(None, RANK="0") == (0, [], 0)
    assert ends(BadInput("x"), RANK="0") == (1, ["train.py: x"], 0)
    assert ends(BadInput("x"), RANK="1") == (1, ["train.py: process 1: x"], 2)
    for said in ("Connection closed by peer", "Broken pipe", "NCCL error", "Connection reset"):
        line = f"train.py: lost the other processes, their error is the one that counts ({said})"
        assert ends(RuntimeError(said), RANK="0") == (1, [line], 10)
    code, lines, slept = ends(ValueError("peer"), RANK="2")  # a mistake of its own
    assert code == 1 and lines[0].startswith("Traceback") and slept == 2
    assert lines[-1] == "train.py: process 2: ValueError: peer"
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # torchrun ends the others with it


def test_rank_and_world(monkeypatch):
    for key in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(key, raising=False)
    assert (rank(), world()) == (0, 1)
    monkeypatch.setenv("RANK", "3"), monkeypatch.setenv("WORLD_SIZE", "4")
    assert (rank(), world()) == (3, 4)


# ---- more of the key=value rule

def test_words_for_true_and_false_in_a_file(call, file):
    assert call(file("flag = 1\ncount = 4.0\nrate = 2"))["flag"] is True
    assert call(file("flag = 'FALSE'"))["flag"] is False
    assert type(call(file("count = 4.0"))["count"]) is int and type(call(file("rate = 2"))["rate"]) is float


def test_a_stage_dict_is_not_heard_where_it_changes_nothing(call, file, capsys):
    """
    A file's own line that says what its stage says anyway is no surprise; nor is one that the command line overrules.
    """
    assert call(file("epochs = 10"))["epochs"] == 10
    assert call(file("lr = 7\none = {'lr': 7}"))["lr"] == 7
    assert call("lr=3", file("lr = 7"))["lr"] == 3
    assert capsys.readouterr().err == ""
    assert call(file("epochs = 99\nstage = 'two'"))["epochs"] == 5
    assert capsys.readouterr().err == f"{file('')}: epochs = 99 gives way to two's 5; write it into two = {{...}}\n"


def test_only_names_that_are_near_are_named(call, capsys):
    assert "did you mean" not in (said := refused(capsys, call, "xyzzy=1")) and "`program.py help` lists them" in said
