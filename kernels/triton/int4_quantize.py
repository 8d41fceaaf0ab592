"""int4_quantize: a tile of whole groups in registers; one read, codes packed two to a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import int4_codes, int4_scale


def describe(weight: Tensor, group: int, symmetric: bool, clip: Tensor | None) -> tuple[int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return (group,)


def candidates(group: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    4096 values are 32 a thread: two to four loads of 16 bytes on their way at once.
    """
    return [
        {"groups": values // group, "warps": warps}
        for values, warps in ((4096, 4), (2048, 4), (8192, 8), (4096, 8))
    ]


def config(group: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(group)[0]


@triton.jit
def group_kernel(
    weight, clip, data, scale, zero, groups, groups_per_row, stride_n, stride_k,
    HAS_CLIP: tl.constexpr, SYMMETRIC: tl.constexpr, G: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Quantize BG consecutive groups of G values and write bytes, scales and zero points."""
    g = tl.program_id(0).to(tl.int64) * BG + tl.arange(0, BG)
    inside = g < groups
    k = (g % groups_per_row)[:, None] * G + tl.arange(0, G)[None, :]
    source = weight + (g // groups_per_row)[:, None] * stride_n + k * stride_k
    value = tl.load(source, mask=inside[:, None], other=0).to(tl.float32)
    ratio = tl.full([BG], 1.0, tl.float32)
    if HAS_CLIP:
        ratio = tl.load(clip + g, mask=inside, other=1).to(tl.float32)
    group_scale, group_zero = int4_scale(tl.min(value, 1), tl.max(value, 1), ratio, SYMMETRIC)
    codes = int4_codes(value, group_scale[:, None], group_zero[:, None]).to(tl.int32)
    even, odd = tl.split(tl.reshape(codes, [BG, G // 2, 2]))
    place = g[:, None] * (G // 2) + tl.arange(0, G // 2)[None, :]
    tl.store(data + place, (even | (odd << 4)).to(tl.uint8), mask=inside[:, None])
    tl.store(scale + g, group_scale.to(tl.float16), mask=inside)
    tl.store(zero + g, group_zero.to(tl.uint8), mask=inside)


def launch(
    weight: Tensor,
    group: int,
    symmetric: bool,
    clip: Tensor | None,
    chosen: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize all groups in one launch."""
    features, width = weight.shape
    per_row = width // group
    data = torch.empty(features, width // 2, dtype=torch.uint8, device=weight.device)
    scale = torch.empty(features, per_row, dtype=torch.float16, device=weight.device)
    zero = torch.empty(features, per_row, dtype=torch.uint8, device=weight.device)
    groups = features * per_row
    if groups == 0:
        return data, scale, zero
    chosen = chosen or config(group)
    group_kernel[(triton.cdiv(groups, chosen["groups"]),)](
        weight, weight if clip is None else clip.contiguous(), data, scale, zero,
        groups, per_row, weight.stride(0), weight.stride(1),
        HAS_CLIP=clip is not None, SYMMETRIC=symmetric, G=group, BG=chosen["groups"],
        num_warps=chosen["warps"],
    )  # fmt: skip
    return data, scale, zero
