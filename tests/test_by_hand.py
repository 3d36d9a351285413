"""
A training run computed by hand, in plain torch and without a line of the project's: what train.py logs and saves must
be these numbers, for any number of processes and micro-batches.

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
from conftest import ROOT
from safetensors.torch import load_file, save_file
from sentencepiece import SentencePieceProcessor
from test_train import in_processes
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from lib.program import BadInput
from model import LLaMA, SLLaMA

# none of page one's own values: the rate climbs for three steps, clipping bites on some, the last batch has two clips
STEPS, BATCH, EPOCHS, SEED = 12, 6, 3, 7
LR, WARMUP, DECAY, CLIP = 2e-3, 3, 5.0, 2.0
SMOOTHING, DROP, WINDOW, HEADS = 0.1, 0.3, 4, 2
RANK, ALPHA, TARGETS = 4, 12, ("wq", "wv", "w2")
BETA1, BETA2, EPS = 0.9, 0.95, 1e-8  # of AdamW
SETTING = [f"batch_size={BATCH}", f"epochs={EPOCHS}", f"seed={SEED}", f"lr={LR}", f"warmup={WARMUP}",
           f"weight_decay={DECAY}", f"grad_clip={CLIP}", f"label_smoothing={SMOOTHING}", f"frame_drop={DROP}",
           f"window={WINDOW}", "ltn_dim=32", f"ltn_heads={HEADS}", f"lora_rank={RANK}", f"lora_alpha={ALPHA}",
           f"lora_targets={','.join(TARGETS)}", "language=English", "log_every=1", "eval_every=8", "eval_clips=0"]
STAGES = {"align": ["stage=align", "prompt={clip}"],
          "sft": ["stage=sft", "prompt=am {clip} gibt es {language}", "train_embeddings=true"],
          # all learns at once, from means of two frames
          "all": ["stage=align", "prompt=am {clip} gibt es {language}", "train_embeddings=true", "freeze_llm=false",
                  "lora_rank=0", "merge=2"]}
LEARNS = {"align": ("proj.", "ltn.", "adaptor."), "sft": ("adaptor.", "llm.tok_embeddings.", "lora_"),
          "all": ("proj.", "ltn.", "adaptor.", "tok_embeddings.", "attention.w", "feed_forward.w", "output.")}
FOLDER = {"align": "align", "sft": "sft", "all": "align"}


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
    heads = lambda y: y.unflatten(-1, (-1, head_dim)).transpose(0, 1)  # (T, H*D) -> (H, T, D)
    q, k, v = (heads(linear(normed, f"attention.{part}")) for part in ("wq", "wk", "wv"))
    q, k = rotary(q), rotary(k)
    k, v = (t.repeat_interleave(len(q) // len(t), 0) for t in (k, v))  # several heads share their keys
    seen = (q @ k.mT / head_dim**0.5).masked_fill(~mask, -math.inf).softmax(-1) @ v
    x = x + linear(seen.transpose(0, 1).flatten(1), "attention.wo")
    normed = rms_norm(x, w[f"{name}.ffn_norm.weight"])
    return x + linear(F.silu(linear(normed, "feed_forward.w1")) * linear(normed, "feed_forward.w3"), "feed_forward.w2")


def clip_loss(w, features, before, after, answer, smoothing):
    """Sum of the losses of an answer's tokens, given the clip."""
    at = torch.arange(len(features))
    seen = (at[:, None] - at).abs() <= WINDOW // 2
    x = (features - w["mean"]) / w["std"] @ w["proj.weight"].T
    for n in range(2):
        x = block(w, f"ltn.layers.{n}", x, 32 // HEADS, seen)
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


def merged(x, k):
    """(T, D) -> the means of k rows each, the last of what is left, as they are kept: in float16."""
    return torch.stack([x[t:t + k].mean(0) for t in range(0, len(x), k)]).half().double()


def run_by_hand(home, w, prompt, learns, merge=1):
    """
    -> [{"step", "epoch", "loss", "grad_norm", "lr", "tokens"}, behind those of steps 8 and 12 {"step", "dev_loss"}],
    and at the end what has learnt and AdamW's two moments, by name
    """
    toy = home / "data" / "toy"
    sp = SentencePieceProcessor(model_file=str(toy / "llm" / "tokenizer.model"))
    before, after = (sp.encode(part.strip()) for part in prompt.split("{clip}"))
    features = {name: merged(x.double(), merge) for name, x in load_file(toy / "toycnn" / "train.safetensors").items()}
    rows = [json.loads(line) for line in open(toy / "train.jsonl")]
    clips = [(row["name"], sp.encode(row["text"]) + [sp.eos_id()]) for row in rows]
    w = {name: x.double() for name, x in w.items()}
    learning = {name: x.requires_grad_() for name, x in w.items() if any(part in name for part in learns)}
    m, v = ({name: torch.zeros_like(x) for name, x in learning.items()} for _ in "mv")
    per_epoch = math.ceil(len(clips) / BATCH)
    lines = []
    for step in range(STEPS):
        epoch, at = step // per_epoch, step % per_epoch
        chosen = [clips[i] for i in random(SEED, "order", epoch).permutation(len(clips))[at * BATCH:(at + 1) * BATCH]]
        loss = tokens = 0
        for name, answer in chosen:
            kept = features[name][random(SEED, "drop", epoch, name).random(len(features[name])) >= DROP]
            part = clip_loss(w, kept, [1, *before], after, answer, SMOOTHING) / sum(len(a) for _, a in chosen)
            part.backward()  # the gradients add up
            loss += part.item()
            tokens += len([1, *before, *kept, *after, *answer[:-1]])
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
            lines.append({"step": step + 1, "epoch": round((step + 1) / per_epoch, 3), "loss": loss, "grad_norm": norm,
                          "lr": lr, "tokens": tokens})
            if step + 1 in (8, 12):  # without dropped frames, without smoothing
                total = sum(clip_loss(w, features[name], [1, *before], after, answer, 0)
                            for name, answer in clips)
                targets = sum(len(answer) for _, answer in clips)
                lines.append({"step": step + 1, "dev_loss": total.item() / targets})
    return lines, {name: p.detach() for name, p in learning.items()}, m, v

# ---------------------------------------------------------------------------------------------------------------------
# train.py's run beside it

PEFT = {"self_attn": "attention", "mlp": "feed_forward", "q_proj": "wq", "k_proj": "wk", "v_proj": "wv", "o_proj": "wo",
        "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def saved(run, stage):
    """The weights in a run's last/, by their names in the model."""
    w = load_file(run / FOLDER[stage] / "last" / "vision.safetensors")
    if stage == "sft":
        for name, x in load_file(run / stage / "last" / "adapter_model.safetensors").items():
            # base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight
            *_, layer, part, linear, matrix, _ = name.split(".")
            w[f"llm.layers.{layer}.{PEFT[part]}.{PEFT[linear]}.{matrix}"] = x
    return w


def log(run, stage):
    return [json.loads(line) for line in open(run / FOLDER[stage] / "log.jsonl")]


@pytest.fixture(scope="module")
def hand(home):
    """{stage: (arguments of train.py, first weights, what run_by_hand says)}; sft goes on from train.py's align."""
    def trained(out, *args):
        with pytest.MonkeyPatch.context() as m:
            m.setattr(sys, "argv", ["train.py", f"data_dir={home}/data", f"out_dir={home}/{out}", *args])
            train.main()
        return home / out / "toy"

    llm = LLaMA.from_pretrained(str(home / "data" / "toy" / "llm")).state_dict()
    llm = {"llm." + name: x for name, x in llm.items()}
    align = trained("first", *SETTING, *STAGES["align"])
    found = {}
    for stage, learns in LEARNS.items():
        args = [*SETTING, *STAGES[stage], *[f"init_from={align}/align/last"] * (stage == "sft")]
        start = llm | saved(trained("start", *args, "max_steps=1", "lr=0"), stage)  # a step that moves nothing
        prompt = STAGES[stage][1].removeprefix("prompt=").replace("{language}", "English")
        found[stage] = args, start, run_by_hand(home, start, prompt, learns, 2 if stage == "all" else 1)
    return found


def is_as_by_hand(run, stage, hand):
    """
    Losses to 1e-6. Norms, moments and the way that weights have gone to a few 1e-5, summed over a tensor: train.py
    computes in float32, and Adam makes of a gradient that all but cancels a step as long as any, so that a single
    weight may be off by more than its rounding. Another network may be off by ten times as much: what is off is shown
    step by step, and rounding grows slowly from a first step that agrees, a mistake does not.
    """
    _, start, (lines, weights, *moments) = hand[stage]
    off = lambda x, right, size: (x - right).abs().sum() / size.abs().sum()
    wrong = []
    for said, line in zip(log(run, stage), lines, strict=True):
        paces = {"tokens_per_s", "step_s"} if "loss" in line else set()  # scores of dev have none
        assert said.keys() == line.keys() - {"tokens"} | paces
        assert (said["step"], said.get("epoch")) == (line["step"], line.get("epoch"))
        for key, rel in {"loss": 1e-6, "dev_loss": 1e-6, "grad_norm": 2e-5, "lr": 1e-12}.items():
            if key in line and said[key] != pytest.approx(line[key], rel=rel):
                wrong.append(f"step {line['step']}: {key} {said[key]} is {said[key] / line[key] - 1:.1e} off")
        if paces and line["step"] % 4:  # where a process has run out of clips, it reads one that does not count
            assert said["tokens_per_s"] * said["step_s"] == pytest.approx(line["tokens"], rel=0.01)
    assert not wrong, "\n".join(wrong)
    now, kept = saved(run, stage), load_file(run / FOLDER[stage] / "last" / "optimizer.safetensors")
    assert kept.keys() == {f"{key}.{name}" for key in ("exp_avg", "exp_avg_sq") for name in weights}
    for name, x in weights.items():
        assert off(now[name], x, x - start[name]) < 5e-5, name
        for key, moment in zip(("exp_avg", "exp_avg_sq"), moments):
            assert off(kept[f"{key}.{name}"], moment[name], moment[name]) < 5e-5, (key, name)
    for name in now.keys() - weights.keys():
        assert torch.equal(now[name], start[name]), name


@pytest.mark.parametrize("grad_accum", [1, 2])
@pytest.mark.parametrize("stage", LEARNS)
def test_one_process_trains_as_computed_by_hand(hand, train_here, stage, grad_accum):
    norms = [line["grad_norm"] for line in hand[stage][2][0] if "loss" in line]
    assert min(norms) < CLIP < max(norms)  # else the setting shows nothing of clipping
    is_as_by_hand(train_here(f"one{grad_accum}", *hand[stage][0], f"grad_accum={grad_accum}"), stage, hand)


SEVERAL = f"""
import json, sys
sys.path.insert(0, {str(ROOT)!r})
import torch.distributed as dist
import train
join, leave = dist.init_process_group, dist.destroy_process_group
# they stay together from one run to the next
dist.init_process_group = lambda *args, **more: dist.is_initialized() or join(*args, **more)
dist.destroy_process_group = lambda: None
for args in json.loads(sys.argv[1]):
    sys.argv = ["train.py", *args]
    train.main()
leave()
"""


def twice(home):
    """-> a data set of the same clip under two names, as arguments of train.py."""
    folder = home / "data" / "twice"
    (folder / "toycnn").mkdir(parents=True)
    x = next(iter(load_file(home / "data" / "toy" / "toycnn" / "train.safetensors").values()))
    save_file({"a": x, "b": x.clone()}, folder / "toycnn" / "train.safetensors")
    rows = [{"name": name, "text": "am montag"} for name in "ab"]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["dataset=twice", f"data_dir={home}/data", f"llm={home}/data/toy/llm"]


@pytest.mark.long
def test_two_processes_train_as_computed_by_hand(hand, home, train_here):
    """
    With and without accumulation; a step of two clips leaves micro-batches without one. And each process draws a
    dropout of its own: two of the same clip have not the gradient of one.
    """
    (home / "several.py").write_text(SEVERAL)
    runs = [[*hand[stage][0], f"data_dir={home}/data", f"out_dir={home}/two{accum}{stage}", f"grad_accum={accum}"]
            for stage in LEARNS for accum in (1, 2)]
    dropout = [*hand["sft"][0], *twice(home), "lora_dropout=0.5", "frame_drop=0", "max_steps=1", "eval_every=-1"]
    in_processes(2, home, "", json.dumps([*runs, [*dropout, f"out_dir={home}/both"]]), program=home / "several.py")
    for accum in (1, 2):
        for stage in LEARNS:
            is_as_by_hand(home / f"two{accum}{stage}" / "toy", stage, hand)
    train_here("alone", *dropout, "max_clips=1")
    one, both = (log(home / out / "twice", "sft")[0] for out in ("alone", "both"))
    assert both["loss"] == pytest.approx(one["loss"], rel=1e-6) and abs(both["grad_norm"] / one["grad_norm"] - 1) > 1e-3

# ---------------------------------------------------------------------------------------------------------------------
# The rest of the arithmetic

ONE_CLIP = ["max_clips=1", "batch_size=1", "frame_drop=0", "eval_every=-1"]  # a step an epoch


def test_the_rate_climbs_to_its_peak_and_falls_to_a_tenth(train_here):
    def rates(*args):
        return [line["lr"] for line in log(train_here("rates", *ONE_CLIP, "epochs=10", "lr=1e-3", *args), "align")]

    found = rates("warmup=2")
    by_hand = {0: 0.5e-3, 1: 1e-3, 2: 1e-3, 6: 0.55e-3, 9: 0.1342542e-3}
    assert len(found) == 10 and {step: found[step] for step in by_hand} == pytest.approx(by_hand, rel=1e-6)
    assert rates("warmup=2", "max_steps=4") == found[:4]  # an early stop does not change it
    assert rates("warmup=0", "max_steps=1") == [1e-3]
    assert rates("warmup=20")[-1] == pytest.approx(0.5e-3)  # the warm-up may outlast the run


def test_features_are_standardised_and_frames_have_the_size_of_words(hand, home):
    start = {name: x.double() for name, x in hand["align"][1].items()}
    x = torch.cat([*load_file(home / "data" / "toy" / "toycnn" / "train.safetensors").values()]).double()
    std = x.std(0)
    assert torch.allclose(start["mean"], x.mean(0), atol=1e-5)
    assert torch.allclose(start["std"], std.where(std > 1e-4, 1), rtol=1e-4)  # a dead feature stays as it is
    words = start["llm.tok_embeddings.weight"]
    assert start["scale"].item() == pytest.approx(words.square().mean().sqrt().item(), rel=1e-5)


@pytest.mark.parametrize("most", [0, 1e6, 0.01])
def test_grad_clip_is_the_most_that_reaches_the_optimizer_and_0_is_any(train_here, most):
    """After the first step AdamW's first moment is a tenth of the gradient."""
    run = train_here("clip", *ONE_CLIP, "max_steps=1", f"grad_clip={most}")
    moments = load_file(run / "align" / "last" / "optimizer.safetensors")
    first = [x.double() for name, x in moments.items() if name.startswith("exp_avg.")]
    reached = 10 * math.sqrt(sum(x.square().sum() for x in first))
    norm = log(run, "align")[0]["grad_norm"]
    assert norm > 1 and reached == pytest.approx(min(norm, most or math.inf), rel=1e-4)


def test_dropout_differs_from_step_to_step_and_comes_again_in_the_same_run(hand, train_here):
    """Of one clip, and with a rate of 0, nothing else could change the gradient."""
    def norms(p):
        run = train_here("dropout", *hand["sft"][0], *ONE_CLIP, "lr=0", f"lora_dropout={p}")
        return [line["grad_norm"] for line in log(run, "sft")]

    dropped = norms(0.5)
    assert len(set(norms(0))) == 1 and len(set(dropped)) == EPOCHS and norms(0.5) == dropped


def test_when_it_logs_evaluates_and_saves(train_here):
    """
    0: once an epoch, -1: never; the last step is logged, evaluated and saved. Two steps an epoch, six in all. The
    scores of dev are a line of their own, behind the step's.
    """
    for args, logged, evaluated, kept in (
            ("log_every=0 eval_every=-1 save_every=0", [2, 4, 6], [], [2, 4, 6]),
            ("log_every=4 eval_every=-1 save_every=5", [4, 6], [], [5, 6]),
            ("log_every=-1 eval_every=4 save_every=-1", [4, 6], [4, 6], [6]),
            ("log_every=-1 eval_every=-1 save_every=-1", [], [], [6]),
            ("log_every=4 eval_every=0 save_every=2 max_steps=5", [2, 4, 5], [2, 4], [2, 4, 5]),
            ("log_every=-1 eval_every=-1 save_every=1 max_steps=0", [], [], [1, 2])):
        run = train_here("often", "max_clips=4", "batch_size=2", "epochs=3", "eval_clips=0", "keep=7", *args.split())
        lines = [(line["step"], "dev_loss" in line) for line in log(run, "align")]
        assert lines == sorted([(step, False) for step in logged] + [(step, True) for step in evaluated]), args
        assert sorted(json.load(open(state))["step"] for state in run.glob("align/last*/state.json")) == kept, args


def learnt(folder):
    """What a step of align moves: the weights and AdamW's moments."""
    w = load_file(folder / "vision.safetensors")
    return {k: w[k] for k in w if k not in ("mean", "std", "scale")} | load_file(folder / "optimizer.safetensors")


def test_a_step_whose_gradient_is_not_finite_is_skipped(train_here, home, monkeypatch, capsys):
    """Its loss may well be. Weights and moments stay, and a step that goes well ends the count of max_skips."""
    bad, calls, real = {2: "inf", 4: "nan", 6: "-inf"}, [], SLLaMA.forward

    def forward(self, batch):
        calls.append(1)
        loss, n = real(self, batch)
        if len(calls) in bad:
            loss.register_hook(lambda g: g * float(bad[len(calls)]))
        return loss, n

    monkeypatch.setattr(SLLaMA, "forward", forward)
    run = train_here("skips", "eval_every=-1", "max_steps=7", "max_skips=2", "save_every=1", "keep=7") / "align"
    said = capsys.readouterr().out
    assert all(f"step {n}: the gradient is not finite, the step is skipped" in said for n in bad)
    assert said.count("is skipped") == 3
    folders = [run / f"last.{n}" for n in range(6, 0, -1)] + [run / "last"]  # after step 1, 2, ...
    assert [json.load(open(folder / "state.json"))["skipped"] for folder in folders] == [0, 1, 1, 2, 2, 3, 3]
    for step in range(2, 8):
        was, now = (learnt(folder) for folder in folders[step - 2:step])
        for name in now:
            assert torch.isfinite(now[name]).all() and torch.equal(was[name], now[name]) == (step in bad), (name, step)
    calls.clear(), bad.clear()
    bad |= {2: "nan", 3: "nan"}
    with pytest.raises(BadInput, match="max_skips=2 steps in a row"):
        train_here("skips2", "eval_every=-1", "max_skips=2")


# ---------------------------------------------------------------------------------------------------------------------
# bfloat16 and float16

def local(x):
    return x.to_local() if hasattr(x, "to_local") else x


@pytest.fixture
def seen(monkeypatch):
    """A dict that notes the types of a training run's numbers, and its last gradients."""
    seen, real = {}, SLLaMA.forward

    def forward(self, batch):
        if not seen:
            seen["frozen"] = {p.dtype for p in self.llm.layers.parameters() if not p.requires_grad}
            self.llm.register_forward_hook(lambda module, args, out: seen.update(logits=out.dtype))
        loss, n = real(self, batch)
        seen["loss"] = loss.dtype
        return loss, n

    def stepping(optimizer, args, kwargs):
        learning = [p for group in optimizer.param_groups for p in group["params"]]
        seen.update(learning={p.dtype for p in learning}, grads=[local(p.grad).clone() for p in learning])

    monkeypatch.setattr(SLLaMA, "forward", forward)
    hook = register_optimizer_step_pre_hook(stepping)
    yield seen
    hook.remove()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stage", LEARNS)
def test_half_precision(hand, train_here, seen, stage, dtype):
    """What is frozen lies and computes in dtype; what learns, the sums of its gradients and the loss are float32."""
    args, start, (lines, weights, *_) = hand[stage]
    how = ["grad_accum=2", "grad_clip=0", "eval_every=-1", "max_steps=2", "warmup=0", "lr=1e-6", "weight_decay=0"]
    run = train_here("half", *args, f"dtype={str(dtype).removeprefix('torch.')}", *how)
    assert seen["frozen"] == {dtype} and seen["logits"] == dtype and seen["loss"] == torch.float32
    assert seen["learning"] == {torch.float32} and all(g.dtype == torch.float32 for g in seen["grads"])
    if dtype == torch.bfloat16:  # the sum of two of its numbers has more digits
        assert any((g != g.bfloat16()).any() for g in seen["grads"])
    (first, _), now = log(run, stage), saved(run, stage)
    assert first["loss"] == pytest.approx(lines[0]["loss"], rel=5e-3)
    assert first["grad_norm"] == pytest.approx(lines[0]["grad_norm"], rel=3e-2)
    moved = (now["adaptor.w1.weight"] - start["adaptor.w1.weight"]).abs()
    assert 1.5e-6 < moved.median() < 2.1e-6  # twice the rate: in half precision so small a step would be lost
    moments = load_file(run / FOLDER[stage] / "last" / "optimizer.safetensors")
    assert all(x.dtype == torch.float32 for x in [*moments.values(), *(now[name] for name in weights)])


def test_float16_halves_the_scale_of_its_loss_until_no_gradient_overflows(hand, train_here, monkeypatch):
    scales, real = [], SLLaMA.forward

    def forward(self, batch):
        loss, n = real(self, batch)

        def overflow(g):
            scales.append(round(g.item() * n))
            return g * math.inf if scales[-1] > 100 else g

        loss.register_hook(overflow)
        return loss, n

    monkeypatch.setattr(SLLaMA, "forward", forward)
    how = [*hand["align"][0], "dtype=float16", "eval_every=-1"]
    lines = log(train_here("overflow", *how, "max_steps=6"), "align")
    assert scales == [1024, 512, 256, 128, 64, 64]
    assert [math.isfinite(line["grad_norm"]) for line in lines] == [False] * 4 + [True] * 2
    assert lines[4]["grad_norm"] < 2 * hand["align"][2][0][0]["grad_norm"]  # whatever the scale
    train_here("overflow", *how, "max_steps=7", "resume=true")
    assert scales[-1] == 64  # a resumed run knows what it has learnt

# ---------------------------------------------------------------------------------------------------------------------
# Evaluation; its loss is in the run by hand

def test_dev_decoding(train_here, home, monkeypatch):
    """In eval mode, with the beam asked for, of the clips asked for, each sentence scored against its own reference."""
    toy, real, calls = home / "data" / "toy", train.translate, []
    texts = {row["name"]: row["text"] for row in map(json.loads, open(toy / "dev.jsonl"))}
    known = {x.numpy().tobytes(): name for name, x in load_file(toy / "toycnn" / "dev.safetensors").items()}

    sp = SentencePieceProcessor(model_file=str(toy / "llm" / "tokenizer.model"))
    longest = 2 * max(len(sp.encode(text)) for text in texts.values())  # who has not learnt to end need not babble on

    def translate(*args, **more):
        call = inspect.signature(real).bind(*args, **more).arguments
        names = [known[x.numpy().tobytes()] for x in call["features"]]
        assert call["max_new_tokens"] == longest
        calls.append((call["beam"], names, {module.training for module in call["sllama"].modules()}))
        return [texts[name] for name in names]

    monkeypatch.setattr(train, "translate", translate)
    for eval_clips, chosen in ((-1, range(20)), (6, (0, 3, 6, 10, 13, 16)), (50, range(20))):
        calls.clear()
        run = train_here(f"decode{eval_clips}", "max_steps=1", "eval_every=1", "beam=3", f"eval_clips={eval_clips}")
        _, line = log(run, "align")
        assert line.keys() == {"step", "dev_loss", "dev_bleu", "dev_rouge"} and line["step"] == 1
        assert line["dev_bleu"] == pytest.approx([100] * 4) and line["dev_rouge"] == pytest.approx(100)
        assert sorted(name for _, names, _ in calls for name in names) == [f"{i:05}" for i in chosen]
        assert all(beam == 3 and training == {False} for beam, _, training in calls)
