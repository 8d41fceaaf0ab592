"""Atomic writes and file hashes: a kill at any moment leaves the old content or the new one."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailor_engine.errors import TailorError, UserError

#: Prefix of every unfinished file or folder; whatever bears it may be deleted after a crash.
TEMPORARY_PREFIX = ".unfinished-"
#: Prefix of a folder that is being replaced; see `recover`.
REPLACED_PREFIX = ".replaced-"

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def atomic_write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that a reader sees either the old content or all of the new one.

    Raises:
        TailorError: the disk is full or the place cannot be written; nothing half-written stays.
    """
    path = Path(path)
    temporary = None
    with one_line_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fchmod(descriptor, 0o666 & ~_umask())
                os.fsync(descriptor)
            os.replace(temporary, path)
            sync_folder(path.parent)
        except BaseException:
            if temporary is not None:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            raise


def atomic_write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text atomically."""
    atomic_write_bytes(path, text.encode("utf-8"))


def atomic_write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as indented JSON atomically; NaN and infinity are refused (ValueError)."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is missing or is not JSON; the line names it.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary sibling folder that becomes `path`, whole, when the block ends well.

    On an exception the temporary folder is removed and an old `path` stays as it was. A rename
    cannot replace a filled folder, so the old one steps aside first; `recover` puts it back if the
    process is killed between those two renames.

    Raises:
        TailorError: the disk is full or the place cannot be written.
        UserError: `path` is a file.
    """
    path = Path(path).absolute()
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file, expected a folder or a new name")
    recover(path)
    temporary = None
    with one_line_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(
                tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{path.name}-", dir=path.parent)
            )
            os.chmod(temporary, 0o777 & ~_umask())
            yield temporary
            sync_tree(temporary)
            replaced = path.parent / f"{REPLACED_PREFIX}{path.name}"
            if path.is_dir():
                os.rename(path, replaced)
            os.rename(temporary, path)
            sync_folder(path.parent)
            shutil.rmtree(replaced, ignore_errors=True)
        except BaseException:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
            recover(path)
            raise


def recover(path: str | os.PathLike[str]) -> None:
    """Finish a folder replacement that a kill cut short: put the old folder back, or delete it."""
    path = Path(path).absolute()
    replaced = path.parent / f"{REPLACED_PREFIX}{path.name}"
    if replaced.is_dir():
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, path)


def remove_unfinished(folder: str | os.PathLike[str]) -> list[str]:
    """Delete what killed writers left in a folder, and return the names.

    Call it only where no other process writes (under the folder's lock).
    """
    removed = []
    for entry in sorted(Path(folder).iterdir()):
        if entry.name.startswith(TEMPORARY_PREFIX):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
            removed.append(entry.name)
        elif entry.name.startswith(REPLACED_PREFIX):
            recover(entry.with_name(entry.name.removeprefix(REPLACED_PREFIX)))
    return removed


@contextlib.contextmanager
def one_line_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the system's errors on writing into one line that names the path.

    safetensors reports a full disk as its own exception, with the system's number in its text.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number and int(number[1]) in _NO_SPACE:
            raise _no_space(path) from error
        raise TailorError(f"{path}: could not be written ({error})") from error
    except OSError as error:
        if error.errno in _NO_SPACE:
            raise _no_space(path) from error
        reason = error.strerror or str(error)
        raise TailorError(f"{path}: could not be written ({reason})") from error


def _no_space(path: str | os.PathLike[str]) -> TailorError:
    return TailorError(
        f"{path}: the disk is full; nothing was changed. Free some space and run again"
    )


def sync_tree(folder: str | os.PathLike[str]) -> None:
    """Force all files and folders below to the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            descriptor = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        sync_folder(root)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Force a folder's entries to the disk, where the system can (POSIX)."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def hash_file(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def hash_folder(folder: str | os.PathLike[str]) -> str:
    """Return one SHA-256 over the relative names and contents of all files below, in order."""
    folder = Path(folder)
    digest = hashlib.sha256()
    for file in sorted(entry for entry in folder.rglob("*") if entry.is_file()):
        digest.update(f"{file.relative_to(folder).as_posix()}\0{hash_file(file)}\n".encode())
    return digest.hexdigest()


def folder_bytes(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of all files below a folder."""
    return sum(entry.stat().st_size for entry in Path(folder).rglob("*") if entry.is_file())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
