"""
Which of several files and scores is taken: the best checkpoint, the newest run, the setting that won on dev, the name
of a file that is written; and which of several answers decoding takes.

    python -m pytest tests/test_choices.py
"""
import hashlib
import json
import math
import os
import shutil
import signal
import sys
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from data import pack
from eval import translate
from lib.controls import baselines
from lib.program import BadInput, Signals, run_program, summed
from lib.scores import bleu, report, rouge
from model import SLLaMA, generate


def rows(data, split):
    return [json.loads(line) for line in open(data / f"{split}.jsonl")]


def state(checkpoint):
    return json.load(open(checkpoint / "state.json"))


def log(folder):
    return [json.loads(line) for line in open(folder / "log.jsonl")]


def bleu4(hyps, refs, order=4, tokenize="13a"):
    return sacrebleu.metrics.BLEU(tokenize=tokenize, max_ngram_order=order).corpus_score(hyps, [refs]).score


def without(n):
    """A sentence whose last n words are wrong."""
    return lambda text: " ".join(text.split()[:-n] + ["x"] * n)


def shorter(n):
    """A sentence that lacks its last n words."""
    return lambda text: " ".join(text.split()[:-n])


def backwards(text):
    """BLEU-1 takes it for perfect, BLEU-4 for worthless."""
    return " ".join(reversed(text.split()))


class Oracle:
    """
    Stands in the place of translate. It knows whose features it is given, and says what answer(row, how) makes of them;
    "?" for a stranger's.
    .calls: for each call, the splits of the clips, their names, the features and how to decode them.
    """

    def __init__(self, data, answer):
        self.answer, self.calls, self.known = answer, [], {}
        for split in ("train", "dev", "test"):
            store = load_file(data / "toycnn" / f"{split}.safetensors")
            self.known |= {store[row["name"]].numpy().tobytes(): row | {"split": split} for row in rows(data, split)}

    def __call__(self, sllama, features, tokenizer, beam=4, length_penalty=1.0, max_new_tokens=200, batch_size=16,
                 progress=None, warn=True, stop=()):
        how = SimpleNamespace(beam=beam, length_penalty=length_penalty, max_new_tokens=max_new_tokens,
                              batch_size=batch_size, features=features)
        found = [self.known.get(f.numpy().tobytes()) for f in features]
        how.splits, how.names = {row and row["split"] for row in found}, [row and row["name"] for row in found]
        self.calls.append(how)
        return [self.answer(row, how) if row else "?" for row in found]


# ---------------------------------------------------------------------------------------------------------------------
# Training: which step is the best

@pytest.mark.long
def test_best_is_the_step_of_the_best_bleu_4(train_here, home, monkeypatch):
    """Among better BLEU-1, equal scores and later steps; and a resumed run remembers it."""
    said = {1: shorter(4), 2: without(1), 3: without(1), 4: backwards, 5: without(2), 6: str}
    oracle = Oracle(home / "data" / "toy", lambda row, how: said[len(oracle.calls)](row["text"]))
    monkeypatch.setattr(train, "translate", oracle)
    args = ["eval_clips=3", "eval_every=1", "save_every=1", "beam=3"]
    run = train_here("bleu", *args, "keep=3", "max_steps=4") / "align"
    refs = [row["text"] for row in rows(home / "data" / "toy", "dev")[:3]]
    by_hand = {step: [bleu4([change(r) for r in refs], refs, n) for n in (1, 2, 3, 4)] for step, change in said.items()}
    assert by_hand[4][0] == pytest.approx(100) and by_hand[1][3] < by_hand[5][3] < by_hand[2][3] < 100

    assert state(run / "best")["step"] == 2 and state(run / "last")["step"] == 4
    assert state(run / "best")["best"] == state(run / "last")["best"] == pytest.approx(by_hand[2][3])
    of_step_2 = load_file(run / "last.2" / "vision.safetensors")
    assert all(torch.equal(w, of_step_2[k]) for k, w in load_file(run / "best" / "vision.safetensors").items())
    # nobody goes on from it: no moments
    assert {p.name for p in (run / "best").iterdir()} == {"state.json", "vision.safetensors"}

    train_here("bleu", *args, "max_steps=5", "resume=true")
    assert state(run / "best")["step"] == 2 and state(run / "last")["step"] == 5
    assert state(run / "last")["best"] == pytest.approx(by_hand[2][3])
    train_here("bleu", *args, "max_steps=6", "resume=true")
    assert state(run / "best")["step"] == 6 and state(run / "last")["best"] == pytest.approx(100)
    trained, scored = ([e for e in log(run) if ("dev_bleu" in e) == of_dev] for of_dev in (False, True))
    assert [e["step"] for e in trained] == [e["step"] for e in scored] == [*said]
    assert [e["dev_bleu"] for e in scored] == [pytest.approx(by_hand[step]) for step in said]
    assert scored[0]["dev_rouge"] == pytest.approx(rouge([said[1](r) for r in refs], refs, "de"))

    # how it was decoded: beam= wide, and no further than twice the longest sentence of dev
    words = train.Tokenizer(f"{home}/data/toy/llm")
    longest = max(len(words.encode(row["text"])) for row in rows(home / "data" / "toy", "dev"))
    assert {(call.beam, call.max_new_tokens) for call in oracle.calls} == {(3, 2 * longest)}
    assert all(sorted(call.names) == ["00020", "00021", "00022"] for call in oracle.calls)


def test_without_decoding_best_is_the_lowest_dev_loss(train_here, monkeypatch):
    losses, real = iter([3.0, 2.0, 2.0, 2.5]), SLLaMA.forward

    def forward(self, batch):
        loss, n = real(self, batch)
        return (loss, n) if self.training else (torch.tensor(n * next(losses)), n)

    monkeypatch.setattr(SLLaMA, "forward", forward)
    monkeypatch.setattr(train, "translate", lambda *a, **k: pytest.fail("eval_clips=0 asks for no decoding"))
    run = train_here("loss", "eval_clips=0", "eval_every=1", "max_steps=4") / "align"
    assert [e["dev_loss"] for e in log(run) if "loss" not in e] == [3.0, 2.0, 2.0, 2.5]
    assert not any("dev_bleu" in e for e in log(run)) and len(log(run)) == 8
    assert state(run / "best")["step"] == 2 and state(run / "best")["best"] == state(run / "last")["best"] == -2.0


def test_without_a_look_at_dev_the_last_is_taken(train_here, home, monkeypatch, capsys):
    """Because none is wanted, or because there is no dev split."""
    without_dev = home / "data" / "nodev"
    shutil.copytree(home / "data" / "toy", without_dev, dirs_exist_ok=True)
    (without_dev / "dev.jsonl").unlink(missing_ok=True)
    for out, args in (("unasked", ["eval_every=-1"]), ("nodev", ["dataset=nodev", f"llm={home}/data/toy/llm"])):
        train_here(out, *args, "max_steps=1")
        run = home / out / ("nodev" if out == "nodev" else "toy") / "align"
        assert "eval.py takes last/" in capsys.readouterr().out
        assert {p.name for p in run.iterdir()} == {"config.json", "last", "log.jsonl"}
        monkeypatch.setattr(evaluation, "translate", lambda sllama, features, *a, **k: ["x"] * len(features))
        monkeypatch.setattr(sys, "argv", ["eval.py", f"ckpt={run}"])
        evaluation.main()
        assert json.load(open(run / "scores.json"))["checkpoint"] == str(run / "last")


# ---------------------------------------------------------------------------------------------------------------------
# Saving: what lies on the disk, and when

def test_nothing_takes_its_place_before_it_is_on_the_disk(train_here, home, monkeypatch):
    """
    A file is synced before it is renamed, the folder that holds its name after that; the old checkpoint goes only then.
    So a power cut at any moment leaves a whole one.
    """
    train_here("disk", "stage=align", "max_steps=1")
    done, sizes = [], {}

    def sync(f):
        path = os.readlink(f"/proc/self/fd/{f}")
        sizes[path.replace(".part", "")] = os.fstat(f).st_size  # what of it has left the buffers
        return "sync", path

    real = {(os, "fsync"): sync, (os, "rename"): lambda a, b: ("move", a, b),
            (os, "replace"): lambda a, b: ("move", a, b),
            (shutil, "rmtree"): lambda path, **k: ("gone", path)}
    for (module, name), event in real.items():
        def recorded(*args, call=getattr(module, name), event=event, **kwargs):
            if os.path.exists(args[0]) if isinstance(args[0], str) else True:
                done.append(event(*args, **kwargs))
            return call(*args, **kwargs)
        monkeypatch.setattr(module, name, recorded)
    run = train_here("disk", "stage=sft", "max_steps=2", "save_every=1", "eval_every=-1") / "sft"
    at = [i for i, e in enumerate(done) if e[0] == "move" and e[1].endswith(".part")]
    names = ("config.json", "log.jsonl", "last", "last")
    assert [done[i][1:] for i in at] == [(f"{run}/{f}.part", f"{run}/{f}") for f in names]

    for i in at[:2]:  # a file
        assert done[i - 1:i + 2] == [("sync", done[i][1]), done[i], ("sync", str(run))]
    files = {"vision.safetensors", "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors",
             "state.json"}
    assert {p.name for p in (run / "last").iterdir()} == files
    assert all(sizes[str(p)] == p.stat().st_size for p in [run / "config.json", *(run / "last").iterdir()])
    first, second = done[at[1] + 2:at[2] + 2], done[at[2] + 2:]
    assert set(first[:5]) == {("sync", f"{run}/last.part/{f}") for f in files}  # no moment and no adapter is forgotten
    part = ("sync", f"{run}/last.part") if first[5][1] == f"{run}/last.part" else ("sync", f"{run}/last.part/")
    assert first[5:] == [part, ("move", f"{run}/last.part", f"{run}/last"), ("sync", str(run))]
    assert set(second[:5]) == set(first[:5])
    aside, gone = ("move", f"{run}/last", f"{run}/last.1"), ("gone", f"{run}/last.1")
    assert second[5:] == [part, aside, first[6], ("sync", str(run)), gone]


def test_what_a_checkpoint_says_of_itself(train_here, home, capsys):
    run = train_here("says", "max_steps=2", "keep=2", "save_every=1", "eval_every=-1") / "align"
    assert {p.name for p in run.iterdir()} == {"config.json", "last", "last.1", "log.jsonl"}
    assert state(run / "last.1")["step"] == 1
    found, config = state(run / "last"), json.load(open(run / "config.json"))
    assert {k: v for k, v in found.items() if k not in ("config", "extractor", "clips", "code")} == {
        "step": 2, "best": None, "skipped": 0, "scored": 0, "dim_in": 1024}
    files = ["train.py", "eval.py", "model.py", "lora.py", "data.py", *(f"lib/{p.name}" for p in ROOT.glob("lib/*.py"))]
    assert found["code"] == {f: hashlib.sha256((ROOT / f).read_bytes()).hexdigest()[:12] for f in files}
    assert found["config"] | {"versions": config["versions"]} == config
    assert config["keep"] == 2 and config["versions"]["processes"] == 1
    store = load_file(home / "data" / "toy" / "toycnn" / "train.safetensors")
    assert found["clips"] == f"20 clips of {sum(map(len, store.values()))} frames"
    assert found["extractor"]["backbone"] == "toycnn" and found["extractor"]["fps"] == 25

    shutil.rmtree(run / "last.1")
    os.rename(run / "last", run / "last.1")  # a kill between two renames
    train_here("says", "max_steps=3", "keep=0", "eval_every=-1", "resume=true")
    assert "going on at step 2" in capsys.readouterr().out
    assert [e["step"] for e in log(run)] == [1, 2, 3]
    assert state(run / "last")["step"] == 3 and not (run / "last.1").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: which checkpoint, which file

@pytest.fixture(scope="module")
def trained(home):
    """An sft run whose best/ is of step 1 and whose last/ is of step 2; half of what enters its LoRA is dropped."""
    with pytest.MonkeyPatch.context() as m:
        for stage in ("align", "sft"):
            m.setattr(sys, "argv", ["train.py", f"data_dir={home}/data", f"out_dir={home}/trained", *SMALL,
                                    f"stage={stage}", "max_steps=2", "lora_dropout=0.5", "eval_every=1"])
            # no step is better than the first
            m.setattr(train, "translate", lambda model, features, *a, **k: ["x"] * len(features))
            train.main()
    return home / "trained" / "toy" / "sft"


@pytest.fixture
def run(trained, tmp_path):
    """A copy of it, to write into."""
    return shutil.copytree(trained, tmp_path / "out" / "toy" / "sft")


@pytest.fixture
def evaluate(home, monkeypatch):
    """
    A function of (*args, answer=(row, how) -> sentence): eval.main() with an Oracle for the model -> its calls.
    Left to itself it says a clip's name.
    """
    def call(*args, answer=lambda row, how: row["name"]):
        oracle = Oracle(home / "data" / "toy", answer)
        with monkeypatch.context() as m:
            m.setattr(evaluation, "translate", oracle)
            m.setattr(sys, "argv", ["eval.py", *args])
            evaluation.main()
        return oracle.calls
    return call


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("there, taken", [
    (["best", "last"], "best"), (["last"], "last"), (["best"], "best"), (["best.1", "last"], "best.1"),
    (["best", "best.1", "last", "last.1"], "best"), (["last", "last.1"], "last"), (["last.1"], "last.1"),
    (["best.1", "last.1"], "best.1"), ([".", "best", "last"], "."), (["last", "last.2"], "last")], ids=str)
def test_which_checkpoint_of_a_run(tmp_path, there, taken):
    """best/ before last/, and what a kill between two renames has left for what is not there."""
    for folder in there:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "state.json").write_text("{}")
    (tmp_path / "best").mkdir(exist_ok=True)  # an empty folder is no checkpoint
    found = evaluation.find_checkpoint(str(tmp_path))
    assert os.path.realpath(found) == os.path.realpath(tmp_path / taken) and not found.endswith("/")


def test_a_folder_without_a_checkpoint(tmp_path):
    with pytest.raises(BadInput, match="holds no checkpoint"):
        evaluation.find_checkpoint(str(tmp_path))


def test_the_newest_run_is_the_one_whose_checkpoint_is_the_newest(evaluate, run, tmp_path):
    """Whatever it is called, wherever it stands below out_dir, and whatever was written into its folder since."""
    for name, age in (("out/toy/old", 300), ("out/toy/new", 100), ("out/zzz", 200)):
        for n, checkpoint in enumerate(("best", "last")):
            copied = shutil.copytree(run / checkpoint, tmp_path / name / "sft" / checkpoint)
            os.utime(copied / "state.json", (10**9 - age + n,) * 2)
    os.utime(tmp_path / "out" / "toy" / "old" / "sft")
    shutil.copytree(run / "last", tmp_path / "out" / "zzz" / "align" / "last")  # newer, but no sft run
    shutil.rmtree(run)
    evaluate(f"out_dir={tmp_path}/out")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("scores.json")] == ["out/toy/new/sft/scores.json"]
    with pytest.raises(BadInput, match="no sft run"):
        evaluate(f"out_dir={tmp_path}/out/toy/new/sft/best")


def test_no_score_is_written_over_another(evaluate, run, home):
    """What is not the test split of the run's own data set with its own clips goes by another name, and says so."""
    shutil.copytree(home / "data" / "toy", home / "data" / "other", dirs_exist_ok=True)
    cases = [([], [""]), (["split=dev"], [".dev"]), (["split=train"], [".train"]),
             (["control=shuffle"], [".shuffle"]), (["control=blank"], [".blank"]),
             (["dataset=other"], [".other"]), (["split=dev", "control=noise"], [".dev.noise"]),
             (["dataset=other", "split=dev", "control=shuffle"], [".other.dev.shuffle"]),
             (["split=train", "control=all"], [".train", ".train.shuffle", ".train.blank", ".train.noise"])]
    for args, marks in cases:
        before = contents(run)
        evaluate(f"ckpt={run}", *args)
        after = contents(run)
        written = {f for f in after if after[f] != before.get(f)}
        allowed = {f"{f}{m}.{end}" for m in marks for f, end in (("hyps", "jsonl"), ("scores", "json"))}
        assert allowed >= written >= after.keys() - before.keys(), args
        for mark in marks:
            said = json.loads(after[f"scores{mark}.json"])
            split = next((s for s in ("dev", "train") if s in mark), "test")
            control = next((c for c in ("shuffle", "blank", "noise") if c in mark), "none")
            data = "other" if "other" in mark else "toy"
            assert (said["split"], said["control"], said["dataset"]) == (split, control, data)
            lines = [json.loads(line) for line in after[f"hyps{mark}.jsonl"].splitlines()]
            own = [(row["name"], row["text"]) for row in rows(home / "data" / "toy", split)]
            assert [(line["name"], line["ref"]) for line in lines] == own
            own = [line["hyp"] == line["name"] for line in lines]
            assert all(own) if control == "none" else not any(own)
    plain = contents(run)
    evaluate(f"ckpt={run}", "dataset=toy", "split=test")  # to say what is so anyway changes no name
    assert contents(run).keys() == plain.keys()


@pytest.mark.parametrize("named, taken", [("", "best"), ("/", "best"), ("/best", "best"), ("/last", "last"),
                                          ("/last/", "last"), ("/last.1", "last.1"), ("/last.1/", "last.1")])
def test_scores_stand_in_the_run_whichever_checkpoint_was_named(evaluate, run, named, taken):
    shutil.copytree(run / "last", run / "last.1")
    before = contents(run)
    evaluate(f"ckpt={run}{named}")
    assert contents(run).keys() - before.keys() == {"hyps.jsonl", "scores.json"}
    found = json.load(open(run / "scores.json"))
    assert found["step"] == (1 if taken == "best" else 2) and found["checkpoint"] == f"{run}/{taken}"


def test_digests_of_all_that_a_score_hangs_on(evaluate, run, home):
    """The sentences, the features and the checkpoint's weights; the moments of the optimizer say nothing about it."""
    evaluate(f"ckpt={run}/last", "split=dev")
    found = json.load(open(run / "scores.dev.json"))
    data = home / "data" / "toy"
    files = [data / "dev.jsonl", data / "toycnn" / "dev.safetensors", run / "last" / "vision.safetensors",
             run / "last" / "adapter_model.safetensors"]
    assert found["sha256"] == {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
    assert found["references"].startswith(str(data / "dev.jsonl")) and found["clips"] == 4
    assert "4 layers of width 128" in found["llm"]


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: the model

def test_a_loaded_model_drops_nothing_out(trained, home):
    sllama, tokenizer, cfg = evaluation.load_model(str(trained), device="cpu")
    dropouts = [m.p for m in sllama.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(dropouts) == {0.0, 0.5} and not any(m.training for m in sllama.modules())
    assert not any(p.requires_grad for p in sllama.parameters())
    clips = evaluation.Clips(cfg, "dev")
    batch = pack([clips.sample(i, ([], []), tokenizer) for i in range(3)])
    assert sllama(batch)[0].item() == sllama(batch)[0].item() != sllama.train()(batch)[0].item()


def test_an_adapter_that_is_missing_is_refused(evaluate, run, trained):
    (run / "best" / "adapter_config.json").unlink()
    with pytest.raises(BadInput, match="best: has no adapter_config.json"):
        evaluate(f"ckpt={run}")
    evaluate(f"ckpt={run}/last")  # this one has its own
    align = trained.parent / "align"
    evaluate(f"ckpt={align}")  # and this one never had a LoRA
    assert json.load(open(align / "scores.json"))["exact"] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: how it decodes

def sentences(data, split):
    return [row["text"] for row in rows(data, split)]


def test_the_setting_is_chosen_on_dev_by_bleu_4_and_decodes_the_split(evaluate, run, home, capsys):
    made_up = {(1, 0.0): without(3), (1, 2.0): backwards, (5, 0.0): without(1), (5, 2.0): without(2)}
    # on test it is the other way round: who looked there would choose another
    upside_down = dict(zip(made_up, [str, without(1), without(4), without(2)]))
    setting = lambda how: (how.beam, how.length_penalty)
    answer = lambda row, how: {"dev": made_up, "test": upside_down}[row["split"]][setting(how)](row["text"])
    calls = evaluate(f"ckpt={run}", "beams=1,5", "length_penalties=0,2", "max_new_tokens=77", "batch_size=3",
                     answer=answer)
    assert [(call.splits, *setting(call)) for call in calls] == [*(({"dev"}, *s) for s in made_up), ({"test"}, 5, 0.0)]
    assert {(call.max_new_tokens, call.batch_size, len(call.names)) for call in calls} == {(77, 3, 4)}
    found = json.load(open(run / "scores.json"))
    dev, test = (sentences(home / "data" / "toy", split) for split in ("dev", "test"))
    assert found["decoding"] == {"beam": 5, "length_penalty": 0.0, "max_new_tokens": 77, "batch_size": 3}
    assert found["sweep"] == [
        {"beam": b, "length_penalty": p, "dev_bleu4": pytest.approx(bleu4(list(map(change, dev)), dev))}
        for (b, p), change in made_up.items()]
    assert found["bleu"][3] == pytest.approx(bleu4(list(map(without(4), test)), test))
    said = capsys.readouterr().out
    for s in found["sweep"]:
        assert f"dev, beam {s['beam']}, length penalty {s['length_penalty']:g}: BLEU-4 {s['dev_bleu4']:.2f}\n" in said


@pytest.mark.parametrize("args, tried, taken", [
    (["beams=3,2"], [(3, 1.0), (2, 1.0)], (3, 1.0)),  # equally good: the first
    (["beams=2", "length_penalty=0.5", "beam=7"], [(2, 0.5)], (2, 0.5)),
    (["length_penalties=0.5,0", "beam=7"], [(7, 0.5), (7, 0.0)], (7, 0.5)),
    ([], [], (4, 1.0)), (["beam=1", "length_penalty=0"], [], (1, 0.0))], ids=str)
def test_what_is_tried_and_what_is_not(evaluate, run, args, tried, taken):
    calls = evaluate(f"ckpt={run}", *args, answer=lambda row, how: row["text"])
    expected = [*(({"dev"}, *t) for t in tried), ({"test"}, *taken)]
    assert [(call.splits, call.beam, call.length_penalty) for call in calls] == expected
    assert json.load(open(run / "scores.json"))["exact"] == 100


@pytest.mark.parametrize("language, lang, args, code, tokens", [
    ("German", "", [], "de", "13a"), ("Chinese", "", [], "zh", "char"), ("English", "", [], "en", "13a"),
    ("German", "th", [], "th", "char"),
    ("German", "th", ["lang=en"], "en", "13a"), ("Klingon", "", ["lang=ja"], "ja", "char")])
def test_whose_language_cuts_the_sentences(evaluate, run, home, language, lang, args, code, tokens):
    """eval's own, else the run's, else what the prompt's language is called."""
    changed = state(run / "best")
    changed["config"] |= {"language": language, "lang": lang}
    (run / "best" / "state.json").write_text(json.dumps(changed))
    evaluate(f"ckpt={run}", *args, answer=lambda row, how: without(2)(row["text"]))
    found, refs = json.load(open(run / "scores.json")), sentences(home / "data" / "toy", "test")
    hyps = list(map(without(2), refs))
    assert found["lang"] == code and f"tok:{tokens}" in found["signature"]["bleu"]
    assert f"tok:{'char' if tokens == 'char' else 'space'}" in found["signature"]["rouge"]
    assert found["bleu"][3] == pytest.approx(bleu4(hyps, refs, tokenize=tokens))
    assert found["rouge"] == pytest.approx(rouge(hyps, refs, code))


@pytest.mark.parametrize("lang, apart", [("zh", True), ("yue", True), ("ja", True), ("th", True),
                                         ("de", False), ("en", False), ("ko", False), ("hu", False)])
def test_where_no_spaces_are_written_characters_count(lang, apart):
    """Two of three characters are right, and no word is; spaces that stand between them all the same do not count."""
    expected = 100 * 2 / 3 if apart else 0.0
    assert bleu(["東京晴"] * 2, ["東京雨"] * 2, lang)[0] == pytest.approx(expected)
    for hyp, ref in (("東京晴", "東京雨"), *([("東 京晴", "東京 雨")] if apart else [])):
        assert rouge([hyp], [ref], lang) == pytest.approx(expected)
    assert rouge(["a bc d"], ["a bc e"], lang) == pytest.approx(75 if apart else expected or 100 * 2 / 3)
    signature = report(["東京晴"], ["東京雨"], lang)["signature"]["rouge"]
    assert signature == f"ROUGE-L|F:beta1.2|tok:{'char' if apart else 'space'}|mean:sentence"


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation: controls, baselines, and what is on screen

def test_all_controls_beside_the_model(evaluate, run, home, capsys):
    calls = evaluate(f"ckpt={run}", "control=all", answer=lambda row, how: row["text"])
    data = home / "data" / "toy"
    test, store = rows(data, "test"), load_file(data / "toycnn" / "test.safetensors")
    names, texts = [row["name"] for row in test], [row["text"] for row in test]
    real, shuffled, blank, noise = calls
    assert real.names == names and sorted(shuffled.names) == names
    assert all(a != b for a, b in zip(shuffled.names, names))
    shapes = [store[n].shape for n in names]
    assert [f.shape for f in blank.features] == [f.shape for f in noise.features] == shapes
    assert set(noise.names) == {None}
    assert not any(f.any() for f in blank.features) and all(f.isfinite().all() and f.std() > 0 for f in noise.features)
    (other,) = evaluate(f"ckpt={run}", "control=noise", "seed=5")
    assert (other.features[0] != noise.features[0]).any()
    found = {c: json.load(open(run / f"scores{c and '.'}{c}.json")) for c in ("", "shuffle", "blank")}
    assert [found[c]["exact"] for c in found] == [100, 0, 0] and found["blank"]["bleu"] == [0] * 4
    # what a control scores without looking is no baseline of its own
    assert "baselines" in found[""] and "baselines" not in found["shuffle"]

    said = capsys.readouterr().out
    table = said[said.index("\ntoy test "):].splitlines()[1:]
    marks = ["toy test", "model", '  (" ." appended)', "CONTROL shuffle", "CONTROL blank", "CONTROL noise",
             "nearest training clip", "most frequent sentence", "4 clips, "]
    assert [line[:len(m)] for line, m in zip(table, marks)] == marks and "STAND-IN" not in said
    assert table[1].split() == ["model", *["100.00"] * 6]
    shown = found["shuffle"]
    assert table[3].split()[2:] == [f"{x:.2f}" for x in (*shown["bleu"], shown["rouge"], shown["chrf"])]
    for i in range(3):  # the first three clips, to look at
        assert f"\n{names[i]}\n  reference  {texts[i]}\n  model      {texts[i]}\n" in said
    assert f"\n{names[3]}\n" not in said


def test_a_control_alone(evaluate, run, capsys):
    evaluate(f"ckpt={run}", "control=blank", answer=lambda row, how: pytest.fail("the real features were decoded"))
    said = capsys.readouterr().out
    assert "\nCONTROL blank " in said and "\nmodel " not in said and "nearest training clip" not in said


def test_baselines_by_hand(evaluate, run, home):
    """
    The sentence of the train clip whose mean feature, standardised as the model does it, is the nearest; and the most
    frequent train sentence.
    """
    data = home / "data" / "toy"
    evaluate(f"ckpt={run}")
    found = json.load(open(run / "scores.json"))["baselines"]
    weights = load_file(run / "best" / "vision.safetensors")
    stores = {s: load_file(data / "toycnn" / f"{s}.safetensors") for s in ("train", "test")}
    standard = lambda x: (x.float() - weights["mean"]) / weights["std"]
    mean = lambda split: [standard(stores[split][r["name"]]).mean(0) for r in rows(data, split)]
    texts, refs, known = sentences(data, "train"), sentences(data, "test"), mean("train")
    nearest = [texts[min(range(len(known)), key=lambda j: (x - known[j]).norm())] for x in mean("test")]
    frequent = [max(texts, key=texts.count)] * len(refs)
    for name, hyps in (("nearest training clip", nearest), ("most frequent sentence", frequent)):
        assert found[name]["bleu"] == pytest.approx([bleu4(hyps, refs, n) for n in (1, 2, 3, 4)])
        assert found[name]["rouge"] == pytest.approx(rouge(hyps, refs, "de"))
        assert found[name]["chrf"] == pytest.approx(sacrebleu.corpus_chrf(hyps, [refs]).score)


def test_the_nearest_clip_is_so_by_its_mean_however_long_it_is():
    class Few:
        """Clips as data.Clips shows them, of one feature a frame."""

        def __init__(self, *features):
            self.rows = [{"name": str(f), "text": str(f[0])} for f in features]
            self.features = lambda i: torch.tensor(features[i])[:, None]

        def __len__(self):
            return len(self.rows)

    train, test = Few([1.0], [4.0, 4.0]), Few([1.0, 1.0, 1.0, 1.1], [4.1])
    found = baselines(test, train, torch.zeros(1), torch.ones(1))
    assert found["nearest training clip"] == ["1.0", "4.0"]


def test_stand_in_features_are_named_beside_every_score(evaluate, run, home, capsys):
    """And where there is no train split, there are no baselines, and no error either."""
    standin = shutil.copytree(home / "data" / "toy", home / "data" / "standin", dirs_exist_ok=True)
    (standin / "train.jsonl").unlink(missing_ok=True)
    path = standin / "toycnn" / "test.safetensors"
    save_file(load_file(path), path, metadata={"settings": json.dumps({"standin": "made from alignments"})})
    evaluate(f"ckpt={run}", "dataset=standin")
    said, found = capsys.readouterr().out, json.load(open(run / "scores.standin.json"))
    assert "\nstandin test, STAND-IN " in said and "NOT a score of the data set: made from alignments" in said
    assert found["standin"] == "made from alignments" and "baselines" not in found
    evaluate(f"ckpt={run}")
    assert json.load(open(run / "scores.json"))["standin"] is None


def test_clips_are_shared_out_among_processes(evaluate, run, home, monkeypatch, capsys):
    """Each decodes clips of its own, all together every clip once; the first writes them in the split's order."""
    answers, test = [], rows(home / "data" / "toy", "test")

    def all_gather_object(parts, mine):
        answers.append(mine)
        parts[:] = answers + [{}] * (3 - len(answers))
        if len(answers) < 3:
            raise SystemExit  # the others are yet to come
    monkeypatch.setattr(dist, "all_gather_object", all_gather_object)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    decoded = []
    for rank in (1, 2, 0):
        monkeypatch.setenv("RANK", str(rank))
        answer = lambda row, how: decoded.append(row["name"]) or row["name"]
        if rank:
            with pytest.raises(SystemExit):
                evaluate(f"ckpt={run}", answer=answer)
            assert not capsys.readouterr().out and not (run / "hyps.jsonl").exists()
        else:
            evaluate(f"ckpt={run}", answer=answer)
    assert sorted(decoded) == [row["name"] for row in test] and [len(a) for a in answers] == [1, 1, 2]
    assert [json.loads(line)["hyp"] for line in open(run / "hyps.jsonl")] == [row["name"] for row in test]

    answers.clear()
    theirs = {0: "", 1: "", 2: "", 3: ""}
    fill = lambda parts, mine: parts.__setitem__(slice(None), [theirs, mine, {}])
    monkeypatch.setattr(dist, "all_gather_object", fill)
    monkeypatch.setenv("RANK", "1")
    before = contents(run)
    capsys.readouterr()
    evaluate(f"ckpt={run}", "split=dev")
    assert contents(run) == before and not capsys.readouterr().out  # only the first writes and speaks


# ---------------------------------------------------------------------------------------------------------------------
# Two files of sentences

def test_two_files_are_compared_clip_by_clip_in_their_language(tmp_path, monkeypatch, capsys):
    """The other file's clips may come in another order; only the first process speaks."""
    refs = [f"{chr(0x4e00 + i)}天气晴朗{chr(0x4f00 + i)}风很大{chr(0x5000 + i)}" for i in range(12)]
    systems = {"mine": [r[:-2] for r in refs], "theirs": [r[:-5] for r in refs]}
    for name, hyps in systems.items():
        lines = [json.dumps({"name": str(i), "hyp": h, "ref": r}) + "\n" for i, (h, r) in enumerate(zip(hyps, refs))]
        (tmp_path / name).write_text("".join(lines if name == "mine" else reversed(lines)))
    monkeypatch.setattr(sys, "argv", ["eval.py", f"hyps={tmp_path}/mine", f"against={tmp_path}/theirs", "lang=zh"])
    with monkeypatch.context() as m:
        m.setenv("RANK", "1")
        evaluation.main()
    assert capsys.readouterr().out == ""
    evaluation.main()
    said = capsys.readouterr().out
    mine, theirs = (bleu4(hyps, refs, tokenize="char") for hyps in systems.values())
    mine_f, theirs_f = (sacrebleu.corpus_chrf(hyps, [refs]).score for hyps in systems.values())
    table = {line.rsplit(maxsplit=6)[0]: line.split()[-3:] for line in said.splitlines()[2:7]}
    assert table["mine"][0] == f"{mine:.2f}"
    rouge_l = rouge(systems["theirs"], refs, "zh")
    assert table["against theirs"] == [f"{theirs:.2f}", f"{rouge_l:.2f}", f"{theirs_f:.2f}"]
    assert f"BLEU-4 {mine - theirs:+.2f}, p = 0.00" in said and f"chrF   {mine_f - theirs_f:+.2f}, p = 0.00" in said
    assert said.count(": significant") == 2
    assert "12 clips, " in said and "), 0 % exact" in said  # a part of a sentence is not the sentence


def test_the_interval_is_that_of_these_hypotheses_against_these_references():
    refs = [f"a{i} b{i} c{i} d e f g h i j k l{' m n o' * (i % 3)}" for i in range(12)]
    hyps = [" ".join(r.split()[:5]) for r in refs]
    found = report(hyps, refs, "en")
    low, high = found["bleu4_95"]
    assert low < found["bleu"][3] < high and not low < bleu4(refs, hyps) < high


# ---------------------------------------------------------------------------------------------------------------------
# Decoding by hand

END, A, B, END2 = range(4)


class Chain:
    """
    An LLM by hand: next_p(clip, step, last token) is the probability of each token that may come next. A prefix is
    frames that hold its clip's number, a token's embedding is the token itself.
    """

    def __init__(self, next_p, vocab=4):
        self.next_p, self.vocab, self.clips, self.parts, self.beams = next_p, vocab, {}, [], 0
        self.tok_embeddings = lambda token: token[..., None].float()

    def logits(self, clip, step, token):
        out = torch.full((self.vocab,), 1e-30)
        for t, p in self.next_p(clip, step, token).items():
            out[t] = p
        return out.log() + 3.0 * clip - step  # logits: probabilities only up to a factor

    def __call__(self, h, lens=None, pos=None, cache=None, at=None):
        clips = self.clips.setdefault(cache, [])
        if lens is not None:
            mine = h[0, at, 0].int().tolist()
            assert [len(set(part[:, 0].tolist())) for part in h[0].split(lens)] == [1] * len(lens)
            clips += zip(mine, lens)
            self.parts.append(lens)
            return torch.stack([self.logits(clip, 0, None) for clip in mine])[None]
        self.beams = h.shape[1]
        # positions go on from where the prefix ended; the cache counts from there
        assert [set(p.tolist()) for p in pos] == [{n + cache.step} for _, n in clips]
        step = cache.step + 1
        each = [[self.logits(clip, step, int(t)) for t in row] for (clip, _), row in zip(clips, h[..., 0])]
        return torch.stack([torch.stack(row) for row in each])


def prefix(*clips):
    """Frames of clips that are 1, 2, ... frames long."""
    lens = [n + 1 for n in range(len(clips))]
    return [(torch.cat([torch.full((n, 1), float(c)) for c, n in zip(clips, lens)])[None], lens)]


def short_or_long(p):
    """Ends at once with probability p; or goes on, and then it is A A A. What else there is, is all but impossible."""
    on = {A: 1, B: 1e-6, END: 1e-12}  # an end less likely than B: it takes no beam's place
    return lambda clip, step, token: [{END: p, A: 1 - p, B: 1e-6}, on, on, {END: 1, B: 1e-6}][step]


@pytest.mark.parametrize("p, penalty, longer", [
    # log(0.575) / log(0.425) = 0.647; 4 tokens against 1 divide by 9/6 and 6/6: the short one is ahead down to 0.667
    (0.575, 0.0, False), (0.575, 1.0, False), (0.575, 2.0, True),
    # 0.686; were lengths counted without the end (8/6 against 5/6) or one too many (10/6, 7/6), either this one or the
    # one above would turn over
    (0.565, 0.0, False), (0.565, 1.0, True), (0.565, 2.0, True),
    # 0.465 and 0.437 about 0.667 squared
    (0.63, 2.0, True), (0.64, 2.0, False), (0.64, 1.0, False)])
def test_length_penalty_by_hand(p, penalty, longer):
    long, short = math.log(1 - p) / (9 / 6) ** penalty, math.log(p) / (6 / 6) ** penalty
    assert (long > short) == longer
    (found,) = generate(Chain(short_or_long(p)), prefix(0), [END], beam=2, length_penalty=penalty, max_new_tokens=4)
    assert found == ([A, A, A] if longer else [], True)


def test_a_hypothesis_that_ends_at_the_last_step_counts_and_one_step_less_cuts_it():
    llm = Chain(lambda clip, step, token: {END: 1.0} if step == 3 else {A: 0.9, B: 0.1})
    for beam in (1, 2, 3):
        assert generate(llm, prefix(0), [END], beam=beam, max_new_tokens=4) == [([A, A, A], True)]
        assert generate(llm, prefix(0), [END], beam=beam, max_new_tokens=3) == [([A, A, A], False)]


def garden_path(clip, step, token):
    """A looks better, B is: P(A B) = 0.6 * 0.4 * 0.9, P(B) = 0.4 * 0.9."""
    return {None: {A: 0.6, B: 0.4}, A: {END: 0.3, A: 0.3, B: 0.4}}.get(token, {END: 0.9, A: 0.1})


def test_greedy_takes_the_garden_path_and_two_beams_do_not():
    llm = Chain(garden_path)
    assert generate(llm, prefix(0), [END], beam=1, length_penalty=0.0) == [([A, B], True)]
    for beam in (2, 3):
        assert generate(llm, prefix(0), [END], beam=beam, length_penalty=0.0) == [([B], True)]


def test_a_beam_that_overtakes_takes_its_words_along():
    """B comes second, B B first: each of A's three ways to go on has less than 0.6 * 0.35, B B has 0.4 * 0.9."""
    ways = {None: {A: 0.6, B: 0.4}, A: {A: 0.34, B: 0.33, END2: 0.33}, B: {B: 0.9, END: 0.1}}
    llm = Chain(lambda clip, step, token: {END: 1.0} if step == 2 else ways[token])
    assert generate(llm, prefix(0), [END], beam=2, length_penalty=0.0) == [([B, B], True)]


def test_each_end_is_a_hypothesis_of_its_own():
    """Of two tokens that end an answer each counts with its own probability, and none of them is part of it."""
    ends = lambda clip, step, token: {END: 0.26, END2: 0.3, A: 0.44} if step == 0 else {END2: 0.5, A: 0.3, B: 0.2}
    assert generate(Chain(ends), prefix(0), [END], beam=1) == [([A] + [END2] * 199, False)]
    assert generate(Chain(ends), prefix(0), [END, END2], beam=1, length_penalty=0.0) == [([A], True)]
    # 0.3 against 0.44 * 0.5; both ends together would have 0.56
    assert generate(Chain(ends), prefix(0), [END2, END], beam=2, length_penalty=0.0) == [([], True)]


def test_a_search_ends_when_as_many_hypotheses_as_beams_have_ended():
    """Two that end early close the search, though a third would have won: log(0.45) / (8/6)**9 is the largest."""
    def late(clip, step, token):
        return [{END: 0.3, A: 0.5, B: 0.2}, {A: 0.9, B: 0.1} if token == A else {END: 1.0}, {END: 1.0}][step]

    assert generate(Chain(late), prefix(0), [END], beam=2, length_penalty=9.0, max_new_tokens=3) == [([B], True)]
    assert generate(Chain(late), prefix(0), [END], beam=3, length_penalty=9.0, max_new_tokens=3) == [([A, A], True)]
    # nor does it take more while another clip beside it goes on
    def beside(clip, step, token):
        return late(clip, step, token) if clip == 0 else {A: 0.9, B: 0.1} if step < 2 else {END: 1.0}

    found = generate(Chain(beside), prefix(0, 1), [END], beam=2, length_penalty=9.0, max_new_tokens=3)
    assert found == [([B], True), ([A, A], True)]


def test_as_many_go_on_as_there_are_beams_however_many_end():
    """The second best that goes on, B B, is only the fifth best of all, behind three ends; and it wins."""
    def crowd(clip, step, token):
        after_b = {END: 0.35, END2: 0.33, B: 0.32} if step == 1 else {END: 1.0}
        after = {None: {A: 0.5, B: 0.5}, A: {A: 0.6, END: 0.39}, B: after_b}
        return after.get(token, {A: 1.0})
    found = generate(Chain(crowd), prefix(0), [END, END2], beam=2, length_penalty=9.0, max_new_tokens=3)
    assert found == [([B, B], True)]


class Words:
    """A tokenizer of numbers, of which two end an answer."""
    bos_id, eos_ids = -1, [END, END2]
    encode = staticmethod(lambda text: [int(w) for w in text.split()])
    decode = staticmethod(lambda ids: " " + " ".join(map(str, ids)) + " ")


def seeing(llm):
    """A model that reads a clip's number for every token of the prompt 7 {clip} 8."""
    def embed(batch):
        parts = batch.tokens.split(batch.lens)
        assert all(part[0] == 7 and part[-1] == 8 and not part[1:-1].any() for part in parts)
        number = [batch.features[batch.clip == i][:1] for i in range(len(parts))]
        return torch.cat([x.expand(len(part), 1) for x, part in zip(number, parts)])[None]
    return SimpleNamespace(prompt="7 {clip} 8", mean=torch.zeros(1), embed=embed, llm=llm)


def test_translate_by_hand(capsys):
    """Answers in the order of the clips, decoded by likeness of length; those that did not end are counted."""
    ends = lambda clip: END2 if clip % 2 else END
    llm = Chain(lambda clip, step, token: {ends(clip): 1.0} if step == clip else {10 + clip: 1.0, 30: 0.01}, vocab=31)
    lens = [5, 9, 2, 7, 1, 3]
    features, done = [torch.full((n, 1), float(clip)) for clip, n in enumerate(lens)], []
    expected = ["", "11", "12 12", "13 13 13", "14 14 14 14", "15 15 15 15"]
    for beam, size in ((1, 4), (2, 4), (3, 16), (1, 1)):
        how = dict(beam=beam, max_new_tokens=4, batch_size=size, progress=done.append)
        assert translate(seeing(llm), features, Words, **how) == expected
        assert capsys.readouterr().err == "2 of 6 answers did not end within max_new_tokens=4 and were cut there\n"
    assert done == [4, 6, 4, 6, 6, 1, 2, 3, 4, 5, 6]
    by_length = [3, 4, 5, 7, 9, 11]  # the prompt's two tokens with each
    assert llm.parts == [[3, 4, 5, 7], [9, 11]] * 2 + [by_length] + [[n] for n in by_length]
    assert translate(seeing(llm), features, Words, max_new_tokens=4, warn=False) == expected and llm.beams == 4
    assert translate(seeing(llm), features, Words, max_new_tokens=6) == [*expected[:5], "15 15 15 15 15"]
    assert translate(seeing(llm), [], Words) == [] and not capsys.readouterr().err


def test_translate_passes_the_length_penalty_on():
    for p, penalty, longer in ((0.575, 1.0, False), (0.565, 1.0, True), (0.565, 0.0, False)):
        llm = seeing(Chain(short_or_long(p)))
        how = dict(beam=2, length_penalty=penalty, max_new_tokens=4)
        (found,) = translate(llm, [torch.zeros(3, 1)], Words, **how)
        assert found == ("1 1 1" if longer else "")
    llm = seeing(Chain(short_or_long(0.565)))
    assert translate(llm, [torch.zeros(3, 1)], Words, beam=2, max_new_tokens=4) == ["1 1 1"]


def test_sums_over_processes_keep_every_digit(monkeypatch):
    """In float64: a loss of millions of tokens, and how many they are."""
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.mul_(2))  # two processes that hold the same
    assert summed("cpu", 1 / 3, 2**24 + 1) == [2 / 3, 2**25 + 2]


@pytest.mark.parametrize("dataset, lost, made", [
    ("toy", None, False), ("toy", "llm", True), ("toy", "test.jsonl", True), ("toy_zh", "toycnn", True),
    ("mine", "llm", False)])
def test_the_toy_is_made_where_any_of_it_is_absent(tmp_path, monkeypatch, dataset, lost, made):
    """And no other data set ever is."""
    for folder in ("llm", "toycnn"):
        (tmp_path / dataset / folder).mkdir(parents=True)
    for file in ("toycnn/test.safetensors", "test.jsonl"):
        (tmp_path / dataset / file).touch()
    if lost:
        (tmp_path / dataset / lost).rename(tmp_path / "elsewhere")
    called = []
    monkeypatch.setattr(train, "run_program", lambda *args: called.append(args))
    train.make_toy(SimpleNamespace(data_dir=str(tmp_path), dataset=dataset))
    assert called == [("scripts.toy", f"data_dir={tmp_path}", f"name={dataset}")] * made


def test_another_program_is_run_to_its_end(monkeypatch):
    """Without torchrun, and in the project's folder."""
    monkeypatch.setenv("RANK", "1")
    once = "-n1", "-r1"
    run_program("timeit", *once, "import os, train; assert 'RANK' not in os.environ")
    with pytest.raises(BadInput, match="json.tool: ended with exit code 2"):
        run_program("json.tool", "--no-such-option")


def test_no_video_goes_into_a_model_of_imported_features(evaluate, run, home):
    for path in run.glob("*/state.json"):
        state = json.loads(path.read_text())
        state["extractor"]["imported"] = True
        path.write_text(json.dumps(state))
    with pytest.raises(BadInput, match="were imported, and no extractor can make them from a video"):
        evaluate(f"ckpt={run}", f"video={home}/data/toy/clips/00024.mp4")


def test_signals_are_given_back():
    """Once a run has ended, Ctrl-C means again what it means in Python."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        signals = Signals()
        assert signal.getsignal(signal.SIGINT) == signal.getsignal(signal.SIGTERM) == signals.note
        signals.forget()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, before[0]), signal.signal(signal.SIGINT, before[1])
