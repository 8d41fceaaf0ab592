"""int8_linear: quantize the tokens in one pass, then an integer product with scales at its end."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import accumulator, operand, power_of_two, rounded_to
from tailor_engine.kernels._tokens import PLAIN, prepare


def config(tokens: int, features: int, width: int, element_size: int) -> dict[str, int]:
    """Choose the tile of output features and tokens, and the step along K.

    The weight is the left operand: its 64 features fill a warp group's instruction even where only
    16 tokens stand on the other side.
    """
    block_t = power_of_two(tokens, 16, 128)
    block_n = 128 if block_t == 128 else 64
    block_k = {1: 128, 2: 64}.get(element_size, 32)
    warps = 8 if block_t == 128 else 4
    if element_size == 1:
        block_k = power_of_two(width, 32, 128)
    if element_size == 8:
        block_n, block_t = 32, min(block_t, 32)
    return {
        "block_n": block_n, "block_t": block_t, "block_k": block_k,
        "warps": warps, "stages": 4 if block_t <= 32 else 3,
    }  # fmt: skip


@triton.jit
def product_kernel(
    x, token_scale, data, scale, bias, y, tokens, features, width, steps, stride_t, stride_k,
    QUANTIZED: tl.constexpr, PANEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    OPERAND: tl.constexpr, SUM: tl.constexpr, ACC: tl.constexpr,
    BN: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Multiply a tile of features with a tile of tokens and write y [T, N]."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    n = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
    total = tl.zeros([BN, BT], SUM)
    for start in range(0, width, BK):
        k = start + tl.arange(0, BK)
        if PANEL:  # 16 features by 4 values of k lie together: ops/_layout.py
            place = (n // 16)[:, None] * (steps * 64) + (n % 16)[:, None] * 4
            place += (k // 4)[None, :] * 64 + (k % 4)[None, :]
        else:
            place = n[:, None] * width + k[None, :]
        inside = (n < features)[:, None] & (k < width)[None, :]
        weight = tl.load(data + place, mask=inside, other=0)
        tokens_at = x + t.to(tl.int64)[None, :] * stride_t + k.to(tl.int64)[:, None] * stride_k
        inside = (k < width)[:, None] & (t < tokens)[None, :]
        value = tl.load(tokens_at, mask=inside, other=0)
        total = tl.dot(
            weight.to(OPERAND), value.to(OPERAND), total, input_precision="ieee", out_dtype=SUM
        )
    result = total.to(ACC)
    if QUANTIZED:
        result *= tl.load(token_scale + t, mask=t < tokens, other=0).to(ACC)[None, :]
    result *= tl.load(scale + n, mask=n < features, other=0).to(ACC)[:, None]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < features, other=0).to(ACC)[:, None]
    out = y + t.to(tl.int64)[:, None] * features + n[None, :]
    inside = (t < tokens)[:, None] & (n < features)[None, :]
    tl.store(out, rounded_to(tl.trans(result), y.dtype.element_ty), mask=inside)


def launch(
    x: Tensor,
    data: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    layout: str,
    quantize_activations: bool,
) -> Tensor:
    """Run the token pass where asked for, and the product."""
    features, width = scale.shape[0], x.shape[-1]
    y = torch.empty(*x.shape[:-1], features, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = x.reshape(-1, width) if width else x.new_zeros(y.numel() // features, 0)
    tokens = rows.shape[0]
    token_scale, kind, total = scale, operand(x.dtype), accumulator(x.dtype)
    if quantize_activations:
        rows, token_scale = prepare(rows, True, PLAIN)
        kind, total = tl.int8, tl.int32
    chosen = config(tokens, features, width, rows.element_size())
    grid = triton.cdiv(tokens, chosen["block_t"]), triton.cdiv(features, chosen["block_n"])
    product_kernel[grid](
        rows, token_scale, data.contiguous(), scale.contiguous(),
        scale if bias is None else bias.contiguous(), y,
        tokens, features, width, data.shape[1], rows.stride(0), rows.stride(1),
        QUANTIZED=quantize_activations, PANEL=layout == "cpu", HAS_BIAS=bias is not None,
        OPERAND=kind, SUM=total, ACC=accumulator(x.dtype), BN=chosen["block_n"],
        BT=chosen["block_t"], BK=chosen["block_k"],
        num_warps=chosen["warps"], num_stages=chosen["stages"],
    )  # fmt: skip
    return y
