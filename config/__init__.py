"""
The key=value rule, shared by every program.

    python train.py config/phoenix14t_7b.py stage=sft lr=1e-4
    python train.py help                  # every variable with its comment and its value

A program's page one (its top-level assignments of literals) holds the defaults; a config file is a file of such
assignments and nothing else, so it is read, never executed. Later wins: page one, config files, the stage's dict, command line.
"""
import ast
import contextlib
import difflib
import math
import os
import re
import signal
import sys
import time
import traceback
from types import SimpleNamespace

import torch

VERSION = "0.1.0"


class BadInput(ValueError):
    """What the user can mend: a file, a clip or a variable, named in one line. Programs print it and end with exit code 1."""


def rank():
    """This process's number under torchrun, 0 without it."""
    return int(os.environ.get("RANK", 0))


def world():
    """How many processes torchrun has started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def print0(*args, **kwargs):
    """print, on the first process only."""
    if rank() == 0:
        print(*args, flush=True, **kwargs)


def usage_error(program, message):
    """A wrong command line: one line on stderr, exit code 2."""
    if rank() == 0:
        print(f"{os.path.basename(program)}: {message}", file=sys.stderr)
    raise SystemExit(2)


def launch(main):
    """Call a program's main(). Whatever ends it, the last line on stderr is the program's own; exit code 1 for what the user can mend and for mistakes of ours."""
    name = os.path.basename(sys.argv[0]) + (f": process {rank()}" if rank() else "")
    try:
        main()
        if "RANK" in os.environ:  # all is done and written; torch's threads can still crash a process on its way out, and torchrun would call that a failed run
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(0)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was saved is there", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as e:
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the others with it
        said = " ".join(str(e).split())
        if "RANK" in os.environ and isinstance(e, RuntimeError) and re.search("peer|Broken pipe|Connection|NCCL", said):
            if getattr(before, "asked", []):
                os._exit(1)  # it came a moment ago, and train.py has noted it
            time.sleep(10)  # another process has died: its own error is the one to read, and torchrun ends this one meanwhile
            said = f"lost the other processes, their error is the one that counts ({said})"
        elif not isinstance(e, (BadInput, OSError)):
            traceback.print_exc()
            said = f"{type(e).__name__}: {said}"
        time.sleep(2 * (rank() > 0))  # the first process speaks first, and torchrun then ends the others before they repeat it
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not sys.exit: a process group with a dead partner can hang in its destructor


def sync(path):
    """A file's bytes, or a folder's names, onto the disk itself: after this they outlive a power cut."""
    f = os.open(path, os.O_RDONLY)
    try:
        os.fsync(f)
    finally:
        os.close(f)


@contextlib.contextmanager
def whole(path, mode="w"):
    """Open path for writing, in full or not at all: the file is path.part until its last byte is on the disk, and then takes the place of the old one."""
    try:
        with open(path + ".part", mode, encoding=None if "b" in mode else "utf-8") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".part", path)
        sync(os.path.dirname(path) or ".")
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(path + ".part")  # a full disk gets its room back
        raise


class Progress:
    """done/total, rate and time left, on one line: rewritten on a terminal, a new line every ten seconds in a log file."""

    def __init__(self, what, total):
        self.what, self.total, self.start = what, total, time.time()
        self.said = self.start
        self.tty = sys.stderr.isatty()

    def __call__(self, done, units=None, unit="clips"):
        now = time.time()
        if rank() or (now - self.said < (0.2 if self.tty else 10) and done < self.total):
            return
        self.said, passed = now, max(now - self.start, 1e-9)
        left = passed / (done or 1) * (self.total - done)
        said = lambda n: f"{n:.2f}" if isinstance(n, float) else n
        rate = (done if units is None else units) / passed
        line = f"{self.what}: {said(done)}/{said(self.total)}, {rate:.{0 if rate >= 10 else 2}f} {unit}/s, {left:.0f} s left"
        end = "\n" if done >= self.total or not self.tty else ""
        print(("\r" if self.tty else "") + line.ljust(78) if self.tty else line, end=end, file=sys.stderr, flush=True)


def read_literals(path, strict=False):
    """
    name -> (value, comment) for the top-level assignments of literals to lower-case names in a Python file; a dict's comments are a dict too.
    strict: anything else in the file is a BadInput.
    """
    try:
        source = open(path, encoding="utf-8").read()
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError) as e:
        raise BadInput(f"{path}: cannot be read as a config file ({e})") from None
    lines, found = source.splitlines(), {}

    def comment(node):  # what stands behind the # after a node
        m = re.search(r"#\s*(.*)$", lines[node.end_lineno - 1].encode()[node.end_col_offset:].decode())
        return m[1] if m else ""

    for node in tree.body:
        is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        try:
            (target,) = node.targets  # AttributeError: not an assignment
            if not target.id.islower() and not strict:
                continue  # a constant of the program, not a variable
            value = ast.literal_eval(node.value)
            comments = {k.value: comment(v) for k, v in zip(node.value.keys, node.value.values)} if isinstance(value, dict) else comment(node)
            found[target.id] = value, comments
        except (AttributeError, ValueError, TypeError):  # TypeError: {[]: 1}
            if strict and not is_docstring:
                raise BadInput(f"{path}:{node.lineno}: a config file holds assignments of literals only") from None
    return found


def coerce(value, like):
    """value (text from the command line, or a literal) as the type of like; ValueError with the reason where it is not one."""
    kind = type(like)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(f"{value!r} is not a text in quotes")
        return value
    words = {"true": True, "false": False, "1": True, "0": False}
    if kind is bool:
        if str(value).lower() not in words:
            raise ValueError(f"{value!r} is not true or false")
        return words[str(value).lower()]
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)  # "1e3" is a fine int, "1" a fine float
        if not math.isfinite(number) or (kind is int and number != int(number)):
            raise ValueError
        return kind(number)
    except (ValueError, TypeError):
        raise ValueError(f"{value!r} is not {'a whole number' if kind is int else 'a finite number'}") from None


def configure(program, argv=None, choices={}, stages=()):
    """
    The configuration of a program: its page one, then config files, the stage's dict, the command line.

    program: path of the program, whose top-level literals are the defaults. choices: variable -> values allowed.
    stages: names of the dicts that hold a stage's values; the variable `stage` picks one.
    Returns a SimpleNamespace. A wrong command line ends the program with exit code 2 and one line; a bad config file raises BadInput.
    """
    argv = sys.argv[1:] if argv is None else argv
    page = read_literals(program)
    per_stage, stage_comments = {}, {}
    for name in stages:
        values, stage_comments[name] = page.pop(name)
        per_stage[name] = dict(values)
    cfg = {name: value for name, (value, _) in page.items()} | {k: v for values in per_stage.values() for k, v in values.items()}
    origin = {}  # variable -> the config file that set it

    def put(target, key, value, where):
        if key not in cfg:
            near = difflib.get_close_matches(key, cfg, 1, 0.5)
            hint = f", did you mean {near[0]}?" if near else f"; `{os.path.basename(program)} help` lists them"
            usage_error(program, f"{where}unknown variable {key}{hint}")
        try:
            target[key] = coerce(value, cfg[key])
            if key in choices and target[key] not in choices[key]:
                raise ValueError(f"{value!r} is none of {', '.join(choices[key])}")
        except ValueError as e:
            usage_error(program, f"{where}{key}: {e}")

    command_line, show_help = {}, False
    for arg in argv:
        key, equals, value = arg.removeprefix("--").partition("=")
        if equals:
            put(command_line, key, value, "")
        elif arg.endswith(".py"):
            for name, (value, _) in read_literals(arg, strict=True).items():
                if name in stages:
                    if not isinstance(value, dict):
                        usage_error(program, f"{arg}: {name}: {value!r} is not a dict")
                    for k, v in value.items():
                        put(per_stage[name], str(k), v, f"{arg}: {name}: ")
                else:
                    put(cfg, name, value, f"{arg}: ")
                    origin[name] = arg
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
                print0(f"{origin[key]}: {key} = {cfg[key]!r} gives way to {stage}'s {value!r}; write it into {stage} = {{...}}", file=sys.stderr)
            put(cfg, key, value, "")
    cfg.update(command_line)

    if show_help:
        print0(ast.get_docstring(ast.parse(open(program, encoding="utf-8").read())), "\n")
        comments = {name: text for name, (_, text) in page.items()} | (stage_comments[stage] if stages else {})
        for name, value in cfg.items():
            print0(f"{name + ' = ' + repr(value):36} {comments[name]}")
        raise SystemExit(0)
    return SimpleNamespace(**cfg)


def pick_device(device="auto"):
    """-> (torch.device of this process, the reason). A GPU is taken where there is one for each process."""
    processes, local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus < processes):
        return torch.device("cpu"), f"device={device}" if device == "cpu" else f"auto: {processes} process(es), {gpus} GPU(s)"
    if gpus < processes:
        raise BadInput(f"device=cuda: {gpus} GPU(s) for {processes} process(es)")
    return torch.device("cuda", local), f"{device}: {processes} process(es), {gpus} GPU(s)"


def pick_dtype(dtype, device):
    """-> (torch dtype, the reason)"""
    if dtype != "auto":
        return getattr(torch, dtype), f"dtype={dtype}"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "auto: a GPU with bfloat16"
    return torch.float32, "auto: " + ("a GPU without its own bfloat16" if device.type == "cuda" else "no GPU")
