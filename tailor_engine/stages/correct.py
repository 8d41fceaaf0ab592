"""Teacher correction: bring the dense model's knowledge of the domain up before it teaches."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

from tailor_engine.data import Data
from tailor_engine.model import Model
from tailor_engine.stages._adapter import add_adapter, merge_adapter
from tailor_engine.stages._objective import CrossEntropy
from tailor_engine.stages._precision import training_precision
from tailor_engine.stages._stage import Report, option, stage
from tailor_engine.stages._train import train
from tailor_engine.stages._train_config import TrainConfig, prepared, training_rows


@dataclass(frozen=True)
class CorrectConfig(TrainConfig):
    """How far the base model is taught before it is pruned and distilled."""

    steps: int = option(60, "optimizer steps", low=1)
    learning_rate: float = option(2e-4, "highest learning rate", low=0, high=1)
    method: str = option("full", "all weights, or low-rank adapters", choices=("full", "lora"))
    rank: int = option(16, "of the adapters", low=1)
    alpha: int = option(32, "scale of the adapters times their rank", low=1)
    dropout: float = option(0.0, "of the adapters' inputs", low=0, high=0.9)


@stage(CorrectConfig)
def correct(model: Model, config: Any, data: Data) -> tuple[Model, Report]:
    """Fine-tune the base model lightly on domain and general text.

    The result's `base` is the model that came in, untouched; adapters are merged.
    """
    report = Report("correct", dataclasses.asdict(config))
    rows, validation = training_rows(model, config, data)
    network = copy.deepcopy(model.network)
    dtype = training_precision(config, model.device)
    report.notes.append(f"products in {str(dtype).removeprefix('torch.')}")
    if config.method == "lora":
        add_adapter(network, model.family, config.rank, config.alpha, config.dropout, config.seed)
    with prepared(network, model.family, config):
        objective = CrossEntropy(network, model.family, dtype)
        report.metrics |= train(objective, rows, validation, config).metrics()
    if config.method == "lora":
        merge_adapter(network)
    return model.replace(network=network, base=model.base or model), report
