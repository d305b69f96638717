"""Where clients' private state lies between rounds: one safetensors file a client and version, outside the driver.

A version is the round that wrote it. A task names the version it starts from and writes the next one, so a task that is run
again after a kill starts from the same bytes and overwrites its own result.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import safetensors
from safetensors.torch import load_file, save_file

from fedgraft.errors import CheckpointError
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

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, client_id: int, version: int) -> Path:
        """File of one client's state after one round."""
        return self._folder / f"{client_id:06d}" / f"round-{version:06d}.safetensors"

    def write(self, client_id: int, version: int, state: Params) -> None:
        """Store a client's state after round ``version``."""
        write_tensors(state, self.path(client_id, version))

    def read(self, client_id: int, version: int) -> Params:
        """Load a client's state as it was after round ``version``.

        Raises:
            CheckpointError: The file is missing or torn.
        """
        return read_tensors(self.path(client_id, version))

    def digest(self, client_id: int, version: int) -> str:
        """SHA-256 of the stored file."""
        return hashlib.sha256(self.path(client_id, version).read_bytes()).hexdigest()

    def prune(self, client_id: int, keep: set[int]) -> None:
        """Delete the versions of a client that are not in ``keep``, and what replicas that were killed had half written."""
        folder = self._folder / f"{client_id:06d}"
        for path in sorted(folder.glob("round-*.safetensors")):
            if int(path.stem.removeprefix("round-")) not in keep:
                path.unlink()
        for path in sorted(folder.glob(".round-*")):
            path.unlink(missing_ok=True)
