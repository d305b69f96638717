"""Files that are there whole or not at all, and what is said when a disk takes no more."""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path

import safetensors

from fedgraft.errors import StorageError

__all__ = ["append_text", "is_disk_full", "storage_error", "sync_file", "sync_folder", "written_whole"]

_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a scratch name beside ``path``; after the block, flush what was written there to disk, and rename it.

    A reader, and whoever comes after a kill or a power cut, sees the old file or the new one. The scratch file never stays.

    Raises:
        StorageError: It cannot be written, e.g. as the disk is full; the old file, if there is one, is as it was.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield scratch
        with scratch.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(scratch, path)
        sync_folder(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise storage_error(path, error) from error
    finally:
        scratch.unlink(missing_ok=True)


def append_text(path: Path, text: str) -> None:
    """Add text to a file: it is there when this process dies, and after a power cut once ``sync_file`` was called.

    Raises:
        StorageError: It cannot be written; what was written of it is taken back.
    """
    before = path.stat().st_size if path.is_file() else 0
    try:
        with path.open("a") as stream:
            stream.write(text)
    except OSError as error:
        if path.is_file():
            os.truncate(path, before)
        raise storage_error(path, error) from error


def sync_file(path: Path) -> None:
    """Flush what was added to a file to disk.

    Raises:
        StorageError: It cannot be written, e.g. as the disk is full.
    """
    try:
        with path.open("ab") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise storage_error(path, error) from error


def sync_folder(folder: Path) -> None:
    """Flush a folder to disk, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error says that a disk, or the user's share of it, is full."""
    return _number(error) in _FULL


def storage_error(path: Path, error: BaseException) -> StorageError:
    """Say that a file could not be written, and what to do; an error of a part of it is told as the whole's."""
    if isinstance(error, StorageError) and error.__cause__ is not None:
        error = error.__cause__
    if is_disk_full(error):
        free = f"free space under {path.parent}, then go on: what was finished is whole"
        return StorageError(f"{path} cannot be written: no space is left there", free)
    return StorageError(f"{path} cannot be written: {error}", "mend the cause, then go on: what was finished is whole")


def _number(error: BaseException) -> int | None:
    """The system's number of an error; safetensors has it in its text only."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, safetensors.SafetensorError) else None
    return int(found.group(1)) if found else None
