"""
Clips in, batches out: video decoding, data-set readers, feature extraction and store, tokenizer, packing.

    python data.py dataset=isl root=clips_of_isl                            # own clips: a folder with clips.tsv (file<TAB>text)
    torchrun --nproc_per_node=2 data.py dataset=isl root=clips_of_isl       # the same, shared out among processes

Writes data/NAME/{train,dev,test}.jsonl (one clip a line) and data/NAME/BACKBONE/{split}.safetensors (name -> (frames, width) float16).
A run that was killed goes on where it stopped; clips that have not changed are not extracted again.
"""
import glob
import json
import math
import os
import re
import shutil
import zlib
from dataclasses import dataclass

import av
import numpy as np
import torch
import torch.distributed as dist
from av.video.reformatter import VideoReformatter
from safetensors import safe_open

from config import BadInput, Progress, configure, launch, print0, rank, usage_error, whole
from model import Docs, GoogLeNet, RandomCNN, load_json
from readers import READERS, SPLITS, deal_out

dataset = ""  # name of the data set: its common form goes to data_dir/NAME
root = ""  # folder of the clips as they were downloaded or filmed
reader = ""  # form of that folder: clips; "" = the data set's own name where that is a form, else clips
data_dir = "data"  # folder that holds the data sets
backbone = "toycnn"  # frozen CNN: toycnn, googlenet (paper: pre-trained Inception, 1024-d)
weights = ""  # googlenet: file of torchvision's weights (.pth or .safetensors)
ratio = "0.8,0.1,0.1"  # shares of train, dev, test where clips.tsv has no split column and at least 20 clips
device = "auto"  # auto, cpu, cuda: where the CNN runs

# ---------------------------------------------------------------------------------------------------------------------
# Clips in

def natural(name):
    """Sort key under which frame 2 comes before frame 10."""
    return [int(s) if s.isdecimal() else s for s in re.split(r"(\d+)", name)]


def frames(path, size=None):
    """Yield the frames of a clip (mp4, webm, gif, ..., or a folder of png/jpg) as uint8 (H, W, 3); size: squeezed to size x size."""
    if os.path.isdir(path):
        files = [os.path.join(path, f) for f in sorted(os.listdir(path), key=natural) if f.lower().endswith((".png", ".jpg", ".jpeg"))]
    else:
        files = [path]
    shape, convert = None, VideoReformatter()
    to = dict(width=size, height=size) if size else {}
    for file in files:
        try:
            if file.lower().endswith(".gif") and open(file, "rb").read().rstrip(b"\0\r\n ")[-1:] != b";":
                raise BadInput(f"{file}: is cut off, a GIF ends with ';'")  # the decoder would give the frames up to there without a word
            with av.open(file) as container:
                if not container.streams.video:
                    raise BadInput(f"{file}: holds no video")
                container.streams.video[0].thread_count = 1  # small clips: threads cost more than they bring, processes scale
                for frame in container.decode(video=0):
                    shape = shape or (frame.width, frame.height)
                    if shape != (frame.width, frame.height):
                        raise BadInput(f"{file}: a frame of {frame.width}x{frame.height} in a clip of {shape[0]}x{shape[1]}")
                    rgb = convert.reformat(frame, format="rgb24", interpolation="BILINEAR", threads=1, **to).to_ndarray()
                    yield np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb  # phones film upright and note the turn
                # webm: the decoder takes the end of a file that was cut off for the end of the clip, but the header knows how long it was
                if len(container.streams) == 1 and not file.lower().endswith(".gif") and (frame.time or 0) + 0.5 < 0.8e-6 * (container.duration or 0):
                    raise BadInput(f"{file}: is cut off, it ends at {frame.time:.1f} s of {container.duration / 1e6:.1f}")
        except (av.error.FFmpegError, OSError) as e:
            raise BadInput(f"{file}: cannot be decoded ({getattr(e, 'strerror', None) or e})") from None
    if shape is None:
        raise BadInput(f"{path}: has no frames")


def read_video(path):
    """A clip (mp4, webm, gif, or a folder of png/jpg frames in natural order) -> uint8 (T, H, W, 3)."""
    return np.stack(list(frames(path)))


# ---------------------------------------------------------------------------------------------------------------------
# Feature extraction and store

class Extractor:
    """A frozen CNN with the preparation of its frames: squeezed to size, centre-cropped, normalised to [-1, 1]. Called with a path -> float16 (T, D)."""

    SIZES = {"toycnn": (64, 64), "googlenet": (256, 224)}  # side after squeezing, side of the centre crop

    def __init__(self, backbone, weights="", device="auto"):
        if backbone not in self.SIZES:
            raise BadInput(f"backbone={backbone}: is none of {', '.join(self.SIZES)}")
        if backbone == "googlenet" and not weights:
            raise BadInput("weights: googlenet needs a file of torchvision's weights (googlenet-1378be20.pth)")
        self.settings = {"backbone": backbone, "weights": weights}
        if weights and os.path.exists(weights):
            self.settings["weights_file"] = fingerprint(weights)  # features of other weights are other features
        self.size, self.crop = self.SIZES[backbone]
        self.device = pick_device(device)[0]
        self.cnn = (RandomCNN() if backbone == "toycnn" else GoogLeNet().load(weights)).to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, path):
        """The features of a clip: float16 (T, D)."""
        low = (self.size - self.crop) // 2
        parts, batch = [], []

        def flush():
            x = torch.from_numpy(np.stack(batch)).to(self.device).permute(0, 3, 1, 2)  # (T, H, W, 3) -> (T, 3, H, W), channels last
            parts.append(self.cnn.features(x.float() / 127.5 - 1).half().cpu().numpy())
            batch.clear()

        for frame in frames(path, self.size):
            batch.append(frame[low:low + self.crop, low:low + self.crop])
            if len(batch) == 64:
                flush()
        if batch:
            flush()
        features = np.concatenate(parts)
        if not np.isfinite(features).all():
            raise BadInput(f"{path}: backbone {self.settings['backbone']} gives features that are not finite")
        return features


def fingerprint(path):
    """Changes when a file does, or one of the files in a folder of frames."""
    stats = [f.stat() for f in os.scandir(path)] if os.path.isdir(path) else [os.stat(path)]
    return f"{os.path.abspath(path)} {len(stats)} {sum(s.st_size for s in stats)} {max((s.st_mtime_ns for s in stats), default=0)}"


def thin(x, max_frames):
    """Features (T, D) -> at most max_frames of them (0: all), evenly spaced; in training and test alike."""
    return x[torch.linspace(0, len(x) - 1, max_frames).long()] if 0 < max_frames < len(x) else x


def pick_device(device="auto"):
    """-> (torch.device of this process, the reason). A GPU is taken where there is one for each process."""
    processes, local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and gpus < processes):
        return torch.device("cpu"), f"device={device}" if device == "cpu" else f"auto: {processes} process(es), {gpus} GPU(s)"
    if gpus < processes:
        raise BadInput(f"device=cuda: {gpus} GPU(s) for {processes} process(es)")
    return torch.device("cuda", local), f"{device}: {processes} process(es), {gpus} GPU(s)"


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


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def write_common(folder, backbone, splits, shapes, read, metadata):
    """
    A data set's common form: {split: [row]} -> folder/{split}.jsonl and folder/BACKBONE/{split}.safetensors.
    shapes: name of a clip -> (T, D); read: name -> (T, D) float16; metadata: names of a split -> {text: text} that its store carries.
    """
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


def prepare(name, splits, data_dir, extractor):
    """
    Write a data set's common form: {split: [row]} -> data_dir/name/{split}.jsonl and data_dir/name/BACKBONE/{split}.safetensors.
    Each process appends its clips to a file of its own in .parts; the first one joins them at the end.
    """
    folder = os.path.join(data_dir, name, extractor.settings["backbone"])
    parts = os.path.join(folder, ".parts")
    settings = json.dumps(extractor.settings)
    if rank() == 0:
        os.makedirs(parts, exist_ok=True)
        noted = os.path.join(parts, "settings.json")
        if os.path.exists(noted) and open(noted).read() != settings:
            shutil.rmtree(parts)  # made with another CNN
            os.makedirs(parts)
        with open(noted, "w") as f:
            f.write(settings)
    barrier()

    rows = [(split, row) for split in SPLITS for row in splits[split]]
    prints = {row["name"]: fingerprint(row["video"]) for _, row in rows}
    done = {}  # name -> features, of clips whose file is still the one that was extracted
    for split in SPLITS:
        path = os.path.join(folder, split + ".safetensors")
        if os.path.exists(path):
            try:
                store = Store(path)
            except BadInput as e:
                print0(f"{e}; it is made anew")
                continue
            if store.metadata.get("settings") == settings:
                old = json.loads(store.metadata.get("fingerprints", "{}"))
                done |= {n: store[n].numpy() for n in store.names if n in prints and old.get(n) == prints[n]}

    def read_parts():
        """Note in `done` what the parts hold; yields (index file, its good lines, bytes of data that these speak of)."""
        for index in sorted(glob.glob(os.path.join(glob.escape(parts), "*.jsonl"))):
            data, good, size = index[:-6] + ".f16", [], 0
            there = os.path.getsize(data)
            for line in open(index).read().split("\n")[:-1]:  # a last line without its end was cut off by a kill
                entry = json.loads(line)
                end = size + 2 * entry["shape"][0] * entry["shape"][1]
                if end > there:  # a power cut: the line reached the disk, its features did not
                    break
                if prints.get(entry["name"]) == entry["fingerprint"]:
                    done[entry["name"]] = np.memmap(data, np.float16, "r", size, tuple(entry["shape"]))
                size, good = end, good + [line]
            yield index, good, size

    for _ in read_parts():
        pass
    todo = [row for _, row in rows if row["name"] not in done]
    if len(todo) < len(rows):
        print0(f"features: {len(rows) - len(todo)} of {len(rows)} clips are there already")
    barrier()  # everybody has read the parts; from here on they grow
    mine = os.path.join(parts, f"{rank():04d}")
    for index, good, size in read_parts():
        if index == mine + ".jsonl":  # cut off what a kill left behind
            os.truncate(mine + ".f16", size)
            with open(index, "w") as f:
                f.writelines(line + "\n" for line in good)
    own, n_frames, show = todo[rank()::world()], 0, Progress("features", len(todo))
    if not os.path.exists(mine + ".jsonl") and os.path.exists(mine + ".f16"):
        os.remove(mine + ".f16")  # killed before its first line
    with open(mine + ".f16", "ab") as data, open(mine + ".jsonl", "a") as index:
        for i, row in enumerate(own):
            features = extractor(row["video"])
            data.write(features.tobytes())
            data.flush()  # the features before the line that says that they are there
            index.write(json.dumps({"name": row["name"], "shape": features.shape, "fingerprint": prints[row["name"]]}) + "\n")
            index.flush()
            n_frames += len(features)
            show(min((i + 1) * world(), len(todo)), n_frames * world(), "frames")
    barrier()
    if rank() == 0:
        for _ in read_parts():
            pass
        write_common(os.path.join(data_dir, name), extractor.settings["backbone"], splits, {n: f.shape for n, f in done.items()}, done.__getitem__,
                     lambda names: {"settings": settings, "fingerprints": json.dumps({n: prints[n] for n in names})})
        shutil.rmtree(parts)
    barrier()

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
    pos: torch.Tensor  # (N,) position within the clip's own sequence
    docs: Docs  # where each clip's sequence lies
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
    pos = torch.cat([torch.arange(n) for n in lens])
    return Batch(torch.cat([s.features for s in samples]).to(device, non_blocking=True), on(clip), on(frame_at), on(tokens),
                 pos.to(device), Docs.of(lens, device), on(target_at), on(targets))


def stateless(*key):
    """A random generator that is a function of its key (numbers and texts): resuming anywhere draws the same."""
    return np.random.default_rng([zlib.crc32(k.encode()) if isinstance(k, str) else k for k in key])


class Clips:
    """One split of a data set in its common form, as samples for a prompt."""

    def __init__(self, data_dir, dataset, backbone, split, max_frames=0):
        folder = os.path.join(data_dir, dataset)
        path = os.path.join(folder, split + ".jsonl")
        if not os.path.exists(path):
            there = [s for s in SPLITS if os.path.exists(os.path.join(folder, s + ".jsonl"))]
            hint = f"it has {', '.join(there)}: say split=" if there else "make it with python data.py"
            raise BadInput(f"{path}: data set {dataset} has no split {split}; {hint}")
        self.rows = []
        try:
            lines = list(open(path, encoding="utf-8"))
        except UnicodeDecodeError:
            raise BadInput(f"{path}: is not UTF-8") from None
        if not lines:
            raise BadInput(f"{path}: has no clips")
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not all(row[k] and isinstance(row[k], str) for k in ("name", "text")):
                    raise ValueError("empty name or text")
            except (ValueError, KeyError, TypeError) as e:
                raise BadInput(f"{path}:{number}: is not a clip ({e})") from None
            self.rows.append(row)
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
    extractor = Extractor(cfg.backbone, cfg.weights, cfg.device)
    print0(f"backbone {cfg.backbone}: {sum(p.numel() for p in extractor.cnn.parameters()) / 1e6:.1f}M frozen parameters on {extractor.device}")
    splits, dealt = READERS[cfg.reader or (cfg.dataset if cfg.dataset in READERS else "clips")](cfg.root)
    rows = [row for split in SPLITS for row in splits[split]]
    if not dealt and len(rows) >= 20:
        splits = deal_out(rows, cfg.ratio)
        print0(f"no column split in clips.tsv: train, dev, test by ratio={cfg.ratio}")
    elif not dealt:
        print0(f"{len(rows)} clips are too few to hold some out (fewer than 20, no column split in clips.tsv): all go to train")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")
    prepare(cfg.dataset, splits, cfg.data_dir, extractor)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    launch(main)
