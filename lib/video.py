"""
Videos in, frames out: mp4, webm, gif, folders of images; number, order, orientation and times as ffmpeg's.
"""
import contextlib
import os
import re

import numpy as np

from lib.program import BadInput

IMAGES = (".png", ".jpg", ".jpeg")
VIDEOS = (".mp4", ".webm", ".gif", ".mov", ".avi", ".mkv")
# a larger frame or a longer clip is taken for a mistake
MAX_SIDE = 8192
MAX_FRAMES = 20_000


def natural(name):
    """Sort key under which frame 2 comes before frame 10."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)]


@contextlib.contextmanager
def opened(file):
    """The container of a video or an image; whatever there is to say against it is a BadInput."""
    import av  # here: with all its codecs it takes a tenth of a second, and who trains decodes nothing
    try:
        # the decoder would give a GIF's frames up to where it is cut off, without a word
        if file.lower().endswith(".gif") and open(file, "rb").read().rstrip(b"\0\r\n ")[-1:] != b";":
            raise BadInput(f"{file}: is cut off, a GIF ends with ';'")
        with av.open(file) as container:
            if not container.streams.video:
                raise BadInput(f"{file}: holds no video")
            video = container.streams.video[0]
            if max(video.width, video.height) > MAX_SIDE:
                raise BadInput(f"{file}: is {video.width}x{video.height} large, "
                               f"video.MAX_SIDE = {MAX_SIDE} allows no more")
            video.thread_count = 1  # small clips: threads cost more than they bring, processes scale
            yield container
    except (av.error.FFmpegError, UnicodeDecodeError, OSError) as e:  # UnicodeDecodeError: damaged tags
        raise BadInput(f"{file}: cannot be decoded ({getattr(e, 'strerror', None) or e})") from None


def rate_of(path, rate=0.0):
    """
    Frames a second as a video file has them, 0 where it does not say or says nonsense.
    A folder of frames cannot say; its rate is the one given.
    """
    if os.path.isdir(path):
        return rate
    with opened(path) as container:
        video = container.streams.video[0]
        own = float(video.average_rate or 0)
        # that is a guess from the first frames of a GIF, and hangs on how long the last one of an mp4 lasts
        if video.frames > 1:
            times = [p.pts for p in container.demux(video) if p.pts is not None]
            seconds = (max(times) - min(times)) * video.time_base
            own = float((len(times) - 1) / max(seconds, 1e-6))
    return own if 1 <= own <= 240 else 0.0


def timed(path, rate=0.0):
    """Yield (time in seconds, av's frame) through a clip; a folder of frames has no times but those of its rate."""
    if os.path.isdir(path):
        files = [os.path.join(path, f) for f in sorted(os.listdir(path), key=natural) if f.lower().endswith(IMAGES)]
    else:
        files = [path]
        rate = 0.0
    shape = None
    for number, file in enumerate(files):
        with opened(file) as container:
            at = 0.0
            for frame in container.decode(video=0):
                at = frame.time or 0.0
                size = (frame.width, frame.height)
                shape = shape or size  # that of the first frame
                if size != shape:
                    raise BadInput(f"{file}: a frame of {size[0]}x{size[1]} in a clip of {shape[0]}x{shape[1]}")
                time = number / rate if rate else frame.time
                yield time, frame
            # webm: the decoder takes the end of a file that was cut off for the end of the clip,
            # but the header knows how long it was
            gif = file.lower().endswith(".gif")
            if len(container.streams) == 1 and not gif and at + 0.5 < 0.8e-6 * (container.duration or 0):
                raise BadInput(f"{file}: is cut off, it ends at {at:.1f} s of {container.duration / 1e6:.1f}")
    if shape is None:
        raise BadInput(f"{path}: has no frames")


def resampled(clip, fps, path):
    """
    (time, frame) through a clip -> for each of the times 0, 1/fps, 2/fps, ... the frame nearest to it.
    Frames may come at any intervals.
    """
    n = 0
    start = None
    frame = None
    before = 0.0  # when `frame` came, from the start
    for at, after in clip:
        if at is None:
            raise BadInput(f"{path}: its frames carry no times, fps={fps:g} cannot be made of them")
        if start is None:
            start = at
        step = at - start - before
        middle = (at - start + before) / 2
        while frame and n / fps < middle + 1e-6:  # halfway between two frames: the earlier
            yield n / fps, frame
            n += 1
        before = at - start
        frame = after
    while n / fps < before + max(step, 1e-3) / 2 + 1e-6:  # the last one is shown as long as the one before
        yield n / fps, frame
        n += 1


def frames(path, size=None, interpolation="BILINEAR", fps=0.0, rate=0.0):
    """
    Yield the frames of a clip (mp4, webm, gif, ..., or a folder of png/jpg, filmed at `rate`) as uint8 (H, W, 3).
    size: squeezed to size x size.
    fps: resampled to it where its own rate is another by more than 1 % (and known, if it is a folder).
    """
    from av.video.reformatter import VideoReformatter
    clip = timed(path, rate)
    if fps and abs(rate_of(path, rate or fps) / fps - 1) > 0.01:
        clip = resampled(clip, fps, path)
    how = dict(format="rgb24", interpolation=interpolation, threads=1)
    if size:
        how |= dict(width=size, height=size)
    reformat = VideoReformatter().reformat
    for n, (_, frame) in enumerate(clip):
        if n == MAX_FRAMES:
            raise BadInput(f"{path}: is longer than video.MAX_FRAMES = {MAX_FRAMES} frames")
        rgb = reformat(frame, **how).to_ndarray()
        yield np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb  # phones film upright and note the turn


def read_video(path):
    """A clip (mp4, webm, gif, or a folder of png/jpg frames in natural order) -> uint8 (T, H, W, 3)."""
    return np.stack(list(frames(path)))
