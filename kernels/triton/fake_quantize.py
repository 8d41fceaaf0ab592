"""fake_quantize: the packers' rounding and back again, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import (
    int4_codes,
    int4_scale,
    int8_codes,
    int8_scale,
    power_of_two,
    rounded_to,
)


def describe(
    x: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None
) -> tuple[int, int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return x.shape[1], group


def candidates(width: int, group: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    Groups: 4096 values, 32 a thread. A whole row: at once up to 8192 values, 16 to 32 a thread,
    so that the second pass over it finds it in the first-level cache.
    """
    if group:
        sizes = ((4096, 4), (2048, 4), (8192, 8), (4096, 8))
        return [{"groups": values // group, "warps": warps} for values, warps in sizes]
    block = power_of_two(width, 128, 8192)
    warps = max(1, min(8, block // 512))
    return [{"block_k": block, "warps": count} for count in dict.fromkeys((warps, 2 * warps, 4))]


def config(width: int, group: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(width, group)[0]


@triton.jit
def rounded(value, low, high, ratio, BITS: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Return the float32 values that the packers would store of groups with these extremes."""
    if BITS == 8:
        scale = int8_scale(tl.maximum(-low, high) * ratio)
        codes = int8_codes(value, scale).to(tl.int32)  # an integer has no negative zero
        return codes.to(tl.float32) * scale
    else:
        scale, zero = int4_scale(low, high, ratio, SYMMETRIC)
        return (int4_codes(value, scale, zero) - zero) * scale


@triton.jit
def group_kernel(
    x, clip, out, groups, groups_per_row, stride_n, stride_k,
    HAS_CLIP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr,
    G: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Round BG consecutive groups of G values."""
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)[:, None]
    inside = g < groups
    k = (g % groups_per_row) * G + tl.arange(0, G)[None, :]
    source = x + (g // groups_per_row) * stride_n + k * stride_k
    value = tl.load(source, mask=inside, other=0).to(tl.float32)
    ratio = tl.full([BG, 1], 1.0, tl.float32)
    if HAS_CLIP:
        ratio = tl.load(clip + g, mask=inside, other=1).to(tl.float32)
    low, high = tl.min(value, 1)[:, None], tl.max(value, 1)[:, None]
    value = rounded_to(rounded(value, low, high, ratio, BITS, SYMMETRIC), out.dtype.element_ty)
    tl.store(out + g * G + tl.arange(0, G)[None, :], value, mask=inside)


@triton.jit
def row_kernel(
    x, clip, out, width, stride_n, stride_k,
    HAS_CLIP: tl.constexpr, BITS: tl.constexpr, SYMMETRIC: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Round one whole row as one group; the second pass over it comes from the cache."""
    n = tl.program_id(0).to(tl.int64)
    row = x + n * stride_n
    first = tl.load(row).to(tl.float32)
    low = tl.full([BK], 0.0, tl.float32) + first
    high = low
    for start in range(0, width, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        value = tl.load(row + k * stride_k, mask=k < width, other=0).to(tl.float32)
        value = tl.where(k < width, value, first)
        low, high = tl.minimum(low, value), tl.maximum(high, value)
    ratio = tl.full([1], 1.0, tl.float32)
    if HAS_CLIP:
        ratio = tl.load(clip + n + tl.arange(0, 1)).to(tl.float32)
    lowest = tl.min(low, 0) + tl.zeros([1], tl.float32)
    highest = tl.max(high, 0) + tl.zeros([1], tl.float32)
    for start in range(0, width, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        value = tl.load(row + k * stride_k, mask=k < width, other=0).to(tl.float32)
        value = rounded(value, lowest, highest, ratio, BITS, SYMMETRIC)
        tl.store(out + n * width + k, rounded_to(value, out.dtype.element_ty), mask=k < width)


def launch(
    x: Tensor,
    bits: int,
    group: int,
    symmetric: bool,
    clip: Tensor | None,
    chosen: dict[str, int] | None = None,
) -> Tensor:
    """Round all groups in one launch."""
    features, width = x.shape
    out = torch.empty(features, width, dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    chosen = chosen or config(width, group)
    ratios = x if clip is None else clip.contiguous()
    if group:
        groups = features * (width // group)
        group_kernel[(triton.cdiv(groups, chosen["groups"]),)](
            x, ratios, out, groups, width // group, x.stride(0), x.stride(1),
            HAS_CLIP=clip is not None, BITS=bits, SYMMETRIC=symmetric,
            G=group, BG=chosen["groups"], num_warps=chosen["warps"],
        )  # fmt: skip
    else:
        row_kernel[(features,)](
            x, ratios, out, width, x.stride(0), x.stride(1),
            HAS_CLIP=clip is not None, BITS=bits, SYMMETRIC=symmetric,
            BK=chosen["block_k"], num_warps=chosen["warps"],
        )  # fmt: skip
    return out
