"""gram: the upper triangle of X^T X in tiles, mirrored, added to the caller's accumulator."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import PROCESSORS, accumulator, operand

LONGEST_SUM = 8192  # rows that one float32 sum may run over


def config(tokens: int, channels: int, element_size: int) -> dict[str, int]:
    """Choose the tile and how many token ranges share one tile.

    Small matrices have fewer tiles than the card has processors; their token range is split, and a
    second pass adds the parts in a fixed order.
    """
    half = element_size == 2
    block = 128 if half and channels >= 1024 else 64
    if channels <= 32:
        block = 32
    edge = triton.cdiv(channels, block)
    tiles = edge * (edge + 1) // 2
    splits = min(max(1, PROCESSORS // tiles), triton.cdiv(tokens, 512))
    splits = max(splits, triton.cdiv(tokens, LONGEST_SUM), 1)
    return {
        "block": block,
        "block_t": 64 if half else 32,
        "tiles": tiles,
        "splits": splits,
        "warps": 8 if block == 128 else 4,
        "stages": 3,
    }


@triton.jit
def tile_of(index):
    """Return (row, column) of an upper-triangle tile: column by column, row <= column."""
    column = ((tl.sqrt(8.0 * index + 1.0) - 1.0) * 0.5).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= index).to(tl.int32)
    column -= (column * (column + 1) // 2 > index).to(tl.int32)
    return index - column * (column + 1) // 2, column


@triton.jit
def add_tile(out, tile, row, column, channels, B: tl.constexpr):
    """Add a tile to both triangles of out."""
    i = row * B + tl.arange(0, B)
    j = column * B + tl.arange(0, B)
    kind = out.dtype.element_ty
    upper = out + i.to(tl.int64)[:, None] * channels + j[None, :]
    inside = (i < channels)[:, None] & (j < channels)[None, :]
    tl.store(upper, tl.load(upper, mask=inside, other=0) + tile.to(kind), mask=inside)
    if row != column:
        lower = out + j.to(tl.int64)[:, None] * channels + i[None, :]
        inside = (j < channels)[:, None] & (i < channels)[None, :]
        mirrored = tl.trans(tile).to(kind)
        tl.store(lower, tl.load(lower, mask=inside, other=0) + mirrored, mask=inside)


@triton.jit
def tile_kernel(
    x, mask, out, partial, tokens, channels, stride_t, stride_d, rows,
    HAS_MASK: tl.constexpr, DIRECT: tl.constexpr, OPERAND: tl.constexpr, ACC: tl.constexpr,
    B: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Multiply one tile over one range of tokens; write it to out, or to the partial sums."""
    index = tl.program_id(0)
    split = tl.program_id(1)
    row, column = tile_of(index)
    i = row * B + tl.arange(0, B)
    j = column * B + tl.arange(0, B)
    left = x + i.to(tl.int64)[None, :] * stride_d
    right = x + j.to(tl.int64)[None, :] * stride_d
    tile = tl.zeros([B, B], ACC)
    begin = split * rows
    end = tl.minimum(begin + rows, tokens)
    for start in range(begin, end, BT):
        t = start + tl.arange(0, BT)
        keep = t < end
        if HAS_MASK:
            keep = keep & (tl.load(mask + t, mask=keep, other=0) != 0)
        offset = t.to(tl.int64)[:, None] * stride_t
        a = tl.load(left + offset, mask=keep[:, None] & (i < channels)[None, :], other=0)
        b = tl.load(right + offset, mask=keep[:, None] & (j < channels)[None, :], other=0)
        tile = tl.dot(
            tl.trans(a.to(OPERAND)), b.to(OPERAND), tile, input_precision="ieee", out_dtype=ACC
        )
    if DIRECT:
        add_tile(out, tile, row, column, channels, B)
    else:
        base = partial + (split.to(tl.int64) * tl.num_programs(0) + index) * (B * B)
        inner = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
        tl.store(base + inner, tile)


@triton.jit
def finish_kernel(out, partial, splits, tiles, channels, ACC: tl.constexpr, B: tl.constexpr):
    """Sum one tile's token ranges in a fixed order and add it to both triangles."""
    index = tl.program_id(0)
    inner = tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :]
    tile = tl.zeros([B, B], ACC)
    for split in range(0, splits):
        tile += tl.load(partial + (tl.cast(split, tl.int64) * tiles + index) * (B * B) + inner)
    row, column = tile_of(index)
    add_tile(out, tile, row, column, channels, B)


def launch(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Multiply the upper tiles, and where the tokens were split add the parts in a second pass."""
    tokens, channels = x.shape
    if tokens == 0 or channels == 0:
        return
    chosen = config(tokens, channels, x.element_size())
    block, block_t = chosen["block"], chosen["block_t"]
    tiles, splits = chosen["tiles"], chosen["splits"]
    rows = triton.cdiv(triton.cdiv(tokens, splits), block_t) * block_t
    splits = triton.cdiv(tokens, rows)
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    partial = out
    if splits > 1:
        partial = torch.empty(splits, tiles, block, block, dtype=kind, device=x.device)
    acc = accumulator(x.dtype)
    tile_kernel[(tiles, splits)](
        x, x if mask is None else mask, out, partial, tokens, channels,
        x.stride(0), x.stride(1), rows,
        HAS_MASK=mask is not None, DIRECT=splits == 1, OPERAND=operand(x.dtype), ACC=acc,
        B=block, BT=block_t, num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    if splits > 1:
        finish_kernel[(tiles,)](
            out, partial, splits, tiles, channels, ACC=acc, B=block, num_warps=8
        )
