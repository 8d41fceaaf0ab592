"""What a stage must know of a model family: where its parts are and which of its habits differ."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `import tailor_engine` reads families, and must not wait for torch
    import torch
    from torch import nn

#: The seven matrices of a block, by the names that stages use.
PARTS = ("query", "key", "value", "output", "gate", "up", "down")


@dataclass(frozen=True)
class Family:
    """Paths and habits of one model family; a stage walks these and never asks for a class name."""

    name: str
    model_types: tuple[str, ...]  # values of transformers' config.model_type
    # Paths from the causal language model.
    body: str = "model"
    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens"
    final_norm: str = "model.norm"
    head: str = "lm_head"
    # Paths from one block.
    attention: str = "self_attn"
    query: str = "self_attn.q_proj"
    key: str = "self_attn.k_proj"
    value: str = "self_attn.v_proj"
    output: str = "self_attn.o_proj"
    mlp: str = "mlp"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    down: str = "mlp.down_proj"
    query_norm: str | None = None
    key_norm: str | None = None
    attention_norm: str = "input_layernorm"
    attention_out_norm: str | None = None  # "sandwich" norm on what attention adds to the stream
    mlp_norm: str = "post_attention_layernorm"
    mlp_out_norm: str | None = None
    # Habits.
    norm_offset: float = 0.0  # a norm multiplies by (norm_offset + weight)
    activation: str = "hidden_act"  # config key
    softcap_key: str | None = None  # config key: logits = c * tanh(logits / c)
    attention_softcap_key: str | None = None
    embedding_scaled: bool = False  # the embedding is multiplied by sqrt(hidden size)

    def body_of(self, network: nn.Module) -> nn.Module:
        """Return the module that maps input ids to final hidden states."""
        return network.get_submodule(self.body)

    def blocks_of(self, network: nn.Module) -> nn.ModuleList:
        """Return the list of transformer blocks."""
        from torch import nn

        blocks = network.get_submodule(self.blocks)
        if not isinstance(blocks, nn.ModuleList):
            raise TypeError(f"{self.blocks} of {self.name} is a {type(blocks).__name__}")
        return blocks

    def part(self, block: nn.Module, name: str) -> Any:
        """Return one part of a block by its name in this family, such as "down" or "mlp_norm"."""
        path = getattr(self, name, None)
        if not isinstance(path, str):
            raise KeyError(f"family {self.name} has no part {name!r} in its blocks")
        return block.get_submodule(path)

    def has(self, block: nn.Module, name: str) -> bool:
        """Say whether a block has a part, for its attention or its "mlp" may be left out."""
        module: Any = block
        for step in getattr(self, name).split("."):
            module = getattr(module, step, None)
        return module is not None and not getattr(module, "left_out", False)

    def linears(self, network: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
        """Yield (block index, part name, module) of every matrix in every block."""
        for index, block in enumerate(self.blocks_of(network)):
            for name in PARTS:
                if self.has(block, name):
                    yield index, name, self.part(block, name)

    def embedding_of(self, network: nn.Module) -> Any:
        """Return the token embedding module."""
        return network.get_submodule(self.embedding)

    def head_of(self, network: nn.Module) -> Any:
        """Return the module that maps hidden states to logits."""
        return network.get_submodule(self.head)

    def head_weight(self, network: nn.Module) -> torch.Tensor:
        """Return the head's weight [V, D]; a quantized head is dequantized to float32."""
        head = self.head_of(network)
        packed = getattr(head, "packed", None)
        import torch

        return head.weight if packed is None else packed.dequantize(torch.float32)

    def tied(self, network: nn.Module) -> bool:
        """Say whether embedding and head are one matrix."""
        embedding, head = self.embedding_of(network), self.head_of(network)
        name = "packed" if getattr(head, "packed", None) is not None else "weight"
        return getattr(embedding, name, None) is getattr(head, name)

    def softcap(self, config: Any) -> float:
        """Return c of logits = c * tanh(logits / c), or 0.0 for a family without it."""
        return float(getattr(config, self.softcap_key, None) or 0.0) if self.softcap_key else 0.0

    def widths(self, network: nn.Module) -> list[int]:
        """Return every block's feed-forward width, as its matrices have it; 0 where left out."""
        return [
            int(self.part(block, "gate").out_features) if self.has(block, "mlp") else 0
            for block in self.blocks_of(network)
        ]

    def heads(self, block: nn.Module) -> tuple[int, int]:
        """Return a block's numbers of query heads and of key-value heads; 0, 0 where left out."""
        if not self.has(block, "attention"):
            return 0, 0
        size = self.part(block, "attention").head_dim
        query, key = self.part(block, "query"), self.part(block, "key")
        return query.out_features // size, key.out_features // size

    def norms(self, block: nn.Module) -> list[str]:
        """Return the names of a block's norms over the hidden size, in the order of the stream."""
        names = ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
        return [name for name in names if getattr(self, name) and self.has(block, name)]
