"""What every training stage can be told, which rows it sees, and the curve that it leaves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from tailor_engine.data import Data
from tailor_engine.errors import UserError
from tailor_engine.families._family import Family
from tailor_engine.model import Model
from tailor_engine.stages._stage import context, option


@dataclass(frozen=True)
class TrainConfig:
    """What every training stage can be told; a stage changes the defaults and adds its own."""

    steps: int = option(200, "optimizer steps", low=1)
    tokens: int = option(0, "training tokens; above 0 it sets the steps instead", low=0)
    batch_size: int = option(4, "rows an optimizer step, over all processes together", low=1)
    sequence_length: int = option(256, "tokens a row", low=8)
    gradient_accumulation: int = option(1, "micro-batches that a step's rows are cut into", low=1)
    learning_rate: float = option(2e-4, "highest learning rate", low=0, high=1)
    warmup: float = option(0.1, "share of the steps below 1, else number of steps", low=0)
    schedule: str = option(
        "cosine", "learning rate after warm-up", choices=("cosine", "linear", "constant")
    )
    weight_decay: float = option(0.01, "AdamW's, on matrices only", low=0, high=1)
    beta1: float = option(0.9, "AdamW's average of gradients", low=0, high=1)
    beta2: float = option(0.95, "AdamW's average of squared gradients", low=0, high=1)
    epsilon: float = option(1e-8, "AdamW's, beside the root of that average", low=1e-12, high=1)
    clip_norm: float = option(1.0, "largest norm of the whole gradient; 0: no limit", low=0)
    domain_weight: float = option(0.5, "share of domain rows beside general ones", low=0, high=1)
    validation_rows: int = option(8, "rows of the validation split; 0: no validation", low=0)
    validations: int = option(2, "moments of validation, evenly spaced, the last at the end", low=1)
    keep: str = option(
        "best", "weights of the best validation or of the last step", choices=("best", "last")
    )
    precision: str = option(
        "auto",
        "of matrix products; auto: bfloat16 where it is measured to be fast",
        choices=("auto", "float32", "bfloat16"),
    )
    gradient_checkpointing: bool = option(False, "compute activations twice to save memory")
    freeze_embeddings: bool = option(False, "leave embedding and head as they are")
    checkpoint_seconds: float = option(60.0, "seconds between checkpoints; 0: none by time", low=0)
    checkpoint_steps: int = option(0, "steps between checkpoints; 0: none by count", low=0)
    seed: int = option(0, "of the order of rows and of dropout", low=0)

    @property
    def step_count(self) -> int:
        """Return the number of optimizer steps."""
        if self.tokens:
            return max(1, round(self.tokens / (self.batch_size * self.sequence_length)))
        return self.steps

    @property
    def row_count(self) -> int:
        """Return the number of rows that the training sees, repeated ones counted each time."""
        return self.step_count * self.batch_size

    def rate(self, step: int) -> float:
        """Return the learning rate of a step counted from 0."""
        total = self.step_count
        warm = round(self.warmup * total) if self.warmup < 1 else int(self.warmup)
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        done = (step - warm) / max(1, total - warm)
        shape = {
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
            "linear": 1 - done,
            "constant": 1.0,
        }
        return self.learning_rate * shape[self.schedule]


@dataclass
class History:
    """The curve of one training; lists run in parallel, one entry a step or a validation."""

    curves: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Append one value to each named curve."""
        for name, value in values.items():
            self.curves.setdefault(name, []).append(value)

    def metrics(self) -> dict[str, Any]:
        """Return what a report keeps: all curves, first and last loss, tokens per second."""
        metrics: dict[str, Any] = dict(self.curves)
        speeds = sorted(self.curves.get("step_tokens_per_second", []))
        if speeds:
            metrics["train_tokens_per_second"] = speeds[len(speeds) // 2]
        for name in ("loss", "validation_loss"):
            if self.curves.get(name):
                metrics[f"{name}_first"], metrics[f"{name}_last"] = (
                    self.curves[name][0],
                    self.curves[name][-1],
                )
        return metrics


def training_rows(model: Model, config: TrainConfig, data: Data) -> tuple[Any, Any]:
    """Return the rows that a training sees, in order, and those that judge it.

    The latter are of the validation split; where it holds less than one row, there are none.
    """
    length, share = config.sequence_length, config.domain_weight
    rows = data.mixed(
        "train", model.tokenizer, length, config.row_count, share, config.seed, repeat=True
    )
    if not config.validation_rows:
        return rows, rows[:0]
    try:
        held = data.mixed(
            "validation", model.tokenizer, length, config.validation_rows, share, repeat=True
        )
    except UserError as error:
        context().note(f"no validation while training: {error}")
        held = rows[:0]
    return rows, held


@contextlib.contextmanager
def prepared(network: Any, family: Family, config: TrainConfig) -> Iterator[None]:
    """Set a network up for training as the config says, and as it was before at the end."""
    before = {name: p.requires_grad for name, p in network.named_parameters()}
    if config.freeze_embeddings:
        for module in (family.embedding_of(network), family.head_of(network)):
            module.requires_grad_(False)
    # Renamed in transformers 5: the old name still works, with a warning.
    name = "activation" if hasattr(network, "activation_checkpointing_enable") else "gradient"
    if config.gradient_checkpointing:
        getattr(network, f"{name}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            getattr(network, f"{name}_checkpointing_disable")()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(before[name])
        network.eval()
