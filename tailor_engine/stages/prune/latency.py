"""What a size costs in decode time: a table timed on this machine, through our own products.

The products of every size that a place may have are timed one by one, cold: between two reads of a
matrix pass as many bytes as a step of the whole network reads. What a half of a block takes beside
its products (norm, rotation, cache, Python, less the calls that a step spares) is a constant of its
kind: the step of the network itself, less that of a copy without any such half, less the products.
A block costs something beside its halves, too. So the table's sum for the dense network is its
measured step.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from tailor_engine import __version__
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.modules import FusedLinears, QuantizedLinear
from tailor_engine.ops import OPS, causal_attention, gated_activation
from tailor_engine.stages._decode import as_decoded, pack, step_milliseconds
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune import attention
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.costs import Costs, dense_size
from tailor_engine.stages.prune.library import widths
from tailor_engine.stages.prune.places import KINDS, Place, places

POINTS = 12  # sizes of a kind that are timed; between them it is a straight line
ROUNDS = 41  # of each entry, whose median counts
AGREE = 1.1  # times slower at most: two tables of one moment
COLD_BYTES = 2**28  # read between two reads of one entry at most: no cache holds more
USED = ("int4_linear", "int8_linear", "causal_attention", "gated_activation")

Call = Callable[[], Any]


@dataclass(frozen=True)
class Table:
    """Milliseconds of one decode step, part by part."""

    products: Mapping[str, Mapping[str, float]]
    """kind ("mlp", "attention", "head") -> size as text -> products of that size."""
    rest: Mapping[str, float]
    """kind -> what a half of a block takes beside its products; "block": what a block does."""
    step: float
    """The whole step of the dense network, as measured."""

    def of(self, kind: str, size: Any) -> float:
        """Return the products' time at a size: as timed, or between its two neighbours."""
        known = self.products[kind]
        if isinstance(size, Heads):
            return known[_name(size)]
        sizes = sorted(map(int, known))
        times = np.array([known[str(s)] for s in sizes])
        # More work takes no less time; what says otherwise is the noise of the two.
        rising = (np.maximum.accumulate(times) + np.minimum.accumulate(times[::-1])[::-1]) / 2
        return float(np.interp(size, sizes, rising))


def price_list(model: Model, config: Any, tokens: Sequence[int]) -> Costs:
    """Return prices in milliseconds of a decode step; `tokens`: sizes of the vocabulary."""
    family, network = model.family, model.network
    table = timed(model, config, tokens)
    rows = int(family.embedding_of(network).weight.shape[0])

    def price(place: Place, size: Any) -> float:
        return max(0.0, table.of(place.kind, size) + table.rest[place.kind]) if size else 0.0

    def vocabulary(count: int) -> float:
        return table.of("head", count)

    known = sum(price(p, dense_size(family, network, p)) for p in places(family, network))
    block = table.rest["block"]
    known += block * len(family.blocks_of(network))
    return Costs(price, vocabulary, table.step - known - vocabulary(rows), block)


def measured(dense: Model, pruned: Model, config: Any) -> tuple[float, float]:
    """Return the time of a decode step of both models in milliseconds, timed in turn."""
    networks = {
        name: as_decoded(model.family, model.network, config.bits)
        for name, model in (("dense", dense), ("pruned", pruned))
    }
    found = step_milliseconds(networks, config.latency_rows, config.latency_context)
    return found["dense"], found["pruned"]


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
        table = _quietest(model, config, wanted)
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
        "mlp": _spread(found["mlp"]),
        "attention": list(found["attention"]),
        "head": _spread({rows, *tokens}),
    }


def _spread(sizes: Iterable[int]) -> list[int]:
    """Return at most POINTS of the sizes, the smallest and the largest among them."""
    ordered = sorted(sizes)
    places = np.linspace(0, len(ordered) - 1, min(POINTS, len(ordered))).round().astype(int)
    return [ordered[i] for i in dict.fromkeys(places.tolist())]


@dataclass(frozen=True)
class _Entry:
    """One size of one kind: how to make its products, and how many bytes they read."""

    kind: str
    size: Any
    make: Callable[[], Call]
    bytes: float


def _quietest(model: Model, config: Any, wanted: Mapping[str, Sequence[Any]]) -> Table:
    """Time twice, once more where the two disagree; other work on the machine only slows down.

    A table of a busy moment (2.4 times too slow, once) would otherwise be kept for ever.
    """
    tables = [_measure(model, config, wanted) for _ in range(2)]
    first, second = sorted(table.step for table in tables)
    if second > AGREE * first:
        tables.append(_measure(model, config, wanted))
    return min(tables, key=lambda table: table.step)


def _measure(model: Model, config: Any, wanted: Mapping[str, Sequence[Any]]) -> Table:
    family, network = model.family, model.network
    with torch.random.fork_rng(devices=[]):  # a cached table leaves the generators alike
        entries = _Products(model, config).entries(wanted)
        products = _time(entries, model.parameters * config.bits / 8)
    table = Table(products, {}, 0.0)
    variants = {"": as_decoded(family, network, config.bits)}
    for what in (*KINDS, "blocks"):
        variants[what] = as_decoded(family, network, config.bits, what)
    steps = step_milliseconds(variants, config.latency_rows, config.latency_context)
    saved = {what: steps[""] - step for what, step in steps.items()}
    everywhere = places(family, network)
    half: dict[str, float] = {}
    rest: dict[str, float] = {}
    for kind in KINDS:
        sizes = [dense_size(family, network, place) for place in everywhere if place.kind == kind]
        half[kind] = saved[kind] / max(1, len(sizes))
        own = sum(table.of(kind, size) for size in sizes) / max(1, len(sizes))
        # Below 0 where a step spares what each product alone pays: its own call from Python.
        rest[kind] = half[kind] - own
    gone = {index for index, _ in enumerate(family.blocks_of(network)) if index % 2}
    halves = sum(half[place.kind] for place in everywhere if place.block in gone)
    rest["block"] = max(0.0, saved["blocks"] - halves) / max(1, len(gone))
    return Table(products, rest, steps[""])


class _Products:
    """Makes the products of any size, on weights of their own."""

    def __init__(self, model: Model, config: Any) -> None:
        self.bits, self.rows, self.context = (
            config.bits,
            config.latency_rows,
            config.latency_context,
        )
        family, network = model.family, model.network
        self.hidden = int(family.embedding_of(network).weight.shape[1])
        heads = [b for b in family.blocks_of(network) if family.has(b, "attention")]
        self.head_dim = int(family.part(heads[0], "attention").head_dim) if heads else 0
        self.dtype = torch.bfloat16 if self.bits == 16 else torch.float32

    def entries(self, wanted: Mapping[str, Sequence[Any]]) -> list[_Entry]:
        """Return the entries of all sizes."""
        hidden, each = self.hidden, self.bits / 8
        found = []
        for width in wanted["mlp"]:
            read = 3 * hidden * width * each
            found.append(_Entry("mlp", width, partial(self._feed_forward, width), read))
        for size in wanted["attention"]:
            read = 2 * hidden * (size.queries + 1) * size.groups * self.head_dim * each
            found.append(_Entry("attention", size, partial(self._attention, size), read))
        for tokens in wanted["head"]:
            read = hidden * tokens * max(each, 1)
            found.append(_Entry("head", tokens, partial(self._head, tokens), read))
        return found

    def _input(self, width: int) -> torch.Tensor:
        return torch.randn(self.rows, 1, width, dtype=self.dtype)

    def _together(self, sizes: Sequence[int], width: int, bits: int) -> Callable[..., Any]:
        """Return the product of one input by several weights [N, K], fused where a network does."""
        weights = [torch.randn(size, width) for size in sizes]
        if bits > 8:
            dense = [weight.to(self.dtype) for weight in weights]
            return lambda x: [nn.functional.linear(x, weight) for weight in dense]
        linears = [QuantizedLinear(pack(weight, bits)) for weight in weights]
        fused = FusedLinears.of(linears) if len(linears) > 1 else None
        return (lambda x: [linear(x) for linear in linears]) if fused is None else fused.all

    def _feed_forward(self, width: int) -> Call:
        both = self._together([width, width], self.hidden, self.bits)
        down = self._together([self.hidden], width, self.bits)
        x = self._input(self.hidden)
        return lambda: down(gated_activation(*both(x), "silu"))

    def _attention(self, size: Heads) -> Call:
        inner, shared = size.groups * size.queries * self.head_dim, size.groups * self.head_dim
        projections = self._together([inner, shared, shared], self.hidden, self.bits)
        output = self._together([self.hidden], inner, self.bits)
        x, mixed = self._input(self.hidden), self._input(inner)
        query, keys, values = (
            torch.randn(self.rows, heads, length, self.head_dim, dtype=self.dtype)
            for heads, length in (
                (size.groups * size.queries, 1),
                (size.groups, self.context),
                (size.groups, self.context),
            )
        )

        def run() -> None:
            projections(x)
            causal_attention(query, keys, values, 1.0)
            output(mixed)

        return run

    def _head(self, tokens: int) -> Call:
        head = self._together([tokens], self.hidden, max(self.bits, 8))
        x = self._input(self.hidden)
        return lambda: head(x)


@torch.inference_mode()
def _time(entries: Sequence[_Entry], network_bytes: float) -> dict[str, dict[str, float]]:
    """Return the median milliseconds of every entry; all of them take turns."""
    apart = min(network_bytes, COLD_BYTES)
    copies = max(1, round(apart / max(1.0, sum(entry.bytes for entry in entries))))
    ring = [(entry, entry.make()) for _ in range(copies) for entry in entries]
    chance = random.Random(0)
    times: dict[tuple[str, str], list[float]] = {}
    for _ in range(1 + -(-ROUNDS // copies)):
        chance.shuffle(ring)  # what stood before leaves more or less in the caches
        for entry, call in ring:
            start = time.perf_counter()
            call()
            passed = 1000 * (time.perf_counter() - start)
            times.setdefault((entry.kind, _name(entry.size)), []).append(passed)
    found: dict[str, dict[str, float]] = {}
    for (kind, size), samples in times.items():
        found.setdefault(kind, {})[size] = statistics.median(samples[copies:])
    return found
