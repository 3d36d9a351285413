"""
lib/memory.py: every row of the estimate, counted again by hand for a model so small that its tensors can be listed.

    python -m pytest tests/test_memory.py
"""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import page
from torch.testing._internal.distributed.fake_pg import FakeStore

import train
from lib.memory import estimate
from lib.weights import ModelArgs
from model import ADAPTORS, Adaptor

# no two sizes alike, so that none can stand for another; heads together are wider than the model
DIM, LAYERS, HEADS, KV, HEAD, HIDDEN, VOCAB, FEATURES, LTN = 12, 3, 4, 2, 10, 28, 51, 18, 16
ARGS = ModelArgs(dim=DIM, n_layers=LAYERS, n_heads=HEADS, n_kv_heads=KV, hidden_dim=HIDDEN, vocab_size=VOCAB,
                 head_dim=HEAD)
Q, K = HEADS * HEAD, KV * HEAD
MATRICES = {"wq": (Q, DIM), "wk": (K, DIM), "wv": (K, DIM), "wo": (DIM, Q),
            "w1": (HIDDEN, DIM), "w2": (DIM, HIDDEN), "w3": (HIDDEN, DIM)}
CFG = dict(ltn_dim=LTN, ltn_layers=2, ltn_heads=2, window=6, frame_drop=0.6, lora_rank=3, lora_alpha=4.0)


@pytest.fixture
def processes(monkeypatch):
    """A function of a number: from now on this is the first of so many processes, the others being made up."""
    def start(n):
        monkeypatch.setenv("WORLD_SIZE", str(n))
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=n)
    return start


def tensors(cfg):
    """(shape, whether it learns) of every weight: those of one of the LLM's blocks, those outside of the blocks."""
    whole = not cfg.freeze_llm and not cfg.lora_rank
    block = [(s, whole) for s in MATRICES.values()] + [((DIM,), False)] * 2
    if not cfg.freeze_llm and not whole:
        for t in cfg.lora_targets.split(","):
            out, into = MATRICES[t]
            block += [((cfg.lora_rank, into), True), ((out, cfg.lora_rank), True)]
    rest = [((VOCAB, DIM), cfg.train_embeddings), ((DIM,), False), ((VOCAB, DIM), whole)]
    wide = LTN if cfg.ltn else FEATURES
    if cfg.ltn:
        layer = [(LTN, LTN)] * 4 + [(42, LTN), (LTN, 42), (42, LTN)] + [(LTN,)] * 2  # SwiGLU's width: 8/3 of 16
        rest += [(s, cfg.train_ltn) for s in [(LTN, FEATURES), *layer * cfg.ltn_layers, (LTN,)]]
    return block, rest + [(s, True) for s in [(DIM, wide), (DIM, DIM)][:1 if cfg.adaptor == "linear" else 2]]


def counted(cfg, n, frames, answers, prompt, s, cuda):
    """
    The eight rows in bytes, of the first of n processes. frames, answers: how many each clip of the longest micro-batch
    has; prompt: tokens of the prompt; s: bytes of a number that is computed with.
    """
    block, rest = tensors(cfg)
    everything = block * LAYERS + rest
    # of the rows the first process has the larger part
    share = lambda shape: math.prod((-(-shape[0] // n), *shape[1:]))
    frozen = sum(share(shape) for shape, learns in everything if not learns) * s
    learning = sum(share(shape) for shape, learns in everything if learns) * 4
    sharded = n > 1 or cfg.cpu_offload
    numbers = lambda some: sum(math.prod(shape) for shape, _ in some)
    F, M = sum(frames), sum(answers)
    N = F + M + (prompt - 1) * len(frames)  # the last of an answer's tokens is never read
    # what a block keeps for a token: what goes into the two norms, in fp32; SwiGLU's three parts;
    # queries, keys, values and what attention makes of them
    row = 4 * (DIM + DIM) + s * 3 * HIDDEN + s * (Q + K + K + Q)
    if not cfg.freeze_llm:
        inputs = {"wq": "x", "wk": "x", "wv": "x", "wo": "o", "w1": "y", "w3": "y", "w2": "z"}
        if cfg.lora_dropout:  # each has dropped out other numbers, and keeps its mask
            row += sum(MATRICES[t][1] * (s + 1) for t in cfg.lora_targets.split(","))
        else:
            targets = cfg.lora_targets.split(",") if cfg.lora_rank else MATRICES
            row += sum({inputs[t]: MATRICES[t][1] * s for t in targets}.values())
    inside = N * row
    # and for each head a log-sum of each row, or, in bfloat16 on a CPU, what each token gives each of its sequence
    lens = [prompt + f + m - 1 for f, m in zip(frames, answers)]
    by_products = s < 4 and not cuda
    inside += HEADS * (s * sum(n * n for n in lens) if by_products else 4 * N)
    kept = LAYERS * inside
    if cfg.activation_checkpointing:
        kept = LAYERS * N * DIM * s + inside  # the input of each block, and the inside of one
    kept += F * DIM * s * {"mlp": 3, "mlp_noact": 2, "linear": 1}[cfg.adaptor]
    if cfg.ltn and cfg.train_ltn:
        seen = 32 + cfg.window  # keys that a block of 32 queries meets, copied for it
        inside = s * (7 * LTN + 4 * 42 + 4 * LTN + 2 * LTN * seen / 32)
        kept += cfg.ltn_layers * F * inside + F * seen
    back = max(3 * 4 * M * VOCAB, s * N * (3 * HIDDEN + 2 * DIM))
    learnt = numbers([t for t in everything if t[1]])
    if s < 4:  # cast for each use; word embeddings are looked up
        kept += s * (learnt - cfg.train_embeddings * VOCAB * DIM)
    after = learnt * (s + 4) if cuda else 3 * learnt * 4
    size = lambda some: sum(math.prod(shape) * (4 if learns else s) for shape, learns in some)
    gathered = size(rest) + 2 * size(block) if sharded else 0
    beside = gathered + kept + back + max(0, after - kept - back)
    # dev's five clips, decoded together: all of their frames, and 16 tokens at most, which lie in a room for 32
    read = sum(CLIPS.lengths) + prompt * 5
    dev = s * LAYERS * (K + K) * (read + 5 * 32 * cfg.beam) + s * read * 3 * HIDDEN + sharded * size(everything)
    return [frozen, learning, 2 * learning, gathered, kept, back, max(0, after - kept - back),
            max(0, dev - beside)]


CASES = {
    "align": ({}, 1, torch.float32),
    "all targets": (dict(freeze_llm=False, train_embeddings=True, lora_targets=",".join(MATRICES)), 1, torch.float32),
    "two LoRAs": (dict(freeze_llm=False, lora_targets="wk,w2", train_ltn=False, adaptor="mlp_noact"), 1, torch.float32),
    "dropout": (dict(freeze_llm=False, lora_targets="wq,wv,wo,w3", lora_dropout=0.1, ltn=False, adaptor="linear"), 1,
                torch.float32),
    "checkpointing": (dict(activation_checkpointing=True, freeze_llm=False, train_ltn=False), 1, torch.float32),
    "two processes": (dict(freeze_llm=False, train_embeddings=True, train_ltn=False), 2, torch.float32),
    "two processes in bfloat16": (dict(freeze_llm=False, train_embeddings=True, lora_dropout=0.1, window=16,
                                       activation_checkpointing=True), 2, torch.bfloat16),
    "one process in bfloat16": ({}, 1, torch.bfloat16),
    "the whole LLM": (dict(freeze_llm=False, lora_rank=0), 1, torch.bfloat16),
    "offloaded": (dict(cpu_offload=True, train_embeddings=True), 1, torch.float32),
    "a wide beam on dev": (dict(beam=16), 1, torch.float32),
}
# Six tenths of the frames are left out, but never all of a clip. The longest micro-batch is the one of most frames.
# -> micro-batches, then how many frames and target tokens the clips of the longest have; the second has few frames,
# beside which logits and gradients are large
CLIPS = SimpleNamespace(lengths=[9, 1, 30, 41, 25],
                        rows=[{"text": t} for t in ("a b c d e f g h", "a", "a b", "a b c d", "a b c d e f")])
MICRO = (([[2], [3, 1], [0, 4]], [16, 1], [5, 2]), ([[1], [0]], [4], [9]))
WORDS = SimpleNamespace(encode=str.split)


def make(cfg, n, dtype, processes):
    if n > 1 or cfg.cpu_offload:
        processes(n)
    return train.build(cfg, ARGS, FEATURES, torch.device("cpu"), dtype)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("case", CASES)
def test_every_row(processes, monkeypatch, case, device):
    changes, n, dtype = CASES[case]
    cfg = page(**CFG | changes)
    model = make(cfg, n, dtype, processes)
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    for micro, frames, answers in MICRO:
        prompt = [1, 7, 8], [9, 9]
        longest, rows = estimate(cfg, model, CLIPS, micro, prompt, WORDS, dtype, torch.device(device), CLIPS)
        tokens = sum(frames) + sum(answers) + 4 * len(frames)
        assert longest == f"{len(frames)} clips of {sum(frames)} frames, {tokens} tokens"
        by_hand = counted(cfg, n, frames, answers, 5, dtype.itemsize, device == "cuda")
        assert [size for _, size in rows] == pytest.approx(by_hand), [what for what, _ in rows]
        without = estimate(cfg, model, CLIPS, micro, prompt, WORDS, dtype, torch.device(device))[1]
        assert without == [*rows[:7], (rows[7][0], 0)]
        away = [what for what, _ in rows if "on the CPU" in what]
        assert away == [what for what, _ in rows[:3]] * (cfg.cpu_offload and device == "cuda")


def test_joined_clips_are_one_sequence(monkeypatch):
    """concat: a clip and the one that follows it attend to each other, which costs more than either alone."""
    cfg = page(**CFG | dict(concat=0.3))
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "131072")
    micro, frames, answers = MICRO[0]
    model = make(cfg, 1, torch.bfloat16, None)
    longest, rows = estimate(cfg, model, CLIPS, micro, ([1, 7, 8], [9, 9]), WORDS, torch.bfloat16, torch.device("cpu"),
                             CLIPS)
    frames, answers = [2 * f for f in frames], [2 * (n - 1) + 1 for n in answers]  # one EOS for both
    assert longest == f"2 clips of {sum(frames)} frames, {sum(frames) + sum(answers) + 4 * 2} tokens"
    assert [size for _, size in rows] == pytest.approx(counted(cfg, 1, frames, answers, 5, 2, cuda=False))


@pytest.mark.parametrize("kind", ADAPTORS)
def test_what_autograd_keeps_of_an_adaptor(kind):
    """The bytes of `estimate` are those of the tensors that PyTorch really keeps, and of the frames in the stream."""
    kept, adaptor = {}, Adaptor(LTN, DIM, kind)
    own = {p.data_ptr() for p in adaptor.parameters()}

    def keep(x):
        if x.data_ptr() not in own:
            kept[x.data_ptr()] = x
        return x

    x = torch.randn(100, LTN)  # the local transformer's own, in its row
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        in_stream = adaptor(x)
    kept.pop(x.data_ptr())
    estimated = []
    for frames in (0, 100):
        cfg = page(**CFG | dict(adaptor=kind, frame_drop=0.0, ltn=False))
        model = train.build(cfg, ARGS, FEATURES, torch.device("cpu"), torch.float32)
        clip = SimpleNamespace(lengths=[1 + frames], rows=[{"text": "a"}])
        rows = estimate(cfg, model, clip, [[0]], ([], []), WORDS, torch.float32, torch.device("cpu"))[1]
        estimated.append(dict(rows)["kept for the backward pass"])
    of_a_frame = LAYERS * (4 * 2 * DIM + 4 * 3 * HIDDEN + 4 * 2 * (Q + K) + 4 * HEADS)  # in the LLM's blocks
    of_the_adaptor = sum(x.nbytes for x in [*kept.values(), in_stream])
    assert estimated[1] - estimated[0] == 100 * of_a_frame + of_the_adaptor


def test_each_maximum_is_reached_from_both_sides():
    logits, after, dev = set(), set(), set()
    for (changes, n, dtype), (_, frames, answers) in itertools.product(CASES.values(), MICRO):
        cfg = page(**CFG | changes)
        rows = counted(cfg, n, frames, answers, 5, dtype.itemsize, False)
        logits.add(rows[5] == 12 * sum(answers) * VOCAB), after.add(rows[6] > 0)
        dev.add(rows[7] > 0)
    assert logits == after == dev == {True, False}


def test_what_glibc_keeps(processes, monkeypatch):
    """On a CPU, unless the environment forbids it: an eighth or so of all the rest."""
    cfg = page(**CFG)
    model = make(cfg, 1, torch.float32, processes)
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    rows = lambda device: estimate(cfg, model, CLIPS, [[2]], ([1], []), WORDS, torch.float32, torch.device(device))[1]
    cpu, cuda = ([size for _, size in rows(device)] for device in ("cpu", "cuda"))
    assert len(cuda) == 8 and len(cpu) == 9 and cpu[8] == pytest.approx(0.12 * sum(cpu[:8]))
