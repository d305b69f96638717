"""Private state comes back as it was written, whole, by version."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

from fedgraft.errors import CheckpointError
from fedgraft.platform import storage
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.state_store import ClientStateStore, write_tensors


@pytest.fixture
def store(tmp_path: Path) -> ClientStateStore:
    return ClientStateStore(tmp_path / "clients")


def test_versions_and_clients_are_kept_apart(store: ClientStateStore) -> None:
    for client in (0, 7):
        for version in (1, 4):
            store.write(client, version, {"w": torch.tensor([client, version])})
    for client in (0, 7):
        for version in (1, 4):
            assert store.read(client, version)["w"].tolist() == [client, version]


def test_every_kind_of_tensor_survives(store: ClientStateStore) -> None:
    state = {
        "bfloat16": torch.randn(3, dtype=torch.bfloat16),
        "int64": torch.tensor([2**62]),
        "infinite": torch.tensor([float("-inf")]),
        "scalar": torch.tensor(3.0),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "learned": torch.nn.Parameter(torch.ones(2)),
        "empty": torch.zeros(0, 4),
    }
    store.write(0, 1, state)
    found = store.read(0, 1)
    assert set(found) == set(state)
    for key, value in state.items():
        assert found[key].dtype == value.dtype
        assert found[key].equal(value.detach())


def test_a_version_written_again_replaces_the_first(store: ClientStateStore) -> None:
    store.write(3, 2, {"w": torch.zeros(2)})
    first = store.digest(3, 2)
    store.write(3, 2, {"w": torch.ones(2)})
    assert store.read(3, 2)["w"].tolist() == [1.0, 1.0]
    assert store.digest(3, 2) != first
    assert store.digest(3, 2) == hashlib.sha256(store.path(3, 2).read_bytes()).hexdigest()


def test_a_missing_or_torn_file_is_named(store: ClientStateStore) -> None:
    with pytest.raises(CheckpointError, match="round-000005") as caught:
        store.read(1, 5)
    assert caught.value.hint == "resume from an earlier round"
    store.write(1, 5, {"w": torch.ones(20)})
    store.path(1, 5).write_bytes(store.path(1, 5).read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="round-000005"):
        store.read(1, 5)


def test_a_kill_while_writing_leaves_what_was_there(store: ClientStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write(1, 1, {"w": torch.zeros(2)})

    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage.os, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        store.write(1, 1, {"w": torch.ones(2)})
    monkeypatch.undo()
    assert store.read(1, 1)["w"].tolist() == [0.0, 0.0]
    assert [path.name for path in store.path(1, 1).parent.iterdir()] == ["round-000001.safetensors"]


def test_prune_keeps_only_what_is_named(store: ClientStateStore) -> None:
    for client in (1, 2):
        for version in (1, 2, 3, 10):
            store.write(client, version, {"w": torch.zeros(1)})
    store.prune(1, {2, 10, 99})
    left = [sorted(path.name for path in store.path(client, 1).parent.iterdir()) for client in (1, 2)]
    assert left[0] == ["round-000002.safetensors", "round-000010.safetensors"]
    assert len(left[1]) == 4
    store.prune(5, set())  # a client that never wrote


def test_prune_takes_what_a_killed_replica_had_half_written(store: ClientStateStore) -> None:
    for client in (1, 2):
        store.write(client, 3, {"w": torch.zeros(1)})
        store.path(client, 4).with_name(".round-000004.safetensors.4711").write_bytes(b"torn")
    store.prune(1, {3})
    assert [path.name for path in store.path(1, 3).parent.iterdir()] == ["round-000003.safetensors"]
    assert len(list(store.path(2, 3).parent.iterdir())) == 2  # another client's are its own business


def test_a_digest_is_taken_once_a_version(store: ClientStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    digest = ClientStateStore.digest

    def counted(self: ClientStateStore, client_id: int, version: int) -> str:
        asked.append((client_id, version))
        return digest(self, client_id, version)

    monkeypatch.setattr(ClientStateStore, "digest", counted)
    for version in (1, 4):
        store.write(7, version, {"w": torch.tensor([version])})
        for _ in range(3):
            assert store.known_digest(7, version) == digest(store, 7, version)
    assert asked == [(7, 1), (7, 4)]


def test_prune_looks_again_only_where_something_changed(store: ClientStateStore) -> None:
    for version in (1, 2):
        store.write(3, version, {"w": torch.zeros(1)})
    store.prune(3, {2})
    late = store.path(3, 1)
    late.write_bytes(b"put there behind its back")
    store.prune(3, {2})
    assert late.is_file()
    store.write(3, 3, {"w": torch.zeros(1)})
    store.prune(3, {2, 3})
    assert sorted(path.name for path in late.parent.iterdir()) == ["round-000002.safetensors", "round-000003.safetensors"]


def test_folders_are_made(tmp_path: Path) -> None:
    write_tensors({"w": torch.ones(1)}, tmp_path / "a" / "b" / "c.safetensors")
    assert (tmp_path / "a" / "b" / "c.safetensors").is_file()


# ---- in a store that a URI names


@pytest.fixture
def remote(tmp_path: Path) -> ClientStateStore:
    return ClientStateStore(RemoteFolder(f"file://{tmp_path}/store").child("clients"))


def test_a_remote_store_keeps_the_same_bytes(remote: ClientStateStore, store: ClientStateStore) -> None:
    state = {"a": torch.arange(6.0).reshape(2, 3).T, "gate": torch.tensor([float("-inf")])}
    for each in (remote, store):
        each.write(1, 4, state)
    assert remote.digest(1, 4) == store.digest(1, 4)
    found = remote.read(1, 4)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)
    with pytest.raises(CheckpointError, match="clients/000001/round-000005.safetensors cannot be read"):
        remote.read(1, 5)
    with pytest.raises(OSError, match="round-000005"):
        remote.digest(1, 5)


def test_a_remote_store_is_pruned_and_copied_to_a_disk(remote: ClientStateStore, store: ClientStateStore, tmp_path: Path) -> None:
    for version in (1, 2, 3):
        for client in (1, 2):
            remote.write(client, version, {"x": torch.tensor([float(10 * client + version)])})
    store.write(1, 1, {"x": torch.zeros(1)})
    remote.prune(1, {2, 3})
    assert sorted(path.name for path in (tmp_path / "store" / "clients" / "000001").iterdir()) == [
        "round-000002.safetensors",
        "round-000003.safetensors",
    ]
    remote.copy_to(tmp_path / "clients", {1: {2, 3}, 2: {3}})
    assert store.read(1, 2)["x"] == 12
    assert store.read(2, 3)["x"] == 23
    assert not store.path(2, 2).exists()
    assert not store.path(1, 1).exists()  # of no checkpoint that is kept


def test_what_the_writer_said_is_not_read_again(store: ClientStateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    said = store.write(1, 2, {"x": torch.ones(1)})
    assert said == store.digest(1, 2)
    store.note_digest(1, 2, said)
    store.path(1, 2).unlink()
    assert store.known_digest(1, 2) == said
    store.write(1, 3, {"x": torch.zeros(1)})
    assert store.known_digest(1, 3) == store.digest(1, 3) != said


def test_both_kinds_of_store_say_the_digest_of_what_they_wrote(remote: ClientStateStore, store: ClientStateStore) -> None:
    state = {"x": torch.arange(5.0)}
    assert remote.write(1, 1, state) == store.write(1, 1, state) == remote.digest(1, 1)
