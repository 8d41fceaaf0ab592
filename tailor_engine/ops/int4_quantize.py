"""Int4 weights in groups along the input features, symmetric or with zero points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._layout import pack_nibbles
from tailor_engine.ops._op import op, threads


def reference(
    weight: Tensor, group: int, symmetric: bool = True, clip: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize groups of ``group`` input features to unsigned 4-bit codes.

    Shapes: weight [N, K]; clip [N, K/G] or None -> data [N, K/2] uint8 (even k in the low nibble),
        scale [N, K/G] float16, zero [N, K/G] uint8; value = (code - zero) * scale.
    Numbers: float32 arithmetic for every dtype of weight; scale rounded to float16 before the
        codes, 1 where it would be 0; symmetric: absmax * clip / 7 and zero 8; otherwise from the
        minimum and maximum (zero included) times clip; codes round half to even, clamped to 0..15.
    Raises: ValueError, TypeError for other shapes, groups and dtypes.
    """
    features, width = weight.shape
    groups = weight.float().reshape(features, width // group, group)
    codes, scale, zero = rules.int4_codes(groups, symmetric, clip)
    data = pack_nibbles(codes.to(torch.uint8).reshape(features, width))
    return data, scale[..., 0].half(), zero[..., 0].to(torch.uint8)


def _check(weight: Tensor, group: int, symmetric: bool, clip: Tensor | None) -> None:
    check.dimensions("int4_quantize", "weight", weight, 2)
    check.dtype("int4_quantize", "weight", weight, check.FLOATS)
    rules.check_group("int4_quantize", group, weight.shape[1])
    if clip is not None:
        expected = (weight.shape[0], weight.shape[1] // group)
        check.shape("int4_quantize", "clip", clip, expected)
        check.dtype("int4_quantize", "clip", clip, check.FLOATS)


def _cpu(
    native: Any, weight: Tensor, group: int, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not weight.numel():
        return reference(weight, group, symmetric, clip)
    dense, ratio = rules.dense(weight), None if clip is None else clip.float().contiguous()
    features, width = dense.shape
    data = torch.empty(features, width // 2, dtype=torch.uint8)
    scale = torch.empty(features, width // group, dtype=torch.float16)
    zero = torch.empty(features, width // group, dtype=torch.uint8)
    native.int4_quantize(
        dense.data_ptr(), check.CODES[dense.dtype], features, width, group, symmetric,
        check.pointer(ratio), data.data_ptr(), scale.data_ptr(), zero.data_ptr(), threads(),
    )  # fmt: skip
    return data, scale, zero


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    for features, width, group in ((1, 32, 32), (7, 192, 64), (33, 576, 32), (0, 64, 32)):
        for symmetric in (True, False):
            yield torch.randn(features, width, generator=generator), group, symmetric, None
    weight = torch.randn(20, 256, generator=generator)
    weight[3], weight[4] = 0, weight[4].abs()
    clip = 0.5 + 0.5 * torch.rand(20, 2, generator=generator)
    yield weight, 128, True, clip
    yield 1e3 * weight.bfloat16(), 128, False, clip
    yield weight.half()[::2, 64:], 64, True, None
    yield weight.T[:, :0], 32, False, None


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    weight = torch.zeros(4, 96)
    yield (weight[0], 32, True, None), ValueError, "weight must have 2 dimensions"
    yield (weight.int(), 32, True, None), TypeError, "weight must be float32"
    yield (weight, 16, True, None), ValueError, "group must be one of 32, 64, 128, got 16"
    yield (weight, 64, True, None), ValueError, "K = 96 must be a multiple of the group, 64"
    yield (weight, 32, True, torch.ones(4)), ValueError, "clip must have shape [4, 3]"


def _cost(weight: Tensor, group: int, symmetric: bool, clip: Tensor | None) -> tuple[float, float]:
    """One read of the weight, half a byte written a value, three bytes a group."""
    values = weight.numel()
    return values * (weight.element_size() + 0.5) + 3 * values / group, 4 * values


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for features, width in ((1536, 576), (4096, 11008)):
            yield f"{features}x{width}", (torch.randn(features, width).to(dtype), 32, True, None)


int4_quantize = op(
    __name__,
    "(Tensor weight, int group, bool symmetric=True, Tensor? clip=None) "
    "-> (Tensor, Tensor, Tensor)",
    exact=True,
)
