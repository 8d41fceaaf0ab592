"""What stands where a block's attention or feed-forward layer was left out: it adds nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine.families._family import Family

#: The sub-layers that may be left out, by their names in transformers' `skip`, and their norms.
NORMS = {
    "attention": ("attention_norm", "attention_out_norm"),
    "mlp": ("mlp_norm", "mlp_out_norm"),
}


class NoAttention(nn.Module):
    """Adds nothing to the stream, and keeps its layer of the cache as long as the others.

    The length of the first layer is that of the whole cache to transformers.
    """

    left_out = True

    def __init__(self, layer_idx: int, key_value_heads: int, head_dim: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, head_dim
        self.key_value_heads = key_value_heads

    def forward(
        self, hidden_states: Tensor, past_key_values: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        """Return zeros for every token, and no attention weights."""
        if past_key_values is not None:
            batch, tokens = hidden_states.shape[:2]
            shape = batch, self.key_value_heads, tokens, self.head_dim
            nothing = hidden_states.new_zeros(shape)
            past_key_values.update(nothing, nothing, self.layer_idx)
        return torch.zeros_like(hidden_states), None


class NoMLP(nn.Module):
    """Adds nothing to the stream."""

    left_out = True

    def forward(self, x: Tensor) -> Tensor:
        """Return zeros for every token."""
        return torch.zeros_like(x)


class NoNorm(nn.Identity):
    """Stands where a norm would have only nothing to normalise."""

    left_out = True


def leave_out(family: Family, block: Any, name: str) -> None:
    """Take the "attention" or the "mlp" of a block out, with its norms.

    Raises:
        ValueError: no such sub-layer.
    """
    if name not in NORMS:
        raise ValueError(f"expected a sub-layer {' or '.join(NORMS)}, got {name!r}")
    if not family.has(block, name):
        return
    if name == "attention":
        old = family.part(block, "attention")
        nothing: nn.Module = NoAttention(old.layer_idx, 1, old.head_dim)
    else:
        nothing = NoMLP()
    setattr(block, getattr(family, name), nothing)
    for norm in NORMS[name]:
        path = getattr(family, norm)
        if path is not None:
            setattr(block, path, NoNorm())
