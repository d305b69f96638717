"""An experiment's folder on the driver's disk, kept a second time in a store that outlives its node.

Only what has changed is put, in an order that a cut-off copy survives: records first, then checkpoints (a torn one is refused
and the one before it taken), then what is gone here is deleted there. Clients' private states are not copied: replicas put them
into the store themselves (``state_store``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fedgraft.errors import CheckpointError
from fedgraft.platform.checkpoint import needed_states
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.run_folder import RunFolder, write_json
from fedgraft.platform.state_store import ClientStateStore

__all__ = ["Mirror", "fetch_experiment"]

_SEQUENCE = "mirror.json"
_SCRATCH = re.compile(r"\..*")
"""Names of what is half written: all of those begin with a dot."""


class Mirror:
    """A folder and its copy.

    Args:
        folder: An experiment's.
        remote: Its copy.
    """

    def __init__(self, folder: Path, remote: RemoteFolder) -> None:
        self._folder = folder
        self._remote = remote
        self._put: dict[str, tuple[int, int]] = {}
        self._known: set[str] | None = None

    def put(self) -> None:
        """Make the copy like the folder.

        Raises:
            StorageError: The store cannot be written.
        """
        if self._known is None:
            self._known = {name for name in self._remote.names() if not _is_private(name)}
        found = {str(PurePosixPath(path.relative_to(self._folder))): path for path in _files(self._folder)}
        for name in sorted(found, key=_order):
            stat = found[name].stat()
            mark = (stat.st_size, stat.st_mtime_ns)
            if self._put.get(name) != mark:
                self._remote.upload(found[name], name)
                self._put[name] = mark
        for name in sorted(self._known - found.keys() - {_SEQUENCE}):
            self._remote.delete(name)
            self._put.pop(name, None)
        self._known = set(found)
        sequence = _sequence(self._folder / _SEQUENCE) + 1
        write_json({"sequence": sequence}, self._folder / _SEQUENCE)
        self._remote.upload(self._folder / _SEQUENCE, _SEQUENCE)

    def get(self) -> bool:
        """Make the folder like its copy where that is further, e.g. as another node went on; says whether it was.

        Raises:
            StorageError: The store cannot be read.
        """
        if not self._remote.has(_SEQUENCE):
            return False
        if int(json.loads(self._remote.read(_SEQUENCE))["sequence"]) <= _sequence(self._folder / _SEQUENCE):
            return False
        names = {name for name in self._remote.names() if not _is_private(name)}
        for name in sorted(names, key=_order):
            self._remote.download(name, self._folder / name)
        for path in list(_files(self._folder)):
            inner = PurePosixPath(path.relative_to(self._folder))
            if "checkpoints" in inner.parts and str(inner) not in names:
                path.unlink()  # of a history that was not gone on with
        return True

    def get_private(self) -> None:
        """Copy the private states that the folder's checkpoints belong to, so that the folder is whole without its copy.

        Raises:
            StorageError: The store cannot be read.
        """
        for info in sorted(self._folder.rglob("run.json")):
            run = RunFolder(info.parent)
            where = PurePosixPath(run.state_folder.relative_to(self._folder))
            needed = needed_states(sorted(run.checkpoint_folder.glob("round-*")))
            ClientStateStore(self._remote.child(str(where))).copy_to(run.state_folder, needed)


def fetch_experiment(uri: str, root: Path) -> Path:
    """Copy an experiment out of a store into a folder of runs, to go on with it here, or to read it; it is whole by itself.

    Args:
        uri: Of the experiment, e.g. ``s3://bucket/runs/NAME-DATE``.
        root: Folder of runs.

    Raises:
        CheckpointError: There is no experiment, or a folder of that name is here already.
        StorageError: The store cannot be read.
    """
    place, mark, options = uri.partition("?")
    parent, _, name = place.rstrip("/").rpartition("/")
    remote = RemoteFolder(f"{parent}{mark}{options}").child(name)
    folder = root.resolve() / name
    if folder.exists():
        raise CheckpointError(f"{folder} is here already", f"go on with it: fedgraft run --resume {folder}; or move it away")
    if not remote.has("config.yaml"):
        raise CheckpointError(f"{remote} holds no config.yaml", "name an experiment's folder below its output.storage")
    mirror = Mirror(folder, remote)
    mirror.get()
    mirror.get_private()
    return folder


def _files(folder: Path) -> Iterator[Path]:
    """All files to be kept: neither half-written ones nor private states nor the mirror's own."""
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        if not path.is_file() or any(_SCRATCH.fullmatch(part) for part in inner.parts):
            continue
        if not _is_private(str(PurePosixPath(inner))) and inner.name != _SEQUENCE:
            yield path


def _is_private(name: str) -> bool:
    return "clients" in PurePosixPath(name).parts[2:-1]  # below LABEL/seed-N; a label may be called so, too


def _order(name: str) -> tuple[bool, bool, str]:
    """Records, then tensors of checkpoints, then what makes a checkpoint valid."""
    parts = PurePosixPath(name).parts
    is_checkpoint = "checkpoints" in parts
    return is_checkpoint, is_checkpoint and parts[-1] == "state.json", name


def _sequence(path: Path) -> int:
    try:
        return int(json.loads(path.read_text())["sequence"])
    except (OSError, ValueError, LookupError, TypeError):
        return 0
