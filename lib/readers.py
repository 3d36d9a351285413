"""
Data sets as they were downloaded or filmed: a folder -> the rows of its clips.

A reader is a function of the folder that gives ({split: [row]}, whether the folder itself says the splits).
A row is {"name", "text", "video", "signer", "gloss", "frames"}; the last four keys only where the data set has them
("frames": how many its labels promise). Readers take what is written; check.py says what is wrong with it.
"""
import glob
import os
import re
import zlib

from lib.pickles import outline
from lib.program import BadInput, print0

SPLITS = ("train", "dev", "test")
VAL = {"dev": "val"}  # how How2Sign and others call the dev split
# frames a second of the readers whose clips are folders of frames: those cannot say it themselves
FPS = {"phoenix14t": 25.0, "csl_daily": 30.0}

# ---------------------------------------------------------------------------------------------------------------------
# Tables and folders

def read_table(path, sep, columns, quotes=False):
    """
    The rows {column: cell} of a table with a header, in UTF-8; "line" is a row's place in the file.
    quotes: a cell in quotes stands for what is inside, as pandas writes it; else a quote is just a character.
    """
    raw = open(path, "rb").read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}:{raw[:e.start].count(10) + 1}: is not UTF-8 "
                       f"({e.reason} at byte {e.start})") from None
    lines = [line.removesuffix("\r") for line in text.split("\n")]  # splitlines would also split at U+2028
    header = lines[0].split(sep)
    for column in columns:
        if column not in header:
            raise BadInput(f"{path}: its header has no column {column}")
    if len(set(header)) < len(header):
        raise BadInput(f"{path}: its header names a column twice")
    rows = []
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
        homes = {hit.removesuffix("/" + f) for f in files
                 for hit in glob.glob(os.path.join(glob.escape(root), *["*"] * depth, f))}
        if len(homes) > 1:
            raise BadInput(f"{root}: holds the data set more than once ({', '.join(sorted(homes))}): "
                           "say which with root=")
        if homes:
            return homes.pop()
    if not os.path.isdir(root):
        raise BadInput(f"{root}: there is no such folder")
    raise BadInput(f"{root}: holds no {files[0]}, not even three folders down")


def first(paths):
    """The first of these paths that exists, else the first of all: the one that the error will name."""
    return next((p for p in paths if os.path.exists(p)), paths[0])


def files_in(root, *folders):
    """file name -> path for what lies in these folders of root; the earlier ones go first."""
    paths = [os.path.join(root, folder) for folder in reversed(folders)]
    return {f: os.path.join(path, f) for path in paths if os.path.isdir(path) for f in os.listdir(path)}

# ---------------------------------------------------------------------------------------------------------------------
# Pickles of labels

def entries(path, content=None):
    """The clips of a pickle: a list of dicts (neccam) or a dict of dicts (GFSLT), as dicts with a name and a text."""
    if content is None:
        content = outline(path)
    if isinstance(content, dict):
        content = [{"name": name} | e if isinstance(e, dict) else e for name, e in content.items()]
    if not isinstance(content, list) or not content:
        raise BadInput(f"{path}: is not a list or a dict of clips")
    for number, e in enumerate(content, 1):
        for key in ("name", "text"):
            if not isinstance(e, dict) or not isinstance(e.get(key), str):
                name = e.get("name") if isinstance(e, dict) else e
                raise BadInput(f"{path}: clip number {number} ({str(name)[:80]}) has no text `{key}`")
    return content


def optional(entry):
    """A row's keys beside name, text and video, from an entry of a pickle."""
    gloss = entry.get("gloss")
    if isinstance(gloss, list):
        gloss = " ".join(map(str, gloss))
    texts = {"signer": entry.get("signer"), "gloss": gloss}
    row = {k: v for k, v in texts.items() if isinstance(v, (str, int)) and v != ""}
    frames = entry.get("num_frames", entry.get("length"))
    if isinstance(frames, int):
        row["frames"] = frames
    return row


def label_pattern(root, *stems):
    """
    The path of pickled labels with {split} in it.
    It is root itself where that is one, else the first root/STEM.{split} of which there is any split.
    """
    patterns = [root] if "{split}" in root else [os.path.join(root, stem + ".{split}") for stem in stems]
    for pattern in patterns:
        if any(os.path.isfile(pattern.replace("{split}", s)) for s in SPLITS):
            return pattern
    raise BadInput(f"{patterns[0].replace('{split}', 'train')}: there is no such file; "
                   "root= is the folder of these files, or their path with {split} in it")


def label_entries(pattern):
    """(split, entry) for every clip in the files of a pattern."""
    for split in SPLITS:
        path = pattern.replace("{split}", split)
        if os.path.isfile(path):
            for e in entries(path):
                yield split, e | {"name": e["name"].removeprefix(split + "/")}

# ---------------------------------------------------------------------------------------------------------------------
# Readers

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
        more = {k: row[k] for k in ("signer", "gloss") if row.get(k)}
        splits[split].append({"name": name, "text": row["text"], "video": video} | more)
    return splits, "split" in table[0]


def read_phoenix14t(root):
    """
    RWTH-PHOENIX-Weather 2014T (Camgoz et al. 2018), release v3.
    root is PHOENIX-2014-T, its parent PHOENIX-2014-T-release-v3, or a folder around that.
    The column video says NAME/1/*.png; there is no such folder 1 on the disk.
    """
    csv = "annotations/manual/PHOENIX-2014-T.{}.corpus.csv"
    home = find(root, *[csv.format(s) for s in SPLITS])
    splits = {s: [] for s in SPLITS}
    for split in SPLITS:
        path = os.path.join(home, csv.format(split))
        if not os.path.exists(path):
            continue
        for row in read_table(path, "|", ("name", "speaker", "orth", "translation")):
            video = os.path.join(home, "features/fullFrame-210x260px", split, row["name"])
            splits[split].append({"name": row["name"], "text": row["translation"], "video": video,
                                  "signer": row["speaker"], "gloss": row["orth"]})
    return splits, True


def read_csl_daily(root):
    """
    CSL-Daily (Zhou et al. 2021): sentence_label/csl2020ct_v2.pkl and split_1.txt.
    Frames lie in sentence/frames_512x512/NAME, or what other copies call it.
    The text is label_char, joined: every character as it stands there, full-width punctuation too.
    """
    labels = "sentence_label/csl2020ct_v2.pkl"
    home = find(root, labels)
    path = os.path.join(home, labels)
    content = outline(path)
    info = content.get("info") if isinstance(content, dict) else None
    if not isinstance(info, list) or not all(isinstance(e, dict) and isinstance(e.get("label_char"), list)
                                             for e in info):
        raise BadInput(f"{path}: has no list 'info' of clips with a label_char")
    info = [e | {"text": "".join(map(str, e["label_char"])), "gloss": e.get("label_gloss")} for e in info]
    info = {e["name"]: e for e in entries(path, info)}
    folders = ("sentence", "sentences", "sentence_frames-512x512")
    frames = first([os.path.join(home, f, inner) for f in folders for inner in ("frames_512x512", "")])
    splits = {s: [] for s in SPLITS}
    lost = []
    for row in read_table(os.path.join(home, "sentence_label/split_1.txt"), "|", ("name", "split")):
        name = row["name"].strip()
        split = row["split"].strip()
        if split not in SPLITS:
            raise BadInput(f"{row['line']}: clip {name}: split {split!r} is none of {', '.join(SPLITS)}")
        if name not in info:
            lost.append(name)
            continue
        known = {"name": name, "text": info[name]["text"], "video": os.path.join(frames, name)}
        splits[split].append(known | optional(info[name]))
    if lost:  # the official release has one such, S000005_P0004_T00: hence the 18400 training clips of some papers
        print0(f"{path}: has no text for {len(lost)} clip(s) of split_1.txt, left out: {', '.join(lost[:20])}")
    return splits, True


def read_how2sign(root):
    """
    How2Sign (Duarte et al. 2021): how2sign_realigned_{train,val,test}.csv, tab-separated.
    Beside them the sentence clips SENTENCE_NAME.mp4, cut with the realigned times.
    Both lie in root, in root/{split}..., or where the official script puts them (sentence_level/{split}/...).
    """
    splits = {s: [] for s in SPLITS}
    for split in SPLITS:
        s = VAL.get(split, split)
        texts = f"sentence_level/{s}/text/en/raw_text"
        homes = ("", s, f"{s}_rgb_front_clips", texts + "/re_aligned", texts)
        path = first([os.path.join(root, home, f"how2sign_realigned_{s}.csv") for home in homes])
        if not os.path.exists(path):
            continue
        clips = files_in(root, f"sentence_level/{s}/rgb_front/raw_videos", f"{s}_rgb_front_clips/raw_videos",
                         f"{s}_raw_videos", f"{s}/raw_videos", s, "raw_videos", "")
        for row in read_table(path, "\t", ("SENTENCE_NAME", "SENTENCE"), quotes=True):
            name = row["SENTENCE_NAME"]
            video = clips.get(name + ".mp4", os.path.join(root, name + ".mp4"))
            splits[split].append({"name": name, "text": row["SENTENCE"], "video": video})
    if not any(splits.values()):
        raise BadInput(f"{root}: holds no how2sign_realigned_train.csv, neither there nor in train "
                       "or sentence_level/train/text/en/raw_text/re_aligned")
    return splits, True


def read_openasl(root):
    """
    OpenASL (Shi et al. 2022): openasl-v1.0.tsv in root or root/data.
    Its columns are vid, yid (YouTube's id), start, end, raw-text, tokenized-text, one for glosses, and split
    (train, valid, test). Clips are VID.mp4 in root, root/clips, root/videos or root/{split}; its crop_video.py
    writes '%' for the ':' in a vid.
    """
    home = find(root, "openasl-v1.0.tsv")
    clips = files_in(root, "", "clips", "videos", "train", "valid", "test")
    splits = {s: [] for s in SPLITS}
    for row in read_table(os.path.join(home, "openasl-v1.0.tsv"), "\t", ("vid", "raw-text", "split"), quotes=True):
        name = row["vid"]
        split = {"valid": "dev", "val": "dev"}.get(row["split"], row["split"])
        if split not in SPLITS:
            raise BadInput(f"{row['line']}: clip {name}: split {row['split']!r} is none of train, valid, test")
        file = name + ".mp4"
        video = clips.get(file) or clips.get(file.replace(":", "%")) or os.path.join(root, file)
        splits[split].append({"name": name, "text": row["raw-text"], "video": video})
    return splits, True


def read_gfslt(root):
    """
    GFSLT-VLP's labels.{train,dev,test} (Zhou et al. 2023) and their kin for CSL-Daily (sltbaselines, Uni-Sign).
    They are gzip pickles of a dict name -> {name, text, gloss, imgs_path or video_path}; texts are taken as they are.
    Clips are looked for in root itself and in the folders that PHOENIX-2014T and CSL-Daily have for them.
    """
    folder = os.path.dirname(root) if "{split}" in root else root
    inside = ("", "fullFrame-210x260px", "features/fullFrame-210x260px",
              "PHOENIX-2014-T/features/fullFrame-210x260px",
              "PHOENIX-2014-T-release-v3/PHOENIX-2014-T/features/fullFrame-210x260px",
              "sentence-crop", "sentence/frames_512x512")
    splits = {s: [] for s in SPLITS}
    for split, e in label_entries(label_pattern(root, "labels", "csl_daily.labels")):
        clip = e.get("video_path")
        if not clip:
            images = e.get("imgs_path")
            clip = os.path.dirname(str(images[0])) if images and isinstance(images, list) else e["name"]
        found = first([os.path.join(folder, i, c) for i in inside for c in (str(clip), f"{split}/{clip}")])
        splits[split].append({"name": e["name"], "text": e["text"], "video": found} | optional(e))
    return splits, True


SLT = ("phoenix14t.pami0", "neccam.phoenix14t", "phoenix14t")  # what neccam's files are called


def read_slt(root):
    """
    neccam/slt's phoenix14t.pami0.{train,dev,test} (Camgoz et al. 2020).
    They are gzip pickles of a list of {name, signer, gloss, text, sign: (T, 1024)}.
    The " ." at the end of every text is not the data set's own and goes. There are no clips: the features are
    imported, and the pami1, ... beside them are concatenated by features=A.{split},B.{split}.
    """
    splits = {s: [] for s in SPLITS}
    for split, e in label_entries(label_pattern(root, *SLT)):
        splits[split].append({"name": e["name"], "text": e["text"].removesuffix(" .")} | optional(e))
    return splits, True


READERS = {"phoenix14t": read_phoenix14t, "csl_daily": read_csl_daily, "how2sign": read_how2sign,
           "openasl": read_openasl, "clips": read_clips, "gfslt": read_gfslt, "slt": read_slt}


def deal_out(rows, ratio):
    """Share rows out to train, dev and test in an order that depends on their names alone."""
    try:
        shares = [float(s) for s in ratio.split(",")]
        if len(shares) != 3 or min(shares) < 0 or not 0.999 < sum(shares) < 1.001:
            raise ValueError
    except ValueError:
        raise BadInput(f"ratio={ratio}: is not three shares that sum to 1") from None
    rows = sorted(rows, key=lambda r: (zlib.crc32(r["name"].encode()), r["name"]))
    a = round(shares[0] * len(rows))
    b = round((shares[0] + shares[1]) * len(rows))
    return {"train": rows[:a], "dev": rows[a:b], "test": rows[b:]}
