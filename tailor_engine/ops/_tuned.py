"""Kernel configurations that were measured on this card, in place of those that `config` reasons.

Used only when it is asked for: by default every choice is a pure function of the shape.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from typing import Any

Table = Mapping[str, Mapping[str, dict[str, Any]]]
"""{op: {key of config's arguments: the configuration}}."""


def key(arguments: tuple) -> str:
    """Return the name of config's arguments in a table."""
    return json.dumps([str(each) for each in arguments])


def use(table: Table) -> None:
    """Let the kernels of some ops choose as a table says, where it knows their shape."""
    for op_name, measured in table.items():
        module: Any = importlib.import_module(f"tailor_engine.kernels.{op_name}")
        module.config = _choice(measured, getattr(module.config, "reasoned", module.config))


def _choice(measured: Mapping[str, dict[str, Any]], reasoned: Any) -> Any:
    def config(*arguments: Any) -> dict[str, Any]:
        return measured.get(key(arguments)) or reasoned(*arguments)

    config.reasoned = reasoned  # type: ignore[attr-defined]
    return config
