"""Write a diagnosis: a page of pictures, and the numbers behind them as Parquet."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

import numpy as np

from tailor_engine.diagnostics import Diagnosis
from tailor_engine.diagnostics.findings import BUDGETS, at_share
from tailor_engine.errors import UserError
from tailor_engine.io import _diagnosis_charts as charts
from tailor_engine.io import files, report, units

PAGE = "index.html"
TOP = 8  # channels of a kind that the page names


def check_place(out: str | os.PathLike[str]) -> None:
    """Refuse a folder that holds something else than a diagnosis, before any work is done."""
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder or a new name")
    if path.is_dir() and any(path.iterdir()) and not (path / "channels.parquet").exists():
        raise UserError(f"{path}: holds files that are not a diagnosis's; choose another --out")


def write(diagnosis: Diagnosis, out: str | os.PathLike[str]) -> Path:
    """Write the page and its tables into a folder, all of it or nothing; return the page's path.

    Raises:
        UserError: the folder holds something else.
        TailorError: the disk is full.
    """
    import pyarrow
    from pyarrow import parquet

    check_place(out)
    content = page(diagnosis)
    with files.atomic_folder(out) as folder:
        for name, table in diagnosis.tables.items():
            parquet.write_table(pyarrow.table(table), folder / f"{name}.parquet")
        about = {"facts": diagnosis.facts, "findings": diagnosis.findings, "notes": diagnosis.notes}
        files.atomic_write_json(folder / "diagnosis.json", about)
        files.atomic_write_text(folder / PAGE, content)
    return Path(out) / PAGE


def page(diagnosis: Diagnosis) -> str:
    """Return the page as HTML that needs nothing else."""
    tables, facts = diagnosis.tables, diagnosis.facts
    view = {
        "name": Path(facts["source"]).name.split(":")[-1],
        "style": _style(),
        "facts": facts,
        "notes": diagnosis.notes,
        "pictures": _pictures(tables, facts),
        "findings": diagnosis.findings,
        "tiles": _tiles(tables, facts),
        "layers": _layer_rows(tables["layers"], facts["general"] is not None),
        "channels": _channel_rows(tables["channels"]),
        "tables": {name: len(next(iter(t.values()))) for name, t in tables.items()},
    }
    return report.render("diagnosis.html.j2", view)


def _style() -> str:
    """Return the run report's own style sheet: both pages are one family."""
    text = (importlib.resources.files("tailor_engine") / "assets" / "report.html.j2").read_text(
        encoding="utf-8"
    )
    return text[text.index("<style>") + len("<style>") : text.index("</style>")]


def _pictures(tables: dict[str, Any], facts: dict[str, Any]) -> dict[str, str]:
    layers, channels = tables["layers"], tables["channels"]
    config = facts["config"]
    drawn = {
        "budget": charts.budget(tables["budget"], layers),
        "blocks": charts.blocks(layers),
        "importance": charts.importance(channels, layers, tables["agreement"]),
        "extremes": charts.extremes(channels, layers, config["outlier"]),
        "redundancy": charts.redundancy(layers),
        "heads": charts.heads(tables["heads"], facts["depth"]),
    }
    if np.isfinite(channels["log2_ratio"]).any():
        drawn["corpora"] = charts.corpora(channels, layers, config["contrast"])
    return drawn


def _tiles(tables: dict[str, Any], facts: dict[str, Any]) -> list[dict[str, str]]:
    """Return the four figures that a reader wants first."""
    layers, heads = tables["layers"], tables["heads"]
    share = BUDGETS[1]
    nats = at_share(tables["budget"], "all", share)
    channels = len(tables["channels"]["layer"])
    sinks = int((heads["first_token_share"] > 0.5).sum())
    return [
        {
            "words": f"Predicted cost of {100 * share:.0f} % less",
            "figure": "–" if nats is None else f"{nats:.2g} nats",
            "more": f"of {units.count(facts['parameters'])} parameters, repaired",
        },
        {
            "words": "Dead channels",
            "figure": f"{int(layers['dead'].sum()):,}",
            "more": f"of {channels:,}",
        },
        {
            "words": "Outlier channels",
            "figure": f"{int(layers['outliers'].sum()):,}",
            "more": f"in {int((layers['outliers'] > 0).sum())} of {facts['depth']} layers",
        },
        {
            "words": "Heads that rest on the first token",
            "figure": f"{sinks:,}",
            "more": f"of {len(heads['layer']):,}: over half of their attention",
        },
    ]


def _layer_rows(layers: dict[str, Any], both: bool) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the cells of the table of layers."""
    wanted = [
        ("layer", "Layer", "{:.0f}"),
        ("width", "Channels", "{:,.0f}"),
        ("block_influence", "Influence", "{:.3f}"),
        ("half_nats", "Half, nats", "{:.2g}"),
        ("effective_rank_scaled", "Eff. rank", "{:.0f}"),
        ("explained", "Explained", "{:.0%}"),
        ("dead", "Dead", "{:.0f}"),
        ("outliers", "Outliers", "{:.0f}"),
        ("peak_ratio", "Peak ratio", "{:,.0f}"),
        ("stream_peak", "Stream peak", "{:,.0f}"),
        ("entropy_share", "Entropy", "{:.0%}"),
        ("first_token_share", "First token", "{:.0%}"),
    ]
    if both:
        wanted += [
            ("domain_only", "Domain's own", "{:.0f}"),
            ("general_only", "General's own", "{:.0f}"),
        ]
    cells = [
        [
            shape.format(layers[key][i]) if np.isfinite(layers[key][i]) else "–"
            for key, _, shape in wanted
        ]
        for i in range(len(layers["layer"]))
    ]
    return [words for _, words, _ in wanted], cells


def _channel_rows(channels: dict[str, Any]) -> list[dict[str, str]]:
    """Return the channels that stand out, kind by kind, the starkest first."""
    alive = ~channels["dead"]
    ratio = np.where(alive, channels["log2_ratio"], np.nan)
    kinds = (
        ("outlier", channels["outlier"], channels["peak_ratio"], "peaks at {:,.0f} × typical"),
        ("domain's own", channels["domain_only"], ratio, "{:,.0f} × the energy on domain text"),
        ("general's own", channels["general_only"], -ratio, "{:,.0f} × the energy on general text"),
        ("twin", (np.abs(channels["twin_cosine"]) >= 0.98) & alive,
         np.abs(channels["twin_cosine"]), "cosine {:.3f} to channel {twin}"),
        ("dead", channels["dead"], -channels["energy"], "energy {energy:.1e}"),
    )  # fmt: skip
    rows = []
    for kind, chosen, value, words in kinds:
        picked = np.flatnonzero(chosen)
        picked = picked[np.argsort(-value[picked], kind="stable")][:TOP]
        for index in picked:
            shown = 2.0 ** value[index] if kind.endswith("own") else value[index]
            twin, energy = channels["twin"][index], channels["energy"][index]
            rows.append(
                {
                    "kind": kind,
                    "layer": f"{channels['layer'][index]}",
                    "channel": f"{channels['channel'][index]}",
                    "words": words.format(shown, twin=twin, energy=energy),
                }
            )
    return rows
