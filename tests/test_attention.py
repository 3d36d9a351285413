"""The recorded attention weights, times the values, are what the model's own kernels give."""
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
import torch.nn.attention.varlen as varlen

import model
from lib.program import BadInput
from model import (
    Attention,
    RMSNorm,
    attention_by_products,
    banded,
    causal_attention,
    each_to_itself,
    gpu_attention,
    rope_table,
)
from scripts.attention import recorded


def head_norm():
    """Qwen3's norm of queries and keys, as training leaves it: its weights are not ones."""
    norm = RMSNorm(8)
    torch.nn.init.uniform_(norm.weight, 0.2, 5.0)
    return norm


@pytest.mark.parametrize("norm", [torch.nn.Identity, head_norm])
@pytest.mark.parametrize("window, kv", [(None, 4), (None, 2), (8, 4)])
def test_recorded(window, kv, norm):
    torch.manual_seed(0)
    part, x = Attention(32, 4, kv, 8, norm=norm), torch.randn(1, 50, 32)
    check_recorded(part, x, kv, (banded, 8, None) if window else (causal_attention, None))


def test_recorded_of_one_kernel(kernel):
    torch.manual_seed(0)
    part, x = Attention(32, 4, 2, 8), torch.randn(1, 50, 32)
    check_recorded(part, x, 2, (gpu_attention, torch.tensor([0, 50]), 50))


def check_recorded(part, x, kv, attend):
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
    (1, (causal_attention, [20, 30])),
    (1, (banded, 8, torch.arange(50)[None] // 25)),
    (1, (gpu_attention, torch.tensor([0, 20, 50]), 30)),
    (2, (causal_attention, None)), (2, (banded, 8, None)), (1, (cached,))])
def test_several_clips_are_refused(clips, how):
    part = Attention(32, 4, 4, 8)
    with pytest.raises(BadInput, match="one clip"), recorded(torch.nn.ModuleDict({"a": part})):
        part(torch.randn(clips, 50, 32), rope_table(torch.arange(50)[None], 8), *how)

# ---------------------------------------------------------------------------------------------------------------------
# One kernel for all sequences of a stream


def plain(q, k, v, ends_q, ends_k, longest_q, longest_k, *, window_size, enable_gqa):
    """What varlen_attn says that it computes, sequence by sequence: q (N, H, D), k and v (N, Hkv, D) -> (N, H, D)"""
    assert ends_q.dtype == ends_k.dtype and torch.equal(ends_q, ends_k) and enable_gqa == (q.shape[1] != k.shape[1])
    assert longest_q == longest_k == ends_q.diff().max()
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    out = []
    for a, b in zip(ends_q[:-1], ends_q[1:]):
        score = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) / q.shape[2] ** 0.5
        assert window_size == (-1, 0)
        score = score.masked_fill(torch.ones(b - a, b - a, dtype=torch.bool).triu(1), float("-inf"))
        out.append(torch.einsum("hij,jhd->ihd", score.softmax(-1), v[a:b]))
    return torch.cat(out)


@pytest.fixture
def kernel(monkeypatch):
    """The GPU's kernel, as a CPU can compute it."""
    monkeypatch.setattr(varlen, "varlen_attn", plain)


def streams(device, dtype, heads, kv, width):
    lens = [37, 1, 120, 64]
    g = torch.Generator().manual_seed(0)
    make = lambda h: torch.randn(1, sum(lens), h, width, generator=g).to(device, dtype).requires_grad_(True)
    ends = torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=device)
    return lens, ends, [make(heads), make(kv), make(kv)]


@pytest.mark.parametrize("kv", [4, 2])
def test_one_kernel_is_a_call_each(kernel, kv):
    lens, ends, qkv = streams("cpu", torch.float32, 4, kv, 8)
    got, want = gpu_attention(*qkv, ends, max(lens)), causal_attention(*qkv, lens)
    assert got.shape == want.shape and torch.allclose(got, want, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("heads, kv, width", [(32, 32, 128), (8, 4, 32), (9, 3, 64)])
def test_the_kernel_itself(heads, kv, width):
    """Result and gradients in bfloat16 are those of float32, but for rounding."""
    lens, ends, qkv = streams("cuda", torch.bfloat16, heads, kv, width)
    exact = [t.detach().float().requires_grad_(True) for t in qkv]
    got, want = gpu_attention(*qkv, ends, max(lens)), causal_attention(*exact, lens)
    back = torch.randn_like(want)
    pairs = zip((got, *torch.autograd.grad(got, qkv, back.bfloat16())), (want, *torch.autograd.grad(want, exact, back)))
    assert all((a.float() - b).norm() < 0.02 * b.norm() for a, b in pairs)


@pytest.mark.parametrize("B, heads, kv, width", [(1, 4, 4, 8), (1, 6, 2, 10), (3, 4, 2, 16)])
@pytest.mark.parametrize("causal", [True, False])
def test_plain_products_are_the_kernel(B, heads, kv, width, causal):
    """scaled_dot_product_attention and its gradients, in float64."""
    g = torch.Generator().manual_seed(0)
    make = lambda h: torch.randn(B, h, 37, width, generator=g, dtype=torch.float64).requires_grad_(True)
    qkv = make(heads), make(kv), make(kv)
    how = dict(is_causal=causal, enable_gqa=heads != kv)
    got, want = attention_by_products(*qkv, **how), torch.nn.functional.scaled_dot_product_attention(*qkv, **how)
    back = torch.randn_like(want)
    pairs = zip((got, *torch.autograd.grad(got, qkv, back)), (want, *torch.autograd.grad(want, qkv, back)))
    assert all(a.shape == b.shape and torch.allclose(a, b, atol=1e-12) for a, b in pairs)


@pytest.mark.parametrize("dtype, taken", [(torch.bfloat16, True), (torch.float16, True), (torch.float32, False)])
def test_where_plain_products_are_taken(monkeypatch, dtype, taken):
    """In 16 bits on a CPU, for each sequence of a stream; the result is float32's, but for rounding."""
    calls = []

    def counted(*qkv, **how):
        calls.append(qkv[0].shape[2])
        return attention_by_products(*qkv, **how)

    monkeypatch.setattr(model, "attention_by_products", counted)
    lens, _, qkv = streams("cpu", dtype, 4, 2, 16)
    got, want = causal_attention(*qkv, lens), causal_attention(*(t.float() for t in qkv), lens)
    assert got.dtype == dtype and calls == (lens if taken else [])
    assert (got.float() - want).norm() < 0.01 * want.norm()


def test_where_the_kernel_is_taken(monkeypatch):
    """On a GPU in 16 bits; not in float32, nor on an old one, which cannot, nor where sequences lie side by side."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    on = lambda dtype, is_cuda=True: SimpleNamespace(is_cuda=is_cuda, dtype=dtype, device="cpu")
    for dtype in (torch.bfloat16, torch.float16):
        attend, ends, *rest = each_to_itself(on(dtype), [2, 3])
        assert attend is gpu_attention and rest == [3]
        assert ends.tolist() == [0, 2, 5] and ends.dtype == torch.int32
    for x in (on(torch.float32), on(torch.bfloat16, is_cuda=False)):
        assert each_to_itself(x, [2, 3]) == (causal_attention, [2, 3])
    assert each_to_itself(on(torch.bfloat16), None) == (causal_attention, None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert each_to_itself(on(torch.float16), [2, 3]) == (causal_attention, [2, 3])


def test_one_definition_of_who_is_seen(monkeypatch):
    """`reach` changed as README has it: bands look back alone, and so does what is recorded of them."""
    monkeypatch.setattr(model, "reach", lambda window: (window, 0))
    ltn, x = model.LocalTransformer(16, 1, 2, 8).eval(), torch.randn(1, 30, 16, requires_grad=True)
    with recorded(ltn) as weights:
        out = ltn(x, torch.zeros(1, 30, dtype=torch.long))
    out[0, 20].sum().backward()
    seen = x.grad[0].abs().sum(1).nonzero().flatten().tolist()
    assert seen == list(range(12, 21))
    (w,) = weights.values()
    assert (w[:, 20] > 0).all(0).nonzero().flatten().tolist() == seen
