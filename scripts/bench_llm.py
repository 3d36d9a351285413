"""
The LLM's part of scripts/bench.py: ours and transformers (+ PEFT) in turn, on the same weights and the same ragged clips, first shown to give the same result.
"""
import contextlib
import json
import os
import statistics
import tempfile
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import train
from config import BadInput, configure
from data import Sample, Tokenizer, pack, prompt_ids, stateless
from eval import generate
from lora import adapter, write_adapter
from model import SIZES, LLaMA, SLLaMA, fill, full, local_attention, open_llm
from readers import read_gfslt
from weights import to_hf

SIZES["bench"] = dict(dim=576, n_layers=12, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=32000)  # a size for two cores


def turns(repeats, **sides):
    """Call each side `repeats` times, in turn -> side -> its median, least and largest number of seconds."""
    took = {name: [] for name in sides}
    for side in sides.values():
        side()  # what is made at first use is made
    for _ in range(repeats):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            took[name].append(time.perf_counter() - start)
    return {name: {"median": statistics.median(t), "low": min(t), "high": max(t)} for name, t in took.items()}


def say(what, found, floor=None):
    """Print a line of a comparison of `ours` and `peer`; returns its figures."""
    show = lambda t: f"{1000 * t['median']:8.1f} ms ({1000 * t['low']:.1f} to {1000 * t['high']:.1f})"
    ratio = found["peer"]["median"] / found["ours"]["median"]
    print(f"{what:44} ours {show(found['ours'])}, peer {show(found['peer'])}, ratio {ratio:.2f}"
          + (f", floor {1000 * floor:.1f} ms = {floor / found['ours']['median']:.2f} of ours" if floor else ""), flush=True)
    return {"what": what, "ratio": ratio, "floor": floor, **found}


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


def write_llm(folder, size="bench"):
    """Random weights of a size as a Hugging Face folder that both sides read; large enough that logits differ."""
    raw = open_llm(f"random:{size}")
    args = raw.args
    state = {to_hf(k): (raw.read(k) * (3.0 if "tok_embeddings" in k or "output" in k else 1.0)).contiguous() for k in raw.shapes}
    save_file(state, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as f:
        json.dump({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": args.dim, "num_hidden_layers": args.n_layers,
                   "num_attention_heads": args.n_heads, "num_key_value_heads": args.n_kv_heads, "head_dim": args.head_dim, "intermediate_size": args.hidden_dim,
                   "vocab_size": args.vocab_size, "rms_norm_eps": args.norm_eps, "rope_theta": args.rope_theta, "hidden_act": "silu", "max_position_embeddings": 4096,
                   "tie_word_embeddings": args.tied, "bos_token_id": 1, "eos_token_id": 2}, f)


class Ours:
    """What train.py runs, with its optimizer: SLLaMA as train.build makes it, on one process."""

    def __init__(self, cfg, folder, stage, lora_rank=8):
        page = [f"stage={stage}", f"llm={folder}", f"lora_rank={lora_rank}", "ltn_dim=0", "ltn_heads=8", "dtype=float32", "device=cpu"]
        self.cfg, self.device = configure(train.__file__, page, stages=("align", "sft")), torch.device("cpu")
        self.tokenizer = Tokenizer(cfg.tokenizer) if os.path.isdir(cfg.tokenizer) else Tokenizer("random:bench")
        if not dist.is_initialized():
            train.setup(self.device)
        raw = open_llm(folder)
        self.model = train.build(self.cfg, raw.args, 1024, self.device, torch.float32)
        with contextlib.redirect_stderr(open(os.devnull, "w")):
            self.model.load(raw, self.device, 0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:  # not zero, as after some training
                    fill(p, 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        self.prompt = prompt_ids(self.model.prompt, self.tokenizer)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def samples(self, clips):
        rng = stateless(0, "bench", "features")
        return [Sample(str(i), torch.from_numpy(rng.standard_normal((T, 1024), np.float32)).half(), *self.prompt,
                       self.tokenizer.encode(text) + [self.tokenizer.eos_id]) for i, (T, text) in enumerate(clips)]

    def loss(self, samples):
        loss, n = self.model(pack(samples))
        return loss / n


class Peer(nn.Module):
    """What people would write with transformers and PEFT: one padded batch, logits at every position. The visual part is ours, padded too."""

    def __init__(self, ours, folder):
        super().__init__()
        try:
            import peft
            import transformers
        except ImportError as e:
            raise BadInput(f"{e.name}: is not installed, and the peer is made of it (pip install transformers peft)") from None
        self.llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
        if not ours.cfg.freeze_llm:
            tensors, config = adapter(ours.model.llm, folder)
            write_adapter({k: full(v).contiguous() for k, v in tensors.items()}, config, os.path.join(folder, "lora"))
            self.llm = peft.PeftModel.from_pretrained(self.llm, os.path.join(folder, "lora"), is_trainable=True)
        fresh = SLLaMA(ours.model.llm.args, 1024, ours.cfg)
        self.ltn, self.adaptor = fresh.ltn.requires_grad_(ours.cfg.train_ltn), fresh.adaptor
        state = dict(ours.model.named_parameters())
        for name, p in self.named_parameters():
            if name in state:  # all of ltn and adaptor
                p.data = full(state[name])
        self.scale, self.prompt = ours.model.scale.item(), ours.prompt
        self.optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-6, fused=True)

    def inputs(self, samples, answers=True):
        """[Sample] -> embeddings (B, T, dim), attention mask (B, T), labels (B, T); right-padded to learn, left-padded to generate."""
        frames, embed = [len(s.features) for s in samples], lambda ids: self.llm.get_input_embeddings()(torch.tensor(ids, dtype=torch.long))
        x = nn.utils.rnn.pad_sequence([s.features.float() for s in samples], batch_first=True)  # (B, F, D)
        clip = torch.arange(x.shape[1]) >= torch.tensor(frames)[:, None]  # (B, F) filling is a clip of its own
        x = self.adaptor(self.ltn(x, clip.long())) * self.scale
        rows = [torch.cat([embed(s.before), x[i, :frames[i]], embed(s.after), *([embed(s.answer)] if answers else [])]) for i, s in enumerate(samples)]
        T = max(map(len, rows))
        side = lambda n: (0, T - n) if answers else (T - n, 0)
        h = torch.stack([F.pad(r, (0, 0, *side(len(r)))) for r in rows])
        mask = torch.stack([F.pad(torch.ones(len(r), dtype=torch.long), side(len(r))) for r in rows])
        labels = torch.stack([F.pad(torch.tensor([-100] * (len(r) - len(s.answer)) + s.answer), side(len(r)), value=-100) for r, s in zip(rows, samples)]) if answers else None
        return h, mask, labels

    def loss(self, samples):
        h, mask, labels = self.inputs(samples)
        return self.llm(inputs_embeds=h, attention_mask=mask, labels=labels).loss

    @torch.no_grad()
    def generate(self, samples, beam, new):
        h, mask, _ = self.inputs(samples, answers=False)
        out = self.llm.generate(inputs_embeds=h, attention_mask=mask, num_beams=beam, do_sample=False, length_penalty=0.0, early_stopping=True, max_new_tokens=new, pad_token_id=0)
        return [ids[:ids.index(2)] if 2 in ids else ids for ids in out.tolist()]


def train_step(side, parameters, batches):
    """One pass over the batches, as train.py's loop takes it."""
    for samples in batches:
        side.loss(samples).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        side.optimizer.step()
        side.optimizer.zero_grad(set_to_none=True)


def floor_of_step(ours, batches):
    """Seconds that this machine's own matrix-multiply rate allows for the work of a pass: frozen weights are multiplied twice (forward, and back to their inputs)."""
    a = ours.model.llm.args
    block = a.dim * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads) + 3 * a.dim * a.hidden_dim  # multiplications a token
    work = 0
    for samples in batches:
        lens = [len(s.before) + len(s.features) + len(s.after) + len(s.answer) - 1 for s in samples]
        work += 2 * a.n_layers * (block * sum(lens) + sum(n * n * a.dim for n in lens))  # q k^T and p v, half of each behind the causal mask
        work += 2 * a.vocab_size * a.dim * sum(len(s.answer) for s in samples)
        vision = sum(p.numel() for k, p in ours.model.named_parameters() if k.startswith(("ltn.", "adaptor.")) and p.dim() > 1)
        work += (3 if ours.cfg.train_ltn else 1.5) * vision * sum(len(s.features) for s in samples)
    x, w = torch.randn(512, a.dim), torch.randn(a.hidden_dim, a.dim)
    best = min(turns(20, gemm=lambda: F.linear(x, w))["gemm"].values())
    return work * best / (x.numel() * a.hidden_dim), 2e-9 * x.numel() * a.hidden_dim / best


def step(cfg):
    """SFT and align steps on ragged batches of 4 clips with PHOENIX-2014T's lengths."""
    figures = []
    for stage in ("sft", "align"):
        with tempfile.TemporaryDirectory() as folder:
            write_llm(folder)
            ours = Ours(cfg, folder, stage)
            peer = Peer(ours, folder)
            samples = ours.samples(clips_like_phoenix(cfg, 4 * cfg.batches))
            batches = [samples[i:i + 4] for i in range(0, len(samples), 4)]
            with torch.no_grad():
                apart = max(abs(ours.loss(b) - peer.loss(b)).item() for b in batches)
            print(f"{stage}: frames {[[len(s.features) for s in b] for b in batches]}, losses differ by {apart:.1e} at most")
            if apart > 1e-4:
                raise BadInput(f"{stage}: ours and the peer do not compute the same loss (difference {apart:.1e})")
            floor, gflops = floor_of_step(ours, batches)
            sides = {"ours": (ours, list(ours.model.parameters())), "peer": (peer, list(peer.parameters()))}
            found = turns(cfg.repeats, **{name: (lambda side=side, ps=ps: train_step(side, ps, batches)) for name, (side, ps) in sides.items()})
            per = {name: {k: v / len(batches) for k, v in t.items()} for name, t in found.items()}
            figures.append(say(f"{stage} step, 4 clips, matrices at {gflops:.0f} GFLOP/s", per, floor / len(batches)) | {"loss_difference": apart})
    return figures


def decode(cfg):
    """Beam-4 and greedy decoding of 32 clips; the peer in batches of 8."""
    figures, new = [], 32
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder)
        ours = Ours(cfg, folder, "align")
        peer, model = Peer(ours, folder), ours.model
        model.unshard(), [block.unshard() for block in model.llm.layers]
        samples = sorted(ours.samples(clips_like_phoenix(cfg, 32)), key=lambda s: len(s.features))

        @torch.no_grad()
        def mine(beam):
            out = []
            for i in range(0, 32, 16):
                batch = pack([Sample(s.name, s.features, s.before, s.after, None) for s in samples[i:i + 16]])
                out += [ids for ids, _ in generate(model.llm, model.embed(batch), batch.docs, [2], beam, 0.0, new)]
            return out

        theirs = lambda beam: [ids for i in range(0, 32, 8) for ids in peer.generate(samples[i:i + 8], beam, new)]
        for beam in (4, 1):
            same = sum(a == b for a, b in zip(mine(beam), theirs(beam)))
            print(f"beam {beam}: {same} of 32 hypotheses are the same, up to {new} tokens each")
            found = turns(cfg.repeats, ours=lambda: mine(beam), peer=lambda: theirs(beam))
            figures.append(say(f"decoding 32 clips, beam {beam}", found) | {"same": same})
    return figures


def band(cfg):
    """local_attention against dense attention with a mask, and its growth with T."""
    figures = []
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
    """How an SFT step grows with the frames of a clip, the clips of a batch and the rank, ours and the peer's."""
    figures = []
    with tempfile.TemporaryDirectory() as folder:
        write_llm(folder)
        for rank, batch, frames in [(8, 4, T) for T in (30, 112, 240, 475)] + [(8, B, 112) for B in (1, 2, 8)] + [(r, 4, 112) for r in (4, 16, 32)]:
            ours = Ours(cfg, folder, "sft", rank)
            peer = Peer(ours, folder)
            batches = [ours.samples(clips_like_phoenix(cfg, batch, frames))]
            found = turns(cfg.repeats, ours=lambda: train_step(ours, list(ours.model.parameters()), batches), peer=lambda: train_step(peer, list(peer.parameters()), batches))
            figures.append(say(f"rank {rank}, {batch} clips of {frames} frames", found))
    return figures


NAMES = {"step": step, "decode": decode, "band": band, "load": load, "scale": scale}
