"""What stands out in a network's numbers, in plain words: a few sentences a section of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

Table = dict[str, Any]

BUDGETS = (0.1, 0.2, 0.3)  # shares of all parameters that people ask for
MASSIVE = 1000.0  # times the stream's typical value; Sun et al. 2024, "Massive Activations"
SINK = 0.5  # a head that puts so much on the first token is a sink
FOCUSED, UNIFORM = 0.1, 0.9  # of the entropy that a head could have
REDUNDANT = 0.9  # of a channel's energy that the others tell
AXES = {"mlp": "widths", "attention": "heads", "sublayers": "halves of blocks"}
#: How far the prediction is off, as measured on SmolLM2; see benchmarks/results.
BIAS = "On SmolLM2 the held-out loss rose 0.8 to 2 times as much as predicted."


def of(tables: dict[str, Table], facts: dict[str, Any]) -> dict[str, list[str]]:
    """Return the sentences of every section, the most telling ones first."""
    layers, channels, heads = (tables[name] for name in ("layers", "channels", "heads"))
    wide = {name: values[layers["width"] > 0] for name, values in layers.items()}
    return {
        "budget": _budget(tables["budget"], wide),
        "blocks": _blocks(layers),
        "importance": _importance(wide),
        "extremes": _extremes(wide, channels) + _massive(layers),
        "redundancy": _redundancy(wide),
        "heads": _heads(heads),
        "corpora": _corpora(wide, channels, facts),
    }


def at_share(table: Table, plan: str, removed: float) -> float | None:
    """Return the predicted loss rise of a plan at a share of the parameters, or None beyond it."""
    chosen = table["plan"] == plan
    x, y = table["removed"][chosen], table["nats"][chosen]
    order = np.argsort(x)
    if not len(x) or removed > x.max() + 1e-9:
        return None
    return float(np.interp(removed, x[order], y[order]))


def _budget(table: Table, layers: Table) -> list[str]:
    found = [(share, at_share(table, "all", share)) for share in BUDGETS]
    known = [(share, nats) for share, nats in found if nats is not None]
    lines = []
    if known:
        parts = [f"{_percent(share)} about {nats:.2g} nats a token" for share, nats in known]
        last = known[-1][1]
        lines.append(
            f"Of all parameters, over widths, heads and halves of blocks, {_and(parts)} "
            f"({_times(math.exp(last))} the perplexity at the last). {BIAS}"
        )
        share = known[min(1, len(known) - 1)][0]
        alone = [(words, at_share(table, axis, share)) for axis, words in AXES.items()]
        parts = [f"{words} {nats:.2g}" for words, nats in alone if nats is not None]
        if parts:
            lines.append(f"{_percent(share)} along one axis alone, in nats: {_and(parts)}.")
    order = np.argsort(layers["half_nats"])
    if len(order) > 1:
        cheap, dear = order[0], order[-1]
        lines.append(
            f"Half of the channels are dearest in layer {layers['layer'][dear]} "
            f"({layers['half_nats'][dear]:.2g} nats) and cheapest in layer "
            f"{layers['layer'][cheap]} ({layers['half_nats'][cheap]:.2g})."
        )
    return lines


def _blocks(layers: Table) -> list[str]:
    influence = layers["block_influence"]
    order = np.argsort(influence)
    count = min(3, len(order) - 1)
    lines = []
    if count > 0:
        least = _and(f"{i} ({influence[i]:.3f})" for i in order[:count])
        most = order[-1]
        lines.append(
            f"{'Layers' if count > 1 else 'Layer'} {least} turn the stream least: the first to "
            f"try without. Layer {most} ({influence[most]:.3f}) turns it most."
        )
    return lines


def _importance(layers: Table) -> list[str]:
    if not len(layers["width"]):
        return []
    share = layers["channels_of_most"] / layers["width"]
    low, high = int(share.argmin()), int(share.argmax())
    lines = [
        f"In the median layer, {_percent(np.median(share))} of the channels hold 90\u00a0% of the "
        "importance."
    ]
    if low != high:
        lines.append(
            f"Most concentrated: layer {layers['layer'][low]} "
            f"({layers['channels_of_most'][low]} of {layers['width'][low]:,} channels); most even: "
            f"layer {layers['layer'][high]} "
            f"({_percent(share[high])})."
        )
    return lines


def _extremes(layers: Table, channels: Table) -> list[str]:
    dead, outliers = int(channels["dead"].sum()), int(channels["outlier"].sum())
    total = len(channels["dead"])
    lines = []
    if dead:
        worst = int(layers["dead"].argmax())
        lines.append(
            f"{_count(dead, 'channel')} of {total:,} {_is(dead)} dead, {layers['dead'][worst]} of "
            f"them in layer {layers['layer'][worst]}: they can go for nothing."
        )
    else:
        lines.append(f"None of the {total:,} channels is dead.")
    if outliers:
        first = int(channels["peak_ratio"].argmax())
        lines.append(
            f"{_count(outliers, 'channel')} {_is(outliers)} outlying, in "
            f"{_count(int((layers['outliers'] > 0).sum()), 'layer')}; the largest is channel "
            f"{channels['channel'][first]} of layer {channels['layer'][first]}, at "
            f"{_times(channels['peak_ratio'][first])} the layer's typical activation."
        )
    else:
        lines.append("No channel is an outlier.")
    return lines


def _massive(layers: Table) -> list[str]:
    """Tell where a massive value enters the residual stream, and where it leaves."""
    peaks = np.concatenate([[0.0], layers["stream_peak"]])
    largest = layers["stream_peak_ratio"].max()
    if largest < MASSIVE:
        return [
            f"The residual stream holds no massive value: at most {_times(largest)} the typical."
        ]
    steps = np.diff(peaks)
    enters, leaves = int(steps.argmax()), int(steps.argmin())
    line = (
        f"A massive value of the residual stream enters in layer {enters}, at dimension "
        f"{layers['stream_peak_channel'][enters]}: {layers['stream_peak'][enters]:,.0f}, "
        f"{_times(layers['stream_peak_ratio'][enters])} the typical one"
    )
    if steps[leaves] < -0.3 * peaks.max():
        line += f"; layer {leaves} takes most of it away again"
    return [line + ". Quantize and cut such layers with care."]


def _redundancy(layers: Table) -> list[str]:
    if not len(layers["width"]):
        return []
    rank = layers["effective_rank_scaled"] / layers["width"]
    low, high = int(rank.argmin()), int(rank.argmax())
    lines = [
        f"The channels of a layer move in about {_percent(np.median(rank))} as many directions as "
        f"there are channels (median); least free is layer {layers['layer'][low]} "
        f"({layers['effective_rank_scaled'][low]:.0f} of {layers['width'][low]:,}), "
        f"freest layer {layers['layer'][high]} ({layers['effective_rank_scaled'][high]:.0f})."
    ]
    collapsed = np.flatnonzero(layers["effective_rank"] < 0.02 * layers["width"])
    if len(collapsed):
        lines.append(
            f"By energy, {_few('layer', layers['layer'][collapsed])} nearly one direction: a few "
            "outliers hold almost all of it."
        )
    twins = int(layers["twins"].sum())
    if twins:
        lines.append(f"{_count(twins, 'channel')} {_is(twins)} nearly a copy of another one.")
    least = float(layers["tokens"].min())
    if least < 2 * float(layers["width"].max()):
        lines.append(
            f"With {least:,.0f} tokens for {layers['width'].max():,.0f} channels, the rows limit "
            "the ranks: take more of them."
        )
    return lines


def _heads(heads: Table) -> list[str]:
    first, entropy = heads["first_token_share"], heads["entropy_share"]
    sinks, uniform = first > SINK, entropy > UNIFORM
    focused = (entropy < FOCUSED) & ~sinks
    total = len(first)
    lines = [
        f"{int(sinks.sum()):,} of {total:,} heads put more than half of their attention on the "
        f"first token; on average a head puts {_percent(first.mean())} there."
    ]
    if sinks.any():
        top = int(first.argmax())
        lines.append(f"The strongest sink is {_head(heads, top)}, with {_percent(first[top])}.")
    if uniform.any():
        widest = int(entropy.argmax())
        lines.append(
            f"{_count(int(uniform.sum()), 'head')} {_look(uniform)} about evenly at all tokens, "
            f"most of all {_head(heads, widest)}: an average that a cheaper layer could take."
        )
    if focused.any():
        lines.append(
            f"{_count(int(focused.sum()), 'head')} {_look(focused)} at one token or two, and not "
            "at the first."
        )
    before = int(heads["previous_share"].argmax())
    if heads["previous_share"][before] > SINK:
        lines.append(
            f"{_head(heads, before).capitalize()} looks at the token before, with "
            f"{_percent(heads['previous_share'][before])}."
        )
    return lines


def _corpora(layers: Table, channels: Table, facts: dict[str, Any]) -> list[str]:
    if not np.isfinite(channels["log2_ratio"]).any():
        return []
    times = f"{facts['config']['contrast']:g}"
    lines = []
    for name, other in (("domain", "general"), ("general", "domain")):
        own = channels[f"{name}_only"]
        line = (
            f"{_count(int(own.sum()), 'channel')} of {len(own):,} {_carry(own)} at least {times} "
            f"times more energy on {name} text than on {other} text"
        )
        if own.any():
            share = layers[f"{name}_only"] / layers["width"]
            worst = int(share.argmax())
            line += f", most of them by share in layer {layers['layer'][worst]} "
            line += f"({100 * share[worst]:.1f}\u00a0%)"
        lines.append(line + ".")
    ratio = np.where(channels["dead"], 0, channels["log2_ratio"])
    strongest = int(np.abs(ratio).argmax())
    towards = "domain" if ratio[strongest] > 0 else "general"
    lines.append(
        f"The starkest is channel {channels['channel'][strongest]} of layer "
        f"{channels['layer'][strongest]}: {_times(2.0 ** abs(ratio[strongest]))} the energy on "
        f"{towards} text."
    )
    return lines


def _head(heads: Table, index: int) -> str:
    return f"head {heads['head'][index]} of layer {heads['layer'][index]}"


def _few(word: str, indices: Any) -> str:
    """Name up to four things, or count them."""
    if len(indices) == 1:
        return f"{word} {indices[0]} is"
    if len(indices) <= 4:
        return f"{word}s {_and(map(str, indices))} are"
    return f"{len(indices)} {word}s are"


def _and(parts: Iterable[str]) -> str:
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _is(number: int) -> str:
    return "is" if number == 1 else "are"


def _look(which: Any) -> str:
    return "looks" if int(which.sum()) == 1 else "look"


def _carry(which: Any) -> str:
    return "carries" if int(which.sum()) == 1 else "carry"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\u00a0%"


def _times(value: float) -> str:
    return f"{value:,.0f} times" if value >= 10 else f"{value:.2g} times"
