"""`python -m benchmarks.readme`: write README's tables from the declarations and a results file."""

import json
import re
from pathlib import Path

from tailor_engine.ops import OPS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def demo_table():
    """Return what the demo printed: every stage's size, quality and seconds."""
    path = max(RESULTS.glob("demo-*.json"))
    report = json.loads(path.read_text())
    steps = [("untouched", None, report["base"]["metrics"])]
    steps += [(s["stage"], s["seconds"], s["metrics"]) for s in report["stages"]]
    machine = report["machine"]
    lines = [
        f"What it measured on {machine['processor']}, {machine['threads']} threads, "
        f"{_minutes(report['wall_seconds'])} for all of `make demo` "
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
    """Return the newest results file's rows: time, share of the limit, and the peers."""
    path = newest()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    machine, limits = rows[0]["machine"], rows[0]["ceilings"]
    lines = [
        f"{machine['processor']} ({', '.join(machine['levels'])}), {rows[0]['threads']} threads, "
        f"torch {machine['torch']}; limits measured in the same run: "
        f"{limits['read_gbps']:.0f} GB/s read, {limits['float32_gflops']:.0f} GFLOP/s float32; "
        f"from [{path.name}](benchmarks/results/{path.name}).",
        "",
        "| op | shape | backend | time | limit | share of it | faster than |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        ratios = ", ".join(f"{us / row['us']:.1f}x {peer}" for peer, us in row["peers"].items())
        lines.append(
            f"| `{row['op']}` | {row['shape']} | {row['backend']} | {_time(row['us'])} | "
            f"{row['limit']} | {row['percent_of_limit']:.0f} % | {ratios} |"
        )
    return "\n".join(lines)


def newest():
    """Return the results file that README shows: the last day's, at the highest level run."""
    return max(RESULTS.glob("ops-*-avx512vnni.jsonl"))


def fill(text):
    """Return README's text with its generated parts made anew."""
    for name, make in (("demo", demo_table), ("ops", op_table), ("speed", speed_table)):
        pattern = rf"(<!-- {name}: begin[^>]*-->\n).*?(<!-- {name}: end -->)"
        body = make()
        text, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.S)  # noqa: B023
        assert count == 1, f"README.md has no part {name!r}"
    return text


def _minutes(seconds):
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _time(us):
    return f"{us / 1000:.2f} ms" if us >= 1000 else f"{us:.0f} us"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(fill(readme.read_text()))

__all__ = ["fill", "newest", "op_table", "speed_table"]
