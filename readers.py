"""
Data sets as they were downloaded or filmed: a folder -> the rows of its clips, {split: [{"name", "text", "video", "signer", "gloss"}]}.
"""
import os
import zlib

from config import BadInput

SPLITS = ("train", "dev", "test")


def read_clips(root):
    """
    Own clips: root/clips.tsv with a header and the columns file, text and, if you like, split, signer, gloss. Returns {split: [row]}.
    Without a split column the clips are dealt out by `ratio`; fewer than 20 all go to train, since nothing can be measured on two.
    """
    path = os.path.join(root, "clips.tsv")
    try:
        lines = open(path, encoding="utf-8-sig").read().split("\n")  # splitlines would also split at U+2028
    except UnicodeDecodeError as e:
        raise BadInput(f"{path}: is not UTF-8 ({e.reason} at byte {e.start})") from None
    except OSError as e:
        raise BadInput(f"{path}: {e.strerror}; own clips need this table, with a header file<TAB>text") from None
    header = lines[0].split("\t") if lines else []
    for column in ("file", "text"):
        if column not in header:
            raise BadInput(f"{path}: its header has no column {column}")
    if len(set(header)) < len(header):
        raise BadInput(f"{path}: its header names a column twice")
    splits, files = {s: [] for s in SPLITS}, {}
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        cells = line.split("\t")
        if len(cells) != len(header):
            raise BadInput(f"{path}:{number}: {len(cells)} columns, the header has {len(header)}")
        row = dict(zip(header, (c.strip() for c in cells)))
        file = os.path.normpath(row["file"]) if row["file"] else ""
        video = os.path.join(root, file)
        name = file if os.path.isdir(video) else os.path.splitext(file)[0]
        if os.path.isabs(file) or file.split(os.sep)[0] == ".." or name == "__metadata__":  # a key of safetensors' own
            raise BadInput(f"{path}:{number}: clip {row['file']}: the name must be one inside the folder")
        if not row["file"] or not os.path.exists(video):
            raise BadInput(f"{path}:{number}: clip {video} does not exist")
        if not row["text"]:
            raise BadInput(f"{path}:{number}: clip {name} has an empty text")
        if name in files:
            raise BadInput(f"{path}:{number}: clip {name} stands there twice ({files[name]}, {row['file']})")
        files[name] = row["file"]
        split = row.get("split", "train") or "train"
        if split not in SPLITS:
            raise BadInput(f"{path}:{number}: clip {name}: split {split!r} is none of {', '.join(SPLITS)}")
        splits[split].append({"name": name, "text": row["text"], "video": video} | {k: row[k] for k in ("signer", "gloss") if row.get(k)})
    if not files:
        raise BadInput(f"{path}: lists no clips")
    return splits, "split" in header


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


READERS = {"clips": read_clips}  # form of a folder -> function of the folder: ({split: [row]}, whether the folder itself says the splits)
FPS = {"phoenix14t": 25.0, "csl_daily": 30.0}  # form of a folder whose clips are folders of frames -> the rate at which they were filmed
