"""rms_norm: a row in registers between its sum of squares and its scaling; long rows read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import accumulator, power_of_two, rounded_to


def describe(x: Tensor, weight: Tensor, epsilon: float, offset: float) -> tuple[int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return (x.shape[-1],)


def candidates(width: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    A row of up to 4096 values is one block, 16 values a thread; a longer one is read twice, the
    second time from the cache.
    """
    block = power_of_two(width, 64, 4096)
    warps = max(1, min(8, block // 512))
    return [{"block_d": block, "warps": count} for count in dict.fromkeys((warps, 2 * warps, 4))]


def config(width: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(width)[0]


@triton.jit
def row_kernel(
    x, weight, y, epsilon, offset, width, stride_t, stride_d, weight_stride,
    ACC: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Normalise one row."""
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([BD], ACC)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        value = tl.load(x + row * stride_t + d * stride_d, mask=d < width, other=0).to(ACC)
        squares += value * value
    scale = 1.0 / tl.sqrt_rn(tl.sum(squares, 0) / width + epsilon)
    for start in range(0, width, BD):
        d = start + tl.arange(0, BD)
        inside = d < width
        value = tl.load(x + row * stride_t + d * stride_d, mask=inside, other=0).to(ACC)
        factor = offset + tl.load(weight + d * weight_stride, mask=inside, other=0).to(ACC)
        out = rounded_to(factor * (value * scale), y.dtype.element_ty)
        tl.store(y + row * width + d, out, mask=inside)


def launch(
    x: Tensor,
    weight: Tensor,
    epsilon: float,
    offset: float,
    chosen: dict[str, int] | None = None,
) -> Tensor:
    """Run one program a row."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    rows = x.reshape(-1, x.shape[-1])
    chosen = chosen or config(rows.shape[1])
    row_kernel[(rows.shape[0],)](
        rows, weight, y, epsilon, offset, rows.shape[1], *rows.stride(), weight.stride(0),
        ACC=accumulator(x.dtype), BD=chosen["block_d"], num_warps=chosen["warps"],
    )  # fmt: skip
    return y
