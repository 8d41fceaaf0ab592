"""Distillation: the pruned student learns to predict what its dense teacher predicts."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._objective import (
    CachedRows,
    Imitation,
    Teacher,
    layer_map,
    require_same_vocabulary,
)
from tailor_engine.stages._precision import training_precision
from tailor_engine.stages._stage import Report, option, stage
from tailor_engine.stages._train import train
from tailor_engine.stages._train_config import TrainConfig, prepared, training_rows


@dataclass(frozen=True)
class DistillConfig(TrainConfig):
    """What of the teacher is imitated, and how strongly."""

    divergence: str = option(
        "forward",
        "from the teacher's probabilities",
        choices=("forward", "reverse", "jensen_shannon"),
    )
    temperature: float = option(1.0, "that softens both distributions", low=0.05, high=20)
    cross_entropy: float = option(0.0, "share of the labels' loss in the mix", low=0, high=1)
    hidden_weight: float = option(0.0, "of the hidden states' loss beside it; 0: none", low=0)
    hidden_loss: str = option("cosine", "between hidden states", choices=("cosine", "mse"))
    hidden_layers: int = option(4, "blocks whose output is compared, evenly spaced", low=1)
    teacher: str = option(
        "online",
        "asked at each step, or once: its top_k tokens of every position are kept in memory",
        choices=("online", "top_k"),
    )
    top_k: int = option(64, "tokens kept of every position by teacher top_k", low=1)


@stage(DistillConfig)
def distill(model: Model, config: Any, data: Data) -> tuple[Model, Report]:
    """Train the model to imitate its teacher, the dense model that pruning started from."""
    report = Report("distill", dataclasses.asdict(config))
    source = _teacher_of(model, config)
    rows, validation = training_rows(model, config, data)
    network = copy.deepcopy(model.network)
    dtype = training_precision(config, model.device)
    report.notes.append(f"products in {str(dtype).removeprefix('torch.')}")
    teacher = Teacher(source, dtype)
    hidden_map: list[tuple[int, int]] = []
    if config.hidden_weight:
        blocks = [len(m.family.blocks_of(m.network)) for m in (model, source)]
        hidden_map = layer_map(blocks[0], blocks[1], config.hidden_layers)
        report.metrics["hidden_map"] = [list(pair) for pair in hidden_map]
    objective = Imitation(
        network,
        model.family,
        dtype,
        teacher,
        divergence=config.divergence,
        temperature=config.temperature,
        cross_entropy=config.cross_entropy,
        hidden_weight=config.hidden_weight,
        hidden_loss=config.hidden_loss,
        hidden_map=hidden_map,
    )
    if config.teacher == "top_k":
        rows, validation = (
            _ask(teacher, part, config, model.device) for part in (rows, validation)
        )
    with prepared(network, model.family, config):
        report.metrics |= train(objective, rows, validation, config).metrics()
    return model.replace(network=network), report


def _teacher_of(model: Model, config: DistillConfig) -> Model:
    """Return the teacher, checked against the student and the config."""
    teacher = model.teacher
    if teacher is None:
        raise UserError(
            "distill needs a teacher, and this model has none: prune it first (the dense model "
            "becomes its teacher), or set Model.teacher"
        )
    require_same_vocabulary(model, teacher)
    if config.teacher == "top_k" and (config.hidden_weight or config.divergence != "forward"):
        raise UserError(
            "distill: teacher top_k keeps probabilities alone; it needs hidden_weight 0 and "
            "divergence forward, or teacher online"
        )
    vocabulary = int(teacher.family.head_weight(teacher.network).shape[0])
    if config.teacher == "top_k" and config.top_k >= vocabulary:
        raise UserError(f"distill: top_k {config.top_k} must be below the {vocabulary} tokens")
    sizes = model.config.hidden_size, teacher.config.hidden_size
    if config.hidden_weight and sizes[0] != sizes[1]:
        raise UserError(
            f"distill: hidden states of {sizes[0]} and {sizes[1]} values cannot be compared; "
            "set hidden_weight to 0"
        )
    return teacher


def _ask(teacher: Teacher, rows: Any, config: DistillConfig, device: torch.device) -> CachedRows:
    """Ask the teacher once about each different row."""
    if not len(rows):
        return CachedRows(rows.input_ids, rows.position_ids, rows.labels)
    key = torch.cat([rows.input_ids, rows.position_ids, rows.labels], 1)
    _, places = torch.unique(key, dim=0, return_inverse=True)
    first = torch.full((int(places.max()) + 1,), len(rows))
    first.scatter_reduce_(0, places, torch.arange(len(rows)), "amin")
    once = CachedRows(rows.input_ids[first], rows.position_ids[first], rows.labels[first])
    asked = teacher.cached(once, config.top_k, config.batch_size, device, config.temperature)
    extra = {name: tensor[places] for name, tensor in asked.extra.items()}
    return CachedRows(rows.input_ids, rows.position_ids, rows.labels, extra)
