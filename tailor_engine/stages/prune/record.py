"""What the prune stage reports: times, sizes, errors and pictures small enough for a page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.places import Place
from tailor_engine.stages.prune.repair import Verdict
from tailor_engine.stages.prune.search import Candidate, Choice

if TYPE_CHECKING:
    from tailor_engine.stages.prune.plan import Plan

BINS = 64  # columns of the heat maps
_ERRORS = ("error_before", "error_after", "repair_share")


class Record:
    """Collects figures while the stage runs; lists hold one entry a block of the dense model."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.figures: dict[str, Any] = {}
        self.notes: list[str] = []

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            passed = time.perf_counter() - start
            self.seconds[phase] = self.seconds.get(phase, 0.0) + passed

    def note(self, line: str) -> None:
        """Keep a one-line fact."""
        if line not in self.notes:
            self.notes.append(line)
            context().note(line)

    def prepare(self, dense: Mapping[Place, Any], depth: int) -> None:
        """Make the per-block lists."""
        widths = [dense.get(Place(i, "mlp"), 0) for i in range(depth)]
        heads = [list(dense.get(Place(i, "attention"), (0, 0))) for i in range(depth)]
        self.figures |= {
            "widths_before": widths,
            "widths": [0] * depth,
            "heads_before": heads,
            "heads": [list(pair) for pair in heads],
            "importance_profile": [None] * depth,
            "kept_profile": [[0.0] * BINS for _ in range(depth)],
        }
        for key in _ERRORS:
            self.figures |= {key: [None] * depth, f"attention_{key}": [None] * depth}

    def planned(self, plan: Plan) -> None:
        """Keep what is left out: blocks, and halves of others; and how many tokens stay."""
        whole = {place.block for place, size in plan.sizes.items() if size}
        blocks = {place.block for place in plan.dropped} - whole
        self.figures["blocks_dropped"] = sorted(blocks)
        self.figures["left_out"] = [str(p) for p in plan.dropped if p.block not in blocks]
        self.figures["tokens"] = plan.tokens
        self.figures |= plan.figures
        for place in plan.dropped:
            if place.kind == "attention":
                self.figures["heads"][place.block] = [0, 0]

    def latency(self, dense: float, pruned: float) -> None:
        """Keep the measured time of a decode step before and after, beside the predicted one.

        The prediction's own measure of the dense step may be of another day.
        """
        share = self.figures.get("predicted_share")
        self.figures |= {"latency_ms_dense": dense, "latency_ms": pruned}
        if share is not None:
            predicted = self.figures["predicted_cost"]
            self.figures |= {
                "latency_ms_predicted": predicted,
                "latency_ms_dense_predicted": predicted / share,
            }

    def width(self, index: int, kept: Tensor, width: int, scores: Tensor | None) -> None:
        """Keep which channels of a block stay, and the profile of their scores."""
        self.figures["widths"][index] = len(kept)
        mask = torch.zeros(width, dtype=torch.float64, device=kept.device)
        mask[kept] = 1.0
        self.figures["kept_profile"][index] = binned(mask)
        if scores is not None:
            self.figures["importance_profile"][index] = profile(scores)

    def heads(self, index: int, heads: Tensor) -> None:
        """Keep how many groups and query heads of a block stay."""
        self.figures["heads"][index] = list(heads.shape)

    def verdict(self, place: Place, verdict: Verdict) -> None:
        """Keep the held-out errors of a place before and after its repair."""
        prefix = "" if place.kind == "mlp" else "attention_"
        values = (round(verdict.before, 6), round(verdict.after, 6), round(verdict.share, 3))
        for key, value in zip(_ERRORS, values, strict=True):
            self.figures[prefix + key][place.block] = value
        if verdict.share == 0:
            self.note(f"{place}: repair left out, held-out rows are better so")

    def repairs(self) -> None:
        """Note where a repair was applied in part."""
        found = [*self.figures["repair_share"], *self.figures["attention_repair_share"]]
        shares = [share for share in found if share is not None and 0 < share < 1]
        if shares:
            self.note(
                f"repair applied in part ({min(shares):.0%} to {max(shares):.0%}) in "
                f"{len(shares)} places, where held-out rows are better so"
            )

    def metrics(self) -> dict[str, Any]:
        """Return everything under keys that carry their unit."""
        times = {f"seconds_{phase}": round(value, 3) for phase, value in self.seconds.items()}
        return {**self.figures, **times}


def expected(
    library: Sequence[Sequence[Candidate]],
    choice: Choice,
    spent: float,
    whole: float,
    curve: Sequence[tuple[float, float]],
    depth: int,
) -> dict[str, Any]:
    """Return what the search saw: how many candidates, what it expects, and the curve."""
    rises = [0.0] * depth
    for candidate in choice:
        if isinstance(candidate.place, Place):
            rises[candidate.place.block] += candidate.rise
    return {
        "candidates": sum(map(len, library)),
        "predicted_loss_rise_nats": [round(rise, 6) for rise in rises],
        "predicted_loss_rise_nats_total": sum(c.rise for c in choice),
        "predicted_share": spent / whole,
        "predicted_cost": spent,
        "predicted_curve": [[round(x, 4), round(y, 5)] for x, y in curve],
    }


def binned(values: Tensor) -> list[float]:
    """Return the means of at most 64 equal runs of channels."""
    parts = torch.tensor_split(values, min(BINS, len(values)))
    return [round(v, 4) for v in torch.stack([p.mean() for p in parts]).tolist()]


def profile(scores: Tensor) -> list[float]:
    """Return the share of all importance that each of 64 equal groups holds, highest first."""
    ordered = scores.double().clamp_min(0).sort(descending=True).values
    total = ordered.sum().clamp_min(torch.finfo(torch.float64).tiny)
    parts = torch.tensor_split(ordered, min(BINS, len(ordered)))
    return [float(f"{v:.4g}") for v in (torch.stack([p.sum() for p in parts]) / total).tolist()]
