"""block_influence: cosine and norms of two tensors' rows in one read, totals in a fixed order.

What it costs: one read of both.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import accumulator, power_of_two

WARPS = 4


def describe(x: Tensor, *_: Tensor | None) -> tuple[int, int, int]:
    """Return what a configuration depends on, of the op's positional arguments."""
    return *x.shape, x.element_size()


def config(tokens: int, channels: int, element_size: int = 2) -> dict[str, int]:
    """Choose the tile that walks along a block of rows, and the pass that adds their totals.

    | what | why |
    |---|---|
    | block_d: at most 1 KB of a row, an eighth of it beyond the end | whole bursts; 576 channels
      would leave 44 % of tiles of 512 idle |
    | 32 bytes a thread of x and of y under way | six programs a processor have 48 KB in flight,
      and 3 TB/s at 700 ns ask for 16 |
    | block_p: all blocks of rows at once, up to 2048 | one program adds them: every further turn of
      its loop would wait for memory again |
    """
    lanes = 16 // element_size
    block_d = power_of_two(channels, lanes, 64 * lanes)
    while block_d > 8 * lanes and triton.cdiv(channels, block_d) * block_d > 1.125 * channels:
        block_d //= 2
    block_t = WARPS * 64 * lanes // block_d
    blocks = triton.cdiv(tokens, block_t)
    return {
        "block_t": block_t,
        "block_d": block_d,
        "block_p": power_of_two(blocks, 32, 2048),
        "warps": WARPS,
    }


def candidates(tokens: int, channels: int, element_size: int = 2) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    usual = config(tokens, channels, element_size)
    found = [usual]
    for block_t, block_d, warps in ((2, 1, 4), (1, 1, 2), (1, 1, 8), (1, 2, 8)):
        other = {"block_t": usual["block_t"] * block_t, "block_d": usual["block_d"] * block_d}
        found.append({**usual, **other, "warps": warps})
    return found


@triton.jit
def row_kernel(
    x, y, mask, rows, partial, tokens, channels, x_stride_t, x_stride_d, y_stride_t, y_stride_d,
    HAS_MASK: tl.constexpr, ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Write cosine, |x| and |y| of a block of rows, and their sums as partial totals."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    keep = t < tokens
    if HAS_MASK:
        keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
    left = x + t.to(tl.int64)[:, None] * x_stride_t
    right = y + t.to(tl.int64)[:, None] * y_stride_t
    dot = tl.zeros([BT, BD], ACC)
    squares_x = tl.zeros([BT, BD], ACC)
    squares_y = tl.zeros([BT, BD], ACC)
    for start in range(0, channels, BD):
        d = start + tl.arange(0, BD)
        inside = keep[:, None] & (d < channels)[None, :]
        d = d.to(tl.int64)[None, :]
        a = tl.load(left + d * x_stride_d, mask=inside, other=0).to(ACC)
        b = tl.load(right + d * y_stride_d, mask=inside, other=0).to(ACC)
        dot += a * b
        squares_x += a * a
        squares_y += b * b
    norm_x = tl.sqrt_rn(tl.sum(squares_x, 1))
    norm_y = tl.sqrt_rn(tl.sum(squares_y, 1))
    norms = norm_x * norm_y
    cosine = tl.where(norms == 0, 0.0, tl.div_rn(tl.sum(dot, 1), tl.where(norms == 0, 1.0, norms)))
    tl.store(rows + t, cosine, mask=t < tokens)
    tl.store(rows + tokens + t, norm_x, mask=t < tokens)
    tl.store(rows + 2 * tokens + t, norm_y, mask=t < tokens)
    out = partial + block * 4
    tl.store(out, tl.sum(keep.to(tl.float64), 0))
    tl.store(out + 1, tl.sum(cosine.to(tl.float64), 0))
    tl.store(out + 2, tl.sum(norm_x.to(tl.float64), 0))
    tl.store(out + 3, tl.sum(norm_y.to(tl.float64), 0))


@triton.jit
def finish_kernel(partial, totals, blocks, BP: tl.constexpr):
    """Add all partial totals to the caller's, in one fixed order."""
    part = tl.arange(0, 4)
    total = tl.zeros([BP, 4], tl.float64)
    for start in range(0, blocks, BP):
        p = start + tl.arange(0, BP)
        total += tl.load(
            partial + p[:, None] * 4 + part[None, :], mask=p[:, None] < blocks, other=0
        )
    tl.store(totals + part, tl.load(totals + part) + tl.sum(total, 0))


def launch(
    x: Tensor, y: Tensor, mask: Tensor | None, totals: Tensor, chosen: dict[str, int] | None = None
) -> Tensor:
    """Run the row pass and the pass that adds the partial totals."""
    tokens, channels = x.shape
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.empty(3, tokens, dtype=kind, device=x.device)
    if tokens == 0:
        return rows
    chosen = chosen or config(*describe(x))
    blocks = triton.cdiv(tokens, chosen["block_t"])
    partial = torch.empty(blocks, 4, dtype=torch.float64, device=x.device)
    row_kernel[(blocks,)](
        x, y, x if mask is None else mask, rows, partial, tokens, channels,
        x.stride(0), x.stride(1), y.stride(0), y.stride(1),
        HAS_MASK=mask is not None, ACC=accumulator(x.dtype),
        BT=chosen["block_t"], BD=chosen["block_d"], num_warps=chosen["warps"],
    )  # fmt: skip
    finish_kernel[(1,)](
        partial, totals, blocks, BP=chosen["block_p"], num_warps=max(1, chosen["block_p"] // 256)
    )
    return rows
