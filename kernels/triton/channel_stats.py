"""channel_stats: one read of the activations, deterministic, no synchronisation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import PROCESSORS, accumulator, power_of_two

SPLIT_ROWS = 512  # no float32 sum runs over more rows than this
PARTS = 5  # count, sum, sum of squares, sum of absolutes, absolute maximum


def config(tokens: int, channels: int) -> dict[str, int]:
    """Choose tiles and the number of token ranges: enough programs to fill the card four times."""
    block_d = power_of_two(channels, 16, 128)
    block_t = 16
    columns = triton.cdiv(channels, block_d)
    wanted = triton.cdiv(4 * PROCESSORS, columns)
    rows = triton.cdiv(triton.cdiv(tokens, wanted), block_t) * block_t
    rows = min(max(rows, block_t), SPLIT_ROWS)
    return {"block_t": block_t, "block_d": block_d, "rows": rows, "warps": 4}


@triton.jit
def partial_kernel(
    x, mask, partial, tokens, channels, stride_t, stride_d, rows,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Statistics of one range of rows and one band of columns, kept in registers."""
    split = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    columns = x + d.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([BT, BD], ACC)
    squares = tl.zeros([BT, BD], ACC)
    absolutes = tl.zeros([BT, BD], ACC)
    maximum = tl.zeros([BT, BD], ACC)
    count = tl.zeros([BT], tl.int32)
    for start in range(0, rows, BT):
        t = split * rows + start + tl.arange(0, BT)
        keep = t < tokens
        if HAS_MASK:
            keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
        inside = keep[:, None] & (d < channels)[None, :]
        value = tl.load(columns + t.to(tl.int64)[:, None] * stride_t, mask=inside, other=0).to(ACC)
        magnitude = tl.abs(value)
        total += value
        squares += value * value
        absolutes += magnitude
        maximum = tl.maximum(maximum, magnitude, propagate_nan=tl.PropagateNan.ALL)
        count += keep.to(tl.int32)
    out = partial + split.to(tl.int64) * 5 * channels + d
    inside = d < channels
    tl.store(out, (tl.sum(count, 0) + tl.zeros([BD], tl.int32)).to(ACC), mask=inside)
    tl.store(out + channels, tl.sum(total, 0), mask=inside)
    tl.store(out + 2 * channels, tl.sum(squares, 0), mask=inside)
    tl.store(out + 3 * channels, tl.sum(absolutes, 0), mask=inside)
    tl.store(out + 4 * channels, tl.max(maximum, 0), mask=inside)


@triton.jit
def finish_kernel(partial, stats, splits, channels, BS: tl.constexpr, BD: tl.constexpr):
    """Add all ranges to the caller's accumulator, in float64 and in a fixed order."""
    part = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    total = tl.zeros([BS, BD], tl.float64)
    for start in range(0, splits, BS):
        s = start + tl.arange(0, BS)
        inside = (s < splits)[:, None] & (d < channels)[None, :]
        offset = (s.to(tl.int64)[:, None] * 5 + part) * channels + d[None, :]
        value = tl.load(partial + offset, mask=inside, other=0).to(tl.float64)
        if part == 4:
            total = tl.maximum(total, value, propagate_nan=tl.PropagateNan.ALL)
        else:
            total += value
    out = stats + part * channels + d
    inside = d < channels
    old = tl.load(out, mask=inside, other=0).to(tl.float64)
    if part == 4:
        new = tl.maximum(old, tl.max(total, 0), propagate_nan=tl.PropagateNan.ALL)
    else:
        new = old + tl.sum(total, 0)
    tl.store(out, new.to(stats.dtype.element_ty), mask=inside)


def launch(x: Tensor, mask: Tensor | None, stats: Tensor) -> None:
    """Run the two passes: partial sums of row ranges, then their sum into ``stats``."""
    tokens, channels = x.shape
    if tokens == 0 or channels == 0:
        return
    chosen = config(tokens, channels)
    block_d, rows = chosen["block_d"], chosen["rows"]
    splits = triton.cdiv(tokens, rows)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, PARTS, channels, dtype=kind, device=x.device)
    partial_kernel[(splits, triton.cdiv(channels, block_d))](
        x, x if mask is None else mask, partial, tokens, channels, x.stride(0), x.stride(1), rows,
        HAS_MASK=mask is not None, ACC=accumulator(x.dtype), BT=chosen["block_t"], BD=block_d,
        num_warps=chosen["warps"],
    )  # fmt: skip
    finish_kernel[(PARTS, triton.cdiv(channels, 32))](
        partial, stats, splits, channels, BS=64, BD=32, num_warps=4
    )
