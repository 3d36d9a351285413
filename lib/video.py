"""
Videos in, frames out: mp4, webm, gif, folders of images; number, order, orientation and times are ffmpeg's.
"""
import contextlib
import itertools
import logging
import os
import re

import numpy as np

from lib.program import BadInput

IMAGES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".avi", ".mkv")
# a larger frame or a longer clip is taken for a mistake
MAX_SIDE = 8192
MAX_FRAMES = 20_000
# the form of a file, and what ffmpeg notes of one that is cut off where it decodes what is left of it without an error
CUT = r"matroska.*: File ended prematurely|gif: LZW decode failed|(image2|jpeg_pipe): EOI missing"


def natural(name):
    """Sort key under which frame 2 comes before frame 10."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)]


def visible(folder):
    """What lies in a folder, less what systems put there: ._1.png, .DS_Store, @eaDir, __MACOSX."""
    return sorted((f for f in os.listdir(folder) if f[0] not in ".@" and f != "__MACOSX"), key=natural)


def frame_files(folder):
    """The images in a folder, in natural order."""
    files = [f for f in visible(folder) if f.lower().endswith(IMAGES)]
    for one, other in itertools.pairwise(files):
        if os.path.splitext(one)[0] == os.path.splitext(other)[0]:
            raise BadInput(f"{folder}: {one} and {other} are one frame under two endings")
    return [f"{folder}/{f}" for f in files]


def cut_short(file):
    """Whether a file is shorter than it says itself, in the boxes of an mp4 or the first chunk of an AVI."""
    left = os.path.getsize(file)
    with open(file, "rb") as f:
        while left >= 0 and len(head := f.read(16)) > 7:
            if head[4:8] in b"ftyp moov moof mdat free wide skip uuid sidx":
                size = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4])
            else:
                size = head.startswith(b"RIFF") and int.from_bytes(head[4:8], "little") + 8
            if not size:
                break
            left -= size
            f.seek(-max(left, 0), os.SEEK_END)
    return left < 0


@contextlib.contextmanager
def opened(file):
    """A video or an image -> (container, its default video); whatever there is to say against it is a BadInput."""
    import av  # here: with all its codecs it takes a tenth of a second, and who trains decodes nothing
    logging.getLogger("libav").setLevel("CRITICAL")  # what ffmpeg says is read here, and is not for the screen
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)
    try:
        if cut_short(file):
            raise BadInput(f"{file}: is cut off")
        with av.logging.Capture() as said, av.open(file, metadata_errors="replace") as container:
            video = container.streams.best("video")
            if not video or not video.codec_context:
                raise BadInput(f"{file}: holds no video that ffmpeg can decode")
            if max(video.width, video.height) > MAX_SIDE:
                raise BadInput(f"{file}: is {video.width}x{video.height} large, "
                               f"video.MAX_SIDE = {MAX_SIDE} allows no more")
            video.thread_count = 1  # small clips: threads cost more than they bring, processes scale
            yield container, video
            if any(re.match(CUT, f"{container.format.name}: {message}") for *_, message in said):
                raise BadInput(f"{file}: is cut off")
    except (av.error.FFmpegError, OSError) as e:
        raise BadInput(f"{file}: cannot be decoded: absent, damaged or cut off ({e.strerror or e})") from None


def going_on(times, video):
    """
    Times in the video's unit, made to go on where they begin again, since one recording was put behind another.
    In an MPEG stream, which may begin at any time, also where they leap by more than ten seconds, as in ffmpeg.
    Within half a second they may be out of order, as packets are in a file.
    """
    back = 0.5 / video.time_base
    leap = 20 * back if video.container.format.name == "mpegts" else float("inf")
    shift = 0
    step = 1
    last = None
    for at in times:
        if at is not None:
            at += shift
            last = at if last is None else last
            if not last - back <= at <= last + leap:
                shift += last + step - at
                at = last + step
            step = at - last if at > last else step
            at = last = max(at, last)
        yield at


def rate_of(path, rate=0.0):
    """
    Frames a second as a video file's packets have them, 0 where they do not say or say nonsense.
    A folder of frames cannot say; its rate is the one given.
    """
    if os.path.isdir(path):
        return rate
    with opened(path) as (container, video):
        times = [at for at in going_on((p.pts for p in container.demux(video)), video) if at is not None]
        span = (max(times) - min(times)) * video.time_base if times else 0
        own = float((len(times) - 1) / span if span else video.average_rate or 0)
    return own if 1 <= own <= 240 else 0.0


def decoded(container, video, still):
    """An image's frame, or a video's in the order in which they are shown."""
    last = None
    for packet in itertools.islice(container.demux(video), 1 if still else None):
        yield from packet.decode()
        last = packet if packet.size else last
    # a GIF's picture ends with an empty block
    if last and (last.is_corrupt or container.format.name == "gif" and not re.search(rb"\0(;|$)", last)):
        raise BadInput(f"{container.name}: is cut off")


def timed(path, rate=1.0):
    """Yield (time in seconds, av's frame) through a clip; a folder of frames has no times but those of its rate."""
    from av.filter import Graph
    folder = os.path.isdir(path)
    frame = None
    for number, file in enumerate(frame_files(path) if folder else [path]):
        with opened(file) as (container, video):
            still = file.lower().endswith(IMAGES)
            pictures, again = itertools.tee(decoded(container, video, still))
            for frame, at in zip(pictures, going_on((f.pts for f in again), video)):
                try:
                    len(frame.side_data)
                except ValueError:  # some that this av has no name for, EXIF among them: a filter takes them away
                    graph = Graph()
                    unnamed = [graph.add("sidedata", f"mode=delete:type={n}") for n in range(28, 32)]
                    graph.link_nodes(graph.add_buffer(video), *unnamed, graph.add("buffersink")).configure()
                    graph.push(frame)
                    frame = graph.pull()
                yield number / rate if folder else at and float(at * video.time_base), frame
    if frame is None:
        raise BadInput(f"{path}: has no frames")


def resampled(clip, fps, path):
    """
    (time, frame) through a clip -> for each of the times 0, 1/fps, 2/fps, ... the frame nearest to it.
    Frames may come at any intervals; the last one is shown as long as the one before.
    """
    n = 0
    start = None
    step = 0.0
    for (at, frame), (after, _) in itertools.pairwise(itertools.chain(clip, [(None, None)])):
        if at is None:
            raise BadInput(f"{path}: its frames carry no times, fps={fps:g} cannot be made of them")
        start = at if start is None else start
        step = step if after is None else after - at
        while n / fps < at - start + max(step, 1e-3) / 2 + 1e-6:  # halfway between two frames: the earlier
            yield n / fps, frame
            n += 1


def upright(rgb, frame):
    """A picture as it is to be shown: turned and mirrored by its frame's display matrix, which phones and EXIF give."""
    found = frame.side_data.get("DISPLAYMATRIX")
    if not found:
        return rgb
    a, b, _, c, d = np.frombuffer(found, np.int32)[:5].tolist()  # (x, y) -> (a x + c y, b x + d y)
    if abs(b) > abs(a):
        rgb, a, d = rgb.swapaxes(0, 1), c, b
    return rgb[::-1 if d < 0 else 1, ::-1 if a < 0 else 1]


def other_rate(own, fps):
    """Whether a clip of `own` frames a second is resampled to fps: where they differ by more than 1 %; 0 = never."""
    return bool(fps) and abs(own / fps - 1) > 0.01


def frames(path, size=None, interpolation="BILINEAR", fps=0.0, rate=0.0):
    """
    Yield the frames of a clip (mp4, webm, gif, ..., or a folder of png/jpg, filmed at `rate`) as uint8 (H, W, 3).
    size: squeezed to size x size; else all have the size of the first.
    fps: resampled to it where its own rate is another (and known, if it is a folder), see other_rate.
    """
    from av.video.reformatter import VideoReformatter
    clip = timed(path, rate or 1.0)
    if fps and other_rate(rate_of(path, rate or fps), fps):  # to count all frames of a clip takes a moment
        clip = resampled(clip, fps, path)
    shape = size and (size, size)
    reformat = VideoReformatter().reformat
    for n, (_, frame) in enumerate(clip):
        if n == MAX_FRAMES:
            raise BadInput(f"{path}: is longer than video.MAX_FRAMES = {MAX_FRAMES} frames")
        shape = shape or (frame.width, frame.height)
        rgb = reformat(frame, *shape, "rgb24", interpolation=interpolation, threads=1).to_ndarray()
        yield upright(rgb, frame)


def read_video(path):
    """A clip (mp4, webm, gif, or a folder of png/jpg frames in natural order) -> uint8 (T, H, W, 3)."""
    return np.stack(list(frames(path)))
