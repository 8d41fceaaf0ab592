"""What several kernels share: exact rounding, a soft cap, and the interpreter's limits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime import driver

PROCESSORS = 132  # streaming multiprocessors of an H100 or H200: how many programs fill the card
LOWEST = tl.constexpr(-1e30)  # a logit that is not there; differences of -inf would be NaN
INTERPRETING = tl.constexpr(triton.knobs.runtime.interpret)

DTYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


def capability() -> int:
    """Return the compute capability of the current device, such as 90 for an H100."""
    return 90 if INTERPRETING.value else driver.active.get_current_target().arch


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype that sums of ``dtype`` run in: float32, or float64 for float64."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def operand(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype of matrix operands: the interpreter multiplies bfloat16 bit patterns."""
    return tl.float32 if INTERPRETING.value and dtype == torch.bfloat16 else DTYPES[dtype]


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
def rounded_to(value, TYPE: tl.constexpr):
    """Convert to TYPE, rounding half to even; the interpreter's bfloat16 conversion truncates."""
    if INTERPRETING and tl.bfloat16 == TYPE:
        bits = value.to(tl.float32).to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        value = bits.to(tl.float32, bitcast=True)
    return value.to(TYPE)


@triton.jit
def soft_cap(z, cap):
    """Return (cap * tanh(z / cap), its derivative), each to a few units in the last place.

    tanh u = 1 - w with w = 2 / (e^2u + 1) cancels near zero: below 1 stands u + u^3 p(u^2), with p
    fitted by us. The derivative is w * (2 - w): 1 - tanh^2 would cancel near the cap.
    """
    u = tl.abs(z / cap)
    w = 2.0 / (tl.exp(2.0 * u) + 1.0)
    s = u * u
    p = 0.0025196762 + s * -0.00042374627
    p = 0.021665599 + s * (-0.0082293814 + s * p)
    p = -0.33333331 + s * (0.1333314 + s * (-0.053936094 + s * p))
    tanh = tl.where(u < 1.0, u + u * s * p, 1.0 - w)
    return cap * tl.where(z < 0, -tanh, tanh), w * (2.0 - w)


@triton.jit
def nonzero_scale(scale):
    """Return 1 where a scale would be 0: the codes are 0 there whatever divides them."""
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def int4_scale(low, high, clip, SYMMETRIC: tl.constexpr):
    """Return (scale, zero) as float32 of groups with extremes ``low`` and ``high``.

    The scale is rounded to float16, as it is stored, before anything is divided by it.
    """
    if SYMMETRIC:
        scale = tl.div_rn(tl.maximum(-low, high) * clip, tl.full(low.shape, 7.0, tl.float32))
    else:
        low = tl.minimum(low * clip, 0.0)  # zero itself stays exact
        high = tl.maximum(high * clip, 0.0)
        scale = tl.div_rn(high - low, tl.full(low.shape, 15.0, tl.float32))
    scale = nonzero_scale(tl.minimum(scale, 65504.0).to(tl.float16).to(tl.float32))
    if SYMMETRIC:
        zero = tl.full(low.shape, 8.0, tl.float32)
    else:
        zero = tl.minimum(tl.maximum(round_half_even(tl.div_rn(-low, scale)), 0.0), 15.0)
    return scale, zero


@triton.jit
def int8_scale(absmax):
    """Return the float32 scale of rows with a largest magnitude ``absmax`` (already clipped)."""
    return nonzero_scale(tl.div_rn(absmax, tl.full(absmax.shape, 127.0, tl.float32)))


@triton.jit
def int8_codes(values, scale):
    """Return values / scale, rounded half to even and clamped to -127..127, as float32."""
    return tl.minimum(tl.maximum(round_half_even(tl.div_rn(values, scale)), -127.0), 127.0)


@triton.jit
def int4_codes(values, scale, zero):
    """Return values / scale + zero, rounded half to even and clamped to 0..15, as float32."""
    return tl.minimum(tl.maximum(round_half_even(tl.div_rn(values, scale)) + zero, 0.0), 15.0)
