"""
Data sets as they were downloaded or filmed: a folder -> the rows of its clips.

A reader is a function of the folder that gives ({split: [row]}, whether the folder itself says the splits).
A row is {"name", "text", "video", "signer", "gloss", "frames"}; the last four keys only where the data set has them
("frames": how many its labels promise). Readers take what is written; check.py says what is wrong with it.
"""
import csv
import functools
import glob
import io
import os
import unicodedata
import zlib

from lib.files import kind_of, read_text
from lib.pickles import outline
from lib.program import BadInput, print0

SPLITS = ("train", "dev", "test")
VAL = {"dev": "val"}  # how How2Sign and others call the dev split
# frames a second of the readers whose clips are folders of frames: those cannot say it themselves
FPS = {"phoenix14t": 25.0, "csl_daily": 30.0}

# ---------------------------------------------------------------------------------------------------------------------
# Tables and folders

def read_table(path, *columns):
    """
    The rows {column: cell} of a table with a header, as pandas reads them; "line" is a row's place in the file.
    Tab, comma, semicolon or '|' part the cells, whichever the header has; beside '|' a quote is just a character.
    """
    lines = [*io.StringIO(read_text(path), newline=""), "\n"]  # the last shows whether the rows end outside of quotes
    sep = max("\t,;|", key=lines[0].count)
    table = csv.reader(lines, delimiter=sep, quoting=csv.QUOTE_NONE if sep == "|" else csv.QUOTE_MINIMAL)
    header = next(table)
    for column in columns:
        if header.count(column) != 1:
            raise BadInput(f"{path}: its header {'names twice' if column in header else 'has no'} column {column}"
                           + (kind_of(path) and f", it is {kind_of(path)}"))
    rows, cells, line = [], header, f"{path}:1"
    try:
        for cells in table:
            line = f"{path}:{table.line_num}"
            if "".join(cells).strip():
                rows.append(dict(zip(header, cells, strict=True)) | {"line": line})
    except csv.Error as e:
        raise BadInput(f"{path}:{table.line_num}: {e}") from None
    except ValueError:
        raise BadInput(f"{line}: {len(cells)} columns, the header has {len(header)}") from None
    if cells:
        raise BadInput(f"{line}: a cell that begins with a quote has no end")
    for row in rows:
        if any(part.count(sep) >= len(header) - 1 > 0 for cell in row.values() for part in cell.splitlines()[1:]):
            raise BadInput(f"{row['line']}: a cell holds a whole row behind a line break: a quote before it has no "
                           "end, or stands for itself and must be written twice, in quotes")
    if not rows:
        raise BadInput(f"{path}: lists no clips")
    return rows


def find(root, *files):
    """The folder that holds one of these files: root itself, or one up to three folders down."""
    for depth in range(4):
        homes = {hit.removesuffix(f).rstrip("/") for f in files
                 for hit in glob.glob(f"{glob.escape(root)}/{'*/' * depth}{f}")}
        if len(homes) > 1:
            raise BadInput(f"{root}: holds the data set more than once ({', '.join(sorted(homes))}): "
                           "say which with root=")
        if homes:
            return homes.pop()
    what = f"holds no {files[0]}, not even three folders down" if os.path.isdir(root) else "there is no such folder"
    raise BadInput(f"{root}: {what}")


def forms(name):
    """A name as it is, and as other systems write it: macOS takes an ü apart."""
    return dict.fromkeys([name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD"))])


def first(folder, names, otherwise=0):
    """The first of these names in a folder that exists, else this one of them: the one that the error will name."""
    paths = [os.path.join(folder, form) for name in names for form in forms(name)]
    return next(filter(os.path.exists, paths), paths[otherwise])

# ---------------------------------------------------------------------------------------------------------------------
# Pickles of labels

def entries(path):
    """The clips of a pickle: a list of dicts (neccam) or a dict of dicts (GFSLT), as dicts with a name and a text."""
    content = outline(path)
    if isinstance(content, dict):
        content = [{"name": name} | e if isinstance(e, dict) else e for name, e in content.items()]
    if not isinstance(content, list) or not content:
        raise BadInput(f"{path}: is not a list or a dict of clips")
    for number, e in enumerate(content, 1):
        for key in ("name", "text"):
            if not isinstance(e, dict) or not isinstance(e.get(key), str):
                raise BadInput(f"{path}: clip number {number} ({str(e)[:80]}) has no text `{key}`")
    return content


def optional(entry):
    """A row's keys beside name, text and video, from an entry of a pickle."""
    gloss = entry.get("gloss")
    row = {"signer": entry.get("signer"), "gloss": " ".join(map(str, gloss)) if isinstance(gloss, list) else gloss,
           "frames": entry.get("num_frames", entry.get("length"))}
    return {k: v for k, v in row.items() if isinstance(v, (str, int)) and v != ""}


def label_pattern(root, *stems):
    """
    The path of pickled labels with {split} in it.
    It is root itself where that is one, else the first root/STEM.{split} of which there is any split.
    """
    patterns = [root] if "{split}" in root else [f"{root}/{stem}." + "{split}" for stem in stems]
    for pattern in patterns:
        if any(os.path.isfile(pattern.replace("{split}", s)) for s in SPLITS):
            return pattern
    raise BadInput(f"{patterns[0].replace('{split}', 'train')}: there is no such file; "
                   "root= is the folder of these files, or their path with {split} in it")


def label_entries(root, *stems):
    """(split, entry) for every clip in the files that label_pattern finds."""
    pattern = label_pattern(root, *stems)
    for split in SPLITS:
        path = pattern.replace("{split}", split)
        for e in entries(path) if os.path.isfile(path) else ():
            yield split, e | {"name": e["name"].removeprefix(split + "/")}

# ---------------------------------------------------------------------------------------------------------------------
# Readers

def reader(rows):
    """
    Makes a reader of a function of the folder that yields (split, row).
    The split is None where the folder does not say it: those go to train until data.py deals them out, and
    stay there where it does say that of others: a line tells how many, since a cell may have been forgotten.
    "line", a row's place in a table, is for the error alone.
    """
    @functools.wraps(rows)
    def read(root):
        splits = {s: [] for s in SPLITS}
        mute = 0  # clips whose split is not said
        for split, row in rows(root):
            line = row.pop("line", root)
            if split not in (None, *SPLITS):
                raise BadInput(f"{line}: clip {row['name']}: split {split!r} is none of {', '.join(SPLITS)}")
            splits[split or "train"].append(row)
            mute += split is None
        total = sum(map(len, splits.values()))
        if 0 < mute < total:
            print0(f"{root}: {mute} of {total} clips have no split and go to train")
        return splits, mute < total
    return read


@reader
def read_clips(root):
    """
    Own clips: root/clips.tsv with a header and the columns file, text and, if you like, split, signer, gloss.
    A clip's name is its file without the ending. Without a split column data.py deals the clips out.
    """
    path = f"{root}/clips.tsv"
    if not os.path.exists(path):
        raise BadInput(f"{path}: No such file or directory; own clips need this table, with a header file<TAB>text")
    for cells in read_table(path, "file", "text"):
        row = {k: c.strip() for k, c in cells.items() if c.strip()}
        if "file" not in row:
            raise BadInput(f"{row['line']}: names no file")
        file = os.path.normpath(row["file"])
        video = first(root, [file])
        name = unicodedata.normalize("NFC", file if os.path.isdir(video) else os.path.splitext(file)[0])
        more = {k: row[k] for k in ("signer", "gloss", "line") if k in row}
        yield row.get("split"), {"name": name, "text": row.get("text", ""), "video": video} | more


@reader
def read_phoenix14t(root):
    """
    RWTH-PHOENIX-Weather 2014T (Camgoz et al. 2018), release v3.
    root is PHOENIX-2014-T, its parent PHOENIX-2014-T-release-v3, or a folder around that.
    The column video says NAME/1/*.png; there is no such folder 1 on the disk.
    """
    tables = {s: f"annotations/manual/PHOENIX-2014-T.{s}.corpus.csv" for s in SPLITS}
    home = find(root, *tables.values())
    for split, table in tables.items():
        path = f"{home}/{table}"
        if os.path.exists(path):
            for row in read_table(path, "name", "speaker", "orth", "translation"):
                video = f"{home}/features/fullFrame-210x260px/{split}/{row['name']}"
                yield split, {"name": row["name"], "text": row["translation"], "video": video,
                              "signer": row["speaker"], "gloss": row["orth"]}


@reader
def read_csl_daily(root):
    """
    CSL-Daily (Zhou et al. 2021): sentence_label/csl2020ct_v2.pkl and split_1.txt.
    Frames lie in sentence/frames_512x512/NAME, or what other copies call it.
    The text is label_char, joined: every character as it stands there, full-width punctuation too.
    """
    labels = "sentence_label/csl2020ct_v2.pkl"
    home = find(root, labels)
    path = f"{home}/{labels}"
    try:
        info = {str(e["name"]): e for e in outline(path)["info"]}
        texts = {name: "".join(map(str, e["label_char"])) for name, e in info.items()}
    except (KeyError, TypeError):
        raise BadInput(f"{path}: has no list 'info' of clips with a label_char") from None
    folders = ("sentence", "sentences", "sentence_frames-512x512")
    frames = first(home, [f + inner for f in folders for inner in ("/frames_512x512", "")])
    lost = []
    for row in read_table(f"{home}/sentence_label/split_1.txt", "name", "split"):
        name = row["name"].strip()
        if name in info:
            known = {"name": name, "text": texts[name], "video": f"{frames}/{name}", "line": row["line"]}
            yield row["split"].strip(), known | optional(info[name] | {"gloss": info[name].get("label_gloss")})
        else:
            lost.append(name)
    if lost:  # the official release has one such, S000005_P0004_T00: hence the 18400 training clips of some papers
        print0(f"{path}: has no text for {len(lost)} clip(s) of split_1.txt, left out: {', '.join(lost[:20])}")


@reader
def read_how2sign(root):
    """
    How2Sign (Duarte et al. 2021): how2sign_realigned_{train,val,test}.csv, tab-separated.
    Beside them the sentence clips SENTENCE_NAME.mp4, cut with the realigned times.
    Both lie in root, in root/{split}..., or where the official script puts them (sentence_level/{split}/...).
    """
    found = False
    for split in SPLITS:
        s = VAL.get(split, split)
        texts = f"sentence_level/{s}/text/en/raw_text/"
        homes = ("", f"{s}/", f"{s}_rgb_front_clips/", texts + "re_aligned/", texts)
        path = first(root, [f"{home}how2sign_realigned_{s}.csv" for home in homes])
        folders = (f"sentence_level/{s}/rgb_front/raw_videos/", f"{s}_rgb_front_clips/raw_videos/",
                   f"{s}_raw_videos/", f"{s}/raw_videos/", f"{s}/", "raw_videos/", "")
        for row in read_table(path, "SENTENCE_NAME", "SENTENCE") if os.path.exists(path) else ():
            found = True
            video = first(root, [f"{folder}{row['SENTENCE_NAME']}.mp4" for folder in folders], -1)
            yield split, {"name": row["SENTENCE_NAME"], "text": row["SENTENCE"], "video": video}
    if not found:
        raise BadInput(f"{root}: holds no how2sign_realigned_train.csv, neither there nor in train "
                       "or sentence_level/train/text/en/raw_text/re_aligned")


@reader
def read_openasl(root):
    """
    OpenASL (Shi et al. 2022): openasl-v1.0.tsv in root or root/data.
    Its columns are vid, yid (YouTube's id), start, end, raw-text, tokenized-text, one for glosses, and split
    (train, valid, test). Clips are VID.mp4 in root, root/clips, root/videos or root/{split}; its crop_video.py
    writes '%' for the ':' in a vid.
    """
    path = find(root, "openasl-v1.0.tsv") + "/openasl-v1.0.tsv"
    folders = ("", "clips/", "videos/", "train/", "valid/", "test/")
    for row in read_table(path, "vid", "raw-text", "split"):
        files = [row["vid"] + ".mp4", row["vid"].replace(":", "%") + ".mp4"]
        video = first(root, [folder + file for file in files for folder in folders])
        yield ({"valid": "dev", "val": "dev"}.get(row["split"], row["split"]),
               {"name": row["vid"], "text": row["raw-text"], "video": video, "line": row["line"]})


@reader
def read_gfslt(root):
    """
    GFSLT-VLP's labels.{train,dev,test} (Zhou et al. 2023) and their kin for CSL-Daily (sltbaselines, Uni-Sign).
    They are gzip pickles of a dict name -> {name, text, gloss, imgs_path or video_path}; texts are taken as they are.
    Clips are looked for in root itself and in the folders that PHOENIX-2014T and CSL-Daily have for them.
    """
    folder = os.path.dirname(root) if "{split}" in root else root
    inside = ("", "fullFrame-210x260px/", "features/fullFrame-210x260px/",
              "PHOENIX-2014-T/features/fullFrame-210x260px/",
              "PHOENIX-2014-T-release-v3/PHOENIX-2014-T/features/fullFrame-210x260px/",
              "sentence-crop/", "sentence/frames_512x512/")
    for split, e in label_entries(root, "labels", "csl_daily.labels"):
        images = e.get("imgs_path")
        folder_of = os.path.dirname(str(images[0])) if images and isinstance(images, list) else e["name"]
        clip = str(e.get("video_path") or folder_of)
        video = first(folder, [i + c for i in inside for c in (clip, f"{split}/{clip}")])
        yield split, {"name": e["name"], "text": e["text"], "video": video} | optional(e)


SLT = ("phoenix14t.pami0", "neccam.phoenix14t", "phoenix14t")  # what neccam's files are called


@reader
def read_slt(root):
    """
    neccam/slt's phoenix14t.pami0.{train,dev,test} (Camgoz et al. 2020).
    They are gzip pickles of a list of {name, signer, gloss, text, sign: (T, 1024)}.
    The " ." at the end of every text is not the data set's own and goes. There are no clips: the features are
    imported, and the pami1, ... beside them are concatenated by features=A.{split},B.{split}.
    """
    for split, e in label_entries(root, *SLT):
        yield split, {"name": e["name"], "text": e["text"].removesuffix(" .")} | optional(e)


READERS = {"phoenix14t": read_phoenix14t, "csl_daily": read_csl_daily, "how2sign": read_how2sign,
           "openasl": read_openasl, "clips": read_clips, "gfslt": read_gfslt, "slt": read_slt}


def deal_out(rows, ratio):
    """Share rows out to train, dev and test in an order that depends on their names alone."""
    try:
        a, b, c = map(float, ratio.split(","))
        if min(a, b, c) < 0 or not 0.999 < a + b + c < 1.001:
            raise ValueError
    except ValueError:
        raise BadInput(f"ratio={ratio}: is not three shares that sum to 1") from None
    rows = sorted(rows, key=lambda r: (zlib.crc32(r["name"].encode()), r["name"]))
    one, two = round(a * len(rows)), round((a + b) * len(rows))
    return {"train": rows[:one], "dev": rows[one:two], "test": rows[two:]}
