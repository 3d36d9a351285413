"""
Extraction at work: processes that decode and die, batches across clips, broken clips, frame rates, timm's backbones.

    python -m pytest tests/test_extract.py
"""
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import clips_of
from safetensors.torch import save_file

from lib import extract, video
from lib.cnn import GoogLeNet, RandomCNN
from lib.extract import Extractor, prepare
from lib.features import Store
from lib.program import BadInput
from lib.readers import SPLITS, read_clips
from scripts import bench, tables
from scripts.toy import write_mp4

ROOT = Path(__file__).resolve().parents[1]
FORK = pytest.mark.skipif(multiprocessing.get_start_method() != "fork",
                          reason="the mistake is put into this process, and a process that is not forked lacks it")
LINUX = pytest.mark.skipif(not os.path.exists("/proc/self/status"),
                           reason="a program's processes are found in Linux's /proc")
# frames; 222 in all: seven batches of 32, the last one filled up
LENGTHS = {"a": 40, "b": 1, "c": 33, "d": 70, "e": 5, "f": 64, "g": 9}


def noise(n, seed=0, size=(48, 40)):
    return np.random.default_rng(seed).integers(0, 256, (n, *size, 3), np.uint8)


def table(root, names):
    lines = [f"{n}.mp4\tsatz {n}\t{s}\n" for n, s in zip(names, ["train", "dev", "test"] + ["train"] * 99)]
    (root / "clips.tsv").write_text("file\ttext\tsplit\n" + "".join(lines))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder of own clips."""
    root = tmp_path_factory.mktemp("clips")
    for i, (name, n) in enumerate(LENGTHS.items()):
        write_mp4(str(root / f"{name}.mp4"), noise(n, i))
    table(root, LENGTHS)
    return root


def run(root, home, workers=0, strict=True, **how):
    extractor = Extractor("toycnn", device="cpu", workers=workers, **how)
    prepare("own", read_clips(str(root))[0], str(home), extractor, strict)
    return everything(home)


def everything(home):
    """Every file of a prepared data set, byte for byte."""
    return {str(p.relative_to(home)): p.read_bytes() for p in sorted(home.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def want(root, tmp_path_factory):
    return run(root, tmp_path_factory.mktemp("want"))


def program(*args, processes=1, **how):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    start = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "data.py"), *map(str, args)]
    return subprocess.Popen(start, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **how)


def descendants(pid):
    """Processes that a process has started, theirs included."""
    with contextlib.suppress(OSError):  # it may end meanwhile
        children = [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return children + [n for child in children for n in descendants(child)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Whoever decodes, however often it is killed: the same bytes

@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 2, 5])
def test_workers_leave_no_trace(root, want, tmp_path, workers):
    assert run(root, tmp_path, workers) == want


def test_where_nothing_changed_nothing_is_written(root, want, tmp_path):
    """A split may have 20 GB. Another clip of one split, or a word of one, changes the files of that alone."""
    clips = tmp_path / "clips"
    shutil.copytree(root, clips)
    files = lambda: (p for p in (tmp_path / "data/own").rglob("*") if p.is_file())
    written = lambda: {f"{p.parent.name}/{p.name}": p.stat().st_mtime_ns for p in files()}
    run(clips, tmp_path / "data")
    before = written()
    assert run(clips, tmp_path / "data").keys() == want.keys() and written() == before
    table = (clips / "clips.tsv").read_text().splitlines()
    at = next(i for i, line in enumerate(table) if line.endswith("\tdev"))
    file, text, split = table[at].split("\t")
    table[at] = f"{file}\tsomething else\t{split}"
    (clips / "clips.tsv").write_text("\n".join(table) + "\n")
    run(clips, tmp_path / "data")
    assert {f for f, when in written().items() if when != before[f]} == {"own/dev.jsonl"}
    before = written()
    os.utime(clips / file, (9, 9))
    run(clips, tmp_path / "data")
    assert {f for f, when in written().items() if when != before[f]} == {"toycnn/dev.safetensors"}


def test_a_clip_alone_has_the_same_features(root, want, tmp_path, monkeypatch):
    batches, compute = [], Extractor.compute
    monkeypatch.setattr(Extractor, "compute", lambda self, batch: batches.append(batch.shape) or compute(self, batch))
    assert run(root, tmp_path) == want
    assert batches == [(32, 64, 64, 3)] * 7  # across the borders of clips; clip by clip it would be twelve
    for split in SPLITS:
        clips = clips_of(tmp_path, "own", "toycnn", split)
        for row in clips.rows:
            assert row["frames"] == LENGTHS[row["name"]]
            assert np.array_equal(clips.store[row["name"]].numpy(), Extractor("toycnn", device="cpu")(row["video"]))


def test_where_no_clip_is_left_the_cnn_does_nothing(monkeypatch):
    """A process whose share is done, or data.py called once more."""
    monkeypatch.setattr(Extractor, "compute", lambda self, batch: pytest.fail("computes a batch of nothing"))
    assert list(Extractor("toycnn", device="cpu").stream([])) == []


@pytest.mark.long
def test_googlenet_does_not_see_a_frame_s_place_in_the_batch():
    extractor = Extractor("googlenet", "random", "cpu")
    batch = noise(extract.BATCH, size=(224, 224))
    a = extractor.compute(batch)
    assert a.shape == (32, 1024) and np.isfinite(a).all() and a.astype(float).std() > 0.01
    assert np.array_equal(extractor.compute(np.roll(batch, 5, 0)), np.roll(a, 5, 0))


@LINUX
@pytest.mark.long
@pytest.mark.parametrize("processes, alone", [(1, False), (2, False), (1, True)])
def test_killed_program_goes_on(root, want, tmp_path, processes, alone):
    """
    SIGKILL to everything that is at work, as soon as a clip or two are done; then the same command again.
    alone: to the program itself, and those that decode for it end by themselves.
    """
    long = tmp_path / "clips"
    long.mkdir()
    names = list(LENGTHS) + [f"long{i}" for i in range(12)]
    for name in names:
        (long / f"{name}.mp4").symlink_to(root / f"{name[0] if name in LENGTHS else 'd'}.mp4")
    table(long, names)
    args = ["dataset=own", "backbone=toycnn", f"root={long}", f"data_dir={tmp_path / 'data'}", "device=cpu"]
    # whoever kills it comes first, however busy the machine is
    work = program(*args, processes=processes, preexec_fn=lambda: os.nice(19))
    parts = tmp_path / "data/own/toycnn/.parts"
    while not (parts.exists() and any(parts.glob("*.safetensors"))):
        assert work.poll() is None, work.stdout.read()
        time.sleep(0.002)
    # torchrun gives each of its processes a session of its own
    for pid in [work.pid] if alone else (work.pid, *descendants(work.pid)):
        with contextlib.suppress(ProcessLookupError):  # those that decode end by themselves without who has asked
            os.kill(pid, signal.SIGKILL)
    work.communicate(timeout=30)  # until the last of them has let go of the pipe
    assert not (tmp_path / "data/own/train.jsonl").exists()
    again = program(*args, processes=processes)
    said = again.communicate()[0]
    assert again.returncode == 0 and "clips are there already" in said, said
    assert everything(tmp_path / "data") == run(long, tmp_path / "whole")


@FORK
@pytest.mark.parametrize("code", [1, -signal.SIGKILL])
def test_a_dead_worker_is_one_line(root, want, tmp_path, monkeypatch, code):
    whole = extract.frames

    def dies(path, *args, **kwargs):
        if path.endswith("f.mp4") and torch.utils.data.get_worker_info():
            time.sleep(0.5)  # others get ready meanwhile
            os._exit(1) if code == 1 else os.kill(os.getpid(), -code)
        return whole(path, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(extract, "frames", dies)
        with pytest.raises(BadInput, match="^a process that decodes was killed.*workers=1"):
            run(root, tmp_path, workers=2)
    assert any((tmp_path / "own/toycnn/.parts").iterdir())
    assert run(root, tmp_path) == want


@FORK
def test_a_mistake_in_a_worker_is_no_dead_worker(root, tmp_path, monkeypatch):
    def wrong(*args, **kwargs):
        raise RuntimeError("a mistake in the code")
    monkeypatch.setattr(extract, "frames", wrong)
    with pytest.raises(RuntimeError, match="a mistake in the code") as e:
        run(root, tmp_path, workers=1)
    # what reads from the worker lies there; left to the collector, torch would wait five seconds for that worker
    traceback.clear_frames(e.tb)


def test_long_clips_come_in_pieces(monkeypatch):
    decoded = []

    def endless(*args, **kwargs):
        for i in range(10**6):
            decoded.append(i)
            yield np.zeros((64, 64, 3), np.uint8)
    monkeypatch.setattr(extract, "frames", endless)
    pieces = iter(extract.Decoder(["a.mp4"], 64, 64))
    for n in (1, 2, 3):
        assert next(pieces)[1].shape == (16, 64, 64, 3) and len(decoded) == 16 * n


# ---------------------------------------------------------------------------------------------------------------------
# Broken clips

@pytest.fixture
def broken(root, tmp_path):
    """The clips, of which the dev clip (b) is text and c is cut off in the middle."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in LENGTHS:
        content = (root / f"{name}.mp4").read_bytes()
        instead = {"b": b"text", "c": content[:len(content) // 2]}
        (folder / f"{name}.mp4").write_bytes(instead.get(name, content))
    table(folder, LENGTHS)
    return folder


@pytest.mark.parametrize("workers", [0, 2])
def test_strict(broken, tmp_path, workers, capsys):
    with pytest.raises(BadInput) as e:
        run(broken, tmp_path / "data", workers)
    assert "\n" not in str(e.value) and any(f"{n}.mp4" in str(e.value) for n in "bc")
    assert not (tmp_path / "data/own/train.jsonl").exists()
    kept = len(list((tmp_path / "data/own/toycnn/.parts").iterdir()))
    capsys.readouterr()
    files = run(broken, tmp_path / "data", workers, strict=False)
    out, err = capsys.readouterr()
    assert f"{kept} of 7" in out if kept else "already" not in out
    assert "clip b is left out" in err and "clip c is left out" in err and "5 train, 0 dev, 0 test" in out
    problems = files["own/problems.txt"].decode().splitlines()
    assert sorted(p.split(": ")[0] for p in problems) == ["clip b", "clip c"]
    assert all("b.mp4" in p or "c.mp4" in p for p in problems)
    assert "own/dev.jsonl" not in files and len(clips_of(tmp_path / "data", "own", "toycnn", "train")) == 5


def test_a_broken_clip_is_mended(broken, root, want, tmp_path):
    run(broken, tmp_path / "data", strict=False)
    for name in "bc":
        (broken / f"{name}.mp4").write_bytes((root / f"{name}.mp4").read_bytes())
    files = run(broken, tmp_path / "data")
    store = Store(str(tmp_path / "data/own/toycnn/dev.safetensors"))
    assert len(store["b"]) == 1 and {f for f in files if "problems" not in f} == set(want)


def test_only_broken_clips(broken, tmp_path):
    for path in broken.glob("*.mp4"):
        path.write_bytes(b"text")
    with pytest.raises(BadInput, match=r"has no features of clip a \(7 of 7"):
        run(broken, tmp_path / "data", strict=False)


@pytest.mark.parametrize("limit, value, says", [("MAX_SIDE", 47, "40x48"), ("MAX_FRAMES", 39, "longer")])
def test_absurd_sizes(root, monkeypatch, limit, value, says):
    assert len(list(video.frames(str(root / "a.mp4"), 16))) == 40
    monkeypatch.setattr(video, limit, value + 1)
    assert len(list(video.frames(str(root / "a.mp4"), 16))) == 40  # as much as is allowed
    monkeypatch.setattr(video, limit, value)
    with pytest.raises(BadInput, match=f"a.mp4.*{says}.*|a.mp4.*video.{limit} = {value}") as e:
        list(video.frames(str(root / "a.mp4"), 16))
    assert f"video.{limit} = {value}" in str(e.value) and says in str(e.value)


# ---------------------------------------------------------------------------------------------------------------------
# Frame rates

def shades(path, times, fps=1000):
    """A clip whose frame at time t has the even grey 100 t: a frame's brightness says when it was filmed."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("h264", rate=fps, options={"crf": "10", "preset": "ultrafast", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = 32, 32, "yuv420p"
        for t in times:
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), round(100 * t) % 256, np.uint8))
            frame.pts = round(t * fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return str(path)


def filmed(path, **how):
    return [f.mean() / 100 for f in video.frames(path, **how)]


@pytest.mark.parametrize("own, n, fps, times", [
    (50, 100, 25, [k / 25 for k in range(50)]),  # every second frame
    (12.5, 25, 25, [k // 2 / 12.5 for k in range(50)]),  # every frame twice
    (30, 60, 25, [round(30 * k / 25) / 30 for k in range(50)]),
    (24.9, 50, 25, [k / 24.9 for k in range(50)])])  # within 1 %: as they are
def test_resampling(tmp_path, own, n, fps, times):
    path = shades(tmp_path / "a.mp4", [k / own for k in range(n)])
    assert video.rate_of(path) == pytest.approx(own, rel=0.005)
    got = filmed(path, fps=fps)
    assert len(got) == len(times) and max(abs(a - b) for a, b in zip(got, times)) < 0.03
    assert len(filmed(path)) == n


def test_variable_frame_rate(tmp_path):
    """Phones film when they can: dense at first, then with a gap."""
    path = shades(tmp_path / "a.mp4", [0, 0.02, 0.04, 0.06, 0.08, 0.5, 1.0, 1.5, 2.0])
    got = filmed(path, fps=10)
    want = [0, 0.08, 0.08] + [0.5] * 5 + [1.0] * 5 + [1.5] * 5 + [2.0] * 5
    assert len(got) == len(want) and max(abs(a - b) for a, b in zip(got, want)) < 0.03


def test_folders_of_frames_have_the_rate_that_is_said(tmp_path):
    for i in range(10):
        with av.open(str(tmp_path / f"{i}.png"), "w", options={"update": "1"}) as container:
            stream = container.add_stream("png", rate=25)
            stream.height, stream.width, stream.pix_fmt = 32, 32, "rgb24"
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((32, 32, 3), 10 * i, np.uint8))))
            container.mux(stream.encode())
    assert len(filmed(str(tmp_path), fps=25, rate=50)) == 5
    assert len(filmed(str(tmp_path), fps=25)) == 10 == len(filmed(str(tmp_path), fps=25, rate=25))
    assert video.rate_of(str(tmp_path)) == 0 and video.rate_of(str(tmp_path), 30.0) == 30


def fps_of(home, split="train"):
    return json.loads(Store(str(home / f"own/toycnn/{split}.safetensors")).metadata["settings"])["fps"]


def test_the_store_knows_its_rate(root, tmp_path, capsys):
    run(root, tmp_path / "as filmed")
    assert fps_of(tmp_path / "as filmed") == 25 and "frames a second" not in capsys.readouterr().out
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name in "ab":
        write_mp4(str(mixed / f"{name}.mp4"), noise(20), fps=25 if name == "a" else 50)
    (mixed / "clips.tsv").write_text("file\ttext\na.mp4\tja\nb.mp4\tnein\n")
    run(mixed, tmp_path / "mixed as filmed")
    said = capsys.readouterr().out
    assert fps_of(tmp_path / "mixed as filmed") == 0 and "from 25 to 50 frames a second" in said and "fps=25" in said
    run(mixed, tmp_path / "mixed", fps=25.0)
    assert fps_of(tmp_path / "mixed") == 25 and "frames a second" not in capsys.readouterr().out
    clips = clips_of(tmp_path / "mixed", "own", "toycnn", "train")
    assert dict(zip([r["name"] for r in clips.rows], clips.lengths)) == {"a": 20, "b": 10}
    run(mixed, tmp_path / "mixed")  # another rate, other features
    assert fps_of(tmp_path / "mixed") == 0
    assert clips_of(tmp_path / "mixed", "own", "toycnn", "train").lengths == [20, 20]


def test_bench(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "extract", "backbone=toycnn", "clips=2", "length=40", "repeats=2",
                                      "threads=1", f"out={tmp_path / 'out.json'}"])
    bench.main()
    figures = json.loads((tmp_path / "out.json").read_text())["backbones"]["toycnn"]
    assert figures["clips"] == 2 and 40 <= figures["frames"] <= 120
    assert 0 < figures["ratio"] < 10 and len(figures["peak_mb"]) == 2
    assert "ratio" in capsys.readouterr().out


def test_bench_puts_its_row_into_the_table(tmp_path, monkeypatch, capsys):
    """A row a kind of processor: its own of before is replaced, what others have measured stays."""
    def figure(what, dtype, ms, ratio):
        return {"what": what, "dtype": dtype, "ratio": ratio, "ours": {"median": ms / 1000}}

    found = {"step": [figure("sft step, 4 clips, float32", "float32", 841.4, 2.04),
                      figure("sft step, 4 clips, bfloat16", "bfloat16", 310, 3.26),
                      {"what": "sft step, each at its best", "ratio": 5.5},
                      figure("align step, 4 clips, float32", "float32", 973, 2.0)],
             "decode": [figure("32 clips from features, beam 4", "float32", 5000, 3.4),
                        figure("32 clips from embeddings, beam 4", "float32", 4000, 4.4)],
             "band": [figure("band of window 8, T = 4096, float32 (differ by 1e-07)", "float32", 9, 22.6),
                      figure("band of window 8, T = 1024, float32 (differ by 1e-07)", "float32", 3, 9)]}
    asked = []
    for name, figures in found.items():
        monkeypatch.setitem(bench.NAMES, name, lambda cfg, figures=figures: asked.append(cfg.dtypes) or figures)
    monkeypatch.setattr(bench, "processor", lambda: "Intel Xeon, AMX, 2 cores; torch 2.13.0")
    page, head = tmp_path / "speed.md", bench.TABLE_HEAD
    other = "| AMD EPYC, AVX512-BF16, 2 cores; torch 2.12.0 | 1 |"
    old = "| Intel Xeon, AMX, 2 cores; torch 2.12.0 | 2 |"
    page.write_text(f"# How fast\n\n{head}\n{old}\n{other}\n\nWords.\n")
    monkeypatch.setattr(sys, "argv", ["bench", "all", f"table={page}", f"out={tmp_path / 'all.json'}"])
    bench.main()
    row = ("| Intel Xeon, AMX, 2 cores; torch 2.13.0 | float32 2.0 x (841 ms), bfloat16 3.3 x (310 ms) "
           "| float32 2.0 x (973 ms) | float32 3.4 x (5000 ms) |  | float32 22.6 x (9 ms) |")
    assert page.read_text() == f"# How fast\n\n{head}\n{other}\n{row}\n\nWords.\n"
    assert capsys.readouterr().out == f"{head}\n{row}\n" and asked == ["float32,bfloat16"] * 3
    assert json.load(open(tmp_path / "all.json")) == [f for some in found.values() for f in some]


# ---------------------------------------------------------------------------------------------------------------------
# timm

@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.mark.parametrize("name, width, size, crop, mean", [
    ("resnet34", 512, 235, 224, 0.485), ("vit_tiny_patch16_224", 192, 248, 224, 0.5),
    ("efficientnet_b0", 1280, 256, 224, 0.485)])
@pytest.mark.long
def test_timm(timm, root, tmp_path, name, width, size, crop, mean):
    path, extractor = str(root / "e.mp4"), Extractor(f"timm/{name}", "random", "cpu")
    features = extractor(path)
    assert features.shape == (5, width) and features.dtype == np.float16
    assert not extractor.cnn.training and not any(p.requires_grad for p in extractor.cnn.parameters())
    assert np.array_equal(features, Extractor(f"timm/{name}", "random", "cpu")(path))  # the same for everybody
    # once more by hand, with what timm itself says of the model's preparation
    how = timm.data.resolve_model_data_config(extractor.cnn)
    side, low = how["input_size"][1], (size - crop) // 2
    found = side, int(side / how["crop_pct"]), how["mean"][0], how["interpolation"]
    assert found == (crop, size, mean, "bicubic")
    frames = np.stack(list(video.frames(path, size, "BICUBIC")))[:, low:low + crop, low:low + crop]
    x = torch.from_numpy(frames).permute(0, 3, 1, 2) / 255
    x = (x - torch.tensor(how["mean"]).view(3, 1, 1)) / torch.tensor(how["std"]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(features).float(), extractor.cnn(x), rtol=5e-3, atol=1e-3)


def test_widths_of_table_5(timm):
    """The names and widths that the README gives, which are those of the rows of scripts.tables."""
    rows = (ROOT / "README.md").read_text(encoding="utf-8").split("| Table 5 |")[1].split("\n\n")[0].splitlines()[2:]
    cells = [row.split("|")[2:4] for row in rows]
    given = {name: int(width) for names, widths in cells
             for name, width in zip(re.findall("`(.+?)`", names), widths.split(","), strict=True)}
    asked = {row[3].get("backbone") for row in tables.ROWS[5]}
    assert set(given) == {name for name in asked if name and name.startswith("timm/")} | {"timm/inception_v4"}
    for backbone, width in given.items():
        with torch.device("meta"):
            model = timm.create_model(backbone.removeprefix("timm/"), num_classes=0).eval()
            frame = torch.zeros(1, *timm.data.resolve_model_data_config(model)["input_size"])
            assert model(frame).shape == (1, width)
        assert timm.models.is_model_pretrained(backbone.removeprefix("timm/"))  # somebody has published weights


@pytest.mark.long
def test_timm_weights_from_a_file(timm, root, tmp_path):
    """A file as timm's authors publish it: with the classifier."""
    torch.manual_seed(3)
    model = timm.create_model("resnet18")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    torch.save(model.state_dict(), tmp_path / "model.pth")
    model.reset_classifier(0)
    for file in ("model.safetensors", "model.pth"):
        loaded = Extractor("timm/resnet18", str(tmp_path / file), "cpu").cnn.state_dict()
        assert all(torch.equal(v, loaded[k]) for k, v in model.state_dict().items())
    with pytest.raises(BadInput, match="model.pth: has no tensor"):
        Extractor("timm/resnet34", str(tmp_path / "model.pth"), "cpu")
    extractor = Extractor("timm/resnet18", str(tmp_path / "model.pth"), "cpu")
    prepare("own", read_clips(str(root))[0] | {"train": []}, str(tmp_path / "data"), extractor)
    clips = clips_of(tmp_path / "data", "own", "timm/resnet18", "dev")  # a folder in a folder
    assert clips.features(0).shape == (1, 512)


@pytest.mark.parametrize("name", ["resnet9999", "../../etc", "hf-hub:someone/something", ""])
def test_timm_has_no_such_model(timm, name):
    with pytest.raises(BadInput, match="no model of this name"):
        Extractor(f"timm/{name}", "random", "cpu")


def test_timm_without_network(timm, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("the network\nis down")
    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(BadInput, match=r"timm/resnet18: timm cannot make it \(the network\).*weights=FILE"):
        Extractor("timm/resnet18", "", "cpu")


def test_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match="pip install timm"):
        Extractor("timm/resnet18", "random", "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# What a CNN is given, by hand

def write_png(path, rgb):
    with av.open(str(path), "w", options={"update": "1"}) as container:
        stream = container.add_stream("png", rate=25)
        stream.height, stream.width, stream.pix_fmt = *rgb.shape[:2], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(rgb)))
        container.mux(stream.encode())


def checks(number):
    """
    A frame of 300 x 400 that no two ways to squeeze it leave the same: hard edges, no two channels alike, no symmetry.
    """
    y, x = np.mgrid[:300, :400]
    light = ((x // 7 + y // 5 + number) % 2 + x / 400) / 2
    return (255 * light[..., None] * (1, 0.8, 0.6)).astype(np.uint8)


def squeezed(rgb, size, mode):
    """The textbook's interpolation, from further around where the picture shrinks: PIL's, torch's with antialias."""
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None].float()
    return F.interpolate(x, (size, size), mode=mode, antialias=True)[0].clamp(0, 255)


class Fake(torch.nn.Module):
    """One of timm's models, as far as it is asked: a projection of the frame's mean colour, without the classifier."""

    pretrained_cfg = {"classifier": "head"}

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Linear(3, 8)

    def forward(self, x):
        return self.stem(x.mean((2, 3)))


FAKE = {"input_size": (3, 56, 56), "crop_pct": 0.875, "interpolation": "bicubic",
        "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@pytest.fixture
def fake_timm(monkeypatch):
    """The few names of timm that are used, with one small model; .asked: how it was asked for."""
    asked, how = [], dict(FAKE)

    def create_model(name, **kwargs):
        asked.append((name, kwargs))
        return Fake()

    data = SimpleNamespace(resolve_model_data_config=lambda model: how)
    fake = SimpleNamespace(__version__="0", is_model=lambda name: name == "fake", create_model=create_model,
                           how=how, asked=asked, data=data)
    monkeypatch.setitem(sys.modules, "timm", fake)
    return fake


@pytest.mark.parametrize("backbone, weights, size, crop, mode, mean, std", [
    ("toycnn", "", 64, 64, "bilinear", (0.5,) * 3, (0.5,) * 3),
    ("googlenet", "random", 256, 224, "bilinear", (0.5,) * 3, (0.5,) * 3),
    ("timm/fake", "random", 64, 56, "bicubic", FAKE["mean"], FAKE["std"])])
def test_what_the_cnn_sees(fake_timm, tmp_path, monkeypatch, backbone, weights, size, crop, mode, mean, std):
    """
    The whole frame squeezed to a square, its middle, normalised: each CNN with its own sizes, interpolation, mean and
    deviation.
    """
    for n in range(2):
        write_png(tmp_path / f"{n}.png", checks(n))
    for cnn, name in ((RandomCNN, "features"), (GoogLeNet, "features"), (Fake, "forward")):
        monkeypatch.setattr(cnn, name, lambda self, x: x.flatten(1))  # a CNN that hands on what it sees
    seen = torch.from_numpy(Extractor(backbone, weights, "cpu")(str(tmp_path))).float().view(2, 3, crop, crop)
    low = (size - crop) // 2
    for n in range(2):
        want = squeezed(checks(n), size, mode)[:, low:low + crop, low:low + crop]
        pixels = 255 * (seen[n] * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1))
        assert (pixels - want).abs().mean() < 1  # the two interpolations differ by four times as much


def test_the_two_interpolations_differ():
    """The test above can fail: a bicubic frame is no bilinear one, nor is the next frame, nor another crop."""
    for size in (64, 256):
        a, b = squeezed(checks(0), size, "bicubic"), squeezed(checks(0), size, "bilinear")
        assert (a - b).abs().mean() > 3.5
        for other in (squeezed(checks(1), size, "bicubic"), a.flip(0), a.roll(1, 1), a.roll(1, 2)):
            assert (a - other).abs().mean() > 20


def test_timm_is_asked_for_a_model_without_classifier(fake_timm, capsys):
    first, again = (Extractor("timm/fake", "random", "cpu").cnn for _ in range(2))
    assert torch.equal(first.stem.weight, again.stem.weight)  # random weights are the same for everybody
    assert not first.training and not any(p.requires_grad for p in first.parameters())
    torch.manual_seed(5)
    before = torch.get_rng_state()
    Extractor("timm/fake", "", "cpu")
    assert torch.equal(before, torch.get_rng_state()) and "downloads" in capsys.readouterr().out
    assert fake_timm.asked == [("fake", {"pretrained": not w, "num_classes": 0}) for w in ("random", "random", "")]
    with pytest.raises(BadInput, match="no model of this name"):
        Extractor("timm/other", "random", "cpu")
    fake_timm.how["input_size"] = (3, 56, 60)
    with pytest.raises(BadInput, match="60x56"):
        Extractor("timm/fake", "random", "cpu")


def test_new_weights_are_new_features(fake_timm, root, tmp_path, capsys):
    """The file of weights is replaced under its old name: what it made is made anew. Left alone, it is not."""

    def weigh(seed):
        torch.manual_seed(seed)
        cnn = Fake()
        save_file(cnn.state_dict() | {"head.weight": torch.zeros(2, 8)}, tmp_path / "weights.safetensors")
        os.utime(tmp_path / "weights.safetensors", (seed, seed))
        return cnn

    def made():
        extractor = Extractor("timm/fake", f"{tmp_path}/weights.safetensors", "cpu")
        prepare("own", read_clips(str(root))[0], str(tmp_path / "data"), extractor)
        path = tmp_path / "data/own/timm/fake/dev.safetensors"
        return Store(str(path))["b"], "7 of 7 clips are there" in capsys.readouterr().out

    for seed, kept in ((1, False), (1, True), (2, False)):
        cnn = weigh(seed)
        features, there = made()
        (frame,) = video.frames(str(root / "b.mp4"), 64, "BICUBIC")
        colour = torch.from_numpy(frame[4:60, 4:60].copy()).float().mean((0, 1)) / 255
        want = cnn.stem((colour - torch.tensor(FAKE["mean"])) / torch.tensor(FAKE["std"]))
        torch.testing.assert_close(features[0].float(), want.detach(), rtol=2e-3, atol=2e-3)
        assert there == kept


# ---------------------------------------------------------------------------------------------------------------------
# More of decoding

def encodes(codec):
    try:
        return bool(av.codec.Codec(codec, "w"))
    except av.codec.codec.UnknownCodecError:
        return False


def written(path, n, codec, pix_fmt, rate=25):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width, stream.pix_fmt = 48, 40, pix_fmt
        for frame in noise(n):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("name, codec, pix_fmt", [("a.webm", "libvpx", "yuv420p"), ("a.gif", "gif", "rgb8")])
def test_what_is_cut_off_is_refused(tmp_path, name, codec, pix_fmt):
    """The decoder gives the frames up to the cut and says nothing: half a clip must not pass for a whole one."""
    if not encodes(codec):
        pytest.skip(f"this build of av cannot write {codec}")
    path = written(tmp_path / name, 100, codec, pix_fmt)
    raw = path.read_bytes()
    assert len(list(video.frames(str(path)))) == 100
    for share in (0.3, 0.6):
        path.write_bytes(raw[:int(share * len(raw))])
        with pytest.raises(BadInput, match=f"{name}: is cut off"):
            list(video.frames(str(path)))
        with pytest.raises(BadInput, match=f"{name}: is cut off"):
            Extractor("toycnn", device="cpu")(str(path))
    path.write_bytes(raw + b"\0\n")  # some programs write a little more
    assert len(list(video.frames(str(path)))) == 100


def test_sound_may_be_longer_than_the_picture(tmp_path):
    """A clip of one second with four seconds of sound is whole."""
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        picture, sound = container.add_stream("h264", rate=25), container.add_stream("aac", rate=16000)
        picture.height, picture.width, picture.pix_fmt = 48, 40, "yuv420p"
        for frame in noise(25):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(picture.encode())
        for n in range(63):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
            frame.sample_rate, frame.pts = 16000, 1024 * n
            container.mux(sound.encode(frame))
        container.mux(sound.encode())
    assert len(list(video.frames(str(tmp_path / "a.mp4")))) == 25


@pytest.mark.parametrize("turn, matrix", [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_a_turned_phone(tmp_path, turn, matrix):
    """
    The track's header says by how much a picture is to be turned clockwise; squeezed or not, the light corner goes with
    it.
    """
    corner = np.full((3, 48, 64, 3), 20, np.uint8)
    corner[:, :24, :32] = 220  # above, left
    write_mp4(str(tmp_path / "a.mp4"), corner)
    raw = (tmp_path / "a.mp4").read_bytes()
    at = raw.index(b"tkhd") + 44
    a, b, c, d = (v << 16 for v in matrix)
    (tmp_path / "a.mp4").write_bytes(raw[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + raw[at + 36:])
    for size in (None, 32):
        for frame in video.frames(str(tmp_path / "a.mp4"), size):
            h, w = frame.shape[:2]
            assert (h, w) == ((32, 32) if size else (48, 64) if turn == 180 else (64, 48))
            clockwise = (0, 0), (0, w // 2 + 4), (h // 2 + 4, w // 2 + 4), (h // 2 + 4, 0)
            light = [frame[i:i + h // 2 - 4, j:j + w // 2 - 4].mean() > 120 for i, j in clockwise]
            assert light == [k == turn // 90 for k in range(4)]


def test_times_begin_where_the_clip_begins(tmp_path):
    """A clip that was cut out of a longer one may begin at any time; and 2 % beside fps is another rate."""
    path = shades(tmp_path / "a.mkv", [0.8 + k / 50 for k in range(40)])
    assert filmed(path, fps=25) == pytest.approx([0.8 + k / 25 for k in range(20)], abs=0.03)
    near = shades(tmp_path / "b.mp4", [k / 24.5 for k in range(49)])
    assert len(filmed(near, fps=25)) == 50 and len(filmed(near)) == 49


def test_odd_rates_are_no_rates(tmp_path):
    assert video.rate_of(shades(tmp_path / "slow.mp4", [0, 2, 4, 6])) == 0  # half a frame a second: a slide show
    assert video.rate_of(shades(tmp_path / "one.mp4", [k for k in range(5)])) == pytest.approx(1)
    assert video.rate_of(shades(tmp_path / "fast.mp4", [k / 200 for k in range(20)])) == pytest.approx(200)
    assert video.rate_of(shades(tmp_path / "faster.mp4", [k / 500 for k in range(20)])) == 0


# ---------------------------------------------------------------------------------------------------------------------
# More of the store

class Counter:
    """Stands in for a CNN: a clip of n bytes becomes n frames of zeros; rates: what its files are filmed at."""

    def __init__(self, rates=(25.0,), fps=0.0):
        self.settings = {"backbone": "counter", "weights": "", "fps": fps}
        self.rates, self.workers, self.seen, self.rate = rates, 0, [], 0.0

    def stream(self, paths, workers=0):
        for i, path in enumerate(paths):
            self.seen.append(os.path.basename(path))
            size = sum(f.stat().st_size for f in os.scandir(path)) if os.path.isdir(path) else os.path.getsize(path)
            yield i, np.zeros((size, 4), np.float16), self.rates[i % len(self.rates)]


@pytest.mark.parametrize("rates, fps, says", [
    ((25.0, 25.0, 25.2), 25.0, None), ((29.97, 29.97), 29.97, None),
    ((25.0, 25.5), 0, "from 25 to 25.5 frames a second:"),
    ((0.0, 30.0, 24.0), 0, "from 24 to 30 frames a second, 1 of unknown rate:"),
    ((25.0, 25.0, 0.0), 0, "25 to 25 frames a second, 1 of"), ((0.0, 0.0), 0, None)])
def test_the_rate_that_all_clips_share(tmp_path, capsys, rates, fps, says):
    for i in range(len(rates)):
        (tmp_path / f"{i}.bin").write_bytes(b"x")
    rows = [{"name": str(i), "text": "ja", "video": str(tmp_path / f"{i}.bin")} for i in range(len(rates))]
    prepare("own", {"train": rows, "dev": [], "test": []}, str(tmp_path / "data"), Counter(rates))
    store = Store(str(tmp_path / "data/own/counter/train.safetensors"))
    assert json.loads(store.metadata["settings"])["fps"] == fps
    assert json.loads(store.metadata["rates"]) == {str(i): r for i, r in enumerate(rates)}
    said = capsys.readouterr().out
    assert says in said if says else "frames a second" not in said


@pytest.mark.parametrize("folders, fps", [(3, 0.0), (2, 12.5)])
def test_folders_of_no_known_rate_are_not_said_to_be_resampled(tmp_path, capsys, folders, fps):
    """fps= does nothing to them: a line says so, and a store that has nothing else says no rate."""
    paths = [tmp_path / f"{i}" for i in range(3)]
    for path in paths[:folders]:
        path.mkdir()
        (path / "0.png").write_bytes(b"x")
    for path in paths[folders:]:
        path.write_bytes(b"x")
    rows = [{"name": path.name, "text": "ja", "video": str(path)} for path in paths]
    rates = (0.0,) * folders + (25.0,) * (3 - folders)
    prepare("own", {"train": rows, "dev": [], "test": []}, str(tmp_path / "data"), Counter(rates, 12.5))
    assert f"fps=12.5: {folders} of 3 clips are folders" in capsys.readouterr().out
    assert Store(str(tmp_path / "data/own/counter/train.safetensors")).settings["fps"] == fps


def test_a_changed_frame_of_a_folder(tmp_path):
    """Features of a folder are made anew when one of its frames has changed, has come or has gone; else not."""
    folder, home = tmp_path / "clip", str(tmp_path / "data")
    folder.mkdir()
    for i in range(3):
        (folder / f"{i}.png").write_bytes(b"xx")
        os.utime(folder / f"{i}.png", (100 + i, 100 + i))
    row = {"name": "a", "text": "ja", "video": str(folder)}

    def seen():
        counter = Counter()
        prepare("own", {"train": [row], "dev": [], "test": []}, home, counter)
        return counter.seen

    assert seen() == ["clip"] and seen() == []
    os.utime(folder / "1.png", (200, 200))  # another picture of the same size
    assert seen() == ["clip"] and seen() == []
    (folder / "3.png").write_bytes(b"")
    os.utime(folder / "3.png", (50, 50))
    assert seen() == ["clip"]
    (folder / "2.png").write_bytes(b"xxx")
    os.utime(folder / "2.png", (102, 102))
    assert seen() == ["clip"] and seen() == []
    assert clips_of(home, "own", "counter", "train").lengths == [7]


def test_a_store_begins_its_numbers_at_eight_bytes(root, want):
    """
    safetensors' own writer does, and so readers may map the file as it lies; its header names the clips in the rows'
    order.
    """
    raw = want["own/toycnn/train.safetensors"]
    n = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:8 + n])
    assert n % 8 == 0 and [k for k in header if k != "__metadata__"] == ["a", "d", "e", "f", "g"]
    assert [header[k]["data_offsets"][0] for k in "adefg"] == [2 * 1024 * m for m in (0, 40, 110, 115, 179)]
    assert len(raw) == 8 + n + 2 * 1024 * 188
