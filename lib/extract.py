"""
Frames through a frozen CNN into the store: `python data.py` drives it.
A run that was killed goes on where it stopped, and clips that have not changed are not extracted again.
"""
import contextlib
import glob
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import sys
import threading
import time

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from lib.cnn import CNNS, open_timm
from lib.features import Store, write_common, write_store
from lib.files import fingerprint
from lib.poses import Poses, is_pose
from lib.program import BadInput, Progress, barrier, pick_device, pick_dtype, print0, rank, world
from lib.readers import SPLITS
from lib.video import VIDEOS, frames, rate_of

# frames that go through the CNN at once: always as many, so that a feature does not depend on the clips around it
# (see Extractor.stream)
BATCH = 32

# ---------------------------------------------------------------------------------------------------------------------
# Clips -> features

class Decoder(IterableDataset):
    """
    The frames of many clips, a share of them in each process that decodes.
    Yields (number of the clip, some of its frames (n, crop, crop, 3), None).
    At a clip's end come no frames, and the third is its own frame rate, or the BadInput of a broken clip.
    """

    def __init__(self, paths, size, crop, **how):
        self.paths = paths
        self.size = size
        self.crop = crop
        self.how = how

    def __iter__(self):
        me = get_worker_info()
        low = (self.size - self.crop) // 2
        middle = slice(low, low + self.crop)
        for i in range(me.id if me else 0, len(self.paths), me.num_workers if me else 1):
            path = self.paths[i]
            try:
                clip = (frame[middle, middle] for frame in frames(path, self.size, **self.how))
                while some := list(itertools.islice(clip, BATCH // 2)):
                    yield i, np.stack(some), None  # a clip is never held as a whole, however long it is
                yield i, [], rate_of(path, self.how["rate"])
            except BadInput as e:
                yield i, [], e


def end_with_parent(number):
    """A process that decodes ends with the one it decodes for, however that ended: torch's would wait for a reader."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def choose_backbone(paths, weights=""):
    """
    The best backbone that can work on these clips, here, where nobody says which -> (backbone, its weights).
    It says which and why. Never the random one: that is for who asks for it.
    """
    if weights:
        raise BadInput(f"weights={weights}: of which backbone? Say backbone=googlenet or backbone=timm/NAME")
    places = [".", "weights", os.path.join(torch.hub.get_dir(), "checkpoints")]
    found = [f for place in places for f in sorted(glob.glob(glob.escape(place) + "/googlenet*"))]
    googlenet = [f for f in found if f.endswith((".pth", ".safetensors"))]
    home = os.environ.get("HF_HOME") or os.path.expanduser("~/.cache/huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    cached = glob.glob(glob.escape(cache) + "/models--timm--*/snapshots/*/model.safetensors")
    if all(map(is_pose, paths)):
        backbone, why = "poses", "the clips are poses"
    elif googlenet:
        backbone, weights, why = "googlenet", googlenet[0], f"its weights are there, {googlenet[0]}"
    elif cached and importlib.util.find_spec("timm"):
        newest = max(cached, key=os.path.getmtime)
        backbone = "timm/" + newest[len(cache) + 1:].split(os.sep)[0].removeprefix("models--timm--")
        why = f"timm's newest weights in {cache}"
    else:
        raise BadInput("backbone: none can be had here. The clips are no poses (docs/poses.md makes them), no "
                       f"googlenet*.pth lies in {', '.join(places)}, and timm has no weights in {cache}; "
                       "backbone=toycnn is random, for trials")
    print0(f"backbone={backbone}: {why}; backbone=... says another")
    return backbone, weights


class Extractor:
    """
    A frozen CNN with the preparation of its frames: squeezed to a square, centre-cropped, normalised.
    Called with a path -> float16 (T, D).
    """

    endings = VIDEOS

    def __init__(self, backbone, weights="", device="auto", fps=0.0, rate=0.0, workers=0):
        """
        fps: clips are resampled to it, 0 = as filmed. rate: of folders of frames, where it is known.
        workers: processes that decode for prepare.
        """
        self.settings = {"backbone": backbone, "weights": weights, "fps": fps}
        if os.path.exists(weights):
            self.settings["weights_file"] = fingerprint(weights)  # features of other weights are other features
        if backbone in CNNS:
            make, size, self.crop = CNNS[backbone]
            self.cnn = make(weights)
            self.features = self.cnn.features
            interpolation = "BILINEAR"
            mean = std = (0.5,) * 3
        elif backbone.startswith("timm/"):
            self.cnn, size, self.crop, interpolation, mean, std = open_timm(backbone, weights)
            self.features = self.cnn
        else:
            raise BadInput(f"backbone={backbone}: is none of {', '.join(CNNS)}, timm/NAME, poses")
        self.how = dict(size=size, crop=self.crop, interpolation=interpolation, fps=fps, rate=rate)
        self.rate, self.workers = rate, workers
        self.device = pick_device(device)[0]
        self.cnn.requires_grad_(False).eval().to(self.device, memory_format=torch.channels_last)
        self.mean, self.std = (255 * torch.tensor(v, device=self.device).view(3, 1, 1) for v in (mean, std))
        self.bf16 = pick_dtype("auto", self.device)[0] == torch.bfloat16

    def describe(self):
        parameters = sum(p.numel() for p in self.cnn.parameters())
        return f"backbone {self.settings['backbone']}: {parameters / 1e6:.1f}M frozen parameters on {self.device}"

    def rate_of(self, path):
        """Frames a second of a clip that is to be translated; a folder has the rate of the others."""
        return rate_of(path, self.rate or self.settings["fps"])

    @torch.inference_mode()
    def compute(self, batch):
        """Frames uint8 (BATCH, crop, crop, 3) -> features float16 (BATCH, D)."""
        x = torch.from_numpy(batch).to(self.device).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W), channels last
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.features((x.float() - self.mean) / self.std).half().cpu().numpy()

    def stream(self, paths, workers=0):
        """
        The features of many clips, as they are done: yields (number of the clip, float16 (T, D), its own frame rate),
        or (number, anything, the BadInput) for a broken one.
        NOTE a batch holds frames of several clips, and its size never changes. Kernels are chosen by shape and round
        differently, but a frame gives bitwise the same feature at any place of a batch, whatever is around it. So
        neither kills nor workers leave a trace in the store.
        """
        batch = np.zeros((BATCH, self.crop, self.crop, 3), np.uint8)
        n = 0  # frames in the batch
        queue = []  # (clip, None) for each of them, and (clip, how it ended) behind a clip's last
        rows = {i: [] for i in range(len(paths))}  # clip -> its features so far

        def flush():
            features = iter(self.compute(batch))  # what the last batch is filled up with has no owner
            for i, end in queue:
                if end is None:
                    rows[i].append(next(features))
                    continue
                x = np.array(rows.pop(i))
                if not np.isfinite(x).all():
                    end = BadInput(f"{paths[i]}: backbone {self.settings['backbone']} gives features "
                                   "that are not finite")
                yield i, x, end
            queue.clear()

        # collate_fn: arrays stay arrays and come through a pipe; tensors would go through /dev/shm, small in containers
        for i, some, end in DataLoader(Decoder(paths, **self.how), batch_size=None, collate_fn=tuple,
                                       num_workers=min(workers, len(paths)), worker_init_fn=end_with_parent):
            for frame in some:
                if n == BATCH:
                    yield from flush()
                    n = 0
                batch[n] = frame
                n += 1
                queue.append((i, None))
            if end is not None:
                queue.append((i, end))
        if queue:
            yield from flush()

    def __call__(self, path):
        """The features of a clip: float16 (T, D)."""
        ((_, features, end),) = self.stream([path])
        if isinstance(end, BadInput):
            raise end
        return features


def open_extractor(made, weights="", device="auto"):
    """What has made a run's features, from the settings in their store. weights: of the CNN, another file."""
    fps, rate = made.get("fps", 0.0), made.get("rate", 0.0)
    if made["backbone"] != "poses":
        return Extractor(made["backbone"], weights or made["weights"], device, fps, rate)
    poses = Poses(made["components"], fps, rate)
    if made["dimensions"] != poses.settings["dimensions"]:
        raise BadInput(f"poses: were learnt from as {made['dimensions']}, now they are {poses.settings['dimensions']}")
    return poses

# ---------------------------------------------------------------------------------------------------------------------
# A data set

def prepare(name, splits, data_dir, extractor, strict=True):
    """
    Write a data set's common form: {split: [row]} -> data_dir/name/{split}.jsonl and .../BACKBONE/{split}.safetensors.
    Each clip that is done becomes a small store of its own in .parts, so that a kill loses none.
    The first process joins them at the end.
    strict=False: clips that cannot be decoded are left out and listed in data_dir/name/problems.txt.
    """
    settings = extractor.settings
    home = f"{data_dir}/{name}"
    folder = f"{home}/{settings['backbone']}"
    parts = f"{folder}/.parts"
    os.makedirs(parts, exist_ok=True)
    made = json.dumps(settings)
    rows = {row["name"]: row for split in SPLITS for row in splits[split]}
    prints = {n: fingerprint(row["video"]) for n, row in rows.items()}

    def notes(rates):
        """What a store says of its clips, so that `there` can tell whether they are still the same."""
        return {"made": made, "fingerprints": json.dumps({n: prints[n] for n in rates}), "rates": json.dumps(rates)}

    def there():
        """What is done, of clips whose file is the one that was extracted: name -> (read(name), (T, D), frame rate)."""
        found = {}
        for place in (folder, parts):
            for path in sorted(glob.glob(glob.escape(place) + "/*.safetensors")):
                try:
                    store = Store(path)
                except BadInput as e:
                    print0(f"{e}; it is made anew")
                    continue
                if store.metadata.get("made") != made:
                    continue  # by another CNN
                old = json.loads(store.metadata["fingerprints"])
                rates = json.loads(store.metadata["rates"])
                # the parts are too many to stay open; a split's store must, since its file is about to be replaced
                read = store.__getitem__ if place == folder else lambda n, path=path: Store(path)[n]
                found |= {n: (read, store.shape(n), rates[n]) for n in store.names if old[n] == prints.get(n)}
        return found

    # each process extracts its share of what is missing
    done = there()
    todo = [n for n in rows if n not in done]
    if done:
        print0(f"features: {len(done)} of {len(rows)} clips are there already")
    barrier()  # everybody has seen what is there; from here on it grows
    own = todo[rank()::world()]
    n_frames = 0
    show = Progress("features", len(todo))
    try:
        stream = extractor.stream([rows[n]["video"] for n in own], extractor.workers)
        with contextlib.closing(stream):  # whatever happens, its processes end
            for k, (i, features, rate) in enumerate(stream, 1):
                n = own[i]
                if not isinstance(rate, BadInput):
                    part = f"{parts}/{hashlib.sha1(n.encode()).hexdigest()}.safetensors"
                    write_store(part, {n: features.shape}, lambda n: features, notes({n: rate}))
                    n_frames += len(features)
                elif strict:
                    raise rate
                else:
                    print(f"clip {n} is left out: {rate}", file=sys.stderr, flush=True)
                    with open(f"{home}/problems.txt", "a", encoding="utf-8") as f:
                        f.write(f"clip {n}: {rate}\n")
                show(min(k * world(), len(todo)), n_frames * world(), "frames")
    except RuntimeError as e:
        if "DataLoader worker (pid" not in str(e):
            raise
        raise BadInput("a process that decodes was killed, for its memory perhaps; what is done is kept, "
                       f"and workers={max(extractor.workers - 1, 0)} takes less") from None
    barrier()

    # the first joins all of them
    if rank() == 0:
        done = there()
        missing = [n for n in rows if n not in done]
        if not done or (strict and missing):
            raise BadInput(f"{folder}: has no features of clip {missing[0]} "
                           f"({len(missing)} of {len(rows)} clips are missing)")
        splits = {s: [row for row in splits[s] if row["name"] in done] for s in SPLITS}
        shapes = {n: shape for n, (_, shape, _) in done.items()}
        rates = {n: rate for n, (*_, rate) in done.items()}
        fps = rate_of_store(settings["fps"], rates, rows)
        filmed = {"rate": extractor.rate} if extractor.rate else {}  # what open_extractor needs to know of folders
        said = {"settings": json.dumps(settings | {"fps": fps} | filmed)}
        write_common(home, settings["backbone"], splits, shapes, lambda n: done[n][0](n).numpy(),
                     lambda names: said | notes({n: rates[n] for n in names}))
        shutil.rmtree(parts)
    barrier()


def rate_of_store(fps, rates, rows):
    """
    The frame rate of a store's clips: the one that they were resampled to, else the one that they share, 0 without.
    Folders of unknown rate have no times that could be resampled: a line says so, and where all are such, fps= is none.
    """
    untimed = sum(not rate and os.path.isdir(rows[n]["video"]) for n, rate in rates.items())
    if fps and untimed:
        print0(f"fps={fps:g}: {untimed} of {len(rates)} clips are folders, which have no times: "
               "they are taken as they are")
    return fps if fps and untimed < len(rates) else common_rate(rates.values())


def common_rate(rates):
    """The frame rate that all clips share within 1 %, else 0; says so where they are known and differ."""
    if 0 < max(rates) <= 1.01 * min(rates):
        return round(statistics.median(rates), 3)
    if known := [r for r in rates if r]:
        unknown = f", {len(rates) - len(known)} of unknown rate" if len(known) < len(rates) else ""
        print0(f"clips have from {min(known):g} to {max(known):g} frames a second{unknown}: "
               "they are taken as filmed, fps=25 would resample them to one rate")
    return 0.0
