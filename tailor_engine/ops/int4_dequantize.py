"""The values of an int4 weight, as a dense matrix."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._layout import unpack_nibbles
from tailor_engine.ops._op import op, threads
from tailor_engine.ops._small_batch import queue
from tailor_engine.ops.int4_quantize import reference as quantize


def reference(
    data: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> Tensor:
    """Return (code - zero) * scale of each value.

    Shapes: data [N, K/2] uint8 in the canonical layout, scale [N, K/G] float16, zero [N, K/G]
        uint8 or None (8 everywhere) -> [N, K] of ``dtype``.
    Numbers: the product is exact in float32; one rounding to ``dtype``.
    Raises: ValueError, TypeError for other shapes, groups and dtypes.
    """
    codes = unpack_nibbles(data).unflatten(1, (scale.shape[1], group)).float()
    centred = codes - (8 if zero is None else zero.float()[..., None])
    return (centred * scale.float()[..., None]).flatten(1).to(dtype)


def check_packed(
    op_name: str, data: Tensor, scale: Tensor, zero: Tensor | None, group: int
) -> None:
    """Check an int4 weight in the canonical layout."""
    check.dimensions(op_name, "data", data, 2)
    check.dtype(op_name, "data", data, (torch.uint8,))
    rules.check_group(op_name, group, 2 * data.shape[1])
    check_groups(op_name, scale, zero, (data.shape[0], 2 * data.shape[1] // group))


def check_groups(
    op_name: str, scale: Tensor, zero: Tensor | None, expected: tuple[int, ...]
) -> None:
    """Check scales and zero points [N, K/G]."""
    check.shape(op_name, "scale", scale, expected)
    check.dtype(op_name, "scale", scale, (torch.float16,))
    if zero is not None:
        check.shape(op_name, "zero", zero, expected)
        check.dtype(op_name, "zero", zero, (torch.uint8,))


def _check(
    data: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> None:
    check_packed("int4_dequantize", data, scale, zero, group)
    if dtype not in check.FLOATS:
        raise TypeError(f"int4_dequantize: dtype must be a floating-point one, got {dtype}")


def _cpu(
    native: Any,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    if dtype == torch.float64:
        return reference(data, scale, zero, group, dtype)
    data, scale = check.rows_contiguous(data), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    rows, groups = scale.shape
    out = torch.empty(rows, groups * group, dtype=dtype)
    native.int4_dequantize(
        data.data_ptr(), data.stride(0), scale.data_ptr(), check.pointer(zero), rows, groups,
        group, out.data_ptr(), check.CODES[dtype], threads(),
    )  # fmt: skip
    return out


def _cuda(
    native: Any,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    dtype: torch.dtype,
) -> Tensor:
    if dtype == torch.float64:
        return reference(data, scale, zero, group, dtype)
    data, scale = data.contiguous(), scale.contiguous()
    data = data if data.data_ptr() % 16 == 0 else data.clone()
    zero = None if zero is None else zero.contiguous()
    out = torch.empty(data.shape[0], 2 * data.shape[1], dtype=dtype, device=data.device)
    with queue(data.device) as stream:
        native.int4_dequantize(
            data.data_ptr(), scale.data_ptr(), check.pointer(zero), out.numel(), group,
            out.data_ptr(), check.CODES[dtype], stream,
        )  # fmt: skip
    return out


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, 32, 32), (17, 192, 64), (40, 576, 32), (0, 64, 32), (9, 256, 128))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float32, torch.float64)
    for (features, width, group), dtype in zip(shapes, dtypes, strict=True):
        for symmetric in (True, False):
            weight = torch.randn(features, width, generator=generator)
            data, scale, zero = quantize(weight, group, symmetric)
            yield data, scale, None if symmetric else zero, group, dtype
    data, scale, zero = quantize(torch.randn(16, 256, generator=generator), 32, False)
    yield data[::2, 16:], scale[::2, 1:], zero[::2, 1:], 32, torch.float32


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    data, scale, zero = quantize(torch.ones(4, 96), 32)
    f32 = torch.float32
    yield (data[0], scale, zero, 32, f32), ValueError, "data must have 2 dimensions"
    yield (data.int(), scale, zero, 32, f32), TypeError, "data must be uint8, got int32"
    yield (data, scale, zero, 48, f32), ValueError, "group must be one of 32, 64, 128, got 48"
    yield (data, scale, zero, 64, f32), ValueError, "K = 96 must be a multiple of the group, 64"
    yield (data, scale[:, :2], zero, 32, f32), ValueError, "scale must have shape [4, 3]"
    yield (data, scale.float(), zero, 32, f32), TypeError, "scale must be float16"
    yield (data, scale, zero.float(), 32, f32), TypeError, "zero must be uint8"
    yield (data, scale, zero, 32, torch.int8), TypeError, "dtype must be a floating-point one"


def _cost(
    data: Tensor, scale: Tensor, zero: Tensor | None, group: int, dtype: torch.dtype
) -> tuple[float, float]:
    """One read of the packed weight, one write of the values; two operations a value."""
    read = data.numel() + 2 * scale.numel() + (0 if zero is None else zero.numel())
    return read + 2 * data.numel() * dtype.itemsize, 4 * data.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for dtype in (torch.float32, torch.bfloat16):
        for features, width in ((1536, 576), (4096, 11008)):
            data = torch.randint(256, (features, width // 2), dtype=torch.uint8)
            scale = torch.rand(features, width // 32).half()
            yield f"{features}x{width}", (data, scale, None, 32, dtype)


int4_dequantize = op(
    __name__,
    "(Tensor data, Tensor scale, Tensor? zero, int group, ScalarType dtype) -> Tensor",
    exact=True,
)
