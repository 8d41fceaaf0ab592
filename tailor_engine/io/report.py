"""The report page of a run: one HTML file that needs nothing else."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from typing import Any

from tailor_engine.diagnostics.findings import BIAS
from tailor_engine.io import _charts, _prune_charts, files, runs, units


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _with(value: float | None, unit: str, before: str = "") -> str:
    return "–" if value is None else f"{before}{units.number(value)}{unit}"


#: (metric, words, format, whether less is better)
QUALITY = (
    ("perplexity", "Perplexity", units.number, True),
    ("bits_per_byte", "Bits per byte", units.number, True),
    ("accuracy", "Next token right", _percent, False),
    ("kl_to_base", "KL to the base, nats", units.number, True),
)
SPEED = (
    ("parameters", "Parameters", units.count, True),
    ("size_bytes", "Size on disk", units.size, True),
    ("peak_bytes", "Peak memory", units.size, True),
    ("latency_ms_first_token", "Time to the first token", lambda v: _with(v, " ms"), True),
    ("latency_ms_p50", "Time a token, median", lambda v: _with(v, " ms"), True),
    ("latency_ms_p95", "Time a token, 95th percentile", lambda v: _with(v, " ms"), True),
    ("tokens_per_second", "Tokens a second", units.number, False),
    ("cost_per_million_tokens", "Cost of a million tokens", lambda v: _with(v, "", "$"), True),
)


def write(run: str | os.PathLike[str]) -> Path:
    """Write report.html into a run folder and return its path.

    Raises:
        UserError: no run there, or nothing of it is finished.
    """
    found = runs.read_run(run)
    path = Path(run) / "report.html"
    files.atomic_write_text(path, page(found["report"], found["manifest"], Path(run).name))
    return path


def page(report: dict[str, Any], manifest: dict[str, Any], name: str) -> str:
    """Return the page as HTML.

    report and manifest are the content of a run's report.json and manifest.json.
    """
    return render("report.html.j2", _view(report, manifest, name))


def render(asset: str, view: dict[str, Any]) -> str:
    """Fill a template of the assets with what it shows."""
    import jinja2

    template = importlib.resources.files("tailor_engine") / "assets" / asset
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"seconds": units.seconds, "size": units.size, "count": units.count}
    environment.filters |= {"number": units.number, "percent": _percent}
    return environment.from_string(template.read_text(encoding="utf-8")).render(view)


def _view(report: dict[str, Any], manifest: dict[str, Any], name: str) -> dict[str, Any]:
    """Return everything that the template shows."""
    base, final = report["base"]["metrics"], report["final"]["metrics"]
    stages = report["stages"]
    recipe = manifest.get("recipe") or {}
    domain = manifest["data"]["domain"]["name"] if manifest.get("data") else "the domain"
    return {
        "name": name,
        "complete": report.get("complete", False),
        "planned": len(recipe.get("stages") or stages),
        "domain": domain,
        "source": manifest.get("model", {}).get("source", "the model"),
        "headline": _headline(base, final, domain),
        "summary": _summary(base, final),
        "tiles": _tiles(base, final),
        "stages": stages,
        "rows": [{"name": "untouched", "seconds": None, "metrics": base}]
        + [{"name": s["name"], "seconds": s["seconds"], "metrics": s["metrics"]} for s in stages],
        "has_general": base.get("general_perplexity") is not None,
        "pictures": _pictures(base, stages),
        "quality": _tables(base, final),
        "speed": _compare(SPEED, base, final, ""),
        "samples": final.get("samples") or [],
        "bias": BIAS,
        "prunes": [s for s in stages if s["details"].get("widths")],
        "notes": [(s["name"], s["notes"]) for s in stages if s["notes"]],
        "recipe": _yaml(recipe),
        "manifest": manifest,
        "seconds": sum(s["seconds"] for s in stages),
    }


def _headline(base: dict[str, Any], final: dict[str, Any], domain: str) -> str:
    if not final.get("size_bytes") or not base.get("size_bytes"):
        return f"A specialist for {domain}"
    ratio = base["size_bytes"] / final["size_bytes"]
    smaller = f"{ratio:.1f}\u00a0times\u00a0smaller" if ratio > 1.05 else "of the same size"
    old, new = base.get("domain_perplexity"), final.get("domain_perplexity")
    if not old or not new:
        return f"A specialist for {domain}, {smaller}"
    change = 100 * (new / old - 1)
    if abs(change) < 1:
        return f"A specialist for {domain}, {smaller} and as good on it"
    better = "better" if change < 0 else "worse"
    joint = "and" if change < 0 else "but"
    return (
        f"A specialist for {domain}, {smaller} {joint} {abs(change):.0f}\u00a0%\u00a0{better} on it"
    )


def _summary(base: dict[str, Any], final: dict[str, Any]) -> str:
    parts = []
    for key, words, shown in (
        ("parameters", "{} parameters", units.count),
        ("size_bytes", "{}", units.size),
        ("domain_perplexity", "domain perplexity {}", units.number),
        ("general_perplexity", "general perplexity {}", units.number),
        ("tokens_per_second", "{} tokens a second", units.number),
    ):
        if base.get(key) is not None and final.get(key) is not None:
            parts.append(words.format(f"{shown(base[key])} → {shown(final[key])}"))
    return ", ".join(parts) + "."


def _tiles(base: dict[str, Any], final: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the four figures that a reader wants first."""
    wanted = (
        ("size_bytes", "Size on disk", units.size, True),
        ("domain_perplexity", "Domain perplexity", units.number, True),
        ("general_perplexity", "General perplexity", units.number, True),
        ("tokens_per_second", "Tokens a second", units.number, False),
    )
    return [row for row in _compare(wanted, base, final, "") if row["before"] != "–"]


def _compare(
    wanted: tuple, base: dict[str, Any], final: dict[str, Any], prefix: str
) -> list[dict[str, Any]]:
    """Return rows of before, after and the change in words; `good` is None where it is neither."""
    rows = []
    for key, words, shown, less in wanted:
        old, new = base.get(prefix + key), final.get(prefix + key)
        if old is None and new is None:
            continue
        row = {"words": words, "before": shown(old), "after": shown(new), "good": None, "by": "–"}
        if old and new:
            row["by"] = (
                f"{old / new:.1f}× less" if new < old / 2 else f"{100 * (new / old - 1):+.0f} %"
            )
            row["by"] = f"{new / old:.1f}× more" if new > 2 * old else row["by"].replace("-", "−")
            if abs(new / old - 1) >= 0.01:
                row["good"] = (new < old) == less
        rows.append(row)
    return rows


def _tables(base: dict[str, Any], final: dict[str, Any]) -> list[dict[str, Any]]:
    found = []
    for corpus, title in (("domain", "Domain text"), ("general", "General text")):
        rows = _compare(QUALITY, base, final, f"{corpus}_")
        if rows:
            tokens = final.get(f"{corpus}_tokens")
            found.append({"title": title, "rows": rows, "tokens": tokens})
    return found


def _pictures(base: dict[str, Any], stages: list[dict[str, Any]]) -> dict[str, Any]:
    points = [{"name": "untouched", **_point(base)}]
    points += [{"name": s["stage"], **_point(s["metrics"])} for s in stages]
    points = [p for p in points if p["bytes"] and p["domain"]]
    curves = [{**s["details"], "name": s["name"]} for s in stages if s["details"].get("loss")]
    curves = [c for c in curves if isinstance(c["loss"], list) and len(c["loss"]) > 1]
    return {
        "size": _charts.size_quality(points) if len(points) > 1 else "",
        "loss": _charts.loss_curves(curves) if curves else "",
        "cuts": [
            (s["name"], _charts.cuts(s["details"]), _shapes(s))
            for s in stages
            if s["details"].get("widths")
        ],
    }


def _shapes(stage: dict[str, Any]) -> str:
    """Draw the shape that a prune stage left; nothing for a run of an older version."""
    details, config = stage["details"], stage["config"]
    if not details.get("heads_before"):
        return ""
    timed = config.get("latency") or config.get("latency_ms")
    unit = "milliseconds a token" if timed else "bytes" if config.get("bytes") else "parameters"
    return _prune_charts.shapes(details, unit)


def _point(metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "bytes": metrics.get("size_bytes"),
        "domain": metrics.get("domain_perplexity"),
        "general": metrics.get("general_perplexity"),
    }


def _yaml(recipe: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=88)
