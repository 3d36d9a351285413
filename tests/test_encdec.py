"""
scripts/encdec.py: the peer that an LLM is compared with.

    python -m pytest tests/test_encdec.py
"""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import clips_of

from lib.program import BadInput
from lib.tensors import stateless
from scripts import encdec

NET = SimpleNamespace(dim=16, heads=2, layers=2, dropout=0.3)


@pytest.fixture
def net():
    torch.manual_seed(0)
    net = encdec.EncoderDecoder(8, 30, NET).eval()
    torch.nn.init.normal_(net.output.weight)  # surer of itself
    return net


def test_filling_changes_nothing(net):
    clips = [torch.randn(n, 8) for n in (5, 9, 2)]
    y = torch.randint(30, (3, 4))
    x, filling = encdec.filled(clips)
    together = net.decode(net.encode(x, filling), filling, y)
    for i, clip in enumerate(clips):
        alone, none = encdec.filled([clip])
        assert torch.allclose(together[i], net.decode(net.encode(alone, none), none, y[i:i + 1])[0], atol=1e-5)
    changed = y.clone()
    changed[:, 3] += 1  # what is to come is not seen
    assert torch.allclose(net.decode(net.encode(x, filling), filling, changed)[:, :3], together[:, :3], atol=1e-5)


def by_hand(net, clip, beam, eos, longest):
    """The best answer of one clip, hypotheses as lists: what has ended stays among them."""
    x, filling = encdec.filled([clip])
    memory = net.encode(x, filling)
    beams = [([1], 0.0)]
    for _ in range(longest):
        found = []
        for ids, score in beams:
            if ids[-1] == eos:
                found.append((ids, score))
                continue
            p = net.decode(memory, filling, torch.tensor([ids]))[0, -1].log_softmax(-1)
            found += [(ids + [token], score + p[token].item()) for token in range(len(p))]
        beams = sorted(found, key=lambda b: -b[1])[:beam]
    best = max(beams, key=lambda b: b[1] / ((5 + len(b[0]) - 1 + (b[0][-1] != eos)) / 6))[0][1:]
    return best[:-1] if best[-1] == eos else best


@torch.no_grad()
@pytest.mark.parametrize("beam", [1, 3])
def test_beam_search_by_hand(net, beam):
    clips = [torch.randn(n, 8) for n in (5, 9, 2, 7)]
    words = SimpleNamespace(bos_id=1, eos_id=2, decode=lambda ids: " ".join(map(str, ids)))
    said = encdec.translate(net, clips, words, beam, 6)
    assert net.training  # as it was found by a loop that trains
    net.eval()
    assert said == [" ".join(map(str, by_hand(net, clip, beam, 2, 6))) for clip in clips] and len(set(said)) > 1


def test_disturbed():
    cfg, x = SimpleNamespace(frame_drop=0.25, mask=0.5), 1.0 + torch.arange(40.0)[:, None]
    blanked, left = [], []
    for k in range(60):
        y = encdec.disturbed(x, cfg, stateless(k)).flatten()
        at = (y == 0).nonzero().flatten()
        assert len(at) == 0 or at[-1] - at[0] + 1 == len(at) <= len(y) // 2  # one span, of half at most
        assert (y[y > 0].diff() > 0).all()
        blanked.append(len(at) / len(y)), left.append(len(y) / 40)
    assert 0.15 < sum(blanked) / 60 < 0.35 and 0.7 < sum(left) / 60 < 0.8
    assert len(encdec.disturbed(x, SimpleNamespace(frame_drop=0.999, mask=0.9), stateless(0))) == 1


def test_program(home, tmp_path, monkeypatch, capsys):
    def go(to, *words):
        monkeypatch.setattr(sys, "argv", ["encdec", "dataset=toy", f"data_dir={home}/data", "backbone=toycnn", "dim=16",
                                          f"tokenizer={home}/data/toy/llm", "heads=2", "layers=1", "epochs=3",
                                          "batch_size=4", "warmup=2", "max_new_tokens=8", f"to={tmp_path / to}",
                                          *words])
        encdec.main()
        return [json.loads(line) for line in open(tmp_path / to / "log.jsonl")]

    log = go("a")
    assert [e["step"] for e in log] == [5, 10, 15] and log[-1]["loss"] < log[0]["loss"]
    for split in ("dev", "test"):
        rows = [json.loads(line) for line in open(home / "data" / "toy" / f"{split}.jsonl")]
        assert (tmp_path / "a" / f"refs.{split}.txt").read_text().splitlines() == [row["text"] for row in rows]
        assert len((tmp_path / "a" / f"hyps.{split}.txt").read_text().splitlines()) == len(rows)
    assert "test, beam 4: BLEU-1..4" in capsys.readouterr().out
    strip = lambda log: [{k: v for k, v in e.items() if k != "minutes"} for e in log]
    assert strip(go("b")) == strip(log)  # the same seed, the same run
    assert strip(go("c", "max_clips=8"))[0]["step"] == 2


def test_what_it_cannot_learn_from_is_named(home, monkeypatch):
    train = clips_of(home / "data", "toy", "toycnn", "train")
    assert list(encdec.three_splits(train)) == ["train", "dev", "test"]
    monkeypatch.setattr(encdec, "LONGEST", max(train.lengths) - 1)
    with pytest.raises(BadInput, match="merge="):
        encdec.three_splits(train)
    monkeypatch.setattr(train, "beside", lambda split: None)
    monkeypatch.setattr(encdec, "LONGEST", 2048)
    with pytest.raises(BadInput, match="has no dev beside it"):
        encdec.three_splits(train)


def test_a_tokenizer_without_bos():
    assert encdec.first_token(SimpleNamespace(bos_id=1, eos_id=2)) == 1
    assert encdec.first_token(SimpleNamespace(bos_id=-1, eos_id=2)) == 2
