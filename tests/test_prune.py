"""Pruning: scores, closed-form repair, widths, the two streams, and what the stage promises."""

import itertools
import random

import pytest
import torch
from torch import nn

from tailor_engine.data import Corpus, Data, Document
from tailor_engine.errors import UserError
from tailor_engine.families import replace_linear
from tailor_engine.stages import prune as package
from tailor_engine.stages.prune import PruneConfig, criteria, lockstep, prune, repair, statistics
from tailor_engine.stages.prune.cut import cut_channels
from tailor_engine.stages.prune.fisher import collect_with_fisher, metric, sampled_gradient
from tailor_engine.stages.prune.widths import Budget, allocate, options
from tests.tiny import FAMILIES, SENTENCES, tiny

CONFIG = {
    "sequence_length": 32,
    "rows": 48,
    "target": 0.85,
    "rounding": 32,
    "fisher_rows": 8,
    "precision": "float32",
}


class Forbidden(list):
    """A split that must not be looked at."""

    def __iter__(self):
        raise AssertionError("the test split was read")

    __getitem__ = __iter__


@pytest.fixture(scope="module")
def data():
    """Two corpora of shuffled words whose test split cannot be read."""
    chance = random.Random(0)
    words = " ".join(SENTENCES).split()

    def corpus(name):
        texts = (" ".join(chance.choices(words, k=60)) for _ in range(300))
        made = Corpus.from_documents(name, [Document(text) for text in texts])
        made.splits["test"] = Forbidden(made.splits["test"])
        return made

    return Data(corpus("domain"), corpus("general"))


def batches_of(model, data, count=24, size=8, dtype=torch.float32):
    rows = data.mixed("calibration", model.tokenizer, 32, count)
    return statistics.batches(rows, size, torch.device("cpu"), dtype)


def gaussian(tokens=400, channels=12, hidden=5):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, channels, generator=generator, dtype=torch.float64) @ mixing
    down = torch.randn(hidden, channels, generator=generator, dtype=torch.float64)
    missing = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    return h, down, missing + h[:, :hidden]


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def logits(model):
    with torch.no_grad():
        return model.network(torch.arange(40)[None] % 300).logits


# Scores and OBS


def test_scores_follow_their_formulae():
    h, down, _ = gaussian(channels=6)
    gate, up = torch.randn(6, 4), torch.randn(6, 4)
    stats = torch.stack([torch.full((6,), 400.0), h.sum(0), h.square().sum(0)]).double()
    given = criteria.Channels(gate, up, down, stats)
    energy, columns = h.square().mean(0), down.square().sum(0)
    rows = sum((w.amax(1).abs() + w.amin(1).abs()).double() for w in (gate, up))
    expected = {
        "maw": rows,
        "l2": gate.norm(dim=1).double() + up.norm(dim=1),
        "product": gate.norm(dim=1).double() * up.norm(dim=1),
        "variance": gate.var(1).double() + up.var(1),
        "activation_norm": energy.sqrt(),
        "wanda": energy.sqrt() * down.abs().sum(0),
        "cfsp": energy * columns,
        "flap": h.var(0, correction=0) * columns,
    }
    for name, value in expected.items():
        torch.testing.assert_close(criteria.score(name, given), value, rtol=1e-5, atol=1e-6)
    assert {*expected, *criteria.IN_ROUNDS} == {*criteria.NAMES} == {*package.CRITERIA}


def test_rounds_add_up_to_the_error_that_least_squares_leaves():
    h, down, _ = gaussian()
    second = h.T @ h / len(h)
    inverse = torch.linalg.inv(second)
    found = criteria.remove_in_rounds(down, inverse, [3, 2, 2])
    for removed, error in zip((3, 5, 7), found.errors, strict=True):
        kept = torch.tensor(
            [j for j in range(12) if j not in set(found.dropped[:removed].tolist())]
        )
        best = torch.linalg.lstsq(h[:, kept], h @ down.T).solution
        left = (h @ down.T - h[:, kept] @ best).square().sum() / len(h)
        torch.testing.assert_close(torch.tensor(error, dtype=left.dtype), left)
    # One channel a round is the greedy choice: no other single channel would cost less.
    single = criteria.remove_in_rounds(down, inverse, [1])
    costs = down.square().sum(0) / inverse.diagonal()
    assert single.errors[0] == pytest.approx(costs.min().item())


# Repair


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_least_squares_is_the_regression_on_the_rows(alpha):
    h, down, missing = gaussian()
    kept = torch.tensor([0, 2, 3, 7, 8, 11])
    moments = repair.Moments(h.T @ h / len(h), missing.T @ h / len(h))
    solved, ridge = repair.least_squares(down, kept, moments, 1e-12, alpha)
    target = h @ down.T + alpha * missing
    best = torch.linalg.lstsq(h[:, kept], target).solution.T
    torch.testing.assert_close(solved, best)
    assert ridge == 1e-12
    heavy, _ = repair.least_squares(down, kept, moments, 1e9, alpha)
    torch.testing.assert_close(heavy, down[:, kept])  # the ridge pulls to the plain slice


def test_a_matrix_that_cannot_be_factorised_gets_more_ridge():
    ones = torch.ones(40, 40, dtype=torch.float64)
    factor = repair.factorise(ones - 1e-3 * torch.eye(40), 1e-6)
    assert factor.ridge > 1e-6
    with pytest.raises(ValueError, match="positive definite"):
        repair.factorise(torch.full((3, 3), float("nan")), 1e-3)


def test_the_verdict_is_the_error_on_held_out_rows():
    h, down, missing = gaussian()
    kept = torch.arange(8)
    fit = repair.Moments(h[:20].T @ h[:20] / 20, missing[:20].T @ h[:20] / 20)
    solved, _ = repair.least_squares(down, kept, fit, 1e-6, 1.0)
    h, missing = h[200:], missing[200:]
    n = len(h)
    energy = missing.square().sum().item() / n
    held_out = repair.Moments(h.T @ h / n, missing.T @ h / n, energy, n)
    differences = [repair.difference(down, kept, w) for w in (None, solved)]
    verdict = repair.judge_by_moments(down, *differences, held_out)
    target = h @ down.T + missing

    def error(share):
        weight = down[:, kept] + share * (solved - down[:, kept])
        left = (target - h[:, kept] @ weight.T).square().sum()
        return (left / target.square().sum()).item()

    assert verdict.before == pytest.approx(error(0), rel=1e-4)
    assert verdict.after == pytest.approx(error(verdict.share), rel=1e-4)
    assert 0 < verdict.share < 1  # 20 rows overfit 8 channels here
    assert verdict.after <= min(error(s / 20) for s in range(21)) + 1e-6


# Widths


def test_allocation_is_the_best_of_all():
    chance = random.Random(1)
    limits = Budget(channels=11 * 32, widths=(128, 160, 128), rounding=32, floor=32)
    curves = []
    for width in limits.widths:
        steps = sorted(chance.random() for _ in options(width, limits)[1:])
        curves.append([0.0, *itertools.accumulate(steps)])
    chosen = allocate(curves, limits)
    tables = [
        dict(zip(options(w, limits), c, strict=True))
        for w, c in zip(limits.widths, curves, strict=True)
    ]
    fitting = [c for c in itertools.product(*tables) if sum(c) <= limits.channels]
    cost = {c: sum(t[w] for t, w in zip(tables, c, strict=True)) for c in fitting}
    assert cost[tuple(chosen)] == pytest.approx(min(cost.values()))


# Statistics


def test_one_pass_counts_every_token_once_and_no_padding(data):
    model = tiny("qwen2")
    found = batches_of(model, data, 10, 10)[0]
    valid = torch.rand(10, 32, generator=torch.Generator().manual_seed(0)) < 0.8
    found = statistics.Batch(found.input_ids, found.positions, valid.reshape(-1))
    kept = []
    down = model.family.part(model.family.blocks_of(model.network)[1], "down")
    handle = down.register_forward_pre_hook(lambda m, args: kept.append(args[0].reshape(-1, 128)))
    statistics.forward(model.family, model.network, found)
    handle.remove()
    h = kept[0][valid.reshape(-1)].double()
    halves = [
        statistics.Batch(found.input_ids[s], found.positions[s], valid[s].reshape(-1))
        for s in (slice(0, 3), slice(3, 10))
    ]
    for parts in ([found], halves):
        one = statistics.collect(model.family, model.network, parts, gram=True)[1]
        assert one.tokens == valid.sum()
        torch.testing.assert_close(one.channels[1], h.sum(0), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.gram.double(), h.T @ h, rtol=1e-4, atol=1e-3)
        assert 0 < 1 - one.influence[1] / one.influence[0] < 1


def test_fisher_predicts_the_loss_of_a_small_error(data):
    model = tiny("llama", layers=2)
    family, network = model.family, model.network
    found = batches_of(model, data, 64, 16)
    gathered = collect_with_fisher(family, network, found, gram=True, seed=0)
    assert all(p.requires_grad for p in network.parameters())
    assert all(p.grad is None for p in network.parameters())
    with torch.no_grad():
        before = torch.cat(
            [
                network(input_ids=b.input_ids, position_ids=b.positions, use_cache=False).logits
                for b in found
            ]
        ).log_softmax(-1)
    for index, block in enumerate(family.blocks_of(network)):
        weight = family.part(block, "down").weight
        delta = 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(index))
        seen = metric(gathered[index]).T @ delta.double()
        predicted = 0.5 * ((seen @ gathered[index].moments().second.double()) * seen).sum()
        with torch.no_grad():
            weight += delta
            after = torch.cat(
                [
                    network(input_ids=b.input_ids, position_ids=b.positions, use_cache=False).logits
                    for b in found
                ]
            ).log_softmax(-1)
            weight -= delta
        measured = (before.exp() * (before - after)).sum(-1).mean()
        assert 0.6 < (predicted / measured).item() < 1.6


def test_sampled_gradient_is_that_of_cross_entropy():
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(30, 8, generator=generator, requires_grad=True)
    head, draws = torch.randn(11, 8, generator=generator), torch.rand(30, generator=generator)
    valid = torch.arange(30) % 4 != 0
    for softcap in (0.0, 5.0):
        ours = sampled_gradient(hidden.detach(), head, valid, softcap, draws)
        scores = hidden @ head.T
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        labels = (scores.softmax(-1).cumsum(-1) <= draws[:, None]).sum(1)
        losses = nn.functional.cross_entropy(scores, labels, reduction="none")
        (gradient,) = torch.autograd.grad(losses[valid].sum(), hidden)
        torch.testing.assert_close(ours, gradient)


# Two streams


@pytest.mark.parametrize("family_name", ["qwen2", "gemma2"])
@pytest.mark.parametrize("kept_bytes", [0, 2**30])
def test_lockstep_sees_what_the_pruned_network_sees(data, family_name, kept_bytes, monkeypatch):
    """Its moments are those of the partly pruned network's own forward pass."""
    monkeypatch.setattr(lockstep, "KEPT_BYTES", kept_bytes)
    dense, pruned = tiny(family_name), tiny(family_name)
    family, batch = dense.family, batches_of(dense, data, 6, 6)[0]
    blocks = family.blocks_of(pruned.network)
    seen = {}

    def record(name, module, position):
        def hook(m, args, output):
            seen[name] = (args[0] if position == "in" else output).reshape(
                -1, args[0].shape[-1] if position == "in" else output.shape[-1]
            )

        return module.register_forward_hook(hook)

    def decide(index, fit, held_out, alpha):
        handles = [
            record("h", family.part(blocks[index], "down"), "in"),
            record("out", blocks[index], "out"),
            record("target", family.blocks_of(dense.network)[index], "out"),
        ]
        for model in (dense, pruned):
            statistics.forward(family, model.network, batch)
        for handle in handles:
            handle.remove()
        h, valid = seen["h"].double(), batch.valid
        torch.testing.assert_close(
            fit.second.double(), h[valid].T @ h[valid] / valid.sum(), rtol=1e-3, atol=1e-4
        )
        assert fit.tokens == valid.sum()
        if family_name == "qwen2":
            missing = (seen["target"] - seen["out"]).double()
            expected = missing[valid].T @ h[valid] / valid.sum()
            torch.testing.assert_close(fit.error.double(), expected, rtol=1e-3, atol=1e-4)
        kept = torch.arange(0, 128, 2) if index < 2 else torch.arange(128)
        cut_channels(family, blocks[index], kept, None)
        return kept

    with torch.no_grad():
        lockstep.walk(family, dense.network, pruned.network, [batch], [], [], 0.5, decide)


def test_what_is_missing_goes_back_through_a_sandwich_norm():
    model = tiny("gemma2")
    block = model.family.blocks_of(model.network)[0]
    norm = model.family.part(block, "mlp_out_norm")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 64, generator=generator)
    out = norm(y).detach()
    target = out + 0.01 * torch.randn(50, 64, generator=generator)
    missing = lockstep._missing(model.family, block, target, out, y)
    left = (norm(y + missing) - target).norm() / (out - target).norm()
    assert left < 0.3  # what the norm takes out again lies along y


# The stage


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize(
    "config",
    [{"preset": "fast", "uniform": True}, {}, {"axes": "both", "blocks": 1, "target": 0.6}],
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
    common = CONFIG | {"uniform": True, "target": 0.75, "rows": 96}
    figures = {
        name: divergence(model, prune(model, common | config, data)[0], data)
        for name, config in {
            "maw": {"criterion": "maw", "repair": "none", "mode": "one_pass"},
            "cfsp": {"preset": "fast", "repair": "none"},
            "repaired": {"preset": "fast"},
            "default": {},
        }.items()
    }
    assert figures["repaired"] < figures["cfsp"] < figures["maw"]
    assert figures["default"] < figures["repaired"]


def test_a_dropped_block_is_folded_into_the_one_before(data):
    model = tiny("mistral", layers=4, seed=2)
    common = CONFIG | {"axes": "blocks", "blocks": 1, "rows": 96}
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
        ({"target": 0.3}, "below"),
        ({"axes": "blocks", "blocks": 3}, "below 3"),
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


def test_presets_resolve():
    fast = PruneConfig(preset="fast").resolved()
    assert (fast.criterion, fast.mode, fast.ridge) == ("cfsp", "one_pass", 1e-3)
    best = PruneConfig().resolved()
    assert (best.criterion, best.mode, best.ridge) == ("fisher_obs", "sequential", 1e-2)


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
        config = CONFIG | {"preset": preset, "uniform": True, "parameters": ceiling}
        result, report = prune(model, config, data)
        assert result.parameters == ceiling
        assert report.metrics["widths"] == [96, 96, 96]
        torch.testing.assert_close(logits(result), logits(model), rtol=1e-3, atol=1e-3)
