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
from typing import Any

import torch
from torch import Tensor, nn

from tailor_engine.errors import UserError
from tailor_engine.stages._stage import context
from tailor_engine.stages._train_config import History, TrainConfig


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
        # Without a GPU, accelerate joins the processes of a launcher only where it is told `cpu`.
        self.accelerator = accelerate.Accelerator(
            mixed_precision="no", device_placement=False, cpu=not torch.accelerator.is_available()
        )
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
        self.labels_of_row: list[int] = (rows.labels != -100).sum(1).tolist()
        groups: list[dict[str, Any]] = [
            {"params": [p for _, p in named if p.dim() > 1]},
            {"params": [p for _, p in named if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
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
        tokens = max(1, sum(self.labels_of_row[row] for row in indices.tolist()))
        micro = list(self._micro_batches(self.rows, indices))
        totals: dict[str, Tensor] = {}
        for number, batch in enumerate(micro):
            # accelerate averages gradients over processes; shares must add up instead.
            share = batch["labelled"].numel() / tokens
            last = number == len(micro) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(wrapped):
                parts = wrapped(batch)
                self.accelerator.backward(parts["loss"] * (share * self.world))
            for name, value in parts.items():
                totals[name] = totals.get(name, 0) + share * value.detach()
        norm = self.accelerator.clip_grad_norm_(self.trained.values(), config.clip_norm or math.inf)
        # The step's only wait for the device; the optimizer and the next step's start follow it.
        values = self._sum_over_processes(totals, gradient_norm=norm)
        if not all(math.isfinite(values[name]) for name in ("loss", "gradient_norm")):
            raise UserError(self._fault(values["loss"], micro))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.step += 1
        speed = len(indices) * self.rows.input_ids.shape[1] / (time.perf_counter() - start)
        self.history.add(
            step=self.step,
            **values,
            learning_rate=rate,
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

    def _sum_over_processes(self, totals: dict[str, Tensor], **same: Tensor) -> dict[str, float]:
        """Read figures back, all at once; those of `same` are alike in every process."""
        summed = torch.stack([value.float() for value in totals.values()])
        if self.world > 1:
            summed = self.accelerator.reduce(summed, "sum")
        figures = [summed, *(value.float()[None] for value in same.values())]
        return dict(zip([*totals, *same], torch.cat(figures).tolist(), strict=True))

    @torch.no_grad()
    def _validate(self) -> None:
        """Measure the loss on rows of the validation split; remember the best weights."""
        self.objective.eval()
        rows, size = self.validation, max(1, self.config.batch_size // self.world)
        totals: dict[str, Tensor] = {}
        tokens = max(1, int((rows.labels != -100).sum()))
        for indices in torch.arange(len(rows))[self.rank :: self.world].split(size):
            batch = take(rows, indices, self.device)
            share = batch["labelled"].numel() / tokens
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
                "precision": str(self.objective.dtype).removeprefix("torch."),
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
                cause = f"the weights of {_plain(name)} hold NaN or infinity"
                return f"{where}; {cause}: load another model"
        bad = _first_bad_module(self.objective, micro)
        if bad:
            return f"{where}; the activations of {_plain(bad)} overflow: try precision float32"
        rate = self.config.learning_rate
        return f"{where}; the weights are too large, or learning_rate (now {rate:g}) is too high"


def take(rows: Any, indices: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Return some rows, and what else is known of them, as a batch on a device.

    "labelled" holds the places [T] of the labelled tokens among all [B * L].
    """
    names = ("input_ids", "position_ids", "labels")
    tensors = {name: getattr(rows, name) for name in names} | getattr(rows, "extra", {})
    batch = {name: tensor[indices] for name, tensor in tensors.items()}
    batch["labelled"] = (batch["labels"].flatten() != -100).nonzero()[:, 0]
    if device.type == "cuda":  # a copy from pinned memory does not make the host wait
        return {name: t.pin_memory().to(device, non_blocking=True) for name, t in batch.items()}
    return {name: tensor.to(device) for name, tensor in batch.items()}


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
