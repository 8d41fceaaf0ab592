"""What a size costs of a budget: parameters, or bytes once its weights are quantized.

The third budget, milliseconds, is in latency.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tailor_engine.families import Family
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.places import Place, places

#: Bytes of a weight of a matrix, by bits; int4 with a float16 scale for each group of 64.
BYTES = {32: 4.0, 16: 2.0, 8: 1.0, 4: 0.5 + 2 / 64}
NORM_BYTES = 4.0


@dataclass(frozen=True)
class Costs:
    """Prices of the places of one network; all in one unit."""

    place: Callable[[Place, Any], float]
    """Cost of a place at a size: channels, or heads; 0 where it is left out."""
    tokens: Callable[[int], float]
    """Cost of so many tokens' rows in embedding and head."""
    fixed: float
    """Cost of what cannot be cut."""
    block: float = 0.0
    """Cost of a block beside its two halves; it goes where both do."""


def dense_size(family: Family, network: Any, place: Place) -> Any:
    """Return the size that a place has."""
    block = family.blocks_of(network)[place.block]
    if place.kind == "mlp":
        return int(family.part(block, "gate").out_features)
    queries, keys = family.heads(block)
    return Heads(keys, queries // keys)


def storage(family: Family, network: Any, weight: float = 1.0, norm: float = 1.0) -> Costs:
    """Return prices by what is stored: `weight` a value of a matrix, `norm` any other value.

    With 1 and 1 these are numbers of parameters.
    """
    blocks = family.blocks_of(network)

    def of_matrices(block: Any, names: tuple[str, ...], way: str) -> float:
        """Price of one row (or column) of all these matrices, with the row's bias."""
        total = 0.0
        for name in names:
            module = family.part(block, name)
            total += weight * (module.in_features if way == "row" else module.out_features)
            total += norm * (way == "row" and module.bias is not None)
        return total

    def rest(block: Any, place: Place) -> float:
        """Price of what goes only with the whole place: norms, and the output's bias."""
        names = [name for name in family.norms(block) if name.startswith(place.kind)]
        total = norm * sum(
            p.numel() for name in names for p in family.part(block, name).parameters()
        )
        bias = family.part(block, place.projection).bias
        total += norm * (0 if bias is None else bias.numel())
        if place.kind == "attention":
            inner = [family.query_norm, family.key_norm]
            found = [block.get_submodule(path) for path in inner if path]
            total += norm * sum(p.numel() for module in found for p in module.parameters())
        return total

    def price(place: Place, size: Any) -> float:
        if not size:
            return 0.0
        block = blocks[place.block]
        if place.kind == "mlp":
            one = of_matrices(block, ("gate", "up"), "row") + of_matrices(
                block, ("down",), "column"
            )
            return size * one + rest(block, place)
        width = int(family.part(block, "attention").head_dim)
        one = of_matrices(block, ("query",), "row") + of_matrices(block, ("output",), "column")
        shared = of_matrices(block, ("key", "value"), "row")
        return width * (size.groups * size.queries * one + size.groups * shared) + rest(
            block, place
        )

    matrices = 1 if family.tied(network) else 2
    token = matrices * weight * family.embedding_of(network).weight.shape[1]
    known = sum(price(p, dense_size(family, network, p)) for p in places(family, network))
    rows = family.embedding_of(network).weight.shape[0]
    whole = _stored(network, weight, norm)
    return Costs(price, lambda count: count * token, whole - known - rows * token)


def _stored(network: Any, weight: float, norm: float) -> float:
    """Price of all parameters, tied ones once."""
    return sum(p.numel() * (weight if p.dim() > 1 else norm) for p in network.parameters())
