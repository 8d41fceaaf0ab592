"""The streaming passes: every row goes through the network once, a part of them backward too."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailor_engine.data import Corpus, Data, Rows
from tailor_engine.errors import UserError
from tailor_engine.families import Family
from tailor_engine.model import Model
from tailor_engine.ops.channel_stats import ABS_MAX
from tailor_engine.stages._stage import context
from tailor_engine.stages.prune.fisher import collect_parts_with_fisher, metric
from tailor_engine.stages.prune.places import PROJECTIONS
from tailor_engine.stages.prune.statistics import (
    BlockStatistics,
    batches,
    check_weights,
    collect_parts,
)

if TYPE_CHECKING:
    from tailor_engine.diagnostics import DiagnoseConfig

PROJECTED = tuple(PROJECTIONS.values())  # the matrices that write to the stream
Parts = dict[str, dict[int, BlockStatistics]]  # by matrix and block


@dataclass
class Measured:
    """What one block showed: sums of each corpus over channels, both halves' joint statistics.

    Shapes: domain, general [5, F] (see ops.channel_stats), of the feed-forward channels; by kind
    of half together[kind].gram [F, F], factors[kind] [D, D], its Fisher factor. A half that is
    left out has no entry.
    """

    domain: Tensor | None
    general: Tensor | None
    together: dict[str, BlockStatistics]
    factors: dict[str, Tensor]

    @property
    def block(self) -> BlockStatistics:
        """Return the statistics of either half: the block's own sums are in both."""
        return next(iter(self.together.values()))


@dataclass
class Chosen:
    """Calibration rows of the two corpora; either may be missing, not both."""

    domain: Rows | None
    general: Rows | None

    def named(self) -> list[tuple[str, Rows]]:
        """Return what there is, with its name."""
        pairs = (("domain", self.domain), ("general", self.general))
        return [(name, rows) for name, rows in pairs if rows is not None]

    @property
    def total(self) -> int:
        """Number of rows."""
        return sum(len(rows) for _, rows in self.named())

    def share(self, rows: Rows, count: int) -> int:
        """Return how many of `count` rows of both fall on this corpus; at least one."""
        return min(len(rows), max(1, round(count * len(rows) / self.total)))

    def sample(self, count: int) -> Rows:
        """Return the first rows of each corpus, about `count` in all."""
        return Rows.concat([rows[: self.share(rows, count)] for _, rows in self.named()])


def check(family: Family, network: Any) -> None:
    """Refuse a network whose weights cannot be read as numbers.

    Raises:
        UserError: quantized or wrapped matrices, NaN or infinity.
    """
    for index, name, module in family.linears(network):
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise UserError(
                f"diagnose: {name} of block {index} is a {type(module).__name__}; diagnose the "
                "model before it is quantized or wrapped"
            )
    with _told_by_diagnose():
        check_weights(network)


def choose_rows(model: Model, config: DiagnoseConfig, data: Data) -> tuple[Chosen, list[str]]:
    """Take calibration rows of the domain and of general text, in the shares of domain_weight."""
    weight = config.domain_weight if data.general is not None else 1.0
    if data.general is None and config.domain_weight == 0:
        raise UserError("diagnose: domain_weight 0 asks for general text alone; none was given")
    wanted = round(config.rows * weight)
    notes: list[str] = []

    def rows(corpus: Corpus | None, count: int) -> Rows | None:
        if corpus is None or not count:
            return None
        found = corpus.rows(
            "calibration", model.tokenizer, config.sequence_length, count, config.seed
        )
        if len(found) < count:
            line = f"{len(found)} rows of {corpus.name} instead of {count}: there is no more text"
            notes.append(line)
            context().note(line)
        return found

    return Chosen(rows(data.domain, wanted), rows(data.general, config.rows - wanted)), notes


@dataclass(frozen=True)
class _Some(Family):
    """A family that shows only some neighbouring blocks of a network."""

    first: int = 0
    last: int = 0

    def blocks_of(self, network: nn.Module) -> nn.ModuleList:
        return super().blocks_of(network)[self.first : self.last]


def groups(family: Family, network: Any, limit: float) -> Iterator[tuple[int, int]]:
    """Cut the blocks into runs (first, last) whose sums fit in `limit` bytes; one run at best."""
    first, held = 0, 0.0
    blocks = family.blocks_of(network)
    for index, block in enumerate(blocks):
        there = [family.part(block, part) for part in PROJECTED if family.has(block, part)]
        # Two corpora's float32 sums exist at once, and the Fisher factor in float64.
        need = sum(8.0 * (m.in_features**2 + 2 * m.out_features**2) for m in there)
        if index > first and held + need > limit:
            yield first, index
            first, held = index, 0.0
        held += need
    yield first, len(blocks)


def collect_all(
    family: Family,
    network: Any,
    first: int,
    last: int,
    rows: Chosen,
    config: DiagnoseConfig,
    dtype: torch.dtype,
) -> list[Measured]:
    """Return the sums of blocks first to last - 1 over all rows.

    The leading rows of each corpus run forward and backward for the Fisher matrices, the others
    forward alone; the sums of both are one.

    Raises:
        UserError: activations that are not finite.
    """
    some = _Some(**vars(family), first=first, last=last)
    whole = len(family.blocks_of(network)) == last - first

    def cut(part: Rows) -> list[Any]:
        return batches(part, config.batch_size, network.device, dtype)

    sums: Parts = {}
    own: dict[str, dict[int, Tensor]] = {}
    with _told_by_diagnose("" if whole else f"blocks {first} to {last - 1}"):
        for number, (name, part) in enumerate(rows.named()):
            count = rows.share(part, config.fisher_rows)
            seed = config.seed + number
            found = collect_parts_with_fisher(
                some, network, cut(part[:count]), PROJECTED, True, seed
            )
            own[name] = {i: s.channels.clone() for i, s in found["down"].items()}
            sums = _added(sums, found)
        factors = {part: {i: metric(s) for i, s in of.items()} for part, of in sums.items()}
        for s in itertools.chain(*(of.values() for of in sums.values())):
            s.fisher = None
        for name, part in rows.named():
            rest = part[rows.share(part, config.fisher_rows) :]
            if len(rest):
                found = collect_parts(some, network, cut(rest), PROJECTED, True)
                for index, new in found["down"].items():
                    _add_channels(own[name][index], new.channels)
                sums = _added(sums, found)

    def of_block(parts: Any, index: int) -> dict[str, Any]:
        kinds = {kind: parts[part] for kind, part in PROJECTIONS.items()}
        return {kind: of[index] for kind, of in kinds.items() if index in of}

    return [
        Measured(
            own.get("domain", {}).get(index),
            own.get("general", {}).get(index),
            of_block(sums, index),
            of_block(factors, index),
        )
        for index in range(last - first)
    ]


def _added(sums: Parts, more: Parts) -> Parts:
    """Add the sums of another pass, in place; the first pass is kept as it is."""
    if not sums:
        return more
    for part, of in sums.items():
        for index, mine in of.items():
            new = more[part][index]
            _add_channels(mine.channels, new.channels)
            mine.influence += new.influence
            for name in ("gram", "fisher"):
                matrix, other = getattr(mine, name), getattr(new, name)
                if matrix is not None and other is not None:
                    matrix += other
                setattr(new, name, None)
    return sums


def _add_channels(mine: Tensor, new: Tensor) -> None:
    """Add the statistics of other tokens: sums add up, the absolute maximum does not."""
    peak = torch.maximum(mine[ABS_MAX], new[ABS_MAX])
    mine += new
    mine[ABS_MAX] = peak


class _told_by_diagnose:
    """Make the errors of the shared passes speak of this command, and of the right blocks."""

    def __init__(self, blocks: str = "") -> None:
        self.blocks = blocks

    def __enter__(self) -> None:
        """Do nothing."""

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Replace the error's first word, or its number of a block where blocks were cut off."""
        if not isinstance(error, UserError):
            return
        words = str(error).removeprefix("prune: ")
        if self.blocks and words.startswith("the activations"):
            words = f"the activations of {self.blocks} hold NaN or infinity; check the weights"
        raise UserError(f"diagnose: {words}") from error
