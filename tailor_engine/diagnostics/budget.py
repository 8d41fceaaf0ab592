"""What a budget of parameters would cost in nats, before anything is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages.prune import widths
from tailor_engine.stages.prune.widths import Budget, channel_parameters

if TYPE_CHECKING:
    from tailor_engine.diagnostics import DiagnoseConfig

STEP = 0.02  # of all parameters, between two budgets
Curve = tuple[list[int], list[float]]  # widths, and the predicted loss rise at each of them


def steps(dense: Sequence[int], width: int, config: DiagnoseConfig) -> list[int]:
    """Return the widths that a block may have, down to the floor that all blocks share."""
    floor = round(config.floor * max(dense) / config.rounding) * config.rounding
    floor = min(max(config.rounding, floor), *dense)
    return widths.options(width, Budget(width, (width,), config.rounding, floor))


def sweep(model: Model, curves: Sequence[Curve], config: DiagnoseConfig) -> dict[str, Any]:
    """Return one row for each budget: its best widths and the loss rise that they predict.

    Rows of plan "per_layer" have the widths that a dynamic program finds; rows of "uniform" take
    the same width everywhere. The second-order prediction sums what each layer costs alone.
    """
    family, network = model.family, model.network
    cost = channel_parameters(family, family.blocks_of(network)[0])
    dense = [sizes[0] for sizes, _ in curves]
    table: dict[str, list[Any]] = {
        key: [] for key in ("plan", "removed", "parameters", "nats", "widths")
    }

    def add(plan: str, chosen: list[int]) -> None:
        nats = sum(
            float(np.interp(width, sizes[::-1], errors[::-1]))
            for width, (sizes, errors) in zip(chosen, curves, strict=True)
        )
        gone = cost * (sum(dense) - sum(chosen))
        row = (plan, gone / model.parameters, model.parameters - gone, nats, chosen)
        for key, value in zip(table, row, strict=True):
            table[key].append(value)

    def limits(removed: float) -> Budget | None:
        allowed = (1 - removed) * model.parameters
        try:
            return widths.budget(
                family, network, model.parameters, allowed, [], config.rounding, config.floor, False
            )
        except UserError:
            return None  # below what the floor leaves

    bounds = [b for b in map(limits, np.arange(0, 1, STEP)) if b is not None]
    errors = [nats for _, nats in curves]
    plans = {
        "per_layer": [widths.allocate(errors, bound) for bound in bounds],
        "uniform": [widths.uniform(bound, False) for bound in bounds],
    }
    for plan, found in plans.items():
        for chosen, _ in itertools.groupby(found):  # small steps may fall on the same widths
            add(plan, chosen)
    return {key: values if key == "widths" else np.array(values) for key, values in table.items()}
