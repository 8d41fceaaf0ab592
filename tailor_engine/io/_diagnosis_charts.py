"""The pictures of a diagnosis, in the report's style: any number of layers, any width (binned)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from tailor_engine.io import _charts, units
from tailor_engine.io._charts import DOMAIN, GENERAL, GRID, INK, MUTED, PAPER

BINS = 64  # cells of a row of a heat map, however wide the layer is
# Two hues that people tell apart with any colour vision, in tones that a light and a dark page
# both carry; opacity is the value.
TEAL, ORANGE = (0x1A, 0x93, 0x9B), (0xD0, 0x6A, 0x1A)
Table = dict[str, Any]
SHOWN = 0.5  # of the parameters removed: where the curve of budgets ends


def budget(table: Table, layers: Table) -> str:
    """Draw the loss that each budget predicts, and the widths that it would choose."""
    removed, nats, chosen = _plan(table, "all")
    widths = np.array([table["widths"][i] for i in chosen]).T
    heads = np.array([table["groups"][i] for i in chosen]).T
    heads = heads * np.array([table["queries"][i] for i in chosen]).T
    kept = [_shares(widths), _shares(heads)]
    top = 2.2 * max(nats[removed <= SHOWN].max(), 1e-6)

    def draw(figure: Any, narrow: bool) -> None:
        left, *maps = _panels(figure, narrow, [1.1, 1, 1])
        left.fill_between(100 * removed, nats, 2 * nats, color=DOMAIN, alpha=0.15, linewidth=0,
                          label="up to twice as much")  # fmt: skip
        for name, words, style in (
            ("all", "all axes", "-"),
            ("mlp", "widths alone", "--"),
            ("attention", "heads alone", ":"),
            ("sublayers", "halves of blocks alone", "-."),
        ):
            x, y, _ = _plan(table, name)
            colour = DOMAIN if name == "all" else GENERAL
            left.plot(100 * x, y, style, color=colour, linewidth=1.6, label=words)
        left.set_ylim(0, top)
        left.set_xlim(0, 100 * min(SHOWN, removed.max()))
        left.set_xlabel("share of all parameters removed, %")
        left.set_ylabel("predicted loss rise, nats a token")
        left.legend(frameon=False, loc="upper left", handlelength=1.2)
        _title(left, "What a budget costs")
        round_shares = np.arange(0, 100 * removed.max() + 1e-6, 10)
        places = np.interp(round_shares, 100 * removed, np.arange(len(removed)))
        for axis, cells, title in zip(maps, kept, ("Channels", "Heads"), strict=True):
            _heat(axis, cells, TEAL)
            axis.set_xticks(places, [f"{share:.0f}" for share in round_shares])
            axis.set_xlabel("share of all parameters removed, %")
            _layers_down(axis, len(cells))
            _title(axis, title)
            _key(axis, ["0", "50", "100 %"], TEAL)

    label = "Predicted loss rise over the share of parameters removed: " + ", ".join(
        f"{100 * x:.0f} % {y:.2g} nats" for x, y in zip(removed[::5], nats[::5], strict=True)
    )
    tall = _tall(len(widths))
    return _charts.both("budget", label, draw, (10.4, max(3.6, tall)), (4.9, 3.4 + 2 * tall))


def _shares(sizes: np.ndarray) -> np.ndarray:
    """Return what stays of each layer's first size; nothing of a layer that had nothing."""
    shares: np.ndarray = sizes / np.maximum(sizes[:, :1], 1)
    return shares


def _plan(table: Table, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    chosen = np.flatnonzero(table["plan"] == name)
    chosen = chosen[np.argsort(table["removed"][chosen], kind="stable")]
    return table["removed"][chosen], table["nats"][chosen], chosen


def blocks(layers: Table) -> str:
    """Draw each block's influence, and what half of its channels would cost."""
    series = (
        ("block_influence", "Block influence", "1 − cosine of in and out", DOMAIN),
        ("half_nats", "Cost of half of the channels", "nats a token", GENERAL),
    )

    def draw(figure: Any, narrow: bool) -> None:
        for axis, (key, title, unit, colour) in zip(
            _panels(figure, narrow, [1, 1]), series, strict=True
        ):
            there = np.isfinite(layers[key])
            values, places = np.maximum(layers[key][there], 1e-6), layers["layer"][there]
            axis.set_yscale("log")
            axis.vlines(places, values.min() / 1.3, values, color=GRID, linewidth=1.6)
            _dots(axis, places, values, colour)
            axis.set_ylim(values.min() / 1.3, values.max() * 1.5)
            _charts._plain_ticks(axis.yaxis)
            _layers_across(axis, len(there))
            axis.set_ylabel(unit)
            _title(axis, title)

    label = "Block influence by layer: " + _listed(layers["block_influence"])
    return _charts.both("blocks", label, draw, (10.4, 3.1), (4.9, 5.8))


def importance(channels: Table, layers: Table, agreement: Table) -> str:
    """Draw how concentrated importance is, and how far the criteria agree."""
    depth = len(layers["layer"])
    ordered = [np.sort(part)[::-1] for part in _by_layer(channels, "importance_fisher_obs", depth)]
    micronats = 0.5e6 * np.array([_binned(np.maximum(part, 0)) for part in ordered])
    some = micronats[micronats > 0] if (micronats > 0).any() else np.ones(1)
    low, high = np.quantile(some, (0.01, 0.99))
    high = max(high, 10 * low)
    cells = np.log(np.maximum(micronats, low / 10) / low) / np.log(high / low)
    names = list(agreement["criterion"])
    matrix = np.array([agreement[name] for name in names])

    def draw(figure: Any, narrow: bool) -> None:
        left, right = _panels(figure, narrow, [1.25, 1])
        _heat(left, cells, TEAL)
        left.set_xticks([0, 15.5, 31.5, 47.5, 63], ["0", "25", "50", "75", "100"])
        left.set_xlabel("channels, most important first, %")
        _layers_down(left, depth)
        _title(left, "Importance")
        marks = [units.number(mark, 2) for mark in (low, np.sqrt(low * high), high)]
        _key(left, [*marks[:2], f"{marks[2]} µnats"], TEAL)
        _two_tone(right, matrix)
        plain = [name.replace("_", " ") for name in names]
        right.set_xticks(range(len(names)), plain, rotation=90)
        right.set_yticks(range(len(names)), plain)
        for row, column in np.ndindex(matrix.shape):
            text = str(round(100 * float(matrix[row, column]))).replace("-", "−")
            right.text(column, row, text, ha="center", va="center", color=INK, fontsize="x-small")
        _title(right, "Agreement of criteria, %")

    label = (
        f"Importance of channels in {depth} layers, and rank correlation of {len(names)} criteria"
    )
    tall = max(4.4, _tall(depth))
    return _charts.both("importance", label, draw, (10.4, tall), (4.9, tall + 4.6))


def extremes(channels: Table, layers: Table, limit: float) -> str:
    """Draw the largest activations of each layer's channels, and those of the stream behind it."""
    depth = len(layers["layer"])
    parts = _by_layer(channels, "peak_ratio", depth)
    low, middle, high, top = (
        np.maximum([np.quantile(part, q) if len(part) else np.nan for part in parts], 1e-3)
        for q in (0.01, 0.5, 0.99, 1.0)
    )
    x = layers["layer"]

    def draw(figure: Any, narrow: bool) -> None:
        left, right = _panels(figure, narrow, [1, 1])
        left.fill_between(x, low, high, color=DOMAIN, alpha=0.2, linewidth=0, label="98 %")
        left.plot(x, middle, color=DOMAIN, linewidth=1.6, label="median")
        _dots(left, x, top, GENERAL, "largest")
        left.axhline(limit, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        left.set_ylabel("peak, times the typical activation")
        _title(left, "Channels of the feed-forward layer")
        right.plot(x, layers["stream_typical"], color=DOMAIN, linewidth=1.6, label="typical")
        _dots(right, x, layers["stream_peak"], GENERAL, "largest")
        right.set_ylabel("absolute value")
        _title(right, "Residual stream behind each layer")
        for axis in (left, right):
            axis.set_yscale("log")
            bottom, above = axis.get_ylim()
            axis.set_ylim(bottom, above * (above / bottom) ** 0.3)  # room for the legend
            _powers(axis.yaxis)
            _layers_across(axis, depth)
            axis.legend(frameon=False, loc="upper left", ncols=3, handlelength=1.1,
                        columnspacing=1.0, handletextpad=0.4)  # fmt: skip

    label = "Largest activation of a channel, times the layer's typical one: " + _listed(top)
    return _charts.both("extremes", label, draw, (10.4, 3.5), (4.9, 6.6))


def redundancy(layers: Table) -> str:
    """Draw how many directions the channels of each layer really use."""
    width = np.maximum(layers["width"], 1)
    series = (
        ("explained by the other channels", layers["explained"], MUTED),
        ("effective rank, every channel alike", layers["effective_rank_scaled"] / width, DOMAIN),
        ("effective rank, by energy", layers["effective_rank"] / width, GENERAL),
    )

    def draw(figure: Any, narrow: bool) -> None:
        axis = figure.subplots()
        for words, values, colour in series:
            axis.plot(layers["layer"], 100 * values, color=colour, linewidth=1.2, alpha=0.6)
            _dots(axis, layers["layer"], 100 * values, colour, words)
        axis.set_ylim(0, 103)
        axis.set_ylabel("% of the layer's channels")
        _layers_across(axis, len(width))
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(-0.02, 1.0), handletextpad=0.2,
                    ncols=1 if narrow else 3, columnspacing=1.4)  # fmt: skip

    label = "Effective rank by layer: " + _listed(layers["effective_rank_scaled"])
    return _charts.both("redundancy", label, draw, (10.4, 3.2), (4.9, 3.6))


def heads(table: Table, depth: int) -> str:
    """Draw each head's entropy, and its share of attention on the first token."""
    count = int(table["head"].max()) + 1
    panels = (("entropy_share", "Entropy of attention"), ("first_token_share", "First token"))

    def draw(figure: Any, narrow: bool) -> None:
        for axis, (key, title) in zip(_panels(figure, narrow, [1, 1]), panels, strict=True):
            cells = np.full((depth, count), np.nan)
            cells[table["layer"], table["head"]] = table[key]
            _heat(axis, cells, TEAL)
            every = -(-count // 16)
            axis.set_xticks(range(0, count, every), [str(i) for i in range(0, count, every)])
            axis.set_xlabel("head")
            _layers_down(axis, depth)
            _title(axis, title)
            _key(axis, ["0", "50", "100 %"], TEAL)

    label = f"Entropy and first-token share of {len(table['head'])} attention heads"
    tall = _tall(depth)
    return _charts.both("heads", label, draw, (10.4, tall), (4.9, 2 * tall))


def corpora(channels: Table, layers: Table, contrast: float) -> str:
    """Draw which corpus each layer's channels work for."""
    depth = len(layers["layer"])
    ratios = [np.sort(part)[::-1] for part in _by_layer(channels, "log2_ratio", depth)]
    cells = np.clip(np.array([_binned(part) for part in ratios]) / 3, -1, 1)  # 1/8 to 8 times

    def draw(figure: Any, narrow: bool) -> None:
        left, right = _panels(figure, narrow, [1.25, 1])
        _two_tone(left, cells)
        left.set_xticks([0, 15.5, 31.5, 47.5, 63], ["0", "25", "50", "75", "100"])
        left.set_xlabel("channels, most domain first, %")
        _layers_down(left, depth)
        _title(left, "Domain over general")
        _key(left, ["1/8", "1", "8 ×"], TEAL, ORANGE)
        rows = layers["layer"]
        for key, colour, sign in (("general_only", GENERAL, -1), ("domain_only", DOMAIN, 1)):
            share = 100 * layers[key] / np.maximum(layers["width"], 1)
            right.barh(rows, sign * share, color=colour, height=0.72)
        right.axvline(0, color=MUTED, linewidth=0.8)
        right.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
        right.set_xlabel(
            f"general\u2009←  % of the channels, {contrast:g} × and more  →\u2009domain"
        )
        _layers_down(right, depth)
        right.set_ylim(depth - 0.5, -0.5)
        _title(right, "One corpus' own channels")

    label = "Channels with much more energy on domain text by layer: " + _listed(
        layers["domain_only"]
    )
    tall = _tall(depth) + 0.3
    return _charts.both("corpora", label, draw, (10.4, tall), (4.9, 2 * tall))


def _panels(figure: Any, narrow: bool, ratios: Sequence[float]) -> Any:
    """Return two axes, side by side on a wide page and one above the other on a phone."""
    if narrow:
        return figure.subplots(len(ratios), 1)
    return figure.subplots(1, len(ratios), width_ratios=ratios)


def _tall(depth: int) -> float:
    """Return the height in inches of a map with one row a layer."""
    return max(3.0, 0.135 * min(depth, 40) + 0.075 * max(0, depth - 40) + 1.0)


def _by_layer(channels: Table, name: str, depth: int) -> list[np.ndarray]:
    bounds = np.searchsorted(channels["layer"], np.arange(depth + 1))
    return [channels[name][a:b] for a, b in itertools.pairwise(bounds)]


def _binned(values: np.ndarray) -> np.ndarray:
    """Return 64 means of neighbours; narrower rows are drawn out, no values stay none."""
    if not len(values):
        return np.full(BINS, np.nan)
    if len(values) < BINS:
        values = np.repeat(values, -(-BINS // len(values)))
    return np.array([part.mean() for part in np.array_split(values, BINS)])


def _heat(axis: Any, cells: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw values of 0 to 1 as the opacity of one colour; nothing where there is no value."""
    picture = np.zeros((*cells.shape, 4), dtype=np.uint8)
    picture[..., :3] = colour
    picture[..., 3] = np.round(255 * np.clip(np.nan_to_num(cells), 0, 1))
    axis.imshow(picture, aspect="auto", interpolation="none")
    axis.grid(False)


def _two_tone(axis: Any, cells: np.ndarray) -> None:
    """Draw values of -1 to 1: teal above 0, orange below."""
    picture = np.zeros((*cells.shape, 4), dtype=np.uint8)
    picture[..., :3] = np.where((cells >= 0)[..., None], TEAL, ORANGE)
    picture[..., 3] = np.round(255 * np.clip(np.abs(np.nan_to_num(cells)), 0, 1))
    axis.imshow(picture, aspect="auto", interpolation="none")
    axis.grid(False)


def _title(axis: Any, text: str) -> None:
    """Write a title at the same height over every panel, whatever stands beside it."""
    axis.set_title(text, y=1.0, pad=9)


def _key(axis: Any, texts: list[str], colour: tuple, below: tuple | None = None) -> None:
    """Draw a strip that says what the colours stand for, above the right end of a map."""
    rows = axis.get_subplotspec().get_gridspec().nrows
    inch = 1 / (axis.figure.get_figheight() / rows - 0.9)  # of the panel's height, nearly
    strip = axis.inset_axes((0.55, 1 + 0.06 * inch, 0.45, 0.07 * inch))
    if below is None:
        _heat(strip, np.linspace(0, 1, 64)[None], colour)
    else:
        _two_tone(strip, np.linspace(-1, 1, 64)[None])
    strip.set_yticks([])
    strip.set_xticks([-0.5, 31.5, 63.5], texts, fontsize="small")
    strip.xaxis.tick_top()
    for label, side in zip(strip.get_xticklabels(), ("left", "center", "right"), strict=True):
        label.set_horizontalalignment(side)
    strip.tick_params(pad=1)
    for spine in strip.spines.values():
        spine.set_visible(False)


def _powers(axis: Any) -> None:
    """Write powers of ten as whole numbers."""
    _charts._plain_ticks(axis)
    axis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")


def _dots(axis: Any, x: Any, y: Any, colour: str, label: str | None = None) -> None:
    size = 5.0 if len(x) <= 40 else 3.4
    axis.plot(x, y, "o", color=colour, markersize=size, markeredgecolor=PAPER,
              markeredgewidth=0.6, label=label, zorder=3)  # fmt: skip


def _every(depth: int) -> list[int]:
    step = 1 if depth <= 16 else 2 if depth <= 32 else -(-depth // 16)
    return list(range(0, depth, step))


def _layers_down(axis: Any, depth: int) -> None:
    axis.set_yticks(_every(depth), [str(i) for i in _every(depth)])
    axis.set_ylabel("layer")


def _layers_across(axis: Any, depth: int) -> None:
    step = max(1, -(-depth // 10))
    axis.set_xticks(range(0, depth, step), [str(i) for i in range(0, depth, step)])
    axis.set_xlim(-0.6, depth - 0.4)
    axis.set_xlabel("layer")


def _listed(values: Any) -> str:
    return ", ".join(f"{i} {value:.3g}" for i, value in enumerate(values))
