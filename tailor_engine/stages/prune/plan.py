"""What is to be cut: which blocks go, and how wide each of the others stays."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailor_engine.model import Model
from tailor_engine.stages.prune import criteria
from tailor_engine.stages.prune.criteria import Channels
from tailor_engine.stages.prune.record import Record
from tailor_engine.stages.prune.repair import factorise, inverse
from tailor_engine.stages.prune.statistics import BlockStatistics
from tailor_engine.stages.prune.widths import (
    Budget,
    allocate,
    block_parameters,
    budget,
    options,
    uniform,
)

if TYPE_CHECKING:
    from tailor_engine.stages.prune.layers import Layers

BLOCKS_SHARE = 1 / 3  # of the parameters to remove, where both axes are cut and no number is given


@dataclass
class Plan:
    """The shape to reach; `metrics` are the Fisher factors A, where the criterion needs them."""

    dropped: list[int]
    widths: list[int]  # one a block of the dense model; 0 for a dropped one
    statistics: list[BlockStatistics] | None = None
    metrics: list[Tensor | None] = field(default_factory=list)


def make_plan(model: Model, config: Any, layers: Layers, record: Record) -> Plan:
    """Decide the shape, from the statistics that the criterion and the allocation need."""
    family, network = model.family, model.network
    blocks = family.blocks_of(network)
    dense_widths = family.widths(network)
    record.prepare(len(blocks), dense_widths)
    fisher = config.criterion == "fisher_obs" and config.axes != "blocks"
    varied = config.axes != "blocks" and not config.uniform
    one_pass = config.mode == "one_pass"
    statistics: list[BlockStatistics] | None = None
    metrics: list[Tensor | None] = [None] * len(blocks)
    if config.axes != "mlp" or varied or fisher or one_pass:
        gram = config.criterion in criteria.IN_ROUNDS and (varied or one_pass)
        gram = gram or (one_pass and config.repair != "none")
        statistics, metrics = layers.statistics(gram, fisher)
    allowed = float(config.parameters or config.target * model.parameters)
    dropped: list[int] = []
    if config.axes != "mlp":
        assert statistics is not None
        influence = [1 - float(s.influence[1] / s.influence[0]) for s in statistics]
        record.figures["block_influence"] = [round(v, 6) for v in influence]
        sizes = [block_parameters(b) for b in blocks]
        dropped = _blocks_to_drop(config, influence, sizes, model.parameters - allowed)
        record.figures["blocks_dropped"] = dropped
    if config.axes == "blocks":
        widths = [0 if i in dropped else w for i, w in enumerate(dense_widths)]
        return Plan(dropped, widths, statistics, metrics)
    kept = [i for i in range(len(blocks)) if i not in dropped]
    ceiling = config.parameters > 0
    limits = budget(
        family,
        network,
        model.parameters,
        allowed,
        dropped,
        config.rounding,
        config.floor,
        ceiling,
    )
    if config.uniform:
        chosen = uniform(limits, ceiling)
    else:
        assert statistics is not None
        with record.timed("widths"):
            chosen = _varied(layers, statistics, metrics, kept, limits, record)
    widths = [0] * len(blocks)
    for index, width in zip(kept, chosen, strict=True):
        widths[index] = width
    return Plan(dropped, widths, statistics, metrics)


def _blocks_to_drop(
    config: Any, influence: Sequence[float], sizes: Sequence[int], remove: float
) -> list[int]:
    """Return the blocks of least influence: so many as were asked for, or as the target needs."""
    order = sorted(range(len(influence)), key=influence.__getitem__)[: len(influence) - 1]
    if config.blocks:
        return sorted(order[: config.blocks])
    if config.axes == "both":
        remove *= BLOCKS_SHARE
    gone: list[int] = []
    for index in order:
        missing = remove - sum(sizes[i] for i in gone)
        # To the nearest whole block for a share of the parameters, and down to it for a number.
        least = 0.0 if config.parameters and config.axes == "blocks" else sizes[index] / 2
        if missing <= least:
            break
        gone.append(index)
    return sorted(gone)


def _varied(
    layers: Layers,
    statistics: Sequence[BlockStatistics],
    metrics: Sequence[Tensor | None],
    kept: Sequence[int],
    limits: Budget,
    record: Record,
) -> list[int]:
    """Return one width a kept block, by each block's curve of error over width."""
    curves = []
    for index, width in zip(kept, limits.widths, strict=True):
        sizes = options(width, limits)
        channels = layers.channels(index, statistics[index].channels)
        if layers.config.criterion in criteria.IN_ROUNDS:
            curve = rounds_curve(channels, statistics[index], metrics[index], layers, sizes)
        else:
            curve = score_curve(criteria.score(layers.config.criterion, channels), sizes)
        curves.append(curve)
    chosen = allocate(curves, limits)
    if layers.config.criterion == "fisher_obs":
        predicted = [
            curve[options(dense, limits).index(width)]
            for curve, dense, width in zip(curves, limits.widths, chosen, strict=True)
        ]
        rise = [0.0] * len(statistics)
        for index, value in zip(kept, predicted, strict=True):
            rise[index] = round(value, 6)
        record.figures["predicted_loss_rise_nats"] = rise
    return chosen


def score_curve(scores: Tensor, sizes: Sequence[int]) -> list[float]:
    """Return the share of the layer's whole score that is lost at each width."""
    ordered = scores.double().sort(descending=True).values
    lost = 1 - ordered.cumsum(0) / ordered.sum().clamp_min(torch.finfo(torch.float64).tiny)
    return [max(0.0, v) for v in lost[torch.tensor(list(sizes), device=lost.device) - 1].tolist()]


def rounds_curve(
    channels: Channels,
    statistics: BlockStatistics,
    factor: Tensor | None,
    layers: Layers,
    sizes: Sequence[int],
) -> list[float]:
    """Return the error after repair at each width, from one factorisation.

    Numbers: with a Fisher factor in nats a token, without one relative to the layer's own output.
    """
    second = statistics.moments().second.double()
    down = channels.down.double()
    columns = down if factor is None else factor.T @ down
    counts = [a - b for a, b in itertools.pairwise(sizes)]
    damped = inverse(factorise(second, layers.config.ridge))
    errors = [0.0, *criteria.remove_in_rounds(columns, damped, counts).errors]
    if factor is not None:
        return [0.5 * e for e in errors]
    energy = float(((down @ second) * down).sum())
    return [e / max(energy, 1e-30) for e in errors]
