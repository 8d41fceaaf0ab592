"""Attention, sub-layers and the hidden size: what is cut, by which score, and the repair."""

import copy

import pytest
import torch

from tailor_engine import families
from tailor_engine.stages import get
from tailor_engine.stages.prune import attention, criteria, prune
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.cut import cut_heads, cut_hidden, hidden_norms
from tailor_engine.stages.prune.depth import greedy
from tailor_engine.stages.prune.fisher import collect_parts_with_fisher, metric
from tailor_engine.stages.prune.hidden import collect_stream
from tailor_engine.stages.prune.library import seen_through
from tailor_engine.stages.prune.repair import difference, judge_by_moments, least_squares
from tailor_engine.stages.prune.statistics import batches, collect_parts, forward
from tests.pruning import CONFIG, corpora
from tests.shapes import logits_of, mix
from tests.tiny import FAMILIES, tiny

HEAD = 16  # columns of a head in the tiny models: 4 query heads, 2 key-value heads


@pytest.fixture(scope="module")
def data():
    return corpora()


def batches_of(model, data, count, split="calibration"):
    rows = data.mixed(split, model.tokenizer, 32, count)
    return batches(rows, 8, torch.device("cpu"), torch.float32)


def blocks_of(model):
    return list(model.family.blocks_of(model.network))


def masked(model, part, columns):
    """Return the logits where these columns of a projection read nothing."""
    network = copy.deepcopy(model.network)
    with torch.no_grad():
        for block in model.family.blocks_of(network):
            projection = model.family.part(block, part)
            projection.weight[:, columns] = 0
            if len(columns) == projection.in_features and projection.bias is not None:
                projection.bias.zero_()
    return logits_of(network)


def same(network, expected):
    torch.testing.assert_close(logits_of(network), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_cutting_nothing_is_the_identity(family_name):
    model = tiny(family_name, layers=2)
    before, config = logits_of(model.network), model.config.to_dict()
    for block in blocks_of(model):
        cut_heads(model.family, block, torch.tensor([[0, 1], [2, 3]]), None)
    cut_hidden(model.family, model.network, torch.arange(64), {})
    assert torch.equal(logits_of(model.network), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_cut_network_is_the_masked_one(family_name):
    """Groups, query heads within groups, and whole sub-layers, in one family after another."""
    for kept in ([[2, 3]], [[0], [3]], [[1], [2]]):
        model = tiny(family_name, layers=2)
        gone = sorted(set(range(4)) - {head for row in kept for head in row})
        expected = masked(model, "output", criteria.runs_to_columns(torch.tensor(gone), HEAD))
        for block in blocks_of(model):
            cut_heads(model.family, block, torch.tensor(kept), None)
        families.write_shapes(model.network)
        same(model.network, expected)
        assert [model.family.heads(b) for b in blocks_of(model)] == [(2, len(kept))] * 2
    for name, part, width in (("attention", "output", 64), ("mlp", "down", 128)):
        model = tiny(family_name, layers=2)
        expected, before = masked(model, part, range(width)), model.parameters
        for block in blocks_of(model):
            families.leave_out(model.family, block, name)
        families.write_shapes(model.network)
        same(model.network, expected)
        assert model.parameters < before
        left = {part for _, part, _ in model.family.linears(model.network)}
        assert left == set(("gate", "up", "down") if name == "attention" else families.PARTS[:4])


@pytest.mark.parametrize("family_name", FAMILIES)
def test_dead_dimensions_of_the_stream_go_without_a_trace(data, family_name):
    model = tiny(family_name, layers=2)
    family, network = model.family, model.network
    dead = torch.randperm(64, generator=torch.Generator().manual_seed(0))[:32]
    kept = torch.tensor(sorted(set(range(64)) - set(dead.tolist())))
    for norm in hidden_norms(family, network).values():
        norm.variance_epsilon = 0.0  # it is added to the mean over dimensions, fewer of which stay
    with torch.no_grad():
        family.embedding_of(network).weight[:, dead] = 0
        for block in blocks_of(model):
            for part in ("output", "down"):
                family.part(block, part).weight[dead] = 0
    expected = logits_of(network)
    stream = collect_stream(family, network, batches_of(model, data, 16))
    assert list(stream.read) == list(hidden_norms(family, network))
    assert stream.scores()[dead].max() == 0 < stream.scores()[kept].min()
    gains = stream.gains(kept)
    assert all(gain.item() == pytest.approx(2**0.5) for gain in gains.values())
    cut_hidden(family, network, kept, gains)
    same(network, expected)
    assert network.config.hidden_size == 32
    assert family.tied(network) == family.tied(tiny(family_name).network)


def test_a_run_is_scored_by_its_error_after_repair():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 24, generator=generator, dtype=torch.float64)
    x = torch.randn(200, 24, generator=generator, dtype=torch.float64)
    second = x.T @ x / 200
    inverse = torch.linalg.inv(second)

    def error(gone):
        stay = [i for i in range(24) if i not in gone]
        target = x @ weight.T
        solved = torch.linalg.lstsq(x[:, stay], target).solution
        return (target - x[:, stay] @ solved).square().sum() / 200

    for size in (1, 4, 8):
        runs = [list(range(i, i + size)) for i in range(0, 24, size)]
        expected = torch.stack([error(run) for run in runs])
        torch.testing.assert_close(criteria.scores_of_runs(weight, inverse, size), expected)
        found = criteria.remove_in_rounds(weight, inverse, [1, 1], size)
        torch.testing.assert_close(found.scores, expected)
        assert found.dropped[0] == expected.argmin()
        gone = [j for run in found.dropped.tolist() for j in runs[run]]
        assert found.errors[-1] == pytest.approx(error(gone).item())


def test_repair_of_attention_pays_on_unseen_rows(data):
    """Its error is that of the repaired network itself, and OBS finds the cheaper groups."""
    model = tiny("qwen2", layers=2, heads=8, kv=4, hidden=64)
    family, network = model.family, model.network
    fit, held_out = batches_of(model, data, 96), batches_of(model, data, 16, "validation")
    found = collect_parts(family, network, fit, ("down", "output"), gram=True)
    assert set(found) == {"down", "output"} and list(found["output"]) == [0, 1]
    unseen = collect_parts(family, network, held_out, ("output",), gram=True)["output"]
    verdicts, cut = [], copy.deepcopy(network)
    for index, block in enumerate(blocks_of(model)):
        statistics = found["output"][index]
        weight = family.part(block, "output").weight.detach()
        through = seen_through(weight, statistics, None, 1e-3)[:2]
        heads = criteria.scores_of_runs(*through, 8)
        kept = attention.select(*through, heads, Heads(4, 2), Heads(3, 2))
        columns = attention.columns_of(kept, 8)
        solved, _ = least_squares(weight, columns, statistics.moments(), 1e-3, 0.0)
        both = [difference(weight, columns, new) for new in (None, solved)]
        verdicts.append(judge_by_moments(weight, *both, unseen[index].moments()))
        cut_heads(family, family.blocks_of(cut)[index], kept, solved)
    families.write_shapes(cut)
    for verdict in verdicts:
        assert verdict.after < 0.9 * verdict.before
    outputs = []
    for one in (network, cut):
        projection = family.part(family.blocks_of(one)[0], "output")
        seen = []
        handle = projection.register_forward_hook(lambda m, a, y, seen=seen: seen.append(y))
        for batch in held_out:
            forward(family, one, batch)
        handle.remove()
        outputs.append(torch.cat([y.flatten(0, 1) for y in seen]))
    valid = torch.cat([batch.valid for batch in held_out])
    lost = (outputs[0] - outputs[1])[valid].square().sum() / outputs[0][valid].square().sum()
    assert verdicts[0].share == 1.0
    assert lost.item() == pytest.approx(verdicts[0].after, rel=1e-3)


def test_scores_of_heads_and_groups(data):
    model = tiny("llama", layers=2)
    family, network = model.family, model.network
    found = collect_parts_with_fisher(
        family, network, batches_of(model, data, 16), ("down", "output"), gram=True, seed=0
    )
    block, statistics = blocks_of(model)[0], found["output"][0]
    factor = metric(statistics)
    with torch.no_grad():  # a head that adds nothing
        family.part(block, "output").weight[:, HEAD : 2 * HEAD] = 0
    weight, dense = family.part(block, "output").weight.detach(), Heads(2, 2)
    columns, damped, _ = seen_through(weight, statistics, factor, 1e-3)
    found = [attention.scores(n, weight, statistics.channels, HEAD) for n in ("wanda", "flap")]
    for heads in (*found, criteria.scores_of_runs(columns, damped, HEAD)):
        assert heads.shape == (4,) and heads.argmin() == 1 and heads[1] < 1e-6 * heads.max()
        kept = attention.select(columns, damped, heads, dense, Heads(2, 1))
        assert kept.shape == (2, 1) and kept[0] == 0
        whole = attention.select(columns, damped, heads, dense, dense)
        assert whole.tolist() == [[0, 1], [2, 3]]
    for gone in ([], [1], [1, 2], [0, 1, 2, 3]):
        rounds = criteria.remove_in_rounds(columns, damped, [len(gone)] if gone else [], HEAD)
        gone = rounds.dropped
        error = attention.removal_error(columns, damped, attention.columns_of(gone, HEAD))
        assert error == pytest.approx(rounds.errors[-1] if rounds.errors else 0.0)
    moments = statistics.moments().second.double()
    moments += 1e-3 * torch.diag(moments.diagonal())
    left_out = ((columns @ moments) * columns).sum()  # of the whole, which nothing repairs
    whole = attention.removal_error(columns, damped, torch.arange(64))
    assert whole == pytest.approx(left_out.item())
    with pytest.raises(ValueError, match="maw does not score heads"):
        attention.scores("maw", weight, statistics.channels, HEAD)


def test_heads_are_rounded_as_channels_are():
    assert attention.sizes(Heads(3, 3), 64, 64) == [(3, 3), (2, 3), (1, 3), (3, 2), (3, 1)]
    assert attention.sizes(Heads(8, 1), 16, 64) == [(8, 1), (4, 1)]
    assert attention.sizes(Heads(3, 1), 48, 64) == [(3, 1), (2, 1), (1, 1)]  # 144 is no multiple


def test_a_mixed_network_goes_through_the_other_stages(data):
    model = tiny("gemma2", layers=4)
    mix(model)
    quick = {"sequence_length": 32, "batch_size": 2, "steps": 2, "validation_rows": 2}
    measured = {"rows": 2, "sequence_length": 32, "new_tokens": 2, "split": "validation"}
    student, report = get("distill")(model.replace(teacher=tiny("gemma2")), quick, data)
    assert all(loss > 0 for loss in report.metrics["loss"])
    packed, report = get("quantize")(student, {"sequence_length": 32, "rows": 8}, data)
    parts = [set(block) for block in report.metrics["output_error"]]
    assert [len(found) for found in parts] == [3, 7, 4, 7]
    metrics = get("evaluate")(packed, measured, data)[1].metrics
    assert metrics["domain_perplexity"] > 1
    smaller, report = prune(model, CONFIG | {"target": 0.7}, data)
    assert report.parameters_after <= 0.7 * report.parameters_before
    assert torch.isfinite(logits_of(smaller.network)).all()


@pytest.mark.parametrize("by", ["kl", "perplexity"])
def test_greedy_depth_drops_what_costs_least_to_be_without(data, by):
    model = tiny("gemma2", layers=4, seed=3)  # a soft cap, norms behind the parts
    family, network = model.family, model.network
    rows = data.mixed("calibration", model.tokenizer, 32, 6)
    found = batches(rows, 4, torch.device("cpu"), torch.float32)

    def cost(gone):
        blocks = family.blocks_of(network)
        for index in gone:
            blocks[index].forward = lambda x, *args, **kwargs: x
        with torch.no_grad():
            logits = network(rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
        for index in gone:
            del blocks[index].forward
        if by == "perplexity":
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.labels.flatten())
        wanted = dense.log_softmax(-1)[rows.valid]
        apart = wanted - logits.log_softmax(-1)[rows.valid]
        return (wanted.exp() * apart).sum(-1).mean()

    with torch.no_grad():
        dense = network(rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    order = list(greedy(family, network, found, by))
    for done in range(3):
        left = [index for index in range(4) if index not in order[:done]]
        costs = {index: float(cost([*order[:done], index])) for index in left}
        assert order[done] == min(costs, key=costs.get)


def test_depth_by_divergence_is_a_setting_of_prune(data):
    config = {"axes": ["blocks"], "blocks": 1, "depth": "kl", "sequence_length": 32, "rows": 24}
    smaller, report = prune(tiny("llama", layers=4), config | {"fisher_rows": 8}, data)
    assert smaller.network.config.num_hidden_layers == 3
    assert len(report.metrics["blocks_dropped"]) == 1
