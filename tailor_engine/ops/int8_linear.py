"""Linear layer over int8 weights, with int8 activations quantized token by token (W8A8)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops import _small_batch as small_batch
from tailor_engine.ops._layout import from_panels, to_panels
from tailor_engine.ops._op import op, threads
from tailor_engine.ops.int8_quantize import reference as quantize


def reference(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    layout: str = "canonical",
    quantize_activations: bool = True,
) -> Tensor:
    """Return ``x @ (data * scale).T + bias``.

    Shapes: x [..., K], scale [N] float32, bias [N] or None -> [..., N] in the dtype of x;
        data int8 [N, K] ("canonical") or [N/16, K/4, 16, 4] ("cpu", see ops/_layout.py).
    Numbers: each token is quantized to int8 by absmax / 127 in float32, the integer products are
        exact, the sum is scaled by token and feature in float32 (float64 for float64 x).
        quantize_activations=False multiplies x itself with the dequantized weight.
        The gradient for x is ``grad @ (data * scale)``, straight through the rounding of x.
    Raises: ValueError, TypeError for other shapes, dtypes and layouts.
    """
    dtype = rules.compute_dtype(x)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    weight = canonical(data, scale, layout, x.shape[-1])
    if quantize_activations:
        codes, token_scale = rules.activation_codes(rows)
        sums = (codes.double() @ weight.double().t()).to(dtype)
        y = sums * token_scale.to(dtype) * scale.to(dtype)
    else:
        y = rows.to(dtype) @ (weight.to(dtype) * scale.to(dtype)[:, None]).t()
    if bias is not None:
        y = y + bias.to(dtype)
    return y.to(x.dtype).reshape(*x.shape[:-1], scale.shape[0])


def canonical(data: Tensor, scale: Tensor, layout: str, width: int) -> Tensor:
    """Return the int8 weight [N, K] of either layout."""
    return data if layout == "canonical" else from_panels(data, 8, scale.shape[0], width)


def _check(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> None:
    check.dimensions("int8_linear", "scale", scale, 1)
    check.dtype("int8_linear", "scale", scale, (torch.float32,))
    check.dtype("int8_linear", "data", data, (torch.int8,))
    rules.check_linear("int8_linear", x, bias, layout, scale.shape[0])
    features, width = scale.shape[0], x.shape[-1]
    expected = (features, width) if layout == "canonical" else rules.panel_shape(features, width, 8)
    check.shape("int8_linear", "data", data, expected)


def _cpu(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Repack the canonical layout on the fly; leave weight-only and float64 to plain torch."""
    if not quantize_activations or x.dtype == torch.float64 or not x.numel():
        return reference(x, data, scale, bias, layout, quantize_activations)
    if layout == "canonical":
        data = to_panels(data, 8)
    features, width = scale.shape[0], x.shape[-1]
    x, stride = rules.row_stride(x)
    rows = x.numel() // width
    data, scale = data.contiguous(), scale.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    y = torch.empty((*x.shape[:-1], features), dtype=x.dtype)
    workspace = rules.workspace(rows, width, 1)
    native.int8_linear(
        x.data_ptr(), check.CODES[x.dtype], rows, width, stride, data.data_ptr(),
        scale.data_ptr(), check.pointer(bias), y.data_ptr(), features,
        check.pointer(workspace), threads(),
    )  # fmt: skip
    return y


def _cuda(
    native: Any,
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Take few tokens, and leave the rest to Triton: see :func:`small_batch.path`."""
    features, width = scale.shape[0], x.shape[-1]
    tokens = math.prod(x.shape[:-1])
    way = small_batch.path(tokens, features, width, 8, x.dtype, layout, quantize_activations)
    if way == "small batch":
        return small_batch.linear(native, x, data, scale, None, bias, 0, True)
    other = small_batch.elsewhere(int8_linear, x.device.type)
    return other(x, data, scale, bias, layout, quantize_activations)


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def packed(features: int, width: int, layout: str) -> tuple[Tensor, Tensor]:
        data, scale = quantize(torch.randn(features, width, generator=generator))
        return (to_panels(data, 8) if layout == "cpu" else data), scale

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    yield rows(1, 64), *packed(32, 64, "canonical"), None, "canonical", True
    yield rows(1, 576), *packed(100, 576, "cpu"), rows(100), "cpu", True
    yield rows(33), *packed(7, 33, "cpu"), None, "cpu", True
    yield rows(3, 5, 130).bfloat16(), *packed(50, 130, "cpu"), rows(50).bfloat16(), "cpu", True
    yield 10 * rows(37, 96).half(), *packed(16, 96, "cpu"), None, "cpu", True
    spiky = rows(65, 200)
    spiky[3], spiky[5, 7] = 0, 1e6
    yield spiky, *packed(130, 200, "cpu"), None, "cpu", True
    yield rows(20, 300)[::2, 3:100], *packed(33, 97, "canonical"), None, "canonical", True
    yield rows(64, 9).T, *packed(40, 64, "cpu"), None, "cpu", True
    yield rows(0, 32), *packed(8, 32, "cpu"), None, "cpu", True
    # More rows than one block of 128; rows that start at any address.
    yield rows(133, 72), *packed(19, 72, "cpu"), None, "cpu", True
    yield rows(14, 194)[:, 1:], *packed(33, 193, "cpu"), rows(33), "cpu", True
    yield rows(5, 64), *packed(24, 64, "canonical"), rows(24), "canonical", False
    yield rows(5, 66).bfloat16(), *packed(24, 66, "cpu"), None, "cpu", False
    yield 1e3 * rows(9, 1040), *packed(70, 1040, "cpu"), rows(70), "cpu", True
    # The largest codes, of equal signs and of both: what sums of 16 bits must hold.
    rest = (None, "canonical", True)
    signs = rows(24, 104).sign()
    yield torch.cat((signs[:3], -signs[:3], rows(5, 104).clamp(-1, 1))), *quantize(signs), *rest
    lowest = torch.full((24, 104), -128, dtype=torch.int8)
    yield torch.cat((signs[:3], signs[:3].abs(), -signs[:3].abs())), lowest, torch.ones(24), *rest


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    x, data, scale = torch.zeros(2, 8), torch.zeros(4, 8, dtype=torch.int8), torch.ones(4)
    rest = (None, "canonical", True)
    yield (x.int(), data, scale, *rest), TypeError, "x must be float32"
    yield (x[:, :7], data, scale, *rest), ValueError, "data must have shape [4, 7], got [4, 8]"
    yield (x, data.float(), scale, *rest), TypeError, "data must be int8, got float32"
    yield (x, data, scale[:, None], *rest), ValueError, "scale must have 1 dimensions"
    yield (x, data, scale.half(), *rest), TypeError, "scale must be float32, got float16"
    yield (x, data, scale, torch.ones(3), "canonical", True), ValueError, "bias must have shape [4]"
    yield (x, data, scale, None, "gpu", True), ValueError, "layout must be one of canonical, cpu"
    yield (x, data, scale, None, "cpu", True), ValueError, "data must have shape [1, 2, 16, 4]"


def _cost(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> tuple[float, float]:
    """Weight, x and output once; two operations a product."""
    tokens, features = x.numel() // max(1, x.shape[-1]), scale.shape[0]
    moved = data.numel() + 4 * features + (x.numel() + tokens * features) * x.element_size()
    return moved, 2.0 * x.numel() * features


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for rows, width, features in rules.BENCHMARK_SHAPES:
        shape = rules.panel_shape(features, width, 8)
        data = torch.randint(-127, 128, shape, dtype=torch.int8)
        scale, x = torch.rand(features) / 100, torch.randn(rows, width)
        yield f"{rows}x{width}x{features}", (x, data, scale, None, "cpu", True)


int8_linear = op(
    __name__,
    "(Tensor x, Tensor data, Tensor scale, Tensor? bias=None, str layout='canonical', "
    "bool quantize_activations=True) -> Tensor",
    arithmetic="int8",
)


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, data, scale, bias, ctx.layout, _ = inputs
    ctx.save_for_backward(data, scale)
    ctx.width, ctx.bias_dtype = x.shape[-1], None if bias is None else bias.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple:
    data, scale = ctx.saved_tensors
    d_x = d_bias = None
    if ctx.needs_input_grad[0]:
        dtype = rules.compute_dtype(grad)
        weight = canonical(data, scale, ctx.layout, ctx.width).to(dtype) * scale.to(dtype)[:, None]
        d_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[3]:
        d_bias = grad.reshape(-1, scale.shape[0]).sum(0).to(ctx.bias_dtype)
    return d_x, None, None, d_bias, None, None


int8_linear.gradient(_backward, _save)
