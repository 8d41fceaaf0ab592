"""The candidates of every place: the sizes it may have, and the loss of each after repair."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages.prune import attention, criteria
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.costs import Costs, dense_size
from tailor_engine.stages.prune.criteria import Channels
from tailor_engine.stages.prune.places import Place
from tailor_engine.stages.prune.repair import factorise, inverse
from tailor_engine.stages.prune.search import Candidate
from tailor_engine.stages.prune.statistics import BlockStatistics

# Nats found over nats foretold, where widths alone were cut by 20 % of SmolLM2: 1.3 on one domain,
# 1.7 on mixed text. Without it widths look cheap beside vocabulary sizes, which are measured.
UNDERSTATED = 1.5


def widths(dense: int, rounding: int, floor: float) -> list[int]:
    """Return the widths that may be chosen: the dense one, then multiples down to the floor."""
    least = min(dense, max(rounding, round(floor * dense / rounding) * rounding))
    return [dense, *range((dense - 1) // rounding * rounding, least - 1, -rounding)]


def candidates(
    family: Family,
    network: Any,
    place: Place,
    statistics: BlockStatistics | None,
    metric: Tensor | None,
    costs: Costs,
    config: Any,
) -> list[Candidate]:
    """Return the candidates of one place, the dense size first; that alone for an axis not asked.

    Numbers: with the Fisher factor `metric` losses in nats a token, without it relative to the
        place's own output, which compares places of one kind alone.
    """
    block, size = family.blocks_of(network)[place.block], dense_size(family, network, place)
    projection = family.part(block, place.projection).weight.detach().float()
    # Nothing stands before the first block to take on what it does.
    gone = "sublayers" in config.axes and metric is not None and place.block > 0
    rises = {size: 0.0}
    if statistics is not None and (gone or place.kind in config.axes):
        cut = place.kind in config.axes
        if place.kind == "mlp":
            allowed = widths(size, config.rounding, config.floor) if cut else [size]
            rises |= _of_widths(family, block, allowed, gone, statistics, metric, config)
        else:
            head_dim = int(family.part(block, "attention").head_dim)
            options = attention.sizes(size, head_dim, config.rounding) if cut else [size]
            rises |= _of_heads(projection, size, options, gone, statistics, metric, config)
    return [Candidate(place, s, rise, costs.place(place, s)) for s, rise in rises.items()]


def _of_widths(
    family: Family,
    block: Any,
    allowed: Sequence[int],
    gone: bool,
    statistics: BlockStatistics,
    metric: Tensor | None,
    config: Any,
) -> dict[int, float]:
    """Return {width: loss} from one factorisation."""
    gate, up, down = (
        family.part(block, name).weight.detach().float() for name in ("gate", "up", "down")
    )
    ladder = [*allowed, 0] if gone else list(allowed)
    if config.criterion not in criteria.IN_ROUNDS:
        channels = Channels(gate, up, down, statistics.channels, statistics.slopes)
        scores = criteria.score(config.criterion, channels)
        ordered = scores.sort(descending=True).values
        total = ordered.sum().clamp_min(torch.finfo(torch.float64).tiny)
        return {w: max(0.0, float(1 - ordered[:w].sum() / total)) for w in ladder}
    columns, damped, scale = seen_through(down, statistics, metric, config.ridge)
    steps = [a - b for a, b in itertools.pairwise(ladder)]
    errors = criteria.remove_in_rounds(columns, damped, steps).errors
    return {width: scale * error for width, error in zip(ladder, [0.0, *errors], strict=True)}


def _of_heads(
    output: Tensor,
    dense: Heads,
    options: Sequence[Heads],
    gone: bool,
    statistics: BlockStatistics,
    metric: Tensor | None,
    config: Any,
) -> dict[Any, float]:
    """Return {heads: loss}; 0 heads where attention may be left out."""
    columns, damped, scale = seen_through(output, statistics, metric, config.ridge)
    head_dim = output.shape[1] // (dense.groups * dense.queries)
    scores = criteria.scores_of_runs(columns, damped, head_dim)
    found: dict[Any, float] = {}
    for size in options:
        kept = attention.select(columns, damped, scores, dense, size)
        mask = torch.ones(output.shape[1], dtype=torch.bool, device=output.device)
        mask[attention.columns_of(kept, head_dim)] = False
        found[size] = scale * attention.removal_error(columns, damped, mask.nonzero()[:, 0])
    # Left out: all that attention wrote is lost, as if nothing took it on. Less what the place
    # before it can learn to write is foretold too little and chosen worse: SmolLM2, -5 % by halves
    # of blocks, 0.05 nats foretold and 0.21 found, -13 % 0.20 and 0.67; as here, -14 %, 0.67
    # foretold and 0.29 found.
    if gone:
        everything = torch.arange(output.shape[1], device=output.device)
        found[0] = scale * attention.removal_error(columns, damped, everything)
    return found


def seen_through(
    projection: Tensor, statistics: BlockStatistics, metric: Tensor | None, ridge: float
) -> tuple[Tensor, Tensor, float]:
    """Return the projection seen through the metric, (C + lambda I)^-1, and the errors' factor.

    The factor is 1/2 with a Fisher factor (nats a token) and what the second order understates,
    else one over the output's energy.
    """
    second, wide = statistics.moments().second.double(), projection.double()
    damped = inverse(factorise(second, ridge))
    if metric is not None:
        return metric.T @ wide, damped, 0.5 * UNDERSTATED
    energy = float(((wide @ second) * wide).sum())
    return wide, damped, 1 / max(energy, 1e-30)


def library(
    family: Family,
    network: Any,
    kept: Collection[Place],
    seen: Iterable[tuple[Place, BlockStatistics]],
    metrics: Mapping[Place, Tensor],
    costs: Costs,
    config: Any,
) -> list[list[Candidate]]:
    """Return the candidates of all places that are not dropped already.

    `seen` gives places with their statistics, each once: no Gram matrix is kept.
    """
    found: dict[Place, list[Candidate]] = {}
    for place, statistics in seen:
        if place in kept:
            found[place] = candidates(
                family, network, place, statistics, metrics.get(place), costs, config
            )
    for place in set(kept) - set(found):
        found[place] = candidates(family, network, place, None, None, costs, config)
    return [found[place] for place in kept]
