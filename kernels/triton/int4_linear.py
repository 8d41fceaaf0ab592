"""int4_linear: codes multiplied group by group as exact small numbers, scaled in float32.

A group's codes minus its zero point are integers within -15..15, exact as int8, float16 and
bfloat16; so the product of a group is taken of integers, and its scale is applied to the sum.
Nothing is rounded that the definition does not round.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels import int4_dequantize
from tailor_engine.kernels._device import accumulator, operand, power_of_two, rounded_to
from tailor_engine.kernels._tokens import ORDERS, prepare

DENSE_TOKENS = 2048  # from here unpacking once and a dense product win: kernels/README.md


def config(
    tokens: int, features: int, group: int, layout: str, quantize_activations: bool
) -> dict[str, int | bool]:
    """Choose the tile, or to unpack the weight once for a dense product.

    The weight is the left operand, so that unpacked codes stay in registers.
    """
    block_t = power_of_two(tokens, 16, 64)
    return {
        "dense": tokens >= DENSE_TOKENS and layout == "canonical" and not quantize_activations,
        "block_n": 128 if block_t == 64 else 64,
        "block_t": block_t,
        "warps": 8 if block_t == 64 else 4,
        "stages": 4 if block_t == 16 else 3,
        # Half a group of 32 is shorter than one int8 instruction; float16 products of these
        # integers, at most 127 * 15, and their sum of 16 are exact as well.
        "integer": quantize_activations and group >= 64,
    }


@triton.jit
def product_kernel(
    x, token_scale, data, scale, zero, bias, y, tokens, features, width,
    QUANTIZED: tl.constexpr, PANEL: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of features with a tile of tokens and write y [T, N]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    byte = tl.arange(0, G // 2)
    half = width // 2
    groups = width // G
    here = n < features
    low_values = x + t.to(tl.int64)[None, :] * width + byte[:, None]
    if PANEL:  # 16 features by 4 bytes lie together, scales by [K/G][16]: ops/_layout.py
        bytes_at = data + (n // 16)[:, None] * (half * 16) + (n % 16)[:, None] * 4
        bytes_at += (byte // 4)[None, :] * 64 + (byte % 4)[None, :]
        scale_step = tl.minimum(features - n // 16 * 16, 16)
        scale_at = n // 16 * (16 * groups) + n % 16
        step = G * 8
    else:
        bytes_at = data + n[:, None] * half + byte[None, :]
        scale_step = tl.full([BN], 1, tl.int64)
        scale_at = n * groups
        step = G // 2
    total = tl.zeros([BN, BT], ACC)
    for g in range(0, groups):
        packed = tl.load(bytes_at + tl.cast(g, tl.int64) * step, mask=here[:, None], other=0)
        at = scale_at + g * scale_step
        centre = tl.full([BN], 8, tl.int8)
        if HAS_ZERO:
            centre = tl.load(zero + at, mask=here, other=0).to(tl.int8)
        low = ((packed & 15).to(tl.int8) - centre[:, None]).to(OPERAND)
        high = ((packed >> 4).to(tl.int8) - centre[:, None]).to(OPERAND)
        values_at = low_values + g * (G // 2)
        first = tl.load(values_at, mask=(t < tokens)[None, :], other=0).to(OPERAND)
        second = tl.load(values_at + half, mask=(t < tokens)[None, :], other=0).to(OPERAND)
        part = tl.dot(low, first, input_precision="ieee", out_dtype=SUM)
        part = tl.dot(high, second, part, input_precision="ieee", out_dtype=SUM)
        total += part.to(ACC) * tl.load(scale + at, mask=here, other=0).to(ACC)[:, None]
    if QUANTIZED:
        total *= tl.load(token_scale + t, mask=t < tokens, other=0).to(ACC)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=here, other=0).to(ACC)[:, None]
    out = y + t.to(tl.int64)[:, None] * features + n[None, :]
    inside = (t < tokens)[:, None] & here[None, :]
    tl.store(out, rounded_to(tl.trans(total), y.dtype.element_ty), mask=inside)


def dense(rows: Tensor, packed: tuple, bias: Tensor | None, group: int) -> Tensor:
    """Unpack the weight in the dtype of the tokens and multiply with torch."""
    weight = int4_dequantize.launch(*packed, group, rows.dtype)
    if bias is None:
        return torch.mm(rows, weight.t())
    return torch.addmm(bias.to(rows.dtype), rows, weight.t())


def launch(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Reorder (and quantize) the tokens, then run the product; or unpack, for many tokens."""
    features, width = scale.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = x.reshape(y.numel() // features, width)
    tokens = rows.shape[0]
    chosen = config(tokens, features, group, layout, quantize_activations)
    if chosen["dense"]:
        return dense(rows, (data, scale, zero), bias, group).view_as(y)
    values, token_scale = prepare(rows, quantize_activations, ORDERS[layout])
    acc = accumulator(x.dtype)
    if quantize_activations:
        kind, total = (tl.int8, tl.int32) if chosen["integer"] else (tl.float16, tl.float32)
    else:
        kind, total = operand(x.dtype), acc
    grid = triton.cdiv(tokens, chosen["block_t"]), triton.cdiv(features, chosen["block_n"])
    product_kernel[grid](
        values, token_scale, data.contiguous(), scale.contiguous(),
        scale if zero is None else zero.contiguous(),
        scale if bias is None else bias.contiguous(), y, tokens, features, width,
        QUANTIZED=quantize_activations, PANEL=layout == "cpu", HAS_ZERO=zero is not None,
        HAS_BIAS=bias is not None, OPERAND=kind, SUM=total, ACC=acc, G=group,
        BN=chosen["block_n"], BT=chosen["block_t"],
        num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    return y
