"""
The house: who imports whom, how long the five files are, how wide a line is.

    python -m pytest tests/test_house.py
"""
import ast

import pytest
from conftest import ROOT

# at most so many lines; none may lean on cutting shapes and reasons out of comments
FIVE = {"train": 430, "model": 540, "lora": 155, "data": 270, "eval": 292}
MAY = {"model": set(), "lora": set(), "data": set(), "eval": {"model", "lora", "data"},
       "train": {"eval", "model", "lora", "data"}}
FOLDERS = (".", "lib", "scripts", "config", "tests")
SOURCES = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
LIB = sorted((ROOT / "lib").glob("*.py"))


def imported(path):
    """Every module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_five_files_on_top():
    assert {path.stem for path in ROOT.glob("*.py")} == set(FIVE)


@pytest.mark.parametrize("name", FIVE)
def test_the_five(name):
    path = ROOT / f"{name}.py"
    ours = {module for module in imported(path) if module.split(".")[0] in {*FIVE, "scripts", "tests", "config"}}
    assert ours <= MAY[name]
    assert len(path.read_text(encoding="utf-8").splitlines()) <= FIVE[name]


def test_lib_stands_on_nothing_of_ours():
    for path in LIB:
        tops = {module.split(".")[0] for module in imported(path)}
        assert not tops & {*FIVE, "scripts", "tests", "config"}, path.name


def test_no_circle():
    arrows = {f"lib.{path.stem}": {m for m in imported(path) if m.startswith("lib.")} for path in LIB}
    while free := {name for name, needs in arrows.items() if not needs & arrows.keys()}:
        arrows = {name: needs for name, needs in arrows.items() if name not in free}
    assert not arrows


def test_config_holds_literals_and_nothing_imports_it():
    assert not (ROOT / "config" / "__init__.py").exists()
    assert not any("config" in {m.split(".")[0] for m in imported(path)} for path in SOURCES)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_width(path):
    wide = [n for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not wide
