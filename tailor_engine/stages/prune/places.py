"""The places of a network that can be cut by themselves: every block's attention and its MLP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tailor_engine.families import Family

KINDS = ("attention", "mlp")  # in the order of the stream
#: The matrix that writes a kind's result to the stream.
PROJECTIONS = {"attention": "output", "mlp": "down"}


class Place(NamedTuple):
    """One half of a block."""

    block: int
    kind: str

    @property
    def projection(self) -> str:
        """Name the part that writes to the stream."""
        return PROJECTIONS[self.kind]

    @property
    def out_norm(self) -> str:
        """Name the norm behind the projection, which only some families have."""
        return f"{self.kind}_out_norm"

    def __str__(self) -> str:
        return f"{self.kind} of block {self.block}"


def places(family: Family, network: Any) -> list[Place]:
    """Return every place that is there, in the order of the stream."""
    return [
        Place(index, kind)
        for index, block in enumerate(family.blocks_of(network))
        for kind in KINDS
        if family.has(block, kind)
    ]


@contextlib.contextmanager
def alone(family: Family, block: Any, kind: str) -> Iterator[None]:
    """Let a block run one of its halves: inside, the other adds nothing to the stream."""
    other = "mlp" if kind == "attention" else "attention"
    module = family.part(block, other)
    module.forward = _no_mlp if other == "mlp" else _no_attention
    try:
        yield
    finally:
        del module.forward


def _no_mlp(hidden_states: Tensor) -> Tensor:
    return torch.zeros_like(hidden_states)


def _no_attention(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None
