"""
A training run computed by hand, in plain torch and without a line of the project's: what train.py logs and saves must be these numbers,
for any number of processes and micro-batches.

    python -m pytest tests/test_by_hand.py
"""
import inspect
import json
import math
import shutil
import sys
import zlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from test_train import in_processes
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from model import LLaMA, SLLaMA

# none of page one's own values, where another one shows more: the rate climbs for three steps, clipping bites on some steps, a last batch of two clips
STEPS, BATCH, EPOCHS, SEED = 12, 6, 3, 7
LR, WARMUP, DECAY, CLIP = 2e-3, 3, 5.0, 2.0
SMOOTHING, DROP, WINDOW, HEADS = 0.1, 0.3, 4, 2
RANK, ALPHA, TARGETS = 4, 12, ("wq", "wv", "w2")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8  # of AdamW
SETTING = [f"batch_size={BATCH}", f"epochs={EPOCHS}", f"seed={SEED}", f"lr={LR}", f"warmup={WARMUP}", f"weight_decay={DECAY}", f"grad_clip={CLIP}",
           f"label_smoothing={SMOOTHING}", f"frame_drop={DROP}", f"window={WINDOW}", "ltn_dim=32", f"ltn_heads={HEADS}", f"lora_rank={RANK}",
           f"lora_alpha={ALPHA}", f"lora_targets={','.join(TARGETS)}", "language=English", "log_every=1", "eval_every=8", "eval_clips=0"]
STAGES = {"align": ["stage=align", "prompt={clip}"], "sft": ["stage=sft", "prompt=am {clip} gibt es {language}", "train_embeddings=true"]}
LEARNS = {"align": ("proj.", "ltn.", "adaptor."), "sft": ("adaptor.", "llm.tok_embeddings.", "lora_")}


@pytest.fixture(scope="module")
def home(home):
    """Its dev set is its 20 train clips: evaluation takes two batches of unequal size."""
    toy = home / "data" / "toy"
    for name in ("train.jsonl", "toycnn/train.safetensors"):
        shutil.copy(toy / name, toy / name.replace("train", "dev"))
    return home

# ---------------------------------------------------------------------------------------------------------------------
# The model: one clip at a time, whole masks, every formula written out. w: all weights by name, in float64

def rms_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def rotary(x):
    """x (H, T, D): channels k and k + D/2 of frame t are turned by the angle t * 10000^(-2k/D)."""
    angle = torch.arange(x.shape[1])[:, None] * 10000.0 ** (-torch.arange(0, x.shape[2], 2, dtype=x.dtype) / x.shape[2])
    a, b = x.chunk(2, -1)
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


def block(w, name, x, head_dim, mask):
    """x (T, dim) -> (T, dim)"""
    def linear(x, part):
        y = x @ w[f"{name}.{part}.weight"].T
        if f"{name}.{part}.lora_A" in w:
            y = y + ALPHA / RANK * (x @ w[f"{name}.{part}.lora_A"].T @ w[f"{name}.{part}.lora_B"].T)
        return y

    normed = rms_norm(x, w[f"{name}.attention_norm.weight"])
    q, k, v = (linear(normed, f"attention.{p}").unflatten(-1, (-1, head_dim)).transpose(0, 1) for p in ("wq", "wk", "wv"))  # (H, T, D)
    q, k = rotary(q), rotary(k)
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))  # several heads share their keys
    seen = (q @ k.mT / head_dim**0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v
    x = x + linear(seen.transpose(0, 1).flatten(1), "attention.wo")
    normed = rms_norm(x, w[f"{name}.ffn_norm.weight"])
    return x + linear(F.silu(linear(normed, "feed_forward.w1")) * linear(normed, "feed_forward.w3"), "feed_forward.w2")


def clip_loss(w, features, before, after, answer, smoothing):
    """Sum of the losses of an answer's tokens, given the clip."""
    at = torch.arange(len(features))
    x = (features - w["mean"]) / w["std"] @ w["proj.weight"].T
    for n in range(2):
        x = block(w, f"ltn.layers.{n}", x, 32 // HEADS, (at[:, None] - at).abs() <= WINDOW // 2)
    x = rms_norm(x, w["ltn.norm.weight"]) @ w["adaptor.w1.weight"].T
    x = F.gelu(x) @ w["adaptor.w2.weight"].T * w["scale"]
    words = w["llm.tok_embeddings.weight"]
    h = torch.cat([words[before], x, words[after + answer[:-1]]])
    for n in range(4):
        h = block(w, f"llm.layers.{n}", h, 32, torch.ones(len(h), len(h)).tril().bool())
    logp = (rms_norm(h, w["llm.norm.weight"])[-len(answer):] @ w["llm.output.weight"].T).log_softmax(-1)
    right, every = logp[range(len(answer)), answer], logp.mean(-1)
    return -((1 - smoothing) * right + smoothing * every).sum()

# ---------------------------------------------------------------------------------------------------------------------
# The run

def random(*key):
    """Random numbers are a function of their key."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def run_by_hand(home, w, prompt, learns):
    """-> [{"loss", "grad_norm", "lr" and after steps 8 and 12 "dev_loss"}], the weights and AdamW's moments at the end."""
    toy = home / "data" / "toy"
    sp = SentencePieceProcessor(model_file=str(toy / "llm" / "tokenizer.model"))
    before, after = (sp.encode(part.strip()) for part in prompt.split("{clip}"))
    features = {name: x.double() for name, x in load_file(toy / "toycnn" / "train.safetensors").items()}
    clips = [(row["name"], sp.encode(row["text"]) + [sp.eos_id()]) for row in map(json.loads, open(toy / "train.jsonl"))]
    w = {name: x.double() for name, x in w.items()}
    learning = {name: x.requires_grad_() for name, x in w.items() if any(part in name for part in learns) and name not in ("mean", "std", "scale")}
    m, v = ({name: torch.zeros_like(x) for name, x in learning.items()} for _ in "mv")
    per_epoch = math.ceil(len(clips) / BATCH)
    lines = []
    for step in range(STEPS):
        epoch, at = step // per_epoch, step % per_epoch
        chosen = [clips[i] for i in random(SEED, "order", epoch).permutation(len(clips))[at * BATCH:(at + 1) * BATCH]]
        loss = 0
        for name, answer in chosen:
            kept = features[name][random(SEED, "drop", epoch, name).random(len(features[name])) >= DROP]
            part = clip_loss(w, kept, [1, *before], after, answer, SMOOTHING) / sum(len(a) for _, a in chosen)
            part.backward()  # the gradients add up
            loss += part.item()
        norm = math.sqrt(sum(p.grad.square().sum().item() for p in learning.values()))
        if step < WARMUP:
            lr = LR * (step + 1) / WARMUP
        else:
            lr = LR / 10 + (LR - LR / 10) * (1 + math.cos(math.pi * (step - WARMUP) / (STEPS - WARMUP))) / 2
        with torch.no_grad():
            for name, p in learning.items():
                g = p.grad * min(1, CLIP / norm)
                m[name] = BETA1 * m[name] + (1 - BETA1) * g
                v[name] = BETA2 * v[name] + (1 - BETA2) * g**2
                p -= lr * (DECAY * p if p.dim() > 1 else 0)
                p -= lr * (m[name] / (1 - BETA1 ** (step + 1))) / ((v[name] / (1 - BETA2 ** (step + 1))).sqrt() + EPS)
                p.grad = None
            lines.append({"step": step + 1, "epoch": round((step + 1) / per_epoch, 3), "loss": loss, "grad_norm": norm, "lr": lr})
            if step + 1 in (8, 12):  # without dropped frames, without smoothing
                total = sum(clip_loss(w, features[name], [1, *before], after, answer, 0) for name, answer in clips)
                lines[-1]["dev_loss"] = total.item() / sum(len(answer) for _, answer in clips)
    return lines, {name: p.detach() for name, p in learning.items()}, m, v

# ---------------------------------------------------------------------------------------------------------------------
# train.py's run beside it

PEFT = {"self_attn": "attention", "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
        "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def saved(run, stage):
    """The weights in a run's last/, by their names in the model."""
    w = load_file(run / stage / "last" / "vision.safetensors")
    if stage == "sft":
        for name, x in load_file(run / stage / "last" / "adapter_model.safetensors").items():
            *_, layer, part, linear, matrix, _ = name.split(".")  # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
            w[f"llm.layers.{layer}.{PEFT[part]}.{PEFT[linear]}.{matrix}"] = x
    return w


def log(run, stage):
    return [json.loads(line) for line in open(run / stage / "log.jsonl")]


@pytest.fixture(scope="module")
def hand(home):
    """{stage: (arguments of train.py, first weights, what run_by_hand says)}; sft goes on from the align run of train.py."""
    def trained(out, *args):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", ["train.py", f"data_dir={home}/data", f"out_dir={home}/{out}", *args])
            train.main()
        return home / out / "toy"

    llm = {"llm." + name: x for name, x in LLaMA.from_pretrained(str(home / "data" / "toy" / "llm")).state_dict().items()}
    align = trained("first", *SETTING, *STAGES["align"])
    found = {}
    for stage, learns in LEARNS.items():
        args = [*SETTING, *STAGES[stage], *[f"init_from={align}/align/last"] * (stage == "sft")]
        start = llm | saved(trained("start", *args, "max_steps=1", "lr=0"), stage)  # a step that moves nothing leaves the first weights
        prompt = STAGES[stage][1].removeprefix("prompt=").replace("{language}", "English")
        found[stage] = args, start, run_by_hand(home, start, prompt, learns)
    return found


def is_as_by_hand(run, stage, hand):
    """
    Losses to 1e-6. Norms, moments and the way that weights have gone to a few 1e-5, summed over a tensor: train.py computes in float32, and Adam makes
    of a gradient that all but cancels a step as long as any, so that a single weight may be off by more than its rounding.
    """
    _, start, (lines, weights, *moments) = hand[stage]
    close = lambda a, b, size, what: pytest.approx(0, abs=5e-5) == ((a - b).abs().sum() / size.abs().sum()).item() or pytest.fail(what)
    for said, line in zip(log(run, stage), lines, strict=True):
        assert said.keys() - line.keys() == {"tokens_per_s", "step_s"} and said["epoch"] == line["epoch"] and said["step"] == line["step"]
        for key, rel in {"loss": 1e-6, "dev_loss": 1e-6, "grad_norm": 2e-5, "lr": 1e-12}.items():
            assert key not in line or said[key] == pytest.approx(line[key], rel=rel), (key, line["step"])
    now, kept = saved(run, stage), load_file(run / stage / "last" / "optimizer.safetensors")
    assert kept.keys() == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in weights}
    for name, x in weights.items():
        close(now[name], x, x - start[name], name)
        for key, moment in zip(("exp_avg", "exp_avg_sq"), moments):
            close(kept[f"{key}.{name}"], moment[name], moment[name], f"{key}.{name}")
    for name in now.keys() - weights.keys():
        assert torch.equal(now[name], start[name]), name


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("stage", LEARNS)
def test_one_process_trains_as_computed_by_hand(hand, train_here, stage, grad_accum):
    norms = [line["grad_norm"] for line in hand[stage][2][0]]
    assert min(norms) < CLIP < max(norms)  # else the setting shows nothing of clipping
    is_as_by_hand(train_here(f"one{grad_accum}", *hand[stage][0], f"grad_accum={grad_accum}"), stage, hand)


def twice(home):
    """-> a data set of the same clip under two names, as arguments of train.py."""
    folder = home / "twice" / "toy"
    (folder / "toycnn").mkdir(parents=True)
    x = next(iter(load_file(home / "data" / "toy" / "toycnn" / "train.safetensors").values()))
    save_file({"a": x, "b": x.clone()}, folder / "toycnn" / "train.safetensors")
    (folder / "train.jsonl").write_text("".join(json.dumps({"name": name, "text": "am montag"}) + "\n" for name in "ab"))
    return [f"data_dir={home}/twice", f"llm={home}/data/toy/llm"]


SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import train
join, leave = dist.init_process_group, dist.destroy_process_group
dist.init_process_group = lambda *args, **more: dist.is_initialized() or join(*args, **more)  # they stay together from one run to the next
dist.destroy_process_group = lambda: None
for args in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *args]
    train.main()
leave()
"""


@pytest.mark.long
def test_two_processes_train_as_computed_by_hand(hand, home):
    """With and without accumulation; a step of two clips leaves micro-batches without one."""
    (home / "several.py").write_text(SEVERAL)
    runs = [[*hand[stage][0], f"data_dir={home}/data", f"out_dir={home}/two{accum}", f"grad_accum={accum}"] for stage in LEARNS for accum in (1, 2)]
    in_processes(2, home, "", json.dumps(runs), program=home / "several.py")
    for accum in (1, 2):
        for stage in LEARNS:
            is_as_by_hand(home / f"two{accum}" / "toy", stage, hand)
