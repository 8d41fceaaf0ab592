"""A gated unit between its products: the activation of the gate times the other half."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tailor_engine.ops import _check as check
from tailor_engine.ops import _quantize as rules
from tailor_engine.ops._op import op, threads

#: What native code knows by its place in this list.
ACTIVATIONS = ("silu", "gelu_tanh")


def reference(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return ``activation(gate) * up``: SwiGLU with silu, GeGLU with gelu_tanh.

    Shapes: gate, up [..., F], any strides -> [..., F].
    Numbers: gate and up of one dtype, which the result has; in between float32 (float64 for
        float64). Without gradients: it stands in for a network's own where none is asked for.
    Raises: ValueError, TypeError for other shapes, dtypes and activations.
    Source: Shazeer (arXiv 2002.05202), equation 6.
    """
    wide = rules.compute_dtype(gate)
    values = gate.to(wide)
    if activation == "silu":
        values = functional.silu(values)
    else:
        values = functional.gelu(values, approximate="tanh")
    return (values * up.to(wide)).to(gate.dtype)


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    check.dtype("gated_activation", "gate", gate, check.FLOATS)
    if gate.dim() == 0:
        raise ValueError("gated_activation: gate must have at least 1 dimension, got a scalar")
    check.shape("gated_activation", "up", up, tuple(gate.shape))
    check.dtype("gated_activation", "up", up, (gate.dtype,))
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"gated_activation: activation must be one of {', '.join(ACTIVATIONS)}, "
            f"got {activation!r}"
        )


def _cpu(native: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if gate.dtype == torch.float64 or not gate.numel():
        return reference(gate, up, activation)
    y = torch.empty_like(gate, memory_format=torch.contiguous_format)
    gate, gate_stride = check.even_rows(gate)
    up, up_stride = check.even_rows(up)
    width = gate.shape[-1]
    native.gated_activation(
        gate.data_ptr(), up.data_ptr(), check.CODES[gate.dtype], gate.numel() // width, width,
        gate_stride, up_stride, ACTIVATIONS.index(activation), y.data_ptr(), threads(),
    )  # fmt: skip
    return y


def _cases() -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return 3 * torch.randn(shape, generator=generator)

    for activation in ACTIVATIONS:
        for shape in ((1, 1), (3, 33), (2, 5, 96), (0, 8), (40,), (70, 520)):
            yield normal(*shape), normal(*shape), activation
        for dtype in (torch.bfloat16, torch.float16):
            yield normal(7, 100).to(dtype), normal(7, 100).to(dtype), activation
        both = normal(9, 200)
        yield both[:, :100], both[:, 100:], activation
        yield 100 * normal(64, 6).T, normal(6, 64), activation


def _errors() -> Iterator[tuple[tuple, type[Exception], str]]:
    gate = torch.zeros(2, 8)
    yield (gate.int(), gate, "silu"), TypeError, "gate must be float32"
    yield (gate[0, 0], gate[0, 0], "silu"), ValueError, "at least 1 dimension"
    yield (gate, gate[:1], "silu"), ValueError, "up must have shape [2, 8], got [1, 8]"
    yield (gate, gate.half(), "silu"), TypeError, "up must be float32, got float16"
    yield (gate, gate, "relu"), ValueError, "one of silu, gelu_tanh, got 'relu'"


def _cost(gate: Tensor, up: Tensor, activation: str) -> tuple[float, float]:
    """Two reads and one write of the rows; thirty operations a value, of which e^x is twenty."""
    return 3 * gate.numel() * gate.element_size(), 30 * gate.numel()


def _benchmarks() -> Iterator[tuple[str, tuple]]:
    for rows in (1, 512):
        yield f"{rows}x1536", (torch.randn(rows, 1536), torch.randn(rows, 1536), "silu")


gated_activation = op(__name__, "(Tensor gate, Tensor up, str activation) -> Tensor")
