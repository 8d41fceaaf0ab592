"""What a budget of parameters would cost in nats, before anything is cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tailor_engine.model import Model
from tailor_engine.stages.prune.costs import storage
from tailor_engine.stages.prune.library import widths
from tailor_engine.stages.prune.places import Place
from tailor_engine.stages.prune.search import Candidate, choose, least

if TYPE_CHECKING:
    from tailor_engine.diagnostics import DiagnoseConfig

STEP = 0.02  # of all parameters, between two budgets
Curve = tuple[list[int], list[float]]  # widths, and the predicted loss rise at each of them


def steps(width: int, config: DiagnoseConfig) -> list[int]:
    """Return the widths that a block may have, down to its floor."""
    return widths(width, config.rounding, config.floor)


def sweep(model: Model, curves: Sequence[Curve], config: DiagnoseConfig) -> dict[str, Any]:
    """Return one row for each budget: its best widths and the loss rise that they predict.

    Rows of plan "per_layer" have the widths that an integer program finds; rows of "uniform" take
    the same width everywhere. The second-order prediction sums what each layer costs alone.
    """
    price = storage(model.family, model.network).place
    library = [
        [
            Candidate(i, width, nats, price(Place(i, "mlp"), width))
            for width, nats in zip(*curve, strict=True)
        ]
        for i, curve in enumerate(curves)
    ]
    whole = sum(place[0].cost for place in library)
    table: dict[str, list[Any]] = {
        key: [] for key in ("plan", "removed", "parameters", "nats", "widths")
    }

    def add(plan: str, chosen: Sequence[Candidate]) -> None:
        gone = round(whole - sum(c.cost for c in chosen))
        nats, sizes = sum(c.rise for c in chosen), [c.size for c in chosen]
        row = (plan, gone / model.parameters, model.parameters - gone, nats, sizes)
        for key, value in zip(table, row, strict=True):
            table[key].append(value)

    budgets = [whole - removed * model.parameters for removed in np.arange(0, 1, STEP)]
    best = [choose(library, budget)[0] for budget in budgets if budget >= least(library)]
    add("per_layer", [place[0] for place in library])
    for choice, _ in itertools.groupby(best[1:]):  # small steps may fall on the same widths
        add("per_layer", choice)
    for width in library[0]:
        same = [[c for c in place if c.size <= width.size] for place in library]
        if all(same):
            add("uniform", [place[0] for place in same])
    return {key: values if key == "widths" else np.array(values) for key, values in table.items()}
