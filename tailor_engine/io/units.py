"""Numbers as people read them."""

from __future__ import annotations


def count(value: float | None) -> str:
    """Return a count with three digits and K, M or B."""
    return _scaled(value, ((1e9, " B"), (1e6, " M"), (1e3, " K")), "")


def size(value: float | None) -> str:
    """Return bytes as kB, MB or GB (powers of ten)."""
    return _scaled(value, ((1e9, " GB"), (1e6, " MB"), (1e3, " kB")), " B", 100)


def seconds(value: float | None) -> str:
    """Return a duration as seconds, minutes or hours."""
    if value is None:
        return "–"
    if value < 100:
        return f"{value:.1f} s" if value < 10 else f"{value:.0f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{value / 3600:.1f} h"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, never in powers of ten."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    whole = len(str(int(abs(value)))) if abs(value) >= 1 else 0
    if not whole:
        return f"{value:.{digits + (abs(value) < 0.1) + (abs(value) < 0.01)}f}"
    return f"{value:,.{max(0, digits - whole)}f}"


def _scaled(value: float | None, steps: tuple, unit: str, whole: int = 1000) -> str:
    if value is None:
        return "–"
    for step, name in steps:
        if abs(value) >= step:
            shown = value / step
            return f"{shown:.{0 if shown >= whole else 1 if shown >= 10 else 2}f}{name}"
    return f"{value:.0f}{unit}"
