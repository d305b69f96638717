"""A checkpoint is whole or it is not used, and pruning never takes what a kept one needs."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fedgraft.errors import CheckpointError
from fedgraft.platform import checkpoint as module
from fedgraft.platform.checkpoint import Checkpoint, load_latest, save
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.types import ServerState


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def store(tmp_path: Path) -> ClientStateStore:
    return ClientStateStore(tmp_path / "clients")


@pytest.fixture
def save_round(folder: Path, store: ClientStateStore) -> Callable[..., None]:
    """Checkpoint round r: the parameter is r everywhere; clients in ``trained`` write version r before."""
    versions: dict[int, int] = {}

    def write(round_idx: int, trained: tuple[int, ...] = (0, 1), keep: int = 2) -> None:
        for client in trained:
            store.write(client, round_idx, {"p": torch.full((3,), float(round_idx))})
            versions[client] = round_idx
        state = ServerState(params={"w": torch.full((4,), float(round_idx))}, notes={"round": round_idx})
        save(folder, Checkpoint(round_idx=round_idx, state=state, versions=dict(versions)), store=store, keep=keep)

    return write


def loaded_round(folder: Path, store: ClientStateStore) -> int:
    found = load_latest(folder, store=store)
    assert found is not None
    assert found.state.params["w"].tolist() == [float(found.round_idx)] * 4
    assert found.state.notes == {"round": found.round_idx}
    return found.round_idx


def test_everything_of_the_state_comes_back(folder: Path, store: ClientStateStore) -> None:
    store.write(11, 3, {"p": torch.ones(2)})
    notes = {"map": [1, 2], "flag": True, "none": None, "nested": {"a": 0.1, "9": 1, "10": 2}}
    state = ServerState(
        params={"a/b.c[3]": torch.randn(2, 3), "h": torch.randn(2).to(torch.bfloat16)},
        extras={"a/b.c[3]": torch.randn(1)},
        memory={"moment/x": torch.randn(2, dtype=torch.float64)},
        notes=notes,
    )
    save(folder, Checkpoint(round_idx=3, state=state, versions={11: 3}), store=store)
    found = load_latest(folder, store=store)
    assert found is not None
    assert (found.round_idx, found.versions, found.state.notes) == (3, {11: 3}, state.notes)
    for kind in ("params", "extras", "memory"):
        before, after = getattr(state, kind), getattr(found.state, kind)
        assert set(before) == set(after)
        for key, value in before.items():
            assert after[key].dtype == value.dtype
            assert torch.equal(after[key], value)


def test_without_a_checkpoint_there_is_none(folder: Path, store: ClientStateStore) -> None:
    assert load_latest(folder, store=store) is None
    folder.mkdir()
    assert load_latest(folder, store=store) is None


def tear_tensors(folder: Path, store: ClientStateStore) -> None:
    path = folder / "round-000002" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-4])


def flip_a_bit(folder: Path, store: ClientStateStore) -> None:
    path = folder / "round-000002" / "state.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


def lose_tensors(folder: Path, store: ClientStateStore) -> None:
    (folder / "round-000002" / "state.safetensors").unlink()


def tear_record(folder: Path, store: ClientStateStore) -> None:
    path = folder / "round-000002" / "state.json"
    path.write_text(path.read_text()[:-20])


def lose_record(folder: Path, store: ClientStateStore) -> None:
    (folder / "round-000002" / "state.json").unlink()


def empty_record(folder: Path, store: ClientStateStore) -> None:
    (folder / "round-000002" / "state.json").write_text("{}")


def record_of_another_kind(folder: Path, store: ClientStateStore) -> None:
    (folder / "round-000002" / "state.json").write_text("[1, 2]")


def tamper_with_the_record(folder: Path, store: ClientStateStore) -> None:
    path = folder / "round-000002" / "state.json"
    path.write_text(path.read_text().replace('"round": 2', '"round": 3'))


def tamper_with_a_client(folder: Path, store: ClientStateStore) -> None:
    store.write(1, 2, {"p": torch.full((3,), 9.0)})


def lose_a_client(folder: Path, store: ClientStateStore) -> None:
    store.path(0, 2).unlink()


DAMAGES = [
    tear_tensors,
    flip_a_bit,
    lose_tensors,
    tear_record,
    lose_record,
    empty_record,
    record_of_another_kind,
    tamper_with_the_record,
    tamper_with_a_client,
    lose_a_client,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda function: function.__name__)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    damage: Callable[[Path, ClientStateStore], None],
    folder: Path,
    store: ClientStateStore,
    save_round: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    save_round(1)
    save_round(2)
    assert loaded_round(folder, store) == 2
    damage(folder, store)
    with caplog.at_level(logging.WARNING):
        assert loaded_round(folder, store) == 1
    assert "round-000002 is refused" in caplog.text
    found = load_latest(folder, store=store)
    assert found is not None
    assert found.versions == {0: 1, 1: 1}
    assert store.read(1, 1)["p"].tolist() == [1.0] * 3


@pytest.mark.parametrize("damage", [tear_tensors, tear_record], ids=lambda function: function.__name__)
def test_a_run_goes_on_beside_a_damaged_checkpoint(
    damage: Callable[[Path, ClientStateStore], None], folder: Path, store: ClientStateStore, save_round: Callable[..., None]
) -> None:
    save_round(1)
    save_round(2)
    damage(folder, store)
    save_round(3)
    assert loaded_round(folder, store) == 3
    save_round(4)
    assert loaded_round(folder, store) == 4


def test_all_damaged_is_an_error(folder: Path, store: ClientStateStore, save_round: Callable[..., None]) -> None:
    save_round(1)
    save_round(2)
    for path in folder.glob("round-*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole") as caught:
        load_latest(folder, store=store)
    assert caught.value.hint


def test_prune_keeps_what_kept_checkpoints_need(folder: Path, store: ClientStateStore, save_round: Callable[..., None]) -> None:
    save_round(1, trained=(0, 1, 2))  # client 2 never comes back
    for round_idx in range(2, 7):
        save_round(round_idx, trained=(0, 1) if round_idx % 2 else (0,))
    assert sorted(path.name for path in folder.iterdir()) == ["round-000005", "round-000006"]

    def versions(client: int) -> list[int]:
        return sorted(int(path.stem[-6:]) for path in store.path(client, 0).parent.glob("*.safetensors"))

    assert [versions(client) for client in range(3)] == [[5, 6], [5], [1]]
    found = load_latest(folder, store=store)
    assert found is not None
    assert found.versions == {0: 6, 1: 5, 2: 1}
    for client, version in found.versions.items():
        store.read(client, version)
    lines = json.loads((folder / "round-000005" / "state.json").read_text())
    for client, version in lines["versions"].items():
        store.read(int(client), version)


def test_many_rounds_are_ordered_by_number(folder: Path, store: ClientStateStore, save_round: Callable[..., None]) -> None:
    for round_idx in (9, 10, 11, 100):
        save_round(round_idx)
    assert loaded_round(folder, store) == 100


def test_a_kill_between_write_and_rename_is_harmless(
    folder: Path, store: ClientStateStore, save_round: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_round(1)
    real = module.os.replace

    def die(source: Path, target: Path) -> None:
        if Path(target).name.startswith("round-") and Path(target).parent == folder:
            raise KeyboardInterrupt
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(module.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            save_round(2)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".writing")]
    assert left, "the temporary folder is not where this test expects it"
    assert loaded_round(folder, store) == 1
    save_round(2)
    save_round(3)
    assert loaded_round(folder, store) == 3
    assert sorted(path.name for path in folder.iterdir()) == ["round-000002", "round-000003"]


def test_another_process_temporary_folder_is_not_a_checkpoint(
    folder: Path, store: ClientStateStore, save_round: Callable[..., None]
) -> None:
    (folder / ".writing-1").mkdir(parents=True)
    (folder / ".writing-1" / "state.safetensors").write_bytes(b"half")
    assert load_latest(folder, store=store) is None
    save_round(1)
    assert loaded_round(folder, store) == 1


def test_a_repeated_round_replaces_its_checkpoint(folder: Path, store: ClientStateStore, save_round: Callable[..., None]) -> None:
    save_round(1)
    save_round(2)
    store.write(0, 2, {"p": torch.zeros(3)})
    state = ServerState(params={"w": torch.full((4,), 2.0)}, notes={"round": 2})
    save(folder, Checkpoint(round_idx=2, state=state, versions={0: 2}), store=store)
    found = load_latest(folder, store=store)
    assert found is not None
    assert found.versions == {0: 2}
