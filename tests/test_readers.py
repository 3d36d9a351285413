"""
Data sets as they were downloaded: every reader against its source, hostile pickles, the check, ready features.

    python -m pytest tests/test_readers.py
"""
import collections
import csv
import gzip
import io
import json
import os
import pickle
import re
import resource
import struct
import subprocess
import sys
import unicodedata
import zipfile
import zlib

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from conftest import ROOT, clips_of
from test_data import bad, shades, write_image

import data
from lib import features, pickles, video
from lib.check import check
from lib.features import Store
from lib.pickles import read_pickle
from lib.readers import (
    READERS,
    SPLITS,
    deal_out,
    read_clips,
    read_csl_daily,
    read_gfslt,
    read_how2sign,
    read_openasl,
    read_phoenix14t,
    read_slt,
)


@pytest.fixture(autouse=True)
def forget():
    pickles.outline.cache_clear()  # tests write a file of one name twice


def run(monkeypatch, tmp_path, *args):
    """data.main() with these arguments; the data set is called `set`, its folder is returned."""
    words = ["dataset=set", "backbone=toycnn", f"data_dir={tmp_path / 'data'}", *args]
    monkeypatch.setattr(sys, "argv", ["data.py", *words])
    data.main()
    return tmp_path / "data" / "set"


def write_pickle(path, content, zipped=True, protocol=4):
    raw = content if isinstance(content, bytes) else pickle.dumps(content, protocol)
    path.write_bytes(gzip.compress(raw, 1) if zipped else raw)
    return str(path)


def unpickled(path):
    """The reference: python's own pickle, for files that can be trusted."""
    return pickle.load(gzip.open(path))


def rows_of(folder, split):
    return [json.loads(line) for line in open(folder / f"{split}.jsonl", encoding="utf-8")]


def neccam(split, n=3, width=8, seed=0, dtype=torch.float32):
    """Clips in neccam's form, of 2, 3, ... frames."""
    g = torch.Generator().manual_seed(seed + len(split))
    return [{"name": f"{split}/clip{split}-{i}", "signer": f"Signer0{i}", "gloss": "REGEN KOMMEN",
             "text": f"regen {i} in {split} .", "sign": torch.randn(i + 2, width, generator=g).to(dtype)}
            for i in range(n)]


def make_slt(folder, stem="phoenix14t.pami0", **options):
    folder.mkdir(exist_ok=True)
    made = {s: neccam(s, **options) for s in SPLITS}
    for split, clips in made.items():
        write_pickle(folder / f"{stem}.{split}", clips)
    return made

# ---------------------------------------------------------------------------------------------------------------------
# Own clips

def test_real_own_clips(real):
    splits, dealt = read_clips(str(real / "isl"))
    assert len(splits["train"]) == 10 and not splits["dev"] and not splits["test"] and not dealt
    for row in splits["train"]:
        sizes = {f.shape for f in video.frames(row["video"], 32)}  # decoded in full, kept small
        assert sizes == {(32, 32, 3)}, row["video"]
    assert {"name": "sit_down", "text": "sit down", "video": str(real / "isl" / "sit_down.gif")} in splits["train"]


@pytest.fixture
def own(tmp_path):
    """Content of clips.tsv -> what read_clips says of it; a.mp4, b.mp4, c.gif and a folder d of frames are there."""
    for name in ("a.mp4", "b.mp4", "c.gif"):
        (tmp_path / name).touch()
    (tmp_path / "d.x").mkdir()

    def read(table):
        (tmp_path / "clips.tsv").write_bytes(table if isinstance(table, bytes) else table.encode())
        return read_clips(str(tmp_path))
    return read


def test_clips_tsv(own, tmp_path):
    splits, dealt = own("text\tfile\n Wie geht's? \ta.mp4\n\n\"quoted\"\td.x\nmit\u2028Zeichen\tc.gif\n")
    assert not dealt and splits == {"dev": [], "test": [], "train": [
        {"name": "a", "text": "Wie geht's?", "video": str(tmp_path / "a.mp4")},
        {"name": "d.x", "text": "quoted", "video": str(tmp_path / "d.x")},
        {"name": "c", "text": "mit\u2028Zeichen", "video": str(tmp_path / "c.gif")}]}


def test_clips_tsv_as_windows_writes_it(own, capsys):
    splits, dealt = own("\ufefffile\ttext\tsplit\tsigner\tgloss\r\n"
                        "a.mp4\tüber\ttest\tS1\tÜBER ICH\r\nb.mp4\tja\t\t\t\r\n")
    assert dealt and [r["name"] for r in splits["train"]] == ["b"] and not splits["dev"]
    row = {"name": "a", "text": "über", "video": "", "signer": "S1", "gloss": "ÜBER ICH"}
    assert splits["test"][0] | {"video": ""} == row
    assert "signer" not in splits["train"][0]
    assert "1 of 2 clips have no split and go to train" in capsys.readouterr().out
    own("file\ttext\na.mp4\tja\nb.mp4\tnein\n")
    own("file\ttext\tsplit\na.mp4\tja\ttrain\nb.mp4\tnein\ttest\n")
    assert "no split" not in capsys.readouterr().out


CELLS = [("a.mp4", 'Er sagt "hallo", und geht; ja'), ("b.mp4", '"Ja"'), ("c.gif", "Grüße\naus Köln"),
         ("d.x", '5" breit')]


@pytest.mark.parametrize("sep", ["\t", ",", ";"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_tables_as_programs_write_them(own, sep, encoding, end):
    """Excel, LibreOffice and pandas: quotes where they are needed, rows of empty cells at the end."""
    f = io.StringIO(newline="")
    quotes = csv.QUOTE_ALL if end == "\r" else csv.QUOTE_MINIMAL  # of "\n" it would think nothing
    csv.writer(f, delimiter=sep, lineterminator=end, quoting=quotes).writerows([("file", "text"), *CELLS, ("", "")])
    found = own(f.getvalue().encode(encoding))[0]["train"]
    assert [(os.path.basename(r["video"]), r["text"]) for r in found] == CELLS


@pytest.mark.parametrize("disk", ["NFC", "NFD"])
@pytest.mark.parametrize("table", ["NFC", "NFD"])
def test_names_as_macos_writes_them(tmp_path, monkeypatch, disk, table):
    """An umlaut is one character or two, on the disk, in the table and in the features: it is the same clip."""
    root = tmp_path / unicodedata.normalize("NFC", "für")  # the folder's own name need not be of the same kind
    root.mkdir()
    name = lambda form, end="": unicodedata.normalize(form, "grüße" + end)
    write_image(tmp_path / "1.png", shades(50)[0])
    (root / name(disk)).mkdir()
    (tmp_path / "1.png").rename(root / name(disk) / "1.png")
    (root / "clips.tsv").write_text("file\ttext\n" + name(table) + "\tja\n", encoding="utf-8")
    splits = read_clips(str(root))[0]
    assert not check(splits)[1] and splits["train"][0]["name"] == name("NFC")
    np.save(root / name(disk, ".npy"), np.ones((1, 4), np.float32))
    safetensors.numpy.save_file({name(disk): np.ones((1, 4), np.float32)}, tmp_path / "f.safetensors")
    for path in (f"{root}", f"{tmp_path}/f.safetensors"):
        assert check(splits, [path])[4] == {name("NFC"): (1, 4)}


@pytest.mark.parametrize("table, says", [
    ("file\ttext\na.mp4\tja\n\tnein\n", (":3",)),
    ("file\tsentence\na.mp4\tja\n", ("no column text",)),
    ("a.mp4\tja\n", ("no column file",)),
    ("file:text\na.mp4:ja\n", ("no column file",)),
    ('file\ttext\na.mp4\t"ja\nb.mp4\tnein\n', ("begins with a quote",)),
    ('file\ttext\na.mp4\t"I went.\nb.mp4\tThen it rained.\nc.mp4\tIt was late."\n', ("clips.tsv:4", "whole row")),
    ("file\ttext\na.mp4\t" + "ja " * 50000 + "\n", (":2", "limit")),
    ('file\ttext\t"signer\na.mp4\tja\tS1\n', ("clips.tsv:1", "begins with a quote")),
    ("", ("no column file",)),
    ("file\ttext\n\n", ("no clips",)),
    ("file\ttext\n\na.mp4\tja\tnein\n", (":3", "3 columns", "2")),
    ("file\ttext\na.mp4\n", (":2", "1 columns", "2")),
    ("file\ttext\tsplit\na.mp4\tja\tvalid\n", (":2", "clip a", "valid", "train, dev, test")),
    ("file\ttext\na.mp4\tfür\n".encode("cp1252"), (":2", "UTF-8", "byte 17", "save it as UTF-8")),
    (b"PK\3\4\xff\xff", ("zip archive", ".xlsx")),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", ("no column file", "Git LFS pointer"))])
def test_wrong_clips_tsv(own, tmp_path, table, says):
    with bad(tmp_path / "clips.tsv", *says):
        own(table)


@pytest.mark.parametrize("line, trouble", [
    ("z.mp4\tnein", "z.mp4 does not exist"), ("b.mp4\t ", "clip b: has an empty text"),
    ("a.mp4\tnein", "clip a: stands there already, in train"), ("a.gif\tnein", "a.mp4"),
    ("d.x\tnein", "has no frames"), ("b.mp4\tnein", "is an empty file"), ("../x.mp4\tnein", "inside the folder"),
    ("/x.mp4\tnein", "inside the folder"), ("__metadata__.gif\tnein", "inside the folder")])
def test_broken_own_clips(own, tmp_path, line, trouble):
    for name in ("a.mp4", "a.gif", "__metadata__.gif"):
        (tmp_path / name).write_text("full")
    good, problems, *_ = check(own(f"file\ttext\na.mp4\tja\n{line}\n")[0])
    assert [r["name"] for r in good["train"]] == ["a"] and len(problems) == 1 and trouble in problems[0]


def test_no_clips_tsv(tmp_path):
    with bad(tmp_path / "clips.tsv", "file<TAB>text"):
        read_clips(str(tmp_path))
    with bad(tmp_path / "absent"):
        read_clips(str(tmp_path / "absent"))


@pytest.mark.parametrize("n, ratio, want", [
    (20, "0.8,0.1,0.1", (16, 2, 2)), (1000, "0.8,0.1,0.1", (800, 100, 100)), (30, "1,0,0", (30, 0, 0)),
    (21, ".5,.25,.25", (10, 6, 5))])
def test_deal_out(n, ratio, want):
    rows = [{"name": f"clip{i}"} for i in range(n)]
    splits = deal_out(rows, ratio)
    assert tuple(len(splits[s]) for s in SPLITS) == want
    assert sorted(r["name"] for part in splits.values() for r in part) == sorted(r["name"] for r in rows)
    assert deal_out(rows[::-1], ratio) == splits  # the order of the table does not matter
    if n == 1000:
        assert splits["train"] != rows[:800]  # the test clips are not just the last ones


@pytest.mark.parametrize("n, dealt", [(19, [19]), (20, [16, 2, 2])], ids=str)
def test_from_20_clips_on_some_are_held_out(tmp_path, monkeypatch, n, dealt):
    for i in range(n):
        write_image(tmp_path / f"{i}.png", shades(10 * i)[0])
    (tmp_path / "clips.tsv").write_text("file\ttext\n" + "".join(f"{i}.png\tx\n" for i in range(n)))
    folder = run(monkeypatch, tmp_path, f"root={tmp_path}", "device=cpu", "workers=0")
    assert [len(rows_of(folder, split)) for split in SPLITS if (folder / f"{split}.jsonl").exists()] == dealt


@pytest.mark.parametrize("args", [["reader=phoenix"], ["device=tpu"], ["fps=-1"], ["workers=-1"], ["dataset="],
                                  ["root="]], ids=str)
def test_a_wrong_word_of_the_command_line(tmp_path, monkeypatch, capsys, args):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, tmp_path, f"root={tmp_path}", *args)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and args[0].split("=")[0] in said


@pytest.mark.parametrize("ratio", ["0.8,0.2", "0.8,0.1,0.2", "a,b,c", "", "1.1,-0.1,0", "nan,0,0"])
def test_wrong_ratio(ratio):
    with bad("ratio="):
        deal_out([{"name": "a"}], ratio)

# ---------------------------------------------------------------------------------------------------------------------
# PHOENIX-2014T

PHOENIX = "PHOENIX-2014-T-release-v3/PHOENIX-2014-T"
HEADER = "name|video|start|end|speaker|orth|translation\n"


def make_phoenix(root, texts, frames=2):
    """PHOENIX-2014T's release folder: {split: {name: text}}, frames made of nothing."""
    home = root / PHOENIX
    (home / "annotations/manual").mkdir(parents=True)
    for split, clips in texts.items():
        table = HEADER + "".join(f"{n}|{n}/1/*.png|-1|-1|Signer01|REGEN KOMMEN|{t}\n" for n, t in clips.items())
        (home / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv").write_text(table, encoding="utf-8")
        for name in clips:
            folder = home / "features/fullFrame-210x260px" / split / name
            folder.mkdir(parents=True)
            for i in range(frames):
                write_image(folder / f"images{i + 1:04}.png", shades(9 * i)[0])
    return root


@pytest.mark.parametrize("root", ["", "phoenix14t", "phoenix14t/PHOENIX-2014-T-release-v3", "phoenix14t/" + PHOENIX])
def test_phoenix_real(real, root):
    splits, dealt = read_phoenix14t(str(real / root))
    assert dealt
    for split in SPLITS:
        home = real / "phoenix14t" / PHOENIX
        with open(home / f"annotations/manual/PHOENIX-2014-T.{split}.corpus.csv", encoding="utf-8", newline="") as f:
            source = list(csv.DictReader(f, delimiter="|", quoting=csv.QUOTE_NONE))
        found = [(r["name"], r["text"], r["signer"], r["gloss"]) for r in splits[split]]
        assert found == [(r["name"], r["translation"], r["speaker"], r["orth"]) for r in source]
        assert len(video.read_video(splits[split][0]["video"])) == 2


def test_phoenix_quotes_and_separators(tmp_path):
    make_phoenix(tmp_path, {"train": {"a": 'er sagt "guten abend', "b": "zeile\u2028zwei"}, "test": {"c": "c"}})
    splits, _ = read_phoenix14t(str(tmp_path))
    assert [r["text"] for r in splits["train"]] == ['er sagt "guten abend', "zeile\u2028zwei"] and splits["dev"] == []


@pytest.mark.parametrize("form, rate", [("phoenix14t", 25), ("csl_daily", 30)])
def test_frame_folders_have_the_rate_of_their_data_set(tmp_path, monkeypatch, form, rate):
    """
    They cannot say it themselves; a store says it to whoever extracts another clip. The data set's name says its form.
    """
    if form == "phoenix14t":
        root = make_phoenix(tmp_path, {s: {s: "regen"} for s in SPLITS})
    else:
        root = make_csl(tmp_path)
        for frame in root.glob("sentence/**/*.jpg"):
            write_image(frame, shades(70)[0])
    run(monkeypatch, tmp_path, f"dataset={form}", f"root={root}", "device=cpu", "workers=0")
    for split in SPLITS:
        store = Store(str(tmp_path / "data" / form / "toycnn" / f"{split}.safetensors"))
        assert json.loads(store.metadata["settings"])["fps"] == rate


def test_phoenix_wrong(tmp_path):
    with bad(tmp_path / "absent", "no such folder"):
        read_phoenix14t(str(tmp_path / "absent"))
    with bad(tmp_path, "PHOENIX-2014-T.train.corpus.csv"):
        read_phoenix14t(str(tmp_path))
    make_phoenix(tmp_path, {"train": {"a": "x"}})
    table = tmp_path / PHOENIX / "annotations/manual/PHOENIX-2014-T.train.corpus.csv"
    table.write_bytes(HEADER.encode() + "a|a/1/*.png|-1|-1|S|X|für alle\n".encode("latin-1"))
    with bad(f"{table}:2", "UTF-8", "byte"):
        read_phoenix14t(str(tmp_path))
    table.write_text(HEADER + "a|a/1/*.png|-1|-1|S|X\n")
    with bad(f"{table}:2", "6 columns", "7"):
        read_phoenix14t(str(tmp_path))
    for copy in ("one", "two"):
        make_phoenix(tmp_path / "twice" / copy, {"train": {"a": "x"}})
    with bad("more than once", "root="):
        read_phoenix14t(str(tmp_path / "twice"))


def test_phoenix_to_store(tmp_path, monkeypatch, capsys):
    """
    The whole way, with a byte order mark and a frame folder missing, one empty, one repeated name: strict says which,
    strict=false goes on.
    """
    make_phoenix(tmp_path, {"train": {"a": "eins", "b": "zwei", "c": " "}, "dev": {"d": "eins", "a": "drei"},
                            "test": {"e": "zwei", "f": "x"}})
    home = tmp_path / PHOENIX
    table = home / "annotations/manual/PHOENIX-2014-T.train.corpus.csv"
    table.write_bytes(b"\xef\xbb\xbf" + table.read_bytes())
    for f in (home / "features/fullFrame-210x260px/train/b").iterdir():
        f.unlink()
    (home / "features/fullFrame-210x260px/test/f").rename(tmp_path / "away")
    args = ("reader=phoenix14t", f"root={tmp_path}")
    with bad("4 clip(s)", "problems.txt", "strict=false"):
        run(monkeypatch, tmp_path, *args)
    listed = (tmp_path / "data/set/problems.txt").read_text().splitlines()
    out = capsys.readouterr().out
    begins = "train: clip b: ", "train: clip c: ", "dev: clip a: ", "test: clip f: "
    words = "has no frames", "empty text", "already, in train", "does not exist"
    for line, begin, word in zip(listed, begins, words, strict=True):
        assert line.startswith(begin) and word in line and f"problem: {line}\n" in out
    assert not (tmp_path / "data/set/train.jsonl").exists()  # nothing was computed
    folder = run(monkeypatch, tmp_path, *args, "strict=false")
    assert [[r["name"] for r in rows_of(folder, s)] for s in SPLITS] == [["a"], ["d"], ["e"]]
    assert rows_of(folder, "dev")[0] | {"video": ""} == {
        "name": "d", "text": "eins", "video": "", "signer": "Signer01", "gloss": "REGEN KOMMEN", "frames": 2}
    assert len(clips_of(tmp_path / "data", "set", "toycnn", "train")) == 1


def test_exit_code(tmp_path):
    make_phoenix(tmp_path, {"train": {"a": ""}})
    command = [sys.executable, "data.py", "dataset=phoenix14t", f"root={tmp_path}", f"data_dir={tmp_path}/data"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1 and "1 clip(s)" in done.stderr
    assert "clip a: has an empty text" in done.stdout

# ---------------------------------------------------------------------------------------------------------------------
# CSL-Daily, How2Sign, OpenASL

def make_csl(root, frames="sentence/frames_512x512"):
    texts = [["他", "是", "谁", "？"], ["Ａ", "b", "，", "3"], ["好", "。"]]
    info = [{"name": f"S00000{i}_P0000_T00", "length": 2, "label_gloss": ["他", "谁"], "label_char": chars,
             "label_word": ["x"], "label_postag": ["r"], "signer": i, "time": 0} for i, chars in enumerate(texts)]
    (root / "sentence_label").mkdir(parents=True)
    write_pickle(root / "sentence_label/csl2020ct_v2.pkl", {"info": info, "gloss_map": ["a"]}, zipped=False, protocol=3)
    splits = {0: "train", 9: "train", 1: "dev", 2: "test"}
    table = "name|split\n" + "".join(f"S00000{i}_P0000_T00|{s}\n" for i, s in splits.items())
    (root / "sentence_label/split_1.txt").write_text(table)
    for e in info:
        folder = root / frames / e["name"]
        folder.mkdir(parents=True)
        for i in range(e["length"]):
            (folder / f"{i:06}.jpg").touch()
    return root


@pytest.mark.parametrize("frames", ["sentence/frames_512x512", "sentences", "sentence_frames-512x512",
                                    "sentence_frames-512x512/frames_512x512", "sentence"])
def test_csl_daily(tmp_path, frames, capsys):
    splits, dealt = read_csl_daily(str(make_csl(tmp_path / "csl", frames).parent))
    assert dealt and [[r["text"] for r in splits[s]] for s in SPLITS] == [["他是谁？"], ["Ａb，3"], ["好。"]]
    folder = str(tmp_path / "csl" / frames / "S000000_P0000_T00")
    assert splits["train"] == [{"name": "S000000_P0000_T00", "text": "他是谁？", "video": folder, "signer": 0,
                                "gloss": "他 谁", "frames": 2}]
    assert "S000009_P0000_T00" in capsys.readouterr().out  # in split_1.txt without a text: said
    good, problems, notes, *_ = check(splits)
    assert not problems and good == splits and "published are 18401/1077/1176" in notes[0]
    os.remove(os.path.join(good["dev"][0]["video"], "000001.jpg"))
    assert "clip S000001_P0000_T00: 1 frames, its labels say 2" in check(splits)[2][1]


def test_csl_daily_18400():
    row = lambda split, i: {"name": f"S{i:06}_P0000_T00", "text": "好", "video": "."}
    notes = check({s: [row(s, i) for i in range(n)] for s, n in zip(SPLITS, (18400, 1077, 1176))})[2]
    assert "clips: 18400/1077/1176" in notes[0] and "known variant" in notes[0]


def test_csl_daily_wrong(tmp_path):
    make_csl(tmp_path)
    (tmp_path / "sentence_label/split_1.txt").write_text("name|split\nS000000_P0000_T00|valid\n")
    with bad("split_1.txt:2", "valid"):
        read_csl_daily(str(tmp_path))
    write_pickle(tmp_path / "sentence_label/csl2020ct_v2.pkl", ["no"], zipped=False)
    pickles.outline.cache_clear()
    with bad("csl2020ct_v2.pkl", "info"):
        read_csl_daily(str(tmp_path))


@pytest.mark.parametrize("table, clips", [
    (".", "."), (".", "{}"), (".", "{}/raw_videos"), ("{}", "{}_raw_videos"),
    ("{}_rgb_front_clips", "{}_rgb_front_clips/raw_videos"),
    ("sentence_level/{}/text/en/raw_text/re_aligned", "sentence_level/{}/rgb_front/raw_videos")])
def test_how2sign(tmp_path, table, clips):
    header = "VIDEO_ID\tVIDEO_NAME\tSENTENCE_ID\tSENTENCE_NAME\tSTART_REALIGNED\tEND_REALIGNED\tSENTENCE\n"
    for s in ("train", "val", "test"):
        for folder in (table, clips):
            (tmp_path / folder.format(s)).mkdir(parents=True, exist_ok=True)
        (tmp_path / table.format(s) / f"how2sign_realigned_{s}.csv").write_text(
            header + f'-x\t-x-5-rgb_front\t-x_0\t-x_0-{s}\t0.1\t2.5\tIt\'s 5" wide.\n'
            + f'-x\t-x-5-rgb_front\t-x_1\t-x_1-{s}\t0.1\t2.5\t"""Hi,"" he said."\n')
        for i in range(2):
            (tmp_path / clips.format(s) / f"-x_{i}-{s}.mp4").write_text("video")
    splits, _ = read_how2sign(str(tmp_path))
    for split, s in zip(SPLITS, ("train", "val", "test")):
        rows = [(r["name"], r["text"]) for r in splits[split]]
        assert rows == [(f"-x_0-{s}", 'It\'s 5" wide.'), (f"-x_1-{s}", '"Hi," he said.')]
    assert not check(splits)[1]
    os.remove(splits["dev"][1]["video"])
    assert "dev: clip -x_1-val" in check(read_how2sign(str(tmp_path))[0])[1][0]
    with bad("how2sign_realigned_train.csv"):
        read_how2sign(str(tmp_path / "absent"))


@pytest.mark.parametrize("folder", ["", "clips", "valid"])
def test_openasl(tmp_path, folder):
    (tmp_path / folder).mkdir(exist_ok=True)
    names = ["a-00:00:01.000-00:00:02.500", "b", "c"]
    rows = [f'{n}\ty\t00:00:01.000\t00:00:02.000\tHe said "{n[0]}".\the said\t\t{s}\n'
            for n, s in zip(names, ("train", "valid", "test"))]
    header = "vid\tyid\tstart\tend\traw-text\ttokenized-text\tgloss\tsplit\n"
    (tmp_path / "openasl-v1.0.tsv").write_text(header + "".join(rows))
    (tmp_path / folder / (names[0].replace(":", "%") + ".mp4")).write_text("video")
    (tmp_path / folder / "b.mp4").write_text("video")
    splits, _ = read_openasl(str(tmp_path))
    found = [[(r["name"], r["text"]) for r in splits[s]] for s in SPLITS]
    assert found == [[(n, f'He said "{n[0]}".')] for n in names]
    problems = check(splits)[1]
    assert len(problems) == 1 and "test: clip c" in problems[0]

# ---------------------------------------------------------------------------------------------------------------------
# The pickles of GFSLT and neccam

@pytest.mark.long
def test_gfslt_real(real):
    splits, _ = read_gfslt(str(real / "labels"))
    for split in SPLITS:
        source = unpickled(real / "labels" / f"labels.{split}")
        found = [(split + "/" + r["name"], r["text"], r.get("gloss", ""), r["frames"]) for r in splits[split]]
        assert found == [(n, e["text"], e["gloss"], len(e["imgs_path"])) for n, e in source.items()]
    assert [len(splits[s]) for s in SPLITS] == [7096, 519, 642]
    *_, table, _ = check(splits)
    assert table[3].split() == ["test", "642", "642", "642", "32"]


def test_csl_variant_real(real):
    splits, _ = read_gfslt(str(real / "labels" / "csl_daily.labels.{split}"))
    for split in SPLITS:
        source = unpickled(real / "labels" / f"csl_daily.labels.{split}")
        found = [(r["name"], r["text"], r["gloss"]) for r in splits[split]]
        assert found == [(n, e["text"], " ".join(e["gloss"])) for n, e in source.items()]
    assert splits["train"][0]["video"].endswith("S000000_P0000_T00.mp4")


@pytest.mark.parametrize("inside", [".", "features/fullFrame-210x260px", PHOENIX + "/features/fullFrame-210x260px"])
def test_gfslt_frames(tmp_path, inside):
    a = {"name": "train/a", "text": "ja", "gloss": "JA", "length": 2,
         "imgs_path": ["train/a/images0001.png", "train/a/images0002.png"]}
    b = {"name": "train/b", "text": "nein.", "gloss": "NEIN", "length": 2}
    write_pickle(tmp_path / "labels.train", {"train/a": a, "train/b": b})
    for name in "ab":
        (tmp_path / inside / "train" / name).mkdir(parents=True)
        for i in (1, 2):
            (tmp_path / inside / "train" / name / f"images000{i}.png").touch()
    good, problems, notes, *_ = check(read_gfslt(str(tmp_path))[0])
    assert not problems and notes == ["dev: no clips", "test: no clips"]
    assert [(r["name"], r["text"], r["frames"]) for r in good["train"]] == [("a", "ja", 2), ("b", "nein.", 2)]


def test_slt_real(real):
    splits, _ = read_slt(str(real / "labels"))
    for split in SPLITS:
        source = unpickled(real / "labels" / f"neccam.phoenix14t.{split}")
        found = [(f"{split}/{r['name']}", r["text"] + " .", r["gloss"], r["signer"], r["frames"])
                 for r in splits[split]]
        assert found == [(e["name"], e["text"], e["gloss"], e["signer"], e["num_frames"]) for e in source]


@pytest.mark.parametrize("content, says", [
    ([], "list or a dict"), ("x", "list or a dict"), ([{"name": "a"}], "no text `text`"),
    ([{"name": 3, "text": "x"}], "no text `name`"), ([7], "clip number 1")])
def test_labels_of_another_form(tmp_path, content, says):
    path = write_pickle(tmp_path / "labels.train", content)
    with bad(path, says):
        read_gfslt(str(tmp_path))


def test_no_labels(tmp_path):
    with bad(tmp_path / "labels.train", "{split}"):
        read_gfslt(str(tmp_path))

# ---------------------------------------------------------------------------------------------------------------------
# Pickles

CASES = {"float32": np.arange(6, dtype=np.float32).reshape(2, 3), "big-endian": np.arange(6, dtype=">f8").reshape(3, 2),
         "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "float16": np.ones((1, 4), np.float16),
         "int": np.arange(4)[:, None], "large": np.random.default_rng(0).standard_normal((300, 100))}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("case", CASES)
def test_numpy_arrays(tmp_path, case, protocol):
    x = CASES[case]
    more = [(1, 2.5, None, True), {"x", "y"}, collections.OrderedDict(a=1), b"\x00\xff", "für", 10**30]
    content = {"a": x, "n": np.float32(2.5), "i": np.int64(7), "s": np.str_("ü"), "more": more}
    path = write_pickle(tmp_path / "p", content, protocol % 2 == 0, protocol)
    got = read_pickle(path)
    assert got["a"].data.dtype == x.dtype and got["a"].data.tobytes("F") == x.tobytes("F") and got["a"].shape == x.shape
    assert {k: v for k, v in got.items() if k != "a"} == {k: v for k, v in content.items() if k != "a"}
    outline = read_pickle(path, values=False)
    assert outline["a"].shape == x.shape and outline["a"].data is None


@pytest.mark.parametrize("x", [
    torch.randn(3, 4), torch.randn(4, 3).T, torch.randn(10, 4)[2:5], torch.randn(3, 4).half(),
    torch.randn(3, 4).double(), torch.randn(3, 4).bfloat16(), torch.randn(300, 40)],
    ids=["plain", "transposed", "slice", "half", "double", "bfloat16", "large"])
def test_torch_tensors(tmp_path, x):
    path = write_pickle(tmp_path / "p", [x, torch.tensor([])])
    got, empty = read_pickle(path)
    assert (torch.from_numpy(got.data.copy()) == (x.float() if x.dtype == torch.bfloat16 else x)).all()
    assert got.shape == x.shape and empty.shape == (0,)
    assert [a.shape for a in read_pickle(path, values=False)] == [x.shape, (0,)]


class Call:
    """Pickles to a call of a function with arguments."""

    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def old_reduce(module, name, arg):
    return f"c{module}\n{name}\n(V{arg}\ntR.".encode()


def touch(mark):
    """What pickles to a call that makes the file `mark`."""
    return Call(os.system, f"touch {mark}")


def text_of(command):
    """A short text as protocol 4 writes it."""
    return b"\x8c" + bytes([len(command)]) + command.encode()


HOSTILE = {
    "system": lambda mark: pickle.dumps(touch(mark), 4),
    "system, protocol 0": lambda mark: pickle.dumps(touch(mark), 0),
    "GLOBAL": lambda mark: old_reduce("os", "system", f"touch {mark}"),
    "GLOBAL builtins": lambda mark: old_reduce("builtins", "eval", f"open({str(mark)!r},'w')"),
    "INST": lambda mark: f"(Vtouch {mark}\nios\nsystem\n.".encode(),
    "OBJ": lambda mark: f"(cos\nsystem\nVtouch {mark}\no.".encode(),
    "STACK_GLOBAL": lambda mark: b"\x80\x04\x8c\x02os\x8c\x06system\x93" + text_of(f"touch {mark}") + b"\x85R.",
    "dotted": lambda mark: b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__init__\x93.",
    "getattr": lambda mark: pickle.dumps(Call(getattr, collections.OrderedDict, "fromkeys")),
    "inside a container": lambda mark: pickle.dumps([{"name": "a", "text": touch(mark)}]),
    "exec in numpy": lambda mark: old_reduce("numpy.testing._private.utils", "runstring", f"open({str(mark)!r},'w')"),
    "numpy.load": lambda mark: old_reduce("numpy", "load", mark),
    "torch.load": lambda mark: old_reduce("torch", "load", mark),
    "torch hub": lambda mark: old_reduce("torch.hub", "load", mark),
    "partial": lambda mark: b"cfunctools\npartial\n.", "EXT1": lambda mark: b"\x80\x02\x82\x01.",
    "persistent id": lambda mark: b"Pid\n.", "copyreg": lambda mark: b"ccopyreg\n_reconstructor\n.",
    "storage that calls": lambda mark: pickle.dumps(
        Call(torch.storage._load_from_bytes, pickle.dumps(touch(mark)))),
    "saved tensor that calls": lambda mark: pickle.dumps(
        Call(torch.storage._load_from_bytes, saved(touch(mark)))),
    "subtype of array": lambda mark: b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(I0\ntS'b'\ntR.",
    "BUILD on a class": lambda mark: (b"cnumpy\ndtype\n(N}V__init__\ncbuiltins\nset\nstb0"
                                      b"cnumpy\ndtype\n(Vf4\ntRcbuiltins\neval\n."),
}


def saved(x):
    f = io.BytesIO()
    torch.save(x, f)
    return f.getvalue()


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("values", [True, False])
def test_hostile_pickles(tmp_path, case, values):
    mark = tmp_path / "x"
    path = write_pickle(tmp_path / "labels.train", HOSTILE[case](mark), zipped=values)
    if values or "that calls" not in case:  # without values no tensor is loaded at all
        with bad(path):
            read_pickle(path, values)
    else:
        read_pickle(path, values)
    assert not mark.exists()


def test_hostile_pickle_is_named(tmp_path):
    path = write_pickle(tmp_path / "labels.train", HOSTILE["system"](tmp_path / "x"))
    with bad(path, "posix.system", "nothing of it was run"):
        read_gfslt(str(tmp_path))


def test_the_hostile_pickles_are_hostile(tmp_path):
    """Python's own pickle runs them: the test above can fail."""
    for i, case in enumerate(("system", "GLOBAL", "INST", "OBJ", "STACK_GLOBAL", "storage that calls")):
        mark = tmp_path / str(i)
        try:
            pickle.loads(HOSTILE[case](mark))
        except RuntimeError:  # torch finds out afterwards
            assert case == "storage that calls"
        assert mark.exists(), case


def array_state(shape, dtype="f4", raw=b"\0" * 16, fields=None):
    """A numpy array by hand: any shape, any dtype over any bytes."""
    return (b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntcbuiltins\nset\n)RtR(I1\n"
            + pickle.dumps(shape, 0)[:-1] + b"cnumpy\ndtype\n(V" + dtype.encode() + b"\nI0\nI1\ntR(I3\nV<\nN"
            + pickle.dumps(fields, 0)[:-1] + b"NI-1\nI-1\nI0\ntbI00\n"
            + pickle.dumps(raw, 4)[2:-1].replace(b"\x94", b"") + b"tb.")


def torch_rebuild(size, stride, offset=0):
    four = torch.zeros(4).untyped_storage()
    storage = torch.storage.TypedStorage(wrap_storage=four, dtype=torch.float32, _internal=True)
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, collections.OrderedDict())


def compressed():
    """torch's own file of a storage, deflated: a thousandth of what it unpacks to."""
    f, plain = io.BytesIO(), io.BytesIO(saved(torch.zeros(10**6).untyped_storage()))
    with zipfile.ZipFile(f, "w", zipfile.ZIP_DEFLATED) as z, zipfile.ZipFile(plain) as source:
        for name in source.namelist():
            z.writestr(name, source.read(name))
    return f.getvalue()


PETA = struct.pack("<Q", 10**15)
SHAPES = {
    "petabyte of numpy": array_state((10**6, 10**9)), "negative": array_state((-1, -4)),
    "object": array_state((2,), "O"), "void": array_state((2,), "V8"), "fields": array_state((4,), "f4", fields=("a",)),
    "wrong bytes": array_state((5,)), "petabyte of torch": pickle.dumps(torch_rebuild((10**6, 10**9), (10**9, 1))),
    "stride 0": pickle.dumps(torch_rebuild((10**6, 10**9), (0, 0))),
    "beyond the storage": pickle.dumps(torch_rebuild((4,), (2,))),
    "offset": pickle.dumps(torch_rebuild((4,), (1,), 1)),
    "negative offset": pickle.dumps(torch_rebuild((2,), (1,), -2)),
    "compressed tensor": pickle.dumps(Call(torch.storage._load_from_bytes, compressed())),
    "memo of 64 GB": b"\x80\x02Nr\xff\xff\xff\xffN0N0", "petabyte of bytes": b"\x80\x04\x8e" + PETA + b".",
    "petabyte of bytearray": b"\x80\x05\x96" + PETA + b".", "frame of a petabyte": b"\x80\x04\x95" + PETA + b"N.",
    "negative length": b"\x80\x02T" + struct.pack("<i", -5) + b".", "nothing": b"", "text": b"not a pickle at all",
    "no end": pickle.dumps([1, 2, 3])[:-1], "popped empty": b"0.", "garbage": bytes(range(256))}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("case", SHAPES)
def test_hostile_shapes(tmp_path, case, zipped):
    path = write_pickle(tmp_path / "p", SHAPES[case], zipped)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with bad(path):
        read_pickle(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


def test_arrays_by_hand_are_arrays(tmp_path):
    """The hand-made pickles above fail for their shapes and not for their form."""
    assert read_pickle(write_pickle(tmp_path / "p", array_state((2, 2)))).data.tolist() == [[0, 0], [0, 0]]
    assert read_pickle(write_pickle(tmp_path / "p", pickle.dumps(torch_rebuild((2, 2), (2, 1))))).shape == (2, 2)


def test_gzip_bomb(tmp_path, monkeypatch):
    bomb = b"\x80\x04\x8e" + struct.pack("<Q", 300 << 20) + b"\0" * (300 << 20)
    path = write_pickle(tmp_path / "p", bomb)
    del bomb
    assert os.path.getsize(path) < 3 << 20
    with bad(path, "0.3 GB", "MAX_PICKLE", "gunzip"):
        read_pickle(path)
    monkeypatch.setattr(pickles, "MAX_PICKLE", 1000)
    with bad("0.0 GB"):
        read_pickle(write_pickle(tmp_path / "q", [list(range(1000))]))


def test_truncated_and_damaged_gzip(tmp_path):
    raw = gzip.compress(pickle.dumps(neccam("train", 50)))
    for content in (raw[:len(raw) // 2], raw[:-4], raw[:-8] + b"\0\0\0\0" + raw[-4:],
                    raw[:500] + b"\xff\xff\xff" + raw[503:]):
        (tmp_path / "p").write_bytes(content)
        with bad(tmp_path / "p"):
            read_pickle(str(tmp_path / "p"))

# ---------------------------------------------------------------------------------------------------------------------
# Ready features

def same(got, want):
    """float16 of the source, bit by bit."""
    want = np.asarray(want).astype(np.float16)
    return got.shape == want.shape and got.numpy().tobytes() == want.tobytes()


def test_slt_with_features_inside(tmp_path, monkeypatch, capsys):
    made = make_slt(tmp_path / "slt")
    monkeypatch.setattr(data, "Extractor", None)  # none is built
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", "backbone=pami0")
    for split, clips in made.items():
        store = Store(str(folder / "pami0" / f"{split}.safetensors"))
        found = [(r["name"], r["text"], r["frames"]) for r in rows_of(folder, split)]
        assert found == [(e["name"].split("/")[1], e["text"][:-2], len(e["sign"])) for e in clips]
        assert all(same(store[e["name"].split("/")[1]], e["sign"]) for e in clips) and len(store.names) == len(clips)
        assert json.loads(store.metadata["settings"]) == {
            "backbone": "pami0", "weights": "", "imported": True,
            "features": f"{tmp_path}/slt/phoenix14t.pami0.{{split}}"}
    assert len(clips_of(tmp_path / "data", "set", "pami0", "test")) == 3
    assert "video" not in rows_of(folder, "train")[0]


SMALL = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}


def save_as(form, folder, prefix):
    """neccam's test features in another form -> the pattern that finds them."""
    for split in SPLITS:
        arrays = {(f"{split}/" if prefix else "") + e["name"].split("/")[1]: e["sign"] for e in neccam(split)}
        if form == "pickle":
            write_pickle(folder / f"f.{split}", {n: x.numpy() for n, x in arrays.items()})
        elif form == "pickle of dicts":
            write_pickle(folder / f"f.{split}", {n: {"name": n, "sign": x} for n, x in arrays.items()})
        elif form == "safetensors":
            safetensors.torch.save_file(arrays, folder / f"f.{split}.safetensors")
        elif form in SMALL:
            small = {n: x.to(SMALL[form]) for n, x in arrays.items()}
            safetensors.torch.save_file(small, folder / f"f.{split}.safetensors")
        else:
            for n, x in arrays.items():
                path = folder / ("npy" if "{split}" not in form else split) / f"{n}.npy"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, x.numpy())
    pickled, tensors = "f.{split}", "f.{split}.safetensors"
    return str(folder / {"pickle": pickled, "pickle of dicts": pickled, "safetensors": tensors, "bfloat16": tensors,
                         "float8": tensors}.get(form, form))


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("form", ["pickle", "pickle of dicts", "safetensors", "bfloat16", "float8", "{split}",
                                  "{split}/{name}.npy", "npy"])
def test_forms_of_features(tmp_path, monkeypatch, form, prefix):
    make_slt(tmp_path / "slt", width=2, seed=9)  # other features, not to be taken
    pattern = save_as(form, tmp_path, prefix)
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"features={pattern}",
                 "backbone=timm/resnet")
    for split in SPLITS:
        store = Store(str(folder / "timm/resnet" / f"{split}.safetensors"))
        for e in neccam(split):
            assert same(store[e["name"].split("/")[1]], e["sign"].to(SMALL.get(form, torch.float32)).float())


@pytest.mark.parametrize("form", ["pickle", "safetensors", "{split}", "npy"])
def test_features_that_have_not_changed_are_left_alone(tmp_path, monkeypatch, form):
    """A store may have 20 GB. Another file of one split changes the store of that split alone."""
    make_slt(tmp_path / "slt", width=2)
    pattern = save_as(form, tmp_path, True)
    again = lambda: run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"features={pattern}",
                        "backbone=x")
    written = lambda: {p.name: p.stat().st_mtime_ns for p in (tmp_path / "data/set").rglob("*.*") if p.is_file()}
    again()
    before = written()
    assert len(before) == 6 and again() and written() == before
    of_dev = [p for p in tmp_path.rglob("*") if p.is_file() and "dev" in str(p.relative_to(tmp_path))
              and not {"data", "slt"} & set(p.relative_to(tmp_path).parts)]
    os.utime(of_dev[0], (9, 9))
    again()
    assert {f for f, when in written().items() if when != before[f]} == {"dev.safetensors"}


def test_features_of_own_clips(tmp_path, monkeypatch):
    """Names that do begin with train/, no videos on the disk, concatenation of two kinds."""
    (tmp_path / "clips.tsv").write_text("file\ttext\tsplit\ntrain/a.mp4\tja\ttrain\ndev/b.mp4\tnein\tdev\n")
    a = {s: np.random.default_rng(i).standard_normal((5, 3 + i)) for i, s in enumerate(("train/a", "dev/b", "a", "b"))}
    for split, name in (("train", "a"), ("dev", "b")):
        safetensors.numpy.save_file({name: a[name][:, :2].copy()}, tmp_path / f"{split}.safetensors")
        (tmp_path / "npy" / split).mkdir(parents=True)
        np.save(tmp_path / "npy" / split / f"{name}.npy", a[f"{split}/{name}"][:, :3])
    folder = run(monkeypatch, tmp_path, f"root={tmp_path}", f"features={tmp_path}/{{split}}.safetensors,{tmp_path}/npy",
                 "backbone=two")
    for split, name in (("train", "a"), ("dev", "b")):
        want = np.concatenate([a[name][:, :2], a[f"{split}/{name}"][:, :3]], 1)
        assert same(Store(str(folder / "two" / f"{split}.safetensors"))[f"{split}/{name}"], want)


def test_concatenated_pickles(tmp_path, monkeypatch):
    one, two = make_slt(tmp_path / "slt", width=8), make_slt(tmp_path / "slt", "phoenix14t.pami1", width=5, seed=7)
    patterns = ",".join(f"{tmp_path}/slt/phoenix14t.{pami}.{{split}}" for pami in ("pami0", "pami1"))
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"features={patterns}",
                 "backbone=pami01")
    for split in SPLITS:
        store = Store(str(folder / "pami01" / f"{split}.safetensors"))
        for a, b in zip(one[split], two[split]):
            assert same(store[a["name"].split("/")[1]], torch.cat([a["sign"], b["sign"]], 1))


@pytest.mark.parametrize("change, says", [
    (lambda clips: clips.pop(1), "clip cliptrain-1: has no features in"),
    (lambda clips: clips[1].update(sign=torch.zeros(3)), "(3,), not (frames, width)"),
    (lambda clips: clips[1].update(sign=torch.zeros(0)), "features=states"),
    (lambda clips: clips[1].update(sign=torch.zeros(0, 8)), "(0, 8)"),
    (lambda clips: clips[1].update(sign=torch.zeros(3, 7)), "7 wide, those of the first clip 8"),
    (lambda clips: clips[1].update(sign="x"), "has no features")])
def test_features_of_a_clip_are_wrong(tmp_path, monkeypatch, change, says):
    make_slt(tmp_path / "slt")
    clips = neccam("train")
    change(clips)
    write_pickle(tmp_path / "f.train", clips)
    for split in ("dev", "test"):
        write_pickle(tmp_path / f"f.{split}", neccam(split))
    args = ("reader=slt", f"root={tmp_path / 'slt'}", f"features={tmp_path}/f.{{split}}", "backbone=x")
    with bad("1 clip(s)", "strict=false"):
        run(monkeypatch, tmp_path, *args)
    (line,) = (tmp_path / "data/set/problems.txt").read_text().splitlines()
    assert "clip cliptrain-1" in line and says in line
    folder = run(monkeypatch, tmp_path, *args, "strict=false")
    assert [r["name"] for r in rows_of(folder, "train")] == ["cliptrain-0", "cliptrain-2"]


def test_frames_of_two_files_differ(tmp_path):
    make_slt(tmp_path / "slt")
    np.save(tmp_path / "cliptrain-0.npy", np.zeros((9, 2), np.float32))
    (tmp_path / "cliptrain-1.npy").write_bytes(b"\x93NUMPY\x01\0")
    with open(tmp_path / "cliptrain-2.npy", "wb") as f:
        np.lib.format.write_array(f, np.array([os.system], object), allow_pickle=True)
    rows = read_slt(str(tmp_path / "slt"))[0]["train"]
    patterns = [f"{tmp_path}/slt/phoenix14t.pami0.{{split}}", str(tmp_path)]
    good, problems, *_ = check({"train": rows, "dev": [], "test": []}, patterns)
    assert "2 frames" in problems[0] and "9 frames" in problems[0]
    assert "cannot be read as an array: cut off" in problems[1] and "not of numbers" in problems[2]
    np.savez(tmp_path / "whole.npz", a=np.zeros((9, 2), np.float32))
    zipped = (tmp_path / "whole.npz").read_bytes()
    for broken, says in ((zipped, "zip archive"), (zipped[:-20], "zip archive"), (b"nothing", "no .npy of numbers"),
                         (b"\x93NUMPY\x01\0\x10\0{'descr': ((((((", "cut off, damaged")):
        (tmp_path / "cliptrain-1.npy").write_bytes(broken)
        assert says in check({"train": rows, "dev": [], "test": []}, patterns)[1][1]


@pytest.mark.parametrize("value, says", [(70000.0, "7e+04"), (float("inf"), "not finite"), (float("nan"), "not finite"),
                                         (-1e9, "1e+09")])
def test_what_float16_cannot_hold(tmp_path, monkeypatch, value, says):
    made = make_slt(tmp_path / "slt")
    made["dev"][1]["sign"][1, 3] = value
    write_pickle(tmp_path / "slt/phoenix14t.pami0.dev", made["dev"])
    with bad("phoenix14t.pami0.dev", "clip clipdev-1", says):
        run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", "backbone=x")


def test_largest_float16_is_kept():
    x = np.array([[65504.0, -65504, 65519, 6e-8]])
    assert features.half(x, "x").tolist() == [[65504, -65504, 65504, np.float16(6e-8)]]


def torch_saved(zipped):
    f = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, f, _use_new_zipfile_serialization=zipped)
    return f.getvalue()


@pytest.mark.parametrize("content, says", [
    (torch_saved(True), "torch.save"), (torch_saved(False), "torch.save"), (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5"),
    (b'[{"name": "a", "text": "b"}]', "JSON"), (b'\n{"a": 1}', "JSON"), (b"<!DOCTYPE html><html></html>", "a web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "Git LFS pointer, git lfs pull"),
    (b"\x93NUMPY\1\0", ".npy")], ids=lambda value: value if isinstance(value, str) else "")
def test_files_of_another_kind(tmp_path, content, says):
    """Named for what they are, with the forms that are read, as labels and as features."""
    for name in ("labels.train", "a.npy", "f.safetensors"):
        (tmp_path / name).write_bytes(content)
    with bad(tmp_path / "labels.train", says, "read are pickles"):
        read_gfslt(str(tmp_path))
    for path in ("labels.train", "f.safetensors"):
        with bad(tmp_path / path, says):
            features.open_features(str(tmp_path / path), "train", ["a"])
    if ".npy" not in says:
        assert says in features.open_features(str(tmp_path), "train", ["a"])["a"][0]


def test_transposed_features(tmp_path):
    """(width, frames): where the frames are known each clip says so, else the first that differs asks."""
    rows = []
    for i, T in enumerate((5, 5, 7)):
        (tmp_path / str(i)).mkdir()
        for n in range(T):
            (tmp_path / str(i) / f"{n}.png").touch()
        np.save(tmp_path / f"{i}.npy", np.zeros((16, T), np.float32))
        rows.append({"name": str(i), "text": "ja", "video": str(tmp_path / str(i))})
    look = lambda rows: check({"train": rows, "dev": [], "test": []}, [str(tmp_path)])[1]
    said = look(rows)
    assert len(said) == 3 and all("(16, " in line and "frames, (frames, width) is read" in line for line in said)
    assert len(look([r | {"video": "", "frames": T} for r, T in zip(rows, (5, 5, 7))])) == 3
    (line,) = look([r | {"video": ""} for r in rows])
    assert "clip 2: its features are 7 wide, those of the first clip 5" in line and "(width, frames)?" in line


def test_tensors_saved_on_a_gpu(tmp_path):
    """Their storages say cuda:0, and there is none here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        raw = pickle.dumps({"a": torch.arange(4.0).view(2, 2)})
    assert b"cuda:0" in raw
    path = write_pickle(tmp_path / "p", raw)
    source = features.open_features(path, "train", ["a"])
    assert source["a"][1]().tolist() == [[0, 1], [2, 3]]


def test_no_file_of_features(tmp_path, monkeypatch):
    make_slt(tmp_path / "slt")
    for pattern in ("absent.{split}", "absent.{split}.safetensors"):
        with bad("absent.train"):
            run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"features={tmp_path}/{pattern}",
                "backbone=x")
    for label in ("../x", "/x", ".parts"):
        with bad("backbone="):
            run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"backbone={label}")


def test_names_cannot_leave(tmp_path, monkeypatch):
    clips = neccam("train", 6)
    for clip, name in zip(clips, ("../../x", "/etc/x", "__metadata__", "a\nb", "", "half\ud800")):
        clip["name"] = name
    clips += neccam("train", 1)
    make_slt(tmp_path / "slt")
    write_pickle(tmp_path / "slt/phoenix14t.pami0.train", clips)
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", "backbone=x", "strict=false")
    assert [r["name"] for r in rows_of(folder, "train")] == ["cliptrain-0"]
    listed = (folder / "problems.txt").read_text().splitlines()
    assert len(listed) == 6 and all("inside the folder" in line for line in listed)


def test_many_problems_are_all_in_the_file(tmp_path, monkeypatch, capsys):
    lines = "".join(f"{i}.mp4\tx\ttrain\n" for i in range(30))
    (tmp_path / "clips.tsv").write_text("file\ttext\tsplit\n" + lines)
    with bad("30 clip(s)"):
        run(monkeypatch, tmp_path, f"root={tmp_path}")
    out = capsys.readouterr().out
    assert out.count("problem: ") == 21 and "and 10 more" in out
    assert len((tmp_path / "data/set/problems.txt").read_text().splitlines()) == 30
    with bad("no clip is left"):
        run(monkeypatch, tmp_path, f"root={tmp_path}", "strict=false")

# ---------------------------------------------------------------------------------------------------------------------
# Stand-ins

def test_states(tmp_path, monkeypatch, real, capsys):
    source = {}
    for split in SPLITS:
        source[split] = unpickled(real / "labels" / f"neccam.phoenix14t.{split}")[:3]
        write_pickle(tmp_path / f"neccam.phoenix14t.{split}", source[split])
    args = ("reader=slt", f"root={tmp_path}", "features=states")
    folder = run(monkeypatch, tmp_path, *args)
    said = capsys.readouterr().out
    assert "STAND-IN" in said and "PHOENIX" not in said.upper()
    vectors = {}
    for split in SPLITS:
        store = Store(str(folder / "standin" / f"{split}.safetensors"))
        assert "stand-in" in json.loads(store.metadata["settings"])["standin"]
        for e in source[split]:
            x = store[e["name"].split("/")[1]].float()
            assert x.shape == (e["num_frames"], 1024)
            assert abs(x.std() - 2.5 ** 0.5) < 0.05  # 1 + 1/4 + 1/4 + noise of 1
            for frame, states in zip(x, zip(*[e["alignments"][f"pami{i}"].split() for i in range(3)])):
                vectors.setdefault(states, []).append(frame)
    same_states = [torch.stack(v[:2]) for v in vectors.values() if len(v) > 1]
    # 1.5 of 2.5 in common: the same states look alike, the noise does not
    assert 0.5 < np.mean([torch.corrcoef(v)[0, 1] for v in same_states]) < 0.7
    noise = lambda name: np.subtract(*(features.standin(name, [["0"] * 50] * 3, sigma) for sigma in (1.0, 0.0)))
    a, b = noise("a"), noise("b")
    # each clip has a noise of its own
    assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02 and abs(a.std() - 1) < 0.02
    first = {s: (folder / "standin" / f"{s}.safetensors").read_bytes() for s in SPLITS}
    run(monkeypatch, tmp_path, *args)
    assert first == {s: (folder / "standin" / f"{s}.safetensors").read_bytes() for s in SPLITS}  # the same every time
    run(monkeypatch, tmp_path, *args, "sigma=0", "backbone=quiet")
    e = source["dev"][0]
    quiet = Store(str(folder / "quiet/dev.safetensors"))[e["name"].split("/")[1]]
    vectors = lambda i: np.stack([features.state_vector(i, int(s)) for s in e["alignments"][f"pami{i}"].split()])
    want = sum(w * vectors(i) for i, w in enumerate((1, 0.5, 0.5)))
    assert same(quiet, want)


def test_states_need_alignments(tmp_path, monkeypatch):
    make_slt(tmp_path / "slt")
    with bad("9 clip(s)"):
        run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", "features=states")
    line = (tmp_path / "data/set/problems.txt").read_text().splitlines()[0]
    assert "clip cliptrain-0" in line and "no alignments" in line
    with bad("reader=slt"):
        (tmp_path / "clips.tsv").write_text("file\ttext\na.mp4\tx\n")
        run(monkeypatch, tmp_path, f"root={tmp_path}", "features=states")


def test_every_reader_is_there():
    assert sorted(READERS) == sorted("phoenix14t csl_daily how2sign openasl clips gfslt slt".split())
    line = next(line for line in (ROOT / "data.py").read_text().splitlines() if line.startswith("reader = "))
    page = (ROOT / "docs" / "datasets.md").read_text()
    for name in READERS:  # and is named where its user looks
        assert name in re.split(r"\W+", line) and f"`{name}`" in page


# ---------------------------------------------------------------------------------------------------------------------
# More of the readers

def test_the_end_of_a_text_of_neccam(tmp_path):
    """ " ." goes once from the end and nothing else does: a text may end in points of its own."""
    texts = ["regen am abend .", "usw. .", "regen . .", "ende.", ". .", "sonne .."]
    write_pickle(tmp_path / "phoenix14t.pami0.train", [{"name": f"train/{i}", "text": t} for i, t in enumerate(texts)])
    found = [r["text"] for r in read_slt(str(tmp_path))[0]["train"]]
    assert found == ["regen am abend", "usw.", "regen .", "ende.", ".", "sonne .."]


def test_a_clip_that_lies_in_two_folders(tmp_path):
    """The official place goes before the makeshift ones, for tables and clips."""
    raw = "sentence_level/val/rgb_front/raw_videos"
    for folder in (raw, "val_raw_videos", "raw_videos", "val"):
        (tmp_path / folder).mkdir(parents=True)
    header = "SENTENCE_NAME\tSENTENCE\n"
    (tmp_path / "how2sign_realigned_val.csv").write_text(header + "a\there\nb\there\nc\there\nd\there\n")
    (tmp_path / "val/how2sign_realigned_val.csv").write_text(header + "a\tthere\n")
    for name, folders in {"a": (".", raw, "raw_videos"), "b": (".", "val_raw_videos", "val"),
                          "c": (".", "raw_videos")}.items():
        for folder in folders:
            (tmp_path / folder / f"{name}.mp4").write_text("video")
    rows = read_how2sign(str(tmp_path))[0]["dev"]
    assert [(r["name"], r["text"]) for r in rows] == [(n, "here") for n in "abcd"]
    files = f"{raw}/a.mp4", "val_raw_videos/b.mp4", "raw_videos/c.mp4", "d.mp4"
    assert [os.path.normpath(r["video"]) for r in rows] == [str(tmp_path / f) for f in files]
    (tmp_path / "openasl-v1.0.tsv").write_text("vid\traw-text\tsplit\na\tone\ttrain\nb\ttwo\tval\nx:y\tthree\ttest\n")
    (tmp_path / "clips").mkdir()
    for name in ("a", "b", "x%y"):
        (tmp_path / "clips" / f"{name}.mp4").write_text("video")
    splits = read_openasl(str(tmp_path))[0]
    files = "a.mp4", "b.mp4", "clips/x%y.mp4"
    assert [os.path.normpath(splits[s][0]["video"]) for s in SPLITS] == [str(tmp_path / f) for f in files]
    (tmp_path / "openasl-v1.0.tsv").write_text("vid\traw-text\tsplit\na\tone\tdev1\n")
    with bad("openasl-v1.0.tsv:2", "clip a", "dev1"):
        read_openasl(str(tmp_path))


@pytest.mark.parametrize("depth", [0, 3, 4])
def test_how_far_down_a_data_set_may_lie(tmp_path, depth):
    home = tmp_path.joinpath(*"abcd"[:depth])
    home.mkdir(parents=True, exist_ok=True)
    (home / "openasl-v1.0.tsv").write_text("vid\traw-text\tsplit\na\tja\ttrain\n")
    if depth == 4:
        with bad(tmp_path, "openasl-v1.0.tsv", "three folders down"):
            read_openasl(str(tmp_path))
    else:
        assert len(read_openasl(str(tmp_path))[0]["train"]) == 1


def test_a_header_that_names_a_column_twice(own, tmp_path):
    with bad(tmp_path / "clips.tsv", "twice"):
        own("file\ttext\ttext\na.mp4\tja\tnein\n")


def test_csl_daily_cells_have_spaces_and_numbers(tmp_path):
    """Cells of split_1.txt with spaces around, characters that were unpickled as numbers, a gloss that is missing."""
    make_csl(tmp_path)
    info = [{"name": "S000000_P0000_T00", "length": 2, "label_char": [3, "个", "人"], "signer": 0}]
    write_pickle(tmp_path / "sentence_label/csl2020ct_v2.pkl", {"info": info}, zipped=False)
    (tmp_path / "sentence_label/split_1.txt").write_text("name|split\n S000000_P0000_T00 | test \n")
    splits = read_csl_daily(str(tmp_path))[0]
    row = {"name": "S000000_P0000_T00", "text": "3个人", "video": "", "signer": 0, "frames": 2}
    assert [r | {"video": ""} for r in splits["test"]] == [row] and not splits["train"]


def test_gfslt_videos(tmp_path):
    """
    The kin of labels.train for CSL-Daily: a video_path, which goes before the name; a clip may lie under its split;
    what is empty is left out.
    """
    clips = {"a": {"name": "a", "text": "ja", "gloss": ["A", "B"], "video_path": "x/one.mp4", "signer": ""},
             "train/b": {"name": "train/b", "text": "nein", "gloss": "", "num_frames": 7}}
    write_pickle(tmp_path / "csl_daily.labels.train", clips)
    (tmp_path / "sentence-crop/x").mkdir(parents=True)
    (tmp_path / "sentence-crop/x/one.mp4").write_text("video")
    (tmp_path / "fullFrame-210x260px/train/b").mkdir(parents=True)
    for root in (tmp_path, f"{tmp_path}/csl_daily.labels.{{split}}"):
        splits, dealt = read_gfslt(str(root))
        assert dealt and splits["train"] == [
            {"name": "a", "text": "ja", "video": f"{tmp_path}/sentence-crop/x/one.mp4", "gloss": "A B"},
            {"name": "b", "text": "nein", "video": f"{tmp_path}/fullFrame-210x260px/train/b", "frames": 7}]


def test_the_order_of_dealing_out():
    """By the names' checksum, so that a clip keeps its split on every machine."""
    names = [f"clip{i}" for i in range(40)]
    order = sorted(names, key=lambda n: zlib.crc32(n.encode()))
    splits = deal_out([{"name": n, "text": "x"} for n in names], "0.6,0.3,0.1")
    assert [[r["name"] for r in splits[s]] for s in SPLITS] == [order[:24], order[24:36], order[36:]]


# ---------------------------------------------------------------------------------------------------------------------
# More of the check

@pytest.mark.parametrize("form, counts", [
    ("{:02}April_2010_Thursday_heute-{}", (7096, 519, 642)), ("S{1:06}_P{0:04}_T01", (18401, 1077, 1176))])
def test_published_numbers_of_clips(form, counts):
    """
    As many as the authors published: no note. One less: a note that says both, and the table says what was published.
    """
    clips = [{"name": form.format(i % 100, i), "text": "x", "video": "absent.mp4"} for i in range(sum(counts))]
    train, dev, test = counts
    splits = {"train": clips[:train], "dev": clips[train:train + dev], "test": clips[train + dev:]}
    _, problems, notes, table, _ = check(splits)
    assert not notes and len(problems) == sum(counts)
    assert [line.split()[:4] for line in table[1:]] == [[s, str(n), str(n), str(n)] for s, n in zip(SPLITS, counts)]
    for split in SPLITS:
        (note,) = check(splits | {split: splits[split][1:]})[2]
        less = tuple(n - (s == split) for s, n in zip(SPLITS, counts))
        assert "clips: {}/{}/{}, published are".format(*less) in note and "{}/{}/{}".format(*counts) in note


def test_the_table_of_the_check(tmp_path):
    """Clips, problems, and how many texts of a split stand in train, each counted by hand."""
    (tmp_path / "a.mp4").write_text("full")
    file = lambda name: str(tmp_path / ("a.mp4" if name[0] != "x" else "absent.mp4"))
    row = lambda name, text: {"name": name, "text": text, "video": file(name)}
    splits = {"train": [row("a", "eins"), row("b", "zwei"), row("xc", "drei")],
              "dev": [row("d", "eins"), row("e", "eins"), row("xf", "drei"), row("g", "vier")], "test": []}
    good, problems, notes, table, shapes = check(splits)
    assert [" ".join(line.split()) for line in table[1:]] == ["train 3 1", "dev 4 1 3", "test 0 0 0"]
    assert [len(good[s]) for s in SPLITS] == [2, 3, 0] and len(problems) == 2
    assert notes == ["test: no clips"] and shapes == {}


def test_a_name_twice_says_where_it_stood(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).write_text("full")
    row = lambda file: {"name": "a", "text": "x", "video": str(tmp_path / file)}
    problems = check({"train": [row("a.mp4")], "dev": [row("b.mp4")], "test": [row("b.mp4")]})[1]
    assert problems == [f"{s}: clip a: stands there already, in train ({tmp_path}/a.mp4)" for s in ("dev", "test")]


def test_frames_beside_their_labels(tmp_path):
    """
    Fewer frames than the labels say are a note, and so are more; half a character is a problem in a text as in a name.
    """
    for n in range(3):
        (tmp_path / f"{n}.png").touch()
    row = lambda name, text="x", **more: {"name": name, "text": text, "video": str(tmp_path)} | more
    train = [row("a", frames=2), row("b", frames=3), row("c", frames=4), row("d"), row("e", "x\ud800")]
    good, problems, notes, *_ = check({"train": train, "dev": [], "test": []})
    assert notes[:2] == ["train: clip a: 3 frames, its labels say 2", "train: clip c: 3 frames, its labels say 4"]
    assert len(notes) == 4 and [r["name"] for r in good["train"]] == ["a", "b", "c", "d"]
    assert problems == ["train: clip e: its text has half a character"]


def test_frame_folders_of_known_data_sets_have_their_rate(tmp_path, monkeypatch):
    """
    PHOENIX-2014T was filmed at 25 frames a second, CSL-Daily at 30; their folders of frames cannot say so, and fps=
    resamples from there.
    """
    make_phoenix(tmp_path / "phoenix", {"train": {"a": "eins"}}, frames=10)
    make_csl(tmp_path / "csl")
    for image in (tmp_path / "csl").rglob("*.jpg"):
        write_image(image, shades(90)[0])
    for form, rate in (("phoenix14t", 25), ("csl_daily", 30)):
        root = tmp_path / form.split("14")[0].split("_")[0]
        folder = run(monkeypatch, tmp_path, f"reader={form}", f"root={root}", "workers=0", "device=cpu")
        assert json.loads(Store(str(folder / "toycnn/train.safetensors")).metadata["settings"])["fps"] == rate
    folder = run(monkeypatch, tmp_path, "reader=phoenix14t", f"root={tmp_path / 'phoenix'}", "workers=0", "device=cpu",
                 "fps=12.5")
    assert rows_of(folder, "train")[0]["frames"] == 5


def test_problems_that_are_mended_are_forgotten(tmp_path, monkeypatch):
    """problems.txt speaks of the last look alone."""
    (tmp_path / "clips.tsv").write_text("file\ttext\na.npy\tja\nb.npy\tja\n")
    np.save(tmp_path / "a.npy", np.ones((2, 3), np.float32))
    args = (f"root={tmp_path}", f"features={tmp_path}", "backbone=x")
    with bad("1 clip(s)"):
        run(monkeypatch, tmp_path, *args)
    np.save(tmp_path / "b.npy", np.ones((2, 3), np.float32))
    assert not (run(monkeypatch, tmp_path, *args) / "problems.txt").exists()


# ---------------------------------------------------------------------------------------------------------------------
# More of ready features

@pytest.mark.parametrize("dtype, fine", [("f2", True), ("f8", True), ("i8", True), ("u1", True), ("?", False),
                                         ("c8", False), ("S3", False)])
def test_features_are_numbers(tmp_path, monkeypatch, dtype, fine):
    """Floats and whole numbers are features; yes and no, complex numbers and texts are a mistake."""
    x = np.array([[1, 0], [0, 1], [1, 1]]).astype(dtype)
    (tmp_path / "clips.tsv").write_text("file\ttext\na.mp4\tja\n")
    np.save(tmp_path / "a.npy", x)
    args = (f"root={tmp_path}", f"features={tmp_path}", "backbone=x")
    if fine:
        assert same(Store(str(run(monkeypatch, tmp_path, *args) / "x/train.safetensors"))["a"], x)
    else:
        with bad(tmp_path, "clip a", f"dtype {x.dtype}"):
            run(monkeypatch, tmp_path, *args)


def test_features_whose_dev_split_is_called_val(tmp_path, monkeypatch):
    made = make_slt(tmp_path / "slt", width=2, seed=9)
    for split, name in (("train", "train"), ("dev", "val"), ("test", "test")):
        arrays = {e["name"]: np.full((len(e["sign"]), 3), ord(name[0]), np.float32) for e in made[split]}
        write_pickle(tmp_path / f"f.{name}", arrays)
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path / 'slt'}", f"features={tmp_path}/f.{{split}}",
                 "backbone=x")
    for split, letter in (("train", "t"), ("dev", "v"), ("test", "t")):
        store = Store(str(folder / "x" / f"{split}.safetensors"))
        for e in made[split]:
            x = store[e["name"].split("/")[1]]
            assert (x == ord(letter)).all() and len(x) == len(e["sign"])


def test_standins_by_hand(tmp_path, monkeypatch):
    """A state's vector follows from its stream and number, a clip's noise from its name: for everybody the same."""
    streams = {"pami0": [4, 4, 7], "pami1": [0, 2, 2], "pami2": [9, 9, 9]}
    clip = {"name": "train/a", "text": "ja .", "alignments": {k: " ".join(map(str, v)) for k, v in streams.items()}}
    odd = [{"name": "train/b", "alignments": clip["alignments"] | {"pami1": "1 2"}},
           {"name": "train/c", "alignments": clip["alignments"] | {"pami2": "1 x 2"}}, {"name": "train/d"}]
    write_pickle(tmp_path / "neccam.phoenix14t.train", [clip] + [{"text": "x ."} | e for e in odd])
    folder = run(monkeypatch, tmp_path, "reader=slt", f"root={tmp_path}", "features=states", "sigma=0.5",
                 "strict=false")
    listed = (folder / "problems.txt").read_text().splitlines()
    assert [line.split(":")[1] for line in listed] == [" clip b", " clip c", " clip d"]
    vector = lambda *key: np.random.default_rng([*key]).standard_normal(1024, np.float32)
    clean = np.stack([vector(0, a) + 0.5 * vector(1, b) + 0.5 * vector(2, c) for a, b, c in zip(*streams.values())])
    noise = np.random.default_rng([3, *b"a"]).standard_normal((3, 1024), np.float32)
    store = Store(str(folder / "standin/train.safetensors"))
    assert store.names == {"a"} and np.allclose(store["a"].float().numpy(), clean + 0.5 * noise, rtol=1e-3, atol=1e-3)
    assert "sigma=0.5" in json.loads(store.metadata["settings"])["standin"]
