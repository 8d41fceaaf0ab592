"""Per-channel running statistics of activations, in one pass, into the caller's accumulator."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import op, threads

COUNT, SUM, SUM_SQUARES, SUM_ABS, ABS_MAX = range(5)  # rows of the accumulator


def reference(x: Tensor, mask: Tensor | None, stats: Tensor) -> None:
    """Add the statistics of ``x`` to ``stats``.

    Shapes: x [T, D], rows of any stride; mask [T] (False: the row does not count) or None;
        stats [5, D]: count, sum, sum of squares, sum of absolutes, absolute maximum.
    Numbers: x float32, bfloat16, float16 or float64; stats float32 or float64. The sums of one call
        run in float32 (float64 for float64 x). NaN in a counted row gives NaN in its channel.
    Raises: ValueError, TypeError for other shapes and dtypes.
    """
    rows = x if x.dtype == torch.float64 else x.float()
    if mask is not None:
        rows = torch.where(mask[:, None], rows, 0)
    stats[COUNT] += x.shape[0] if mask is None else mask.sum()
    stats[SUM] += rows.sum(0)
    stats[SUM_SQUARES] += (rows * rows).sum(0)
    stats[SUM_ABS] += rows.abs().sum(0)
    if x.shape[0]:
        stats[ABS_MAX] = torch.maximum(stats[ABS_MAX], rows.abs().amax(0))


def _check(x: Tensor, mask: Tensor | None, stats: Tensor) -> None:
    check.dimensions("channel_stats", "x", x, 2)
    check.dtype("channel_stats", "x", x, check.FLOATS)
    check.token_mask("channel_stats", mask, x.shape[0])
    check.shape("channel_stats", "stats", stats, (5, x.shape[1]))
    check.dtype("channel_stats", "stats", stats, (torch.float32, torch.float64))
    check.contiguous("channel_stats", "stats", stats)


def _cpu(native: Any, x: Tensor, mask: Tensor | None, stats: Tensor) -> None:
    if x.dtype == torch.float64:  # for truths, not for speed
        return reference(x, mask, stats)
    x = check.rows_contiguous(x)
    native.channel_stats(
        x.data_ptr(), check.CODES[x.dtype], x.shape[0], x.shape[1], x.stride(0),
        check.pointer(mask), stats.data_ptr(), check.CODES[stats.dtype], threads(),
    )  # fmt: skip
    return None


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def rows(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tokens, channels, generator=generator).to(dtype)

    for tokens, channels in ((1, 1), (1, 64), (7, 33), (65, 576), (300, 100), (0, 16)):
        yield rows(tokens, channels), None, torch.zeros(5, channels, dtype=torch.float64)
    mask = torch.arange(129) % 3 != 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield rows(129, 200, dtype), mask, rows(5, 200).abs().double()
        yield 1e4 * rows(40, 17, dtype), None, torch.zeros(5, 17)
    yield rows(50, 400)[::2, 3:100], None, torch.zeros(5, 97)
    yield rows(30, 50).T, None, torch.zeros(5, 30, dtype=torch.float64)


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, stats = torch.zeros(4, 8), torch.zeros(5, 8)
    yield (x[0], None, stats), ValueError, "x must have 2 dimensions"
    yield (x.int(), None, stats), TypeError, "x must be float32"
    yield (x, torch.ones(3, dtype=torch.bool), stats), ValueError, "mask must have shape [4]"
    yield (x, torch.ones(4), stats), TypeError, "mask must be bool"
    yield (x, None, stats[:4]), ValueError, "stats must have shape [5, 8]"
    yield (x, None, stats.half()), TypeError, "stats must be float32, float64"
    yield (x, None, torch.zeros(8, 5).T), ValueError, "stats must be contiguous"


def _cost(x: Tensor, mask: Tensor | None, stats: Tensor) -> tuple[float, float]:
    """One read of x and of the accumulator, one write; four operations a value."""
    return x.numel() * x.element_size() + 2 * stats.numel() * stats.element_size(), 4 * x.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens, channels in ((2048, 576), (2048, 1536), (4096, 4096)):
            x = torch.randn(tokens, channels).to(dtype)
            yield f"{tokens}x{channels}", (x, None, torch.zeros(5, channels, dtype=torch.float64))


channel_stats = op(__name__, "(Tensor x, Tensor? mask, Tensor(a!) stats) -> ()")
