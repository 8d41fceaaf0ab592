"""How wide each layer stays under a budget of parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tailor_engine.errors import UserError
from tailor_engine.families import Family


@dataclass(frozen=True)
class Budget:
    """How many channels may stay in all, and what the choice is bound to."""

    channels: int  # of all kept blocks together
    widths: tuple[int, ...]  # dense width of each kept block
    rounding: int
    floor: int


def block_parameters(block: Any) -> int:
    """Return the number of weights of one block."""
    return sum(p.numel() for p in block.parameters())


def channel_parameters(family: Family, block: Any) -> int:
    """Return the number of weights that one channel has in gate, up and down."""
    gate, up, down = (family.part(block, name) for name in ("gate", "up", "down"))
    biases = (gate.bias is not None) + (up.bias is not None)
    return gate.in_features + up.in_features + down.out_features + biases


def budget(
    family: Family,
    network: Any,
    total: int,
    allowed: float,
    dropped: Sequence[int],
    rounding: int,
    floor_share: float,
    ceiling: bool,
) -> Budget:
    """Turn a number of parameters into a number of channels.

    Raises:
        UserError: the target lies below what the floor leaves.
    """
    blocks = [b for i, b in enumerate(family.blocks_of(network)) if i not in set(dropped)]
    widths = tuple(int(family.part(b, "gate").out_features) for b in blocks)
    cost = channel_parameters(family, blocks[0])
    gone = sum(block_parameters(family.blocks_of(network)[i]) for i in dropped)
    fixed = total - gone - sum(widths) * cost
    floor = max(rounding, round(floor_share * max(widths) / rounding) * rounding)
    floor = min(floor, *widths)
    least = fixed + floor * len(widths) * cost
    exact = (allowed - fixed) / cost
    step = exact / rounding
    channels = (int(step) if ceiling else round(step)) * rounding
    if allowed < least - 0.5 * rounding * cost:
        raise UserError(
            f"prune: the target of {allowed:,.0f} parameters is below {least:,}, the least that "
            f"MLP widths of at least {floor} leave; raise target, lower floor or drop more blocks"
        )
    channels = max(floor * len(widths), min(channels, sum(widths)))
    return Budget(channels, widths, rounding, floor)


def uniform(limits: Budget, ceiling: bool) -> list[int]:
    """Return the same width for every block: the multiple nearest to the budget, or below it."""
    step = limits.channels / len(limits.widths) / limits.rounding
    width = (int(step) if ceiling else round(step)) * limits.rounding
    return [min(w, max(limits.floor, width)) for w in limits.widths]


def options(width: int, limits: Budget) -> list[int]:
    """Return the widths that a block may have: the dense one, then multiples down to the floor."""
    return rounded(width, limits.rounding, limits.floor)


def rounded(count: int, rounding: int, floor: int, columns: int = 1) -> list[int]:
    """Return how many of `count` may stay: all, then those that make a multiple of the rounding.

    Numbers: channels and hidden dimensions have one column each, heads and groups of heads more;
        of them so many stay that the columns are a multiple. None is below `floor`.
    """
    step = rounding // math.gcd(rounding, columns)
    return [count, *range((count - 1) // step * step, max(floor, 1) - 1, -step)]


def allocate(curves: Sequence[Sequence[float]], limits: Budget) -> list[int]:
    """Choose one width a block so that the summed error is least and the channels fit.

    A dynamic program over the number of channels in units of the rounding: exact, and
    milliseconds for any depth.

    Shapes: curves[i][j] is the error of block i at its j-th option (see `options`).
    """
    unit = limits.rounding
    capacity = limits.channels // unit
    best = np.zeros(capacity + 1)
    choices = []
    for width, curve in zip(limits.widths, curves, strict=True):
        sizes = [-(-w // unit) for w in options(width, limits)]
        table = np.full((len(sizes), capacity + 1), np.inf)
        for row, (size, error) in enumerate(zip(sizes, curve, strict=True)):
            if size <= capacity:
                table[row, size:] = best[: capacity + 1 - size] + error
        choices.append((table.argmin(0), sizes))
        best = table.min(0)
    if not np.isfinite(best[capacity]):
        raise UserError(f"prune: no widths of at least {limits.floor} fit {limits.channels}")
    widths, left = [], capacity
    for width, (choice, sizes) in zip(limits.widths[::-1], choices[::-1], strict=True):
        row = int(choice[left])
        widths.append(options(width, limits)[row])
        left -= sizes[row]
    return widths[::-1]
