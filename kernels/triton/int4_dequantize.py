"""int4_dequantize: one read of the packed bytes, one exact product, one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import DTYPES, rounded_to


def describe(
    data: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return 2 * data.shape[1], group


def candidates(width: int, group: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    A thread reads 16 bytes and writes their 32 values in four stores of 16 bytes (bfloat16); with
    512 values of a row beside one another, a warp's reads are whole lines.
    """
    groups = max(1, min(512, triton.next_power_of_2(max(width, 1))) // group)
    return [
        {"block_n": rows, "groups": groups, "warps": warps}
        for rows, warps in ((8, 4), (16, 4), (16, 8), (4, 2))
    ]


def config(width: int, group: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(width, group)[0]


@triton.jit
def tile_kernel(
    data, scale, zero, out, features, groups, data_stride_n, data_stride_b,
    scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g,
    HAS_ZERO: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Unpack BG groups of BN rows: bytes [BN, BG, G/2] to values [BN, BG, G]."""
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)[:, None, None]
    g = (tl.program_id(0) * BG + tl.arange(0, BG))[None, :, None]
    byte = tl.arange(0, G // 2)[None, None, :]
    inside = (n < features) & (g < groups)
    place = n * data_stride_n + (g * (G // 2) + byte) * data_stride_b
    packed = tl.load(data + place, mask=inside, other=0)
    step = tl.load(scale + n * scale_stride_n + g * scale_stride_g, mask=inside, other=0)
    step = step.to(tl.float32)
    centre = tl.full([BN, BG, 1], 8, tl.int32)
    if HAS_ZERO:
        centre = tl.load(zero + n * zero_stride_n + g * zero_stride_g, mask=inside, other=0)
        centre = centre.to(tl.int32)
    low = ((packed & 15).to(tl.int32) - centre).to(tl.float32) * step
    high = ((packed >> 4).to(tl.int32) - centre).to(tl.float32) * step
    value = tl.reshape(tl.join(rounded_to(low, OUT), rounded_to(high, OUT)), [BN, BG, G])
    k = g * G + tl.arange(0, G)[None, None, :]
    tl.store(out + n * (groups * G) + k, value, mask=inside)


def launch(
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    dtype: torch.dtype,
    chosen: dict[str, int] | None = None,
) -> Tensor:
    """Unpack the whole weight in one launch."""
    features, half_width = data.shape
    out = torch.empty(features, 2 * half_width, dtype=dtype, device=data.device)
    if not out.numel():
        return out
    chosen = chosen or config(2 * half_width, group)
    zeros, groups = scale if zero is None else zero, scale.shape[1]
    grid = triton.cdiv(groups, chosen["groups"]), triton.cdiv(features, chosen["block_n"])
    tile_kernel[grid](
        data, scale, zeros, out, features, groups, *data.stride(), *scale.stride(),
        *zeros.stride(), HAS_ZERO=zero is not None, OUT=DTYPES[dtype], G=group,
        BN=chosen["block_n"], BG=chosen["groups"], num_warps=chosen["warps"],
    )  # fmt: skip
    return out
