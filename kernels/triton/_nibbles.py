"""Two int4 codes a byte, as operands of a product.

The interpreter has no inline assembly: there the plain expressions of the same values stand.
"""

from __future__ import annotations

import triton
import triton.language as tl

from tailor_engine.kernels._device import INTERPRETING, rounded_to


@triton.jit
def integers(packed, centre, OPERAND: tl.constexpr):
    """Return (low, high) codes minus ``centre``, exact in OPERAND.

    Four bytes at a time: 128 + code - centre borrows from no neighbour, and flipping the top bit
    takes the 128 off. Byte by byte this is 4 instructions a code instead of one.
    """
    if INTERPRETING or tl.int8 != OPERAND:
        low = (packed & 15).to(tl.int8) - centre
        high = (packed >> 4).to(tl.int8) - centre
        return low.to(OPERAND), high.to(OPERAND)
    else:
        return tl.inline_asm_elementwise(
            """{ .reg .b32 low, high;
            lop3.b32 low, $2, 0x0f0f0f0f, 0x80808080, 0xea;
            shr.u32 high, $2, 4;
            lop3.b32 high, high, 0x0f0f0f0f, 0x80808080, 0xea;
            sub.u32 low, low, $3;
            sub.u32 high, high, $3;
            xor.b32 $0, low, 0x80808080;
            xor.b32 $1, high, 0x80808080; }""",
            "=r,=r,r,r", [packed, tl.broadcast_to(centre, packed.shape)],
            dtype=(tl.int8, tl.int8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def weights(packed, scale, zero, TYPE: tl.constexpr, OPERAND: tl.constexpr):
    """Return (low, high) values (code - zero) * scale, scale and product each rounded to TYPE.

    A code in the last bits of 128 (bfloat16) or 1024 (float16) is a number at once: multiplied by
    2^12 + 1 and masked, a byte holds both. The difference to zero is exact.
    """
    if INTERPRETING or TYPE.primitive_bitwidth != 16:
        step = rounded_to(scale, TYPE).to(OPERAND)
        low = ((packed & 15).to(OPERAND) - zero.to(OPERAND)) * step
        high = ((packed >> 4).to(OPERAND) - zero.to(OPERAND)) * step
        return rounded_to(low, TYPE).to(OPERAND), rounded_to(high, TYPE).to(OPERAND)
    else:
        MAGIC: tl.constexpr = 0x43004300 if tl.bfloat16 == TYPE else 0x64006400
        BASE: tl.constexpr = 128.0 if tl.bfloat16 == TYPE else 1024.0
        both = (packed.to(tl.int32) * 0x1001) & 0x000F000F | MAGIC
        low, high = tl.inline_asm_elementwise(
            "mov.b32 {$0, $1}, $2;", "=h,=h,r", [both],
            dtype=(tl.int16, tl.int16), is_pure=True, pack=1,
        )  # fmt: skip
        low, high = low.to(TYPE, bitcast=True), high.to(TYPE, bitcast=True)
        base, step = (zero.to(tl.float32) + BASE).to(TYPE), scale.to(TYPE)
        return (low - base) * step, (high - base) * step
