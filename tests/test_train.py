"""
The training loop on a tiny toy: both stages under torchrun, resuming, process counts, and what must not change.

    python -m pytest tests/test_train.py
"""
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, SMALL
from safetensors.torch import load_file

import data
import eval as evaluation
import train
from lib.checkpoint import Run
from lib.extract import Extractor
from lib.program import BadInput
from lib.tensors import full
from lib.video import read_video
from model import LLaMA
from scripts import faults, toy


def in_processes(n, home, out, *args, program="train.py", check=True):
    """
    Run a program in a folder, under torchrun where n > 1: each such start costs some four seconds, so what one process
    can do the tests do in their own.
    """
    # standalone: at a free port, several can run at once
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"] * (n > 1)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *torchrun, str(ROOT / program), *args], cwd=home, env=env,
                          capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def spawn_train(n, home, out, *args):
    in_processes(n, home, out, f"out_dir={out}", *SMALL, *args)
    return home / out / "toy"


@pytest.fixture
def evaluate_here(home, monkeypatch, capfd):
    """A function of (*args): eval.main() in this process and in the module's folder -> (stdout, stderr)."""
    def run(*args):
        monkeypatch.chdir(home)
        monkeypatch.setattr(sys, "argv", ["eval.py", *args])
        capfd.readouterr()
        evaluation.main()
        return capfd.readouterr()
    return run


def log(run):
    return [json.loads(line) for line in open(run / "log.jsonl")]


def losses(run):
    """Of every step that was logged; dev scores stand on lines of their own."""
    return [e["loss"] for e in log(run) if "dev_loss" not in e]


def weights(run, stage, name="vision"):
    return load_file(run / stage / "last" / f"{name}.safetensors")


def same(a, b, tolerance=0.0):
    assert a.keys() == b.keys()
    for k in a:
        assert (a[k] - b[k]).abs().max() <= tolerance * max(1e-6, a[k].abs().max()), k


@pytest.mark.long
def test_both_stages_and_eval_under_torchrun(home, evaluate_here):
    run = spawn_train(2, home, "smoke", "stage=align")
    spawn_train(2, home, "smoke", "stage=sft")
    assert {p.name for p in (run / "sft" / "last").iterdir()} == {
        "vision.safetensors", "adapter_model.safetensors", "adapter_config.json", "optimizer.safetensors", "state.json"}
    # every LoRA B has had a gradient, though the weights were spread over two processes
    adapter = weights(run, "sft", "adapter_model")
    assert len(adapter) == 4 * 4 * 2 and all(t.abs().max() > 0 for t in adapter.values())
    first = json.loads(open(run / "sft" / "log.jsonl").readline())
    assert {"step", "epoch", "loss", "grad_norm", "lr", "tokens_per_s", "step_s"} <= first.keys()
    assert any("dev_bleu" in json.loads(line) for line in open(run / "sft" / "log.jsonl"))
    config = json.load(open(run / "sft" / "config.json"))
    assert config["stage"] == "sft" and config["versions"]["processes"] == 2

    how = ["out_dir=smoke", "beam=2", "max_new_tokens=20"]  # it has not learnt to end a sentence
    said, _ = evaluate_here(*how)
    hyps = [json.loads(line) for line in open(run / "sft" / "hyps.jsonl")]
    scores = json.load(open(run / "sft" / "scores.json"))
    assert len(hyps) == 4 and scores["clips"] == 4 and scores["control"] == "none" and len(scores["bleu"]) == 4
    assert "BLEU-4" in said and scores["signature"]["bleu"] in said
    in_processes(2, home, "", *how, program="eval.py")  # sharded: the same sentences
    assert [json.loads(line) for line in open(run / "sft" / "hyps.jsonl")] == hyps
    scores = json.load(open(run / "sft" / "scores.json"))
    evaluate_here(*how, "control=shuffle")
    assert json.load(open(run / "sft" / "scores.shuffle.json"))["control"] == "shuffle"
    assert json.load(open(run / "sft" / "scores.json")) == scores and (run / "sft" / "hyps.shuffle.jsonl").exists()

    clip = home / "data" / "toy" / "clips" / "00022.mp4"
    said, beside = evaluate_here(f"ckpt={run / 'sft'}", f"video={clip}", "max_new_tokens=20")
    assert said.count("\n") == 1  # the sentence, and all else on stderr
    assert "resampled" not in beside
    toy.write_mp4(str(home / "fast.mp4"), np.repeat(read_video(str(clip)), 2, 0), fps=50)
    said, beside = evaluate_here(f"ckpt={run / 'sft'}", "video=fast.mp4", "max_new_tokens=20")
    assert said.count("\n") == 1 and beside.count("fast.mp4: its 50.0 frames a second are resampled to 25") == 1


@pytest.mark.long
def test_one_process_is_two_processes_is_accumulation(home, train_here):
    """With one dev clip: a process that has none to decode must not leave the other hanging in the next backward."""
    how = ["max_steps=4", "eval_clips=1", "eval_every=2"]
    runs = [train_here("one", *how), spawn_train(2, home, "two", *how), train_here("three", *how, "grad_accum=3")]
    for other in runs[1:]:
        assert losses(other / "align") == pytest.approx(losses(runs[0] / "align"), rel=1e-4)
        # Adam's first steps divide small gradients by their own size
        same(weights(runs[0], "align"), weights(other, "align"), 2e-3)


@pytest.mark.long
@pytest.mark.parametrize("bits", [8, 4])
def test_fewer_bits_are_shared_out_recomputed_and_offloaded(home, train_here, bits):
    """Two processes, each with its share of the packed bytes; one that recomputes; one that keeps them elsewhere."""
    how = ["eval_every=-1", f"llm_bits={bits}", "max_steps=2"]
    runs = [train_here(f"bits{bits}", *how), train_here(f"bits{bits}again", *how, "activation_checkpointing=true"),
            train_here(f"bits{bits}away", *how, "cpu_offload=true"), spawn_train(2, home, f"bits{bits}two", *how)]
    for other in runs[1:]:
        assert losses(other / "align") == pytest.approx(losses(runs[0] / "align"), rel=1e-4)
        same(weights(runs[0], "align"), weights(other, "align"), 2e-3)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_is_eager(home, train_here):
    """On an LLM of two blocks: the first and the last are compiled apart, and the C++ compiler takes the time."""
    sizes = dict(dim=64, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=32, hidden_dim=96, vocab_size=704)
    faults.random_llm(home / "two_blocks", home / "data" / "toy" / "llm" / "tokenizer.model", **sizes)
    # a block is compiled for each number of clips: here there is one
    how = [f"llm={home}/two_blocks", "batch_size=5", "max_steps=2", "eval_every=1"]
    eager, compiled = train_here("eager", *how), spawn_train(1, home, "compiled", *how, "compile=true")
    for a, b in zip(log(eager / "align"), log(compiled / "align"), strict=True):
        numbers = a.keys() & {"loss", "grad_norm", "dev_loss"}
        assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-4) for k in numbers)


@pytest.mark.parametrize("stage", ["align", "sft"])
@pytest.mark.long
def test_resumed_is_uninterrupted(train_here, stage):
    if stage == "sft":
        for out in ("whole", "halves"):
            train_here(out, "stage=align", "max_steps=2")
    whole = train_here("whole", f"stage={stage}", "lora_dropout=0.1")
    halves = train_here("halves", f"stage={stage}", "lora_dropout=0.1", "max_steps=3")
    # a line that was logged after the checkpoint belongs to a future that did not happen
    with open(halves / stage / "log.jsonl", "a") as f:
        f.write('{"step": null, "loss": 9.0}\n{"step": 4, "loss": 99.0}\n{"step": 4, "dev_loss": 9.0}\n{"step": 5, "lo')
    train_here("halves", f"stage={stage}", "lora_dropout=0.1", "resume=true")
    same(weights(whole, stage), weights(halves, stage))
    same(weights(whole, stage, "optimizer"), weights(halves, stage, "optimizer"))
    assert losses(whole / stage) == losses(halves / stage)
    lines = lambda run: [(e["step"], e.get("dev_loss"), e.get("dev_bleu")) for e in log(run / stage)]
    assert lines(whole) == lines(halves)


@pytest.mark.long
def test_resumed_with_another_number_of_processes_or_micro_batches(train_here, home, monkeypatch):
    monkeypatch.chdir(home)  # where the others are started: the same relative paths
    whole = train_here("whole1", "max_steps=6")
    spawn_train(2, home, "parts", "max_steps=2")
    train_here("parts", "max_steps=4", "resume=true", "grad_accum=2")
    parts = spawn_train(2, home, "parts", "max_steps=6", "resume=true")
    assert losses(parts / "align") == pytest.approx(losses(whole / "align"), rel=1e-4)


@pytest.mark.parametrize("stage", ["align", "sft"])
def test_frozen_weights_stay_bitwise(train_here, home, monkeypatch, stage):
    """align leaves the whole LLM as it was, sft its base weights and the local transformer; what is to learn, does."""
    seen = {}
    keep = lambda self, name, model, *_, **how: seen.update((k, full(p).clone()) for k, p in model.named_parameters())
    if stage == "sft":
        train_here("frozen", "stage=align", "max_steps=1")
        before = weights(home / "frozen" / "toy", "align")
    monkeypatch.setattr(Run, "save", keep)
    train_here("frozen", f"stage={stage}", "max_steps=2", "train_embeddings=false")
    for name, w in LLaMA.from_pretrained(str(home / "data" / "toy" / "llm")).state_dict().items():
        assert torch.equal(seen["llm." + name], w), name
    if stage == "sft":
        assert all(torch.equal(seen[k], before[k]) for k in seen if k.startswith(("ltn.", "proj.")))
        assert not torch.equal(seen["adaptor.w1.weight"], before["adaptor.w1.weight"])
        assert all(seen[k].abs().max() > 0 for k in seen if k.endswith("lora_B"))


@pytest.mark.long
def test_variants_of_the_model_train_and_load_again(train_here):
    """Tables 3, 4, 6 and the switches of the machine: each a few steps, then a translation from the checkpoint."""
    for n, args in enumerate((["adaptor=linear", "ltn=false"], ["ltn_dim=0", "max_frames=10"],
                              ["adaptor=mlp_noact", "window=4", "activation_checkpointing=true", "freeze_llm=true"])):
        train_here(f"variant{n}", "stage=align", "max_steps=1", *args)
        run = train_here(f"variant{n}", "stage=sft", "max_steps=1", "train_embeddings=true", *args)
        assert "llm.tok_embeddings.weight" in weights(run, "sft")
        assert (run / "sft" / "last" / "adapter_model.safetensors").exists() == ("freeze_llm=true" not in args)
        sllama, tokenizer, _ = evaluation.load_model(str(run / "sft"))
        assert evaluation.translate(sllama, [torch.randn(9, 1024)], tokenizer, max_new_tokens=3)[0] is not None


@pytest.mark.long
def test_what_align_has_taught_the_llm_lasts(train_here):
    """An sft stage that leaves it alone computes with it, so its checkpoint holds it, in 16 bits."""
    train_here("taught", "stage=align", "max_steps=1", "train_embeddings=true", "freeze_llm=false", "lora_rank=0")
    run = train_here("taught", "stage=sft", "max_steps=1", "train_embeddings=false")
    align, sft = weights(run, "align"), weights(run, "sft")
    taught = [name for name in align if name.startswith("llm.")]
    assert len(taught) == 2 + 7 * len({name.split(".")[2] for name in taught if ".layers." in name})
    own = evaluation.load_model(str(run / "sft"))[0].state_dict()
    assert all(torch.equal(sft[name], align[name]) and torch.equal(own[name], align[name]) for name in taught)
    for bits in (8, 4):
        with pytest.raises(BadInput, match="llm_bits=16"):
            evaluation.load_model(str(run / "sft"), llm_bits=bits)
    with pytest.raises(BadInput, match="lora_alpha=16"):
        train_here("taught", "stage=sft", f"init_from={run}/sft", "lora_alpha=8")


@pytest.mark.long
def test_scores_in_other_bits_stand_beside_the_runs_own(train_here, evaluate_here, home, monkeypatch):
    """And what the baselines need is opened before anything is decoded."""
    for stage in ("align", "sft"):
        run = train_here("bits", f"stage={stage}", "max_steps=1") / "sft"
    evaluate_here(f"ckpt={run}", "max_new_tokens=4")
    files = {f: (run / f).read_bytes() for f in ("hyps.jsonl", "scores.json")}
    evaluate_here(f"ckpt={run}", "llm_bits=8", "max_new_tokens=4")
    assert all((run / f).read_bytes() == was for f, was in files.items())
    assert "matrices in 8 bits" in json.loads((run / "scores.8bits.json").read_text())["llm"]
    assert (run / "hyps.8bits.jsonl").exists()
    store = home / "data" / "toy" / "toycnn" / "train.safetensors"
    store.rename(f"{store}.away")
    monkeypatch.setattr(evaluation, "generate", lambda *_: pytest.fail("is decoding"))
    with pytest.raises(BadInput, match="train.safetensors"):
        evaluate_here(f"ckpt={run}")
    os.rename(f"{store}.away", store)


def test_an_earlier_run_is_moved_aside(train_here):
    run = train_here("again", "max_steps=1")
    first = weights(run, "align")
    train_here("again", "max_steps=1", "seed=5")
    same(first, load_file(run / "align.1" / "last" / "vision.safetensors"))


def test_what_does_not_fit_is_named(train_here, home):
    run = train_here("fits", "max_steps=1")
    for args, word in ((["stage=sft", "window=4"], "window=8"), (["stage=align", "resume=true", "seed=2"], "seed=1337"),
                       (["stage=sft", "init_from=nowhere"], "nowhere"), (["stage=sft", "ltn_dim=64"], "ltn_dim=32"),
                       (["dataset=nothing", f"llm={home}/data/toy/llm"], "nothing"), ([f"llm={home}"], "tokenizer"),
                       (["stage=align", "resume=true", "warmup=3"], "warmup=2")):
        with pytest.raises(BadInput, match=word):
            train_here("fits", *args)
        dist.is_initialized() and dist.destroy_process_group()
    assert weights(run, "align")  # nothing that was saved is lost


@pytest.mark.parametrize("args, word", [
    (["stage=pretrain"], "stage"), (["epoch=3"], "epochs"), (["lr=fast"], "lr"), (["batch_size=0"], "batch_size"),
    (["frame_drop=1"], "frame_drop"), (["lora_targets=wq,wx"], "wx"), (["adaptor=qformer"], "adaptor"),
    (["prompt=hello"], "prompt"), (["dataset=mine"], "llm")])
def test_a_wrong_command_line_is_one_line_and_exit_code_2(monkeypatch, capsys, args, word):
    monkeypatch.setattr(sys, "argv", ["train.py", *args])
    with pytest.raises(SystemExit) as stop:
        train.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and word in said


def test_bad_input_is_one_line_and_exit_code_1(home):
    done = in_processes(1, home, "", "dataset=nothing", "llm=data/toy/llm", check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "nothing" in done.stderr


@pytest.mark.long
def test_ten_real_clips_on_a_real_llama(real, tmp_path, monkeypatch):
    """
    Learnt by heart on purpose: every part from gif to sentence is connected, and without the right clip nothing comes
    back.
    """
    def call(main, *args):
        monkeypatch.setattr(sys, "argv", ["program", *args])
        main()

    places = [f"data_dir={tmp_path}/data", f"out_dir={tmp_path}/out"]
    call(data.main, "dataset=isl", "backbone=toycnn", f"root={real / 'isl'}", places[0])
    for stage in ("align", "sft"):
        words = [str(ROOT / "config" / "isl.py"), "save_every=60", f"stage={stage}", f"llm={real / 'stories260K'}"]
        call(train.main, *words, *places)
    for control, low, high in (("none", 90, 100), ("shuffle", 0, 10)):
        call(evaluation.main, f"ckpt={tmp_path}/out/isl/sft", "split=train", f"control={control}")
        suffix = "" if control == "none" else ".shuffle"
        assert low <= json.load(open(tmp_path / "out" / "isl" / "sft" / f"scores.train{suffix}.json"))["exact"] <= high


def test_every_clip_is_dealt_out_once():
    lengths = [50, 10, 40, 30, 20, 60, 5]
    parts = data.deal([0, 2, 3, 4, 5, 6], lengths, 4)
    assert sorted(i for p in parts for i in p) == [0, 2, 3, 4, 5, 6]
    assert [len(p) for p in data.deal([1, 2], lengths, 3)] == [1, 1, 0]  # fewer clips than processes
    loads = [sum(lengths[i] for i in p) for p in data.deal([0, 1, 2, 3, 4, 5], lengths, 2)]
    assert max(loads) - min(loads) <= 20


def test_the_loss_is_that_of_the_whole_step(train_here):
    """The logged loss, gradient and weights do not know in how many micro-batches a step was computed."""
    how = ["max_steps=2", "eval_every=-1", "log_every=1", "frame_drop=0"]
    whole, parts = (train_here(f"in-{n}", *how, f"grad_accum={n}") for n in (1, 3))
    for key in ("loss", "grad_norm"):
        a, b = ([e[key] for e in log(run / "align")] for run in (whole, parts))
        assert len(a) == 2 and b == pytest.approx(a, rel=1e-4)
    same(weights(whole, "align"), weights(parts, "align"), 2e-3)


def test_a_clip_of_another_rate_is_resampled(train_here, home, monkeypatch, capsys):
    """
    video=: the model reads the features of the clip at the rate that it has learnt from, and the sentence alone
    goes to stdout.
    """
    run = train_here("films", "max_steps=1", "eval_every=-1")
    path, seen = str(home / "fast.mp4"), []
    toy.write_mp4(path, np.random.default_rng(0).integers(0, 256, (40, 64, 64, 3), np.uint8), fps=50)
    answer = lambda sllama, features, tokenizer, **how: seen.extend(features) or [" ja \n nein "]
    monkeypatch.setattr(evaluation, "translate", answer)
    monkeypatch.setattr(sys, "argv", ["eval.py", f"ckpt={run}/align", f"video={path}", "device=cpu"])
    capsys.readouterr()
    evaluation.main()
    out, err = capsys.readouterr()
    assert out == "ja nein\n" and "fast.mp4: its 50.0 frames a second are resampled to 25" in err
    (features,) = seen
    want = torch.from_numpy(Extractor("toycnn", device="cpu", fps=25.0)(path))
    assert len(features) == 20 and torch.equal(features, want)
