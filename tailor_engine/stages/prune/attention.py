"""Which heads matter: groups (a key-value head with its query heads), and query heads within them.

Attention's output is y = O o with the heads' outputs o side by side, so all that holds for the down
projection of channels holds for O, with runs of columns in place of single ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from tailor_engine.stages.prune import criteria
from tailor_engine.stages.prune.criteria import Channels, remove_in_rounds, runs_to_columns


class Heads(NamedTuple):
    """The size of an attention: key-value heads, and query heads that share each of them."""

    groups: int
    queries: int


def sizes(dense: Heads, head_dim: int, rounding: int) -> list[Heads]:
    """Return the sizes that may be chosen: fewer groups, or fewer query heads in every group.

    Numbers: the output projection's columns stay a multiple of `rounding`, as far as they are one.
    """
    found = [Heads(g, dense.queries) for g in range(dense.groups, 0, -1)]
    found += [Heads(dense.groups, q) for q in range(dense.queries - 1, 0, -1)]
    step = math.gcd(rounding, dense.groups * dense.queries * head_dim)
    return [heads for heads in found if heads.groups * heads.queries * head_dim % step == 0]


def select(
    columns: Tensor, inverse: Tensor | None, scores: Tensor, dense: Heads, size: Heads
) -> Tensor:
    """Return the query heads that stay [g, q], a row for each key-value head, increasing.

    With the inverse second moment groups go one by one, each time the one that the others repair
    best (see `criteria.remove_in_rounds`); without it by the sum of their heads' scores.

    Shapes: columns [R, H d], the output projection seen through a metric; inverse [H d, H d];
        scores [H], of the query heads.
    """
    by_group = scores.view(dense.groups, dense.queries)
    if inverse is None or size.groups == dense.groups:
        groups = criteria.kept_by_score(by_group.sum(1), size.groups)
    else:
        width = columns.shape[1] // dense.groups
        gone = remove_in_rounds(columns, inverse, [1] * (dense.groups - size.groups), width).dropped
        left = set(range(dense.groups)) - set(gone.tolist())
        groups = torch.tensor(sorted(left), device=columns.device)
    best = by_group[groups].argsort(dim=1, descending=True, stable=True)[:, : size.queries]
    return best.sort(1).values + groups[:, None] * dense.queries


def columns_of(heads: Tensor, head_dim: int) -> Tensor:
    """Return the output projection's columns of some query heads, increasing."""
    return runs_to_columns(heads.flatten(), head_dim)


def scores(name: str, output: Tensor, stats: Tensor, head_dim: int) -> Tensor:
    """Return the score of each query head by a criterion of activations: the sum over its columns.

    Shapes: output [D, H d]; stats [5, H d], see ops.channel_stats.

    Raises:
        ValueError: the criterion looks at gate and up projections, which attention lacks.
    """
    if name not in criteria.FROM_ACTIVATIONS:
        raise ValueError(f"criterion {name} does not score heads; those of activations do")
    return criteria.score(name, Channels(output, output, output, stats)).view(-1, head_dim).sum(1)


def removal_error(columns: Tensor, inverse: Tensor, gone: Tensor) -> float:
    """Return the error that these columns leave when they go together, after repair.

    Shapes: columns [R, F], seen through a metric; inverse [F, F]; gone [n].
    """
    if not len(gone):
        return 0.0
    part = columns[:, gone]
    solved = torch.linalg.solve(inverse[gone][:, gone], part.T)
    return float((part.T * solved).sum())
