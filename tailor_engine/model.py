"""A language model on its way through the stages: network, tokenizer, family, source."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from tailor_engine.errors import UserError
from tailor_engine.families._family import Family


def choose_device(wanted: str = "auto") -> torch.device:
    """Return where a command's models live: everything that comes out of them stays there.

    Numbers: "auto" is a GPU where there is one, else the CPU; "cuda" the current card, or that of
        this process where a launcher started one for each card.

    Raises:
        UserError: an unknown device, or a GPU that is not here.
    """
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdecimal()):
        raise UserError(f"device must be auto, cpu, cuda or cuda:N, got {wanted!r}")
    if kind == "cpu":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    index = int(number or os.environ.get("LOCAL_RANK", "0"))
    if index >= count:
        raise UserError(f"device {wanted!r} was asked for; torch sees {count} CUDA GPUs here")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


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

    def to(self, device: torch.device | str) -> Model:
        """Move the network, and the teacher's and the base's, to a device; return the model."""
        for each in (self, self.teacher, self.base):
            if each is not None and each.network.device != torch.device(device):
                each.network.to(device)
        return self

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
