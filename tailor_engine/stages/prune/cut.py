"""Take channels, heads or hidden dimensions out of a network's matrices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine import ops
from tailor_engine.families import PARTS, Family, replace_linear, set_hidden_size
from tailor_engine.stages.prune.criteria import runs_to_columns

#: The matrices of a block that write to the stream; the others read from it.
WRITERS = ("output", "down")


@torch.no_grad()
def cut_channels(family: Family, block: Any, kept: Tensor, down_weight: Tensor | None) -> None:
    """Keep some channels of gate, up and down; `down_weight` [D, k] replaces the plain slice."""
    given = {} if down_weight is None else {"down": down_weight}
    _slice(family, block, {"gate": kept, "up": kept}, {"down": kept}, given)


@torch.no_grad()
def cut_heads(family: Family, block: Any, kept: Tensor, output_weight: Tensor | None) -> None:
    """Keep some query heads and the key-value heads that they share.

    Shapes: kept [k, q], the query heads of each key-value head that stays, increasing;
        output_weight [D, k * q * head_dim] replaces the plain slice of the output projection.

    Raises:
        ValueError: a row holds query heads of several key-value heads.
    """
    attention = family.part(block, "attention")
    queries, keys = family.heads(block)
    owners = kept // (queries // keys)
    if kept.dim() != 2 or not bool((owners == owners[:, :1]).all()):
        raise ValueError(f"expected rows of heads that share keys and values, got {kept.tolist()}")
    rows = runs_to_columns(kept.flatten(), attention.head_dim)
    shared = runs_to_columns(owners[:, 0], attention.head_dim)
    given = {} if output_weight is None else {"output": output_weight}
    _slice(family, block, {"query": rows, "key": shared, "value": shared}, {"output": rows}, given)
    attention.num_key_value_groups = kept.shape[1]


@torch.no_grad()
def cut_hidden(family: Family, network: Any, kept: Tensor, gains: Mapping[str, Tensor]) -> None:
    """Keep some dimensions of the residual stream, in all that reads or writes it.

    Shapes: kept [d], increasing; gains {norm: scalar}, by the names of `hidden_norms`: what each
        norm's gain is multiplied by, since it divides by the root mean square of fewer dimensions.
    """
    for name, norm in hidden_norms(family, network).items():
        gain = (norm.weight + family.norm_offset) * gains.get(name, 1.0)
        norm.weight = nn.Parameter(_rows([gain - family.norm_offset], kept)[0])
    for block in family.blocks_of(network):
        parts = [name for name in PARTS if family.has(block, name)]
        _slice(
            family,
            block,
            {name: kept for name in parts if name in WRITERS},
            {name: kept for name in parts if name not in WRITERS},
            {},
        )
    embedding, head = family.embedding_of(network), family.head_of(network)
    tied, before = family.tied(network), embedding.embedding_dim
    embedding.weight = nn.Parameter(_columns(embedding.weight, kept))
    head.weight = embedding.weight if tied else nn.Parameter(_columns(head.weight, kept))
    if family.embedding_scaled:  # by the square root of the hidden size, which has changed
        scale = (before / len(kept)) ** 0.5
        embedding.weight *= scale
        if tied:
            final = network.get_submodule(family.final_norm)
            final.weight.copy_((final.weight + family.norm_offset) / scale - family.norm_offset)
    set_hidden_size(network, len(kept))


def hidden_norms(family: Family, network: Any) -> dict[str, Any]:
    """Return the norms over the hidden size by their paths, in the order of the stream."""
    found = {}
    for index, block in enumerate(family.blocks_of(network)):
        for name in family.norms(block):
            path = f"{family.blocks}.{index}.{getattr(family, name)}"
            found[path] = network.get_submodule(path)
    found[family.final_norm] = network.get_submodule(family.final_norm)
    return found


def repaired_weight(weight: Tensor, kept: Tensor, repaired: Tensor, share: float) -> Tensor:
    """Return the kept columns moved towards the repair by a share from 0 to 1."""
    plain = weight[:, kept].double()
    return (plain + share * (repaired - plain)).to(weight.dtype)


def _rows(tensors: list[Tensor], kept: Tensor) -> list[Tensor]:
    return list(ops.structured_slice(tensors, [kept] * len(tensors), [None] * len(tensors)))


def _columns(weight: Tensor, kept: Tensor) -> Tensor:
    return ops.structured_slice([weight.detach()], [None], [kept])[0]


def _slice(
    family: Family,
    block: Any,
    rows: Mapping[str, Tensor],
    columns: Mapping[str, Tensor],
    given: Mapping[str, Tensor],
) -> None:
    """Keep rows and columns of a block's matrices, by part; a `given` weight replaces the slice."""
    weights: list[Tensor] = []
    row_index: list[Tensor | None] = []
    column_index: list[Tensor | None] = []
    parts = [*rows, *columns]
    for name in parts:
        module = family.part(block, name)
        if name not in given:
            weights.append(module.weight.detach())
            row_index.append(rows.get(name))
            column_index.append(columns.get(name))
        if module.bias is not None and name in rows:
            weights.append(module.bias.detach())
            row_index.append(rows[name])
            column_index.append(None)
    sliced = iter(ops.structured_slice(weights, row_index, column_index))
    for name in parts:
        module = family.part(block, name)
        weight = given[name] if name in given else next(sliced)
        bias = next(sliced) if module.bias is not None and name in rows else module.bias
        weight = weight.to(module.weight.dtype).contiguous()
        replace_linear(block, name, weight, bias, family)
