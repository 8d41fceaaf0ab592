"""Walk through the network place after place, so that one place's moments exist at a time.

Pruning takes two streams along: the dense model's and the already pruned one's. Each half of a
block is judged and repaired on what really reaches it, and its projection learns to bring the
pruned stream back to the dense one, so that the error of what stands before it is corrected too.
What is left out is folded into the projection before it in the same way. In one pass the streams
never part: every place is repaired on what the dense model gives it. Memory: the streams
[tokens, D], the moments of one place, and one place's h where that is small enough.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.errors import UserError
from tailor_engine.families import Family
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.criteria import SUM_SQUARES
from tailor_engine.stages.prune.places import Place, alone, places
from tailor_engine.stages.prune.repair import Moments
from tailor_engine.stages.prune.statistics import Batch, BlockStatistics, flat, hooked

KEPT_BYTES = 2**30  # of one place's h over all rows: kept up to here, else computed again
LEAST_GAIN = 0.05  # of a norm's mean gain: less is not divided by

Arguments = list[tuple[tuple, dict[str, Any]]]
#: (place, what its projection saw on fitting rows, on held-out rows, alpha) -> cuts the place and
#: returns the projection's columns that stay.
Decide = Callable[[Place, Moments, Moments, float], Tensor]


@dataclass
class Lane:
    """One batch on its way through the blocks."""

    batch: Batch
    held_out: bool
    arguments: Arguments  # what the body gives each block beside the hidden states
    dense: Tensor  # [B, L, D]
    pruned: Tensor
    inner: Tensor | None = None  # h of the place under way


@torch.no_grad()
def lane_of(family: Family, network: Any, batch: Batch, held_out: bool) -> Lane:
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
    return Lane(batch, held_out, taken, start[0], start[0])


@torch.no_grad()
def with_grams(
    family: Family,
    network: Any,
    found: Sequence[Batch],
    statistics: Mapping[Place, BlockStatistics],
) -> Iterator[tuple[Place, BlockStatistics]]:
    """Yield each place's statistics with the Gram matrix of h, which nobody else should keep."""
    lanes = [lane_of(family, network, batch, False) for batch in found]
    for index, block in enumerate(family.blocks_of(network)):
        here = {place: each for place, each in statistics.items() if place.block == index}
        parts = {place: family.part(block, place.projection) for place in here}
        taps = {place: _Tap(part) for place, part in parts.items()}
        grams = {
            place: torch.zeros(part.in_features, part.in_features, device=part.weight.device)
            for place, part in parts.items()
        }
        with hooked([tap.handle for tap in taps.values()]):
            for lane in lanes:
                args, kwargs = lane.arguments[index]
                with lane.batch.autocast():
                    result = block(lane.dense, *args, **kwargs)
                lane.dense = result[0] if isinstance(result, tuple) else result
                for place, tap in taps.items():
                    ops.gram(flat(tap.h), lane.batch.valid, grams[place])
        del taps
        for place, each in here.items():
            yield place, replace(each, gram=grams.pop(place))


class _Tap:
    """Keeps the input and output of a projection's latest pass."""

    def __init__(self, projection: Any) -> None:
        self.handle = projection.register_forward_hook(self.hook)

    def hook(self, module: Any, args: tuple, y: Tensor) -> None:
        self.h, self.y = args[0], y


class _Sums:
    """The moments of one place, as sums on the device.

    One Gram matrix of h and what is missing, side by side, holds all of them: 55 ms for 2,048
    tokens (D 576, F 1536, one Zen 5 thread), where a float32 product beside it took 76 ms.

    Shapes: channels [5, F]; joint [side, side], F + D wide, F where nothing can be missing, or 0
    where no Gram matrix is wanted.
    """

    def __init__(self, width: int, side: int, device: torch.device) -> None:
        self.width = width
        self.joint = torch.zeros(side, side, device=device)
        self.channels = torch.zeros(5, width, dtype=torch.float64, device=device)

    def add(self, h: Tensor, missing: Tensor | None, valid: Tensor) -> None:
        if len(self.joint):
            both = h if missing is None else torch.cat([h, missing.to(h.dtype)], 1)
            ops.gram(both, valid, self.joint)
        ops.channel_stats(h, valid, self.channels)

    def moments(self) -> Moments:
        tokens = int(self.channels[0, 0])
        mean = self.joint / max(tokens, 1)
        second, error = mean[: self.width, : self.width], mean[self.width :, : self.width]
        energy = float(mean.diagonal()[self.width :].sum())
        return Moments(second, error if len(error) else None, energy, tokens, self.channels)


class Walk:
    """Both networks and the streams through them."""

    def __init__(
        self,
        family: Family,
        dense: Any,
        pruned: Any,
        fit: Sequence[Batch],
        held_out: Sequence[Batch],
        one_pass: bool = False,
        gram: bool = True,
    ) -> None:
        """Start the streams; `pruned` is a copy of `dense`, which `run` cuts in place.

        Without `gram`, moments hold the channels' statistics alone.
        """
        self.family, self.one_pass, self.gram = family, one_pass, gram
        self.dense, self.pruned = family.blocks_of(dense), family.blocks_of(pruned)
        self.places = places(family, dense)
        self.lanes = [lane_of(family, dense, batch, False) for batch in fit]
        self.lanes += [lane_of(family, dense, batch, True) for batch in held_out]

    @torch.no_grad()
    def run(
        self,
        dropped: Collection[Place],
        touched: Collection[Place],
        alpha: float,
        decide: Decide,
    ) -> None:
        """Go through the places; `decide` cuts and repairs each touched one in place.

        Dropped places are passed over, not removed; the one before them takes their part on.

        Raises:
            UserError: activations hold NaN or infinity.
        """
        for position, place in enumerate(self.places):
            if place not in dropped:
                after = self.places[position + 1 :]
                folded = list(itertools.takewhile(lambda p: p in dropped, after))
                if folded or place in touched:
                    self._cut(place, folded, alpha, decide)
                else:
                    self._pass(place)
            elif all(p in dropped for p in self.places[:position]):
                for lane in self.lanes:  # nobody stands before it to take its part on
                    lane.dense = self._half(self.dense, place, lane.dense, lane)
                    if self.one_pass:
                        lane.pruned = lane.dense
            context().progress(position + 1, len(self.places), "prune and repair")

    def _half(self, blocks: Any, place: Place, x: Tensor, lane: Lane) -> Tensor:
        """Run one half of a block."""
        block, (args, kwargs) = blocks[place.block], lane.arguments[place.block]
        with lane.batch.autocast(), alone(self.family, block, place.kind):
            result = block(x, *args, **kwargs)
        return result[0] if isinstance(result, tuple) else result

    def _pass(self, place: Place) -> None:
        """Take both streams through a place that stays as it is."""
        for lane in self.lanes:
            pruned = self._half(self.dense, place, lane.pruned, lane)
            apart = lane.pruned is not lane.dense
            lane.dense = self._half(self.dense, place, lane.dense, lane) if apart else pruned
            lane.pruned = pruned

    def _cut(self, place: Place, folded: list[Place], alpha: float, decide: Decide) -> None:
        block = self.dense[place.block]
        projection = self.family.part(block, place.projection)
        # In one pass the stream lacks nothing but what is left out.
        lacks = folded or not self.one_pass
        side = projection.in_features + (projection.out_features if lacks else 0)
        size = projection.in_features, side if self.gram else 0, projection.weight.device
        sums = [_Sums(*size) for _ in range(2)]
        tap = _Tap(projection)
        tokens = sum(len(lane.batch.valid) for lane in self.lanes)
        bytes_each = self.lanes[0].batch.dtype.itemsize * projection.in_features
        keep = tokens * bytes_each <= KEPT_BYTES
        with hooked([tap.handle]):
            for lane in self.lanes:
                out = self._half(self.dense, place, lane.pruned, lane)
                inner, y = tap.h, tap.y  # before the dense stream passes the same tap
                if lane.pruned is lane.dense:
                    lane.dense = out  # the streams have not parted yet
                else:
                    lane.dense = self._half(self.dense, place, lane.dense, lane)
                for other in folded:
                    lane.dense = self._half(self.dense, other, lane.dense, lane)
                missing = None
                if lacks:
                    missing = _missing(self.family, block, place, lane.dense, out, y)
                sums[lane.held_out].add(flat(inner), missing, lane.batch.valid)
                if self.one_pass:
                    lane.pruned = lane.dense
                elif keep:
                    lane.inner = inner
                    lane.pruned = out - _added(self.family, block, place, y)
        fit, held_out = (s.moments() for s in sums)
        _check(self.family, place, fit)
        # What follows is left out, so nobody else imitates it: the whole way to the target.
        kept = decide(place, fit, held_out, 1.0 if folded else alpha)
        if not self.one_pass:
            for lane in self.lanes:
                self._step(place, lane, kept)

    def _step(self, place: Place, lane: Lane, kept: Tensor) -> None:
        """Take the pruned stream through the place that was just cut.

        Where its h was kept, `lane.pruned` stands before it, and only the new projection is left to
        do: what makes h is not computed again.
        """
        if lane.inner is None:
            lane.pruned = self._half(self.pruned, place, lane.pruned, lane)
            return
        block = self.pruned[place.block]
        with lane.batch.autocast():
            y = self.family.part(block, place.projection)(lane.inner[..., kept])
            lane.pruned = lane.pruned + _added(self.family, block, place, y)
        lane.inner = None


def _norm(family: Family, block: Any, place: Place) -> Any:
    """Return the norm behind a projection, or None."""
    named = getattr(family, place.out_norm) is not None
    return family.part(block, place.out_norm) if named else None


def _added(family: Family, block: Any, place: Place, y: Tensor) -> Tensor:
    """Return what a place adds to the stream for an output of its projection."""
    norm = _norm(family, block, place)
    return y if norm is None else norm(y)


def _missing(
    family: Family, block: Any, place: Place, target: Tensor, out: Tensor, y: Tensor
) -> Tensor:
    """Return what the projection's output lacks to bring the stream to the target [T, D].

    Where a norm stands behind the projection, what the stream lacks is taken back through it: the
    norm's gain is divided out and the token's own root mean square put back.
    """
    error = flat(target).float() - flat(out).float()
    norm = _norm(family, block, place)
    if norm is None:
        return error
    y = flat(y).float()
    gain = family.norm_offset + norm.weight.detach().float()
    least = LEAST_GAIN * gain.abs().mean()
    gain = torch.where(gain.abs() < least, torch.where(gain < 0, -least, least), gain)
    return error / gain * y.square().mean(1, keepdim=True).sqrt()


def _check(family: Family, place: Place, moments: Moments) -> None:
    assert moments.channels is not None
    energy = moments.channels[SUM_SQUARES].sum() + moments.second.diagonal().sum()
    if not bool(torch.isfinite(energy)):
        raise UserError(
            f"prune: the activations of block {place.block} ({family.blocks}.{place.block}) hold "
            "NaN or infinity; check the weights of this block and those before it"
        )
