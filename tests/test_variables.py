"""
Every variable of every program does what its comment says; a run that goes on refuses what would make it another run.

    python -m pytest tests/test_variables.py

A test that is entered into the table with @does gives its words to the program and says what must follow from them.
A variable that no test has entered fails test_every_variable_is_in_the_table.
"""
import gzip
import inspect
import json
import math
import os
import pickle
import re
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from conftest import ROOT, SMALL
from safetensors.torch import load_file, save_file

import data
import eval as evaluation
import lora
import model
import train
from lib.cnn import GoogLeNet, RandomCNN, he_init
from lib.configurator import configure, read_literals
from lib.extract import Extractor, open_extractor
from lib.features import Store
from lib.program import BadInput, pick_device, pick_dtype
from lib.scores import rouge
from lib.tokenizer import Tokenizer
from model import LLaMA, SLLaMA
from scripts.toy import write_mp4

# program -> variable -> the tests that say what it does
TABLE = {"train.py": {}, "eval.py": {}, "data.py": {}, "lora.py": {}}


def does(program, *words):
    """Enter a test into the table. Every run of the program in this test is given these words."""
    def enter(test):
        test.words = list(words)
        for word in words:
            TABLE[program].setdefault(word.partition("=")[0], []).append(test.__name__)
        return test
    return enter


def variables(program):
    """The names of a program's variables, those in the stages' dicts too."""
    page = {key: value for key, (value, _) in read_literals(str(ROOT / program)).items()}
    return page.keys() - {"align", "sft"} | {key for stage in ("align", "sft") for key in page.get(stage, {})}


@pytest.mark.parametrize("program", TABLE)
def test_every_variable_is_in_the_table(program):
    assert TABLE[program].keys() == variables(program)


def call(monkeypatch, main, *words):
    monkeypatch.setattr(sys, "argv", ["program", *words])
    main()


def rows(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def features(world, split):
    """What the toy's features are: name -> (T, D)."""
    return load_file(world / "data" / "toy" / "toycnn" / f"{split}.safetensors")


@pytest.fixture(scope="module")
def world(home):
    """
    Beside the toy of 20 train, 4 dev and 4 test clips: the data set `mine`, which lacks the first 7 train and the first
    test clip; a folder `other` whose toy lacks the first 13 and 2; features `loud`, twice as large as toycnn's; an LLM
    `llm2` of twice the weights, whose output is surer, and so wrong that a target's probability is 0.
    """
    toy = home / "data" / "toy"
    shutil.copytree(toy, home / "data" / "mine")
    shutil.copytree(toy, home / "other" / "toy")
    for name, n in (("data/mine/train", 7), ("data/mine/test", 1), ("other/toy/train", 13), ("other/toy/test", 2)):
        path = home / f"{name}.jsonl"
        path.write_text("".join(open(path).readlines()[n:]))
    (toy / "loud").mkdir()
    for split in ("train", "dev", "test"):
        store = Store(str(toy / "toycnn" / f"{split}.safetensors"))
        twice = {name: 2 * store[name] for name in store.names}
        save_file(twice, toy / "loud" / f"{split}.safetensors", metadata=store.metadata)
    shutil.copytree(toy / "llm", home / "llm2")
    path = home / "llm2" / "consolidated.00.pth"
    torch.save({k: v * (40 if k.startswith("output") else 2) for k, v in torch.load(path).items()}, path)
    return home


@pytest.fixture(scope="module")
def runs(world):
    """Runs of both stages in `base`, sft's best/ of step 2 and its last/ of step 3; sft with lang=zh in `zh`."""
    how = [f"data_dir={world}/data", *SMALL, "eval_clips=0", "max_frames=12"]
    with pytest.MonkeyPatch.context() as patch:
        call(patch, train.main, *how, f"out_dir={world}/base", "eval_every=-1", "max_steps=1")
        call(patch, train.main, *how, f"out_dir={world}/base", "stage=sft", "eval_every=2", "max_steps=3")
        other = [f"out_dir={world}/zh", f"init_from={world}/base/toy/align", "lang=zh"]
        call(patch, train.main, *how, *other, "stage=sft", "eval_every=-1", "max_steps=1")
    return world / "base" / "toy"


@pytest.fixture(scope="module")
def tokenizer(home):
    return Tokenizer(str(home / "data" / "toy" / "llm"))

# ---------------------------------------------------------------------------------------------------------------------
# train.py. Eight steps of six clips (the last of an epoch: two) of twelve frames, none left out, and no look at dev,
# where a test does not say otherwise


@pytest.fixture
def run(request, world, train_here, monkeypatch, capsys):
    """A function of words: train.main() with the test's words and these -> what the model saw and what the run left."""
    number = iter(range(100))

    def go(*words, out=None):
        saw = SimpleNamespace(batches=[], dev=[], decoded=[], blocks=0, model=None)

        def forward(self, batch, real=SLLaMA.forward):
            saw.model = self
            (saw.batches if self.training else saw.dev).append(batch)
            return real(self, batch)

        def block(self, x, rope, at, attend, *how, real=model.Block.forward):
            saw.blocks += attend is model.causal_attention  # those of the LLM
            return real(self, x, rope, at, attend, *how)

        def translate(*args, **more):
            given = inspect.signature(evaluation.translate).bind(*args, **more).arguments
            saw.decoded.append(given)
            return ["heute regnet es im norden"] * len(given["features"])

        words = [word.replace("HOME", str(world)) for word in (*request.function.words, *words)]
        stage = ([word.removeprefix("stage=") for word in words if word.startswith("stage=")] or ["align"])[-1]
        base = ["eval_every=-1", "frame_drop=0", "max_frames=12"]
        if stage == "sft":
            base += [f"init_from={request.getfixturevalue('runs')}/align"]
        capsys.readouterr()
        saw.out = out or f"{request.node.name}-{next(number)}"
        with monkeypatch.context() as m:
            m.setattr(SLLaMA, "forward", forward)
            m.setattr(model.Block, "forward", block)
            m.setattr(train, "translate", translate)
            try:
                saw.folder = train_here(saw.out, *base, *words) / stage
            finally:
                said = capsys.readouterr()
                saw.said = said.out + said.err
        if (saw.folder / "log.jsonl").exists():
            read_run(saw)
        return saw
    return go


def read_run(saw):
    """Add what lies in a run's folder."""
    last = saw.folder / "last"
    entries = rows(saw.folder / "log.jsonl")
    saw.log, saw.looks = ([e for e in entries if kind in e] for kind in ("loss", "dev_loss"))
    assert len(saw.log) + len(saw.looks) == len(entries)  # a line is of a step or of a look at dev
    saw.logged, saw.scored = ([e["step"] for e in lines] for lines in (saw.log, saw.looks))
    saw.state = json.load(open(last / "state.json"))
    saw.vision, saw.moments = load_file(last / "vision.safetensors"), load_file(last / "optimizer.safetensors")
    saw.learns = {k.removeprefix("exp_avg.") for k in saw.moments if k.startswith("exp_avg.")}
    saw.lora = json.load(open(last / "adapter_config.json")) if (last / "adapter_config.json").exists() else None
    saw.adapter = load_file(last / "adapter_model.safetensors") if saw.lora else {}


def clips_of(batches, tokenizer):
    """The sentences of the clips in batches, from their targets."""
    found, ids = [], []
    for token in torch.cat([b.targets for b in batches]).tolist():
        if token == tokenizer.eos_id:
            found.append(tokenizer.decode(ids).strip())
            ids = []
        else:
            ids.append(token)
    return found


def frames_of(batches):
    """The features of each clip in batches."""
    return [b.features[b.clip == i] for b in batches for i in range(len(b.lens))]


def prompt_of(batch):
    """The token ids before and after the frames of a batch's first clip; behind them stands its answer, but for EOS."""
    first, T = batch.frame_at[0].item(), int((batch.clip == 0).sum())
    return batch.tokens[:first].tolist(), batch.tokens[first + T:batch.lens[0]].tolist()


def texts(folder, split):
    return [row["text"] for row in rows(folder / f"{split}.jsonl")]


@does("train.py", "stage=sft")
def test_sft_has_a_prompt_and_a_lora(run, world, tokenizer):
    saw = run("max_steps=1")
    assert saw.folder == world / saw.out / "toy" / "sft" and saw.adapter
    before, after = prompt_of(saw.batches[0])
    assert before == [tokenizer.bos_id, *tokenizer.encode("[INST] <sign>")]
    assert after[:3] == tokenizer.encode("</sign> \n Translate")[:3]
    align = run("max_steps=1", "stage=align")
    assert align.folder == world / align.out / "toy" / "align" and not align.adapter
    assert prompt_of(align.batches[0])[0] == [tokenizer.bos_id]


@does("train.py", "dataset=mine")
def test_another_data_set(run, world, tokenizer):
    saw = run("llm=HOME/data/toy/llm", "epochs=1", out="mine")
    assert sorted(clips_of(saw.batches, tokenizer)) == sorted(texts(world / "data" / "toy", "train")[7:])
    assert (world / "mine" / "mine" / "align" / "last").exists()


@does("train.py", "data_dir=HOME/other")
def test_another_folder_of_data_sets(run, world, tokenizer):
    assert sorted(clips_of(run("epochs=1").batches, tokenizer)) == sorted(texts(world / "data" / "toy", "train")[13:])


@does("train.py", "backbone=loud")
def test_other_features(run):
    one, two = run("max_steps=1", "backbone=toycnn"), run("max_steps=1")
    assert one.vision["mean"].any() and torch.allclose(two.vision["mean"], 2 * one.vision["mean"])


@does("train.py", "llm=HOME/llm2")
def test_another_llm(run, world):
    saw, own = run("max_steps=1"), run("max_steps=1", f"llm={world}/data/toy/llm")
    assert torch.equal(saw.model.llm.tok_embeddings.weight, 2 * own.model.llm.tok_embeddings.weight)
    assert torch.allclose(saw.vision["scale"], 2 * own.vision["scale"])  # frames are as large as words
    default = run("max_steps=1", "llm=")
    assert torch.equal(default.model.llm.tok_embeddings.weight, own.model.llm.tok_embeddings.weight)
    assert json.load(open(default.folder / "config.json"))["llm"] == f"{world}/data/toy/llm"


@does("train.py", "out_dir=HOME/elsewhere", "run=tries/one")
def test_where_the_run_lies(run, world):
    run("max_steps=1")
    assert (world / "elsewhere" / "toy" / "tries" / "one" / "align" / "last" / "state.json").exists()
    run("max_steps=1", "stage=sft", "init_from=")  # from the align run beside it
    assert (world / "elsewhere" / "toy" / "tries" / "one" / "sft" / "last" / "state.json").exists()
    assert [p.name for p in (world / "elsewhere").iterdir()] == ["toy"]
    assert [p.name for p in (world / "elsewhere" / "toy").iterdir()] == ["tries"]


@does("train.py", "init_from=HOME/first/toy/align")
def test_a_run_starts_from_the_weights_of_another(run):
    """With a rate of 0 it also ends with them."""
    first = run("init_from=", "max_steps=2", "seed=3", out="first").vision
    for stage in ("align", "sft"):
        saw = run(f"stage={stage}", "lr=0", "max_steps=1").vision
        assert saw.keys() == first.keys() and all(torch.equal(saw[k], first[k]) for k in first)


@does("train.py", "resume=true")
def test_a_resumed_run_goes_on(run, world):
    saw = run("max_steps=3")
    assert saw.logged == [1, 2, 3] and "starting at step 0" in saw.said
    again = run("max_steps=5", out=saw.out)
    assert again.logged == [1, 2, 3, 4, 5] and len(again.batches) == 2
    assert run("max_steps=1", "resume=false", out=saw.out).logged == [1]  # and without it begins anew


@does("train.py", "estimate=true")
def test_an_estimate_is_printed_and_nothing_done(run):
    saw = run()
    assert "GB" in saw.said and "estimate: " in saw.said and not saw.batches and not saw.folder.exists()


@does("train.py", "seed=5")
def test_the_seed_is_first_weights_order_and_frame_drop(run, tokenizer):
    one, same, other = (run("lr=0", "max_steps=1", "frame_drop=0.5", *seed) for seed in ([], [], ["seed=6"]))
    (a,), (b,), (c,) = one.batches, same.batches, other.batches
    assert torch.equal(a.features, b.features)
    assert torch.equal(one.vision["adaptor.w1.weight"], same.vision["adaptor.w1.weight"])
    assert clips_of([a], tokenizer) != clips_of([c], tokenizer)
    assert not torch.equal(one.vision["adaptor.w1.weight"], other.vision["adaptor.w1.weight"])
    one, other = (run("lr=0", "max_steps=1", "batch_size=20", "frame_drop=0.5", *seed) for seed in ([], ["seed=6"]))
    one, other = (dict(zip(clips_of(saw.batches, tokenizer), frames_of(saw.batches))) for saw in (one, other))
    assert one.keys() == other.keys() and not any(torch.equal(one[clip], other[clip]) for clip in one)


@does("train.py", "bos_id=7", "eos_id=9")
def test_every_sequence_begins_with_bos_and_ends_with_eos(run):
    (batch,) = run("max_steps=1").batches
    starts, ends = torch.tensor([0, *batch.lens[:-1]]).cumsum(0), torch.tensor(batch.lens).cumsum(0) - 1
    assert (batch.tokens[starts] == 7).all()
    assert (batch.targets[torch.isin(batch.target_at, ends)] == 9).all() and (batch.targets == 9).sum() == 6
    (batch,) = run("max_steps=1", "bos_id=0").batches
    assert batch.frame_at[0] == 1 and batch.tokens[0] == 0
    (batch,) = run("max_steps=1", "bos_id=-1", "eos_id=-1").batches  # SentencePiece's own
    assert (batch.tokens[starts[:1]] == 1).all() and (batch.targets == 2).sum() == 6


@does("train.py", "ltn=false")
def test_without_the_local_transformer_the_adaptor_takes_the_features(run):
    saw = run("max_steps=1")
    assert saw.learns == {"adaptor.w1.weight", "adaptor.w2.weight"}
    assert saw.vision["adaptor.w1.weight"].shape == (128, 1024)


@does("train.py", "ltn_dim=48", "ltn_layers=3", "ltn_heads=4")
def test_width_depth_and_heads_of_the_local_transformer(run, monkeypatch):
    saw = run("max_steps=1")
    assert saw.vision["proj.weight"].shape == (48, 1024) and saw.vision["adaptor.w1.weight"].shape == (128, 48)
    assert {k.split(".")[2] for k in saw.vision if k.startswith("ltn.layers.")} == {"0", "1", "2"}
    assert [layer.attention.head_dim for layer in saw.model.ltn.layers] == [12, 12, 12]
    built = []
    monkeypatch.setattr(SLLaMA, "load", lambda self, *args: built.append(self) or (_ for _ in ()).throw(Reached))
    with pytest.raises(Reached):
        run("ltn_dim=0")
    assert built[0].proj is None and built[0].adaptor.w1.weight.shape == (128, 1024)


@does("train.py", "window=4")
def test_a_frame_sees_as_far_as_the_window_reaches(run):
    def seen(ltn):  # the frames that frame 20 of 40 depends on
        x = torch.randn(1, 40, 32, requires_grad=True)
        ltn(x)[0, 20].sum().backward()
        return x.grad[0].abs().sum(1).nonzero().flatten().tolist()

    for window in (4, 12):
        before, after = model.reach(window)
        saw = run("max_steps=1", "ltn_layers=1", f"window={window}")
        assert seen(saw.model.ltn) == [*range(20 - before, 20 + after + 1)] and saw.model.ltn.window == window


@does("train.py", "dropout=0.5", "llm_dropout=0.25")
def test_dropout_of_the_visual_part_and_of_the_llm(run):
    saw = run("max_steps=1")
    net, (batch, *_) = saw.model, saw.batches
    assert [b.dropout.p for b in net.ltn.layers] == [0.5] * 2 and [b.dropout.p for b in net.llm.layers] == [0.25] * 4
    assert net.dropout.p == 0.5 and net.word_dropout.p == 0.25

    def moved(*quiet):
        """Which of frames, words and the LLM's answers differ from one training step to the next."""
        net.train()
        for m in quiet:
            m.eval()
        (x, y), z = (net.embed(batch)[0] for _ in "12"), [net(batch)[0] for _ in "12"]
        is_frame = torch.zeros(len(x), dtype=torch.bool).index_fill(0, batch.frame_at, True)
        return not torch.equal(x[is_frame], y[is_frame]), not torch.equal(x[~is_frame], y[~is_frame]), z[0] != z[1]

    assert moved() == (True, True, True)
    assert moved(net.dropout, net.ltn) == (False, True, True)
    assert moved(net.dropout, net.ltn, net.word_dropout) == (False, False, True)
    for some in ([net.dropout], [net.ltn]):  # either of them disturbs the frames
        assert moved(net.word_dropout, net.llm, *some) == (True, False, True)
    assert moved(net) == (False, False, False)


@does("train.py", "adaptor=linear")
def test_kinds_of_adaptors(run):
    x = torch.randn(5, 32)
    kinds = [], ["adaptor=mlp_noact"], ["adaptor=mlp"]
    linear, noact, mlp = (run("max_steps=1", *kind).model.adaptor for kind in kinds)
    w1, w2 = (mlp.get_parameter(f"{w}.weight") for w in ("w1", "w2"))
    with torch.no_grad():
        assert torch.allclose(linear(x), x @ linear.w1.weight.T, atol=1e-5) and len(list(linear.parameters())) == 1
        assert torch.allclose(noact(x), x @ noact.w1.weight.T @ noact.w2.weight.T, atol=1e-5)
        assert torch.allclose(mlp(x), F.gelu(x @ w1.T) @ w2.T, atol=1e-5)


@does("train.py", "lora_rank=3", "lora_alpha=12", "lora_dropout=0.25", "lora_targets=wq,w2")
def test_rank_alpha_dropout_and_targets_of_the_lora(run):
    saw = run("stage=sft", "max_steps=1")
    assert (saw.lora["r"], saw.lora["lora_alpha"], saw.lora["lora_dropout"]) == (3, 12, 0.25)
    assert sorted(saw.lora["target_modules"]) == ["down_proj", "q_proj"] and len(saw.adapter) == 4 * 2 * 2
    assert all(min(t.shape) == 3 for t in saw.adapter.values())
    layer = saw.model.llm.layers[0].attention.wq
    assert layer.scaling == 12 / 3 and layer.dropout.p == 0.25


@does("train.py", "lora_rank=0")
def test_the_whole_llm_learns(run, world, monkeypatch):
    saw = run("stage=sft", "max_steps=2", "lr=0.01")
    raw = dict(LLaMA.from_pretrained(f"{world}/data/toy/llm").named_parameters())
    learnt = {name.removeprefix("llm."): w for name, w in saw.vision.items() if name.startswith("llm.")}
    # without LoRA, all matrices but the word embeddings, which have a variable of their own; norms stay
    assert not saw.adapter and learnt.keys() == {k for k, w in raw.items() if w.dim() == 2} - {"tok_embeddings.weight"}
    assert all(not torch.equal(w, raw[name]) for name, w in learnt.items())
    assert re.search(r"learns: llm.layers +0\.\d\dM", saw.said)
    loaded = dict(evaluation.load_model(str(saw.folder))[0].llm.named_parameters())
    assert all(torch.equal(loaded[name], learnt.get(name, w)) for name, w in raw.items())
    call(monkeypatch, lora.main, "merge", f"ckpt={saw.folder}", f"to={saw.folder}/merged")
    merged = dict(LLaMA.from_pretrained(f"{saw.folder}/merged").named_parameters())
    assert all(torch.equal(merged[name], learnt.get(name, w)) for name, w in raw.items())
    resumed = run("stage=sft", "max_steps=3", "lr=0.01", "resume=true", out=saw.out)
    assert resumed.logged == [1, 2, 3]
    with pytest.raises(BadInput, match="lora_rank=0: an LLM in 8 bits cannot learn itself"):
        run("stage=sft", "llm_bits=8")


@does("train.py", "merge=3")
def test_neighbours_are_merged_in_train_and_dev_alike(run, world, tokenizer):
    saw = run("max_steps=4", "eval_every=0", "frame_drop=0", "max_frames=0")
    got = dict(zip(clips_of(saw.batches, tokenizer), frames_of(saw.batches)))
    for row in rows(world / "data" / "toy" / "train.jsonl"):
        whole = features(world, "train")[row["name"]].float()
        want = torch.stack([whole[i:i + 3].mean(0) for i in range(0, len(whole), 3)])
        assert torch.allclose(got[row["text"]].float(), want, atol=2e-3, rtol=2e-3)
    ends = lambda clips: sorted(map(len, clips))
    assert ends(frames_of(saw.dev)) == sorted(-(-len(x) // 3) for x in features(world, "dev").values())
    assert all(len(x) < 30 for x in saw.decoded[0]["features"])
    assert "features toycnn of width 1024, means of 3" in saw.said
    # twelve of them are first picked, then merged
    assert {len(x) for x in frames_of(run("max_steps=1", "max_frames=12", "frame_drop=0").batches)} == {4}


@does("train.py", "concat=0.5")
def test_another_clip_and_its_sentence_follow_half_of_them(run, world, tokenizer):
    """Frames and words of both, the same other clip on any machine and another one in each epoch; never on dev."""
    train, dev = ({row["text"]: features(world, split)[row["name"]] for row in rows(world / f"data/toy/{split}.jsonl")}
                  for split in ("train", "dev"))
    how = ["batch_size=20", "epochs=4", "max_frames=0"]
    saw = run(*how, "eval_every=0")
    assert len(saw.batches) == 4
    epochs = []
    for batch in saw.batches:
        followers = {}
        for said, frames in zip(clips_of([batch], tokenizer), frames_of([batch])):
            first = max((text for text in train if said.startswith(text)), key=len)
            second = said.removeprefix(first).removeprefix(" ")
            assert torch.equal(frames, torch.cat([train[text] for text in (first, second) if text]))
            followers[first] = second
        assert followers.keys() == train.keys()
        epochs.append(followers)
    assert 25 < sum(bool(second) for followers in epochs for second in followers.values()) < 55  # of 80
    assert len({tuple(followers.values()) for followers in epochs}) == 4
    assert sorted(set(clips_of(saw.dev, tokenizer))) == sorted(dev)
    again = run(*how, "grad_accum=2", "batch_size=10", "epochs=1")
    assert sorted(clips_of(again.batches, tokenizer)) == sorted(clips_of(saw.batches[:1], tokenizer))
    assert sorted(clips_of(run(*how, "concat=0", "epochs=1").batches, tokenizer)) == sorted(train)


@does("train.py", "beta2=0.5")
def test_the_second_moment_is_a_mean_with_beta2(run):
    """After one step it is (1 - beta2) g^2, the first (1 - 0.9) g."""
    for words, beta2 in (([], 0.5), (["beta2=0.98"], 0.98)):
        moments = run("max_steps=1", *words).moments
        for name in (k.removeprefix("exp_avg.") for k in moments if k.startswith("exp_avg.")):
            g = moments["exp_avg." + name] / (1 - 0.9)
            assert torch.allclose(moments["exp_avg_sq." + name], (1 - beta2) * g.square(), rtol=1e-4, atol=1e-12), name


@does("train.py", "max_clips=7")
def test_learns_from_so_many_clips_spread_over_the_set(run, world, tokenizer):
    every = texts(world / "data" / "toy", "train")
    saw = run("epochs=1")
    assert len(saw.batches) == 2
    assert sorted(clips_of(saw.batches, tokenizer)) == sorted(every[i] for i in (0, 2, 5, 8, 11, 14, 17))
    assert sorted(clips_of(run("epochs=1", "max_clips=0").batches, tokenizer)) == sorted(every)


@does("train.py", "max_frames=10")
def test_long_clips_are_thinned_out_in_train_and_dev_alike(run, world, tokenizer):
    saw = run("max_steps=4", "eval_every=0")
    thinned = dict(zip(clips_of(saw.batches, tokenizer), frames_of(saw.batches)))
    for row in rows(world / "data" / "toy" / "train.jsonl"):
        whole = features(world, "train")[row["name"]]
        at = [(whole == x).all(1).nonzero()[0].item() for x in thinned[row["text"]]]
        assert len(at) == 10 < len(whole) and at[0] == 0 and at[-1] == len(whole) - 1
        assert all(abs(k - i * (len(whole) - 1) / 9) < 1.01 for i, k in enumerate(at))
    assert [len(x) for x in frames_of(saw.dev)] == [10] * 4
    assert [len(x) for x in saw.decoded[0]["features"]] == [10, 10]
    assert "20 train clips are longer than max_frames=10" in saw.said
    whole = run("max_steps=4", "eval_every=0", "max_frames=0")
    lengths = lambda split: sorted(map(len, features(world, split).values()))
    assert sorted(map(len, frames_of(whole.batches))) == lengths("train")
    assert sorted(map(len, frames_of(whole.dev))) == lengths("dev")


@does("train.py", "language=Chinese")
def test_the_prompt_names_the_language(run, tokenizer):
    (batch,) = run("stage=sft", "max_steps=1").batches
    want = tokenizer.encode("</sign> \n Translate the sign language into Chinese text. [/INST]")
    assert prompt_of(batch)[1][:len(want)] == want


@does("train.py", "prompt=im {clip} es")
def test_the_prompt_stands_around_the_frames(run, tokenizer):
    (batch,) = run("max_steps=1").batches
    before, after = prompt_of(batch)
    es, answer = tokenizer.encode("es"), batch.targets.tolist()
    assert before == [tokenizer.bos_id, *tokenizer.encode("im")]
    assert after == es + answer[:answer.index(tokenizer.eos_id)]


@does("train.py", "lang=zh")
def test_the_language_s_code_picks_the_tokens_of_bleu_and_rouge(run, world):
    refs = [texts(world / "data" / "toy", "dev")[i] for i in (0, 2)]
    hyps = ["heute regnet es im norden"] * 2
    for lang, cut in (("zh", "char"), ("", "13a")):
        (entry,) = run("max_clips=6", "epochs=1", "eval_every=0", f"lang={lang}").looks
        want = sacrebleu.metrics.BLEU(tokenize=cut, force=True).corpus_score(hyps, [refs]).score
        assert entry["dev_bleu"][3] == pytest.approx(want)
        assert entry["dev_rouge"] == rouge(hyps, refs, lang or "de")
    with pytest.raises(BadInput, match="lang: say the code of Esperanto"):
        run("language=Esperanto", "lang=")


@does("train.py", "label_smoothing=0.2")
def test_label_smoothing_by_hand_and_none_on_dev(run):
    saw = run("llm=HOME/llm2", "lr=0", "max_steps=4", "eval_every=0", "eval_clips=0")  # the weights stay what they are

    def losses(batches):
        with torch.no_grad():
            logits = torch.cat([saw.model.llm(h=saw.model.embed(b), lens=b.lens, at=b.target_at)[0] for b in batches])
        log_p, targets = logits.log_softmax(-1), torch.cat([b.targets for b in batches])
        return -log_p.gather(1, targets[:, None]).mean().item(), -log_p.mean().item()

    one, uniform = losses(saw.batches[:1])
    assert abs(one - uniform) > 0.1
    assert saw.log[0]["loss"] == pytest.approx(0.8 * one + 0.2 * uniform, rel=1e-5)
    assert saw.looks[-1]["dev_loss"] == pytest.approx(losses(saw.dev)[0], rel=1e-5)


@does("train.py", "grad_accum=3")
def test_a_step_is_so_many_micro_batches(run, tokenizer):
    saw, whole = run("max_steps=1"), run("max_steps=1", "grad_accum=1")
    assert [len(b.lens) for b in saw.batches] == [2, 2, 2] and [len(b.lens) for b in whole.batches] == [6]
    assert sorted(clips_of(saw.batches, tokenizer)) == sorted(clips_of(whole.batches, tokenizer))
    assert saw.log[0]["loss"] == pytest.approx(whole.log[0]["loss"], rel=1e-5)


@does("train.py", "weight_decay=0.5")
def test_weight_decay_shrinks_matrices_alone(run):
    how = ["max_steps=1", "warmup=0"]
    first, decayed = run(*how, "lr=0").vision, run(*how, "lr=0.01").vision
    plain = run(*how, "lr=0.01", "weight_decay=0").vision
    for name in first:  # AdamW: w -= lr * weight_decay * w, before anything else
        want = plain[name] - 0.01 * 0.5 * first[name] * (first[name].dim() > 1)
        assert torch.allclose(decayed[name], want, atol=1e-6), name


@does("train.py", "lr=8e-3", "warmup=4")
def test_the_rate_climbs_to_lr_in_warmup_steps_and_falls_to_a_tenth(run):
    rates = [e["lr"] for e in run().log]
    assert rates[:5] == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.008])
    assert rates[6] == pytest.approx(0.008 * 0.55)
    assert rates[7] == pytest.approx(0.008 * (0.55 + 0.45 * math.cos(math.pi * 3 / 4)))
    assert run("warmup=0", "max_steps=1").log[0]["lr"] == 0.008


@does("train.py", "grad_clip=0.01")
def test_the_gradient_is_clipped(run):
    """Adam's first moment after one step is a tenth of the gradient that it was given."""
    square = lambda saw: sum(t.square().sum().item() for k, t in saw.moments.items() if k.startswith("exp_avg."))
    given = lambda saw: 10 * math.sqrt(square(saw))
    saw, free = run("max_steps=1"), run("max_steps=1", "grad_clip=0")
    assert saw.log[0]["grad_norm"] > 0.1 and given(saw) == pytest.approx(0.01, rel=1e-3)
    assert given(free) == pytest.approx(free.log[0]["grad_norm"], rel=1e-4)
    assert free.log[0]["grad_norm"] == saw.log[0]["grad_norm"]


@does("train.py", "epochs=3", "batch_size=7", "max_steps=-1")
def test_epochs_steps_and_clips(run, world, tokenizer):
    """20 clips are 7, 7 and 6. Every epoch learns from every clip. The rate goes by epochs, wherever a run stops."""
    saw = run()
    assert [len(b.lens) for b in saw.batches] == [7, 7, 6] * 3 and saw.logged == [*range(1, 10)]
    for n in (0, 3, 6):
        assert sorted(clips_of(saw.batches[n:n + 3], tokenizer)) == sorted(texts(world / "data" / "toy", "train"))
    assert [e["epoch"] for e in saw.log][2::3] == [1, 2, 3]
    stopped = {n: run(f"max_steps={n}") for n in (0, 2, 99)}
    assert {n: s.logged for n, s in stopped.items()} == {0: [1, 2, 3], 2: [1, 2], 99: [*range(1, 10)]}
    assert [e["lr"] for e in stopped[0].log] == [e["lr"] for e in saw.log[:3]]


@does("train.py", "frame_drop=0.5", "max_frames=0")
def test_a_share_of_the_frames_is_left_out_in_training_alone(run, world, tokenizer):
    saw = run("max_steps=4", "eval_every=0")
    store = features(world, "train")
    names = {row["text"]: row["name"] for row in rows(world / "data" / "toy" / "train.jsonl")}
    left = dict(zip(clips_of(saw.batches, tokenizer), frames_of(saw.batches)))
    total = sum(map(len, store.values()))
    assert len(left) == 20 and abs(sum(map(len, left.values())) / total - 0.5) < 4 * math.sqrt(0.25 / total)
    for text, some in left.items():  # what is left keeps its order
        at = [(store[names[text]] == x).all(1).nonzero()[0].item() for x in some]
        assert at == sorted(set(at))
    assert sorted(map(len, frames_of(saw.dev))) == sorted(map(len, features(world, "dev").values()))


def parts(names):
    """The parts of the model that these parameters belong to."""
    of = {"proj.": "ltn", "ltn.": "ltn", "adaptor.": "adaptor", "tok_embeddings": "words", "lora_": "lora"}
    return {part for name in names for mark, part in of.items() if mark in name}


@does("train.py", "train_ltn=false", "freeze_llm=true", "train_embeddings=false")
@pytest.mark.parametrize("stage, own", [("align", {"ltn", "adaptor"}), ("sft", {"adaptor", "lora"})])
def test_what_learns(run, stage, own):
    def learn(*words):
        saw = run(f"stage={stage}", "max_steps=1", *words)
        said = re.findall(r"^learns: (\S+) +\d+\.\d\dM$", saw.said, re.M)  # the parts, and nothing that is not there
        assert {{"proj": "ltn", "llm.tok_embeddings": "words"}.get(part, part) for part in said} == parts(saw.learns)
        return parts(saw.learns)

    assert learn() == {"adaptor"}
    assert learn("train_ltn=true") == {"adaptor", "ltn"}
    assert learn("freeze_llm=false") == {"adaptor", "lora"}
    assert learn("train_embeddings=true") == {"adaptor", "words"}
    assert own == learn(*(f"{key}={value}" for key, value in read_literals(str(ROOT / "train.py"))[stage][0].items()
                          if key in ("train_ltn", "freeze_llm", "train_embeddings")))


@does("train.py", "device=cuda")
def test_the_device(run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="device=cuda: 0 GPU"):
        run("max_steps=1")
    assert "on cpu (device=cpu)" in run("max_steps=1", "device=cpu").said
    assert "on cpu (auto: 1 process(es), 0 GPU(s))" in run("max_steps=1", "device=auto").said


@does("train.py", "dtype=bfloat16")
def test_the_type_of_the_frozen_weights(run):
    for word, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)):
        saw = run("stage=sft", "max_steps=1", f"dtype={word}")
        assert {p.dtype for p in saw.model.parameters() if not p.requires_grad} == {dtype}
        assert f"dtype {word} (dtype={word})" in saw.said
        assert {p.dtype for p in saw.model.parameters() if p.requires_grad} == {torch.float32}
        assert math.isfinite(saw.log[0]["loss"])


@does("train.py", "llm_bits=8")
def test_the_bits_of_the_llm_s_matrices(run):
    """Seven a block, beside them their scales; all else, what learns too, is of the types that it ever is."""
    losses = {}
    for bits, dtype in ((8, torch.int8), (4, torch.uint8), (16, torch.float32)):
        saw = run("stage=sft", "max_steps=2", f"llm_bits={bits}")
        packed = {name for name, p in saw.model.named_parameters() if name.endswith(".weight") and p.dtype == dtype}
        floats = {name for name, p in saw.model.named_parameters() if p.dtype == torch.float32}
        assert bits == 16 or packed == {f"llm.layers.{i}.{part}.{w}.weight" for i in range(4) for part, w in (
            *(("attention", w) for w in ("wq", "wk", "wv", "wo")), *(("feed_forward", w) for w in ("w1", "w2", "w3")))}
        assert {"llm.tok_embeddings.weight", "llm.output.weight", "llm.layers.0.ffn_norm.weight"} <= floats
        assert {p.dtype for p in saw.model.parameters() if p.requires_grad} == {torch.float32}
        assert "M parameters" in saw.said and json.load(open(saw.folder / "config.json"))["llm_bits"] == bits
        losses[bits] = saw.log[0]["loss"]
        assert (f"beside an LLM in 16 bits, this run's lies in {bits}" in saw.said) == (bits != 16)
    assert 0 < abs(losses[8] - losses[16]) < 0.02 < abs(losses[4] - losses[16]) < 0.6


@does("train.py", "compile=true")
def test_each_block_is_compiled(run, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self), how)))
    run("max_steps=1")
    assert compiled == [(model.Block, {"dynamic": True})] * 4
    run("max_steps=1", "compile=false")
    assert len(compiled) == 4


@does("train.py", "activation_checkpointing=true")
def test_blocks_are_computed_again_in_the_backward_pass(run):
    saw, plain = run("max_steps=3"), run("max_steps=3", "activation_checkpointing=false")
    assert (saw.blocks, plain.blocks) == (3 * 2 * 4, 3 * 4)
    assert [e["loss"] for e in saw.log] == [e["loss"] for e in plain.log]
    # the look at dev has no backward pass
    assert run("max_clips=6", "epochs=1", "eval_every=0", "eval_clips=0").blocks == 2 * 4 + 4


@does("train.py", "cpu_offload=true")
def test_parameters_are_kept_on_the_cpu(run, monkeypatch):
    from torch.distributed import fsdp
    offloads, real = [], fsdp.fully_shard

    def fully_shard(part, **how):
        offloads.append(type(how.get("offload_policy")))
        return real(part, **how)

    monkeypatch.setattr(fsdp, "fully_shard", fully_shard)
    saw = run("max_steps=2")
    assert offloads == [fsdp.CPUOffloadPolicy] * 5  # the blocks and the root
    plain = run("max_steps=2", "cpu_offload=false")
    assert len(offloads) == 5 and [e["loss"] for e in saw.log] == pytest.approx([e["loss"] for e in plain.log])


@does("train.py", "log_every=3")
def test_the_steps_that_are_logged(run):
    assert run().logged == [3, 6, 8]  # the last step too
    assert run("log_every=0").logged == [4, 8] and run("log_every=-1").logged == []


@does("train.py", "tensorboard=true", "eval_every=4")
def test_what_tensorboard_is_told(run, world):
    """What log.jsonl holds, number by number, and the dev sentences; after a resume no step twice."""
    where = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(where, reason="tensorboard is not installed (pip install tensorboard)")
    saw = run("eval_clips=3", "max_steps=6", "save_every=4", "keep=2", out="watched")
    shutil.rmtree(saw.folder / "last")
    os.rename(saw.folder / "last.1", saw.folder / "last")  # step 4: 5 and 6 are told again
    assert run("eval_clips=3", "resume=true", out="watched").logged == [*range(1, 9)]
    board = events.EventAccumulator(str(saw.folder)).Reload()
    told = {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    expected = {}
    for line in rows(saw.folder / "log.jsonl"):
        bleus = {f"dev_bleu/{n}": v for n, v in enumerate(line.pop("dev_bleu", []), 1)}
        for tag, value in (line | bleus).items():
            expected.setdefault(tag, []).append((line["step"], pytest.approx(value)))
    del expected["step"]
    assert told == expected
    *_, text = board.Tensors("dev sentences/text_summary")
    refs = [row["text"] for row in rows(world / "data" / "toy" / "dev.jsonl")][:3]
    assert text.step == 8 and re.findall("ref  (.*)", text.tensor_proto.string_val[0].decode()) == refs


@does("train.py", "tensorboard=true")
def test_tensorboard_is_not_there(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(BadInput, match="tensorboard=true: needs the package"):
        run()


@does("train.py", "eval_every=3")
def test_the_steps_after_which_dev_is_looked_at(run):
    saw = run()
    assert saw.scored == [3, 6, 8] and len(saw.dev) == len(saw.decoded) == 3
    assert (saw.folder / "best" / "state.json").exists()
    assert run("eval_every=0").scored == [4, 8]
    never = run("eval_every=-1")
    assert never.scored == [] and not never.dev and not (never.folder / "best").exists()


@does("train.py", "eval_clips=3", "beam=5")
def test_how_many_dev_clips_are_decoded_and_how(run, world):
    dev = [features(world, "dev")[row["name"]] for row in rows(world / "data" / "toy" / "dev.jsonl")]
    ends = lambda clips: sorted(x[-1].sum().item() for x in clips)  # the last frame is never thinned out
    for n, chosen in ((3, [0, 1, 2]), (2, [0, 2]), (1, [0]), (-1, [0, 1, 2, 3]), (9, [0, 1, 2, 3])):
        (given,) = run("max_clips=6", "epochs=1", "eval_every=0", f"eval_clips={n}").decoded
        assert given["beam"] == 5
        assert ends(given["features"]) == ends(dev[i] for i in chosen)
    saw = run("max_clips=6", "epochs=1", "eval_every=0", "eval_clips=0")
    assert not saw.decoded and "dev_bleu" not in saw.looks[-1] and saw.scored == [1] and (saw.folder / "best").exists()
    assert run("max_clips=6", "epochs=1", "eval_every=0", "beam=1").decoded[0]["beam"] == 1


@does("train.py", "save_every=3", "keep=9")
def test_the_steps_after_which_is_saved_and_how_many_are_kept(run):
    def kept(*words):  # the steps of last/, last.1/, ...
        return [json.load(open(p / "state.json"))["step"] for p in sorted(run(*words).folder.glob("last*"))]

    assert kept() == [8, 6, 3]
    assert kept("save_every=0") == [8, 4] and kept("save_every=-1") == [8]
    assert kept("keep=2") == [8, 6] and kept("keep=1") == kept("keep=0") == [8]


@does("train.py", "max_skips=3")
def test_so_many_skipped_steps_in_a_row_are_the_end(run, monkeypatch):
    real, calls = SLLaMA.forward, []

    def forward(self, batch):
        calls.append(1)
        return real(self, batch)[0] * float("nan"), 1

    monkeypatch.setattr(SLLaMA, "forward", forward)
    with pytest.raises(BadInput, match="max_skips=3 steps in a row"):
        run()
    assert len(calls) == 3

# ---------------------------------------------------------------------------------------------------------------------
# A run that goes on, and sft on an align run: each variable is changed in turn

CHANGES = dict(
    stage="sft", dataset="mine", data_dir="HOME/moved", backbone="loud", llm="HOME/llm2", out_dir="HOME/going2",
    run="tries", init_from="HOME/base/toy/align", resume="false", estimate="true", seed="5", bos_id="7", eos_id="9",
    ltn="false", ltn_dim="48", ltn_layers="3", ltn_heads="4", window="4", adaptor="linear", lora_rank="4",
    lora_alpha="8", lora_dropout="0.1", lora_targets="wq", max_clips="7", max_frames="10", language="Chinese",
    lang="en", label_smoothing="0.1", grad_accum="2", weight_decay="0.1", warmup="3", grad_clip="2", max_steps="5",
    device="cpu", dtype="bfloat16", compile="true", activation_checkpointing="true", cpu_offload="true",
    log_every="2", eval_every="2", eval_clips="1", beam="2", save_every="2", keep="2", max_skips="3", epochs="3",
    tensorboard="true", batch_size="5", lr="1e-4", frame_drop="0.2", prompt="im {clip}", train_ltn="false",
    freeze_llm="false", train_embeddings="true", llm_bits="8", merge="2", dropout="0.1", llm_dropout="0.1",
    concat="0.5", beta2="0.99")
# the same run, moved
PLACES = {"out_dir", "run", "data_dir", "init_from", "resume"}
# what carries it
MACHINE = {"device", "dtype", "compile", "activation_checkpointing", "cpu_offload", "grad_accum", "estimate"}
# how it is watched and when it stops
LOOKS = {"max_steps", "log_every", "eval_every", "save_every", "keep", "max_skips", "tensorboard"}
GOES_ON = PLACES | MACHINE | LOOKS
# what the weights of an align run fit
NETWORK = {"merge", "ltn", "ltn_dim", "ltn_layers", "ltn_heads", "window", "adaptor", "backbone", "llm"}


class Reached(Exception):
    """The program has accepted its starting point and begins to build the model."""


@pytest.fixture
def reach(world, train_here, monkeypatch):
    """A function of (out, *words): train.main() up to where the model is built. What is not accepted is a BadInput."""
    def built(*args):
        raise Reached

    def go(out, *words):
        with monkeypatch.context() as m, pytest.raises(Reached):
            m.setattr(SLLaMA, "__init__", built)
            m.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=None))  # it need not be
            train_here(out, f"llm={world}/data/toy/llm", *[word.replace("HOME", str(world)) for word in words])
    return go


def test_every_variable_is_changed():
    assert CHANGES.keys() == variables("train.py")


@pytest.fixture(scope="module")
def going(world):
    """An align run of one step, where it was made and wherever a changed place looks for it."""
    with pytest.MonkeyPatch.context() as patch:
        where = [f"data_dir={world}/data", f"out_dir={world}/going", f"llm={world}/data/toy/llm"]
        call(patch, train.main, *where, *SMALL, "eval_every=-1", "max_steps=1")
    for place in ("going2/toy/align", "going/toy/tries/align", "going/mine/align", "going/toy/sft"):
        shutil.copytree(world / "going" / "toy" / "align", world / place)
    shutil.copytree(world / "data" / "toy", world / "moved" / "toy")


@pytest.mark.parametrize("variable", CHANGES)
def test_a_resumed_run_refuses_what_would_make_it_another(going, reach, variable):
    words = ["resume=true", "eval_every=-1", f"{variable}={CHANGES[variable]}"]
    if variable == "stage":
        words += ["freeze_llm=true", "train_ltn=true", "prompt={clip}"]  # the stage's name is then all that differs
    if variable in GOES_ON:
        reach("going", *words)
    else:
        with pytest.raises(BadInput, match=f"was trained with {variable}=.*, this run says {variable}="):
            reach("going", *words)


@pytest.mark.parametrize("variable", sorted(CHANGES.keys() - {"stage"}))
def test_sft_must_have_the_network_of_its_align_run(runs, reach, variable):
    words = ["stage=sft", f"init_from={runs}/align", f"{variable}={CHANGES[variable]}"]
    if variable in NETWORK:
        said = f"align/last: was trained with {variable}=.*, this run says {variable}="
        with pytest.raises(BadInput, match=said):
            reach(f"on-{variable}", *words)
    else:
        reach(f"on-{variable}", *words)


def test_the_same_llm_by_another_path_is_the_same(world, runs, reach):
    os.symlink(world / "data" / "toy" / "llm", world / "link")
    reach("linked", "stage=sft", f"init_from={runs}/align", "llm=HOME/link")

# ---------------------------------------------------------------------------------------------------------------------
# eval.py, with an sft run of three steps: greedy and three tokens an answer where a test does not say otherwise


@pytest.fixture
def score(request, world, runs, monkeypatch, capsys):
    """A function of words: eval.main() with the test's words and these -> what was decoded, and how."""
    def go(*words, answer=None):
        saw = SimpleNamespace(calls=[], steps=[], streams=[])

        def translate(*args, real=evaluation.translate, **more):
            given = inspect.signature(real).bind(*args, **more).arguments
            saw.calls.append(given)
            saw.sllama = given["sllama"]
            return answer(given) if answer else real(*args, **more)

        def forward(self, *args, real=LLaMA.forward, **more):
            if more.get("pos") is not None:
                saw.steps.append(tuple(more["h"].shape[:2]))  # (clips, beams) of a cached step
            return real(self, *args, **more)

        def embed(self, batch, real=SLLaMA.embed):
            saw.streams.append(batch)
            return real(self, batch)

        words = [word.replace("HOME", str(world)) for word in (*request.function.words, *words)]
        run = [] if any(word.startswith(("out_dir=", "ckpt=")) for word in words) else [f"ckpt={world}/base/toy/sft"]
        capsys.readouterr()
        with monkeypatch.context() as m:
            m.setattr(evaluation, "translate", translate)
            m.setattr(LLaMA, "forward", forward)
            m.setattr(SLLaMA, "embed", embed)
            call(m, evaluation.main, *run, "beam=1", "max_new_tokens=3", *words)
        saw.out, saw.err = capsys.readouterr()
        return saw
    return go


@pytest.fixture
def result(world):
    """What eval.py wrote: a mark in the file's names -> (scores, lines)."""
    def read(mark="", run="base/toy/sft"):
        return json.load(open(world / run / f"scores{mark}.json")), rows(world / run / f"hyps{mark}.jsonl")
    return read


def likes(monkeypatch, **chances):
    """An LLM to which the next token is always the same: these ids with these chances."""
    def forward(self, tokens=None, h=None, lens=None, pos=None, cache=None, at=None):
        logits = torch.full((640,), -30.0)
        for token, chance in chances.items():
            logits[int(token.removeprefix("id"))] = math.log(chance)
        return logits.expand(*((1, len(at)) if pos is None else pos.shape), 640)

    monkeypatch.setattr(LLaMA, "forward", forward)


@does("eval.py", "ckpt=HOME/base/toy/sft/last")
def test_which_checkpoint(score, result, world):
    score()
    assert result()[0]["checkpoint"] == f"{world}/base/toy/sft/last" and result()[0]["step"] == 3
    score("ckpt=HOME/base/toy/sft")
    assert result()[0]["checkpoint"] == f"{world}/base/toy/sft/best" and result()[0]["step"] == 2


@does("eval.py", "out_dir=HOME/several")
def test_without_ckpt_it_is_the_newest_sft_run(score, world):
    for n, name in enumerate(("a/toy/sft", "c/toy/sft", "b/toy/sft", "d/toy/align")):
        shutil.copytree(world / "base" / "toy" / "sft" / "best", world / "several" / name / "best")
        os.utime(world / "several" / name / "best" / "state.json", (1000 + n, 1000 + n))
    score()
    assert [*(world / "several").rglob("scores.json")] == [world / "several" / "b" / "toy" / "sft" / "scores.json"]


@does("eval.py", "split=dev")
def test_the_split(score, result, world):
    for split, mark, n in (("dev", ".dev", 4), ("test", "", 4), ("train", ".train", 20)):
        score(f"split={split}")
        scores, lines = result(mark)
        assert scores["split"] == split and scores["clips"] == n
        clips = rows(world / "data" / "toy" / f"{split}.jsonl")
        assert [(r["name"], r["ref"]) for r in lines] == [(r["name"], r["text"]) for r in clips]


@does("eval.py", "beam=3", "max_new_tokens=5", "batch_size=3")
def test_beams_tokens_and_clips_at_once(score, result, monkeypatch):
    likes(monkeypatch, id300=0.5, id301=0.3)  # nothing ever ends
    saw = score()
    assert saw.steps == [(3, 3)] * 4 + [(1, 3)] * 4 and [len(s.lens) for s in saw.streams] == [3, 1]
    assert result()[0]["decoding"] == {"beam": 3, "length_penalty": 1, "max_new_tokens": 5, "batch_size": 3}
    assert "4 of 4 answers did not end within max_new_tokens=5" in saw.err
    assert score("max_new_tokens=2", "batch_size=16", "beam=1").steps == [(4, 1)]


@does("eval.py", "length_penalty=10", "eos_id=9")
def test_length_penalty_and_eos_by_hand(score, result, monkeypatch, tokenizer):
    """Of two beams one ends at once, log .5, and one after a token, (log .4 + log .5) / (7/6)**length_penalty."""
    likes(monkeypatch, id9=0.5, id300=0.4)
    score("beam=2")
    assert [r["hyp"] for r in result()[1]] == [tokenizer.decode([300]).strip()] * 4 != [""] * 4
    for penalty in (0, 1):
        score("beam=2", f"length_penalty={penalty}")
        assert [r["hyp"] for r in result()[1]] == [""] * 4
    score("eos_id=300")  # and now 9 is a token like others
    assert [r["hyp"] for r in result()[1]] == [tokenizer.decode([9, 9, 9]).strip()] * 4


@does("eval.py", "bos_id=7")
def test_sequences_begin_with_bos(score):
    for n, first in ((7, 7), (0, 0), (-1, 1)):
        assert score(f"bos_id={n}").streams[0].tokens[0] == first


@does("eval.py", "beams=1,2", "length_penalties=0,3")
def test_beams_and_penalties_are_chosen_on_dev(score, result, world):
    dev, test = features(world, "dev"), features(world, "test")
    refs = texts(world / "data" / "toy", "dev")

    def answer(given):  # only a beam of 2 without a penalty is right, and on dev alone
        right = (given["beam"], given["length_penalty"]) == (2, 0) and len(given["features"]) == 4
        return refs if right else ["falsch"] * len(given["features"])

    calls = score(answer=answer).calls
    assert [(c["beam"], c["length_penalty"]) for c in calls] == [(1, 0), (1, 3), (2, 0), (2, 3), (2, 0)]
    last = lambda store: sorted(t[-1].sum().item() for t in store.values())
    assert [sorted(x[-1].sum().item() for x in c["features"]) for c in calls] == [last(dev)] * 4 + [last(test)]
    scores = result()[0]
    assert [s["dev_bleu4"] > 99 for s in scores["sweep"]] == [False, False, True, False]
    assert (scores["decoding"]["beam"], scores["decoding"]["length_penalty"], scores["split"]) == (2, 0, "test")
    calls = score("length_penalties=", answer=answer).calls
    assert [(c["beam"], c["length_penalty"]) for c in calls] == [(1, 1), (2, 1), (1, 1)]  # equally good: the first
    calls = score("beams=", "beam=3", answer=answer).calls
    assert [(c["beam"], c["length_penalty"]) for c in calls] == [(3, 0), (3, 3), (3, 0)]


@does("eval.py", "control=all", "seed=5")
def test_controls(score, result):
    saw = score()
    real, shuffled, blank, noise = (c["features"] for c in saw.calls)
    at = [[torch.equal(x, y) for y in real].index(True) for x in shuffled]
    assert sorted(at) == [0, 1, 2, 3] and all(i != k for i, k in enumerate(at))
    assert all(not x.any() and x.shape == y.shape for x, y in zip(blank, real))
    assert [x.shape for x in noise] == [x.shape for x in real]
    assert all(abs(((x - saw.sllama.mean) / saw.sllama.std).std() - 1) < 0.05 for x in noise)
    assert result()[0]["control"] == "none"
    for control in ("shuffle", "blank", "noise"):
        assert result(f".{control}")[0]["control"] == control
    same, other = (score("control=noise", *seed).calls for seed in ([], ["seed=6"]))
    assert len(same) == 1 and torch.equal(same[0]["features"][0], noise[0])
    assert not torch.equal(other[0]["features"][0], noise[0])
    orders = set()
    for n in range(6):
        (given,) = score("control=shuffle", f"seed={n}").calls
        orders.add(tuple([torch.equal(x, y) for y in real].index(True) for x in given["features"]))
    assert len(orders) > 1 and len(score("control=none").calls) == 1


@does("eval.py", "video=HOME/data/toy/clips/00024.mp4")
def test_a_video_is_the_same_as_its_features(score, result, world):
    """The first clip of test, as its split is decoded: thinned out to max_frames as in training."""
    split = score("video=")
    saw = score()
    assert saw.out == " ".join(result()[1][0]["hyp"].split()) + "\n"
    (one,) = saw.calls[0]["features"]
    assert [len(x) for x in split.calls[0]["features"]] == [12] * 4
    assert torch.equal(one, split.calls[0]["features"][0])
    assert "thinned out to max_frames=12" in saw.err
    assert "data: 4 test clips are longer than max_frames=12" in split.out


@does("eval.py", "videos=HOME/some")
def test_a_folder_of_videos(score, result, world):
    (world / "some").mkdir()
    for name in ("00025.mp4", "00024.mp4"):
        shutil.copy(world / "data" / "toy" / "clips" / name, world / "some")
    (world / "some" / "notes.txt").touch()
    score("videos=")
    said = [" ".join(row["hyp"].split()) for row in result()[1]]
    saw = score()
    assert saw.out == f"00024.mp4\t{said[0]}\n00025.mp4\t{said[1]}\n" and "notes.txt: passed over" in saw.err


@does("eval.py", "weights=HOME/other.pth", "video=HOME/data/toy/clips/00024.mp4")
def test_a_video_s_cnn_has_other_weights(score, world, monkeypatch):
    made, real = [], Extractor.__init__

    def init(*args, **more):
        given = inspect.signature(real).bind(*args, **more).arguments
        made.append((given["backbone"], given["weights"], given.get("fps")))
        real(*args, **more)

    monkeypatch.setattr(Extractor, "__init__", init)
    score(), score("weights=")
    assert made == [("toycnn", f"{world}/other.pth", 25.0), ("toycnn", "", 25.0)]


def write_hyps(path, hyps, refs):
    lines = [{"name": str(n), "hyp": hyp, "ref": ref} for n, (hyp, ref) in enumerate(zip(hyps, refs))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@does("eval.py", "hyps=HOME/A.jsonl", "against=HOME/B.jsonl", "lang=de")
def test_files_of_hypotheses(score, world):
    refs = ["heute regnet es im norden nicht", "morgen scheint am rhein wieder die sonne", "am abend weht der wind"]
    files = {"A": [refs[0], refs[1][:-6], refs[2]], "B": [refs[1], refs[1], refs[0]]}
    for name, hyps in files.items():
        write_hyps(world / f"{name}.jsonl", hyps, refs)
    metric = lambda cut: sacrebleu.metrics.BLEU(tokenize=cut, force=True)
    bleu = lambda name, cut: f"{metric(cut).corpus_score(files[name], [refs]).score:6.2f}"
    line = lambda saw, start: next(row for row in saw.out.splitlines() if row.startswith(start))
    saw = score()
    assert bleu("A", "13a") in line(saw, "A.jsonl") and bleu("B", "13a") in line(saw, "against B.jsonl")
    assert "paired bootstrap" in line(saw, "BLEU-4")
    alone = score("against=", "lang=zh")
    assert bleu("A", "char") in line(alone, "A.jsonl") and "against" not in alone.out
    assert bleu("A", "char") != bleu("A", "13a")


@does("eval.py", "hyps=HOME/A.txt", "refs=HOME/R.txt", "lang=de")
def test_sentences_and_references_in_two_files(score, world):
    texts = {"A": ["heute regnet es im norden", "ja"], "R": ["heute regnet es im süden", "ja"]}
    for name, lines in texts.items():
        (world / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    want = sacrebleu.metrics.BLEU(tokenize="13a", force=True).corpus_score(texts["A"], [texts["R"]]).score
    assert f"{want:6.2f}" in next(row for row in score().out.splitlines() if row.startswith("A.txt"))
    with pytest.raises(BadInput, match="A.txt:1: is not a line"):
        score("refs=")


@does("eval.py", "lang=en")
def test_the_language_is_the_run_s_or_another(score, result):
    score()
    assert result()[0]["lang"] == "en"
    score("lang=")
    assert result()[0]["lang"] == "de"
    score("lang=", "ckpt=HOME/zh/toy/sft")
    assert result(run="zh/toy/sft")[0]["lang"] == "zh"
    assert "tok:char" in result(run="zh/toy/sft")[0]["signature"]["bleu"]


@does("eval.py", "dataset=mine", "data_dir=HOME/other", "backbone=loud")
def test_other_data(score, result, world):
    plain = score("dataset=", "data_dir=", "backbone=").calls[0]["features"]
    mine, other, loud = score("data_dir=", "backbone="), score("dataset=", "backbone="), score("dataset=", "data_dir=")
    assert [len(saw.calls[0]["features"]) for saw in (mine, other, loud)] == [3, 2, 4]
    assert all(torch.equal(x, 2 * y) for x, y in zip(loud.calls[0]["features"], plain))
    assert result(".mine")[0]["dataset"] == "mine"
    assert [r["ref"] for r in result(".mine")[1]] == texts(world / "data" / "mine", "test")


@does("eval.py", "llm=HOME/llm2")
def test_an_llm_that_has_moved(score, result, world):
    words = lambda saw: saw.sllama.llm.tok_embeddings.weight
    assert torch.equal(words(score()), 2 * words(score("llm="))) and "llm2" not in result()[0]["llm"]
    score()
    assert f"{world}/llm2" in result()[0]["llm"]


@does("eval.py", "llm_bits=8")
def test_the_bits_of_the_llm_when_it_decodes(score, runs, world):
    for word, dtype in (("8", torch.int8), ("4", torch.uint8), ("16", torch.float32), ("", torch.float32)):
        assert score(f"llm_bits={word}").sllama.llm.layers[0].attention.wq.weight.dtype == dtype
    shutil.copytree(runs / "sft", world / "eight" / "toy" / "sft")
    for state in (world / "eight").rglob("state.json"):
        state.write_text(state.read_text().replace('"llm_bits": 16', '"llm_bits": 8'))
    run = f"ckpt={world}/eight/toy/sft"
    assert score(run, "llm_bits=").sllama.llm.layers[0].attention.wq.weight.dtype == torch.int8


@does("eval.py", "dtype=bfloat16", "device=cuda")
def test_type_and_device(score, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="device=cuda: 0 GPU"):
        score()
    for word, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32), ("auto", torch.float32)):
        sllama = score("device=cpu", f"dtype={word}").sllama
        assert {p.dtype for k, p in sllama.named_parameters() if "lora_" not in k} == {dtype}
        assert sllama.mean.dtype == torch.float32 and not sllama.training

# ---------------------------------------------------------------------------------------------------------------------
# lora.py


@does("lora.py", "ckpt=HOME/base/toy/sft/last", "to=HOME/merged", "llm=HOME/llm2")
def test_merging_adds_the_run_s_lora_to_the_llm(request, world, runs, monkeypatch):
    words = [word.replace("HOME", str(world)) for word in request.function.words]
    for to, llm, checkpoint in (("merged", "llm2", "last"), ("merged_best", "data/toy/llm", "best")):
        more = [] if to == "merged" else [f"ckpt={world}/base/toy/sft", f"to={world}/{to}", "llm="]
        call(monkeypatch, lora.main, "merge", *words, *more)
        delta = load_file(world / "base" / "toy" / "sft" / checkpoint / "adapter_model.safetensors")
        a, b = (delta[f"base_model.model.model.layers.1.self_attn.v_proj.lora_{m}.weight"] for m in "AB")
        before, after = (LLaMA.from_pretrained(str(world / f)).layers[1].attention.wv.weight for f in (llm, to))
        assert torch.allclose(after, before + 16 / 8 * b @ a, atol=1e-6) and not torch.equal(after, before)

# ---------------------------------------------------------------------------------------------------------------------
# data.py, on three clips of ten frames at 25 a second


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    for n, name in enumerate("abc"):
        write_mp4(str(root / f"{name}.mp4"), np.random.default_rng(n).integers(0, 256, (10, 48, 48, 3), np.uint8))
    (root / "clips.tsv").write_text("file\ttext\tsplit\na.mp4\tja\ttrain\nb.mp4\tnein\tdev\nc.mp4\tdoch\ttest\n")
    return root


@pytest.fixture
def make(request, films, tmp_path, monkeypatch, capsys):
    """A function of words: data.main() with the test's words and these -> what lies in data_dir/own."""
    def go(*words):
        words = [word.replace("HERE", str(tmp_path)) for word in (*request.function.words, *words)]
        call(monkeypatch, data.main, "dataset=own", f"root={films}", f"data_dir={tmp_path}/data", "workers=0",
             "backbone=toycnn", *words)
        return tmp_path / "data" / "own"
    return go


def settings(folder, backbone="toycnn", split="train"):
    return json.loads(Store(str(folder / backbone / f"{split}.safetensors")).metadata["settings"])


def films_of(root, name, texts):
    """A folder of own clips with no column split: folders of one picture each."""
    from PIL import Image
    root.mkdir()
    for n, text in enumerate(texts):
        (root / f"{name}{n}").mkdir()
        Image.fromarray(np.full((16, 16, 3), n, np.uint8)).save(root / f"{name}{n}" / "1.png")
    (root / "clips.tsv").write_text("file\ttext\n" + "".join(f"{name}{n}\t{text}\n" for n, text in enumerate(texts)))


@does("data.py", "dataset=mine", "data_dir=HERE/elsewhere", "root=HERE/root")
def test_where_the_common_form_comes_from_and_goes_to(make, tmp_path):
    films_of(tmp_path / "root", "x", ["ja"])
    make()
    assert not (tmp_path / "data").exists() and [p.name for p in (tmp_path / "elsewhere").iterdir()] == ["mine"]
    assert [(r["name"], r["text"]) for r in rows(tmp_path / "elsewhere" / "mine" / "train.jsonl")] == [("x0", "ja")]


@does("data.py", "ratio=0.5,0.3,0.2")
def test_shares_of_the_splits(make, tmp_path):
    films_of(tmp_path / "root", "x", ["ja"] * 20)
    count = lambda folder: [len(rows(folder / f"{split}.jsonl")) for split in ("train", "dev", "test")]
    assert count(make("root=HERE/root")) == [10, 6, 4]
    assert count(make("root=HERE/root", "ratio=0.8,0.1,0.1")) == [16, 2, 2]


@does("data.py", "strict=false")
def test_broken_clips(make, films, tmp_path):
    shutil.copytree(films, tmp_path / "root")
    table = (films / "clips.tsv").read_text()
    (tmp_path / "root" / "clips.tsv").write_text(table + "d.mp4\tweg\ttrain\n")
    with pytest.raises(BadInput, match="1 clip"):
        make("root=HERE/root", "strict=true")
    folder = make("root=HERE/root")
    assert [r["name"] for r in rows(folder / "train.jsonl")] == ["a"]
    assert "clip d: " in (folder / "problems.txt").read_text()
    (tmp_path / "root" / "d.mp4").write_bytes(b"no video")
    with pytest.raises(BadInput, match="d.mp4"):  # that is only noticed when it is decoded
        make("root=HERE/root", "strict=true")
    assert [r["name"] for r in rows(make("root=HERE/root") / "train.jsonl")] == ["a"]


@does("data.py", "backbone=googlenet", "weights=HERE/cnn.safetensors")
def test_the_cnn_and_its_weights(make, tmp_path, monkeypatch):
    nets = []

    def compute(self, batch):  # the real one would take a second
        nets.append(self.cnn)
        return np.zeros((len(batch), 4), np.float16)

    monkeypatch.setattr(Extractor, "compute", compute)
    want = he_init(GoogLeNet(), seed=7).state_dict()
    save_file(want, tmp_path / "cnn.safetensors")
    folder = make()
    assert all(torch.equal(t, want[k]) for k, t in nets[-1].state_dict().items())
    assert settings(folder, "googlenet")["weights"] == f"{tmp_path}/cnn.safetensors"
    make("weights=random")
    assert not torch.equal(nets[-1].conv1.conv.weight, want["conv1.conv.weight"])
    make("backbone=toycnn", "weights=")
    assert type(nets[-1]) is RandomCNN


@does("data.py", "fps=12.5")
def test_clips_are_resampled(make):
    folder = make()
    assert rows(folder / "train.jsonl")[0]["frames"] == 5 and settings(folder)["fps"] == 12.5
    folder = make("fps=0")
    assert rows(folder / "train.jsonl")[0]["frames"] == 10 and settings(folder)["fps"] == 25


@does("data.py", "features=HERE/ready/{split}")
def test_ready_features(make, tmp_path):
    x = {split: np.random.default_rng(len(split)).standard_normal((10, 6)) for split in ("train", "dev", "test")}
    for split, name in (("train", "a"), ("dev", "b"), ("test", "c")):
        (tmp_path / "ready" / split).mkdir(parents=True)
        np.save(tmp_path / "ready" / split / f"{name}.npy", x[split])
    for label, words in (("imported", ()), ("theirs", ["backbone=theirs"])):
        folder = make(*words)
        assert torch.equal(load_file(folder / label / "dev.safetensors")["b"], torch.tensor(x["dev"]).half())
        assert settings(folder, label)["imported"]
    assert not (folder / "toycnn").exists()


@does("data.py", "reader=slt", "sigma=2")
def test_the_reader_and_the_noise_of_stand_ins(make, tmp_path):
    for split in ("train", "dev", "test"):
        entry = {"name": f"{split}/a{split}", "signer": "S", "gloss": "JA", "text": "ja .", "sign": torch.zeros(3, 5),
                 "alignments": {f"pami{i}": "1 1 2" for i in range(3)}}
        (tmp_path / f"phoenix14t.pami0.{split}").write_bytes(gzip.compress(pickle.dumps([entry])))
    how = ["root=HERE", "features=states"]

    def made(sigma):
        folder = make(*how, f"backbone=s{sigma}", f"sigma={sigma}")
        return load_file(folder / f"s{sigma}" / "train.safetensors")["atrain"].float()

    two, one, none = made(2), made(1), made(0)
    assert torch.allclose(two - none, 2 * (one - none), atol=0.02) and torch.equal(none[0], none[1])
    assert abs((one - none).std() - 1) < 0.05
    assert "sigma=2" in settings(make(*how), "standin")["standin"]
    assert rows(make(*how) / "train.jsonl")[0]["text"] == "ja"
    with pytest.raises(BadInput, match="clips.tsv"):
        make("root=HERE", "reader=")  # dataset=own is the name of no form


@does("data.py", "workers=2")
def test_processes_that_decode(make, monkeypatch):
    started, real = [], torch.utils.data.DataLoader.__init__

    def init(self, *args, **how):
        started.append(how["num_workers"])
        real(self, *args, **how)

    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", init)
    make(), make("workers=0", "fps=5")
    assert started == [2, 0]


@does("data.py", "device=cuda")
def test_where_the_cnn_runs(make, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="device=cuda: 0 GPU"):
        make()
    assert make("device=cpu").exists() and make("device=auto").exists()


@does("data.py", "reader=phoenix14t")
@pytest.mark.parametrize("reader, rate", [("phoenix14t", 25.0), ("csl_daily", 30.0)])
def test_the_rate_of_folders_of_frames_is_the_data_set_s(make, tmp_path, reader, rate):
    """Frames in a folder carry no times: the store must say how fast they were filmed, and half of that halves them."""
    films_of(tmp_path / "frames", "f", ["ja"])
    labels, name = tmp_path / "root", "S000000_P0000_T00"
    home = {"phoenix14t": "features/fullFrame-210x260px/train", "csl_daily": "sentence/frames_512x512"}[reader]
    clip = labels / home / name
    clip.mkdir(parents=True)
    for n in range(6):
        shutil.copy(tmp_path / "frames" / "f0" / "1.png", clip / f"{n}.png")
    if reader == "phoenix14t":
        (labels / "annotations/manual").mkdir(parents=True)
        table = f"name|video|start|end|speaker|orth|translation\n{name}|x|-1|-1|S|JA|ja\n"
        (labels / "annotations/manual/PHOENIX-2014-T.train.corpus.csv").write_text(table)
    else:
        (labels / "sentence_label").mkdir()
        info = [{"name": name, "label_char": ["好"], "label_gloss": ["好"], "length": 6}]
        (labels / "sentence_label/csl2020ct_v2.pkl").write_bytes(pickle.dumps({"info": info}))
        (labels / "sentence_label/split_1.txt").write_text(f"name|split\n{name}|train\n")
    folder = make("root=HERE/root", f"reader={reader}")
    assert settings(folder)["fps"] == rate and rows(folder / "train.jsonl")[0]["frames"] == 6
    folder = make("root=HERE/root", f"reader={reader}", f"fps={rate / 2}")
    assert rows(folder / "train.jsonl")[0]["frames"] == 3
    again = open_extractor(settings(folder), device="cpu")  # as eval.py has it for video=
    assert again.rate_of(str(clip)) == rate and len(again(str(clip))) == 3

# ---------------------------------------------------------------------------------------------------------------------
# The paper's settings, and what `auto` means


NEUTRAL = {
    "train.py": dict(
        llm="", run="", init_from="", resume=False, estimate=False, bos_id=-1, eos_id=-1, ltn=True, lora_dropout=0,
        max_clips=0, max_frames=0, concat=0, lang="", label_smoothing=0, grad_accum=1, max_steps=-1, device="auto",
        dtype="auto", compile=False, activation_checkpointing=False, cpu_offload=False, eval_every=0, eval_clips=-1,
        save_every=0, keep=1, stage="align", window=8, adaptor="mlp", lora_rank=8, lora_targets="wq,wk,wv,wo"),
    "eval.py": dict(
        ckpt="", split="test", beams="", length_penalties="", control="none", video="", videos="", hyps="",
        refs="", against="", lang="", dataset="", data_dir="", backbone="", weights="", llm="", bos_id=-1, eos_id=-1,
        dtype="auto", device="auto"),
    "data.py": dict(
        dataset="", root="", reader="", strict=True, backbone="", weights="", fps=0, ratio="0.8,0.1,0.1",
        features="", device="auto")}


@pytest.mark.parametrize("program", NEUTRAL)
def test_what_nobody_asks_for_is_not_done(program):
    page = {key: value for key, (value, _) in read_literals(str(ROOT / program)).items()}
    assert {key: page[key] for key in NEUTRAL[program]} == NEUTRAL[program]


PROMPT = "[INST] <sign> {clip} </sign> \n Translate the sign language into {language} text. [/INST]"
PAPER = dict(
    backbone="googlenet", ltn=True, ltn_dim=1024, window=8, adaptor="mlp", lora_rank=8, lora_targets="wq,wk,wv,wo")
STAGES = {
    "align": dict(epochs=3, batch_size=4, frame_drop=0.1, train_ltn=True, freeze_llm=True, train_embeddings=False,
                  prompt="{clip}"),
    "sft": dict(epochs=2, batch_size=2, train_ltn=False, freeze_llm=False, train_embeddings=True, prompt=PROMPT)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["phoenix14t_7b", "csl_daily_7b"])
def test_the_paper_s_values(name, stage):
    words = [str(ROOT / "config" / f"{name}.py"), f"stage={stage}"]
    cfg, want = vars(configure(str(ROOT / "train.py"), words, stages=("align", "sft"))), PAPER | STAGES[stage]
    assert {key: cfg[key] for key in want} == want


@pytest.mark.parametrize("dataset, language", [("phoenix14t", "German"), ("csl_daily", "Chinese")])
def test_a_data_set_s_settings_differ_by_the_llm_alone(dataset, language):
    def said(name):
        return {k: v for k, (v, _) in read_literals(str(ROOT / "config" / f"{name}.py"), strict=True).items()}

    small, large, german = said(f"{dataset}_7b"), said(f"{dataset}_13b"), said("phoenix14t_7b")
    assert (small["dataset"], small["language"], small["llm"]) == (dataset, language, "weights/llama-2-7b")
    assert large == small | {"llm": "weights/llama-2-13b", "activation_checkpointing": True}
    assert small == german | {"dataset": dataset, "language": language}


@pytest.mark.parametrize("gpus, processes, auto, cuda", [
    (0, 1, "cpu", None), (1, 1, "cuda:0", "cuda:0"), (1, 2, "cpu", None), (2, 1, "cuda:0", "cuda:0"),
    (2, 2, "cuda:1", "cuda:1")])
def test_a_gpu_is_taken_where_there_is_one_for_each_process(monkeypatch, gpus, processes, auto, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus or 1)  # one that cannot be used is counted too
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_RANK", str(processes - 1))
    torch.backends.cuda.enable_cudnn_sdp(True)
    assert str(pick_device("auto")[0]) == auto and pick_device("cpu")[0] == torch.device("cpu")
    # ragged clips: cuDNN's attention would make a plan for every length
    assert torch.backends.cuda.cudnn_sdp_enabled() == (auto == "cpu")
    if cuda:
        assert str(pick_device("cuda")[0]) == cuda
    else:
        with pytest.raises(BadInput, match=rf"device=cuda: {gpus} GPU\(s\) for {processes} process"):
            pick_device("cuda")


def test_bfloat16_is_taken_where_the_gpu_has_it_itself(monkeypatch):
    """An older GPU emulates it, more slowly than float32."""
    has = {"itself": False, "emulated": True}
    supported = lambda including_emulation=True: has["itself"] or (including_emulation and has["emulated"])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    gpu = torch.device("cuda", 0)
    assert pick_dtype("auto", gpu)[0] == torch.float32
    has["itself"] = True
    assert pick_dtype("auto", gpu)[0] == torch.bfloat16


@pytest.mark.parametrize("has", ["avx512_bf16", "amx_bf16"])
def test_bfloat16_is_taken_on_a_cpu_that_multiplies_in_it_and_gains(monkeypatch, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: True, "avx512_f": True})
    cpu = torch.device("cpu")
    assert pick_dtype("auto", cpu, 50_000_000)[0] == torch.bfloat16
    dtype, why = pick_dtype("auto", cpu, 49_999_999)
    assert dtype == torch.float32 and why == "auto: a CPU, and an LLM of less than 50M parameters"
    assert pick_dtype("auto", cpu)[0] == torch.float32  # a CNN
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {has: False, "avx512_f": True})
    assert pick_dtype("auto", cpu, 7_000_000_000) == (torch.float32, "auto: a CPU without bfloat16")
    for name in ("float32", "bfloat16", "float16"):
        assert pick_dtype(name, cpu)[0] == getattr(torch, name)
