"""int4_linear: unpacked in registers, group by group, beside tokens as they lie.

Weight-only, a weight is (code - zero) * scale in the tokens' dtype, rounded as int4_dequantize
and a dense product would, and one sum runs through all groups. A sum a group, scaled afterwards,
would round less but holds twice the registers and drains the tensor cores once a group.
With int8 tokens a group's product is one of integers; its scale, in float32, meets the exact sum.
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels import int4_dequantize
from tailor_engine.kernels._device import DTYPES, accumulator, capability, operand, rounded_to
from tailor_engine.kernels._nibbles import integers, weights
from tailor_engine.kernels._tiles import (
    GROUPED,
    add_parts,
    finished,
    partial_sums,
    parts,
    stages,
    tile_of,
    tiles,
)
from tailor_engine.kernels._tokens import ORDERS, prepare

DENSE_TOKENS = 2048  # from here unpacking once and a dense product win: kernels/README.md


def describe(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    group: int,
    layout: str,
    quantize_activations: bool,
) -> tuple[int, int, int, int, str, bool, int, int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    features, width = scale.shape[0], x.shape[-1]
    size = 1 if quantize_activations else x.element_size()
    rows = math.prod(x.shape[:-1])
    return rows, features, width, group, layout, quantize_activations, size, capability()


def candidates(
    tokens: int,
    features: int,
    width: int,
    group: int,
    layout: str,
    quantize_activations: bool,
    size: int,
    capability: int,
) -> list[dict[str, int | bool]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    =====================  ============================================================
    tokens                 choice and reason
    =====================  ============================================================
    up to 64               64 features by all tokens: unpacked once; K is shared by up to
                           eight programs until every processor has its 8 or 16 warps
    to 256                 64 x 64, 64 x 128: the largest that still fills the card
    beyond                 128 x 256 unpacks once for 256 tokens: 410 instructions a warp
                           where the tensor cores need 2,048 cycles, two warps a scheduler
    from 2048, weight-only unpack once into memory, then a dense product; so does float64, whose
                           products Triton 3.6 cannot take of anything converted from bytes
    =====================  ============================================================

    128 tokens are the most where registers hold more than the sums: those of a group too (int8
    tokens), or, before sm_90, the tokens (128 x 256 spills 264 bytes, and weight-only 128 x 128
    spills 8).
    """
    twice = quantize_activations or capability < 90
    chosen = tiles(tokens, features, 128 if twice else 256)
    if capability < 90 and not quantize_activations:
        chosen = [tile for tile in chosen if tile["block_n"] == 64]
    if size > 2:  # no tensor cores for float32 as it is: small tiles of plain products
        chosen = [{"block_n": 256 // size, "block_t": 16, "warps": 4}]
    found: list[dict[str, int | bool]] = []
    for tile in chosen:
        step_bytes = group * (tile["block_n"] // 2 + tile["block_t"] * size)
        depth = stages(step_bytes, capability, 5 if tile["block_t"] <= 32 else 4)
        shared = parts(tile, tokens, features, width // group)
        for split in dict.fromkeys((shared, max(1, shared // 2), min(2 * shared, 8))):
            found.append({**tile, "stages": depth, "parts": split, "dense": False})
    if layout == "canonical" and not quantize_activations:
        dense = {**found[0], "dense": True}
        found.insert(0 if tokens >= DENSE_TOKENS or size == 8 else len(found), dense)
    return found


@functools.lru_cache(4096)  # a decoding model asks hundreds of times a token
def config(*description: int | str | bool) -> dict[str, int | bool]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(*description)[0]


@triton.jit
def product_kernel(
    x, token_scale, data, scale, zero, bias, y, tokens, features, width, stride_t, stride_k,
    QUANTIZED: tl.constexpr, PANEL: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    TYPE: tl.constexpr, OPERAND: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    G: tl.constexpr, BN: tl.constexpr, BT: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of features with a tile of tokens, over all groups or one part of them."""
    tile_t, tile_n = tile_of(tl.program_id(0), tokens, features, BT, BN, GROUP)
    # 64 bits where a tile begins, 32 within it: a register less for every 16 bytes to load.
    first_t, first_n = tl.cast(tile_t * BT, tl.int64), tl.cast(tile_n * BN, tl.int64)
    row = tl.arange(0, BT)
    counted = (row < (tokens - first_t).to(tl.int32))[None, :]
    feature = tl.minimum(tl.arange(0, BN), (features - 1 - first_n).to(tl.int32))
    half, groups = width // 2, width // G
    byte = tl.arange(0, G // 2)
    if PANEL:  # 16 features by 4 bytes lie together, scales by [K/G][16]: ops/_layout.py
        packed_at = (feature // 16)[:, None] * (half * 16) + (feature % 16)[:, None] * 4
        packed_at += (byte // 4)[None, :] * 64 + (byte % 4)[None, :]
        panel_end = (features - first_n).to(tl.int32) - feature // 16 * 16
        scale_step = tl.minimum(panel_end, 16)
        scale_at = feature // 16 * (16 * groups) + feature % 16
    else:
        packed_at = feature[:, None] * half + byte[None, :]
        scale_step = tl.full([BN], 1, tl.int32)
        scale_at = feature * groups
    step: tl.constexpr = G * 8 if PANEL else G // 2
    data += first_n * half
    scale += first_n * groups
    zero += first_n * groups
    x += first_t * stride_t
    first = groups * tl.program_id(1) // tl.num_programs(1)
    last = groups * (tl.program_id(1) + 1) // tl.num_programs(1)
    total = tl.zeros([BN, BT], ACC)
    for g in range(first, last):
        packed = tl.load(data + tl.cast(g, tl.int64) * step + packed_at)
        group_scale = tl.load(scale + (scale_at + g * scale_step))
        if HAS_ZERO:
            centre = tl.load(zero + (scale_at + g * scale_step))[:, None]
        else:
            centre = tl.full([BN, 1], 8, tl.uint8)
        if QUANTIZED:
            low, high = integers(packed, centre.to(tl.int8), OPERAND)
        else:
            low, high = weights(packed, group_scale[:, None].to(SUM), centre, TYPE, OPERAND)
        if QUANTIZED or PANEL:  # reordered: the tokens of all low nibbles, then of all high ones
            values = x + g * (G // 2)
            value_at = row[None, :] * width + byte[:, None]
            even = tl.load(values + value_at, mask=counted, other=0).to(OPERAND)
            odd = tl.load(values + half + value_at, mask=counted, other=0).to(OPERAND)
            if QUANTIZED:
                part = tl.dot(low, even, input_precision="ieee", out_dtype=SUM)
                part = tl.dot(high, odd, part, input_precision="ieee", out_dtype=SUM)
                total += part.to(ACC) * group_scale.to(ACC)[:, None]
            else:
                total = tl.dot(low, even, total, input_precision="ieee", out_dtype=SUM)
                total = tl.dot(high, odd, total, input_precision="ieee", out_dtype=SUM)
        else:
            values = x + tl.cast(g, tl.int64) * G * stride_k
            value_at = row[None, :] * stride_t + tl.arange(0, G)[:, None] * stride_k
            value = tl.load(values + value_at, mask=counted, other=0).to(OPERAND)
            weight = tl.reshape(tl.join(low, high), [BN, G])
            total = tl.dot(weight, value, total, input_precision="ieee", out_dtype=SUM)
    t, n = first_t + tl.arange(0, BT), first_n + tl.arange(0, BN)
    y += first_t * features + first_n
    if SPLIT:
        y += tl.program_id(1).to(tl.int64) * tokens * features
    else:
        total = finished(
            total, token_scale, scale, bias, t, n, tokens, features,
            QUANTIZED, False, HAS_BIAS, ACC,
        )  # fmt: skip
    place = tl.arange(0, BT)[:, None] * features + tl.arange(0, BN)[None, :]
    inside = (t < tokens)[:, None] & (n < features)[None, :]
    tl.store(y + place, rounded_to(tl.trans(total), y.dtype.element_ty), mask=inside)


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
    chosen: dict | None = None,
) -> Tensor:
    """Quantize or reorder the tokens where needed, run the product, and add its parts."""
    features, width = scale.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    values = x.reshape(y.numel() // features, width)
    tokens = values.shape[0]
    chosen = chosen or config(
        *describe(x, data, scale, zero, bias, group, layout, quantize_activations)
    )
    if chosen["dense"]:
        return dense(values, (data, scale, zero), bias, group).view_as(y)
    token_scale, acc = scale, accumulator(x.dtype)
    if quantize_activations or layout == "cpu":
        values, token_scale = prepare(values, quantize_activations, ORDERS[layout])
    kind, total = operand(x.dtype), acc
    if quantize_activations:
        # Half a group of 32 is shorter than one int8 instruction; float16 products of these
        # integers, at most 127 * 15, and their sum of 16 are exact as well.
        kind, total = (tl.int8, tl.int32) if group >= 64 else (tl.float16, tl.float32)
    constants = {
        "QUANTIZED": quantize_activations, "HAS_BIAS": bias is not None, "ACC": acc,
    }  # fmt: skip
    bias = scale if bias is None else bias.contiguous()
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = partial_sums(chosen["parts"], y, tokens, features, sums)
    count = triton.cdiv(tokens, chosen["block_t"]) * triton.cdiv(features, chosen["block_n"])
    product_kernel[(count, chosen["parts"])](
        values, token_scale, data.contiguous(), scale.contiguous(),
        scale if zero is None else zero.contiguous(), bias, out, tokens, features, width,
        *values.stride(), **constants, PANEL=layout == "cpu", HAS_ZERO=zero is not None,
        TYPE=DTYPES[x.dtype], OPERAND=kind, SUM=total, G=group, BN=chosen["block_n"],
        BT=chosen["block_t"], SPLIT=chosen["parts"] > 1, GROUP=GROUPED,
        num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    if chosen["parts"] > 1:
        add_parts(out, token_scale, scale, bias, y, **constants, SCALED=False)
    return y
