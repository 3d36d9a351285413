"""
A program from its start to its exit code: its machine, its partners under torchrun, its signals, what it says.
"""
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

VERSION = "0.1.0"
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the repository
PARENT = os.getppid()  # torchrun, if it has started this process
GAINS = 50e6  # parameters of an LLM that is faster in bfloat16 on a CPU (docs/speed.md)


class BadInput(ValueError):
    """What the user can mend: a file, a clip or a variable, named in one line. Programs end with exit code 1."""


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


def warn(message):
    """What is no result of the program: on stderr, by the first process only."""
    print0(message, file=sys.stderr)


def launch(main):
    """
    Call a program's main(). Whatever ends it, the last line on stderr is the program's own.
    Exit code 1 for what the user can mend and for mistakes of ours.
    """
    name = os.path.basename(sys.argv[0]) + (f": process {rank()}" if rank() else "")
    try:
        main()
        if "RANK" in os.environ:
            # All is done and written. torch's threads can still crash a process on its way out,
            # and torchrun would call that a failed run.
            sys.stdout.flush()
            os._exit(0)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; what was saved is there", file=sys.stderr, flush=True)
        os._exit(130)
    except Exception as e:
        before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun ends the others with it
        said = " ".join(str(e).split())
        if "RANK" in os.environ and isinstance(e, RuntimeError) and re.search("peer|Broken pipe|Connection|NCCL", said):
            if getattr(before, "__self__", None):  # Signals that are not empty: it came a moment ago, and was noted
                os._exit(1)
            # another process has died: its own error is the one to read, and torchrun ends this one meanwhile
            time.sleep(10)
            said = f"lost the other processes, their error is the one that counts ({said})"
        elif not isinstance(e, (BadInput, OSError)):
            traceback.print_exc()
            said = f"{type(e).__name__}: {said}"
        if rank() > 0:
            time.sleep(2)  # the first process speaks first, and torchrun then ends the others before they repeat it
        print(f"{name}: {said}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(1)  # not sys.exit: a process group with a dead partner can hang in its destructor


def run_program(module, *args):
    """Run another of our programs to its end, as `python -m` would and without torchrun. SIGTERM ends both."""
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    other = subprocess.Popen([sys.executable, "-m", module, *args], cwd=ROOT, env=alone)

    def end(number, frame):
        other.terminate()
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    if other.wait():
        raise BadInput(f"{module}: ended with exit code {other.returncode}")
    signal.signal(signal.SIGTERM, before)

# ---------------------------------------------------------------------------------------------------------------------
# The machine

def pick_device(device):
    """-> (torch.device of this process, the reason). A GPU is taken where there is one for each process."""
    processes, local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu":
        return torch.device("cpu"), "device=cpu"
    why = f"{device}: {processes} process(es), {gpus} GPU(s)"
    if gpus >= processes:
        # cuDNN's attention makes a plan for every length that it has not met: a second a step, where lengths differ
        torch.backends.cuda.enable_cudnn_sdp(False)
        return torch.device("cuda", local), why
    if device == "auto":
        return torch.device("cpu"), why
    raise BadInput(f"device=cuda: {gpus} GPU(s) for {processes} process(es)")


def pick_dtype(dtype, device, size=0):
    """
    -> (torch dtype of the frozen weights and the arithmetic, the reason)
    size: parameters of the LLM. A CPU that multiplies in bfloat16 gains by it only where the products are large.
    """
    if dtype != "auto":
        return getattr(torch, dtype), f"dtype={dtype}"
    if device.type == "cuda":
        own = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "auto: a GPU with bfloat16") if own else (torch.float32, "auto: a GPU without it")
    can = torch.cpu.get_capabilities()
    if not can.get("avx512_bf16") and not can.get("amx_bf16"):
        return torch.float32, "auto: a CPU without bfloat16"
    if size < GAINS:
        return torch.float32, f"auto: a CPU, and an LLM of less than {GAINS / 1e6:.0f}M parameters"
    return torch.bfloat16, "auto: a CPU that multiplies in bfloat16"

# ---------------------------------------------------------------------------------------------------------------------
# The other processes

def join(device=torch.device("cpu")):
    """Join the process group; one process needs no torchrun. The others may wait for hours while the first works."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # gloo beside NCCL: with cpu_offload gradients are clipped on the CPU
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)


def leave():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier():
    """Wait until every process has come here."""
    if dist.is_initialized():
        dist.barrier()


def summed(device, *numbers):
    """The sums of these numbers over all processes, in float64. Every process must call it."""
    sums = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(sums)
    return sums.tolist()


def gathered(found):
    """A dict of each process -> all of them in one, on every process."""
    if world() == 1:
        return found
    parts = [None] * world()
    dist.all_gather_object(parts, found)
    return {key: value for part in parts for key, value in part.items()}

# ---------------------------------------------------------------------------------------------------------------------
# Signals, and what a program says while it works

class Signals(list):
    """
    (number, when) of each SIGTERM and SIGINT from now on: the loop looks at `len` once a step.
    A second Ctrl-C ends the process.
    """

    def __init__(self):
        signal.signal(signal.SIGTERM, self.note)
        signal.signal(signal.SIGINT, self.note)

    def note(self, number, frame):
        # a scheduler signals every process, and torchrun passes on what it has got: within a second it is one wish
        if self and number == signal.SIGINT and time.time() - self[0][1] > 1:
            os._exit(130)
        self.append((number, time.time()))

    def check_torchrun(self):
        """BadInput where the torchrun that has started this process is gone: killed, it leaves its processes alive."""
        if "RANK" in os.environ and os.getppid() != PARENT:
            raise BadInput("torchrun is gone, so this process ends and saves nothing more; to go on: resume=true")

    def forget(self):
        """Give both signals back their usual meaning."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def leave(self, step, folder, resumes):
        """End a stopped program: say how to go on; the exit code is 128 + the signal's number."""
        number = self[0][0] if self else signal.SIGTERM  # else another process has got it
        program = ["torchrun", f"--nproc_per_node={world()}"] if "RANK" in os.environ else ["python"]
        again = shlex.join([*program, *sys.argv] + ([] if resumes else ["resume=true"]))
        warn(f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name} after step {step}, "
             f"saved in {folder}; to go on: {again}")
        raise SystemExit(128 + number)


class Pace(list):
    """(seconds, tokens) of each step since the last line of the log."""

    def so_far(self):
        """-> {"tokens_per_s", "step_s"}, on a GPU "gpu_gb", the most it has held, and begins anew."""
        seconds, tokens = map(sum, zip(*self))
        rates = {"tokens_per_s": round(tokens / max(seconds, 1e-9)), "step_s": round(seconds / len(self), 4)}
        self.clear()
        held = torch.cuda.max_memory_allocated()  # 0 where nothing runs on a GPU
        return rates | ({"gpu_gb": round(held / 1e9, 2)} if held else {})


class Progress:
    """done/total, rate and time left, on one line: rewritten on a terminal, every ten seconds a new one in a file."""

    def __init__(self, what, total):
        self.what, self.total = what, total
        self.said = self.start = time.time()
        self.tty = sys.stderr.isatty()

    def __call__(self, done, units=None, unit="clips"):
        now = time.time()
        if rank() or (now - self.said < (0.2 if self.tty else 10) and done < self.total):
            return
        self.said, passed = now, max(now - self.start, 1e-9)
        left = passed / (done or 1) * (self.total - done)
        number = lambda n: f"{n:.2f}" if isinstance(n, float) else n
        rate = (done if units is None else units) / passed
        line = (f"{self.what}: {number(done)}/{number(self.total)}, {rate:.{0 if rate >= 10 else 2}f} {unit}/s, "
                f"{left:.0f} s left")
        end = "\n" if done >= self.total or not self.tty else ""
        print("\r" + line.ljust(78) if self.tty else line, end=end, file=sys.stderr, flush=True)
