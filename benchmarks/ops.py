"""Benchmark rows of every op, from the declarations: checked, then timed beside the peers."""

import dataclasses
import datetime
import functools
import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from tailor_engine import ops
from tailor_engine.ops import OPS

from .peers import peers
from .timing import ceilings, interleaved, machine

COLD_BYTES = 192e6  # more than the last-level caches of common machines


@dataclass
class Row:
    """One op on one shape; the fields are those of a results file."""

    op: str
    backend: str
    threads: int
    shape: str
    dtype: str
    us: float
    spread: float
    gflops: float
    gbps: float
    limit: str
    percent_of_limit: float
    peers: dict


def measure(name, label, arguments, backend, limits, seconds):
    """Time one op on one shape beside its peers."""
    op = OPS[name]
    chosen = backend or op.choose()
    forced = op.on(chosen)
    moved, operations = op.cost(*arguments)
    # Weights and activations come from memory in real use: rotate over more than a cache holds.
    copies = [arguments] + [_copy(arguments) for _ in range(min(31, int(COLD_BYTES / moved)))]
    with torch.no_grad():
        expected, got = op.reference(*_copy(arguments)), forced(*_copy(arguments))
        _agree(name, label, arguments, expected, got)  # never time what has not just been checked
        rivals = [peers(name, copy) for copy in copies]
        turns = {"ours": _rotating([functools.partial(forced, *copy) for copy in copies])}
        turns |= {peer: _rotating([each[peer] for each in rivals]) for peer in rivals[0]}
        times = interleaved(turns, seconds)
    us, spread = times.pop("ours")
    memory_us = moved / limits["read_gbps"] / 1e3
    arithmetic_us = operations / limits["float32_gflops"] / 1e3
    dtype = _tensors(arguments)[0].dtype
    return Row(
        op=name,
        backend=chosen,
        threads=torch.get_num_threads(),
        shape=label,
        dtype=str(dtype).removeprefix("torch."),
        us=us,
        spread=spread,
        gflops=operations / us / 1e3,
        gbps=moved / us / 1e3,
        limit="memory" if memory_us > arithmetic_us else "float32 products",
        percent_of_limit=100 * max(memory_us, arithmetic_us) / us,
        peers={peer: median for peer, (median, _) in times.items()},
    )


def run(names=(), backend=None, quick=False, threads=None):
    """Yield the measured ceilings first, then a Row for every op and shape."""
    if threads:
        torch.set_num_threads(threads)
    limits = ceilings()
    yield limits
    for name in names or sorted(OPS):
        op = OPS[name]
        if backend and op.missing(backend):
            continue
        for label, arguments in op.benchmarks():
            yield measure(name, label, arguments, backend, limits, 0.1 if quick else 0.6)


def record(rows, limits, path):
    """Append the rows to a JSON-lines file, each with the machine it was measured on."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp = {"date": datetime.date.today().isoformat(), "machine": machine(), "ceilings": limits}
    with path.open("a") as file:
        for row in rows:
            file.write(json.dumps(dataclasses.asdict(row) | stamp) + "\n")


def line(row):
    """Return one printed line: ours, the limit, and how many times faster than each peer."""
    ratios = "  ".join(f"{us / row.us:5.2f}x {peer}" for peer, us in row.peers.items())
    return (
        f"{row.op:18} {row.shape:22} {row.backend:15} {row.us:10.1f} us {row.gflops:8.1f} GFLOP/s"
        f" {row.gbps:6.1f} GB/s {row.percent_of_limit:4.0f} % of {row.limit:16} {ratios}"
    )


def _rotating(functions):
    turn = itertools.cycle(functions)
    return lambda: next(turn)()


def _copy(arguments):
    return [
        [t.clone() for t in a]
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], torch.Tensor)
        else a.clone()
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    ]


def _agree(name, label, arguments, expected, got):
    coarse = _tensors(arguments)[0].dtype in (torch.bfloat16, torch.float16)
    tolerance = 2e-2 if coarse else 1e-4
    for left, right in zip(_tensors(expected), _tensors(got), strict=True):
        scale = left.double().abs().max().clamp_min(1e-30) if left.numel() else 1
        error = ((left.double() - right.double()).abs().max() / scale).item() if left.numel() else 0
        if error > tolerance:
            raise RuntimeError(f"{name} {label}: differs from the reference by {error:.2g}")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []


__all__ = ["line", "measure", "ops", "record", "run"]
