"""Activations as the quantized products read them: in int8 with a scale a token, or reordered."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import int8_codes, int8_scale, power_of_two

# Where value k of a token goes. An int4 byte holds two values of k; their activations stand in two
# halves of K/2, so that a tile of low nibbles meets a tile of consecutive activations.
PLAIN, PAIRS, PANELS = 0, 1, 2
ORDERS = {"canonical": PAIRS, "cpu": PANELS}


def config(width: int) -> dict[str, int]:
    """Choose the block that walks along a token: the whole of it up to 4096 values."""
    block = power_of_two(width, 128, 4096)
    return {"block_k": block, "warps": max(1, min(8, block // 512))}


@triton.jit
def place_of(k, width, ORDER: tl.constexpr):
    """Return the place of value k: ops/_layout.py says which two values an int4 byte holds."""
    if ORDER == 1:
        return (k % 2) * (width // 2) + k // 2
    elif ORDER == 2:
        return (k % 8 // 4) * (width // 2) + k // 8 * 4 + k % 4
    else:
        return k


@triton.jit
def token_kernel(
    x, out, scale, width, stride_t, stride_k,
    QUANTIZE: tl.constexpr, ORDER: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Write one token's values at their places; quantized, by its largest magnitude."""
    t = tl.program_id(0).to(tl.int64)
    row = x + t * stride_t
    token_scale = tl.full([1], 1.0, tl.float32)
    if QUANTIZE:
        largest = tl.zeros([BK], tl.float32)
        for start in range(0, width, BK):
            k = (start + tl.arange(0, BK)).to(tl.int64)
            value = tl.load(row + k * stride_k, mask=k < width, other=0).to(tl.float32)
            largest = tl.maximum(largest, tl.abs(value))
        token_scale = int8_scale(tl.max(largest, 0) + tl.zeros([1], tl.float32))
        tl.store(scale + t + tl.arange(0, 1), token_scale)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        value = tl.load(row + k.to(tl.int64) * stride_k, mask=k < width, other=0)
        if QUANTIZE:
            value = int8_codes(value.to(tl.float32), token_scale)
        value = value.to(out.dtype.element_ty)
        tl.store(out + t * width + place_of(k, width, ORDER), value, mask=k < width)


def prepare(rows: Tensor, quantize: bool, order: int) -> tuple[Tensor, Tensor]:
    """Return rows [T, K] as the products read them, and the scale [T] of each token."""
    tokens, width = rows.shape
    dtype = torch.int8 if quantize else rows.dtype
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    chosen = config(width)
    token_kernel[(tokens,)](
        rows, out, scale, width, rows.stride(0), rows.stride(1),
        QUANTIZE=quantize, ORDER=order, BK=chosen["block_k"], num_warps=chosen["warps"],
    )  # fmt: skip
    return out, scale
