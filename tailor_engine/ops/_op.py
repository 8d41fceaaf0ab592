"""Declare an op in one place; find, choose and force the implementation that runs it.

An :class:`Op` is the only declaration: dispatch, the generated tests, the benchmark rows and the
op table of the README all follow from it. This is the one place that chooses an implementation.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tailor_engine.errors import UserError
from tailor_engine.ops._direct import is_direct, signature

LEVELS = ("cpu.baseline", "cpu.avx2", "cpu.avx512vnni", "cpu.amx")
BACKENDS = ("reference", *LEVELS, "triton", "cuda")
# What runs when nobody asks: the first available backend in this order.
PREFERENCE = {
    "cpu": (*reversed(LEVELS), "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

# What an op's module defines under these names is part of its declaration.
DEFINED = {
    "reference": "reference",
    "check": "_check",
    "cases": "_cases",
    "errors": "_errors",
    "cost": "_cost",
    "benchmarks": "_benchmarks",
    "cpu": "_cpu",
    "cuda": "_cuda",
}

OPS: dict[str, Op] = {}
_CPU = torch.device("cpu")
_library = torch.library.Library("tailor_engine", "DEF")
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("forced", default=None)


@dataclass(frozen=True)
class Op:
    """One operation: its schema, its truth, and what its tests and benchmarks need.

    Arguments of every function below are the op's own positional arguments.
    """

    name: str
    schema: str
    """torch.library schema without the name, such as ``(Tensor x) -> Tensor``."""
    reference: Callable[..., Any]
    """Plain torch: the specification, the truth (run in float64) and the shape function."""
    check: Callable[..., None]
    """Raises ValueError or TypeError with names and numbers before any backend runs."""
    cases: Callable[[], Iterator[tuple]]
    """Argument tuples for the tests: one row, odd width, wide, strided, empty, large values."""
    errors: Callable[[], Iterator[tuple[tuple, type[Exception], str]]]
    """(arguments, exception, words of its message)."""
    cost: Callable[..., tuple[float, float]]
    """(bytes moved, operations) of one call: the floor that benchmarks print."""
    benchmarks: Callable[[], Iterator[tuple[str, tuple]]] = lambda: iter(())
    """(label, arguments) at the sizes of real use: the rows that benchmarks time."""
    cpu: Callable[..., Any] | None = None
    """``cpu(native, *args)``: allocates and calls one instruction-set level of ``_cpu``."""
    cuda: Callable[..., Any] | None = None
    """``cuda(native, *args)``: the same over ``_cuda``."""
    arithmetic: str = "float"
    """Whose peak bounds it: "float" (in its inputs' dtype), "int8", "int4"; "none" for a copy."""
    exact: bool = False
    """Integer and copying ops: every backend equals the reference bit for bit."""
    factor: float = 2.0
    """error(backend) <= factor * error(reference in the same dtype) + eps * max|truth|."""
    prefer: dict[str, Sequence[str]] = field(default_factory=dict)
    """A measured preference that differs from PREFERENCE, by device type."""
    shapes: Callable[..., Any] | None = None
    """The shape function, where running the reference on fake tensors is not enough."""
    differentiable: tuple[int, ...] = ()
    """Positions of the arguments that gradcheck differentiates."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the op on the chosen backend; see the declaring module for its arguments."""
        if torch.compiler.is_compiling():
            return getattr(torch.ops.tailor_engine, self.name)(*args, **kwargs)
        if not kwargs:
            known = signature(self.name)
            if is_direct(known, args):
                return _run(self, "cpu", args + known.defaults[len(args) :])
        if _is_tensor_missing(self, args):
            position = next(
                i for i in _tensor_positions(self.name) if i < len(args) and not _ok(args[i])
            )
            raise TypeError(
                f"{self.name}: argument {position + 1} must be a Tensor, "
                f"got {type(args[position]).__name__}"
            )
        return getattr(torch.ops.tailor_engine, self.name)(*args, **kwargs)

    def on(self, backend_name: str) -> Callable[..., Any]:
        """Return the op forced to one backend by name."""

        @functools.wraps(self.reference)
        def forced(*args: Any, **kwargs: Any) -> Any:
            with backend(backend_name):
                return self(*args, **kwargs)

        return forced

    def missing(self, backend_name: str, device: str = "cpu") -> str:
        """Say why a backend cannot run this op on a device; an empty string means that it can."""
        return _missing(self.name, backend_name, device)

    def choose(self, device: str = "cpu") -> str:
        """Return the backend that runs this op on a device type, or raise for a forced one."""
        forced = _forced.get() or os.environ.get("TAILOR_BACKEND")
        if forced:
            reason = self.missing(forced, device)
            if reason:
                raise UserError(f"backend {forced!r} was asked for, but {self.name}: {reason}")
            return forced
        return _preferred(self.name, device)

    def implementation(self, backend_name: str) -> Callable[..., Any]:
        """Return the function that a backend runs."""
        return _implementation(self.name, backend_name)

    def gradient(self, backward: Callable[..., Any], save: Callable[..., None]) -> None:
        """Tie a backward to the op: ``save(ctx, inputs, output)``, ``backward(ctx, *grads)``."""
        torch.library.register_autograd(
            f"tailor_engine::{self.name}", backward, setup_context=save, lib=_library
        )


def op(module: str, schema: str, **declaration: Any) -> Op:
    """Declare the op that a module is named after and register it with torch.library.

    The functions of the module that DEFINED names belong to the declaration.
    """
    name = module.rpartition(".")[2]
    own = vars(sys.modules[module]) if module in sys.modules else {}
    found = {part: own[label] for part, label in DEFINED.items() if label in own}
    declared = OPS[name] = Op(name, schema, **found | declaration)

    def run(*args: Any) -> Any:
        return _started(name, args)

    def shapes(*args: Any) -> Any:
        _device(declared.name, args)
        declared.check(*args)
        return (declared.shapes or declared.reference)(*args)

    _library.define(f"{name}{schema}")
    # One Python implementation for every device: `Library.impl` costs half of `custom_op` a call.
    _library.impl(name, _with_defaults(name, run), "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"tailor_engine::{name}", _with_defaults(name, shapes), lib=_library
    )
    return declared


def _started(op_name: str, args: tuple) -> Any:
    """Run an op on the device of its tensors; kernels start on the current card."""
    declared, device = OPS[op_name], _device(op_name, args)
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _run(declared, device.type, args)
    with torch.cuda.device(device):
        return _run(declared, device.type, args)


def _run(declared: Op, device: str, args: tuple) -> Any:
    """Check the arguments and call the implementation that is chosen for the device."""
    declared.check(*args)
    implementation = _implementation(declared.name, declared.choose(device))
    if torch.is_autocast_enabled(device):  # a caller's autocast ends at the op's border
        with torch.autocast(device, enabled=False):
            return implementation(*args)
    return implementation(*args)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend by name for every op inside the block, or raise.

    Raises:
        UserError: an unknown name, or a backend that this machine cannot run.
    """
    reason = unavailable(name)
    if reason:
        raise UserError(f"backend {name!r}: {reason}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@functools.cache
def unavailable(backend_name: str) -> str:
    """Say why this machine cannot run a backend at all; an empty string means that it can."""
    if backend_name not in BACKENDS:
        return f"unknown; the backends are {', '.join(BACKENDS)}"
    if backend_name in LEVELS:
        native = _native("_cpu")
        if native is None:
            return "the C++ extension is not built (pip install . needs a C++17 compiler)"
        return native.missing(backend_name.removeprefix("cpu."))
    if backend_name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        if importlib.util.find_spec("tailor_engine.kernels") is None:
            return "tailor_engine.kernels is not installed (pip install -e . maps it)"
        if not (torch.cuda.is_available() or _interpreting()):
            return "no GPU here (TRITON_INTERPRET=1 runs it slowly on the CPU)"
    if backend_name == "cuda":
        if _native("_cuda") is None:
            return "the CUDA extension is not built (nvcc was not found at install time)"
        if not torch.cuda.is_available():
            return "no GPU here"
    return ""


@functools.cache
def _preferred(op_name: str, device: str) -> str:
    order = OPS[op_name].prefer.get(device) or PREFERENCE.get(device, ("reference",))
    return next(name for name in order if not _missing(op_name, name, device))


@functools.cache
def _missing(op_name: str, backend_name: str, device: str) -> str:
    declared = OPS[op_name]
    reason = unavailable(backend_name)
    if reason or backend_name == "reference":
        return reason
    if backend_name in LEVELS:
        if declared.cpu is None:
            return "not written for this backend"
        if device != "cpu":
            return f"runs on the CPU only, the tensors are on {device}"
        level = getattr(_native("_cpu"), backend_name.removeprefix("cpu."))
        return "" if hasattr(level, op_name) else "not written for this backend"
    if backend_name == "triton":
        if importlib.util.find_spec(f"tailor_engine.kernels.{op_name}") is None:
            return "not written for this backend"
        if device == "cpu" and not _interpreting():
            return "the tensors are on the CPU (TRITON_INTERPRET=1 runs it slowly there)"
        return ""
    if declared.cuda is None:
        return "not written for this backend"
    return "" if device == "cuda" else f"runs on a GPU only, the tensors are on {device}"


@functools.cache
def _implementation(op_name: str, backend_name: str) -> Callable[..., Any]:
    declared = OPS[op_name]
    if backend_name == "reference":
        return declared.reference
    if backend_name == "triton":
        return importlib.import_module(f"tailor_engine.kernels.{op_name}").launch
    if backend_name == "cuda":
        assert declared.cuda is not None
        return functools.partial(declared.cuda, _native("_cuda"))
    assert declared.cpu is not None
    level = getattr(_native("_cpu"), backend_name.removeprefix("cpu."))
    return functools.partial(declared.cpu, level)


@functools.cache
def _native(name: str) -> Any:
    """Import a native module after torch, whose OpenMP runtime it shares."""
    try:
        return importlib.import_module(f"tailor_engine.{name}")
    except ImportError:
        return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _arguments(op_name: str) -> Sequence[Any]:
    return getattr(torch.ops.tailor_engine, op_name).default._schema.arguments


@functools.cache
def _tensor_positions(op_name: str) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(_arguments(op_name)) if str(a.type) == "Tensor")


def _ok(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_tensor_missing(declared: Op, args: tuple) -> bool:
    return any(i < len(args) and not _ok(args[i]) for i in _tensor_positions(declared.name))


def _with_defaults(op_name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function every argument by position: torch drops trailing ones left at default."""

    @functools.wraps(function)
    def complete(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != len(_arguments(op_name)):
            rest = _arguments(op_name)[len(args) :]
            args += tuple(kwargs.get(a.name, a.default_value) for a in rest)
        return function(*args)

    return complete


def _device(op_name: str, args: tuple) -> torch.device:
    """Return the device that all tensors share."""
    found: torch.device | None = None
    for value in args:
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, torch.Tensor):
                if found is not None and item.device != found:
                    raise ValueError(
                        f"{op_name}: tensors on {found} and {item.device}; move them to one"
                    )
                found = item.device
    return found if found is not None else _CPU


def threads() -> int:
    """Return the number of threads a native kernel may use: torch's own setting."""
    return torch.get_num_threads()
