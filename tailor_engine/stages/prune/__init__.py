"""Pruning: a smaller network, chosen by data over several axes at once, then repaired."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from tailor_engine.data import Data, Rows
from tailor_engine.errors import UserError
from tailor_engine.families import drop_blocks, leave_out, write_shapes
from tailor_engine.model import Model
from tailor_engine.stages._precision import precision
from tailor_engine.stages._stage import Report, context, option, stage
from tailor_engine.stages._text_loss import losses, pieces
from tailor_engine.stages._vocabulary import Trimming
from tailor_engine.stages.prune.costs import dense_size
from tailor_engine.stages.prune.hidden import narrowed
from tailor_engine.stages.prune.latency import measured
from tailor_engine.stages.prune.layers import Layers
from tailor_engine.stages.prune.places import places
from tailor_engine.stages.prune.plan import Plan, check, make_plans
from tailor_engine.stages.prune.record import Record
from tailor_engine.stages.prune.statistics import batches, check_weights
from tailor_engine.stages.prune.tokens import foretell

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
    "taylor",
    "obs",
    "fisher_obs",
)
#: What may be cut; sublayers: attention or feed-forward layers left out whole.
AXES = ("mlp", "attention", "sublayers", "blocks", "vocabulary", "hidden")
#: The axes that are compared in nats; blocks by influence, the hidden size by activations, alone.
IN_NATS = ("mlp", "attention", "sublayers", "vocabulary")
JUDGED_TEXTS = 32  # of each corpus, that judge finalists


@dataclass(frozen=True)
class PruneConfig:
    """What to cut, by which measure, and how to repair it."""

    target: float = option(
        0.8, "share of all parameters to keep; widths go to the nearest step", low=0.05, high=1
    )
    parameters: int = option(0, "at most this many parameters; above 0 it replaces target", low=0)
    bytes: int = option(0, "at most this many bytes; above 0 it replaces target", low=0)
    latency_ms: float = option(
        0.0, "at most this time a decode step; above 0 it replaces target", low=0
    )
    latency: float = option(
        0.0, "share of the model's decode time to keep; above 0 it replaces target", low=0, high=1
    )
    latency_rows: int = option(1, "requests that are decoded at once", low=1)
    latency_context: int = option(128, "tokens in the cache of a timed decode step", low=1)
    bits: int = option(
        4, "of the weights when bytes are counted or steps timed", choices=(4, 8, 16, 32)
    )
    axes: list = option(
        [],
        f"what may be cut, such as [mlp, vocabulary], of {', '.join(AXES)}; "
        "none: all but blocks and hidden (nor sublayers with uniform), or mlp alone where "
        "another criterion than fisher_obs is asked for",
    )
    blocks: int = option(
        0, "whole blocks to drop; 0: what the target needs, a third of it beside other axes", low=0
    )
    depth: str = option(
        "influence",
        "how blocks are chosen: by their influence, or greedily by the divergence to the dense "
        "model or the perplexity without each",
        choices=("influence", "kl", "perplexity"),
    )
    depth_rows: int = option(4, "sequences that choose blocks greedily", low=1)
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
    finalists: int = option(
        1,
        "combinations that are built and judged on validation text; where blocks are one axis of "
        "several, from none of what is to go taken from blocks to all of it",
        low=1,
        high=16,
    )
    repair: str = option(
        "least_squares", "of what writes to the stream", choices=("none", "least_squares")
    )
    uniform: bool = option(False, "the same sizes in every block, so that stock code loads it")
    rounding: int = option(64, "widths are multiples of this", choices=(32, 64, 128, 256))
    floor: float = option(0.25, "share of its channels that every block keeps", low=0.02, high=1)
    rounds: int = option(4, "rounds of OBS", low=1, high=64)
    ridge: float | None = option(
        None,
        "damping, relative to each channel's energy; none: 1e-3 one pass, 3e-2 else",
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
            ridge = 1e-3 if mode == "one_pass" else 3e-2
        axes = self.axes
        if not axes:
            axes = list(IN_NATS) if criterion == "fisher_obs" else ["mlp"]
            if self.uniform:
                axes = [axis for axis in axes if axis != "sublayers"]
        return replace(self, criterion=criterion, mode=mode, ridge=ridge, axes=axes)


@stage(PruneConfig)
def prune(model: Model, config: PruneConfig, data: Data) -> tuple[Model, Report]:
    """Cut what a domain's activations do not need within a budget, and repair what stays."""
    settings = config.resolved()
    _check(model, settings)
    check_weights(model.network)
    record = Record()
    trimming, tokens = None, []
    if "vocabulary" in settings.axes:
        with record.timed("vocabulary"):
            trimming = _trimming(model, data, settings, record, asked=bool(config.axes))
            tokens = foretell(trimming, data, settings) if trimming else []
    with torch.no_grad():
        work = _Work(model, settings, data, record)
        if settings.axes == ["hidden"]:
            built = [_narrow(work)]
        else:
            plans = make_plans(model, settings, work.layers, record, tokens)
            rows: dict[int, tuple[Rows, Rows]] = {0: (work.fit, work.held_out)}
            built = [_build(plan, work, trimming, data, rows) for plan in plans]
    pruned = _best(built, data, settings, record)
    if settings.latency_ms or settings.latency:
        with record.timed("latency"):
            record.latency(*measured(model, pruned, settings))
    report = Report("prune", dict(vars(config)), metrics=record.metrics(), notes=record.notes)
    report.metrics["calibration_tokens"] = int(work.fit.valid.sum())
    report.metrics["held_out_tokens"] = int(work.held_out.valid.sum())
    return pruned, report


def _trimming(
    model: Model, data: Data, settings: PruneConfig, record: Record, asked: bool
) -> Trimming | None:
    """Return how the vocabulary can be cut; None, with a note, where it cannot and none asked."""
    try:
        return Trimming(model, data, settings.domain_weight, seed=settings.seed)
    except UserError as error:
        if asked:
            raise
        record.note(f"the vocabulary stays whole: {error}")
        return None


class _Work:
    """A model on its way to be pruned, and the rows that guide it."""

    def __init__(
        self,
        model: Model,
        settings: PruneConfig,
        data: Data,
        record: Record,
        rows: tuple[Rows, Rows] | None = None,
    ) -> None:
        self.model, self.settings, self.record = model, settings, record
        with record.timed("rows"):
            rows = rows or _split(_rows(model, settings, data), settings, record)
        self.fit, self.held_out = rows
        device, size = model.device, settings.batch_size
        dtype = precision(settings.precision, device)
        self.layers = Layers(
            model.family,
            model.network,
            batches(self.fit, size, device, dtype),
            batches(self.held_out, size, device, dtype),
            batches(self.fit[: settings.fisher_rows], size, device, dtype),
            batches(self.fit[: settings.depth_rows], size, device, dtype),
            settings,
            record,
        )


def _build(
    plan: Plan,
    work: _Work,
    trimming: Trimming | None,
    data: Data,
    rows: dict[int, tuple[Rows, Rows]],
) -> tuple[Model, Record]:
    """Carry one plan out, on a record of its own; `rows`: of each size of the vocabulary."""
    record = copy.deepcopy(work.record)
    model = work.model
    if trimming is not None and plan.tokens:
        model = trimming.cut(plan.tokens)
    work = _Work(model, work.settings, data, record, rows.get(plan.tokens))
    rows[plan.tokens] = work.fit, work.held_out
    record.planned(plan)
    work.layers.run(plan)
    network = work.layers.pruned
    _finish(model, network, plan)
    pruned = model.replace(
        network=network, teacher=model.teacher or model, base=model.base or model
    )
    return pruned, record


def _narrow(work: _Work) -> tuple[Model, Record]:
    """Take dimensions out of the residual stream; nothing repairs that."""
    model, settings = work.model, work.settings
    family, network, record = model.family, model.network, work.record
    dense = {place: dense_size(family, network, place) for place in places(family, network)}
    record.prepare(dense, len(family.blocks_of(network)))
    share = settings.parameters / model.parameters if settings.parameters else settings.target
    with record.timed("narrow"):
        network = narrowed(model, share, work.layers.fit, settings.rounding)
    record.figures["widths"] = record.figures["widths_before"]
    record.figures["hidden_size"] = network.config.hidden_size
    pruned = model.replace(
        network=network, teacher=model.teacher or model, base=model.base or model
    )
    return pruned, record


def _best(
    built: list[tuple[Model, Record]], data: Data, settings: PruneConfig, record: Record
) -> Model:
    """Return the model with the least loss on validation text, and take its record over."""
    rises = [0.0] * len(built)
    if len(built) > 1:
        tokenizer = built[0][0].tokenizer
        share = 1.0 if data.general is None else settings.domain_weight
        for corpus, weight in ((data.domain, share), (data.general, 1 - share)):
            if corpus is not None and weight:
                texts = pieces(corpus.splits["validation"], tokenizer, JUDGED_TEXTS)
                for i, (model, _) in enumerate(built):
                    loss, _ = losses(model, texts, settings.precision)
                    rises[i] += weight * float(loss.sum())
    best = min(range(len(built)), key=rises.__getitem__)
    pruned, found = built[best]
    record.__dict__.update(found.__dict__)
    record.figures["finalist"] = best
    return pruned


def _check(model: Model, config: PruneConfig) -> None:
    """Refuse what cannot be cut."""
    unknown = [axis for axis in config.axes if axis not in AXES]
    if unknown:
        raise UserError(f"prune: axes may hold {', '.join(AXES)}, got {config.axes}")
    check(config)
    for index, name, module in model.family.linears(model.network):
        if not isinstance(getattr(module, "weight", None), torch.Tensor):
            raise UserError(
                f"prune: {name} of block {index} is a {type(module).__name__}; prune the model "
                "before it is quantized or wrapped"
            )
    depth = len(model.family.blocks_of(model.network))
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
    """Take out what is dropped, and write the new shapes into the config."""
    family = model.family
    blocks = family.blocks_of(network)
    for place in plan.dropped:
        leave_out(family, blocks[place.block], place.kind)
    kept = sorted({place.block for place, size in plan.sizes.items() if size})
    if len(kept) < len(blocks):
        drop_blocks(network, kept)
    else:
        write_shapes(network)
    network.eval()
