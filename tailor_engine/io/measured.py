"""What was measured on this machine, kept between runs in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from tailor_engine.errors import TailorError, UserError
from tailor_engine.io import files, runs


def folder() -> Path:
    """Return the folder: TAILOR_CACHE, or tailor_engine in the user's own cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("TAILOR_CACHE") or Path(home) / "tailor_engine")


def recall(what: str, key: Any) -> Any:
    """Return what was kept under this key on this machine and build of ours, or None."""
    whole = _whole(key)
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # none, or damaged
        kept = files.read_json(_path(what, whole))
        return kept["value"] if kept["key"] == whole else None
    return None


def remember(what: str, key: Any, value: Any) -> None:
    """Keep a measurement; where the folder cannot be written to, it is done again next time."""
    whole = _whole(key)
    with contextlib.suppress(TailorError):
        files.atomic_write_json(_path(what, whole), {"key": whole, "value": value})


def _whole(key: Any) -> Any:
    """Add the machine and the kernels' build to a key, as JSON holds it."""
    known = runs.machine()
    machine = {name: known[name] for name in ("processor", "cores", "system")}
    spec = importlib.util.find_spec("tailor_engine._cpu")
    built = Path(spec.origin).stat().st_mtime_ns if spec is not None and spec.origin else 0
    return json.loads(json.dumps({"asked": key, "machine": machine, "kernels": built}))


def _path(what: str, whole: Any) -> Path:
    digest = hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()
    return folder() / f"{what}-{digest[:16]}.json"
