"""Quantize and dequantize in one step, with a straight-through gradient, for training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._layout import GROUPS
from tailor_engine.ops._op import op, threads


def reference(
    x: Tensor, bits: int, group: int = 0, symmetric: bool = True, clip: Tensor | None = None
) -> Tensor:
    """Return the values that int8_quantize or int4_quantize would store.

    Shapes: x [N, K]; group 32, 64, 128 or 0 (the whole row); clip [N, K/G] or [N] (group 0).
    Numbers: bits 4 or 8 (8: symmetric only). float32 arithmetic and (4 bits) float16 scales for
        every dtype of x, one rounding to it: bit for bit what the packers store.
        The gradient is straight-through: that of the identity, clipped values included.
    Raises: ValueError, TypeError for other shapes, bits, groups and dtypes.
    """
    features, width = x.shape
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    groups = x.float().reshape(features, -1, group or width)
    if bits == 8:
        codes, scale = rules.int8_codes(groups, clip)
        return ((codes + 0.0) * scale).reshape(features, width).to(x.dtype)  # no negative zeros
    codes, scale, zero = rules.int4_codes(groups, symmetric, clip)
    return ((codes - zero) * scale).reshape(features, width).to(x.dtype)


def _check(x: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None) -> None:
    check.dimensions("fake_quantize", "x", x, 2)
    check.dtype("fake_quantize", "x", x, check.FLOATS)
    if bits not in (4, 8):
        raise ValueError(f"fake_quantize: bits must be 4 or 8, got {bits}")
    if bits == 8 and not symmetric:
        raise ValueError("fake_quantize: 8 bits are symmetric only, got symmetric=False")
    rules.check_group("fake_quantize", group, x.shape[1], (0, *GROUPS))
    if clip is not None:
        expected = (x.shape[0], x.shape[1] // group) if group else (x.shape[0],)
        check.shape("fake_quantize", "clip", clip, expected)
        check.dtype("fake_quantize", "clip", clip, check.FLOATS)


def _cpu(
    native: Any, x: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None
) -> Tensor:
    if not x.numel():
        return reference(x, bits, group, symmetric, clip)
    values, ratio = rules.dense(x), None if clip is None else clip.float().contiguous()
    out, size = torch.empty_like(values), group or x.shape[1]
    native.fake_quantize(
        values.data_ptr(), check.CODES[values.dtype], x.numel() // size, size, bits, symmetric,
        check.pointer(ratio), out.data_ptr(), threads(),
    )  # fmt: skip
    return out.to(x.dtype)


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for features, width, bits, group in ((1, 1, 8, 0), (7, 33, 4, 0), (33, 576, 4, 32)):
        yield torch.randn(features, width, generator=generator), bits, group, True, None
    x = torch.randn(20, 256, generator=generator)
    x[3], x[4] = 0, x[4].abs()
    clip = 0.5 + 0.5 * torch.rand(20, 4, generator=generator)
    yield x, 4, 64, True, clip
    yield 1e3 * x.bfloat16(), 4, 64, False, clip
    yield x.half(), 8, 0, True, clip[:, 0]
    yield x[::2, 128:], 8, 128, True, None
    yield x.T[:, :0], 4, 32, False, None


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x = torch.zeros(4, 96)
    yield (x[0], 4, 32, True, None), ValueError, "x must have 2 dimensions"
    yield (x.int(), 4, 32, True, None), TypeError, "x must be float32"
    yield (x, 3, 32, True, None), ValueError, "bits must be 4 or 8, got 3"
    yield (x, 8, 0, False, None), ValueError, "8 bits are symmetric only"
    yield (x, 4, 16, True, None), ValueError, "group must be one of 0, 32, 64, 128, got 16"
    yield (x, 4, 64, True, None), ValueError, "K = 96 must be a multiple of the group, 64"
    yield (x, 4, 32, True, torch.ones(4)), ValueError, "clip must have shape [4, 3]"


def _cost(
    x: Tensor, bits: int, group: int, symmetric: bool, clip: Tensor | None
) -> tuple[float, float]:
    """One read and one write of x; six operations a value."""
    return 2 * x.numel() * x.element_size(), 6 * x.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for features, width in ((1536, 576), (4096, 11008)):
            yield f"{features}x{width}", (torch.randn(features, width).to(dtype), 4, 32, True, None)


fake_quantize = op(
    __name__,
    "(Tensor x, int bits, int group=0, bool symmetric=True, Tensor? clip=None) -> Tensor",
    exact=True,
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Nothing is kept: the gradient is the identity."""


def _backward(ctx: Any, grad: Tensor) -> tuple:
    return grad, None, None, None, None


fake_quantize.gradient(_backward, _save)
