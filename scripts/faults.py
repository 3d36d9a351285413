"""
Breaks things on purpose: damaged files, kills inside a save, kills of whole runs. Whatever happens must be a clear line or no harm at all.

    python -m scripts.faults                          # 1,000 damaged files, a kill at every call of a save, 25 kills of runs
    python -m scripts.faults trials=5000 kills=0 seed=7

Each trial on a file runs in a forked process with a limit on time and memory, through config.launch as a program does: it must end with exit code 0,
or with 1 and one line. A run that was killed must go on to the very losses and weights of one that was not. tests/test_faults.py runs a few of each.
"""
import collections
import contextlib
import glob
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

import config
import data
import eval as evaluation
import lora
import model
import readers
import train
import weights
from scripts import toy
from video import read_video

trials = 1000  # damaged files
kills = 25  # of runs, each continued to its end
seed = 0  # of everything random here
limit = 20  # seconds a damaged file may take
folder = ""  # where to work; "" = a temporary folder

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["ltn_dim=32", "ltn_heads=2", "batch_size=6", "epochs=2", "eval_clips=2", "eval_every=3", "log_every=1", "save_every=1", "warmup=2", "keep=2", "max_steps=7"]

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
                config.launch(job)
            except SystemExit as e:  # a wrong command line
                code = e.code
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        err.seek(0)
        return code, err.read().decode(errors="replace")


ABSURD = [b"-1", b"0", b"1000000000", b"99999999999999999999", b"1e400", b"NaN", b"null", b'"x"', b"[]", b"{}", b"true", b"0.5", b'"../../x"', b'"/etc/passwd"']


def damage(raw, rng):
    """Bytes -> bytes with one or more wounds, and what was done."""
    raw, kind = bytearray(raw), rng.choice(["flip", "flip", "noise", "cut", "lose", "insert", "zeros", "value", "value", "swap", "empty"])
    reach = rng.choice([len(raw), len(raw), min(len(raw), 1000)])  # often near the beginning, where headers are
    at, n = rng.randrange(reach or 1), rng.choice([1, 4, 100])
    if kind == "flip":
        for _ in range(n):
            if raw:
                raw[rng.randrange(reach)] ^= 1 << rng.randrange(8)
    elif kind == "noise":
        raw[at:at + n] = rng.randbytes(n)
    elif kind == "cut":
        del raw[at:]
    elif kind == "lose":
        del raw[at:at + n]
    elif kind == "insert":
        raw[at:at] = rng.randbytes(n)
    elif kind == "zeros":
        raw[at:at + n] = bytes(n)
    elif kind == "swap":
        other = rng.randrange(len(raw) or 1)
        raw[at:at + n], raw[other:other + n] = raw[other:other + n], raw[at:at + n]
    elif kind == "value":  # a number or a word in a text becomes something that parses and makes no sense
        found = [m for m in re.finditer(rb'(?<=[:\[\t ])\s*("[^"\n]{0,80}"|-?\d[\d.e+-]*|true|false|null)', bytes(raw[:200000]))]
        if found:
            m = rng.choice(found)
            raw[m.start(1):m.end(1)] = rng.choice(ABSURD)
    else:
        raw.clear()
    return bytes(raw), kind


def material(home):
    """A small toy with runs of both stages and one file at least of every type -> [(file, loader)]."""
    home = Path(home)
    llm, run, files = home / "data" / "toy" / "llm", reference(home, "sft", 1) / "last", home / "files"
    files.mkdir(exist_ok=True)

    def load_llm(path):
        model.LLaMA.from_pretrained(str(path)), model.open_llm(str(path)).describe(torch.float32)

    def tokenize(path):
        tokenizer = data.Tokenizer(str(path)).fit(10**6)
        tokenizer.decode(tokenizer.encode("am abend regnet es"))

    def load_run(path):
        sllama, tokenizer, _ = evaluation.load_model(str(path), device="cpu", llm=str(llm))
        evaluation.translate(sllama, [torch.randn(9, 1024)], tokenizer, max_new_tokens=2)

    def load_moments(path):
        state, *_ = evaluation.read_checkpoint(str(run))
        args = model.open_llm(str(llm)).args
        sllama = model.SLLaMA(args, 1024, SimpleNamespace(**state["config"])).requires_grad_(False)
        sllama.adaptor.requires_grad_(True)
        train.load_optimizer(str(path / "optimizer.safetensors"), sllama, torch.optim.AdamW(sllama.adaptor.parameters()), 2)

    def load_clips(path):
        clips = data.Clips(str(path), "toy", "toycnn", "train")
        tokenizer = data.Tokenizer(str(llm))
        data.pack([clips.sample(i, ([1], []), tokenizer) for i in range(len(clips))])

    hf = files / "hf"
    if not hf.exists():
        llama = model.LLaMA.from_pretrained(str(llm))
        lora.export_hf(llama, str(hf), str(llm), shard_bytes=10**6)  # several shards and their index
    fast = files / "fast"
    if not fast.exists():
        fast.mkdir()
        with contextlib.suppress(ImportError):
            import tokenizers
            tok = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
            tok.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
            tok.train_from_iterator(["am abend regnet es im norden"] * 3, tokenizers.trainers.BpeTrainer(special_tokens=["<unk>", "<s>", "</s>"], show_progress=False))
            tok.save(str(fast / "tokenizer.json"))
            (fast / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    videos = files / "videos"
    if not videos.exists():
        (videos / "frames").mkdir(parents=True)
        import av
        video = read_video(str(home / "data" / "toy" / "clips" / "00000.mp4"))
        shutil.copy(home / "data" / "toy" / "clips" / "00000.mp4", videos / "a.mp4")
        for name, codec, format in (("a.gif", "gif", "rgb8"), ("a.webm", "libvpx", "yuv420p")):
            with av.open(str(videos / name), "w") as container:
                stream = container.add_stream(codec, rate=25)
                stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], format
                for frame in video[:12]:
                    container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
                container.mux(stream.encode())
        for i in range(2):
            with av.open(str(videos / "frames" / f"{i}.png"), "w") as container:
                stream = container.add_stream("png", rate=1)
                stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], "rgb24"
                container.mux(stream.encode(av.VideoFrame.from_ndarray(video[i])))
                container.mux(stream.encode())
    if not (files / "googlenet.pth").exists():
        torch.save(model.GoogLeNet().state_dict(), files / "googlenet.pth")
        torch.save(model.GoogLeNet().state_dict(), files / "old.pth", _use_new_zipfile_serialization=False)
    hyps = files / "hyps.jsonl"
    hyps.write_text("".join(json.dumps({"name": str(i), "hyp": "es regnet", "ref": "am abend regnet es"}) + "\n" for i in range(3)))
    shutil.copy(ROOT / "config" / "isl.py", files / "settings.py")

    kinds = [(llm / "params.json", load_llm), (llm / "consolidated.00.pth", load_llm), (llm / "tokenizer.model", tokenize), (hf / "config.json", load_llm),
             (hf / "model.safetensors.index.json", load_llm), (sorted(hf.glob("*.safetensors"))[0], load_llm),
             *((run / f, load_run) for f in ("vision.safetensors", "adapter_model.safetensors", "adapter_config.json", "state.json")),
             (run / "optimizer.safetensors", load_moments), (home / "data" / "toy" / "train.jsonl", load_clips),
             (home / "data" / "toy" / "toycnn" / "train.safetensors", load_clips),
             (home / "data" / "toy" / "clips" / "clips.tsv", lambda path: readers.read_clips(str(path))),
             *((videos / f, lambda path, f=f: read_video(str(path / f))) for f in ("a.mp4", "a.gif", "a.webm")),
             (videos / "frames" / "0.png", lambda path: read_video(str(path))),
             *((files / f, lambda path, f=f: model.GoogLeNet().load(str(path / f))) for f in ("googlenet.pth", "old.pth")),
             (hyps, lambda path: evaluation.score_files(str(path / "hyps.jsonl"), "", "de")),
             (files / "settings.py", lambda path: config.configure(str(ROOT / "train.py"), [str(path / "settings.py")], stages=("align", "sft")))]
    if (fast / "tokenizer.json").exists():
        kinds += [(fast / "tokenizer.json", tokenize), (fast / "tokenizer_config.json", tokenize)]
    return kinds


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
    kinds, rng, count, bad = material(home), random.Random(seed), collections.Counter(), []
    for trial in range(n):
        path, load = kinds[trial % len(kinds)]
        place = path.parent if path.parent.name != "toy" and path.parent.name != "toycnn" else path.parents[1 + (path.parent.name == "toycnn")]
        sound = path.read_bytes()
        wounded, kind = damage(sound, rng)
        wound = path.with_name(path.name + ".sound")
        os.rename(path, wound)  # mapped files of this process stay what they are
        try:
            path.write_bytes(wounded)
            code, said = forked(lambda: load(place), seconds)
        finally:
            os.replace(wound, path)
        if wrong := verdict(code, said):
            bad.append((path.name, kind, f"trial {trial}: {wrong}", said))
            say(f"{path.name}, {kind}, trial {trial}: {wrong}\n{said[-1500:]}")
        count["wrong" if wrong else "refused" if code else "unharmed"] += 1
    return count, bad


def hostile(home, seconds=20):
    """Files that were made to do harm: each must be refused -> [(what, exit code, stderr)]. A canary tells whether code was executed."""
    place = Path(home) / "hostile"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    canary = place / "executed"

    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    def meta(name, **params):
        (place / name).mkdir()
        (place / name / "params.json").write_text(json.dumps({"dim": 8, "n_layers": 1, "n_heads": 1, "norm_eps": 1e-5} | params))
        return str(place / name)

    def hf(name, **changes):
        (place / name).mkdir()
        c = dict(model_type="llama", hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=8, rms_norm_eps=1e-5) | changes
        (place / name / "config.json").write_text(json.dumps(c))
        save_file({"model.norm.weight": torch.ones(8)}, place / name / "model.safetensors")
        return str(place / name)

    def text(name, content):
        (place / name).write_bytes(content)
        return str(place / name)

    pickled = meta("pickled")
    torch.save({"tok_embeddings.weight": Harm()}, os.path.join(pickled, "consolidated.00.pth"))
    text("plain.pth", pickle.dumps({"a": Harm()}))
    with open(place / "big.json", "wb") as f:
        f.truncate(3 * 10**9)  # a hole in the disk, gigabytes to a reader
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    jobs = {
        "a pickle that runs a command": lambda: model.open_llm(pickled),
        "a pickle of old that runs a command": lambda: weights.load_tensors(str(place / "plain.pth")),
        "a safetensors header of 10 GB": lambda: weights.load_tensors(text("long.safetensors", (10**10).to_bytes(8, "little") + b"{}")),
        "a tensor of 4 TB in 100 bytes": lambda: weights.load_tensors(text("wide.safetensors", len(header).to_bytes(8, "little") + header)),
        "JSON of 3 GB": lambda: weights.load_json(str(place / "big.json")),
        "JSON nested 100,000 deep": lambda: weights.load_json(text("deep.json", b'{"a":' + b"[" * 10**5)),
        "a number of 100,000 digits": lambda: weights.load_json(text("digits.json", b'{"a": ' + b"9" * 10**5 + b"}")),
        "hidden_size=10**9": lambda: model.LLaMA.from_pretrained(hf("wide", hidden_size=10**9)),
        "num_hidden_layers=10**9": lambda: model.LLaMA.from_pretrained(hf("deep", num_hidden_layers=10**9)),
        "num_attention_heads=0": lambda: model.LLaMA.from_pretrained(hf("headless", num_attention_heads=0)),
        "n_layers=10**9": lambda: model.LLaMA.from_pretrained(meta("deepmeta", n_layers=10**9)),
        "shards named outside of the folder": lambda: model.open_llm(index(hf("outside"))),
        "a config file with code": lambda: config.read_literals(text("code.py", f"import os\nos.system('touch {canary}')\n".encode()), strict=True),
    }

    def index(path):
        Path(path, "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../../etc/passwd"}}))
        return path

    ended = [(what, *forked(job, seconds)) for what, job in jobs.items()]
    return ended + [("code was executed", -1, "")] * canary.exists()

# ---------------------------------------------------------------------------------------------------------------------
# Kills and faults inside a save

def small_model(step):
    """A tiny model with LoRA, an optimizer that has moved, and a state; all its numbers tell the step."""
    torch.manual_seed(0)
    args = model.ModelArgs(dim=16, n_layers=1, n_heads=2, n_kv_heads=2, hidden_dim=24, vocab_size=20, head_dim=8)
    cfg = SimpleNamespace(ltn=False, adaptor="linear", prompt="{clip}", language="German", label_smoothing=0.0, freeze_llm=False, llm="")
    sllama = model.SLLaMA(args, 8, cfg).requires_grad_(False)
    sllama.adaptor.requires_grad_(True)
    lora.apply_lora(sllama.llm, 2, 4, ["wq"])
    for p in sllama.parameters():
        if p.requires_grad:
            p.data.fill_(step)
            p.grad = torch.ones_like(p)
    optimizer = torch.optim.AdamW([p for p in sllama.parameters() if p.requires_grad], lr=0.0, weight_decay=0.0)
    optimizer.step()
    return sllama, optimizer, {"step": step, "config": vars(cfg), "dim_in": 8}, cfg


def saved_step(place):
    """The step of the checkpoint that a resumed run would find in place, all of whose files must be whole and of that step."""
    found = evaluation.find_checkpoint(str(place))
    state, tensors, _ = evaluation.read_checkpoint(found)
    moments = weights.load_tensors(os.path.join(found, "optimizer.safetensors"))
    assert moments and all(bool((t == state["step"]).all()) for k, t in tensors.items() if k.startswith("adaptor") or "lora" in k)
    return state["step"]


CALLS = [(os, "rename"), (os, "fsync"), (os, "makedirs"), (shutil, "rmtree"), (train, "save_file"), (lora, "save_file"), (json, "dump")]


def faulty_saves(home, fault, keep=1, say=print):
    """
    Save step 1, then step 2 with a fault at its n-th call, for every n, then step 3 -> [(n, call, step found after the fault, after step 3)].
    fault: "kill" or an OSError's number. In between, a reader must find step 1 or 2 in full.
    """
    train.dist = SimpleNamespace(all_reduce=lambda t: None)
    place, ended = Path(home) / "saves", []
    for n in range(1000):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        last, hit = str(place / "last"), place / "hit"

        def second():
            calls = iter(range(10**6))
            for owner, name in CALLS:
                def wrapped(*args, real=getattr(owner, name), name=name, **kwargs):
                    if next(calls) == n:
                        hit.write_text(name)
                        if fault == "kill":
                            os.kill(os.getpid(), signal.SIGKILL)
                        raise OSError(fault, os.strerror(fault))
                    return real(*args, **kwargs)
                setattr(owner, name, wrapped)
            train.save(last, *small_model(2), keep)

        train.save(last, *small_model(1), keep)
        code, said = forked(second, 20)
        assert code == (-signal.SIGKILL if fault == "kill" and hit.exists() else 0), said
        between = saved_step(place)
        train.save(last, *small_model(3), keep)
        ended.append((n, hit.read_text() if hit.exists() else "none", between, saved_step(place)))
        if not hit.exists():
            return ended  # that save had fewer calls than n

# ---------------------------------------------------------------------------------------------------------------------
# Kills of whole runs

def start(home, name, *args, processes=1):
    command = [sys.executable, *(["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] if processes > 1 else []), str(ROOT / name), *args]
    return subprocess.Popen(command, cwd=home, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def program(home, name, *args, processes=1):
    """Run a program to its end."""
    p = start(home, name, *args, processes=processes)
    said = p.communicate(timeout=600)[0]
    assert p.returncode == 0, said[-3000:]
    return said


def children(pid):
    """Processes that a process has started, and theirs."""
    found = []
    for stat in glob.glob("/proc/[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            if int(open(stat).read().rpartition(")")[2].split()[1]) == pid:
                child = int(stat.split("/")[2])
                found += [child, *children(child)]
    return found


def kill(p, rng):
    """SIGKILL to everything of a run at once, or to one worker alone."""
    below = children(p.pid)
    with contextlib.suppress(ProcessLookupError):
        if below and rng.random() < 0.5:
            os.kill(rng.choice(below), signal.SIGKILL)  # torchrun ends the others
        else:
            for pid in [p.pid, *below]:
                os.kill(pid, signal.SIGKILL)
    p.communicate(timeout=60)
    for pid in below:  # nobody may still be writing when the run goes on
        while os.path.exists(f"/proc/{pid}") and "\nState:\tZ" not in open(f"/proc/{pid}/status").read():
            time.sleep(0.05)


def wait_for(p, count, n, rng):
    """Until count() has come to n (or the run is over), and a random moment more."""
    until = time.time() + 120
    while p.poll() is None and time.time() < until and count() < n:
        time.sleep(0.005)
    time.sleep(rng.random() * 0.1)


def same_run(a, b):
    """What differs between two runs' folders: losses, weights, moments, best/. -> '' if nothing does."""
    logs = [[json.loads(line) for line in open(run / "log.jsonl")] for run in (a, b)]
    keys = ("step", "loss", "grad_norm", "lr", "dev_loss", "dev_bleu")
    if [[e.get(k) for k in keys] for e in logs[0]] != [[e.get(k) for k in keys] for e in logs[1]]:
        return f"logs differ: steps {[e['step'] for e in logs[0]]} and {[e['step'] for e in logs[1]]}"
    for file in ["best/vision.safetensors", "last/vision.safetensors", "last/optimizer.safetensors", "last/adapter_model.safetensors"]:
        if (a / file).exists() != (b / file).exists():
            return f"{file} is missing"
        if (a / file).exists():
            x, y = load_file(a / file), load_file(b / file)
            if x.keys() != y.keys() or any(not torch.equal(x[k], y[k]) for k in x):
                return f"{file} differs"
    return ""


def wanted(home, stage, out):
    return [f"stage={stage}", f"out_dir={out}", *SMALL, "lora_dropout=0.1", *([f"init_from={home}/whole1/toy/align"] if stage == "sft" else [])]


def reference(home, stage, processes):
    """The folder of a run that nobody killed; made where it is absent."""
    toy.build(str(Path(home) / "data"), n_train=20, n_dev=4, n_test=4, text_steps=3, text_batch=8)
    if stage == "sft":
        reference(home, "align", 1)
    run = Path(home) / f"whole{processes}" / "toy" / stage
    if not (run / "last" / "state.json").exists():
        program(home, "train.py", *wanted(home, stage, f"whole{processes}"), processes=processes)
    return run


def killed_run(home, stage, processes, rng):
    """Kill a run of a stage at a random moment, some of them twice, and go on -> (what, what differs from a run that nobody killed)."""
    whole, out, where = reference(home, stage, processes), Path(home) / "killed", []
    shutil.rmtree(out, ignore_errors=True)
    log = out / "toy" / stage / "log.jsonl"
    lines = lambda: log.read_bytes().count(b"\n") if log.exists() else 0
    for _ in range(rng.choice([1, 1, 2])):
        p = start(home, "train.py", *wanted(home, stage, out), "resume=true", processes=processes)
        wait_for(p, lines, rng.randint(lines(), 6), rng)
        kill(p, rng)
        where.append(lines())
    program(home, "train.py", *wanted(home, stage, out), "resume=true", processes=processes)
    return f"{stage}, {processes} process(es), killed at {', '.join(map(str, where))} of 7 lines", same_run(whole, out / "toy" / stage)


def killed_extraction(home, processes, rng):
    """Kill data.py at a random moment and go on: the same stores, byte for byte but for the order in which the data set was noted."""
    home = Path(home)
    toy.build(str(home / "data"), n_train=20, n_dev=4, n_test=4, text_steps=3, text_batch=8)
    call = lambda out: ["dataset=cut", f"root={home}/data/toy/clips", f"data_dir={home}/{out}"]
    if not (home / "wholedata" / "cut" / "train.jsonl").exists():
        program(home, "data.py", *call("wholedata"))
    shutil.rmtree(home / "cutdata", ignore_errors=True)
    p = start(home, "data.py", *call("cutdata"), processes=processes)
    done = lambda: len(list((home / "cutdata" / "cut" / "toycnn" / ".parts").glob("*.safetensors")))
    wait_for(p, done, rng.randint(0, 28), rng)
    kill(p, rng)
    there = done()
    program(home, "data.py", *call("cutdata"), processes=processes)
    wrong = ""
    for split in ("train", "dev", "test"):
        x, y = (load_file(home / d / "cut" / "toycnn" / f"{split}.safetensors") for d in ("wholedata", "cutdata"))
        lines = [sorted(open(home / d / "cut" / f"{split}.jsonl")) for d in ("wholedata", "cutdata")]
        if x.keys() != y.keys() or any(not torch.equal(x[k], y[k]) for k in x) or lines[0] != lines[1]:
            wrong = f"{split} differs"
    return f"extraction, {processes} process(es), killed at {there} of 28 clips", wrong


# ---------------------------------------------------------------------------------------------------------------------
# The estimate of a run's memory, beside what it then holds

WATCH = """
import sys
sys.path.insert(0, {root!r})
import train
from scripts.memory import held, watch

def setup(device, real=train.setup):
    global base, peak
    real(device)
    import torch._dynamo  # the optimizer would: part of the program, not of the run
    base, peak = held(), watch()

train.setup, train.configure = setup, lambda program, real=train.configure, **more: real(train.__file__, **more)
sys.argv.append("estimate=true")
train.main()
sys.argv.pop()
train.main()
print("HELD", peak[0] - base)
"""


def random_llm(folder, tokenizer, **sizes):
    """A LLaMA of any size with random weights, in Hugging Face's layout."""
    Path(folder).mkdir()
    with torch.device("meta"):
        shapes = {k: p.shape for k, p in model.LLaMA(model.ModelArgs(**sizes)).named_parameters()}
    save_file({weights.to_hf(k): torch.randn(s) * 0.02 for k, s in shapes.items()}, Path(folder) / "model.safetensors")
    c = {"model_type": "llama", "hidden_size": sizes["dim"], "num_hidden_layers": sizes["n_layers"], "num_attention_heads": sizes["n_heads"], "head_dim": sizes["head_dim"],
         "num_key_value_heads": sizes["n_kv_heads"], "intermediate_size": sizes["hidden_dim"], "vocab_size": sizes["vocab_size"], "rms_norm_eps": 1e-5}
    (Path(folder) / "config.json").write_text(json.dumps(c))
    shutil.copy(tokenizer, folder)


def peak(home, *args, **env):
    """A short run on the toy in home/data -> (GB that estimate=true says, GB that the run holds above the imported program)."""
    (Path(home) / "watch.py").write_text(WATCH.format(root=str(ROOT)))
    command = [sys.executable, str(Path(home) / "watch.py"), "out_dir=peak", *args]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(re.search(r"in all +([\d.]+) GB", done.stdout)[1]), int(re.search(r"HELD (\d+)", done.stdout)[1]) / 1e9

# ---------------------------------------------------------------------------------------------------------------------

def main():
    cfg = config.configure(__file__)
    torch.set_num_threads(1)
    home, began = Path(cfg.folder or tempfile.mkdtemp(prefix="faults")), time.time()
    home.mkdir(parents=True, exist_ok=True)
    wrong = 0
    if cfg.trials:
        for what, code, said in hostile(home, cfg.limit):
            wrong += bool(code != 1 or verdict(code, said))
            print(f"{what}: {'WRONG' if code != 1 else 'refused'}: {said.strip()[-300:]}")
        count, bad = corruptions(home, cfg.trials, cfg.seed, cfg.limit)
        wrong += len(bad)
        print(f"{cfg.trials} damaged files: " + ", ".join(f"{n} {what}" for what, n in sorted(count.items())) + f", {time.time() - began:.0f} s", flush=True)
        dist = train.dist
        for fault in ("kill", 28, 30, 5):
            for keep in (1, 3):
                ended = faulty_saves(home, fault, keep)
                wrong += sum(between not in (1, 2) or after != 3 for *_, between, after in ended)
                print(f"{len(ended)} saves with keep={keep}, {'a kill' if fault == 'kill' else os.strerror(fault)} at every call in turn: afterwards steps "
                      f"{sorted({e[2] for e in ended})}, after the next save {sorted({e[3] for e in ended})}", flush=True)
        train.dist = dist
    rng = random.Random(cfg.seed)
    for trial in range(cfg.kills):
        if trial % 5 == 4:
            what, differs = killed_extraction(home, 1 + trial // 5 % 2, rng)
        else:
            what, differs = killed_run(home, ("align", "sft")[trial % 2], 1 + trial // 2 % 2, rng)
        wrong += bool(differs)
        print(f"kill {trial + 1} of {cfg.kills}: {what}: {differs or 'went on exactly'}, {time.time() - began:.0f} s", flush=True)
    print(f"{cfg.trials} damaged files and {cfg.kills} kills, seed {cfg.seed}, {wrong} went wrong, {time.time() - began:.0f} s")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    config.launch(main)
