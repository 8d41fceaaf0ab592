"""The training loop and its three stages, on tiny models."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tailor_engine.errors import UserError
from tailor_engine.stages import _precision
from tailor_engine.stages._adapter import merge_adapter
from tailor_engine.stages._objective import (
    CachedRows,
    CrossEntropy,
    Imitation,
    Teacher,
    distance_of,
    final_states,
    layer_map,
)
from tailor_engine.stages._precision import bfloat16_speedup, precision
from tailor_engine.stages._stage import Context, use_context
from tailor_engine.stages._train import take
from tailor_engine.stages._train_config import TrainConfig
from tailor_engine.stages.correct import correct
from tailor_engine.stages.distill import distill
from tailor_engine.stages.specialize import specialize
from tests.tiny import FAMILIES, tiny, tiny_tokenizer
from tests.two_processes import CONFIG, tiny_data, trained

CPU = torch.device("cpu")
DATA = tiny_data()


def settings(**changes) -> dict:
    return CONFIG | {"gradient_accumulation": 1, "batch_size": 4} | changes


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.network.named_parameters()}


def furthest(left: dict, right: dict) -> float:
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


class Kept(Context):
    """Keeps checkpoints in memory, and can be killed right after one of them."""

    def __init__(self, state: dict | None = None, kill_at: int = 0) -> None:
        self.state, self.kill_at, self.seen, self.notes = state, kill_at, [], []

    def load_checkpoint(self) -> dict | None:
        return self.state

    def save_checkpoint(self, state: dict) -> None:
        self.state = copy.deepcopy(state)
        if state["step"] == self.kill_at:
            raise KeyboardInterrupt

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.seen.append((done, total, text))

    def note(self, line: str) -> None:
        self.notes.append(line)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_in_every_training_stage(family: str) -> None:
    model, few = tiny(family), settings(steps=3)
    before = weights(model)
    teacher, report = correct(model, few, DATA)
    assert furthest(before, weights(model)) == 0, "the input model must stay untouched"
    assert teacher.base is model
    assert report.metrics["loss_last"] < report.metrics["loss_first"]
    student = tiny(family, seed=1).replace(teacher=teacher, base=model)
    student, report = distill(student, few | {"hidden_weight": 0.1}, DATA)
    assert report.metrics["loss_last"] < report.metrics["loss_first"]
    assert student.teacher is teacher and student.base is model
    special, report = specialize(student, few, DATA)
    assert report.metrics["validation_loss"]
    assert special.parameters == student.parameters
    assert furthest(weights(special), weights(student)) > 0
    assert not special.network.training


def test_distillation_brings_the_student_to_the_teacher() -> None:
    teacher = correct(tiny(), settings(steps=30), DATA)[0]
    student = tiny(layers=2, seed=1).replace(teacher=teacher)
    rows = DATA.mixed("test", teacher.tokenizer, 32, 16, repeat=True)
    batch = take(rows, torch.arange(16), CPU)
    keep = batch["labels"] != -100

    @torch.no_grad()
    def divergence(model) -> float:
        asked = {name: batch[name] for name in ("input_ids", "position_ids")}
        log_q, log_p = (
            m.network(**asked, use_cache=False).logits[keep].log_softmax(-1)
            for m in (teacher, model)
        )
        return float((log_q.exp() * (log_q - log_p)).sum(-1).mean())

    before = divergence(student)
    for changes in ({}, {"teacher": "top_k", "top_k": 64}, {"divergence": "jensen_shannon"}):
        after = divergence(distill(student, settings(steps=25, **changes), DATA)[0])
        assert after < 0.5 * before, (changes, before, after)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_gradient_of_the_mixed_loss_is_that_of_plain_torch(family: str) -> None:
    teacher, student = tiny(family, seed=1), tiny(family)
    rows = DATA.mixed("train", student.tokenizer, 32, 3)
    batch = take(rows, torch.arange(3), CPU)
    batch["position_ids"] = torch.arange(32).expand(3, 32)  # one document a row
    keep, pairs = batch["labels"] != -100, [(0, 1), (2, 2)]
    objective = Imitation(
        student.network, student.family, torch.float32, Teacher(teacher, torch.float32),
        temperature=1.5, cross_entropy=0.3, hidden_weight=0.7, hidden_loss="mse", hidden_map=pairs,
    )  # fmt: skip
    objective(batch)["loss"].backward()
    found = {name: p.grad.clone() for name, p in student.network.named_parameters()}
    student.network.zero_grad()

    def run(model):
        return model.network(input_ids=batch["input_ids"], output_hidden_states=True)

    with torch.no_grad():
        wanted = run(teacher)
    ours = run(student)
    log_p = (ours.logits[keep] / 1.5).log_softmax(-1)
    log_q = (wanted.logits[keep] / 1.5).log_softmax(-1)
    divergence = 1.5**2 * (log_q.exp() * (log_q - log_p)).sum(-1).mean()
    labels = torch.nn.functional.cross_entropy(ours.logits[keep], batch["labels"][keep])
    blocks: dict = {}
    for name, model in (("ours", student), ("wanted", teacher)):
        states = final_states(model.network, model.family, batch, torch.float32, [0, 1, 2])[1]
        blocks[name] = {k: v if name == "ours" else v.detach() for k, v in states.items()}
    hidden = [distance_of(blocks["ours"][i], blocks["wanted"][j], "mse") for i, j in pairs]
    (0.7 * divergence + 0.3 * labels + 0.7 * torch.stack(hidden).mean()).backward()
    for name, parameter in student.network.named_parameters():
        scale = float(parameter.grad.abs().max()) + 1e-6
        assert float((found[name] - parameter.grad).abs().max()) < 2e-4 * scale, name


def test_documents_of_a_row_do_not_see_each_other() -> None:
    model = tiny()
    ids = torch.randint(6, 300, (1, 24), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, 24, dtype=torch.int64)
    parts = [slice(0, 10), slice(10, 24)]
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    together, *alone = (
        final_states(
            model.network,
            model.family,
            take(CachedRows(*(t[:, part] for t in (ids, positions, labels))), torch.arange(1), CPU),
            torch.float32,
        )[0]
        for part in (slice(None), *parts)
    )
    for part, states in zip(parts, alone, strict=True):
        torch.testing.assert_close(together[part], states, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [correct, distill, specialize], ids=lambda stage: stage.name)
def test_a_killed_training_goes_on_bit_for_bit(stage) -> None:
    model = tiny(seed=1).replace(teacher=tiny())
    config = settings(steps=7, checkpoint_steps=3, validations=7, learning_rate=0.05)
    if stage is not distill:
        config |= {"dropout": 0.2}
    if stage is correct:
        config |= {"method": "lora"}
    whole, report = stage(model, config, DATA)
    for step in (3, 6):
        torch.manual_seed(step)  # the world's own randomness must not matter
        killed = Kept(kill_at=step)
        with use_context(killed), pytest.raises(KeyboardInterrupt):
            stage(model, config, DATA)
        resumed = Kept(killed.state)
        with use_context(resumed):
            again, second = stage(model, config, DATA)
        assert furthest(weights(whole), weights(again)) == 0
        assert second.metrics["loss"] == report.metrics["loss"]
        assert resumed.seen[0][0] == step + 1
        assert resumed.notes[0] == f"went on from the checkpoint of step {step}"
    other = Kept(killed.state)
    with use_context(other):
        stage(model, config | {"learning_rate": 0.01}, DATA)
    assert "other settings" in other.notes[0] and len(other.seen) == 7


def test_a_resumed_training_keeps_its_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the measurement of auto now says otherwise."""
    model = tiny(seed=1).replace(teacher=tiny())
    config = settings(steps=4, checkpoint_steps=2, precision="auto")
    for fast in (True, False):
        monkeypatch.setattr(_precision, "fast_bfloat16", lambda device, fast=fast: fast)
        whole, _ = distill(model, config, DATA)
        killed = Kept(kill_at=2)
        with use_context(killed), pytest.raises(KeyboardInterrupt):
            distill(model, config, DATA)
        monkeypatch.setattr(_precision, "fast_bfloat16", lambda device, fast=fast: not fast)
        with use_context(Kept(killed.state)):
            again, report = distill(model, config, DATA)
        assert report.notes[0] == f"products in {'bfloat16' if fast else 'float32'}"
        assert furthest(weights(whole), weights(again)) == 0
        with use_context(Kept(killed.state)):  # other settings: a training of its own
            _, report = distill(model, config | {"learning_rate": 0.01}, DATA)
        assert report.notes[0] == f"products in {'float32' if fast else 'bfloat16'}"


def test_the_best_validation_is_kept_on_request() -> None:
    config = settings(steps=8, learning_rate=0.5, validations=8, schedule="constant", clip_norm=0.0)
    best, report = correct(tiny(), config, DATA)
    last, _ = correct(tiny(), config | {"keep": "last"}, DATA)
    losses = report.metrics["validation_loss"]
    assert min(losses) < losses[-1]
    assert furthest(weights(best), weights(last)) > 0
    rows = DATA.mixed("validation", best.tokenizer, 32, 3, 0.5, repeat=True)
    loss = CrossEntropy(best.network, best.family, torch.float32)(take(rows, torch.arange(3), CPU))
    assert float(loss["loss"]) == pytest.approx(min(losses), rel=1e-5)


def test_micro_batches_equal_the_whole_batch() -> None:
    whole, _ = correct(tiny(), settings(batch_size=5), DATA)
    for parts in (2, 5):
        cut, _ = correct(tiny(), settings(batch_size=5, gradient_accumulation=parts), DATA)
        assert furthest(weights(whole), weights(cut)) < 1e-6


def test_gradient_checkpointing_changes_nothing() -> None:
    model = tiny(layers=4).replace(teacher=tiny(seed=1))
    config = settings(steps=2, hidden_weight=1.0, hidden_layers=2)
    plain, _ = distill(model, config, DATA)
    saving, _ = distill(model, config | {"gradient_checkpointing": True}, DATA)
    assert furthest(weights(plain), weights(saving)) < 1e-6
    assert not saving.network.is_gradient_checkpointing


def test_a_merged_adapter_equals_the_kept_one() -> None:
    model = tiny("qwen2")
    kept, _ = specialize(model, settings(merge=False, dropout=0.1), DATA)
    merged, _ = specialize(model, settings(dropout=0.1), DATA)
    assert kept.parameters > merged.parameters == model.parameters
    ids = torch.arange(6, 40)[None]
    with torch.no_grad():
        left, right = (m.network(input_ids=ids).logits for m in (kept, merged))
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
        assert float((left - model.network(input_ids=ids).logits).abs().max()) > 1e-3
    merge_adapter(kept.network)
    assert furthest(weights(kept), weights(merged)) == 0
    assert type(kept.network.model.layers[0].mlp.down_proj) is torch.nn.Linear


def test_frozen_embeddings_stay() -> None:
    model = tiny("qwen3")
    result, _ = correct(model, settings(freeze_embeddings=True), DATA)
    same = {
        name
        for name, p in result.network.named_parameters()
        if torch.equal(p, model.network.get_parameter(name))
    }
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(p.requires_grad for p in result.network.parameters())


def test_bfloat16_training_stays_near_float32() -> None:
    model = tiny(seed=1).replace(teacher=tiny())
    losses = [
        distill(model, settings(steps=8, precision=name), DATA)[1].metrics["loss"]
        for name in ("float32", "bfloat16")
    ]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


def test_two_processes_equal_one(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    # A free port of its own, on the loopback alone: the machine's name need not resolve.
    where = ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    done = subprocess.run(
        [*launch, *where, "-m", "tests.two_processes", str(tmp_path / "weights.pt")],
        cwd=Path(__file__).parents[1],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    two, losses = torch.load(tmp_path / "weights.pt")
    one, expected = trained()
    assert furthest(two, one) < 1e-6
    assert losses == pytest.approx(expected, abs=1e-5)


def test_bad_input_gets_one_clear_line() -> None:
    model = tiny()
    wide = tiny(hidden=96)
    alien = tiny()
    alien.tokenizer = tiny_tokenizer(300)
    cases = [
        (distill, model, {}, "prune it first"),
        (distill, model.replace(teacher=tiny(vocabulary=310)), {}, "student has 320.*teacher 310"),
        (distill, model.replace(teacher=alien), {}, "one vocabulary: token"),
        (distill, model.replace(teacher=wide), {"hidden_weight": 1.0}, "64 and 96 values"),
        (distill, model.replace(teacher=wide), {"teacher": "top_k", "top_k": 320}, "below the 320"),
        (distill, model.replace(teacher=wide),
         {"teacher": "top_k", "divergence": "reverse"}, "divergence forward"),
        (specialize, model, {"teacher_weight": 0.5}, "needs a teacher"),
        (correct, model, {"gradient_accumulation": 5}, "must be at least 5"),
        (correct, model, {"schedule": "cosin"}, "did you mean 'cosine'"),
    ]  # fmt: skip
    for stage, subject, changes, words in cases:
        with pytest.raises(UserError, match=words) as caught:
            stage(subject, settings(**changes), DATA)
        assert "\n" not in str(caught.value)
    student, _ = distill(model.replace(teacher=wide), settings(steps=1), DATA)
    assert student.parameters == model.parameters, "a teacher of another width teaches"


def test_a_loss_that_is_not_finite_names_step_and_cause() -> None:
    broken = tiny()
    broken.network.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("nan")
    with pytest.raises(UserError, match=r"step 1 of 4.*model\.layers\.1\.mlp\.up_proj\.weight"):
        correct(broken, settings(), DATA)
    huge = tiny()
    huge.network.model.layers[1].mlp.down_proj.weight.data *= 1e36
    huge.network.model.layers[1].mlp.up_proj.weight.data *= 1e6
    with pytest.raises(UserError, match=r"activations of model\.layers\.1\.mlp\.down_proj"):
        correct(huge, settings(), DATA)
    steep = tiny("qwen3")
    steep.network.lm_head.weight.data *= 1e25
    with pytest.raises(UserError, match=r"step 1 of 4: the gradient is not.*learning_rate"):
        correct(steep, settings(), DATA)


def test_learning_rate_layer_map_and_precision() -> None:
    config = TrainConfig(steps=100, learning_rate=1.0, warmup=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 11 for k in range(10)])
    assert rates[10] == 1.0 and rates[55] == pytest.approx(0.5) and 0 < rates[99] < 1e-3
    assert TrainConfig(tokens=10_240, batch_size=4, sequence_length=256).step_count == 10
    assert layer_map(24, 30, 4) == [(5, 7), (11, 14), (17, 21), (23, 29)]
    assert layer_map(2, 2, 9) == [(0, 0), (1, 1)]
    assert precision("bfloat16", CPU) == torch.bfloat16
    fast = bfloat16_speedup("cpu", torch.get_num_threads()) >= 1.5
    assert (precision("auto", CPU) == torch.bfloat16) == fast
