"""What a stage is: a function of (model, config, data) that gives back a model and a report.

A config is a frozen dataclass whose fields carry their own help, range and choices; the recipe's
keys, the command line's flags, the validation and the help all follow from it.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import difflib
import resource
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tailor_engine.errors import UserError

if TYPE_CHECKING:  # both import torch, which help and recipe checks do without
    from tailor_engine.data import Data
    from tailor_engine.model import Model

STAGES: dict[str, Stage] = {}
_measured: dict[tuple[str, str], Any] = {}


@dataclass
class Report:
    """What one stage did; the keys of metrics carry their unit (``latency_ms_p50``)."""

    stage: str
    config: dict[str, Any]
    seconds: float = 0.0
    peak_bytes: int = 0
    parameters_before: int = 0
    parameters_after: int = 0
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)


class Context:
    """What a stage may use of the outside: progress, notes and its own checkpoint.

    This one does nothing; a pipeline puts its own in place with :func:`use_context`.
    """

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Tell how far the stage is."""

    def note(self, line: str) -> None:
        """Keep a one-line fact for the report."""

    def recall(self, what: str, key: Any) -> Any:
        """Return what was measured on this machine under this key, or None."""
        return _measured.get((what, repr(key)))

    def remember(self, what: str, key: Any, value: Any) -> None:
        """Keep a measurement (plain values) for later runs; this one: for this process."""
        _measured[what, repr(key)] = value

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Return what save_checkpoint kept of an interrupted run of this very stage, or None."""
        return None

    def save_checkpoint(self, state: dict[str, Any]) -> None:
        """Keep a state (nested dicts of tensors and plain values) to go on from after a kill."""


_context: contextvars.ContextVar[Context] = contextvars.ContextVar("context", default=Context())  # noqa: B039


def context() -> Context:
    """Return the context that the running stage reports to."""
    return _context.get()


@contextlib.contextmanager
def use_context(outside: Context) -> Iterator[None]:
    """Put a context in place for the stages inside the block."""
    token = _context.set(outside)
    try:
        yield
    finally:
        _context.reset(token)


@dataclass(frozen=True)
class Stage:
    """A registered stage: its name, its config's type and its function."""

    name: str
    config_type: type
    function: Callable[[Model, Any, Data], tuple[Model, Report]]

    def __call__(self, model: Model, config: Any, data: Data) -> tuple[Model, Report]:
        """Validate the config, run the stage, and complete its report."""
        if isinstance(config, dict):
            config = make_config(self.config_type, config, self.name)
        validate(config, self.name)
        start, before = time.perf_counter(), model.parameters
        peak = _peak_of(model.device)
        result, report = self.function(model, config, data)
        report.seconds = time.perf_counter() - start
        report.peak_bytes = peak()
        report.parameters_before, report.parameters_after = before, result.parameters
        return result, report


def _peak_of(device: Any) -> Callable[[], int]:
    """Return what tells the most memory held from now on: a GPU's, or that of the process."""
    if device.type != "cuda":
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    import torch

    torch.cuda.reset_peak_memory_stats(device)
    return lambda: torch.cuda.max_memory_allocated(device)


def stage(config_type: type) -> Callable[[Callable], Stage]:
    """Register a function of (model, config, data) as the stage of its own name."""

    def register(function: Callable) -> Stage:
        declared = Stage(function.__name__, config_type, function)
        STAGES[declared.name] = declared
        return declared

    return register


def option(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple | None = None,
) -> Any:
    """Declare one field of a config: its default, one line of help with the unit, its range."""
    metadata = {"help": help, "low": low, "high": high, "choices": choices}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def make_config(config_type: type, values: dict[str, Any], where: str) -> Any:
    """Build a config from a recipe's section or a command line.

    Raises:
        UserError: an unknown key (with the nearest right one) or a value out of range.
    """
    known = [f.name for f in dataclasses.fields(config_type)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"{where}: unknown key {key!r}{hint} The keys are {', '.join(known)}.")
    config = config_type(**values)
    validate(config, where)
    return config


def validate(config: Any, where: str) -> None:
    """Check the type, the range and the choices of every field.

    Raises:
        UserError: one line that names the key, what was expected and what came.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, rule = getattr(config, field.name), field.metadata
        if not _fits(value, hints[field.name]):
            expected = getattr(hints[field.name], "__name__", str(hints[field.name]))
            raise UserError(f"{where}: {field.name} must be {expected}, got {value!r}")
        if value is None or not rule:
            continue
        if rule["choices"] and value not in rule["choices"]:
            near = difflib.get_close_matches(str(value), map(str, rule["choices"]), 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            names = ", ".join(map(str, rule["choices"]))
            raise UserError(f"{where}: {field.name} must be one of {names}, got {value!r}{hint}")
        low, high = rule["low"], rule["high"]
        if (low is not None and value < low) or (high is not None and value > high):
            bounds = [f">= {low:g}"] if low is not None else []
            bounds += [f"<= {high:g}"] if high is not None else []
            span = " and ".join(bounds)
            raise UserError(f"{where}: {field.name} must be {span}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, part) for part in typing.get_args(hint))
    if hint is Any:
        return True
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, origin or hint)
