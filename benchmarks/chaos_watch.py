"""What happens in a folder, as it happens: inotify (Linux), for a watcher that wants to be there before the next step is done."""

from __future__ import annotations

import ctypes
import os
import select
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Change", "Watch"]

_MODIFY, _MOVED_TO, _CREATE, _ISDIR, _NONBLOCK = 0x2, 0x80, 0x100, 0x40000000, 0o4000
_HEADER = struct.Struct("iIII")


@dataclass(frozen=True, slots=True)
class Change:
    """``is_whole``: it was renamed to this path; else it was made there, or written to."""

    path: Path
    is_whole: bool


class Watch:
    """Follows a folder and all folders in it, also those that are made later.

    Args:
        folder: Must be there.
    """

    def __init__(self, folder: Path) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(_NONBLOCK)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "inotify_init1")
        self._folders: dict[int, Path] = {}
        self._found: list[Change] = list(self._add(folder))

    def close(self) -> None:
        """Stop following."""
        os.close(self._descriptor)

    def read(self, timeout_s: float) -> list[Change]:
        """Wait for changes; none where nothing happens in this time."""
        if not self._found and not select.select([self._descriptor], [], [], timeout_s)[0]:
            return []
        found, self._found = self._found, []
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return found
        at = 0
        while at < len(data):
            number, mask, _, length = _HEADER.unpack_from(data, at)
            at += _HEADER.size
            name = data[at : at + length].rstrip(b"\0").decode()
            at += length
            if number not in self._folders or not name:
                continue
            path = self._folders[number] / name
            found.append(Change(path, is_whole=bool(mask & _MOVED_TO)))
            if mask & _ISDIR:
                found += self._add(path)
        return found

    def _add(self, folder: Path) -> Iterator[Change]:
        """Follow a folder; what is in it already was made before anybody looked."""
        number = self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), _MODIFY | _MOVED_TO | _CREATE)
        if number < 0:
            return  # it has gone again
        self._folders[number] = folder
        try:
            inside = list(os.scandir(folder))
        except OSError:
            return
        for entry in inside:
            path = Path(entry.path)
            yield Change(path, is_whole=not entry.name.startswith("."))
            if entry.is_dir(follow_symlinks=False):
                yield from self._add(path)
