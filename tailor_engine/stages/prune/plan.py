"""What is to be cut: which places go, and how large each of the others stays."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages.prune import criteria, latency
from tailor_engine.stages.prune.costs import BYTES, NORM_BYTES, Costs, dense_size, storage
from tailor_engine.stages.prune.library import library, widths
from tailor_engine.stages.prune.places import Place, places
from tailor_engine.stages.prune.record import Record, expected
from tailor_engine.stages.prune.search import (
    Candidate,
    Choice,
    Joint,
    alike,
    choose,
    cost,
    curve,
    least,
    together,
)
from tailor_engine.stages.prune.statistics import BlockStatistics

if TYPE_CHECKING:
    from tailor_engine.stages.prune.layers import Layers

BLOCKS_SHARE = 1 / 3  # of what is to go, where blocks are one axis of several and none is counted
CURVE = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)  # shares of the cost: budgets that are foretold
VOCABULARY = "vocabulary"  # the place of the tokens
APART = 3  # places in which two finalists differ at least


@dataclass
class Plan:
    """The shape to reach, and the dense model's statistics that it was chosen by."""

    sizes: dict[Place, Any]  # channels, or Heads; 0 for a place that is left out
    tokens: int = 0  # that stay of the vocabulary; 0: all
    statistics: Mapping[Place, BlockStatistics] = field(default_factory=dict)
    metrics: Mapping[Place, Tensor] = field(default_factory=dict)  # Fisher factors A
    figures: Mapping[str, Any] = field(default_factory=dict)  # what the search expects of it

    @property
    def dropped(self) -> list[Place]:
        """Places that are left out."""
        return [place for place, size in self.sizes.items() if not size]


def make_plans(
    model: Model,
    config: Any,
    layers: Layers,
    record: Record,
    tokens: Sequence[tuple[int, float]] = (),
) -> list[Plan]:
    """Decide the shape: the best `finalists` of all combinations, from the dense statistics.

    `tokens` are sizes that the vocabulary may have, and what each costs in nats a token.
    """
    family, network = model.family, model.network
    everywhere = places(family, network)
    costs = price_list(model, config, tokens)
    dense = {place: dense_size(family, network, place) for place in everywhere}
    rows = int(family.embedding_of(network).weight.shape[0])
    depth = len(family.blocks_of(network))
    whole = costs.fixed + sum(costs.place(p, s) for p, s in dense.items())
    whole += costs.tokens(rows) + costs.block * depth
    allowed = _allowed(config, whole)
    record.prepare(dense, depth)
    statistics, metrics = layers.statistics()
    depths = _depths(config, costs, dense, statistics, whole - allowed, layers, record)

    def plan(gone: Collection[int], choice: Choice, figures: Mapping[str, Any]) -> Plan:
        sizes = {place: 0 if place.block in gone else size for place, size in dense.items()}
        picked: dict[Any, Any] = {c.place: c.size for c in choice}
        left = picked.pop(VOCABULARY, rows)
        sizes |= picked
        return Plan(sizes, left if left < rows else 0, statistics, metrics, figures)

    if config.axes == ["blocks"]:
        spent = whole - sum(_of_block(costs, dense, index) for index in depths[0])
        return [plan(depths[0], (), {"predicted_cost": spent, "predicted_share": spent / whole})]
    if not searched(config):
        kept = {p: size for p, size in dense.items() if p.block not in depths[0]}
        return [plan(depths[0], _uniform(costs, kept, allowed, rows, config), {})]
    with record.timed("search"):
        staying = [p for p in everywhere if p.block not in set.intersection(*depths)]
        seen = layers.with_grams(statistics)
        found = library(family, network, staying, seen, metrics, costs, config)
        if tokens:
            found.append([Candidate(VOCABULARY, n, r, costs.tokens(n)) for n, r in tokens])
        fixed = costs.fixed + (0 if tokens else costs.tokens(rows))
        plans = []
        for gone in depths:
            left = [place for place in found if _block_of(place[0]) not in gone]
            rest = fixed + costs.block * (depth - len(gone))
            joints = joints_of(left, costs)
            options, members = _same_everywhere(left) if config.uniform else (left, {})
            if least(options, joints) > allowed - rest and len(depths) > 1:
                continue  # what blocks leave of the budget is less than the others can reach
            count = config.finalists if len(depths) == 1 else 1
            apart = 1 if config.uniform else APART
            for picked in choose(options, allowed - rest, count, apart, joints):
                choice = tuple(c for one in picked for c in members.get(one, (one,)))
                spent = rest + cost(choice, joints)
                curve = curve_of(options, rest, whole, joints)
                figures = expected(left, choice, spent, whole, curve, depth)
                plans.append(plan(gone, choice, figures))
    if not plans:
        raise UserError("prune: no combination of these axes fits the budget; raise it")
    return plans


def _same_everywhere(
    found: Sequence[Sequence[Candidate]],
) -> tuple[list[list[Candidate]], dict[Candidate, Choice]]:
    """Return one place a kind, and what each of its candidates means: one size for every block."""
    kinds: dict[str, list[Sequence[Candidate]]] = {}
    for place in found:
        where = place[0].place
        kinds.setdefault(where.kind if isinstance(where, Place) else where, []).append(place)
    choices = {kind: alike(members) for kind, members in kinds.items()}
    options = [together(same, kind) for kind, same in choices.items()]
    return options, dict(
        zip(itertools.chain(*options), itertools.chain(*choices.values()), strict=True)
    )


def searched(config: Any) -> bool:
    """Whether sizes are chosen by their losses; one width for all needs none."""
    return not config.uniform or bool(set(config.axes) - {"mlp", "blocks"})


def _block_of(candidate: Candidate) -> int | None:
    return candidate.place.block if isinstance(candidate.place, Place) else None


def _of_block(costs: Costs, dense: Mapping[Place, Any], index: int) -> float:
    """Return what a whole block costs."""
    return costs.block + sum(costs.place(p, s) for p, s in dense.items() if p.block == index)


def joints_of(found: Sequence[Sequence[Candidate]], costs: Costs) -> list[Joint]:
    """Return what the blocks save that may go as a whole, where a block has a price of its own."""
    if not costs.block:
        return []
    halves: dict[int, list[Candidate | None]] = {}
    for place in found:
        if isinstance(place[0].place, Place):
            none = next((candidate for candidate in place if not candidate.size), None)
            halves.setdefault(place[0].place.block, []).append(none)
    return [
        Joint(tuple(filter(None, members)), costs.block)
        for members in halves.values()
        if None not in members
    ]


def curve_of(
    found: Sequence[Sequence[Candidate]],
    fixed: float,
    whole: float,
    joints: Sequence[Joint] = (),
) -> list[tuple[float, float]]:
    """Return (share of the cost kept, predicted loss rise in nats) over budgets."""
    points = curve(found, [share * whole - fixed for share in CURVE], joints)
    return [((cost + fixed) / whole, rise) for cost, rise in points]


def price_list(model: Model, config: Any, tokens: Sequence[tuple[int, float]] = ()) -> Costs:
    """Return prices in the unit of the budget that the config gives."""
    if config.latency_ms or config.latency:
        return latency.price_list(model, config, [count for count, _ in tokens])
    if config.bytes:
        return storage(model.family, model.network, BYTES[config.bits], NORM_BYTES)
    return storage(model.family, model.network)


def _allowed(config: Any, whole: float) -> float:
    if config.latency:
        return float(config.latency * whole)
    return float(_ceiling(config) or config.target * whole)


def _ceiling(config: Any) -> float:
    """Return the budget that is given as a number and not as a share, or 0."""
    return float(config.latency_ms or config.bytes or config.parameters)


def _depths(
    config: Any,
    costs: Costs,
    dense: Mapping[Place, Any],
    statistics: Mapping[Place, BlockStatistics],
    remove: float,
    layers: Layers,
    record: Record,
) -> list[set[int]]:
    """Return the blocks that matter least: so many as were asked for, or as the target needs.

    Beside other axes a third of what is to go, or, with several finalists, from none to all of it:
    what whole blocks cost is not known in nats, so that held-out text decides.
    """
    if "blocks" not in config.axes:
        return [set()]
    influence: dict[int, float] = {}
    for place, found in statistics.items():
        influence[place.block] = 1 - float(found.influence[1] / found.influence[0])
    record.figures["block_influence"] = [round(v, 6) for v in influence.values()]
    order = layers.blocks_to_go(influence)
    with record.timed("blocks"):
        if config.blocks:
            return [set(itertools.islice(order, config.blocks))]
        alone = config.axes == ["blocks"]
        shares = [1.0] if alone else [BLOCKS_SHARE]
        if not alone and config.finalists > 1:
            shares = [i / (config.finalists - 1) for i in range(config.finalists)]
        known = itertools.islice(order, len(influence) - 1)
        gone: list[int] = []
        depths: list[set[int]] = []
        index = next(known, None)
        for share in shares:
            left = share * remove - sum(_of_block(costs, dense, i) for i in gone)
            while index is not None:
                size = _of_block(costs, dense, index)
                # To the nearest whole block for a share of the budget, down to it for a number.
                if left <= (0.0 if _ceiling(config) and alone else size / 2):
                    break
                gone.append(index)
                left -= size
                index = next(known, None)
            if set(gone) not in depths:
                depths.append(set(gone))
        return depths


def _uniform(
    costs: Costs, kept: Mapping[Place, Any], allowed: float, rows: int, config: Any
) -> Choice:
    """Return the same width for every feed-forward layer: the nearest to a share of the parameters.

    Where a number is given instead of a share, the widest that it takes.
    """
    mlps = [place for place in kept if place.kind == "mlp"]
    others = sum(costs.place(p, size) for p, size in kept.items() if p.kind != "mlp")
    blocks = costs.block * len({place.block for place in kept})
    left = allowed - costs.fixed - costs.tokens(rows) - blocks - others
    best: tuple[float, Choice] | None = None
    for width in widths(max(kept[p] for p in mlps), config.rounding, config.floor):
        sizes = {place: min(width, kept[place]) for place in mlps}
        choice = tuple(Candidate(p, n, 0.0, costs.place(p, n)) for p, n in sizes.items())
        over = sum(candidate.cost for candidate in choice) - left
        if _ceiling(config) and over > 0:
            continue
        if best is None or abs(over) < best[0]:
            best = abs(over), choice
    step = costs.place(mlps[0], config.rounding) * len(mlps)
    if best is None or best[0] > max(step, 0.05 * allowed):
        raise UserError(
            f"prune: the budget of {allowed:,.4g} is below what MLP widths leave that keep "
            f"{config.floor:.0%} of their channels; raise it, lower floor or drop blocks"
        )
    return best[1]


def check(config: Any) -> None:
    """Refuse axes that do not go together.

    Raises:
        UserError: one line that says what to set instead.
    """
    if "hidden" in config.axes and (len(config.axes) > 1 or config.bytes):
        raise UserError(
            "prune: the hidden size is cut alone, to a share of the parameters; set axes to hidden "
            "and target or parameters"
        )
    if config.criterion != "fisher_obs" and set(config.axes) - {"mlp", "blocks", "hidden"}:
        raise UserError(
            f"prune: axes {', '.join(config.axes)} are compared in nats, which criterion "
            "fisher_obs alone gives; set it, or axes to mlp or blocks"
        )
    if config.uniform and "sublayers" in config.axes:
        raise UserError(
            "prune: uniform keeps blocks alike, and sublayers leaves parts of some out; take "
            "sublayers from axes, or set uniform to false"
        )
    given = [n for n in ("latency_ms", "latency", "bytes", "parameters") if getattr(config, n)]
    if len(given) > 1:
        raise UserError(f"prune: {' and '.join(given)} are two budgets; give one of them")
    if config.blocks and "blocks" not in config.axes:
        raise UserError(f"prune: blocks is {config.blocks}, but axes has no blocks")


def needs_gradients(config: Any) -> bool:
    """Say whether the plan or its criterion needs gradients of the dense model."""
    from_gradients = config.criterion in ("fisher_obs", *criteria.FROM_GRADIENTS)
    return from_gradients and config.axes != ["blocks"]
