"""Run a plan: each stage on what the stage before wrote, evaluated before the first and after each.

A run with a store (`io.runs.RunFolder`) is resumable: a finished stage whose inputs are unchanged
is never redone, an interrupted training stage goes on from its checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any, Protocol

import numpy
import torch

from tailor_engine import __version__, stages
from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.io import measured
from tailor_engine.io.models import check_finite
from tailor_engine.io.stores import Memory, Store
from tailor_engine.model import Model
from tailor_engine.stages._repeat import expand
from tailor_engine.stages._stage import STAGES, Context, Report, make_config, use_context

BASE = "0-base"


@dataclass(frozen=True)
class Step:
    """One step of a plan: a stage's name and its config."""

    name: str
    config: Any


class Observer(Protocol):
    """Hears what a run does; the command line shows it."""

    def started(self, name: str, position: int, total: int) -> None:
        """Begin a stage."""
        return None

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the running stage is."""
        return None

    def note(self, line: str) -> None:
        """Tell a one-line fact that the user should read."""
        return None

    def finished(self, name: str, record: dict[str, Any], kept: bool) -> None:
        """End a stage and its evaluation; `kept` when an earlier run had done them."""
        return None


class _Silent(Observer):
    """Says nothing."""


def make_plan(items: Iterable[Any]) -> list[Step]:
    """Turn a list of configs, names, `{name: {key: value}}` mappings or steps into steps.

    `{"repeat": {"times": N, "stages": [...]}}` stands for N rounds of these stages.

    Raises:
        UserError: an unknown stage, an unknown key or a value out of range.
    """
    plan = []
    for item in expand(items):
        if isinstance(item, Step):
            name, config = item.name, item.config
        elif is_dataclass(item):
            name, config = _stage_of(item), item
        else:
            name, config = next(iter(item.items())) if isinstance(item, dict) else (item, {})
        plan.append(Step(name, _config(name, config)))
    return plan


def _config(name: str, values: Any) -> Any:
    """Return a stage's config, made from a mapping unless it is one already."""
    config_type = stages.config_type(name)
    if isinstance(values, config_type):
        return values
    return make_config(config_type, values or {}, name)


def _stage_of(config: Any) -> str:
    for name, stage in stages.load().items():
        if isinstance(config, stage.config_type):
            return name
    raise UserError(
        f"{type(config).__name__} is not the config of a stage; the stages are {', '.join(STAGES)}"
    )


def run(
    model: Model,
    plan: Iterable[Any],
    data: Data,
    run: Store | None = None,
    *,
    evaluate: Any = None,
    seed: int = 0,
    observer: Observer | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Walk a plan and return the last model and the report of the whole run.

    `evaluate` holds the settings of the evaluations (a config, or a mapping of its keys); False
    skips them. The report is the content of report.json: "base", "stages" and "final".

    Raises:
        UserError: the plan, the model or the data cannot be used as they stand, or a stage left
            weights that are not finite.
    """
    stages.load()
    walk = _Walk(model, data, run or Memory(), evaluate, seed, observer or _Silent())
    return walk.run(make_plan(plan))


def run_stage(
    name: str,
    model: Model,
    config: Any,
    data: Data,
    *,
    seed: tuple[int, int] = (0, 1),
    context: _StepContext | None = None,
    observer: Observer | None = None,
) -> tuple[Model, Report]:
    """Run one stage with its own seeds, gather its notes, and check what it leaves.

    Raises:
        UserError: the stage left weights that are not finite.
    """
    context = context or _StepContext(name, Memory(), observer or _Silent())
    with use_context(context), _seeded(*seed):
        after, report = stages.get(name)(model, _config(name, config), data)
    if after.network is not model.network:
        check_finite(after.network, f"stage {name}")
    report.notes.extend(line for line in context.notes if line not in report.notes)
    return after, report


class _Walk:
    """The state of one run: where it is, and which models are in memory."""

    def __init__(
        self, model: Model, data: Data, store: Store, evaluate: Any, seed: int, observer: Observer
    ) -> None:
        self.base, self.data, self.store = model, data, store
        self.seed, self.observer = seed, observer
        self.evaluation = evaluate is not False and _config("evaluate", evaluate)
        check_finite(model.network, model.source)
        self.base_outputs = fingerprint(model)
        self.common = {"tailor_engine": __version__, "seed": seed, "data": data.manifest()}
        self.models: dict[str, Model] = {BASE: model}  # by the name of the step that wrote them

    def run(self, plan: list[Step]) -> tuple[Model, dict[str, Any]]:
        previous: dict[str, Any] = {
            "name": BASE,
            "model": BASE,
            "teacher": None,
            "outputs": self.base_outputs,
            "input_hash": None,
        }
        total = len(plan)
        self.observer.started(BASE, 0, total)
        base = {"metrics": self.evaluate(BASE, previous, not plan)}
        report: dict[str, Any] = {"base": base, "stages": [], "final": base, "complete": False}
        self.observer.finished(BASE, base, False)
        self.store.report(report)
        for position, step in enumerate(plan, 1):
            name = f"{position}-{step.name}"
            self.observer.started(name, position, total)
            previous, kept = self.step(name, position, step, previous)
            metrics = previous["report"]["metrics"]
            if step.name != "evaluate":
                metrics = self.evaluate(name, previous, position == total)
            entry = stage_entry(name, previous["report"], metrics)
            report["stages"].append(entry)
            report["final"] = {"name": name, "metrics": metrics}
            self.store.report(report)
            self.observer.finished(name, entry, kept)
        report["complete"] = True
        self.store.report(report)
        return self.model_of(previous), report

    def step(
        self, name: str, position: int, step: Step, previous: dict[str, Any]
    ) -> tuple[dict[str, Any], bool]:
        """Return the record of a step, done now or kept from an earlier run."""
        inputs = {
            **self.common,
            "stage": step.name,
            "config": plain(asdict(step.config)),
            "previous": {key: previous[key] for key in ("outputs", "input_hash")},
        }
        record = self.store.find(name, inputs)
        if record is not None:
            return record, True
        self.store.begin(name, inputs)
        before = self.model_of(previous)
        after, report = run_stage(
            step.name,
            before,
            step.config,
            self.data,
            seed=(self.seed, position),
            context=_StepContext(name, self.store, self.observer),
        )
        unchanged = after.network is before.network
        models = {} if unchanged else {"model": after}
        teacher = self.name_of(after.teacher)
        if after.teacher is not None and teacher is None:
            models["teacher"], teacher = after.teacher, name
        record = {
            "name": name,
            "model": previous["model"] if unchanged else name,
            "teacher": teacher,
            "inputs": inputs,
            "input_hash": hash_of(inputs),
            "outputs": previous["outputs"] if unchanged else fingerprint(after),
            "report": plain(asdict(report)),
        }
        return self.store.finish(name, record, models), False

    def evaluate(self, name: str, record: dict[str, Any], last: bool) -> dict[str, Any]:
        """Measure the model that a step left, unless that has been done.

        Only the last one answers the sample prompts: generating text is most of the time.
        """
        if self.evaluation is False:
            return {}
        config = self.evaluation if last else replace(self.evaluation, samples=0)
        inputs = {
            **self.common,
            "config": plain(asdict(config)),
            "outputs": record["outputs"],
            "base": self.base_outputs,
        }
        metrics = self.store.find_evaluation(name, inputs)
        if metrics is None:
            model = self.model_of(record)
            with use_context(_StepContext(name, self.store, self.observer)), _seeded(self.seed, 0):
                _, report = STAGES["evaluate"](model, config, self.data)
            metrics = {**plain(report.metrics), "evaluation_seconds": report.seconds}
            self.store.keep_evaluation(name, inputs, metrics)
        return metrics

    def model_of(self, record: dict[str, Any]) -> Model:
        """Return the model that a step left, with its teacher and its base."""
        name, teacher = record["model"], record["teacher"]
        for other in [key for key in self.models if key not in (BASE, name, teacher)]:
            del self.models[other]
        if name == BASE:
            return self.base
        if name not in self.models:
            self.models[name] = self.load(name)
        restored = None
        if teacher == name:
            restored = self.load(name, "teacher")
        elif teacher is not None:
            if teacher not in self.models:
                self.models[teacher] = self.load(teacher)
            restored = self.models[teacher]
        return self.models[name].replace(base=self.base, teacher=restored)

    def load(self, *names: str) -> Model:
        """Return what the store kept, on the device of the base: one device a run."""
        return self.store.load(*names).to(self.base.device)

    def name_of(self, model: Model | None) -> str | None:
        """Return the step whose model this is."""
        if model is not None:
            for name, known in self.models.items():
                if known.network is model.network:
                    return name
        return None


class _StepContext(Context):
    """What a stage says goes to the observer; its checkpoint goes to the store."""

    def __init__(self, name: str, store: Store, observer: Observer) -> None:
        self.name, self.store, self.observer = name, store, observer
        self.notes: list[str] = []

    def progress(self, done: int, total: int, text: str = "") -> None:
        self.observer.progress(done, total, text)

    def note(self, line: str) -> None:
        self.notes.append(line)
        self.observer.note(line)

    def recall(self, what: str, key: Any) -> Any:
        return measured.recall(what, key)

    def remember(self, what: str, key: Any, value: Any) -> None:
        measured.remember(what, key, value)

    def load_checkpoint(self) -> dict[str, Any] | None:
        return self.store.load_checkpoint(self.name)

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        self.store.save_checkpoint(self.name, state)


class _seeded:
    """Seed every generator for one step, and leave them outside as they were."""

    def __init__(self, seed: int, position: int) -> None:
        self.seed = (seed * 1_000_003 + position) % 2**32

    def __enter__(self) -> None:
        self.states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
        self.cards = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        random.seed(self.seed)
        numpy.random.seed(self.seed)
        torch.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        random.setstate(self.states[0])
        numpy.random.set_state(self.states[1])
        torch.set_rng_state(self.states[2])
        if self.cards:
            torch.cuda.set_rng_state_all(self.cards)


def fingerprint(model: Model) -> str:
    """Return one SHA-256 over the names, types, shapes and bytes of a model's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.network.state_dict().items()):
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\n".encode())
        stored = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(memoryview(stored.numpy()))
    return digest.hexdigest()


def hash_of(value: Any) -> str:
    """Return the SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def plain(value: Any) -> Any:
    """Return a value as JSON can hold it: tensors as lists, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (torch.Tensor, numpy.ndarray, numpy.generic)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def stage_entry(name: str, report: dict[str, Any], metrics: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's entry in report.json; "details" are its own metrics, the loss curve say."""
    details = {} if report["stage"] == "evaluate" else report["metrics"]
    rest = {key: value for key, value in report.items() if key not in ("metrics", "stage")}
    return {"name": name, "stage": report["stage"], **rest, "metrics": metrics, "details": details}
