"""Rounds of pruning and distilling are plain stages, each with its part."""

import math

import pytest
import yaml

from tailor_engine import pipeline
from tailor_engine.errors import UserError
from tailor_engine.io import recipes
from tailor_engine.stages._repeat import expand
from tests.pruning import CONFIG, corpora
from tests.tiny import tiny
from tests.workshop import QUICK

INNER = [{"prune": {"target": 0.7}}, {"distill": {"tokens": 100}}]


def test_each_round_has_its_part():
    plan = list(expand(["correct", {"repeat": {"times": 3, "stages": INNER}}]))
    assert [name if isinstance(name, str) else next(iter(name)) for name in plan] == [
        "correct", *["prune", "distill"] * 3,
    ]  # fmt: skip
    prunes, distills = plan[1::2], plan[2::2]
    assert math.prod(item["prune"]["target"] for item in prunes) == pytest.approx(0.7)
    assert [item["distill"]["tokens"] for item in distills] == [33, 33, 34]
    [first, _] = expand([{"repeat": {"times": 2, "stages": ["distill"]}}])
    assert first["distill"]["steps"] == 100  # of the 200 that nobody changed
    [first, _] = expand([{"repeat": {"times": 2, "stages": [{"prune": {"latency": 0.81}}]}}])
    assert first["prune"]["latency"] == pytest.approx(0.9)


def test_bad_rounds_are_one_line():
    cases = [
        ({"times": 3}, "mapping with times and stages"),
        ({"times": 0, "stages": INNER}, "times must be 1..16, got 0"),
        ({"times": 2, "stages": "prune"}, "must be a list of stages"),
        ({"times": 2, "stages": [{"prune": {"bytes": 9}}]}, "takes a share here .*, got bytes"),
        ({"times": 2, "stages": ["prun"]}, "did you mean 'prune'"),
    ]
    for section, words in cases:
        with pytest.raises(UserError, match=words):
            list(expand([{"repeat": section}]))
        values = {"model": "m", "domain": "d", "stages": [{"repeat": section}]}
        with pytest.raises(UserError, match=words):
            recipes.check(values, "r", "r.yaml")


def test_a_recipe_says_what_will_run(tmp_path):
    path = tmp_path / "r.yaml"
    stages = [{"repeat": {"times": 2, "stages": INNER}}, {"quantize": {}}]
    path.write_text(yaml.safe_dump({"model": "m", "domain": "d", "stages": stages}))
    checked = recipes.load(str(path), ["stages.repeat.times=3"])
    assert [name for name, _ in checked.stages] == ["prune", "distill"] * 3 + ["quantize"]
    again = recipes.check(yaml.safe_load(checked.as_yaml()), "r", "r.yaml")
    assert again.stages == checked.stages


def test_the_rounds_reach_the_budget_and_keep_the_teacher():
    model = tiny("llama")
    inner = [{"prune": CONFIG | {"target": 0.7}}, {"distill": {**QUICK, "steps": 4}}]
    plan = [{"repeat": {"times": 2, "stages": inner}}]
    data = corpora()
    for corpus in (data.domain, data.general):
        corpus.splits["test"] = []  # a run's manifest counts what is in it
    result, report = pipeline.run(model, plan, data, evaluate=False)
    sizes = [stage["parameters_after"] / model.parameters for stage in report["stages"]]
    assert sizes[0] == sizes[1] == pytest.approx(0.7**0.5, abs=0.04)
    assert sizes[2] == sizes[3] == pytest.approx(0.7, abs=0.04)
    assert result.parameters == sizes[3] * model.parameters
    assert result.teacher.network is model.network
    kept = [stage["details"]["widths"] for stage in report["stages"][::2]]
    assert all(later <= earlier for earlier, later in zip(*kept, strict=True))
