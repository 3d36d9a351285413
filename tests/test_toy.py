"""
The embedded default: its sentences, its signs, its clips and its tiny LLaMA.

    python -m pytest tests/test_toy.py
"""
import itertools
import json
import os
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lib.program import BadInput
from lib.tensors import stateless
from lib.tokenizer import Tokenizer
from lib.video import read_video
from model import LLaMA
from scripts import small_llm, toy


@pytest.fixture(scope="module")
def every():
    """All sentences of the language, in the order of seed 1337."""
    return toy.sentences(1337, None)


# ---- the language

def test_sentences_are_all_different(every):
    assert len(every) > 10_000
    assert len({german for *_, german in every}) == len(every)  # so no test sentence can be one of train's
    assert len({(*signs, shaken) for signs, shaken, _ in every}) == len(every)  # and no two are signed alike
    assert all("  " not in german and german == german.strip() and "{" not in german for *_, german in every)


def test_sentences_follow_from_the_seed(every):
    assert toy.sentences(1337, 50) == toy.sentences(1337, 50) == every[:50]
    assert toy.sentences(1, 50) != every[:50]


def test_what_is_tested_was_never_read(monkeypatch, tmp_path, every):
    """Neither the train clips nor the LLaMA's text hold a dev or a test sentence."""
    seen = {}
    clips = lambda root, seed, language, counts, workers, show, hard: seen.update(
        clips=toy.sentences(seed, sum(counts.values())), counts=counts)
    monkeypatch.setattr(toy, "make_clips", clips)
    monkeypatch.setattr(toy, "train_llama", lambda folder, texts, *_, **sizes: seen.update(texts=texts))
    for name in ("read_clips", "prepare", "Extractor"):
        monkeypatch.setattr(toy, name, lambda *args, **kwargs: [None])
    toy.build(str(tmp_path), seed=1337, n_train=100, n_dev=20, n_test=30)
    german = [g for *_, g in seen["clips"]]
    train, held_out = set(german[:100]), set(german[100:])
    assert list(seen["counts"].items()) == [("train", 100), ("dev", 20), ("test", 30)] and len(held_out) == 50
    assert not train & held_out and not set(seen["texts"]) & held_out
    assert train <= set(seen["texts"]) and len(seen["texts"]) == len(every) - 50


def test_signs_stand_in_another_order_than_german_words():
    german = "am montag regnet es im süden später bei zehn grad"
    (signs,) = [s for s, shaken, g in toy.sentences(1337, None) if g == german]
    assert signs == ["ZEHN", "SUED", "MONTAG", "SPAETER", "REGEN"]


def test_the_head_shakes_for_a_negation_and_nothing_else(every):
    said = {"nicht", "keine", "keinen"}
    for signs, shaken, german in every:
        assert (shaken == len(signs) - 1) == bool(said & set(german.split())) and shaken in (-1, len(signs) - 1)


def test_sign_table():
    table = toy.sign_table(1337)
    assert table.keys() == set(toy.SIGNS) and table == toy.sign_table(1337) != toy.sign_table(1)
    forms = [tuple(map(str, form)) for form in table.values()]
    for i, a in enumerate(forms):
        assert all(sum(x != y for x, y in zip(a, b)) >= 2 for b in forms[:i])  # no two are hard to tell apart


def test_the_pairs_of_a_hard_toy():
    """Seven pairs of signs of one group differ in their movement alone; any others in two things at least, as ever."""
    table = toy.sign_table(1337, pairs=True)
    forms = {sign: tuple(map(str, form)) for sign, form in table.items()}
    apart = lambda a, b: [i for i, (x, y) in enumerate(zip(forms[a], forms[b])) if x != y]
    pairs = [(a, b) for a, b in itertools.combinations(toy.SIGNS, 2) if len(apart(a, b)) < 2]
    assert pairs == [("HEUTE", "MORGEN"), ("MONTAG", "MITTWOCH"), ("NORD", "SUED"), ("RHEIN", "INSEL"),
                     ("SONNE", "WIND"), ("SPAETER", "LANGE"), ("NULL", "FUENF")]
    assert all(apart(*pair) == [1] for pair in pairs) and table.keys() == set(toy.SIGNS)


def test_nobody_who_is_tested_on_has_been_learnt_from(tmp_path, monkeypatch):
    """A hard toy's clips: twenty sign those of train, two others those of dev and test, each at a pace of their own."""
    jobs = []
    monkeypatch.setattr(toy, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    monkeypatch.setattr(toy, "make_clip", jobs.append)
    counts = {"train": 45, "dev": 4, "test": 5}
    toy.make_clips(str(tmp_path / "clips"), 1337, "German", counts, 1, lambda done: None, hard=True)
    by = [number for *_, number in sorted(jobs)]
    assert set(by[:45]) == set(range(20)) and set(by[45:49]) == set(by[49:]) == {20, 21}
    signers = [toy.signer(1337, number) for number in range(22)]
    assert len(set(signers)) == 22 and signers == [toy.signer(1337, number) for number in range(22)]
    for who in signers:
        assert 0.76 <= who.speed[0] < who.speed[1] <= 1.365 and who.speed[1] - who.speed[0] < 0.14
        assert 0.83 <= who.size[0] < who.size[1] <= 1.13 and 0.85 <= who.width <= 1.15 and who.noise == 0.04
    slow, fast = (min(signers, key=lambda who: sign * who.speed[0]) for sign in (1, -1))
    length = lambda who: np.mean([len(toy.render(SIGNS, -1, toy.sign_table(1), stateless(i), who)) for i in range(5)])
    assert length(slow) > 1.2 * length(fast)
    # who signs is seen: the body is as broad as theirs
    wide, slim = (toy.ANYBODY._replace(width=w) for w in (1.15, 0.85))
    broad = lambda who: (toy.render(SIGNS, -1, toy.sign_table(1), stateless(0), who)[0].mean(-1) > 110).any(0).sum()
    assert broad(wide) > broad(slim)


# ---- the figure

SIGNS = ["ZEHN", "SUED", "MONTAG", "REGEN"]


def test_negated_twins_differ_in_the_head_alone():
    table = toy.sign_table(1337)
    plain, shaken = (toy.choreography(SIGNS, s, table, stateless(1337, "clip", 0)) for s in (-1, len(SIGNS) - 1))
    for a, b in zip(plain[:3], shaken[:3]):  # hands and fingers
        assert a.shape == b.shape and (a == b).all()
    assert len(plain[3]) == len(plain[0]) and not plain[3].any()
    turn = shaken[3]
    assert abs(turn).max() > 0.2 and not turn[:len(turn) // 2].any()  # from the last sign on
    a, b = (toy.render(SIGNS, s, table, stateless(1337, "clip", 0)).astype(int) for s in (-1, len(SIGNS) - 1))
    differ = (a != b).any((0, 2, 3))  # rows of the picture
    assert differ[:20].any() and not differ[30:].any()


def test_clips_follow_from_their_key():
    table = toy.sign_table(1337)
    render = lambda *key: toy.render(SIGNS, -1, table, stateless(*key))
    a, again, b = render(1337, "clip", 0), render(1337, "clip", 0), render(1337, "clip", 1)
    assert a.dtype == np.uint8 and a.shape[1:] == (64, 64, 3) and (a == again).all()
    assert a.shape != b.shape or (a != b).any()  # no two performances are the same
    order = [toy.choreography(s, -1, table, stateless(0))[0] for s in (SIGNS, SIGNS[::-1])]
    assert order[0].shape != order[1].shape or abs(order[0] - order[1]).max() > 0.1


def test_every_sign_can_be_rendered():
    table = toy.sign_table(1337)
    for i, sign in enumerate(toy.SIGNS):
        right, left, fingers, head = toy.choreography([sign], 0, table, stateless(i))
        assert len(right) == len(left) == len(fingers) == len(head) > 8
        assert all(np.isfinite(x).all() for x in (right, left, head))
        assert abs(right).max() < 1.1 and abs(left).max() < 1.1  # in the picture


def test_mp4_holds_every_frame(tmp_path):
    clip = toy.render(SIGNS, -1, toy.sign_table(1337), stateless(0))
    path = str(tmp_path / "a.mp4")
    toy.write_mp4(path, clip)
    back = read_video(path)
    assert back.shape == clip.shape and abs(back.astype(int) - clip.astype(int)).mean() < 6
    toy.make_clip((path, SIGNS, -1, 1337, 0, None))
    assert len(read_video(path)) == len(toy.render(SIGNS, -1, toy.sign_table(1337), stateless(1337, "clip", 0)))


# ---- the tiny LLaMA

@pytest.fixture(scope="module")
def trained(tmp_path_factory, every):
    """A LLaMA after two steps: its folder, its tokenizer and the model as it was before it was written."""
    folder = str(tmp_path_factory.mktemp("toy") / "llm")
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small_llm, "LLaMA", lambda *args, **more: made.append(LLaMA(*args, **more)) or made[-1])
        small_llm.train_llama(folder, [g for *_, g in every[:500]], 1337, 2, 4)
    return SimpleNamespace(folder=folder, tokenizer=Tokenizer(folder), model=made[0])


def test_content_words():
    draw = lambda text, k=0: small_llm.content_words(text, stateless(k))
    text = "am montag gibt es im süden keine wolken"
    kept = [draw(text, k) for k in range(200)]
    least, most = {"montag", "süden", "nicht", "wolken"}, {*text.split(), "nicht"} - {"keine"}
    assert all(least <= set(words) <= most for words in kept)
    assert len({tuple(words) for words in kept if len(words) == 4}) == 24  # in any order
    assert sum(len(words) == 4 for words in kept) > 100  # function words are the exception


def test_text_batches(trained, every):
    texts = [g for *_, g in every[:12]]
    tokenizer = trained.tokenizer
    tokens, lens, at, targets, signed = small_llm.text_batch_of(texts, tokenizer, stateless(0))
    N = tokens.shape[1]
    assert tokens.shape == (1, N) and signed.shape == (N,) and sum(lens) == N and len(lens) == 12
    answers = [tokenizer.encode(t) + [tokenizer.eos_id] for t in texts]
    assert targets.tolist() == sum(answers, [])
    prompt = tokenizer.encode(small_llm.PROMPT.replace("{language}", "German").split("{clip}")[1].strip())
    start, i, prompted = 0, 0, 0
    for n, answer, text in zip(lens, answers, texts):
        document, blurred = tokens[0, start:start + n].tolist(), signed[start:start + n]
        assert document[0] == tokenizer.bos_id
        # each target is the token after its place
        assert at[i:i + len(answer)].tolist() == list(range(start + n - len(answer), start + n))
        assert document[n - len(answer) + 1:] == answer[:-1]
        words = [t for t, b in zip(document, blurred) if b]
        assert set(tokenizer.decode(words).split()) <= set(text.split()) | {"nicht"}
        # as long as a sign; what is learnt stays clear
        assert len(words) > len(set(words)) and not blurred[n - len(answer) + 1:].any()
        prompted += document[n - len(answer) + 1 - len(prompt):n - len(answer) + 1] == prompt
        start, i = start + n, i + len(answer)
    assert 0 < prompted < 12  # about half of them
    again = small_llm.text_batch_of(texts, tokenizer, stateless(0))
    assert (tokens == again[0]).all() and (signed == again[-1]).all()


def test_tokenizer(trained, every):
    tokenizer = trained.tokenizer
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    for *_, german in every[:20]:
        assert tokenizer.decode(tokenizer.encode(german)) == german
    assert len(tokenizer.encode("montag")) == len(tokenizer.encode("nicht")) == 1  # a word, a piece
    assert tokenizer.decode(tokenizer.encode("日本 Ω")) == "日本 Ω"  # bytes, where there is no piece


def test_llama_folder(trained):
    # Meta's layout
    assert sorted(os.listdir(trained.folder)) == ["consolidated.00.pth", "params.json", "tokenizer.model"]
    params = json.load(open(os.path.join(trained.folder, "params.json")))
    assert params["dim"] == 128 and params["vocab_size"] == -1  # as Meta ships it
    llama = LLaMA.from_pretrained(trained.folder)
    assert llama.args.vocab_size >= trained.tokenizer.vocab_size
    saved = torch.load(os.path.join(trained.folder, "consolidated.00.pth"), weights_only=True)
    kept, query = trained.model.state_dict(), "layers.0.attention.wq.weight"
    assert saved.keys() == kept.keys()
    assert (saved[query] != kept[query]).any()  # rotary pairs side by side in the file
    tokens = torch.tensor([[1, 300, 301, 302, 5, 6, 7, 400]])
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), trained.model(tokens), rtol=0, atol=0)  # there and back


def test_llama_follows_from_the_seed(trained, tmp_path, every):
    small_llm.train_llama(str(tmp_path / "llm"), [g for *_, g in every[:500]], 1337, 2, 4)
    for name in os.listdir(trained.folder):
        if name.endswith(".pth"):
            a, b = (torch.load(f"{folder}/{name}", weights_only=True) for folder in (trained.folder, tmp_path / "llm"))
            assert all((a[k] == b[k]).all() for k in a)
        else:
            assert open(os.path.join(trained.folder, name), "rb").read() == open(tmp_path / "llm" / name, "rb").read()


def test_the_llm_that_is_best_on_dev_is_kept(tmp_path, every, monkeypatch, capsys):
    """Here each step but the first makes it worse."""
    texts, dev = [g for *_, g in every[:500]], [g for *_, g in every[600:620]]
    monkeypatch.setattr(small_llm, "EVERY", 1)
    folder = str(tmp_path / "llm")
    small_llm.train_llama(folder, texts, 1, 6, 4, dev=dev, lr=50.0, dropout=0.1, label_smoothing=0.1)
    said = re.search(r"loss ([\d.]+) a token at the end, the best on dev ([\d.]+)", capsys.readouterr().out)
    end, best = map(float, said.groups())
    tokens, lens, at, targets, _ = small_llm.text_batch_of(dev, Tokenizer(folder), stateless(3))
    with torch.no_grad():
        kept = F.cross_entropy(LLaMA.from_pretrained(folder)(tokens, lens=lens, at=at)[0], targets).item()
    assert kept < best * 1.5 < end / 2


def test_an_llm_that_has_read_nothing(tmp_path, every, capsys):
    """Words of unit size, and blocks that add little to them: GPT-2's outputs, smaller by the root of their number."""
    folder = str(tmp_path / "llm")
    small_llm.train_llama(folder, [g for *_, g in every[:500]], 1, 0, 4, dev=["am montag"])
    said = capsys.readouterr().out
    assert "untrained" in said and "loss" not in said
    llama = LLaMA.from_pretrained(folder)  # four blocks of width 128, that is eight outputs
    size = lambda part: llama.get_parameter(part).square().mean().sqrt().item()
    assert size("tok_embeddings.weight") == pytest.approx(1, rel=0.02)
    for block in range(4):
        for part, width in (("attention.wo", 128), ("feed_forward.w2", 352)):
            assert size(f"layers.{block}.{part}.weight") == pytest.approx((width * 8) ** -0.5, rel=0.02)
        assert size(f"layers.{block}.attention.wq.weight") == pytest.approx(128 ** -0.5, rel=0.02)


def test_small_llm_of_a_data_set(home, tmp_path, monkeypatch, capsys):
    """The program: size and function words as asked, and dev, where there is one, picks the weights."""
    data = tmp_path / "data"
    shutil.copytree(home / "data" / "toy", data / "toy", ignore=shutil.ignore_patterns("*.mp4", "llm*"))
    for to, dev in (("a", True), ("b", False)):
        if not dev:
            (data / "toy" / "dev.jsonl").unlink()
        monkeypatch.setattr(sys, "argv", ["small_llm", "dataset=toy", f"data_dir={data}", f"to={tmp_path / to}",
                                          "steps=2", "batch=4", "dim=64", "layers=1", "pieces=400", "function_words=3"])
        small_llm.main()
        said = capsys.readouterr().out
        assert ("the best on dev" in said) == dev and "20 sentences; counted as function words:" in said
        args = LLaMA.from_pretrained(str(tmp_path / to)).args
        assert (args.dim, args.n_layers, args.n_heads) == (64, 1, 2)


def test_small_llm_of_sentences_without_spaces(tmp_path, monkeypatch):
    """They show no words to restore a sentence from; other languages than German keep their spaces."""
    assert small_llm.written("i like cats", "English") == "i like cats"
    assert small_llm.written("我 想", "Chinese") == "我想"
    (tmp_path / "data" / "zh").mkdir(parents=True)
    rows = [{"name": str(i), "text": f"今天我想吃面条{i}", "frames": 3} for i in range(4)]
    (tmp_path / "data" / "zh" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    words = ["small_llm", "dataset=zh", f"data_dir={tmp_path}/data", "language=Chinese", "layers=1", "dim=64"]
    monkeypatch.setattr(sys, "argv", [*words, f"to={tmp_path}/a"])
    with pytest.raises(BadInput, match="steps=0"):
        small_llm.main()
    monkeypatch.setattr(sys, "argv", [*words, f"to={tmp_path}/a", "steps=0", "pieces=300"])
    small_llm.main()
    assert (tmp_path / "a" / "params.json").exists()


@pytest.mark.parametrize("llm", [k for k in toy.LLMS if k not in ("llm", "llm_13b")])
def test_other_llms(tmp_path, every, llm):
    """Each stand-in of Table 7 is a Hugging Face folder of its own kind, which transformers reads with equal logits."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("tokenizers")
    folder = str(tmp_path / llm)
    small_llm.train_llama(folder, [g for *_, g in every[:500]], 1, 2, 4, **toy.LLMS[llm])
    llama, tokenizer = LLaMA.from_pretrained(folder), Tokenizer(folder)
    assert llama.args.model_type == toy.LLMS[llm].get("model_type", "llama") and tokenizer.fit(llama.args.vocab_size)
    assert (tokenizer.bos_id == -1) == (llm == "llm_qwen2")
    text = every[0][2]
    assert tokenizer.decode(tokenizer.encode(text)).strip() == text
    tokens = torch.tensor([tokenizer.encode(text)])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


def test_chinese():
    every = toy.sentences(1338, None, "Chinese")
    texts = [small_llm.written(words, "Chinese") for *_, words in every]
    assert len(set(texts)) == len(every) == 17280
    assert not any(" " in t for t in texts) and all(t.endswith("。") for t in texts)
    for signs, shaken, words in every:
        assert (shaken >= 0) == bool({"不会", "没有"} & set(words.split()))
    assert "星期一在南部再次会下雨，气温十度。" in texts
    kept = small_llm.content_words("星期一 在 南部 再次 不会 下雨 ， 气温 十 度 。", stateless(3))
    assert {"星期一", "南部", "再次", "不", "下雨", "十"} <= set(kept)


# ---- the table of clips

def test_the_table_is_what_was_signed(tmp_path, monkeypatch):
    """
    clips.tsv: so many of each split, each sentence with its signs in signing order, the mark on the sign with the head
    shake.
    """
    # other processes take seconds to start
    monkeypatch.setattr(toy, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    shown, counts = [], {"train": 6, "dev": 2, "test": 3}
    toy.make_clips(str(tmp_path / "clips"), 1337, "German", counts, 1, shown.append)
    header, *lines = (tmp_path / "clips/clips.tsv").read_text(encoding="utf-8").splitlines()
    rows = [dict(zip(header.split("\t"), line.split("\t"))) for line in lines]
    assert [r["split"] for r in rows] == ["train"] * 6 + ["dev"] * 2 + ["test"] * 3
    assert [r["file"] for r in rows] == [f"{i:05}.mp4" for i in range(11)]
    assert shown == list(range(1, 12)) and len({r["text"] for r in rows}) == 11
    for i, (row, (signs, shaken, text)) in enumerate(zip(rows, toy.sentences(1337, 11))):
        assert row["text"] == text
        assert row["gloss"] == " ".join(signs) + "(-)" * bool({"nicht", "keine", "keinen"} & set(text.split()))
        clip = toy.render(signs, shaken, toy.sign_table(1337), stateless(1337, "clip", i))
        back = read_video(str(tmp_path / "clips" / row["file"]))
        assert back.shape == clip.shape and abs(back.astype(int) - clip.astype(int)).mean() < 6
    assert any("(-)" in r["gloss"] for r in rows) and not all("(-)" in r["gloss"] for r in rows)


def test_how_much_of_the_language_there_is(every):
    """
    8 times, 6 places, 6 kinds of weather with and without head shake, 4 manners and 5 degrees or none: each combination
    once.
    """
    assert len(every) == 8 * 6 * 6 * 2 * 5 * 6 and len(toy.SIGNS) == len(set(toy.SIGNS)) == 8 + 6 + 6 + 4 + 5
    assert sum(shaken >= 0 for _, shaken, _ in every) == len(every) // 2
    count = lambda sign: sum(sign in signs for signs, *_ in every)
    for sign, n in (("HEUTE", 8), ("RHEIN", 6), ("NEBEL", 6), ("OFT", 5), ("ZEHN", 6)):
        assert count(sign) * n == len(every)
    german = {g for *_, g in every}
    for text in ("in der nacht gibt es auf den inseln wieder keinen nebel bei dreißig grad",
                 "am abend weht an der küste oft der wind nicht", "heute scheint im norden die sonne"):
        assert text in german
    assert toy.GERMAN.keys() == toy.CHINESE.keys() == set(toy.SIGNS)


def test_another_language_is_signed_otherwise(monkeypatch, tmp_path):
    """toy_zh: a seed of its own, so that neither signs nor sentences are toy's, and Chinese sentences."""
    asked = []
    monkeypatch.setattr(toy, "make_clips", lambda root, seed, language, *_: asked.append((seed, language)))
    train = lambda folder, texts, seed, steps, batch, language, **sizes: asked.append(
        (seed, language, steps, batch, sizes))
    monkeypatch.setattr(toy, "train_llama", train)
    for name in ("read_clips", "prepare", "Extractor"):
        monkeypatch.setattr(toy, name, lambda *args, **kwargs: [None])
    toy.build(str(tmp_path), "toy_zh", "llm_mistral", seed=7, text_steps=5, text_batch=6)
    assert sorted(asked, key=len) == [(8, "Chinese"), (11, "Chinese", 5, 6, toy.LLMS["llm_mistral"])]
    assert json.loads((tmp_path / "toy_zh" / "toy.json").read_text()) == {
        "seed": 7, "n_train": 1000, "n_dev": 100, "n_test": 100, "text_steps": 5, "text_batch": 6}
    with pytest.raises(BadInput, match="made with seed=7, not 8"):
        toy.build(str(tmp_path), "toy_zh", "llm", seed=8)
    asked.clear()
    toy.build(str(tmp_path), "toy_zh", "llm")  # as it was begun
    assert sorted(asked, key=len) == [(8, "Chinese"), (8, "Chinese", 5, 6, {})]


def test_movements_and_hands():
    """
    A sign's hand moves around its place, the other hand mirrors it, waits in front of the body or rests, and both come
    back to rest.
    """
    t = np.linspace(0, 1, 9)
    paths = [toy.movement(kind, t) for kind in range(8)]
    assert all(p.shape == (9, 2) and 0.05 < abs(p).max() < 0.25 for p in paths)
    assert all(abs(a - b).max() > 0.05 for i, a in enumerate(paths) for b in paths[:i])
    table = {"A": ((0.3, -0.3), 2, 3, 1), "B": ((0.3, -0.3), 2, 5, 2), "C": ((0.3, -0.3), 2, 1, 0)}
    for sign, other in (("A", None), ("B", (-0.25, 0.15)), ("C", toy.REST[0])):
        right, left, fingers, head = toy.choreography([sign], -1, table, stateless(0))
        middle = len(right) // 2
        assert np.allclose(right[[0, -1]], toy.REST[1]) and np.allclose(left[[0, -1]], toy.REST[0]) and not head.any()
        assert np.allclose(left[middle], other if other else right[middle] * (-1, 1))
        assert tuple(fingers[middle]) == (table[sign][2], table[sign][2] if table[sign][3] else 0)
        assert abs(right[middle] - table[sign][0]).max() < 0.26
