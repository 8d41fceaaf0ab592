"""A language model on its way through the stages: network, tokenizer, family, source."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tailor_engine.families._family import Family


@dataclass
class Model:
    """A causal language model with its tokenizer; stages take one and give back another."""

    network: Any  # transformers.PreTrainedModel in eval mode
    tokenizer: Any  # transformers.PreTrainedTokenizerBase
    family: Family
    source: str  # what the user typed
    teacher: Model | None = None  # the dense model that distillation imitates; set by prune
    base: Model | None = None  # the untouched model; None: this one is it

    def replace(self, **changes: Any) -> Model:
        """Return a copy with some fields changed; the network is not copied."""
        return dataclasses.replace(self, **changes)

    @property
    def config(self) -> Any:
        """The network's transformers config."""
        return self.network.config

    @property
    def device(self) -> torch.device:
        """Where the network's parameters are."""
        return self.network.device

    @property
    def parameters(self) -> int:
        """Number of weights; tied ones count once, packed ones by what they stand for."""
        return sum(tensor.numel() for tensor in self.network.parameters()) + sum(
            packed.shape[0] * packed.shape[1] for packed in self._packed()
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all saved tensors as they are stored, packed codes, scales and zeros too."""
        return sum(tensor.nbytes for tensor in self._dense()) + sum(
            packed.size_bytes for packed in self._packed()
        )

    def _dense(self) -> Iterator[torch.Tensor]:
        yield from self.network.parameters()
        for module in self.network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:  # those are not saved
                    yield buffer

    def _packed(self) -> Iterator[Any]:
        seen: set[int] = set()
        for module in self.network.modules():
            packed = getattr(module, "packed", None)
            if packed is not None and id(packed) not in seen:
                seen.add(id(packed))
                yield packed
