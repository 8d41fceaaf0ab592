"""Decode time as a budget: the table, what is kept of it, and the search under it."""

import copy

import pytest
import torch

from tailor_engine.errors import UserError
from tailor_engine.io import measured as kept_figures
from tailor_engine.stages._decode import as_decoded, step_milliseconds
from tailor_engine.stages._stage import Context, use_context
from tailor_engine.stages.prune import PruneConfig, latency, prune
from tailor_engine.stages.prune.attention import Heads
from tailor_engine.stages.prune.costs import dense_size
from tailor_engine.stages.prune.places import Place, places
from tests.pruning import CONFIG, corpora
from tests.tiny import FAMILIES, tiny

# A machine on which attention takes most of the time: 3 blocks of 2 + 1 + 1, and 2 for the rest.
TABLE = {
    "sizes": {
        "mlp": {"32": 0.75, "128": 1.0},
        "attention": {"2x2": 2.0, "1x2": 1.9, "2x1": 1.9},
        "vocabulary": {"320": 0.0},
    },
    "block": 1.0,
    "step": 14.0,
}


class Known(Context):
    """Knows one table, and what was asked for."""

    def __init__(self, table=None):
        self.table, self.keys, self.kept = table, [], []

    def recall(self, what, key):
        self.keys.append(key)
        return self.table

    def remember(self, what, key, value):
        self.kept.append(value)


@pytest.fixture(scope="module")
def data():
    return corpora()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr("tailor_engine.stages._decode.STEPS", 4)
    monkeypatch.setattr(latency, "COPIES", 2)


def test_between_two_sizes_it_is_a_straight_line_that_never_falls():
    sizes = {"mlp": {"64": -0.5, "128": 3.0, "192": 2.0, "256": 5.0}}
    table = latency.Table(sizes, 0.0, 0.0)
    assert [table.of("mlp", size) for size in (64, 96, 128, 160, 192, 256)] == [
        0.0, 1.25, 2.5, 2.5, 2.5, 5.0,
    ]  # fmt: skip
    assert latency._spread(range(64, 1600, 64), 12)[::11] == [64, 1536]
    assert latency._spread([320], 12) == [320]


def test_the_prices_sum_up_to_the_measured_step():
    model = tiny("llama")
    with use_context(Known(TABLE)):
        costs = latency.price_list(model, PruneConfig(latency=0.5), [])
    family, network = model.family, model.network
    whole = sum(costs.place(p, dense_size(family, network, p)) for p in places(family, network))
    assert whole + costs.tokens(320) + costs.fixed + 3 * costs.block == pytest.approx(14.0)
    assert costs.place(places(family, network)[0], 0) == 0
    assert costs.place(places(family, network)[0], Heads(1, 2)) == pytest.approx(1.9)


@pytest.mark.parametrize("family_name", FAMILIES)
def test_a_table_of_every_family(family_name):
    model = tiny(family_name, layers=2)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    config = copy.deepcopy(model.config.to_dict())
    state = torch.get_rng_state()
    known = Known()
    with use_context(known):
        table = latency.timed(model, PruneConfig(rounding=32, latency=0.8), [256])
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config.to_dict() == config
    assert all(torch.equal(before[k], v) for k, v in model.network.state_dict().items())
    assert set(table.sizes["mlp"]) == {"128", "96", "64", "32"}
    assert set(table.sizes["attention"]) == {"2x2", "1x2", "2x1"}
    assert set(table.sizes["vocabulary"]) == {"256", "320"}
    assert table.step > 0 and table.block >= 0
    assert known.kept == [vars(table)]
    with use_context(Known(known.kept[0])) as _:
        assert latency.timed(model, PruneConfig(rounding=32, latency=0.8), [256]) == table
        costs = latency.price_list(model, PruneConfig(rounding=32, latency=0.8), [256])
    family, network = model.family, model.network
    prices = [costs.place(p, dense_size(family, network, p)) for p in places(family, network)]
    assert all(price >= 0 for price in prices)
    whole = costs.fixed + sum(prices) + costs.tokens(320) + 2 * costs.block
    assert whole == pytest.approx(table.step)


def test_prices_are_what_the_variants_take(monkeypatch):
    """On a clock that shows what a network is made of, any mixture costs what the table says."""

    def clock(networks, rows, context):
        return {name: made_of(model.family, network) for name, network in networks.items()}

    def made_of(family, network):
        work = 7.0 + 0.01 * family.embedding_of(network).num_embeddings
        for block in family.blocks_of(network):
            work += 3.0
            if family.has(block, "mlp"):
                work += 0.5 + 0.02 * family.part(block, "gate").out_features
            queries, groups = family.heads(block)
            work += 0.3 * queries + 0.7 * groups + (2.0 if groups else 0.0)
        return work

    model = tiny("qwen2")
    monkeypatch.setattr(latency, "step_milliseconds", clock)
    config = PruneConfig(rounding=32, latency=0.8)
    with use_context(Known()):
        costs = latency.price_list(model, config, [128])
    blocks = model.family.blocks_of(model.network)
    mixture = [(128, Heads(1, 2)), (48, 0), (0, Heads(2, 1))]
    found = costs.fixed + costs.tokens(200) + 3 * costs.block
    for index, (block, (width, heads)) in enumerate(zip(blocks, mixture, strict=True)):
        found += costs.place(Place(index, "mlp"), width)
        found += costs.place(Place(index, "attention"), heads)
        latency.set_size(model.family, block, "mlp", width)
        latency.set_size(model.family, block, "attention", heads)
    latency._shorten(model.family, 200, model.network)
    assert found == pytest.approx(made_of(model.family, model.network))
    with torch.no_grad():
        logits = model.network(torch.arange(9)[None]).logits
    assert logits.shape == (1, 9, 200) and bool(logits.isfinite().all())


def test_what_else_is_timed_is_another_table():
    model, keys = tiny("llama"), []
    for changes in ({}, {"bits": 8}, {"latency_rows": 4}, {"latency_context": 9}, {"floor": 0.5}):
        known = Known(TABLE)
        with use_context(known):
            latency.timed(model, PruneConfig(rounding=32, **changes), [])
        assert known.keys[0] not in keys
        keys += known.keys


@pytest.mark.parametrize("bits", [4, 8, 16, 32])
def test_a_network_as_it_is_decoded(bits):
    model = tiny("llama")
    ids = torch.arange(20)[None]
    timed = as_decoded(model.family, model.network, bits)
    with torch.no_grad():
        expected, found = (network(ids).logits.float() for network in (model.network, timed))
    assert (
        float((found - expected).norm() / expected.norm())
        < {4: 0.6, 8: 0.1, 16: 0.1, 32: 1e-6}[bits]
    )
    shared = timed.model.norm.weight.data_ptr() == model.network.model.norm.weight.data_ptr()
    assert shared == (bits != 16) and model.network.dtype == torch.float32
    found = step_milliseconds({"decoded": timed, "plain": model.network}, 2, 8)
    assert set(found) == {"decoded", "plain"} and min(found.values()) > 0


def test_the_search_takes_what_saves_time(data):
    model = tiny("llama")
    config = CONFIG | {"latency": 0.55, "bits": 32}
    with use_context(Known(TABLE)):
        _, report = prune(model, config, data)
    figures = report.metrics
    assert figures["latency_ms_predicted"] <= 0.55 * 14 * (1 + 1e-9)
    assert figures["latency_ms_dense_predicted"] == pytest.approx(14)
    assert figures["latency_ms"] > 0 and figures["latency_ms_dense"] > 0
    gone = [heads for heads in figures["heads"] if heads == [0, 0]]
    assert len(gone) == 2  # of the first block nothing may be left out
    assert report.parameters_after < report.parameters_before
    with use_context(Known(TABLE)):
        _, other = prune(model, CONFIG | {"latency_ms": 0.55 * 14, "bits": 32}, data)
        assert other.metrics["widths"] == figures["widths"]
        assert other.metrics["heads"] == figures["heads"]
        several = {"axes": ["mlp", "attention", "sublayers", "blocks"], "finalists": 3}
        _, best = prune(model, config | several, data)
        assert best.metrics["latency_ms_predicted"] <= 0.55 * 14 * (1 + 1e-9)
        _, blocks = prune(model, config | {"axes": ["blocks"]}, data)
        assert len(blocks.metrics["blocks_dropped"]) == 2  # 4 ms each, nearest to 6.3
        with pytest.raises(UserError, match="below .*, the least that the axes"):
            prune(model, config | {"axes": ["mlp"]}, data)
    with pytest.raises(UserError, match="latency_ms and parameters are two budgets"):
        prune(model, CONFIG | {"latency_ms": 1.0, "parameters": 10}, data)


def test_figures_of_this_machine_are_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("TAILOR_CACHE", str(tmp_path / "cache"))
    key = {"bits": 4, "sizes": [1, 2]}
    assert kept_figures.recall("latency", key) is None
    kept_figures.remember("latency", key, TABLE)
    assert kept_figures.recall("latency", key) == TABLE
    assert kept_figures.recall("latency", key | {"bits": 8}) is None
    monkeypatch.setattr(kept_figures.runs, "_processor", lambda: "another one")
    assert kept_figures.recall("latency", key) is None
    monkeypatch.undo()
    monkeypatch.setenv("TAILOR_CACHE", str(tmp_path / "cache"))
    [file] = (tmp_path / "cache").iterdir()
    file.write_text("{half")
    assert kept_figures.recall("latency", key) is None
    monkeypatch.setenv("TAILOR_CACHE", str(file))  # a file where the folder should be
    kept_figures.remember("latency", key, TABLE)
    assert kept_figures.recall("latency", key) is None
