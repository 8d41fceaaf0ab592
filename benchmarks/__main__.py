"""`python -m benchmarks`, as `tailor bench`: the ops of this machine beside their peers."""

import importlib
import importlib.util
import os
import sys

import torch

from tailor_engine.cli._flags import Parser
from tailor_engine.errors import TailorError, UserError
from tailor_engine.ops import BACKENDS, OPS

from . import ceilings, levels, memory, ops, timing, tune
from .results import FOLDER, Results
from .table import Table

# Whole models, beside ops: each a module with run(quick, threads, json) that yields printed rows.
WHOLE = {
    "decode": "tokens per second, one at a time",
    "prefill": "tokens per second of a prompt",
    "train": "one distillation step",
}


def main(argv=None):
    """Run what was asked for; return 0, 2 for the user's errors, 1 for ours."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = parse(argv)
        levels.hold_peers(arguments.backend, argv)
        if arguments.threads:
            torch.set_num_threads(arguments.threads)
        for name in [name for name in arguments.names if name in WHOLE]:
            for row in whole(name)(arguments.quick, arguments.threads, arguments.json):
                print(row, flush=True)
        if arguments.tune:
            for line in tune.run(arguments.ops):
                print(line, flush=True)
        elif arguments.memory:
            measure_memory(arguments.json)
        elif arguments.ops or not arguments.names:
            measure_ops(arguments)
    except TailorError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


def parse(argv):
    """Return the arguments, with `ops` the names of ops alone."""
    known = [*sorted(OPS), *WHOLE]
    parser = Parser(
        prog="tailor bench",
        description="Measure this machine's ceilings, then each op beside its peers.",
        epilog=f"OP: {', '.join(known)}; none: every op.",
    )
    add = parser.add_argument
    add("names", nargs="*", metavar="OP", help="what to measure (default: every op)")
    add("--backend", choices=BACKENDS, metavar="B", help="instead of the fastest; holds the peers")
    add("--peer", action="append", default=[], metavar="P", help="only this one; repeatable")
    add("--shape", action="append", default=[], metavar="S", help="such as 1x576x1536 or '512x*'")
    add("--threads", type=int, metavar="N", help="instead of torch's own setting")
    add("--quick", action="store_true", help="a tenth of a second a shape")
    add("--json", metavar="FILE", help="append here (default benchmarks/results/ops-...jsonl)")
    add("--plot", metavar="FILE", help="draw the roofline (.png or .svg)")
    add("--memory", action="store_true", help="memory of linear_kl by tokens, instead of times")
    add("--tune", action="store_true", help="measure GPU kernels' candidates (TAILOR_TUNED=1)")
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in known:
            raise UserError(f"unknown op {name!r}; there are {', '.join(known)}")
    if arguments.threads is not None and arguments.threads < 1:
        raise UserError("--threads must be >= 1")
    if arguments.plot and not arguments.plot.endswith((".png", ".svg")):
        raise UserError("--plot must end in .png or .svg")
    arguments.backend = arguments.backend or os.environ.get("TAILOR_BACKEND")
    arguments.ops = tuple(name for name in arguments.names if name in OPS)
    return arguments


def whole(name):
    """Return the function that measures a whole model, imported when it is asked for."""
    if importlib.util.find_spec(f"benchmarks.{name}") is None:
        raise UserError(f"{name} ({WHOLE[name]}): benchmarks/{name}.py is not written yet")
    return importlib.import_module(f"benchmarks.{name}").run


def measure_ops(arguments):
    """Print the ceilings and a line for each shape; append them to a results file."""
    choice = ops.Choice(
        arguments.ops, arguments.backend, tuple(arguments.peer), tuple(arguments.shape),
        arguments.quick,
    )  # fmt: skip
    level = levels.of(arguments.backend)
    limits = ceilings.measure(level, torch.get_num_threads(), arguments.quick)
    machine, date, table = timing.machine(), timing.today(), Table()
    table.ceilings(limits, machine, timing.overhead())
    default = FOLDER / f"ops-{date}-{level.removeprefix('cpu.')}.jsonl"
    stamp = {"date": date, "machine": machine, "overhead": timing.overhead()}
    stamp["ceilings"] = {str(threads): rates for threads, rates in limits.rates.items()}
    results, rows = Results(arguments.json or default, stamp), []
    for row in ops.run(choice, limits, table.note):
        table.row(row)
        rows.append(results.append(row.as_dict()))
    table.close()
    if arguments.plot:
        from . import roofline  # matplotlib takes a second to import

        roofline.draw(rows, arguments.plot)
        table.line(f"\nroofline: {arguments.plot}")
    table.line(f"\nresults: {results.path}")


def measure_memory(path):
    rows = memory.run()
    for row in rows:
        print(memory.line(row))
    memory.record(rows, path or FOLDER / f"memory-{timing.today()}.jsonl")


if __name__ == "__main__":
    raise SystemExit(main())
