"""Rows of a table file, one dict each, with one-line errors that name the place of the damage."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tailor_engine.errors import UserError

Row = dict[str, Any]
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


def read_table(path: Path, extension: str) -> Iterator[Row]:
    """Rows of one file, lazily.

    Raises: UserError for a damaged file, naming the line where there are lines.
    """
    if extension == ".parquet":
        return _parquet(path)
    text = read_text(path)
    if extension == ".json":
        return _json(path, text)
    if extension in (".csv", ".tsv"):
        return _csv(path, text, "\t" if extension == ".tsv" else ",")
    return _json_lines(path, text)


def read_text(path: Path) -> str:
    """Read a UTF-8 file, decompressed where its name ends in .gz or .xz.

    Raises: UserError where it cannot be read or is not UTF-8, naming the byte.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz":
            data = gzip.decompress(data)
        elif path.suffix == ".xz":
            data = lzma.decompress(data)
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); convert it") from None
    except (lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _json_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{path}, line {number}: not valid JSON ({error.msg} at column {error.colno})"
            ) from None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object {{...}}, got {line[:40]}")
        yield _clean(row)


def _json(path: Path, text: str) -> Iterator[Row]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{path}: expected a list of objects [{{...}}, ...]")
    yield from map(_clean, rows)


def _csv(path: Path, text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    # A text column may hold whole articles; the module's own bound is 128 KiB.
    csv.field_size_limit(1 << 30)
    try:
        for row in reader:
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                raise UserError(f"{path}, line {reader.line_num}: expected {columns} columns")
            yield row
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: damaged CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged Parquet file ({str(error).splitlines()[0]})") from None


def _clean(row: Row) -> Row:
    """JSON may spell half a character (a lone surrogate), which no tokenizer accepts."""
    return {
        key: value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
        for key, value in row.items()
    }
