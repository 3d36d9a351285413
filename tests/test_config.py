"""
The key=value rule on a small program, on every file in config/ and on every program's command line.

    python -m pytest tests/test_config.py
"""
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from config import BadInput, configure, read_literals

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = {"train.py": ["train.py"], "eval.py": ["eval.py"], "data.py": ["data.py"], "lora.py": ["lora.py"], "scripts/toy.py": ["-m", "scripts.toy"]}

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
    return lambda *args: vars(configure(str(program), [str(a) for a in args], {"mode": ("fast", "slow"), "stage": ("one", "two")}, ("one", "two")))


@pytest.fixture
def file(tmp_path):
    """Lines -> path of a config file that holds them."""
    def write(source, name="settings.py"):
        path = tmp_path / name
        path.write_bytes(source if isinstance(source, bytes) else source.encode())
        return path
    return write


def refused(capsys, call, *args):
    """The one line on stderr of a command line that ends with exit code 2."""
    with pytest.raises(SystemExit) as e:
        call(*args)
    out, err = capsys.readouterr()
    assert e.value.code == 2 and not out
    assert err.count("\n") == 1 and err.endswith("\n") and err.startswith("program.py: ")
    return err


# ---- values

def test_defaults(call):
    assert call() == {"stage": "one", "mode": "fast", "rate": 0.5, "count": 3, "flag": False, "text": "hello", "lr": 1e-3, "epochs": 10}


@pytest.mark.parametrize("arg, key, value", [
    ("rate=1", "rate", 1.0), ("rate=1e-4", "rate", 1e-4), ("rate=-2", "rate", -2.0),
    ("count=1e3", "count", 1000), ("count=4", "count", 4), ("count=4.0", "count", 4), ("count=-1", "count", -1),
    ("flag=true", "flag", True), ("flag=True", "flag", True), ("flag=1", "flag", True), ("flag=false", "flag", False), ("flag=0", "flag", False),
    ("text=", "text", ""), ("text=b=c", "text", "b=c"), ("text=1", "text", "1"), ("text=true", "text", "true"), ("text=x.py", "text", "x.py"),
    ("text=a, b = 'c'", "text", "a, b = 'c'"), ("--count=4", "count", 4), ("--text=--x", "text", "--x"), ("mode=slow", "mode", "slow"),
    ("lr=1", "lr", 1.0)])
def test_takes_the_defaults_type(call, arg, key, value):
    got = call(arg)[key]
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize("arg, key", [
    ("count=1.5", "count"), ("count=many", "count"), ("count=", "count"), ("count=nan", "count"), ("count=inf", "count"), ("count=1e999", "count"),
    ("rate=fast", "rate"), ("rate=nan", "rate"), ("rate=inf", "rate"), ("rate=-inf", "rate"), ("rate=true", "rate"),
    ("flag=yes", "flag"), ("flag=2", "flag"), ("flag=", "flag"), ("mode=slo", "mode"), ("stage=three", "stage"), ("epochs=x", "epochs")])
def test_bad_value_names_the_variable(call, capsys, arg, key):
    assert f"{key}: " in refused(capsys, call, arg)


def test_choices_are_listed(call, capsys):
    assert "fast, slow" in refused(capsys, call, "mode=slo")


@pytest.mark.parametrize("arg, near", [("conut=3", "count"), ("Rate=1", "rate"), ("--txt=a", "text"), ("epoch=3", "epochs")])
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
    "import os", "print(1)", "count = int(4)", "for i in (1, 2): count = i", "if True: count = 4", "count += 1", "count: int = 4", "count = rate = 4", "count, rate = 4, 1",
    "def f(): pass", "count = 4 if True else 5", "text = f'{1}'", "text = text", "one['lr'] = 1", "one = dict(lr=1)", "two = {[]: 1}", "del count", "(lambda: 0)()"])
def test_config_file_is_read_not_executed(call, file, tmp_path, line):
    made = tmp_path / "made"
    with pytest.raises(BadInput) as e:
        call(file(f"count = 4\n{line}\nrate = [open({str(made)!r}, 'w')][0]\n"))
    assert "settings.py:2: " in str(e.value) and "\n" not in str(e.value)
    assert not made.exists()


@pytest.mark.parametrize("source, says", [("count = 4\nrate = = 1\n", "line 2"), (b"text = '\xff'\n", "settings.py"), (b"text = '\0'\n", "settings.py")])
def test_config_file_that_is_no_python(call, file, source, says):
    with pytest.raises(BadInput) as e:
        call(file(source))
    assert "settings.py" in str(e.value) and says in str(e.value)


def test_config_file_that_is_absent(call, tmp_path):
    with pytest.raises(BadInput, match="absent.py"):
        call(tmp_path / "absent.py")


@pytest.mark.parametrize("source, says", [
    ("conut = 4", "did you mean count"), ("count = 1.5", "count: "), ("count = True", "count: "), ("text = 4", "text: "), ("rate = '1x'", "rate: "), ("count = None", "count: "),
    ("flag = 'perhaps'", "flag: "), ("mode = 'slo'", "mode: "), ("LIMIT = 4", "LIMIT"), ("two = {'epcohs': 4}", "two: unknown variable epcohs, did you mean epochs"),
    ("two = {'epochs': 'x'}", "two: epochs: "), ("two = 4", "two: "), ("two = {1: 4}", "two: "), ("count = {}", "count: ")])
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
    for key, value, comment in (("count", "4", "an int"), ("rate", "2.0", "a float"), ("text", "'hello'", 'a text, with a "#" in its comment'), ("epochs", "10", "(paper: 3)")):
        assert lines[key].startswith(f"{key} = {value} ") and lines[key].endswith(" " + comment)


def test_help_shows_the_chosen_stages_values_and_comments(call, capsys):
    with pytest.raises(SystemExit):
        call("--help", "stage=two")
    out = capsys.readouterr().out
    assert "epochs = 5 " in out and "(paper: 2)" in out and "(paper: 3)" not in out
    assert "lr = 0.0001 " in out


# ---- the real files and programs

CONFIGS = sorted(p.name for p in (ROOT / "config").glob("*.py") if p.name != "__init__.py")


@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_file_fits_train(name, stage, capsys):
    path = ROOT / "config" / name
    cfg = vars(configure(str(ROOT / "train.py"), [str(path), f"stage={stage}"], stages=("align", "sft")))
    assert cfg["stage"] == stage
    said = {k: v for k, (v, _) in read_literals(str(path), strict=True).items()}
    for key, value in ({k: v for k, v in said.items() if k not in ("align", "sft")} | said.get(stage, {})).items():
        assert cfg[key] == value, key
    assert not capsys.readouterr().err  # no line of it is without effect


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_help(name):
    """It ends well, has nothing to say on stderr but what Python was told to, and waits for no package that it does not need."""
    done = subprocess.run([sys.executable, "-X", "importtime", *PROGRAMS[name], "help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
    beside = done.stderr.splitlines()
    assert done.returncode == 0 and all(line.startswith("import time:") for line in beside), done.stderr
    imported = {line.rpartition("|")[2].strip() for line in beside}
    assert "torch" in imported
    if name in ("train.py", "eval.py", "data.py"):
        assert not imported & {"av", "sacrebleu", "sentencepiece", "tokenizers", "transformers", "torchvision", "timm"}
    stages = ("align", "sft") if name == "train.py" else ()
    page = read_literals(str(ROOT / name))
    for key in [k for k in page if k not in stages] + [k for s in stages for k in page[s][0]]:
        (line,) = [li for li in done.stdout.splitlines() if li.startswith(key + " = ")]
        if key not in ("train_ltn", "freeze_llm", "lr"):
            assert line.split(" = ", 1)[1].strip()


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_unknown_key(name, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", [name, "xyzzy=1"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / name), run_name="__main__")
    out, err = capfd.readouterr()
    assert stop.value.code == 2 and not out
    assert err.count("\n") == 1 and err.startswith(Path(name).name + ": ") and "xyzzy" in err
