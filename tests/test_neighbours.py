"""
lib/neighbours.py: words of training that vote, beside the formula in plain Python.

    python -m pytest tests/test_neighbours.py
"""
import math

import pytest
import torch
from test_model import tiny_sllama, two_clips

from data import pack
from lib.neighbours import SHARE, SHARPNESS, Neighbours
from lib.program import BadInput


@pytest.mark.parametrize("k", [1, 3, 5, 99])
def test_by_hand(tmp_path, k):
    """Five words of training, states in between them; k may be more than there are."""
    model, batches = tiny_sllama(tmp_path), [pack([s]) for s in two_clips()]
    llm, inner = model.llm, []
    own = llm.norm.register_forward_hook(lambda module, x, out: inner.append(out[0]))
    with torch.no_grad():
        for b in batches:
            llm(h=model.embed(b), lens=b.lens, at=b.target_at)
        own.remove()
        # the last block of a stream leaves out positions without targets
        states = [s for part, b in zip(inner, batches) for s in (part if len(part) == len(b.targets) else
                                                               part[b.target_at])]
        words = [w for b in batches for w in b.targets.tolist()]
        h = torch.stack(states).mean(0) + torch.randn(2, 1, 32, generator=torch.Generator().manual_seed(0))
        plain = llm.head(h).double().softmax(-1)
        Neighbours(model, batches, k)
        got = llm.head(h)
    assert got.shape == plain.shape and got.dtype == torch.float32 and len(states) == len(words) == 5
    for row in range(2):
        d = sorted(((h[row, 0] - s).double().square().sum().item(), w) for s, w in zip(states, words))[:k]
        mean = sum(x for x, _ in d) / len(d)
        votes = [math.exp(-SHARPNESS * x / mean) for x, _ in d]
        want = (1 - SHARE) * plain[row, 0]
        for vote, (_, word) in zip(votes, d):
            want[word] += SHARE * vote / sum(votes)
        assert torch.allclose(got[row, 0].double().exp(), want, atol=1e-6)
        assert want.sum() == pytest.approx(1)


def test_what_was_learnt_is_said(tmp_path):
    """In the very state of a word of training that word has the vote: no other distance is zero."""
    model, (first, _) = tiny_sllama(tmp_path), two_clips()
    batch = pack([first])
    Neighbours(model, [batch], 3)
    with torch.no_grad():
        p = model.llm(h=model.embed(batch), lens=batch.lens, at=batch.target_at)[0].exp()
    votes = p[range(3), batch.targets]
    assert (votes > 0.99 * SHARE).all() and torch.allclose(p.sum(1), torch.ones(3))


def test_features_of_another_width(tmp_path):
    model, batch = tiny_sllama(tmp_path), pack(two_clips())
    batch.features = batch.features[:, :20]
    with pytest.raises(BadInput, match="neighbours=3: the train clips have features of width 20, the run .* on 24"):
        Neighbours(model, [batch], 3)
