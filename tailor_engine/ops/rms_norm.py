"""Root-mean-square norm of rows, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._op import op, threads


def reference(x: Tensor, weight: Tensor, epsilon: float, offset: float = 0.0) -> Tensor:
    """Return ``(offset + weight) * x / sqrt(mean(x^2) + epsilon)``, row by row.

    Shapes: x [..., D], weight [D] -> [..., D].
    Numbers: x and weight of one dtype, which the result has; in between float32 (float64 for
        float64). offset is 1 where a family stores its norms as the difference from one (Gemma).
        Without gradients: it stands in for a network's own norm where none is asked for.
    Raises: ValueError, TypeError for other shapes and dtypes.
    Source: Zhang and Sennrich (arXiv 1910.07467), equation 4.
    """
    wide = rules.compute_dtype(x)
    values = x.to(wide)
    scale = torch.rsqrt(values.square().mean(-1, keepdim=True) + epsilon)
    return ((offset + weight.to(wide)) * (values * scale)).to(x.dtype)


def _check(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> None:
    check.dtype("rms_norm", "x", x, check.FLOATS)
    if x.dim() == 0:
        raise ValueError("rms_norm: x must have at least 1 dimension, got a scalar")
    check.shape("rms_norm", "weight", weight, (x.shape[-1],))
    check.dtype("rms_norm", "weight", weight, (x.dtype,))


def _cpu(native: Any, x: Tensor, weight: Tensor, epsilon: float, offset: float) -> Tensor:
    if x.dtype == torch.float64 or not x.numel():
        return reference(x, weight, epsilon, offset)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    (x, stride), weight = check.even_rows(x), weight.contiguous()
    width = x.shape[-1]
    native.rms_norm(
        x.data_ptr(), check.CODES[x.dtype], x.numel() // width, width, stride,
        weight.data_ptr(), epsilon, offset, y.data_ptr(), threads(),
    )  # fmt: skip
    return y


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    for shape in ((1, 1), (3, 33), (2, 5, 576), (4, 0), (0, 8), (40,), (130, 520)):
        yield normal(*shape), normal(shape[-1]), 1e-6, 0.0
    for dtype in (torch.bfloat16, torch.float16):
        yield normal(7, 100).to(dtype), normal(100).to(dtype), 1e-5, 1.0
    x = normal(9, 200)
    x[3] = 0
    yield 1e4 * x[::2, 5:140], normal(135), 1e-6, 1.0
    yield 1e-3 * normal(64, 6).T, normal(128)[::2], 1e-6, 0.0


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, weight = torch.zeros(2, 8), torch.ones(8)
    yield (x.int(), weight, 1e-6, 0.0), TypeError, "x must be float32"
    yield (x[0, 0], weight, 1e-6, 0.0), ValueError, "at least 1 dimension"
    yield (x, weight[:7], 1e-6, 0.0), ValueError, "weight must have shape [8], got [7]"
    yield (x, weight.half(), 1e-6, 0.0), TypeError, "weight must be float32, got float16"


def _cost(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[float, float]:
    """One read and one write of the rows; four operations a value."""
    return 2 * x.numel() * x.element_size(), 4 * x.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for rows in (1, 512):
        yield f"{rows}x576", (torch.randn(rows, 576), torch.randn(576), 1e-5, 0.0)


rms_norm = op(__name__, "(Tensor x, Tensor weight, float epsilon, float offset=0.0) -> Tensor")
