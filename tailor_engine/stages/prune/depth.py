"""Which blocks go: those of least influence, or greedily those whose absence costs least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.families import Family
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.lockstep import Lane, lane_of
from tailor_engine.stages.prune.statistics import Batch, flat

BY = ("influence", "kl", "perplexity")


@torch.no_grad()
def greedy(family: Family, network: Any, found: Sequence[Batch], by: str) -> Iterator[int]:
    """Yield blocks in the order in which they go, each the cheapest of those still there.

    `by` kl: the divergence to the dense model; perplexity: the loss on the text's own tokens. The
    stream is carried through the blocks before the one in question once, so that a round of n
    blocks takes n^2 / 2 passes through a block, and n through the head. Nothing is repaired here.

    Source: Shortened LLaMA (2402.02834), section 3, by rounds.
    """
    lanes = [lane_of(family, network, batch, False) for batch in found]
    head, softcap = family.head_weight(network).detach(), family.softcap(network.config)
    left = list(range(len(family.blocks_of(network))))
    dense = [_through(family, network, left, lane, lane.dense) for lane in lanes]

    def cost(lane: Lane, hidden: Tensor, whole: Tensor) -> float:
        labels = _next_tokens(lane.batch) if by == "perplexity" else None
        weight = 0.0 if labels is None else 1.0
        tokens = int(lane.batch.valid.sum())
        states, teacher = (_normed(family, network, lane, x) for x in (hidden, whole))
        return tokens * float(
            ops.linear_kl(
                states, head, teacher, head, labels, lane.batch.valid,
                cross_entropy=weight, softcap=softcap, teacher_softcap=softcap,
            )
        )  # fmt: skip

    depth = len(left)
    while len(left) > 1:
        costs = dict.fromkeys(left, 0.0)
        for lane, whole in zip(lanes, dense, strict=True):
            x = lane.dense
            for position, index in enumerate(left):
                without = _through(family, network, left[position + 1 :], lane, x)
                costs[index] += cost(lane, without, whole)
                x = _through(family, network, [index], lane, x)
        gone = min(costs, key=costs.__getitem__)
        left.remove(gone)
        context().progress(depth - len(left), depth - 1, "blocks by what their absence costs")
        yield gone


def _through(family: Family, network: Any, indices: Sequence[int], lane: Lane, x: Tensor) -> Tensor:
    """Run some blocks, one after another."""
    blocks = family.blocks_of(network)
    for index in indices:
        args, kwargs = lane.arguments[index]
        with lane.batch.autocast():
            result = blocks[index](x, *args, **kwargs)
        x = result[0] if isinstance(result, tuple) else result
    return x


def _normed(family: Family, network: Any, lane: Lane, x: Tensor) -> Tensor:
    return flat(network.get_submodule(family.final_norm)(x)).to(lane.batch.dtype)


def _next_tokens(batch: Batch) -> Tensor:
    """Return each token's label [T]: the next token of its document, or -100."""
    labels = torch.full_like(batch.input_ids, -100)
    follows = batch.positions[:, 1:] == batch.positions[:, :-1] + 1
    labels[:, :-1] = torch.where(follows, batch.input_ids[:, 1:], -100)
    return torch.where(batch.valid, labels.flatten(), -100)
