"""
Trains SL-LLaMA, one loop for both stages of the paper's Figure 3.

    torchrun --nproc_per_node=2 train.py stage=align      # language alignment: local transformer + adaptor learn, the LLM is frozen
    torchrun --nproc_per_node=2 train.py stage=sft        # supervised fine-tuning with a prompt: adaptor + LoRA learn
    python train.py config/phoenix14t_7b.py stage=align   # one process, the paper's setting

On a fresh clone the first command makes the toy data set and its tiny LLaMA. `python train.py help` prints every variable.
"""
import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from itertools import pairwise

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

from config import VERSION, BadInput, configure, launch, pick_device, pick_dtype, print0, rank, sync, usage_error, whole, world
from data import Clips, Tokenizer, pack, prompt_ids, spread, stateless
from eval import bleu, find_checkpoint, gathered, language_code, read_checkpoint, rouge, translate
from lora import TARGETS, adapter, apply_lora, write_adapter
from model import SLLaMA, fill, full, open_llm
from weights import load_tensors

# what to run
stage = "align"  # align, then sft
dataset = "toy"  # folder in data_dir (paper: PHOENIX-2014T, CSL-Daily)
data_dir = "data"  # holds the data sets
backbone = "toycnn"  # label of the features (paper: a pre-trained Inception, 1024-d; Table 5 for others)
llm = ""  # folder of raw LLaMA weights, Meta's or Hugging Face's; "" = the toy's (paper: LLaMA-2 7B and 13B)
out_dir = "out"  # holds the runs: out_dir/dataset/stage
run = ""  # a name: the run goes to out_dir/dataset/NAME/stage
init_from = ""  # checkpoint to start from; "" = nothing for align, the align run beside it for sft
resume = False  # go on from the run's last/
estimate = False  # only print the memory that the run will need, in GB a process
seed = 1337  # first weights, order of the clips, frame drop
bos_id = -1  # -1 = the tokenizer's own
eos_id = -1  # -1 = the tokenizer's own
# the model
ltn = True  # the local transformer (Table 6)
ltn_dim = 192  # its width, 0 = the features' (paper: 1024)
ltn_layers = 2  # its depth (paper: silent)
ltn_heads = 6  # its heads (paper: silent)
window = 8  # frames, half to each side (paper: 8; Table 9: 4, 8, 12, 16)
adaptor = "mlp"  # mlp, mlp_noact, linear (paper: mlp; Table 3)
lora_rank = 8  # (paper: 8; Table 8: 4, 8, 16, 32)
lora_alpha = 16.0  # the update is scaled by alpha/rank (paper: silent)
lora_dropout = 0.0  # (paper: silent)
lora_targets = "wq,wk,wv,wo"  # of wq,wk,wv,wo,w1,w2,w3 (paper: each attention weight)
max_clips = 0  # learn from so many train clips, spread over the set; 0 = all
max_frames = 0  # longer clips are thinned out evenly to so many, 0 = no limit (paper: silent)
language = "German"  # its name goes into the prompt
lang = ""  # its code, which picks BLEU's tokens; "" = by language: German, English, Chinese
label_smoothing = 0.0  # (paper: silent)
# the optimizer
grad_accum = 1  # micro-batches a step and process (paper: silent)
weight_decay = 0.01  # of AdamW, on matrices alone (paper: silent)
warmup = 30  # steps of linear warm-up, then cosine to a tenth (paper: silent)
grad_clip = 1.0  # largest norm of the gradient, 0 = any (paper: silent)
max_steps = -1  # stop here, 0 = after one epoch, -1 = never; the learning rate keeps to epochs
# the machine
device = "auto"  # auto (a GPU where there is one for each process), cpu, cuda
dtype = "auto"  # of the frozen weights and the arithmetic: auto, float32, bfloat16, float16; what learns is float32
compile = False  # torch.compile on each block
activation_checkpointing = False  # recompute the LLM's blocks in the backward pass
cpu_offload = False  # keep the sharded parameters and the optimizer in the CPU's memory
# looking at it
log_every = 20  # steps, 0 = once an epoch, -1 = never
eval_every = 0  # steps between dev losses and dev BLEU, 0 = once an epoch, -1 = never
eval_clips = -1  # dev clips decoded for BLEU, spread over the set, -1 = all, 0 = none: then best/ is the lowest dev loss
beam = 1  # beam width of that decoding
save_every = 0  # steps between checkpoints, 0 = once an epoch, -1 = at the end only
keep = 1  # checkpoints to keep: last/, and before it last.1/, last.2/, ...
max_skips = 10  # steps in a row whose loss or gradient is not finite, then the run stops

# what differs between the stages
align = {
    "epochs": 12,  # (paper: 3)
    "batch_size": 16,  # clips a step, over all processes (paper: 4)
    "lr": 1e-3,  # peak (paper: silent)
    "frame_drop": 0.1,  # share of frames left out at random (paper: 0.1)
    "prompt": "{clip}",  # the frames alone
    "train_ltn": True,
    "freeze_llm": True,  # no LoRA
    "train_embeddings": False,  # the LLM's word embeddings
}
sft = {
    "epochs": 5,  # (paper: 2)
    "batch_size": 16,  # (paper: 2)
    "lr": 1e-3,
    "frame_drop": 0.1,  # (paper: silent)
    "prompt": "[INST] <sign> {clip} </sign> \n Translate the sign language into {language} text. [/INST]",  # section 3.2
    "train_ltn": False,  # (paper: Figure 3, frozen)
    "freeze_llm": False,  # LoRA learns
    "train_embeddings": False,  # (paper: learn, Table 4's best row)
}

SHAPE = ("ltn", "ltn_dim", "ltn_layers", "ltn_heads", "window", "adaptor", "backbone")  # a stage must agree in these with the one it starts from
FREE = ("resume", "run", "out_dir", "data_dir", "init_from", "device", "dtype", "compile", "activation_checkpointing", "cpu_offload", "grad_accum",
        "max_steps", "log_every", "eval_every", "save_every", "keep", "max_skips", "estimate")  # and a resumed run with itself in all but these

LOWERS = "grad_accum= (more micro-batches of fewer clips), batch_size=, activation_checkpointing=true, max_frames=, cpu_offload=true, more processes"


def setup(device):
    """Join the process group; one process needs no torchrun."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # gloo beside NCCL: cpu_offload clips its gradients on the CPU
    alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group(backend, timeout=timedelta(hours=2), **alone)  # the others wait while the first one makes the toy


def note_signals():
    """A list that SIGTERM and SIGINT are noted in from now on: the loop looks at it once a step. A second Ctrl-C ends the process at once."""
    asked = []  # (signal, when)

    def note(number, frame):
        # a scheduler signals every process, and torchrun passes on what itself has got: within a second it is the same wish
        if asked and number == signal.SIGINT and time.time() - asked[0][1] > 1:
            os._exit(130)
        asked.append((number, time.time()))

    note.asked = asked  # launch looks there
    signal.signal(signal.SIGTERM, note), signal.signal(signal.SIGINT, note)
    return asked


def groups(model):
    """The modules that FSDP2 gathers and scatters as one: the LLM's blocks and the root. None where shard() had nothing to do."""
    return [m for m in model.modules() if hasattr(m, "unshard")]


def build(cfg, args, dim_in, device, dtype):
    """SLLaMA on the meta device, sharded: its structure, what of it learns, where it will lie. model.load then gives it its values."""
    with torch.device("meta"):
        model = SLLaMA(args, dim_in, cfg)
    model.requires_grad_(False)
    model.adaptor.requires_grad_(True)
    for part in (model.proj, model.ltn):
        if part is not None:
            part.requires_grad_(cfg.train_ltn)
    model.llm.tok_embeddings.requires_grad_(cfg.train_embeddings)
    if not cfg.freeze_llm:
        apply_lora(model.llm, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets.split(","), cfg.lora_dropout)
    for p in model.parameters():
        p.data = p.data.to(torch.float32 if p.requires_grad else dtype)
    model.llm.activation_checkpointing = cfg.activation_checkpointing
    shard(model, device, dtype, cfg)
    return model


def shard(model, device, dtype, cfg):
    """FSDP2: each of the LLM's blocks is a group of its own, the rest (embeddings, output, local transformer, adaptor) is the root's."""
    if cfg.compile:
        torch._dynamo.config.recompile_limit = 64  # instead of 8: the first block, those between and the last, for each number of clips in a micro-batch
        for block in model.llm.layers:
            block.compile(dynamic=True)  # before fully_shard, and in place: names of weights stay what they are
    if world() == 1 and dtype == torch.float32 and not cfg.cpu_offload:
        return  # nothing to share out, to cast or to keep elsewhere: FSDP2 would only copy every weight, twice a step
    from torch.distributed.device_mesh import init_device_mesh  # half a second of imports, for those who need them
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(device.type, (world(),))  # without a mesh FSDP picks an accelerator on its own
    # frozen weights lie in dtype, what learns in fp32; both compute in dtype, and gradients are summed in fp32
    policy = MixedPrecisionPolicy(param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    how = dict(mesh=mesh, mp_policy=policy) | ({"offload_policy": CPUOffloadPolicy(pin_memory=device.type == "cuda")} if cfg.cpu_offload else {})
    for block in model.llm.layers:
        fully_shard(block, **how)
    fully_shard(model, **how)
    for m in groups(model):  # the plain sum over processes; both calls, only together they mean it on every backend and version
        m.set_gradient_divide_factor(1.0)
        m.set_force_sum_reduction_for_comms(True)


def share(indices, lengths, parts):
    """Deal the clips of a step out to micro-batches of about the same number of frames: longest first, to and fro. A part may be empty."""
    order = sorted(indices, key=lambda i: -lengths[i])
    turns = [*range(parts), *reversed(range(parts))]
    return [[i for k, i in enumerate(order) if turns[k % (2 * parts)] == p] for p in range(parts)]


def micro_batch(clips, indices, prompt, tokenizer, device, drop=0.0, key=()):
    """A packed batch of these clips; with none left for this process, one clip without targets: the collectives need every process."""
    return pack([clips.sample(i, prompt, tokenizer, drop, key) for i in indices or [0]], device, with_targets=bool(indices))


@torch.no_grad()
def evaluate(model, dev, prompt, tokenizer, device, lang, cfg, asked):
    """Dev loss a token, and BLEU and ROUGE of real decoding, the clips shared out. -> dict, the same on every process; {} after a signal."""
    model.eval()
    for m in groups(model):  # gather the weights once; from here on a forward needs no other process
        m.set_reshard_after_forward(False, recurse=False)
        m.unshard()
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    chosen, hyps = spread(len(dev), len(dev) if cfg.eval_clips < 0 else min(cfg.eval_clips, len(dev))), {}
    # FSDP2 remembers who computed last: all must have, or the next backward hangs. Clips of like length are decoded together
    mine = sorted(chosen[rank()::world()] or [0], key=lambda i: dev.lengths[i]) if chosen else []
    longest = max(len(tokenizer.encode(row["text"])) for row in dev.rows)  # a model that has not learnt to end need not babble on
    # blocks would be compiled anew for these numbers of clips, and for every length of the cache
    with torch.compiler.set_stance("force_eager") if cfg.compile else contextlib.nullcontext():
        for start in range(0, len(dev), 16 * world()):  # as many forwards on every process
            if asked:
                break
            indices = share(range(start, min(start + 16 * world(), len(dev))), dev.lengths, world())[rank()]
            loss, n = model(micro_batch(dev, indices, prompt, tokenizer, device))
            sums += torch.tensor([loss.item(), n, 0], dtype=torch.float64, device=device)
        for part in (mine[n:n + 16] for n in range(0, len(mine), 16)):
            if asked:
                break
            hyps |= zip(part, translate(model, [dev.features(i) for i in part], tokenizer, cfg.beam, max_new_tokens=2 * longest, warn=False))
    sums[2] = len(asked)
    dist.all_reduce(sums)
    scores = {} if sums[2] else {"dev_loss": (sums[0] / sums[1]).item()}
    if chosen and scores:
        hyps = gathered(hyps)
        pair = [hyps[i] for i in chosen], [dev.rows[i]["text"] for i in chosen]
        scores |= {"dev_bleu": bleu(*pair, lang), "dev_rouge": rouge(*pair, lang)}
    for m in groups(model):
        m.reshard()
        m.set_reshard_after_forward(m is not model, recurse=False)  # the root's weights are needed again at once
    model.train()
    return scores


def save(folder, model, optimizer, state, cfg, keep=1, final=False):
    """
    Write a checkpoint folder: to folder.part, then renamed, so that a reader never sees half of one. Every process must call it. keep: with the
    one before as folder.1 and so on. -> whether it is there. A disk that is full for an hour need not cost the days in memory: the checkpoint before
    stays what it is, the run says so, goes on and tries again next time; only the last save of a run (final) has no next time and raises BadInput.
    """
    vision = {k: full(v).contiguous() for k, v in model.vision_state().items()}
    lora = None if cfg.freeze_llm else adapter(model.llm, cfg.llm)
    lora = lora and ({k: full(v).contiguous() for k, v in lora[0].items()}, lora[1])
    moments, failed = {}, torch.zeros(())
    if optimizer is not None:
        for name, p in model.named_parameters():
            for key in ("exp_avg", "exp_avg_sq") if p in optimizer.state else ():
                moments[f"{key}.{name}"] = full(optimizer.state[p][key]).contiguous()
    if rank() == 0:
        part, ages = folder + ".part", [folder] + [f"{folder}.{n}" for n in range(1, max(keep, 1) + 1)]  # the last of them is one too old
        try:
            shutil.rmtree(part, ignore_errors=True)
            os.makedirs(part)
            save_file(vision, os.path.join(part, "vision.safetensors"))
            if lora:
                write_adapter(*lora, part)
            if optimizer is not None:
                save_file(moments, os.path.join(part, "optimizer.safetensors"))
            with open(os.path.join(part, "state.json"), "w") as f:
                json.dump(state, f, indent=1)
            for name in [*os.listdir(part), ""]:
                sync(os.path.join(part, name))
            if os.path.exists(folder):  # else a kill has left the newest under another age, and it must not be the one to go
                shutil.rmtree(ages[-1], ignore_errors=True)
                for younger, older in reversed([*pairwise(ages)]):
                    if os.path.exists(younger):
                        os.rename(younger, older)  # a kill here leaves folder.1, and find_checkpoint looks there too
            os.rename(part, folder)
            sync(os.path.dirname(folder))
            shutil.rmtree(ages[-1], ignore_errors=True)
        except (OSError, SafetensorError) as e:
            failed += 1
            shutil.rmtree(part, ignore_errors=True)  # a full disk gets its room back
            why = f"{folder}: the checkpoint of step {state['step']} could not be written ({e}); the one before is untouched"
            print0(why + ("" if final else ", the run goes on"), file=sys.stderr)
    dist.all_reduce(failed)
    if failed and final:
        raise BadInput(f"{folder}: the run ends without its last checkpoint; make room and go on with resume=true")
    return not failed


def load_optimizer(path, model, optimizer, step):
    """Give AdamW the moments of a checkpoint; each process takes its own rows, so the number of processes may have changed."""
    moments = load_tensors(path)
    for name, p in model.named_parameters():
        if p.requires_grad and step:  # else all steps so far were skipped
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device)}
            for key in ("exp_avg", "exp_avg_sq"):
                if f"{key}.{name}" not in moments:
                    raise BadInput(f"{path}: has no {key}.{name}")
                optimizer.state[p][key] = torch.zeros_like(p)
                fill(optimizer.state[p][key], moments[f"{key}.{name}"])


def open_log(path, step):
    """log.jsonl, ready to append; what a resumed run will log again is cut off."""
    kept = []
    if os.path.exists(path):
        for line in open(path):
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a kill cut short, or a stranger's
                kept += [line] if json.loads(line)["step"] <= step else []
    with whole(path) as f:
        f.writelines(kept)
    return open(path, "a", buffering=1)


def versions():
    """What a number in a log depends on beside the variables."""
    here = os.path.dirname(os.path.abspath(__file__))
    try:
        commit = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:
        commit = "unknown"
    return {"sl_llama": VERSION, "python": sys.version.split()[0], "torch": torch.__version__, "commit": commit, "processes": world()}


def learning_rate(step, total, cfg):
    """Linear warm-up, then a cosine to a tenth of the peak."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return cfg.lr * (0.55 + 0.45 * math.cos(math.pi * (step - cfg.warmup) / max(1, total - cfg.warmup)))


def check(cfg):
    """Values that no run could make sense of end it with exit code 2 and the variable's name."""
    for low, keys in {-1: ("max_steps", "log_every", "eval_every", "save_every", "eval_clips"),
                      0: ("seed", "window", "ltn_dim", "max_frames", "max_clips", "warmup", "lr", "grad_clip", "weight_decay", "keep"),
                      1: ("epochs", "batch_size", "grad_accum", "ltn_layers", "ltn_heads", "beam", "max_skips", "lora_rank")}.items():
        for key in keys:
            if getattr(cfg, key) < low:
                usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least {low}")
    for key in ("frame_drop", "lora_dropout", "label_smoothing"):
        if not 0 <= getattr(cfg, key) < 1:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least 0 and less than 1")
    for target in cfg.lora_targets.split(","):
        if target not in TARGETS:
            usage_error(__file__, f"lora_targets: {target!r} is none of {','.join(TARGETS)}")
    if os.path.isabs(cfg.run) or ".." in cfg.run.split("/"):
        usage_error(__file__, f"run={cfg.run}: must be a name inside out_dir")
    if cfg.prompt.count("{clip}") != 1:
        usage_error(__file__, f"prompt={cfg.prompt!r}: must hold {{clip}} once")


def starting_point(cfg, run_dir, n_clips):
    """
    What this run goes on from: its own last/ with resume=true, else init_from or the align run beside it. -> (checkpoint folder or None, its
    tensors by name, {"step", "best", "skipped", "unscored"}, whether it is the run's own). BadInput names the first variable that does not fit.
    """
    last, done = os.path.join(run_dir, cfg.stage, "last"), {"step": 0, "best": None, "skipped": 0, "unscored": None}
    source = next((p for p in (last, last + ".1") if os.path.exists(os.path.join(p, "state.json"))), None) if cfg.resume else None
    resuming = source is not None
    if cfg.resume and not resuming:
        print0(f"resume=true: {os.path.dirname(last)} holds no checkpoint yet, starting at step 0")
    if not resuming and not cfg.estimate and (cfg.init_from or cfg.stage == "sft"):
        source = find_checkpoint(cfg.init_from or os.path.join(run_dir, "align"))
    if not source:
        return None, {}, done, False
    state, tensors, _ = read_checkpoint(source)
    for key in sorted(vars(cfg).keys() - FREE) if resuming else SHAPE + ("llm",):
        was, now = state["config"].get(key), getattr(cfg, key)
        if was != now and not (key == "llm" and os.path.realpath(was) == os.path.realpath(now)):
            raise BadInput(f"{source}: was trained with {key}={was}, this run says {key}={now}")
    if resuming:
        done = {key: state.get(key) for key in done}
        kinds = {"step": (int,), "skipped": (int,), "best": (int, float, type(None)), "unscored": (dict, type(None))}
        if any(type(done[key]) not in kinds[key] for key in done) or done["step"] < 0:
            raise BadInput(f"{source}/state.json: is damaged, {done}")
        if state.get("clips") not in (None, n_clips):
            raise BadInput(f"{source}: was trained on {state['clips']}, {cfg.data_dir}/{cfg.dataset} has {n_clips}")
    return source, tensors, done, resuming


def standardise(model, clips):
    """Give a new model the mean and deviation of the training features, from 200 clips spread over the set."""
    some = torch.cat([clips.features(i).float() for i in range(0, len(clips), -(-len(clips) // 200))])
    std = some.std(0)
    if not torch.isfinite(std).all():
        raise BadInput(f"{clips.store.path}: some of its features are not finite")
    model.mean.copy_(some.mean(0)), model.std.copy_(torch.where(std > 1e-4, std, 1.0))  # a dead feature stays as it is


def print_model(model, learning, source):
    """How many parameters there are, and which of them learn."""
    count = lambda some: f"{sum(p.numel() for p in some) / 1e6:.2f}M"
    print0(f"model: {count(model.parameters())} parameters" + (f", those that have learnt before from {source}" if source else ""))
    for part in ("proj", "ltn", "adaptor", "llm.tok_embeddings", "lora_"):
        if found := [p for k, p in learning.items() if part in k]:
            print0(f"learns: {part.rstrip('_'):18} {count(found)}")
    print0(f"learns: {count(learning.values())} in all; frozen: {count(p for p in model.parameters() if not p.requires_grad)}")


def main():
    cfg = configure(__file__, stages=("align", "sft"), choices={"stage": ("align", "sft"), "adaptor": ("mlp", "mlp_noact", "linear"),
                                                                "dtype": ("auto", "float32", "bfloat16", "float16")})
    check(cfg)
    if not cfg.llm and cfg.dataset not in ("toy", "toy_zh"):
        usage_error(__file__, f"llm: dataset={cfg.dataset} needs one, llm=FOLDER; the toy's own knows nothing but the toy's language")
    cfg.llm = cfg.llm or os.path.join(cfg.data_dir, cfg.dataset, "llm")
    lang = language_code(cfg.language, cfg.lang)
    device, device_why = pick_device(cfg.device)
    setup(device)
    run_dir = os.path.join(cfg.out_dir, cfg.dataset, cfg.run)
    run_folder = os.path.join(run_dir, cfg.stage)
    last, best = (os.path.join(run_folder, name) for name in ("last", "best"))
    if rank() == 0 and not cfg.estimate:
        os.makedirs(run_folder, exist_ok=True)
        tempfile.TemporaryFile(dir=run_folder).close()  # an OSError here names the folder, and costs less than one after the model is loaded
    if cfg.dataset in ("toy", "toy_zh"):
        from scripts import toy
        toy.build(cfg.data_dir, cfg.dataset)  # nothing to do where it is there already

    # ---- data
    tokenizer = Tokenizer(cfg.llm, cfg.bos_id, cfg.eos_id)
    clips = Clips(cfg.data_dir, cfg.dataset, cfg.backbone, "train", cfg.max_frames, cfg.max_clips)
    has_dev = os.path.exists(os.path.join(cfg.data_dir, cfg.dataset, "dev.jsonl")) and cfg.eval_every >= 0
    dev = Clips(cfg.data_dir, cfg.dataset, cfg.backbone, "dev", cfg.max_frames) if has_dev else None
    extractor = json.loads(clips.store.metadata.get("settings", "{}"))
    dim_in = clips.features(0).shape[1]
    n_clips = f"{len(clips)} clips of {sum(clips.lengths)} frames"  # a resumed run must find the same
    scored = f"{len(dev)} dev clips" if dev else "no dev score: best/ is not written, eval.py takes last/"
    print0(f"data: {cfg.dataset}, {len(clips)} train clips of {sum(clips.lengths) / len(clips):.0f} frames, "
           f"features {cfg.backbone} of width {dim_in}, {scored}")
    if "standin" in extractor:
        print0(f"data: {extractor['standin']}: no score here is one of the data set")
    if cfg.max_frames:
        print0(f"data: {clips.too_long} train clips are longer than max_frames={cfg.max_frames} and are thinned out evenly")

    # ---- where to start
    source, tensors, done, resuming = starting_point(cfg, run_dir, n_clips)

    # ---- model: its structure on the meta device, sharded, then filled tensor by tensor
    raw = open_llm(cfg.llm)
    tokenizer.fit(raw.args.vocab_size)
    torch_dtype, why = pick_dtype(cfg.dtype, device)
    print0("LLM: " + raw.describe(torch_dtype))
    model = build(cfg, raw.args, dim_in, device, torch_dtype)
    if cfg.estimate:
        from scripts.memory import estimate
        order = stateless(cfg.seed, "order", 0).permutation(len(clips)).tolist()  # the first epoch's micro-batches
        micro = [m for n in range(0, len(order), cfg.batch_size) for m in share(order[n:n + cfg.batch_size], clips.lengths, world() * cfg.grad_accum)]
        longest, rows = estimate(cfg, model, clips, micro, prompt_ids(model.prompt, tokenizer), tokenizer, torch_dtype, device)
        print0(f"estimate: a process of {world()}, at the longest micro-batch, {longest}; lower it by {LOWERS}")
        for what, size in [*rows, ("in all", sum(size for what, size in rows if "on the CPU" not in what))]:
            print0(f"  {what:44} {size / 1e9:8.2f} GB")
        return dist.destroy_process_group()
    model.load(raw, "cpu" if cfg.cpu_offload else device, cfg.seed, tensors)
    del raw  # its files need not stay mapped
    if not tensors:
        standardise(model, clips)
    for name, b in model.named_buffers():
        setattr(model, name, b.to(device))  # with cpu_offload only the parameters stay behind
    learning = {k: p for k, p in model.named_parameters() if p.requires_grad}
    print_model(model, learning, source)
    print0(f"dtype {str(torch_dtype).removeprefix('torch.')} ({why}), what learns in float32; on {device.type} ({device_why})")

    # ---- optimizer and its schedule
    matrices, vectors = ([p for p in learning.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    kinds = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW([k for k in kinds if k["params"]], lr=cfg.lr, betas=(0.9, 0.95), fused=True)
    if resuming:
        load_optimizer(os.path.join(source, "optimizer.safetensors"), model, optimizer, done["step"] - done["skipped"])
    per_epoch = -(-len(clips) // cfg.batch_size)
    total = cfg.epochs * per_epoch
    stop = total if cfg.max_steps < 0 else min(total, cfg.max_steps or per_epoch)
    often = lambda n: per_epoch if n == 0 else n if n > 0 else total + 1  # 0: once an epoch, -1: never
    log_every, eval_every, save_every = often(cfg.log_every), often(cfg.eval_every), often(cfg.save_every)

    # ---- the run's folder
    log = None
    if rank() == 0:
        if not resuming and (os.path.exists(last) or os.path.exists(best)):
            n = next(n for n in range(1, 10**6) if not os.path.exists(f"{run_folder}.{n}"))
            os.rename(run_folder, f"{run_folder}.{n}")  # nothing that was saved is lost
            print0(f"{run_folder} held an earlier run: moved to {run_folder}.{n}")
        os.makedirs(run_folder, exist_ok=True)
        with whole(os.path.join(run_folder, "config.json")) as f:
            json.dump(vars(cfg) | {"versions": versions()}, f, indent=1)
        log = open_log(os.path.join(run_folder, "log.jsonl"), done["step"])
    dist.barrier()

    # ---- the loop
    prompt = prompt_ids(model.prompt, tokenizer)
    parts = world() * cfg.grad_accum
    best_score, skipped, in_a_row, unscored, saved = done["best"], done["skipped"], 0, done["unscored"], done["step"]
    checkpoint = {"config": vars(cfg), "dim_in": dim_in, "extractor": extractor, "clips": n_clips}
    model.train()
    began, tokens_seen, last_said = time.time(), 0, (time.time(), done["step"])
    if done["step"] >= stop:
        print0(f"{cfg.stage}: {source} is at step {done['step']} of {stop}, nothing is left to do")
    print0(f"{cfg.stage}: {total} steps of {cfg.batch_size} clips in {cfg.epochs} epochs"
           + (f", going on at step {done['step']}" if resuming else ""))
    asked, names = note_signals(), lambda indices: ", ".join(clips.rows[i]["name"] for i in indices)

    def standing():
        return checkpoint | {"step": finished, "best": best_score, "skipped": skipped, "unscored": unscored}

    def write(entry):
        try:
            log and log.write(json.dumps(entry) + "\n")
        except OSError as e:  # the line waits in the file's buffer for the next one
            print0(f"{run_folder}/log.jsonl: {e.strerror}, the run goes on", file=sys.stderr)

    def look(entry):
        """Dev scores into a line of the log, and best/ by them. -> None, or the line where a signal came first: it is still to be scored."""
        nonlocal best_score
        scores = evaluate(model, dev, prompt, tokenizer, device, lang, cfg, asked)
        if not scores:
            return entry
        decoded = f" BLEU-4 {scores['dev_bleu'][3]:.2f} ROUGE {scores['dev_rouge']:.2f}" if "dev_bleu" in scores else ""
        print0(f"step {finished}/{total} dev loss {scores['dev_loss']:.4f}{decoded}")
        score = scores["dev_bleu"][3] if "dev_bleu" in scores else -scores["dev_loss"]
        if (best_score is None or score > best_score) and save(best, model, None, standing() | {"best": score}, cfg):
            best_score = score
        write(entry | scores)

    finished = done["step"]
    if unscored:
        unscored = look(unscored) if dev else write(unscored)  # eval_every=-1 may have come since: then the line goes without scores
    for step in range(done["step"], stop):
        epoch, at = divmod(step, per_epoch)
        if at == 0 or step == done["step"]:
            order = stateless(cfg.seed, "order", epoch).permutation(len(clips))
        chosen = order[at * cfg.batch_size:(at + 1) * cfg.batch_size].tolist()
        mine = share(chosen, clips.lengths, parts)[rank() * cfg.grad_accum:(rank() + 1) * cfg.grad_accum]
        batches = [micro_batch(clips, part, prompt, tokenizer, device, cfg.frame_drop, (cfg.seed, "drop", epoch)) for part in mine]
        sums = [sum(len(b.targets) for b in batches), sum(len(b.tokens) for b in batches), len(asked)]
        sums = torch.tensor(sums, dtype=torch.float64, device=device)
        dist.all_reduce(sums)
        if sums[2] or unscored:  # a signal has reached one of the processes: all stop here, with the same steps behind them
            break
        if not (n_targets := sums[0].item()):
            raise BadInput(f"step {step + 1}: there is no token to learn in clips {names(chosen)}")
        torch.manual_seed(int(stateless(cfg.seed, "dropout", step, rank()).integers(2**62)))  # dropout too has no state to save
        loss = torch.zeros((), dtype=torch.float64, device=device)
        scale = 2.0 ** max(0, 10 - skipped) if torch_dtype == torch.float16 else 1.0  # keeps small gradients out of float16's underflow
        for i, batch in enumerate(batches):
            for m in groups(model):
                m.set_requires_gradient_sync(i == len(batches) - 1, recurse=False)  # gradients travel once a step
            # the mean over the target tokens of the whole step: the same gradient however many processes and micro-batches share it
            try:
                part_loss, _ = model(batch)
                (part_loss * (scale / n_targets)).backward()
            except torch.OutOfMemoryError as e:
                raise BadInput(f"step {step + 1}: out of memory with {len(batch.lens)} clips of {len(batch.features)} frames, "
                               f"{len(batch.tokens)} tokens in a micro-batch; what lowers it: {LOWERS}; estimate=true says how much ({str(e).splitlines()[0]})") from None
            loss += part_loss.detach() / n_targets
        dist.all_reduce(loss)
        loss = loss.item()
        for p in learning.values():
            if scale != 1.0 and p.grad is not None:
                p.grad.div_(scale)
        norm = torch.nn.utils.clip_grad_norm_(learning.values(), cfg.grad_clip or math.inf)
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).item()
        rate = learning_rate(step, total, cfg)
        if math.isfinite(norm) and math.isfinite(loss):
            in_a_row = 0
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        else:
            what = "the gradient" if math.isfinite(loss) else "the loss"
            print0(f"step {step + 1}: {what} is not finite, the step is skipped; its clips: {names(chosen)}")
            skipped, in_a_row = skipped + 1, in_a_row + 1
            if in_a_row == cfg.max_skips:
                raise BadInput(f"max_skips={cfg.max_skips} steps in a row were not finite, the last with clips {names(chosen)}; "
                               f"the checkpoint of step {saved} is kept in {last}")
        optimizer.zero_grad(set_to_none=True)
        tokens_seen, now = tokens_seen + sums[1].item(), time.time()

        # ---- looking at it
        finished = step + 1
        entry = {}
        evaluates = dev and (finished % eval_every == 0 or finished == total)
        if finished % log_every == 0 or evaluates or (finished == stop and cfg.log_every >= 0):
            step_s = (now - last_said[0]) / (finished - last_said[1])
            entry = {"step": finished, "epoch": round(finished / per_epoch, 3), "loss": loss, "grad_norm": norm, "lr": rate,
                     "tokens_per_s": round(tokens_seen / max(now - last_said[0], 1e-9)), "step_s": round(step_s, 4)}
            print0(f"step {finished}/{total} epoch {finished / per_epoch:.2f} loss {loss:.4f} norm {norm:.3f} lr {rate:.1e} "
                   f"{entry['tokens_per_s']} tokens/s {step_s:.3f} s/step, {(stop - finished) * step_s:.0f} s left")
        if evaluates:
            unscored = look(entry)
        elif entry:
            write(entry)
        if not unscored and (finished % save_every == 0 or finished == stop):
            saved = finished if save(last, model, optimizer, standing(), cfg, cfg.keep, finished == stop) else saved
        if entry:
            last_said, tokens_seen = (time.time(), finished), 0
    stopped = finished < stop or unscored
    if stopped and finished > saved:
        save(last, model, optimizer, standing(), cfg, cfg.keep, True)
    processes = world()
    dist.destroy_process_group()
    if stopped:
        number = asked[0][0] if asked else signal.SIGTERM  # else another process has got it
        program = ["torchrun", f"--nproc_per_node={processes}"] if "RANK" in os.environ else ["python"]
        again = shlex.join([*program, *sys.argv, *["resume=true"] * (not cfg.resume)])
        print0(f"{os.path.basename(sys.argv[0])}: stopped by {signal.Signals(number).name} after step {finished}, saved in {last}; "
               f"to go on: {again}", file=sys.stderr)
        raise SystemExit(128 + number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.default_int_handler)
    print0(f"{cfg.stage}: done in {time.time() - began:.0f} s, {run_folder}")


if __name__ == "__main__":
    launch(main)
