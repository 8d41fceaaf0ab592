"""What the two losses do along a row of logits: read it, and sum exponentials as they go.

A row stands in memory as blocks of G x E logits. The E logits that a thread loads at once (16
bytes) are one line of the block, so that what runs along a line needs no other thread: each of the
G lines keeps a largest logit and sums of its own, and only the end of a row brings them together.
Exponents are powers of two throughout: that is what the hardware raises to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tailor_engine.kernels._device import LOWEST, soft_cap

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def places(start, G: tl.constexpr, E: tl.constexpr):
    """Return the vocabulary ids [G, E] of a block."""
    return start + tl.arange(0, G)[:, None] * E + tl.arange(0, E)[None, :]


@triton.jit
def read(
    row, v, vocabulary, stride, cap, HOLES: tl.constexpr, CAPPED: tl.constexpr,
    LAST: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return a block of (capped) logits, LOWEST where there is none, and the cap's derivative.

    A row is padded to `stride`: whole 16-byte loads stay inside, whatever the vocabulary. HOLES
    are logits that were taken out of the row, by -inf.
    """
    if LAST:
        z = tl.load(row + v, mask=v < stride, other=0).to(ACC)
        z = tl.where(v < vocabulary, z, float("-inf"))
    else:
        z = tl.load(row + v).to(ACC)
    there = z != float("-inf")
    slope = 1.0
    if CAPPED:
        z, slope = soft_cap(z, cap)
    if LAST or HOLES:
        z = tl.where(there, z, LOWEST)  # finite, for a difference of infinities would be NaN
    return z, slope


@triton.jit
def write(row, v, value, stride, LAST: tl.constexpr):
    """Write a block of gradients, with LAST the padding too (nobody reads it)."""
    if LAST:
        tl.store(row + v, value, mask=v < stride)
    else:
        tl.store(row + v, value)


@triton.jit
def write_zeros(row, stride, G: tl.constexpr, E: tl.constexpr):
    """Give a row that does not count no gradient."""
    zeros = tl.zeros([G, E], row.dtype.element_ty)
    for start in range(0, stride, G * E):
        write(row, places(start, G, E), zeros, stride, True)


@triton.jit
def softened(z, scale, low, FINE: tl.constexpr):
    """Return z / temperature in bits: log2(e) / temperature is the sum of two float32.

    One rounded factor would shift all of a row the same way. That is below the rounding of 16-bit
    logits, so only FINE ones (float32, float64) pay for the second.
    """
    if FINE:
        return z * scale + z * low
    return z * scale


@triton.jit
def raised(z, most, scale, low, FINE: tl.constexpr):
    """Return each line's new largest logit, what older sums shrink by, and 2^(z - it)."""
    top = tl.maximum(most, tl.max(z, 1))
    shrink = tl.exp2(softened(most - top, scale, low, FINE))
    return top, shrink, tl.exp2(softened(z - top[:, None], scale, low, FINE))


@triton.jit
def shares(most, top, scale, low, FINE: tl.constexpr):
    """Return what each line's sums count for in the row's, whose largest logit is `top`."""
    return tl.exp2(softened(most - top, scale, low, FINE))
