"""What a person sees of a run: bars with the time left, or one line a stage."""

from __future__ import annotations

import sys
from typing import Any

from tailor_engine.io import units
from tailor_engine.stages._stage import Context


class Display(Context):
    """The observer of a run that the command line uses; a context manager."""

    def __init__(self) -> None:
        self.bar: Any = None
        self.task: Any = None
        self.name = ""
        self.before: dict[str, Any] = {}

    def __enter__(self) -> Display:
        """Open the bars, if this is a terminal."""
        if sys.stdout.isatty() and sys.stderr.isatty():
            from rich import progress

            self.bar = progress.Progress(
                progress.TextColumn("{task.description:<14}"),
                progress.BarColumn(bar_width=30),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("left"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("[dim]{task.fields[text]}"),
                transient=True,
            )
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bars; the lines stay."""
        if self.bar is not None:
            self.bar.stop()

    def started(self, name: str, position: int, total: int) -> None:
        """Show a fresh bar."""
        self.name = name
        if self.bar is not None:
            self._drop()
            label = name if not total else f"{position}/{total} {name.split('-', 1)[-1]}"
            self.task = self.bar.add_task(label, total=None, text="")

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Move the bar; a new total begins a new part of the stage."""
        if self.bar is None or self.task is None:
            return
        task = self.bar.tasks[self.bar.task_ids.index(self.task)]
        if task.total != total:
            self.bar.reset(self.task, total=total)
        self.bar.update(self.task, completed=done, text=text)

    def note(self, line: str) -> None:
        """Print a fact beside the bars."""
        self._drop(keep=True)
        print(f"note: {line}", file=sys.stderr)

    def finished(self, name: str, record: dict[str, Any], kept: bool) -> None:
        """Print the stage's one line."""
        self._drop()
        metrics = record["metrics"]
        parts = [f"{name:<13}", "    kept" if kept else f"{record.get('seconds', 0.0):7.1f}s"]
        parts += [f"{units.count(metrics.get('parameters')):>7} parameters"]
        parts += [f"{units.size(metrics.get('size_bytes')):>8}"]
        for corpus in ("domain", "general"):
            value = metrics.get(f"{corpus}_perplexity")
            if value is not None:
                parts.append(f"{corpus} {value:.2f}{change(self.before, metrics, corpus)}")
        if metrics.get("tokens_per_second"):
            parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
        self.before = metrics
        self.line("  ".join(parts))

    def data(self, data: Any) -> None:
        """Tell, on a terminal, what text there is."""
        if self.bar is None:
            return
        for role, corpus in (("domain", data.domain), ("general", data.general)):
            if corpus is not None:
                count = sum(map(len, corpus.splits.values()))
                removed = corpus.duplicates_removed
                print(f"{role}: {corpus.name}, {count} documents, {removed} duplicates removed")

    def stage_done(self, name: str, report: dict[str, Any], out: Any) -> None:
        """Print what one stage alone did; an evaluation's metrics as a table."""
        self._drop()
        if name == "evaluate":
            numbers = {k: v for k, v in report["metrics"].items() if isinstance(v, (int, float))}
            print(table([[key, f"{value:,.6g}"] for key, value in numbers.items()]))
            return
        before, after = report["parameters_before"], report["parameters_after"]
        change = f"{units.count(before)} -> {units.count(after)} parameters"
        metrics = report["metrics"]
        if metrics.get("latency_ms_dense"):
            old, new = metrics["latency_ms_dense"], metrics["latency_ms"]
            change += f", {old:.2f} -> {new:.2f} ms a token"
            if metrics.get("latency_ms_predicted"):
                expected = [metrics[f"latency_ms{name}_predicted"] for name in ("_dense", "")]
                change += f" (predicted {expected[0]:.2f} -> {expected[1]:.2f})"
        self.line(f"{name}: {change} in {units.seconds(report['seconds'])}, written to {out}")

    def line(self, text: str) -> None:
        """Print one line to stdout, above the bars."""
        print(text, flush=True)

    def _drop(self, keep: bool = False) -> None:
        if self.bar is not None and self.task is not None and not keep:
            self.bar.remove_task(self.task)
            self.task = None


def change(before: dict[str, Any], after: dict[str, Any], corpus: str) -> str:
    """Return how a perplexity moved, in percent."""
    old, new = before.get(f"{corpus}_perplexity"), after.get(f"{corpus}_perplexity")
    return f" ({100 * (new / old - 1):+.0f} %)" if old and new else ""


def table(rows: list[list[str]]) -> str:
    """Return rows as aligned columns; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
