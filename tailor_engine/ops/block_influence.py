"""Block influence: how far a block turns and scales the residual stream, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import op, threads

COUNT, SUM_COSINE, SUM_NORM_X, SUM_NORM_Y = range(4)  # places of the totals
COSINE, NORM_X, NORM_Y = range(3)  # rows of the result


def reference(x: Tensor, y: Tensor, mask: Tensor | None, totals: Tensor) -> Tensor:
    """Return cosine and norms of the rows of ``x`` and ``y``, and add their sums to ``totals``.

    Shapes: x, y [T, D] (a block's input and output), any strides; mask [T] or None; totals [4]:
        count, sum of cosines, sum of |x|, sum of |y|; the result is [3, T]: cosine, |x|, |y|.
    Numbers: x, y float32, bfloat16, float16 or float64 alike; totals float64; the result is
        float32 (float64 for float64 x). A row of norm zero has cosine 0; a masked row gives 0, 0, 0
        and does not count. NaN in a row gives NaN there and in the totals.
    Raises: ValueError, TypeError for other shapes and dtypes.
    Source: ShortGPT (arXiv 2403.03853), equation 1: block influence = 1 - mean cosine.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x, y = x.to(wide), y.to(wide)
    if mask is not None:
        x, y = (torch.where(mask[:, None], rows, 0) for rows in (x, y))
    norm_x, norm_y = (x * x).sum(1).sqrt(), (y * y).sum(1).sqrt()
    norms = norm_x * norm_y
    cosine = torch.where(norms == 0, 0, (x * y).sum(1) / norms)
    rows = torch.stack((cosine, norm_x, norm_y))
    totals[COUNT] += x.shape[0] if mask is None else mask.sum()
    totals[SUM_COSINE:] += rows.sum(1, dtype=torch.float64)
    return rows


def _check(x: Tensor, y: Tensor, mask: Tensor | None, totals: Tensor) -> None:
    check.dimensions("block_influence", "x", x, 2)
    check.dtype("block_influence", "x", x, check.FLOATS)
    check.shape("block_influence", "y", y, tuple(x.shape))
    check.dtype("block_influence", "y", y, (x.dtype,))
    check.token_mask("block_influence", mask, x.shape[0])
    check.shape("block_influence", "totals", totals, (4,))
    check.dtype("block_influence", "totals", totals, (torch.float64,))
    check.contiguous("block_influence", "totals", totals)


def _cpu(native: Any, x: Tensor, y: Tensor, mask: Tensor | None, totals: Tensor) -> Tensor:
    x, y = check.rows_contiguous(x), check.rows_contiguous(y)
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    rows = torch.empty(3, x.shape[0], dtype=wide)
    native.block_influence(
        x.data_ptr(), y.data_ptr(), check.CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0),
        y.stride(0), check.pointer(mask), totals.data_ptr(), rows.data_ptr(), threads(),
    )  # fmt: skip
    return rows


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def pair(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> tuple:
        x = torch.randn(tokens, channels, generator=generator)
        y = x + 0.3 * torch.randn(tokens, channels, generator=generator)
        return x.to(dtype), y.to(dtype)

    def totals() -> Tensor:
        return torch.arange(4, dtype=torch.float64)

    for tokens, channels in ((1, 1), (5, 33), (0, 8), (33, 576)):
        yield *pair(tokens, channels), None, totals()
    mask = torch.arange(65) % 3 != 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield *pair(65, 100, dtype), mask, totals()
    x, y = pair(6, 40)
    x[2] = 0
    y[4] = 0
    yield x, y, None, totals()
    yield 1e4 * x, -1e-4 * y, None, totals()
    x, y = pair(40, 90)
    yield x[::2, 5:70], y[::2, 5:70], None, totals()
    yield x.T, y.T, None, totals()


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, totals = torch.zeros(4, 8), torch.zeros(4, dtype=torch.float64)
    yield (x[0], x[0], None, totals), ValueError, "x must have 2 dimensions"
    yield (x.int(), x.int(), None, totals), TypeError, "x must be float32"
    yield (x, x[:3], None, totals), ValueError, "y must have shape [4, 8]"
    yield (x, x.half(), None, totals), TypeError, "y must be float32, got float16"
    yield (x, x, torch.ones(4), totals), TypeError, "mask must be bool"
    yield (x, x, None, totals[:3]), ValueError, "totals must have shape [4]"
    yield (x, x, None, totals.float()), TypeError, "totals must be float64"


def _cost(x: Tensor, y: Tensor, mask: Tensor | None, totals: Tensor) -> tuple[float, float]:
    """One read of both tensors, one write of three values a row; six operations a value."""
    return 2 * x.numel() * x.element_size() + 12 * x.shape[0], 6 * x.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, channels in ((2048, 576), (4096, 4096)):
            x, y = torch.randn(2, tokens, channels).to(dtype)
            yield f"{tokens}x{channels}", (x, y, None, torch.zeros(4, dtype=torch.float64))


block_influence = op(__name__, "(Tensor x, Tensor y, Tensor? mask, Tensor(a!) totals) -> Tensor")
