"""`python -m benchmarks.readme`: write README's tables and RESULTS.md from the results files."""

import json
import re
from pathlib import Path

from tailor_engine.ops import OPS
from tailor_engine.ops._op import LEVELS

from . import quality_table, results, table

ROOT = Path(__file__).parents[1]
RESULTS = results.FOLDER
ALL = ROOT / "benchmarks/RESULTS.md"
# README's rows of the fastest level; RESULTS.md has every one, of every level.
SHOWN = {
    "int8_linear": [f"{rows}x{w}" for w in ("576x1536", "4096x4096") for rows in (1, 64, 512)],
    "int4_linear": [f"{rows}x{w}" for w in ("576x1536", "4096x4096") for rows in (1, 64, 512)],
    "linear_kl": ["1024x576x49152", "512x576x49152 bf16"],
    "linear_kl_topk": ["512x576x49152, 64 ids"],
    "gram": ["2048x4096"],
    "channel_stats": ["4096x4096", "4096x4096 bf16"],
    "block_influence": ["4096x4096", "4096x4096 bf16"],
    "structured_slice": ["80 % of 8 x 1536x576", "4096x11008, 80 % of"],
    "int4_quantize": ["4096x11008"],
    "int8_quantize": ["4096x11008"],
    "fake_quantize": ["4096x11008"],
    "causal_attention": ["9/3x1x1024x64", "9/3x512x512x64"],
    "rms_norm": ["512x576"],
}


def demo_table():
    """Return what the demo printed: every stage's size, quality and seconds."""
    path = max(RESULTS.glob("demo-*.json"))
    report = json.loads(path.read_text())
    steps = [("untouched", None, report["base"]["metrics"])]
    steps += [(s["stage"], s["seconds"], s["metrics"]) for s in report["stages"]]
    machine = report["machine"]
    lines = [
        f"What it measured on {machine['processor']}, {_threads(machine['threads'])}, "
        f"{_minutes(report['wall_seconds'])} for all of `tailor run demo` "
        f"([{path.name}](benchmarks/results/{path.name})):",
        "",
        "| after | seconds | parameters | size | domain ppl. | general ppl. | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, seconds, metrics in steps:
        took = "" if seconds is None else f"{seconds:.0f}"
        lines.append(
            f"| {name} | {took} | {metrics['parameters'] / 1e6:.1f} M | "
            f"{metrics['size_bytes'] / 1e6:.0f} MB | {metrics['domain_perplexity']:.2f} | "
            f"{metrics['general_perplexity']:.2f} | {metrics['tokens_per_second']:.1f} |"
        )
    return "\n".join(lines)


def op_table():
    """Return the op table: what each computes, and where it runs."""
    lines = ["| op | what it computes | C++ | Triton | CUDA |", "|---|---|---|---|---|"]
    for name, op in sorted(OPS.items()):
        module = __import__(f"tailor_engine.ops.{name}", fromlist=["*"])
        summary = (module.__doc__ or op.reference.__doc__).strip().split("\n")[0].rstrip(".")
        triton = (ROOT / f"kernels/triton/{name}.py").exists()
        marks = ["yes" if has else "" for has in (op.cpu, triton, op.cuda)]
        lines.append(f"| `{name}` | {summary} | {' | '.join(marks)} |")
    return "\n".join(lines)


def speed_table():
    """Return the most telling rows of the fastest level, with the roofline."""
    level = max(newest(), key=LEVELS.index)
    return "\n\n".join(
        [
            f"![Roofline of {level}](benchmarks/results/roofline.png)",
            _speed_table(level, newest()[level], SHOWN),
            "Every shape, and AVX2: [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
        ]
    )


def everything():
    """Return RESULTS.md: all that README sums up, the best level first."""
    levels = newest()
    quality = results.read(max(RESULTS.glob("quality-*.jsonl")))
    parts = [
        "# Results",
        "Written by `python -m benchmarks.readme` from the files in [results](results).",
        "## What pruning costs",
        "Ratios with the standard error of paired texts. `with labels`: half of the loss is of the "
        "text's own tokens, which teaches the text as well; how much of it, the dense model's rows "
        "show. In the general text of mixed rows the dense model wrote words in the places of "
        "`<unk>`, for every method alike.",
        quality_table.table(quality),
        "## Speed",
    ]
    for level in sorted(levels, key=LEVELS.index, reverse=True):
        parts.append(_speed_table(level, levels[level]))
    return "\n\n".join(parts).replace("(benchmarks/results/", "(results/") + "\n"


def newest():
    """Return {level: path} of the newest results file of each level."""
    found = {}
    for path in sorted(RESULTS.glob("ops-*.jsonl")):  # by date: a later one replaces
        found[results.read(path)[0]["level"]] = path
    return found


def measured(path):
    """Return {(op, shape): {threads: row}} of a results file; a later run of a shape replaces."""
    found = {}
    for row in results.read(path):
        shapes = found.setdefault((row["op"], table.label(row["shape"], row["dtype"])), {})
        shapes[row["threads"]] = row
    return found


def quality_part():
    """Return the table of what pruning costs, by method, with its picture."""
    path = max(RESULTS.glob("quality-*.jsonl"))
    rows = results.read(path)
    machine = rows[0]["machine"]
    tokens = {
        name: min(row["judged_tokens"][name] for row in rows) for name in ("domain", "general")
    }
    return "\n".join(
        [
            "Perplexity over the dense model's, a dense token, of SmolLM2-135M-Instruct on "
            f"{tokens['domain']:,} held-out tokens of python-docs, the domain; calibrated on both "
            f"texts, also on {tokens['general']:,} of WikiText-2 test. Shares of all parameters "
            "go; *trained* is 25,600 tokens of the teacher's probabilities; a share in brackets is "
            "of domain rows, and every share that was tried is shown. No other setting was chosen "
            f"on these texts. {machine['processor']}, {_threads(machine['threads'])} "
            f"([{path.name}](benchmarks/results/{path.name})).",
            "",
            "![Loss over size, and over the share of domain rows](benchmarks/results/quality.png)",
            "",
            quality_table.summary(rows),
            "",
            "Blocks, other criteria, standard errors, seconds, and training with the text's own "
            "tokens as labels: [benchmarks/RESULTS.md](benchmarks/RESULTS.md).",
        ]
    )


def network_table():
    """Return tokens a second of whole networks: prompt and decode, one thread and two."""
    paths = [max(RESULTS.glob(f"{name}-2*.jsonl")) for name in ("prefill", "decode")]
    rows = [row for path in paths for row in results.read(path)]
    columns = sorted({(row["bench"], row["threads"]) for row in rows}, reverse=True)
    columns.sort(key=lambda column: (column[0] != "prefill", column[1]))
    named = {"prefill": "a prompt of 512", "decode": "then a token"}
    titles = [f"{named[bench]}, {_threads(threads)}" for bench, threads in columns]
    found = {(row["engine"], row["bench"], row["threads"]): row for row in rows}
    links = ", ".join(f"[{path.name}](benchmarks/results/{path.name})" for path in paths)
    lines = [
        f"SmolLM2-135M on {rows[0]['machine']['processor']}, tokens a second ({links}):",
        "",
        f"| | {' | '.join(titles)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for engine in dict.fromkeys(row["engine"] for row in rows):
        cells = [found.get((engine, *column)) for column in columns]
        speeds = ["" if row is None else f"{row['tokens_per_second']:,.0f}" for row in cells]
        lines.append(f"| {engine} | {' | '.join(speeds)} |")
    return "\n".join(lines)


def _speed_table(level, path, shown=None):
    """Return a level's table: of all rows, or of `shown`, {op: shapes}, in its order."""
    rows = {key: dict(sorted(by.items())) for key, by in measured(path).items()}
    if shown:
        keys = [(op, shape) for op, shapes in shown.items() for shape in shapes]
        rows = {key: rows[key] for key in keys if key in rows}
    first = next(iter(next(iter(rows.values())).values()))
    machine, ceilings = first["machine"], first["ceilings"]
    threads = sorted({count for by in rows.values() for count in by})
    counts = " and ".join(map(str, [*threads[:-1], _threads(threads[-1])]))
    held = ", peers held to the same level" if machine["held_to"] else ""
    limits = ", ".join(
        f"{table.MEANING[kind]} {_both(_ceiling(ceilings[str(n)], kind) for n in threads)} "
        f"{table.UNITS.get(kind, 'GFLOP/s')}"
        for kind in ("read", "copy", "float32", "int8")
    )
    lines = [
        f"**{level}** on {machine['processor']}, {counts}, torch {machine['torch']}{held}. "
        f"Limits: {limits} ([all rows](benchmarks/results/{path.name})).",
        "",
        "| op | shape | time | share of limit | times the speed of |",
        "|---|---|---|---|---|",
    ]
    for (name, shape), by in rows.items():
        peers = ", ".join(
            f"{_both(_ratio(row, peer) for row in by.values())}x {peer.replace(',', '')}"
            for peer in next(iter(by.values()))["peers"]
        )
        shares = _both(f"{row['percent_of_limit']:.0f}" for row in by.values())
        limit = table.NAMES[next(iter(by.values()))["limit"]]
        lines.append(
            f"| `{name}` | {shape} | {_both(_time(row['us']) for row in by.values())} | "
            f"{shares} % {limit} | {peers} |"
        )
    return "\n".join(lines)


def _ceiling(rates, kind):
    return f"{table.in_units(kind, rates[kind]):,.0f}"


def _ratio(row, peer):
    return f"{row['peers'][peer] / row['us']:.1f}"


def _both(values):
    return " / ".join(values)


def fill(text):
    """Return README's text with its generated parts made anew."""
    parts = {
        "demo": demo_table,
        "quality": quality_part,
        "ops": op_table,
        "networks": network_table,
        "speed": speed_table,
    }
    for name, make in parts.items():
        pattern = rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)"
        body = make()
        text, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.S)  # noqa: B023
        assert count == 1, f"README.md has no part {name!r}"
    return text


def _threads(count):
    return f"{count} thread" + "s" * (count > 1)


def _minutes(seconds):
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _time(us):
    if us >= 1e6:
        return f"{us / 1e6:.2f} s"
    return f"{us / 1e3:.2f} ms" if us >= 1e3 else f"{us:.0f} us"


def draw():
    """Draw the roofline of the best level with one thread, and what pruning costs."""
    from .roofline import draw

    level = max(newest(), key=LEVELS.index)
    rows = [by[min(by)] for by in measured(newest()[level]).values()]
    draw(rows, RESULTS / "roofline.png")
    quality_table.draw(results.read(max(RESULTS.glob("quality-*.jsonl"))), RESULTS / "quality.png")


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))
    ALL.write_text(everything())
    draw()
