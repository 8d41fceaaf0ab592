"""The picture of a pruned network's shape: heads and widths that stay, and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tailor_engine.io import _charts
from tailor_engine.io._charts import DOMAIN, GENERAL, GRID, INK, MUTED, PAPER


def shapes(details: dict[str, Any], unit: str) -> str:
    """Draw each layer's attention and feed-forward part as it is now, and the predicted curve.

    `details` are the metrics of a prune stage, `unit` names what its budget counts.
    """
    heads, widths = _heads(details), _widths(details)
    curve = details.get("predicted_curve") or []

    def draw(figure: Any, narrow: bool) -> None:
        count = 3 if curve else 2
        if narrow:
            axes = figure.subplots(count, 1)
        else:
            axes = figure.subplots(1, count, width_ratios=[1, 1, 1.25][:count])
        gone = set(details.get("blocks_dropped") or [])
        for axis, (title, shares, texts) in zip(axes, (heads, widths), strict=False):
            _bars(axis, shares, texts, gone)
            axis.set_title(title, pad=8)
        if curve:
            _curve(axes[2], details, unit)

    label = "; ".join(
        f"{title}: " + ", ".join(f"layer {i} {text}" for i, text in enumerate(texts))
        for title, _, texts in (heads, widths)
    )
    tall = max(2.8, 0.135 * len(widths[1]) + 0.9)
    narrow = 2 * tall + (3.2 if curve else 0)
    return _charts.both("shapes", label, draw, (10.4, tall), (4.9, narrow))


def _heads(details: dict[str, Any]) -> tuple[str, list[float], list[str]]:
    now, before = (
        [groups * queries for groups, queries in details[key]] for key in ("heads", "heads_before")
    )
    texts = [f"{groups} × {queries}" if groups else "none" for groups, queries in details["heads"]]
    return "Attention: groups × query heads", _shares(now, before), texts


def _widths(details: dict[str, Any]) -> tuple[str, list[float], list[str]]:
    now, before = details["widths"], details["widths_before"]
    texts = [f"{width:,}" if width else "none" for width in now]
    return "Feed-forward channels", _shares(now, before), texts


def _shares(now: Sequence[int], before: Sequence[int]) -> list[float]:
    return [a / b if b else 0.0 for a, b in zip(now, before, strict=True)]


def _bars(axis: Any, shares: Sequence[float], texts: Sequence[str], gone: set[int]) -> None:
    """Draw a bar a layer: full for what is whole, an outline of dashes for what is left out."""
    layers = np.arange(len(shares))
    axis.barh(layers, 1.0, color="none", edgecolor=GRID, height=0.72, linewidth=0.6)
    axis.barh(layers, shares, color=DOMAIN, alpha=0.75, height=0.72)
    small = "x-small" if len(shares) > 16 else "small"
    for layer, (share, text) in enumerate(zip(shares, texts, strict=True)):
        if share < 1:
            words = "block dropped" if layer in gone else "left out" if not share else text
            axis.text(max(share, 0) + 0.02, layer, words, va="center", color=INK, fontsize=small)
    every = 1 if len(shares) <= 16 else 2 if len(shares) <= 32 else -(-len(shares) // 16)
    axis.set_yticks(layers[::every], [str(i) for i in layers[::every]])
    axis.set_ylim(len(shares) - 0.5, -0.5)
    axis.set_xlim(0, 1.02)
    axis.set_xticks([0, 0.5, 1], ["0", "50", "100 %"])
    axis.set_ylabel("layer")
    axis.grid(False)


def _curve(axis: Any, details: dict[str, Any], unit: str) -> None:
    """Draw the loss rise that the search expects of each budget, and the one that was chosen."""
    points = np.array([[1.0, 0.0], *details["predicted_curve"]])
    axis.plot(100 * points[:, 0], points[:, 1], "-", color=DOMAIN, linewidth=1.6)
    axis.plot(100 * points[:, 0], points[:, 1], "o", color=DOMAIN, markersize=4)
    x, y = 100 * details["predicted_share"], details["predicted_loss_rise_nats_total"]
    axis.plot([x], [y], "o", color=GENERAL, markersize=8, markeredgecolor=PAPER, zorder=3)
    words = f"chosen: {x:.0f} %, {y:.2g} nats"
    axis.annotate(words, (x, y), (-6, 10), textcoords="offset points", ha="right", color=INK)
    axis.axhline(0, color=MUTED, linewidth=0.8)
    axis.invert_xaxis()
    axis.margins(x=0.12, y=0.16)
    axis.set_xlabel(f"{unit} that stay, %")
    axis.set_ylabel("predicted loss rise, nats a token")
    axis.set_title("What each budget would cost", pad=8)
