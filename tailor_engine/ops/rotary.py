"""Rotary position embedding of all queries and keys of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._op import op, threads


def reference(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Return ``x * cosine + rotate_half(x) * sine`` with rotate_half((a, b)) = (-b, a).

    Shapes: x [B, H, T, D], any strides; cosine, sine [B, T, D] or [1, T, D] -> [B, H, T, D].
    Numbers: all of one dtype, which the result has; in between float32 (float64 for float64).
        Without gradients: it stands in for a network's own where none is asked for.
    Raises: ValueError, TypeError for other shapes and dtypes, and an odd D.
    Source: RoFormer (arXiv 2104.09864), equation 34, halves instead of neighbours.
    """
    wide = rules.compute_dtype(x)
    first, second = x.to(wide).chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    cosine, sine = (angle.to(wide)[:, None] for angle in (cosine, sine))
    return (x.to(wide) * cosine + turned * sine).to(x.dtype).contiguous()


def _check(x: Tensor, cosine: Tensor, sine: Tensor) -> None:
    check.dimensions("rotary", "x", x, 4)
    check.dtype("rotary", "x", x, check.FLOATS)
    batch, _, tokens, width = x.shape
    if width % 2:
        raise ValueError(f"rotary: x must have an even number of values a head, got {width}")
    check.dimensions("rotary", "cosine", cosine, 3)
    check.shape("rotary", "sine", sine, tuple(cosine.shape))
    rows = 1 if cosine.shape[0] == 1 else batch
    for name, angle in (("cosine", cosine), ("sine", sine)):
        check.shape("rotary", name, angle, (rows, tokens, width))
        check.dtype("rotary", name, angle, (x.dtype,))


def _cpu(native: Any, x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    if x.dtype == torch.float64 or not x.numel():
        return reference(x, cosine, sine)
    x, cosine, sine = check.rows_contiguous(x), cosine.contiguous(), sine.contiguous()
    batch, heads, tokens, width = x.shape
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    native.rotary(
        x.data_ptr(), check.CODES[x.dtype], batch, heads, tokens, width, *x.stride()[:3],
        cosine.data_ptr(), sine.data_ptr(), 0 if len(cosine) == 1 else tokens * width,
        y.data_ptr(), threads(),
    )  # fmt: skip
    return y


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for batch, heads, tokens, width in ((1, 1, 1, 2), (2, 3, 5, 38), (1, 9, 7, 64), (2, 0, 3, 8)):
        angles = normal(batch, tokens, width)
        yield normal(batch, heads, tokens, width), angles.cos(), angles.sin()
    for dtype in (torch.bfloat16, torch.float16):
        angles = normal(1, 6, 32)
        x = normal(2, 6, 4, 32).to(dtype).transpose(1, 2)  # as a projection leaves its heads
        yield x, angles.cos().to(dtype), angles.sin().to(dtype)
    angles = 100 * normal(1, 200, 48)
    yield 1e4 * normal(2, 200, 5, 48).transpose(1, 2), angles.cos(), angles.sin()
    angles = normal(1, 5, 48)
    yield normal(1, 48, 5, 200).transpose(1, 3), angles.cos(), angles.sin()


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, angle = torch.zeros(2, 3, 4, 8), torch.zeros(2, 4, 8)
    yield (x[0], angle, angle), ValueError, "x must have 4 dimensions"
    yield (x.int(), angle, angle), TypeError, "x must be float32"
    yield (x[..., :7], angle, angle), ValueError, "even number of values a head, got 7"
    yield (x, angle[0], angle[0]), ValueError, "cosine must have 3 dimensions"
    yield (x, angle[:, :3], angle[:, :3]), ValueError, "cosine must have shape [2, 4, 8]"
    yield (x, angle, angle[:1]), ValueError, "sine must have shape [2, 4, 8], got [1, 4, 8]"
    yield (x, angle, angle.half()), TypeError, "sine must be float32, got float16"


def _cost(x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[float, float]:
    """One read and one write of the heads; three operations a value."""
    return 2 * x.numel() * x.element_size(), 3 * x.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for tokens in (1, 512):
        x, angles = torch.randn(1, tokens, 9, 64).transpose(1, 2), torch.randn(1, tokens, 64)
        yield f"1x9x{tokens}x64", (x, angles.cos(), angles.sin())


rotary = op(__name__, "(Tensor x, Tensor cosine, Tensor sine) -> Tensor")
