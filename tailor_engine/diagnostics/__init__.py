"""Diagnostics: what the layers, channels and heads of a model do on a domain, before any cut."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from tailor_engine.data import Data
from tailor_engine.diagnostics import budget, channels, findings, measure, patterns
from tailor_engine.model import Model
from tailor_engine.stages._precision import precision
from tailor_engine.stages._stage import context, make_config, option, validate

Table = dict[str, Any]  # column name -> numpy array, or a list of lists


@dataclass(frozen=True)
class DiagnoseConfig:
    """How much text is looked at, and from where on a channel stands out."""

    rows: int = option(64, "calibration sequences, domain and general together", low=1)
    domain_weight: float = option(0.5, "share of domain rows beside general ones", low=0, high=1)
    fisher_rows: int = option(32, "of these rows, those that also run backward", low=1)
    attention_rows: int = option(8, "of these rows, those whose attention is read", low=1)
    sequence_length: int = option(256, "tokens a sequence", low=8)
    dead: float = option(
        1e-4, "a channel is dead below this share of its layer's median contribution", low=0, high=1
    )
    outlier: float = option(
        100.0, "an outlier peaks above so many times its layer's typical activation", low=1
    )
    contrast: float = option(
        4.0, "a channel belongs to a corpus that gives it so many times the energy", low=1
    )
    rounding: int = option(64, "steps of the sizes of a budget", choices=(32, 64, 128, 256))
    floor: float = option(0.25, "share of its channels that every block keeps", low=0.02, high=1)
    ridge: float = option(3e-2, "damping, relative to each channel's energy", low=0, high=1)
    memory: float = option(
        4.0, "GB for the sums of a pass; where they need more, there are more passes", low=0
    )
    batch_size: int = option(8, "sequences a forward pass; no effect on the result", low=1)
    precision: str = option(
        "auto",
        "of the forward passes; auto: bfloat16 where it is measured to be fast",
        choices=("auto", "float32", "bfloat16"),
    )
    seed: int = option(0, "of the choice of rows and of the Fisher's labels", low=0)


@dataclass
class Diagnosis:
    """Tables of numbers, what stands out in them in words, and how they came about.

    `tables` holds channels, layers, heads, budget, curves and agreement; `findings` the sentences
    of each section of the page.
    """

    tables: dict[str, Table]
    findings: dict[str, list[str]]
    facts: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def diagnose(model: Model, config: Any, data: Data) -> Diagnosis:
    """Measure every layer, channel and head of a model on a domain; the model stays as it is.

    config is a DiagnoseConfig, or a mapping of its keys.

    Raises:
        UserError: a quantized or wrapped model, weights or activations that are not finite, or
            too little text.
    """
    if isinstance(config, dict):
        config = make_config(DiagnoseConfig, config, "diagnose")
    validate(config, "diagnose")
    start = time.perf_counter()
    family, network = model.family, model.network
    measure.check(family, network)
    rows, notes = measure.choose_rows(model, config, data)
    dtype = precision(config.precision, model.device)
    layers: list[channels.Layer] = []
    library: budget.Places = []
    for first, last in measure.groups(family, network, config.memory * 1e9):
        measured = measure.collect_all(family, network, first, last, rows, config, dtype)
        for index in range(first, last):
            found = measured.pop(0)  # its large matrices go with it
            layers.append(channels.examine(family, network, index, found, config))
            halves = budget.of_block(model, index, found, config)
            layers[-1].numbers["half_nats"] = budget.half(halves, index)
            library += halves
            context().progress(index + 1, len(family.blocks_of(network)), "layers")
    heads, streams = patterns.collect(family, network, rows.sample(config.attention_rows))
    tables = {
        "channels": _joined([layer.columns for layer in layers if layer.columns]),
        "layers": _layers(layers, heads, streams),
        "heads": heads,
        "budget": budget.sweep(model, library),
        "agreement": channels.agreement(layers),
        "curves": budget.curves(library),
    }
    facts = {
        "source": model.source,
        "family": family.name,
        "parameters": model.parameters,
        "depth": len(layers),
        "domain": data.domain.name,
        "general": data.general.name if rows.general is not None and data.general else None,
        "tokens": {name: part.tokens for name, part in rows.named()},
        "rows": {name: len(part) for name, part in rows.named()},
        "attention_rows": min(config.attention_rows, rows.total),
        "config": asdict(config),
        "seconds": time.perf_counter() - start,
    }
    return Diagnosis(tables, findings.of(tables, facts), facts, notes)


def _joined(parts: list[Table]) -> Table:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _layers(layers: list[channels.Layer], heads: Table, streams: list[Table]) -> Table:
    """Return one row a layer: its own numbers, its stream's, and the means over its heads."""
    rows = [layer.numbers | stream for layer, stream in zip(layers, streams, strict=True)]
    table = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    for name in ("entropy_share", "first_token_share"):
        found = [heads[name][heads["layer"] == i] for i in range(len(rows))]
        table[name] = np.array([part.mean() if len(part) else np.nan for part in found])
    return table


__all__ = ["DiagnoseConfig", "Diagnosis", "diagnose"]
