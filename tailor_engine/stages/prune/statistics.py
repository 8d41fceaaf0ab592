"""One streaming pass over the calibration rows: what pruning and repair must know of each block.

Hooks add to accumulators on the device, through our ops. No activation outlives its batch, nothing
waits for the device, and padding is masked out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tailor_engine import ops
from tailor_engine.data import Rows
from tailor_engine.errors import UserError
from tailor_engine.families import Family
from tailor_engine.stages._mask import attention_mask
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.repair import Moments


@dataclass(frozen=True)
class Batch:
    """Some rows on the device, and the precision of the passes over them.

    Shapes: input_ids, positions [B, L]; valid [B * L].
    """

    input_ids: Tensor
    positions: Tensor
    valid: Tensor
    dtype: torch.dtype = torch.float32

    def autocast(self) -> torch.autocast:
        """Return the context of a forward pass; the residual stream stays float32 in it."""
        mixed = self.dtype != torch.float32
        return torch.autocast(
            self.valid.device.type, self.dtype if mixed else torch.bfloat16, enabled=mixed
        )

    def exact(self) -> torch.autocast:
        """Return the context of what hooks compute: a Gram matrix in bfloat16 would be useless."""
        return torch.autocast(self.valid.device.type, torch.bfloat16, enabled=False)


def batches(rows: Rows, size: int, device: torch.device, dtype: torch.dtype) -> list[Batch]:
    """Cut rows into batches; what is computed from them does not depend on the size."""
    return [
        Batch(
            rows.input_ids[i : i + size].to(device),
            rows.position_ids[i : i + size].to(device),
            rows.valid[i : i + size].reshape(-1).to(device),
            dtype,
        )
        for i in range(0, len(rows), size)
    ]


def flat(x: Tensor) -> Tensor:
    """View [B, L, D] as [T, D]."""
    return x.reshape(-1, x.shape[-1])


@contextlib.contextmanager
def hooked(handles: list[Any]) -> Iterator[None]:
    """Remove hooks at the end, whatever happens."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class BlockStatistics:
    """Sums over the tokens seen so far.

    Shapes: channels [5, F] (see ops.channel_stats); gram [F, F]; influence [4] (see
    ops.block_influence); fisher [D, D], the sum of g g^T of the projection's output; slopes [5, F],
    channel_stats of h dL/dh.
    """

    channels: Tensor
    influence: Tensor
    gram: Tensor | None = None
    fisher: Tensor | None = None
    slopes: Tensor | None = None

    @property
    def tokens(self) -> float:
        """Number of tokens counted."""
        return float(self.channels[0, 0])

    def moments(self) -> Moments:
        """Return the second moment a token."""
        assert self.gram is not None
        return Moments(self.gram / self.tokens, tokens=int(self.tokens))


def empty(linear: Any, gram: bool, fisher: bool, slopes: bool = False) -> BlockStatistics:
    """Return accumulators for one matrix that writes to the stream."""
    device, width, hidden = linear.weight.device, linear.in_features, linear.out_features
    wide = {"dtype": torch.float64, "device": device}
    return BlockStatistics(
        torch.zeros(5, width, **wide),
        torch.zeros(4, **wide),
        torch.zeros(width, width, device=device) if gram else None,
        torch.zeros(hidden, hidden, device=device) if fisher else None,
        torch.zeros(5, width, **wide) if slopes else None,
    )


@dataclass
class _Watch:
    """The hooks of one block, and the batch under way."""

    into: BlockStatistics
    batch: Batch | None = None

    def inner(self, module: Any, args: tuple) -> None:
        assert self.batch is not None
        h = flat(args[0]).detach()
        with self.batch.exact():
            ops.channel_stats(h, self.batch.valid, self.into.channels)
            if self.into.gram is not None:
                ops.gram(h, self.batch.valid, self.into.gram)

    def output(self, module: Any, args: tuple, y: Tensor) -> None:
        assert self.batch is not None
        batch, fisher, slopes = self.batch, self.into.fisher, self.into.slopes
        h = None if slopes is None else flat(args[0]).detach()

        def add(gradient: Tensor) -> None:
            with batch.exact():
                ops.gram(flat(gradient), batch.valid, fisher)
                if h is not None:
                    slope = flat(gradient).to(h.dtype) @ module.weight.detach().to(h.dtype)
                    ops.channel_stats(h * slope, batch.valid, slopes)

        if y.requires_grad:
            y.register_hook(add)

    def block(self, module: Any, args: tuple, result: Any) -> None:
        assert self.batch is not None
        x = flat(args[0].detach())
        y = flat((result[0] if isinstance(result, tuple) else result).detach()).to(x.dtype)
        with self.batch.exact():
            ops.block_influence(x, y, self.batch.valid, self.into.influence)


def collect(
    family: Family,
    network: Any,
    found: Sequence[Batch],
    gram: bool,
    run: Callable[[Batch], None] | None = None,
    fisher: bool = False,
) -> list[BlockStatistics]:
    """Return the statistics of every block's down projection; see `collect_parts`."""
    return list(
        collect_parts(family, network, found, ("down",), gram, run, fisher)["down"].values()
    )


def collect_parts(
    family: Family,
    network: Any,
    found: Sequence[Batch],
    parts: Sequence[str],
    gram: bool,
    run: Callable[[Batch], None] | None = None,
    fisher: bool = False,
    slopes: bool = False,
) -> dict[str, dict[int, BlockStatistics]]:
    """Return {part: {block: statistics}} of "down", "output" or both, from one pass over batches.

    `run` defaults to a forward pass. Blocks whose part is left out are not among the results; each
    block's influence is with all its parts.
    """
    statistics: dict[str, dict[int, BlockStatistics]] = {part: {} for part in parts}
    watches, handles = [], []
    for index, block in enumerate(family.blocks_of(network)):
        for part in (part for part in parts if family.has(block, part)):
            linear = family.part(block, part)
            statistics[part][index] = empty(linear, gram, fisher, slopes)
            watch = _Watch(statistics[part][index])
            watches.append(watch)
            handles.append(linear.register_forward_pre_hook(watch.inner))
            handles.append(block.register_forward_hook(watch.block))
            if fisher:
                handles.append(linear.register_forward_hook(watch.output))
    with hooked(handles):
        for done, batch in enumerate(found):
            for watch in watches:
                watch.batch = batch
            if run is not None:
                run(batch)
            else:
                forward(family, network, batch)
            context().progress(done + 1, len(found), "statistics")
    for part in parts:
        check_finite(family, statistics[part])
    return statistics


@torch.no_grad()
def forward(family: Family, network: Any, batch: Batch) -> Tensor:
    """Run the body; positions that restart give each packed document its own attention."""
    body = family.body_of(network)
    mask = attention_mask(network, batch.positions)
    with batch.autocast():
        output = body(
            input_ids=batch.input_ids,
            position_ids=batch.positions,
            attention_mask=mask,
            use_cache=False,
        )
    return output.last_hidden_state


def check_finite(family: Family, statistics: Mapping[int, BlockStatistics]) -> None:
    """Require finite activations, with one look at the device for all blocks.

    Raises:
        UserError: names the first block whose activations hold NaN or infinity.
    """
    if not statistics:
        return
    # What a block adds to the stream can overflow where its own channels do not.
    energies = [s.channels[2].sum() + s.influence.sum() for s in statistics.values()]
    finite = torch.isfinite(torch.stack(energies)).tolist()
    if not all(finite):
        index = list(statistics)[finite.index(False)]
        raise UserError(
            f"prune: the activations of block {index} ({family.blocks}.{index}) hold NaN or "
            "infinity; check the weights of this block and those before it"
        )


def check_weights(network: Any) -> None:
    """Require finite weights.

    Raises:
        UserError: names the first matrix that holds NaN or infinity.
    """
    named = list(network.named_parameters())
    finite = torch.stack([torch.isfinite(p.detach().sum()) for _, p in named]).tolist()
    for (name, _), good in zip(named, finite, strict=True):
        # A sum of huge but finite weights overflows too.
        if not good and not bool(torch.isfinite(network.get_parameter(name)).all()):
            raise UserError(f"prune: the weight {name} holds NaN or infinity")
