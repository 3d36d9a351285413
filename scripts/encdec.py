"""
A peer to compare with: a plain encoder-decoder Transformer (torch.nn.Transformer, 6.8M parameters) that learns
from nothing on the same features and sentences. It shows what the features hold without an LLM.

    python -m scripts.encdec dataset=standin backbone=standin tokenizer=weights/standin
    python eval.py hyps=out/standin/encdec/hyps.test.txt refs=out/standin/encdec/refs.test.txt lang=de

Means of 3 frames, frames left out, one span masked, dropout, label smoothing. The epoch that is best on dev is kept;
test is decoded once, at the end. Writes to/{log.jsonl,hyps.SPLIT.txt,refs.SPLIT.txt}.
"""
import json
import math
import os
import time
import warnings

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import Clips
from lib.configurator import configure
from lib.program import BadInput, Progress, launch, pick_device
from lib.readers import SPLITS
from lib.scores import bleu, language_code, rouge
from lib.tensors import stateless
from lib.tokenizer import Tokenizer
from train import learning_rate

dataset = "standin"  # folder in data_dir
data_dir = "data"  # holds the data sets
backbone = "standin"  # label of the features
tokenizer = "weights/standin"  # folder of the LLM whose pieces it writes
to = "out/standin/encdec"  # folder to write
language = "German"  # picks BLEU's tokens
max_clips = 0  # of train, spread over the set; 0 = all
max_frames = 0  # longer clips are thinned out evenly to so many, 0 = no limit
epochs = 16  # the learning rate falls with them, as train.py's
seed = 1337
merge = 3  # frames whose mean is one token
dim = 256  # width
heads = 8
layers = 3  # of the encoder, and of the decoder
dropout = 0.2
label_smoothing = 0.1
frame_drop = 0.1  # share of the tokens left out
mask = 0.125  # largest share of a clip's tokens that is blanked, in one place
batch_size = 32  # clips
lr = 1e-3  # peak, after `warmup` steps
warmup = 300
weight_decay = 1e-3  # of AdamW
beam = 4  # width of the last decoding; dev is scored greedily on the way
max_new_tokens = 60
device = "auto"  # auto, cpu, cuda

LONGEST = 2048  # tokens of a clip or a sentence

# ---------------------------------------------------------------------------------------------------------------------
# The network

def angles(length, dim):
    """Sinusoidal positions (length, dim), Vaswani et al. 2017."""
    at = torch.arange(length)[:, None] * 10000 ** (-torch.arange(0, dim, 2) / dim)
    return torch.stack([at.sin(), at.cos()], -1).flatten(1)


class EncoderDecoder(nn.Module):
    def __init__(self, width, vocab, cfg):
        """width: of a feature; vocab: pieces."""
        super().__init__()
        self.proj, self.norm, self.dropout = nn.Linear(width, cfg.dim), nn.LayerNorm(cfg.dim), nn.Dropout(cfg.dropout)
        self.words = nn.Embedding(vocab, cfg.dim)
        nn.init.normal_(self.words.weight, 0, cfg.dim ** -0.5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # norm_first does without nested tensors
            self.transformer = nn.Transformer(cfg.dim, cfg.heads, cfg.layers, cfg.layers, 4 * cfg.dim, cfg.dropout,
                                              batch_first=True, norm_first=True)
        self.output = nn.Linear(cfg.dim, vocab)
        self.register_buffer("positions", angles(LONGEST, cfg.dim))

    def encode(self, x, filling):
        """x (B, T, width), filling (B, T) -> (B, T, dim)"""
        x = self.dropout(self.norm(self.proj(x)) + self.positions[:x.shape[1]])
        return self.transformer.encoder(x, src_key_padding_mask=filling)

    def decode(self, memory, filling, y):
        """y (B, L) tokens so far -> logits of the next (B, L, vocab)"""
        h = self.words(y) * self.words.embedding_dim ** 0.5 + self.positions[:y.shape[1]]
        ahead = torch.ones(y.shape[1], y.shape[1], dtype=torch.bool, device=y.device).triu(1)
        h = self.transformer.decoder(self.dropout(h), memory, tgt_mask=ahead, memory_key_padding_mask=filling)
        return self.output(h)

# ---------------------------------------------------------------------------------------------------------------------
# Its data

class Split:
    """A split in memory: standardised features and sentences."""

    def __init__(self, clips, mean, std):
        self.x = [((clips.features(i).float() - mean) / std).half() for i in range(len(clips))]
        self.texts = [row["text"] for row in clips.rows]

    def batches(self, rng, size):
        """An epoch's batches: clips of like length together, to save filling, and the batches in any order."""
        order = rng.permutation(len(self.x))
        pools = [sorted(order[a:a + 20 * size], key=lambda i: len(self.x[i])) for a in range(0, len(order), 20 * size)]
        batches = [pool[b:b + size] for pool in pools for b in range(0, len(pool), size)]
        return [batches[i] for i in rng.permutation(len(batches))]


def first_token(tokenizer):
    """What the decoder reads before a sentence: BOS, or EOS where the tokenizer has none (Qwen's)."""
    return tokenizer.bos_id if tokenizer.bos_id >= 0 else tokenizer.eos_id


def three_splits(train):
    """train -> name -> Clips of it, dev and test. BadInput where one is missing or has a clip that is too long."""
    clips = {s: train if s == "train" else train.beside(s) for s in SPLITS}
    for split, found in clips.items():
        if not found:
            raise BadInput(f"{train.path}: has no {split} beside it, and this needs {', '.join(SPLITS)}")
        if max(found.lengths) > LONGEST:
            raise BadInput(f"{found.path}: its longest clip has {max(found.lengths)} tokens, there is room for "
                           f"{LONGEST}; what lowers it: merge=, max_frames=")
    return clips


def disturbed(x, cfg, rng):
    """(T, width) with tokens left out and one span of zeros, which are the features' mean."""
    keep = torch.from_numpy(rng.random(len(x)) >= cfg.frame_drop)
    x = x[keep] if keep.any() else x[:1]
    n = int(rng.integers(0, int(len(x) * cfg.mask) + 1))
    at = int(rng.integers(0, len(x) - n + 1))
    return x.index_fill(0, torch.arange(at, at + n), 0.0)


def filled(clips, device="cpu"):
    """[(T, width)] -> (B, T, width), and what is filling (B, T)"""
    x = pad_sequence([t.float() for t in clips], batch_first=True)
    filling = torch.arange(x.shape[1]) >= torch.tensor([len(t) for t in clips])[:, None]
    return x.to(device), filling.to(device)

# ---------------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def translate(net, clips, tokenizer, beam, longest):
    """Beam search, the plain way: every step reads all that is written. Length penalty as model.generate's."""
    net.eval()
    device = net.positions.device
    out, order = [None] * len(clips), sorted(range(len(clips)), key=lambda i: len(clips[i]))
    progress = Progress(f"decoding, beam {beam}", len(order))
    for start in range(0, len(order), 32):
        some = order[start:start + 32]
        n, rows = len(some), torch.arange(len(some), device=device)[:, None]
        x, filling = filled([clips[i] for i in some], device)
        memory, filling = net.encode(x, filling).repeat_interleave(beam, 0), filling.repeat_interleave(beam, 0)
        y = torch.full((n * beam, 1), first_token(tokenizer), device=device)
        scores = torch.full((n, beam), float("-inf"), device=device)
        scores[:, 0] = 0.0  # the beams are one and the same at first
        ended = torch.zeros(n * beam, dtype=torch.bool, device=device)
        for _ in range(longest):
            p = net.decode(memory, filling, y)[:, -1].log_softmax(-1)
            p[ended] = float("-inf")
            p[ended, tokenizer.eos_id] = 0.0  # what has ended goes on as it is
            scores, flat = (scores[..., None] + p.view(n, beam, -1)).flatten(1).topk(beam)
            source, token = (flat // p.shape[-1] + rows * beam).flatten(), (flat % p.shape[-1]).flatten()
            y, ended = torch.cat([y[source], token[:, None]], 1), ended[source] | (token == tokenizer.eos_id)
            if ended.all():
                break
        written = y[:, 1:].view(n, beam, -1)
        length = (written == tokenizer.eos_id).cumsum(2).eq(0).sum(2) + 1  # EOS is among them
        best = (scores / ((5 + length) / 6)).argmax(1)
        for k, i in enumerate(some):
            out[i] = tokenizer.decode(written[k, best[k], :length[k, best[k]] - 1].tolist()).strip()
        progress(start + n)
    net.train()
    return out


def main():
    cfg = configure(__file__, positive=("merge", "dim", "heads", "layers", "batch_size", "beam", "epochs"),
                    shares=("dropout", "label_smoothing", "frame_drop", "mask"))
    pieces, lang, rng = Tokenizer(cfg.tokenizer), language_code(cfg.language, ""), stateless(cfg.seed, "encdec")
    train = Clips(cfg, "train", cfg.max_clips)
    print(train.describe())
    mean, std = train.statistics()
    splits = {s: Split(clips, mean, std) for s, clips in three_splits(train).items()}
    answers = [[first_token(pieces), *pieces.encode(t), pieces.eos_id] for t in splits["train"].texts]
    torch.manual_seed(cfg.seed)
    device = pick_device(cfg.device)[0]
    net = EncoderDecoder(train.width, pieces.vocab_size, cfg).to(device)
    print(f"{sum(p.numel() for p in net.parameters()) / 1e6:.2f}M parameters, all of which learn", flush=True)
    optimizer = torch.optim.AdamW(net.parameters(), betas=(0.9, 0.998), weight_decay=cfg.weight_decay, fused=True)
    total = cfg.epochs * math.ceil(len(train) / cfg.batch_size)
    step, best, kept, minutes = 0, -1.0, None, 0.0
    os.makedirs(cfg.to, exist_ok=True)
    with open(f"{cfg.to}/log.jsonl", "w", buffering=1) as log:
        for epoch in range(1, cfg.epochs + 1):
            began, losses = time.time(), []
            for some in splits["train"].batches(rng, cfg.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, total, cfg)
                x, filling = filled([disturbed(splits["train"].x[i], cfg, rng) for i in some], device)
                y = pad_sequence([torch.tensor(answers[i]) for i in some], batch_first=True, padding_value=-100)
                y = y.to(device)
                with torch.autocast(device.type, torch.bfloat16):
                    logits = net.decode(net.encode(x, filling), filling, y[:, :-1].clamp_min(0))
                loss = F.cross_entropy(logits.float().flatten(0, 1), y[:, 1:].flatten(), ignore_index=-100,
                                       label_smoothing=cfg.label_smoothing)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
                step += 1
            minutes += (time.time() - began) / 60
            score = bleu(translate(net, splits["dev"].x, pieces, 1, cfg.max_new_tokens), splits["dev"].texts, lang)
            if score[3] > best:
                best, kept = score[3], {k: v.clone() for k, v in net.state_dict().items()}
            entry = {"step": step, "epoch": epoch, "minutes": round(minutes, 2), "loss": sum(losses) / len(losses),
                     "dev_bleu": score}
            print(f"epoch {epoch}/{cfg.epochs} loss {entry['loss']:.4f} dev BLEU-4 {score[3]:.2f}, "
                  f"{minutes:.1f} min of training", flush=True)
            log.write(json.dumps(entry) + "\n")
    net.load_state_dict(kept)
    for split in ("dev", "test"):
        hyps, refs = translate(net, splits[split].x, pieces, cfg.beam, cfg.max_new_tokens), splits[split].texts
        scores = " ".join(f"{b:.2f}" for b in bleu(hyps, refs, lang))
        print(f"{split}, beam {cfg.beam}: BLEU-1..4 {scores} ROUGE {rouge(hyps, refs, lang):.2f}", flush=True)
        for name, lines in (("hyps", hyps), ("refs", refs)):
            with open(f"{cfg.to}/{name}.{split}.txt", "w", encoding="utf-8") as f:
                f.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    launch(main)
