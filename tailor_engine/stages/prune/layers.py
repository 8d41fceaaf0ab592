"""Carry a plan out: choose the channels of each block, cut them, repair what stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune import criteria, lockstep
from tailor_engine.stages.prune.criteria import Channels
from tailor_engine.stages.prune.cut import cut_channels, repaired_weight
from tailor_engine.stages.prune.fisher import collect_with_fisher, metric
from tailor_engine.stages.prune.plan import Plan
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
    collect,
    held_out_verdicts,
)


class Layers:
    """The dense network, the copy that is being pruned, and the rows that guide it."""

    def __init__(
        self,
        family: Family,
        dense: Any,
        pruned: Any,
        fit: Sequence[Batch],
        held_out: Sequence[Batch],
        sample: Sequence[Batch],
        config: Any,
        record: Record,
    ) -> None:
        self.family, self.dense, self.pruned = family, dense, pruned
        self.fit, self.held_out, self.sample = fit, held_out, sample
        self.config, self.record = config, record
        self.repairs = config.repair != "none" and (len(held_out) > 0 or config.held_out == 0)

    def statistics(
        self, gram: bool, fisher: bool
    ) -> tuple[list[BlockStatistics], list[Tensor | None]]:
        """Return the dense model's statistics and Fisher factors (or None) of every block.

        A sequential run needs them only to decide the shape, for which a sample of the rows is
        enough; a one-pass run takes all rows.
        """
        found: list[BlockStatistics] = []
        metrics: list[Tensor | None] = [None] * len(self.family.blocks_of(self.dense))
        one_pass = self.config.mode == "one_pass"
        if fisher:
            with self.record.timed("fisher"):
                found = collect_with_fisher(
                    self.family, self.dense, self.sample, gram and not one_pass, self.config.seed
                )
                metrics = [metric(s) for s in found]
        if one_pass or not fisher:
            with self.record.timed("statistics"):
                rows = self.fit if one_pass else self.sample
                found = collect(self.family, self.dense, rows, gram)
        return found, metrics

    def channels(self, index: int, stats: Tensor | None) -> Channels:
        """Return what a criterion may look at in a block."""
        block = self.family.blocks_of(self.dense)[index]
        gate, up, down = (self.family.part(block, n).weight for n in ("gate", "up", "down"))
        return Channels(gate.detach().float(), up.detach().float(), down.detach().float(), stats)

    def run(self, plan: Plan) -> None:
        """Cut and repair every block of the pruned network; dropped blocks stay in place."""
        self.plan = plan
        self._carry_out(plan)
        shares = [s for s in self.record.figures["repair_share"] if s is not None and 0 < s < 1]
        if shares:
            self.record.note(
                f"repair applied in part ({min(shares):.0%} to {max(shares):.0%}) in "
                f"{len(shares)} blocks, where held-out rows are better so"
            )

    def _carry_out(self, plan: Plan) -> None:
        if self.config.mode == "one_pass":
            if plan.dropped and self.repairs:
                self.record.note(
                    "mode one_pass does not fold dropped blocks into the ones before them; "
                    "sequential does"
                )
            self._one_pass(plan)
            return
        with self.record.timed("prune_and_repair"):
            lockstep.walk(
                self.family,
                self.dense,
                self.pruned,
                self.fit,
                self.held_out if self.repairs else [],
                plan.dropped,
                self.config.alpha,
                self._decide,
            )

    def _one_pass(self, plan: Plan) -> None:
        statistics = plan.statistics
        assert statistics is not None
        kept: list[Tensor | None] = []
        repaired: list[Tensor | None] = []
        with self.record.timed("solve"):
            for index, (width, found) in enumerate(zip(plan.widths, statistics, strict=True)):
                moments = found.moments() if found.gram is not None else None
                channels = self.channels(index, found.channels)
                chosen = self._choose(index, width, channels, moments) if width else None
                kept.append(chosen)
                solved = None
                if chosen is not None and self.repairs and width < channels.down.shape[1]:
                    assert moments is not None
                    solved = self._solve(index, channels.down, chosen, moments, 0.0)
                repaired.append(solved)
                context().progress(index + 1, len(statistics), "choose and solve")
        pairs: list[tuple[Tensor, Tensor] | None] = []
        for index, (chosen, solved) in enumerate(zip(kept, repaired, strict=True)):
            if chosen is None or solved is None:
                pairs.append(None)
                continue
            down = self.channels(index, None).down
            pairs.append((difference(down, chosen, None), difference(down, chosen, solved)))
        with self.record.timed("held_out"):
            verdicts = held_out_verdicts(self.family, self.dense, self.held_out, pairs)
        for index, chosen in enumerate(kept):
            if chosen is not None:
                self._cut(index, chosen, repaired[index], verdicts[index])

    def _decide(self, index: int, fit: Moments, held_out: Moments, alpha: float) -> Tensor:
        """Choose, cut and repair one block in a sequential run; return the channels that stay."""
        channels = self.channels(index, fit.channels)
        kept = self._choose(index, self.plan.widths[index], channels, fit)
        down, solved, verdict = channels.down, None, None
        if self.repairs:
            solved = self._solve(index, down, kept, fit, alpha)
            if held_out.tokens:
                plain, full = difference(down, kept, None), difference(down, kept, solved)
                verdict = judge_by_moments(down, plain, full, held_out)
        self._cut(index, kept, solved, verdict)
        return kept

    def _choose(
        self, index: int, width: int, channels: Channels, moments: Moments | None
    ) -> Tensor:
        """Return the channels of a block that stay, increasing."""
        dense_width = channels.down.shape[1]
        name = self.config.criterion
        scores = None
        if width == dense_width:
            kept = torch.arange(width, device=channels.down.device)
        elif name in criteria.IN_ROUNDS:
            assert moments is not None
            factor = self.plan.metrics[index]
            columns = channels.down.double()
            columns = columns if factor is None else factor.T @ columns
            ridge = ridge_for(self.config.ridge, moments.tokens, dense_width)
            damped = inverse(factorise(moments.second, ridge))
            counts = criteria.even_rounds(dense_width - width, self.config.rounds)
            found = criteria.remove_in_rounds(columns, damped, counts)
            scores, gone = found.scores, found.dropped
            mask = torch.ones(dense_width, dtype=torch.bool, device=gone.device)
            mask[gone] = False
            kept = mask.nonzero()[:, 0]
        else:
            scores = criteria.score(name, channels)
            kept = criteria.kept_by_score(scores, width)
        self.record.block(index, kept, dense_width, scores)
        return kept

    def _solve(
        self, index: int, down: Tensor, kept: Tensor, moments: Moments, alpha: float
    ) -> Tensor:
        """Repair a block's down projection, with more ridge where rows are few or it must be."""
        ridge = ridge_for(self.config.ridge, moments.tokens, len(kept))
        if ridge > self.config.ridge:
            self.record.note(
                f"{moments.tokens} calibration tokens are too few for {len(kept)} channels (two "
                "tokens a channel and more are wanted): the repair is damped and repairs less"
            )
        solved, used = least_squares(down, kept, moments, ridge, alpha)
        if used > ridge:
            self.record.note(
                f"block {index}: the second moment is ill-conditioned, ridge raised to {used:.1e}"
            )
        return solved

    def _cut(
        self, index: int, kept: Tensor, solved: Tensor | None, verdict: Verdict | None
    ) -> None:
        block = self.family.blocks_of(self.pruned)[index]
        down = self.family.part(block, "down").weight.detach()
        weight = None
        if verdict is not None:
            figures = self.record.figures
            figures["error_before"][index] = round(verdict.before, 6)
            figures["error_after"][index] = round(verdict.after, 6)
            figures["repair_share"][index] = round(verdict.share, 3)
            if verdict.share == 0:
                self.record.note(f"block {index}: repair left out, held-out rows are better so")
        if solved is not None:
            share = 1.0 if verdict is None else verdict.share
            weight = repaired_weight(down, kept, solved, share)
        if weight is None and len(kept) == down.shape[1]:
            return
        cut_channels(self.family, block, kept, weight)
