"""`python -m benchmarks`, as `tailor bench`: the ops of this machine beside their peers."""

import argparse
import datetime
from pathlib import Path

from tailor_engine.ops import BACKENDS, OPS

from . import memory, ops

RESULTS = Path(__file__).parent / "results"


def main():
    parser = argparse.ArgumentParser(prog="tailor bench", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(sorted(OPS))}; or all")
    parser.add_argument("--backend", choices=BACKENDS, help="instead of the one that is chosen")
    parser.add_argument("--threads", type=int, help="instead of torch's own setting")
    parser.add_argument("--quick", action="store_true", help="a tenth of a second a shape")
    parser.add_argument("--memory", action="store_true", help="memory of linear_kl by tokens")
    parser.add_argument("--json", metavar="FILE", help="append here, not in benchmarks/results")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"unknown op {min(unknown)!r}; the ops are {', '.join(sorted(OPS))}")
    today = datetime.date.today().isoformat()
    if arguments.memory:
        rows = memory.run()
        for row in rows:
            print(memory.line(row))
        memory.record(rows, arguments.json or RESULTS / f"memory-{today}.jsonl")
        return
    limits, *rows = _printed(
        ops.run(arguments.ops, arguments.backend, arguments.quick, arguments.threads)
    )
    ops.record(rows, limits, arguments.json or RESULTS / f"ops-{today}.jsonl")


def _printed(results):
    """Print each result as it comes, and pass it on."""
    for number, result in enumerate(results):
        if number == 0:
            read, product = result["read_gbps"], result["float32_gflops"]
            print(f"limits here: {read:.1f} GB/s read, {product:.0f} GFLOP/s float32 products")
        else:
            print(ops.line(result), flush=True)
        yield result


if __name__ == "__main__":
    main()
