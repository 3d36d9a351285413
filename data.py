"""
Clips in, packed batches out; and the program that makes a data set's common form.

    python data.py dataset=mine root=FOLDER                            # own clips: a folder with clips.tsv
    torchrun --nproc_per_node=2 data.py dataset=mine root=FOLDER       # the same, shared out among processes
    python data.py dataset=phoenix14t root=FOLDER backbone=googlenet weights=googlenet.pth
    python data.py dataset=slt root=FOLDER backbone=pami0                   # neccam's files with features inside

Writes data/NAME/{train,dev,test}.jsonl (one clip a line) and data/NAME/BACKBONE/{split}.safetensors (name ->
(frames, width) float16). A run that was killed goes on where it stopped; clips that have not changed are not
extracted again. Readers stand in lib/readers.py, their check in lib/check.py, the CNN's work in lib/extract.py.
"""
import math
import os
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from lib.check import check, report
from lib.configurator import configure, usage_error
from lib.extract import Extractor, choose_backbone, prepare
from lib.features import Store, import_features, read_common, text_of
from lib.poses import Poses, in_place, whose_points
from lib.program import BadInput, join, launch, leave, print0, rank, world
from lib.readers import FPS, READERS, SLT, SPLITS, deal_out, label_pattern
from lib.tensors import stateless

dataset = ""  # name of the data set: its common form goes to data_dir/NAME
root = ""  # folder of the clips as they were downloaded or filmed
reader = ""  # phoenix14t csl_daily how2sign openasl clips gfslt slt; "" = the data set's name, else clips
strict = True  # false: go on without clips that cannot be read, listed in data_dir/NAME/problems.txt
data_dir = "data"  # folder that holds the data sets
backbone = ""  # googlenet (paper), timm/NAME (Table 5), poses, toycnn (random); "" = the best there is; features=: any
weights = ""  # file of the CNN's weights (.pth, .safetensors), random for a trial; timm/NAME: "" = downloaded
fps = 0.0  # resample clips to so many frames a second, 0 = as filmed
ratio = "0.8,0.1,0.1"  # shares of train, dev, test where clips.tsv has no split column and at least 20 clips
features = ""  # ready ones: a pickle, .safetensors, .npy, {split} in it; A,B: both; {name}.pose; states: stand-ins
sigma = 1.0  # features=states: noise, beside sign states of deviation 1, which leaves a single frame readable
workers = 2  # processes that decode clips while the CNN runs, for each process of torchrun; 0 = in the CNN's own
device = "auto"  # auto, cpu, cuda: where the CNN runs

# ---------------------------------------------------------------------------------------------------------------------
# Clips in

def thin(x, max_frames, merge=1):
    """Features (T, D) -> at most max_frames (0: all), evenly spaced, then the means of `merge`."""
    x = x[torch.linspace(0, len(x) - 1, max_frames).long()] if 0 < max_frames < len(x) else x
    return F.avg_pool1d(x.float().T, merge, ceil_mode=True).T.type_as(x) if merge > 1 else x


def spread(total, n):
    """n of the numbers 0 .. total - 1, evenly apart."""
    return [i * total // n for i in range(n)]


class Clips:
    """One split of a data set in its common form, as samples for a prompt."""

    def __init__(self, run, split, max_clips=0):
        """run: its data_dir, dataset, backbone, max_frames, merge (see thin); max_clips: spread over all, 0 = all."""
        folder = os.path.join(run.data_dir, run.dataset)
        self.path = os.path.join(folder, split + ".jsonl")
        if not os.path.exists(self.path):
            there = [s for s in SPLITS if os.path.exists(os.path.join(folder, s + ".jsonl"))]
            hint = f"it has {', '.join(there)}" + ": say split=" * (split == "test") if there else "data.py makes it"
            raise BadInput(f"{self.path}: data set {run.dataset} has no split {split}; {hint}")
        self.run, self.split = run, split
        self.store = Store(os.path.join(folder, run.backbone, split + ".safetensors"))
        self.rows, shapes = read_common(self.path, self.store)
        if 0 < max_clips < len(self.rows):
            self.rows = [self.rows[i] for i in spread(len(self.rows), max_clips)]
        lengths = [shapes[row["name"]][0] for row in self.rows]
        self.too_long = sum(0 < run.max_frames < n for n in lengths)
        # frames of each clip, as they will be used
        self.lengths = [math.ceil(min(n, run.max_frames or n) / run.merge) for n in lengths]
        self.width = shapes[self.rows[0]["name"]][1]

    def __len__(self):
        return len(self.rows)

    def beside(self, split):
        """Another split of the same data set, None where it has none."""
        there = os.path.exists(os.path.join(os.path.dirname(self.path), split + ".jsonl"))
        return Clips(self.run, split) if there else None

    def describe(self):
        """What these clips are, and what is done to them: lines for the screen."""
        lines = [f"data: {self.run.dataset}, {len(self)} {self.split} clips of "
                 f"{sum(self.lengths) / len(self):.0f} frames, features {self.run.backbone} of width {self.width}"
                 + (f", means of {self.run.merge}" if self.run.merge > 1 else "")]
        if standin := self.store.settings.get("standin"):
            lines.append(f"data: {standin}: no score here is one of the data set")
        if self.too_long:
            lines.append(f"data: {self.too_long} {self.split} clips are longer than max_frames={self.run.max_frames} "
                         "and are thinned out evenly, the same in training and test")
        return "\n".join(lines)

    def names(self, indices):
        """The names of some clips, for a message."""
        return ", ".join(self.rows[i]["name"] for i in indices)

    def features(self, i, drop=0.0, key=()):
        """(T, D) of clip i; drop: share of its frames left out at random, as the key says."""
        row = self.rows[i]
        x = thin(self.store[row["name"]], self.run.max_frames, self.run.merge)
        if drop:
            keep = stateless(*key, row["name"]).random(len(x)) >= drop
            x = x[torch.from_numpy(keep)] if keep.any() else x[:1]
        return x

    def sample(self, i, prompt, tokenizer, drop=0.0, key=(), concat=0.0):
        rng = stateless(*key, "concat", self.rows[i]["name"])
        some = [i] + [int(rng.integers(len(self)))] * (rng.random() < concat)  # another and its sentence may follow
        answer = tokenizer.encode(text_of(self.rows[j] for j in some)) + [tokenizer.eos_id]
        return Sample(torch.cat([self.features(j, drop, key) for j in some]), *prompt, answer)

    def statistics(self):
        """Mean and deviation (D,) of the features, from some 200 clips spread over the split."""
        some = range(0, len(self), math.ceil(len(self) / 200))
        parts = [self.features(i).float() for i in some]
        if broken := [i for i, x in zip(some, parts) if not torch.isfinite(x).all()]:
            raise BadInput(f"{self.store.path}: features that are not finite, of clip {self.names(broken)}")
        x = torch.cat(parts)
        std = x.std(0)
        return x.mean(0), torch.where(std > 1e-4, std, 1.0)  # a dead feature stays as it is

# ---------------------------------------------------------------------------------------------------------------------
# Batches out

@dataclass
class Sample:
    """One clip as the LLM will read it: before, the frames, after, the answer (None when it is to be generated)."""
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
    """A prompt with {clip} in it -> (ids before the clip, ids after it). "{clip}" alone, as in align: just BOS."""
    if prompt.count("{clip}") != 1:
        raise BadInput(f"prompt={prompt!r}: must hold {{clip}} once")
    before, after = (tokenizer.encode(part.strip()) if part.strip() else [] for part in prompt.split("{clip}"))
    return [tokenizer.bos_id] * (tokenizer.bos_id >= 0) + before, after


def pack(samples, device="cpu", with_targets=True):
    """[Sample] -> Batch on the device. with_targets=False: nothing is to be learnt here."""
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

# ---------------------------------------------------------------------------------------------------------------------
# Which clips, and who takes them: functions of the step's number and the seed, with no state to save

def clips_of_step(n_clips, step, batch_size, seed):
    """-> (epoch, numbers of the clips of this step): each epoch passes through all of them, in an order of its own."""
    epoch, number = divmod(step, math.ceil(n_clips / batch_size))
    order = stateless(seed, "order", epoch).permutation(n_clips)
    return epoch, order[number * batch_size:(number + 1) * batch_size].tolist()


def deal(indices, lengths, parts):
    """Deal clips out to micro-batches of about as many frames each: longest first, to and fro. A part may be empty."""
    order = sorted(indices, key=lambda i: -lengths[i])
    turns = [*range(parts), *reversed(range(parts))]
    return [[i for k, i in enumerate(order) if turns[k % (2 * parts)] == p] for p in range(parts)]


def my_part(indices, lengths, grad_accum=1):
    """This process's micro-batches of a step's clips, `grad_accum` of them."""
    return deal(indices, lengths, world() * grad_accum)[rank() * grad_accum:(rank() + 1) * grad_accum]


def micro_batch(clips, indices, prompt, tokenizer, device, drop=0.0, key=(), concat=0.0):
    """A packed batch of these clips. With none left for this process, one clip without targets: all must compute."""
    return pack([clips.sample(i, prompt, tokenizer, drop, key, concat) for i in indices or [0]], device, bool(indices))

# ---------------------------------------------------------------------------------------------------------------------

def main():
    cfg = configure(__file__, choices={"reader": ("", *READERS)})
    for key, what in (("dataset", "the data set's name"), ("root", "the folder of its clips")):
        if not getattr(cfg, key):
            usage_error(__file__, f"{key}: say {what}, {key}=...")
    if not re.fullmatch(r"[\w.-]+", cfg.dataset) or cfg.dataset.startswith("."):
        raise BadInput(f"dataset={cfg.dataset}: a name of letters, digits, '_', '-' and '.'")
    form = cfg.reader or (cfg.dataset if cfg.dataset in READERS else "clips")
    splits, has_splits = READERS[form](cfg.root)
    rows = [row for split in SPLITS for row in splits[split]]
    no_splits = f"{form}: says no splits" + " (clips.tsv: no column split)" * (form == "clips")
    if not has_splits and len(rows) >= 20:
        splits = deal_out(rows, cfg.ratio)
        print0(f"{no_splits}, so train, dev, test by ratio={cfg.ratio}")
    elif not has_splits:
        print0(f"{no_splits}, and {len(rows)} clips are too few to hold some out: all go to train")

    # where ready features lie, if there are any
    states = cfg.features == "states"
    if states and form != "slt":
        raise BadInput("features=states: needs the alignments in neccam's base annotations, reader=slt")
    if form == "slt" and (states or not cfg.features):  # in the files of the labels
        patterns = [label_pattern(cfg.root, *SLT)]
    else:
        patterns = [p.strip() for p in cfg.features.split(",") if p.strip()]
    if cfg.features.endswith(".pose") or cfg.features and cfg.backbone == "poses":
        splits, patterns, cfg.backbone = in_place(splits, cfg.features), [], cfg.backbone or "poses"
    sigma = cfg.sigma if states else None

    splits, problems, notes, table, shapes = check(splits, patterns, sigma)
    report(problems, notes, table, os.path.join(cfg.data_dir, cfg.dataset), cfg.strict)
    if not any(splits.values()):
        raise BadInput(f"{cfg.root}: no clip is left")
    if patterns:
        return take_over(cfg, splits, patterns, shapes, sigma)
    videos = [row["video"] for split in SPLITS for row in splits[split]]
    if not cfg.backbone:
        cfg.backbone, cfg.weights = choose_backbone(videos, cfg.weights)
    if cfg.backbone == "poses":
        extractor = Poses(whose_points(videos), cfg.fps, FPS.get(form, 0.0))
    else:
        extractor = Extractor(cfg.backbone, cfg.weights, cfg.device, cfg.fps, FPS.get(form, 0.0), cfg.workers)
    print0(extractor.describe())
    if world() > 1:
        join()
    prepare(cfg.dataset, splits, cfg.data_dir, extractor, cfg.strict)
    leave()


def take_over(cfg, splits, patterns, shapes, sigma):
    """Import features that others have made, or stand-ins, under a name of their own."""
    label = cfg.backbone
    if label in ("", "toycnn"):  # these are not made by it
        label = "imported" if sigma is None else "standin"
        print0(f"backbone={label}: how these features are called, for want of another backbone=")
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", label):
        raise BadInput(f"backbone={label}: a name of letters, digits, '_', '-', '.' and '/'")
    if rank() == 0:  # nothing to share out: it is as fast as the disk
        import_features(cfg.dataset, splits, cfg.data_dir, label, patterns, shapes, sigma)
    if sigma is not None:
        print0(f"these are STAND-IN features, sigma={sigma:g}: made from alignments, not from videos; "
               "scores on them are no scores of the data set")


if __name__ == "__main__":
    launch(main)
