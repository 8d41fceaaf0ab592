"""Which heads matter: groups (a key-value head with its query heads), and query heads within them.

Attention's output is y = O o with the heads' outputs o side by side, so all that holds for the down
projection of channels holds for O, with runs of columns in place of single ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tailor_engine.families import Family
from tailor_engine.stages.prune import criteria
from tailor_engine.stages.prune.criteria import Channels, Rounds, runs_to_columns
from tailor_engine.stages.prune.repair import factorise, inverse, ridge_for
from tailor_engine.stages.prune.statistics import BlockStatistics


def group_columns(family: Family, block: Any) -> int:
    """Return how many columns of the output projection one key-value head has."""
    queries, keys = family.heads(block)
    return queries // keys * int(family.part(block, "attention").head_dim)


def scores(
    family: Family,
    block: Any,
    name: str,
    statistics: BlockStatistics,
    size: int,
    ridge: float,
    metric: Tensor | None = None,
) -> Tensor:
    """Return the score of each run of `size` columns by a criterion's name: a head or a group.

    For a criterion of single channels, the sum of a run's. `metric` is the Fisher's factor A of
    "fisher_obs".

    Raises:
        ValueError: the criterion looks at gate and up projections, which attention lacks.
    """
    if name in criteria.IN_ROUNDS:
        return in_rounds(family, block, statistics, size, [], ridge, metric).scores
    if name not in criteria.FROM_ACTIVATIONS:
        raise ValueError(f"criterion {name} does not score heads; those of activations do")
    weight = family.part(block, "output").weight.detach().float()
    found = Channels(weight, weight, weight, statistics.channels)
    return criteria.score(name, found).view(-1, size).sum(1)


def in_rounds(
    family: Family,
    block: Any,
    statistics: BlockStatistics,
    size: int,
    counts: list[int],
    ridge: float,
    metric: Tensor | None = None,
) -> Rounds:
    """Drop heads or groups round by round; the errors over all counts cost one factorisation.

    Numbers: errors in nats a token with the Fisher's factor and after halving, see
        `criteria.remove_in_rounds`.
    """
    weight = family.part(block, "output").weight.detach().double()
    columns = weight if metric is None else metric.T @ weight
    moments = statistics.moments()
    damped = factorise(moments.second, ridge_for(ridge, moments.tokens, weight.shape[1]))
    return criteria.remove_in_rounds(columns, inverse(damped), counts, size)


def keep_groups(family: Family, block: Any, group_scores: Tensor, count: int) -> Tensor:
    """Return the query heads of the `count` best groups [count, q], as `cut.cut_heads` takes them.

    Raises:
        ValueError: `count` is not between 1 and the block's key-value heads.
    """
    queries, keys = family.heads(block)
    if not 1 <= count <= keys:
        raise ValueError(f"expected 1 to {keys} groups to keep, got {count}")
    groups = criteria.kept_by_score(group_scores, count)
    return runs_to_columns(groups, queries // keys).view(count, -1)


def keep_queries(family: Family, block: Any, head_scores: Tensor, count: int) -> Tensor:
    """Return the `count` best query heads of every group [keys, count], so that GQA stays regular.

    Raises:
        ValueError: `count` is not between 1 and a group's query heads.
    """
    queries, keys = family.heads(block)
    each = queries // keys
    if not 1 <= count <= each:
        raise ValueError(f"expected 1 to {each} query heads a group to keep, got {count}")
    best = head_scores.view(keys, each).topk(count, 1).indices
    starts = torch.arange(keys, device=best.device)[:, None] * each
    return best.sort(1).values + starts
