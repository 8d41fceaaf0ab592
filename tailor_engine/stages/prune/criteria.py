"""Which channels matter: a score for each channel of a gated feed-forward layer; the lowest go.

Notation: h = act(G x) * (U x) in R^F, y = D h; D_:,j is column j of the down projection,
C = E[h h^T] over calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

COUNT, SUM, SUM_SQUARES, SUM_ABSOLUTES = 0, 1, 2, 3  # rows of the channel_stats accumulator


@dataclass
class Channels:
    """What a score may look at; for attention, `down` is its output projection, and no gate is.

    Shapes: gate, up [F, D]; down [D, F]; stats [5, F] or None; slopes [5, F] or None, the same
        statistics of h_j dL/dh_j.
    """

    gate: Tensor
    up: Tensor
    down: Tensor
    stats: Tensor | None = None
    slopes: Tensor | None = None

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


def _taylor(c: Channels) -> Tensor:
    assert c.slopes is not None
    return c.slopes[SUM_SQUARES] / c.slopes[COUNT].clamp_min(1)


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
#: Scores from the Fisher pass's gradients, by name.
FROM_GRADIENTS: dict[str, Callable[[Channels], Tensor]] = {
    # First order: E[(h_j dL/dh_j)^2], with L the divergence to the dense model itself (SDMPrune),
    # whose gradient is zero there, so that of labels sampled from it stands in.
    "taylor": _taylor,
}
#: Optimal brain surgeon: scores that follow from the whole of C, in rounds.
IN_ROUNDS = ("obs", "fisher_obs")
#: Those that need no gradient, or come with the Fisher matrix.
NAMES = (*FROM_WEIGHTS, *FROM_ACTIVATIONS, *IN_ROUNDS)


def score(name: str, channels: Channels) -> Tensor:
    """Return the score of every channel [F] in float64 by a criterion's name."""
    scores = FROM_WEIGHTS | FROM_ACTIVATIONS | FROM_GRADIENTS
    return scores[name](channels).double()


@dataclass
class Rounds:
    """Channels in the order in which they went, and the error after each round."""

    dropped: Tensor  # [removed]
    scores: Tensor  # [F], or one a run of columns, of the first round
    errors: list[float]  # cumulated, in the unit of the metric; one a round


def remove_in_rounds(columns: Tensor, inverse: Tensor, counts: list[int], size: int = 1) -> Rounds:
    """Drop channels round by round, each time those whose loss the others repair best.

    In a round, P = the lowest ||D_:,j||^2 / G_jj; then D_S -= D_P G_PP^-1 G_PS,
    G_SS -= G_SP G_PP^-1 G_PS (a downdate, not a new factorisation), and the error added is
    tr(D_P G_PP^-1 D_P^T). With a `size`, runs of so many columns (a head, a group of heads) go
    together, each run r by its own tr(D_r G_rr^-1 D_r^T).

    Shapes: columns [R, F], the down projection seen through a metric (A^T D for F = A A^T);
        inverse [F, F], G = (C + lambda I)^-1; counts: how many runs go in each round; the results
        number runs.
    Numbers: float64.
    Source: OBS (Hassibi 1993), SparseGPT, SlimGPT equations 3-5, by blocks of channels.
    """
    alive = torch.arange(columns.shape[1] // size, device=columns.device)
    first = scores_of_runs(columns, inverse, size)
    total = torch.zeros((), dtype=torch.float64, device=columns.device)
    dropped, errors = [], []
    for done, count in enumerate(counts):
        scores = scores_of_runs(columns, inverse, size) if done else first
        order = scores.argsort()
        runs, rest = order[:count], order[count:].sort().values
        gone, stay = runs_to_columns(runs, size), runs_to_columns(rest, size)
        inverse_pp = inverse[gone][:, gone]
        factor = torch.linalg.cholesky(inverse_pp)
        columns_p, inverse_ps = columns[:, gone], inverse[gone][:, stay]
        solved = torch.cholesky_solve(columns_p.T, factor)  # G_PP^-1 D_P^T
        total = total + (columns_p.T * solved).sum()
        errors.append(total)
        dropped.append(alive[runs])
        columns = columns[:, stay] - solved.T @ inverse_ps
        half = torch.linalg.solve_triangular(factor, inverse_ps, upper=False)
        inverse = torch.addmm(inverse[stay][:, stay], half.T, half, alpha=-1)
        alive = alive[rest]
    out = torch.cat(dropped) if dropped else alive[:0]
    return Rounds(out, first, torch.stack(errors).tolist() if errors else [])


def scores_of_runs(columns: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Return the error that each run of columns leaves when it goes alone, after repair [F/size].

    Shapes: columns [R, F]; inverse [F, F], see `remove_in_rounds`.
    """
    if size == 1:
        return columns.square().sum(0) / inverse.diagonal()
    count = columns.shape[1] // size
    blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    own = columns.view(-1, count, size).permute(1, 2, 0)  # [run, column, R]
    half = torch.linalg.solve_triangular(torch.linalg.cholesky(blocks), own, upper=False)
    return half.square().sum((1, 2))


def runs_to_columns(runs: Tensor, size: int) -> Tensor:
    """Return the indices of runs of `size` columns, by the numbers of the runs."""
    return (runs[:, None] * size + torch.arange(size, device=runs.device)).flatten()


def even_rounds(removed: int, rounds: int) -> list[int]:
    """Split a number of channels to remove into rounds of nearly equal size."""
    rounds = max(1, min(rounds, removed))
    return [removed // rounds + (i < removed % rounds) for i in range(rounds)] if removed else []


def kept_by_score(scores: Tensor, width: int) -> Tensor:
    """Return the indices of the `width` highest scores, increasing."""
    return scores.argsort(descending=True, stable=True)[:width].sort().values
