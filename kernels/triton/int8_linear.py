"""int8_linear: quantize the tokens in one pass, then an integer product with scales at its end."""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import (
    accumulator,
    capability,
    operand,
    power_of_two,
    rounded_to,
)
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
from tailor_engine.kernels._tokens import PLAIN, prepare


def describe(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> tuple[int, int, int, int, int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    features, width = scale.shape[0], x.shape[-1]
    size = 1 if quantize_activations else x.element_size()
    return math.prod(x.shape[:-1]), features, width, size, capability()


def candidates(
    tokens: int, features: int, width: int, size: int, capability: int
) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    ===========  ======================================================================
    tokens       choice and reason
    ===========  ======================================================================
    up to 64     64 features by all tokens, K shared by up to eight programs: the weight
                 comes once, by as many processors as there are
    to 256       64 x 64, 64 x 128: the largest that still fills the card
    beyond       128 x 256 x 128, 8 warps: four steps of 48 KB in flight; 8 bytes of shared
                 memory for 1,024 products, a third less than 128 x 128
    ===========  ======================================================================

    int8 tokens take 128 values of k a step, bfloat16 ones 64: 128 bytes, one swizzled row.
    Triton waits for an integer product within its step (only float32 sums run on into the next),
    so a tuning also tries 256 values of k by two steps of loads.
    Before sm_90 the operands stand in registers beside the sums, and 128 tokens are the most.
    """
    chosen = tiles(tokens, features, 256 if capability >= 90 else 128)
    if size > 2:  # no tensor cores for float32 as it is: small tiles of plain products
        chosen = [{"block_n": 256 // size, "block_t": 16, "warps": 4}]
    block_k = power_of_two(width, 32, 128 if size == 1 else 64 if size == 2 else 32)
    found = []
    for tile in chosen:
        depth = 5 if tile["block_t"] <= 32 else 4
        depth = stages(block_k * (tile["block_n"] + tile["block_t"] * size), capability, depth)
        shared = parts(tile, tokens, features, triton.cdiv(width, block_k))
        for split in dict.fromkeys((shared, max(1, shared // 2), min(2 * shared, 8))):
            found.append({**tile, "block_k": block_k, "stages": depth, "parts": split})
    first = found[0]
    if first["block_t"] == 256 and first["block_k"] == 128:
        found.append({**first, "block_k": 256, "stages": 2})
    return found


@functools.lru_cache(4096)  # a decoding model asks hundreds of times a token
def config(*description: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(*description)[0]


@triton.jit
def product_kernel(
    x, token_scale, data, scale, bias, y, tokens, features, width, steps, stride_t, stride_k,
    QUANTIZED: tl.constexpr, PANEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr, WHOLE: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of features with a tile of tokens, over all of K or one part of it."""
    tile_t, tile_n = tile_of(tl.program_id(0), tokens, features, BT, BN, GROUP)
    # 64 bits where a tile begins, 32 within it: a register less for every 16 bytes to load.
    first_t, first_n = tl.cast(tile_t * BT, tl.int64), tl.cast(tile_n * BN, tl.int64)
    row, feature = tl.arange(0, BT), tl.arange(0, BN)
    row = tl.minimum(row, (tokens - 1 - first_t).to(tl.int32))
    feature = tl.minimum(feature, (features - 1 - first_n).to(tl.int32))
    x += first_t * stride_t
    k = tl.arange(0, BK)
    if PANEL:  # 16 features by 4 values of k lie together: ops/_layout.py
        data += first_n * (steps * 4)
        weight_at = (feature // 16)[:, None] * (steps * 64) + (feature % 16)[:, None] * 4
        weight_at += (k // 4)[None, :] * 64 + (k % 4)[None, :]
    else:
        data += first_n * width
        weight_at = feature[:, None] * width + k[None, :]
    value_at = row[None, :] * stride_t + k[:, None] * stride_k
    blocks = tl.cdiv(width, BK)
    first = blocks * tl.program_id(1) // tl.num_programs(1)
    last = blocks * (tl.program_id(1) + 1) // tl.num_programs(1)
    total = tl.zeros([BN, BT], SUM)
    for block in range(first, last):
        start = tl.cast(block * BK, tl.int64)
        weights, values = data + start * (16 if PANEL else 1), x + start * stride_k
        if WHOLE:
            weight, value = tl.load(weights + weight_at), tl.load(values + value_at)
        else:
            inside = k < width - block * BK
            weight = tl.load(weights + weight_at, mask=inside[None, :], other=0)
            value = tl.load(values + value_at, mask=inside[:, None], other=0)
        total = tl.dot(
            weight.to(OPERAND), value.to(OPERAND), total, input_precision="ieee", out_dtype=SUM
        )
    t, n = first_t + tl.arange(0, BT), first_n + tl.arange(0, BN)
    y += first_t * features + first_n
    if SPLIT:
        y += tl.program_id(1).to(tl.int64) * tokens * features
        result = total
    else:
        result = finished(
            total, token_scale, scale, bias, t, n, tokens, features, QUANTIZED, True, HAS_BIAS, ACC
        )
    place = tl.arange(0, BT)[:, None] * features + tl.arange(0, BN)[None, :]
    inside = (t < tokens)[:, None] & (n < features)[None, :]
    tl.store(y + place, rounded_to(tl.trans(result), y.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
    chosen: dict[str, int] | None = None,
) -> Tensor:
    """Run the token pass where asked for, the product, and the sum of its parts."""
    features, width = scale.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    chosen = chosen or config(*describe(x, data, scale, bias, layout, quantize_activations))
    rows = x.reshape(-1, width) if width else x.new_zeros(y.numel() // features, 0)
    tokens = rows.shape[0]
    acc = accumulator(x.dtype)
    token_scale, kind, total = scale, operand(x.dtype), acc
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    if quantize_activations:
        rows, token_scale = prepare(rows, True, PLAIN)
        kind, total, sums = tl.int8, tl.int32, torch.int32
    elif x.dtype == torch.float64:  # Triton 3.6 compiles no float64 product of converted bytes
        data = data.double()
    constants = {
        "QUANTIZED": quantize_activations, "HAS_BIAS": bias is not None, "ACC": acc,
    }  # fmt: skip
    bias = scale if bias is None else bias.contiguous()
    out = partial_sums(chosen["parts"], y, tokens, features, sums)
    count = triton.cdiv(tokens, chosen["block_t"]) * triton.cdiv(features, chosen["block_n"])
    product_kernel[(count, chosen["parts"])](
        rows, token_scale, data.contiguous(), scale.contiguous(), bias, out,
        tokens, features, width, data.shape[1], *rows.stride(), **constants,
        PANEL=layout == "cpu", OPERAND=kind, SUM=total, WHOLE=width % chosen["block_k"] == 0,
        BN=chosen["block_n"], BT=chosen["block_t"], BK=chosen["block_k"], SPLIT=chosen["parts"] > 1,
        GROUP=GROUPED, num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    if chosen["parts"] > 1:
        add_parts(out, token_scale, scale, bias, y, **constants, SCALED=True)
    return y
