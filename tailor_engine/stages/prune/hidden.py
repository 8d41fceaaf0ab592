"""Which dimensions of the residual stream matter, and what a norm must know of those that go."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.families import Family
from tailor_engine.model import Model
from tailor_engine.stages.prune import criteria
from tailor_engine.stages.prune.cut import cut_hidden, hidden_norms
from tailor_engine.stages.prune.statistics import Batch, flat, forward, hooked


@dataclass
class Stream:
    """What every norm read and gave, summed over tokens, by the norms' paths.

    Shapes: read, given [5, D] each (see ops.channel_stats).
    """

    read: dict[str, Tensor]
    given: dict[str, Tensor]

    def scores(self) -> Tensor:
        """Return the sum over norms of the mean absolute activation behind them [D].

        Source: Minitron (2407.14679), section 2.2.
        """
        return torch.stack([s[criteria.SUM_ABSOLUTES] / s[0] for s in self.given.values()]).sum(0)

    def gains(self, kept: Tensor) -> dict[str, Tensor]:
        """Return what each norm's gain is multiplied by when only `kept` dimensions stay.

        A norm divides by the root mean square over dimensions; the factor is that of the kept ones
        over that of all, so that the kept ones come out as large as before.
        """
        return {
            name: (s[criteria.SUM_SQUARES][kept].mean() / s[criteria.SUM_SQUARES].mean()).sqrt()
            for name, s in self.read.items()
        }


@torch.no_grad()
def collect_stream(family: Family, network: Any, found: Sequence[Batch]) -> Stream:
    """Return what every norm over the hidden size reads and gives, in one pass over batches."""
    norms = hidden_norms(family, network)
    size, device = family.embedding_of(network).embedding_dim, network.device
    read, given = (
        {name: torch.zeros(5, size, dtype=torch.float64, device=device) for name in norms}
        for _ in range(2)
    )
    now: list[Batch] = []

    def watch(name: str) -> Any:
        def hook(module: Any, args: tuple, y: Tensor) -> None:
            with now[-1].exact():
                ops.channel_stats(flat(args[0]).detach(), now[-1].valid, read[name])
                ops.channel_stats(flat(y).detach(), now[-1].valid, given[name])

        return hook

    handles = [norm.register_forward_hook(watch(name)) for name, norm in norms.items()]
    with hooked(handles):
        for batch in found:
            now.append(batch)
            forward(family, network, batch)
    return Stream(read, given)


@torch.no_grad()
def narrowed(model: Model, share: float, found: Sequence[Batch], rounding: int = 1) -> Any:
    """Return a copy of the network whose residual stream has fewer dimensions, by their scores.

    The hidden size is the largest multiple of `rounding` that keeps at most `share` of the
    parameters: every matrix has it on one side.
    """
    network = copy.deepcopy(model.network)
    stream = collect_stream(model.family, network, found)
    wanted = share * len(stream.scores()) / rounding
    size = max(1, int(wanted + 1e-6)) * rounding
    kept = stream.scores().topk(size).indices.sort().values
    cut_hidden(model.family, network, kept, stream.gains(kept))
    return network
