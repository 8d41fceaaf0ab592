"""The run folder: one sub-folder a finished step, whole or absent, whenever the process is killed.

runs/demo/
  lock                    held (flock) by the process that runs here; holds its number
  manifest.json           versions, machine, seed, hashes of the inputs
  report.json             the run as far as it has come
  0-base/                 evaluation.json: the metrics of the untouched model
  1-prune/                manifest.json, report.json, model/, evaluation.json
  .working-2-distill/     inputs.json, checkpoint.pt; becomes 2-distill by one rename
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import pickle
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tailor_engine import __version__
from tailor_engine.errors import UserError
from tailor_engine.io import files, models
from tailor_engine.model import Model

WORKING_PREFIX = ".working-"
FORMAT = 1
_PACKAGES = ("torch", "transformers", "accelerate", "peft", "datasets", "safetensors", "numpy")


class RunFolder:
    """A folder that keeps the steps of one run; use it as a context manager, which locks it.

    Raises:
        UserError: another process runs here, or the folder holds something else.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.note: Callable[[str], None] = lambda line: None

    def __enter__(self) -> RunFolder:
        """Lock the folder and clear away what a killed process left half-written."""
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path}: is a file, expected a run folder or a new name")
        if self.path.is_dir() and any(self.path.iterdir()) and not is_run(self.path):
            raise UserError(
                f"{self.path}: holds files that are not a run's; choose another folder with --out"
            )
        with files.one_line_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "a+", encoding="utf-8")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            owner = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise UserError(
                f"{self.path}: in use by process {owner}; wait for it, or choose another --out"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        files.remove_unfinished(self.path)
        return self

    def __exit__(self, *error: object) -> None:
        """Unlock; the lock of a killed process is free by itself."""
        self._lock.close()

    def describe(self, description: dict[str, Any]) -> None:
        """Write the manifest of the run: what went in, on which versions and machine."""
        manifest = {"format": FORMAT, **description, "versions": versions(), "machine": machine()}
        manifest["started"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        files.atomic_write_json(self.path / "manifest.json", manifest)

    def find(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the record of a finished step with these very inputs, its files checked."""
        self._adopt(name)
        folder = self.path / name
        if not folder.exists():
            return None
        try:
            manifest = files.read_json(folder / "manifest.json")
            changed = list(_changes(manifest["inputs"], inputs))
        except (UserError, KeyError, TypeError, AttributeError):
            self.note(f"{name}: half-written (no readable manifest.json); done again")
            return None
        if changed:
            self.note(f"{name}: {'; '.join(changed[:3])}; done again")
            return None
        fault = _fault(folder, manifest["files"])
        if fault:
            self.note(f"{name}: {fault}; done again")
            return None
        return manifest

    def begin(self, name: str, inputs: dict[str, Any]) -> None:
        """Open the working folder of a step; a checkpoint stays if its inputs are the same."""
        working = self._working(name)
        known = None
        if (working / "inputs.json").exists():
            with contextlib.suppress(UserError):  # half-written: as good as absent
                known = files.read_json(working / "inputs.json")
        if known != inputs:
            shutil.rmtree(working, ignore_errors=True)
            files.atomic_write_json(working / "inputs.json", inputs)
        files.remove_unfinished(working)

    def load_checkpoint(self, name: str) -> dict[str, Any] | None:
        """Return the checkpoint of an interrupted step, or None."""
        path = self._working(name) / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
            self.note(f"{name}: the checkpoint is damaged ({error}); started again")
            return None

    def save_checkpoint(self, name: str, state: dict[str, Any]) -> None:
        """Replace the checkpoint of the running step by a newer one, in one rename."""
        working = self._working(name)
        temporary = working / f"{files.TEMPORARY_PREFIX}checkpoint"
        with files.one_line_errors(working / "checkpoint.pt"):
            try:
                with open(temporary, "wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, working / "checkpoint.pt")
            except BaseException as error:
                temporary.unlink(missing_ok=True)
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None  # torch hides it behind its own
                raise

    def finish(self, name: str, record: dict[str, Any], kept: dict[str, Model]) -> dict[str, Any]:
        """Write a step's models, report and manifest, then give the folder its name."""
        working = self._working(name)
        for part, model in kept.items():
            models.save(model, working / part)
        if "report" in record:
            files.atomic_write_json(working / "report.json", record["report"])
        listing = {
            str(path.relative_to(working)): [path.stat().st_size, files.hash_file(path)]
            for path in sorted(working.rglob("*"))
            if path.is_file() and path.name not in ("inputs.json", "checkpoint.pt")
        }
        manifest = {"format": FORMAT, **record, "files": listing}
        manifest |= {"versions": versions(), "machine": machine()}
        manifest["finished"] = time.strftime("%Y-%m-%d %H:%M:%S %z")
        files.atomic_write_json(working / "manifest.json", manifest)
        self._adopt(name)
        return manifest

    def load(self, name: str, part: str = "model") -> Model:
        """Return the model that a step wrote."""
        return models.load(self.path / name / part)

    def find_evaluation(self, name: str, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the metrics of a step's model, if measured with these very inputs."""
        path = self.path / name / "evaluation.json"
        if path.exists():
            try:
                kept = files.read_json(path)
                return kept["metrics"] if kept["inputs"] == inputs else None
            except (UserError, KeyError, TypeError):
                self.note(f"{name}: evaluation.json is damaged; measured again")
        return None

    def keep_evaluation(self, name: str, inputs: dict[str, Any], metrics: dict[str, Any]) -> None:
        """Write the metrics of a step's model into its folder."""
        kept = {"inputs": inputs, "metrics": metrics}
        files.atomic_write_json(self.path / name / "evaluation.json", kept)

    def report(self, report: dict[str, Any]) -> None:
        """Write report.json, and drop the folders of steps that the plan no longer has."""
        files.atomic_write_json(self.path / "report.json", report)
        if report["complete"]:
            names = {"0-base", *(stage["name"] for stage in report["stages"])}
            for folder in step_folders(self.path):
                if folder.name not in names:
                    self._discard(folder)

    def _working(self, name: str) -> Path:
        return self.path / f"{WORKING_PREFIX}{name}"

    def _adopt(self, name: str) -> None:
        """Give a complete working folder its name; the last act of a step, so done again if cut."""
        working = self._working(name)
        if not (working / "manifest.json").exists():
            return
        with files.one_line_errors(working):
            for leftover in ("checkpoint.pt", "inputs.json"):
                (working / leftover).unlink(missing_ok=True)
            files.sync_folder(working)  # its files were synced as they were written
            self._discard(self.path / name)
            os.rename(working, self.path / name)
            files.sync_folder(self.path)

    def _discard(self, folder: Path) -> None:
        if folder.exists():
            aside = folder.with_name(f"{files.TEMPORARY_PREFIX}{folder.name}-{os.getpid()}")
            os.rename(folder, aside)
            shutil.rmtree(aside)


def is_run(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder looks like a run's, finished or not."""
    path = Path(path)
    return (path / "lock").exists() or (path / "manifest.json").exists()


def step_folders(path: str | os.PathLike[str]) -> list[Path]:
    """Return the folders of finished steps, in order."""
    found = [
        entry
        for entry in Path(path).iterdir()
        if entry.is_dir() and entry.name.split("-")[0].isdigit()
    ]
    return sorted(found, key=lambda entry: (int(entry.name.split("-")[0]), entry.name))


def model_path(path: str | os.PathLike[str]) -> str:
    """Return the model folder that a path means: a run's last, a step's, or the path itself."""
    folder = Path(path)
    if not folder.is_dir() or (folder / "config.json").exists():
        return str(path)
    if (folder / "model" / "config.json").exists():
        return str(folder / "model")
    finished = [step for step in step_folders(folder) if (step / "model/config.json").exists()]
    return str(finished[-1] / "model") if finished else str(path)


def read_run(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a report needs of a run: "report", "manifest".

    Raises:
        UserError: no run there, or none of its steps is finished.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise UserError(f"{path}: no such run folder")
    if not is_run(folder):
        raise UserError(f"{path}: is not a run folder (no manifest.json); give the --out of a run")
    try:
        return {name: files.read_json(folder / f"{name}.json") for name in ("report", "manifest")}
    except UserError as error:
        raise UserError(
            f"{path}: half-written run folder ({error}); `tailor run` with this --out finishes it"
        ) from None


def versions() -> dict[str, str]:
    """Return the versions of everything that a result depends on."""
    found = {"tailor_engine": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def machine() -> dict[str, Any]:
    """Return what is known of this machine."""
    described = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
    return described


def _processor() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _changes(before: dict[str, Any], after: dict[str, Any], path: str = "") -> Iterator[str]:
    """Yield one phrase for each input that is not what it was."""
    for key in sorted(before.keys() | after.keys()):
        old, new = before.get(key), after.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from _changes(old, new, f"{path}{key}.")
        elif old != new:
            short = len(str(old)) + len(str(new)) < 60
            yield f"{path}{key} was {old}, now {new}" if short else f"{path}{key} has changed"


def _fault(folder: Path, listing: dict[str, list]) -> str:
    """Say what is wrong with the files of a finished step; an empty string means nothing."""
    for name, (size, digest) in listing.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} is damaged ({path.stat().st_size} bytes, expected {size})"
        if files.hash_file(path) != digest:
            return f"{name} is damaged (its content is not what was written)"
    return ""
