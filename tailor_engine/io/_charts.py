"""The report's pictures as inline SVG: each drawn for a wide page and for a phone.

Colours are placeholders that become CSS variables, so that one picture serves light and dark
pages; text stays text and takes the page's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import numpy as np

# What matplotlib draws -> what the page shows.
INK, MUTED, GRID, PAPER = "#010101", "#020202", "#030303", "#040404"
DOMAIN, GENERAL, WASH = "#050505", "#060606", "#070707"
_VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card",
    DOMAIN: "--domain", GENERAL: "--general", WASH: "--wash",
}  # fmt: skip
_KEPT = (0x1A, 0x93, 0x9B)  # the heat map is a picture of one colour whose opacity is the value
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailor",
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.edgecolor": GRID,
    "axes.labelcolor": MUTED,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def both(
    name: str, label: str, draw: Callable[[Any, bool], None], wide: tuple, narrow: tuple
) -> str:
    """Draw a figure at two sizes (inches) and return both SVGs; the page shows one of them."""
    import matplotlib

    matplotlib.use("svg", force=False)
    from matplotlib.figure import Figure

    parts = []
    for kind, shape, points in (("wide", wide, 8.6), ("narrow", narrow, 11.0)):
        sizes = {"font.size": points, "axes.titlesize": points * 1.15, "legend.fontsize": points}
        style: Any = {**_STYLE, **sizes}
        with matplotlib.rc_context(style):
            figure = Figure(figsize=shape, layout="constrained")
            draw(figure, kind == "narrow")
            stream = io.StringIO()
            figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
        parts.append(_inline(stream.getvalue(), f"{name}-{kind}", kind, label))
    return "\n".join(parts)


def _inline(svg: str, prefix: str, kind: str, label: str) -> str:
    """Strip the file's frame, make ids unique on the page, and colours the page's own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(
        r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', rf'<svg viewBox="\1" class="{kind}">', svg, count=1
    )
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    svg = svg.replace("xlink:href", "href")
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    described = label.replace("&", "and").replace('"', "'").replace("<", "less than ")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{described}" ', 1)


def size_quality(points: list[dict[str, Any]]) -> str:
    """Draw perplexity over size, stage by stage: one panel each for domain and general text."""
    panels = [key for key in ("domain", "general") if all(p.get(key) for p in points)]
    titles = {"domain": "Domain text", "general": "General text"}

    def draw(figure: Any, narrow: bool) -> None:
        grid = (len(panels), 1) if narrow else (1, len(panels))
        axes = figure.subplots(*grid, squeeze=False).flat
        for axis, key in zip(axes, panels, strict=True):
            colour = DOMAIN if key == "domain" else GENERAL
            x = np.array([p["bytes"] / 1e6 for p in points])
            y = np.array([p[key] for p in points])
            axis.set_xscale("log")
            if y.max() > 4 * y.min():
                axis.set_yscale("log")
            span = np.log(x.max() / x.min()) or 1.0
            # The smaller, the further to the right: the eye follows the run.
            axis.set_xlim(
                x.max() * np.exp(0.08 * span), x.min() / np.exp((0.5 if narrow else 0.36) * span)
            )
            axis.axhline(y[0], color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.plot(x, y, color=colour, linewidth=1.6, alpha=0.55)
            axis.scatter(x, y, s=34, color=colour, edgecolor=PAPER, linewidth=1.2, zorder=3)
            axis.margins(y=0.16)
            _ticks(axis.xaxis, x, " MB")
            _plain_ticks(axis.yaxis)
            axis.set_title(titles[key], pad=10)
            axis.set_ylabel("perplexity")
            axis.set_xlabel("size on disk, smaller to the right")
            _labels(figure, axis, x, y, [p["name"] for p in points])

    label = "Perplexity over size on disk after each stage: " + "; ".join(
        f"{p['name']} {p['bytes'] / 1e6:.0f} MB, " + ", ".join(f"{k} {p[k]:.1f}" for k in panels)
        for p in points
    )
    count = len(panels)
    return both("size", label, draw, (5.0 * count + 0.4, 3.9), (4.9, 3.7 * count))


def _labels(figure: Any, axis: Any, x: Any, y: Any, names: list[str]) -> None:
    """Write each point's name to its right, moved apart where points share a size."""
    figure.draw_without_rendering()
    height = 1.45 * axis.title.get_fontsize() * figure.dpi / 72
    places = axis.transData.transform(np.column_stack([x, y]))
    inverse = axis.transData.inverted()
    groups: list[list[int]] = []
    for index in range(len(x)):
        near = [g for g in groups if abs(places[g[0]][0] - places[index][0]) < 5 * height]
        near[0].append(index) if near else groups.append([index])
    for group in groups:
        order = sorted(group, key=lambda index: places[index][1])
        wanted = [places[index][1] for index in order]
        for i in range(1, len(wanted)):
            wanted[i] = max(wanted[i], wanted[i - 1] + height)
        shift = (sum(places[i][1] for i in order) - sum(wanted)) / len(order)
        start = max(places[index][0] for index in group) + 0.9 * height
        for index, level in zip(order, wanted, strict=True):
            target = inverse.transform((start, level + shift))
            axis.annotate(
                f"{names[index]}  {y[index]:.1f}",
                (x[index], y[index]),
                target,
                va="center",
                color=INK,
                bbox={"facecolor": PAPER, "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
                arrowprops={"arrowstyle": "-", "color": MUTED, "linewidth": 0.6, "shrinkB": 4},
                annotation_clip=False,
            )


def loss_curves(curves: list[dict[str, Any]]) -> str:
    """Draw the loss of each training stage over its steps, with the validation's."""

    def draw(figure: Any, narrow: bool) -> None:
        grid = (len(curves), 1) if narrow else (1, len(curves))
        for axis, curve in zip(figure.subplots(*grid, squeeze=False).flat, curves, strict=True):
            loss = np.array(curve["loss"], dtype=float)
            step = np.array(curve.get("step") or range(1, len(loss) + 1))
            axis.plot(step, loss, color=DOMAIN, linewidth=0.8, alpha=0.35)
            if len(loss) > 8:
                width = max(3, len(loss) // 12)
                padded = np.pad(loss, (width // 2, width - 1 - width // 2), mode="edge")
                smooth = np.convolve(padded, np.ones(width) / width, mode="valid")
                axis.plot(step, smooth, color=DOMAIN, linewidth=1.9, label="training")
            else:
                axis.plot(step, loss, color=DOMAIN, linewidth=1.9, label="training")
            if curve.get("validation_loss"):
                axis.plot(
                    curve["validation_step"], curve["validation_loss"], "o", color=GENERAL,
                    markeredgecolor=PAPER, markersize=6.5, label="validation",
                )  # fmt: skip
                axis.legend(frameon=False, loc="upper right", handlelength=1.2)
            axis.set_title(curve["name"], pad=8)
            axis.set_xlabel("step")
            axis.margins(x=0.02, y=0.12)
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
            if axis.get_subplotspec().is_first_col():
                axis.set_ylabel("loss, nats a token")

    label = "Training loss of " + "; ".join(
        f"{c['name']}: {c['loss'][0]:.2f} to {c['loss'][-1]:.2f} in {len(c['loss'])} steps"
        for c in curves
    )
    count = len(curves)
    return both("loss", label, draw, (10.4, 3.1), (4.9, 2.9 * count))


def cuts(details: dict[str, Any]) -> str:
    """Draw what pruning kept: layers x runs of channels, and each layer's error by the repair."""
    kept = [row or [0.0] for row in details["kept_profile"]]
    columns = max(map(len, kept))
    cells = np.zeros((len(kept), columns))
    for index, row in enumerate(kept):
        cells[index] = np.interp(np.linspace(0, 1, columns), np.linspace(0, 1, len(row)), row)
    before, after = (
        _numbers(details.get(f"error_{key}"), len(kept)) for key in ("before", "after")
    )
    widths, full = details["widths"], details["widths_before"]
    errors = bool(np.isfinite(before).any())

    def draw(figure: Any, narrow: bool) -> None:
        if narrow:
            rows = 2 if errors else 1
            axes = figure.subplots(rows, 1, squeeze=False).flat
        else:
            ratios = [2.1, 1] if errors else [1]
            axes = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False).flat
        picture = np.zeros((*cells.shape, 4), dtype=np.uint8)
        picture[..., :3] = _KEPT
        picture[..., 3] = np.round(255 * np.clip(cells, 0, 1))
        axes[0].imshow(picture, aspect="auto", interpolation="none")
        axes[0].grid(False)
        axes[0].set_title("Channels kept, layer by layer", pad=8)
        axes[0].set_xticks([])
        axes[0].set_xlabel("feed-forward channels, from first to last")
        every = 1 if len(kept) <= 16 else 2 if len(kept) <= 32 else -(-len(kept) // 16)
        shown = list(range(0, len(kept), every))
        axes[0].set_yticks(shown, [str(i) for i in shown])
        axes[0].set_ylabel("layer")
        right = axes[0].secondary_yaxis("right")
        texts = [f"{widths[i]}" if widths[i] else "dropped" for i in shown]
        right.set_yticks(shown, texts)
        right.spines["right"].set_visible(False)
        if errors:
            _errors(axes[1], before, after, shown, narrow)

    label = f"Channels kept in each of {len(kept)} layers: " + ", ".join(
        f"layer {i} {w} of {f}" for i, (w, f) in enumerate(zip(widths, full, strict=False))
    )
    tall = max(2.8, 0.135 * len(kept) + 0.9)
    return both("cuts", label, draw, (10.4, tall), (4.9, tall * (2.1 if errors else 1.1)))


def _errors(axis: Any, before: Any, after: Any, shown: list[int], narrow: bool) -> None:
    layers = np.arange(len(before))
    axis.hlines(layers, after, before, color=GRID, linewidth=2.2)
    axis.plot(before, layers, "o", color=GENERAL, markersize=4.6, label="before repair")
    axis.plot(after, layers, "o", color=DOMAIN, markersize=4.6, label="after repair")
    axis.set_xscale("log")
    _plain_ticks(axis.xaxis)
    axis.set_ylim(len(before) - 0.5, -0.5)
    axis.set_yticks(shown, [str(i) for i in shown] if narrow else [])
    axis.set_title("Relative error of each layer's output", pad=26)
    axis.legend(
        frameon=False, loc="lower left", bbox_to_anchor=(-0.03, 1.0), ncols=2,
        handletextpad=0.2, columnspacing=1.2, borderpad=0.1,
    )  # fmt: skip


def _numbers(values: Any, count: int) -> Any:
    cleaned = [np.nan if v is None or v <= 0 else float(v) for v in values or []]
    return np.array(cleaned or [np.nan] * count)


def _ticks(axis: Any, values: Any, unit: str) -> None:
    """Put ticks where the points are, leaving out those that would touch."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    kept: list[float] = []
    span = np.log(max(values) / min(values)) or 1.0
    for value in sorted(set(values), reverse=True):
        if all(abs(np.log(value / other)) > 0.17 * span for other in kept):
            kept.append(value)
    axis.set_major_locator(FixedLocator(kept))
    texts = [f"{v:.0f}{unit}" if v >= 10 else f"{v:.2g}{unit}" for v in kept]
    axis.set_major_formatter(FixedFormatter(texts))
    axis.set_minor_locator(NullLocator())


def _plain_ticks(axis: Any) -> None:
    """Write ticks as plain numbers, also on a logarithmic axis, and few of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    if axis.get_scale() == "log":
        low, high = axis.get_view_interval()
        few = abs(np.log10(high / low)) < 1.5
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,), numticks=8))
