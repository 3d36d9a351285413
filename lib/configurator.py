"""
The key=value rule, shared by every program.

    python train.py config/phoenix14t_7b.py stage=sft lr=1e-4
    python train.py help                  # every variable with its comment and its value

A program's page one (its top-level assignments of literals) holds the defaults; a config file is a file of such
assignments and nothing else, so it is read, never executed. Later wins: page one, config
files, the stage's dict, command line.
"""
import ast
import contextlib
import difflib
import math
import os
import sys
from types import SimpleNamespace

from lib.program import VERSION, BadInput, print0, warn

CHOICES = {"device": ("auto", "cpu", "cuda"), "dtype": ("auto", "float32", "bfloat16", "float16")}  # in every program


def usage_error(program, message):
    """A wrong command line: one line on stderr, exit code 2."""
    warn(f"{os.path.basename(program)}: {message}")
    raise SystemExit(2)


def read_literals(path, strict=False):
    """
    name -> (value, comment) for the top-level assignments of literals to lower-case names in a Python file.
    A dict's comments are a dict too. strict: anything else in the file is a BadInput.
    """
    try:
        source = open(path, encoding="utf-8").read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read as a config file ({e})") from None
    lines, found = source.splitlines(), {}

    def comment(node):  # what stands behind the # after a node
        return lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode().partition("#")[2].strip()

    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        try:
            (target,) = node.targets  # AttributeError: not an assignment
            if not target.id.islower() and not strict:
                continue  # a constant of the program, not a variable
            value, comments = ast.literal_eval(node.value), comment(node)
            if isinstance(value, dict):
                comments = {k.value: comment(v) for k, v in zip(node.value.keys, node.value.values)}
            found[target.id] = value, comments
        except (AttributeError, ValueError, TypeError):  # TypeError: {[]: 1}
            if strict and not is_docstring:
                raise BadInput(f"{path}:{node.lineno}: a config file holds assignments of literals only") from None
    return found


def coerce(value, like):
    """value (a text from the command line, or a literal) as the type of like; ValueError says why it is none."""
    kind = type(like)
    with contextlib.suppress(KeyError, TypeError, ValueError, OverflowError):
        if kind is str and isinstance(value, str):
            return value
        if kind is bool:
            return {"true": True, "false": False, "1": True, "0": False}[str(value).lower()]
        if kind in (int, float) and not isinstance(value, bool):
            number = float(value)  # "1e3" is a fine int, "1" a fine float
            if number.is_integer() or kind is float and math.isfinite(number):
                return kind(number)
    wanted = {str: "a text in quotes", bool: "true or false", int: "a whole number", float: "a finite number"}
    raise ValueError(f"{value!r} is not {wanted[kind]}")


def page_one(program, stages):
    """A program's defaults -> ({variable: value}, {stage: {variable: value}}, {variable or stage: its comments})."""
    page = read_literals(program)
    values, comments = ({name: both[n] for name, both in page.items()} for n in (0, 1))
    return values, {stage: values.pop(stage) for stage in stages}, comments


def configure(program, argv=None, choices={}, positive=(), minus_one=(), shares=(), stages=()):
    """
    The configuration of a program: its page one, then config files, the stage's dict, the command line.

    program: path of the program, whose top-level literals are the defaults. choices: variable -> values allowed.
    A number is at least 0; at least 1 in `positive`; less than 1 in `shares`; at least -1 where that is its
    default, or in `minus_one`, where it says so.
    stages: names of the dicts that hold a stage's values; the variable `stage` picks one.
    Returns a SimpleNamespace. A wrong command line ends the program with exit code 2 and one line; a bad config file
    raises BadInput.
    """
    argv = sys.argv[1:] if argv is None else argv
    cfg, per_stage, comments = page_one(program, stages)
    for values in per_stage.values():
        cfg |= values
    defaults, choices = dict(cfg), CHOICES | choices
    origin = {}  # variable -> the config file that set it

    def put(target, key, value, where):
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1, 0.5)
            hint = f", did you mean {near[0]}?" if near else f"; `{os.path.basename(program)} help` lists them"
            usage_error(program, f"{where}unknown variable {key}{hint}")
        try:
            target[key] = coerce(value, defaults[key])
            if key in choices and target[key] not in choices[key]:
                raise ValueError(f"{value!r} is none of {', '.join(map(str, choices[key]))}")
        except ValueError as e:
            usage_error(program, f"{where}{key}: {e}")

    command_line, show_help = {}, False
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if equals:
            put(command_line, key, value, "")
        elif arg.endswith(".py"):
            for name, (value, _) in read_literals(arg, strict=True).items():
                if name not in stages:
                    put(cfg, name, value, f"{arg}: ")
                    origin[name] = arg
                elif isinstance(value, dict):
                    for k, v in value.items():
                        put(per_stage[name], str(k), v, f"{arg}: {name}: ")
                else:
                    usage_error(program, f"{arg}: {name}: {value!r} is not a dict")
        elif arg in ("help", "--help", "-h"):
            show_help = True
        elif arg == "--version":
            print0(f"SL-LLaMA {VERSION}")
            raise SystemExit(0)
        else:
            usage_error(program, f"{arg!r} is neither key=value nor a config file")

    if stages:
        stage = command_line.get("stage", cfg["stage"])
        for key, value in per_stage[stage].items():
            if key in origin and key not in command_line and cfg[key] != value:
                warn(f"{origin[key]}: {key} = {cfg[key]!r} gives way to {stage}'s {value!r}; "
                     f"write it into {stage} = {{...}}")
            put(cfg, key, value, "")
        comments |= comments[stage]
    cfg.update(command_line)

    if show_help:
        print0(ast.get_docstring(ast.parse(open(program, encoding="utf-8").read())), "\n")
        for name, value in cfg.items():
            print0(f"{name + ' = ' + repr(value):36} {comments[name]}")
        raise SystemExit(0)
    for key, value in cfg.items():
        low = 1 if key in positive else -1 if defaults[key] == -1 or key in minus_one else 0
        if type(value) in (int, float) and (value < low or key in shares and value >= 1):
            usage_error(program, f"{key}={value}: must be at least {low}" + " and less than 1" * (key in shares))
    return SimpleNamespace(**cfg)


def numbers(program, key, text, kind, low):
    """A variable that is a list such as 1,4,8 -> its numbers, of this kind and at least `low`."""
    try:
        found = [kind(n) for n in text.split(",") if n]
        if min(found, default=low) < low:
            raise ValueError(f"must be at least {low}")
        return found
    except ValueError as e:
        usage_error(program, f"{key}={text}: is no list of numbers such as 1,4,8 ({e})")
