"""
What holds for any input of a kind, tried on those that hypothesis thinks of.

    python -m pytest tests/test_properties.py
"""
import csv
import json
import math
import struct
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data import Sample, clips_of_step, deal, pack, prompt_ids, spread, thin
from lib.configurator import configure
from lib.program import BadInput
from lib.readers import read_clips
from lib.tensors import from_hf, halves, load_tensors, pairs, to_hf
from model import generate, local_attention, reach, sees

settings.register_profile("ours", deadline=None, derandomize=True, max_examples=40, database=None,
                          suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.load_profile("ours")

ids = st.lists(st.integers(1, 99), max_size=5)

# ---------------------------------------------------------------------------------------------------------------------
# Batches

@given(st.lists(st.tuples(st.integers(1, 9), ids.filter(bool)), min_size=1, max_size=5), ids, ids, st.booleans())
def test_pack(clips, before, after, learn):
    """Each clip's sequence can be read out of the stream again, and each token of its answer is learnt once."""
    samples = [Sample(torch.full((T, 2), float(i)), before, after, answer) for i, (T, answer) in enumerate(clips)]
    batch = pack(samples, with_targets=learn)
    assert sum(batch.lens) == len(batch.tokens) and len(batch.features) == len(batch.frame_at) == len(batch.clip)
    assert batch.features[:, 0].equal(batch.clip.float())
    start, learnt = 0, dict(zip(batch.target_at.tolist(), batch.targets.tolist()))
    assert len(learnt) == len(batch.targets)
    for i, (T, answer) in enumerate(clips):
        stream = batch.tokens[start:start + batch.lens[i]].tolist()
        assert stream == before + [0] * T + after + answer[:-1]
        first = start + len(before)
        assert batch.frame_at[batch.clip == i].tolist() == [*range(first, first + T)]
        end = start + batch.lens[i]  # what stands at a place, and what is learnt there: the next token
        assert [learnt.pop(n) for n in range(end - len(answer), end)] == answer if learn else not learnt
        start = end
    assert not learnt


class Letters:
    """A token a letter."""
    def __init__(self, bos_id):
        self.bos_id, self.encode = bos_id, lambda text: [ord(c) for c in text]


@given(st.text(), st.text(), st.sampled_from([-1, 0, 7]))
def test_prompt(before, after, bos):
    prompt = f"{before}{{clip}}{after}"
    if prompt.count("{clip}") != 1:
        with pytest.raises(BadInput):
            prompt_ids(prompt, Letters(bos))
        return
    a, b = prompt_ids(prompt, Letters(bos))
    assert a == [bos] * (bos >= 0) + [ord(c) for c in before.strip()] and b == [ord(c) for c in after.strip()]


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 9))
def test_an_epoch_takes_every_clip_once(n, batch_size, seed):
    steps = math.ceil(n / batch_size)
    for epoch in (0, 3):
        took = [clips_of_step(n, epoch * steps + i, batch_size, seed) for i in range(steps)]
        assert {e for e, _ in took} == {epoch} and sorted(i for _, some in took for i in some) == [*range(n)]
        assert all(len(some) == batch_size for _, some in took[:-1])


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 9))
def test_a_deal(lengths, parts):
    """Every clip once; as many in each part, but for one; and no part has more frames than another by a clip's."""
    dealt = deal(range(len(lengths)), lengths, parts)
    assert len(dealt) == parts and sorted(i for part in dealt for i in part) == [*range(len(lengths))]
    sizes, frames = [len(p) for p in dealt], [sum(lengths[i] for i in p) for p in dealt]
    assert max(sizes) - min(sizes) <= 1 and max(frames) - min(frames) <= max(lengths)


@given(st.integers(1, 400), st.integers(0, 400))
def test_what_is_spread_or_thinned_out_is_even(total, n):
    n = min(n, total)
    chosen = spread(total, n)
    assert len(chosen) == len(set(chosen)) == n and all(0 <= i < total for i in chosen)
    gaps = [b - a for a, b in zip(chosen, chosen[1:])]
    assert not gaps or max(gaps) - min(gaps) <= 1
    assert thin(torch.arange(total)[:, None], n).shape == (n or total, 1)

# ---------------------------------------------------------------------------------------------------------------------
# Model

@given(st.lists(st.integers(1, 70), min_size=1, max_size=4), st.integers(0, 40), st.integers(0, 9))
def test_the_band_is_dense_attention_with_the_others_masked(lens, window, seed):
    g = torch.Generator().manual_seed(seed)
    T, doc = sum(lens), torch.repeat_interleave(torch.arange(len(lens)), torch.tensor(lens))[None]
    q, k, v = torch.randn(3, 1, 2, T, 4, generator=g).unbind()
    scores, i, j = q @ k.mT / 2, *torch.meshgrid(torch.arange(T), torch.arange(T), indexing="ij")
    before, after = reach(window)
    near = (j - i <= after) & (i - j <= before)
    assert near.equal(sees(i, j, window)) and near.sum(1).max() <= before + 1 + after
    mask = near & (doc[0][:, None] == doc[0])
    dense = scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v
    assert (local_attention(q, k, v, window, doc) - dense).abs().max() < 1e-5


class Five:
    """An LLM of five tokens, whose next token hangs on the last two alone. 0 ends an answer."""

    def __init__(self, seed):
        self.table = 2 * torch.randn(6, 6, 5, generator=torch.Generator().manual_seed(seed))  # 5: nothing before it
        self.tok_embeddings = lambda token: token

    def __call__(self, h, lens=None, pos=None, cache=None, at=None):
        if lens:  # the prefix is empty to this LLM
            self.said = torch.full((len(lens), 1, 2), 5)
            cache.reorder = self.reorder
            return self.table[5, 5].expand(1, len(lens), 5)
        self.said = torch.stack([self.said[..., 1].expand(h.shape), h], -1)  # (n, beams, 2)
        return self.table[self.said[..., 0], self.said[..., 1]]

    def reorder(self, source):
        self.said = self.said.expand(*source.shape, 2)[torch.arange(len(source))[:, None], source]

    def score(self, tokens, penalty):
        """Of an answer with its EOS, as generate's docstring has it."""
        steps = zip([5, 5, *tokens], [5, *tokens], tokens)
        total = sum(self.table[a, b].log_softmax(-1)[c].item() for a, b, c in steps)
        return total / ((5 + len(tokens)) / 6) ** penalty


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from([0.0, 1.0, 2.0]))
def test_a_beam_as_wide_as_the_tree_finds_the_best_answer(seed, longest, penalty):
    """Of all answers of up to so many tokens, the ended one of the highest score."""
    llm = Five(seed)
    width = 4**longest + 1
    ((found, ended),) = generate(llm, [(torch.zeros(1, 1, 1), [1])], [0], width, penalty, longest)
    answers = [[*words, 0] for n in range(longest) for words in product(range(1, 5), repeat=n)]
    best = max(answers, key=lambda a: llm.score(a, penalty))
    assert ended and llm.score([*found, 0], penalty) == pytest.approx(llm.score(best, penalty), abs=1e-5)

# ---------------------------------------------------------------------------------------------------------------------
# Words on a command line, and files

@given(text=st.text(st.characters(exclude_categories=["Cs"])), whole=st.integers(0, 10**9), yes=st.booleans(),
       number=st.floats(0, 1e30))
def test_key_value_round_trip(tmp_path, text, whole, yes, number):
    """Whatever a value is, its text on a command line and its literal in a config file give it back."""
    program, config = tmp_path / "program.py", tmp_path / "config.py"
    program.write_text('name = ""  # a text\ncount = 3  # a number\nyes = True  # a truth\nrate = 0.5  # a number\n')
    want = {"name": text, "count": whole, "yes": yes, "rate": number}
    config.write_text("".join(f"{key} = {value!r}\n" for key, value in want.items()), encoding="utf-8")
    for words in ([f"{key}={value}" for key, value in want.items()], [str(config)]):
        got = vars(configure(str(program), words))
        assert got == want and {k: type(v) for k, v in got.items()} == {k: type(v) for k, v in want.items()}


@given(st.sampled_from(["attention.wq", "attention.wo", "feed_forward.w1", "attention_norm", "ffn_norm"]),
       st.integers(0, 999), st.sampled_from(["weight", "bias", "lora_A", "lora_B"]))
def test_names_of_weights_round_trip(part, layer, kind):
    for name in (f"layers.{layer}.{part}.{kind}", f"tok_embeddings.{kind}", f"norm.{kind}", f"output.{kind}"):
        assert from_hf(to_hf(name)) == name and (to_hf(name) != name or not name.startswith("layers"))


@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 4))
def test_rows_of_wq_round_trip(heads, half_width, width):
    w = torch.arange(heads * 2 * half_width * width).view(-1, width)
    assert pairs(halves(w, 2 * half_width), 2 * half_width).equal(w)


cells = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).filter(str.strip)


@given(st.lists(cells, min_size=1, max_size=5), st.sampled_from("\t,;"),
       st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_cells_of_a_table_round_trip(tmp_path, texts, separator, encoding, quoting):
    """Whatever a sentence holds (quotes, separators, line ends), it comes back as the csv module has written it."""
    with open(tmp_path / "clips.tsv", "w", encoding=encoding, newline="") as f:
        write = csv.writer(f, delimiter=separator, quoting=quoting).writerow
        write(["file", "text"])
        for i, text in enumerate(texts):
            write([f"{i}.mp4", text])
    splits, has_splits = read_clips(str(tmp_path))
    found = [(row["name"], row["text"]) for row in splits["train"]]
    assert found == [(str(i), text.strip()) for i, text in enumerate(texts)] and not has_splits


numbers = st.integers(-2, 2**63) | st.just(8)
entry = st.fixed_dictionaries({}, optional={
    "dtype": st.sampled_from(["F32", "F16", "BF16", "U8", "X", 3]), "shape": st.lists(numbers, max_size=3) | st.none(),
    "data_offsets": st.lists(numbers, min_size=1, max_size=3)})


@given(st.dictionaries(st.sampled_from(["a", "b", "__metadata__", ""]), entry | st.integers() | st.none(), max_size=3),
       st.integers(-9, 9), st.binary(max_size=64))
def test_headers_of_safetensors(tmp_path, header, off, rest):
    """A file is read, or refused in one line that names it; nothing is believed of its size."""
    path, text = tmp_path / "x.safetensors", json.dumps(header).encode()
    path.write_bytes(struct.pack("<q", len(text) + off) + text + rest)
    try:
        tensors = load_tensors(str(path))
    except BadInput as e:
        assert str(path) in str(e) and "\n" not in str(e)
    else:
        assert sum(t.nbytes for t in tensors.values()) <= len(rest)


@pytest.mark.long
@settings(max_examples=4)
@given(st.integers(1, 7), st.sampled_from([1, 2, 3]))
def test_a_run_stopped_after_any_step_goes_on_to_the_same_losses(train_here, tmp_path_factory, stop, grad_accum):
    args = ["eval_every=-1", "frame_drop=0.2"]
    losses = lambda folder: [json.loads(line)["loss"] for line in open(folder / "align" / "log.jsonl")]
    whole = losses(train_here("whole", *args))
    train_here(f"stop{stop}{grad_accum}", *args, f"max_steps={stop}", f"grad_accum={grad_accum}")
    assert losses(train_here(f"stop{stop}{grad_accum}", *args, "resume=true")) == pytest.approx(whole, rel=1e-5)
