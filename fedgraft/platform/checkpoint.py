"""Checkpoints of the server's state: safetensors and JSON, checksummed, written whole or not at all.

A checkpoint is a folder ``round-000005`` with ``state.safetensors`` (keys ``params/...``, ``extras/...``, ``memory/...``) and
``state.json`` (round, notes, the version of every client's private state, checksums of all of it). It is written under a
temporary name and renamed, so a kill leaves the one before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
from safetensors.torch import load_file

from fedgraft.errors import CheckpointError, StorageError
from fedgraft.moe.hashing import hash_params
from fedgraft.platform.run_folder import write_json
from fedgraft.platform.state_store import ClientStateStore, write_tensors
from fedgraft.platform.storage import storage_error, sync_folder
from fedgraft.types import Params, ServerState

__all__ = ["Checkpoint", "hash_state", "load", "load_latest", "needed_states", "save"]

_log = logging.getLogger(__name__)
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, safetensors.SafetensorError)
"""What reading a torn or changed record can raise."""

_KINDS = ("params", "extras", "memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The server after a round: its state and, by client, the round whose private state is current."""

    round_idx: int
    state: ServerState
    versions: dict[int, int]


def save(folder: Path, checkpoint: Checkpoint, *, store: ClientStateStore, keep: int = 2) -> None:
    """Write a checkpoint and delete all but the last ``keep``, with the private states that only they needed.

    Raises:
        StorageError: It cannot be written, e.g. as the disk is full; the ones before it stay, and nothing of it does.
    """
    scratch = folder / f".writing-{os.getpid()}"
    target = folder / f"round-{checkpoint.round_idx:06d}"
    try:
        _write(scratch, checkpoint, store)
        shutil.rmtree(target, ignore_errors=True)  # only a resumed run that repeats a round finds it there
        os.replace(scratch, target)
        sync_folder(folder)
    except (OSError, StorageError) as error:
        shutil.rmtree(scratch, ignore_errors=True)
        raise storage_error(target, error) from error
    kept = sorted(folder.glob("round-*"))[-keep:]
    for path in sorted(folder.glob("round-*"))[:-keep]:
        shutil.rmtree(path)
    for client, versions in needed_states(kept).items():
        store.prune(client, versions)


def needed_states(checkpoints: Iterable[Path]) -> dict[int, set[int]]:
    """The versions of private states that checkpoints belong to, by client."""
    needed: dict[int, set[int]] = {}
    for path in checkpoints:
        for client, version in _versions(path).items():
            needed.setdefault(client, set()).add(version)
    return needed


def _write(scratch: Path, checkpoint: Checkpoint, store: ClientStateStore) -> None:
    """Write a checkpoint's two files into a folder."""
    tensors = {f"{kind}/{key}": value for kind in _KINDS for key, value in getattr(checkpoint.state, kind).items()}
    write_tensors(tensors, scratch / "state.safetensors")
    record = {
        "round": checkpoint.round_idx,
        "notes": dict(checkpoint.state.notes),
        "versions": {str(client): version for client, version in checkpoint.versions.items()},
        "sha256": _digest(scratch / "state.safetensors"),
        "private": {str(client): store.known_digest(client, version) for client, version in checkpoint.versions.items()},
    }
    write_json(record | {"record_sha256": _record_digest(record)}, scratch / "state.json")


def load_latest(folder: Path, *, store: ClientStateStore) -> Checkpoint | None:
    """Load the last checkpoint that is whole; a torn or changed one is named in the log and the one before it is used.

    Returns:
        ``None`` where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and none is whole.
    """
    found = sorted(folder.glob("round-*"), reverse=True)
    for path in found:
        try:
            return load(path, store)
        except CheckpointError as error:
            _log.warning("checkpoint %s is refused: %s", path, error)
    if found:
        raise CheckpointError(f"no checkpoint in {folder} is whole", "start the run anew in another folder")
    return None


def load(path: Path, store: ClientStateStore) -> Checkpoint:
    """Load one checkpoint, if its checksums and those of the private states that belong to it are right.

    Raises:
        CheckpointError: It is torn or changed; the message names the file.
    """
    try:
        return _load(path, store)
    except _UNREADABLE as error:
        raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def hash_state(state: ServerState) -> str:
    """SHA-256 over all of the server's state: tensors by kind and key with shapes, dtypes and bytes, and its notes."""
    tensors = {f"{kind}/{key}": value for kind in _KINDS for key, value in getattr(state, kind).items()}
    return hashlib.sha256(f"{hash_params(tensors)}|{_record_digest(dict(state.notes))}".encode()).hexdigest()


def _load(path: Path, store: ClientStateStore) -> Checkpoint:
    record = json.loads((path / "state.json").read_text())
    if _record_digest(record) != record["record_sha256"]:
        raise CheckpointError(f"{path / 'state.json'} does not have its own checksum")
    digest = _digest(path / "state.safetensors")
    if digest != record["sha256"]:
        raise CheckpointError(f"{path / 'state.safetensors'} has checksum {digest[:12]}, expected {record['sha256'][:12]}")
    versions = {int(client): int(version) for client, version in record["versions"].items()}
    for client, version in versions.items():
        if store.digest(client, version) != record["private"][str(client)]:
            raise CheckpointError(f"{store.place(client, version)} does not have the checksum of the checkpoint")
    parts: dict[str, Params] = {kind: {} for kind in _KINDS}
    for name, value in load_file(path / "state.safetensors").items():
        kind, _, key = name.partition("/")
        parts[kind][key] = value
    state = ServerState(params=parts["params"], extras=parts["extras"], memory=parts["memory"], notes=record["notes"])
    return Checkpoint(round_idx=int(record["round"]), state=state, versions=versions)


def _versions(path: Path) -> dict[int, int]:
    """The private states that a checkpoint needs; none where its record is damaged, as it cannot be loaded then."""
    try:
        record = json.loads((path / "state.json").read_text())
        return {int(client): int(version) for client, version in record["versions"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


def _record_digest(record: dict[str, object]) -> str:
    """Checksum of a record as it is read back: JSON turns every key into text."""
    plain = json.loads(json.dumps({key: value for key, value in record.items() if key != "record_sha256"}))
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
