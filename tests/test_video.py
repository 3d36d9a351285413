"""
Videos as cameras, phones, browsers and disks leave them. Each frame carries its number: which come, which way up, when.

    python -m pytest tests/test_video.py
"""
import os
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from test_data import bad

from lib import video
from lib.check import check
from lib.program import BadInput

CONTAINERS = {"a.mp4": "h264", "front.mp4": "h264", "pieces.mp4": "h264", "a.mov": "h264", "a.mkv": "h264",
              "a.webm": "libvpx", "live.webm": "libvpx", "a.avi": "mjpeg", "b.avi": "h264"}
OPTIONS = {"front.mp4": {"movflags": "faststart"}, "pieces.mp4": {"movflags": "frag_keyframe+empty_moov"},
           "live.webm": {"live": "1"}}


def picture(n, width=64, height=48):
    """Grey, red above at the left, blue above at the right; below the number n as eight black or white blocks."""
    rgb = np.full((height, width, 3), 110, np.uint8)
    rgb[:height // 3, :width // 4], rgb[:height // 3, -(width // 4):] = (255, 0, 0), (0, 0, 255)
    for b in range(8):
        rgb[height * 2 // 3:, b * width // 8:(b + 1) * width // 8] = 255 * (n >> (7 - b) & 1)
    return rgb


def number(rgb):
    height, width = rgb.shape[:2]
    row = rgb[height * 7 // 8].mean(1)
    return sum(int(row[int((b + 0.5) * width / 8)] > 127) << (7 - b) for b in range(8))


def film(path, numbers, times=None, codec="h264", sound=0.0, size=(64, 48), base=Fraction(1, 1000), **options):
    """A clip whose frames show these numbers, at these times or 25 a second; sound: seconds of silence."""
    pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "png": "rgb24"}.get(codec, "yuv420p")
    quality = {"h264": {"crf": "10", "bf": "0"}, "libvpx": {"deadline": "realtime", "lag-in-frames": "0", "b": "2M"}}
    with av.open(str(path), "w", options=OPTIONS.get(path.name, {})) as container:
        stream = container.add_stream(codec, rate=25, options=quality.get(codec, {}) | options)
        stream.width, stream.height, stream.pix_fmt = *size, pix_fmt
        stream.codec_context.time_base = base
        packets = []
        if sound:
            audio = container.add_stream("libopus" if path.suffix == ".webm" else "aac", rate=48000, layout="mono")
            for k in range(int(sound * 50)):
                form = audio.codec_context.format.name
                frame = av.AudioFrame.from_ndarray(np.zeros((1, 960), "f4" if "fl" in form else "i2"), form, "mono")
                frame.sample_rate, frame.pts, frame.time_base = 48000, 960 * k, Fraction(1, 48000)
                packets += audio.encode(frame)
            packets += audio.encode()
        for n, t in zip(numbers, times or [k / 25 for k in range(len(numbers))]):
            frame = av.VideoFrame.from_ndarray(picture(n, *size))
            frame.pts, frame.time_base = round(t / base), base
            packets += stream.encode(frame)
        packets += stream.encode()
        for packet in sorted((p for p in packets if p.dts is not None), key=lambda p: p.dts * p.time_base):
            container.mux(packet)
    return path


def made(path, n=50, **how):
    """The numbers 1 to n in one of the containers."""
    base = Fraction(1, 25 if path.suffix == ".avi" else 1000)
    return film(path, range(1, n + 1), codec=CONTAINERS[path.name], base=base, **how)


def image(path, n=1, **how):
    return film(path, [n], codec="png" if path.suffix == ".png" else "mjpeg", update="1", **how)


def seen(path, **how):
    return [number(f) for f in video.frames(str(path), **how)]


@pytest.fixture
def folder(tmp_path):
    """A folder of three frames."""
    home = tmp_path / "clip"
    home.mkdir()
    for n in (1, 2, 3):
        image(home / f"{n}.png", n)
    return home

# ---------------------------------------------------------------------------------------------------------------------
# Which frames, and when

@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("sound", [0.0, 3.0])
def test_every_container(tmp_path, name, sound):
    """All frames in order and at their own rate, whatever lies behind the end of the file; resampled by their times."""
    path = made(tmp_path / name, sound=sound)
    raw = path.read_bytes()
    for more in (b"", b"\0\n", b"made by a site".ljust(54)):
        path.write_bytes(raw + more)
        assert seen(path) == list(range(1, 51))
    # with sound av's writers themselves lay the first frame of two of them a little apart
    assert video.rate_of(str(path)) == pytest.approx(25, rel=0.03 if sound else 0.001)
    assert len(seen(path, fps=50.0)) in (99, 100, 101, 102)


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "b.avi", "a.ts"])
def test_frames_that_lie_in_another_order(tmp_path, name):
    path = film(tmp_path / name, range(1, 51), base=Fraction(1, 25), bf="3")
    assert seen(path) == list(range(1, 51)) and video.rate_of(str(path)) == pytest.approx(25)
    assert len(seen(path, fps=12.5)) == 25


def test_a_browser_s_recording(tmp_path):
    """No rate and no duration in the header, after two seconds only every third frame: the packets have the times."""
    times = [k / 30 for k in range(60)] + [2 + k / 10 for k in range(40)]
    path = film(tmp_path / "live.webm", range(1, 101), times, "libvpx")
    raw = bytearray(path.read_bytes())
    at = raw.index(b"\x23\xe3\x83")  # its DefaultDuration: now a void
    n = 4 + (raw[at + 3] & 0x7f)
    raw[at:at + n] = b"\xec" + bytes([0x80 | (n - 2)]) + bytes(n - 2)
    path.write_bytes(raw)
    assert video.rate_of(str(path)) == pytest.approx(99 / times[-1], rel=0.01)
    got = seen(path, fps=30.0)
    assert abs(len(got) - 178) <= 2 and got[:60] == list(range(1, 61)) and got[-1] == 100
    assert seen(path) == list(range(1, 101))


@pytest.mark.parametrize("name", ["a.ts", "live.webm", "a.mkv"])
def test_two_recordings_in_one_file(tmp_path, name):
    """Their times begin again: one comes behind the other."""
    (tmp_path / "2").mkdir()
    codec = "libvpx" if name == "live.webm" else "h264"
    parts = [film(tmp_path / where / name, numbers, codec=codec)
             for where, numbers in (("", range(1, 31)), ("2", range(31, 61)))]
    path = tmp_path / name
    path.write_bytes(b"".join(p.read_bytes() for p in parts))
    assert seen(path) == list(range(1, 61)) and video.rate_of(str(path)) == pytest.approx(25, rel=0.01)
    got = seen(path, fps=50.0)
    assert abs(len(got) - 120) <= 2 and sorted(set(got)) == list(range(1, 61)) and got == sorted(got)


def test_a_broadcast_that_leaps(tmp_path):
    """In an MPEG stream a leap of hours is another recording; a pause in a webm is a pause."""
    late = film(tmp_path / "b.ts", range(31, 61), [5000 + k / 25 for k in range(30)])
    path = film(tmp_path / "a.ts", range(1, 31))
    path.write_bytes(path.read_bytes() + late.read_bytes())
    assert abs(len(seen(path, fps=50.0)) - 120) <= 2
    path = film(tmp_path / "a.webm", [1, 2, 3], [0, 0.04, 12.0], "libvpx")
    assert abs(len(seen(path, fps=5.0)) - 60) <= 31


def test_the_default_stream(tmp_path):
    """A camera's small preview may lie in front of the picture itself."""
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        streams = [container.add_stream("h264", rate=25, options={"crf": "10"}) for _ in range(2)]
        for stream in streams:
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        streams[0].disposition, streams[1].disposition = 0, av.stream.Disposition.default
        packets = []
        for stream, numbers in zip(streams, ((101, 102, 103), (1, 2, 3))):
            for n in numbers:
                packets += stream.encode(av.VideoFrame.from_ndarray(picture(n)))
            packets += stream.encode()
        container.mux(sorted(packets, key=lambda p: p.dts * p.time_base))
    assert seen(tmp_path / "a.mkv") == [1, 2, 3]


@pytest.mark.parametrize("encoding", ["gbk", "latin-1", "shift-jis", "utf-16"])
def test_tags_in_any_encoding(tmp_path, encoding):
    path = tmp_path / "a.mp4"
    with av.open(str(film(tmp_path / "b.mp4", [1, 2, 3]))) as source, av.open(str(path), "w") as container:
        container.metadata["title"] = "X" * 8
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    title = ("für alle" if encoding == "latin-1" else "手話").encode(encoding).ljust(8)[:8]
    path.write_bytes(path.read_bytes().replace(b"X" * 8, title))
    assert seen(path) == [1, 2, 3] and video.rate_of(str(path)) == pytest.approx(25)


def test_sizes_that_change(tmp_path, folder):
    """Each frame is squeezed to a square anyway; where none is asked for, all have the size of the first."""
    small, large = (film(tmp_path / f"{size[0]}.webm", numbers, codec="libvpx", size=size)
                    for size, numbers in (((64, 48), range(1, 9)), ((128, 96), range(9, 17))))
    with av.open(str(small)) as a, av.open(str(large)) as b, av.open(str(tmp_path / "a.webm"), "w") as container:
        stream = container.add_stream_from_template(a.streams.video[0])
        for k, source in enumerate((a, b)):
            for packet in source.demux(video=0):
                if packet.pts is not None:
                    packet.pts = packet.dts = packet.pts + 320 * k
                    packet.stream = stream
                    container.mux(packet)
    image(folder / "4.png", 4, size=(96, 96))
    for path, numbers in ((tmp_path / "a.webm", list(range(1, 17))), (folder, [1, 2, 3, 4])):
        for size, shape in ((None, (48, 64, 3)), (32, (32, 32, 3))):
            assert seen(path, size=size) == numbers
            assert {f.shape for f in video.frames(str(path), size)} == {shape}

# ---------------------------------------------------------------------------------------------------------------------
# Which way up

# EXIF's number: what is done to the picture as it lies in the file; the matrix that says so in an mp4
TURNS = {1: (lambda x: x, (1, 0, 0, 1)), 2: (lambda x: x[:, ::-1], (-1, 0, 0, 1)),
         3: (lambda x: x[::-1, ::-1], (-1, 0, 0, -1)), 4: (lambda x: x[::-1], (1, 0, 0, -1)),
         5: (lambda x: x.swapaxes(0, 1), (0, 1, 1, 0)), 6: (lambda x: np.rot90(x, -1), (0, 1, -1, 0)),
         7: (lambda x: x[::-1, ::-1].swapaxes(0, 1), (0, -1, -1, 0)), 8: (np.rot90, (0, -1, 1, 0))}


@pytest.mark.parametrize("turn", TURNS)
def test_turned_and_mirrored(tmp_path, turn):
    """Phones note in the track's header how a picture is to be shown, cameras in a photo's EXIF."""
    change, (a, b, c, d) = TURNS[turn]
    path = film(tmp_path / "a.mp4", [5, 6])
    plain = next(video.frames(str(path), 48)).astype(int)
    raw = path.read_bytes()
    at = raw.index(b"tkhd") + 44
    matrix = struct.pack(">9i", *(v << 16 for v in (a, b, 0, c, d, 0, 0, 0)), 1 << 30)
    path.write_bytes(raw[:at] + matrix + raw[at + 36:])
    photos = tmp_path / "photos"
    photos.mkdir()
    raw = image(photos / "5.jpg", 5, qmin="1", qmax="1").read_bytes()
    for order in "<>":  # an entry: orientation, of type short, one of them
        exif = b"Exif\0\0" + {"<": b"II", ">": b"MM"}[order] + struct.pack(
            order + "HIHHHIHHI", 42, 8, 1, 0x112, 3, 1, turn, 0, 0)
        (photos / "5.jpg").write_bytes(raw[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + raw[2:])
        for clip in (path, photos):
            first = next(video.frames(str(clip)))
            want = change(picture(5)).astype(int)
            assert first.shape == want.shape and abs(first - want).mean() < 12
            squeezed = next(video.frames(str(clip), 48)).astype(int)
            assert squeezed.shape == (48, 48, 3) and abs(squeezed - change(plain)).mean() < 12

# ---------------------------------------------------------------------------------------------------------------------
# What is cut off, and what is not

@pytest.mark.parametrize("name", CONTAINERS)
@pytest.mark.parametrize("sound", [0.0, 3.0])
def test_cut_off(tmp_path, name, sound):
    """Wherever the file ends too early: never a part of the clip without a word."""
    path = made(tmp_path / name, sound=sound)
    raw = path.read_bytes()
    for share in np.linspace(0.2, 0.97, 12):
        path.write_bytes(raw[:int(share * len(raw))])
        try:
            assert seen(path) == list(range(1, 51))  # what is gone lies behind the frames
        except BadInput as e:
            assert str(path) in str(e)
    path.write_bytes(raw[:len(raw) * 6 // 10])
    with bad(path, "cut off"):
        seen(path)


def test_gifs(tmp_path):
    """Without the last byte, and with a site's mark behind it, all frames are there; else a picture is cut off."""
    path = film(tmp_path / "a.gif", range(1, 7), codec="gif", base=Fraction(1, 25))
    raw = path.read_bytes()
    for whole in (raw, raw[:-1], raw + b"\0\n", raw + b"made by a site".ljust(54)):
        path.write_bytes(whole)
        assert seen(path) == [1, 2, 3, 4, 5, 6]
    for end in range(len(raw) * 2 // 3, len(raw) - 8, 7):
        path.write_bytes(raw[:end])
        try:
            got = seen(path)
        except BadInput as e:
            assert "cut off" in str(e)
        else:  # cut exactly between two pictures
            assert got == [1, 2, 3, 4, 5, 6][:len(got)] and raw[end - 1] == 0


def test_a_long_last_frame_is_no_cut(tmp_path):
    """The header knows that the last frame is shown for three seconds."""
    for name in ("a.webm", "a.mkv", "a.mp4"):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libvpx" if name == "a.webm" else "h264", rate=25)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            packets = [p for n in (1, 2, 3) for p in stream.encode(av.VideoFrame.from_ndarray(picture(n)))]
            packets += stream.encode()
            packets[-1].duration = round(3 / packets[-1].time_base)
            container.mux(packets)
        assert len(seen(tmp_path / name)) == 3


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7, 0.9, 0.99])
def test_half_a_frame_of_a_folder(folder, ending, share):
    noise = np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8)
    (folder / "2.png").unlink()
    path = image(folder / f"2.{ending}", 2)
    with av.open(str(path), "w", options={"update": "1"}) as container:
        stream = container.add_stream("png" if ending == "png" else "mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "rgb24" if ending == "png" else "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(noise)) + stream.encode())
    assert len(seen(folder)) == 3
    path.write_bytes(path.read_bytes()[:int(share * path.stat().st_size)])
    with bad(path, "cut off"):
        seen(folder)

# ---------------------------------------------------------------------------------------------------------------------
# What else lies in a folder

def test_what_systems_put_into_folders(folder):
    for name in ("._1.png", "._2.png", ".DS_Store", "Thumbs.db", ".hidden.jpg"):
        (folder / name).write_bytes(b"\0\5\x16\7" + bytes(4000))
    for name in ("__MACOSX", "@eaDir"):
        (folder / name).mkdir()
        (folder / name / "1.png").write_bytes(b"\0\5\x16\7")
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes() + b"more behind it")
    assert seen(folder) == [1, 2, 3]
    row = {"name": "a", "text": "ja", "video": str(folder), "frames": 3}
    assert check({"train": [row], "dev": [], "test": []})[1:3] == ([], ["dev: no clips", "test: no clips"])


def test_one_frame_under_two_endings(folder):
    image(folder / "2.jpg", 2)
    with bad(folder, "2.jpg and 2.png are one frame"):
        seen(folder)
    problems = check({"train": [{"name": "a", "text": "ja", "video": str(folder)}], "dev": [], "test": []})[1]
    assert len(problems) == 1 and "clip a: " in problems[0] and "2.jpg and 2.png" in problems[0]
    (folder / "2.png").unlink()
    os.rename(folder / "2.jpg", folder / "2.JPG")
    assert seen(folder) == [1, 2, 3]
