"""What several kernels share: exact rounding, an accurate tanh, and the interpreter's limits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PROCESSORS = 132  # streaming multiprocessors of an H100 or H200: how many programs fill the card
INTERPRETING = triton.knobs.runtime.interpret

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype that sums of ``dtype`` run in: float32, or float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of matrix operands: the interpreter multiplies bfloat16 bit patterns."""
    return tl.float32 if INTERPRETING and dtype == torch.bfloat16 else DTYPES[dtype]


def power_of_two(value: int, low: int, high: int) -> int:
    """Return the smallest power of two that holds ``value``, between two limits."""
    return max(low, min(high, triton.next_power_of_2(max(value, 1))))


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, ties to even, for float32 below 2^22 in magnitude.

    Adding 1.5 * 2^23 leaves no bits for a fraction, so the addition itself rounds as IEEE asks. An
    external rounding function would be one instruction less, but the interpreter cannot call one.
    """
    return (x + 12582912.0) - 12582912.0


@triton.jit
def tanh(x):
    """Hyperbolic tangent to a few units in the last place; the plain formula cancels near zero."""
    square = x * x
    small = x * (1.0 + square * (-0.33333333 + square * (0.13333333 + square * -0.053968254)))
    large = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.15, small, large)
