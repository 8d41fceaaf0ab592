"""The integer program against every combination there is."""

import itertools

import pytest
import torch

from tailor_engine.errors import UserError
from tailor_engine.stages.prune import search
from tailor_engine.stages.prune.search import Candidate, Joint, choose, curve


def library(seed, places=5, sizes=4):
    numbers = torch.rand(places, sizes, 2, generator=torch.Generator().manual_seed(seed)).tolist()
    return [
        [Candidate(block, size, *pair) for size, pair in enumerate(place)]
        for block, place in enumerate(numbers)
    ]


def rise(choice):
    return sum(candidate.rise for candidate in choice)


def cost(choice):
    return sum(candidate.cost for candidate in choice)


@pytest.mark.parametrize("seed", range(5))
def test_the_best_of_all_combinations(seed):
    places = library(seed)
    fitting = sorted((c for c in itertools.product(*places) if cost(c) <= 2.0), key=rise)
    found = choose(places, 2.0, 3)
    assert found == fitting[:3]


@pytest.mark.parametrize("seed", range(5))
def test_what_saves_more_together(seed):
    places = library(seed)
    cheapest = [min(place, key=lambda c: c.cost) for place in places]
    joints = [Joint(tuple(cheapest[:2]), 0.3), Joint(tuple(cheapest[2:4]), 0.2)]

    def saved(choice):
        return sum(j.saving for j in joints if all(m in choice for m in j.members))

    budget = cost(cheapest) - 0.2  # out of reach without the joints
    fitting = [c for c in itertools.product(*places) if cost(c) - saved(c) <= budget]
    found = choose(places, budget, 3, joints=joints)
    assert found == sorted(fitting, key=rise)[:3]
    assert search.cost(found[0], joints) == pytest.approx(cost(found[0]) - saved(found[0]))
    assert search.least(places, joints) == pytest.approx(cost(cheapest) - 0.5)
    with pytest.raises(UserError, match="is below"):
        choose(places, budget)


def test_one_size_for_all_places():
    first, second = library(0, 2, 4)
    small = library(1, 1, 2)[0]  # has none of the larger sizes
    places = [place[::-1] for place in (first, second, small)]  # the dense size first
    choices = search.alike(places)
    assert [tuple(c.size for c in same) for same in choices] == [
        (3, 3, 1), (2, 2, 1), (1, 1, 1), (0, 0, 0),
    ]  # fmt: skip
    merged = search.together(choices, "all")
    assert [c.size for c in merged] == [3, 2, 1, 0]
    assert [c.rise for c in merged] == [rise(same) for same in choices]
    assert [c.cost for c in merged] == [cost(same) for same in choices]


def test_a_size_of_two_numbers_must_not_grow_in_either():
    shapes = ([(3, 2), (2, 2)], [(2, 3), (2, 2), (1, 3)])
    places = [[Candidate(i, size, 0.0, 1.0) for size in sizes] for i, sizes in enumerate(shapes)]
    assert [tuple(c.size for c in same) for same in search.alike(places)] == [((2, 2), (2, 2))]


def test_fewer_combinations_than_asked_for():
    places = library(0, 2, 2)
    assert len(choose(places, 100.0, 9)) == 4


def test_nothing_fits():
    with pytest.raises(UserError, match="is below 10, the least"):
        choose([[Candidate(0, 1, 0.0, 10.0)]], 9.0)


def test_the_curve_falls_with_the_budget():
    places = library(1)
    least = sum(min(candidate.cost for candidate in place) for place in places)
    points = curve(places, [0.9 * least, least, 2 * least, 3 * least])
    assert len(points) == 3  # the first budget is out of reach
    assert all(spent <= n * least * 1.0001 for n, (spent, _) in enumerate(points, 1))
    rises = [loss for _, loss in points]
    assert rises == sorted(rises, reverse=True)
