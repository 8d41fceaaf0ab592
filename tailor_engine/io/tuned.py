"""Where the measured kernel configurations of a card lie: in the user's cache, a file a card."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from tailor_engine.errors import UserError
from tailor_engine.io import files
from tailor_engine.ops import _tuned

ASKED = "TAILOR_TUNED"


def path(card: str) -> Path:
    """Return the file of a card, by its name."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-")
    return home / "tailor_engine" / f"tuned-{name}.json"


def keep(card: str, table: dict[str, Any]) -> Path:
    """Add what was measured to the card's file; a shape that was there is replaced."""
    place, known = path(card), read(card)
    for op_name, measured in table.items():
        known.setdefault(op_name, {}).update(measured)
    place.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write_json(place, known)
    return place


def read(card: str) -> dict[str, Any]:
    """Return what was measured on a card; nothing where nothing was."""
    place = path(card)
    return files.read_json(place) if place.exists() else {}


def use_if_asked() -> None:
    """Take the measured configurations where the environment says TAILOR_TUNED=1.

    Raises:
        UserError: there is no GPU, or nothing was measured on it.
    """
    if os.environ.get(ASKED, "0") in ("", "0"):
        return
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{ASKED} was asked for, but there is no CUDA GPU here")
    card = torch.cuda.get_device_name()
    table = read(card)
    if not table:
        raise UserError(f"{ASKED}: nothing was measured on {card}; run `tailor bench --tune` first")
    _tuned.use(table)
