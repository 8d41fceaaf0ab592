"""int4_dequantize: one read of the packed bytes, one exact product, one rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import DTYPES, rounded_to


def config(width: int) -> dict[str, int]:
    """Choose a tile of 4096 values, 512 along a row: 16-byte accesses of a row's bytes."""
    return {"block_n": 8, "block_b": 256, "warps": 4}


@triton.jit
def tile_kernel(
    data, scale, zero, out, features, half_width, data_stride_n, data_stride_b,
    scale_stride_n, scale_stride_g, zero_stride_n, zero_stride_g,
    HAS_ZERO: tl.constexpr, OUT: tl.constexpr, G: tl.constexpr,
    BN: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """Unpack a tile of bytes [BN, BB] to values [BN, 2 BB]."""
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    b = tl.program_id(0) * BB + tl.arange(0, BB)
    inside = (n < features)[:, None] & (b < half_width)[None, :]
    packed = tl.load(data + n[:, None] * data_stride_n + b[None, :] * data_stride_b, mask=inside)
    g = b // (G // 2)
    groups = scale + n[:, None] * scale_stride_n + g[None, :] * scale_stride_g
    step = tl.load(groups, mask=inside, other=0).to(tl.float32)
    centre = tl.full([BN, BB], 8, tl.int32)
    if HAS_ZERO:
        groups = zero + n[:, None] * zero_stride_n + g[None, :] * zero_stride_g
        centre = tl.load(groups, mask=inside, other=0).to(tl.int32)
    low = ((packed & 15).to(tl.int32) - centre).to(tl.float32) * step
    high = ((packed >> 4).to(tl.int32) - centre).to(tl.float32) * step
    value = tl.reshape(tl.join(rounded_to(low, OUT), rounded_to(high, OUT)), [BN, 2 * BB])
    k = tl.program_id(0) * (2 * BB) + tl.arange(0, 2 * BB)
    inside = (n < features)[:, None] & (k < 2 * half_width)[None, :]
    tl.store(out + n[:, None] * (2 * half_width) + k[None, :], value, mask=inside)


def launch(
    data: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """Unpack the whole weight in one launch."""
    features, half_width = data.shape
    out = torch.empty(features, 2 * half_width, dtype=dtype, device=data.device)
    if not out.numel():
        return out
    chosen = config(2 * half_width)
    zeros = scale if zero is None else zero
    grid = triton.cdiv(half_width, chosen["block_b"]), triton.cdiv(features, chosen["block_n"])
    tile_kernel[grid](
        data, scale, zeros, out, features, half_width, data.stride(0), data.stride(1),
        scale.stride(0), scale.stride(1), zeros.stride(0), zeros.stride(1),
        HAS_ZERO=zero is not None, OUT=DTYPES[dtype], G=group,
        BN=chosen["block_n"], BB=chosen["block_b"], num_warps=chosen["warps"],
    )  # fmt: skip
    return out
