"""Where clients' private state lies between rounds: one safetensors file a client and version, outside the driver.

A version is the round that wrote it. A task names the version it starts from and writes the next one, so a task that is run
again after a kill starts from the same bytes and overwrites its own result. The files lie in a folder that all nodes share, or in
an object store, which replicas and driver read and write directly.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import safetensors
from safetensors.torch import load, load_file, save, save_file

from fedgraft.errors import CheckpointError, StorageError
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.storage import written_whole
from fedgraft.types import Params

__all__ = ["ClientStateStore", "read_tensors", "write_tensors"]


def write_tensors(tensors: Params, path: Path) -> None:
    """Write tensors as safetensors under a temporary name, flush to disk, then rename: a reader sees all or nothing.

    Raises:
        StorageError: The file cannot be written, e.g. as the disk is full; what was there is as it was.
    """
    with written_whole(path) as scratch:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, scratch)


def read_tensors(path: Path) -> Params:
    """Load tensors that ``write_tensors`` wrote.

    Raises:
        CheckpointError: The file is missing or torn.
    """
    try:
        found: Params = load_file(path)
        return found
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}", "resume from an earlier round") from error


class ClientStateStore:
    """Private state by client and version, in a folder.

    Args:
        folder: Made on the first write.
    """

    def __init__(self, folder: Path | RemoteFolder) -> None:
        self._folder = folder
        self._known: dict[int, tuple[int, str]] = {}
        self._kept: dict[int, frozenset[int]] = {}

    def path(self, client_id: int, version: int) -> Path:
        """File of one client's state after one round, of a store on a disk."""
        assert isinstance(self._folder, Path), "a remote store has no paths"
        return self._folder / _name(client_id, version)

    def place(self, client_id: int, version: int) -> str:
        """Where a state lies, in words."""
        return f"{self._folder}/{_name(client_id, version)}"

    def write(self, client_id: int, version: int, state: Params) -> str:
        """Store a client's state after round ``version``; gives the SHA-256 of its file."""
        self._known.pop(client_id, None)
        if isinstance(self._folder, RemoteFolder):
            data = save({key: value.detach().cpu().contiguous() for key, value in state.items()})
            self._folder.write(_name(client_id, version), data)
            return hashlib.sha256(data).hexdigest()
        path = self.path(client_id, version)
        write_tensors(state, path)
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()

    def read(self, client_id: int, version: int) -> Params:
        """Load a client's state as it was after round ``version``.

        Raises:
            CheckpointError: The file is missing or torn.
        """
        if not isinstance(self._folder, RemoteFolder):
            return read_tensors(self.path(client_id, version))
        try:
            found: Params = load(self._folder.read(_name(client_id, version)))
            return found
        except (StorageError, safetensors.SafetensorError) as error:
            raise CheckpointError(
                f"{self.place(client_id, version)} cannot be read: {error}", "resume from an earlier round"
            ) from error

    def digest(self, client_id: int, version: int) -> str:
        """SHA-256 of the stored file.

        Raises:
            OSError: There is no such file.
        """
        if not isinstance(self._folder, RemoteFolder):
            return hashlib.sha256(self.path(client_id, version).read_bytes()).hexdigest()
        try:
            return hashlib.sha256(self._folder.read(_name(client_id, version))).hexdigest()
        except StorageError as error:
            raise OSError(error.message) from error

    def note_digest(self, client_id: int, version: int, digest: str) -> None:
        """Take the SHA-256 of a state from whoever has just written it."""
        self._known[client_id] = (version, digest)

    def known_digest(self, client_id: int, version: int) -> str:
        """SHA-256 of a state as its writer said it, or as it was when this store first asked for it.

        A version is written in its own round only. A checkpoint names every client's state, and most have not changed since the
        one before.
        """
        known = self._known.get(client_id)
        if known is None or known[0] != version:
            self._known[client_id] = known = (version, self.digest(client_id, version))
        return known[1]

    def prune(self, client_id: int, keep: set[int]) -> None:
        """Delete the versions of a client that are not in ``keep``, and what replicas that were killed had half written.

        A client for which the last call said the same is passed over.
        """
        if self._kept.get(client_id) == frozenset(keep):
            return
        self._kept[client_id] = frozenset(keep)
        if isinstance(self._folder, RemoteFolder):
            folder = self._folder.child(f"{client_id:06d}")
            for name in folder.names():
                version = _version(name)
                if version is None or version not in keep:
                    folder.delete(name)
            return
        on_disk = self._folder / f"{client_id:06d}"
        for path in sorted(on_disk.glob("round-*.safetensors")):
            if _version(path.name) not in keep:
                path.unlink()
        for path in sorted(on_disk.glob(".round-*")):
            path.unlink(missing_ok=True)

    def copy_to(self, folder: Path, versions: dict[int, set[int]]) -> None:
        """Copy states of a remote store into a store on a disk, those that are not there yet.

        What the store has no more is left out: it was an older checkpoint's, which is refused without it.

        Args:
            folder: Of the other store.
            versions: Which, by client.
        """
        assert isinstance(self._folder, RemoteFolder), "a store on a disk is read where it is"
        other = ClientStateStore(folder)
        for client_id, wanted in versions.items():
            there = {_version(name) for name in self._folder.child(f"{client_id:06d}").names()}
            for version in sorted(wanted):
                if version in there and not other.path(client_id, version).is_file():
                    self._folder.download(_name(client_id, version), other.path(client_id, version))
            other.prune(client_id, wanted)


def _name(client_id: int, version: int) -> str:
    return f"{client_id:06d}/round-{version:06d}.safetensors"


def _version(name: str) -> int | None:
    """The version of a file of that name; ``None`` where it is no whole state."""
    found = re.fullmatch(r"round-(\d+)\.safetensors", name)
    return int(found[1]) if found else None
