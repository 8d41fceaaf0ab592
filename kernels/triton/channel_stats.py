"""channel_stats: one read of the activations, deterministic, no synchronisation.

What it costs: the read. At 3 TB/s an H100 has 20 instructions a lane for a 16-bit value; compiled,
the loop takes 9. The second pass reads some thousandth of it, but is a launch more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import PROCESSORS, accumulator, power_of_two

SPLIT_ROWS = 512  # no float32 sum runs over more rows than this
WARPS, DEEP = 4, 4
PARTS = 5  # count, sum, sum of squares, sum of absolutes, absolute maximum


def describe(x: Tensor, mask: Tensor | None, stats: Tensor) -> tuple[int, int, int]:
    """Return what a configuration depends on, of the op's positional arguments."""
    return *x.shape, x.element_size()


def config(tokens: int, channels: int, element_size: int = 2) -> dict[str, int]:
    """Choose the tile, the loads under way, and the number of token ranges.

    | what | why |
    |---|---|
    | block_d: 256 bytes | 16 threads of 16 bytes; a whole memory burst of each row |
    | block_t: as many rows as 4 warps cover with one load each | one sum a thread and channel |
    | deep: 4 such tiles at once | 64 bytes a thread before the first use; five programs a processor
      have 40 KB in flight, and 3 TB/s at 700 ns ask for 16 |
    | rows: four programs a processor, at most 512 rows | one round of the card; no float32 sum runs
      over more |
    """
    lanes = 16 // element_size
    block_d = power_of_two(channels, lanes, 16 * lanes)
    block_t = WARPS * 32 * lanes // block_d
    step = block_t * DEEP
    wanted = triton.cdiv(4 * PROCESSORS, triton.cdiv(channels, block_d))
    rows = triton.cdiv(triton.cdiv(tokens, wanted), step) * step
    rows = min(max(rows, step), SPLIT_ROWS)
    return {"block_t": block_t, "block_d": block_d, "deep": DEEP, "rows": rows, "warps": WARPS}


def candidates(tokens: int, channels: int, element_size: int = 2) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    usual = config(tokens, channels, element_size)
    found = [usual]
    for deep, share in ((2, 1), (8, 1), (DEEP, 2)):
        step = usual["block_t"] * deep
        rows = triton.cdiv(usual["rows"] // share, step) * step
        other = {**usual, "deep": deep, "rows": rows}
        if other not in found:
            found.append(other)
    return found


@triton.jit
def partial_kernel(
    x, mask, partial, tokens, channels, stride_t, stride_d, rows,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Statistics of one range of rows and one band of columns, kept in registers.

    K tiles of rows are loaded together; what is summed over them stays within a thread.
    """
    split = tl.program_id(0)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    row = tl.arange(0, K)[:, None] * BT + tl.arange(0, BT)[None, :]
    columns = x + d.to(tl.int64)[None, None, :] * stride_d
    total = tl.zeros([BT, BD], ACC)
    squares = tl.zeros([BT, BD], ACC)
    absolutes = tl.zeros([BT, BD], ACC)
    maximum = tl.zeros([BT, BD], ACC)
    count = tl.zeros([K, BT], tl.int32)
    for start in range(0, rows, K * BT):
        t = split * rows + start + row
        keep = t < tokens
        if HAS_MASK:
            keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
        inside = keep[:, :, None] & (d < channels)[None, None, :]
        value = tl.load(columns + t.to(tl.int64)[:, :, None] * stride_t, mask=inside, other=0)
        value = value.to(ACC)
        magnitude = tl.abs(value)
        total += tl.sum(value, 0)
        squares += tl.sum(value * value, 0)
        absolutes += tl.sum(magnitude, 0)
        maximum = tl.maximum(maximum, tl.max(magnitude, 0))
        count += keep.to(tl.int32)
    out = partial + split.to(tl.int64) * 5 * channels + d
    inside = d < channels
    tl.store(out, (tl.sum(tl.sum(count, 0), 0) + tl.zeros([BD], tl.int32)).to(ACC), mask=inside)
    tl.store(out + channels, tl.sum(total, 0), mask=inside)
    tl.store(out + 2 * channels, tl.sum(squares, 0), mask=inside)
    absolute = tl.sum(absolutes, 0)
    tl.store(out + 3 * channels, absolute, mask=inside)
    # A maximum over threads passes over NaN; the sum of absolutes has it wherever there is one.
    largest = tl.where(absolute >= 0, tl.max(maximum, 0), absolute)
    tl.store(out + 4 * channels, largest, mask=inside)


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
        numbers = tl.min((total >= 0).to(tl.int32), 0) > 0
        largest = tl.where(numbers, tl.max(total, 0), float("nan"))
        new = tl.maximum(old, largest, propagate_nan=tl.PropagateNan.ALL)
    else:
        new = old + tl.sum(total, 0)
    tl.store(out, new.to(stats.dtype.element_ty), mask=inside)


def launch(
    x: Tensor, mask: Tensor | None, stats: Tensor, chosen: dict[str, int] | None = None
) -> None:
    """Run the two passes: partial sums of row ranges, then their sum into ``stats``."""
    tokens, channels = x.shape
    if tokens == 0 or channels == 0:
        return
    chosen = chosen or config(*describe(x, mask, stats))
    block_d, rows = chosen["block_d"], chosen["rows"]
    splits = triton.cdiv(tokens, rows)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = torch.empty(splits, PARTS, channels, dtype=kind, device=x.device)
    partial_kernel[(splits, triton.cdiv(channels, block_d))](
        x, x if mask is None else mask, partial, tokens, channels, x.stride(0), x.stride(1), rows,
        HAS_MASK=mask is not None, ACC=accumulator(x.dtype), K=chosen["deep"], BT=chosen["block_t"],
        BD=block_d, num_warps=chosen["warps"],
    )  # fmt: skip
    finish_kernel[(PARTS, triton.cdiv(channels, 32))](
        partial, stats, splits, channels, BS=64, BD=32, num_warps=4
    )
