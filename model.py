"""
Full definition of SL-LLaMA, the whole network in one file, in the order in which data flows through it (the paper's Figure 2):
frames -> frozen CNN (GoogLeNet) -> LocalTransformer -> Adaptor -> LLaMA, and SLLaMA, which joins them. Raw weights are read by weights.py.
References:
1) SL-LLaMA, Guo et al. 2026: https://doi.org/10.5755/j01.itc.55.1.40498 ("the paper")
2) LLaMA 2 by Meta: https://github.com/meta-llama/llama/blob/main/llama/model.py (the names of modules and weights)
3) GoogLeNet as torchvision ships it: https://github.com/pytorch/vision/blob/main/torchvision/models/googlenet.py
Names of shapes: B sequences, T their length, N tokens of a packed stream, H heads, D head width, F frames.
"""
import math
import zlib
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from config import BadInput, Progress
from weights import check_names, load_tensors, open_folder

# ---------------------------------------------------------------------------------------------------------------------
# The frozen visual backbones: (F, 3, height, width) -> (F, width of a feature), eq. 1

class RandomCNN(nn.Module):
    """The toy's backbone: three random convolutions, never trained, pooled to a 4x4 grid of 64 channels. (F, 3, h, w) -> (F, 1024)."""

    def __init__(self, seed=0):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, stride=2, padding=2) for i, o in ((3, 32), (32, 64), (64, 64)))
        he_init(self, seed).requires_grad_(False)

    def features(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return F.adaptive_avg_pool2d(x, 4).flatten(1)  # (F, 64, 4, 4) -> (F, 1024)


class ConvBN(nn.Module):
    def __init__(self, i, o, kernel, stride=1):
        super().__init__()
        self.conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, bias=False)
        self.bn = nn.BatchNorm2d(o, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Inception(nn.Module):
    """Four branches side by side: 1x1, 3x3, "5x5" (3x3 in torchvision's weights) and a pooled one, concatenated on channels."""

    def __init__(self, i, c1, c3_in, c3, c5_in, c5, pool):
        super().__init__()
        self.branch1 = ConvBN(i, c1, 1)
        self.branch2 = nn.Sequential(ConvBN(i, c3_in, 1), ConvBN(c3_in, c3, 3))
        self.branch3 = nn.Sequential(ConvBN(i, c5_in, 1), ConvBN(c5_in, c5, 3))
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, 1, 1, ceil_mode=True), ConvBN(i, pool, 1))

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], 1)


class GoogLeNet(nn.Module):
    """Inception-v1, the paper's 1024-d CNN. Always in eval mode, no transform inside: video.Extractor normalises with mean 0.5, deviation 0.5."""

    def __init__(self):
        super().__init__()
        pool = lambda kernel: nn.MaxPool2d(kernel, 2, ceil_mode=True)
        self.conv1, self.maxpool1 = ConvBN(3, 64, 7, 2), pool(3)
        self.conv2, self.conv3, self.maxpool2 = ConvBN(64, 64, 1), ConvBN(64, 192, 3), pool(3)
        self.inception3a = Inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b, self.maxpool3 = Inception(256, 128, 128, 192, 32, 96, 64), pool(3)
        self.inception4a = Inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = Inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = Inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = Inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e, self.maxpool4 = Inception(528, 256, 160, 320, 32, 128, 128), pool(2)
        self.inception5a = Inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = Inception(832, 384, 192, 384, 48, 128, 128)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        return super().train(False)  # BatchNorm must never see a batch: a frame's feature cannot depend on its neighbours

    def features(self, x):
        for module in self.children():  # in the order of __init__
            x = module(x)
        return x.mean((2, 3))  # (F, 1024, 7, 7) -> (F, 1024)

    def load(self, path):
        """Read torchvision's googlenet state dict (.pth or .safetensors); its classifiers (fc, aux1, aux2) are not needed."""
        return load_cnn(self, path, ("fc.", "aux"))


def load_cnn(net, path, heads):
    """Read a CNN's weights from a file, which may also hold classifiers: names that begin like one of `heads`."""
    counter = lambda k: "num_batches" in k  # BatchNorm's: older files lack it, and nobody needs it
    state = {k: v for k, v in load_tensors(path).items() if not k.startswith(heads) and not counter(k)}
    check_names(path, {k: v.shape for k, v in net.state_dict().items() if not counter(k)}, {k: v.shape for k, v in state.items()})
    net.load_state_dict({**net.state_dict(), **state})
    return net


def he_init(net, seed=0):
    """Random weights for a CNN, a function of the seed alone. He: a ReLU halves the variance."""
    for name, p in net.named_parameters():
        p.data = init_weight(name, p.shape, seed) * (2**0.5 if p.dim() > 1 else 1)
    return net

# ---------------------------------------------------------------------------------------------------------------------
# Pieces that the local transformer and LLaMA share

class RMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-5):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # computes in fp32, whatever the model runs in


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rope_table(pos, head_dim, theta=10000.0, scaling=None):
    """pos (...) -> cos, sin (..., 1, D/2) fp32. Made anew each forward: a table kept as a buffer would come back as garbage from the meta device."""
    inv = theta ** (-torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)
    if scaling:  # LLaMA 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended
        turns = scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv = keep * inv + (1 - keep) * inv / scaling["factor"]
    angle = pos[..., None, None].float() * inv  # (..., 1, D/2)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary positions in the rotate-half layout of Hugging Face files; x (B, T, H, D)."""
    cos, sin = rope
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).type_as(x)


def local_attention(q, k, v, window, doc=None):
    """
    Banded attention: frame i sees frame j iff |i-j| <= window//2 and both are of the same clip (section 3.1).
    q, k, v (B, H, T, D), doc (B, T) clip numbers or None -> (B, H, T, D). Blocks of queries meet only the keys
    around them, so time and memory grow with T, not T^2; equal to dense attention with the others masked to -inf.
    """
    B, H, T, D = q.shape
    reach, block = min(window // 2, T), 32
    n, seen = -(-T // block), block + 2 * reach  # number of blocks, keys that a block's queries meet
    tail = n * block - T  # rows that fill the last block
    doc = torch.zeros(B, T, dtype=torch.long, device=q.device) if doc is None else doc
    # blocks become a batch, four dimensions in all: with five, scaled_dot_product_attention has no fused kernel
    q = F.pad(q, (0, 0, 0, tail)) if tail else q
    q = q.unflatten(2, (n, block)).transpose(1, 2).flatten(0, 1)  # (B, H, T, D) -> (B n, H, block, D)
    cut = lambda t: t.unfold(2, seen, block).permute(0, 2, 1, 4, 3).flatten(0, 1)  # (B, H, T', D) -> (B n, H, seen, D)
    zeros = q.new_zeros(B, H, reach + tail, D)  # at both ends; F.pad would write all of its result twice
    k, v = (cut(torch.cat([zeros[:, :, :reach], t, zeros], 2)) for t in (k, v))
    doc_q = F.pad(doc, (0, tail), value=-1).view(B * n, block, 1)  # -1: filling; it sees filling alone, so no row is empty
    doc_k = F.pad(doc, (reach, reach + tail), value=-1).unfold(1, seen, block).reshape(B * n, 1, seen)
    offset = torch.arange(seen, device=q.device) - reach - torch.arange(block, device=q.device)[:, None]  # j - i
    mask = (offset.abs() <= reach) & (doc_q == doc_k)  # (B n, block, seen)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return o.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]  # (B n, H, block, D) -> (B, H, T, D)


def causal_attention(q, k, v, lens=None):
    """
    q (B, T, H, D), k, v (B, T, Hkv, D) -> (B, T, H*D). lens: lengths of the sequences that are packed in a stream (B == 1), or None.
    Each attends to itself alone, in a call of its own: the fused kernel then needs no mask, and there is no filling, whose cost would
    grow with the square of the longest.
    """
    cut = lambda t: [part.transpose(1, 2) for part in t.split(lens or t.shape[1], 1)]  # (B, T, H, D) -> for each sequence (B, H, its length, D)
    o = [F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]) for one in zip(cut(q), cut(k), cut(v))]
    return torch.cat(o, 2).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H*D)


class Cache:
    """
    The KV cache of n clips that are being decoded with several beams each. A prefix (prompt and frames) is computed once per clip
    and shared by its beams; beside it stands what each beam has written since. Prefixes come in parts, packed streams of a few clips
    (lens says how long each is); once all are there, every forward takes one token a beam, h (n, beams, dim), after step was raised.
    """

    def __init__(self, beams, max_new):
        self.beams, self.max_new = beams, max_new
        self.prefix, self.written = defaultdict(list), {}  # attention module -> keys and values, those of the prefixes part by part
        self.step = -1  # index of the token being read, counted from the end of the prefix

    def attend(self, layer, q, k, v, lens=None):
        if lens:
            filling = torch.arange(max(lens)) >= torch.tensor(lens)[:, None]  # the part's prefixes lie side by side here, filled up on the right
            kp, vp = (pad_sequence(t[0].split(lens), batch_first=True) for t in (k, v))  # (1, N, H, D) -> (part, L, H, D)
            kp, vp = kp.permute(0, 2, 3, 1).contiguous(), vp.transpose(1, 2).contiguous()  # (part, H, D, L), (part, H, L, D): as every step multiplies them
            self.prefix[layer].append((kp, vp, filling[:, None, None].to(k.device)))
            return causal_attention(q, k, v, lens)
        if layer not in self.written:
            self.written[layer] = [t.new_empty(len(t), self.beams, t.shape[2], self.max_new, t.shape[3]) for t in (k, v)]  # (n, beams, H, max_new, D)
        for new, written in zip((k, v), self.written[layer]):
            written[:, :, :, self.step] = new
        q = (q / q.shape[-1] ** 0.5).unflatten(2, (k.shape[2], -1)).transpose(1, 2)  # (n, beams, heads, D) -> (n, H, beams, heads per key, D)
        kw, vw = (t[:, :, :, :self.step + 1].transpose(1, 2) for t in self.written[layer])  # (n, H, beams, S, D)
        parts, o = self.prefix[layer], []
        for q, kw, vw, (kp, vp, filling) in zip(*(t.split([len(kp) for kp, _, _ in parts]) for t in (q, kw, vw)), parts):
            old = (q.flatten(2, 3) @ kp).masked_fill_(filling, float("-inf"))  # (part, H, beams * heads per key, L): the beams share the prefix
            new = (q @ kw.mT).flatten(2, 3)  # (part, H, beams * heads per key, S): and have written each their own
            p = torch.cat([old, new], -1).float().softmax(-1).type_as(q)  # one softmax over both
            old, new = p.split([old.shape[-1], new.shape[-1]], -1)
            o.append((old @ vp).view_as(q) + new.unflatten(2, q.shape[2:4]) @ vw)
        return torch.cat(o).transpose(1, 2).flatten(2)  # (n, H, beams, heads per key, D) -> (n, beams, heads * D)

    def reorder(self, source):
        """Beam b of clip i goes on from what its beam source[i, b] has written; the prefix stays where it is."""
        clips = torch.arange(len(source), device=source.device)[:, None]
        for pair in self.written.values():
            for t in pair:
                t[:, :, :, :self.step + 1] = t[:, :, :, :self.step + 1][clips, source]


class Attention(nn.Module):
    """Multi-head attention with rotary positions: causal and grouped-query in LLaMA, banded in the local transformer (window)."""

    def __init__(self, dim, n_heads, n_kv_heads, head_dim, bias=False, window=None):
        super().__init__()
        self.head_dim, self.window = head_dim, window
        self.wq = nn.Linear(dim, n_heads * head_dim, bias=bias)
        self.wk = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.wv = nn.Linear(dim, n_kv_heads * head_dim, bias=bias)
        self.wo = nn.Linear(n_heads * head_dim, dim, bias=False)

    def forward(self, x, rope, doc=None, lens=None, cache=None):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # (B, T, dim) -> (B, T, H, D)
        q, k = rotate(q, rope), rotate(k, rope)
        if self.window is not None:
            o = local_attention(*(t.transpose(1, 2) for t in (q, k, v)), self.window, doc).transpose(1, 2).flatten(2)
        elif cache is not None:
            o = cache.attend(self, q, k, v, lens)
        else:
            o = causal_attention(q, k, v, lens)
        return self.wo(o)


class Block(nn.Module):
    def __init__(self, dim, hidden_dim, attention, eps=1e-5):
        super().__init__()
        self.attention = attention
        self.feed_forward = FeedForward(dim, hidden_dim)
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)

    def forward(self, x, rope, doc=None, lens=None, cache=None, at=None):
        x = x + self.attention(self.attention_norm(x), rope, doc, lens, cache)
        x = x if at is None else x[:, at]  # (B, T, dim) -> (B, len(at), dim)
        return x + self.feed_forward(self.ffn_norm(x))

# ---------------------------------------------------------------------------------------------------------------------
# What learns: local transformer and adaptor

class LocalTransformer(nn.Module):
    """
    The LTN of section 3.1: frame i attends to the frames within +-window//2 of the same clip, eq. 2. (B, T, dim) -> (B, T, dim).
    Depth, heads and positions are ours, the paper is silent: pre-norm blocks as LLaMA's, rotary positions.
    """

    def __init__(self, dim, n_layers, n_heads, window):
        super().__init__()
        if dim % n_heads or dim // n_heads % 2:
            raise BadInput(f"ltn_heads={n_heads}: heads of even width must divide the local transformer's width {dim}")
        head_dim = dim // n_heads
        hidden_dim = 8 * dim // 3  # three matrices of SwiGLU cost what two of width 4*dim would
        self.layers = nn.ModuleList(Block(dim, hidden_dim, Attention(dim, n_heads, n_heads, head_dim, window=window)) for _ in range(n_layers))
        self.norm = RMSNorm(dim)
        self.head_dim = head_dim

    def forward(self, x, doc=None):
        # the band is relative, and so are rotary positions: they may run on over the clips of a stream
        rope = rope_table(torch.arange(x.shape[1], device=x.device)[None], self.head_dim)
        for layer in self.layers:
            x = layer(x, rope, doc)
        return self.norm(x)


class Adaptor(nn.Module):
    """The MM-Adaptor (Table 3). mlp: W2 GELU(W1 x), eq. 3; mlp_noact: W2 W1 x; linear: W1 x. No biases, as in eq. 3."""

    def __init__(self, dim_in, dim_out, kind="mlp"):
        super().__init__()
        if kind not in ("mlp", "mlp_noact", "linear"):
            raise BadInput(f"adaptor={kind}: is none of mlp, mlp_noact, linear")
        self.kind = kind
        self.w1 = nn.Linear(dim_in, dim_out, bias=False)
        self.w2 = nn.Linear(dim_out, dim_out, bias=False) if kind != "linear" else None

    def forward(self, x):
        x = self.w1(x)
        if self.kind == "linear":
            return x
        return self.w2(F.gelu(x) if self.kind == "mlp" else x)

# ---------------------------------------------------------------------------------------------------------------------
# LLaMA

@dataclass
class ModelArgs:
    """Meta's names for the sizes; the last five are what Mistral, Qwen2 and LLaMA 3 add."""
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    hidden_dim: int
    vocab_size: int
    head_dim: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict = None  # LLaMA 3.1's dict, or None
    qkv_bias: bool = False  # Qwen2
    tied: bool = False  # the output layer is the embedding
    sliding_window: int = None  # Mistral 0.1: no sequence may be longer
    model_type: str = "llama"


class LLaMA(nn.Module):
    """LLaMA 2 under Meta's names of weights, but with wq and wk in the rotate-half layout of Hugging Face's files."""

    def __init__(self, args):
        super().__init__()
        self.args = args
        attention = lambda: Attention(args.dim, args.n_heads, args.n_kv_heads, args.head_dim, args.qkv_bias)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args.dim, args.hidden_dim, attention(), args.norm_eps) for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tied else nn.Linear(args.dim, args.vocab_size, bias=False)
        self.activation_checkpointing = False  # recompute a block's inside in the backward pass instead of keeping it

    def forward(self, tokens=None, h=None, lens=None, pos=None, cache=None, at=None):
        """
        tokens (B, T) int64 -> logits (B, T, vocab). Or h (B, T, dim) embeddings instead of tokens. lens: h is a packed stream (1, N, dim) of
        sequences of these lengths, each with its own positions 0, 1, ... at: positions of the stream whose logits are wanted -> (1, len(at), vocab).
        cache: a Cache; forwards with lens read the prefixes, later ones a token a beam, which stand at the positions pos (n, beams).
        """
        h = self.tok_embeddings(tokens) if h is None else h
        if pos is None:
            pos = torch.cat([torch.arange(n, device=h.device) for n in lens or [h.shape[1]]])[None]
            longest = max(lens or [h.shape[1]]) + (cache.max_new if cache else 0)
            if self.args.sliding_window and longest > self.args.sliding_window:
                raise BadInput(f"sliding_window={self.args.sliding_window}: a sequence of {longest} tokens is longer, "
                               "and the window is not implemented")
        rope = rope_table(pos, self.args.head_dim, self.args.rope_theta, self.args.rope_scaling)
        for layer in self.layers:
            run = partial(checkpoint, layer, use_reentrant=False) if self.activation_checkpointing and torch.is_grad_enabled() else layer
            # after the last attention nobody looks at positions without logits any more: its feed-forward leaves them out
            h = run(h, rope, None, lens, cache, at if layer is self.layers[-1] else None)
        h = self.norm(h)
        return F.linear(h, self.tok_embeddings.weight) if self.output is None else self.output(h)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu"):
        """
        A LLaMA with the weights of a folder: Meta's layout (params.json + consolidated.*.pth, any number of shards) or Hugging Face's
        (config.json + *.safetensors; model types llama, mistral, qwen2). BadInput names what is missing, surplus or cannot be run exactly.
        """
        raw = open_llm(path)
        with torch.device("meta"):
            llama = cls(raw.args).to(dtype)
        own = dict(llama.to_empty(device=device).requires_grad_(False).named_parameters())
        check_names(path, {k: p.shape for k, p in own.items()}, raw.shapes)
        for name, weight in raw.tensors():
            fill(own[name], weight)
        return llama.eval()

# ---------------------------------------------------------------------------------------------------------------------
# SL-LLaMA

class SLLaMA(nn.Module):
    """The whole model: features of frames -> LocalTransformer -> Adaptor -> spliced between the prompt's embeddings -> LLaMA."""

    def __init__(self, llm_args, dim_in, cfg):
        super().__init__()
        width = (cfg.ltn_dim or dim_in) if cfg.ltn else dim_in
        # Where the paper is silent: features are standardised with the training set's statistics, so that one learning rate fits all backbones
        self.register_buffer("mean", torch.zeros(dim_in))
        self.register_buffer("std", torch.ones(dim_in))
        # ... and frames enter the LLM at the size of its words: LLaMA-2's embeddings have a deviation of 0.02, not 1
        self.register_buffer("scale", torch.ones(()))
        self.proj = nn.Linear(dim_in, width, bias=False) if width != dim_in else None
        self.ltn = LocalTransformer(width, cfg.ltn_layers, cfg.ltn_heads, cfg.window) if cfg.ltn else None
        self.adaptor = Adaptor(width, llm_args.dim, cfg.adaptor)
        self.llm = LLaMA(llm_args)
        self.prompt = cfg.prompt.replace("{language}", cfg.language)  # holds {clip} where the frames go
        self.label_smoothing = cfg.label_smoothing

    def embed(self, batch):
        """The stream that the LLM reads: embeddings of its tokens, with every clip's frames in their place. -> (1, N, dim)"""
        x = ((batch.features.float() - self.mean) / self.std)[None].to(self.adaptor.w1.weight.dtype)  # (1, F, dim_in)
        x = x if self.proj is None else self.proj(x)
        x = x if self.ltn is None else self.ltn(x, batch.clip[None])
        h = self.llm.tok_embeddings(batch.tokens)  # (N, dim)
        return h.index_copy(0, batch.frame_at, (self.adaptor(x).squeeze(0) * self.scale).type_as(h))[None]

    def forward(self, batch):
        """batch: data.Batch -> (sum of the token losses, number of target tokens); targets are the answer and EOS."""
        logits = self.llm(h=self.embed(batch), lens=batch.lens, at=batch.target_at).squeeze(0)  # (M, vocab)
        smooth = self.label_smoothing if self.training else 0.0
        return F.cross_entropy(logits.float(), batch.targets, reduction="sum", label_smoothing=smooth), batch.targets.numel()

    @torch.no_grad()
    def load(self, raw, device, seed, state=None):
        """
        Give every parameter of a model built on the meta device (and perhaps sharded since) its value: from state (a checkpoint's
        tensors by name), else from the raw LLM, else from the seed. One tensor at a time; nothing is skipped.
        """
        own, state = dict(self.named_parameters()), state or {}
        learnt = {k: p for k, p in own.items() if not k.startswith("llm.") or "lora_" in k}
        check_names(raw.path, {k[4:]: p.shape for k, p in own.items() if k not in learnt}, raw.shapes)
        buffers = dict(self.named_buffers())
        for name, value in state.items():
            have = own.get(name, buffers.get(name))
            if have is None or have.shape != value.shape:
                want = "the model has no such tensor" if have is None else f"the model's is {tuple(have.shape)}"
                raise BadInput(f"checkpoint does not fit: {name} is {tuple(value.shape)}, {want}")
        if state and (missing := sorted(learnt.keys() - state.keys() | buffers.keys() - state.keys())):
            # the LoRA of a stage that only now begins is the one thing that may be new
            if missing := [k for k in missing if "lora_" not in k or any("lora_" in s for s in state)]:
                raise BadInput(f"checkpoint does not fit: it has no {missing[0]} ({len(missing)} missing)")
        self.to_empty(device=device)
        own = dict(self.named_parameters())
        for name, weight in raw.tensors():
            fill(own["llm." + name], weight)
        for name in learnt.keys() | state.keys() & own.keys():
            fill(own[name], state[name] if name in state else init_weight(name, own[name].shape, seed))
        for name, b in self.named_buffers():
            b.copy_(state.get(name, torch.tensor(float(name != "mean"))))
        if not state:
            words = raw.read("tok_embeddings.weight")
            sizes = torch.linalg.vector_norm(words, dim=1, dtype=torch.float32)  # row by row: a copy in fp32 would be half a gigabyte at 7B
            self.scale.fill_((sizes.square().mean() / words.shape[1]).sqrt())

    def vision_state(self):
        """What a checkpoint's vision.safetensors holds, by name: all but the LLM, and the word embeddings where they learn."""
        return {k: v for k, v in [*self.named_parameters(), *self.named_buffers()]
                if not k.startswith("llm.") or (k == "llm.tok_embeddings.weight" and v.requires_grad)}


def init_weight(name, shape, seed):
    """A parameter's first value, a function of (name, shape, seed) alone: the same for any number of processes and any order."""
    if name.endswith("lora_B"):
        return torch.zeros(shape)  # LoRA starts as the identity
    if len(shape) == 1:
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    g = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))  # NOTE the CPU's generator reads 32 bits of a seed and drops the rest
    fan_in = math.prod(shape[1:])
    if name.endswith("lora_A"):
        return (torch.rand(shape, generator=g) * 2 - 1) / fan_in**0.5  # as PEFT: kaiming_uniform(a=sqrt(5))
    return torch.randn(shape, generator=g) / fan_in**0.5


def fill(param, full):
    """Copy a whole tensor into a parameter; one that FSDP2 has sharded takes its own rows (dimension 0, blocks of ceil(rows/world))."""
    local = param.detach()
    if hasattr(param, "to_local"):  # a DTensor; its class would take half a second to import
        local = local.to_local()
        low = -(-full.shape[0] // param.device_mesh.size()) * param.device_mesh.get_local_rank()
        full = full[low:low + local.shape[0]]
    local.copy_(full)


def full(param):
    """The whole tensor of a parameter, on the CPU. Collective where it is sharded: every process must call it."""
    return (param.full_tensor() if hasattr(param, "full_tensor") else param).detach().cpu()

# ---------------------------------------------------------------------------------------------------------------------
# The LLM's raw weights

SIZES = {  # llm=random:NAME
    "7B": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000),  # LLaMA 2, Vicuna 1.5
    "13B": dict(dim=5120, n_layers=40, n_heads=40, n_kv_heads=40, hidden_dim=13824, vocab_size=32000),
    "70B": dict(dim=8192, n_layers=80, n_heads=64, n_kv_heads=8, hidden_dim=28672, vocab_size=32000),
    "vicuna-7b-v1.5": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=32000),
    "mistral-7b-instruct-v0.3": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, hidden_dim=14336, vocab_size=32768, rope_theta=1e6,
                                     model_type="mistral"),
    "qwen2-7b-instruct": dict(dim=3584, n_layers=28, n_heads=28, n_kv_heads=4, hidden_dim=18944, vocab_size=152064, norm_eps=1e-6, rope_theta=1e6,
                              qkv_bias=True, model_type="qwen2"),
    "deepseek-llm-7b-chat": dict(dim=4096, n_layers=30, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=102400, norm_eps=1e-6),
    "chinese-llama-2-7b": dict(dim=4096, n_layers=32, n_heads=32, n_kv_heads=32, hidden_dim=11008, vocab_size=55296),
    "smollm2-135m": dict(dim=576, n_layers=30, n_heads=9, n_kv_heads=3, hidden_dim=1536, vocab_size=49152, rope_theta=1e5, tied=True),
}


@dataclass
class RawLLM:
    """An LLM before it is loaded."""
    path: str
    args: ModelArgs
    shapes: dict  # name -> shape of its weights
    read: Callable  # name -> one whole tensor, read when it is asked for

    def describe(self, dtype):
        """One line: type, sizes, parameters and bytes."""
        a, n = self.args, sum(math.prod(s) for s in self.shapes.values())
        return (f"{self.path}: {a.model_type}, {a.n_layers} layers of width {a.dim}, {a.n_heads} heads ({a.n_kv_heads} of keys) of {a.head_dim}, "
                f"SwiGLU {a.hidden_dim}, {a.vocab_size} tokens; {n / 1e6:.2f}M parameters, {n * dtype.itemsize / 1e9:.3f} GB in "
                + str(dtype).removeprefix("torch."))

    def tensors(self):
        """Yield (name, whole tensor), so that no more than one need be in memory; shows GB/s."""
        done, total, scale, show = 0, sum(math.prod(s) for s in self.shapes.values()), 0.0, None
        for name in self.shapes:
            weight = self.read(name)
            if show is None:
                scale = weight.itemsize / 1e9
                show = Progress(f"loading {self.path}, GB", total * scale)
            yield name, weight
            done += weight.numel()
            show(done * scale, unit="GB")


def open_llm(path):
    """A folder of raw weights as it was downloaded, or random:NAME of SIZES -> RawLLM."""
    if path.startswith("random:"):
        return open_random(path)
    sizes, shapes, read = open_folder(path)
    return RawLLM(path, ModelArgs(**sizes), shapes, read)


def open_random(path):
    """random:7B and its like: the sizes of an LLM with random weights, for trials of speed and memory where there are no real ones."""
    size = path.removeprefix("random:")
    if size not in SIZES:
        raise BadInput(f"llm={path}: the sizes are {', '.join(SIZES)}")
    args = ModelArgs(head_dim=SIZES[size]["dim"] // SIZES[size]["n_heads"], **SIZES[size])
    with torch.device("meta"):
        shapes = {k: tuple(p.shape) for k, p in LLaMA(args).named_parameters()}
    noise = torch.randn(2**22 - 3, generator=torch.Generator().manual_seed(0))  # drawn once, since billions take minutes; a prime: rows differ

    def read(name):
        n = math.prod(shapes[name])
        if len(shapes[name]) == 1:
            return init_weight(name, shapes[name], 0)
        return noise.roll(zlib.crc32(name.encode())).repeat(-(-n // len(noise)))[:n].view(shapes[name]).mul_(shapes[name][1] ** -0.5)

    return RawLLM(path, args, shapes, read)
