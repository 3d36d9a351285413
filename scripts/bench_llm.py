"""
The LLM's part of scripts/bench.py: ours and transformers (+ PEFT) in turn, on the same weights and ragged clips.
Before anything is timed both are shown to give the same result.
"""
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from statistics import median
from time import perf_counter, process_time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors.torch import save_file

import train
from data import Sample, pack, prompt_ids
from eval import prefixes
from lib.adapter import write_adapter
from lib.checkpoint import read_log
from lib.cnn import import_torchvision
from lib.configurator import configure
from lib.features import write_common
from lib.program import BadInput, join, pick_device, pick_dtype
from lib.readers import read_gfslt
from lib.tensors import fill, full, init_weight, stateless, to_hf
from lib.tokenizer import Tokenizer
from lib.weights import SIZES, ModelArgs, hf_config, open_llm
from model import Adaptor, LLaMA, LocalTransformer, generate, local_attention, sees
from scripts.memory import peak_memory

LTN = ["ltn_dim=0", "ltn_heads=8"]  # the paper's width: that of the features
# a size for two cores
SIZES["bench"] = ModelArgs(576, 12, 9, 3, 1536, 32000, 64)


def turns(repeats, **sides):
    """
    Call each side `repeats` times, in turn. -> side -> its median, least and largest number of seconds, cpu: the median
    of this process's CPU time, which a busy machine disturbs less, and on a GPU the most memory it held, in GB.
    """
    took, gpu = {name: [] for name in sides}, torch.cuda.is_available()
    for turn in range(repeats + 1):
        for name, side in sides.items():
            if gpu:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start, cpu = perf_counter(), process_time()
            side()
            if gpu:
                torch.cuda.synchronize()
            held = torch.cuda.max_memory_allocated() / 1e9 if gpu else 0.0
            if turn:  # in the first, what is made at first use is made
                took[name].append((perf_counter() - start, process_time() - cpu, held))
    found = {}
    for name, each in took.items():
        wall, cpu, held = zip(*each)
        found[name] = {"median": median(wall), "low": min(wall), "high": max(wall)}
        found[name]["cpu"] = median(cpu)
        if gpu:
            found[name]["gpu_gb"] = max(held)
    return found


def say(what, found, floor=None):
    """Print a line of a comparison of `ours` and `peer`; returns its figures."""
    def show(t):
        low, middle, high = (1000 * t[k] for k in ("low", "median", "high"))
        return f"{middle:8.1f} ms ({low:.1f} to {high:.1f})" + (f" {t['gpu_gb']:.1f} GB" if "gpu_gb" in t else "")

    ours, peer = found["ours"], found["peer"]
    ratio = peer["median"] / ours["median"]
    print(f"{what:44} ours {show(ours)}, peer {show(peer)}, ratio {ratio:.2f}"
          + (f", floor {1000 * floor:.1f} ms = {floor / ours['median']:.2f} of ours" if floor else ""), flush=True)
    return {"what": what, "ratio": ratio, "floor": floor, "ours": ours, "peer": peer}


def clips_like_phoenix(cfg, n, frames=0):
    """
    n clips as (frames, sentence). frames: all so long.
    They are drawn from PHOENIX-2014T's own labels where labels= holds them, else numbers and words like theirs.
    """
    rng = stateless(0, "bench", "clips")
    if os.path.isdir(cfg.labels):
        rows = read_gfslt(cfg.labels)[0]["train"]
        drawn = [(rows[i]["frames"], rows[i]["text"]) for i in rng.integers(len(rows), size=n)]
    else:
        words = ("heute morgen im norden regnet es am tag scheint die sonne und wind weht schwach aus nordwest "
                 "grad").split()
        length = lambda: int(np.clip(np.exp(rng.normal(4.7, 0.45)), 16, 475))
        drawn = [(length(), " ".join(rng.choice(words, 14))) for _ in range(n)]
    return [(frames or T, text) for T, text in drawn]


def write_llm(folder, size="bench", dtype=torch.float32, device="cpu"):
    """Random weights of a size as a Hugging Face folder that both sides read; large enough that logits differ."""
    raw, state = open_llm(f"random:{size}"), {}
    for name, shape in raw.shapes.items():
        large = 3.0 if "tok_embeddings" in name or "output" in name else 1.0
        state[to_hf(name)] = (init_weight(name, shape, 0, device) * large).to(dtype).cpu()
    save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
    with open(f"{folder}/config.json", "w") as f:
        json.dump(hf_config(raw.args, "random:bench", dtype), f)


def dtypes(cfg):
    """What both sides compute in, one after the other: dtypes=, else train.py's own choice."""
    device = pick_device(cfg.device)[0]
    return [pick_dtype(name, device, SIZES[cfg.llm].size())[0] for name in (cfg.dtypes or "auto").split(",")]


def features_like(clips):
    """Random features (T, 1024) float16 for [(T, sentence)], always the same."""
    rng = stateless(0, "bench", "features")
    return [torch.from_numpy(rng.standard_normal((T, 1024), np.float32)).half() for T, _ in clips]


def what_learns(module):
    return [p for p in module.parameters() if p.requires_grad]


def quiet():
    return contextlib.redirect_stderr(open(os.devnull, "w"))


class Ours:
    """What train.py runs, with its optimizer: SLLaMA as train.build makes it, on one process."""

    def __init__(self, cfg, folder, stage, dtype, lora_rank=8):
        page = [f"stage={stage}", f"llm={folder}", f"lora_rank={lora_rank}", *LTN, f"compile={cfg.compile}",
                f"activation_checkpointing={cfg.activation_checkpointing}", f"llm_bits={cfg.llm_bits}"]
        self.cfg = configure(train.__file__, page, stages=("align", "sft"))
        self.device, self.dtype = pick_device(cfg.device)[0], dtype
        self.tokenizer = Tokenizer(cfg.tokenizer if os.path.isdir(cfg.tokenizer) else "random:bench")
        if not dist.is_initialized():
            join(self.device)
        raw = open_llm(folder)
        self.model = train.build(self.cfg, raw.args, 1024, self.device, self.dtype)
        with quiet():
            self.model.load(raw, self.device, 0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:  # not zero, as after some training
                    fill(p, 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        self.prompt = prompt_ids(self.model.prompt, self.tokenizer)
        self.optimizer = torch.optim.AdamW(what_learns(self.model), lr=1e-6, fused=True)

    def samples(self, clips):
        """[(frames, sentence)] -> [Sample]"""
        answers = [self.tokenizer.encode(text) + [self.tokenizer.eos_id] for _, text in clips]
        return [Sample(x, *self.prompt, answer) for x, answer in zip(features_like(clips), answers)]

    def loss(self, samples):
        loss, n = self.model(pack(samples, self.device))
        return loss / n


class Peer(nn.Module):
    """
    What people would write with transformers and PEFT: one padded batch, logits at every position.
    The visual part is ours, padded too.
    """

    def __init__(self, ours, folder):
        super().__init__()
        import_torchvision()
        try:
            import peft
            import transformers
            if ours.cfg.llm_bits < 16:
                import bitsandbytes  # noqa: F401
        except ImportError as e:
            raise BadInput("the peer is made of transformers and peft, in 8 and 4 bits of bitsandbytes too, "
                           f"pip install transformers peft bitsandbytes ({e})") from None
        self.device, c, adapter = ours.device, ours.cfg, f"{folder}/lora"
        quantized = {} if c.llm_bits == 16 else {"quantization_config": transformers.BitsAndBytesConfig(
            load_in_8bit=c.llm_bits == 8, load_in_4bit=c.llm_bits == 4, bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=ours.dtype), "device_map": {"": self.device}}
        self.llm = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=ours.dtype, **quantized)
        self.llm.requires_grad_(False)
        if not c.freeze_llm:
            tensors = {k.removeprefix("llm."): full(v) for k, v in ours.model.named_parameters() if "lora_" in k}
            write_adapter(adapter, tensors, c.lora_rank, c.lora_alpha, base=folder)
            self.llm = peft.PeftModel.from_pretrained(self.llm, adapter, is_trainable=True)
        if c.activation_checkpointing:
            self.llm.gradient_checkpointing_enable({"use_reentrant": False})
        self.ltn = LocalTransformer(1024, c.ltn_layers, c.ltn_heads, c.window).requires_grad_(c.train_ltn)
        self.adaptor = Adaptor(1024, ours.model.llm.args.dim)
        state = dict(ours.model.named_parameters())
        for name, p in self.named_parameters():
            if name in state:  # all of ltn and adaptor
                p.data = full(state[name])
        self.to(self.device)
        self.scale, self.prompt = ours.model.scale.item(), ours.prompt
        self.optimizer = torch.optim.AdamW(what_learns(self), lr=1e-6, fused=True)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.llm.dtype == torch.bfloat16)

    def inputs(self, samples, answers=True):
        """
        [Sample] -> embeddings (B, T, dim), attention mask (B, T), labels (B, T).
        Right-padded to learn; without answers left-padded, to generate.
        """
        frames, words = [len(s.features) for s in samples], self.llm.get_input_embeddings()
        embed = lambda ids: words(torch.tensor(ids, dtype=torch.long, device=self.device))
        x = nn.utils.rnn.pad_sequence([s.features.float() for s in samples], batch_first=True)  # (B, F, D)
        clip = torch.arange(x.shape[1]) >= torch.tensor(frames)[:, None]  # (B, F) filling is a clip of its own
        with self.autocast():
            x = self.adaptor(self.ltn(x.to(self.device), clip.long().to(self.device))) * self.scale
        rows, labels = [], []
        for s, seen, n in zip(samples, x.to(self.llm.dtype), frames):
            answer = s.answer if answers else []
            rows.append(torch.cat([embed(s.before), seen[:n], embed(s.after), embed(answer)]))
            labels.append(torch.tensor([-100] * (len(rows[-1]) - len(answer)) + answer))
        pad = lambda some, value: nn.utils.rnn.pad_sequence(some, batch_first=True, padding_value=value,
                                                            padding_side="right" if answers else "left")
        mask = pad([torch.ones(len(row), dtype=torch.long) for row in rows], 0)
        return pad(rows, 0.0), mask.to(self.device), pad(labels, -100).to(self.device)

    def loss(self, samples):
        h, mask, labels = self.inputs(samples)
        with self.autocast():
            return self.llm(inputs_embeds=h, attention_mask=mask, labels=labels).loss

    @torch.no_grad()
    def generate(self, h, mask, beam, new):
        out = self.llm.generate(inputs_embeds=h, attention_mask=mask, num_beams=beam, do_sample=False,
                                length_penalty=0.0, early_stopping=True, max_new_tokens=new, pad_token_id=0)
        return [ids[:ids.index(2)] if 2 in ids else ids for ids in out.tolist()]


def both(cfg, stage, size, dtype, lora_rank=8):
    """Ours and the peer's model of a size, with the same random weights."""
    folder = llm_of(size, dtype, pick_device(cfg.device)[0]).name
    ours = Ours(cfg, folder, stage, dtype, lora_rank)
    return ours, Peer(ours, folder)


@functools.cache
def llm_of(size, dtype, device):
    """write_llm's folder, once for all that is measured on it: at 7B writing takes longer than measuring."""
    folder = tempfile.TemporaryDirectory()
    write_llm(folder.name, size, dtype, device)
    return folder


def train_step(side, module, batches):
    """One pass over the batches, as train.py's loop takes it."""
    for samples in batches:
        side.loss(samples).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        side.optimizer.step()
        side.optimizer.zero_grad(set_to_none=True)


def sides(ours, peer, batches):
    """What turns() calls to time a pass of both."""
    return {"ours": lambda: train_step(ours, ours.model, batches), "peer": lambda: train_step(peer, peer, batches)}


def work_of_step(ours, batches):
    """
    What a pass over the batches cannot do without.
    -> (tokens, floating-point operations of its matrix products, bytes of all else)
    Frozen weights are multiplied twice, forward and back to their inputs.
    Bytes: what the norms, rotary positions, SwiGLU and sums of a block read and write, were each of them one kernel,
    three times (forward, and as much again for each of two inputs backward); the logits, written and read, and their
    gradients.
    """
    a, tokens, flops, values = ours.model.llm.args, 0, 0, 0
    # multiplications a token
    block = a.dim * a.head_dim * (2 * a.n_heads + 2 * a.n_kv_heads) + 3 * a.dim * a.hidden_dim
    moved = 10 * a.dim + 2 * a.head_dim * (a.n_heads + a.n_kv_heads) + 3 * a.hidden_dim  # values a token
    vision = sum(p.numel() for k, p in ours.model.named_parameters() if k[:4] in ("ltn.", "adap") and p.dim() > 1)
    for samples in batches:
        batch = pack(samples)
        N, M = len(batch.tokens), len(batch.targets)
        tokens += N
        flops += 2 * 2 * a.n_layers * block * N
        # the last layer's feed-forward: only where logits are wanted
        flops -= 2 * 2 * 3 * a.dim * a.hidden_dim * (N - M)
        # q k^T and p v, half of each behind the causal mask; twice that backward
        flops += 2 * 3 * a.n_layers * sum(n * n * a.n_heads * a.head_dim for n in batch.lens)
        flops += 2 * 2 * a.vocab_size * a.dim * M
        flops += 2 * (3 if ours.cfg.train_ltn else 1.5) * vision * len(batch.features)
        values += 3 * a.n_layers * moved * N - 3 * 3 * a.hidden_dim * (N - M) + 4 * a.vocab_size * M
    return tokens, flops, values * ours.dtype.itemsize


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def each_at_its_best(what, figures):
    """The ratio where each side computes in the dtype in which it is fastest."""
    ours, peer = (min((f[side]["median"], f["dtype"]) for f in figures) for side in ("ours", "peer"))
    print(f"{what}, each at its best: ours in {ours[1]}, peer in {peer[1]}, ratio {peer[0] / ours[0]:.2f}", flush=True)
    return {"what": f"{what}, each at its best", "ratio": peer[0] / ours[0]}


def step(cfg):
    """SFT and align steps on ragged batches of PHOENIX-2014T's lengths."""
    figures = []
    for stage in ("sft", "align"):
        some = [step_of(cfg, stage, dtype) for dtype in dtypes(cfg)]
        figures += some
        if len(some) > 1:
            figures.append(each_at_its_best(f"{stage} step", some))
    return figures


def step_of(cfg, stage, dtype):
    """A stage's step in a dtype, beside the peer's and what the machine's own rates allow."""
    ours, peer = both(cfg, stage, cfg.llm, dtype)
    samples = ours.samples(clips_like_phoenix(cfg, cfg.batch_size * cfg.batches))
    batches = [samples[i:i + cfg.batch_size] for i in range(0, len(samples), cfg.batch_size)]
    with torch.no_grad():
        apart = max(abs(ours.loss(b) - peer.loss(b)).item() for b in batches)
    frames = [[len(s.features) for s in b] for b in batches]
    print(f"{stage}: frames {frames}, losses differ by {apart:.1e} at most")
    # in 8 and 4 bits the two do not round alike
    if apart > (1e-4 if ours.dtype == torch.float32 and cfg.llm_bits == 16 else 0.05):
        raise BadInput(f"{stage}: ours and the peer do not compute the same loss (difference {apart:.1e})")
    tokens, flops, moved = work_of_step(ours, batches)
    a = ours.model.llm.args
    make = lambda *shape: torch.randn(shape, device=ours.device).to(ours.dtype)
    x, w = make(tokens // len(batches), a.dim), make(a.hidden_dim, a.dim)
    big, copy = make(2**25), make(2**25)
    # the machine's own rates take turns with the two: they change with its load too
    found = turns(cfg.repeats, **sides(ours, peer, batches), matrices=lambda: [F.linear(x, w) for _ in range(20)],
                  memory=lambda: [copy.copy_(big) for _ in range(4)])
    rate = 20 * 2 * x.numel() * a.hidden_dim / found["matrices"]["median"]
    bandwidth = 4 * 2 * big.nbytes / found["memory"]["median"]
    took = found["ours"]["median"]
    for t in found.values():
        t |= {key: t[key] / len(batches) for key in ("median", "low", "high")}
    floor = (flops / rate + moved / bandwidth) / len(batches)
    bits = f", {cfg.llm_bits} bits" if cfg.llm_bits < 16 else ""
    figures = say(f"{stage} step, {cfg.batch_size} clips, {name_of(dtype)}{bits}", found, floor)
    print(f"  {tokens / took:.0f} tokens/s, {flops / took / 1e9:.0f} GFLOP/s; this machine multiplies matrices at "
          f"{rate / 1e9:.0f} GFLOP/s and copies memory at {bandwidth / 1e9:.1f} GB/s", flush=True)
    return figures | {"dtype": name_of(dtype), "loss_difference": apart, "tokens_per_s": tokens / took,
                      "flops_per_s": flops / took, "machine": [rate, bandwidth]}


def decode(cfg):
    """Beam-4 and greedy decoding of 32 clips. What a second dtype writes is compared with the first's."""
    figures, first = [], {}
    for dtype in dtypes(cfg):
        for f, hyps in decode_in(cfg, dtype):
            figures.append(f)
            before = first.setdefault(f["what"], hyps)
            if hyps is not before:
                same = sum(a == b for a, b in zip(hyps, before))
                print(f"  {same} of 32 hypotheses are those of ours in {cfg.dtypes.split(',')[0]}")
    for what in first if len(dtypes(cfg)) > 1 else ():
        figures.append(each_at_its_best(what, [f for f in figures if f["what"] == what]))
    return figures


@torch.no_grad()
def decode_in(cfg, dtype):
    """
    Ours decodes 32 clips all at once (no filling, a prefix once a clip), the peer in batches of 8 of like length.
    From their features, and from the embeddings that the same local transformer and adaptor make of them on both sides.
    Yields the figures, and what ours has written.
    """
    new = 32
    ours, peer = both(cfg, "align", cfg.llm, dtype)
    model = ours.model
    for m in train.groups(model):
        m.unshard()
    samples = sorted(ours.samples(clips_like_phoenix(cfg, 32)), key=lambda s: len(s.features))
    embed = {"ours": lambda: prefixes(model, [s.features for s in samples], ours.prompt),
             "peer": lambda: (peer.inputs(samples[i:i + 8], answers=False)[:2] for i in range(0, 32, 8))}
    write = {"ours": lambda streams, beam: [ids for ids, _ in generate(model.llm, streams, [2], beam, 0.0, new)],
             "peer": lambda parts, beam: [ids for h, mask in parts for ids in peer.generate(h, mask, beam, new)]}
    embedded = {name: list(embed[name]()) for name in embed}
    for beam in (4, 1):
        hyps = [write[name](embedded[name], beam) for name in write]
        same = sum(a == b for a, b in zip(*hyps))
        print(f"beam {beam}, {name_of(dtype)}: {same} of 32 hypotheses are the peer's, up to {new} tokens each")
        for what, source in {"features": lambda name: embed[name](), "embeddings": embedded.get}.items():
            found = turns(cfg.repeats, **{name: lambda name=name: write[name](source(name), beam) for name in write})
            yield say(f"32 clips from {what}, beam {beam}", found) | {"same": same, "dtype": name_of(dtype)}, hyps[0]


def band(cfg):
    """local_attention against dense attention with a mask, and its growth with T."""
    figures, device = [], pick_device(cfg.device)[0]
    # glibc's malloc keeps freed memory up to twice the largest tensor (of 32 MB at most) that a process has freed so
    # far. One that trains or decodes has freed larger ones than the band's. A fresh process would give every page back,
    # and time the faults that fetch it again
    torch.empty(7_500_000)
    for T in (1024, 4096):
        q, k, v = (torch.randn(1, 8, T, 64, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
        at = torch.arange(T, device=device)
        mask = sees(at[:, None], at, 8)
        for dtype in dtypes(cfg):
            cast = [t.to(dtype) for t in (q, k, v)]
            ours = lambda: local_attention(*cast, 8)
            dense = lambda: F.scaled_dot_product_attention(*cast, attn_mask=mask)
            apart = (ours() - dense()).abs().max().item()
            found = turns(cfg.repeats, ours=ours, peer=dense)
            what = f"band of window 8, T = {T}, {name_of(dtype)} (differ by {apart:.0e})"
            figures.append(say(what, found) | {"difference": apart, "dtype": name_of(dtype)})
    print("      T        ms   ns a frame")
    for T in (1024, 4096, 16384, 65536):
        q, k, v = (torch.randn(1, 8, T, 64, device=device) for _ in range(3))
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
        write_common(f"{folder}/data/bench", "random", {"train": rows, "dev": [], "test": []},
                     {k: f.shape for k, f in features.items()}, lambda name: features[name].numpy(), lambda names: {})
        shutil.copy(os.path.join(cfg.tokenizer, "tokenizer.model"), folder)
        for stage in ("align", "sft"):
            args = [train.__file__, "dataset=bench", "backbone=random", "language=German", f"llm={folder}",
                    f"data_dir={folder}/data", *LTN, f"stage={stage}", "batch_size=4", "log_every=1", "epochs=1"]
            for n in (1, 2) * cfg.repeats:
                torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={n}"] if n > 1 else []
                env = os.environ | {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // n))}
                with peak_memory() as peak:
                    subprocess.run([sys.executable, *torchrun, *args, f"out_dir={folder}/out{n}"], env=env, check=True,
                                   stdout=subprocess.DEVNULL)
                log = map(json.loads, read_log(f"{folder}/out{n}/bench/{stage}/log.jsonl"))
                steps = [e["step_s"] for e in log if "step_s" in e][2:]
                # without this process and torchrun
                held = sorted(b for pid, b in peak.each.items() if pid != os.getpid())[-n]
                figures.append({"stage": stage, "processes": n, "step_s": median(steps),
                                "gb_a_process": held / 1e9})
            for n in (1, 2):
                some = [f for f in figures if f["stage"] == stage and f["processes"] == n]
                print(f"{stage}, {n} process(es): {median(f['step_s'] for f in some):.3f} s a step, "
                      f"{max(f['gb_a_process'] for f in some):.2f} GB a process", flush=True)
    return figures


def load(cfg):
    """LLaMA.from_pretrained against transformers' on the same folder."""
    import transformers
    device, size = pick_device(cfg.device)[0], "smollm2-135m" if cfg.llm == "bench" else cfg.llm
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    folder = llm_of(size, dtype, device).name
    gb = os.path.getsize(f"{folder}/model.safetensors") / 1e9

    def mine():
        with quiet():
            LLaMA.from_pretrained(folder, dtype, device)

    theirs = lambda: transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device)
    found = turns(cfg.repeats, ours=mine, peer=theirs)
    return [say(f"loading {gb:.2f} GB, {gb / found['ours']['median']:.2f} GB/s", found)]


def scale(cfg):
    """
    How an SFT step grows with the frames of a clip, the clips of a batch and the rank, ours and the peer's.
    And what a second process brings.
    """
    figures = processes(cfg)
    sizes = [(8, 4, T) for T in (30, 112, 240, 475)] + [(8, B, 112) for B in (1, 2, 8)]
    sizes += [(r, 4, 112) for r in (4, 16, 32)]
    for rank, batch, frames in sizes:
        ours, peer = both(cfg, "sft", "bench", dtypes(cfg)[0], rank)
        found = turns(cfg.repeats, **sides(ours, peer, [ours.samples(clips_like_phoenix(cfg, batch, frames))]))
        figures.append(say(f"rank {rank}, {batch} clips of {frames} frames", found))
    return figures


def start(cfg):
    """How long one waits: `train.py help` beside an import of torch, and the first step of a toy run with its data."""
    here = os.path.dirname(train.__file__)
    call = lambda *command: subprocess.run([sys.executable, *command], cwd=here, check=True, stdout=subprocess.DEVNULL)
    found = turns(cfg.repeats, ours=lambda: call("train.py", "help"), peer=lambda: call("-c", "import torch"))
    figures = [say("train.py help, beside import torch", found)]
    with tempfile.TemporaryDirectory() as folder:
        once = ["train.py", f"out_dir={folder}", "max_steps=1", "eval_every=-1"]
        call(*once)  # makes the toy
        waits = []
        for _ in range(cfg.repeats):
            began = perf_counter()
            run = subprocess.Popen([sys.executable, *once], cwd=here, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.DEVNULL)
            waits += [perf_counter() - began for line in run.stdout if line.startswith("step 1/")]
    print(f"first step of a toy run after {median(waits):.1f} s ({min(waits):.1f} to {max(waits):.1f})")
    return figures + [{"what": "first step", "seconds": waits}]


NAMES = {f.__name__: f for f in (step, decode, band, load, scale, start)}
