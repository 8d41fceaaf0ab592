"""Which channels matter: a score for each channel of a gated feed-forward layer; the lowest go.

Notation: h = act(G x) * (U x) in R^F, y = D h; D_:,j is column j of the down projection,
C = E[h h^T] over calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT, SUM, SUM_SQUARES = 0, 1, 2  # rows of the channel_stats accumulator


@dataclass
class Channels:
    """What a score may look at. Shapes: gate, up [F, D]; down [D, F]; stats [5, F] or None."""

    gate: Tensor
    up: Tensor
    down: Tensor
    stats: Tensor | None = None

    @property
    def second_moment(self) -> Tensor:
        """C_jj, the mean of h_j squared over tokens [F]."""
        assert self.stats is not None
        return self.stats[SUM_SQUARES] / self.stats[COUNT].clamp_min(1)

    @property
    def mean(self) -> Tensor:
        """Mean of h_j over tokens [F]."""
        assert self.stats is not None
        return self.stats[SUM] / self.stats[COUNT].clamp_min(1)

    @property
    def column_energy(self) -> Tensor:
        """Squared norm of each column of the down projection [F]."""
        return self.down.double().square().sum(0)


def _maw(c: Channels) -> Tensor:
    return sum(w.amax(1).abs() + w.amin(1).abs() for w in (c.gate, c.up))  # type: ignore[return-value]


def _l2(c: Channels) -> Tensor:
    return c.gate.norm(dim=1) + c.up.norm(dim=1)


def _variance(c: Channels) -> Tensor:
    return c.gate.var(1) + c.up.var(1)


def _product(c: Channels) -> Tensor:
    return c.gate.norm(dim=1) * c.up.norm(dim=1)


def _activation_norm(c: Channels) -> Tensor:
    return c.second_moment.sqrt()


def _wanda(c: Channels) -> Tensor:
    return c.second_moment.sqrt() * c.down.double().abs().sum(0)


def _cfsp(c: Channels) -> Tensor:
    return c.second_moment * c.column_energy


def _flap(c: Channels) -> Tensor:
    return (c.second_moment - c.mean.square()).clamp_min(0) * c.column_energy


#: Scores from weights alone, by name.
FROM_WEIGHTS: dict[str, Callable[[Channels], Tensor]] = {
    "maw": _maw,  # optiPfair: max + |min| of the gate's and the up projection's rows
    "l2": _l2,
    "variance": _variance,
    "product": _product,
}
#: Scores from one streaming pass over the calibration rows, by name.
FROM_ACTIVATIONS: dict[str, Callable[[Channels], Tensor]] = {
    "activation_norm": _activation_norm,  # Minitron; over tokens, so that batch size is no matter
    "wanda": _wanda,  # Wanda-sp
    "cfsp": _cfsp,
    "flap": _flap,
}
#: Optimal brain surgeon: scores that follow from the whole of C, in rounds.
IN_ROUNDS = ("obs", "fisher_obs")
NAMES = (*FROM_WEIGHTS, *FROM_ACTIVATIONS, *IN_ROUNDS)


def score(name: str, channels: Channels) -> Tensor:
    """Return the score of every channel [F] in float64 by a criterion's name."""
    function = FROM_WEIGHTS.get(name) or FROM_ACTIVATIONS[name]
    return function(channels).double()


@dataclass
class Rounds:
    """Channels in the order in which they went, and the error after each round."""

    dropped: Tensor  # [removed]
    scores: Tensor  # [F] of the first round
    errors: list[float]  # cumulated, in the unit of the metric; one a round


def remove_in_rounds(columns: Tensor, inverse: Tensor, counts: list[int]) -> Rounds:
    """Drop channels round by round, each time those whose loss the others repair best.

    In a round, P = the lowest ||D_:,j||^2 / G_jj; then D_S -= D_P G_PP^-1 G_PS,
    G_SS -= G_SP G_PP^-1 G_PS (a downdate, not a new factorisation), and the error added is
    tr(D_P G_PP^-1 D_P^T).

    Shapes: columns [R, F], the down projection seen through a metric (A^T D for F = A A^T);
        inverse [F, F], G = (C + lambda I)^-1; counts: how many channels go in each round.
    Numbers: float64.
    Source: OBS (Hassibi 1993), SparseGPT, SlimGPT equations 3-5, by blocks of channels.
    """
    alive = torch.arange(columns.shape[1], device=columns.device)
    first, total = None, torch.zeros((), dtype=torch.float64, device=columns.device)
    dropped, errors = [], []
    for count in counts:
        scores = columns.square().sum(0) / inverse.diagonal()
        first = scores if first is None else first
        order = scores.argsort()
        gone, stay = order[:count], order[count:].sort().values
        inverse_pp = inverse[gone][:, gone]
        factor = torch.linalg.cholesky(inverse_pp)
        columns_p, inverse_ps = columns[:, gone], inverse[gone][:, stay]
        solved = torch.cholesky_solve(columns_p.T, factor)  # G_PP^-1 D_P^T
        total = total + (columns_p.T * solved).sum()
        errors.append(total)
        dropped.append(alive[gone])
        columns = columns[:, stay] - solved.T @ inverse_ps
        half = torch.linalg.solve_triangular(factor, inverse_ps, upper=False)
        inverse = torch.addmm(inverse[stay][:, stay], half.T, half, alpha=-1)
        alive = alive[stay]
    if first is None:
        first = columns.square().sum(0) / inverse.diagonal()
    gone = torch.cat(dropped) if dropped else alive[:0]
    return Rounds(gone, first, torch.stack(errors).tolist() if errors else [])


def even_rounds(removed: int, rounds: int) -> list[int]:
    """Split a number of channels to remove into rounds of nearly equal size."""
    rounds = max(1, min(rounds, removed))
    return [removed // rounds + (i < removed % rounds) for i in range(rounds)] if removed else []


def kept_by_score(scores: Tensor, width: int) -> Tensor:
    """Return the indices of the `width` highest scores, increasing."""
    return scores.argsort(descending=True, stable=True)[:width].sort().values
