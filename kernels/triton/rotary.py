"""rotary: the two halves of a head's values turn together, in one read and one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import accumulator, power_of_two, rounded_to


def describe(x: Tensor, cosine: Tensor, sine: Tensor) -> tuple[int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return (x.shape[-1] // 2,)


def candidates(half: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    1024 pairs of values are 8 a thread: one load of 16 bytes from each half.
    """
    block_d = power_of_two(half, 16, 128)
    return [
        {"block_t": max(1, pairs // block_d), "block_d": block_d, "warps": 4}
        for pairs in (1024, 2048, 512)
    ]


def config(half: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(half)[0]


@triton.jit
def head_kernel(
    x, cosine, sine, y, heads, tokens, half, x_b, x_h, x_t, x_d, angle_b,
    ACC: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Turn a block of tokens of one head."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    t = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)[:, None]
    source = x + batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h + t * x_t
    angle = batch.to(tl.int64) * angle_b + t * (2 * half)
    target = (tl.program_id(0).to(tl.int64) * tokens + t) * (2 * half)
    for start in range(0, half, BD):
        d = (start + tl.arange(0, BD))[None, :]
        inside = (t < tokens) & (d < half)
        first = tl.load(source + d * x_d, mask=inside, other=0).to(ACC)
        second = tl.load(source + (half + d) * x_d, mask=inside, other=0).to(ACC)
        cos_first = tl.load(cosine + angle + d, mask=inside, other=0).to(ACC)
        cos_second = tl.load(cosine + angle + half + d, mask=inside, other=0).to(ACC)
        sin_first = tl.load(sine + angle + d, mask=inside, other=0).to(ACC)
        sin_second = tl.load(sine + angle + half + d, mask=inside, other=0).to(ACC)
        left = rounded_to(first * cos_first - second * sin_first, y.dtype.element_ty)
        right = rounded_to(second * cos_second + first * sin_second, y.dtype.element_ty)
        tl.store(y + target + d, left, mask=inside)
        tl.store(y + target + half + d, right, mask=inside)


def launch(x: Tensor, cosine: Tensor, sine: Tensor, chosen: dict[str, int] | None = None) -> Tensor:
    """Run one program a head and block of tokens."""
    batch, heads, tokens, width = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    cosine, sine = cosine.contiguous(), sine.contiguous()
    chosen = chosen or config(width // 2)
    head_kernel[(batch * heads, triton.cdiv(tokens, chosen["block_t"]))](
        x, cosine, sine, y, heads, tokens, width // 2, *x.stride(),
        0 if len(cosine) == 1 else cosine.stride(0),
        ACC=accumulator(x.dtype), BT=chosen["block_t"], BD=chosen["block_d"],
        num_warps=chosen["warps"],
    )  # fmt: skip
    return y
