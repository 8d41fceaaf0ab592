"""The stages of the recipe, each alone or as a step of a plan."""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any

from tailor_engine.errors import UserError

if TYPE_CHECKING:
    from tailor_engine.stages._stage import Stage


@functools.cache
def names() -> tuple[str, ...]:
    """Return the names of all stages: the public modules of this package."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if not name.startswith("_")))


def load() -> dict[str, Stage]:
    """Import every stage and return them by name."""
    for name in names():
        importlib.import_module(f"{__name__}.{name}")
    from tailor_engine.stages._stage import STAGES

    return STAGES


def get(name: str) -> Stage:
    """Import one stage and return it.

    Raises:
        UserError: no such stage; the line names the nearest.
    """
    check_name(name)
    importlib.import_module(f"{__name__}.{name}")
    from tailor_engine.stages._stage import STAGES

    return STAGES[name]


def config_type(name: str) -> type:
    """Return the type of a stage's config."""
    return get(name).config_type


def summary(name: str) -> str:
    """Return what a stage does, the first line of its module, without importing it."""
    spec: Any = importlib.util.find_spec(f"{__name__}.{name}")
    text = ast.get_docstring(ast.parse(spec.loader.get_source(spec.name))) or ""
    return text.split("\n")[0]


def check_name(name: str) -> None:
    """Raise UserError for a name that is no stage's."""
    if name not in names():
        near = difflib.get_close_matches(str(name), names(), 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"unknown stage {name!r}{hint} The stages are {', '.join(names())}.")
