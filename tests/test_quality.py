"""Rivals in the quality table cut what they say and leave their input alone."""

import re

import pytest
import torch

from benchmarks import quality, rivals
from benchmarks.local_steps import local_steps
from tailor_engine.stages import get
from tests.pruning import CONFIG, corpora
from tests.tiny import tiny

REMOVED = 0.2  # near one block


@pytest.fixture(scope="module")
def model():
    return tiny("llama", hidden=192, ffn=384, layers=5)


def rows(model, count=12):
    return corpora().mixed("calibration", model.tokenizer, 32, count)


@pytest.mark.parametrize(
    "method", [rivals.flap, rivals.minitron_hidden, rivals.slice_gpt, rivals.last_blocks]
)
def test_a_rival_removes_what_was_asked_for_and_leaves_its_input_alone(model, method):
    ids = torch.arange(3, 40)[None]
    before = model.network(ids).logits
    smaller = method(model, REMOVED, rows(model))
    assert smaller.parameters / model.parameters == pytest.approx(1 - REMOVED, abs=0.05)
    assert torch.isfinite(smaller.network(ids).logits).all()
    torch.testing.assert_close(model.network(ids).logits, before, rtol=0, atol=0)


def test_a_rotation_that_drops_nothing_changes_nothing(model):
    untied = sum(p.numel() for p in model.network.parameters())
    head = model.family.head_of(model.network).weight.numel()
    same = rivals.slice_gpt(model, -head / untied, rows(model))  # room for the untied head
    ids = torch.arange(3, 40)[None]
    assert same.network.config.hidden_size == 192
    torch.testing.assert_close(
        same.network(ids).logits, model.network(ids).logits, rtol=1e-3, atol=1e-3
    )


def test_flap_keeps_the_mean_of_what_it_drops(model):
    calibration = rows(model)
    plain, smaller = {}, rivals.flap(model, REMOVED, calibration)
    for name, network in (("dense", model.network), ("pruned", smaller.network)):
        block = model.family.blocks_of(network)[0]
        outputs = []
        handle = block.mlp.register_forward_hook(lambda _, __, y, o=outputs: o.append(y.detach()))
        with torch.no_grad():
            network(calibration.input_ids, position_ids=calibration.position_ids, use_cache=False)
        handle.remove()
        plain[name] = outputs[0][calibration.valid].mean(0)
    torch.testing.assert_close(plain["pruned"], plain["dense"], rtol=1e-3, atol=1e-4)


def test_local_steps_bring_the_stream_back_to_the_dense_one(model):
    data = corpora()
    smaller, _ = get("prune")(model, CONFIG | {"axes": ["mlp"], "repair": "none"}, data)
    seen = rows(model)
    whole = _stream(model, seen)
    error = [
        (_stream(one, seen) - whole).square().mean()
        for one in (smaller, local_steps(smaller, seen, 60))
    ]
    assert error[1] < 0.8 * error[0]


def _stream(model, seen):
    with torch.no_grad():
        body = model.family.body_of(model.network)
        states = body(seen.input_ids, position_ids=seen.position_ids, use_cache=False)
    return states.last_hidden_state[seen.valid]


def test_no_article_that_is_fitted_to_is_held_out(tmp_path):
    paths = [tmp_path / name for name in ("validation", "test")]
    for path in paths:
        lines = [
            f" = {path.name} {number} = \n = = Section = = \n" + f"{path.name} {number}\n" * 400
            for number in range(40)
        ]
        path.write_text("".join(lines))
    splits = quality.general_corpus(*paths).splits
    articles = {
        split: {re.search(r"\w+ \d+", document.text)[0] for document in documents}
        for split, documents in splits.items()
    }
    assert articles["train"] & articles["calibration"]  # passages of most articles are in both
    apart = articles["train"] | articles["calibration"], articles["validation"], articles["test"]
    assert sum(map(len, apart)) == len(set.union(*apart)) == 80
