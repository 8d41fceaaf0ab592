"""`repeat` in a plan: prune a step, distill a little, and again, as so many plain stages.

    - repeat: {times: 3, stages: [{prune: {target: 0.7}}, {distill: {tokens: 30000}}]}

What the stages are told is for all rounds together: each prunes to the same share of what the one
before left, and trains on its part of the tokens. The teacher stays the dense model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from tailor_engine import stages
from tailor_engine.errors import UserError

NAME = "repeat"
KEYS = ("times", "stages")
SHARES = {"prune": ("target", "latency"), "vocabulary": ("share",)}  # of what comes in
ABSOLUTE = {"prune": ("parameters", "bytes", "latency_ms", "blocks"), "vocabulary": ("tokens",)}
SPLIT = ("steps", "tokens")  # of a training
MOST = 16


def expand(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items of a plan with every `repeat` written out.

    Raises:
        UserError: a `repeat` without times or stages, or with a budget that is no share.
    """
    for item in items:
        if isinstance(item, dict) and list(item) == [NAME]:
            yield from _rounds(item[NAME])
        else:
            yield item


def _rounds(section: Any) -> Iterator[Any]:
    if not isinstance(section, dict) or set(section) != set(KEYS):
        raise UserError(f"{NAME} must be a mapping with {' and '.join(KEYS)}, got {section!r}")
    times, inner = section["times"], section["stages"]
    if not isinstance(times, int) or isinstance(times, bool) or not 1 <= times <= MOST:
        raise UserError(f"{NAME}: times must be 1..{MOST}, got {times!r}")
    if not isinstance(inner, list) or not inner:
        raise UserError(f"{NAME}: stages must be a list of stages, got {inner!r}")
    for number in range(times):
        for item in inner:
            name, settings = next(iter(item.items())) if isinstance(item, dict) else (item, {})
            yield {name: _part(str(name), dict(settings or {}), times, number)}


def _part(name: str, settings: dict[str, Any], times: int, number: int) -> dict[str, Any]:
    """Return what one round is told of a stage's settings."""
    for key in ABSOLUTE.get(name, ()):
        if settings.get(key):
            shares = " or ".join(SHARES[name])
            raise UserError(f"{NAME}: {name} takes a share here ({shares}), got {key}")
    defaults = vars(stages.config_type(name)())
    for key in SHARES.get(name, ()):
        value = settings.get(key, defaults[key])
        if value and isinstance(value, (int, float)):
            settings[key] = value ** (1 / times)
    for key in SPLIT if set(SPLIT) <= set(defaults) else ():
        value = settings.get(key, defaults[key])
        if value and isinstance(value, int):
            settings[key] = value * (number + 1) // times - value * number // times
    return settings
