"""
The memory that a run of train.py will need, counted before anything is loaded: `python train.py estimate=true ...` prints it. And what a process really holds.
"""
import contextlib
import os
import threading
import time
from types import SimpleNamespace


def held():
    """Anonymous and shared memory of this process in bytes; pages of mapped files, which the system may drop, are neither."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return 1024 * sum(int(status[k].split()[0]) for k in ("RssAnon", "RssShmem"))


def watch():
    """A list of one number: the most that this process has held since, looked at every 2 ms."""
    peak = [held()]

    def look():
        while True:
            peak[0] = max(peak[0], held())
            time.sleep(0.002)

    threading.Thread(target=look, daemon=True).start()
    return peak


def family(pid):
    """pid -> bytes of a process and all those it has started; what they share is shared out among them (Pss)."""
    found = {}
    with contextlib.suppress(OSError, IndexError, StopIteration):  # a process may end while it is looked at
        pss = next(line for line in open(f"/proc/{pid}/smaps_rollup") if line.startswith("Pss:"))
        found[pid] = 1024 * int(pss.split()[1])
        for child in open(f"/proc/{pid}/task/{pid}/children").read().split():
            found |= family(int(child))
    return found


@contextlib.contextmanager
def peak_memory():
    """The most bytes that this process and those it has started hold meanwhile: .together at one moment, .each by pid."""
    peak, stop = SimpleNamespace(together=0, each={}), threading.Event()

    def look():
        while not stop.wait(0.05):
            found = family(os.getpid())
            peak.together = max(peak.together, sum(found.values()))
            peak.each |= {pid: max(n, peak.each.get(pid, 0)) for pid, n in found.items()}

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def estimate(cfg, model, clips, micro, prompt, tokenizer, dtype, device):
    """
    What each process will hold at its peak, counted from the code of model.py -> (the longest of the micro-batches, [(what, bytes)]), for a
    model on the meta device. Beside it stand the program (0.3 GB), a CUDA context (0.5 GB or so) and NCCL's buffers. On a CPU glibc's allocator keeps a part of what
    is free; MALLOC_MMAP_THRESHOLD_=131072 in the environment stops that.
    """
    args, sharded = model.llm.args, hasattr(next(model.parameters()), "_local_tensor")
    held = {learns: sum(getattr(p, "_local_tensor", p).nbytes for p in model.parameters() if p.requires_grad == learns) for learns in (False, True)}
    block = sum(p.numel() for p in model.llm.layers[0].parameters())
    root = sum(p.numel() for p in model.parameters()) - block * args.n_layers
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # the longest micro-batch: F frames, N tokens, M of them targets
    frames = lambda i: max(1, round(clips.lengths[i] * (1 - cfg.frame_drop)))
    longest = max(micro, key=lambda m: sum(map(frames, m)))
    answers = [len(tokenizer.encode(clips.rows[i]["text"])) + 1 for i in longest]
    lens = [len(prompt[0]) + frames(i) + len(prompt[1]) + n - 1 for i, n in zip(longest, answers)]
    F, N, M = sum(map(frames, longest)), sum(lens), sum(answers)
    # what autograd keeps of a block. A frozen matrix keeps nothing of its input, one that learns or has LoRA beside it keeps all of it
    s, dim, hidden, wide = dtype.itemsize, args.dim, args.hidden_dim, args.n_heads * args.head_dim
    lora = {"wo": ("o", wide), "w2": ("w2", hidden), "w1": ("ffn", dim), "w3": ("ffn", dim)}
    lora = {} if cfg.freeze_llm else {t if cfg.lora_dropout else of: n for t in cfg.lora_targets.split(",") for of, n in [lora.get(t, ("qkv", dim))]}
    kept = N * (2 * dim * 4 + 3 * hidden * s)  # both norms' inputs in fp32; w1 x, silu(w1 x), w3 x
    kept += N * sum(lora.values()) * (s + (cfg.lora_dropout > 0))  # LoRA's inputs, shared where nothing is dropped out; with the mask
    kept += N * 2 * (wide + args.n_kv_heads * args.head_dim) * s + N * args.n_heads * 4  # q, k, v, their output, a log-sum a row
    blocks = args.n_layers * N * dim * s + kept if cfg.activation_checkpointing else args.n_layers * kept
    vision = F * dim * s * (3 if cfg.adaptor == "mlp" else 2)
    if cfg.ltn and cfg.train_ltn:
        w, reach = model.adaptor.w1.in_features, cfg.window // 2  # a block of 32 queries sees 32 + 2 reach keys, and its weights are not kept
        vision += cfg.ltn_layers * F * s * (11 * w + 2 * w * (32 + 2 * reach) // 32 + 4 * (8 * w // 3)) + F * (32 + 2 * reach)
    back = max(3 * 4 * M * args.vocab_size, N * (3 * hidden + 2 * dim) * s)  # log-softmax and two gradients of it, or the gradients inside a block
    away = ", on the CPU" * (cfg.cpu_offload and device.type == "cuda")
    after = learning * (s + 4) if device.type == "cuda" else 3 * 4 * learning  # gradients before and after the sum; a save's copies are made on the CPU
    rows = [
        ("frozen weights" + away, held[False]), ("weights that learn" + away, held[True]), ("AdamW's two moments" + away, 2 * held[True]),
        ("gathered: two blocks and what is no block", (root + 2 * block) * s if sharded else 0), ("kept for the backward pass", blocks + vision),
        ("logits or a block's gradients", back), ("gradients, copies for a save, where larger", max(0, after - blocks - vision - back))]
    if device.type == "cpu" and "MALLOC_MMAP_THRESHOLD_" not in os.environ:  # measured: 1 to 23 % more, on LLMs of 62 to 271 million parameters
        rows.append(("free, but kept by glibc's allocator", 0.12 * sum(size for _, size in rows)))
    return f"{len(lens)} clips of {F} frames, {N} tokens", rows
