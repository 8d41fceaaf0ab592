"""Every family through every stage, saved, and the same logits in a new process."""

import json
import random
import subprocess
import sys

import pytest
import torch

from tailor_engine import stages
from tailor_engine.data import Corpus, Data, Document
from tailor_engine.errors import UserError
from tailor_engine.io.models import save
from tailor_engine.stages.quantize.rounding import Format, compensated
from tailor_engine.stages.quantize.smooth import smooth
from tests.tiny import FAMILIES, SENTENCES, tiny

QUICK = {"sequence_length": 32, "batch_size": 2}
PLAN = {
    "correct": {**QUICK, "steps": 2, "validation_rows": 2},
    "prune": {"sequence_length": 32, "rows": 24, "target": 0.9, "rounding": 32, "fisher_rows": 4},
    "distill": {**QUICK, "steps": 2, "validation_rows": 2},
    "specialize": {**QUICK, "steps": 2, "validation_rows": 2},
    "quantize": {"sequence_length": 32, "rows": 4},
    "evaluate": {
        **QUICK,
        "rows": 2,
        "prompt_tokens": 8,
        "new_tokens": 3,
        "samples": 1,
        "sample_tokens": 4,
    },
}


@pytest.fixture(scope="module")
def data():
    """Two corpora of a few hundred sentences made of shuffled words."""
    chance = random.Random(0)
    words = " ".join(SENTENCES).split()

    def corpus(name):
        texts = (" ".join(chance.choices(words, k=60)) for _ in range(160))
        return Corpus.from_documents(name, [Document(text) for text in texts])

    return Data(corpus("domain"), corpus("general"))


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """Return {family: (folder, logits, reports)} of every family's run through the plan."""
    results = {}
    for family in FAMILIES:
        model, reports = tiny(family, layers=2), {}
        for name, config in PLAN.items():
            model, reports[name] = stages.get(name)(model, config, data)
        folder = tmp_path_factory.mktemp(family) / "model"
        save(model, folder)
        ids = torch.arange(40)[None] % 300
        with torch.inference_mode():
            logits = model.network(ids).logits
        results[family] = (folder, logits, reports)
    return results


def test_every_family_through_every_stage(finished):
    for family, (_, logits, reports) in finished.items():
        assert torch.isfinite(logits).all(), family
        assert reports["prune"].parameters_after < reports["prune"].parameters_before
        assert reports["distill"].metrics["loss"]
        metrics = reports["evaluate"].metrics
        assert metrics["domain_perplexity"] > 1
        assert metrics["general_kl_to_base"] > 0
        assert metrics["size_bytes"] < 4 * metrics["parameters"]
        assert set(metrics["samples"][0]) == {"prompt", "base", "specialist"}


def test_a_new_process_gives_the_same_logits(finished, tmp_path):
    folders = {family: str(folder) for family, (folder, _, _) in finished.items()}
    script = (
        "import json, sys, torch, tailor_engine\n"
        "torch.set_num_threads(1)\n"
        "for family, folder in json.loads(sys.argv[1]).items():\n"
        "    model = tailor_engine.load(folder)\n"
        "    with torch.inference_mode():\n"
        "        logits = model.network(torch.arange(40)[None] % 300).logits\n"
        f"    torch.save(logits, r'{tmp_path}/' + family)\n"
    )
    subprocess.run([sys.executable, "-c", script, json.dumps(folders)], check=True, cwd=tmp_path)
    for family, (_, logits, _) in finished.items():
        again = torch.load(tmp_path / family)
        torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item())


def test_evaluate_counts_like_a_hand_written_loop(data):
    model = tiny("llama", layers=2)
    config = {**PLAN["evaluate"], "rows": 3, "new_tokens": 0, "samples": 0, "precision": "float32"}
    metrics = stages.get("evaluate")(model, config, data)[1].metrics
    rows = data.domain.rows("test", model.tokenizer, 32, limit=3)
    with torch.inference_mode():
        logits = model.network(
            input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False
        ).logits
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows.labels.flatten(), ignore_index=-100
    )
    assert metrics["domain_perplexity"] == pytest.approx(losses.exp().item(), rel=1e-5)
    counted = rows.labels != -100
    hits = (logits.argmax(-1) == rows.labels)[counted].double().mean().item()
    assert metrics["domain_accuracy"] == pytest.approx(hits)
    bits = losses.item() * counted.sum().item() / 0.6931471805599453 / rows.target_bytes
    assert metrics["domain_bits_per_byte"] == pytest.approx(bits, rel=1e-5)
    assert metrics["domain_kl_to_base"] == 0


def test_evaluate_names_the_block_that_breaks(data):
    model = tiny("llama", layers=3)
    model.family.part(model.family.blocks_of(model.network)[1], "down").weight.data[3, 5] = (
        torch.nan
    )
    with pytest.raises(UserError, match="not finite from block 1 on"):
        stages.get("evaluate")(model, PLAN["evaluate"], data)


def test_quantize_keeps_what_it_was_told_to_skip(data):
    model = tiny("qwen3", layers=2)
    config = {**PLAN["quantize"], "skip": ["down"], "embedding_bits": 32, "bits": 8}
    quantized, report = stages.get("quantize")(model, config, data)
    block = model.family.blocks_of(quantized.network)[0]
    assert isinstance(model.family.part(block, "down"), torch.nn.Linear)
    assert not isinstance(model.family.part(block, "up"), torch.nn.Linear)
    assert all(0 < error < 0.01 for error in report.metrics["output_error"][0].values())
    assert quantized.size_bytes < model.size_bytes


def test_each_refinement_of_rounding_loses_less(data):
    model = tiny("llama", layers=2)

    def lost(**config):
        report = stages.get("quantize")(model, {**PLAN["quantize"], "rows": 24, **config}, data)[1]
        return sum(sum(block.values()) for block in report.metrics["output_error"])

    plain = lost(method="nearest", clip_search=False)
    searched = lost(method="nearest")
    repaired = lost(method="compensated")
    assert repaired < searched < plain


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_changes_no_logit(family):
    model = tiny(family, layers=2)
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        before = model.network(ids).logits
    for block in model.family.blocks_of(model.network):
        widths = {
            p: model.family.part(block, p).in_features for p in ("query", "output", "gate", "down")
        }
        largest = {part: torch.rand(width) * 9 + 0.1 for part, width in widths.items()}
        smooth(model.family, block, model.config.num_attention_heads, largest, 0.5)
    with torch.inference_mode():
        after = model.network(ids).logits
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


def test_compensated_rounding_is_the_textbook_recursion():
    """Against a loop that solves for the remaining weights anew after every column."""
    torch.manual_seed(0)
    weight, x = torch.randn(5, 64), torch.randn(400, 64) @ torch.randn(64, 64)
    moment, form = x.T @ x / 400, Format(8, 0, True, clip_search=False)
    packed = compensated(weight, form, moment, ridge=0.01)
    damped = moment.double() + 0.01 * moment.diagonal().mean().double() * torch.eye(64)
    rest, scale = weight.double().clone(), packed.scale.double()
    for j in range(64):
        code = (rest[:, j] / scale).round().clamp(-127, 127)
        change = code * scale - rest[:, j]
        later = damped[j + 1 :, j + 1 :]
        if len(later):  # the best change of the later weights, given this column's
            rest[:, j + 1 :] -= torch.linalg.solve(later, damped[j + 1 :, j, None] * change).T
        rest[:, j] = code * scale
    assert (packed.dequantize().double() - rest).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("stage", "config", "words"),
    [
        ("prune", {"traget": 0.8}, "prune: unknown key 'traget'; did you mean 'target'?"),
        ("prune", {"target": 1.5}, "prune: target must be >= 0.05 and <= 1, got 1.5"),
        ("quantize", {"bits": 3}, "quantize: bits must be one of 4, 8, got 3"),
        ("quantize", {"rows": "many"}, "quantize: rows must be int, got 'many'"),
        ("quantize", {"skip": ["downn"]}, "'downn' is no part of a block"),
    ],
)
def test_a_wrong_config_is_one_clear_line(data, stage, config, words):
    with pytest.raises(UserError) as caught:
        stages.get(stage)(tiny("llama", layers=1), config, data)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
