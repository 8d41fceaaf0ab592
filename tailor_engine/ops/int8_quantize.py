"""Symmetric int8 weights with one scale an output feature."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._op import op, threads


def reference(weight: Tensor, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize each row of ``weight`` to int8.

    Shapes: weight [N, K]; clip [N] or None -> data [N, K] int8, scale [N] float32.
    Numbers: float32 arithmetic for every dtype of weight; scale = absmax * clip / 127 (1 for a row
        of zeros), codes round half to even and stay within -127..127.
    Raises: ValueError, TypeError for other shapes and dtypes.
    """
    if not weight.shape[1]:
        data = weight.to(torch.int8, memory_format=torch.contiguous_format)
        return data, torch.ones_like(weight.float().sum(1))
    codes, scale = rules.int8_codes(weight.float(), clip)
    return codes.to(torch.int8, memory_format=torch.contiguous_format), scale[:, 0]


def _check(weight: Tensor, clip: Tensor | None) -> None:
    check.dimensions("int8_quantize", "weight", weight, 2)
    check.dtype("int8_quantize", "weight", weight, check.FLOATS)
    if clip is not None:
        check.shape("int8_quantize", "clip", clip, (weight.shape[0],))
        check.dtype("int8_quantize", "clip", clip, check.FLOATS)


def _cpu(native: Any, weight: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    if not weight.numel():
        return reference(weight, clip)
    dense, ratio = rules.dense(weight), None if clip is None else clip.float().contiguous()
    data = torch.empty(dense.shape, dtype=torch.int8)
    scale = torch.empty(len(dense))
    native.int8_quantize(
        dense.data_ptr(), check.CODES[dense.dtype], *dense.shape, check.pointer(ratio),
        data.data_ptr(), scale.data_ptr(), threads(),
    )  # fmt: skip
    return data, scale


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for features, width in ((1, 1), (7, 33), (64, 576), (0, 8)):
        yield torch.randn(features, width, generator=generator), None
    weight = torch.randn(40, 96, generator=generator)
    weight[3] = 0
    yield weight, 0.5 + 0.5 * torch.rand(40, generator=generator)
    yield 1e4 * weight.bfloat16(), None
    yield weight.half()[::2, 5:], None
    yield weight.T, None


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    weight = torch.zeros(4, 8)
    yield (weight[0], None), ValueError, "weight must have 2 dimensions"
    yield (weight.int(), None), TypeError, "weight must be float32"
    yield (weight, torch.ones(8)), ValueError, "clip must have shape [4]"


def _cost(weight: Tensor, clip: Tensor | None) -> tuple[float, float]:
    """One read of the weight, one byte written a value; three operations a value."""
    return weight.numel() * (weight.element_size() + 1) + 4 * weight.shape[0], 3 * weight.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for features, width in ((1536, 576), (4096, 11008)):
            yield f"{features}x{width}", (torch.randn(features, width).to(dtype), None)


int8_quantize = op(__name__, "(Tensor weight, Tensor? clip=None) -> (Tensor, Tensor)", exact=True)
