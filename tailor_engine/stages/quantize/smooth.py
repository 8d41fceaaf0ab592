"""Move activation outliers into the weights before rounding: the function stays the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine.families import PARTS, Family


@torch.no_grad()
def smooth(
    family: Family, block: nn.Module, heads: int, largest: dict[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """Divide each input channel of a block's matrices by s and multiply its columns by s, in place.

    The division goes into what makes the input: the norm before query, key, value and before gate
    and up; the rows of up before down; the rows of value before output, alike for all query heads
    that share a key-value head. So a channel that is 30 times the others no longer decides the
    int8 step of its whole token.

    Shapes: largest {first part that reads the input: absolute maximum of each channel [K]};
        returns {the same: s [K]}. ``heads`` is the number of query heads.
    Numbers: s = largest^strength / (absolute maximum of the columns)^(1 - strength).
    Source: Xiao et al., SmoothQuant (2211.10438), equation 4.
    """
    part = {name: family.part(block, name) for name in PARTS if family.has(block, name)}
    scales = {}
    for first, readers, norm in (
        ("query", ("query", "key", "value"), "attention_norm"),
        ("gate", ("gate", "up"), "mlp_norm"),
    ):
        if first in part:
            scales[first] = s = _scale(largest[first], [part[r].weight for r in readers], strength)
            gain = family.part(block, norm).weight
            gain.copy_((gain + family.norm_offset) / s - family.norm_offset)
            for reader in readers:
                part[reader].weight.mul_(s)
    if "down" in part:
        scales["down"] = s = _scale(largest["down"], [part["down"].weight], strength)
        _divide_rows(part["up"], s)
        part["down"].weight.mul_(s)
    if "output" in part:
        width = part["output"].in_features // heads
        s = _scale(largest["output"], [part["output"].weight], strength)
        shared = s.view(part["value"].out_features // width, -1, width).amax(1)
        sharing = heads // len(shared)
        _divide_rows(part["value"], shared.flatten())
        scales["output"] = s = shared[:, None].expand(-1, sharing, -1).flatten()
        part["output"].weight.mul_(s)
    return scales


def _scale(largest: Tensor, weights: list[Tensor], strength: float) -> Tensor:
    columns = torch.stack([w.abs().amax(0) for w in weights]).amax(0)
    known = (largest > 0) & (columns > 0)
    s = largest.clamp_min(1e-12) ** strength / columns.clamp_min(1e-12) ** (1 - strength)
    s = torch.where(known, s, 1.0)
    return s / s.log().mean().exp()  # the geometric mean stays: norms keep their size


def _divide_rows(linear: Any, s: Tensor) -> None:
    linear.weight.div_(s[:, None])
    if linear.bias is not None:
        linear.bias.div_(s)
