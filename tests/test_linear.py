"""
lib/linear.py: 8 and 4 bits against bitsandbytes and torchao, and what learns through them.

    python -m pytest tests/test_linear.py
"""
import itertools

import pytest
import torch
import torch.nn.functional as F
from test_model import hf_folder

from lib.linear import BLOCK, CODES, Linear, dequantize, nf4, packed_shapes, quantize
from lib.program import BadInput
from lora import apply_lora, merge_lora
from model import LLaMA

W = torch.randn(48, 192, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 48)[:, None]
W[3], W[4, :64] = 0, 0  # an empty row, an empty block


def filled(bits, w=W, bias=None):
    """A frozen Linear of a matrix."""
    layer = Linear(w.shape[1], w.shape[0], bias is not None, bits)
    layer.requires_grad_(False)
    for name, value in (quantize(w, bits) if bits < 16 else {"weight": w}).items():
        getattr(layer, name).copy_(value)
    if bias is not None:
        layer.bias.copy_(bias)
    return layer


def test_8_bits_by_hand():
    w = torch.tensor([[1.27, -0.635, 0.0, 0.004], [0.0, 0.0, 0.0, 0.0], [-254.0, 1.1, 127.0, 0.9]])
    packed = quantize(w, 8)
    assert packed["weight"].tolist() == [[127, -64, 0, 0], [0, 0, 0, 0], [-127, 1, 64, 0]]
    assert packed["scale"].flatten().tolist() == pytest.approx([0.01, 0.0, 2.0])
    w8 = dequantize(4, torch.float32, **packed)
    assert w8.allclose(torch.tensor([[1.27, -0.64, 0, 0], [0.0] * 4, [-254, 2, 128, 0]]))


def test_4_bits_by_hand():
    """The first of a block is its largest; codes 15, 0, 7 and 11 of it; a row's largest maximum is kept exactly."""
    w = torch.zeros(1, 2 * BLOCK)
    w[0, :4], w[0, BLOCK:BLOCK + 2] = torch.tensor([2.55, -2.5, 0.01, 0.85]), torch.tensor([-0.1, 0.05])
    packed = quantize(w, 4)
    assert packed["weight"][:2].tolist() == [0xF0, 0x7B] and packed["weight"][32] == 0x0C
    assert packed["block_scale"].tolist() == [255, 10] and packed["scale"].item() == pytest.approx(0.01)
    w4 = dequantize(w.shape[1], torch.float32, **packed)[0]
    assert w4[:4].tolist() == pytest.approx([2.55, -2.55, 0, 2.55 * CODES[11].item()])
    assert w4[BLOCK:BLOCK + 3].tolist() == pytest.approx([-0.1, 0.1 * CODES[12].item(), 0])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_lost(bits):
    """The relative error of normal weights, and bytes a weight."""
    w = torch.randn(64, 4096, generator=torch.Generator().manual_seed(1))
    packed = quantize(w, bits)
    lost = (dequantize(w.shape[1], torch.float32, **packed) - w).norm() / w.norm()
    assert lost < {8: 0.0095, 4: 0.097}[bits]
    assert sum(t.nbytes for t in packed.values()) / w.numel() <= {8: 1.01, 4: 0.52}[bits]
    assert {k: (tuple(t.shape), t.dtype) for k, t in packed.items()} == packed_shapes(*w.shape, bits)


def test_nf4_is_that_of_bitsandbytes():
    bnb = pytest.importorskip("bitsandbytes.functional", exc_type=Exception)
    packed, state = bnb.quantize_4bit(W, blocksize=BLOCK, quant_type="nf4", compress_statistics=False)
    index, largest = nf4(W)
    whole = largest.repeat_interleave(BLOCK)  # of an empty block every code is right
    theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()
    assert theirs[whole > 0].equal(index[whole > 0]) and state.absmax.equal(largest)
    ours = (CODES[index.int()] * whole).view(W.shape)
    assert (ours - bnb.dequantize_4bit(packed, state)).abs().max() <= 1e-6
    assert quantize(W, 4)["weight"][whole[::2] > 0].equal(packed.flatten()[whole[::2] > 0])


@pytest.mark.parametrize("bits, dtype, biased",
                         [*itertools.product([8, 4], [torch.float32, torch.bfloat16], [False, True])])
def test_forward_and_backward_are_those_of_the_dequantised_matrix(bits, dtype, biased):
    bias = torch.randn(48, dtype=dtype) if biased else None
    layer = filled(bits, bias=bias).to(dtype)
    whole = dequantize(192, dtype, *(getattr(layer, n) for n in packed_shapes(1, BLOCK, bits)))
    x = torch.randn(2, 5, 192, dtype=dtype, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    want = F.linear(y, whole) + (bias if biased else 0)
    want.square().sum().backward()
    layer(x).square().sum().backward()
    assert layer(x).equal(want) and (x.grad - y.grad).abs().max() <= 1e-6 * y.grad.abs().max()


@pytest.mark.parametrize("bits", [8, 4])
def test_lora_learns_through_it(bits):
    """Its gradients are those through the same layer dequantised once and frozen; the matrix keeps nothing for them."""
    saved = []
    for layer in (filled(bits), filled(16, dequantize(192, torch.float32, **quantize(W, bits)))):
        holder = torch.nn.Module()
        holder.layers = torch.nn.ModuleList([torch.nn.Module()])
        holder.layers[0].attention, holder.layers[0].feed_forward = torch.nn.Module(), torch.nn.Module()
        holder.layers[0].attention.wq = layer
        torch.manual_seed(0)
        apply_lora(holder, 3, 6, ["wq"])
        lora = holder.layers[0].attention.wq
        torch.nn.init.normal_(lora.lora_B, generator=torch.Generator().manual_seed(1))
        assert {n for n, p in lora.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
        x = torch.randn(7, 192, generator=torch.Generator().manual_seed(2), requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            out = lora(x)
        assert bits == 16 or not any(t.is_floating_point() and t.shape == W.shape for t in kept[:3])
        out.square().sum().backward()
        saved.append([out.detach(), x.grad, lora.lora_A.grad, lora.lora_B.grad])
    for ours, theirs in zip(*saved):
        assert (ours - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    with pytest.raises(BadInput, match="llm_bits"):
        holder.layers[0].attention.wq = filled(bits)
        merge_lora(apply_lora(holder, 3, 6, ["wq"]))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_llama_is_quantised_while_it_is_read(tmp_path, bits):
    """Its seven matrices a block, tensor by tensor; embeddings, output and norms stay as they are."""
    hf_folder(tmp_path, hidden_size=64, intermediate_size=128)
    plain, small = (LLaMA.from_pretrained(str(tmp_path), bits=b) for b in (16, bits))
    for name, w in plain.state_dict().items():
        own = small.state_dict()
        if name.split(".")[-2] in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
            packed = {part: own[name.replace("weight", part)] for part in packed_shapes(1, BLOCK, bits)}
            whole = [dequantize(w.shape[1], torch.float32, **tensors) for tensors in (packed, quantize(w, bits))]
            assert whole[0].equal(whole[1])
        else:
            assert own[name].equal(w)
    tokens = torch.tensor([[1, 7, 9, 30, 2]])
    a, b = plain(tokens), small(tokens)
    assert 0 < (a - b).abs().max() < {8: 0.05, 4: 0.6}[bits] * a.abs().max()


def test_a_matrix_that_is_no_whole_number_of_blocks_is_named(tmp_path):
    hf_folder(tmp_path, hidden_size=36, head_dim=8, intermediate_size=50)
    with pytest.raises(BadInput, match=r"layers.0.feed_forward.w\d.weight has \d+ x \d+ weights, .* divide by 64"):
        LLaMA.from_pretrained(str(tmp_path), bits=4)
    with pytest.raises(BadInput, match="llm_bits=5: is none of 16, 8, 4"):
        LLaMA.from_pretrained(str(tmp_path), bits=5)
