"""Rows as int8 codes with a scale each, or reordered: tokens for the products, int8 weights."""

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
    """Choose the block that walks along a row: the whole of it up to 16384 values.

    Such a row is read once and stays in registers, 16 to 32 values a thread; so that short rows
    fill a processor too, one of 576 values takes two warps and 32 of them run side by side.
    """
    block = power_of_two(width, 128, 16384)
    return {"block_k": block, "warps": max(1, min(16, block // 512))}


@triton.jit
def store_ordered(out, value, start, width, ORDER: tl.constexpr, BK: tl.constexpr):
    """Write values k = start.. to their places; ops/_layout.py says what an int4 byte holds."""
    value = value.to(out.dtype.element_ty)
    if ORDER == 0:
        k = start + tl.arange(0, BK)
        tl.store(out + k, value, mask=k < width)
    else:
        if ORDER == 2:  # eights of two fours: value i of each four beside the other's
            value = tl.permute(tl.reshape(value, [BK // 8, 2, 4]), [0, 2, 1])
        low, high = tl.split(tl.reshape(value, [BK // 2, 2]))
        place = start // 2 + tl.arange(0, BK // 2)
        tl.store(out + place, low, mask=place < width // 2)
        tl.store(out + width // 2 + place, high, mask=place < width // 2)


@triton.jit
def row_kernel(
    x, clip, out, scale, width, stride_t, stride_k,
    QUANTIZE: tl.constexpr, HAS_CLIP: tl.constexpr, ORDER: tl.constexpr, ONCE: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Write one row's values at their places; quantized, by its largest magnitude."""
    t = tl.program_id(0).to(tl.int64)
    row, out = x + t * stride_t, out + t * width
    k = tl.arange(0, BK).to(tl.int64)
    value = tl.load(row + k * stride_k, mask=k < width, other=0)
    row_scale = tl.full([1], 1.0, tl.float32)
    if QUANTIZE:
        largest = tl.abs(value.to(tl.float32))
        if not ONCE:
            for start in range(BK, width, BK):
                at = start + k
                more = tl.load(row + at * stride_k, mask=at < width, other=0).to(tl.float32)
                largest = tl.maximum(largest, tl.abs(more))
        absmax = tl.max(largest, 0)
        if HAS_CLIP:
            absmax = absmax * tl.load(clip + t).to(tl.float32)
        row_scale = int8_scale(absmax + tl.zeros([1], tl.float32))
        tl.store(scale + t + tl.arange(0, 1), row_scale)
    if ONCE:
        if QUANTIZE:
            value = int8_codes(value.to(tl.float32), row_scale)
        store_ordered(out, value, 0, width, ORDER, BK)
    else:  # the second pass over a long row comes from the cache
        for start in range(0, width, BK):
            at = start + k
            value = tl.load(row + at * stride_k, mask=at < width, other=0)
            if QUANTIZE:
                value = int8_codes(value.to(tl.float32), row_scale)
            store_ordered(out, value, start, width, ORDER, BK)


def prepare(
    rows: Tensor,
    quantize: bool,
    order: int,
    clip: Tensor | None = None,
    chosen: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return rows [T, K] as the products read them, and the scale [T] of each."""
    tokens, width = rows.shape
    dtype = torch.int8 if quantize else rows.dtype
    out = torch.empty(tokens, width, dtype=dtype, device=rows.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=rows.device)
    if tokens == 0:
        return out, scale
    chosen = chosen or config(width)
    row_kernel[(tokens,)](
        rows, rows if clip is None else clip.contiguous(), out, scale, width, *rows.stride(),
        QUANTIZE=quantize, HAS_CLIP=clip is not None, ORDER=order,
        ONCE=width <= chosen["block_k"], BK=chosen["block_k"], num_warps=chosen["warps"],
    )  # fmt: skip
    return out, scale
