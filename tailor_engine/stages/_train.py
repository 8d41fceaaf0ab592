"""The one training loop, on accelerate: teacher correction, distillation and adapters share it.

An objective is a module that turns a batch of rows into the mean loss of its labelled tokens. The
loop owns everything else: which rows a step sees, their division over micro-batches and processes,
the optimizer, the learning rate, checkpoints, the loss curve and what happens on a NaN.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

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
    if config.gradient_checkpointing:
        network.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        yield
    finally:
        if config.gradient_checkpointing:
            network.gradient_checkpointing_disable()
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(before[name])
        network.eval()


def train(objective: nn.Module, rows: Any, validation: Any, config: TrainConfig) -> History:
    """Train the objective's parameters that require a gradient, in place.

    Shapes: rows.input_ids, rows.position_ids, rows.labels [N, L]; labels -100 carry no loss.
        objective(batch) gives a dict of scalars, each the mean over the batch's labelled tokens:
        "loss", which is differentiated, and parts of it for the curve.
    Numbers: one process with B rows a step, that step cut into micro-batches, and several
        processes that share it give the same gradients: each part counts by its labelled tokens.
        The same seed, machine and thread count give the same weights, bit for bit, also when
        the training was killed and went on from its checkpoint.
    Raises:
        UserError: no rows, fewer rows a step than parts to cut it into, or a loss that is not
            finite (with the step and the likely cause).
    """
    return _Training(objective, rows, validation, config).run()


class _Training:
    """The state of one training between its steps."""

    def __init__(self, objective: Any, rows: Any, validation: Any, config: TrainConfig) -> None:
        import accelerate

        self.config, self.rows, self.validation = config, rows, validation
        # Mixed precision is the objective's own autocast: accelerate's is fixed once a process,
        # and one recipe may want several.
        self.accelerator = accelerate.Accelerator(mixed_precision="no", device_placement=False)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        parts = config.gradient_accumulation * self.world
        if not len(rows):
            raise UserError("training needs at least one row of text; the train split gave none")
        if config.batch_size < parts:
            raise UserError(
                f"batch_size {config.batch_size} cannot be cut into {config.gradient_accumulation} "
                f"micro-batches on {self.world} processes; it must be at least {parts}"
            )
        self.objective = objective
        if self.world > 1:
            objective.to(self.accelerator.device)
        self.device = next(objective.parameters()).device
        named = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
        self.trained = dict(named)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in named if p.dim() > 1]},
                {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
            ],
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step = 0
        self.history = History()
        self.best: dict[str, Tensor] = {}  # weights of the best validation, unless it is the last
        self.best_loss = math.inf

    def run(self) -> History:
        config = self.config
        self._restore()
        wrapped, optimizer = self.accelerator.prepare(self.objective, self.optimizer)
        moments = {
            round(config.step_count * (k + 1) / config.validations)
            for k in range(config.validations)
        }
        saved = time.perf_counter()
        self.objective.train()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            while self.step < config.step_count:
                self._train_step(wrapped, optimizer)
                if self.step in moments and len(self.validation):
                    self._validate()
                waited = time.perf_counter() - saved
                if self.step < config.step_count and self._checkpoint_due(waited):
                    self._save()
                    saved = time.perf_counter()
        if self.best:
            with torch.no_grad():
                for name, value in self.best.items():
                    self.trained[name].copy_(value)
        self.objective.eval()
        self.optimizer.zero_grad(set_to_none=True)
        return self.history

    def _train_step(self, wrapped: nn.Module, optimizer: Any) -> None:
        config, start = self.config, time.perf_counter()
        # Each step's randomness depends on seed, step and process alone, so none has to be saved.
        torch.manual_seed((config.seed * 1_000_003 + self.step) * 1_009 + self.rank)
        rate = config.rate(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        indices = self._row_indices(self.step)
        tokens = max(1, int((self.rows.labels[indices] != -100).sum()))
        micro = list(self._micro_batches(self.rows, indices))
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(micro):
            # accelerate averages gradients over processes; shares must add up instead.
            share = int((batch["labels"] != -100).sum()) / tokens
            last = number == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):
                parts = wrapped(batch)
                self.accelerator.backward(parts["loss"] * (share * self.world))
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + share * value.detach()
        values = self._sum_over_processes(totals)
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), config.clip_norm or math.inf)
        if not (math.isfinite(values["loss"]) and math.isfinite(float(norm))):
            raise UserError(self._fault(values["loss"], micro))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        speed = len(indices) * self.rows.input_ids.shape[1] / (time.perf_counter() - start)
        self.history.add(
            step=self.step,
            **values,
            learning_rate=rate,
            gradient_norm=float(norm),
            step_tokens_per_second=speed,
        )
        if self.rank == 0:
            text = f"loss {values['loss']:.3f}  {speed:.0f} tok/s"
            context().progress(self.step, config.step_count, text)

    def _row_indices(self, step: int) -> Tensor:
        """Return the rows of a step, a pure function of it: in order, and shuffled once used up."""
        count, size = len(self.rows), self.config.batch_size
        positions = range(step * size, (step + 1) * size)
        orders = {
            epoch: torch.randperm(
                count, generator=torch.Generator().manual_seed(self.config.seed + epoch)
            )
            if epoch
            else torch.arange(count)
            for epoch in {position // count for position in positions}
        }
        return torch.stack([orders[p // count][p % count] for p in positions])

    def _micro_batches(self, rows: Any, indices: Tensor) -> Iterator[dict[str, Tensor]]:
        """Yield this process's part of a step, micro-batch after micro-batch."""
        for part in indices.tensor_split(self.config.gradient_accumulation):
            yield take(rows, part.tensor_split(self.world)[self.rank], self.device)

    def _sum_over_processes(self, totals: dict[str, Tensor]) -> dict[str, float]:
        summed = torch.stack([value.float() for value in totals.values()])
        if self.world > 1:
            summed = self.accelerator.reduce(summed, "sum")
        return dict(zip(totals, summed.tolist(), strict=True))

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the loss on rows of the validation split; remember the best weights."""
        self.objective.eval()
        rows, totals, size = self.validation, {}, max(1, self.config.batch_size // self.world)
        tokens = max(1, int((rows.labels != -100).sum()))
        for indices in torch.arange(len(rows))[self.rank :: self.world].split(size):
            batch = take(rows, indices, self.device)
            share = int((batch["labels"] != -100).sum()) / tokens
            for name, value in self.objective(batch).items():
                totals[name] = totals.get(name, 0) + share * value
        if not totals:  # fewer rows than processes
            totals = {"loss": torch.zeros((), device=self.device)}
        loss = self._sum_over_processes({"loss": totals["loss"]})["loss"]
        self.history.add(validation_step=self.step, validation_loss=loss)
        self.objective.train()
        if loss < self.best_loss:
            self.best_loss, self.best = loss, {}
            if self.config.keep == "best" and self.step < self.config.step_count:
                self.best = {name: p.detach().clone() for name, p in self.trained.items()}
        elif self.step == self.config.step_count and self.best:
            context().note("the weights of an earlier validation were better than the last; kept")

    def _checkpoint_due(self, waited: float) -> bool:
        config = self.config
        by_count = config.checkpoint_steps and self.step % config.checkpoint_steps == 0
        by_time = config.checkpoint_seconds and waited >= config.checkpoint_seconds
        return self.rank == 0 and bool(by_count or by_time)

    def _fingerprint(self) -> str:
        rows = self.rows
        return f"{self.config} {tuple(rows.labels.shape)} {int(rows.input_ids.sum())}"

    def _save(self) -> None:
        context().save_checkpoint(
            {
                "fingerprint": self._fingerprint(),
                "step": self.step,
                "weights": {name: p.detach() for name, p in self.trained.items()},
                "optimizer": {
                    str(index): state
                    for index, state in self.optimizer.state_dict()["state"].items()
                },
                "curves": self.history.curves,
                "best": self.best,
                "best_loss": self.best_loss,
            }
        )

    def _restore(self) -> None:
        """Go on from the checkpoint of an interrupted run, if it is of this very training."""
        state = context().load_checkpoint()
        if state is None:
            return
        if state.get("fingerprint") != self._fingerprint():
            context().note("the checkpoint belongs to other settings or data; started again")
            return
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(
            {
                "state": {int(index): entry for index, entry in state["optimizer"].items()},
                "param_groups": self.optimizer.state_dict()["param_groups"],
            }
        )
        self.step = int(state["step"])
        self.history = History({name: list(curve) for name, curve in state["curves"].items()})
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self.best_loss = float(state["best_loss"])
        context().note(f"went on from the checkpoint of step {self.step}")

    def _fault(self, loss: float, micro: list[dict[str, Tensor]]) -> str:
        """Say at which step the loss or gradient stopped being finite, and the likely cause."""
        where = f"step {self.step + 1} of {self.config.step_count}: "
        where += f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
        for name, parameter in self.objective.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f"{where}; the weights of {_plain(name)} hold NaN or infinity: load another model"
        bad = _first_bad_module(self.objective, micro)
        if bad:
            return f"{where}; the activations of {_plain(bad)} overflow: try precision float32"
        return f"{where}; try a lower learning_rate (now {self.config.learning_rate:g})"


def take(rows: Any, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return some rows, and what else is known of them, as a batch on a device."""
    names = ("input_ids", "position_ids", "labels")
    tensors = {name: getattr(rows, name) for name in names} | getattr(rows, "extra", {})
    return {name: tensor[indices].to(device) for name, tensor in tensors.items()}


@torch.no_grad()
def _first_bad_module(objective: nn.Module, micro: list[dict[str, Tensor]]) -> str:
    """Return the first module, in the order of the forward, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, Tensor) and not bool(torch.isfinite(first).all()):
                found.append(name)

        return hook

    leaves = [(n, m) for n, m in objective.named_modules() if not list(m.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    try:
        for batch in micro:
            objective(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else ""


def _plain(name: str) -> str:
    return name.removeprefix("network.")
