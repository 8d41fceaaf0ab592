"""The same cases under pytest-benchmark, a group a shape: `pytest benchmarks/ -k int8_linear`."""

import functools
import itertools

import pytest
import torch

from tailor_engine.ops import OPS, backend

from . import table
from .ops import Choice, calls_of, dtype_of
from .peers import names


def _every():
    for name, op in sorted(OPS.items()):
        for number, (label, arguments) in enumerate(op.benchmarks()):
            label = table.label(label, dtype_of(arguments))
            for who in ("ours", *names([name])):
                yield pytest.param(name, number, who, id=f"{name}-{label}-{who}")


@functools.lru_cache(maxsize=1)  # all of a shape share their buffers; two shapes may fill memory
def _case(name, number):
    op = OPS[name]
    label, arguments = next(itertools.islice(op.benchmarks(), number, None))
    return table.label(label, dtype_of(arguments)), *calls_of(
        op, op.choose(), label, arguments, Choice((name,))
    )


@pytest.mark.parametrize(("name", "number", "who"), _every())
def test_speed(benchmark, name, number, who):
    label, calls, skipped = _case(name, number)
    if who in skipped:
        pytest.skip(skipped[who])
    benchmark.group = f"{name} {label}"
    with torch.no_grad(), backend(OPS[name].choose()):
        benchmark.pedantic(calls[who], rounds=30, warmup_rounds=1)
