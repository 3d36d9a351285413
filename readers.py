"""
Data sets as they were downloaded or filmed: a folder -> the rows of its clips, the check of both, and features that others have made.

A reader is a function of the folder that gives ({split: [{"name", "text", "video", "signer", "gloss", "frames"}]}, whether the folder itself says the
splits); the last four keys only where the data set has them ("frames": how many its labels promise). Readers take what is written; `check` says what is wrong with it.
"""
import functools
import glob
import os
import re
import zlib

import numpy as np
from safetensors import safe_open

from config import BadInput, print0, rank, whole
from pickles import Array, numpy_of, outline, read_pickle

SPLITS = ("train", "dev", "test")
IMAGES = (".png", ".jpg", ".jpeg")
FPS = {"phoenix14t": 25.0, "csl_daily": 30.0}  # frames a second of the readers whose clips are folders of frames: those cannot say it themselves
PUBLISHED = {"[0-9]{2}[A-Z][a-z]+_[0-9]{4}_[A-Z]": (7096, 519, 642), "S[0-9]{6}_P[0-9]{4}_T[0-9]{2}$": (18401, 1077, 1176)}  # how the names begin -> clips of each split
ODD = "[\0-\x1f\x7f\ud800-\udfff]"  # not for names: control characters, and half characters, which can stand in a pickle and not in UTF-8
VAL = {"dev": "val"}  # how How2Sign and others call the dev split

# ---------------------------------------------------------------------------------------------------------------------
# Tables and folders

def read_table(path, sep, columns, quotes=False):
    """The rows {column: cell} of a table with a header, UTF-8. quotes: a cell in quotes stands for what is inside, as pandas writes it; else a quote is just a character."""
    raw = open(path, "rb").read()
    try:
        lines = [line.removesuffix("\r") for line in raw.decode("utf-8-sig").split("\n")]  # splitlines would also split at U+2028
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}:{raw[:e.start].count(10) + 1}: is not UTF-8 ({e.reason} at byte {e.start})") from None
    header, rows = lines[0].split(sep), []
    for column in columns:
        if column not in header:
            raise BadInput(f"{path}: its header has no column {column}")
    if len(set(header)) < len(header):
        raise BadInput(f"{path}: its header names a column twice")
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split(sep)
        if len(cells) != len(header):
            raise BadInput(f"{path}:{number}: {len(cells)} columns, the header has {len(header)}")
        if quotes:
            cells = [c[1:-1].replace('""', '"') if re.fullmatch('"(?:[^"]|"")*"', c) else c for c in cells]
        rows.append(dict(zip(header, cells)) | {"line": f"{path}:{number}"})
    if not rows:
        raise BadInput(f"{path}: lists no clips")
    return rows


def find(root, *files):
    """The folder that holds one of these files: root itself, or one up to three folders down."""
    for depth in range(4):
        homes = {hit.removesuffix("/" + f) for f in files for hit in glob.glob(os.path.join(glob.escape(root), *["*"] * depth, f))}
        if len(homes) > 1:
            raise BadInput(f"{root}: holds the data set more than once ({', '.join(sorted(homes))}): say which with root=")
        if homes:
            return homes.pop()
    raise BadInput(f"{root}: " + (f"holds no {files[0]}, not even three folders down" if os.path.isdir(root) else "there is no such folder"))


def first(*paths):
    """The first of these paths that exists, else the first of all: the one that the error will name."""
    return next((p for p in paths if os.path.exists(p)), paths[0])


def files_in(*folders):
    """file name -> path for what lies in these folders; the earlier ones go first."""
    return {f: os.path.join(folder, f) for folder in reversed(folders) if os.path.isdir(folder) for f in os.listdir(folder)}

# ---------------------------------------------------------------------------------------------------------------------
# Readers

def entries(path, content=None):
    """The clips of a pickle of labels, a list of dicts (neccam) or a dict of dicts (GFSLT), as dicts with a name and a text."""
    content = outline(path) if content is None else content
    if isinstance(content, dict):
        content = [{"name": name} | e if isinstance(e, dict) else e for name, e in content.items()]
    if not isinstance(content, list) or not content:
        raise BadInput(f"{path}: is not a list or a dict of clips")
    for number, e in enumerate(content, 1):
        for key in ("name", "text"):
            if not isinstance(e, dict) or not isinstance(e.get(key), str):
                raise BadInput(f"{path}: clip number {number} ({str(e.get('name') if isinstance(e, dict) else e)[:80]}) has no text `{key}`")
    return content


def optional(entry):
    """A row's keys beside name and text, from an entry of a pickle."""
    gloss = entry.get("gloss")
    row = {"signer": entry.get("signer"), "gloss": " ".join(map(str, gloss)) if isinstance(gloss, list) else gloss, "frames": entry.get("num_frames", entry.get("length"))}
    return {k: v for k, v in row.items() if v not in (None, "") and isinstance(v, int if k == "frames" else (str, int))}

def read_clips(root):
    """
    Own clips: root/clips.tsv with a header and the columns file, text and, if you like, split, signer, gloss.
    A clip's name is its file without the ending. Without a split column data.py deals the clips out.
    """
    path = os.path.join(root, "clips.tsv")
    if not os.path.exists(path):
        raise BadInput(f"{path}: No such file or directory; own clips need this table, with a header file<TAB>text")
    splits = {s: [] for s in SPLITS}
    table = read_table(path, "\t", ("file", "text"))
    for cells in table:
        row = {k: c.strip() for k, c in cells.items()}
        if not row["file"]:
            raise BadInput(f"{row['line']}: names no file")
        file = os.path.normpath(row["file"])
        video = os.path.join(root, file)
        split = row.get("split", "train") or "train"
        if split not in SPLITS:
            raise BadInput(f"{row['line']}: clip {file}: split {split!r} is none of {', '.join(SPLITS)}")
        name = file if os.path.isdir(video) else os.path.splitext(file)[0]
        splits[split].append({"name": name, "text": row["text"], "video": video} | {k: row[k] for k in ("signer", "gloss") if row.get(k)})
    return splits, "split" in table[0]


def read_phoenix14t(root):
    """
    RWTH-PHOENIX-Weather 2014T (Camgoz et al. 2018), release v3: root is PHOENIX-2014-T, its parent PHOENIX-2014-T-release-v3, or a folder around that.
    The column video says NAME/1/*.png; there is no such folder 1 on the disk.
    """
    csv = "annotations/manual/PHOENIX-2014-T.{}.corpus.csv"
    home, splits = find(root, *[csv.format(s) for s in SPLITS]), {s: [] for s in SPLITS}
    for split in SPLITS:
        path = os.path.join(home, csv.format(split))
        for row in read_table(path, "|", ("name", "speaker", "orth", "translation")) if os.path.exists(path) else ():
            video = os.path.join(home, "features", "fullFrame-210x260px", split, row["name"])
            splits[split].append({"name": row["name"], "text": row["translation"], "video": video, "signer": row["speaker"], "gloss": row["orth"]})
    return splits, True


def read_csl_daily(root):
    """
    CSL-Daily (Zhou et al. 2021): sentence_label/csl2020ct_v2.pkl and split_1.txt; frames in sentence/frames_512x512/NAME, or what other copies call it.
    The text is label_char, joined: every character as it stands there, full-width punctuation too.
    """
    labels = "sentence_label/csl2020ct_v2.pkl"
    home, splits = find(root, labels), {s: [] for s in SPLITS}
    path = os.path.join(home, labels)
    content = outline(path)
    info = content.get("info") if isinstance(content, dict) else None
    if not isinstance(info, list) or not all(isinstance(e, dict) and isinstance(e.get("label_char"), list) for e in info):
        raise BadInput(f"{path}: has no list 'info' of clips with a label_char")
    info = {e["name"]: e for e in entries(path, [e | {"text": "".join(map(str, e["label_char"])), "gloss": e.get("label_gloss")} for e in info])}
    frames = first(*[os.path.join(home, folder, *inner) for folder in ("sentence", "sentences", "sentence_frames-512x512") for inner in (("frames_512x512",), ())])
    lost, table = [], read_table(os.path.join(home, "sentence_label/split_1.txt"), "|", ("name", "split"))
    for row in table:
        name, split = row["name"].strip(), row["split"].strip()
        if split not in SPLITS:
            raise BadInput(f"{row['line']}: clip {name}: split {split!r} is none of {', '.join(SPLITS)}")
        if name not in info:
            lost.append(name)
            continue
        splits[split].append({"name": name, "text": info[name]["text"], "video": os.path.join(frames, name)} | optional(info[name]))
    if lost:  # the official release has one such, S000005_P0004_T00: hence the 18400 training clips of some papers
        print0(f"{path}: has no text for {len(lost)} clip(s) of split_1.txt, left out: {', '.join(lost[:20])}")
    return splits, True


def read_how2sign(root):
    """
    How2Sign (Duarte et al. 2021): how2sign_realigned_{train,val,test}.csv, tab-separated, and the sentence clips SENTENCE_NAME.mp4, cut with the realigned times;
    in root, in root/{split}..., or where the official script puts them (sentence_level/{split}/...).
    """
    splits = {}
    for split in SPLITS:
        s = VAL.get(split, split)
        at = [os.path.join(root, folder) for folder in ("", s, f"{s}_rgb_front_clips", f"sentence_level/{s}/text/en/raw_text/re_aligned", f"sentence_level/{s}/text/en/raw_text")]
        path = first(*[os.path.join(folder, f"how2sign_realigned_{s}.csv") for folder in at])
        clips = files_in(*[os.path.join(root, folder) for folder in (f"sentence_level/{s}/rgb_front/raw_videos", f"{s}_rgb_front_clips/raw_videos", f"{s}_raw_videos",
                                                                     f"{s}/raw_videos", s, "raw_videos", "")])
        splits[split] = [{"name": row["SENTENCE_NAME"], "text": row["SENTENCE"], "video": clips.get(row["SENTENCE_NAME"] + ".mp4",
                          os.path.join(root, row["SENTENCE_NAME"] + ".mp4"))}
                         for row in (read_table(path, "\t", ("SENTENCE_NAME", "SENTENCE"), quotes=True) if os.path.exists(path) else ())]
    if not any(splits.values()):
        raise BadInput(f"{root}: holds no how2sign_realigned_train.csv, neither there nor in train or sentence_level/train/text/en/raw_text/re_aligned")
    return splits, True


def read_openasl(root):
    """
    OpenASL (Shi et al. 2022): openasl-v1.0.tsv in root or root/data, whose columns are vid, yid (YouTube's id), start, end, raw-text, tokenized-text, one for glosses, and split
    (train, valid, test). Clips are VID.mp4 in root, root/clips, root/videos or root/{split}; its crop_video.py writes '%' for the ':' in a vid.
    """
    home, splits = find(root, "openasl-v1.0.tsv"), {s: [] for s in SPLITS}
    clips = files_in(*[os.path.join(root, folder) for folder in ("", "clips", "videos", "train", "valid", "test")])
    for row in read_table(os.path.join(home, "openasl-v1.0.tsv"), "\t", ("vid", "raw-text", "split"), quotes=True):
        split, file = {"valid": "dev", "val": "dev"}.get(row["split"], row["split"]), row["vid"] + ".mp4"
        if split not in SPLITS:
            raise BadInput(f"{row['line']}: clip {row['vid']}: split {row['split']!r} is none of train, valid, test")
        video = clips.get(file) or clips.get(file.replace(":", "%")) or os.path.join(root, file)
        splits[split].append({"name": row["vid"], "text": row["raw-text"], "video": video})
    return splits, True


def label_pattern(root, *stems):
    """The path of pickled labels with {split} in it: root itself where it is one, else the first of root/STEM.{split} of which there is any split."""
    patterns = [root] if "{split}" in root else [os.path.join(root, stem + ".{split}") for stem in stems]
    for pattern in patterns:
        if any(os.path.isfile(pattern.replace("{split}", s)) for s in SPLITS):
            return pattern
    raise BadInput(f"{patterns[0].replace('{split}', 'train')}: there is no such file; root= is the folder of these files, or their path with {{split}} in it")


def label_entries(pattern):
    """(split, entry) for every clip in the files of a pattern."""
    for split in SPLITS:
        if os.path.isfile(path := pattern.replace("{split}", split)):
            for e in entries(path):
                yield split, e | {"name": e["name"].removeprefix(split + "/")}


def read_gfslt(root):
    """
    GFSLT-VLP's labels.{train,dev,test} (Zhou et al. 2023) and their kin for CSL-Daily (sltbaselines, Uni-Sign): gzip pickles of a dict
    name -> {name, text, gloss, imgs_path or video_path}.
    Texts as they are. Clips are looked for in root itself and in the folders that PHOENIX-2014T and CSL-Daily have for them.
    """
    folder = os.path.dirname(root) if "{split}" in root else root
    inside = ("", "fullFrame-210x260px", "features/fullFrame-210x260px", "PHOENIX-2014-T/features/fullFrame-210x260px",
              "PHOENIX-2014-T-release-v3/PHOENIX-2014-T/features/fullFrame-210x260px", "sentence-crop", "sentence/frames_512x512")
    splits = {s: [] for s in SPLITS}
    for split, e in label_entries(label_pattern(root, "labels", "csl_daily.labels")):
        images = e.get("imgs_path")
        clip = e.get("video_path") or (os.path.dirname(str(images[0])) if images and isinstance(images, list) else e["name"])
        found = first(*[os.path.join(folder, i, c) for i in inside for c in (str(clip), f"{split}/{clip}")])
        splits[split].append({"name": e["name"], "text": e["text"], "video": found} | optional(e))
    return splits, True


SLT = ("phoenix14t.pami0", "neccam.phoenix14t", "phoenix14t")  # what neccam's files are called


def read_slt(root):
    """
    neccam/slt's phoenix14t.pami0.{train,dev,test} (Camgoz et al. 2020): gzip pickles of a list of {name, signer, gloss, text, sign: (T, 1024)}; the " ." at the end of every text
    is not the data set's own and goes. Their features are imported, and there are no clips; the pami1, ... beside them are concatenated by features=A.{split},B.{split}.
    """
    splits = {s: [] for s in SPLITS}
    for split, e in label_entries(label_pattern(root, *SLT)):
        splits[split].append({"name": e["name"], "text": e["text"].removesuffix(" .")} | optional(e))
    return splits, True


READERS = {"phoenix14t": read_phoenix14t, "csl_daily": read_csl_daily, "how2sign": read_how2sign, "openasl": read_openasl, "clips": read_clips,
           "gfslt": read_gfslt, "slt": read_slt}


def deal_out(rows, ratio):
    """Share rows out to train, dev and test in an order that depends on their names alone."""
    try:
        shares = [float(s) for s in ratio.split(",")]
        if len(shares) != 3 or min(shares) < 0 or not 0.999 < sum(shares) < 1.001:
            raise ValueError
    except ValueError:
        raise BadInput(f"ratio={ratio}: is not three shares that sum to 1") from None
    rows = sorted(rows, key=lambda r: (zlib.crc32(r["name"].encode()), r["name"]))
    a, b = round(shares[0] * len(rows)), round((shares[0] + shares[1]) * len(rows))
    return {"train": rows[:a], "dev": rows[a:b], "test": rows[b:]}

# ---------------------------------------------------------------------------------------------------------------------
# Features that others have made. A source is {name: (shape, function of nothing that gives the (T, D) array)}.

def open_features(path, split, names, values=True, sigma=None):
    """
    The source of one pattern and split: a pickle, a .safetensors, or .npy files (a folder, or a path with {name} in it). Where a clip has no shape stands what is wrong.
    values=False: for the shapes alone. sigma: stand-ins from the alignments in neccam's base annotations.
    """
    path = first(*[path.replace("{split}", s) for s in (split, VAL.get(split, split))])
    if "{name}" in path or os.path.isdir(path):
        pattern, source = path if "{name}" in path else os.path.join(path, "{name}.npy"), {}
        for name in names:
            file = first(*[pattern.replace("{name}", n) for n in (name, f"{split}/{name}")])
            if os.path.exists(file):
                try:
                    shape = np.load(file, mmap_mode="r", allow_pickle=False).shape
                except (ValueError, EOFError, OSError, AttributeError) as e:  # AttributeError: an .npz
                    shape = f"{os.path.basename(file)} cannot be read as an array ({' '.join(str(e).split())})"
                source[name] = shape, functools.partial(np.load, file, allow_pickle=False)
        return source
    if not os.path.exists(path):
        raise BadInput(f"features: there is no file {path}")
    if path.endswith(".safetensors"):
        try:
            file = safe_open(path, "pt")
        except Exception as e:
            raise BadInput(f"{path}: cannot be read as safetensors ({e})") from None
        source = {key: (tuple(file.get_slice(key).get_shape()), lambda key=key: numpy_of(file.get_tensor(key))) for key in file.keys()}
    elif sigma is not None:
        source = {}
        for e in entries(path):
            lines = e["alignments"] if isinstance(e.get("alignments"), dict) else {}
            lines = [str(lines.get(stream, "")).split() for stream in ("pami0", "pami1", "pami2")]
            fit = lines[0] and len({len(a) for a in lines}) == 1 and all(n.isdecimal() for a in lines for n in a)
            shape = (len(lines[0]), 1024) if fit else "has no alignments pami0, pami1 and pami2 of one length"
            source[e["name"]] = shape, functools.partial(standin, e["name"].removeprefix(split + "/"), lines, sigma)
    else:
        content = read_pickle(path) if values else outline(path)
        if isinstance(content, list):
            content = {e["name"]: e for e in content if isinstance(e, dict) and isinstance(e.get("name"), str)}
        if not isinstance(content, dict):
            raise BadInput(f"{path}: is neither a list of clips nor a dict name -> array")
        arrays = {name: e.get("sign") if isinstance(e, dict) else e for name, e in content.items()}
        source = {name: (a.shape, lambda a=a: a.data) for name, a in arrays.items() if isinstance(a, Array)}
    # with and without "train/" in front, in these files and in the labels
    return {n: source[key] for n in names for key in (n, f"{split}/{n}", n.removeprefix(split + "/")) if key in source}


@functools.lru_cache(None)
def state_vector(stream, state):
    """The random unit-variance vector of a state: (1024,), always the same."""
    return np.random.default_rng([stream, state]).standard_normal(1024, np.float32)


def standin(name, alignments, sigma):
    """
    Stand-in features (T, 1024) from an HMM's frame-by-frame alignments of sign states, mouth shapes and hand shapes (Koller et al. 2019): what a CNN
    that was trained on these states might see, and noise. They hold the real order and length of real signs, and nothing of the video.
    """
    x = sum(weight * np.stack([state_vector(stream, int(s)) for s in a]) for stream, (weight, a) in enumerate(zip((1.0, 0.5, 0.5), alignments)))
    return x + np.float32(sigma) * np.random.default_rng([3, *name.encode()]).standard_normal(x.shape, np.float32)


def half(x, what):
    """An array of numbers -> float16 (T, D). What float16 cannot hold is an error, not infinity."""
    if x.dtype.kind not in "fiu":
        raise BadInput(f"{what}: features of dtype {x.dtype}")
    with np.errstate(over="ignore"):
        h = x.astype(np.float16)
    if not np.isfinite(h).all():
        largest = np.abs(x[np.isfinite(x)].astype(np.float64)).max(initial=0)
        raise BadInput(f"{what}: features " + ("that are not finite" if not np.isfinite(x).all() else f"as large as {largest:.3g}, which float16 cannot hold (65504 at most)"))
    return h


# ---------------------------------------------------------------------------------------------------------------------
# The check

def clip_trouble(row, seen):
    """What is wrong with a clip's name, text and video, or None. seen: name -> split and video of the clips before it."""
    name, text, video = row["name"], row["text"], row.get("video")
    if name in ("", "__metadata__") or os.path.isabs(name) or ".." in name.split("/") or re.search(ODD, name):  # __metadata__ is a key of safetensors' own
        return "the name must be one inside the folder"
    if name in seen:
        return f"stands there already, in {seen[name]}"
    if not text.strip():
        return "has an empty text"
    if re.search("[\ud800-\udfff]", text):
        return "its text has half a character"
    if video is not None and not os.path.exists(video):
        return f"{video or 'its video'} does not exist"
    if video is not None and not (images(video) if os.path.isdir(video) else os.path.getsize(video)):
        return f"{video} " + ("has no frames" if os.path.isdir(video) else "is an empty file")


def images(folder):
    """How many frames lie in a folder."""
    return sum(f.name.lower().endswith(IMAGES) for f in os.scandir(folder))


def feature_trouble(name, sources, width):
    """What is wrong with a clip's features in {pattern: source}, or None."""
    found = {path: source[name][0] for path, source in sources.items() if name in source}
    if missing := [path for path in sources if path not in found]:
        return f"has no features in {missing[0]}"
    for path, shape in found.items():
        if isinstance(shape, str):
            return f"{path}: {shape}"
        if len(shape) != 2 or 0 in shape:
            return f"its features in {path} have the shape {shape}, not (frames, width)" + "; features=states makes stand-ins from alignments" * (shape == (0,))
    if len({T for T, _ in found.values()}) > 1:
        return "its features have " + " and ".join(f"{T} frames in {path}" for path, (T, _) in found.items())
    D = sum(D for _, D in found.values())
    if width and D != width:
        return f"its features are {D} wide, those of the first clip {width}"


def check(splits, patterns=(), sigma=None):
    """
    Look at every clip before anything is computed, opening none. patterns: where features to be imported lie; what becomes of the videos does not matter then.
    Returns ({split: rows in order}, [problem], [note], [line of the table], {name: (T, D) of its features}).
    """
    good, problems, notes, seen, shapes, width = {s: [] for s in SPLITS}, [], [], {}, {}, 0
    table, train = ["split   clips  published  problems  text stands in train"], {row["text"] for row in splits["train"]}
    name = next((row["name"] for s in SPLITS for row in splits[s]), "")
    published = next((counts for names, counts in PUBLISHED.items() if re.match(names, name)), ("", "", ""))
    counts = tuple(len(splits[s]) for s in SPLITS)
    if published[0] and counts != published:
        variant = " (18400 is a known variant, without S000005_P0004_T00)" if (counts[0], published[0]) == (18400, 18401) else ""
        notes.append("clips: {}/{}/{}".format(*counts) + ", published are {}/{}/{}".format(*published) + variant)
    for split, known in zip(SPLITS, published):
        names, before = [row["name"] for row in splits[split]], len(problems)
        sources = {p.replace("{split}", split): open_features(p, split, names, False, sigma) for p in patterns} if names else {}
        for row in splits[split]:
            name, row = row["name"], dict(row)
            if sources and not os.path.exists(row.get("video", "")):
                row.pop("video", None)
            elif not sources:
                row.setdefault("video", "")  # no video and no features either
            trouble = clip_trouble(row, seen) or (feature_trouble(name, sources, width) if sources else None)
            seen.setdefault(name, f"{split} ({row['video']})" if row.get("video") else split)
            if trouble:
                line = f"{split}: clip {name}: {trouble}"
                problems.append(ascii(line) if re.search(ODD, line) else line)
                continue
            good[split].append(row)
            if sources:
                found = [source[name][0] for source in sources.values()]
                shapes[name] = found[0][0], sum(D for _, D in found)
                width = shapes[name][1]
            T = shapes[name][0] if sources else images(row["video"]) if "frames" in row and os.path.isdir(row["video"]) else None
            if T and row.get("frames", T) != T:
                notes.append(f"{split}: clip {name}: {T} frames, its labels say {row['frames']}")
        if not names:
            notes.append(f"{split}: no clips")
        repeated = sum(row["text"] in train for row in splits[split]) if split != "train" else ""
        table.append(f"{split:5} {len(names):7} {known:>10} {len(problems) - before:9} {repeated:>21}".rstrip())
    return good, problems, notes, table, shapes


def report(problems, notes, table, folder, strict):
    """Print what `check` found, the first twenty of each kind; all problems go to folder/problems.txt. With problems and strict: the end."""
    path = os.path.join(folder, "problems.txt")
    if rank() == 0:
        print("\n".join(table), flush=True)
        for kind, lines in (("note", notes), ("problem", problems)):
            for line in lines[:20]:
                print(f"{kind}: {line}")
            if len(lines) > 20:
                print(f"{kind}: ... and {len(lines) - 20} more", flush=True)
        if problems:
            os.makedirs(folder, exist_ok=True)
            with whole(path) as f:
                f.writelines(line + "\n" for line in problems)
        elif os.path.exists(path):
            os.remove(path)
    if problems and strict:
        raise BadInput(f"{len(problems)} clip(s) with problems, all listed in {path}; strict=false goes on without them")
    if problems:
        print0(f"strict=false: goes on without {len(problems)} clip(s), listed in {path}")
