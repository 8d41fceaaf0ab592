"""The process that touches the card: it runs units one after another and reports each on stdout.

    python -m benchmarks.gpu_worker [--rehearse] [--model FOLDER] [--until SECONDS] 'check gram' ...

An exception is a unit's failure, and the next unit follows. After an error that sticks to the
process (an illegal access), or a crash, whoever started this one starts another for the rest.
"""

import gc
import importlib.util
import json
import os
import sys
import time
import traceback
from pathlib import Path

# Read when CUDA and Triton start. cuBLAS gives the same bits twice with a workspace of its own.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes that outlive a kill
if "--rehearse" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

MARK = "@gpu "  # before what is meant for the parent: libraries print too
STUCK = 75  # exit status: the card answers nothing any more, start another process
KERNELS = Path(__file__).parents[1] / "kernels/triton"


def main(arguments):
    """Run the units named; return 0, or STUCK."""
    until = float(_option(arguments, "--until", "inf"))
    model = _option(arguments, "--model", "")
    own_kernels()
    card, compiled = card_of(arguments), watched()
    gc.freeze()  # recording a graph collects garbage: not among all that the libraries made
    for unit in [word for word in arguments if not word.startswith("-")]:
        if time.time() > until:
            break
        say(begin=unit)
        start, failure = time.perf_counter(), ""
        try:
            for row in run(unit, card, model):
                say(row=row)
            card.release()
        except Exception as error:
            failure = "".join(traceback.format_exception(error)[-6:])
        for row in fresh(compiled):
            say(row=row)
        say(end=unit, failure=failure, seconds=time.perf_counter() - start)
        if failure and is_stuck(card):
            return STUCK
    return 0


def run(unit, card, model):
    """Yield the rows of one unit."""
    what, _, name = unit.partition(" ")
    if what == "ceilings":
        from .gpu_card import ceilings

        yield {"kind": "ceilings", "rates": ceilings(card, 0.01 if card.rehearsed else 1.0)}
    elif what == "check":
        from . import gpu_checks

        yield from gpu_checks.check(name, card)
    elif what == "compile":
        from . import gpu_times

        gpu_times.compile_ahead(name, card)
    elif what == "time":
        from . import gpu_times

        yield from gpu_times.measure(name, card)
    else:
        from . import gpu_pipeline

        yield from gpu_pipeline.PARTS[name](card, model)


def card_of(arguments):
    """Return what is measured."""
    from .gpu_card import Card, Rehearsal

    return Rehearsal() if "--rehearse" in arguments else Card()


def is_stuck(card):
    """Say whether the card refuses everything from this process after an error."""
    try:
        card.synchronize()
    except Exception:
        return True
    return False


def own_kernels():
    """Take the kernels of this tree, whether or not a package of them is installed."""
    name = "tailor_engine.kernels"
    spec = importlib.util.spec_from_file_location(
        name, KERNELS / "__init__.py", submodule_search_locations=[str(KERNELS)]
    )
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def watched():
    """Return a dict that fills with every Triton kernel of ours that is launched: {id: (name, it)}.

    Under the interpreter nothing is compiled, and it stays empty.
    """
    from triton.runtime.jit import JITFunction

    launch, compiled = JITFunction.run, {}

    def run(self, *arguments, **options):
        kernel = launch(self, *arguments, **options)
        if kernel is not None and id(kernel) not in compiled:
            module = self.fn.__module__
            if module.startswith("tailor_engine.kernels."):
                compiled[id(kernel)] = f"{module.rpartition('.')[2]}.{self.fn.__name__}", kernel
        return kernel

    JITFunction.run = run
    return compiled


def fresh(compiled):
    """Yield the resources of each kernel that was not told yet, as the driver counts them."""
    for key, (name, kernel) in list(compiled.items()):
        if kernel is None:
            continue
        compiled[key] = name, None
        row = {"kind": "kernel", "kernel": name, "registers": getattr(kernel, "n_regs", None)}
        row["spilled"] = getattr(kernel, "n_spills", None)
        for field, of in (("shared_bytes", "shared"), ("warps", "num_warps"),
                          ("stages", "num_stages")):  # fmt: skip
            row[field] = getattr(kernel.metadata, of, None)
        yield row


def say(**message):
    """Tell the parent."""
    print(MARK + json.dumps(message), flush=True)


def heard(line):
    """Return a message of :func:`say`."""
    return json.loads(line.partition(MARK)[2])


def _option(arguments, name, default):
    """Take an option and its value out of the arguments."""
    if name not in arguments:
        return default
    place = arguments.index(name)
    value = arguments[place + 1]
    del arguments[place : place + 2]
    return value


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
