"""Pruning: fewer feed-forward channels and fewer blocks, chosen by data, then repaired."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from tailor_engine.data import Data, Rows
from tailor_engine.errors import UserError
from tailor_engine.families import drop_blocks, write_shapes
from tailor_engine.model import Model
from tailor_engine.stages._precision import precision
from tailor_engine.stages._stage import Report, context, option, stage
from tailor_engine.stages.prune.layers import Layers
from tailor_engine.stages.prune.plan import Plan, make_plan
from tailor_engine.stages.prune.record import Record
from tailor_engine.stages.prune.statistics import batches, check_weights

#: Names of criteria.py, as literals so that help and recipe checks need not import torch.
CRITERIA = (
    "maw",
    "l2",
    "variance",
    "product",
    "activation_norm",
    "wanda",
    "cfsp",
    "flap",
    "obs",
    "fisher_obs",
)


@dataclass(frozen=True)
class PruneConfig:
    """What to cut, by which measure, and how to repair it."""

    target: float = option(
        0.8, "share of all parameters to keep; widths go to the nearest step", low=0.05, high=1
    )
    parameters: int = option(0, "at most this many parameters; above 0 it replaces target", low=0)
    axes: str = option(
        "mlp", "what is cut: feed-forward channels, whole blocks", choices=("mlp", "blocks", "both")
    )
    blocks: int = option(
        0, "whole blocks to drop; 0: what the target needs (blocks), a third of it (both)", low=0
    )
    preset: str = option(
        "default",
        "fast: one pass, CFSP; default: layer by layer, Fisher-OBS",
        choices=("fast", "default"),
    )
    criterion: str = option(
        "auto", "score of a channel; auto: by preset", choices=("auto", *CRITERIA)
    )
    mode: str = option(
        "auto",
        "statistics of the dense model, or of the already pruned stream; auto: by preset",
        choices=("auto", "one_pass", "sequential"),
    )
    repair: str = option(
        "least_squares", "of the down projections", choices=("none", "least_squares")
    )
    uniform: bool = option(False, "the same width for every block, so that stock code loads it")
    rounding: int = option(64, "widths are multiples of this", choices=(32, 64, 128, 256))
    floor: float = option(0.25, "share of its channels that every block keeps", low=0.02, high=1)
    rounds: int = option(4, "rounds of OBS", low=1, high=64)
    ridge: float | None = option(
        None,
        "damping, relative to the mean diagonal; none: 1e-3 one pass, 1e-2 else",
        low=0,
        high=1,
    )
    alpha: float = option(
        0.5, "sequential: 0 imitates the block's own output, 1 the dense stream", low=0, high=1
    )
    rows: int = option(128, "calibration sequences, the held-out ones among them", low=1)
    held_out: float = option(0.125, "share of the rows that judges the repair", low=0, high=0.5)
    fisher_rows: int = option(32, "sequences of the Fisher pass", low=1)
    sequence_length: int = option(256, "tokens a sequence", low=8)
    domain_weight: float = option(0.5, "share of domain rows beside general ones", low=0, high=1)
    batch_size: int = option(8, "sequences a forward pass; no effect on the result", low=1)
    precision: str = option(
        "auto",
        "of the forward passes; auto: bfloat16 where it is measured to be fast",
        choices=("auto", "float32", "bfloat16"),
    )
    seed: int = option(0, "of the choice of rows and of the Fisher's labels", low=0)

    def resolved(self) -> PruneConfig:
        """Return the config with every "auto" replaced by what the preset means."""
        fast = self.preset == "fast"
        criterion = self.criterion
        if criterion == "auto":
            criterion = "cfsp" if fast else "fisher_obs"
        mode = self.mode
        if mode == "auto":
            mode = "one_pass" if fast else "sequential"
        ridge = self.ridge
        if ridge is None:
            ridge = 1e-3 if mode == "one_pass" else 1e-2
        return replace(self, criterion=criterion, mode=mode, ridge=ridge)


@stage(PruneConfig)
def prune(model: Model, config: PruneConfig, data: Data) -> tuple[Model, Report]:
    """Cut feed-forward channels and blocks by a domain's activations, and repair what stays."""
    _check(model, config)
    settings = config.resolved()
    record = Record()
    with record.timed("rows"):
        fit, held_out = _split(_rows(model, settings, data), settings, record)
    check_weights(model.network)
    device = model.device
    dtype = precision(settings.precision, device)
    size = settings.batch_size
    layers = Layers(
        model.family,
        model.network,
        copy.deepcopy(model.network),
        batches(fit, size, device, dtype),
        batches(held_out, size, device, dtype),
        batches(fit[: settings.fisher_rows], size, device, dtype),
        settings,
        record,
    )
    with torch.no_grad():
        plan = make_plan(model, settings, layers, record)
        layers.run(plan)
    _finish(model, layers.pruned, plan)
    pruned = Model(
        network=layers.pruned,
        tokenizer=model.tokenizer,
        family=model.family,
        source=model.source,
        teacher=model.teacher or model,
        base=model.base or model,
    )
    report = Report("prune", _as_dict(config), metrics=record.metrics(), notes=record.notes)
    report.metrics["calibration_tokens"] = int(fit.valid.sum())
    report.metrics["held_out_tokens"] = int(held_out.valid.sum())
    return pruned, report


def _as_dict(config: PruneConfig) -> dict[str, Any]:
    return dict(vars(config))


def _check(model: Model, config: PruneConfig) -> None:
    """Refuse what cannot be cut."""
    for index, name, module in model.family.linears(model.network):
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            raise UserError(
                f"prune: {name} of block {index} is a {type(module).__name__}; prune the model "
                "before it is quantized or wrapped"
            )
    widths = model.family.widths(model.network)
    if 0 in widths:
        raise UserError(
            f"prune: block {widths.index(0)} has no feed-forward layer; cut channels and blocks "
            "before sub-layers are left out"
        )
    depth = len(widths)
    if config.blocks >= depth:
        raise UserError(
            f"prune: blocks must be below {depth}, the model's depth; got {config.blocks}"
        )


def _rows(model: Model, config: PruneConfig, data: Data) -> Rows:
    rows = data.mixed(
        "calibration",
        model.tokenizer,
        config.sequence_length,
        config.rows,
        config.domain_weight,
        config.seed,
    )
    if len(rows) < config.rows:
        context().note(f"{len(rows)} calibration rows instead of {config.rows}: there is no more")
    return rows


def _split(rows: Rows, config: PruneConfig, record: Record) -> tuple[Rows, Rows]:
    """Hold the last rows out, without text of documents that the others hold."""
    if config.repair == "none" or config.held_out == 0:
        return rows, rows[:0]
    count = max(1, round(len(rows) * config.held_out))
    if len(rows) - count < 1:
        record.note("1 calibration row: too few to hold any out, so the cut is not repaired")
        return rows, rows[:0]
    return rows.hold_out(count)


def _finish(model: Model, network: Any, plan: Plan) -> None:
    """Write the new shapes into the config and take dropped blocks out."""
    write_shapes(network)
    if plan.dropped:
        depth = len(model.family.blocks_of(network))
        drop_blocks(network, [i for i in range(depth) if i not in set(plan.dropped)])
    network.eval()
