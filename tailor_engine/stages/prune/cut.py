"""Take channels out of a block's feed-forward layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.families import Family, replace_linear


@torch.no_grad()
def cut_channels(family: Family, block: Any, kept: Tensor, down_weight: Tensor | None) -> None:
    """Keep some channels of gate, up and down; `down_weight` [D, k] replaces the plain slice."""
    gate, up, down = (family.part(block, name) for name in ("gate", "up", "down"))
    weights: list[Tensor] = [gate.weight, up.weight]
    rows: list[Tensor | None] = [kept, kept]
    columns: list[Tensor | None] = [None, None]
    for module in (gate, up):
        if module.bias is not None:
            weights.append(module.bias)
            rows.append(kept)
            columns.append(None)
    if down_weight is None:
        weights.append(down.weight)
        rows.append(None)
        columns.append(kept)
    sliced = list(ops.structured_slice([w.detach() for w in weights], rows, columns))
    if down_weight is None:
        down_weight = sliced.pop()
    up_bias = sliced.pop() if up.bias is not None else None
    gate_bias = sliced.pop() if gate.bias is not None else None
    replace_linear(block, "gate", sliced[0], gate_bias, family)
    replace_linear(block, "up", sliced[1], up_bias, family)
    down_weight = down_weight.to(down.weight.dtype).contiguous()
    replace_linear(block, "down", down_weight, down.bias, family)


def repaired_weight(down: Tensor, kept: Tensor, repaired: Tensor, share: float) -> Tensor:
    """Return the kept columns moved towards the repair by a share from 0 to 1."""
    plain = down[:, kept].double()
    return (plain + share * (repaired - plain)).to(down.dtype)
