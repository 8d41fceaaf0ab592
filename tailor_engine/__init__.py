"""tailor_engine: turn a general language model into a small, fast specialist.

Importing it teaches transformers' Auto classes to load models whose blocks differ in width; the
rest is imported at first use.
"""

import importlib
from typing import Any

from tailor_engine import families
from tailor_engine.errors import TailorError, UserError

__version__ = "0.1.0"

_LAZY = {
    "Model": "tailor_engine.model",
    "backend": "tailor_engine.ops",
    "load": "tailor_engine.io.models",
    "load_corpus": "tailor_engine.io.text",
    "run": "tailor_engine.pipeline",
    "save": "tailor_engine.io.models",
}
_ROOMS = ("data", "ops", "stages")

__all__ = ["TailorError", "UserError", "families", *_LAZY, *_ROOMS]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Import a public name at first use: torch alone takes a second."""
    if name in _ROOMS:
        return importlib.import_module(f"tailor_engine.{name}")
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'tailor_engine' has no attribute {name!r}")
