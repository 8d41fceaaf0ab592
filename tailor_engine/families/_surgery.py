"""Structure changes of a network and its config: other matrices, widths, fewer blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tailor_engine.families._family import Family

#: Config lists with one entry a block.
_LISTS_BY_BLOCK = ("layer_types", "no_rope_layers")


#: Lists of token ids in a generation config.
_TOKEN_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def _family_of(network: Any) -> Family:
    from tailor_engine import families

    return families.find(network.config)


def replace_linear(
    block: nn.Module,
    part: str,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    family: Family | None = None,
) -> nn.Linear:
    """Put a linear layer with this weight where `part` (such as "down") stands in the block.

    Shapes: weight [N, K]; bias [N] or None for a layer without bias. The tensors are taken as they
    are, without a copy. `family` names the parts; every family known today names them alike.
    """
    if weight.dim() != 2 or (bias is not None and bias.shape != weight.shape[:1]):
        bias_shape = None if bias is None else list(bias.shape)
        raise ValueError(
            f"{part}: expected weight [N, K] and bias [N] or None, "
            f"got {list(weight.shape)} and {bias_shape}"
        )
    path = getattr(family or Family, part, None) if "." not in part else part
    if not isinstance(path, str):
        raise KeyError(f"no part named {part!r}")
    parent, _, name = path.rpartition(".")
    linear = nn.Linear(
        weight.shape[1], weight.shape[0], bias is not None, device="meta", dtype=weight.dtype
    )
    linear.weight = nn.Parameter(weight.detach())
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach())
    old = block.get_submodule(path)
    linear.train(old.training)
    setattr(block.get_submodule(parent), name, linear)
    return linear


def set_mlp_widths(network: Any, widths: Sequence[int] | None = None) -> list[int]:
    """Write the blocks' feed-forward widths into the config, and return them.

    The matrices must have been replaced already; `widths` (one a block, or None to take them from
    the matrices) must be what they have. Equal widths are written as transformers' plain
    `intermediate_size`; different ones as its `per_layer_config`, against the most frequent width.

    Raises:
        ValueError: a block's gate, up and down differ from each other or from `widths`.
    """
    family = _family_of(network)
    blocks = family.blocks_of(network)
    found = family.widths(network)
    if widths is not None and list(widths) != found:
        raise ValueError(f"widths {list(widths)} differ from those of the matrices {found}")
    for index, (block, width) in enumerate(zip(blocks, found, strict=True)):
        up, down = family.part(block, "up").out_features, family.part(block, "down").in_features
        if not width == up == down:
            raise ValueError(f"block {index}: gate has {width} rows, up {up}, down {down} columns")
        family.part(block, "mlp").intermediate_size = width
    config = network.config
    counts = Counter(found)
    common = max(counts, key=lambda width: (counts[width], width))
    config.per_layer_config = None
    config.intermediate_size = common
    different = {i: {"intermediate_size": w} for i, w in enumerate(found) if w != common}
    if different:
        config.per_layer_config = different
    return found


def drop_blocks(network: Any, kept: Sequence[int]) -> None:
    """Keep only these blocks, renumbered in their order, with config and attention caches to match.

    Raises:
        ValueError: `kept` is empty, not increasing, or out of range.
    """
    family = _family_of(network)
    blocks = family.blocks_of(network)
    kept = [int(index) for index in kept]
    if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= len(blocks):
        raise ValueError(
            f"kept blocks must be increasing indices in 0..{len(blocks) - 1}, got {kept}"
        )
    parent_path, _, name = family.blocks.rpartition(".")
    remaining = nn.ModuleList(blocks[index] for index in kept)
    for index, block in enumerate(remaining):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                setattr(module, "layer_idx", index)  # noqa: B010
    setattr(network.get_submodule(parent_path), name, remaining)

    config = network.config
    config.per_layer_config = None  # set again below: its indices count the old blocks
    config.num_hidden_layers = len(kept)
    for key in _LISTS_BY_BLOCK:
        values = getattr(config, key, None)
        if values is not None:
            setattr(config, key, [values[index] for index in kept])
    body: Any = family.body_of(network)
    if hasattr(body, "has_sliding_layers"):
        body.has_sliding_layers = "sliding_attention" in config.layer_types
    set_mlp_widths(network)


def token_ids(settings: Any) -> dict[str, int | list[int]]:
    """Return what a config or a generation config names by token id, such as "eos_token_id"."""
    found = {}
    for key, value in settings.to_dict().items():
        if (key.endswith("token_id") or key in _TOKEN_LISTS) and value not in (None, []):
            found[key] = value
    return found


def keep_tokens(
    network: Any, kept: Sequence[int], embedding: torch.Tensor, head: torch.Tensor | None = None
) -> None:
    """Put an embedding and a head with fewer tokens in place, and renumber what configs name.

    Shapes: kept [V], old ids in their new order; embedding [V, D]; head [V, D], or None for a
        head that is tied to the embedding. The tensors are taken as they are.
    """
    family = _family_of(network)
    new = {old: index for index, old in enumerate(kept)}
    for settings in (network.config, network.generation_config):
        for key, value in token_ids(settings).items():
            if isinstance(value, list):
                setattr(settings, key, [new[i] for i in value if i in new])
            else:
                setattr(settings, key, new.get(value))
    network.config.vocab_size = len(kept)
    table, out = family.embedding_of(network), family.head_of(network)
    table.weight = nn.Parameter(embedding, table.weight.requires_grad)
    table.num_embeddings = out.out_features = len(kept)
    out.weight = table.weight if head is None else nn.Parameter(head, out.weight.requires_grad)
    body: Any = family.body_of(network)
    network.vocab_size = body.vocab_size = len(kept)
    table.padding_idx = body.padding_idx = network.config.pad_token_id
