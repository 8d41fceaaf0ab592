"""The rounding rules that the quantizing ops share, so that they agree bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor_engine.ops import _check as check
from tailor_engine.ops._layout import GROUPS, LAYOUTS, PANEL

LARGEST_HALF = 65504.0


def symmetric_scale(groups: Tensor, largest: int, clip: Tensor | None) -> Tensor:
    """Return absmax * clip / largest of each group [..., G] -> [..., 1] (1 where it would be 0)."""
    absmax = groups.abs().amax(-1, keepdim=True)
    if clip is not None:
        absmax = absmax * clip.to(absmax.dtype).reshape(absmax.shape)
    return absmax / largest


def int8_codes(groups: Tensor, clip: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return (codes as floats in -127..127, float32 scale) of float32 groups [..., G]."""
    scale = symmetric_scale(groups, 127, clip)
    scale = torch.where(scale == 0, 1.0, scale)
    return (groups / scale).round().clamp(-127, 127), scale


def int4_codes(
    groups: Tensor, symmetric: bool, clip: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (codes as floats in 0..15, scale, zero) of float32 groups [..., G].

    The scale is rounded to float16, as it is stored, before the codes are computed.
    """
    if symmetric:
        scale = symmetric_scale(groups, 7, clip)
    else:
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if clip is not None:
            ratio = clip.to(low.dtype).reshape(low.shape)
            low, high = low * ratio, high * ratio
        low, high = low.clamp(max=0), high.clamp(min=0)  # zero itself stays exact
        scale = (high - low) / 15
    scale = scale.clamp(max=LARGEST_HALF).half().float()
    scale = torch.where(scale == 0, 1.0, scale)
    zero = torch.full_like(scale, 8) if symmetric else (-low / scale).round().clamp(0, 15)
    return ((groups / scale).round() + zero).clamp(0, 15), scale, zero


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


def panel_shape(features: int, width: int, block: int) -> tuple[int, ...]:
    """Return the shape of "cpu" data whose panels step by ``block`` values of K."""
    return (-(-features // PANEL), -(-width // block), PANEL, 4)
