"""`python -m benchmarks.gpu`: check and time every GPU kernel on the card of this machine.

One command of at most eight minutes. It builds the CUDA extension where a compiler is there; checks
every op on all its cases (`gpu_checks`) and compiles what will be timed, several processes at a
time; measures the card's two ceilings and each op beside its rivals (`gpu_times`), then the
pipeline (`gpu_pipeline`), and runs compute-sanitizer over a few cases. What was done is skipped
when the command is given again, for the same card and the same sources; what failed is done again.
Exit status: 0, or 1 where a check failed, 2 without a GPU, 3 where the time ran out with nothing
wrong so far.
"""

import argparse
import concurrent.futures
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path

import torch

from . import gpu_table, gpu_worker, results, timing
from .gpu_card import Card, Rehearsal

ROOT = Path(__file__).parents[1]
NATIVE = ("kernels/triton/*.py", "csrc/cuda/*", "tailor_engine/ops/*.py")
PIPELINE = ("prune", "distill", "decode")
UNIT_SECONDS = 180  # a unit that takes longer hangs: a kernel that waits for itself, say
BUILD_SECONDS, SANITIZER_SECONDS = 120, 150
STARTS = 8  # processes that check at a time
LEAST_SECONDS = 20  # below, nothing new is begun
FAILED, NO_GPU, UNFINISHED = 1, 2, 3


def main(argv=None):
    """Run what is not done yet, print the table, and return the exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    card = Rehearsal() if arguments.rehearse else Card()
    if not arguments.rehearse and not torch.cuda.is_available():
        print("benchmarks.gpu: no CUDA GPU here, or no driver for it; nothing was measured")
        return NO_GPU
    run = Run(arguments, card.describe())
    if not arguments.rehearse:
        run.build()
    todo = [unit for unit in units(arguments.only) if unit not in run.done]
    first = [unit for unit in todo if unit.startswith("check ")]
    if not arguments.rehearse:  # a compiler takes seconds a kernel: not one after another
        first += [unit.replace("time", "compile", 1) for unit in todo if unit.startswith("time ")]
    run.all_at_once(first)
    rest = [unit for unit in todo if not unit.startswith("check ") and unit != "sanitizer"]
    if any(unit.startswith("time ") for unit in rest):
        rest = ["ceilings", *rest]  # of this very run, even where only some ops are left
    run.supervise(list(dict.fromkeys(unit for unit in rest if run.may_time(unit))))
    if "sanitizer" in todo:
        run.sanitize([name for name in run.names if f"check {name}" in run.done])
    return run.conclude(todo)


def parse(argv):
    """Return the arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="OP", help="this op; repeatable")
    add("--json", metavar="FILE", help="results (default benchmarks/results/gpu-CARD-DATE.jsonl)")
    add("--minutes", type=float, default=8, help="to stop after (default 8)")
    add("--model", default="", metavar="FOLDER", help="of the pipeline (default: SmolLM2, if here)")
    add("--time-failed", action="store_true",
        help="time an op too whose cases failed, at shapes where it is right")  # fmt: skip
    add("--rehearse", action="store_true", help="every step on the CPU at tiny sizes; no result")
    arguments = parser.parse_args(argv)
    for name in arguments.only:
        if name not in kernels():
            parser.error(f"unknown op {name!r}; there are {', '.join(kernels())}")
    return arguments


def kernels():
    """Return the names of the ops that have a GPU kernel."""
    found = {p.stem for p in (ROOT / "kernels/triton").glob("*.py") if p.stem[0] != "_"}
    return sorted(found | {p.stem for p in (ROOT / "csrc/cuda").glob("*.cu") if p.stem[0] != "_"})


def units(only):
    """Return all that a run does, in order; with `only`, what concerns these ops."""
    names = only or kernels()
    found = [f"check {name}" for name in names] + ["ceilings"]
    found += [f"time {name}" for name in names]
    return found + ([] if only else [f"pipeline {part}" for part in PIPELINE] + ["sanitizer"])


def fingerprint():
    """Return a hash of the sources that decide a kernel's answer and time."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in NATIVE for path in ROOT.glob(pattern)):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def nvcc():
    """Return the path of the compiler, or None."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def builds():
    """Return the commands that build the CUDA extension, in the order in which they are tried.

    The usual one needs setuptools 77 or newer to read pyproject.toml; the compiler alone can
    do it too, for this very card.
    """
    yield [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    try:
        import pybind11
    except ImportError:
        return
    headers = sysconfig.get_path("include"), pybind11.get_include()
    target = f"tailor_engine/_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    found = (str(p) for p in (ROOT / "csrc/cuda").iterdir() if p.suffix in (".cu", ".cpp"))
    yield [nvcc(), "-shared", "-O3", "-std=c++17", "-arch=native", "--threads=0",
           "-Xcompiler=-fPIC,-fvisibility=hidden", *(f"-I{folder}" for folder in headers),
           *sorted(found), "-o", target]  # fmt: skip


def outdated():
    """Say whether the CUDA extension is missing, or older than its sources, and can be built."""
    if nvcc() is None:
        return False
    built = importlib.util.find_spec("tailor_engine._cuda")
    sources = [path.stat().st_mtime for path in (ROOT / "csrc/cuda").iterdir()]
    return built is None or Path(built.origin).stat().st_mtime < max(sources)


class Run:
    """One run of the script: its results file, its deadline, and its processes."""

    def __init__(self, arguments, card):
        self.arguments, self.names = arguments, arguments.only or kernels()
        self.deadline = time.time() + 60 * arguments.minutes
        self.stamp = {"date": timing.today(), "card": card, "source": fingerprint()}
        short = re.sub(r"[^a-z0-9]+", "-", card["name"].lower().removeprefix("nvidia ")).strip("-")
        folder = Path(tempfile.gettempdir()) if arguments.rehearse else results.FOLDER
        path = arguments.json or folder / f"gpu-{short}-{timing.today()}.jsonl"
        self.results, self.lock = results.Results(path, self.stamp), threading.Lock()
        self.rows = [row for row in read(path) if self.is_of_this(row)]
        self.done = {r["unit"] for r in self.rows if r["kind"] == "unit" and not r["failure"]}
        self.rows = [row for row in self.rows if row["unit"] in self.done]
        if self.done:
            print(f"{path}: {len(self.done)} parts are done and skipped", flush=True)

    def is_of_this(self, row):
        """Say whether a row of the file is of this card and these sources."""
        return all(row.get(name) == self.stamp[name] for name in ("card", "source"))

    def keep(self, row):
        """Write a row to the file, with what of the limit it reached if it is a time."""
        with self.lock:
            if row["kind"] == "time":
                found = (r["rates"] for r in reversed(self.rows) if r["kind"] == "ceilings")
                row |= gpu_table.limit(row, next(found, None))
            self.rows.append(self.results.append(row))
            if line := gpu_table.line(row):
                print(line, flush=True)

    def finish(self, unit, failure, seconds):
        """Note the end of a unit; a row of its checks that failed is its failure, too."""
        bad = [r for r in self.rows if r.get("unit") == unit and r["kind"] == "check"]
        bad = sum(bool(row["failure"]) for row in bad)
        failure = failure or (f"{bad} checks failed" if bad else "")
        self.keep({"kind": "unit", "unit": unit, "failure": failure, "seconds": seconds})
        if not failure:
            self.done.add(unit)

    def may_time(self, unit):
        """Say whether a unit may run: an op is timed once its checks hold.

        Or where that was asked for: each shape is checked by itself just before.
        """
        what, _, name = unit.partition(" ")
        return what != "time" or self.arguments.time_failed or f"check {name}" in self.done

    def seconds_left(self):
        return self.deadline - time.time()

    def build(self):
        """Compile the CUDA extension where it is missing or old, and a compiler is there."""
        if not outdated():
            return
        print("building the CUDA extension", flush=True)
        alone = os.environ | {"TAILOR_BUILD_CPU": "0"}  # which takes minutes, for nothing here
        why = []
        for command in builds():
            try:
                done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True,
                                      timeout=BUILD_SECONDS)  # fmt: skip
            except subprocess.TimeoutExpired:
                why.append(f"not built after {BUILD_SECONDS} s")
                break
            if done.returncode == 0:
                return
            why += done.stderr.splitlines()[-4:]
        print(f"no CUDA extension: {' | '.join(why)}", flush=True)
        row = {"kind": "missing", "unit": "build", "what": "CUDA extension"}
        self.keep(row | {"why": " | ".join(why)})

    def all_at_once(self, todo):
        """Run units in several processes: compiling takes their time, not the card."""
        count = max(1, min(STARTS, (os.cpu_count() or 2) // 2, len(todo)))
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(self.supervise, [todo[i::count] for i in range(count)]))

    def supervise(self, todo):
        """Run units in one process; after a crash, the rest in another one."""
        while todo and self.seconds_left() > LEAST_SECONDS:
            begun = self.worker(todo)
            if not begun:
                break
            todo = todo[len(begun) :]

    def worker(self, todo):
        """Start one process on some units; return those that it began."""
        options = ["--rehearse"] if self.arguments.rehearse else []
        options += ["--until", str(self.deadline - LEAST_SECONDS)]
        options += ["--model", self.arguments.model] if self.arguments.model else []
        command = [sys.executable, "-m", "benchmarks.gpu_worker", *options, *todo]
        begun, ended, watch = [], True, None
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace"
            )
            for line in process.stdout:
                if gpu_worker.MARK not in line:
                    continue
                message = gpu_worker.heard(line)
                if "begin" in message:
                    begun, ended = [*begun, message["begin"]], False
                    longest = min(UNIT_SECONDS, max(self.seconds_left(), 0))
                    watch = threading.Timer(longest, process.kill)
                    watch.start()
                elif "row" in message:
                    self.keep({"unit": begun[-1]} | message["row"])
                else:
                    ended = True
                    watch.cancel()
                    self.finish(message["end"], message["failure"], message["seconds"])
            status = process.wait()
            if watch:
                watch.cancel()
            log.seek(0)
            last = " | ".join(log.read().splitlines()[-8:])
        if not ended and self.seconds_left() > 0:
            self.finish(begun[-1], f"its process ended with {status}: {last}", 0.0)
        elif not begun and status:
            self.finish(todo[0], f"its process did not start, {status}: {last}", 0.0)
        return begun

    def sanitize(self, names):
        """Watch a few cases of each op under compute-sanitizer, with the time that is left."""
        from . import gpu_checks

        if not names or self.seconds_left() < LEAST_SECONDS:
            return
        start = time.perf_counter()
        options = ["--rehearse"] if self.arguments.rehearse else []
        seconds = min(SANITIZER_SECONDS, self.seconds_left())
        self.keep({"unit": "sanitizer"} | gpu_checks.sanitized(names, seconds, options))
        self.finish("sanitizer", "", time.perf_counter() - start)

    def conclude(self, todo):
        """Print the table; return the exit status."""
        gpu_table.show(self.rows, self.stamp["card"])
        failed = [r for r in self.rows if r["kind"] == "unit" and r["failure"]]
        ended = {row["unit"] for row in self.rows if row["kind"] == "unit"}
        left = [unit for unit in todo if unit not in ended and self.may_time(unit)]
        print(f"results: {self.results.path}")
        for row in failed:
            print(f"FAILED {row['unit']}: {row['failure'].strip().splitlines()[-1]}")
        if left:
            print(f"left for the next time, by the same command: {', '.join(left)}")
        return FAILED if failed else UNFINISHED if left else 0


def read(path):
    """Return the rows of a results file that may not be there."""
    return results.read(path) if Path(path).exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
