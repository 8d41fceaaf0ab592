"""Carry a plan out: choose what stays of each place, cut it, repair what stays."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages.prune import attention, criteria
from tailor_engine.stages.prune.costs import dense_size
from tailor_engine.stages.prune.criteria import Channels
from tailor_engine.stages.prune.cut import cut_channels, cut_heads, repaired_weight
from tailor_engine.stages.prune.depth import greedy
from tailor_engine.stages.prune.fisher import collect_parts_with_fisher, metric
from tailor_engine.stages.prune.lockstep import Walk, with_grams
from tailor_engine.stages.prune.places import PROJECTIONS, Place
from tailor_engine.stages.prune.plan import Plan, needs_gradients, searched
from tailor_engine.stages.prune.record import Record
from tailor_engine.stages.prune.repair import (
    Moments,
    Verdict,
    difference,
    factorise,
    inverse,
    judge_by_moments,
    least_squares,
    ridge_for,
)
from tailor_engine.stages.prune.statistics import (
    Batch,
    BlockStatistics,
    collect_parts,
)


@dataclass
class Kept:
    """What stays of a place: columns of its projection, and for attention the heads [g, q]."""

    columns: Tensor
    heads: Tensor | None = None
    scores: Tensor | None = None


class Layers:
    """The dense network, and the rows that guide how it is pruned."""

    def __init__(
        self,
        family: Family,
        dense: Any,
        fit: Sequence[Batch],
        held_out: Sequence[Batch],
        sample: Sequence[Batch],
        few: Sequence[Batch],
        config: Any,
        record: Record,
    ) -> None:
        self.family, self.dense = family, dense
        self.fit, self.held_out, self.sample, self.few = fit, held_out, sample, few
        self.config, self.record = config, record
        self.repairs = config.repair != "none" and (len(held_out) > 0 or config.held_out == 0)

    def statistics(self) -> tuple[Mapping[Place, BlockStatistics], Mapping[Place, Tensor]]:
        """Return the dense model's statistics and Fisher factors of the places that may be cut.

        They decide the shape. A sample of the rows is enough for that, but where one pass is all.
        """
        axes = set(self.config.axes)
        kinds = ["mlp", "attention"] if axes & {"attention", "sublayers"} else ["mlp"]
        parts = [PROJECTIONS[kind] for kind in kinds]
        taylor = self.config.criterion in criteria.FROM_GRADIENTS
        found: dict[str, dict[int, BlockStatistics]] = {}
        metrics: dict[Place, Tensor] = {}
        gradients = needs_gradients(self.config)
        if gradients:
            with self.record.timed("fisher"):
                found = collect_parts_with_fisher(
                    self.family, self.dense, self.sample, parts, False, self.config.seed, taylor
                )
                by_gradient = _by_place(kinds, found)
                metrics = {} if taylor else {p: metric(s) for p, s in by_gradient.items()}
        needed = searched(self.config) or "blocks" in axes
        if needed and (self.config.mode == "one_pass" or not gradients):
            with self.record.timed("statistics"):
                found = collect_parts(self.family, self.dense, self._seen(), parts, False)
        statistics = _by_place(kinds, found) if found else {}
        if taylor:
            for place, each in statistics.items():
                each.slopes = by_gradient[place].slopes
        return statistics, metrics

    def with_grams(
        self, statistics: Mapping[Place, BlockStatistics]
    ) -> Iterable[tuple[Place, BlockStatistics]]:
        """Return statistics with the Gram matrices that the criterion wants, one at a time."""
        if self.config.criterion not in criteria.IN_ROUNDS:
            return statistics.items()
        return with_grams(self.family, self.dense, self._seen(), statistics)

    def _seen(self) -> Sequence[Batch]:
        return self.fit if self.config.mode == "one_pass" else self.sample

    def blocks_to_go(self, influence: Mapping[int, float]) -> Iterator[int]:
        """Yield blocks in the order in which they go."""
        if self.config.depth == "influence":
            return iter(sorted(influence, key=influence.__getitem__))
        return greedy(self.family, self.dense, self.few, self.config.depth)

    def run(self, plan: Plan) -> None:
        """Cut and repair every place of a copy, `pruned`; dropped ones stay where they are."""
        self.plan, self.pruned = plan, copy.deepcopy(self.dense)
        held_out = self.held_out if self.repairs else []
        one_pass = self.config.mode == "one_pass"
        gram = self.repairs or self.config.criterion in criteria.IN_ROUNDS
        with self.record.timed("prune_and_repair"):
            walk = Walk(self.family, self.dense, self.pruned, self.fit, held_out, one_pass, gram)
            walk.run(plan.dropped, self._touched(plan), self.config.alpha, self._decide)
        self.record.repairs()

    def _touched(self, plan: Plan) -> set[Place]:
        """Return the places that are cut, and the feed-forward layers that can mend the stream."""
        mends = self.repairs and self.config.mode != "one_pass"
        return {
            place
            for place, size in plan.sizes.items()
            if size and (self._is_cut(place) or (place.kind == "mlp" and mends))
        }

    def _is_cut(self, place: Place) -> bool:
        return bool(self.plan.sizes[place] != dense_size(self.family, self.dense, place))

    def _projection(self, place: Place) -> Tensor:
        block = self.family.blocks_of(self.dense)[place.block]
        weight: Tensor = self.family.part(block, place.projection).weight
        return weight.detach().float()

    def _decide(self, place: Place, fit: Moments, held_out: Moments, alpha: float) -> Tensor:
        """Choose, cut and repair one place; return the columns that stay."""
        kept, solved, verdict = self._choose(place, fit), None, None
        if self.repairs:
            weight = self._projection(place)
            solved = self._solve(place, kept.columns, fit, alpha)
            if held_out.tokens:
                plain = difference(weight, kept.columns, None)
                full = difference(weight, kept.columns, solved)
                verdict = judge_by_moments(weight, plain, full, held_out)
        self._cut(place, kept, solved, verdict)
        return kept.columns

    def _choose(self, place: Place, moments: Moments) -> Kept:
        """Choose what stays of a place at its planned size, by what its projection saw."""
        weight = self._projection(place)
        if not self._is_cut(place):
            kept = Kept(torch.arange(weight.shape[1], device=weight.device))
        elif self.config.criterion in criteria.IN_ROUNDS:
            columns, damped = self._columns_and_inverse(place, weight, moments)
            choose = self._heads if place.kind == "attention" else self._channels
            kept = choose(place, columns, damped)
        else:
            block = self.family.blocks_of(self.dense)[place.block]
            gate, up = (self.family.part(block, name).weight.detach() for name in ("gate", "up"))
            dense = self.plan.statistics.get(place)
            slopes = None if dense is None else dense.slopes
            channels = Channels(gate.float(), up.float(), weight, moments.channels, slopes)
            scores = criteria.score(self.config.criterion, channels)
            kept = Kept(criteria.kept_by_score(scores, self.plan.sizes[place]), scores=scores)
        if place.kind == "mlp":
            self.record.width(place.block, kept.columns, weight.shape[1], kept.scores)
        elif kept.heads is not None:
            self.record.heads(place.block, kept.heads)
        return kept

    def _columns_and_inverse(
        self, place: Place, weight: Tensor, moments: Moments
    ) -> tuple[Tensor, Tensor]:
        """Return the projection seen through the metric, and the damped inverse second moment."""
        factor, columns = self.plan.metrics.get(place), weight.double()
        ridge = ridge_for(self.config.ridge, moments.tokens, weight.shape[1])
        damped = inverse(factorise(moments.second, ridge))
        return columns if factor is None else factor.T @ columns, damped

    def _channels(self, place: Place, columns: Tensor, damped: Tensor) -> Kept:
        dense = columns.shape[1]
        counts = criteria.even_rounds(dense - self.plan.sizes[place], self.config.rounds)
        found = criteria.remove_in_rounds(columns, damped, counts)
        mask = torch.ones(dense, dtype=torch.bool, device=columns.device)
        mask[found.dropped] = False
        return Kept(mask.nonzero()[:, 0], scores=found.scores)

    def _heads(self, place: Place, columns: Tensor, damped: Tensor) -> Kept:
        dense = dense_size(self.family, self.dense, place)
        head_dim = columns.shape[1] // (dense.groups * dense.queries)
        scores = criteria.scores_of_runs(columns, damped, head_dim)
        heads = attention.select(columns, damped, scores, dense, self.plan.sizes[place])
        return Kept(attention.columns_of(heads, head_dim), heads, scores)

    def _solve(self, place: Place, columns: Tensor, moments: Moments, alpha: float) -> Tensor:
        """Repair a projection, with more ridge where rows are few or it must be."""
        ridge = ridge_for(self.config.ridge, moments.tokens, len(columns))
        if ridge > self.config.ridge:
            self.record.note(
                f"{moments.tokens} calibration tokens are too few for {len(columns)} columns (two "
                "tokens a column and more are wanted): the repair is damped and repairs less"
            )
        solved, used = least_squares(self._projection(place), columns, moments, ridge, alpha)
        if used > ridge:
            self.record.note(
                f"{place}: the second moment is ill-conditioned, ridge raised to {used:.1e}"
            )
        return solved

    def _cut(
        self, place: Place, kept: Kept, solved: Tensor | None, verdict: Verdict | None
    ) -> None:
        block = self.family.blocks_of(self.pruned)[place.block]
        projection = self.family.part(block, place.projection).weight.detach()
        weight = None
        if verdict is not None:
            self.record.verdict(place, verdict)
        if solved is not None:
            share = 1.0 if verdict is None else verdict.share
            weight = repaired_weight(projection, kept.columns, solved, share)
        if kept.heads is not None:
            cut_heads(self.family, block, kept.heads, weight)
        elif place.kind == "mlp" and (weight is not None or self._is_cut(place)):
            cut_channels(self.family, block, kept.columns, weight)
        elif weight is not None:  # an attention that is whole takes on what is left out behind it
            self.family.part(block, place.projection).weight = torch.nn.Parameter(weight)


def _by_place(
    kinds: Sequence[str], found: Mapping[str, Mapping[int, BlockStatistics]]
) -> dict[Place, BlockStatistics]:
    return {
        Place(block, kind): statistics
        for kind in kinds
        for block, statistics in found[PROJECTIONS[kind]].items()
    }
