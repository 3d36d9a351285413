"""
Features on the disk: the store in which they wait for training, a data set's common form, and others' files of them.
"""
import functools
import glob
import json
import math
import os
import re
import tokenize
import zipfile

import numpy as np
from safetensors import safe_open

from lib.files import NPY, fingerprint, kind_of, read_jsonl, whole
from lib.pickles import Array, numpy_of, outline, read_pickle
from lib.program import BadInput, print0
from lib.readers import SPLITS, VAL, entries, first, forms
from lib.scores import unspaced

# what numpy raises of a file that is no array, or no longer; AttributeError: an .npz
NO_ARRAY = ValueError, EOFError, AttributeError, zipfile.BadZipFile, tokenize.TokenError

# ---------------------------------------------------------------------------------------------------------------------
# Ours

class Store:
    """The features of one split, memory-mapped: name -> (T, D) float16."""

    def __init__(self, path):
        self.path = path
        try:
            self.file = safe_open(path, "pt")
        except Exception as e:
            said = kind_of(path) if os.path.isfile(path) else ""
            raise BadInput(f"{path}: cannot be read as safetensors, data.py writes them ({said or e})") from None
        self.metadata = self.file.metadata() or {}
        self.names = set(self.file.keys())

    @property
    def settings(self):
        """Of the extractor, or of what was imported."""
        return json.loads(self.metadata.get("settings", "{}"))

    def __getitem__(self, name):
        return self.file.get_tensor(name)

    def array(self, name):
        """The same for numpy, in others' files of any type."""
        return numpy_of(self[name])

    def shape(self, name):
        """(T, D), without reading them."""
        return tuple(self.file.get_slice(name).get_shape())


def write_store(path, shapes, read, metadata):
    """
    A feature store: one safetensors file, written clip by clip, since a data set need not fit into memory.
    shapes: name -> (T, D); read: name -> (T, D) float16; metadata: {text: text}. One that knows the fingerprints of
    its clips or files, and would come out as it lies there, is left alone: it may have 20 GB.
    """
    header = {"__metadata__": metadata}
    at = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    there = "fingerprints" in metadata and os.path.exists(path) and os.path.getsize(path) == len(head) + at
    if there and open(path, "rb").read(len(head)) == head:
        return
    with whole(path, "wb") as f:
        f.write(head)
        for name in shapes:
            f.write(np.asarray(read(name), np.float16).tobytes())


def write_common(folder, backbone, splits, shapes, read, metadata):
    """
    A data set's common form: {split: [row]} -> folder/{split}.jsonl and folder/BACKBONE/{split}.safetensors.
    shapes: name of a clip -> (T, D); read: name -> (T, D) float16.
    metadata: names of a split -> {text: text} that its store carries.
    """
    os.makedirs(f"{folder}/{backbone}", exist_ok=True)
    for split in SPLITS:
        path = f"{folder}/{split}.jsonl"
        if not splits[split]:
            if os.path.exists(path):
                os.remove(path)  # of an earlier division: its clips may stand in another split now
            continue
        store = f"{folder}/{backbone}/{split}.safetensors"
        names = [row["name"] for row in splits[split]]
        write_store(store, {n: shapes[n] for n in names}, read, metadata(names))
        rows = [row | {"frames": shapes[row["name"]][0]} for row in splits[split]]
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        if not os.path.exists(path) or open(path, encoding="utf-8", newline="").read() != lines:
            with whole(path) as f:
                f.write(lines)
    clips = ", ".join(f"{len(splits[s])} {s}" for s in SPLITS)
    print0(f"{folder}: {clips} clips, features ({backbone}) of width {next(iter(shapes.values()))[1]}")


def only_backbone(folder):
    """The label of a data set's features, where it has those of one backbone alone."""
    stores = glob.glob(glob.escape(folder) + "/**/train.safetensors", recursive=True)
    labels = sorted(os.path.relpath(os.path.dirname(store), folder) for store in stores)
    if len(labels) != 1:
        hint = f"{', '.join(labels)}: say which" if labels else "none: python data.py makes some, or say which"
        raise BadInput(f"{folder}: has features {hint}, backbone=...")
    return labels[0]


def row_of_clip(row):
    """A line of {split}.jsonl, as it must be."""
    if not all(isinstance(row[key], str) and row[key].strip() for key in ("name", "text")):
        raise ValueError("empty name or text")
    return row


def text_of(rows):
    """The sentences of these lines, one behind the other as their language is written: with a space, or without."""
    texts = [row["text"] for row in rows]
    letters = re.sub(r"[^\w\s]", "", "".join(texts))  # a short sentence and its punctuation alone would not tell
    return ("" if unspaced([letters]) else " ").join(texts)


def read_common(path, store):
    """A split's {split}.jsonl, whose features lie in a store -> (rows, {name: (T, D)}). Hands may have changed both."""
    shapes = {}

    def take(row):
        name = row_of_clip(row)["name"]
        if name in shapes:
            raise BadInput(f"clip {name}: stands there twice")
        if name not in store.names:
            raise BadInput(f"clip {name}: has no features in {store.path}; run data.py again")
        shapes[name] = shape = store.shape(name)
        width = next(iter(shapes.values()))[-1]
        if len(shape) != 2 or not shape[0] or shape[1] != width:
            raise BadInput(f"clip {name}: its features in {store.path} have the shape {shape}, not (frames, {width})")
        return row

    return read_jsonl(path, "a clip", take), shapes

# ---------------------------------------------------------------------------------------------------------------------
# Others': a source is a dict name -> (shape, or what is wrong with the clip's features; a function that reads them)

def of_split(path, split):
    """A pattern for one split, by each of the names that the split goes by."""
    return [path.replace("{split}", s) for s in dict.fromkeys([split, VAL.get(split, split)])]


def keys_of(name, split):
    """How a clip may be called: with and without "train/" in front, in these files and in the labels."""
    return [key for form in forms(name) for key in (form, f"{split}/{form}", form.removeprefix(split + "/"))]


def files_of(path, split, names):
    """name -> its file, of a pattern with {name} in it; whether it is there is another question."""
    return {n: first("", [p.replace("{name}", key) for p in of_split(path, split) for key in keys_of(n, split)])
            for n in names}


def sources(path, split, names):
    """name -> its file, of those that a pattern has for one split; {"": path} where one file holds all."""
    if any(map(os.path.isdir, of_split(path, split))):
        path += "/{name}.npy"
    if "{name}" in path:
        return {n: file for n, file in files_of(path, split, names).items() if os.path.exists(file)}
    path = first("", of_split(path, split))
    if not os.path.exists(path):
        raise BadInput(f"features: there is no file {path}")
    return {"": path}


def open_features(path, split, names, values=True, sigma=None):
    """
    The source of one pattern and split: .npy files (a folder, or a path with {name} in it), a .safetensors or a pickle.
    values=False: for the shapes alone. sigma: stand-ins from the alignments in neccam's base annotations.
    """
    files = sources(path, split, names)
    if files.keys() != {""}:
        return {n: open_array(file) for n, file in files.items()}
    path = files[""]
    if path.endswith(".safetensors"):
        store = Store(path)
        source = {key: (store.shape(key), functools.partial(store.array, key)) for key in store.names}
    elif sigma is not None:
        source = open_standins(path, split, sigma)
    else:
        source = open_pickle(path, values)
    return {n: source[key] for n in names for key in keys_of(n, split) if key in source}


def open_array(file):
    """What a source has of a clip, from its .npy file."""
    try:
        shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
    except (*NO_ARRAY, OSError):
        kind = kind_of(file)
        said = "cut off, damaged or not of numbers" if kind == NPY else f"it is {kind or 'no .npy of numbers'}"
        shape = f"{os.path.basename(file)} cannot be read as an array: {said}"
    return shape, functools.partial(np.load, file, allow_pickle=False)


def open_pickle(path, values):
    """The source of a pickle: a list of neccam's clips, or a dict name -> array."""
    content = read_pickle(path) if values else outline(path)
    if isinstance(content, list):
        content = {str(e.get("name")): e for e in content if isinstance(e, dict)}
    if not isinstance(content, dict):
        raise BadInput(f"{path}: is neither a list of clips nor a dict name -> array")
    arrays = {name: e.get("sign") if isinstance(e, dict) else e for name, e in content.items()}
    return {name: (a.shape, lambda a=a: a.data) for name, a in arrays.items() if isinstance(a, Array)}


def open_standins(path, split, sigma):
    """The source of stand-ins, from the alignments in neccam's base annotations."""
    source = {}
    for e in entries(path):
        found = e["alignments"] if isinstance(e.get("alignments"), dict) else {}
        streams = [str(found.get(stream, "")).split() for stream in ("pami0", "pami1", "pami2")]
        shape = (len(streams[0]), 1024)
        if not streams[0] or len({*map(len, streams)}) > 1 or not "".join(sum(streams, [])).isdecimal():
            shape = "has no alignments pami0, pami1 and pami2 of one length"
        source[e["name"]] = shape, functools.partial(standin, e["name"].removeprefix(split + "/"), streams, sigma)
    return source


@functools.lru_cache(None)
def state_vector(stream, state):
    """The random unit-variance vector of a state: (1024,), always the same."""
    return np.random.default_rng([stream, state]).standard_normal(1024, np.float32)


def standin(name, alignments, sigma):
    """
    Stand-in features (T, 1024) from an HMM's alignments, frame by frame, of sign states, mouth shapes and hand shapes
    (Koller et al. 2019): what a CNN that was trained on these states might see, and noise.
    They hold the real order and length of real signs, and nothing of the video.
    """
    x = sum(weight * np.stack([state_vector(stream, int(s)) for s in states])
            for stream, (weight, states) in enumerate(zip((1.0, 0.5, 0.5), alignments)))
    noise = np.random.default_rng([3, *name.encode()]).standard_normal(x.shape, np.float32)
    return x + np.float32(sigma) * noise


def half(x, what):
    """An array of numbers -> float16 (T, D). What float16 cannot hold is an error, not infinity."""
    if x.dtype.kind not in "fiu":
        raise BadInput(f"{what}: features of dtype {x.dtype}")
    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
    if not np.isfinite(h).all():
        raise BadInput(f"{what}: features that are not finite, or as large as {np.abs(x).max():.3g}: "
                       "float16 holds 65504 at most")
    return h


def import_features(name, splits, data_dir, label, patterns, shapes, sigma=None):
    """
    Features that others have made -> the data set's common form, under a label, clip by clip.
    They are float16 of what the files hold, joined on the feature axis. splits, shapes: as check() gives them.
    sigma: stand-ins from neccam's alignments, and the store says so.
    """
    split_of = {row["name"]: split for split in SPLITS for row in splits[split]}
    names_of = {split: [row["name"] for row in splits[split]] for split in SPLITS}
    opened = {}  # split -> {path: source}

    def read(clip):
        split = split_of[clip]
        if split not in opened:  # one split's files at a time: a pickle must be read whole
            opened.clear()
            opened[split] = {p: open_features(p, split, names_of[split], True, sigma) for p in patterns}
        return np.concatenate([half(source[clip][1](), f"{path.replace('{split}', split)}: clip {clip}")
                               for path, source in opened[split].items()], 1)

    settings = {"backbone": label, "weights": "", "imported": True, "features": ",".join(patterns)}
    if sigma is not None:
        settings["standin"] = (f"stand-in features made from HMM alignments with noise of sigma={sigma:g}, "
                               "not from videos")

    def metadata(names):
        split = split_of[names[0]]
        prints = [sorted(map(fingerprint, sources(p, split, names).values())) for p in patterns]
        return {"settings": json.dumps(settings), "fingerprints": json.dumps(prints)}

    write_common(f"{data_dir}/{name}", label, splits, shapes, read, metadata)
