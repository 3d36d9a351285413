"""
Full definition of SL-LLaMA, in the order in which data flows through it (the paper's Figure 2):
features of frames -> LocalTransformer -> Adaptor -> LLaMA, then SLLaMA, which joins them, and `generate`, which writes.
What comes before, the frozen CNN, stands in lib/cnn.py; raw weights of LLMs are read by lib/weights.py.
References:
1) SL-LLaMA, Guo et al. 2026: https://doi.org/10.5755/j01.itc.55.1.40498 ("the paper")
2) LLaMA 2 by Meta: https://github.com/meta-llama/llama/blob/main/llama/model.py (the names of modules and weights)
Names of shapes: B sequences, T their length, N tokens of a packed stream, H heads, D head width, F frames.
"""
import math
from collections import defaultdict
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from lib.linear import Linear, must_divide, quantize
from lib.program import BadInput
from lib.tensors import check_fit, fill, init_weight
from lib.weights import open_llm

# ---------------------------------------------------------------------------------------------------------------------
# Pieces that the local transformer and LLaMA share

class RMSNorm(nn.RMSNorm):
    def forward(self, x):
        # sums in fp32, whatever the dtype
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x)."""

    def __init__(self, dim, hidden_dim, linear=Linear):
        super().__init__()
        self.w1 = linear(dim, hidden_dim)
        self.w2 = linear(hidden_dim, dim)
        self.w3 = linear(dim, hidden_dim)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def rope_table(pos, head_dim, theta=10000.0, scaling=None):
    """
    Positions (...) -> cos and sin (..., 1, D) of rotary embeddings, fp32; scaling: as in ModelArgs.
    Made anew in each forward: a table kept as a buffer would come back as garbage from the meta device.
    """
    inv = theta ** (-torch.arange(0, head_dim, 2, device=pos.device, dtype=torch.float32) / head_dim)
    if scaling and "low_freq_factor" not in scaling:  # linear: all wavelengths are stretched by `factor`
        inv = inv / scaling["factor"]
    elif scaling:  # long ones are stretched, short ones kept, those between blended
        turns = scaling["original_max_position_embeddings"] * inv / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        inv = keep * inv + (1 - keep) * inv / scaling["factor"]
    angle = pos[..., None, None].float() * torch.cat([inv, inv])  # (..., 1, D)
    return angle.cos(), angle.sin()


def rotate(x, rope):
    """Rotary positions in the rotate-half layout of Hugging Face files; x (B, T, H, D) -> the same in fp32."""
    cos, sin = rope
    x = x.float()
    a, b = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([-b, a], -1), sin)  # few kernels: a GPU waits for their start


class Attention(nn.Module):
    """
    Multi-head attention with rotary positions. Who sees whom is handed in, with its further arguments:
    attend(q (B, T, H, D), k and v (B, T, Hkv, D), *how) -> (B, T, H*D).
    """

    def __init__(self, dim, n_heads, n_kv_heads, head_dim, bias=False, linear=Linear, norm=nn.Identity):
        super().__init__()
        self.head_dim = head_dim
        self.wq = linear(dim, n_heads * head_dim, bias)
        self.wk = linear(dim, n_kv_heads * head_dim, bias)
        self.wv = linear(dim, n_kv_heads * head_dim, bias)
        self.wo = linear(n_heads * head_dim, dim)
        self.q_norm, self.k_norm = norm(), norm()  # Qwen3's, over each head

    def forward(self, x, rope, attend, *how):
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))  # -> (B, T, H, D)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        return self.wo(attend(q.type_as(v), k.type_as(v), v, *how))


class Block(nn.Module):
    def __init__(self, dim, attention, feed_forward, eps=1e-5, dropout=0.0):
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm = RMSNorm(dim, eps)
        self.ffn_norm = RMSNorm(dim, eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, rope, wanted, attend, *how):
        """x (B, T, dim) -> (B, T, dim), or (B, len(wanted), dim) where only these positions go further."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rope, attend, *how))
        x = x if wanted is None else x[:, wanted]
        return x + self.dropout(self.feed_forward(self.ffn_norm(x)))


def attention_by_products(q, k, v, is_causal, enable_gqa):
    """F.scaled_dot_product_attention, q (B, H, T, D), where that is slow: bfloat16 on a CPU (docs/speed.md)."""
    T, D = q.shape[2:]
    q = (q / D ** 0.5).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # -> (B, Hkv, heads per key * T, D)
    scores = (q @ k.mT).unflatten(2, (-1, T))  # (B, Hkv, heads per key, T, T)
    scores = scores + scores.new_full((T, T), float("-inf")).triu(1) if is_causal else scores
    return (scores.softmax(-1).flatten(2, 3) @ v).unflatten(2, (-1, T)).flatten(1, 2)


def causal_attention(q, k, v, lens=None):
    """
    q (B, T, H, D), k, v (B, T, Hkv, D) -> (B, T, H*D). lens: lengths of sequences packed in a stream (B == 1), or None.
    Each attends to itself alone, in a call of its own: the fused kernel then needs no mask, and there is no filling,
    whose cost would grow with the square of the longest.
    """
    attend = F.scaled_dot_product_attention if q.is_cuda or q.dtype == torch.float32 else attention_by_products
    cut = lambda t: [part.transpose(1, 2) for part in t.split(lens or t.shape[1], 1)]  # -> (B, H, length, D) each
    o = [attend(*one, is_causal=True, enable_gqa=q.shape[2] != k.shape[2]) for one in zip(cut(q), cut(k), cut(v))]
    return torch.cat(o, 2).transpose(1, 2).flatten(2)  # (B, H, T, D) -> (B, T, H*D)


def gpu_attention(q, k, v, ends, longest):
    """causal_attention in one kernel, for a GPU in 16 bits; ends: 0 and the sums of the lengths so far, on the GPU."""
    from torch.nn.attention.varlen import varlen_attn  # a second of imports, for those who need them
    o = varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest, window_size=(-1, 0),
                    enable_gqa=q.shape[2] != k.shape[2])
    return o.flatten(1)[None]  # (N, H, D) -> (1, N, H*D)


def each_to_itself(x, lens):
    """Who sees whom in a stream x, as Attention takes it: the function, and what it is given beside q, k, v."""
    # Ampere is the first that has the kernel
    if lens and x.is_cuda and x.dtype != torch.float32 and torch.cuda.get_device_capability(x.device) >= (8, 0):
        return gpu_attention, torch.tensor([0, *accumulate(lens)], dtype=torch.int32).to(x.device), max(lens)
    return causal_attention, lens

# ---------------------------------------------------------------------------------------------------------------------
# The local transformer and its band (section 3.1)

def reach(window):
    """How many frames a frame sees before and after itself. The one definition of the band: change it here."""
    return window // 2, window // 2


def sees(i, j, window):
    """Whether frame i sees frame j of its clip, by `reach`; numbers or tensors of them."""
    before, after = reach(window)
    return (i - j <= before) & (j - i <= after)


def local_attention(q, k, v, window, doc=None):
    """
    Banded attention: frame i sees frame j iff sees(i, j, window) and both are of the same clip, eq. 2.
    q, k, v (B, H, T, D), doc (B, T) clip numbers or None -> (B, H, T, D). Blocks of queries meet only the keys around
    them, so time and memory grow with T, not T^2; equal to dense attention with the others masked to -inf.

        queries      |  block of 32  |
        keys     |before|   the same   |after|     -> `seen` of them
    """
    B, H, T, D = q.shape
    block = 32
    before, after = (min(n, T) for n in reach(window))
    n, seen = math.ceil(T / block), before + block + after
    tail = n * block - T  # rows that fill up the last block
    doc = torch.zeros(B, T, dtype=torch.long, device=q.device) if doc is None else doc
    # blocks become a batch, four dimensions in all: with five, scaled_dot_product_attention has no fused kernel
    q = F.pad(q, (0, 0, 0, tail)) if tail else q
    q = q.unflatten(2, (n, block)).transpose(1, 2).flatten(0, 1)  # (B, H, T, D) -> (B n, H, block, D)
    cut = lambda t: t.unfold(2, seen, block).permute(0, 2, 1, 4, 3).flatten(0, 1)  # (B, H, T', D) -> (B n, H, seen, D)
    zeros = q.new_zeros(B, H, max(before, after + tail), D)  # at both ends; F.pad would write all of its result twice
    k, v = (cut(torch.cat([zeros[:, :, :before], t, zeros[:, :, :after + tail]], 2)) for t in (k, v))
    # what fills up is of clip -1: it sees itself alone, so no row is empty
    doc_q = F.pad(doc, (0, tail), value=-1).view(B * n, block, 1)
    doc_k = F.pad(doc, (before, after + tail), value=-1).unfold(1, seen, block).reshape(B * n, 1, seen)
    i = torch.arange(block, device=q.device)[:, None]  # of a query, counted from the block's first
    j = torch.arange(seen, device=q.device) - before
    mask = sees(i, j, window) & (doc_q == doc_k)  # (B n, block, seen)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return o.unflatten(0, (B, n)).transpose(1, 2).flatten(2, 3)[:, :, :T]  # (B n, H, block, D) -> (B, H, T, D)


def banded(q, k, v, window, doc):
    """local_attention as Attention calls it: (B, T, H, D) each -> (B, T, H*D)."""
    return local_attention(*(t.transpose(1, 2) for t in (q, k, v)), window, doc).transpose(1, 2).flatten(2)


class LocalTransformer(nn.Module):
    """
    The LTN of section 3.1: (B, T, dim) -> (B, T, dim), each frame among its neighbours of the same clip.
    Depth, heads and positions are ours, the paper is silent: pre-norm blocks as LLaMA's, rotary positions.
    """

    def __init__(self, dim, n_layers, n_heads, window, dropout=0.0):
        super().__init__()
        if dim % n_heads or dim // n_heads % 2:
            raise BadInput(f"ltn_heads={n_heads}: heads of even width must divide the local transformer's width {dim}")
        self.head_dim, self.window, self.reach = dim // n_heads, window, reach(window)
        hidden_dim = 8 * dim // 3  # three matrices of SwiGLU cost what two of width 4*dim would
        block = lambda: Block(dim, Attention(dim, n_heads, n_heads, self.head_dim), FeedForward(dim, hidden_dim),
                              dropout=dropout)
        self.layers = nn.ModuleList(block() for _ in range(n_layers))
        self.norm = RMSNorm(dim, 1e-5)

    def forward(self, x, doc=None):
        # the band is relative, and so are rotary positions: they may run on over the clips of a stream
        rope = rope_table(torch.arange(x.shape[1], device=x.device)[None], self.head_dim)
        for layer in self.layers:
            x = layer(x, rope, None, banded, self.window, doc)
        return self.norm(x)

# ---------------------------------------------------------------------------------------------------------------------
# The adaptor

ADAPTORS = ("mlp", "mlp_noact", "linear")


class Adaptor(nn.Module):
    """The MM-Adaptor (Table 3). mlp: W2 GELU(W1 x), eq. 3; mlp_noact: W2 W1 x; linear: W1 x. No biases, as in eq. 3."""

    def __init__(self, dim_in, dim_out, kind="mlp"):
        super().__init__()
        if kind not in ADAPTORS:  # page one has its choices, a checkpoint has not
            raise BadInput(f"adaptor={kind}: is none of {', '.join(ADAPTORS)}")
        self.kind = kind
        self.w1 = Linear(dim_in, dim_out)
        self.w2 = Linear(dim_out, dim_out) if kind != "linear" else None

    def forward(self, x):
        x = self.w1(x)
        return x if self.w2 is None else self.w2(F.gelu(x) if self.kind == "mlp" else x)

# ---------------------------------------------------------------------------------------------------------------------
# LLaMA

class LLaMA(nn.Module):
    """LLaMA 2 under Meta's names of weights, but with wq and wk in the rotate-half layout of Hugging Face's files."""

    def __init__(self, args, bits=16, dropout=0.0):
        """bits: of the seven matrices of a block; 8 and 4 are frozen. Embeddings, output and norms stay as they are."""
        super().__init__()
        self.args, self.bits = args, bits
        linear = partial(Linear, bits=bits)
        norm = partial(RMSNorm, args.head_dim, args.norm_eps) if args.qk_norm else nn.Identity
        block = lambda: Block(
            args.dim,
            Attention(args.dim, args.n_heads, args.n_kv_heads, args.head_dim, args.qkv_bias, linear, norm),
            FeedForward(args.dim, args.hidden_dim, linear), args.norm_eps, dropout)
        self.tok_embeddings = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(block() for _ in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.output = None if args.tied else Linear(args.dim, args.vocab_size)
        self.activation_checkpointing = False  # recompute a block's inside in the backward pass instead of keeping it

    def forward(self, tokens=None, h=None, lens=None, pos=None, cache=None, at=None):
        """
        tokens (B, T) int64 -> logits (B, T, vocab); or h (B, T, dim), embeddings instead of tokens.
        lens: h is a packed stream (1, N, dim) of sequences of these lengths, each with its own positions 0, 1, ...
        at: positions of the stream whose logits are wanted -> (1, len(at), vocab).
        cache: forwards with lens read the prefixes, later ones a token a beam, at the positions pos (n, beams).
        """
        # the dtype of the arithmetic is that of what never learns; word embeddings may lie in float32
        h = (self.tok_embeddings(tokens) if h is None else h).to(self.norm.weight.dtype)
        if pos is None:
            sequences = lens or [h.shape[1]]
            self.args.fits(max(sequences) + (cache.max_new if cache else 0))
            pos = torch.cat([torch.arange(n, device=h.device) for n in sequences])[None]
        rope = rope_table(pos, self.args.head_dim, self.args.rope_theta, self.args.rope_scaling)
        inside = each_to_itself(h, lens) if cache is None else None  # the same for all layers
        for i, layer in enumerate(self.layers):
            how = inside  # who sees whom: a function, and what it takes beside q, k and v
            if cache is not None:
                how = (cache.read_prefix, i, lens) if lens else (cache.attend, i)
            # after the last attention nobody looks at positions without logits: its feed-forward leaves them out
            wanted = at if layer is self.layers[-1] else None
            if self.activation_checkpointing and torch.is_grad_enabled():
                layer = partial(checkpoint, layer, use_reentrant=False)
            h = layer(h, rope, wanted, *how)
        h = self.norm(h)
        return F.linear(h, self.tok_embeddings.weight.to(h.dtype)) if self.output is None else self.output(h)

    @torch.no_grad()
    def fill(self, raw):
        """Give every weight its value from raw ones, a tensor at a time; what is to lie in 8 or 4 bits is quantised."""
        own = dict(self.named_parameters())
        for name, weight in raw.tensors():
            if own[name].is_floating_point():
                fill(own[name], weight)
                continue
            must_divide(name, weight, self.bits)
            for part, value in quantize(weight.to(own[name].device), self.bits).items():
                fill(own[name.replace("weight", part)], value)

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32, device="cpu", bits=16):
        """
        A LLaMA with the weights of a folder, frozen: Meta's layout (params.json + consolidated.*.pth, any number of
        shards) or Hugging Face's (config.json + *.safetensors or *.bin; model types llama, mistral, qwen2, qwen3).
        BadInput names what is missing, surplus or cannot be run exactly.
        """
        raw = open_llm(path)
        with torch.device("meta"):
            llama = cls(raw.args, bits).to(dtype)
        llama.to_empty(device=device).requires_grad_(False).fill(raw)
        return llama.eval()

# ---------------------------------------------------------------------------------------------------------------------
# SL-LLaMA

class SLLaMA(nn.Module):
    """The whole model: features -> LocalTransformer -> Adaptor -> spliced between the prompt's embeddings -> LLaMA."""

    def __init__(self, llm_args, dim_in, cfg):
        super().__init__()
        width = (cfg.ltn_dim or dim_in) if cfg.ltn else dim_in
        # Where the paper is silent: features are standardised, so that one learning rate fits all backbones ...
        self.register_buffer("mean", torch.zeros(dim_in))
        self.register_buffer("std", torch.ones(dim_in))
        # ... and frames enter the LLM at the size of its words: LLaMA-2's embeddings have a deviation of 0.02, not 1
        self.register_buffer("scale", torch.ones(()))
        self.proj = Linear(dim_in, width) if width != dim_in else None
        self.ltn = LocalTransformer(width, cfg.ltn_layers, cfg.ltn_heads, cfg.window, cfg.dropout) if cfg.ltn else None
        self.adaptor = Adaptor(width, llm_args.dim, cfg.adaptor)
        self.llm = LLaMA(llm_args, cfg.llm_bits, cfg.llm_dropout)
        self.dropout, self.word_dropout = nn.Dropout(cfg.dropout), nn.Dropout(cfg.llm_dropout)
        self.prompt = cfg.prompt.replace("{language}", cfg.language)  # holds {clip} where the frames go
        self.label_smoothing = cfg.label_smoothing
        self.given = ()  # names of all that a checkpoint has given, see load

    def embed(self, batch):
        """The stream that the LLM reads: embeddings of its tokens, each clip's frames in their place. -> (1, N, dim)"""
        x = ((batch.features.float() - self.mean) / self.std)[None].to(self.llm.norm.weight.dtype)  # (1, F, dim_in)
        x = self.dropout(x if self.proj is None else self.proj(x))
        x = x if self.ltn is None else self.ltn(x, batch.clip[None])
        x = self.dropout(self.adaptor(x).squeeze(0) * self.scale)  # (F, dim)
        h = self.word_dropout(self.llm.tok_embeddings(batch.tokens))  # (N, dim)
        return h.index_copy(0, batch.frame_at, x.type_as(h))[None]

    def forward(self, batch):
        """batch: data.Batch -> (sum of the token losses, number of target tokens); targets are the answer and EOS."""
        logits = self.llm(h=self.embed(batch), lens=batch.lens, at=batch.target_at).squeeze(0)  # (M, vocab)
        smooth = self.label_smoothing if self.training else 0.0
        loss = F.cross_entropy(logits.float(), batch.targets, reduction="sum", label_smoothing=smooth)
        return loss, batch.targets.numel()

    @torch.no_grad()
    def load(self, raw, device, seed, state={}):
        """
        Give every parameter of a model built on the meta device (and perhaps sharded since) its value.
        From state (a checkpoint's tensors by name), else from the raw LLM, else from the seed; nothing is skipped.
        """
        own, buffers = dict(self.named_parameters()), dict(self.named_buffers())
        learnt = [name for name in own if not name.startswith("llm.") or "lora_" in name]
        check_fit(state, own | buffers, needed=[*learnt, *buffers])
        self.to_empty(device=device)
        self.llm.fill(raw)
        own = dict(self.named_parameters())  # to_empty has made new ones
        self.given = state.keys()
        for name in {*learnt} | state.keys() & own.keys():
            fill(own[name], state[name] if name in state else init_weight(name, own[name].shape, seed))
        for name, b in self.named_buffers():
            b.copy_(state.get(name, torch.tensor({"mean": 0.0, "std": 1.0, "scale": 1.0}[name])))
        if not state:
            # the size of a word: row by row, since a copy of all in fp32 would be half a gigabyte at 7B
            words = raw.read("tok_embeddings.weight")
            sizes = torch.linalg.vector_norm(words, dim=1, dtype=torch.float32)
            self.scale.fill_((sizes.square().mean() / words.shape[1]).sqrt())

    def size(self):
        """How many parameters there are, in however many bits they lie."""
        return self.llm.args.size() + sum(p.numel() for name, p in self.named_parameters()
                                          if not name.startswith("llm.") or "lora_" in name)

    def vision_state(self):
        """What a checkpoint's vision.safetensors holds: all but LoRA and what of the LLM is still as it was raw."""
        return {name: v for name, v in [*self.named_parameters(), *self.named_buffers()] if "lora_" not in name
                and (not name.startswith("llm.") or v.requires_grad or name in self.given)}

# ---------------------------------------------------------------------------------------------------------------------
# Decoding

class Cache:
    """
    Keys and values of n clips that are being decoded with several beams each. A prefix (prompt and frames) is computed
    once per clip and shared by its beams; beside it stands what each beam has written since. Prefixes come in parts,
    packed streams of a few clips; once all are there, every forward takes one token a beam, h (n, beams, dim).
    """

    def __init__(self, max_new):
        self.max_new = max_new  # tokens that a beam may write
        self.prefix = defaultdict(list)  # layer -> (keys, values, what is filling) of each part
        self.written = {}  # layer -> keys and values (n, beams, H, step + 1 and room for more, D)
        self.step = -1  # index of the token being read, counted from the end of the prefix

    def read_prefix(self, q, k, v, layer, lens):
        """Causal attention in a packed stream, whose keys and values are kept side by side, filled up on the right."""
        filling = torch.arange(max(lens), device=k.device) >= torch.tensor(lens, device=k.device)[:, None]  # (part, L)
        kp, vp = (pad_sequence(t[0].split(lens), batch_first=True) for t in (k, v))  # (1, N, H, D) -> (part, L, H, D)
        # as every step will multiply them: (part, H, D, L) and (part, H, L, D)
        kp, vp = kp.permute(0, 2, 3, 1).contiguous(), vp.transpose(1, 2).contiguous()
        self.prefix[layer].append((kp, vp, filling[:, None, None]))
        return causal_attention(q, k, v, lens)

    def attend(self, q, k, v, layer):
        """One token a beam: q (n, beams, heads, D), k and v (n, beams, H, D) -> (n, beams, heads*D)."""
        if self.step % 32 == 0:  # room for 32 more: most answers end long before max_new
            have = self.written.get(layer) or [t.new_empty(*t.shape[:3], 0, t.shape[3]) for t in (k, v)]
            self.written[layer] = [F.pad(t, (0, 0, 0, 32)) for t in have]
        for new, written in zip((k, v), self.written[layer]):
            written[:, :, :, self.step] = new
        # (n, beams, heads, D) -> (n, beams, H, heads per key, D)
        q = (q / q.shape[-1] ** 0.5).unflatten(2, (k.shape[2], -1))
        kw, vw = (t[:, :, :, :self.step + 1] for t in self.written[layer])  # (n, beams, H, S, D), where they lie
        sizes = [len(kp) for kp, _, _ in self.prefix[layer]]
        parts = zip(self.prefix[layer], q.split(sizes), (q @ kw.mT).split(sizes))
        old, p = zip(*(self.attend_part(*prefix, *rest) for prefix, *rest in parts))
        return (torch.cat(old) + torch.cat(p) @ vw).flatten(2)

    @staticmethod
    def attend_part(kp, vp, filling, q, new):
        """
        The clips of one part: one softmax over the prefix, which the beams share, and what each beam has written, whose
        scores are new (part, beams, H, heads per key, S). -> what the prefix gives (..., D), and new's probabilities
        """
        flat = lambda t: t.transpose(1, 2).flatten(2, 3)  # -> (part, H, beams * heads per key, ...)
        old = (flat(q) @ kp).masked_fill_(filling, float("-inf"))
        p = torch.cat([old, flat(new)], -1).softmax(-1)
        old, new = p.split([old.shape[-1], new.shape[-1]], -1)
        each = lambda t: t.unflatten(2, (q.shape[1], -1)).transpose(1, 2)  # -> (part, beams, H, heads per key, ...)
        return each(old @ vp), each(new)

    def reorder(self, source):
        """Beam b of clip i goes on from what its beam source[i, b] has written; the prefix stays where it is."""
        clips = torch.arange(len(source), device=source.device)[:, None]
        for pair in self.written.values():
            for t in pair:
                t[:, :, :, :self.step + 1] = t[:, :, :, :self.step + 1][clips, source]


def read_prefixes(llm, streams, cache):
    """
    Fill the cache. streams: packed prefixes of a few sequences each, (h (1, N, dim), their lengths).
    -> logits of what follows each prefix (n, V), lengths of the prefixes (n,)
    """
    logits, lens = [], []
    for h, some in streams:
        last = torch.tensor(some, device=h.device).cumsum(0) - 1  # where each sequence of the part ends
        logits.append(llm(h=h, lens=some, cache=cache, at=last)[0])
        lens += some
    return torch.cat(logits), torch.tensor(lens, device=logits[0].device)


def widen(scores, logits, most):
    """
    The best continuations of each clip's beams. scores (n, beams), logits (n, beams, V)
    -> their scores, the beams they come from, their tokens: (n, most) each, the best first.
    """
    top, token = logits.log_softmax(-1, dtype=torch.float32).topk(min(most, logits.shape[-1]))  # (n, beams, k)
    k = top.shape[-1]
    top, flat = (scores[..., None] + top).flatten(1).topk(min(most, top[0].numel()))
    return top, flat // k, token.flatten(1).gather(1, flat)


class Answers:
    """The best answer of each clip that has ended, and how many have."""

    def __init__(self, n, max_new, device):
        self.score = torch.full((n,), float("-inf"), device=device)
        self.tokens = torch.zeros(n, max_new, dtype=torch.long, device=device)
        self.length = torch.zeros(n, dtype=torch.long, device=device)  # without EOS
        self.closed = torch.zeros(n, dtype=torch.long, device=device)

    def keep_best(self, score, closes, source, tokens, length):
        """
        score, closes, source (n, most): continuations, which of them end an answer, the beams they come from.
        tokens (n, beams, max_new): what the beams have written, `length` tokens each.
        """
        score, which = score.masked_fill(~closes, float("-inf")).max(1)  # (n,)
        rows = torch.arange(len(score), device=score.device)
        better = score > self.score
        self.score = torch.where(better, score, self.score)
        self.length = torch.where(better, length, self.length)
        self.tokens = torch.where(better[:, None], tokens[rows, source[rows, which]], self.tokens)
        self.closed += closes.sum(1)


@torch.inference_mode()
def generate(llm, streams, eos_ids, beam=1, length_penalty=1.0, max_new_tokens=200, watch=None):
    """
    Beam search (beam=1: greedy) over all sequences of the streams together; see read_prefixes for what they are.
    -> for each (token ids without EOS, whether EOS was reached). A hypothesis of len tokens, EOS among them, scores
    sum(log p) / ((5+len)/6)**length_penalty (Wu et al. 2016, eq. 14); a sequence is done once `beam` of its hypotheses
    have ended. Every step is one cached forward of n x beam tokens. watch: called at each with what keep_best is given.
    """
    cache = Cache(max_new_tokens)
    logits, lens = read_prefixes(llm, streams, cache)
    n, device = len(lens), logits.device
    logits = logits[:, None].expand(n, beam, -1)  # (n, beam, V)
    scores = torch.full((n, beam), float("-inf"), device=device)
    scores[:, 0] = 0.0  # the beams are one and the same at first
    tokens = torch.zeros(n, beam, max_new_tokens, dtype=torch.long, device=device)
    answers, eos = Answers(n, max_new_tokens, device), torch.tensor(eos_ids, device=device)
    rows = torch.arange(n, device=device)[:, None]
    # enough continuations that `beam` of them go on, were every EOS of every beam among them
    most = beam * (1 + len(eos_ids))
    for step in range(max_new_tokens):
        # which continuations are the best, and which of them end here
        score, source, token = widen(scores, logits, most)  # (n, most)
        ends = torch.isin(token, eos)
        among = torch.arange(score.shape[1], device=device) < beam
        closes = ends & among & score.isfinite() & (answers.closed < beam)[:, None]
        found = score / ((5 + step + 1) / 6) ** length_penalty, closes, source, tokens, step
        answers.keep_best(*found)
        if watch:
            watch(*found)
        # the best of the others go on
        scores, chosen = score.masked_fill(ends, float("-inf")).topk(beam)
        source, token = source.gather(1, chosen), token.gather(1, chosen)  # (n, beam)
        tokens = tokens[rows, source]
        tokens[:, :, step] = token
        if step + 1 == max_new_tokens or bool((answers.closed >= beam).all()):
            break
        # and the LLM reads their tokens
        if beam > 1:
            cache.reorder(source)
        cache.step = step
        logits = llm(h=llm.tok_embeddings(token), pos=(lens[:, None] + step).expand(n, beam), cache=cache)
    ended = answers.score.isfinite()  # else the clip's best beam as far as it came
    return [(answers.tokens[i, :answers.length[i]].tolist(), True) if ended[i] else (tokens[i, 0].tolist(), False)
            for i in range(n)]
