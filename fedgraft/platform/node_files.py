"""What a node needs of a run before a replica on it can work: the base, the data, methods' files, each brought there once.

Without a store they must be seen under the driver's own paths, so on a folder that all nodes share. With one (``output.storage``)
the driver puts them there, and each node fetches what its own cache lacks; no path of the driver's node is used on another.
"""

from __future__ import annotations

import fcntl
import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedgraft.data.prepared import MANIFEST_NAME
from fedgraft.errors import ModelError
from fedgraft.platform.cache_folder import default_cache
from fedgraft.platform.remote import RemoteFolder

__all__ = ["Origin", "put_folder", "require_seen"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """Where a node fetches a run's files from, and into which cache of its own.

    ``base``, ``data`` and ``method_files`` are folders in the store; names of the first two tell their content, so that what a
    cache has of that name is that. ``cache``: ``None`` for the node's default.
    """

    base: RemoteFolder
    data: RemoteFolder
    method_files: RemoteFolder
    cache: Path | None = None

    def bring(self) -> tuple[Path, Path, tuple[Path, ...]]:
        """Fetch what this node lacks; gives base, data and method files on its disk.

        Raises:
            StorageError: The store cannot be read, or the cache not written.
        """
        cache = self.cache or default_cache()
        base = _bring_folder(self.base, cache / "bases" / _last(self.base), "base.json")
        data = _bring_folder(self.data, cache / "data" / _last(self.data), MANIFEST_NAME)
        files = []
        for name in self.method_files.names():
            text = self.method_files.read(name)
            target = cache / "methods" / hashlib.sha256(text).hexdigest()[:16] / Path(name).name
            if not target.is_file():
                self.method_files.download(name, target)
            files.append(target)
        return base, data, tuple(files)


def put_folder(source: Path, remote: RemoteFolder, last: str) -> None:
    """Put a folder's files into a store, unless it is there; the file ``last`` comes last and says that all are.

    Raises:
        StorageError: The store cannot be written.
    """
    if remote.has(last):
        return
    names = [path.name for path in sorted(source.iterdir()) if path.is_file() and path.name != last]
    for name in [*names, last]:
        remote.upload(source / name, name)


def require_seen(folders: Sequence[Path]) -> None:
    """Refuse to go on on a node that does not see the driver's folders.

    Raises:
        ModelError: It does not.
    """
    lacking = [str(folder) for folder in folders if not folder.is_dir()]
    if lacking:
        raise ModelError(
            f"the node {socket.gethostname()} does not see {' and '.join(lacking)}, which the driver's node has",
            "name folders that all nodes share (output.folder, output.cache), or a store that all reach: output.storage",
        )


def _last(folder: RemoteFolder) -> str:
    return folder.inner.rpartition("/")[2]


def _bring_folder(remote: RemoteFolder, target: Path, last: str) -> Path:
    """Fetch a folder once, however many replicas of this node ask for it at a time."""
    if (target / last).is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / f".{target.name}.lock").open("a") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # given back when the file is closed, also by a process that dies
        if not (target / last).is_file():
            for name in [*(name for name in remote.names() if name != last), last]:
                remote.download(name, target / name)
    return target
