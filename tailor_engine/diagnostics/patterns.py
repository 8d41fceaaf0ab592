"""What attention heads look at, and how large the residual stream grows, from a few rows.

The probabilities exist only where attention is computed eagerly, so these rows go through it one by
one, and each layer's [H, L, L] is summed up and gone before the next layer's: memory is one layer
of one row, and the result cannot depend on a batch size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.data import Rows
from tailor_engine.errors import UserError
from tailor_engine.families import Family
from tailor_engine.ops.channel_stats import ABS_MAX, COUNT, SUM_SQUARES
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.statistics import Batch, batches, flat, forward, hooked

#: Sums over queries, in this order, for each head.
FIGURES = ("entropy_nats", "entropy_share", "first_token_share", "previous_share", "distance")


def collect(
    family: Family, network: Any, rows: Rows
) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """Return the table of heads, and for each layer the figures of the stream behind it.

    Numbers: entropy_nats of a query's probabilities; entropy_share relative to log(keys that the
        query can see), so 1 is uniform; first_token_share, previous_share: the probability on the
        first token of the document, and on the token before; distance in tokens. Means over the
        queries that see at least two keys.
    """
    blocks = family.blocks_of(network)
    there = [i for i, block in enumerate(blocks) if family.has(block, "attention")]
    sums: list[Tensor] = [torch.zeros(0)] * len(blocks)
    counts = [0] * len(blocks)
    hidden = family.embedding_of(network).embedding_dim
    wide = {"dtype": torch.float64, "device": network.device}
    streams = [torch.zeros(5, hidden, **wide) for _ in blocks]
    now: list[Batch] = []

    def attention(index: int) -> Any:
        def hook(module: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
            mask = kwargs.get("attention_mask")
            found, queries = head_sums(result[1], mask, now[-1].positions[0], now[-1].valid)
            sums[index] = found if not counts[index] else sums[index] + found
            counts[index] += queries

        return hook

    def stream(index: int) -> Any:
        def hook(module: Any, args: tuple, result: Any) -> None:
            y = flat(result[0] if isinstance(result, tuple) else result)
            ops.channel_stats(y, now[-1].valid, streams[index])

        return hook

    handles = []
    for index, block in enumerate(blocks):
        if index in there:
            module = family.part(block, "attention")
            handles.append(module.register_forward_hook(attention(index), with_kwargs=True))
        handles.append(block.register_forward_hook(stream(index)))
    with eager(network), hooked(handles), torch.no_grad():
        for done, batch in enumerate(batches(rows, 1, network.device, torch.float32)):
            now.append(batch)
            forward(family, network, batch)
            context().progress(done + 1, len(rows), "attention")
    if not all(counts[index] for index in there):
        raise UserError("diagnose: no row holds two tokens of one document; give longer sequences")
    return _table({i: sums[i] / counts[i] for i in there}), [_stream(s) for s in streams]


def head_sums(
    weights: Tensor, mask: Tensor | None, positions: Tensor, valid: Tensor
) -> tuple[Tensor, int]:
    """Return the sums of FIGURES [5, H] over the queries of one row, and how many these are.

    Shapes: weights [1, H, L, L], probabilities of keys for each query; mask [1, 1, L, L], 0 where
        a key is visible, or None; positions [L], 0 at the start of a document; valid [L].
    """
    length = len(positions)
    visible = positions + 1 if mask is None else (mask[0, 0, :, :length] == 0).sum(-1)
    queries = (valid & (visible >= 2) & (positions >= 1)).nonzero()[:, 0]
    chosen = weights[0, :, queries].float()  # [H, Q, L]
    entropy = torch.special.entr(chosen).sum(-1)
    uniform = visible[queries].float().log()
    first = chosen.gather(2, _keys(queries - positions[queries], chosen))[..., 0]
    before = chosen.gather(2, _keys(queries - 1, chosen))[..., 0]
    places = torch.arange(length, device=chosen.device, dtype=chosen.dtype)
    distance = queries - (chosen * places).sum(-1)
    figures = torch.stack([entropy, entropy / uniform, first, before, distance])
    return figures.double().sum(-1), len(queries)


def _keys(places: Tensor, probabilities: Tensor) -> Tensor:
    """Give one key a query the shape that gather wants [H, Q, 1]."""
    return places[None, :, None].expand(probabilities.shape[0], -1, 1)


@contextlib.contextmanager
def eager(network: Any) -> Iterator[None]:
    """Compute attention step by step inside the block, the only way that shows probabilities."""
    before = network.config._attn_implementation
    network.set_attn_implementation("eager")
    try:
        yield
    finally:
        network.set_attn_implementation(before)


def _table(means: dict[int, Tensor]) -> dict[str, np.ndarray]:
    heads = {index: mean.shape[1] for index, mean in means.items()}
    table = {
        "layer": np.repeat(np.array(list(heads), dtype=int), list(heads.values())),
        "head": np.concatenate([np.arange(count) for count in heads.values()]),
    }
    arrays = [mean.cpu().numpy() for mean in means.values()]
    return table | {
        name: np.concatenate([array[row] for array in arrays]) for row, name in enumerate(FIGURES)
    }


def _stream(stats: Tensor) -> dict[str, float]:
    """Return how large the stream behind a layer is, and its largest single value."""
    energy = stats[SUM_SQUARES] / stats[COUNT].clamp_min(1)
    typical = float(energy.sqrt().median())
    peak, channel = stats[ABS_MAX].max(0)
    return {
        "stream_rms": float(energy.mean().sqrt()),
        "stream_typical": typical,
        "stream_peak": float(peak),
        "stream_peak_channel": int(channel),
        "stream_peak_ratio": float(peak) / max(typical, 1e-30),
    }
