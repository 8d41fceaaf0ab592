"""Structure changes of a network and its config: other matrices, fewer blocks and tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tailor_engine.families._family import Family

#: Config lists with one entry a block.
_LISTS_BY_BLOCK = ("layer_types", "no_rope_layers")


#: transformers' own field: the common value of what differs between blocks may be read.
_GLOBAL_ACCESS = "allow_global_per_layer_attribute_access"
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


def write_shapes(network: Any) -> None:
    """Write the shapes that the matrices have into config and modules.

    What is alike in all blocks is written as transformers' plain fields, what differs as its
    `per_layer_config`, against the most frequent value.

    Raises:
        ValueError: the matrices of a block do not fit each other.
    """
    family, config = _family_of(network), network.config
    shapes = [_shape(family, block, i) for i, block in enumerate(family.blocks_of(network))]
    config.per_layer_config = None
    config.__dict__.pop(_GLOBAL_ACCESS, None)
    for key in ("intermediate_size", "num_attention_heads", "num_key_value_heads"):
        _write_common(config, key, [shape[key] for shape in shapes if key in shape])
    for block, shape in zip(family.blocks_of(network), shapes, strict=True):
        _refuse_stock(family, block, shape, config)
    different = {
        index: {key: value for key, value in shape.items() if value != getattr(config, key, None)}
        for index, shape in enumerate(shapes)
    }
    different = {index: override for index, override in different.items() if override}
    _write_head_size(family, network)
    if any("num_attention_heads" in override for override in different.values()):
        # The configs of Llama and Gemma 2 look at the common number of heads, even so.
        setattr(config, _GLOBAL_ACCESS, True)
    if different:
        config.per_layer_config = different


def _shape(family: Family, block: Any, index: int) -> dict[str, Any]:
    """Return what a block's matrices are, by config key, and write it into its modules."""
    shape: dict[str, Any] = {}
    if family.has(block, "mlp"):
        gate, up, down = (family.part(block, name) for name in ("gate", "up", "down"))
        width = gate.out_features
        if not width == up.out_features == down.in_features:
            raise ValueError(
                f"block {index}: gate has {width} rows, up {up.out_features}, "
                f"down {down.in_features} columns"
            )
        shape["intermediate_size"] = family.part(block, "mlp").intermediate_size = width
    if family.has(block, "attention"):
        queries, keys = family.heads(block)
        attention, out = family.part(block, "attention"), family.part(block, "output")
        if queries % keys or out.in_features != queries * attention.head_dim:
            raise ValueError(
                f"block {index}: {queries} query heads, {keys} key-value heads and an output of "
                f"{out.in_features} columns do not fit each other"
            )
        attention.num_key_value_groups = queries // keys
        shape |= {"num_attention_heads": queries, "num_key_value_heads": keys}
    skip = [name for name in ("attention", "mlp") if not family.has(block, name)]
    return shape | ({"skip": skip} if skip else {})


def _write_common(config: Any, key: str, values: Sequence[int]) -> None:
    """Write the most frequent value that the config's own checks take; 1 where they take none.

    Llama's and Gemma 2's want a hidden size that is a multiple of the number of heads.
    """
    counts = Counter(values)
    for value in sorted(counts, key=lambda value: (counts[value], value), reverse=True):
        setattr(config, key, value)
        try:
            return config.validate_architecture()
        except ValueError:
            setattr(config, key, 1)


def _refuse_stock(family: Family, block: Any, shape: dict[str, Any], config: Any) -> None:
    """Give a sub-layer that is left out some width other than the common one, which nothing reads.

    Stock code ignores `skip`, and would start the missing weights at random with no more than a
    warning; but it raises an error where a width differs between blocks.
    """
    skip = shape.get("skip", ())
    if "mlp" in skip:
        shape["intermediate_size"] = 1 if config.intermediate_size != 1 else 2
    if "attention" in skip:
        heads = 1 if config.num_key_value_heads != 1 else 2
        shape["num_key_value_heads"] = family.part(block, "attention").key_value_heads = heads


def _write_head_size(family: Family, network: Any) -> None:
    """Write head_dim where it no longer is the hidden size divided by the heads."""
    config = network.config
    for block in family.blocks_of(network):
        queries, _ = family.heads(block)
        if queries:
            size = family.part(block, "attention").head_dim
            if size != (getattr(config, "head_dim", None) or config.hidden_size // queries):
                config.head_dim = size


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
    write_shapes(network)


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


def set_hidden_size(network: Any, size: int) -> None:
    """Write a new hidden size into config and modules, once all tensors have it."""
    family, config = _family_of(network), network.config
    config.per_layer_config = None  # written again below
    config.hidden_size = size
    for module in network.modules():
        if isinstance(getattr(module, "hidden_size", None), int):
            module.hidden_size = size
    table = family.embedding_of(network)
    table.embedding_dim = family.head_of(network).in_features = size
    if family.embedding_scaled:
        table.scalar_embed_scale = size**0.5
        table.embed_scale.fill_(table.scalar_embed_scale)
    write_shapes(network)
