"""Reading records from local files: JSON lines, JSON, CSV, Parquet, plain or gzipped, and plain text."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import pyarrow
import pyarrow.parquet

from fedgraft.errors import DataError

__all__ = ["Record", "is_text_file", "read_file", "read_folder", "read_text"]

Record: TypeAlias = dict[str, Any]
"""One record as it lies in a file: values by field name."""

_READABLE = (".jsonl", ".json", ".csv", ".parquet")
_UNREADABLE_ERRORS = (
    OSError,
    EOFError,
    zlib.error,
    UnicodeDecodeError,
    csv.Error,
    pyarrow.ArrowException,
    OverflowError,  # a date that Python has no value for
)
_ENCODING = "utf-8-sig"  # with or without the mark that Windows puts first


def is_text_file(path: Path) -> bool:
    """Whether the name says plain text: .txt or .txt.gz."""
    return _kind(path) == ".txt"


def read_folder(folder: Path) -> list[Record]:
    """Read every data file directly in a folder, in the order of their names.

    Raises:
        DataError: There is none, or one of them cannot be read.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and _kind(path) in _READABLE)
    if not files:
        raise DataError(
            f"folder {folder} holds no data file",
            f"put files ending in {', '.join(_READABLE)} (or these with .gz) into it, or name a file",
        )
    return [record for path in files for record in read_file(path)]


def read_file(path: Path) -> list[Record]:
    """Read all records of one file.

    Args:
        path: .jsonl, .json (a list of objects), .csv (with a header line) or .parquet; all but the last also with .gz.

    Raises:
        DataError: The file is missing, empty, torn, of another kind, or holds something else than records.
    """
    kind = _kind(path)
    if kind not in _READABLE:
        raise DataError(f"data file {path} is of unknown kind", f"give it one of {', '.join(_READABLE)} (or with .gz)")
    with _reading(path):
        if kind == ".jsonl":
            records = list(_read_json_lines(path))
        elif kind == ".json":
            records = _read_json(path)
        elif kind == ".csv":
            records = _read_csv(path)
        else:
            records = pyarrow.parquet.read_table(path).to_pylist()
    if not records:
        raise DataError(f"data file {path} holds no records", "check that the file was written or downloaded completely")
    return records


def read_text(path: Path) -> str:
    """Read a .txt or .txt.gz file, UTF-8.

    Raises:
        DataError: The file is missing, empty or torn.
    """
    with _reading(path), _open(path) as stream:
        text = stream.read()
    if not text.strip():
        raise DataError(f"text file {path} is empty", "check that the file was written or downloaded completely")
    return text


def _kind(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return Path(name).suffix.lower()


def _open(path: Path) -> TextIO:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding=_ENCODING, newline="")
    return path.open(encoding=_ENCODING, newline="")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    if not path.is_file():
        raise DataError(f"data file {path} does not exist", "check the path; it is taken from where the command was started")
    try:
        yield
    except _UNREADABLE_ERRORS as error:
        raise DataError(
            f"data file {path} cannot be read to its end ({type(error).__name__}: {error})",
            "the file is torn or not what its ending says; write or download it again",
        ) from error


def _read_json_lines(path: Path) -> Iterator[Record]:
    with _open(path) as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _as_record(_parse(line, path, f"line {number}"), path, f"line {number}")


def _read_json(path: Path) -> list[Record]:
    with _open(path) as stream:
        text = stream.read()
    if not text.strip():
        return []
    content = _parse(text, path, "the file")
    if not isinstance(content, list):
        raise DataError(
            f"data file {path} holds a JSON {type(content).__name__}, expected a list of objects",
            "write it as a list, or as JSON lines (.jsonl)",
        )
    return [_as_record(item, path, f"record {number}") for number, item in enumerate(content, start=1)]


def _read_csv(path: Path) -> list[Record]:
    with _open(path) as stream:
        reader = csv.DictReader(stream)
        records = list(reader)
    for number, record in enumerate(records, start=1):
        if None in record or None in record.values():
            raise DataError(
                f"data file {path}, record {number}: it has not as many values as the header has names "
                f"({', '.join(reader.fieldnames or ())})",
                "quote values that hold commas or line breaks",
            )
    return list(records)


def _parse(text: str, path: Path, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = (
            f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        )
        raise DataError(
            f"data file {path}, {place}: not JSON ({reason})",
            "mend it; .jsonl has one JSON object a line, .json one list of objects",
        ) from error


def _as_record(value: Any, path: Path, place: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"data file {path}, {place}: a JSON {type(value).__name__}, expected an object with named fields")
    return value
