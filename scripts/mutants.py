"""
Puts mistakes into the code, one at a time, as a tired hand would make them, and counts how many the tests notice.

    python -m scripts.mutants                                # 150 mistakes, drawn by the seed over the core files
    python -m scripts.mutants mistakes=0 listed=tests/mistakes.jsonl    # those that hands have made
    python -m scripts.mutants mistakes=0 listed=mutants.jsonl           # the survivors of an earlier report again

The tests run once under coverage, so that it is known which of them meet which line. Each mistake then goes into a copy of the tree, and the tests
that meet it run there, the quick ones first, until one fails: in a forked process, since importing torch anew would take longer than most tests.
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
from pathlib import Path

from config import BadInput, Progress, configure, launch

mistakes = 150  # to draw
seed = 0  # of the draw
files = "train.py,model.py,lora.py,data.py,eval.py"  # where they go
tests = "tests"  # which tests may notice them
listed = ""  # a file of {"file", "old", "new"} lines, tried first; of a report the survivors alone
seconds = 90  # of tests that a mistake may meet before it counts as a survivor
processes = 2  # mistakes at a time
report = "mutants.jsonl"  # a line for each: what it was, whether it was noticed, and by which test

ROOT = Path(__file__).resolve().parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+(?:\[.*?\](?= - |$))?)", re.M)  # the lines in which pytest names them
PYTEST = ["-q", "-p", "no:xdist", "-p", "no:cacheprovider", "-o", "addopts="]  # in one process
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

OPERATORS = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.In: "not in", ast.NotIn: "in",
             ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and", ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*",
             ast.FloorDiv: "/", ast.Mod: "//", ast.Pow: "*", ast.BitAnd: "|", ast.BitOr: "&"}
TWINS = [("min", "max"), ("any", "all"), ("ceil", "floor"), ("zeros", "ones"), ("argmin", "argmax"), ("removeprefix", "removesuffix"),
         ("startswith", "endswith"), ("isfinite", "isnan"), ("sum", "mean"), ("sin", "cos"), ("zeros_like", "ones_like"), ("append", "extend")]
TWINS = dict(TWINS) | {b: a for a, b in TWINS}
WRAPPERS = ("sorted", "reversed", "abs", "round", "float", "int", "list")  # f(x) becomes x
SPEAKERS = ("BadInput", "print", "print0", "usage_error", "say", "refuse", "fail")  # their words are not what is tried here


def text_of(source, node):
    return ast.get_source_segment(source, node)


def changes(node, source):
    """The mistakes that can be made in one node of the syntax tree -> [(node to replace, its new text)]."""
    of = lambda n: text_of(source, n)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            return [(node, str(not node.value))]
        if isinstance(node.value, int):
            return [(node, str(node.value + 1)), (node, str(node.value - 1))]
        return [(node, repr(node.value * 2 or 1.0))] if isinstance(node.value, float) else []
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return [(node, f"{of(node.left)} {OPERATORS[type(node.ops[0])]} {of(node.comparators[0])}")]
    if isinstance(node, ast.BoolOp):
        return [(node, "(" + f" {OPERATORS[type(node.op)]} ".join(f"({of(v)})" for v in node.values) + ")")]
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        texts = (ast.JoinedStr, ast.List, ast.ListComp, ast.Dict, ast.Tuple, ast.Starred)
        if any(isinstance(s, texts) or isinstance(s, ast.Constant) and isinstance(s.value, str) for s in (node.left, node.right)):
            return []  # such a sum only crashes with another sign
        return [(node, f"({of(node.left)}) {OPERATORS[type(node.op)]} ({of(node.right)})")]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        return [(node, f"({of(node.operand)})")]
    if isinstance(node, ast.IfExp):
        return [(node, f"({of(node.body)})"), (node, f"({of(node.orelse)})")]
    if isinstance(node, (ast.If, ast.While)):
        return [(node.test, f"not ({of(node.test)})")]
    if isinstance(node, ast.Slice):
        return [(part, "") for part in (node.lower, node.upper) if part]
    if isinstance(node, ast.Call):
        found, name = [], node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        args = [*map(of, node.args), *((f"{k.arg}=" if k.arg else "**") + of(k.value) for k in node.keywords)]
        call = lambda words: f"{of(node.func)}({', '.join(words)})"
        found += [(node, call(args[:i] + args[i + 1:])) for i in range(len(node.args), len(args))]  # a keyword forgotten
        if len(node.args) > 1 and all(isinstance(a, (ast.Name, ast.Attribute)) for a in node.args[:2]):
            found.append((node, call([args[1], args[0], *args[2:]])))  # two arguments in the wrong order
        if name in TWINS:
            found.append((node, f"{of(node.func).removesuffix(name)}{TWINS[name]}({', '.join(args)})"))
        if name in WRAPPERS and len(node.args) == 1:
            found.append((node, f"({args[0]})"))
        return found
    if isinstance(node, (ast.AugAssign, ast.Raise, ast.Break, ast.Continue)):
        return [(node, "pass")]
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
        return [(node, "pass")]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return [(node, "pass")]
    return []


def silent(node, module):
    """Parts of a program in which no mistake is made: page one, what is said to a person, type hints, the lines that start the program."""
    if isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.arg)):
        return True
    if isinstance(node, ast.Assign) and node in module.body:
        return getattr(node.targets[0], "id", "A").islower()
    if isinstance(node, ast.If) and "__name__" in ast.dump(node.test):
        return True
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and getattr(call.func, "id", getattr(call.func, "attr", "")) in SPEAKERS


def all_mistakes(file, source):
    """Every mistake that one change can make in a file: [{"file", "lines" (of its statement), "at" (bytes from, to), "old", "new"}]."""
    module, raw, found = ast.parse(source), source.encode(), []
    begins = [0]
    for line in raw.split(b"\n"):
        begins.append(begins[-1] + len(line) + 1)

    def walk(node, lines):
        if isinstance(node, ast.stmt):  # of a compound statement the head alone
            lines = node.lineno, max(node.lineno, node.body[0].lineno - 1) if getattr(node, "body", None) else node.end_lineno
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
        for m in all_mistakes(file, (ROOT / file).read_text(encoding="utf-8")):
            by_line.setdefault((file, m["lines"][0]), []).append(m)
    return [rng.choice(by_line[key]) for key in rng.sample(sorted(by_line), min(cfg.mistakes, len(by_line)))]


def from_file(path):
    """The mistakes that stand in a file of lines {"file", "old", "new"}; of a report those that nobody has noticed."""
    found = []
    for number, line in enumerate(open(path, encoding="utf-8"), 1):
        m = json.loads(line)
        if m.get("noticed"):
            continue
        raw, old = (ROOT / m["file"]).read_bytes(), m["old"].encode()
        if raw[slice(*m.get("at", (0, 0)))] != old:
            if raw.count(old) != 1:
                raise BadInput(f"{path}:{number}: {m['file']} holds {raw.count(old)} times {m['old']!r}, not once")
            m["at"] = raw.index(old), raw.index(old) + len(old)
            first = raw[:m["at"][0]].count(b"\n") + 1
            m["lines"] = first, first + old.count(b"\n")
        found.append(m)
    return found

# ---------------------------------------------------------------------------------------------------------------------
# Which tests meet which line

# (This file is also the plugin under which the tests run once.)

def pytest_runtest_setup(item):
    """Programs that a test starts are measured too, under the name of the test that pytest puts into the environment."""
    os.environ["COVERAGE_PROCESS_START"] = os.path.join(os.environ["MUTANTS"], "coveragerc")


def pytest_runtest_logreport(report):
    """How long each test took; xdist's workers tell the process that has started them, which notes it."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        with open(os.path.join(os.environ["MUTANTS"], "tests.jsonl"), "a") as f:
            f.write(json.dumps({"test": report.nodeid, "s": report.duration, "outcome": report.outcome}) + "\n")


def copy_tree(place):
    """The tree as it stands, without what git ignores, in place/main; what lies beside it is linked."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for file in listed.split("\0")[:-1]:
        if (ROOT / file).exists():
            (place / "main" / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / file, place / "main" / file)
    if (ROOT.parent / "shared").exists():
        (place / "shared").symlink_to(ROOT.parent / "shared")
    return place / "main"


def who_meets_what(place, tests):
    """Run the tests once -> ({file: {line: tests}}, {test: seconds}) of those that pass."""
    import coverage
    copy = copy_tree(place)
    (place / "coveragerc").write_text(COVERAGE.format(copy=copy, place=place))
    env = os.environ | {"MUTANTS": str(place), "PYTHONPATH": str(copy)}
    command = [sys.executable, "-m", "pytest", *tests.split(), "-q", "-p", "scripts.mutants", "--cov", f"--cov-config={place}/coveragerc",
               "--cov-context=test", "--cov-report="]
    print(f"{tests}: once, under coverage", flush=True)
    done = subprocess.run(command, cwd=copy, env=env, stdout=open(place / "log", "w"), stderr=subprocess.STDOUT)
    took, failed = Counter(), set()
    if not (place / "tests.jsonl").exists():
        raise BadInput(f"pytest ended with exit code {done.returncode}: {(place / 'log').read_text()[-1000:]}")
    for line in open(place / "tests.jsonl"):
        note = json.loads(line)
        took[note["test"]] += note["s"]
        failed |= {note["test"]} if note["outcome"] != "passed" else set()
    print((place / "log").read_text().splitlines()[-1])
    data = coverage.CoverageData(str(place / "coverage"))
    data.read()
    meets = {}
    for file in data.measured_files():
        lines = meets.setdefault(os.path.relpath(file, copy), {})
        for line, contexts in data.contexts_by_lineno(file).items():
            for context in contexts:
                test, phase = re.fullmatch(r"(.*?)(\|\w+| \(\w+\))?", context, re.S).groups()
                lines.setdefault(line, set()).add((test, "setup" in (phase or "")))
    return meets, {test: s for test, s in took.items() if test not in failed}


def chosen_tests(m, meets, took, seconds):
    """Tests that meet a mistake, file by file, the quick ones first, as many as fit into the seconds."""
    lines = meets.get(m["file"], {})
    met = set().union(*(lines.get(n, set()) for n in range(m["lines"][0], m["lines"][1] + 1)))
    if not any(test in took for test, _ in met):  # a line that runs when the file is imported: whoever comes to this file
        met = set().union(*lines.values())
    tests = {test for test, _ in met if test in took} or set(took)
    shared = {test.split("::")[0] for test, setup in met if setup}  # a fixture met it: whoever shares the fixture
    tests |= {test for test in took if test.split("::")[0] in shared}
    by_file = {}
    for test in sorted(tests, key=took.get):
        by_file.setdefault(test.split("::")[0], []).append(test)
    chosen, total = [], 0.0
    for test in sorted(tests, key=lambda t: (took[t] > 5, list(by_file).index(t.split("::")[0]), took[t])):
        total += took[test]
        if not chosen or total < seconds:
            chosen.append(test)
    return chosen, sum(took[t] for t in chosen)

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
    for n in (1, 2):
        os.dup2(os.open(copy.parent / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), n)
    sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))
    os.chdir(copy)
    forget(ROOT)
    sys.path.insert(0, str(copy))
    import pytest
    code = 70
    try:
        code = int(pytest.main([*PYTEST, "--tb=line", f"--basetemp={copy.parent}/tmp", *options, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(code)


def fail_anyway(tests, copy):
    """Those of the tests that fail in a copy without any mistake, too: what they notice says nothing."""
    os.waitpid(start(copy, tests), 0)
    return set(FAILED.findall((copy.parent / "log").read_text(errors="replace"))) if tests else set()


def main():
    cfg = configure(__file__)
    for key in ("mistakes", "seconds", "processes"):
        if getattr(cfg, key) < (0 if key == "mistakes" else 1):
            raise BadInput(f"{key}={getattr(cfg, key)}: is too small")
    todo = (from_file(cfg.listed) if cfg.listed else []) + drawn(cfg)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"  # a mistake as long as what it replaces, in the same second: Python would run the old bytecode
    sys.dont_write_bytecode = True
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        (place / "map").mkdir()
        meets, took = who_meets_what(place / "map", cfg.tests)
        copies = []
        for n in range(cfg.processes):
            (place / str(n)).mkdir()
            copies.append(copy_tree(place / str(n)))
        # what the tests import is imported here once, and then forked
        import pytest
        with contextlib.redirect_stdout(io.StringIO()):
            os.chdir(copies[0])
            pytest.main([*PYTEST, "--collect-only", *cfg.tests.split()])
            os.chdir(ROOT)
        forget(place)
        forget(ROOT)
        results = run_all(todo, copies, meets, took, cfg)
        fails = fail_anyway(sorted({m["by"] for m in results} & took.keys()), copies[0])
    for m in results:
        if m["by"] in fails:
            print(f"{m['file']}:{m['lines'][0]}: {m['by']} fails here without a mistake too: not counted as noticed")
            m["noticed"] = False
    for file in [*dict.fromkeys(m["file"] for m in results), "in all"]:
        some = [m for m in results if file in (m["file"], "in all")]
        print(f"{file:24} {sum(m['noticed'] for m in some):4} of {len(some):4} noticed, {100 * sum(m['noticed'] for m in some) / max(1, len(some)):.0f} %")


def run_all(todo, copies, meets, took, cfg):
    """Try the mistakes, a few at a time -> the same with "noticed" and "by"."""
    waiting, running, free, results = list(todo), {}, list(copies), []
    progress = Progress("mistakes", len(todo))
    with open(cfg.report, "w", encoding="utf-8") as out:
        while waiting or running:
            while waiting and free:
                m, copy = waiting.pop(0), free.pop()
                tests, expected = chosen_tests(m, meets, took, cfg.seconds)
                m |= {"tests": len(tests), "limit": time.time() + 30 + 5 * expected, "start": time.time()}
                raw = (ROOT / m["file"]).read_bytes()
                (copy / m["file"]).write_bytes(raw[:m["at"][0]] + m["new"].encode() + raw[m["at"][1]:])
                running[start(copy, tests, "-x")] = m, copy
            time.sleep(0.02)
            for pid, (m, copy) in list(running.items()):
                done, status = os.waitpid(pid, os.WNOHANG)
                late = not done and time.time() > m["limit"]
                if not done and not late:
                    continue
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)  # with all that it has started
                if late:
                    os.waitpid(pid, 0)
                del running[pid]
                free.append(copy)
                said = (copy.parent / "log").read_text(errors="replace")
                code = 1 if late else os.waitstatus_to_exitcode(status)
                by = FAILED.findall(said)
                m |= {"noticed": code != 0, "by": "hangs" if late else by[0] if by else said[-300:] if code else "", "took": round(time.time() - m.pop("start"), 1)}
                del m["limit"]
                shutil.copy(ROOT / m["file"], copy / m["file"])
                results.append(m)
                out.write(json.dumps(m, ensure_ascii=False) + "\n")
                out.flush()
                if not m["noticed"]:
                    print(f"{m['file']}:{m['lines'][0]} survived {m['tests']} tests: {m['old']} -> {m['new']}", flush=True)
                progress(len(results), unit="mistakes")
    return results


if __name__ == "__main__":
    launch(main)
