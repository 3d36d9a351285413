"""
The linear layer of everything here. What learns lies in float32 and is cast where it is used. What is frozen lies in
the dtype of the arithmetic, or in 8 or 4 bits (llm_bits=).

8 bits: q = round(w / s) with s = max|w| / 127 of the row.
4 bits: NF4 (QLoRA, Dettmers et al. 2023, https://arxiv.org/abs/2305.14314, section 3). The 16 codes are quantiles of a
normal distribution. Of each 64 weights, row after row, max|w| is kept, and of each weight the code nearest to
w / max|w|, two in a byte, as bitsandbytes has them. The maxima lie in 8 bits themselves, of each 256 the largest / 255
as their unit.
"""
import functools
import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from lib.program import BadInput

CODES = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                      -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                      0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                      0.7229568362236023, 1.0], device="cpu")
BLOCK, GROUP = 64, 256  # weights that share a maximum, maxima that share a unit


class Linear(nn.Linear):
    """x (..., dim_in) -> (..., dim_out), in the dtype of x. bits: 16, or 8 or 4 of a weight that is frozen."""

    def __init__(self, dim_in, dim_out, bias=False, bits=16):
        super().__init__(dim_in, dim_out, bias)
        self.bits = bits
        for name, (shape, dtype) in packed_shapes(dim_out, dim_in, bits).items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))

    def forward(self, x):
        if self.bits == 16:
            return F.linear(x, self.weight.to(x.dtype), self.bias)
        y = Product.apply(x, self.weight, self.scale, *([self.block_scale] if self.bits == 4 else []))
        return y if self.bias is None else y + self.bias


class Product(torch.autograd.Function):
    """
    x W^T with a quantised W. F.linear of the dequantised matrix would keep that for the backward pass, and so all that
    was saved; here the backward pass dequantises again.
    """

    @staticmethod
    def forward(ctx, x, *packed):
        ctx.save_for_backward(*packed)
        ctx.width = x.shape[-1]
        return F.linear(x, dequantize(ctx.width, x.dtype, *packed))

    @staticmethod
    def backward(ctx, g):
        packed = ctx.saved_tensors  # once: activation checkpointing unpacks them
        return g @ dequantize(ctx.width, g.dtype, *packed), *(None for _ in packed)


def packed_shapes(rows, width, bits):
    """name -> (shape, dtype) of what stands in the place of a matrix; nothing in 16 bits."""
    n = rows * width
    if bits == 8:
        return {"weight": ((rows, width), torch.int8), "scale": ((rows, 1), torch.float32)}
    if bits == 4:
        return {"weight": ((n // 2,), torch.uint8), "scale": ((math.ceil(n / BLOCK / GROUP),), torch.float32),
                "block_scale": ((n // BLOCK,), torch.uint8)}
    if bits != 16:  # page one has its choices, a checkpoint has not
        raise BadInput(f"llm_bits={bits}: is none of 16, 8, 4")
    return {}


def must_divide(name, w, bits):
    """BadInput names a matrix that is no whole number of blocks."""
    if bits == 4 and w.numel() % BLOCK:
        raise BadInput(f"llm_bits=4: {name} has {len(w)} x {len(w[0])} weights, which does not divide by {BLOCK}")


def nf4(w):
    """A matrix -> the number of each weight's code (n,), max|w| of each block (n / 64,)."""
    blocks = w.float().view(-1, BLOCK)
    largest = blocks.abs().amax(1)
    relative = blocks / largest.clamp_min(1e-30)[:, None]
    between = ((CODES[1:] + CODES[:-1]) / 2).to(w.device)
    return torch.bucketize(relative, between, out_int32=True).to(torch.uint8).flatten(), largest


def quantize(w, bits):
    """A matrix (rows, width) -> its tensors by the names of packed_shapes."""
    if bits == 8:
        scale = w.float().abs().amax(1, keepdim=True) / 127
        return {"weight": (w / scale.clamp_min(1e-30)).round().to(torch.int8), "scale": scale}
    number, largest = nf4(w)
    groups = F.pad(largest, (0, -len(largest) % GROUP)).view(-1, GROUP)
    scale = groups.amax(1) / 255
    units = (groups / scale.clamp_min(1e-30)[:, None]).round().to(torch.uint8)
    return {"weight": number[::2] << 4 | number[1::2], "scale": scale, "block_scale": units.flatten()[:len(largest)]}


@functools.cache
def code_pairs(device, dtype):
    """(256, 2): the codes of the two weights in each byte. Made once, since every product asks for them."""
    codes = CODES.to(device, dtype)
    return torch.stack([codes.repeat_interleave(16), codes.repeat(16)], 1)


def dequantize(width, dtype, weight, scale, block_scale=None):
    """What `quantize` has made of a matrix -> (rows, width) in dtype."""
    if block_scale is None:
        return weight.to(dtype) * scale.to(dtype)
    w = F.embedding(weight.int(), code_pairs(weight.device, dtype)).view(-1, BLOCK)  # (n / 2, 2) -> (n / 64, 64)
    largest = block_scale * scale.repeat_interleave(GROUP)[:len(block_scale)]
    return w.mul_(largest.to(dtype)[:, None]).view(-1, width)
