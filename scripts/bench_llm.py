"""
The LLM's part of scripts/bench.py: ours and transformers (+ PEFT) in turn, on the same weights and the same ragged clips, first shown to give the same result.
"""
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import train
import video
from config import BadInput, configure, pick_device, pick_dtype
from data import Sample, Tokenizer, pack, prompt_ids, stateless
from eval import generate, prefixes
from lora import adapter, write_adapter
from model import SIZES, Adaptor, LLaMA, LocalTransformer, fill, full, local_attention, open_llm
from readers import read_gfslt
from scripts.memory import peak_memory
from weights import to_hf

SIZES["bench"] = dict(dim=576, n_layers=12, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=32000)  # a size for two cores


def turns(repeats, **sides):
    """Call each side `repeats` times, in turn -> side -> its median, least and largest number of seconds, and on a GPU the most memory it held, in GB."""
    took, gpu = {name: [] for name in sides}, torch.cuda.is_available()
    for turn in range(repeats + 1):
        for name, side in sides.items():
            gpu and torch.cuda.synchronize(), gpu and torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            side()
            gpu and torch.cuda.synchronize()
            if turn:  # in the first, what is made at first use is made
                took[name].append((time.perf_counter() - start, torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0))
    return {name: {"median": statistics.median(s for s, _ in t), "low": min(t)[0], "high": max(t)[0]} | ({"gpu_gb": max(gb for _, gb in t)} if gpu else {})
            for name, t in took.items()}


def say(what, found, floor=None):
    """Print a line of a comparison of `ours` and `peer`; returns its figures."""
    show = lambda t: f"{1000 * t['median']:8.1f} ms ({1000 * t['low']:.1f} to {1000 * t['high']:.1f})" + (f" {t['gpu_gb']:.1f} GB" if "gpu_gb" in t else "")
    ratio = found["peer"]["median"] / found["ours"]["median"]
    print(f"{what:44} ours {show(found['ours'])}, peer {show(found['peer'])}, ratio {ratio:.2f}"
          + (f", floor {1000 * floor:.1f} ms = {floor / found['ours']['median']:.2f} of ours" if floor else ""), flush=True)
    return {"what": what, "ratio": ratio, "floor": floor, "ours": found["ours"], "peer": found["peer"]}


def clips_like_phoenix(cfg, n, frames=0):
    """n clips as (frames, sentence): drawn from PHOENIX-2014T's own labels where labels= holds them, else numbers and words like theirs. frames: all so long."""
    rng = stateless(0, "bench", "clips")
    if os.path.isdir(cfg.labels):
        rows = read_gfslt(cfg.labels)[0]["train"]
        drawn = [(rows[i]["frames"], rows[i]["text"]) for i in rng.integers(len(rows), size=n)]
    else:
        words = "heute morgen im norden regnet es am tag scheint die sonne und wind weht schwach aus nordwest grad".split()
        drawn = [(int(np.clip(np.exp(rng.normal(4.7, 0.45)), 16, 475)), " ".join(rng.choice(words, 14))) for _ in range(n)]
    return [(frames or T, text) for T, text in drawn]


def write_llm(folder, size="bench", dtype=torch.float32):
    """Random weights of a size as a Hugging Face folder that both sides read; large enough that logits differ."""
    raw = open_llm(f"random:{size}")
    args = raw.args
    state = {to_hf(k): (raw.read(k) * (3.0 if "tok_embeddings" in k or "output" in k else 1.0)).to(dtype).contiguous() for k in raw.shapes}
    save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.dim, "num_hidden_layers": args.n_layers,
                   "num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads, "head_dim": args.head_dim, "intermediate_size": args.hidden_dim,
                   "vocab_size": args.vocab_size, "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_theta, "hidden_act": "silu", "max_position_embeddings": 4096,
                   "tie_word_embeddings": args.tied, "bos_token_id": 1, "eos_token_id": 2}, f)


def arithmetic(cfg):
    """The dtype that both sides compute in, train.py's own choice for the device."""
    return pick_dtype("auto", pick_device(cfg.device)[0])[0]


def features_like(clips):
    """Random features (T, 1024) float16 for [(T, sentence)], always the same."""
    rng = stateless(0, "bench", "features")
    return [torch.from_numpy(rng.standard_normal((T, 1024), np.float32)).half() for T, _ in clips]


class Ours:
    """What train.py runs, with its optimizer: SLLaMA as train.build makes it, on one process."""

    def __init__(self, cfg, folder, stage, lora_rank=8):
        page = [f"stage={stage}", f"llm={folder}", f"lora_rank={lora_rank}", "ltn_dim=0", "ltn_heads=8", f"compile={cfg.compile}",
                f"activation_checkpointing={cfg.activation_checkpointing}"]
        self.cfg, self.device, self.dtype = configure(train.__file__, page, stages=("align", "sft")), pick_device(cfg.device)[0], arithmetic(cfg)
        self.tokenizer = Tokenizer(cfg.tokenizer) if os.path.isdir(cfg.tokenizer) else Tokenizer("random:bench")
        if not dist.is_initialized():
            train.setup(self.device)
        raw = open_llm(folder)
        self.model = train.build(self.cfg, raw.args, 1024, self.device, self.dtype)
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            self.model.load(raw, self.device, 0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:  # not zero, as after some training
                    fill(p, 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        self.prompt = prompt_ids(self.model.prompt, self.tokenizer)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def samples(self, clips):
        return [Sample(str(i), features, *self.prompt, self.tokenizer.encode(text) + [self.tokenizer.eos_id])
                for i, (features, (_, text)) in enumerate(zip(features_like(clips), clips))]

    def loss(self, samples):
        loss, n = self.model(pack(samples, self.device))
        return loss / n


class Peer(nn.Module):
    """What people would write with transformers and PEFT: one padded batch, logits at every position. The visual part is ours, padded too."""

    def __init__(self, ours, folder):
        super().__init__()
        try:
            import peft
            import transformers
        except ImportError as e:
            raise BadInput(f"the peer is made of transformers and peft, pip install transformers peft ({e})") from None
        self.device = ours.device
        self.llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype).requires_grad_(False)
        if not ours.cfg.freeze_llm:
            tensors, config = adapter(ours.model.llm, folder)
            write_adapter({k: full(v).contiguous() for k, v in tensors.items()}, config, os.path.join(folder, "lora"))
            self.llm = peft.PeftModel.from_pretrained(self.llm, os.path.join(folder, "lora"), is_trainable=True)
        if ours.cfg.activation_checkpointing:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.ltn = LocalTransformer(1024, ours.cfg.ltn_layers, ours.cfg.ltn_heads, ours.cfg.window).requires_grad_(ours.cfg.train_ltn)
        self.adaptor = Adaptor(1024, ours.model.llm.args.dim)
        state = dict(ours.model.named_parameters())
        for name, p in self.named_parameters():
            if name in state:  # all of ltn and adaptor
                p.data = full(state[name])
        self.to(self.device)
        self.scale, self.prompt = ours.model.scale.item(), ours.prompt
        self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def inputs(self, samples, answers=True):
        """[Sample] -> embeddings (B, T, dim), attention mask (B, T), labels (B, T); right-padded to learn, left-padded to generate."""
        frames, embed = [len(s.features) for s in samples], lambda ids: self.llm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long, device=self.device))
        x = nn.utils.rnn.pad_sequence([s.features.float() for s in samples], batch_first=True).to(self.device)  # (B, F, D)
        clip = torch.arange(x.shape[1]) >= torch.tensor(frames)[:, None]  # (B, F) filling is a clip of its own
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.llm.dtype == torch.bfloat16):
            x = (self.adaptor(self.ltn(x, clip.long().to(self.device))) * self.scale).to(self.llm.dtype)
        rows = [torch.cat([embed(s.before), x[i, :frames[i]], embed(s.after), *([embed(s.answer)] if answers else [])]) for i, s in enumerate(samples)]
        T = max(map(len, rows))
        side = lambda n: (0, T - n) if answers else (T - n, 0)
        h = torch.stack([F.pad(r, (0, 0, *side(len(r)))) for r in rows])
        mask = torch.stack([F.pad(torch.ones(len(r), dtype=torch.long), side(len(r))) for r in rows])
        labels = torch.stack([F.pad(torch.tensor([-100] * (len(r) - len(s.answer)) + s.answer), side(len(r)), value=-100) for r, s in zip(rows, samples)]) if answers else None
        return h, mask.to(self.device), labels if labels is None else labels.to(self.device)

    def loss(self, samples):
        h, mask, labels = self.inputs(samples)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.llm.dtype == torch.bfloat16):
            return self.llm(inputs_embeds=h, attention_mask=mask, labels=labels).loss

    @torch.no_grad()
    def generate(self, h, mask, beam, new):
        out = self.llm.generate(inputs_embeds=h, attention_mask=mask, num_beams=beam, do_sample=False, length_penalty=0.0, early_stopping=True, max_new_tokens=new, pad_token_id=0)
        return [ids[:ids.index(2)] if 2 in ids else ids for ids in out.tolist()]


def train_step(side, parameters, batches):
    """One pass over the batches, as train.py's loop takes it."""
    for samples in batches:
        side.loss(samples).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        side.optimizer.step()
        side.optimizer.zero_grad(set_to_none=True)


def work_of_step(ours, batches):
    """
    What a pass over the batches cannot do without -> (tokens, floating-point operations of its matrix products, bytes of all else). Frozen weights are multiplied
    twice, forward and back to their inputs. Bytes: what the norms, rotary positions, SwiGLU and sums of a block read and write, were each of them
    one kernel, three times (forward, and as much again for each of two inputs backward); the logits, written and read, and their gradients.
    """
    a, tokens, flops, values = ours.model.llm.args, 0, 0, 0
    block = a.dim * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads) + 3 * a.dim * a.hidden_dim  # multiplications a token
    moved = 10 * a.dim + 2 * a.head_dim * (a.n_heads + a.n_kv_heads) + 3 * a.hidden_dim  # values a token
    vision = sum(p.numel() for k, p in ours.model.named_parameters() if k.startswith(("ltn.", "adaptor.")) and p.dim() > 1)
    for samples in batches:
        lens, targets = pack(samples).lens, sum(len(s.answer) for s in samples)
        tokens += sum(lens)
        flops += 2 * 2 * a.n_layers * block * sum(lens)
        flops -= 2 * 2 * 3 * a.dim * a.hidden_dim * (sum(lens) - targets)  # the last layer's feed-forward: only where logits are wanted
        flops += 2 * 3 * a.n_layers * sum(n * n * a.n_heads * a.head_dim for n in lens)  # q k^T and p v, half of each behind the causal mask; twice that backward
        flops += 2 * 2 * a.vocab_size * a.dim * targets + 2 * (3 if ours.cfg.train_ltn else 1.5) * vision * sum(len(s.features) for s in samples)
        values += 3 * a.n_layers * moved * sum(lens) - 3 * 3 * a.hidden_dim * (sum(lens) - targets) + 4 * a.vocab_size * targets
    return tokens, flops, values * ours.dtype.itemsize


def step(cfg):
    """SFT and align steps on ragged batches of PHOENIX-2014T's lengths."""
    figures = []
    for stage in ("sft", "align"):
        with tempfile.TemporaryDirectory() as folder:
            write_llm(folder, cfg.llm, arithmetic(cfg))
            ours = Ours(cfg, folder, stage)
            peer = Peer(ours, folder)
            samples = ours.samples(clips_like_phoenix(cfg, cfg.batch_size * cfg.batches))
            batches = [samples[i:i + cfg.batch_size] for i in range(0, len(samples), cfg.batch_size)]
            with torch.no_grad():
                apart = max(abs(ours.loss(b) - peer.loss(b)).item() for b in batches)
            print(f"{stage}: frames {[[len(s.features) for s in b] for b in batches]}, losses differ by {apart:.1e} at most")
            if apart > (1e-4 if ours.dtype == torch.float32 else 0.05):
                raise BadInput(f"{stage}: ours and the peer do not compute the same loss (difference {apart:.1e})")
            tokens, flops, moved = work_of_step(ours, batches)
            a = ours.model.llm.args
            x, w, big, copy = (torch.randn(shape, device=ours.device).to(ours.dtype) for shape in ((tokens // len(batches), a.dim), (a.hidden_dim, a.dim), (2**25,), (2**25,)))
            sides = {"ours": (ours, list(ours.model.parameters())), "peer": (peer, list(peer.parameters()))}
            # the machine's own rates take turns with the two: they change with its load too
            found = turns(cfg.repeats, **{name: (lambda side=side, ps=ps: train_step(side, ps, batches)) for name, (side, ps) in sides.items()},
                          matrices=lambda: [F.linear(x, w) for _ in range(20)], memory=lambda: [copy.copy_(big) for _ in range(4)])
            rate, bandwidth = 20 * 2 * x.numel() * a.hidden_dim / found["matrices"]["median"], 4 * 2 * big.nbytes / found["memory"]["median"]
            per = {name: t | {k: t[k] / len(batches) for k in ("median", "low", "high")} for name, t in found.items()}
            figures.append(say(f"{stage} step, {cfg.batch_size} clips", per, (flops / rate + moved / bandwidth) / len(batches)) | {"loss_difference": apart})
            figures[-1] |= {"tokens_per_s": tokens / found["ours"]["median"], "flops_per_s": flops / found["ours"]["median"], "machine": [rate, bandwidth]}
            print(f"  {figures[-1]['tokens_per_s']:.0f} tokens/s, {figures[-1]['flops_per_s'] / 1e9:.0f} GFLOP/s; this machine multiplies matrices at {rate / 1e9:.0f} GFLOP/s "
                  f"and copies memory at {bandwidth / 1e9:.1f} GB/s", flush=True)
    return figures


@torch.no_grad()
def decode(cfg):
    """
    Beam-4 and greedy decoding of 32 clips, ours all at once (no filling, a prefix once a clip), the peer's in batches of 8 of like length:
    from their features, and from the embeddings that the same local transformer and adaptor have made of them on both sides.
    """
    figures, new = [], 32
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder, cfg.llm, arithmetic(cfg))
        ours = Ours(cfg, folder, "align")
        peer, model = Peer(ours, folder), ours.model
        for m in train.groups(model):
            m.unshard()
        samples = sorted(ours.samples(clips_like_phoenix(cfg, 32)), key=lambda s: len(s.features))
        embed = {"ours": lambda: prefixes(model, [s.features for s in samples], ours.prompt),
                 "peer": lambda: (peer.inputs(samples[i:i + 8], answers=False)[:2] for i in range(0, 32, 8))}
        write = {"ours": lambda streams, beam: [ids for ids, _ in generate(model.llm, streams, [2], beam, 0.0, new)],
                 "peer": lambda batches, beam: [ids for h, mask in batches for ids in peer.generate(h, mask, beam, new)]}
        embedded = {name: list(embed[name]()) for name in embed}
        for beam in (4, 1):
            same = sum(a == b for a, b in zip(*(write[name](embedded[name], beam) for name in write)))
            print(f"beam {beam}: {same} of 32 hypotheses are the same, up to {new} tokens each")
            for what, source in {"features": lambda name: embed[name](), "embeddings": embedded.get}.items():
                found = turns(cfg.repeats, **{name: lambda name=name: write[name](source(name), beam) for name in write})
                figures.append(say(f"32 clips from {what}, beam {beam}", found) | {"same": same})
    return figures


def band(cfg):
    """local_attention against dense attention with a mask, and its growth with T."""
    figures = []
    # glibc's malloc keeps freed memory up to twice the largest tensor (of 32 MB at most) that a process has freed so far. One that trains or decodes
    # has freed larger ones than the band's; a fresh process would give every page back, and time the faults that fetch it again
    torch.empty(7_500_000)
    for T in (1024, 4096):
        q, k, v = (torch.randn(1, 8, T, 64, generator=torch.Generator().manual_seed(i)) for i in range(3))
        mask = (torch.arange(T)[:, None] - torch.arange(T)).abs() <= 4
        ours, dense = lambda: local_attention(q, k, v, 8), lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        apart = (ours() - dense()).abs().max().item()
        figures.append(say(f"band of window 8, T = {T} (differ by {apart:.0e})", turns(cfg.repeats, ours=ours, peer=dense)) | {"difference": apart})
    print("      T        ms   ns a frame")
    for T in (1024, 4096, 16384, 65536):
        q, k, v = (torch.randn(1, 8, T, 64) for _ in range(3))
        took = turns(cfg.repeats, ours=lambda: local_attention(q, k, v, 8))["ours"]["median"]
        print(f"{T:7} {1000 * took:9.1f} {1e9 * took / T:12.0f}", flush=True)
        figures.append({"T": T, "seconds": took})
    return figures


def processes(cfg):
    """train.py on the same clips with one process and with two: seconds a step and memory a process."""
    figures = []
    if not os.path.isdir(cfg.tokenizer):
        print("one process and two are not compared: train.py takes its LLM's tokenizer, tokenizer=FOLDER")
        return figures
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder)
        drawn = clips_like_phoenix(cfg, 48)
        features = {str(i): f for i, f in enumerate(features_like(drawn))}
        rows = [{"name": str(i), "text": text, "frames": T} for i, (T, text) in enumerate(drawn)]
        video.write_common(os.path.join(folder, "data", "bench"), "random", {"train": rows, "dev": [], "test": []}, {k: f.shape for k, f in features.items()},
                           lambda name: features[name].numpy(), lambda names: {})
        shutil.copy(os.path.join(cfg.tokenizer, "tokenizer.model"), folder)
        for stage in ("align", "sft"):
            for n in (1, 2) * cfg.repeats:
                start = [sys.executable] if n == 1 else [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
                where = ["dataset=bench", "backbone=random", "language=German", f"llm={folder}", f"data_dir={folder}/data", f"out_dir={folder}/out{n}", "ltn_dim=0", "ltn_heads=8"]
                env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // n))}
                with peak_memory() as peak:
                    subprocess.run([*start, train.__file__, *where, f"stage={stage}", "batch_size=4", "log_every=1", "epochs=1"], env=env, check=True, stdout=subprocess.DEVNULL)
                steps = [json.loads(line)["step_s"] for line in open(f"{folder}/out{n}/bench/{stage}/log.jsonl")][2:]
                held = sorted(b for pid, b in peak.each.items() if pid != os.getpid())[-n]  # without this process and torchrun
                figures.append({"stage": stage, "processes": n, "step_s": statistics.median(steps), "gb_a_process": held / 1e9})
            for n in (1, 2):
                some = [f for f in figures if f["stage"] == stage and f["processes"] == n]
                print(f"{stage}, {n} process(es): {statistics.median(f['step_s'] for f in some):.3f} s a step, {max(f['gb_a_process'] for f in some):.2f} GB a process", flush=True)
    return figures


def load(cfg):
    """LLaMA.from_pretrained against transformers' on the same folder."""
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder, "smollm2-135m")
        import transformers
        size = os.path.getsize(os.path.join(folder, "model.safetensors"))

        def mine():
            with contextlib.redirect_stderr(open(os.devnull, "w")):
                LLaMA.from_pretrained(folder)
        found = turns(cfg.repeats, ours=mine, peer=lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
        return [say(f"loading {size / 1e9:.2f} GB, {size / 1e9 / found['ours']['median']:.2f} GB/s", found)]


def scale(cfg):
    """How an SFT step grows with the frames of a clip, the clips of a batch and the rank, ours and the peer's; and what a second process brings."""
    figures = processes(cfg)
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder)
        for rank, batch, frames in [(8, 4, T) for T in (30, 112, 240, 475)] + [(8, B, 112) for B in (1, 2, 8)] + [(r, 4, 112) for r in (4, 16, 32)]:
            ours = Ours(cfg, folder, "sft", rank)
            peer = Peer(ours, folder)
            batches = [ours.samples(clips_like_phoenix(cfg, batch, frames))]
            found = turns(cfg.repeats, ours=lambda: train_step(ours, list(ours.model.parameters()), batches), peer=lambda: train_step(peer, list(peer.parameters()), batches))
            figures.append(say(f"rank {rank}, {batch} clips of {frames} frames", found))
    return figures


def start(cfg):
    """How long one waits: `train.py help` beside an import of torch, and the first step of a toy run whose data are there."""
    here = os.path.dirname(train.__file__)
    quiet = lambda *command: subprocess.run([sys.executable, *command], cwd=here, check=True, stdout=subprocess.DEVNULL)
    found = turns(cfg.repeats, ours=lambda: quiet("train.py", "help"), peer=lambda: quiet("-c", "import torch"))
    figures = [say("train.py help, beside import torch", found)]
    with tempfile.TemporaryDirectory() as folder:
        once = ["train.py", f"out_dir={folder}", "max_steps=1", "eval_every=-1"]
        quiet(*once)  # makes the toy
        waits = []
        for _ in range(cfg.repeats):
            began = time.perf_counter()
            run = subprocess.Popen([sys.executable, *once], cwd=here, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            waits += [time.perf_counter() - began for line in run.stdout if line.startswith("step 1/")]
    print(f"first step of a toy run after {statistics.median(waits):.1f} s ({min(waits):.1f} to {max(waits):.1f})")
    return figures + [{"what": "first step", "seconds": waits}]


NAMES = {"step": step, "decode": decode, "band": band, "load": load, "scale": scale, "start": start}
