"""Choose what to cut over all axes at once: one candidate a place, least loss within a budget.

The candidates of a place are the sizes it may have, each with the loss that it costs after its own
repair and with what it takes of the budget (parameters, bytes or milliseconds). Losses in nats a
token add up over places, so that the best combination is an integer program.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import block_diag, csr_array

from tailor_engine.errors import UserError


@dataclass(frozen=True)
class Candidate:
    """One size of one place. Numbers: rise in nats a token; cost in the budget's own unit."""

    place: Hashable
    size: Any
    rise: float
    cost: float


GAP = 1e-4  # of the best sum: neighbours differ by less, and proving the last digit takes minutes
Library = Sequence[Sequence[Candidate]]
Choice = tuple[Candidate, ...]


def least(library: Library) -> float:
    """Return the cost of the cheapest combination."""
    return sum(min(candidate.cost for candidate in place) for place in library)


def choose(library: Library, budget: float, count: int = 1, apart: int = 1) -> list[Choice]:
    """Return the `count` best combinations whose costs fit the budget, best first.

    Each further one differs from all before it in `apart` places at least. By HiGHS: half a second
    for 61 places of 24 sizes each.

    Raises:
        UserError: nothing fits; the line says what the least is.
    """
    smallest = least(library)
    if smallest > budget:
        raise UserError(
            f"prune: the budget of {budget:,.4g} is below {smallest:,.4g}, the least that the "
            "axes and the floor leave; raise the budget, lower floor or add an axis"
        )
    flat = [candidate for place in library for candidate in place]
    rises, costs = (np.array([getattr(c, name) for c in flat]) for name in ("rise", "cost"))
    one_each = block_diag([np.ones((1, len(place))) for place in library])
    rules = [
        LinearConstraint(one_each, 1, 1),
        # Relative to the budget: the solver's tolerance is absolute.
        LinearConstraint(costs[None] / budget, -np.inf, 1),
    ]
    found: list[Choice] = []
    while len(found) < count:
        with _silence():
            result = milp(
                rises,
                integrality=np.ones(len(flat)),
                bounds=Bounds(0, 1),
                constraints=rules,
                options={"mip_rel_gap": GAP},
            )
        if result.x is None:  # fewer combinations than were asked for
            break
        picked = np.flatnonzero(result.x > 0.5)
        found.append(tuple(flat[i] for i in picked))
        again = csr_array((np.ones(len(picked)), ([0] * len(picked), picked)), (1, len(flat)))
        rules.append(LinearConstraint(again, -np.inf, len(library) - apart))
    return found


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep HiGHS quiet: where it repairs a solution it writes a line to the process's output."""
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def curve(library: Library, budgets: Sequence[float]) -> list[tuple[float, float]]:
    """Return (cost, predicted rise) of the best combination at each budget that can be reached."""
    best = [choose(library, budget)[0] for budget in budgets if least(library) <= budget]
    return [(sum(c.cost for c in choice), sum(c.rise for c in choice)) for choice in best]
