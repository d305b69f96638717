"""A folder that is named by a URI: on a disk that nodes share (``file://``), or in an object store (``s3://``, ``gs://``).

Object stores have no folders, no locks and no renames; what is used here is what all of them have: whole files are put, got,
listed and deleted. PyArrow opens the stores that it knows, with the credentials that they find in the environment; any other
protocol is fsspec's (``memory://`` is this process's own). PyArrow is imported at first use: configurations are read without it.
"""

from __future__ import annotations

import functools
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from fedgraft.errors import StorageError

__all__ = ["RemoteFolder", "is_uri", "known_schemes"]

_CHUNK = 2**24
_ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")


def is_uri(text: str) -> bool:
    """Whether a text is a URI and no path."""
    return "://" in text


def known_schemes() -> tuple[str, ...]:
    """The schemes that can be opened, if what they need is installed."""
    return tuple(sorted({*_ARROW_SCHEMES, *fsspec.available_protocols()}))


@dataclass(frozen=True, slots=True)
class RemoteFolder:
    """A folder under a URI; a value that may travel between processes.

    Attributes:
        uri: Of the root, options included, e.g. ``s3://bucket/runs?region=eu-central-1``.
        inner: This folder's path under the root, without a slash at its ends; empty for the root itself.
    """

    uri: str
    inner: str = ""

    def __str__(self) -> str:
        root, _, _ = self.uri.partition("?")
        return f"{root.rstrip('/')}/{self.inner}".rstrip("/")

    def child(self, *parts: str) -> RemoteFolder:
        """A folder in this one."""
        return RemoteFolder(self.uri, "/".join(part for part in (self.inner, *parts) if part))

    def write(self, name: str, data: bytes) -> None:
        """Put a file; whoever reads gets the old one or the new one, whole.

        Raises:
            StorageError: It cannot be written.
        """
        with self._put(name) as stream:
            stream.write(data)

    def upload(self, source: Path, name: str) -> None:
        """Put a local file.

        Raises:
            StorageError: It cannot be written.
        """
        with source.open("rb") as local, self._put(name) as stream:
            shutil.copyfileobj(local, stream, _CHUNK)

    def read(self, name: str) -> bytes:
        """Get a file.

        Raises:
            StorageError: It is not there, or cannot be read.
        """
        opened, path = self._open(name)
        with _told(self, name, "read"), opened.open_input_stream(path) as stream:
            data: bytes = stream.read()
            return data

    def download(self, name: str, target: Path) -> None:
        """Get a file into a local one, made with its folder; it is there whole or not at all.

        Raises:
            StorageError: It cannot be read here or written there.
        """
        opened, path = self._open(name)
        scratch = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")  # others may fetch the same at a time
        with _told(self, name, "fetched"):
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened.open_input_stream(path) as stream, scratch.open("wb") as local:
                    shutil.copyfileobj(stream, local, _CHUNK)
                os.replace(scratch, target)
            finally:
                scratch.unlink(missing_ok=True)

    def has(self, name: str) -> bool:
        """Whether a file is there.

        Raises:
            StorageError: The store does not answer.
        """
        from pyarrow import fs

        opened, path = self._open(name)
        with _told(self, name, "looked up"):
            return bool(opened.get_file_info(path).type == fs.FileType.File)

    def names(self) -> list[str]:
        """The files in this folder and below it, by their paths under it, sorted; none where there is no such folder.

        Raises:
            StorageError: The store does not answer.
        """
        from pyarrow import fs

        opened, path = self._open("")
        with _told(self, "", "listed"):
            found = opened.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
        start = path.rstrip("/") + "/"
        return sorted(str(info.path).removeprefix(start) for info in found if info.type == fs.FileType.File)

    def delete(self, name: str) -> None:
        """Delete a file; one that is not there is no error.

        Raises:
            StorageError: It cannot be deleted.
        """
        if not self.has(name):
            return
        opened, path = self._open(name)
        with _told(self, name, "deleted"):
            opened.delete_file(path)

    @contextmanager
    def _put(self, name: str) -> Iterator[Any]:
        """A stream to a file's new content. A disk shows what is half written, so there it is renamed; a store does not."""
        from pyarrow import fs

        opened, path = self._open(name)
        is_disk = opened.type_name == "local"
        written = f"{path}.{uuid.uuid4().hex}.part" if is_disk else path
        with _told(self, name, "written"):
            if is_disk:
                opened.create_dir(path.rpartition("/")[0], recursive=True)
            try:
                with opened.open_output_stream(written) as stream:
                    yield stream
                if is_disk:
                    opened.move(written, path)
            except BaseException:
                if is_disk and opened.get_file_info(written).type == fs.FileType.File:
                    opened.delete_file(written)
                raise

    def _open(self, name: str) -> tuple[Any, str]:
        opened, root = _opened(self.uri)
        return opened, "/".join(part for part in (root.rstrip("/"), self.inner, name) if part)


@contextmanager
def _told(folder: RemoteFolder, name: str, verb: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (OSError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise StorageError(
            f"{folder}{'/' if name else ''}{name} cannot be {verb}: {reason}",
            "see that the store can be reached from this node, with credentials that may read and write there",
        ) from error


@functools.lru_cache(maxsize=8)
def _opened(uri: str) -> tuple[Any, str]:
    """The file system of a URI, and the path in it. Kept: opening a store takes requests of its own."""
    from pyarrow import fs

    scheme = uri.partition("://")[0]
    with _told(RemoteFolder(uri), "", "opened"):
        if scheme in _ARROW_SCHEMES:
            opened, path = fs.FileSystem.from_uri(uri)
            return opened, str(path)
        try:
            found, path = fsspec.core.url_to_fs(uri)
        except (ImportError, ValueError) as error:
            raise OSError(str(error)) from None  # what the protocol needs is not installed, or it is none
        return fs.PyFileSystem(fs.FSSpecHandler(found)), str(path)
