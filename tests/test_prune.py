"""Pruning, part by part: scores, closed-form repair, widths, statistics, the two streams."""

import weakref

import pytest
import torch
from torch import nn

from tailor_engine import families
from tailor_engine.stages import prune as package
from tailor_engine.stages.prune import criteria, lockstep, repair, statistics
from tailor_engine.stages.prune.attention import columns_of
from tailor_engine.stages.prune.cut import cut_channels, cut_heads
from tailor_engine.stages.prune.fisher import (
    collect_parts_with_fisher,
    collect_with_fisher,
    metric,
    sampled_gradient,
)
from tailor_engine.stages.prune.places import Place, places
from tests.pruning import corpora
from tests.tiny import FAMILIES, tiny


@pytest.fixture(scope="module")
def data():
    return corpora()


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


# Scores and OBS


def test_scores_follow_their_formulae():
    h, down, _ = gaussian(channels=6)
    gate, up = torch.randn(6, 4), torch.randn(6, 4)
    stats = torch.stack([torch.full((6,), 400.0), h.sum(0), h.square().sum(0)]).double()
    given = criteria.Channels(gate, up, down, stats, slopes=2 * stats)  # of twice the tokens
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
        "taylor": energy,
    }
    for name, value in expected.items():
        torch.testing.assert_close(criteria.score(name, given), value, rtol=1e-5, atol=1e-6)
    names = {*criteria.NAMES, *criteria.FROM_GRADIENTS}
    assert {*expected, *criteria.IN_ROUNDS} == names == {*package.CRITERIA}


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


@pytest.mark.parametrize("family_name", FAMILIES)
def test_gram_matrices_come_one_block_at_a_time(data, family_name):
    model = tiny(family_name)
    found = batches_of(model, data, 10, 5)
    parts = {"attention": "output", "mlp": "down"}
    whole = statistics.collect_parts(model.family, model.network, found, parts.values(), gram=True)
    everywhere = {
        place: whole[parts[place.kind]][place.block]
        for place in places(model.family, model.network)
    }
    alive, seen = [], []
    for place, each in lockstep.with_grams(model.family, model.network, found, everywhere):
        torch.testing.assert_close(each.gram, everywhere[place].gram, rtol=1e-4, atol=1e-3)
        assert each.channels is everywhere[place].channels
        alive.append(weakref.ref(each.gram))
        seen.append(place)
        del each
        assert sum(one() is not None for one in alive) <= 1
    assert seen == list(everywhere)


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


def test_slopes_are_those_of_autograd(data):
    model = tiny("llama")
    family, network = model.family, model.network
    (batch,) = batches_of(model, data, count=4)
    seen = {}

    def keep(module, args):
        args[0].retain_grad()
        seen["h"] = args[0]

    handle = family.part(family.blocks_of(network)[1], "down").register_forward_pre_hook(keep)
    found = collect_parts_with_fisher(family, network, [batch], ("down",), False, 0, slopes=True)
    handle.remove()
    exact = (seen["h"] * seen["h"].grad).flatten(0, 1)[batch.valid].double().square().sum(0)
    torch.testing.assert_close(
        found["down"][1].slopes[criteria.SUM_SQUARES], exact, rtol=1e-4, atol=0
    )


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
    dropped, touched = [Place(1, "attention")], places(family, dense.network)
    families.leave_out(family, blocks[1], "attention")
    seen, alphas = {}, {}

    def record(name, module, position):
        def hook(m, args, output):
            seen[name] = (args[0] if position == "in" else output).flatten(0, 1)

        return module.register_forward_hook(hook)

    def decide(place, fit, held_out, alpha):
        index, alphas[place] = place.block, alpha
        handles = [
            record("h", family.part(blocks[index], place.projection), "in"),
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
        if family_name == "qwen2" and place.kind == "mlp" and alpha < 1:
            missing = (seen["target"] - seen["out"]).double()
            expected = missing[valid].T @ h[valid] / valid.sum()
            torch.testing.assert_close(fit.error.double(), expected, rtol=1e-3, atol=1e-4)
        if place.kind == "attention":
            heads = torch.tensor([[2, 3]]) if index == 0 else torch.tensor([[0], [3]])
            cut_heads(family, blocks[index], heads, None)
            return columns_of(heads, 16)
        kept = torch.arange(0, 128, 2) if index < 2 else torch.arange(128)
        cut_channels(family, blocks[index], kept, None)
        return kept

    walk = lockstep.Walk(family, dense.network, pruned.network, [batch], [])
    walk.run(dropped, touched, 0.5, decide)
    # What stands before the attention that is left out takes its part on.
    assert alphas == {p: 1.0 if p == (0, "mlp") else 0.5 for p in touched if p not in dropped}


def test_what_is_missing_goes_back_through_a_sandwich_norm():
    model = tiny("gemma2")
    block = model.family.blocks_of(model.network)[0]
    norm = model.family.part(block, "mlp_out_norm")
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(50, 64, generator=generator)
    out = norm(y).detach()
    target = out + 0.01 * torch.randn(50, 64, generator=generator)
    missing = lockstep._missing(model.family, block, Place(0, "mlp"), target, out, y)
    left = (norm(y + missing) - target).norm() / (out - target).norm()
    assert left < 0.3  # what the norm takes out again lies along y
