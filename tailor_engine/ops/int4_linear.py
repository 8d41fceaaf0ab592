"""Linear layer over int4 weights in groups, with int8 activations quantized token by token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops import _small_batch as small_batch
from tailor_engine.ops._layout import from_panels, groups_from_panels, groups_to_panels, to_panels
from tailor_engine.ops._op import op, threads
from tailor_engine.ops.int4_dequantize import check_groups, int4_dequantize
from tailor_engine.ops.int4_dequantize import reference as dequantize
from tailor_engine.ops.int4_quantize import reference as quantize


def reference(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str = "canonical",
    quantize_activations: bool = True,
) -> Tensor:
    """Return ``x @ ((code - zero) * scale).T + bias``.

    Shapes: x [..., K], bias [N] or None -> [..., N] in the dtype of x; scale [N, K/G] float16,
        zero [N, K/G] uint8 or None (8 everywhere); data uint8 [N, K/2] ("canonical") or
        [N/16, K/8, 16, 4] ("cpu"; scale and zero are then in its order, see ops/_layout.py).
    Numbers: each token is quantized to int8 by absmax / 127 in float32 (W4A8), the integer
        products of a group are exact, groups are scaled and summed in float32 (float64 for
        float64 x). quantize_activations=False multiplies x itself with the dequantized weight.
        The gradient for x is ``grad @ weight``, straight through the rounding of x.
    Raises: ValueError, TypeError for other shapes, groups, dtypes and layouts.
    """
    dtype = rules.compute_dtype(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weight = dequantize(*canonical(data, scale, zero, layout, x.shape[-1]), group, dtype)
    if quantize_activations:
        codes, token_scale = rules.activation_codes(rows)
        y = (codes.to(dtype) @ weight.t()) * token_scale.to(dtype)
    else:
        y = rows.to(dtype) @ weight.t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], scale.shape[0])


def canonical(
    data: Tensor, scale: Tensor, zero: Tensor | None, layout: str, width: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return (data, scale, zero) of either layout in the canonical one."""
    if layout == "canonical":
        return data, scale, zero
    data = from_panels(data, 4, scale.shape[0], width)
    return data, groups_from_panels(scale), None if zero is None else groups_from_panels(zero)


def panels(
    data: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return canonical (data, scale, zero) in the "cpu" layout."""
    return (
        to_panels(data, 4),
        groups_to_panels(scale),
        None if zero is None else groups_to_panels(zero),
    )


def _check(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> None:
    check.dimensions("int4_linear", "scale", scale, 2)
    check.dtype("int4_linear", "data", data, (torch.uint8,))
    features, width = scale.shape[0], x.shape[-1] if x.dim() else 0
    rules.check_linear("int4_linear", x, bias, layout, features)
    rules.check_group("int4_linear", group, width)
    canonical_shape = (features, width // 2)
    expected = canonical_shape if layout == "canonical" else rules.panel_shape(features, width, 4)
    check.shape("int4_linear", "data", data, expected)
    check_groups("int4_linear", scale, zero, (features, width // group))


def _cpu(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Repack the canonical layout on the fly; leave weight-only and float64 to plain torch."""
    if not quantize_activations or x.dtype == torch.float64 or not x.numel():
        return reference(x, data, scale, zero, bias, group, layout, quantize_activations)
    if layout == "canonical":
        data, scale, zero = panels(data, scale, zero)
    (features, groups), width = scale.shape, x.shape[-1]
    x, stride = rules.row_stride(x)
    rows = x.numel() // width
    data, scale = data.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty((*x.shape[:-1], features), dtype=x.dtype)
    workspace = rules.workspace(rows, width, groups)
    native.int4_linear(
        x.data_ptr(), check.CODES[x.dtype], rows, width, stride, data.data_ptr(),
        scale.data_ptr(), check.pointer(zero), groups, check.pointer(bias), y.data_ptr(), features,
        check.pointer(workspace), threads(),
    )  # fmt: skip
    return y


def _cuda(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Take few tokens, and leave the rest to Triton: see :func:`small_batch.path`."""
    features, width = scale.shape[0], x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    way = small_batch.path(tokens, features, width, 4, x.dtype, layout, quantize_activations)
    if way == "small batch":
        return small_batch.linear(native, x, data, scale, zero, bias, group, quantize_activations)
    if way == "unpack":
        return small_batch.unpacked_linear(native, x, data, scale, zero, bias, group)
    other = small_batch.elsewhere(int4_linear, x.device.type)
    return other(x, data, scale, zero, bias, group, layout, quantize_activations)


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def packed(
        features: int, width: int, group: int, symmetric: bool, layout: str
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = torch.randn(features, width, generator=generator)
        data, scale, zero = quantize(weight, group, symmetric)
        parts = data, scale, None if symmetric else zero
        return panels(*parts) if layout == "cpu" else parts

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield rows(1, 64), *packed(32, 64, 32, True, "canonical"), None, 32, "canonical", True
    yield rows(1, 576), *packed(100, 576, 64, True, "cpu"), rows(100), 64, "cpu", True
    yield rows(2, 256), *packed(33, 256, 128, False, "cpu"), None, 128, "cpu", True
    yield rows(32), *packed(7, 32, 32, False, "cpu"), rows(7), 32, "cpu", True
    bias = rows(50).bfloat16()
    yield rows(3, 5, 192).bfloat16(), *packed(50, 192, 64, True, "cpu"), bias, 64, "cpu", True
    yield 10 * rows(37, 96).half(), *packed(16, 96, 32, False, "cpu"), None, 32, "cpu", True
    spiky = rows(65, 256)
    spiky[3], spiky[5, 7] = 0, 1e6
    yield spiky, *packed(130, 256, 32, True, "cpu"), None, 32, "cpu", True
    parts = packed(33, 96, 32, False, "canonical")
    yield rows(20, 300)[::2, 3:99], *parts, None, 32, "canonical", True
    yield rows(128, 9).T, *packed(40, 128, 64, False, "cpu"), None, 64, "cpu", True
    yield rows(0, 32), *packed(8, 32, 32, True, "cpu"), None, 32, "cpu", True
    yield rows(6, 96), *packed(37, 96, 32, False, "cpu"), rows(37), 32, "cpu", True
    # More rows than one block of 128, more k than one unpacked chunk of 1024, odd features.
    yield rows(133, 1120), *packed(19, 1120, 32, False, "cpu"), None, 32, "cpu", True
    yield rows(13, 1152), *packed(17, 1152, 128, True, "cpu"), None, 128, "cpu", True
    # Rows that start at any address: one float after an aligned one, an odd number apart.
    yield rows(14, 193)[:, 1:], *packed(33, 192, 64, False, "cpu"), rows(33), 64, "cpu", True
    yield rows(5, 64), *packed(24, 64, 64, False, "canonical"), rows(24), 64, "canonical", False
    yield rows(5, 128).bfloat16(), *packed(24, 128, 128, True, "cpu"), None, 128, "cpu", False


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, (data, scale, zero) = torch.zeros(2, 96), quantize(torch.ones(4, 96), 32)
    rest = (None, 32, "canonical", True)
    yield (x.int(), data, scale, zero, *rest), TypeError, "x must be float32"
    yield (x[:, :64], data, scale, zero, *rest), ValueError, "data must have shape [4, 32]"
    yield (x, data.char(), scale, zero, *rest), TypeError, "data must be uint8, got int8"
    yield (x, data, scale[0], zero, *rest), ValueError, "scale must have 2 dimensions"
    yield (x, data, scale.float(), zero, *rest), TypeError, "scale must be float16, got float32"
    yield (x, data, scale, zero[:, :1], *rest), ValueError, "zero must have shape [4, 3]"
    yield (x, data, scale, zero, None, 64, "canonical", True), ValueError, "multiple of the group"
    yield (x, data, scale, zero, None, 31, "canonical", True), ValueError, "got 31"
    yield (x, data, scale, zero, x, 32, "canonical", True), ValueError, "bias must have shape [4]"
    yield (x, data, scale, zero, None, 32, "gpu", True), ValueError, "layout must be one of"
    yield (x, data, scale, zero, None, 32, "cpu", True), ValueError, "shape [1, 12, 16, 4]"


def _cost(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> tuple[float, float]:
    """Weight, scales, x and output once; two operations a product."""
    tokens, features = x.numel() // max(1, x.shape[-1]), scale.shape[0]
    weight = data.numel() + 2 * scale.numel() + (0 if zero is None else zero.numel())
    return weight + (x.numel() + tokens * features) * x.element_size(), 2.0 * x.numel() * features


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for rows, width, features in rules.BENCHMARK_SHAPES:
        width += -width % 32
        shape = rules.panel_shape(features, width, 4)
        data = torch.randint(0, 256, shape, dtype=torch.uint8)
        scale = (torch.rand(features, width // 32) / 100).half()
        x = torch.randn(rows, width)
        yield f"{rows}x{width}x{features}", (x, data, scale, None, None, 32, "cpu", True)


int4_linear = op(
    __name__,
    "(Tensor x, Tensor data, Tensor scale, Tensor? zero, Tensor? bias, int group, "
    "str layout='canonical', bool quantize_activations=True) -> Tensor",
    arithmetic="int4",
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, data, scale, zero, bias, ctx.group, ctx.layout, _ = inputs
    ctx.save_for_backward(data, scale, zero)
    ctx.width, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    data, scale, zero = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        parts = canonical(data, scale, zero, ctx.layout, ctx.width)
        d_x = grad @ int4_dequantize(*parts, ctx.group, grad.dtype)
    if ctx.needs_input_grad[4]:
        d_bias = grad.reshape(-1, scale.shape[0]).sum(0).to(ctx.bias_dtype)
    return d_x, None, None, None, d_bias, None, None, None


int4_linear.gradient(_backward, _save)
