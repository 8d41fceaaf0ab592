"""gram: tiles on and above the diagonal of X^T X on tensor cores, mirrored as they are added.

What it costs: the whole product is 2 T D^2 operations, the tiles here are little more than half of
it. Products of 16-bit values are exact in float32, so the sum differs from a float32 product by the
order of its terms only.

float32 inputs run through torch's float32 product. Their split into three tf32 products would be
faster, but tensor cores cut off the digits below their running sum where a float32 addition rounds
(arXiv 2203.03341, section 3), and over thousands of rows that breaks the accuracy rule.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import PROCESSORS, operand
from tailor_engine.kernels._head import accumulate

LONGEST_SUM = 32768  # rows that one float32 sum may run over
SHORTEST_SPLIT = 512  # rows


def describe(x: Tensor, mask: Tensor | None, out: Tensor) -> tuple[int, int, int, bool]:
    """Return what a configuration depends on, of the op's positional arguments."""
    return *x.shape, x.element_size(), mask is None and out.dtype == torch.float32


def config(tokens: int, channels: int, element_size: int, plain: bool) -> dict[str, int]:
    """Choose between torch and tiles, the tile, and how many programs share the last tiles.

    `plain`: no mask, and a float32 accumulator.

    | what | why |
    |---|---|
    | torch (0 tiles) for 4 and 8-byte values | see above |
    | torch below 3072 channels if plain | others' triangular Triton kernels reach 0.75 of cuBLAS's
      whole product at 2048 channels and 1.26 at 4096 (pytorch #184886) |
    | 128 x 256 from 1024 channels | 85 operations for a byte from L2; 128 x 128 has 64, and 600
      TFLOP/s would ask 9 TB/s of a cache that gives 6 |
    | splits | the tiles that do not fill the card's last round share its processors, each over a
      part of the tokens; writing and adding a part costs as much as the products of 6 tokens |
    """
    if element_size > 2 or (plain and channels < 3072):
        return {"tiles": 0}
    rows, columns, warps = (128, 256, 8) if channels >= 1024 else (64, 64, 4)
    if channels <= 32:
        rows, columns = 32, 32
    edge = triton.cdiv(channels, columns)
    tiles = edge * (edge + 1) // 2 * (columns // rows)
    rest = tiles % PROCESSORS
    return {
        "tiles": tiles,
        "whole": tiles - rest,
        "splits": best_splits(rest, min(tokens, LONGEST_SUM)),
        "rows": rows,
        "columns": columns,
        "block_t": 64,
        "warps": warps,
        "stages": 3,
    }


def best_splits(tiles: int, tokens: int) -> int:
    """Return how many programs should share each of the last tiles, by the model in `config`."""

    def cost(splits: int) -> float:
        parts = 6 * splits * tiles / tokens if splits > 1 else 0
        return triton.cdiv(tiles * splits, PROCESSORS) / splits + parts

    return min(range(1, max(tokens // SHORTEST_SPLIT, 1) + 1), key=cost) if tiles else 1


def candidates(tokens: int, channels: int, element_size: int, plain: bool) -> list[dict[str, int]]:
    """Return the choices that a measurement decides between, the usual one first."""
    usual = config(tokens, channels, element_size, plain)
    if element_size > 2:
        return [usual]
    own = usual if usual["tiles"] else config(tokens, channels, element_size, False)
    found = [usual, {"tiles": 0}, own, {**own, "splits": 1}]
    found += [{**own, "stages": stages} for stages in (2, 4)]
    found += [{**own, "block_t": 128, "stages": 2}]
    return [choice for i, choice in enumerate(found) if choice not in found[:i]]


@triton.jit
def tile_of(index, HIGH: tl.constexpr):
    """Return (row, column) of a tile on or above the diagonal, column by column.

    HIGH tiles stacked are as high as wide: row <= HIGH * column + HIGH - 1.
    """
    square = index // HIGH
    column = ((tl.sqrt(8.0 * square + 1.0) - 1.0) * 0.5).to(tl.int32)
    column += ((column + 1) * (column + 2) // 2 <= square).to(tl.int32)
    column -= (column * (column + 1) // 2 > square).to(tl.int32)
    return (square - column * (column + 1) // 2) * HIGH + index % HIGH, column


@triton.jit
def add_piece(out, piece, i, j, channels, ABOVE: tl.constexpr):
    """Add products to the upper triangle of the symmetric out, and write the sums to the lower.

    ABOVE: all of the piece is above the diagonal. Then no mask breaks up 16-byte accesses.
    """
    i, j = i.to(tl.int64), j.to(tl.int64)
    upper = out + i[:, None] * channels + j[None, :]
    lower = out + j[:, None] * channels + i[None, :]
    piece = piece.to(out.dtype.element_ty)
    if ABOVE:
        total = tl.load(upper) + piece
        tl.store(upper, total)
        tl.store(lower, tl.trans(total))
    else:
        inside = (j < channels)[None, :] & (i[:, None] <= j[None, :])
        total = tl.load(upper, mask=inside, other=0) + piece
        tl.store(upper, total, mask=inside)
        inside = (j < channels)[:, None] & (i[None, :] <= j[:, None])
        tl.store(lower, tl.trans(total), mask=inside)


@triton.jit
def halves(tile, BI: tl.constexpr, BJ: tl.constexpr):
    """Return the left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, [BI, 2, BJ // 2]), [0, 2, 1]))


@triton.jit
def add_half(
    out, half, row, first, channels, ABOVE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr
):
    """Add a half of a tile whose columns begin at `first`, again in halves."""
    i = row * BI + tl.arange(0, BI)
    j = first + tl.arange(0, BJ // 2)
    left, right = halves(half, BI, BJ)
    add_piece(out, left, i, j, channels, ABOVE)
    add_piece(out, right, i, j + BJ // 2, channels, ABOVE)


@triton.jit
def add_tile(out, tile, row, column, channels, BI: tl.constexpr, BJ: tl.constexpr):
    """Add a tile by quarters: what stands in out needs as many registers as what is added."""
    first = column * BJ
    left, right = halves(tile, BI, BJ)
    if (row * BI + BI <= first) & (first + BJ <= channels):
        add_half(out, left, row, first, channels, True, BI, BJ // 2)
        add_half(out, right, row, first + BJ // 2, channels, True, BI, BJ // 2)
    else:
        add_half(out, left, row, first, channels, False, BI, BJ // 2)
        add_half(out, right, row, first + BJ // 2, channels, False, BI, BJ // 2)


@triton.jit
def tile_kernel(
    x, mask, out, partial, tokens, channels, stride_t, stride_d, whole, splits, rows,
    HAS_MASK: tl.constexpr, EVEN: tl.constexpr, OPERAND: tl.constexpr,
    BI: tl.constexpr, BJ: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Multiply one tile over all tokens into out, or over one range of them into partial sums."""
    index = tl.program_id(0)
    part = tl.maximum(index - whole, 0)
    tile = tl.minimum(index, whole + part // splits)
    begin, end = 0, tokens
    if index >= whole:
        begin = part % splits * rows
        end = tl.minimum(begin + rows, tokens)
    row, column = tile_of(tile, BJ // BI)
    i = row * BI + tl.arange(0, BI)
    j = column * BJ + tl.arange(0, BJ)
    t = tl.arange(0, BT)
    from_t = x + (begin + t).to(tl.int64)[:, None] * stride_t
    left = from_t + i.to(tl.int64)[None, :] * stride_d
    right = from_t + j.to(tl.int64)[None, :] * stride_d
    step = tl.cast(stride_t, tl.int64) * BT
    total = tl.zeros([BI, BJ], tl.float32)
    for start in range(begin, end, BT):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            keep = start + t < end
            if HAS_MASK:
                keep = keep & (tl.load(mask + start + t, mask=keep, other=0) != 0)
            a = tl.load(left, mask=keep[:, None] & (i < channels)[None, :], other=0)
            b = tl.load(right, mask=keep[:, None] & (j < channels)[None, :], other=0)
        total = tl.dot(tl.trans(a.to(OPERAND)), b.to(OPERAND), total, input_precision="ieee")
        left += step
        right += step
    if index < whole:
        add_tile(out, total, row, column, channels, BI, BJ)
    else:
        inner = tl.arange(0, BI)[:, None] * BJ + tl.arange(0, BJ)[None, :]
        tl.store(partial + part.to(tl.int64) * (BI * BJ) + inner, total)


@triton.jit
def finish_kernel(
    out, partial, whole, splits, channels,
    BI: tl.constexpr, BJ: tl.constexpr, PI: tl.constexpr, PJ: tl.constexpr,
):  # fmt: skip
    """Sum a piece of a shared tile over its token ranges, in their order, and add it to out."""
    row, column = tile_of(whole + tl.program_id(0), BJ // BI)
    i = tl.program_id(1) // (BJ // PJ) * PI + tl.arange(0, PI)
    j = tl.program_id(1) % (BJ // PJ) * PJ + tl.arange(0, PJ)
    first = partial + tl.program_id(0).to(tl.int64) * splits * (BI * BJ)
    first += i[:, None] * BJ + j[None, :]
    total = tl.zeros([PI, PJ], tl.float32)
    for split in range(0, splits):
        total += tl.load(first + tl.cast(split, tl.int64) * (BI * BJ))
    add_piece(out, total, row * BI + i, column * BJ + j, channels, False)


def launch(
    x: Tensor, mask: Tensor | None, out: Tensor, chosen: dict[str, int] | None = None
) -> None:
    """Add X^T X by torch's product or by tiles, a long X in ranges of tokens."""
    tokens, channels = x.shape
    if tokens == 0 or channels == 0:
        return
    chosen = chosen or config(*describe(x, mask, out))
    if chosen["tiles"] == 0:
        add_product(x if mask is None else torch.where(mask[:, None], x, 0), out)
        return
    for begin in range(0, tokens, LONGEST_SUM):
        part = slice(begin, begin + LONGEST_SUM)
        add_tiles(x[part], None if mask is None else mask[part], out, chosen)


def add_product(x: Tensor, out: Tensor) -> None:
    """Add torch's full product; where it cannot add in out's dtype, by way of a matrix more."""
    if out.dtype == torch.float32 and x.dtype != torch.float64:
        accumulate(out, x, x, False)
    else:
        product = torch.empty_like(out, dtype=torch.promote_types(x.dtype, torch.float32))
        accumulate(product, x, x, True)
        out += product


def add_tiles(x: Tensor, mask: Tensor | None, out: Tensor, chosen: dict[str, int]) -> None:
    """Multiply the tiles; where the last ones were split add their parts in a second pass."""
    tokens, channels = x.shape
    rows, columns, block_t = chosen["rows"], chosen["columns"], chosen["block_t"]
    length = triton.cdiv(triton.cdiv(tokens, chosen["splits"]), block_t) * block_t
    splits = triton.cdiv(tokens, length)
    rest = chosen["tiles"] - chosen["whole"]
    whole = chosen["tiles"] if splits == 1 else chosen["whole"]
    partial = out
    if splits > 1 and rest:
        partial = torch.empty(rest * splits, rows, columns, dtype=torch.float32, device=x.device)
    tile_kernel[(whole + (chosen["tiles"] - whole) * splits,)](
        x, x if mask is None else mask, out, partial, tokens, channels,
        x.stride(0), x.stride(1), whole, splits, length,
        HAS_MASK=mask is not None,
        EVEN=mask is None and channels % columns == 0 and tokens % block_t == 0,
        OPERAND=operand(x.dtype), BI=rows, BJ=columns, BT=block_t,
        num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    if splits > 1 and rest:
        pieces = rows // 32 * (columns // 32)
        finish_kernel[(rest, pieces)](
            out, partial, whole, splits, channels, BI=rows, BJ=columns, PI=32, PJ=32, num_warps=4
        )
