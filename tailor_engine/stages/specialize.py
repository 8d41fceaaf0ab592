"""Specialisation: low-rank adapters on the domain, merged at the end or kept apart."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.model import Model
from tailor_engine.stages._adapter import add_adapter, merge_adapter
from tailor_engine.stages._objective import (
    CrossEntropy,
    Imitation,
    Teacher,
    require_same_vocabulary,
)
from tailor_engine.stages._precision import training_precision
from tailor_engine.stages._stage import Report, option, stage
from tailor_engine.stages._train import train
from tailor_engine.stages._train_config import TrainConfig, prepared, training_rows


@dataclass(frozen=True)
class SpecializeConfig(TrainConfig):
    """How the adapters learn the domain, and how much of the teacher they keep."""

    steps: int = option(60, "optimizer steps", low=1)
    learning_rate: float = option(5e-4, "highest learning rate", low=0, high=1)
    domain_weight: float = option(0.75, "share of domain rows beside general ones", low=0, high=1)
    teacher_weight: float = option(
        0.0, "share of the divergence from the teacher; the rest is the labels'", low=0, high=1
    )
    rank: int = option(16, "of the adapters", low=1)
    alpha: int = option(32, "scale of the adapters times their rank", low=1)
    dropout: float = option(0.0, "of the adapters' inputs", low=0, high=0.9)
    merge: bool = option(True, "add the adapters to the weights at the end")


@stage(SpecializeConfig)
def specialize(model: Model, config: Any, data: Data) -> tuple[Model, Report]:
    """Teach the model the domain through low-rank adapters.

    Unmerged adapters stay in the network as peft's own layers, as `network.add_adapter` leaves
    them; `tailor_engine.stages._adapter.merge_adapter` merges them later.
    """
    report = Report("specialize", dataclasses.asdict(config))
    rows, validation = training_rows(model, config, data)
    network = copy.deepcopy(model.network)
    add_adapter(network, model.family, config.rank, config.alpha, config.dropout, config.seed)
    dtype = training_precision(config, model.device)
    report.notes.append(f"products in {str(dtype).removeprefix('torch.')}")
    objective: Any
    if config.teacher_weight:
        if model.teacher is None:
            raise UserError(
                "specialize: teacher_weight needs a teacher, and this model has none: prune it "
                "first, set Model.teacher, or set teacher_weight to 0"
            )
        require_same_vocabulary(model, model.teacher)
        objective = Imitation(
            network,
            model.family,
            dtype,
            Teacher(model.teacher, dtype),
            cross_entropy=1 - config.teacher_weight,
        )
    else:
        objective = CrossEntropy(network, model.family, dtype)
    with prepared(network, model.family, config):
        report.metrics |= train(objective, rows, validation, config).metrics()
    if config.merge:
        merge_adapter(network)
    return model.replace(network=network), report
