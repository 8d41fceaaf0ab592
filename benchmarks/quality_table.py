"""README's table and chart of `benchmarks.quality`, from its results file."""

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot
from matplotlib.ticker import NullFormatter, ScalarFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")  # Okabe and Ito
TICKS = (1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200)
SHOWN = 100.0  # a ratio above is a ruin: its digits say nothing


def table(rows):
    """Return the table in Markdown: one row a case, ratios to the dense model's perplexity."""
    lines = [
        "| method | removed | calibration | trained | domain | general | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=_order):
        trained = f"{row['training_tokens']:,}" if row["training_tokens"] else ""
        trained += " with labels" if row["cross_entropy"] else ""
        ratios = " | ".join(_ratio(row, name) for name in ("domain", "general"))
        name = f"**{row['method']}**" if row["method"].startswith("tailor") else row["method"]
        lines.append(
            f"| {name} | {100 * row['removed']:.1f} % | {_text(row)} | {trained} | {ratios} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(lines)


#: README's columns: how much goes, on which text, and whether training follows.
SUMMARY = {
    "-10 %": (0.1, "python-docs", 0),
    "-20 %": (0.2, "python-docs", 0),
    "-30 %": (0.3, "python-docs", 0),
    "-30 %, trained": (0.3, "python-docs", 1),
    "-20 %, both texts": (0.2, "mixed", 0),
    "-20 %, both texts, trained": (0.2, "mixed", 1),
}


def summary(rows):
    """Return a table in Markdown of one line a method: domain ratios, of both texts a pair."""
    found = {}
    for row in rows:
        asked = row["asked"]["removed"], row["calibration"], bool(row["training_tokens"])
        if not row["cross_entropy"] and asked in SUMMARY.values():
            found.setdefault(row["method"], {}).setdefault(asked, []).append(row)
    telling = {method: by for method, by in found.items() if len(by) > 1}
    lines = [f"| method | {' | '.join(SUMMARY)} |", "|---" * (len(SUMMARY) + 1) + "|"]
    for method in sorted(telling, key=lambda name: (name.startswith("tailor"), name)):
        cells = [_cell(telling[method].get(asked, [])) for asked in SUMMARY.values()]
        name = f"**{method}**" if method.startswith("tailor") else method
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows):
    """One row's figures, or those of each weight of the domain."""
    rows = sorted(rows, key=lambda row: row["domain_weight"])
    weights = [f" ({row['domain_weight']:.0%})" if len(rows) > 1 else "" for row in rows]
    return "<br>".join(map(str.__add__, map(_pair, rows), weights))


def _pair(row):
    names = ("domain", "general") if row["calibration"] == "mixed" else ("domain",)
    ratios = [row[f"{name}_ratio"] for name in names]
    return " / ".join(map(_short, ratios))


def _short(ratio):
    if ratio > 1000:
        return "> 1,000"
    return f"{ratio:.3f}" if ratio < 10 else f"{ratio:.0f}"


def draw(rows, path):
    """Write two pictures in one: loss over size, and domain against general over the weight."""
    figure, (size, weight) = pyplot.subplots(1, 2, figsize=(11, 4.5), constrained_layout=True)
    plain = [row for row in rows if not row["training_tokens"]]
    alone = [row for row in plain if row["domain_weight"] == 1]
    for method in dict.fromkeys(row["method"] for row in alone):
        points = sorted(
            (100 * r["removed"], r["domain_ratio"]) for r in alone if r["method"] == method
        )
        if len(points) > 2:
            ours = method.startswith("tailor")
            size.plot(*zip(*points, strict=True), "o-" if ours else "s--", label=method)
    size.set(
        yscale="log", xlabel="% of all parameters removed", ylabel="perplexity / dense model's",
        title="Held-out python-docs, calibrated on it, no training",
    )  # fmt: skip
    highest = size.get_ylim()[1]
    size.set_yticks([tick for tick in TICKS if tick < highest], minor=False)
    size.yaxis.set_major_formatter(ScalarFormatter())
    size.yaxis.set_minor_formatter(NullFormatter())
    size.legend()
    mixed = sorted(
        (r for r in plain if r["method"] == _best(plain) and 0.19 < r["removed"] < 0.21),
        key=lambda row: row["domain_weight"],
    )
    for name, colour in zip(("domain", "general"), COLOURS, strict=False):
        weight.errorbar(
            [row["domain_weight"] for row in mixed],
            [row[f"{name}_ratio"] for row in mixed],
            [row[f"{name}_stderr"] for row in mixed],
            fmt="o-", color=colour, capsize=3, label=name,
        )  # fmt: skip
    weight.set(
        xlabel="domain_weight", ylabel="perplexity / dense model's",
        title=f"{_best(plain)}, -20 %, no training",
    )  # fmt: skip
    weight.legend()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _best(rows):
    """The method that was tried at the most weights."""
    weights = {}
    for row in rows:
        weights.setdefault(row["method"], set()).add(row["domain_weight"])
    return max(weights, key=lambda method: len(weights[method]))


def _order(row):
    return (
        row["domain_weight"] != 1,
        row["training_tokens"],
        row["cross_entropy"],
        row["asked"]["removed"],
        -row["domain_ratio"],
    )


def _ratio(row, name):
    value, error = row[f"{name}_ratio"], row[f"{name}_stderr"]
    return f"{value:,.0f}" if value > SHOWN else f"{value:.3f} ± {error:.3f}"


def _text(row):
    if row["calibration"] != "mixed":
        return row["calibration"]
    return f"mixed, {100 * row['domain_weight']:.0f} % domain"
