"""The Fisher information of each block's output: how much an error there costs, in nats.

The gradient of the divergence to the dense model is zero at the dense model itself, so labels are
sampled from the model's own probabilities, and F = E[g g^T] with g the gradient of their
cross-entropy at the output of the down projection. An error e of that output raises the loss by
about e^T F e / 2 nats a token: the same unit in every block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages.prune.statistics import Batch, BlockStatistics, collect_parts, flat

HEAD_CHUNK = 512  # tokens whose logits exist at once
FLOOR = 1e-3  # added to the Fisher's diagonal, relative to its mean


def collect_with_fisher(
    family: Family, network: Any, found: Sequence[Batch], gram: bool, seed: int
) -> list[BlockStatistics]:
    """Return the statistics of every block's down projection with its Fisher matrix."""
    parts = collect_parts_with_fisher(family, network, found, ("down",), gram, seed)
    return list(parts["down"].values())


def collect_parts_with_fisher(
    family: Family,
    network: Any,
    found: Sequence[Batch],
    parts: Sequence[str],
    gram: bool,
    seed: int,
    slopes: bool = False,
) -> dict[str, dict[int, BlockStatistics]]:
    """Return the statistics of "down", "output" or both with Fisher matrices, from one pass."""
    generator = torch.Generator(network.device).manual_seed(seed)
    # Converted once: the largest matrix of the model, and half of the pass.
    head = family.head_weight(network).detach().to(found[0].dtype)
    softcap = family.softcap(network.config)
    body = family.body_of(network)
    embedding = family.embedding_of(network)
    trainable = [p for p in network.parameters() if p.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    # The embedding's output starts the graph, so that no weight needs a gradient.
    start = embedding.register_forward_hook(lambda m, a, y: y.detach().requires_grad_())

    def run(batch: Batch) -> None:
        with torch.enable_grad(), batch.autocast():
            output = body(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False)
            hidden = output.last_hidden_state
        draws = torch.rand(batch.valid.shape, generator=generator, device=batch.valid.device)
        gradient = sampled_gradient(flat(hidden.detach()), head, batch.valid, softcap, draws)
        hidden.backward(gradient.reshape(hidden.shape).to(hidden.dtype))

    try:
        return collect_parts(family, network, found, parts, gram, run, fisher=True, slopes=slopes)
    finally:
        start.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


@torch.no_grad()
def sampled_gradient(
    hidden: Tensor, head: Tensor, valid: Tensor, softcap: float, draws: Tensor
) -> Tensor:
    """Return the gradient of sum CE(sampled label) with respect to the final hidden states.

    Shapes: hidden [T, D]; head [V, D]; valid [T]; draws [T], uniform in [0, 1); the result [T, D].
        Never more logits at once than a chunk's.
    """
    parts = []
    for start in range(0, hidden.shape[0], HEAD_CHUNK):
        stop = start + HEAD_CHUNK
        logits = torch.nn.functional.linear(hidden[start:stop].to(head.dtype), head)
        slope = None
        if softcap:
            bent = torch.tanh(logits.float() / softcap)
            logits, slope = softcap * bent, 1 - bent.square()
        probabilities = logits.softmax(-1, dtype=torch.float32)
        labels = _sample(probabilities, draws[start:stop])
        if slope is None:
            # (p - onehot) W, without a copy of p to subtract the ones from.
            gradient = torch.matmul(probabilities.to(head.dtype), head).float()
            gradient -= head[labels].float()
        else:
            own = slope.gather(1, labels[:, None])
            gradient = torch.matmul((probabilities * slope).to(head.dtype), head).float()
            gradient -= own * head[labels].float()
        parts.append(gradient * valid[start:stop, None])
    return torch.cat(parts)


def _sample(probabilities: Tensor, draws: Tensor) -> Tensor:
    """Return one index a row by the inverse distribution, over groups first and then within one.

    One random number and one sum a row, where torch.multinomial draws and sorts V numbers (seven
    times the time at V = 49,152).

    Shapes: probabilities [T, V]; draws [T] -> [T] int64.
    """
    rows, size = probabilities.shape
    group = math.isqrt(size)
    whole = size // group * group
    sums = probabilities[:, :whole].reshape(rows, -1, group).sum(-1)
    sums = torch.cat([sums, probabilities[:, whole:].sum(-1, keepdim=True)], -1)
    reach = sums.cumsum(-1)
    point = draws[:, None] * reach[:, -1:]
    chosen = torch.searchsorted(reach, point, right=True).clamp_max(sums.shape[1] - 1)
    before = (reach - sums).gather(1, chosen)
    places = chosen * group + torch.arange(group, device=draws.device)
    inside = probabilities.gather(1, places.clamp_max(size - 1))
    inside = torch.where(places < size, inside, 0).cumsum(-1)
    within = torch.searchsorted(inside, point - before, right=True).clamp_max(group - 1)
    return (chosen * group + within)[:, 0].clamp_max(size - 1)


def metric(statistics: BlockStatistics) -> Tensor:
    """Return A [D, D] in float64 with F + 1e-3 mean(diag F) I = A A^T."""
    assert statistics.fisher is not None
    matrix = statistics.fisher.double() / statistics.tokens
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    matrix.diagonal().add_(FLOOR * mean)
    return torch.linalg.cholesky(matrix)
