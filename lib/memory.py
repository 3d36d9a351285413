"""
The memory that a run will need, counted before anything is loaded, and what to say where it was too little.
"""
import contextlib
import math
import os

import torch

from lib.adapter import TARGETS
from lib.program import BadInput, print0, world

LOWERS = ("grad_accum= (more micro-batches of fewer clips), batch_size=, activation_checkpointing=true, max_frames=, "
          "cpu_offload=true, more processes")
DECODING_LOWERS = "batch_size=, beam=, max_new_tokens=, llm_bits=; in training eval_every=-1, which scores no dev clips"


@contextlib.contextmanager
def explained(doing, held, lowers):
    """Out of memory in here is an error that says at what, with what, and what lowers it."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        said = str(e).splitlines()[0]
        raise BadInput(f"{doing}: out of memory with {held}; what lowers it: {lowers} ({said})") from None


def step_explained(step, batch):
    """`explained` for a step of training."""
    return explained(f"step {step + 1}", f"{len(batch.lens)} clips of {len(batch.features)} frames, "
                     f"{len(batch.tokens)} tokens in a micro-batch", LOWERS + "; estimate=true says how much")


def at_once(cfg):
    """Clips of dev that a process decodes together: as many as a micro-batch has, at least 8."""
    return max(8, cfg.batch_size // (world() * cfg.grad_accum))


def print_estimate(*what):
    """Print the rows of `estimate`, whose arguments these are."""
    longest, rows = estimate(*what)
    print0(f"estimate: a process of {world()}, at the longest micro-batch, {longest}; lower it by {LOWERS}")
    in_all = sum(size for row, size in rows if "on the CPU" not in row)
    for row, size in [*rows, ("in all", in_all)]:
        print0(f"  {row:44} {size / 1e9:8.2f} GB")


def estimate(cfg, model, clips, micro, prompt, tokenizer, dtype, device, dev=None):
    """
    What each process will hold at its peak, counted from the code of model.py, for a model on the meta device.
    micro: micro-batches, lists of clip numbers; the longest counts. dev: its clips, None = not scored.
    -> (what is in it, [(what, bytes)]). Beside it stand the program (0.3 GB), a CUDA context (0.5 GB or so) and NCCL's
    buffers.
    """
    args, sharded = model.llm.args, hasattr(next(model.parameters()), "_local_tensor")
    own = lambda p: getattr(p, "_local_tensor", p).nbytes
    frozen, learning = (sum(own(p) for p in model.parameters() if p.requires_grad == learning)
                        for learning in (False, True))
    whole = lambda m: sum(p.nbytes for p in m.parameters())
    block = whole(model.llm.layers[0])
    root = whole(model) - block * args.n_layers
    n_learning = sum(p.numel() for p in model.parameters() if p.requires_grad)

    # the longest micro-batch: F frames, N tokens, M of them targets
    frames = lambda i: max(1, round(clips.lengths[i] * (1 - cfg.frame_drop)))
    longest = max(micro, key=lambda m: sum(map(frames, m)))
    joined = 2 if cfg.concat else 1  # each of them may be followed by one like it, in the same sequence
    shown = [joined * frames(i) for i in longest]
    answers = [joined * len(tokenizer.encode(clips.rows[i]["text"])) + 1 for i in longest]
    lens = [len(prompt[0]) + f + len(prompt[1]) + n - 1 for f, n in zip(shown, answers)]
    F, N, M = sum(shown), sum(lens), sum(answers)

    # what autograd keeps of a block. A frozen matrix keeps nothing of its input, one that learns all of it
    s, dim, hidden, wide = dtype.itemsize, args.dim, args.hidden_dim, args.n_heads * args.head_dim
    kept = N * (2 * dim * 4 + 3 * hidden * s)  # both norms' inputs in fp32; w1 x, silu(w1 x), w3 x
    kept += N * lora_inputs(cfg, dim, hidden, wide) * (s + (cfg.lora_dropout > 0))  # with dropout's mask
    # q, k, v, their output, and a log-sum a row; attention_by_products keeps all of its weights
    by_products = device.type == "cpu" and s < 4
    weights = s * sum(n * n for n in lens) if by_products else 4 * N
    kept += N * 2 * (wide + args.n_kv_heads * args.head_dim) * s + args.n_heads * weights
    blocks = args.n_layers * N * dim * s + kept if cfg.activation_checkpointing else args.n_layers * kept
    # of the adaptor: W1 x, GELU of it, and the frames as they stand in the LLM's stream
    vision = F * dim * s * {"mlp": 3, "mlp_noact": 2, "linear": 1}[cfg.adaptor]
    if cfg.ltn and cfg.train_ltn:  # a block of 32 queries sees so many keys, and its weights are not kept
        w, seen = model.adaptor.w1.in_features, 32 + sum(model.ltn.reach)
        inside = s * (11 * w + 4 * (8 * w // 3) + 2 * w * seen // 32)
        vision += cfg.ltn_layers * F * inside + F * seen
    if s < 4:  # what learns is cast for each use, but for word embeddings, which are looked up
        vision += s * (n_learning - cfg.train_embeddings * args.vocab_size * dim)
    # log-softmax and two gradients of it, or the gradients inside a block, beside them a matrix that is dequantised
    unpacked = dim * hidden * (s + 2) if cfg.llm_bits < 16 else 0  # two weights of 4 bits are first one int32
    back = max(3 * 4 * M * args.vocab_size, N * (3 * hidden + 2 * dim) * s + unpacked)

    away = ", on the CPU" if cfg.cpu_offload and device.type == "cuda" else ""
    # gradients before and after the sum; on a CPU the copies that a save makes
    after = n_learning * (s + 4) if device.type == "cuda" else 3 * 4 * n_learning
    rows = [
        ("frozen weights" + away, frozen), ("weights that learn" + away, learning),
        ("AdamW's two moments" + away, 2 * learning),
        ("gathered: two blocks and what is no block", root + 2 * block if sharded else 0),
        ("kept for the backward pass", blocks + vision), ("logits or a block's gradients", back),
        ("gradients, copies for a save, where larger", max(0, after - blocks - vision - back))]
    scoring = whole(model) * sharded + unpacked + dev_scores(cfg, args, dev, prompt, tokenizer, s) if dev else 0
    rows.append(("dev scores, where larger", max(0, scoring - sum(size for _, size in rows[3:]))))
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        # measured: 1 to 23 % more on LLMs of 62 to 271 million parameters; MALLOC_MMAP_THRESHOLD_=131072 stops that
        rows.append(("free, but kept by glibc's allocator", 0.12 * sum(size for _, size in rows)))
    return f"{len(lens)} clips of {F} frames, {N} tokens", rows


def dev_scores(cfg, args, dev, prompt, tokenizer, s):
    """Bytes of what `train.evaluate` decodes together, numbers of s bytes: keys and values, a block's inside."""
    frames = sorted(dev.lengths)[-at_once(cfg):]
    prefix = sum(frames) + len(frames) * sum(map(len, prompt))
    longest = 2 * max(len(tokenizer.encode(row["text"])) for row in dev.rows)
    written = len(frames) * cfg.beam * 32 * math.ceil(longest / 32)  # as model.Cache makes room
    kept = args.n_layers * 2 * args.n_kv_heads * args.head_dim * s * (prefix + written)
    return kept + prefix * 3 * args.hidden_dim * s


def lora_inputs(cfg, dim, hidden, wide):
    """Width of all that the layers of a block that learn have as inputs; where nothing is dropped out, some share."""
    if cfg.freeze_llm:
        return 0
    inputs = {"wo": ("o", wide), "w2": ("w2", hidden), "w1": ("ffn", dim), "w3": ("ffn", dim)}
    found = {}
    for target in cfg.lora_targets.split(",") if cfg.lora_rank else TARGETS:
        shared, width = inputs.get(target, ("qkv", dim))
        found[target if cfg.lora_rank and cfg.lora_dropout else shared] = width
    return sum(found.values())
