"""
What is wrong with a data set, clip by clip, before anything is computed.
"""
import os
import re

from lib.features import open_features
from lib.files import whole
from lib.poses import pose_files
from lib.program import BadInput, print0, rank
from lib.readers import SPLITS
from lib.video import frame_files

# how the names begin -> clips of each split
PUBLISHED = {"[0-9]{2}[A-Z][a-z]+_[0-9]{4}_[A-Z]": (7096, 519, 642),
             "S[0-9]{6}_P[0-9]{4}_T[0-9]{2}$": (18401, 1077, 1176)}
# not for names: control characters, and half characters, which can stand in a pickle and not in UTF-8
ODD = "[\0-\x1f\x7f\ud800-\udfff]"


def look(row, video, seen):
    """
    How many frames a clip has, None where nobody says it; BadInput says what is wrong with its name, text or video.
    video: None where it does not matter; seen: name -> split and video of the clips before.
    """
    name = row["name"]
    # __metadata__ is a key of safetensors' own
    if name in ("", "__metadata__") or os.path.isabs(name) or ".." in name.split("/") or re.search(ODD, name):
        raise BadInput("the name must be one inside the folder")
    if name in seen:
        raise BadInput(f"stands there already, in {seen[name]}")
    if not row["text"].strip():
        raise BadInput("has an empty text")
    if re.search("[\ud800-\udfff]", row["text"]):
        raise BadInput("its text has half a character")
    if video is None:
        return row.get("frames")
    if not os.path.exists(video):
        raise BadInput(f"{video or 'its video'} does not exist")
    if os.path.isdir(video):
        if T := len(frame_files(video)) or len(pose_files(video)):
            return T
        raise BadInput(f"{video} has no frames")
    if not os.path.getsize(video):
        raise BadInput(f"{video} is an empty file")
    return row.get("frames")


def joined(name, sources, known, first):
    """
    (T, D) of a clip's features from {pattern: source}; BadInput says what is wrong with them.
    known: how many frames the clip has, None if nobody says it; first: (T, D) of the first clip, None before it.
    """
    frames = {}
    D = 0
    for path, source in sources.items():
        if name not in source:
            raise BadInput(f"has no features in {path}")
        shape, _ = source[name]
        if isinstance(shape, str):
            raise BadInput(f"{path}: {shape}")
        if len(shape) != 2 or 0 in shape:
            hint = "; features=states makes stand-ins from alignments" if shape == (0,) else ""
            raise BadInput(f"its features in {path} have the shape {shape}, not (frames, width){hint}")
        T, width = shape
        if T != known == width:
            raise BadInput(f"its features in {path} have the shape {shape}: "
                           f"it has {known} frames, (frames, width) is read")
        frames[path] = T
        D += width
    if len({*frames.values()}) > 1:
        raise BadInput("its features have " + " and ".join(f"{T} frames in {path}" for path, T in frames.items()))
    if first and D != first[1]:
        hint = ", of as many frames: are they (width, frames)?" if T == first[0] else ""
        raise BadInput(f"its features are {D} wide, those of the first clip {first[1]}{hint}")
    return T, D


def check(splits, patterns=(), sigma=None):
    """
    Look at every clip before anything is computed, opening none.
    patterns: where features to be imported lie; what becomes of the videos does not matter then.
    Returns ({split: rows in order}, [problem], [note], [line of the table], {name: (T, D) of its features}).
    """
    good = {s: [] for s in SPLITS}
    problems = []
    notes = []
    shapes = {}
    seen = {}  # name -> split and video
    train = {row["text"] for row in splits["train"]}
    table = ["split   clips  published  problems  text stands in train"]

    # as many as were published?
    name = next((row["name"] for s in SPLITS for row in splits[s]), "")
    published = next((counts for names, counts in PUBLISHED.items() if re.match(names, name)), None)
    counts = tuple(len(splits[s]) for s in SPLITS)
    if published and counts != published:
        hint = " (18400 is a known variant, without S000005_P0004_T00)" if counts[0] == 18400 else ""
        notes.append("clips: {}/{}/{}, published are {}/{}/{}{}".format(*counts, *published, hint))

    for split, known in zip(SPLITS, published or ("", "", "")):
        rows = splits[split]
        names = [row["name"] for row in rows]
        sources = {p.replace("{split}", split): open_features(p, split, names, False, sigma)
                   for p in patterns if names}
        for row in rows:
            name = row["name"]
            video = row.get("video", "")
            if sources and not os.path.exists(video):
                row = {k: v for k, v in row.items() if k != "video"}
                video = None
            try:
                T = look(row, video, seen)
                if sources:
                    T, _ = shapes[name] = joined(name, sources, T, next(iter(shapes.values()), None))
                good[split].append(row)
                if row.get("frames", T) != T:
                    notes.append(f"{split}: clip {name}: {T} frames, its labels say {row['frames']}")
            except BadInput as e:
                line = f"{split}: clip {name}: {e}"
                problems.append(ascii(line) if re.search(ODD, line) else line)
            seen.setdefault(name, f"{split} ({video})" if video else split)
        if not names:
            notes.append(f"{split}: no clips")
        repeated = sum(row["text"] in train for row in rows) if split != "train" else ""
        table.append(f"{split:5} {len(rows):7} {known:>10} {len(rows) - len(good[split]):9} {repeated:>21}".rstrip())
    return good, problems, notes, table, shapes


def report(problems, notes, table, folder, strict):
    """
    Print what `check` found, the first twenty of each kind; all problems go to folder/problems.txt.
    With problems and strict: the end.
    """
    path = f"{folder}/problems.txt"
    if rank() == 0:
        print("\n".join(table), flush=True)
        for kind, lines in (("note", notes), ("problem", problems)):
            more = [f"... and {len(lines) - 20} more"] if len(lines) > 20 else []
            print("".join(f"{kind}: {line}\n" for line in lines[:20] + more), end="", flush=True)
        if problems:
            os.makedirs(folder, exist_ok=True)
            with whole(path) as f:
                f.writelines(line + "\n" for line in problems)
        elif os.path.exists(path):
            os.remove(path)
    if problems and strict:
        raise BadInput(f"{len(problems)} clip(s) with problems, all listed in {path}; "
                       "strict=false goes on without them")
    if problems:
        print0(f"strict=false: goes on without {len(problems)} clip(s), listed in {path}")
