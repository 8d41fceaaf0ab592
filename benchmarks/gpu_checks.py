"""What must hold before a kernel is timed: right, the same twice, the same from a CUDA graph.

On every case of the op's declaration, with values drawn anew, and with outputs poisoned: what
`torch.empty` gives out holds NaN and extreme integers, so an output that nobody writes shows.
"""

import contextlib
import copy
import itertools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from tailor_engine.ops import OPS, _accuracy

from .gpu_shapes import UNRECORDED

ROOT = Path(__file__).parents[1]
DRAWS = 3
SANITIZER = "compute-sanitizer"
SANITIZED = 3  # cases of an op
FOUND = 87  # the exit status by which the sanitizer says that it found something


def backends(op, card):
    """Return the GPU backends that run an op here."""
    return [name for name in ("cuda", "triton") if not op.missing(name, card.device.type)]


def check(name, card, most=None):
    """Yield a row for every case and backend of an op: what failed, or nothing."""
    op, found = OPS[name], backends(OPS[name], card)
    if op.cuda is not None and "cuda" not in found:
        why = op.missing("cuda", card.device.type)
        yield {"kind": "missing", "what": f"CUDA kernel ({name})", "why": why}
    if not found:
        why = op.missing("triton", card.device.type)
        yield {"kind": "check", "op": name, "backend": "triton", "case": None, "failure": why}
    for backend in found:
        drawn_from = seeds(1 if card.rehearsed else DRAWS)
        draws = [cases(op, card, seed) for seed in drawn_from]
        for number, drawn in enumerate(itertools.islice(zip(*draws, strict=True), most)):
            failure = ""
            try:
                with poisoned():
                    _accuracy.check(op, op.on(backend), *drawn)
                    repeatable(op, op.on(backend), drawn[0], card)
            except Exception as error:  # a compiler's too: the other cases are still worth knowing
                failure = f"{type(error).__name__}: {error}"
            shapes = [_described(argument) for argument in drawn[0]]
            yield {"kind": "check", "op": name, "backend": backend, "case": number,
                   "arguments": shapes, "seeds": drawn_from, "failure": failure}  # fmt: skip
            card.synchronize()  # raises where an error sticks: this process can do no more


def seeds(count):
    """Return the seeds of the draws: others at every run, the declaration's own first."""
    first = int.from_bytes(os.urandom(3), "little")
    return (0, *range(first, first + count - 1))


def cases(op, card, seed):
    """Return an op's cases on the card, drawn from another seed than the declaration's 0."""
    with reseeded(seed):
        return [[placed(argument, card.device) for argument in case] for case in op.cases()]


@contextlib.contextmanager
def reseeded(seed):
    """Make every generator that is seeded inside the block draw other numbers."""
    plain = torch.Generator

    class Reseeded(plain):
        def manual_seed(self, given):
            return super().manual_seed(given + seed)

    torch.Generator = Reseeded
    try:
        yield
    finally:
        torch.Generator = plain


def placed(value, device):
    """Return an argument on a device, with its strides and its offset into its memory."""
    if isinstance(value, (list, tuple)):
        return [placed(item, device) for item in value]
    if not isinstance(value, torch.Tensor):
        return value
    whole = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage()).to(device)
    return whole.as_strided(value.shape, value.stride(), value.storage_offset())


@contextlib.contextmanager
def poisoned():
    """Fill all memory that is given out, until the end of the block."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def repeatable(op, function, arguments, card):
    """Require the same bits of a second run, and of a replayed graph where one can be recorded.

    Raises: AssertionError.
    """
    written = _accuracy.written_positions(op.name)
    first, second = (_accuracy.run(function, arguments, written) for _ in range(2))
    _require_same(first, second, "two runs differ")
    if op.name in UNRECORDED:
        return
    private = copy.deepcopy(list(arguments))
    before = copy.deepcopy([private[i] for i in written])
    with torch.no_grad():
        replay, result = card.capture(lambda: function(*private))
        for place, value in zip(written, before, strict=True):
            private[place].copy_(value)
        replay()
        card.synchronize()
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    found = [o for o in outputs if o is not None] + [private[i] for i in written]
    _require_same(first, found, "a CUDA graph's replay differs")


def _require_same(first, second, words):
    for number, (one, other) in enumerate(zip(first, second, strict=True)):
        if not torch.equal(bits(one), bits(other)):
            raise AssertionError(f"output {number}: {words}")


def bits(tensor):
    """Return a tensor as integers: NaN equals itself, and zero is not minus zero."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(sizes[tensor.element_size()])


def _described(argument):
    if isinstance(argument, torch.Tensor):
        return f"{str(argument.dtype).removeprefix('torch.')} {list(argument.shape)}"
    if isinstance(argument, (list, tuple)):
        return [_described(item) for item in argument]
    return str(argument)


def sanitized(names, seconds, options):
    """Run a few cases of each op under compute-sanitizer; return its row.

    Memory that torch keeps for later is switched off, for a read past an array's end must not
    land in the next one.
    """
    tool = shutil.which(SANITIZER) or shutil.which(SANITIZER, path="/usr/local/cuda/bin")
    if tool is None:
        return {"kind": "missing", "what": SANITIZER, "why": "it is not on the PATH"}
    # torch asks the driver for what it may not have: refusals that it handles are no finding.
    command = [tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode",
               str(FOUND), "--target-processes", "all",
               sys.executable, "-m", "benchmarks.gpu_checks", *options, *names]  # fmt: skip
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    with tempfile.TemporaryFile("w+") as log:
        try:
            status = subprocess.run(
                command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=seconds
            ).returncode
        except subprocess.TimeoutExpired:
            why = f"not done after {seconds:.0f} s"
            return {"kind": "missing", "what": SANITIZER, "why": why}
        log.seek(0)
        lines = log.read().splitlines()
    failure = "" if status == 0 else f"exit {status}: " + " | ".join(lines[-12:])
    return {"kind": "check", "op": ", ".join(names), "backend": SANITIZER, "failure": failure}


def main(arguments):
    """Check a few cases of each op once, without draws or graphs: what the sanitizer watches."""
    from . import gpu_worker

    gpu_worker.own_kernels()
    card = gpu_worker.card_of(arguments)
    for name in [word for word in arguments if not word.startswith("-")]:
        for backend in backends(OPS[name], card):
            for case in cases(OPS[name], card, 0)[:SANITIZED]:
                _accuracy.check(OPS[name], OPS[name].on(backend), case)
    card.synchronize()


if __name__ == "__main__":
    main(sys.argv[1:])
