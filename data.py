"""
Clips in, batches out: the program that makes a data set's common form (readers.py and video.py do the work), tokenizer, packing.

    python data.py dataset=isl root=clips_of_isl                            # own clips: a folder with clips.tsv (file<TAB>text)
    torchrun --nproc_per_node=2 data.py dataset=isl root=clips_of_isl       # the same, shared out among processes
    python data.py dataset=phoenix14t root=FOLDER backbone=googlenet weights=googlenet.pth
    python data.py dataset=slt root=FOLDER backbone=pami0                   # neccam's files with features inside: nothing to extract

Writes data/NAME/{train,dev,test}.jsonl (one clip a line) and data/NAME/BACKBONE/{split}.safetensors (name -> (frames, width) float16).
A run that was killed goes on where it stopped; clips that have not changed are not extracted again.
"""
import json
import os
import re
import zlib
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from config import BadInput, configure, launch, print0, rank, usage_error, world
from readers import FPS, READERS, SLT, SPLITS, check, deal_out, label_pattern, report
from video import Extractor, Store, import_features, prepare, read_video  # noqa: F401 - data.read_video is the name that other programs know
from weights import load_json

dataset = ""  # name of the data set: its common form goes to data_dir/NAME
root = ""  # folder of the clips as they were downloaded or filmed
reader = ""  # form of that folder: phoenix14t csl_daily how2sign openasl clips gfslt slt; "" = the data set's own name where that is a form, else clips
strict = True  # false: go on without broken clips, listed in data_dir/NAME/problems.txt
data_dir = "data"  # folder that holds the data sets
backbone = "toycnn"  # frozen CNN: toycnn, googlenet (paper: pre-trained Inception, 1024-d), timm/NAME (Table 5's others; pip install timm); with features= any name
weights = ""  # file of its weights (.pth or .safetensors; googlenet: torchvision's), random for a trial; timm/NAME downloads them where it is ""
fps = 0.0  # resample clips to so many frames a second, 0 = as filmed
ratio = "0.8,0.1,0.1"  # shares of train, dev, test where clips.tsv has no split column and at least 20 clips
features = ""  # ready ones instead of a CNN: a pickle, .safetensors or folder of .npy, with {split} in the path; A,B concatenates; states: stand-ins for reader=slt
sigma = 1.0  # features=states: noise, beside sign states of deviation 1 (nobody can say what a CNN's would be; 1 leaves a single frame readable)
workers = 2  # processes that decode clips while the CNN runs, for each process of torchrun; 0 = in the CNN's own
device = "auto"  # auto, cpu, cuda: where the CNN runs

# ---------------------------------------------------------------------------------------------------------------------
# Text

class Tokenizer:
    """The tokenizer in an LLM's folder: tokenizer.model (SentencePiece) or tokenizer.json (package tokenizers). BOS and EOS as the folder says."""

    def __init__(self, path, bos_id=-1, eos_id=-1):
        """bos_id, eos_id: -1 takes the tokenizer's own. .eos_ids all stop the decoding; the first, .eos_id, is learnt."""
        model, other, words = (os.path.join(path, f) for f in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"))
        special = {}
        try:
            if path.startswith("random:"):  # random weights have no tokenizer: one token a byte, under LLaMA's ids for bytes
                self.encode, self.vocab_size, special = lambda text: [3 + b for b in text.encode()], 259, {"bos_token_id": 1, "eos_token_id": 2}
                self._decode = lambda ids: bytes(i - 3 for i in ids if i > 2).decode(errors="replace")
            elif os.path.exists(model):
                from sentencepiece import SentencePieceProcessor
                sp = SentencePieceProcessor(model_file=model)
                self.encode, self._decode, self.vocab_size = sp.encode, sp.decode, sp.vocab_size()
                special = {"bos_token_id": sp.bos_id(), "eos_token_id": sp.eos_id()}
                id_of = lambda piece: sp.piece_to_id(piece) if sp.id_to_piece(sp.piece_to_id(piece)) == piece else None  # it gives <unk> for others
            elif os.path.exists(other):
                try:
                    import tokenizers
                except ImportError:
                    raise BadInput(f"{other}: needs the package tokenizers (pip install tokenizers)") from None
                tok = tokenizers.Tokenizer.from_file(other)
                self.encode = lambda text: tok.encode(text, add_special_tokens=False).ids
                self._decode, self.vocab_size, id_of = tok.decode, tok.get_vocab_size(), tok.token_to_id
            else:
                raise BadInput(f"{path}: holds neither tokenizer.model nor tokenizer.json")
        except BadInput:
            raise
        except Exception as e:
            raise BadInput(f"{model if os.path.exists(model) else other}: cannot be read as a tokenizer ({e})") from None
        for f in ("config.json", "generation_config.json"):  # the later knows better
            if os.path.exists(os.path.join(path, f)):
                special |= {k: v for k, v in load_json(os.path.join(path, f)).items() if k in ("bos_token_id", "eos_token_id") and v is not None}
        said = load_json(words) if os.path.exists(words) else {}  # and this one best

        def ids(kind, given):
            if given >= 0:
                return [given]
            if kind == "bos" and (said.get("bos_token", "") is None or said.get("add_bos_token") is False):
                return []  # Qwen2: config.json names a BOS, but no text begins with it
            found = special.get(kind + "_token_id", [])
            found = found if isinstance(found, list) else [found]  # chat models list further tokens that end an answer
            if not all(type(i) is int for i in found):
                raise BadInput(f"{path}: {kind}_token_id={str(found)[:50]} is no number of a token")
            if token := said.get(kind + "_token"):
                token = token.get("content") if isinstance(token, dict) else token
                if not isinstance(token, str) or id_of(token) is None:
                    raise BadInput(f"{words}: {kind}_token={token!r} is no piece of the tokenizer; give {kind}_id=")
                found = [id_of(token)] + [i for i in found if i != id_of(token)]
            return [i for i in found if i >= 0]

        self.bos_id = (ids("bos", bos_id) or [-1])[0]  # -1: this LLM begins without one
        self.eos_ids = ids("eos", eos_id)
        if not self.eos_ids:
            raise BadInput(f"{path}: says no EOS token; give eos_id=")
        self.eos_id, self.path = self.eos_ids[0], path

    def fit(self, rows):
        """An embedding needs a row for each piece; one with more (padded to a round number) is fine. Returns the tokenizer."""
        if self.vocab_size > rows:
            raise BadInput(f"llm={self.path}: its tokenizer has {self.vocab_size} pieces, its embedding {rows} rows")
        if max([self.bos_id, *self.eos_ids]) >= rows:
            raise BadInput(f"bos_id={self.bos_id}, eos_id={self.eos_id}: the embedding of {self.path} has {rows} rows")
        return self

    def decode(self, ids):
        return self._decode([i for i in ids if 0 <= i < self.vocab_size])  # a padded embedding has ids that mean nothing

# ---------------------------------------------------------------------------------------------------------------------
# Batches out

@dataclass
class Sample:
    """One clip as the LLM will read it: before, the frames, after, the answer (None when it is to be generated)."""
    name: str
    features: torch.Tensor  # (T, D)
    before: list
    after: list
    answer: list


@dataclass
class Batch:
    """A packed stream of N tokens from several clips, F of them frames; M are targets. No filling anywhere."""
    features: torch.Tensor  # (F, D)
    clip: torch.Tensor  # (F,) number of the clip each frame belongs to
    frame_at: torch.Tensor  # (F,) where in the stream the frames go
    tokens: torch.Tensor  # (N,) token ids, 0 where a frame goes
    lens: list  # length of each clip's sequence
    target_at: torch.Tensor  # (M,) positions whose next token is learnt
    targets: torch.Tensor  # (M,) those tokens: answers and their EOS


def prompt_ids(prompt, tokenizer):
    """A prompt with {clip} in it -> (ids before the clip, ids after it). "{clip}" alone is the align stage: just BOS."""
    if prompt.count("{clip}") != 1:
        raise BadInput(f"prompt={prompt!r}: must hold {{clip}} once")
    before, after = (tokenizer.encode(part.strip()) if part.strip() else [] for part in prompt.split("{clip}"))
    return [tokenizer.bos_id] * (tokenizer.bos_id >= 0) + before, after


def pack(samples, device="cpu", with_targets=True):
    """[Sample] -> Batch on the device. with_targets=False: nothing is to be learnt here (the share of a process that has run out of clips)."""
    tokens, lens, clip, frame_at, target_at, targets = [], [], [], [], [], []
    for i, s in enumerate(samples):
        start, T, answer = len(tokens), len(s.features), s.answer or []
        tokens += s.before + [0] * T + s.after + answer[:-1]  # the last token is only ever predicted
        lens.append(len(tokens) - start)
        clip += [i] * T
        frame_at += range(start + len(s.before), start + len(s.before) + T)
        if with_targets and answer:
            target_at += range(len(tokens) - len(answer), len(tokens))
            targets += answer
    on = lambda x: torch.tensor(x, dtype=torch.long).to(device, non_blocking=True)
    features = torch.cat([s.features for s in samples]).to(device, non_blocking=True)
    return Batch(features, on(clip), on(frame_at), on(tokens), lens, on(target_at), on(targets))


def stateless(*key):
    """A random generator that is a function of its key (numbers and texts): resuming anywhere draws the same."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


def read_rows(path):
    """The clips of a {split}.jsonl: [{"name", "text", ...}]."""
    rows = []
    try:
        lines = list(open(path, encoding="utf-8"))
    except UnicodeDecodeError:
        raise BadInput(f"{path}: is not UTF-8") from None
    if not lines:
        raise BadInput(f"{path}: has no clips")
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
            if not all(rows[-1][k] and isinstance(rows[-1][k], str) for k in ("name", "text")):
                raise ValueError("empty name or text")
        except (ValueError, KeyError, TypeError) as e:
            raise BadInput(f"{path}:{number}: is not a clip ({e})") from None
    return rows


def thin(x, max_frames):
    """Features (T, D) -> at most max_frames of them (0: all), evenly spaced; in training and test alike."""
    return x[torch.linspace(0, len(x) - 1, max_frames).long()] if 0 < max_frames < len(x) else x


def spread(total, n):
    """n of the numbers 0 .. total - 1, evenly apart."""
    return [i * total // n for i in range(n)]


class Clips:
    """One split of a data set in its common form, as samples for a prompt."""

    def __init__(self, data_dir, dataset, backbone, split, max_frames=0, max_clips=0):
        folder = os.path.join(data_dir, dataset)
        path = os.path.join(folder, split + ".jsonl")
        if not os.path.exists(path):
            there = [s for s in SPLITS if os.path.exists(os.path.join(folder, s + ".jsonl"))]
            hint = f"it has {', '.join(there)}: say split=" if there else "make it with python data.py"
            raise BadInput(f"{path}: data set {dataset} has no split {split}; {hint}")
        self.rows, self.path = read_rows(path), path
        if 0 < max_clips < len(self.rows):
            self.rows = [self.rows[i] for i in spread(len(self.rows), max_clips)]
        self.store = Store(os.path.join(folder, backbone, split + ".safetensors"))
        if missing := [r["name"] for r in self.rows if r["name"] not in self.store.names]:
            raise BadInput(f"{self.store.path}: has no features of clip {missing[0]} ({len(missing)} missing); run data.py again")
        self.max_frames = max_frames
        lengths = [self.store.file.get_slice(r["name"]).get_shape()[0] for r in self.rows]
        self.lengths = [min(n, max_frames or n) for n in lengths]  # frames of each clip, as they will be used
        self.too_long = sum(n > m for n, m in zip(lengths, self.lengths))

    def __len__(self):
        return len(self.rows)

    def features(self, i, drop=0.0, key=()):
        """(T, D) of clip i. More than max_frames are thinned out evenly, in training and test alike; drop: share of frames left out at random."""
        row = self.rows[i]
        x = thin(self.store[row["name"]], self.max_frames)
        if drop:
            keep = stateless(*key, row["name"]).random(len(x)) >= drop
            x = x[torch.from_numpy(keep)] if keep.any() else x[:1]
        return x

    def sample(self, i, prompt, tokenizer, drop=0.0, key=()):
        before, after = prompt
        answer = tokenizer.encode(self.rows[i]["text"]) + [tokenizer.eos_id]
        return Sample(self.rows[i]["name"], self.features(i, drop, key), before, after, answer)


def main():
    cfg = configure(__file__, choices={"reader": ("", *READERS), "device": ("auto", "cpu", "cuda")})
    for key, what in (("dataset", "the data set's name"), ("root", "the folder of its clips")):
        if not getattr(cfg, key):
            usage_error(__file__, f"{key}: say {what}, {key}=...")
    if not re.fullmatch(r"[\w.-]+", cfg.dataset) or cfg.dataset.startswith("."):
        raise BadInput(f"dataset={cfg.dataset}: a name of letters, digits, '_', '-' and '.'")
    for key in ("fps", "workers"):
        if getattr(cfg, key) < 0:
            usage_error(__file__, f"{key}={getattr(cfg, key)}: must be at least 0")
    form = cfg.reader or (cfg.dataset if cfg.dataset in READERS else "clips")
    splits, dealt = READERS[form](cfg.root)
    rows = [row for split in SPLITS for row in splits[split]]
    if not dealt and len(rows) >= 20:
        splits = deal_out(rows, cfg.ratio)
        print0(f"no column split in clips.tsv: train, dev, test by ratio={cfg.ratio}")
    elif not dealt:
        print0(f"{len(rows)} clips are too few to hold some out (fewer than 20, no column split in clips.tsv): all go to train")

    states = cfg.features == "states"
    if states and form != "slt":
        raise BadInput("features=states: needs the alignments in neccam's base annotations, reader=slt")
    if form == "slt" and (states or not cfg.features):  # the features are in the files of the labels
        patterns = [label_pattern(cfg.root, *SLT)]
    else:
        patterns = [p.strip() for p in cfg.features.split(",") if p.strip()]
    sigma = cfg.sigma if states else None
    splits, problems, notes, table, shapes = check(splits, patterns, sigma)
    report(problems, notes, table, os.path.join(cfg.data_dir, cfg.dataset), cfg.strict)
    if not any(splits.values()):
        raise BadInput(f"{cfg.root}: no clip is left")

    if patterns:
        label = cfg.backbone
        if label == "toycnn":  # page one's: these are not made by it
            label = "standin" if states else "imported"
            print0(f"backbone={label}: how these features are called, for want of another backbone=")
        if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", label):
            raise BadInput(f"backbone={label}: a name of letters, digits, '_', '-', '.' and '/'")
        if rank() == 0:  # nothing to share out: it is as fast as the disk
            import_features(cfg.dataset, splits, cfg.data_dir, label, patterns, shapes, sigma)
        if states:
            print0(f"these are STAND-IN features, sigma={sigma:g}: made from alignments, not from videos; scores on them are no scores of the data set")
        return
    extractor = Extractor(cfg.backbone, cfg.weights, cfg.device, cfg.fps, FPS.get(form, 0.0), cfg.workers)
    print0(f"backbone {cfg.backbone}: {sum(p.numel() for p in extractor.cnn.parameters()) / 1e6:.1f}M frozen parameters on {extractor.device}")
    if world() > 1:
        dist.init_process_group("gloo")
    prepare(cfg.dataset, splits, cfg.data_dir, extractor, cfg.strict)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main)
