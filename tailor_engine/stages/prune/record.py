"""What the prune stage reports: times, widths, errors and pictures small enough for a page."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tailor_engine.stages._stage import context

BINS = 64  # columns of the heat maps


class Record:
    """Collects figures while the stage runs."""

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

    def prepare(self, depth: int, widths: list[int]) -> None:
        """Make the per-block lists, of the dense model's depth."""
        self.figures |= {
            "widths_before": widths,
            "widths": [0] * depth,
            "error_before": [None] * depth,
            "error_after": [None] * depth,
            "repair_share": [None] * depth,
            "importance_profile": [None] * depth,
            "kept_profile": [[0.0] * BINS for _ in range(depth)],
        }

    def block(self, index: int, kept: Tensor, width: int, scores: Tensor | None) -> None:
        """Keep what was cut in a block, and the profile of its channels' scores."""
        self.figures["widths"][index] = len(kept)
        mask = torch.zeros(width, dtype=torch.float64, device=kept.device)
        mask[kept] = 1.0
        self.figures["kept_profile"][index] = binned(mask)
        if scores is not None:
            self.figures["importance_profile"][index] = profile(scores)

    def metrics(self) -> dict[str, Any]:
        """Return everything under keys that carry their unit."""
        times = {f"seconds_{phase}": round(value, 3) for phase, value in self.seconds.items()}
        return {**self.figures, **times}


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
