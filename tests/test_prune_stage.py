"""The prune stage as a whole: what it promises for every family, and for bad input."""

import pytest
import torch

from tailor_engine.errors import UserError
from tailor_engine.families import replace_linear
from tailor_engine.stages._vocabulary import bpe
from tailor_engine.stages.prune import PruneConfig, prune
from tailor_engine.stages.prune import tokens as tokens_axis
from tests.pruning import CONFIG, corpora
from tests.tiny import FAMILIES, tiny


@pytest.fixture(scope="module")
def data():
    return corpora()


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model.network(torch.arange(40)[None] % 300).logits


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [
        {"preset": "fast", "uniform": True},
        {},
        {"axes": ["mlp", "blocks"], "blocks": 1, "target": 0.6},
    ],
    ids=["fast", "default", "both"],
)
def test_every_family(data, family_name, config):
    model = tiny(family_name)
    before = snapshot(model)
    result, report = prune(model, CONFIG | config, data)
    assert all(torch.equal(before[k], v) for k, v in model.network.state_dict().items())
    assert result.teacher is model
    assert result.base is model
    target = CONFIG["target"] if "target" not in config else config["target"]
    assert report.parameters_after / report.parameters_before == pytest.approx(target, abs=0.05)
    kept = [w for w in report.metrics["widths"] if w]
    assert kept == model.family.widths(result.network)
    assert all(w % 32 == 0 for w in kept)
    assert torch.isfinite(logits(result)).all()
    assert result.network.config.num_hidden_layers == len(kept)
    if config.get("uniform"):
        assert result.network.config.intermediate_size == kept[0]
        assert len(set(kept)) == 1
    for earlier, later in zip(
        report.metrics["error_before"], report.metrics["error_after"], strict=True
    ):
        assert earlier is None or later <= earlier
    for name in ("importance_profile", "kept_profile"):
        assert all(row is None or len(row) == 64 for row in report.metrics[name])


@pytest.mark.parametrize("family_name", FAMILIES)
def test_one_size_of_each_axis_for_all_blocks(data, family_name):
    model = tiny(family_name)
    config = CONFIG | {"uniform": True, "axes": ["mlp", "attention"], "target": 0.7}
    result, report = prune(model, config, data)
    assert report.parameters_after <= 0.7 * report.parameters_before
    widths, heads = report.metrics["widths"], report.metrics["heads"]
    assert widths == [result.network.config.intermediate_size] * len(widths)
    shape = result.network.config.num_key_value_heads, result.network.config.num_attention_heads
    assert heads == [[shape[0], shape[1] // shape[0]]] * len(heads)
    assert not result.network.config.to_dict().get("per_layer_config")
    assert torch.isfinite(logits(result)).all()


def test_same_seed_same_weights_whatever_the_batch(data):
    model = tiny("llama")
    runs = [prune(model, CONFIG | {"batch_size": size}, data)[0] for size in (8, 8, 16)]
    first, second, other = (snapshot(run) for run in runs)
    assert all(torch.equal(first[k], second[k]) for k in first)
    for name, value in first.items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)


def divergence(model, other, data):
    rows = data.mixed("validation", model.tokenizer, 32, 16)
    totals = []
    with torch.no_grad():
        for network in (model.network, other.network):
            output = network(rows.input_ids, position_ids=rows.position_ids, use_cache=False)
            totals.append(output.logits[rows.valid].log_softmax(-1))
    return (totals[0].exp() * (totals[0] - totals[1])).sum(-1).mean().item()


def test_repair_and_data_pay_on_unseen_rows(data):
    model = tiny("llama", layers=4, seed=1)
    common = CONFIG | {"uniform": True, "axes": ["mlp"], "target": 0.75, "rows": 96}
    figures = {
        name: divergence(model, prune(model, common | config, data)[0], data)
        for name, config in {
            "maw": {"criterion": "maw", "repair": "none", "mode": "one_pass"},
            "cfsp": {"preset": "fast", "repair": "none"},
            "taylor": {"criterion": "taylor", "repair": "none", "mode": "one_pass"},
            "repaired": {"preset": "fast"},
            "default": {},
        }.items()
    }
    assert figures["repaired"] < figures["cfsp"] < figures["maw"]
    assert figures["default"] < figures["repaired"]
    assert figures["taylor"] < figures["maw"]


@pytest.mark.parametrize("mode", ["sequential", "one_pass"])
def test_a_dropped_block_is_folded_into_the_one_before(data, mode):
    model = tiny("mistral", layers=4, seed=2)
    common = CONFIG | {"axes": ["blocks"], "blocks": 1, "rows": 96, "mode": mode}
    bare, report = prune(model, common | {"repair": "none"}, data)
    folded, _ = prune(model, common, data)
    assert len(report.metrics["blocks_dropped"]) == 1
    influence = report.metrics["block_influence"]
    assert report.metrics["blocks_dropped"] == [influence.index(min(influence))]
    assert folded.network.config.num_hidden_layers == 3
    assert divergence(model, folded, data) < divergence(model, bare, data)


def test_too_few_rows_are_said_and_repair_less(data):
    model = tiny("llama")
    _, report = prune(model, CONFIG | {"rows": 4}, data)
    assert any("too few" in note for note in report.notes)
    before, after = report.metrics["error_before"], report.metrics["error_after"]
    assert all(a <= b for a, b in zip(after, before, strict=True))
    plain, report = prune(model, CONFIG | {"rows": 1, "domain_weight": 1.0, "preset": "fast"}, data)
    assert any("not repaired" in note for note in report.notes)
    assert torch.isfinite(logits(plain)).all()


def test_dead_channels_do_not_break_the_solve(data):
    model = tiny("llama")
    block = model.family.blocks_of(model.network)[1]
    with torch.no_grad():
        model.family.part(block, "up").weight[:100] = 0
    for preset in ("fast", "default"):
        result, _ = prune(model, CONFIG | {"preset": preset, "ridge": 0.0}, data)
        assert torch.isfinite(logits(result)).all()


def test_bad_input_is_one_line(data):
    model = tiny("llama")
    cases = [
        ({"target": 0.3, "axes": ["mlp"]}, "below"),
        ({"axes": ["mpl"]}, "axes may hold mlp, attention"),
        ({"axes": ["sublayers"], "uniform": True}, "uniform keeps blocks alike"),
        ({"axes": ["attention"], "criterion": "cfsp"}, "fisher_obs alone gives"),
        ({"axes": ["blocks"], "blocks": 3}, "below 3"),
        ({"axes": ["hidden", "mlp"]}, "the hidden size is cut alone"),
        ({"criterion": "mav"}, "maw"),
        ({"rounding": 48}, "rounding must be one of"),
    ]
    for config, words in cases:
        with pytest.raises(UserError, match=words):
            prune(model, CONFIG | config, data)
    down = model.family.part(model.family.blocks_of(model.network)[2], "down")
    with torch.no_grad():
        down.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"layers\.2\.mlp\.down_proj\.weight holds NaN"):
        prune(model, CONFIG, data)
    with torch.no_grad():
        down.weight[3, 4] = 0
        model.family.part(model.family.blocks_of(model.network)[1], "up").weight.mul_(1e30)
    for preset in ("fast", "default"):
        with pytest.raises(UserError, match="activations of block 1"):
            prune(model, CONFIG | {"preset": preset}, data)


def test_the_vocabulary_is_one_axis_of_the_search(data, monkeypatch):
    monkeypatch.setattr(tokens_axis, "SHARES", (0.9,))  # 262 of its 320 must stay
    model = tiny("llama")
    config = CONFIG | {"axes": ["vocabulary"], "target": 0.985, "finalists": 2}
    result, report = prune(model, config, data)
    tokens = report.metrics["tokens"]
    assert report.parameters_after <= 0.985 * report.parameters_before
    assert 0 < tokens < len(model.tokenizer)
    assert len(result.tokenizer) == tokens == result.network.config.vocab_size
    assert result.teacher.network.config.vocab_size == tokens  # it can teach the student
    assert result.base is model
    text = "It is naïve to mesure it: 42 ☃"
    ids = result.tokenizer(text, add_special_tokens=False).input_ids
    assert max(ids) < tokens
    assert result.tokenizer.decode(ids) == text
    rises = dict(report.metrics["predicted_curve"])
    assert list(rises.values()) == sorted(rises.values())


def test_the_hidden_size_is_an_axis_of_its_own(data):
    result, report = prune(
        tiny("llama", hidden=128), CONFIG | {"axes": ["hidden"], "target": 0.8}, data
    )
    assert result.network.config.hidden_size == report.metrics["hidden_size"] == 96
    assert report.parameters_after <= 0.8 * report.parameters_before
    assert report.metrics["widths"] == report.metrics["widths_before"]


def test_a_vocabulary_that_cannot_be_cut_stays_whole_where_nobody_asked(data, monkeypatch):
    def refuse(description):
        raise UserError("vocabulary: a Unigram tokenizer is not rebuilt")

    monkeypatch.setattr(bpe, "check", refuse)
    model = tiny("llama")
    _, report = prune(model, CONFIG, data)
    assert any("stays whole: vocabulary: a Unigram" in note for note in report.notes)
    with pytest.raises(UserError, match="Unigram"):
        prune(model, CONFIG | {"axes": ["vocabulary"]}, data)


def test_presets_resolve():
    fast = PruneConfig(preset="fast").resolved()
    assert (fast.criterion, fast.mode, fast.ridge) == ("cfsp", "one_pass", 1e-3)
    best = PruneConfig().resolved()
    assert (best.criterion, best.mode, best.ridge) == ("fisher_obs", "sequential", 3e-2)


def test_cutting_dead_channels_changes_nothing_biases_included(data):
    model = tiny("llama")
    generator = torch.Generator().manual_seed(0)
    for block in model.family.blocks_of(model.network):
        for name in ("gate", "up", "down"):
            weight = model.family.part(block, name).weight.detach()
            bias = torch.randn(len(weight), generator=generator)
            replace_linear(block, name, weight, bias, model.family)
        dead = torch.randperm(128, generator=generator)[:32]
        with torch.no_grad():
            model.family.part(block, "down").weight[:, dead] = 0
    ceiling = model.parameters - 3 * 32 * (3 * 64 + 2)
    for preset in ("fast", "default"):
        config = CONFIG | {"preset": preset, "uniform": True, "axes": ["mlp"]}
        config["parameters"] = ceiling
        result, report = prune(model, config, data)
        assert result.parameters == ceiling
        assert report.metrics["widths"] == [96, 96, 96]
        torch.testing.assert_close(logits(result), logits(model), rtol=1e-3, atol=1e-3)
