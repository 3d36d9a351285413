"""
What the README says of the code: its commands are understood, its line counts are right.

    python -m pytest tests/test_readme.py
"""
import ast
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest

from config import configure

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
