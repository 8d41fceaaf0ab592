"""`python -m benchmarks.demo`: run the demo in a new folder, and keep what README shows of it."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .results import FOLDER
from .timing import machine, today


def main():
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--run", help="a finished run folder, instead of running it now")
    parser.add_argument("--seconds", type=float, help="how long that run took, start to page")
    arguments = parser.parse_args()
    if arguments.run:
        keep(Path(arguments.run), arguments.seconds)
        return
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        command = [sys.executable, "-m", "tailor_engine.cli", "run", "demo", "--out", folder]
        subprocess.run(command, check=True)
        keep(Path(folder), time.perf_counter() - start)


def keep(run, seconds):
    """Write the figures of a run, without curves and texts, beside the other results."""
    report = json.loads((run / "report.json").read_text())
    figures = {
        "wall_seconds": seconds,
        "machine": machine(),
        "base": {"metrics": _numbers(report["base"]["metrics"])},
        "stages": [
            {
                "stage": stage["stage"],
                "config": stage["config"],
                "seconds": stage["seconds"],
                "metrics": _numbers(stage["metrics"]),
            }
            for stage in report["stages"]
        ],
        "final": {"metrics": _numbers(report["final"]["metrics"])},
    }
    path = FOLDER / f"demo-{today()}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n")


def _numbers(metrics):
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


if __name__ == "__main__":
    main()
