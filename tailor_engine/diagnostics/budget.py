"""What a budget of parameters would cost in nats, over all axes, before anything is cut."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tailor_engine.diagnostics.measure import Measured
from tailor_engine.model import Model
from tailor_engine.stages.prune import PruneConfig
from tailor_engine.stages.prune.costs import storage
from tailor_engine.stages.prune.library import candidates
from tailor_engine.stages.prune.places import KINDS, Place
from tailor_engine.stages.prune.search import Candidate, alike, choose, least

if TYPE_CHECKING:
    from tailor_engine.diagnostics import DiagnoseConfig

STEP = 0.02  # of all parameters, between two budgets
AXES = ("mlp", "attention", "sublayers")
Places = list[list[Candidate]]  # the candidates of each place, the size that it has first


def of_block(model: Model, index: int, found: Measured, config: DiagnoseConfig) -> Places:
    """Return the candidates of a block's halves, as the prune stage makes them."""
    settings = PruneConfig(
        axes=list(AXES), rounding=config.rounding, floor=config.floor, ridge=config.ridge
    ).resolved()
    costs = storage(model.family, model.network)
    return [
        candidates(
            model.family,
            model.network,
            Place(index, kind),
            found.together[kind],
            found.factors[kind],
            costs,
            settings,
        )
        for kind in KINDS
        if kind in found.together
    ]


def curves(library: Places) -> dict[str, np.ndarray]:
    """Return one row a candidate: what it leaves of its place, and the loss rise that it costs."""
    flat = list(itertools.chain(*library))
    heads = [c.size if c.place.kind == "attention" and c.size else (0, 0) for c in flat]
    mlp = np.array([c.place.kind == "mlp" for c in flat])
    channels = np.array([c.size if c.place.kind == "mlp" else 0 for c in flat])
    return {
        "layer": np.array([c.place.block for c in flat]),
        "kind": np.where(mlp, "mlp", "attention"),
        "width": channels,
        "groups": np.array([groups for groups, _ in heads]),
        "queries": np.array([queries for _, queries in heads]),
        "nats": np.array([c.rise for c in flat]),
    }


def half(library: Places, index: int) -> float:
    """Return the loss rise at half of a block's channels, straight between two candidates."""
    for place in library:
        if place[0].place == Place(index, "mlp"):
            sizes, rises = ([getattr(c, name) for c in place] for name in ("size", "rise"))
            return float(np.interp(sizes[0] / 2, sizes[::-1], rises[::-1]))
    return float("nan")


def along(library: Places, axis: str) -> Places:
    """Return the candidates that cut along one axis alone."""

    def on_axis(place: Iterable[Candidate], whole: Candidate) -> list[Candidate]:
        if axis == "sublayers":
            return [c for c in place if c is whole or not c.size]
        return [c for c in place if c is whole or (c.size and c.place.kind == axis)]

    return [on_axis(place, place[0]) for place in library]


def sweep(model: Model, library: Places) -> dict[str, Any]:
    """Return one row for each budget: its best sizes and the loss rise that they predict.

    Rows of plan "all" have what an integer program finds over all axes, those of "mlp",
    "attention" and "sublayers" over one; "uniform" takes the same width everywhere. The
    second-order prediction sums what each place costs alone.
    """
    depth = len(model.family.blocks_of(model.network))
    whole = sum(place[0].cost for place in library)
    table: dict[str, list[Any]] = {
        key: [] for key in ("plan", "removed", "parameters", "nats", "widths", "groups", "queries")
    }

    def add(plan: str, chosen: Sequence[Candidate]) -> None:
        gone = round(whole - sum(c.cost for c in chosen))
        sizes: dict[Place, Any] = {c.place: c.size for c in chosen}
        heads = [sizes.get(Place(i, "attention")) or (0, 0) for i in range(depth)]
        row = (
            plan,
            gone / model.parameters,
            model.parameters - gone,
            sum(c.rise for c in chosen),
            [sizes.get(Place(i, "mlp"), 0) for i in range(depth)],
            [groups for groups, _ in heads],
            [queries for _, queries in heads],
        )
        for key, value in zip(table, row, strict=True):
            table[key].append(value)

    budgets = [whole - removed * model.parameters for removed in np.arange(0, 1, STEP)]
    for plan in ("all", *AXES):
        part = library if plan == "all" else along(library, plan)
        best = [choose(part, budget)[0] for budget in budgets[1:] if budget >= least(part)]
        add(plan, [place[0] for place in library])
        for choice, _ in itertools.groupby(best):  # small steps may fall on the same sizes
            add(plan, choice)
    others = [place[0] for place in library if place[0].place.kind != "mlp"]
    for same in alike([place for place in along(library, "mlp") if place[0].place.kind == "mlp"]):
        add("uniform", [*others, *same])
    return {
        key: values if key in ("widths", "groups", "queries") else np.array(values)
        for key, values in table.items()
    }
