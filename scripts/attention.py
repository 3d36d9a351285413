"""
Who looks at whom: the attention weights of a model, which its fused kernels never write down, computed beside them.

    with recorded(sllama) as weights:
        sllama(batch)  # or any other forward without a cache, of one clip
    weights["llm.layers.0.attention"]  # (H, T, T): row i says how the heads spread position i's look over all positions
"""
import contextlib

import torch

from lib.program import BadInput
from model import Attention, banded, causal_attention, gpu_attention, rotate, sees


@contextlib.contextmanager
def recorded(module):
    """
    Name of an Attention in module -> its weights (H, T, T) fp32 of the forward that is run inside.
    B must be 1, and a packed stream one document.
    """
    weights = {}

    @torch.no_grad()
    def record(name, part, x, rope, attend, *how):
        window, clips = None, None  # no band, and nobody knows
        if attend is banded:
            window, doc = how
            clips = 1 if doc is None else len(doc.unique())
        elif attend is gpu_attention:
            clips = len(how[0]) - 1
        elif attend is causal_attention:
            clips = len(how[0] or [0])
        if len(x) != 1 or clips != 1:
            raise BadInput("recorded: the attention of one clip at a time, and without a cache")
        # (1, T, dim) -> (T, H, D)
        q, k = (rotate(norm(w(x).unflatten(-1, (-1, part.head_dim))), rope)[0].float()
                for w, norm in ((part.wq, part.q_norm), (part.wk, part.k_norm)))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)  # grouped queries share their key
        score = torch.einsum("ihd,jhd->hij", q, k) / part.head_dim**0.5
        i = torch.arange(len(q), device=q.device)
        seen = i[:, None] >= i if window is None else sees(i[:, None], i, window)
        weights[name] = score.masked_fill(~seen, float("-inf")).softmax(-1)

    hooks = [part.register_forward_pre_hook(lambda part, args, name=name: record(name, part, *args))
             for name, part in module.named_modules() if isinstance(part, Attention)]
    try:
        yield weights
    finally:
        for hook in hooks:
            hook.remove()
