"""
scripts/mutants.py: which mistakes it makes, where it puts them, which tests it takes.

    python -m pytest tests/test_mutants.py
"""
import json
import subprocess
from types import SimpleNamespace

import pytest

from lib.program import BadInput
from scripts import mutants

SOURCE = '''"""A program. It is 3 lines long."""
size = 8  # page one is no place for mistakes


def mean(values, start: int = 0):
    total = sum(values, start=start)
    if not values or total < 0:
        raise ValueError("no 7 values")
    return total / len(values[1:]) if "ä" else max(start, total)
'''


def made(source=SOURCE):
    return [(m["old"], m["new"]) for m in mutants.all_mistakes("a.py", source)]


def test_mistakes_of_a_small_program():
    found = made()
    for pair in [("0", "1"), ("sum(values, start=start)", "sum(values)"), ("total < 0", "total <= 0"),
                 ("not values or total < 0", "((not values) and (total < 0))"), ("not values", "(values)"),
                 ("not values or total < 0", "not (not values or total < 0)"),
                 ('raise ValueError("no 7 values")', "pass"), ("1", ""), ("1", "2"),
                 ("total / len(values[1:])", "(total) * (len(values[1:]))"),
                 ("max(start, total)", "min(start, total)"), ("max(start, total)", "max(total, start)")]:
        assert pair in found, pair
    assert not any("8" in old or "7" == old or "3" == old for old, _ in found)  # neither page one nor texts


def test_each_changes_one_place_and_can_be_compiled():
    raw = SOURCE.encode()
    for m in mutants.all_mistakes("a.py", SOURCE):
        low, high = m["at"]
        assert raw[low:high].decode() == m["old"] != m["new"]
        compile(raw[:low] + m["new"].encode() + raw[high:], "a.py", "exec")
        first, last = m["lines"]
        assert first <= raw[:low].count(b"\n") + 1 <= last


def test_a_draw_follows_from_the_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    draw = lambda seed, n: mutants.drawn(SimpleNamespace(seed=seed, mistakes=n, files="a.py"))
    assert draw(1, 3) == draw(1, 3) != draw(2, 3)
    assert len({m["lines"][0] for m in draw(1, 99)}) == len(draw(1, 99)) == 5  # a line that can hold one holds one


def test_the_listed_mistakes_can_still_be_made():
    """Each stands once in its file, and the test that is known to notice it is there."""
    listed = mutants.from_file(str(mutants.ROOT / "tests" / "mistakes.jsonl"))
    for m in listed:
        file, name = m["test"].split("::")
        assert f"def {name}(" in (mutants.ROOT / file).read_text(encoding="utf-8"), m["test"]


def test_mistakes_from_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    lines = [{"file": "a.py", "old": "total < 0", "new": "total > 0"},
             {"file": "a.py", "old": "mean", "new": "m", "noticed": True}]
    (tmp_path / "list").write_text("".join(json.dumps(m) + "\n" for m in lines))
    (one,) = mutants.from_file(str(tmp_path / "list"))  # what was noticed before is left out
    assert one["lines"] == (7, 7) and SOURCE.encode()[slice(*one["at"])] == b"total < 0"
    (tmp_path / "list").write_text(json.dumps({"file": "a.py", "old": "start", "new": "end"}))
    with pytest.raises(BadInput, match="list:1: a.py holds 4 times 'start', not once"):
        mutants.from_file(str(tmp_path / "list"))


def test_which_tests_meet_a_mistake():
    took = {"a.py::quick": 0.1, "a.py::slow": 9.0, "b.py::other": 0.2, "b.py::fixture": 0.3}
    meets = {"m.py": {3: {("a.py::quick", False), ("a.py::slow", False)}, 4: {("b.py::other", True)}, 5: set()}}

    def chosen(line, seconds=60):
        return mutants.chosen_tests({"file": "m.py", "lines": (line, line)}, meets, took, seconds)[0]

    assert chosen(3) == ["a.py::quick", "a.py::slow"] and chosen(3, 5) == ["a.py::quick"]
    assert chosen(4) == ["b.py::other", "b.py::fixture"]  # met while a fixture was made: all that share it
    assert set(chosen(5)) == set(took)  # a line that runs at the import


@pytest.mark.long
def test_end_to_end(tmp_path, monkeypatch):
    """A tree of one file and one test: what the test looks at is noticed, what it does not look at survives."""
    (tmp_path / "tests").mkdir()
    (tmp_path / "a.py").write_text("def twice(x):\n    return x * 2\n\n\ndef other(x):\n    return x + 1\n")
    test = "import a\n\n\ndef test_twice():\n    assert a.twice(3) == 6 and a.other(1)\n"
    (tmp_path / "tests" / "test_a.py").write_text(test)
    subprocess.run("git init -q && git add -A", shell=True, cwd=tmp_path, check=True)
    copy = tmp_path / "copies" / "main"
    copy.parent.mkdir()
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    assert mutants.copy_tree(copy.parent) == copy
    todo = [m for m in mutants.all_mistakes("a.py", (tmp_path / "a.py").read_text())]
    cfg = SimpleNamespace(seconds=9, report=str(tmp_path / "report.jsonl"))
    meets = {"a.py": {n: {("tests/test_a.py::test_twice", False)} for n in (2, 6)}}
    found = mutants.run_all(todo, [copy], meets, {"tests/test_a.py::test_twice": 0.1}, cfg)
    noticed = {(m["old"], m["new"]): m["noticed"] for m in found}
    assert noticed["2", "3"] and noticed["x * 2", "(x) / (2)"] and noticed["x + 1", "(x) - (1)"]
    assert not noticed["1", "2"]  # a.other(1) is true all the same
    assert not mutants.fail_anyway(["tests/test_a.py::test_twice"], copy)
