"""Every op on every backend that can run here; all of it follows from the declarations."""

import itertools
import re

import pytest
import torch

from tailor_engine import ops
from tailor_engine.errors import UserError
from tailor_engine.ops import BACKENDS, OPS
from tailor_engine.ops import _accuracy as accuracy

HERE = [name for name in BACKENDS if not ops.unavailable(name)]
EVERY = sorted(OPS)


def runnable():
    for name, backend in itertools.product(EVERY, HERE):
        if not OPS[name].missing(backend):
            yield name, backend


@pytest.mark.parametrize(("name", "backend"), runnable())
def test_accuracy(name, backend):
    op = OPS[name]
    for number, arguments in enumerate(op.cases()):
        try:
            accuracy.check(op, op.on(backend), arguments)
        except AssertionError as error:
            shapes = [list(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
            raise AssertionError(f"case {number} {shapes}: {error}") from error


@pytest.mark.parametrize("name", EVERY)
def test_errors(name):
    op = OPS[name]
    declared = list(op.errors())
    assert declared, "an op declares the errors that a user can make"
    for arguments, exception, words in declared:
        with pytest.raises(exception, match=re.escape(words)):
            op(*arguments)


@pytest.mark.parametrize("name", EVERY)
def test_opcheck(name):
    op = OPS[name]
    for arguments in itertools.islice(op.cases(), 3):
        torch.library.opcheck(getattr(torch.ops.tailor_engine, name).default, arguments)


@pytest.mark.parametrize("name", [n for n in EVERY if OPS[n].differentiable])
def test_gradcheck(name):
    op = OPS[name]
    arguments = list(accuracy.double(next(iter(op.cases()))))
    positions = op.differentiable

    def function(*inputs):
        for position, value in zip(positions, inputs, strict=True):
            arguments[position] = value
        result = op(*arguments)
        return result[0] if isinstance(result, (tuple, list)) else result

    inputs = [arguments[i].detach().clone().requires_grad_() for i in positions]
    with ops.backend("reference"):
        assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("name", EVERY)
def test_compiles_in_one_graph(name):
    op = OPS[name]
    arguments = next(iter(op.cases()))
    written = accuracy.written_positions(name)
    torch._dynamo.reset()  # each op and case is one more graph of the same function
    compiled = torch.compile(lambda *a: op(*a), backend="aot_eager", fullgraph=True)
    results, expected = (accuracy.run(f, arguments, written) for f in (compiled, op))
    for result, plain in zip(results, expected, strict=True):
        torch.testing.assert_close(result, plain, rtol=0, atol=0)


def test_a_forced_backend_runs_or_raises(monkeypatch):
    x, stats = torch.ones(2, 3), torch.zeros(5, 3)
    with (
        pytest.raises(UserError, match="the backends are reference, cpu.baseline"),
        ops.backend("gpu"),
    ):
        pass
    monkeypatch.setenv("TAILOR_BACKEND", "cuda")
    with pytest.raises(UserError, match="backend 'cuda' was asked for, but channel_stats"):
        ops.channel_stats(x, None, stats)
    monkeypatch.setenv("TAILOR_BACKEND", "reference")
    assert OPS["channel_stats"].choose() == "reference"


def test_one_openmp_runtime():
    ops.channel_stats(torch.ones(2, 3), None, torch.zeros(5, 3))
    with open("/proc/self/maps") as maps:
        runtimes = {
            line.split()[-1] for line in maps if re.search(r"lib(gomp|iomp\d*|omp)\b", line)
        }
    assert len(runtimes) == 1, runtimes


def test_tensors_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="tensors on cpu and meta"):
        ops.channel_stats(torch.ones(2, 3), None, torch.zeros(5, 3, device="meta"))
