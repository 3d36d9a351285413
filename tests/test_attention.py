"""The recorded attention weights, times the values, are what the model's own kernels give."""
import pytest
import torch

from lib.program import BadInput
from model import Attention, RMSNorm, banded, causal_attention, packed_attention, rope_table
from scripts.attention import recorded


def head_norm():
    """Qwen3's norm of queries and keys, as training leaves it: its weights are not ones."""
    norm = RMSNorm(8)
    torch.nn.init.uniform_(norm.weight, 0.2, 5.0)
    return norm


@pytest.mark.parametrize("norm", [torch.nn.Identity, head_norm])
@pytest.mark.parametrize("window, kv", [(None, 4), (None, 2), (8, 4), (-1, 4)])
def test_recorded(window, kv, norm):
    torch.manual_seed(0)
    part, x = Attention(32, 4, kv, 8, norm=norm), torch.randn(1, 50, 32)
    attend = {None: (causal_attention, None), 8: (banded, 8, None), -1: (packed_attention, [50])}[window]
    how = rope_table(torch.arange(50)[None], 8), *attend
    with recorded(torch.nn.ModuleDict({"a": part})) as weights, torch.no_grad():
        got = part(x, *how)
        v = part.wv(x)[0].unflatten(-1, (kv, 8)).repeat_interleave(4 // kv, 1)  # (T, H, D)
        want = part.wo(torch.einsum("hij,jhd->ihd", weights["a"], v).flatten(1))
    assert weights["a"].shape == (4, 50, 50)
    assert torch.allclose(weights["a"].sum(-1), torch.ones(4, 50))
    assert torch.allclose(got[0], want, atol=1e-5)
    part(x, *how)
    assert len(weights) == 1 and not part._forward_pre_hooks  # nothing is left behind


def cached(q, k, v):
    """Neither of the two: what a cache would do."""
    return causal_attention(q, k, v)


@pytest.mark.parametrize("clips, how", [
    (1, (causal_attention, [20, 30])), (1, (packed_attention, [20, 30])),
    (1, (banded, 8, torch.arange(50)[None] // 25)),
    (2, (causal_attention, None)), (2, (banded, 8, None)), (1, (cached,))])
def test_several_clips_are_refused(clips, how):
    part = Attention(32, 4, 4, 8)
    with pytest.raises(BadInput, match="one clip"), recorded(torch.nn.ModuleDict({"a": part})):
        part(torch.randn(clips, 50, 32), rope_table(torch.arange(50)[None], 8), *how)
