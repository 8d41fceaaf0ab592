"""gated_activation: both halves of a gated unit in one read, their product in one write."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tailor_engine.kernels._device import accumulator, power_of_two, rounded_to


def describe(gate: Tensor, up: Tensor, activation: str) -> tuple[int]:
    """Return what ``config`` and ``candidates`` ask of the op's arguments."""
    return (gate.shape[-1],)


def candidates(width: int) -> list[dict[str, int]]:
    """Return the configurations that a tuning may try, the untuned choice first.

    1024 values of a row keep 128 threads busy with one load of 16 bytes from each half.
    """
    block = power_of_two(width, 64, 1024)
    more = power_of_two(width, 64, 4096)
    return [
        {"block_f": block, "warps": 4},
        {"block_f": more, "warps": 4},
        {"block_f": more, "warps": 8},
    ]


def config(width: int) -> dict[str, int]:
    """Choose one configuration from the shape alone: the first of ``candidates``."""
    return candidates(width)[0]


@triton.jit
def block_kernel(
    gate, up, y, width, gate_t, gate_f, up_t, up_f,
    SILU: tl.constexpr, ACC: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Compute a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BF + tl.arange(0, BF)
    inside = f < width
    g = tl.load(gate + row * gate_t + f * gate_f, mask=inside, other=0).to(ACC)
    u = tl.load(up + row * up_t + f * up_f, mask=inside, other=0).to(ACC)
    inner = g
    if not SILU:  # 0.5 g (1 + tanh v) = g / (1 + e^-2v) with v = sqrt(2 / pi) (g + 0.044715 g^3)
        inner = 1.5957691216057308 * g * (1.0 + 0.044715 * g * g)
    # Where e^-inner would overflow, the quotient is 0 in every dtype.
    result = g / (1.0 + tl.exp(tl.minimum(-inner, 88.0))) * u
    tl.store(y + row * width + f, rounded_to(result, y.dtype.element_ty), mask=inside)


def launch(
    gate: Tensor, up: Tensor, activation: str, chosen: dict[str, int] | None = None
) -> Tensor:
    """Run one program a row and block."""
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if not y.numel():
        return y
    gate, up = (half.reshape(-1, half.shape[-1]) for half in (gate, up))
    rows, width = gate.shape
    chosen = chosen or config(width)
    block_kernel[(rows, triton.cdiv(width, chosen["block_f"]))](
        gate, up, y, width, *gate.stride(), *up.stride(),
        SILU=activation == "silu", ACC=accumulator(y.dtype), BF=chosen["block_f"],
        num_warps=chosen["warps"],
    )  # fmt: skip
    return y
