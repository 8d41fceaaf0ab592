"""The Fisher information of each block's output: how much an error there costs, in nats.

The gradient of the divergence to the dense model is zero at the dense model itself, so labels are
sampled from the model's own probabilities, and F = E[g g^T] with g the gradient of their
cross-entropy at the output of the down projection. An error e of that output raises the loss by
about e^T F e / 2 nats a token: the same unit in every block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages.prune.statistics import Batch, BlockStatistics, collect, flat

HEAD_CHUNK = 512  # tokens whose logits exist at once
FLOOR = 1e-3  # added to the Fisher's diagonal, relative to its mean


def collect_with_fisher(
    family: Family, network: Any, found: Sequence[Batch], gram: bool, seed: int
) -> list[BlockStatistics]:
    """Return the statistics of every block with its Fisher matrix, from the same passes."""
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
        return collect(family, network, found, gram, run, fisher=True)
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
        logits = torch.nn.functional.linear(hidden[start:stop].to(head.dtype), head).float()
        slope = None
        if softcap:
            bent = torch.tanh(logits / softcap)
            logits, slope = softcap * bent, 1 - bent.square()
        probabilities = logits.softmax(-1)
        # By the inverse distribution: one random number a token, where multinomial draws V.
        reach = probabilities.cumsum(-1)
        point = draws[start:stop, None] * reach[:, -1:]
        labels = torch.searchsorted(reach, point).clamp_max(head.shape[0] - 1)
        gradient = probabilities.scatter_add_(
            1, labels, torch.full_like(labels, -1, dtype=probabilities.dtype)
        )
        if slope is not None:
            gradient = gradient * slope
        gradient = gradient * valid[start:stop, None]
        parts.append(torch.matmul(gradient.to(head.dtype), head).float())
    return torch.cat(parts)


def metric(statistics: BlockStatistics) -> Tensor:
    """Return A [D, D] in float64 with F + 1e-3 mean(diag F) I = A A^T."""
    assert statistics.fisher is not None
    matrix = statistics.fisher.double() / statistics.tokens
    mean = matrix.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    matrix.diagonal().add_(FLOOR * mean)
    return torch.linalg.cholesky(matrix)
