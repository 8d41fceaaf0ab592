"""The Gram matrix of activations, X^T X, accumulated over calls: least squares and Hessians."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._op import op, threads


def reference(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    """Add ``x^T x`` to the symmetric ``out``; both triangles are valid after each call.

    Shapes: x [T, D], any strides; mask [T] (False: the row does not count) or None; out [D, D].
    Numbers: x float32, bfloat16, float16 or float64; out float32 or float64. Products and sums of
        one call in float32 (bfloat16 and float16 products are exact in it), float64 for float64 x.
    Raises: ValueError, TypeError for other shapes and dtypes.
    """
    rows = x if x.dtype == torch.float64 else x.float()
    if mask is not None:
        rows = torch.where(mask[:, None], rows, 0)
    out += (rows.T @ rows).to(out.dtype)


def _check(x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    check.dimensions("gram", "x", x, 2)
    check.dtype("gram", "x", x, check.FLOATS)
    check.token_mask("gram", mask, x.shape[0])
    check.shape("gram", "out", out, (x.shape[1], x.shape[1]))
    check.dtype("gram", "out", out, (torch.float32, torch.float64))
    check.contiguous("gram", "out", out)


_WORKSPACE_ROWS = 128  # rows packed at a time, and
_WORKSPACE_COLUMNS = 48  # columns of the widest panel: csrc/cpu/gram.h


def _cpu(native: Any, x: Tensor, mask: Tensor | None, out: Tensor) -> None:
    if x.dtype == torch.float64:  # for truths, not for speed
        return reference(x, mask, out)
    x = check.rows_contiguous(x)
    tokens, channels = x.shape
    kept = None if mask is None else mask.nonzero()
    workspace = torch.empty(_WORKSPACE_ROWS, channels + _WORKSPACE_COLUMNS)
    native.gram(
        x.data_ptr(), check.CODES[x.dtype], tokens if kept is None else kept.numel(), channels,
        x.stride(0), check.pointer(kept), out.data_ptr(), check.CODES[out.dtype],
        workspace.data_ptr(), threads(),
    )  # fmt: skip
    return None


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def rows(tokens: int, channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(tokens, channels, generator=generator).to(dtype)

    for tokens, channels in ((1, 1), (3, 5), (0, 4), (130, 97), (300, 160)):
        yield rows(tokens, channels), None, torch.zeros(channels, channels)
    mask = torch.arange(301) % 3 != 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        start = rows(301, 50, dtype).float()
        yield rows(301, 50, dtype), mask, (start.T @ start).double()
    yield 1e4 * rows(40, 33), None, torch.eye(33)
    yield rows(64, 200)[::2, 3:60], torch.zeros(32, dtype=torch.bool), torch.eye(57)
    yield rows(30, 70).T, None, torch.zeros(30, 30)


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, out = torch.zeros(4, 8), torch.zeros(8, 8)
    yield (x[0], None, out), ValueError, "x must have 2 dimensions"
    yield (x.int(), None, out), TypeError, "x must be float32"
    yield (x, torch.ones(3, dtype=torch.bool), out), ValueError, "mask must have shape [4]"
    yield (x, torch.ones(4), out), TypeError, "mask must be bool"
    yield (x, None, out[:4]), ValueError, "out must have shape [8, 8]"
    yield (x, None, out.bfloat16()), TypeError, "out must be float32, float64"
    yield (x, None, torch.zeros(16, 8)[::2]), ValueError, "out must be contiguous"


def _cost(x: Tensor, mask: Tensor | None, out: Tensor) -> tuple[float, float]:
    """One read of x, one read and write of the accumulator; half of a full product."""
    tokens, channels = x.shape
    moved = x.numel() * x.element_size() + 2 * out.numel() * out.element_size()
    return moved, tokens * channels * (channels + 1)


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for tokens, channels, dtype in (
        (2048, 576, torch.float32),
        (4096, 1536, torch.float32),
        (2048, 4096, torch.float32),
        (4096, 1536, torch.bfloat16),
    ):
        x = torch.randn(tokens, channels).to(dtype)
        yield f"{tokens}x{channels}", (x, None, torch.zeros(channels, channels))


gram = op(__name__, "(Tensor x, Tensor? mask, Tensor(a!) out) -> ()")
