"""
Breaks things on purpose: damaged files, kills inside a save, kills and stops of whole runs.
Whatever happens must be a clear line or no harm at all.

    python -m scripts.faults                 # 1,000 damaged files, a kill at every call of a save, 25 kills of runs
    python -m scripts.faults trials=5000 kills=0 seed=7

Each trial on a file runs in a forked process with a limit on time and memory, through program.launch as a program does:
it must end with exit code 0, or with 1 and one line. A run that was killed or stopped must go on to the very losses,
dev scores and weights of one that was not. tests/test_faults.py runs a few of each.
"""
import collections
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import model
from lib import adapter, checkpoint
from lib.checkpoint import Run, find_checkpoint, read_checkpoint
from lib.cnn import GoogLeNet
from lib.configurator import configure, read_literals
from lib.files import load_json
from lib.program import BadInput, launch
from lib.readers import SPLITS, read_clips
from lib.scores import score_files
from lib.tensors import load_tensors
from lib.tokenizer import Tokenizer
from lib.video import read_video
from lib.weights import ModelArgs, open_llm, write_hf
from scripts import toy
from scripts.memory import family
from scripts.small_llm import train_tokenizer_json

trials = 1000  # damaged files
kills = 25  # of runs, each continued to its end; two in five are stops by SIGTERM, one is an extraction
seed = 0  # of everything random here
folder = ""  # where to work; "" = a temporary folder

ROOT = Path(__file__).resolve().parents[1]
TRAIN = f"{ROOT}/train.py"
# 7 of 8 steps, the dev clips after steps 3 and 6
SMALL = ("ltn_dim=32 ltn_heads=2 batch_size=6 epochs=2 eval_clips=2 eval_every=3 log_every=1 save_every=1 warmup=2 "
         "keep=2 max_steps=7").split()

# ---------------------------------------------------------------------------------------------------------------------
# Damaged files

def forked(job, seconds, memory=6e9):
    """job() in a process of its own, as a program would run it -> (exit code or minus the signal, its stderr)."""
    with tempfile.TemporaryFile() as err:
        pid = os.fork()
        if not pid:
            for n in (1, 2):
                os.dup2(err.fileno(), n)
            sys.stdout = sys.stderr = open(2, "w", closefd=False)
            sys.argv = ["trial"]
            with contextlib.suppress(ValueError, OSError):  # macOS takes no such limit
                resource.setrlimit(resource.RLIMIT_AS, (int(memory + 4e9),) * 2)  # what torch only reserves counts too
            signal.alarm(seconds)  # the default action of SIGALRM ends the process, wherever it hangs
            code = 0
            try:
                launch(job)
            except SystemExit as e:  # a wrong command line
                code = e.code
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        return code, err.read().decode(errors="replace")


ABSURD = (b'-1 0 1000000000 99999999999999999999 1e400 NaN null "x" [] {} true 0.5 "../../x" "/etc/passwd"').split()
KINDS = "flip flip noise cut lose insert zeros value value swap empty".split()


def damage(raw, rng):
    """Bytes -> bytes with one or more wounds, and what was done."""
    raw, kind = bytearray(raw), rng.choice(KINDS)
    reach = rng.choice([len(raw), len(raw), min(len(raw), 1000)])  # often near the beginning, where headers are
    at, n = rng.randrange(reach or 1), rng.choice([1, 4, 100])
    if kind == "flip":
        for _ in range(n if raw else 0):
            raw[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind in ("noise", "insert"):
        raw[at:at + n * (kind == "noise")] = rng.randbytes(n)
    elif kind in ("lose", "zeros"):
        raw[at:at + n] = bytes(n * (kind == "zeros"))
    elif kind == "cut":
        del raw[at:]
    elif kind == "swap":
        other = rng.randrange(len(raw) or 1)
        raw[at:at + n], raw[other:other + n] = raw[other:other + n], raw[at:at + n]
    elif kind == "value":  # a number or a word in a text becomes something that parses and makes no sense
        values = rb'(?<=[:\[\t ])\s*("[^"\n]{0,80}"|-?\d[\d.e+-]*|true|false|null)'
        if found := list(re.finditer(values, bytes(raw[:200000]))):
            m = rng.choice(found)
            raw[m.start(1):m.end(1)] = rng.choice(ABSURD)
    else:
        raw.clear()
    return bytes(raw), kind


def material(home):
    """A small toy with runs of both stages and one file at least of every type -> [(file, what loads it)]."""
    home = Path(home)
    run, files = reference(home, "sft", 1) / "last", home / "files"
    llm, clip = f"{home}/data/toy/llm", f"{home}/data/toy/clips/00000.mp4"

    def load_llm(path):
        model.LLaMA.from_pretrained(str(path.parent))
        open_llm(str(path.parent)).describe(torch.float32)

    def tokenize(path):
        tokenizer = Tokenizer(str(path.parent)).fit(10**6)
        tokenizer.decode(tokenizer.encode("am abend regnet es"))

    def load_run(path):
        sllama, tokenizer, _ = evaluation.load_model(str(path.parent), device="cpu", llm=llm)
        evaluation.translate(sllama, [torch.randn(9, 1024)], tokenizer, max_new_tokens=2)

    def load_moments(path):
        sllama = model.SLLaMA(open_llm(llm).args, 1024, SimpleNamespace(**read_checkpoint(str(run)).config))
        sllama.requires_grad_(False)
        sllama.adaptor.requires_grad_(True)
        checkpoint.load_moments(str(run), sllama, torch.optim.AdamW(sllama.adaptor.parameters()), 2)

    def load_clips(path):
        clips = data.Clips(SimpleNamespace(**read_checkpoint(str(run)).config), "train")
        tokenizer = Tokenizer(llm)
        data.pack([clips.sample(i, ([1], []), tokenizer) for i in range(len(clips))])

    def load_settings(path):
        configure(TRAIN, [str(path)], stages=("align", "sft"))

    shutil.rmtree(files, ignore_errors=True)
    for name in ("fast", "frames"):
        os.makedirs(files / name)
    llama = model.LLaMA.from_pretrained(llm)
    # several shards and their index
    write_hf(f"{files}/hf", llama.args, llama.state_dict().items(), llm, torch.float32, shard_bytes=10**6)
    with contextlib.suppress(BadInput):  # tokenizers need not be installed
        train_tokenizer_json(f"{files}/fast", ["am abend regnet es im norden"] * 3, 300, bos=True)
        (files / "fast/tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    video = read_video(clip)
    shutil.copy(clip, files / "a.mp4")
    toy.write_mp4(f"{files}/a.gif", video[:12], 25, "gif", "rgb8")
    toy.write_mp4(f"{files}/a.webm", video[:12], 25, "libvpx", "yuv420p")
    for i in range(2):
        toy.write_mp4(f"{files}/frames/{i}.png", video[i:i + 1], 1, "png", "rgb24")
    torch.save(GoogLeNet().state_dict(), files / "googlenet.pth")
    torch.save(GoogLeNet().state_dict(), files / "old.pth", _use_new_zipfile_serialization=False)
    hyp = '{"name": "%d", "hyp": "es regnet", "ref": "am abend regnet es"}\n'
    (files / "hyps.jsonl").write_text("".join(hyp % i for i in range(3)))
    shutil.copy(ROOT / "config" / "isl.py", files / "settings.py")

    loads = {
        load_llm: "data/toy/llm/params.json data/toy/llm/consolidated.00.pth files/hf/config.json "
                  "files/hf/model.safetensors.index.json files/hf/model-00001-of-*",
        tokenize: "data/toy/llm/tokenizer.model files/fast/tok*",
        load_run: "{run}/vision.safetensors {run}/adapter_* {run}/state.json",
        load_moments: "{run}/optimizer.safetensors",
        load_clips: "data/toy/train.jsonl data/toy/toycnn/train.safetensors",
        lambda path: read_clips(str(path.parent)): "data/toy/clips/clips.tsv",
        lambda path: read_video(str(path)): "files/a.mp4 files/a.gif files/a.webm",
        lambda path: read_video(str(path.parent)): "files/frames/0.png",
        lambda path: GoogLeNet().load(str(path)): "files/googlenet.pth files/old.pth",
        lambda path: score_files(str(path), "", "de"): "files/hyps.jsonl",
        load_settings: "files/settings.py",
    }
    return [(path, load) for load, names in loads.items() for name in names.format(run=run.relative_to(home)).split()
            for path in sorted(home.glob(name))]


def verdict(code, said):
    """What is wrong with the way a trial ended, or ''."""
    lines = [line for line in said.splitlines() if line.strip()]
    if code in (-signal.SIGALRM, -signal.SIGKILL):
        return "hangs"
    if code < 0:
        return f"dies of {signal.Signals(-code).name}"
    if code and "Traceback" in said:
        return "traceback"
    if code == 1 and not lines[-1].startswith("trial: ") or code not in (0, 1, 2):
        return "no clear last line"
    return ""


def corruptions(home, n, seed, seconds=20, say=print):
    """n damaged files, all types in turn -> (Counter of outcomes, [(file, kind, what is wrong, stderr)])."""
    kinds, rng = material(home), random.Random(seed)
    count, bad = collections.Counter(), []
    for trial in range(n):
        path, load = kinds[trial % len(kinds)]
        wounded, kind = damage(path.read_bytes(), rng)
        sound = path.with_name(path.name + ".sound")
        os.rename(path, sound)  # mapped files of this process stay what they are
        try:
            path.write_bytes(wounded)
            code, said = forked(lambda: load(path), seconds)
        finally:
            os.replace(sound, path)
        if wrong := verdict(code, said):
            bad.append((path.name, kind, f"trial {trial}: {wrong}", said))
            say(f"{path.name}, {kind}, trial {trial}: {wrong}\n{said[-1500:]}")
            count["wrong"] += 1
        else:
            count["refused" if code else "unharmed"] += 1
    return count, bad


def hostile(home, seconds=20):
    """
    Files that were made to do harm: each must be refused -> [(what, exit code, stderr)].
    A canary tells whether code was executed.
    """
    place = Path(home) / "hostile"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    canary = place / "executed"

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    def put(name, content):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
        return str(place / name)

    def meta(name, **params):
        sizes = {"dim": 8, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5} | params
        return os.path.dirname(put(f"{name}/params.json", json.dumps(sizes).encode()))

    def hf(name, **changes):
        sizes = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                     intermediate_size=8, vocab_size=8, rms_norm_eps=1e-5) | changes
        folder = os.path.dirname(put(f"{name}/config.json", json.dumps(sizes).encode()))
        save_file({"model.norm.weight": torch.ones(8)}, place / name / "model.safetensors")
        return folder

    build = lambda folder: model.LLaMA.from_pretrained(folder)
    torch.save({"tok_embeddings.weight": Harm()}, f"{meta('pickled')}/consolidated.00.pth")
    outside = hf("outside")
    os.remove(f"{outside}/model.safetensors")  # it would come first
    put("outside/model.safetensors.index.json", b'{"weight_map": {"a": "../../../etc/passwd"}}')
    with open(place / "big.json", "wb") as f:
        f.truncate(3 * 10**9)  # a hole in the disk, gigabytes to a reader
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    wide = len(header).to_bytes(8, "little") + header
    code = f"import os\nos.system('touch {canary}')\n".encode()
    jobs = {
        "a pickle that runs a command": lambda: open_llm(f"{place}/pickled"),
        "a pickle of old that runs a command": lambda: load_tensors(put("plain.pth", pickle.dumps({"a": Harm()}))),
        "a safetensors header of 10 GB":
            lambda: load_tensors(put("long.safetensors", (10**10).to_bytes(8, "little") + b"{}")),
        "a tensor of 4 TB in 100 bytes": lambda: load_tensors(put("wide.safetensors", wide)),
        "JSON of 3 GB": lambda: load_json(f"{place}/big.json"),
        "JSON nested 100,000 deep": lambda: load_json(put("deep.json", b'{"a":' + b"[" * 10**5)),
        "a number of 100,000 digits": lambda: load_json(put("digits.json", b'{"a": ' + b"9" * 10**5 + b"}")),
        "hidden_size=10**9": lambda: build(hf("wide", hidden_size=10**9)),
        "num_hidden_layers=10**9": lambda: build(hf("deep", num_hidden_layers=10**9)),
        "num_attention_heads=0": lambda: build(hf("headless", num_attention_heads=0)),
        "n_layers=10**9": lambda: build(meta("deepmeta", n_layers=10**9)),
        "shards named outside of the folder": lambda: open_llm(outside),
        "a config file with code": lambda: read_literals(put("code.py", code), strict=True),
    }
    ended = [(what, *forked(job, seconds)) for what, job in jobs.items()]
    return ended + ([("code was executed", -1, "")] if canary.exists() else [])

# ---------------------------------------------------------------------------------------------------------------------
# Kills and faults inside a save

def small_model(step):
    """A tiny model with LoRA, an optimizer that has moved, and a state; all its numbers tell the step."""
    torch.manual_seed(0)
    args = ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=24, vocab_size=20, head_dim=8)
    small = "stage=sft ltn=false adaptor=linear lora_rank=2 lora_alpha=4 lora_targets=wq".split()
    cfg = configure(TRAIN, small, stages=("align", "sft"))
    sllama = model.SLLaMA(args, 8, cfg).requires_grad_(False)
    sllama.adaptor.requires_grad_(True)
    lora.apply_lora(sllama.llm, 2, 4, ["wq"])
    for p in sllama.parameters():
        if p.requires_grad:
            p.data.fill_(step)
            p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p for p in sllama.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    optimizer.step()
    return sllama, optimizer, SimpleNamespace(step=step, scored=step, best=None, skipped=0), cfg


def ready(place, step, keep=1):
    """A run in a folder, before its save -> the function that saves last/, of the step that small_model tells."""
    sllama, optimizer, at, cfg = small_model(step)
    run = Run(SimpleNamespace(**vars(cfg) | {"out_dir": str(place), "dataset": "", "stage": ""}))
    run.facts = {"config": vars(cfg), "dim_in": 8, "extractor": {}}
    return lambda: run.save("last", sllama, optimizer, at, keep)


def save(place, step, keep=1):
    """Save last/ in a folder as a run does. -> whether it is there"""
    return ready(place, step, keep)()


def saved_step(place):
    """The step of the checkpoint that a resumed run would find: all its files must be whole and of that step."""
    found = read_checkpoint(find_checkpoint(str(place)))
    step, moments = found.state["step"], load_tensors(f"{found.folder}/optimizer.safetensors")
    learnt = [t for name, t in found.tensors.items() if name.startswith("adaptor") or "lora" in name]
    assert moments and all(bool((t == step).all()) for t in learnt)
    return step


CALLS = [(os, "rename"), (os, "fsync"), (os, "makedirs"), (shutil, "rmtree"), (checkpoint, "save_file"),
         (adapter, "save_file"), (json, "dump")]


def faulty_saves(home, fault, keep=1, say=print):
    """
    Save step 1, then step 2 with a fault at its n-th call, for every n, then step 3.
    -> [(n, call, step found after the fault, after step 3)]; in between, a reader must find step 1 or 2 in full.
    fault: "kill" or an OSError's number.
    """
    checkpoint.dist = SimpleNamespace(all_reduce=lambda t: None)
    place, ended = Path(home) / "saves", []
    for n in range(1000):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        hit = place / "hit"

        def second():
            save_now, calls = ready(place, 2, keep), iter(range(10**6))
            for owner, name in CALLS:
                def wrapped(*args, real=getattr(owner, name), name=name, **kwargs):
                    if next(calls) == n:
                        hit.write_text(name)
                        if fault == "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        raise OSError(fault, os.strerror(fault))
                    return real(*args, **kwargs)
                setattr(owner, name, wrapped)
            save_now()

        save(place, 1, keep)
        code, said = forked(second, 20)
        assert code == (-signal.SIGKILL if fault == "kill" and hit.exists() else 0), said
        between = saved_step(place)
        save(place, 3, keep)
        ended.append((n, hit.read_text() if hit.exists() else "none", between, saved_step(place)))
        if not hit.exists():
            return ended  # that save had fewer calls than n

# ---------------------------------------------------------------------------------------------------------------------
# Kills of whole runs

ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(home, name, *args, processes=1):
    """Start a program of this repository, under torchrun where there are several processes. -> Popen"""
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []
    return subprocess.Popen([sys.executable, *torchrun, f"{ROOT}/{name}", *args], cwd=home, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)


def program(home, name, *args, processes=1):
    """Run a program to its end."""
    p = start(home, name, *args, processes=processes)
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said[-3000:]
    return said


def children(pid):
    """Processes that a process has started, and theirs."""
    return list(family(pid))[1:]


def kill(p, rng, number=signal.SIGKILL):
    """
    A signal to everything of a run at once, to one worker alone (torchrun ends the others), or to torchrun alone: it
    passes on SIGTERM, and when it is killed the others notice.
    """
    below = children(p.pid)
    whom = [p.pid, *below]
    if below and rng.random() < 0.6:
        whom = [rng.choice([p.pid, rng.choice(below)])]
    for pid in whom:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
    p.communicate(timeout=60)
    for pid in below:  # nobody may still be writing when the run goes on
        with contextlib.suppress(OSError):
            while "\nState:\tZ" not in open(f"/proc/{pid}/status").read():
                time.sleep(0.05)


def wait_for(p, count, n, rng):
    """Until count() has come to n (or the run is over), and a random moment more."""
    until = time.time() + 120
    while p.poll() is None and time.time() < until and count() < n:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)


def log_of(run):
    """The lines of a run's log.jsonl; of one that is being written only those that are whole."""
    return [json.loads(line) for line in checkpoint.read_log(run / "log.jsonl")]


def same_tensors(a, b):
    """Whether two safetensors files hold the same, or are both absent."""
    if not (a.exists() and b.exists()):
        return a.exists() == b.exists()
    x, y = load_file(a), load_file(b)
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


def same_run(a, b):
    """What differs between two runs' folders: losses, dev scores, weights, moments, best/. -> '' if nothing does."""
    keys = "step loss grad_norm lr dev_loss dev_bleu".split()
    logs = [[[e.get(k) for k in keys] for e in log_of(run)] for run in (a, b)]
    if logs[0] != logs[1]:
        return f"logs differ: steps {[step for step, *_ in logs[0]]} and {[step for step, *_ in logs[1]]}"
    for file in "best/vision best/adapter_model last/vision last/optimizer last/adapter_model".split():
        if not same_tensors(a / f"{file}.safetensors", b / f"{file}.safetensors"):
            return f"{file}.safetensors differs"
    states = [load_json(f"{run}/last/state.json") for run in (a, b)]
    return "".join(f"{key} differs" for key in "step scored best skipped".split() if states[0][key] != states[1][key])


def wanted(home, stage, out):
    """The arguments of a small run."""
    before = [f"init_from={home}/whole1/toy/align"] if stage == "sft" else []
    return [f"stage={stage}", f"out_dir={out}", *SMALL, "lora_dropout=0.1", *before]


def small_toy(home):
    toy.build(f"{home}/data", n_train=20, n_dev=4, n_test=4, text_steps=3, text_batch=8)


def reference(home, stage, processes):
    """The folder of a run that nobody killed; made where it is absent."""
    small_toy(home)
    if stage == "sft":
        reference(home, "align", 1)
    run = Path(home) / f"whole{processes}" / "toy" / stage
    if not (run / "last" / "state.json").exists():
        program(home, "train.py", *wanted(home, stage, f"whole{processes}"), processes=processes)
    return run


def killed_run(home, stage, processes, rng, number=signal.SIGKILL):
    """
    Kill a run of a stage at a random moment, some of them twice, or stop it by SIGTERM, mostly while dev clips are
    decoded. Then go on, and once more when all is done. -> (what, what differs from a run that nobody killed)
    """
    whole, out, where = reference(home, stage, processes), Path(home) / "killed", []
    shutil.rmtree(out, ignore_errors=True)
    run, command = out / "toy" / stage, ["train.py", *wanted(home, stage, out), "resume=true"]
    lines = lambda: len(log_of(run))
    log = log_of(whole)
    scoring = [n for n, e in enumerate(log) if "dev_loss" in e]  # lines that are there while the next one is worked out
    stops = number == signal.SIGTERM
    for _ in range(1 if stops else rng.choice([1, 1, 2])):
        p = start(home, *command, processes=processes)
        until = rng.randint(lines(), len(log) - 1)
        if stops:  # not before the first line: only a run that has begun knows what to do
            until = rng.choice([*scoring, max(until, 1)])
        wait_for(p, lines, until, rng)
        kill(p, rng, number)
        where.append(str(lines()))
    how = f"{'stopped' if stops else 'killed'} at {', '.join(where)} of {len(log)} lines"
    what = f"{stage}, {processes} process(es), {how}"
    over = [-number] if lines() == len(log) else []  # all is saved: a run may die of what comes on its way out
    if stops and p.returncode not in (0, 1 if processes > 1 else 128 + number, *over):
        return what, f"exit code {p.returncode}"
    for _ in range(2):
        program(home, *command, processes=processes)
    return what, same_run(whole, run)


def killed_extraction(home, processes, rng):
    """Kill data.py at a random moment and go on: the same stores, and the same clips, perhaps in another order."""
    home = Path(home)
    small_toy(home)
    whole, cut = home / "wholedata", home / "cutdata"
    call = lambda out: ["data.py", "dataset=cut", "backbone=toycnn", f"root={home}/data/toy/clips", f"data_dir={out}"]
    if not (whole / "cut" / "train.jsonl").exists():
        program(home, *call(whole))
    shutil.rmtree(cut, ignore_errors=True)
    p = start(home, *call(cut), processes=processes)
    done = lambda: len(list((cut / "cut" / "toycnn" / ".parts").glob("*.safetensors")))
    wait_for(p, done, rng.randint(0, 28), rng)
    kill(p, rng)
    there, wrong = done(), ""
    program(home, *call(cut), processes=processes)
    for split in SPLITS:
        stores = [folder / "cut" / "toycnn" / f"{split}.safetensors" for folder in (whole, cut)]
        lines = [sorted(open(folder / "cut" / f"{split}.jsonl")) for folder in (whole, cut)]
        if not same_tensors(*stores) or lines[0] != lines[1]:
            wrong = f"{split} differs"
    return f"extraction, {processes} process(es), killed at {there} of 28 clips", wrong

# ---------------------------------------------------------------------------------------------------------------------
# The estimate of a run's memory, beside what it then holds

WATCH = """
import sys
sys.path.insert(0, {root!r})
import train
from scripts.memory import held, watch

def join(device, real=train.join):
    global base, peak
    real(device)
    import torch._dynamo  # the optimizer would: part of the program, not of the run
    base, peak = held(), watch()

train.join = join
sys.argv.append("estimate=true")
train.main()
sys.argv.pop()
train.main()
print("HELD", peak[0] - base)
"""


def random_llm(folder, tokenizer, **sizes):
    """A LLaMA of any size with random weights, in Hugging Face's layout, with a tokenizer.model that lies elsewhere."""
    args = ModelArgs(**sizes)
    tensors = ((name, torch.randn(shape) * 0.02) for name, shape in args.shapes().items())
    write_hf(str(folder), args, tensors, os.path.dirname(tokenizer), torch.float32)


def peak(home, *args, **env):
    """A short run on the toy in home/data -> (GB that estimate=true says, GB held above the imported program)."""
    Path(home, "watch.py").write_text(WATCH.format(root=str(ROOT)))
    command = [sys.executable, f"{home}/watch.py", "out_dir=peak", *args]
    done = subprocess.run(command, cwd=home, env=ENV | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    said, held = re.search(r"in all +([\d.]+) GB", done.stdout), re.search(r"HELD (\d+)", done.stdout)
    return float(said[1]), int(held[1]) / 1e9

# ---------------------------------------------------------------------------------------------------------------------

def break_files(cfg, home):
    """Hostile files, damaged files, faults inside a save -> how many went wrong."""
    wrong, began = 0, time.time()
    for what, code, said in hostile(home):
        wrong += bool(code != 1 or verdict(code, said))
        print(f"{what}: {'WRONG' if code != 1 else 'refused'}: {said.strip()[-300:]}")
    count, bad = corruptions(home, cfg.trials, cfg.seed)
    ended = ", ".join(f"{n} {what}" for what, n in sorted(count.items()))
    print(f"{cfg.trials} damaged files: {ended}, {time.time() - began:.0f} s", flush=True)
    dist = checkpoint.dist
    for fault in ("kill", 28, 30, 5):
        for keep in (1, 3):
            ended = faulty_saves(home, fault, keep)
            wrong += sum(between not in (1, 2) or after != 3 for *_, between, after in ended)
            what = "a kill" if fault == "kill" else os.strerror(fault)
            print(f"{len(ended)} saves with keep={keep}, {what} at every call in turn: afterwards steps "
                  f"{sorted({e[2] for e in ended})}, after the next save {sorted({e[3] for e in ended})}", flush=True)
    checkpoint.dist = dist
    return wrong + len(bad)


def main():
    cfg = configure(__file__)
    torch.set_num_threads(1)
    home, began = Path(cfg.folder or tempfile.mkdtemp(prefix="faults")), time.time()
    home.mkdir(parents=True, exist_ok=True)
    wrong = break_files(cfg, home) if cfg.trials else 0
    rng = random.Random(cfg.seed)
    for trial in range(cfg.kills):
        if trial % 5 == 4:
            what, differs = killed_extraction(home, 1 + trial // 5 % 2, rng)
        else:
            number = signal.SIGTERM if trial % 5 in (1, 3) else signal.SIGKILL
            what, differs = killed_run(home, ("align", "sft")[trial % 2], 1 + trial // 2 % 2, rng, number)
        wrong += bool(differs)
        print(f"kill {trial + 1} of {cfg.kills}: {what}: {differs or 'went on exactly'}, {time.time() - began:.0f} s",
              flush=True)
    print(f"{cfg.trials} damaged files and {cfg.kills} kills, seed {cfg.seed}, {wrong} went wrong, "
          f"{time.time() - began:.0f} s")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    launch(main)
