"""int8_quantize: one program a row; the second pass over it comes from the cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import int8_codes, int8_scale, power_of_two


def config(width: int) -> dict[str, int]:
    """Choose the block that walks along a row: the whole row up to 4096 values."""
    block = power_of_two(width, 128, 4096)
    return {"block_k": block, "warps": max(1, min(8, block // 512))}


@triton.jit
def row_kernel(
    weight, clip, data, scale, width, stride_n, stride_k,
    HAS_CLIP: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Find a row's largest magnitude, then write its scale and codes."""
    n = tl.program_id(0).to(tl.int64)
    row = weight + n * stride_n
    largest = tl.zeros([BK], tl.float32)
    for start in range(0, width, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        value = tl.load(row + k * stride_k, mask=k < width, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(value))
    absmax = tl.max(largest, 0)
    if HAS_CLIP:
        absmax = absmax * tl.load(clip + n).to(tl.float32)
    row_scale = int8_scale(absmax + tl.zeros([1], tl.float32))
    tl.store(scale + n + tl.arange(0, 1), row_scale)
    for start in range(0, width, BK):
        k = (start + tl.arange(0, BK)).to(tl.int64)
        value = tl.load(row + k * stride_k, mask=k < width, other=0).to(tl.float32)
        codes = int8_codes(value, row_scale)
        tl.store(data + n * width + k, codes.to(tl.int8), mask=k < width)


def launch(weight: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Quantize every row in one launch."""
    features, width = weight.shape
    data = torch.empty(features, width, dtype=torch.int8, device=weight.device)
    scale = torch.empty(features, dtype=torch.float32, device=weight.device)
    if features == 0:
        return data, scale
    chosen = config(width)
    row_kernel[(features,)](
        weight, weight if clip is None else clip.contiguous(), data, scale, width,
        weight.stride(0), weight.stride(1),
        HAS_CLIP=clip is not None, BK=chosen["block_k"], num_warps=chosen["warps"],
    )  # fmt: skip
    return data, scale
