"""Prune layer after layer on two streams: the dense model's and the already pruned one's.

Each block is judged and repaired on what really reaches it, and its down projection learns to bring
the pruned stream back to the dense one, so that the error of the blocks before it is corrected too.
A dropped block is folded into the down projection before it in the same way. Memory: the two
streams [tokens, D], the moments of one layer, and one layer's h where that is small enough.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.errors import UserError
from tailor_engine.families import Family
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.repair import Moments
from tailor_engine.stages.prune.statistics import Batch, flat, hooked

ATTENTION = ("query", "key", "value", "output")
KEPT_BYTES = 2**30  # of one layer's h over all rows: kept up to here, else computed again
LEAST_GAIN = 0.05  # of a norm's mean gain: less is not divided by

Arguments = list[tuple[tuple, dict[str, Any]]]
#: (block index, what the layer saw on fitting rows, on held-out rows, alpha) -> cuts the block and
#: returns the channels that stay.
Decide = Callable[[int, Moments, Moments, float], Tensor]


@dataclass
class _Lane:
    """One batch on its way through the blocks."""

    batch: Batch
    held_out: bool
    arguments: Arguments  # what the body gives each block beside the hidden states
    dense: Tensor  # [B, L, D]
    pruned: Tensor
    inner: Tensor | None = None  # h of the layer under way


@torch.no_grad()
def _lane(family: Family, network: Any, batch: Batch, held_out: bool) -> _Lane:
    """Run the body with every block passing its input on, and keep what each block was given."""
    taken: Arguments = []
    blocks = family.blocks_of(network)

    def take(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        taken.append((args, kwargs))
        start.append(hidden_states)
        return hidden_states

    start: list[Tensor] = []
    for block in blocks:
        block.forward = take
    try:
        with batch.autocast():
            family.body_of(network)(
                input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False
            )
    finally:
        for block in blocks:
            del block.forward
    return _Lane(batch, held_out, taken, start[0], start[0])


def _run(block: Any, index: int, x: Tensor, lane: _Lane) -> Tensor:
    args, kwargs = lane.arguments[index]
    with lane.batch.autocast():
        result = block(x, *args, **kwargs)
    return result[0] if isinstance(result, tuple) else result


class _Tap:
    """Keeps the down projection's input and output of the latest pass."""

    def __init__(self, down: Any) -> None:
        self.handle = down.register_forward_hook(self.hook)

    def hook(self, module: Any, args: tuple, y: Tensor) -> None:
        self.h, self.y = args[0], y


def _missing(family: Family, block: Any, target: Tensor, out: Tensor, y: Tensor) -> Tensor:
    """Return what the down projection's output lacks to bring the stream to the target [T, D].

    Where a norm stands behind the down projection, what the stream lacks is taken back through it:
    the norm's gain is divided out and the token's own root mean square put back.
    """
    error = flat(target).float() - flat(out).float()
    if family.mlp_out_norm is None:
        return error
    y = flat(y).float()
    gain = family.norm_offset + family.part(block, "mlp_out_norm").weight.detach().float()
    least = LEAST_GAIN * gain.abs().mean()
    gain = torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
    return error / gain * y.square().mean(1, keepdim=True).sqrt()


class _Sums:
    """The moments of one layer, as sums on the device.

    One Gram matrix of h and what is missing, side by side, holds all of them: 55 ms for 2,048
    tokens (D 576, F 1536, one Zen 5 thread), where a float32 product beside it took 76 ms.
    """

    def __init__(self, hidden: int, width: int, device: torch.device) -> None:
        self.width = width
        self.joint = torch.zeros(width + hidden, width + hidden, device=device)
        self.channels = torch.zeros(5, width, dtype=torch.float64, device=device)

    def add(self, h: Tensor, missing: Tensor, valid: Tensor) -> None:
        ops.gram(torch.cat([h, missing.to(h.dtype)], 1), valid, self.joint)
        ops.channel_stats(h, valid, self.channels)

    def moments(self) -> Moments:
        tokens = int(self.channels[0, 0])
        mean = self.joint / max(tokens, 1)
        second, error = mean[: self.width, : self.width], mean[self.width :, : self.width]
        energy = float(mean.diagonal()[self.width :].sum())
        return Moments(second, error, energy, tokens, self.channels)


@torch.no_grad()
def walk(
    family: Family,
    dense: Any,
    pruned: Any,
    fit: Sequence[Batch],
    held_out: Sequence[Batch],
    dropped: Sequence[int],
    alpha: float,
    decide: Decide,
) -> None:
    """Go through the blocks; `decide` cuts and repairs each kept block of `pruned` in place.

    `pruned` starts as a copy of `dense`, whose attention may be cut already: the feed-forward
    layers then correct what that changed. Dropped blocks are passed over, not removed.

    Raises:
        UserError: a block's activations hold NaN or infinity.
    """
    lanes = [_lane(family, dense, batch, False) for batch in fit]
    lanes += [_lane(family, dense, batch, True) for batch in held_out]
    dense_blocks, pruned_blocks = family.blocks_of(dense), family.blocks_of(pruned)
    gone = set(dropped)
    for index, block in enumerate(dense_blocks):
        if index in gone:
            if all(i in gone for i in range(index)):
                _advance_dense(lanes, dense_blocks, [index])
            continue
        run = [index]
        while run[-1] + 1 in gone:
            run.append(run[-1] + 1)
        own = pruned_blocks[index]
        alike = _same_attention(family, block, own)
        down = family.part(own, "down")
        sums = [_Sums(down.out_features, down.in_features, down.weight.device) for _ in range(2)]
        tap = _Tap(down)
        tokens = sum(len(lane.batch.valid) for lane in lanes)
        keep = tokens * down.in_features * lanes[0].batch.dtype.itemsize <= KEPT_BYTES
        with hooked([tap.handle]):
            for lane in lanes:
                out = _run(own, index, lane.pruned, lane)
                inner, y = tap.h, tap.y
                if alike and lane.pruned is lane.dense:
                    lane.dense = out  # the streams have not parted yet
                else:
                    lane.dense = _run(block, index, lane.dense, lane)
                for i in run[1:]:
                    lane.dense = _run(dense_blocks[i], i, lane.dense, lane)
                missing = _missing(family, block, lane.dense, out, y)
                sums[lane.held_out].add(flat(inner), missing, lane.batch.valid)
                if keep:
                    lane.inner, lane.pruned = inner, out - _added(family, block, y)
        moments = [s.moments() for s in sums]
        _check(family, index, moments[0])
        # What follows a dropped block has nobody else to imitate it: the whole way to the target.
        kept = decide(index, moments[0], moments[1], 1.0 if len(run) > 1 else alpha)
        for lane in lanes:
            _step(family, pruned_blocks[index], index, lane, kept)
        context().progress(index + 1, len(dense_blocks), "prune and repair")


def _same_attention(family: Family, block: Any, own: Any) -> bool:
    """Say whether the attention of a block of the pruned network is still the dense one's."""
    if family.heads(block) != family.heads(own) or not family.has(block, "attention"):
        return family.heads(block) == family.heads(own)
    pairs = ((family.part(b, part).weight for b in (block, own)) for part in ATTENTION)
    return all(torch.equal(*pair) for pair in pairs)


def _added(family: Family, block: Any, y: Tensor) -> Tensor:
    """Return what the block adds to the stream for an output of its down projection."""
    return y if family.mlp_out_norm is None else family.part(block, "mlp_out_norm")(y)


def _step(family: Family, block: Any, index: int, lane: _Lane, kept: Tensor) -> None:
    """Take the pruned stream through the block that was just cut.

    Where its h was kept, `lane.pruned` stands before the feed-forward layer, and only the new down
    projection is left to do: the attention and two of three matrices are not computed again.
    """
    if lane.inner is None:
        lane.pruned = _run(block, index, lane.pruned, lane)
        return
    with lane.batch.autocast():
        y = family.part(block, "down")(lane.inner[..., kept])
        lane.pruned = lane.pruned + _added(family, block, y)
    lane.inner = None


def _advance_dense(lanes: Sequence[_Lane], blocks: Any, run: Sequence[int]) -> None:
    for lane in lanes:
        for index in run:
            lane.dense = _run(blocks[index], index, lane.dense, lane)


def _check(family: Family, index: int, moments: Moments) -> None:
    if not bool(torch.isfinite(moments.second.diagonal().sum())):
        raise UserError(
            f"prune: the activations of block {index} ({family.blocks}.{index}) hold NaN or "
            "infinity; check the weights of this block and those before it"
        )
