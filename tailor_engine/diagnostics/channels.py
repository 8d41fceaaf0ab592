"""What one block's channels do: importance, energy, dead, outlying and redundant ones."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tailor_engine.diagnostics.measure import Measured
from tailor_engine.families import Family
from tailor_engine.ops.block_influence import COUNT as TOKENS
from tailor_engine.ops.block_influence import SUM_COSINE, SUM_NORM_X, SUM_NORM_Y
from tailor_engine.ops.channel_stats import ABS_MAX, COUNT, SUM_SQUARES
from tailor_engine.stages.prune import criteria
from tailor_engine.stages.prune.criteria import Channels
from tailor_engine.stages.prune.repair import factorise, inverse, ridge_for

if TYPE_CHECKING:
    from tailor_engine.diagnostics import DiagnoseConfig

TWIN = 0.98  # channels of this cosine and more are twins: either can speak for both
MOST = 0.9  # share of a layer's importance whose channels are counted
#: What a layer without channels has none of, and what it has no figure for.
COUNTS = ("peak_channel", "dead", "outliers", "domain_only", "general_only", "twins",
          "channels_of_most")  # fmt: skip
FIGURES = ("peak_ratio", "effective_rank", "effective_rank_scaled", "explained")
TINY = torch.finfo(torch.float64).tiny


@dataclass
class Layer:
    """One layer's rows of channels.parquet, none where it has no channels, its row of layers."""

    columns: dict[str, np.ndarray]
    numbers: dict[str, Any]


def examine(
    family: Family, network: Any, index: int, found: Measured, config: DiagnoseConfig
) -> Layer:
    """Turn the sums over a block's tokens into numbers a channel and a layer."""
    block = family.blocks_of(network)[index]
    influence = found.block.influence
    tokens = float(influence[TOKENS])
    numbers = {
        "layer": index,
        "width": 0,
        "parameters": sum(p.numel() for p in block.parameters()),
        "tokens": int(tokens),
        "block_influence": 1 - float(influence[SUM_COSINE]) / tokens,
        "norm_in": float(influence[SUM_NORM_X]) / tokens,
        "norm_out": float(influence[SUM_NORM_Y]) / tokens,
        **dict.fromkeys(COUNTS, 0),
        **dict.fromkeys(FIGURES, math.nan),
    }
    if "mlp" not in found.together:
        return Layer({}, numbers)
    gate, up, down = (
        family.part(block, name).weight.detach().float() for name in ("gate", "up", "down")
    )
    together, width = found.together["mlp"], down.shape[1]
    channels = Channels(gate, up, down, together.channels)
    second = together.moments().second.double()
    ridge = ridge_for(config.ridge, int(together.tokens), width)
    cosine = _cosine(second)
    scores, explained = _solved(down, second, cosine, found.factors["mlp"], ridge)
    for name in (*criteria.FROM_WEIGHTS, *criteria.FROM_ACTIVATIONS):
        scores[name] = criteria.score(name, channels)
    twin, likeness = _twins(cosine)
    columns = _energies(found, channels, config)
    columns |= {"explained": explained, "twin": twin, "twin_cosine": likeness}
    columns |= {f"importance_{name}": scores[name] for name in criteria.NAMES}
    peak_ratio, peak_channel = columns["peak_ratio"].max(0)
    numbers |= {"width": width, "peak_ratio": float(peak_ratio), "peak_channel": int(peak_channel)}
    numbers |= {
        name: int(columns[column].sum())
        for name, column in (
            ("dead", "dead"),
            ("outliers", "outlier"),
            ("domain_only", "domain_only"),
            ("general_only", "general_only"),
        )
    }
    numbers |= {
        "effective_rank": effective_rank(second),
        "effective_rank_scaled": effective_rank(cosine),
        "explained": float(explained.mean()),
        "twins": int((likeness.abs() >= TWIN).sum()),
        "channels_of_most": _holders(scores["fisher_obs"]),
    }
    arrays = {name: _array(column) for name, column in columns.items()}
    head = {"layer": np.full(width, index), "channel": np.arange(width)}
    return Layer(head | arrays, numbers)


def _array(column: Tensor) -> np.ndarray:
    """Return a column as it is stored: float32 holds more digits than the rows support."""
    return (column.float() if column.is_floating_point() else column).cpu().numpy()


def _solved(
    down: Tensor, second: Tensor, cosine: Tensor, factor: Tensor, ridge: float
) -> tuple[dict[str, Tensor], Tensor]:
    """Return what follows from the inverse of C: OBS scores and explained shares.

    All in channels of energy 1, h_j / sqrt(C_jj), so that each is damped by a share of its own
    energy. A channel's explained share is what the others tell of it, 1 - 1 / (C_jj G_jj).
    """
    solved = factorise(cosine, ridge)
    damped = inverse(solved)
    diagonal = cosine.diagonal() + solved.ridge * cosine.diagonal().mean()
    explained = (1 - 1 / (diagonal * damped.diagonal()).clamp_min(1)).clamp(0, 1)
    columns = down.double() * second.diagonal().clamp_min(0).sqrt()
    seen = factor.T @ columns
    scores = {
        name: criteria.scores_of_runs(through, damped, 1)
        for name, through in (("obs", columns), ("fisher_obs", seen))
    }
    return scores, explained


def _energies(found: Measured, channels: Channels, config: DiagnoseConfig) -> dict[str, Tensor]:
    """Return energies a corpus, and which channels are dead, outlying or one corpus' own."""
    stats = found.together["mlp"].channels
    energy = channels.second_moment
    contribution = criteria.score("cfsp", channels)
    dead = contribution <= config.dead * contribution.median()
    typical = energy.sqrt().median().clamp_min(TINY)
    columns = {
        "mean": channels.mean,
        "variance": (energy - channels.mean.square()).clamp_min(0),
        "energy": energy,
        "peak": stats[ABS_MAX],
        "peak_ratio": stats[ABS_MAX] / typical,
        "dead": dead,
        "outlier": stats[ABS_MAX] > config.outlier * typical,
    }
    ratio = torch.full_like(energy, math.nan)
    for name, own in (("domain", found.domain), ("general", found.general)):
        columns[f"energy_{name}"] = ratio if own is None else _second_moment(own)
    if found.domain is not None and found.general is not None:
        # The floor keeps what is dead in both from looking like a difference.
        least = max(config.dead, 1e-12) * energy.median().clamp_min(TINY)
        ratio = torch.log2((columns["energy_domain"] + least) / (columns["energy_general"] + least))
    bound = math.log2(config.contrast)
    return columns | {
        "log2_ratio": ratio,
        "domain_only": (ratio >= bound) & ~dead,
        "general_only": (ratio <= -bound) & ~dead,
    }


def _second_moment(stats: Tensor) -> Tensor:
    return stats[SUM_SQUARES] / stats[COUNT].clamp_min(1)


def _cosine(second: Tensor) -> Tensor:
    """Scale a second moment so that every channel has energy 1; channels without any stay 0."""
    scale = second.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, 1 / scale.clamp_min(TINY), 0)
    return second * scale * scale[:, None]


def _twins(cosine: Tensor) -> tuple[Tensor, Tensor]:
    """Return each channel's likest other channel, and the cosine between the two."""
    others = cosine.clone()
    others.fill_diagonal_(0)
    twin = others.abs().argmax(1)
    return twin, others.gather(1, twin[:, None])[:, 0]


def effective_rank(matrix: Tensor) -> float:
    """Return the exponential of the entropy of a Gram matrix' eigenvalues.

    Source: Roy and Vetterli 2007, "The effective rank", with eigenvalues of the Gram matrix.
    """
    values = torch.linalg.eigvalsh(
        matrix.float() / matrix.diagonal().mean().clamp_min(TINY).float()
    )
    share = values.double().clamp_min(0)
    share = share / share.sum().clamp_min(TINY)
    return float(torch.special.entr(share).sum().exp())


def _holders(scores: Tensor) -> int:
    """Return how many channels hold 90 % of a layer's importance."""
    ordered = scores.clamp_min(0).sort(descending=True).values.cumsum(0)
    return int((ordered < MOST * ordered[-1]).sum()) + 1


def agreement(layers: Sequence[Layer]) -> dict[str, Any]:
    """Return the rank correlation between the criteria, mean over layers: a row a criterion."""
    total = np.zeros((len(criteria.NAMES),) * 2)
    with_channels = [layer for layer in layers if layer.columns]
    for layer in with_channels:
        scores = np.stack([layer.columns[f"importance_{name}"] for name in criteria.NAMES], 1)
        ranks = scores.argsort(0).argsort(0)
        total += np.nan_to_num(np.corrcoef(ranks, rowvar=False))
    table: dict[str, Any] = {"criterion": list(criteria.NAMES)}
    return table | dict(zip(criteria.NAMES, total / max(1, len(with_channels)), strict=True))
