"""
Videos in, features out: decoding (mp4, webm, gif, folders of frames), frozen CNNs at work, and the store in which features wait for training.
`python data.py` drives it; a run that was killed goes on where it stopped, and clips that have not changed are not extracted again.
"""
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import statistics
import sys

import numpy as np
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from config import BadInput, Progress, pick_device, print0, rank, whole, world
from model import GoogLeNet, RandomCNN, he_init, load_cnn
from readers import SPLITS, half, open_features

MAX_SIDE, MAX_FRAMES = 8192, 20_000  # a larger frame or a longer clip is taken for a mistake
BATCH = 32  # frames that go through the CNN at once: always as many, so that a feature does not depend on the clips around (see stream)

# ---------------------------------------------------------------------------------------------------------------------
# Decoding

def natural(name):
    """Sort key under which frame 2 comes before frame 10."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)]


@contextlib.contextmanager
def opened(file):
    """The container of a video or an image; whatever there is to say against it is a BadInput."""
    import av  # here: with all its codecs it takes a tenth of a second, and who trains decodes nothing
    try:
        if file.lower().endswith(".gif") and open(file, "rb").read().rstrip(b"\0\r\n ")[-1:] != b";":
            raise BadInput(f"{file}: is cut off, a GIF ends with ';'")  # the decoder would give the frames up to there without a word
        with av.open(file) as container:
            if not container.streams.video:
                raise BadInput(f"{file}: holds no video")
            video = container.streams.video[0]
            if max(video.width, video.height) > MAX_SIDE:
                raise BadInput(f"{file}: is {video.width}x{video.height} large, video.MAX_SIDE = {MAX_SIDE} allows no more")
            video.thread_count = 1  # small clips: threads cost more than they bring, processes scale
            yield container
    except (av.error.FFmpegError, UnicodeDecodeError, OSError) as e:  # UnicodeDecodeError: damaged tags
        raise BadInput(f"{file}: cannot be decoded ({getattr(e, 'strerror', None) or e})") from None


def rate_of(path, rate=0.0):
    """Frames a second as a video file has them, 0 where it does not say or says nonsense; a folder of frames cannot say, its rate is the one given."""
    if os.path.isdir(path):
        return rate
    with opened(path) as container:
        video = container.streams.video[0]
        own = float(video.average_rate or 0)
        if video.frames > 1:  # of a GIF it is a guess from the first frames, of an mp4 it hangs on how long the last one lasts
            times = [p.pts for p in container.demux(video) if p.pts is not None]
            own = float((len(times) - 1) / max((max(times) - min(times)) * video.time_base, 1e-6))
    return own if 1 <= own <= 240 else 0.0


def timed(path, rate=0.0):
    """Yield (time in seconds, av's frame) through a clip; a folder of frames has no times but those of its rate."""
    folder, shape = os.path.isdir(path), None
    files = [os.path.join(path, f) for f in sorted(os.listdir(path), key=natural) if f.lower().endswith((".png", ".jpg", ".jpeg"))] if folder else [path]
    for number, file in enumerate(files):
        with opened(file) as container:
            at = 0.0
            for frame in container.decode(video=0):
                at, shape = frame.time or 0.0, shape or (frame.width, frame.height)
                if shape != (frame.width, frame.height):
                    raise BadInput(f"{file}: a frame of {frame.width}x{frame.height} in a clip of {shape[0]}x{shape[1]}")
                yield number / rate if folder and rate else frame.time, frame
            # webm: the decoder takes the end of a file that was cut off for the end of the clip, but the header knows how long it was
            if len(container.streams) == 1 and not file.lower().endswith(".gif") and at + 0.5 < 0.8e-6 * (container.duration or 0):
                raise BadInput(f"{file}: is cut off, it ends at {at:.1f} s of {container.duration / 1e6:.1f}")
    if shape is None:
        raise BadInput(f"{path}: has no frames")


def resampled(clip, fps, path):
    """(time, frame) through a clip -> for each of the times 0, 1/fps, 2/fps, ... the frame nearest to it; frames may come at any intervals."""
    n, start, before, frame = 0, None, 0.0, None
    for at, after in clip:
        if at is None:
            raise BadInput(f"{path}: its frames carry no times, fps={fps:g} cannot be made of them")
        start = at if start is None else start
        step, middle = at - start - before, (at - start + before) / 2
        while frame and n / fps < middle + 1e-6:  # halfway between two frames: the earlier
            yield n / fps, frame
            n += 1
        before, frame = at - start, after
    while n / fps < before + max(step, 1e-3) / 2 + 1e-6:  # the last one is shown as long as the one before
        yield n / fps, frame
        n += 1


def frames(path, size=None, interpolation="BILINEAR", fps=0.0, rate=0.0):
    """
    Yield the frames of a clip (mp4, webm, gif, ..., or a folder of png/jpg, filmed at `rate`) as uint8 (H, W, 3). size: squeezed to size x size;
    fps: resampled to it where its own rate is another by more than 1 % (and known, if it is a folder).
    """
    from av.video.reformatter import VideoReformatter
    clip, convert = timed(path, rate), VideoReformatter()
    if fps and abs(rate_of(path, rate or fps) / fps - 1) > 0.01:
        clip = resampled(clip, fps, path)
    to = dict(width=size, height=size) if size else {}
    for n, (_, frame) in enumerate(clip):
        if n == MAX_FRAMES:
            raise BadInput(f"{path}: is longer than video.MAX_FRAMES = {MAX_FRAMES} frames")
        rgb = convert.reformat(frame, format="rgb24", interpolation=interpolation, threads=1, **to).to_ndarray()
        yield np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb  # phones film upright and note the turn


def read_video(path):
    """A clip (mp4, webm, gif, or a folder of png/jpg frames in natural order) -> uint8 (T, H, W, 3)."""
    return np.stack(list(frames(path)))

# ---------------------------------------------------------------------------------------------------------------------
# Feature extraction and store

class Decoder(IterableDataset):
    """
    The frames of many clips, a share of them in each process that decodes. Yields (number of the clip, some of its frames (n, crop, crop, 3), None) and
    after the last (number, [], its own frame rate); a broken clip ends with (number, [], the BadInput).
    """

    def __init__(self, paths, size, crop, **how):
        self.paths, self.size, self.crop, self.how = paths, size, crop, how

    def __iter__(self):
        me = get_worker_info()
        low = (self.size - self.crop) // 2
        for i in range(me.id if me else 0, len(self.paths), me.num_workers if me else 1):
            try:
                some = []
                for frame in frames(self.paths[i], self.size, **self.how):
                    some.append(frame[low:low + self.crop, low:low + self.crop])
                    if len(some) == BATCH // 2:  # a clip is never held as a whole, however long it is
                        yield i, np.stack(some), None
                        some = []
                yield i, some and np.stack(some), rate_of(self.paths[i], self.how["rate"])
            except BadInput as e:
                yield i, [], e


def open_timm(backbone, weights):
    """timm/NAME -> (model without its classifier, side after squeezing, side of the crop, interpolation, mean, std), the latter as timm notes them."""
    name = backbone.removeprefix("timm/")
    try:
        import timm
    except Exception as e:  # a torchvision that was built for another torch raises a RuntimeError
        raise BadInput(f"backbone={backbone}: needs the package timm, pip install timm ({e})") from None
    if not re.fullmatch(r"[\w.-]+", name) or not timm.is_model(name.split(".")[0]):
        raise BadInput(f"backbone={backbone}: timm {timm.__version__} has no model of this name")
    if not weights:
        print0(f"backbone {backbone}: no weights=FILE is given, so timm looks for its pre-trained ones on this machine and else downloads them")
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # weights=random are the same for everybody
            cnn = timm.create_model(name, pretrained=not weights, num_classes=0)
    except Exception as e:  # no network, no such weights, ...
        raise BadInput(f"backbone={backbone}: timm cannot make it ({(str(e) or type(e).__name__).splitlines()[0][:200]}); weights=FILE needs no network") from None
    if weights not in ("", "random"):
        heads = cnn.pretrained_cfg.get("classifier") or ()
        load_cnn(cnn, weights, tuple(h + "." for h in ((heads,) if isinstance(heads, str) else heads)))
    how = timm.data.resolve_model_data_config(cnn)
    _, height, width = how["input_size"]
    if height != width:
        raise BadInput(f"backbone={backbone}: takes frames of {width}x{height}, only squares are squeezed and cropped here")
    return cnn, int(height / how["crop_pct"]), height, how["interpolation"].upper(), how["mean"], how["std"]


def open_googlenet(weights):
    """The paper's CNN with torchvision's weights, a .pth or .safetensors; "random": for trials of speed."""
    if not weights:
        raise BadInput("weights: googlenet needs a file of torchvision's weights (googlenet-1378be20.pth)")
    return he_init(GoogLeNet()) if weights == "random" else GoogLeNet().load(weights)


CNNS = {  # backbone= -> a function of weights= that makes a module with .features(frames); pixels that a frame is squeezed to, and of its middle
    "toycnn": (lambda weights: RandomCNN(), 64, 64),
    "googlenet": (open_googlenet, 256, 224),
}


class Extractor:
    """A frozen CNN with the preparation of its frames: squeezed to a square, centre-cropped, normalised. Called with a path -> float16 (T, D)."""

    def __init__(self, backbone, weights="", device="auto", fps=0.0, rate=0.0, workers=0):
        """fps: clips are resampled to it, 0 = as filmed; rate: of folders of frames, where it is known; workers: processes that decode for prepare."""
        if backbone not in CNNS and not backbone.startswith("timm/"):
            raise BadInput(f"backbone={backbone}: is none of {', '.join(CNNS)}, timm/NAME")
        self.settings = {"backbone": backbone, "weights": weights, "fps": fps}
        if weights and os.path.exists(weights):
            self.settings["weights_file"] = fingerprint(weights)  # features of other weights are other features
        if backbone in CNNS:
            make, size, self.crop = CNNS[backbone]
            self.cnn, interpolation, mean, std = make(weights), "BILINEAR", (0.5,) * 3, (0.5,) * 3
        else:
            self.cnn, size, self.crop, interpolation, mean, std = open_timm(backbone, weights)
        self.how = dict(size=size, crop=self.crop, interpolation=interpolation, fps=fps, rate=rate)
        self.device, self.workers = pick_device(device)[0], workers
        self.cnn = self.cnn.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.features = self.cnn if backbone.startswith("timm/") else self.cnn.features
        self.mean, self.std = (255 * torch.tensor(v, device=self.device).view(3, 1, 1) for v in (mean, std))
        self.bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    @torch.inference_mode()
    def compute(self, batch):
        """Frames uint8 (BATCH, crop, crop, 3) -> features float16 (BATCH, D)."""
        x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), channels last
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.features((x.float() - self.mean) / self.std).half().cpu().numpy()

    def stream(self, paths, workers=0):
        """
        The features of many clips. Yields (number of the clip, float16 (T, D), its own frame rate), or (number, None, the BadInput) for a broken one, as they are done.
        A batch holds frames of several clips. NOTE its size never changes: kernels are chosen by shape and round differently, but a frame
        gives bitwise the same feature at any place of a batch, whatever is around it. So neither kills nor workers leave a trace in the store.
        """
        batch, owners = np.zeros((BATCH, self.crop, self.crop, 3), np.uint8), []  # owners: the clip of each frame in the batch
        rows, ended = {}, {}  # clip -> its features so far; clip -> its rate or its BadInput once all its frames have come

        def flush():
            for i, row in zip(owners, self.compute(batch)):  # what the last batch is filled up with has no owner
                rows.setdefault(i, []).append(row)
            owners.clear()

        def done():
            for i in [i for i in ended if i not in owners]:
                end, features = ended.pop(i), np.array(rows.pop(i, []))
                if not isinstance(end, BadInput) and not np.isfinite(features).all():
                    end = BadInput(f"{paths[i]}: backbone {self.settings['backbone']} gives features that are not finite")
                yield (i, None, end) if isinstance(end, BadInput) else (i, features, end)

        # collate_fn: arrays stay arrays and come through a pipe; tensors would go through /dev/shm, which is small in containers
        for i, some, end in DataLoader(Decoder(paths, **self.how), batch_size=None, collate_fn=tuple, num_workers=min(workers, len(paths))):
            for frame in some:
                batch[len(owners)] = frame
                owners.append(i)
                if len(owners) == BATCH:
                    flush()
            if end is not None:
                ended[i] = end
            yield from done()
        if owners:
            flush()
        yield from done()

    def __call__(self, path):
        """The features of a clip: float16 (T, D)."""
        ((_, features, end),) = self.stream([path])
        if features is None:
            raise end
        return features


def fingerprint(path):
    """Changes when a file does, or one of the files in a folder of frames."""
    stats = [f.stat() for f in os.scandir(path)] if os.path.isdir(path) else [os.stat(path)]
    return f"{os.path.abspath(path)} {len(stats)} {sum(s.st_size for s in stats)} {max((s.st_mtime_ns for s in stats), default=0)}"


def write_store(path, shapes, read, metadata):
    """A feature store, shapes {name: (T, D)}, read(name) -> (T, D) float16: one safetensors file, written clip by clip (a data set need not fit into memory)."""
    header, at = {"__metadata__": metadata}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            f.write(np.ascontiguousarray(read(name), dtype=np.float16).tobytes())


class Store:
    """The features of one split, memory-mapped: name -> (T, D) float16."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = safe_open(path, "pt")
        except Exception as e:
            raise BadInput(f"{path}: cannot be read as a feature store, data.py makes it ({e})") from None
        self.names = set(self.file.keys())
        self.metadata = self.file.metadata() or {}

    def __getitem__(self, name):
        return self.file.get_tensor(name)


def barrier():
    if dist.is_initialized():
        dist.barrier()


def write_common(folder, backbone, splits, shapes, read, metadata):
    """
    A data set's common form: {split: [row]} -> folder/{split}.jsonl and folder/BACKBONE/{split}.safetensors.
    shapes: name of a clip -> (T, D); read: name -> (T, D) float16; metadata: names of a split -> {text: text} that its store carries.
    """
    os.makedirs(os.path.join(folder, backbone), exist_ok=True)
    for split in SPLITS:
        path = os.path.join(folder, split + ".jsonl")
        if not splits[split]:
            if os.path.exists(path):
                os.remove(path)  # of an earlier division: its clips may stand in another split now
            continue
        names = [row["name"] for row in splits[split]]
        write_store(os.path.join(folder, backbone, split + ".safetensors"), {n: shapes[n] for n in names}, read, metadata(names))
        with whole(path) as f:
            for row in splits[split]:
                f.write(json.dumps(row | {"frames": shapes[row["name"]][0]}, ensure_ascii=False) + "\n")
    print0(f"{folder}: " + ", ".join(f"{len(splits[s])} {s}" for s in SPLITS) + f" clips, features ({backbone}) of width {next(iter(shapes.values()))[1]}")


def prepare(name, splits, data_dir, extractor, strict=True):
    """
    Write a data set's common form: {split: [row]} -> data_dir/name/{split}.jsonl and data_dir/name/BACKBONE/{split}.safetensors.
    Each clip that is done becomes a small store of its own in .parts, so that a kill loses none; the first process joins them at the end.
    strict=False: clips that cannot be decoded are left out and listed in data_dir/name/problems.txt.
    """
    folder = os.path.join(data_dir, name, extractor.settings["backbone"])
    parts, settings = os.path.join(folder, ".parts"), json.dumps(extractor.settings)
    os.makedirs(parts, exist_ok=True)
    rows = {row["name"]: row for split in SPLITS for row in splits[split]}
    prints = {n: fingerprint(row["video"]) for n, row in rows.items()}
    notes = lambda rates: {"made": settings, "fingerprints": json.dumps({n: prints[n] for n in rates}), "rates": json.dumps(rates)}

    def there():
        """What is done, of clips whose file is still the one that was extracted: name -> (function that reads its features, their shape, its frame rate)."""
        found = {}
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors")) + glob.glob(os.path.join(glob.escape(parts), "*.safetensors"))):
            try:
                store = Store(path)
            except BadInput as e:
                print0(f"{e}; it is made anew")
                continue
            if store.metadata.get("made") == settings:  # by the same CNN
                old, rates = json.loads(store.metadata["fingerprints"]), json.loads(store.metadata["rates"])
                # the parts are too many to stay open; a split's store must, since its file is about to be replaced
                read = store.__getitem__ if os.path.dirname(path) == folder else lambda n, path=path: Store(path)[n]
                found |= {n: (read, store.file.get_slice(n).get_shape(), rates[n]) for n in store.names if old[n] == prints.get(n)}
        return found

    done = there()
    todo = [n for n in rows if n not in done]
    if done:
        print0(f"features: {len(done)} of {len(rows)} clips are there already")
    barrier()  # everybody has seen what is there; from here on it grows
    own, n_frames, show = todo[rank()::world()], 0, Progress("features", len(todo))
    try:
        with contextlib.closing(extractor.stream([rows[n]["video"] for n in own], extractor.workers)) as stream:  # whatever happens, its processes end
            for k, (i, features, rate) in enumerate(stream, 1):
                n = own[i]
                if features is not None:
                    part = os.path.join(parts, hashlib.sha1(n.encode()).hexdigest() + ".safetensors")
                    write_store(part, {n: features.shape}, lambda n: features, notes({n: rate}))
                    n_frames += len(features)
                elif strict:
                    raise rate
                else:
                    print(f"clip {n} is left out: {rate}", file=sys.stderr, flush=True)
                    with open(os.path.join(data_dir, name, "problems.txt"), "a", encoding="utf-8") as f:
                        f.write(f"clip {n}: {rate}\n")
                show(min(k * world(), len(todo)), n_frames * world(), "frames")
    except RuntimeError as e:
        if "DataLoader worker (pid" not in str(e):
            raise
        raise BadInput(f"a process that decodes was killed, for its memory perhaps; what is done is kept, and workers={max(extractor.workers - 1, 0)} takes less") from None
    barrier()
    if rank() == 0:
        done = there()
        missing = [n for n in rows if n not in done]
        if not done or (strict and missing):
            raise BadInput(f"{folder}: has no features of clip {missing[0]} ({len(missing)} of {len(rows)} clips are missing)")
        splits = {s: [row for row in splits[s] if row["name"] in done] for s in SPLITS}
        known = extractor.settings | {"fps": extractor.settings["fps"] or common_rate([rate for *_, rate in done.values()])}
        write_common(os.path.join(data_dir, name), extractor.settings["backbone"], splits, {n: d[1] for n, d in done.items()}, lambda n: done[n][0](n).numpy(),
                     lambda names: {"settings": json.dumps(known)} | notes({n: done[n][2] for n in names}))
        shutil.rmtree(parts)
    barrier()


def common_rate(rates):
    """The frame rate that all clips share within 1 %, else 0; says so where they are known and differ."""
    if 0 < max(rates) <= 1.01 * min(rates):
        return round(statistics.median(rates), 3)
    if known := [r for r in rates if r]:
        unknown = f", {len(rates) - len(known)} of unknown rate" if len(known) < len(rates) else ""
        print0(f"clips have from {min(known):g} to {max(known):g} frames a second{unknown}: they are taken as filmed, fps=25 would resample them to one rate")
    return 0.0


def import_features(name, splits, data_dir, label, patterns, shapes, sigma=None):
    """
    Features that others have made -> the data set's common form, under a label, clip by clip: float16 of what the files hold, joined on the feature axis.
    splits, shapes: as check() gives them. sigma: stand-ins from neccam's alignments, and the store says so.
    """
    split_of, opened = {row["name"]: split for split in SPLITS for row in splits[split]}, {}

    def read(clip):
        split = split_of[clip]
        if split not in opened:  # one split's files at a time: a pickle must be read whole
            opened.clear()
            names = [row["name"] for row in splits[split]]
            opened[split] = {p.replace("{split}", split): open_features(p, split, names, True, sigma) for p in patterns}
        parts = [half(source[clip][1](), f"{path}: clip {clip}") for path, source in opened[split].items()]
        return np.concatenate(parts, 1)

    settings = {"backbone": label, "weights": "", "imported": True, "features": ",".join(patterns)}
    if sigma is not None:
        settings["standin"] = f"stand-in features made from HMM alignments with noise of sigma={sigma:g}, not from videos"
    write_common(os.path.join(data_dir, name), label, splits, shapes, read, lambda names: {"settings": json.dumps(settings)})
