"""What a size costs in decode time: a table timed on this machine, inside a whole decode step.

Every size of every kind is timed in a network that has it at all places: its step beside the step
of the dense network, in turn. Such prices foretell the steps of random mixtures of widths, heads,
halves and blocks left out and tokens (SmolLM2, int4) within 0.8 % on average, and within 1.7 % on a
core that other work shares. A product timed by itself pays for a call from Python and finds nothing
prefetched: sums of such prices foretold -20 % where -8 % were measured.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tailor_engine import __version__
from tailor_engine.errors import UserError
from tailor_engine.families import Family, drop_blocks, keep_tokens, leave_out
from tailor_engine.model import Model
from tailor_engine.ops import OPS
from tailor_engine.stages._decode import as_decoded, step_milliseconds
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune import attention
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.costs import Costs, dense_size
from tailor_engine.stages.prune.library import widths
from tailor_engine.stages.prune.places import KINDS, PROJECTIONS, Place, places

#: Sizes of a kind that are timed; between them it is a straight line. Heads are timed all.
POINTS = {"mlp": 12, "vocabulary": 6}
COPIES = 5  # of the networks that are timed at the end
USED = ("int4_linear", "int8_linear", "causal_attention", "gated_activation")


@dataclass(frozen=True)
class Table:
    """Milliseconds of one decode step, part by part."""

    sizes: Mapping[str, Mapping[str, float]]
    """kind ("mlp", "attention") -> size as text -> one place; "vocabulary": beyond the smallest."""
    block: float
    """A block beside its two halves."""
    step: float
    """The whole step of the dense network."""

    def of(self, kind: str, size: Any) -> float:
        """Return the time at a size: as timed, or between its two neighbours."""
        known = self.sizes[kind]
        if isinstance(size, Heads):
            return max(0.0, known[_name(size)])
        sizes = sorted(map(int, known))
        times = np.array([known[str(s)] for s in sizes]).clip(0)
        # More work takes no less time; what says otherwise is the noise of the two.
        rising = (np.maximum.accumulate(times) + np.minimum.accumulate(times[::-1])[::-1]) / 2
        return float(np.interp(size, sizes, rising))


def price_list(model: Model, config: Any, tokens: Sequence[int]) -> Costs:
    """Return prices in milliseconds of a decode step; `tokens`: sizes of the vocabulary."""
    family, network = model.family, model.network
    table = timed(model, config, tokens)
    rows = int(family.embedding_of(network).weight.shape[0])

    def price(place: Place, size: Any) -> float:
        return table.of(place.kind, size) if size else 0.0

    def vocabulary(count: int) -> float:
        return table.of("vocabulary", count)

    known = sum(price(p, dense_size(family, network, p)) for p in places(family, network))
    known += table.block * len(family.blocks_of(network))
    return Costs(price, vocabulary, table.step - known - vocabulary(rows), table.block)


def measured(dense: Model, pruned: Model, config: Any) -> tuple[float, float]:
    """Return the time of a decode step of both models in milliseconds, timed in turn.

    The median of several copies: where their weights lie in memory makes up to 1 %.
    """
    steps = []
    for _ in range(COPIES):
        copies = [as_decoded(m.family, m.network, config.bits) for m in (dense, pruned)]
        named = dict(zip(("dense", "pruned"), copies, strict=True))
        found = step_milliseconds(named, config.latency_rows, config.latency_context)
        steps.append((found["dense"], found["pruned"]))
    whole, smaller = np.median(steps, axis=0).tolist()
    return whole, smaller


def timed(model: Model, config: Any, tokens: Sequence[int]) -> Table:
    """Return the table of a model, as an earlier run kept it or timed now.

    Raises:
        UserError: the model is not on the CPU.
    """
    if model.device.type != "cpu":
        raise UserError(
            f"prune: latency is timed on the CPU alone so far, the model is on {model.device}; "
            "set target, parameters or bytes"
        )
    wanted = _sizes(model, config, tokens)
    key = {
        "version": __version__,
        "torch": torch.__version__,
        "backends": {name: OPS[name].choose() for name in USED},
        "threads": torch.get_num_threads(),
        "bits": config.bits,
        "rows": config.latency_rows,
        "context": config.latency_context,
        "network": _shape(model),
        "sizes": {kind: [_name(size) for size in sizes] for kind, sizes in wanted.items()},
    }
    found = context().recall("latency", key)
    if found is None:
        table = _measure(model, config, wanted)
        context().remember("latency", key, dict(vars(table)))
        return table
    return Table(**found)


def _shape(model: Model) -> dict[str, Any]:
    """Return what the speed of a network depends on."""
    family, network = model.family, model.network
    everywhere = places(family, network)
    return {
        "type": network.config.model_type,
        "hidden": int(family.embedding_of(network).weight.shape[1]),
        "dtype": str(network.dtype),
        "sizes": [f"{p.kind} {_name(dense_size(family, network, p))}" for p in everywhere],
    }


def _name(size: Any) -> str:
    return f"{size.groups}x{size.queries}" if isinstance(size, Heads) else str(size)


def _sizes(model: Model, config: Any, tokens: Sequence[int]) -> dict[str, list[Any]]:
    """Return the sizes to time of each kind."""
    family, network = model.family, model.network
    found: dict[str, dict[Any, None]] = {kind: {} for kind in KINDS}
    for place in places(family, network):
        dense = dense_size(family, network, place)
        if place.kind == "mlp":
            found["mlp"] |= dict.fromkeys(widths(dense, config.rounding, config.floor))
        else:
            block = family.blocks_of(network)[place.block]
            head_dim = int(family.part(block, "attention").head_dim)
            found["attention"] |= dict.fromkeys(attention.sizes(dense, head_dim, config.rounding))
    rows = int(family.embedding_of(network).weight.shape[0])
    return {
        "mlp": _spread(found["mlp"], POINTS["mlp"]),
        "attention": list(found["attention"]),
        "vocabulary": _spread({rows, *tokens}, POINTS["vocabulary"]),
    }


def _spread(sizes: Iterable[int], points: int) -> list[int]:
    """Return at most so many of the sizes, the smallest and the largest among them."""
    ordered = sorted(sizes)
    places = np.linspace(0, len(ordered) - 1, min(points, len(ordered))).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(places.tolist())]


def _measure(model: Model, config: Any, wanted: Mapping[str, Sequence[Any]]) -> Table:
    """Time a variant of the network for every size: all places of its kind have it, or none."""
    family, network = model.family, model.network
    everywhere = places(family, network)
    depth = len(family.blocks_of(network))
    changes: dict[tuple[str, Any], Callable[[Any], None]] = {
        (kind, size): partial(_resize, family, kind, size)
        for kind in KINDS
        for size in (0, *wanted[kind])
    }
    changes |= {("vocabulary", n): partial(_shorten, family, n) for n in wanted["vocabulary"]}
    changes["blocks", 0] = lambda variant: drop_blocks(variant, range(0, depth, 2))
    with torch.random.fork_rng(devices=[]):  # a cached table leaves the generators alike
        shares, step = _shares(model, config, changes)

    def of_one(kind: str, least: Any, count: int) -> dict[str, float]:
        """Return the time of each size over that of the least, for one of so many places."""
        found = np.array([shares[kind, size] - shares[kind, least] for size in wanted[kind]])
        times = step / max(1, count) * _smooth(wanted[kind], found)
        return dict(zip(map(_name, wanted[kind]), times.tolist(), strict=True))

    kinds = [place.kind for place in everywhere]
    sizes = {kind: of_one(kind, 0, kinds.count(kind)) for kind in KINDS}
    sizes["vocabulary"] = of_one("vocabulary", min(wanted["vocabulary"]), 1)
    table = Table(sizes, 0.0, step)
    gone = [place for place in everywhere if place.block % 2]
    halves = sum(table.of(place.kind, dense_size(family, network, place)) for place in gone)
    beside = max(0.0, step * (1 - shares["blocks", 0]) - halves)
    return Table(sizes, beside / max(1, depth // 2), step)


def _shares(
    model: Model, config: Any, changes: Mapping[Any, Callable[[Any], None]]
) -> tuple[dict[Any, float], float]:
    """Return every changed network's step over the dense one's, and the dense one's milliseconds.

    The two take turns: what else the machine does slows both down.
    """
    family, network = model.family, model.network
    dense = as_decoded(family, network, config.bits)
    shapes = [parameter.shape for parameter in network.parameters()]
    shares, steps = {}, []
    for done, (what, change) in enumerate(changes.items()):
        variant = copy.deepcopy(network, {id(p): p for p in network.parameters()})
        change(variant)
        shares[what] = 1.0
        if shapes != [parameter.shape for parameter in variant.parameters()]:
            running = {"dense": dense, "variant": as_decoded(family, variant, config.bits)}
            found = step_milliseconds(running, config.latency_rows, config.latency_context)
            shares[what] = found["variant"] / found["dense"]
            steps.append(found["dense"])
        context().progress(done + 1, len(changes), "decode steps of variants")
    return shares, statistics.median(steps)


def _smooth(sizes: Sequence[Any], times: np.ndarray) -> np.ndarray:
    """Return times that lie on a parabola over widths or tokens; those of heads as they are.

    Measured times lie on it but for noise, and the search would take the sizes that noise favours.
    """
    if not sizes or isinstance(sizes[0], Heads):
        return times
    powers = np.vander(np.divide(sizes, max(sizes)), 3)
    return powers @ np.linalg.lstsq(powers, times)[0]


def _resize(family: Family, kind: str, size: Any, network: Any) -> None:
    """Give all places of a kind one size."""
    for block in family.blocks_of(network):
        if family.has(block, kind):
            set_size(family, block, kind, size)


def set_size(family: Family, block: Any, kind: str, size: Any) -> None:
    """Give half a block another size, with random weights; 0 leaves it out.

    What they write to the stream is small: else codes that round the other way could grow until the
    native step's trial fails, 1 network of 8, and the ordinary step is timed.
    """
    if not size:
        return leave_out(family, block, kind)
    if kind == "mlp":
        rows, inner = dict.fromkeys(("gate", "up"), size), size
    else:
        module = family.part(block, "attention")
        module.num_key_value_groups = size.queries
        shared, inner = (n * module.head_dim for n in (size.groups, size.groups * size.queries))
        rows = {"query": inner, "key": shared, "value": shared}
    shapes = {part: (n, family.part(block, part).in_features) for part, n in rows.items()}
    output = PROJECTIONS[kind]
    shapes[output] = family.part(block, output).out_features, inner
    for part, shape in shapes.items():
        old = family.part(block, part)
        if (old.out_features, old.in_features) != shape:
            has_bias, dtype = old.bias is not None, old.weight.dtype
            new = nn.Linear(shape[1], shape[0], has_bias, dtype=dtype)
            block.set_submodule(getattr(family, part), new.requires_grad_(False))
            if part == output:
                new.weight *= 0.01


def _shorten(family: Family, tokens: int, network: Any) -> None:
    """Keep the first tokens."""
    head = None if family.tied(network) else family.head_of(network).weight.detach()[:tokens]
    embedding = family.embedding_of(network).weight.detach()[:tokens]
    keep_tokens(network, range(tokens), embedding, head)
