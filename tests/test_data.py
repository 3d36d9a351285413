"""
Clips in, batches out: decoding, the extraction that may be killed, tokenizers, packing.

    python -m pytest tests/test_data.py
"""
import json
import math
import os
import shutil
import struct
from types import SimpleNamespace

import av
import numpy as np
import pytest
import safetensors.numpy
import sentencepiece
import torch
from conftest import clips_of

from data import Clips, Sample, pack, prompt_ids, spread
from lib import video
from lib.cnn import RandomCNN
from lib.extract import Extractor, prepare
from lib.features import Store, write_common, write_store
from lib.program import BadInput
from lib.readers import SPLITS
from lib.tensors import stateless
from lib.tokenizer import Tokenizer
from lib.video import read_video

H, W = 24, 40


def shades(*levels, height=H, width=W):
    """A clip whose frame i has the even grey of levels[i]: (T, H, W, 3)."""
    return np.stack([np.full((height, width, 3), v, np.uint8) for v in levels])


def write(path, video, codec, pix_fmt, **options):
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = *video.shape[1:3], pix_fmt
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    return path


def write_image(path, frame):
    form = ("png", "rgb24") if str(path).endswith("png") else ("mjpeg", "yuvj420p")
    return write(path, frame[None], *form, update="1")


def write_mp4(path, video, **options):
    return write(path, video, "h264", "yuv420p", **options)


def levels(video):
    return video.mean((1, 2, 3))


def bad(*says):
    """pytest.raises of a BadInput in one line that holds these words."""
    class Check:
        def __enter__(self):
            self.raises = pytest.raises(BadInput)
            self.info = self.raises.__enter__()

        def __exit__(self, *e):
            self.raises.__exit__(*e)
            message = str(self.info.value)
            assert "\n" not in message
            for word in map(str, says):
                assert word in message
            return True
    return Check()


# ---------------------------------------------------------------------------------------------------------------------
# Decoding

@pytest.mark.parametrize("name, codec, pix_fmt", [
    ("a.mp4", "h264", "yuv420p"), ("a.gif", "gif", "rgb8"), ("a.webm", "libvpx", "yuv420p"),
    ("a.webm", "libvpx-vp9", "yuv420p")])
def test_video_files(tmp_path, name, codec, pix_fmt):
    try:
        av.codec.Codec(codec, "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this build of av cannot write {codec}")
    want = shades(*range(0, 240, 20))
    video = read_video(str(write(tmp_path / name, want, codec, pix_fmt)))
    assert video.shape == want.shape and video.dtype == np.uint8
    assert abs(levels(video) - levels(want)).max() < 3  # every frame, in order


@pytest.mark.parametrize("ending", ["png", "jpg", "JPEG"])
def test_folder_of_frames_in_natural_order(tmp_path, ending):
    for i in (10, 2, 1, 11):
        write_image(tmp_path / f"frame{i}.{ending.lower()}", shades(20 * i)[0])
        os.rename(tmp_path / f"frame{i}.{ending.lower()}", tmp_path / f"frame{i}.{ending}")
    (tmp_path / "notes.txt").write_text("not a frame")
    video = read_video(str(tmp_path))
    assert video.shape == (4, H, W, 3) and video.dtype == np.uint8
    assert abs(levels(video) - [20, 40, 200, 220]).max() < 3


def test_png_frames_are_exact_and_rgb(tmp_path):
    frame = np.random.default_rng(0).integers(0, 256, (H, W, 3), np.uint8)
    write_image(tmp_path / "1.png", frame)
    assert (read_video(str(tmp_path))[0] == frame).all()


def test_phone_that_films_upright(tmp_path):
    """Phones store frames lying down and note the turn in the track's header: the right half is to be the lower one."""
    frame = shades(10)[0]
    frame[:, W // 2:] = 220
    path = write_mp4(tmp_path / "a.mp4", np.stack([frame] * 3))
    raw = path.read_bytes()
    at = raw.index(b"tkhd") + 44
    path.write_bytes(raw[:at] + struct.pack(">9i", 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30) + raw[at + 36:])
    video = read_video(str(path))
    assert video.shape == (3, W, H, 3)
    assert video[:, :W // 2 - 2].max() < 20 and video[:, W // 2 + 2:].min() > 200


def test_squeezed_frames(tmp_path):
    path = write_mp4(tmp_path / "a.mp4", shades(10, 100, height=48, width=32))
    frames = list(video.frames(str(path), 16))
    assert [f.shape for f in frames] == [(16, 16, 3)] * 2 and [round(f.mean() / 10) for f in frames] == [1, 10]


def test_no_frames(tmp_path):
    (tmp_path / "notes.txt").write_text("not a frame")
    with bad(tmp_path, "no frames"):
        read_video(str(tmp_path))
    path = str(tmp_path / "empty.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("h264", rate=25)
        stream.height, stream.width, stream.pix_fmt = H, W, "yuv420p"
        container.start_encoding()
        container.mux(stream.encode())
    with bad(path):
        read_video(path)
    path = str(tmp_path / "sound.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with bad(path, "no video"):
        read_video(path)


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["index at the end", "index in front"])
def test_truncated_mp4(tmp_path, options):
    noise = np.random.default_rng(0).integers(0, 256, (12, H, W, 3), np.uint8)
    path = write_mp4(tmp_path / "cut.mp4", noise, **options)
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
    with bad(path):
        read_video(str(path))


@pytest.mark.parametrize("content", [b"", b"not a video at all\n" * 100])
def test_no_video_at_all(tmp_path, content):
    path = tmp_path / "text.mp4"
    path.write_bytes(content)
    with bad(path):
        read_video(str(path))
    path.rename(tmp_path / "1.png")
    with bad(tmp_path / "1.png"):
        read_video(str(tmp_path))


def test_absent_clip(tmp_path):
    with bad(tmp_path / "absent.mp4"):
        read_video(str(tmp_path / "absent.mp4"))


@pytest.mark.parametrize("name, T, height, width", [
    ("how2sign_rhythm.mp4", 47, 720, 1280), ("dailymoth_landslides.gif", 181, 224, 224),
    ("phoenix_like_53frames.mp4", 53, 260, 210)])
def test_real_clips(real, name, T, height, width):
    frames = list(video.frames(str(real / "video" / name)))  # not stacked: the large one would take 130 MB more
    assert [f.shape for f in frames] == [(height, width, 3)] * T
    assert all(f.dtype == np.uint8 and f.std() > 10 for f in frames[::20])
    assert any((a != b).any() for a, b in zip(frames, frames[1:]))


@pytest.mark.parametrize("split", SPLITS)
def test_real_phoenix_frames(real, split):
    home = real / "phoenix14t/PHOENIX-2014-T-release-v3/PHOENIX-2014-T/features/fullFrame-210x260px"
    (folder,) = (home / split).iterdir()
    video = read_video(str(folder))
    assert video.shape == (2, 260, 210, 3) and video.dtype == np.uint8 and video.std() > 10


# ---------------------------------------------------------------------------------------------------------------------
# Extraction and store

class Fake:
    """Stands in for a CNN: the file's bytes as features. After `limit` clips it is killed."""

    def __init__(self, limit=10**6, weights=""):
        self.settings = {"backbone": "fake", "weights": weights, "fps": 0.0}
        self.limit, self.seen, self.workers, self.rate = limit, [], 0, 0.0

    def stream(self, paths, workers=0):
        for i, path in enumerate(paths):
            if len(self.seen) == self.limit:
                raise KeyboardInterrupt
            self.seen.append(os.path.basename(path))
            yield i, self(path), 25.0

    def __call__(self, path):
        return np.frombuffer(open(path, "rb").read(), np.uint8).astype(np.float16).reshape(-1, 4)


@pytest.fixture
def clips(tmp_path):
    """{split: rows} of seven clips with 2 to 8 frames of width 4, names with what names may have in them."""
    folder = tmp_path / "clips"
    folder.mkdir()
    rows = []
    for i, name in enumerate(["a", "b c", "ü", "d/e", 'f"g', "h", "11August_2010_Wednesday-1"]):
        path = folder / f"{i}.bin"
        path.write_bytes(np.random.default_rng(i).integers(0, 256, 4 * (i + 2), np.uint8).tobytes())
        rows.append({"name": name, "text": f"satz {i} für\u2028alle", "video": str(path)})
    return {"train": rows[:5], "dev": rows[5:6], "test": rows[6:]}


def parts(tmp_path, home="data"):
    return tmp_path / home / "own" / "fake" / ".parts"


def stores(tmp_path, home):
    """Every file of a prepared data set, byte for byte."""
    folder = tmp_path / home / "own"
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_prepare(tmp_path, clips, capsys):
    fake = Fake()
    prepare("own", clips, str(tmp_path / "data"), fake)
    assert sorted(fake.seen) == [f"{i}.bin" for i in range(7)]
    files = {f"{s}.jsonl" for s in SPLITS} | {f"fake/{s}.safetensors" for s in SPLITS}
    assert stores(tmp_path, "data").keys() == files
    for split, rows in clips.items():
        path = tmp_path / "data" / "own" / "fake" / f"{split}.safetensors"
        store, arrays = Store(str(path)), safetensors.numpy.load_file(path)  # the format's own reader agrees
        assert store.names == arrays.keys() == {r["name"] for r in rows}
        for row in rows:
            want = Fake()(row["video"])
            assert arrays[row["name"]].dtype == np.float16 and (arrays[row["name"]] == want).all()
            assert (store[row["name"]].numpy() == want).all()
        lines = (tmp_path / "data" / "own" / f"{split}.jsonl").read_text("utf-8").split("\n")
        rows = [r | {"frames": os.path.getsize(r["video"]) // 4} for r in rows]
        assert [json.loads(line) for line in lines[:-1]] == rows
    assert "5 train, 1 dev, 1 test clips" in capsys.readouterr().out


def test_second_run_reuses_everything(tmp_path, clips, capsys):
    home = str(tmp_path / "data")
    prepare("own", clips, home, Fake())
    before = stores(tmp_path, "data")
    prepare("own", clips, home, Fake(limit=0))  # would be killed at the first clip
    assert stores(tmp_path, "data") == before
    assert "7 of 7 clips are there already" in capsys.readouterr().out


def test_new_texts_and_splits_keep_the_features(tmp_path, clips):
    home = str(tmp_path / "data")
    prepare("own", clips, home, Fake())
    clips["train"][0]["text"] = "anders"
    moved = {"train": clips["train"] + clips["dev"], "dev": [], "test": clips["test"]}
    prepare("own", moved, home, Fake(limit=0))
    assert not (tmp_path / "data/own/dev.jsonl").exists()
    train = clips_of(home, "own", "fake", "train")
    assert len(train) == 6 and train.rows[0]["text"] == "anders" and len(train.features(5)) == 7


@pytest.mark.parametrize("k", [0, 1, 3, 6])
def test_killed_extraction_goes_on(tmp_path, clips, k, capsys):
    prepare("own", clips, str(tmp_path / "whole"), Fake())
    with pytest.raises(KeyboardInterrupt):
        prepare("own", clips, str(tmp_path / "data"), Fake(limit=k))
    assert not (tmp_path / "data/own/train.jsonl").exists()  # nobody takes it for complete
    made = sorted(parts(tmp_path).iterdir())
    assert len(made) == k
    (parts(tmp_path) / "0.safetensors.part").write_bytes(b"half a clip")  # a kill in the middle of a write
    for path in made[2:]:
        path.write_bytes(path.read_bytes()[:-3])  # a disk that lost its last bytes in a power cut
    rest = Fake()
    prepare("own", clips, str(tmp_path / "data"), rest)
    assert len(rest.seen) == 7 - min(k, 2) and ("made anew" in capsys.readouterr().out) == (k > 2)
    assert stores(tmp_path, "data") == stores(tmp_path, "whole")


def test_killed_twice(tmp_path, clips):
    home = str(tmp_path / "data")
    for k in (2, 1):
        with pytest.raises(KeyboardInterrupt):
            prepare("own", clips, home, Fake(limit=k))
    rest = Fake()
    prepare("own", clips, home, rest)
    assert len(rest.seen) == 4
    prepare("own", clips, str(tmp_path / "whole"), Fake())
    assert stores(tmp_path, "data") == stores(tmp_path, "whole")


@pytest.mark.parametrize("killed", [False, True])
def test_changed_clip_is_extracted_again(tmp_path, clips, killed):
    home, path = str(tmp_path / "data"), clips["train"][1]["video"]
    if killed:
        with pytest.raises(KeyboardInterrupt):
            prepare("own", clips, home, Fake(limit=4))
    else:
        prepare("own", clips, home, Fake())
    with open(path, "wb") as f:
        f.write(bytes(4 * 9))
    again = Fake()
    prepare("own", clips, home, again)
    assert again.seen == ["1.bin"] + ["4.bin", "5.bin", "6.bin"] * killed
    prepare("own", clips, str(tmp_path / "whole"), Fake())
    assert stores(tmp_path, "data") == stores(tmp_path, "whole")


@pytest.mark.parametrize("killed", [False, True])
def test_another_cnn_starts_over(tmp_path, clips, killed):
    home = str(tmp_path / "data")
    if killed:
        with pytest.raises(KeyboardInterrupt):
            prepare("own", clips, home, Fake(limit=4))
    else:
        prepare("own", clips, home, Fake())
    other = Fake(weights="others.pth")
    prepare("own", clips, home, other)
    assert len(other.seen) == 7
    assert Store(os.path.join(home, "own/fake/train.safetensors")).settings["weights"] == "others.pth"


def test_store_equals_direct_features(tmp_path):
    """The toy's CNN through prepare, in batches of 64 frames, against one plain call on the decoded clip."""
    clip = np.random.default_rng(0).integers(0, 256, (70, 64, 64, 3), np.uint8)
    path = str(write_mp4(tmp_path / "a.mp4", clip))
    splits = {"train": [{"name": "a", "text": "ja", "video": path}], "dev": [], "test": []}
    prepare("own", splits, str(tmp_path / "data"), Extractor("toycnn", device="cpu"))
    got = clips_of(tmp_path / "data", "own", "toycnn", "train").features(0)
    x = torch.from_numpy(read_video(path)).permute(0, 3, 1, 2)  # (70, 3, 64, 64)
    want = RandomCNN().features((x.float() / 255 - 0.5) / 0.5)  # mean 0.5, deviation 0.5
    assert got.dtype == torch.float16 and got.shape == (70, 1024)
    torch.testing.assert_close(got.float(), want, rtol=2e-3, atol=1e-3)


def test_features_that_are_not_finite(tmp_path):
    extractor = Extractor("toycnn", device="cpu")
    extractor.cnn.convs[0].bias.data[:] = math.nan
    path = str(write_mp4(tmp_path / "a.mp4", shades(1, 2)))
    with bad(path, "not finite"):
        extractor(path)


def test_wrong_backbones():
    with bad("backbone=vgg", "googlenet"):
        Extractor("vgg")
    with bad("weights", "googlenet"):
        Extractor("googlenet")


def test_wrong_store(tmp_path):
    path = tmp_path / "train.safetensors"
    with bad(path):
        Store(str(path))
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{'half a header")
    with bad(path):
        Store(str(path))


# ---------------------------------------------------------------------------------------------------------------------
# Text

TEXTS = ["am montag regnet es im süden", "heute scheint die sonne bei zehn grad", "In der Nacht: 5 Grad, Nebel & Wind!",
         "今天我想吃面条。"]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A folder with a small SentencePiece model, bytes and all."""
    folder = tmp_path_factory.mktemp("pieces")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=340,
        byte_fallback=True, normalization_rule_name="identity", character_coverage=1.0, minloglevel=2)
    return str(folder)


@pytest.fixture
def jsons(tmp_path):
    """
    Names and contents of further files -> folder with a tokenizer.json (byte-level BPE; <s> 0, </s> 1, <|eot|> 2) and
    them.
    """
    tokenizers = pytest.importorskip("tokenizers")
    ByteLevel = tokenizers.pre_tokenizers.ByteLevel

    def make(**files):
        tok = tokenizers.Tokenizer(tokenizers.models.BPE())
        tok.pre_tokenizer, tok.decoder = ByteLevel(add_prefix_space=False), tokenizers.decoders.ByteLevel()
        tok.train_from_iterator(TEXTS, tokenizers.trainers.BpeTrainer(
            vocab_size=300, special_tokens=["<s>", "</s>", "<|eot|>"], show_progress=False,
            initial_alphabet=ByteLevel.alphabet()))
        begin = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        tok.post_processor = begin  # as Llama 3 has it
        tok.save(str(tmp_path / "tokenizer.json"))
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return str(tmp_path)
    return make


def test_sentencepiece(pieces):
    tokenizer = Tokenizer(pieces)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (1, 2, [2], 340)
    for text in TEXTS + ["neue wörter: ½ 雪"]:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list) and all(isinstance(i, int) for i in ids)
        assert tokenizer.bos_id not in ids and tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_ids_beyond_the_vocabulary_mean_nothing(pieces):
    tokenizer = Tokenizer(pieces)
    ids = tokenizer.encode(TEXTS[0])
    # an embedding padded to a round number has such rows
    assert tokenizer.decode([-1] + ids + [340, 10**6]) == TEXTS[0]


def test_ids_given(pieces, jsons):
    assert Tokenizer(pieces, eos_id=1).eos_ids == [1]
    assert Tokenizer(pieces, bos_id=7).bos_id == 7
    folder = jsons(tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"})
    assert Tokenizer(folder, bos_id=5, eos_id=2).eos_ids == [2] and Tokenizer(folder, bos_id=5).bos_id == 5


@pytest.mark.parametrize("name, size", [("stories260K/tokenizer.model", 512), ("llama2_tokenizer.model", 32000)])
def test_real_tokenizers(real, tmp_path, name, size):
    shutil.copy(real / name, tmp_path / "tokenizer.model")
    tokenizer = Tokenizer(str(tmp_path))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, size)
    for text in TEXTS + ["Once upon a time, there was a little girl named Lily."]:
        ids = tokenizer.encode(text)
        assert not {1, 2} & set(ids) and tokenizer.decode(ids) == text
    if size == 32000:
        assert tokenizer.encode("Hello world") == [15043, 3186]  # as everybody's LLaMA-2 has it


def test_tokenizer_json(jsons):
    tokenizer = Tokenizer(jsons(tokenizer_config={"bos_token": "<s>", "eos_token": "</s>"}))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.vocab_size) == (0, [1], 300)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert isinstance(ids, list) and not {0, 1, 2} & set(ids) and tokenizer.decode(ids) == text  # no <s> by itself
    assert tokenizer.decode(tokenizer.encode(TEXTS[0]) + [1, 300]) == TEXTS[0]


@pytest.mark.parametrize("files, bos, eos", [
    ({"tokenizer_config": {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}}, 0, [1]),
    ({"config": {"bos_token_id": 0, "eos_token_id": 1}}, 0, [1]),
    ({"generation_config": {"bos_token_id": 0, "eos_token_id": [2, 1]}}, 0, [2, 1]),  # all stop, the first is learnt
    ({"config": {"bos_token_id": 0, "eos_token_id": 1}, "generation_config": {"eos_token_id": [1, 2]}}, 0, [1, 2]),
    ({"generation_config": {"eos_token_id": [2, 1]},
      "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>"}}, 0, [1, 2]),
    ({"config": {"bos_token_id": None, "eos_token_id": 1},
      "tokenizer_config": {"bos_token": None, "eos_token": "<|eot|>"}}, -1, [2, 1]),
    ({"config": {"bos_token_id": 0, "eos_token_id": 1},
      "tokenizer_config": {"bos_token": None, "eos_token": "</s>"}}, -1, [1]),  # as Qwen2-7B-Instruct
    ({"config": {"bos_token_id": 0, "eos_token_id": 1},
      "tokenizer_config": {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": False}}, -1, [1]),
    ({"tokenizer_config": {"eos_token": "</s>"}}, 0, [1])])  # tokenizer.json itself puts <s> in front
def test_tokenizer_json_bos_and_eos(jsons, files, bos, eos):
    tokenizer = Tokenizer(jsons(**files))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.eos_id) == (bos, eos, eos[0])


def test_embedding_of_another_size(pieces):
    tokenizer = Tokenizer(pieces)
    assert tokenizer.fit(340) is tokenizer and tokenizer.fit(384) is tokenizer  # padded to a round number
    assert tokenizer.fit(339).encode(TEXTS[0])  # nor is one with fewer, as long as no text needs those that it lacks
    with bad("am montag", "needs token", pieces, "90 rows"):
        tokenizer.fit(90).encode(TEXTS[0])
    with bad("eos_id=400", "384 rows"):
        Tokenizer(pieces, eos_id=400).fit(384)


@pytest.mark.parametrize("ids, wrong", [
    (dict(eos_id=2), None), (dict(eos_id=339), None), (dict(eos_id=340), "eos_id=340"),
    (dict(bos_id=339), None), (dict(bos_id=340), "bos_id=340")], ids=str)
def test_bos_and_eos_need_a_row(pieces, ids, wrong):
    """The last row is one, the number of rows is not."""
    tokenizer = Tokenizer(pieces, **ids)
    if wrong is None:
        assert tokenizer.fit(340) is tokenizer
    else:
        with bad(wrong, "340 rows"):
            tokenizer.fit(340)


def test_every_token_that_ends_an_answer_needs_a_row(jsons):
    tokenizer = Tokenizer(jsons(generation_config={"bos_token_id": 0, "eos_token_id": [1, 300]}))
    with bad("the embedding of", "300 rows"):
        tokenizer.fit(300)
    assert tokenizer.fit(301).eos_ids == [1, 300]


def test_id_0_is_a_token_like_any_other(jsons, pieces):
    tokenizer = Tokenizer(jsons(config={"bos_token_id": 1, "eos_token_id": 2}), bos_id=0)
    assert tokenizer.bos_id == 0 and prompt_ids("{clip}", tokenizer) == ([0], [])
    assert Tokenizer(tokenizer.path, eos_id=0).eos_ids == [0]
    assert "⁇" in Tokenizer(pieces).decode([0])  # SentencePiece's unknown piece


SAYS = lambda bos, eos: {"bos_token_id": bos, "eos_token_id": eos}


@pytest.mark.parametrize("files, bos, eos", [
    ({"config": SAYS(1, 1), "generation_config": SAYS(0, 2)}, 0, [2]),  # the latter knows better
    ({"config": SAYS(0, 2), "generation_config": SAYS(None, None)}, 0, [2]),  # null says nothing
    ({"config": SAYS(-1, [-1, 2])}, 0, [2]),  # as some say that there is none; tokenizer.json knows better
    ({"config": SAYS([0, 1], 1)}, 0, [1]),
    ({"config": SAYS(1, 2), "tokenizer_config": {"bos_token": "<s>", "add_bos_token": True}}, 0, [2])])
def test_which_file_says_bos_and_eos(jsons, files, bos, eos):
    tokenizer = Tokenizer(jsons(**files))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.eos_id) == (bos, eos, eos[0])


@pytest.mark.parametrize("value", ["2", 2.0, True, [1, "2"], {"id": 2}], ids=str)
def test_an_id_that_is_no_number(jsons, value):
    with bad("eos_token_id=", "no number of a token"):
        Tokenizer(jsons(config={"eos_token_id": value}))


def test_sentencepiece_obeys_the_folder(pieces, tmp_path):
    """A Hugging Face folder with a tokenizer.model: its config files say what begins and ends a text."""
    shutil.copy(os.path.join(pieces, "tokenizer.model"), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 7}))
    assert (Tokenizer(str(tmp_path)).bos_id, Tokenizer(str(tmp_path)).eos_ids) == (1, [7])
    says = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(says))
    assert (Tokenizer(str(tmp_path)).bos_id, Tokenizer(str(tmp_path)).eos_ids) == (1, [2, 7])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eot|>"}))
    with bad("tokenizer_config.json", "eos_token='<|eot|>'"):  # SentencePiece itself would call it <unk>
        Tokenizer(str(tmp_path))


def test_wrong_tokenizers(jsons, tmp_path):
    with bad(tmp_path, "tokenizer.model", "tokenizer.json"):
        Tokenizer(str(tmp_path))
    folder = jsons()
    with bad(folder, "eos_id="):
        Tokenizer(folder)
    assert Tokenizer(folder, eos_id=1).eos_ids == [1]
    jsons(tokenizer_config={"eos_token": "<unknown>"})
    with bad(folder, "eos_token='<unknown>'", "eos_id="):
        Tokenizer(folder)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with bad(tmp_path / "tokenizer_config.json"):
        Tokenizer(folder)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer.json").write_text("{}")
    with bad(tmp_path / "tokenizer.json"):
        Tokenizer(folder)
    (tmp_path / "tokenizer.model").write_bytes(b"no model")  # comes second where both are there
    with bad(tmp_path / "tokenizer.json"):
        Tokenizer(folder)
    (tmp_path / "tokenizer.json").unlink()
    with bad(tmp_path / "tokenizer.model"):
        Tokenizer(folder)


# ---------------------------------------------------------------------------------------------------------------------
# Batches out

class Words:
    """A tokenizer whose words are their ids."""
    bos_id, eos_id = 1, 2

    def encode(self, text):
        return [int(w) for w in text.split()]


def test_prompt_ids():
    words = Words()
    assert prompt_ids("{clip}", words) == ([1], [])  # align: just BOS
    assert prompt_ids("10 11 {clip} 12", words) == ([1, 10, 11], [12])
    assert prompt_ids(" {clip} 12 13\n", words) == ([1], [12, 13])
    words.bos_id = -1
    assert prompt_ids("10 {clip}", words) == ([10], [])
    for prompt in ("", "10 11", "{clip} {clip}"):
        with bad("prompt=", "{clip}"):
            prompt_ids(prompt, words)


class Letters:
    """A tokenizer that keeps every space: a character's token is its number."""
    bos_id = 0

    def encode(self, text):
        return [ord(c) for c in text]


def test_spaces_around_the_clip_are_no_tokens_and_bos_may_be_0():
    ids = lambda text: [ord(c) for c in text]
    assert prompt_ids(" a b  {clip}\n c d ", Letters()) == ([0, *ids("a b")], ids("c d"))
    assert prompt_ids("  {clip} \n ", Letters()) == ([0], [])


def test_a_prompts_line_break_reaches_the_llm(pieces):
    tokenizer = Tokenizer(pieces)
    before, after = prompt_ids("[INST] <sign> {clip} </sign> \n Translate [/INST]", tokenizer)
    assert before[0] == 1 and tokenizer.decode(before[1:]) == "[INST] <sign>"
    assert tokenizer.decode(after) == "</sign> \n Translate [/INST]"


def samples():
    """Three clips of 2, 1 and 3 frames of width 1."""
    f = lambda *x: torch.tensor(x, dtype=torch.float16)[:, None]
    return [Sample(f(.1, .2), [1, 10], [20, 21], [30, 31, 2]), Sample(f(.3), [1], [], [2]),
            Sample(f(.4, .5, .6), [1, 10], [20], [40, 2])]


def test_pack_against_hand_written_ids():
    b = pack(samples())
    # the last token of an answer is only predicted
    #                     1 10  F  F 20 21 30 31   1  F   1 10  F  F  F 20 40
    assert b.tokens.tolist() == [1, 10, 0, 0, 20, 21, 30, 31, 1, 0, 1, 10, 0, 0, 0, 20, 40]
    assert b.frame_at.tolist() == [2, 3, 9, 12, 13, 14]
    assert b.clip.tolist() == [0, 0, 1, 2, 2, 2]
    assert b.features.dtype == torch.float16
    assert b.features[:, 0].tolist() == pytest.approx([.1, .2, .3, .4, .5, .6], abs=1e-3)
    # 21 -> 30, 30 -> 31, 31 -> EOS; the frame -> EOS; 20 -> 40, 40 -> EOS
    assert b.target_at.tolist() == [5, 6, 7, 9, 15, 16]
    assert b.targets.tolist() == [30, 31, 2, 2, 40, 2]
    assert b.lens == [8, 2, 7]
    assert all(x.dtype == torch.long for x in (b.tokens, b.frame_at, b.clip, b.target_at, b.targets))


def test_every_clip_of_a_pack_is_what_it_would_be_alone():
    """Each on its own, shifted by the tokens and clips before it."""
    for order in ([0, 1, 2], [2, 0], [1, 1, 2, 0]):
        some = [samples()[i] for i in order]
        together, start, frame, target = pack(some), 0, 0, 0
        for number, one in enumerate(pack([s]) for s in some):
            N, F, M = len(one.tokens), len(one.features), len(one.targets)
            assert together.tokens[start:start + N].equal(one.tokens) and together.lens[number] == one.lens[0] == N
            assert together.frame_at[frame:frame + F].equal(one.frame_at + start)
            assert together.target_at[target:target + M].equal(one.target_at + start)
            assert together.targets[target:target + M].equal(one.targets)
            assert together.features[frame:frame + F].equal(one.features)
            assert (together.clip[frame:frame + F] == number).all()
            start, frame, target = start + N, frame + F, target + M
        assert (len(together.tokens), len(together.features), len(together.targets)) == (start, frame, target)


def test_pack_without_answers():
    some = samples()
    for s in some:
        s.answer = None  # to be generated
    b = pack(some)
    assert b.tokens.tolist() == [1, 10, 0, 0, 20, 21, 1, 0, 1, 10, 0, 0, 0, 20] and b.lens == [6, 2, 6]
    assert len(b.targets) == len(b.target_at) == 0


def test_pack_without_targets():
    b, full = pack(samples(), with_targets=False), pack(samples())
    assert (b.tokens == full.tokens).all() and len(b.targets) == len(b.target_at) == 0
    assert b.targets.dtype == torch.long


def test_stateless():
    draw = lambda *key: stateless(*key).random(5).tolist()
    assert draw(1, "drop", 2, "a") == draw(1, "drop", 2, "a")
    keys = [(1, "drop", 2, "a"), (2, "drop", 2, "a"), (1, "order", 2, "a"), (1, "drop", 3, "a"), (1, "drop", 2, "b")]
    assert len({str(draw(*k)) for k in keys}) == len(keys)


def frame_numbers(x):
    return x[:, 0].int().tolist()


@pytest.fixture
def split(tmp_path):
    """Writes a train split whose clip i has lens[i] frames, feature 0 of a frame its number -> Clips."""
    def make(*lens, max_frames=0):
        os.makedirs(tmp_path / "own" / "cnn", exist_ok=True)
        arrays = {f"clip{i}": np.arange(n, dtype=np.float16)[:, None].repeat(2, 1) for i, n in enumerate(lens)}
        shapes = {k: a.shape for k, a in arrays.items()}
        write_store(str(tmp_path / "own/cnn/train.safetensors"), shapes, arrays.__getitem__, {})
        rows = [{"name": n, "text": "30 31", "frames": len(a)} for n, a in arrays.items()]
        (tmp_path / "own/train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return clips_of(tmp_path, "own", "cnn", "train", max_frames=max_frames)
    return make


@pytest.mark.parametrize("total, n, chosen", [
    (10, 3, [0, 3, 6]), (4, 4, [0, 1, 2, 3]), (3, 2, [0, 1]), (7, 1, [0]), (99, 3, [0, 33, 66]), (5, 0, [])], ids=str)
def test_spread(total, n, chosen):
    assert spread(total, n) == chosen


def test_sample(split):
    s = split(3, 2).sample(1, ([1, 10], [20]), Words())
    assert (s.before, s.after, s.answer) == ([1, 10], [20], [30, 31, 2])
    assert frame_numbers(s.features) == [0, 1]  # clip1's two, not clip0's three


@pytest.mark.parametrize("T, most", [(100, 30), (101, 100), (31, 30), (2000, 512), (7, 1)])
def test_thinning_is_even(split, T, most):
    clips = split(T, most, most - 1 or 1, max_frames=most)
    kept = frame_numbers(clips.features(0))
    steps = np.diff(kept)
    assert len(kept) == most and kept[0] == 0 and (most == 1 or kept[-1] == T - 1)
    assert most == 1 or set(steps) <= {(T - 1) // (most - 1), math.ceil((T - 1) / (most - 1))}  # at most one apart
    assert frame_numbers(clips.features(0)) == kept  # nothing random in it
    assert len(clips.features(1)) == most and len(clips.features(2)) == (most - 1 or 1)
    assert clips.too_long == 1


def test_frame_drop(split):
    clips = split(2000, 2000, 3)
    drop = lambda i, *key: frame_numbers(clips.features(i, 0.1, key))
    kept = drop(0, 1337, "drop", 0)
    assert 0.88 < len(kept) / 2000 < 0.92 and kept == sorted(kept)
    torch.manual_seed(1), np.random.seed(1), drop(1, 1337, "drop", 0)
    assert drop(0, 1337, "drop", 0) == kept  # whatever happened in between
    others = [drop(0, 1338, "drop", 0), drop(0, 1337, "drop", 1), drop(1, 1337, "drop", 0)]  # seed, epoch, clip
    assert all(o != kept for o in others)
    assert frame_numbers(clips.features(0)) == list(range(2000))  # no drop, no loss
    assert all(len(clips.features(2, 0.99, (e,))) >= 1 for e in range(20))  # something is always left


def test_frame_drop_by_hand(split):
    """A frame stays where the number that is drawn for it, from 0 to 1, is at least the share; one always stays."""
    clips = split(40, 40, 1)
    for i, share in ((0, 0.25), (1, 0.25), (0, 0.75), (2, 0.999)):
        drawn = stateless(7, "drop", 3, f"clip{i}").random(len(clips.features(i)))
        expected = [n for n, x in enumerate(drawn) if x >= share] or [0]
        assert frame_numbers(clips.features(i, share, (7, "drop", 3))) == expected
    assert frame_numbers(clips.features(0, 1 - 1e-12)) == [0]  # the first where none would be left
    s = clips.sample(0, ([], []), Words(), 0.25, (7, "drop", 3))  # a sample's are the same
    assert s.features.equal(clips.features(0, 0.25, (7, "drop", 3)))


def test_thinning_by_hand(split):
    assert frame_numbers(split(10, max_frames=4).features(0)) == [0, 3, 6, 9]
    assert frame_numbers(split(9, max_frames=3).features(0)) == [0, 4, 8]
    clips = split(5, 6, 4, 12, max_frames=5)
    assert clips.lengths == [5, 5, 4, 5] and clips.too_long == 2 and len(clips) == 4


@pytest.mark.parametrize("max_clips, chosen", [(0, range(7)), (1, [0]), (3, [0, 2, 4]), (7, range(7)), (9, range(7))])
def test_max_clips_are_spread_over_the_set(split, tmp_path, max_clips, chosen):
    split(2, 3, 4, 5, 6, 7, 8)
    clips = clips_of(tmp_path, "own", "cnn", "train", max_clips=max_clips)
    assert [r["name"] for r in clips.rows] == [f"clip{i}" for i in chosen] and clips.lengths == [i + 2 for i in chosen]


def test_frame_drop_comes_after_thinning(split):
    kept = frame_numbers(split(1000, max_frames=500).features(0, 0.1, (1,)))
    assert 430 < len(kept) < 470 and set(kept) <= set(frame_numbers(split(1000, max_frames=500).features(0)))


def test_stand_ins_say_so_in_a_line_of_their_own(split, tmp_path):
    clips = split(3, 4)
    assert len(clips.describe().splitlines()) == 1
    clips.store.metadata = {"settings": json.dumps({"standin": "made of noise"})}
    assert clips.describe().splitlines()[1:] == ["data: made of noise: no score here is one of the data set"]


def test_what_is_missing_is_named(split, tmp_path):
    split(3, 4)
    with bad(tmp_path / "own/dev.jsonl", "own", "no split dev", "it has train"):
        clips_of(tmp_path, "own", "cnn", "dev")
    with bad("other", "no split train", "data.py"):
        clips_of(tmp_path, "other", "cnn", "train")
    with bad(tmp_path / "own/googlenet/train.safetensors"):
        clips_of(tmp_path, "own", "googlenet", "train")
    with open(tmp_path / "own/train.jsonl", "a") as f:
        f.write('{"name": "new", "text": "40"}\n')
    with bad(tmp_path / "own/cnn/train.safetensors", "clip new"):
        clips_of(tmp_path, "own", "cnn", "train")


def test_a_data_set_edited_by_hand(tmp_path):
    """A clip that nothing can be learnt from is named with its file and line, before a run begins."""
    os.makedirs(tmp_path / "own/cnn")
    store, lines = tmp_path / "own/cnn/train.safetensors", tmp_path / "own/train.jsonl"
    x = {name: np.ones((4, 3), np.float16) for name in "abc"}

    def clips(arrays=x, names="abc", text="ja"):
        write_store(str(store), {n: a.shape for n, a in arrays.items()}, arrays.__getitem__, {})
        lines.write_text("".join(json.dumps({"name": n, "text": text}) + "\n" for n in names))
        return clips_of(tmp_path, "own", "cnn", "train")

    assert clips().lengths == [4, 4, 4] and clips().width == 3
    with bad(f"{lines}:1: is not a clip", "empty name or text"):
        clips(text=" \t")
    with bad(f"{lines}:4: clip b", "twice"):
        clips(names="abcb")
    for other, shape in ((np.ones((0, 3)), "(0, 3)"), (np.ones((4, 2)), "(4, 2)"), (np.ones(3), "(3,)")):
        with bad(f"{lines}:2: clip b", str(store), shape, "not (frames, 3)"):
            clips(x | {"b": other.astype(np.float16)})
    for value in (np.nan, np.inf):
        with bad(str(store), "not finite", "of clip b"):
            clips(x | {"b": np.full((4, 3), value, np.float16)}).statistics()


def test_blank_lines_of_a_jsonl_are_passed_over(split, tmp_path):
    split(3)
    with open(tmp_path / "own/train.jsonl", "a") as f:
        f.write("\n  \n")
    assert len(clips_of(tmp_path, "own", "cnn", "train")) == 1


@pytest.mark.parametrize("line", ['{"name": "b"', '{"name": "b", "text": ""}', '{"name": "", "text": "ja"}',
                                  '{"text": "ja"}', "[1]", "3"])
def test_wrong_jsonl(split, tmp_path, line):
    split(3)
    with open(tmp_path / "own/train.jsonl", "a") as f:
        f.write(line + "\n")
    with bad(tmp_path / "own/train.jsonl", ":2"):
        clips_of(tmp_path, "own", "cnn", "train")


@pytest.mark.parametrize("content, words", [
    (b"", ["has no lines, each a clip"]), (b'{"name": "a", "text": "\xff"}', ["is not UTF-8"]),
    (b'{"name": "a", "text": 3}', [":1: is not a clip", "empty name or text"]),
    (b'{"name": ["a"], "text": "b"}', [":1: is not a clip"]), (b'{"name": "a"}', [":1: is not a clip", "'text'"])])
def test_a_jsonl_that_holds_no_clips_says_why(split, tmp_path, content, words):
    split(3)
    (tmp_path / "own/train.jsonl").write_bytes(content)
    with bad(tmp_path / "own/train.jsonl", *words):
        clips_of(tmp_path, "own", "cnn", "train")


@pytest.mark.parametrize("texts, joined", [(["heute regnet es", "morgen nicht"], "heute regnet es morgen nicht"),
                                           (["今天会下雨吗？", "不会。"], "今天会下雨吗？不会。"),
                                           (["他是谁？", "你去哪？"], "他是谁？你去哪？")])
def test_a_clip_that_follows_is_joined_as_the_language_is_written(tmp_path, texts, joined):
    """concat: a space between two sentences where words have spaces between them, none where they have not."""
    splits = {s: [{"name": f"{s}{i}", "text": t} for i, t in enumerate(texts)] for s in SPLITS}
    shapes = {row["name"]: (2, 4) for rows in splits.values() for row in rows}
    write_common(str(tmp_path / "two"), "cnn", splits, shapes, lambda name: np.zeros((2, 4)), lambda names: {})
    run = SimpleNamespace(data_dir=str(tmp_path), dataset="two", backbone="cnn", max_frames=0, merge=1)
    clips = Clips(run, "train")

    class Letters:
        eos_id = "EOS"
        encode = staticmethod(list)

    answers = ["".join(clips.sample(0, ([], []), Letters, key=(epoch,), concat=1.0).answer) for epoch in range(20)]
    assert set(answers) == {joined + "EOS", joined.replace(texts[1], texts[0]) + "EOS"}
