"""Model families as data: one value a family, found by transformers' `config.model_type`."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from tailor_engine.errors import UserError
from tailor_engine.families._family import PARTS, Family
from tailor_engine.families._layered import register

if TYPE_CHECKING:
    from tailor_engine.families._left_out import leave_out
    from tailor_engine.families._surgery import (
        drop_blocks,
        keep_tokens,
        replace_linear,
        set_hidden_size,
        token_ids,
        write_shapes,
    )

LLAMA = Family("llama", ("llama",))
MISTRAL = Family("mistral", ("mistral",))
QWEN2 = Family("qwen2", ("qwen2",))
QWEN3 = Family("qwen3", ("qwen3",), query_norm="self_attn.q_norm", key_norm="self_attn.k_norm")
_SANDWICH: dict[str, Any] = {
    "attention_out_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_out_norm": "post_feedforward_layernorm",
    "norm_offset": 1.0,
    "activation": "hidden_activation",
    "softcap_key": "final_logit_softcapping",
    "attention_softcap_key": "attn_logit_softcapping",
    "embedding_scaled": True,
}
GEMMA2 = Family("gemma2", ("gemma2",), **_SANDWICH)
GEMMA3 = Family(
    "gemma3",
    ("gemma3_text",),
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    **_SANDWICH,
)

SMOLLM3 = Family("smollm3", ("smollm3",))

FAMILIES: dict[str, Family] = {
    family.name: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3, SMOLLM3)
}
_BY_MODEL_TYPE = {kind: family for family in FAMILIES.values() for kind in family.model_types}


def known() -> list[str]:
    """Return the model types that `find` knows."""
    return sorted(_BY_MODEL_TYPE)


def find(config: Any) -> Family:
    """Return the family of a transformers config.

    Raises:
        UserError: the model type is not among the known ones, which the message lists.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in _BY_MODEL_TYPE:
        return _BY_MODEL_TYPE[model_type]
    hint = " (load its text-only model instead)" if model_type == "gemma3" else ""
    raise UserError(
        f"model type {model_type!r} is not supported{hint}; known: {', '.join(known())}"
    )


def __getattr__(name: str) -> Any:
    """Import the changes of structure at first use: they import torch."""
    if name in __all__:
        home = "_left_out" if name == "leave_out" else "_surgery"
        return getattr(importlib.import_module(f"{__name__}.{home}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register(known())

__all__ = [
    "FAMILIES",
    "PARTS",
    "Family",
    "drop_blocks",
    "find",
    "keep_tokens",
    "known",
    "leave_out",
    "replace_linear",
    "set_hidden_size",
    "token_ids",
    "write_shapes",
]
