"""A diagnosis finds what is planted in a network, and only the text decides what it says."""

import random
import re

import numpy as np
import pytest
import torch
from pyarrow import parquet

from tailor_engine import cli
from tailor_engine.data import Corpus, Data, Document
from tailor_engine.diagnostics import diagnose, patterns
from tailor_engine.errors import TailorError, UserError
from tailor_engine.io import diagnosis as pages
from tailor_engine.stages import get
from tailor_engine.stages.prune import criteria
from tests import workshop
from tests.shapes import mix
from tests.tiny import FAMILIES, SENTENCES, tiny

CONFIG = {
    "rows": 24,
    "fisher_rows": 8,
    "attention_rows": 6,
    "sequence_length": 32,
    "rounding": 32,
    "precision": "float32",
    "ridge": 1e-2,
}
DEAD, TWINS, OUTLIER, HEAD = range(96, 128), (7, 9), 11, 1
DOMAIN_CHANNEL, GENERAL_CHANNEL = 20, 21


def corpora():
    """Two corpora of different words."""
    chance = random.Random(0)

    def corpus(name, words):
        texts = (" ".join(chance.choices(words, k=chance.randint(5, 60))) for _ in range(300))
        return Corpus.from_documents(name, [Document(text) for text in texts])

    first, second = (" ".join(part).split() for part in (SENTENCES[:4], SENTENCES[4:]))
    return Data(corpus("domain", first), corpus("general", second))


def ids(corpus, tokenizer):
    return {i for d in corpus.splits["calibration"] for i in tokenizer(d.text)["input_ids"]}


def planted(data):
    """A model with dead channels, twins, an outlier, an even head, and channels of one corpus."""
    model = tiny("llama")
    first, second, third = model.family.blocks_of(model.network)
    part = model.family.part
    embedding = model.family.embedding_of(model.network).weight
    words = [ids(corpus, model.tokenizer) for corpus in (data.domain, data.general)]
    with torch.no_grad():
        part(first, "up").weight[DEAD] = 0
        for name in ("gate", "up"):
            weight = part(second, name).weight
            weight[TWINS[1]] = weight[TWINS[0]]
        part(third, "up").weight[OUTLIER] *= 3000
        part(second, "query").weight[16 * HEAD : 16 * (HEAD + 1)] = 0
        # A direction of the stream that only one corpus' tokens have, and a channel that reads it.
        for channel, axis, own in (
            (DOMAIN_CHANNEL, 62, words[0] - words[1]),
            (GENERAL_CHANNEL, 63, words[1] - words[0]),
        ):
            embedding[:, axis] = 0
            embedding[list(own), axis] = 6
            part(first, "output").weight[axis] = 0
            for name in ("gate", "up"):
                part(first, name).weight[channel] = 0
                part(first, name).weight[channel, axis] = 1
    return model


@pytest.fixture(scope="module")
def data():
    return corpora()


@pytest.fixture(scope="module")
def model(data):
    return planted(data)


@pytest.fixture(scope="module")
def found(model, data):
    return diagnose(model, CONFIG, data)


def column(found, name, layer):
    table = found.tables["channels"]
    return table[name][table["layer"] == layer]


def test_dead_channels_are_found_and_free(found):
    assert np.flatnonzero(column(found, "dead", 0)).tolist() == list(DEAD)
    assert found.tables["layers"]["dead"].tolist() == [32, 0, 0]
    curves = found.tables["curves"]
    first = (curves["layer"] == 0) & (curves["kind"] == "mlp")
    cost = dict(zip(curves["width"][first], curves["nats"][first], strict=True))
    assert list(cost) == [128, 96, 64, 32]
    assert cost[128] == 0 and cost[96] < 1e-3 * cost[64]
    assert any("32 channels of 384 are dead" in line for line in found.findings["extremes"])


def test_a_twin_is_found_and_lowers_the_rank(found, data):
    twin, cosine = column(found, "twin", 1), column(found, "twin_cosine", 1)
    for one, other in (TWINS, TWINS[::-1]):
        assert twin[one] == other
        assert cosine[one] == pytest.approx(1, abs=1e-5)
        assert column(found, "explained", 1)[one] > 0.97
    assert found.tables["layers"]["twins"].tolist() == [0, 2, 0]
    more = planted(data)
    block = more.family.blocks_of(more.network)[1]
    with torch.no_grad():
        for name in ("gate", "up"):
            more.family.part(block, name).weight[30:60] = more.family.part(block, name).weight[7]
    lower = diagnose(more, CONFIG, data).tables["layers"]
    for name in ("effective_rank", "effective_rank_scaled"):
        assert lower[name][1] < 0.9 * found.tables["layers"][name][1]


def test_an_outlier_is_found(found):
    assert np.flatnonzero(column(found, "outlier", 2)).tolist() == [OUTLIER]
    layers = found.tables["layers"]
    assert layers["peak_channel"][2] == OUTLIER
    assert layers["effective_rank"][2] < 2 < layers["effective_rank_scaled"][2]
    assert any(f"channel {OUTLIER} of layer 2" in line for line in found.findings["extremes"])


def test_channels_of_one_corpus_are_found(found):
    assert column(found, "domain_only", 0)[DOMAIN_CHANNEL]
    assert column(found, "general_only", 0)[GENERAL_CHANNEL]
    ratio = column(found, "log2_ratio", 0)
    assert ratio.argmax() == DOMAIN_CHANNEL and ratio.argmin() == GENERAL_CHANNEL
    assert column(found, "energy_general", 0)[DOMAIN_CHANNEL] == 0
    assert not column(found, "domain_only", 0)[list(DEAD)].any()


def test_an_even_head_has_the_entropy_of_an_even_look(model, data):
    parts = (data.domain, data.general)
    rows = [c.rows("calibration", model.tokenizer, 32, 3) for c in parts]
    rows = type(rows[0]).concat(rows)
    heads, _ = patterns.collect(model.family, model.network, rows)
    seen = 1 + rows.position_ids[rows.valid & (rows.position_ids > 0)].double()
    even = (heads["layer"] == 1) & (heads["head"] == HEAD)
    assert heads["entropy_nats"][even] == pytest.approx(float(seen.log().mean()), rel=1e-5)
    assert heads["entropy_share"][even] == pytest.approx(1, rel=1e-5)
    assert heads["first_token_share"][even] == pytest.approx(float((1 / seen).mean()), rel=1e-5)
    assert heads["previous_share"][even] == pytest.approx(float((1 / seen).mean()), rel=1e-5)
    assert heads["distance"][even] == pytest.approx(float(((seen - 1) / 2).mean()), rel=1e-4)
    assert (heads["entropy_share"][~even] < 0.999).all()
    assert model.network.config._attn_implementation == "sdpa"


def test_padding_does_not_count(model, data, found):
    """The second moment of a channel, by hand, over the text alone."""
    rows = data.domain.rows("calibration", model.tokenizer, 32, 12)
    assert not rows.valid.all()
    down = model.family.part(model.family.blocks_of(model.network)[1], "down")
    held = []
    handle = down.register_forward_pre_hook(lambda module, args: held.append(args[0]))
    with torch.no_grad():
        model.network(rows.input_ids, position_ids=rows.position_ids, use_cache=False)
    handle.remove()
    expected = held[0][rows.valid].double().square().mean(0).numpy()
    np.testing.assert_allclose(column(found, "energy_domain", 1), expected, rtol=1e-4)


def same(first, second):
    for name, table in first.tables.items():
        for key, values in table.items():
            other = second.tables[name][key]
            if name == "budget" or key == "twin":
                continue  # follow from the others, where a tie may fall either way
            if np.asarray(values).dtype.kind == "f":
                np.testing.assert_allclose(values, other, rtol=2e-3, atol=1e-6, err_msg=key)
            else:
                assert np.array_equal(values, other), key


def test_neither_the_batch_nor_the_memory_matters(model, data, found):
    same(found, diagnose(model, CONFIG | {"batch_size": 3}, data))
    same(found, diagnose(model, CONFIG | {"memory": 0.0}, data))


def test_the_budget(found):
    table = found.tables["budget"]
    plans = ("mlp", "attention", "sublayers", "uniform", "all")
    *alone, best = (table["plan"] == plan for plan in plans)
    for rows in (*alone, best):
        assert table["removed"][rows][0] == 0 and table["nats"][rows][0] == 0
        assert (np.diff(table["nats"][rows]) >= 0).all()
    for rows in alone:  # no axis by itself is better than all of them
        for removed, nats in zip(table["removed"][rows], table["nats"][rows], strict=True):
            assert np.interp(removed, table["removed"][best], table["nats"][best]) <= nats + 1e-3
    first = np.flatnonzero(alone[0])[1]
    assert table["widths"][first] == [96, 128, 128]  # the dead ones go first
    assert table["groups"][first] == table["queries"][first] == [2, 2, 2]


@pytest.mark.parametrize("family_name", FAMILIES)
def test_every_family(family_name, data):
    model = tiny(family_name, layers=2)
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    tables = diagnose(model, CONFIG | {"rows": 8, "fisher_rows": 4}, data).tables
    assert all(torch.equal(before[k], v) for k, v in model.network.state_dict().items())
    assert all(p.requires_grad for p in model.network.parameters())
    assert len(tables["channels"]["layer"]) == 2 * 128 and len(tables["heads"]["layer"]) == 2 * 4
    for table in tables.values():
        for values in table.values():
            assert np.asarray(values).dtype.kind != "f" or np.isfinite(values).all()
    assert (tables["heads"]["entropy_share"] <= 1 + 1e-5).all()


def test_a_model_of_different_widths(data, tmp_path):
    pruned, report = get("prune")(
        tiny("llama", layers=4),
        {"sequence_length": 32, "rows": 24, "fisher_rows": 4, "rounding": 32, "target": 0.8},
        data,
    )
    widths = report.metrics["widths"]
    assert len(set(widths)) > 1
    again = diagnose(pruned, CONFIG, data)
    assert again.tables["layers"]["width"].tolist() == widths
    assert again.tables["budget"]["widths"][0] == widths
    assert "What a budget would cost" in pages.page(again)


def test_the_folder(found, tmp_path, monkeypatch):
    page = pages.write(found, tmp_path / "out")
    assert page == tmp_path / "out/index.html"
    columns = {
        "channels": {"layer", "channel", "energy_domain", "energy_general", "variance", "dead"}
        | {"outlier", "explained", "twin", "log2_ratio", "peak"}
        | {f"importance_{name}" for name in criteria.NAMES},
        "layers": {"layer", "block_influence", "effective_rank", "stream_peak", "half_nats"},
        "heads": {"layer", "head", *patterns.FIGURES},
        "budget": {"plan", "removed", "parameters", "nats", "widths", "groups", "queries"},
        "curves": {"layer", "kind", "width", "groups", "queries", "nats"},
        "agreement": {"criterion", *criteria.NAMES},
    }
    for name, expected in columns.items():
        table = parquet.read_table(tmp_path / f"out/{name}.parquet")
        assert expected <= set(table.column_names)
        assert table.num_rows == len(next(iter(found.tables[name].values())))
    text = page.read_text()
    assert text.count("<svg") == 14 and "What the domain uses" in text
    assert not re.search(r"(src|href)=\"http", text)
    for lines in found.findings.values():
        assert all(line in text.replace("&#39;", "'") for line in lines)
    monkeypatch.setattr(pages, "page", lambda diagnosis: "another")
    pages.write(found, tmp_path / "out")  # a diagnosis gives way to another one
    assert page.read_text() == "another"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_failed_write_leaves_no_folder(found, tmp_path, monkeypatch):
    def full(table, path):
        path.write_bytes(b"PAR1")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pages, "page", lambda diagnosis: "page")
    monkeypatch.setattr(parquet, "write_table", full)
    with pytest.raises(TailorError, match="the disk is full"):
        pages.write(found, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_without_general_text(model, data):
    alone = diagnose(model, CONFIG, Data(data.domain))
    assert np.isnan(alone.tables["channels"]["energy_general"]).all()
    assert alone.findings["corpora"] == []
    assert "What the domain uses" not in pages.page(alone)


def test_a_model_of_which_halves_are_left_out(data):
    model = tiny("gemma2", layers=4)
    mix(model)
    blocks = model.family.blocks_of(model.network)
    left = [[model.family.has(b, kind) for b in blocks] for kind in ("attention", "mlp")]
    assert not all(left[0]) and not all(left[1])
    found = diagnose(model, CONFIG, data)
    layers = found.tables["layers"]
    assert layers["width"].tolist() == model.family.widths(model.network)
    assert np.isnan(layers["entropy_share"]).tolist() == [not there for there in left[0]]
    assert np.isnan(layers["half_nats"]).tolist() == [not there for there in left[1]]
    assert np.isfinite(layers["block_influence"]).all()
    assert set(found.tables["heads"]["layer"]) == set(np.flatnonzero(left[0]))
    assert set(found.tables["channels"]["layer"]) == set(np.flatnonzero(left[1]))
    budget = found.tables["budget"]
    assert budget["widths"][0] == model.family.widths(model.network)
    heads = [model.family.heads(block) for block in blocks]
    assert budget["groups"][0] == [keys for _, keys in heads]
    assert (np.diff(budget["nats"][budget["plan"] == "all"]) >= 0).all()
    text = pages.page(found)
    assert "nan" not in re.sub(r"<[^>]*>", " ", text).lower().split()
    same(found, diagnose(model, CONFIG | {"memory": 0.0}, data))


def test_the_prediction_is_that_of_prune(data):
    """The same code on the same rows: what diagnose foretells is what the search expects."""
    model = tiny("llama", layers=3)
    config = {"rows": 24, "fisher_rows": 24, "sequence_length": 32, "rounding": 32, "ridge": 0.03}
    found = diagnose(model, config | {"precision": "float32"}, Data(data.domain))
    table = found.tables["budget"]
    wanted = config | {"domain_weight": 1.0, "held_out": 0.0, "precision": "float32"}
    _, report = get("prune")(model, wanted | {"target": 0.8}, Data(data.domain))
    best = table["plan"] == "all"
    foretold = np.interp(0.2, table["removed"][best], table["nats"][best])
    assert foretold == pytest.approx(report.metrics["predicted_loss_rise_nats_total"], rel=0.2)


def test_bad_input_is_one_line(data):
    quantized, _ = get("quantize")(tiny("llama"), {"sequence_length": 32, "rows": 4}, data)
    with pytest.raises(UserError, match="diagnose: .* QuantizedLinear; .* before it is quantized"):
        diagnose(quantized, CONFIG, data)
    with pytest.raises(UserError, match="did you mean 'rows'"):
        diagnose(tiny("llama"), {"rowz": 3}, data)
    broken = tiny("llama")
    down, up = (
        broken.family.part(broken.family.blocks_of(broken.network)[i], name)
        for i, name in ((2, "down"), (1, "up"))
    )
    with torch.no_grad():
        down.weight[3, 4] = float("nan")
    with pytest.raises(UserError, match=r"^diagnose: the weight .*layers\.2.* holds NaN"):
        diagnose(broken, CONFIG, data)
    with torch.no_grad():
        down.weight[3, 4] = 0
        up.weight.mul_(1e30)
    with pytest.raises(UserError, match="^diagnose: the activations of block 1 "):
        diagnose(broken, CONFIG, data)
    with pytest.raises(UserError, match="^diagnose: the activations of blocks 1 to 1 "):
        diagnose(broken, CONFIG | {"memory": 0.0}, data)
    empty = Corpus.from_documents("few", [Document("too little")])
    with pytest.raises(UserError, match="less than one sequence"):
        diagnose(tiny("llama"), CONFIG, Data(empty))


def test_the_command(tmp_path, monkeypatch, capsys):
    workshop.furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    short = ["--rows", "8", "--fisher-rows", "4", "--attention-rows", "2"]
    short += ["--sequence-length", "32", "--rounding", "32"]

    def tailor(*more):
        code = cli.main(["diagnose", "tiny", "--domain", "domain.txt", *more, *short])
        return code, *capsys.readouterr()

    code, out, err = tailor("--general", "general.txt", "--out", "seen")
    assert (code, out.strip()) == (0, "diagnosis: seen/index.html"), err
    assert (tmp_path / "seen/channels.parquet").exists()
    code, out, err = tailor("--out", ".")
    assert code == 2 and err.count("\n") == 1 and "not a diagnosis's" in err
    code, out, err = tailor("--out", "other", "--dead", "2")
    assert code == 2 and err.count("\n") == 1 and "dead must be" in err
    assert not (tmp_path / "other").exists()
