"""
Puts mistakes into the code, one at a time, as a tired hand would make them, and counts how many the tests notice.

    python -m scripts.mutants                               # 150 mistakes, drawn by the seed over the core files
    python -m scripts.mutants mistakes=0 listed=tests/mistakes.jsonl    # those that hands have made
    python -m scripts.mutants mistakes=0 listed=mutants.jsonl           # the survivors of an earlier report again

The tests run once under coverage, so that it is known which of them meet which line. Each mistake then goes into a copy
of the tree, and the tests that meet it run there, the quick ones first, until one fails. They run in a forked process,
since importing torch anew would take longer than most tests.
What survives is either a hole in the tests or no mistake (a buffer's size, a hint for speed): somebody has to look.
Needs tests/requirements.txt and the package pytest-cov.
"""
import ast
import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from itertools import accumulate
from pathlib import Path

from lib.configurator import configure
from lib.files import read_jsonl
from lib.program import BadInput, Progress, launch

mistakes = 150  # to draw
seed = 0  # of the draw
files = "train.py,model.py,lora.py,data.py,eval.py"  # where they go; lib = all of lib/
tests = "tests"  # which tests may notice them
listed = ""  # a file of {"file", "old", "new"} lines, tried first; of a report the survivors alone
seconds = 90  # of tests that a mistake may meet before it counts as a survivor
processes = 2  # mistakes at a time
known = ""  # folder that keeps which tests meet which line; where it does, they need not run for that again
shared = "tests/test_train.py::test_an_earlier_run_is_moved_aside"  # makes what tests share, before any mistake
report = "mutants.jsonl"  # a line for each: what it was, whether it was noticed, and by which test

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\](?= - |$))?)", re.M)  # the lines in which pytest names them
LONG = 15  # seconds: such tests come last
PYTEST = "-q -p no:xdist -p no:cacheprovider -o addopts=".split()  # in one process
COVERAGE = """[run]
source = {copy}
omit = {copy}/tests/*
data_file = {place}/coverage
parallel = true
patch = _exit
context = ${{PYTEST_CURRENT_TEST-}}
"""

# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

# an operator's name in the syntax tree, and what it is mistaken for
OPERATORS = dict(pair.split(" ", 1) for pair in (
    "Lt <=, LtE <, Gt >=, GtE >, Eq !=, NotEq ==, In not in, NotIn in, Is is not, IsNot is, And or, Or and, Add -, "
    "Sub +, Mult /, Div *, FloorDiv /, Mod //, Pow *, BitAnd |, BitOr &").split(", "))
TWINS = [pair.split() for pair in (
    "min max, any all, ceil floor, zeros ones, argmin argmax, removeprefix removesuffix, startswith endswith, "
    "isfinite isnan, sum mean, sin cos, zeros_like ones_like, append extend").split(", ")]
TWINS = dict(TWINS) | {b: a for a, b in TWINS}
WRAPPERS = "sorted reversed abs round float int list".split()  # f(x) becomes x
SPEAKERS = "BadInput print print0 warn usage_error say refusal fail".split()  # their words are not what is tried here


def name_of(call):
    """The last word of what a call calls."""
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def changes(node, source):
    """The mistakes that can be made in one node of the syntax tree -> [(node to replace, its new text)]."""
    of = lambda n: ast.get_source_segment(source, n)
    other = lambda op: OPERATORS[type(op).__name__]
    here = lambda *texts: [(node, text) for text in texts]
    match node:
        case ast.Constant(bool(value)):
            return here(str(not value))
        case ast.Constant(int(value)):
            return here(str(value + 1), str(value - 1))
        case ast.Constant(float(value)):
            return here(repr(value * 2 or 1.0))
        case ast.Compare(left, [op], [right]):
            return here(f"{of(left)} {other(op)} {of(right)}")
        case ast.BoolOp(op, values):
            return here("(" + f" {other(op)} ".join(f"({of(v)})" for v in values) + ")")
        case ast.BinOp(left, op, right) if type(op).__name__ in OPERATORS:
            texts = (ast.JoinedStr, ast.List, ast.ListComp, ast.Dict, ast.Tuple, ast.Starred)
            if any(isinstance(s, texts) or isinstance(getattr(s, "value", 0), str) for s in (left, right)):
                return []  # such a sum only crashes with another sign
            return here(f"({of(left)}) {other(op)} ({of(right)})")
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            return here(f"({of(operand)})")
        case ast.IfExp(_, body, orelse):
            return here(f"({of(body)})", f"({of(orelse)})")
        case ast.If(test) | ast.While(test):
            return [(test, f"not ({of(test)})")]
        case ast.Slice(lower, upper):
            return [(part, "") for part in (lower, upper) if part]
        case ast.Call(func, places, keywords):
            name = name_of(node)
            args = [*map(of, places), *((f"{k.arg}=" if k.arg else "**") + of(k.value) for k in keywords)]
            call = lambda *words: f"{of(func)}({', '.join(words)})"
            # a keyword forgotten
            found = [call(*args[:i], *args[i + 1:]) for i in range(len(places), len(args))]
            if len(places) > 1 and all(isinstance(a, (ast.Name, ast.Attribute)) for a in places[:2]):
                found.append(call(args[1], args[0], *args[2:]))  # two arguments in the wrong order
            if name in TWINS:
                found.append(f"{of(func).removesuffix(name)}{TWINS[name]}({', '.join(args)})")
            if name in WRAPPERS and len(places) == 1:
                found.append(f"({args[0]})")
            return here(*found)
        case (ast.AugAssign() | ast.Raise() | ast.Break() | ast.Continue() | ast.Expr(ast.Call())
              | ast.Assign([ast.Attribute() | ast.Subscript(), *_])):
            return here("pass")
    return []


def silent(node, module):
    """
    Parts of a program in which no mistake is made.
    They are page one, what is said to a person, type hints, the lines that start the program.
    """
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom() | ast.arg():
            return True
        case ast.Assign([ast.Name(name), *_]) if node in module.body:
            return name.islower()
        case ast.If(test) if "__name__" in ast.dump(test):
            return True
        case ast.Expr(ast.Call() as call) | (ast.Call() as call):
            return name_of(call) in SPEAKERS
    return False


def all_mistakes(file, source):
    """
    Every mistake that one change can make in a file.
    -> [{"file", "lines" (first and last of its statement), "at" (bytes from, to), "old", "new"}]
    """
    module, raw, found = ast.parse(source), source.encode(), []
    begins = [0, *accumulate(map(len, raw.splitlines(True)))]

    def walk(node, lines):
        if isinstance(node, ast.stmt):
            lines = node.lineno, node.end_lineno
            if body := getattr(node, "body", None):  # of a compound statement the head alone
                lines = node.lineno, max(node.lineno, body[0].lineno - 1)
        if silent(node, module):
            return
        for part, new in changes(node, source):
            at = begins[part.lineno - 1] + part.col_offset, begins[part.end_lineno - 1] + part.end_col_offset
            mistake = {"file": file, "lines": lines, "at": at, "old": raw[slice(*at)].decode(), "new": new}
            with contextlib.suppress(SyntaxError):
                compile(raw[:at[0]] + new.encode() + raw[at[1]:], file, "exec")
                found.append(mistake)
        for child in ast.iter_child_nodes(node):
            walk(child, lines)

    walk(module, (1, 1))
    return found


def drawn(cfg):
    """Mistakes by the seed: first a line that can hold one, then one of those that it can hold."""
    rng, by_line = random.Random(cfg.seed), {}
    for file in cfg.files.split(","):
        for path in sorted(ROOT.glob(file if file.endswith(".py") else f"{file}/*.py")):
            for m in all_mistakes(str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")):
                by_line.setdefault((m["file"], m["lines"][0]), []).append(m)
    return [rng.choice(by_line[key]) for key in rng.sample(sorted(by_line), min(cfg.mistakes, len(by_line)))]


def from_file(path):
    """
    The mistakes that stand in a file of lines {"file", "old", "new"}, perhaps with the "test" that is known to notice
    one; of a report those that nobody has noticed.
    """
    def placed(m):
        if m.get("noticed"):
            return None
        raw, old = (ROOT / m["file"]).read_bytes(), m["old"].encode()
        if raw[slice(*m.get("at", (0, 0)))] != old:
            if raw.count(old) != 1:
                raise BadInput(f"{m['file']} holds {raw.count(old)} times {m['old']!r}, not once")
            at = raw.index(old)
            first = raw[:at].count(b"\n") + 1
            m |= {"at": (at, at + len(old)), "lines": (first, first + old.count(b"\n"))}
        return m

    return list(filter(None, read_jsonl(path, "a mistake", placed)))

# ---------------------------------------------------------------------------------------------------------------------
# Which tests meet which line

# (This file is also the plugin under which the tests run once.)

def pytest_runtest_setup(item):
    """Programs that a test starts are measured too, under the test's name, which pytest puts into the environment."""
    os.environ["COVERAGE_PROCESS_START"] = f"{os.environ['MUTANTS']}/coveragerc"


def pytest_runtest_logreport(report):
    """How long each test took; xdist's workers tell the process that has started them, which notes it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(f"{os.environ['MUTANTS']}/tests.jsonl", "a") as f:
            f.write(json.dumps({"test": report.nodeid, "s": report.duration, "outcome": report.outcome}) + "\n")


def copy_tree(place):
    """The tree as it stands, without what git ignores, in place/main; what lies beside it is linked."""
    command = "git ls-files -co --exclude-standard -z".split()
    copy, shared = place / "main", ROOT.parent / "shared"
    for file in subprocess.check_output(command, cwd=ROOT, text=True).split("\0")[:-1]:
        if (ROOT / file).exists():
            (copy / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, copy / file)
    if shared.exists():
        (place / "shared").symlink_to(shared)
    return copy


def run_under_coverage(place, copy, tests, known):
    """Run the tests once, and leave what they meet in the folder `known`: coverage and tests.jsonl."""
    (place / "coveragerc").write_text(COVERAGE.format(copy=copy, place=place))
    env = os.environ | {"MUTANTS": str(place), "PYTHONPATH": str(copy)}
    command = f"-m pytest {tests} -q -p scripts.mutants --cov --cov-context=test --cov-report=".split()
    command = [sys.executable, *command, f"--cov-config={place}/coveragerc"]
    print(f"{tests}: once, under coverage", flush=True)
    with open(place / "log", "w") as log:
        code = subprocess.run(command, cwd=copy, env=env, stdout=log, stderr=log).returncode
    said = (place / "log").read_text()
    print(said.splitlines()[-1], flush=True)
    if not (place / "tests.jsonl").exists():
        raise BadInput(f"pytest ended with exit code {code}: {said[-1000:]}")
    known.mkdir(exist_ok=True)
    for file in ("coverage", "tests.jsonl"):
        shutil.copy(place / file, known)


def who_meets_what(known):
    """({file: {line: tests}}, {test: seconds}) of those that passed."""
    import coverage
    took, failed = Counter(), set()
    for note in map(json.loads, open(known / "tests.jsonl")):
        took[note["test"]] += note["s"]
        if note["outcome"] != "passed":
            failed.add(note["test"])
    data = coverage.CoverageData(str(known / "coverage"))
    data.read()
    meets = {}
    for file in data.measured_files():
        lines = meets.setdefault(file.split("/main/", 1)[1], {})  # in the copy, see copy_tree
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                test, phase = re.fullmatch(r"(.*?)(\|\w+| \(\w+\))?", context, re.S).groups()
                lines.setdefault(line, set()).add((test, "setup" in (phase or "")))
    return meets, {test: s for test, s in took.items() if test not in failed}


def chosen_tests(m, meets, took, seconds, caught=Counter()):
    """
    Tests that meet a mistake, as many as fit into the seconds -> (tests, seconds that they take).
    First the one that is said to notice it ("test"), then those that have caught the most so far, then the file of that
    name (test_lora.py for lora.py), then files by what they have caught, in a file the quick ones; the long come last.
    """
    file_of = lambda test: test.split("::")[0]
    lines, (first, last) = meets.get(m["file"], {}), m["lines"]
    met = set().union(*(lines.get(n, ()) for n in range(first, last + 1)))
    if ("", False) in met or not any(test in took for test, _ in met):
        # a line that runs at the import (and again in each program that a test starts): whoever comes to this file
        met = set().union(*lines.values())
    # where a fixture met it, whoever shares the fixture
    shared = {file_of(test) for test, setup in met if setup}
    tests = {test for test, _ in met if test in took} or set(took)
    said = m.get("test", "::")
    tests |= {test for test in took if file_of(test) in shared or test.startswith(said)}
    quickest = {}  # file -> the seconds of its quickest test
    for test in sorted(tests, key=took.get):
        quickest.setdefault(file_of(test), took[test])
    chosen, total = [], 0.0
    own = f"test_{Path(m['file']).stem}.py"
    rank = lambda t: (not t.startswith(said), -caught[t], took[t] > LONG, not file_of(t).endswith(own),
                      -caught[file_of(t)], quickest[file_of(t)], file_of(t), took[t])
    for test in sorted(tests, key=rank):
        if chosen and total + took[test] >= seconds:
            break
        chosen.append(test)
        total += took[test]
    return chosen, total

# ---------------------------------------------------------------------------------------------------------------------
# One mistake

def forget(root):
    """Drop the modules that were imported from a folder."""
    for name, module in list(sys.modules.items()):
        if name != "__main__" and str(getattr(module, "__file__", "") or "").startswith(str(root)):
            del sys.modules[name]
    sys.path[:] = [p for p in sys.path if p and not p.startswith(str(root))]


def start(copy, tests, *options):
    """Run tests in a copy of the tree, in a forked process that writes beside it. -> its pid"""
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.environ["PYTEST_XDIST_WORKER"] = "gw0"  # what xdist's processes would share then stays for the next mistake
    for n in (1, 2):
        os.dup2(os.open(copy.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), n)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
    os.chdir(copy)
    forget(ROOT)
    sys.path.insert(0, str(copy))
    import pytest
    code = 0
    try:
        # the likely ones apart: in one go pytest would sort them, so that tests which share a fixture stand together
        for some in (tests[:1], tests[1:8], tests[8:]):
            if some and not (code and "-x" in options):
                code = int(pytest.main([*PYTEST, "--tb=line", f"--basetemp={copy.parent}/tmp", *options, *some]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def fail_anyway(tests, copy):
    """Those of the tests that fail in a copy without any mistake, too: what they notice says nothing."""
    os.waitpid(start(copy, tests), 0)
    return set(FAILED.findall((copy.parent / "log").read_text(errors="replace"))) if tests else set()


def main():
    cfg = configure(__file__, positive=("seconds", "processes"))
    todo = (from_file(cfg.listed) if cfg.listed else []) + drawn(cfg)
    # a mistake as long as what it replaces, in the same second: Python would run the old bytecode
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as place:
        folders = [Path(place) / str(n) for n in range(cfg.processes + 1)]
        for folder in folders:
            folder.mkdir()
        known = Path(cfg.known or f"{place}/known")
        if not (known / "tests.jsonl").exists():
            run_under_coverage(folders[0], copy_tree(folders[0]), cfg.tests, known)
        meets, took = who_meets_what(known)
        copies = [copy_tree(folder) for folder in folders[1:]]
        # what the tests import is imported here once, and then forked
        import pytest
        with contextlib.redirect_stdout(io.StringIO()), contextlib.chdir(copies[0]):
            pytest.main([*PYTEST, "--collect-only", *cfg.tests.split()])
        forget(place)
        forget(ROOT)
        for copy in copies if cfg.shared in took else ():
            os.waitpid(start(copy, [cfg.shared]), 0)
        results = run_all(todo, copies, meets, took, cfg)
        fails = fail_anyway(sorted({m["by"] for m in results} & took.keys()), copies[0])
    for m in results:
        if m["by"] in fails:
            print(f"{m['file']}:{m['lines'][0]}: {m['by']} fails here without a mistake too: not counted as noticed")
            m["noticed"] = False
    for file in [*dict.fromkeys(m["file"] for m in results), "in all"]:
        noticed = [m["noticed"] for m in results if file in (m["file"], "in all")]
        share = 100 * sum(noticed) / max(1, len(noticed))
        print(f"{file:24} {sum(noticed):4} of {len(noticed):4} noticed, {share:.0f} %")


def begin(m, copy, meets, took, cfg, caught):
    """Put a mistake into a copy and start the tests that meet it. -> pid, seconds after which they hang"""
    tests, expected = chosen_tests(m, meets, took, cfg.seconds, caught)
    m["tests"] = len(tests)
    raw, (first, last) = (ROOT / m["file"]).read_bytes(), m["at"]
    (copy / m["file"]).write_bytes(raw[:first] + m["new"].encode() + raw[last:])
    return start(copy, tests, "-x"), 30 + 5 * expected


def end(m, copy, code, took):
    """Take the mistake out again, and note by which test it was noticed. code: None where the tests hang."""
    said = (copy.parent / "log").read_text(errors="replace")
    m |= {"noticed": code != 0, "by": "", "took": round(took, 1)}
    if code is None:
        m["by"] = "hangs"
    elif code:
        m["by"] = (FAILED.findall(said) or [said[-300:]])[0]
    shutil.copy(ROOT / m["file"], copy / m["file"])


def run_all(todo, copies, meets, took, cfg):
    """Try the mistakes, a few at a time -> the same with "noticed" and "by"."""
    waiting, running, free, results, caught = list(todo), {}, list(copies), [], Counter()
    progress = Progress("mistakes", len(todo))
    with open(cfg.report, "w", encoding="utf-8") as out:
        while waiting or running:
            while waiting and free:
                m, copy = waiting.pop(0), free.pop()
                pid, limit = begin(m, copy, meets, took, cfg, caught)
                running[pid] = m, copy, time.time(), limit
            time.sleep(0.02)
            for pid, (m, copy, began, limit) in list(running.items()):
                passed, (done, status) = time.time() - began, os.waitpid(pid, os.WNOHANG)
                if not done and passed < limit:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # with all that it has started
                if not done:
                    os.waitpid(pid, 0)
                end(m, copy, os.waitstatus_to_exitcode(status) if done else None, passed)
                del running[pid]
                free.append(copy)
                results.append(m)
                caught.update({m["by"], m["by"].split("::")[0]})
                out.write(json.dumps(m, ensure_ascii=False) + "\n")
                out.flush()
                if not m["noticed"]:
                    said = f"survived {m['tests']} tests: {m['old']} -> {m['new']}"
                    print(f"{m['file']}:{m['lines'][0]} {said}", flush=True)
                progress(len(results), unit="mistakes")
    return results


if __name__ == "__main__":
    launch(main)
