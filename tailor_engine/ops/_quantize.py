"""The rounding rules that the quantizing ops share, so that they agree bit for bit."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._layout import GROUPS, LAYOUTS, PANEL

LARGEST_HALF = 65504.0
STACK = 32768  # bytes; the same number stands in csrc/cpu/activations.h
# (rows, K, N) that the linears are timed at: SmolLM2's layers and head, larger models', an odd one.
BENCHMARK_SHAPES = (
    *itertools.chain.from_iterable(
        ((rows, width, features) for rows in (1, 4, 16, 64, 512))
        for width, features in (
            *((576, 1536), (1536, 576), (576, 576), (576, 192), (576, 49152)),
            *((2048, 8192), (4096, 4096), (4096, 11008)),
        )
    ),
    (7, 1000, 1000),
)


def extremes(groups: Tensor, clip: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (minimum, maximum) of each group [..., G] -> [..., 1], times clip."""
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    if clip is None:
        return low, high
    ratio = clip.to(low.dtype).reshape(low.shape)
    return low * ratio, high * ratio


def int8_scale(low: Tensor, high: Tensor) -> Tensor:
    """Return the float32 step of groups with these extremes: absmax / 127, never 0."""
    scale = torch.maximum(-low, high) / 127
    return torch.where(scale == 0, 1.0, scale)


def int4_scale(low: Tensor, high: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Return (step, zero point) of groups with these extremes, the step rounded to float16."""
    if symmetric:
        step = torch.maximum(-low, high) / 7
    else:
        low, high = low.clamp(max=0), high.clamp(min=0)  # so that 0 itself stays exact
        step = (high - low) / 15
    scale = step.clamp(max=LARGEST_HALF).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
    return scale, zero


def int8_codes(groups: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (codes as floats in -127..127, float32 scale) of float32 groups [..., G]."""
    scale = int8_scale(*extremes(groups, clip))
    return (groups / scale).round().clamp(-127, 127), scale


def int4_codes(
    groups: Tensor, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes as floats in 0..15, scale, zero) of float32 groups [..., G]."""
    scale, zero = int4_scale(*extremes(groups, clip), symmetric)
    return ((groups / scale).round() + zero).clamp(0, 15), scale, zero


def dense(x: Tensor) -> Tensor:
    """Return x as the C++ quantizers read it: contiguous, in a dtype that float32 holds."""
    return (x.float() if x.dtype == torch.float64 else x).contiguous()


def activation_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (codes as float32 in -127..127, float32 scale [T, 1]) of tokens x [T, K].

    Numbers: float32 by definition, whatever the dtype of x: absmax / 127, one division a value,
        round half to even. So the integers, and their products, are the same on every backend.
    """
    values = x.float()
    if not values.shape[-1]:
        return values, torch.ones_like(values.sum(-1, keepdim=True))
    return int8_codes(values, None)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype in which the reference scales and sums."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_group(op_name: str, group: int, width: int, allowed: tuple[int, ...] = GROUPS) -> None:
    """Require a known group size that divides K."""
    if group not in allowed:
        raise ValueError(
            f"{op_name}: group must be one of {', '.join(map(str, allowed))}, got {group}"
        )
    if group and width % group:
        raise ValueError(f"{op_name}: K = {width} must be a multiple of the group, {group}")


def check_linear(op_name: str, x: Tensor, bias: Tensor | None, layout: str, features: int) -> None:
    """Check what the two linears share."""
    check.dtype(op_name, "x", x, check.FLOATS)
    if x.dim() == 0:
        raise ValueError(f"{op_name}: x must have at least 1 dimension, got a scalar")
    if layout not in LAYOUTS:
        raise ValueError(f"{op_name}: layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if bias is not None:
        check.shape(op_name, "bias", bias, (features,))
        check.dtype(op_name, "bias", bias, check.FLOATS)


def panel_shape(features: int, width: int, bits: int) -> tuple[int, ...]:
    """Return the shape of "cpu" data: a step is eight k in 4 bits, half of eight k in 8 bits."""
    return (-(-features // PANEL), -(-width // 8) * (bits // 4), PANEL, 4)


def workspace(rows: int, width: int, groups: int) -> Tensor | None:
    """Return the memory in which the C++ linears keep quantized activations (activations.h).

    None for few rows, which fit on the stack.
    """
    a_code = 3 if rows <= 2 else 5
    size = rows * (a_code * (-(-width // 64) * 64) + 4 * groups + 8)
    return None if size <= STACK else torch.empty(size, dtype=torch.uint8)


def row_stride(x: Tensor) -> tuple[Tensor, int]:
    """Return x, or a copy, with its last dimension contiguous, and the stride from row to row.

    No reshape for the usual contiguous x: it costs as much as quantizing a row.
    """
    if x.is_contiguous():
        return x, x.shape[-1]
    if x.dim() == 2:
        x = check.rows_contiguous(x)
        return x, x.stride(0)
    return x.contiguous(), x.shape[-1]
