"""The recorded attention weights, times the values, are what the model's own kernels give."""
import pytest
import torch

from config import BadInput
from model import Attention, rope_table
from scripts.attention import recorded


@pytest.mark.parametrize("window, kv", [(None, 4), (None, 2), (8, 4)])
def test_recorded(window, kv):
    torch.manual_seed(0)
    part, x = Attention(32, 4, kv, 8, window=window), torch.randn(1, 50, 32)
    with recorded(torch.nn.ModuleDict({"a": part})) as weights, torch.no_grad():
        got = part(x, rope_table(torch.arange(50)[None], 8))
        v = part.wv(x)[0].unflatten(-1, (kv, 8)).repeat_interleave(4 // kv, 1)  # (T, H, D)
        want = part.wo(torch.einsum("hij,jhd->ihd", weights["a"], v).flatten(1))
    assert weights["a"].shape == (4, 50, 50)
    assert torch.allclose(weights["a"].sum(-1), torch.ones(4, 50))
    assert torch.allclose(got[0], want, atol=1e-5)
    part(x, rope_table(torch.arange(50)[None], 8))
    assert len(weights) == 1 and not part._forward_pre_hooks  # nothing is left behind


@pytest.mark.parametrize("window, doc, lens", [(None, None, [20, 30]), (8, torch.arange(50)[None] // 25, None)])
def test_several_clips_are_refused(window, doc, lens):
    part = Attention(32, 4, 4, 8, window=window)
    with pytest.raises(BadInput, match="one clip"), recorded(torch.nn.ModuleDict({"a": part})):
        part(torch.randn(1, 50, 32), rope_table(torch.arange(50)[None], 8), doc, lens)
