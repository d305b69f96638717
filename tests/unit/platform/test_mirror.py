"""A folder and its copy in a store: what is put and in which order, who is further, and what a cut leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.errors import CheckpointError, StorageError
from fedgraft.platform.checkpoint import Checkpoint, load_latest, save
from fedgraft.platform.mirror import Mirror, fetch_experiment
from fedgraft.platform.remote import RemoteFolder
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.types import ServerState


class Recorder:
    """Notes what is put and deleted, and breaks off at a file if it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.breaks_at = ""
        upload, delete = RemoteFolder.upload, RemoteFolder.delete

        def uploads(remote: RemoteFolder, source: Path, name: str) -> None:
            if self.breaks_at and self.breaks_at in name:
                raise StorageError(f"{name} cannot be written")
            self.names.append(name)
            upload(remote, source, name)

        def deletes(remote: RemoteFolder, name: str) -> None:
            self.names.append(f"-{name}")
            delete(remote, name)

        monkeypatch.setattr(RemoteFolder, "upload", uploads)
        monkeypatch.setattr(RemoteFolder, "delete", deletes)

    def taken(self) -> list[str]:
        found, self.names = self.names, []
        return found


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


@pytest.fixture
def remote(tmp_path: Path) -> RemoteFolder:
    return RemoteFolder(f"file://{tmp_path}/store").child("exp-1")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "runs" / "exp-1"
    made.mkdir(parents=True)
    (made / "config.yaml").write_text("name: exp\n")
    return made


def _round(folder: Path, remote: RemoteFolder, number: int) -> None:
    """What a round leaves: a line, a private state in the store, a checkpoint."""
    run = RunFolder(folder / "flex" / "seed-0")
    run.write_info(label="flex")
    run.append("metrics", [{"round": number}])
    store = ClientStateStore(remote.child("flex", "seed-0", "clients"))
    store.write(3, number, {"mine": torch.tensor([float(number)])})
    state = ServerState(params={"x": torch.tensor([float(number)])})
    save(run.checkpoint_folder, Checkpoint(round_idx=number, state=state, versions={3: number}), store=store)


def _latest(folder: Path) -> Any:
    run = RunFolder(folder / "flex" / "seed-0")
    return load_latest(run.checkpoint_folder, store=ClientStateStore(run.state_folder))


def test_only_what_has_changed_is_put_and_checkpoints_come_last(folder: Path, remote: RemoteFolder, recorder: Recorder) -> None:
    mirror = Mirror(folder, remote)
    _round(folder, remote, 1)
    (folder / ".half").write_text("torn")
    mirror.put()
    assert recorder.taken() == [
        "config.yaml",
        "flex/seed-0/metrics.jsonl",
        "flex/seed-0/run.json",
        "flex/seed-0/checkpoints/round-000001/state.safetensors",
        "flex/seed-0/checkpoints/round-000001/state.json",
        "mirror.json",
    ]
    for number in (2, 3):
        _round(folder, remote, number)
    recorder.taken()
    mirror.put()
    put = recorder.taken()
    assert "config.yaml" not in put
    assert put[-3:] == [
        "-flex/seed-0/checkpoints/round-000001/state.json",
        "-flex/seed-0/checkpoints/round-000001/state.safetensors",
        "mirror.json",
    ]


def test_the_further_one_of_folder_and_copy_is_gone_on_with(folder: Path, remote: RemoteFolder, tmp_path: Path) -> None:
    _round(folder, remote, 1)
    Mirror(folder, remote).put()
    assert not Mirror(folder, remote).get()
    other = tmp_path / "other" / "exp-1"
    assert Mirror(other, remote).get()
    _round(other, remote, 2)
    Mirror(other, remote).put()
    assert not Mirror(other, remote).get()
    assert Mirror(folder, remote).get()
    Mirror(folder, remote).get_private()
    assert _latest(folder).round_idx == 2
    assert (folder / "flex/seed-0/metrics.jsonl").read_text().count("\n") == 2


def test_a_copy_that_was_cut_off_gives_the_checkpoint_before(
    folder: Path, remote: RemoteFolder, recorder: Recorder, tmp_path: Path
) -> None:
    for number in (1, 2):
        _round(folder, remote, number)
    mirror = Mirror(folder, remote)
    mirror.put()
    for breaks_at in ("round-000003/state.safetensors", "round-000003/state.json", "mirror.json"):
        if breaks_at == "round-000003/state.safetensors":
            _round(folder, remote, 3)
        recorder.breaks_at = breaks_at
        with pytest.raises(StorageError):
            mirror.put()
        recorder.breaks_at = ""
        found = fetch_experiment(str(remote), tmp_path / breaks_at.replace("/", "-"))
        assert _latest(found).round_idx == (3 if breaks_at == "mirror.json" else 2)


def test_a_fetched_experiment_is_whole_by_itself(folder: Path, remote: RemoteFolder, tmp_path: Path) -> None:
    for number in (1, 2, 3):
        _round(folder, remote, number)
    Mirror(folder, remote).put()
    found = fetch_experiment(f"{remote}/", tmp_path / "elsewhere")
    assert found == tmp_path / "elsewhere" / "exp-1"
    latest = _latest(found)
    assert (latest.round_idx, latest.versions) == (3, {3: 3})
    with pytest.raises(CheckpointError, match="is here already"):
        fetch_experiment(str(remote), tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="holds no config.yaml"):
        fetch_experiment(str(remote) + "-none", tmp_path / "elsewhere")


def test_a_label_may_be_called_clients(folder: Path, remote: RemoteFolder) -> None:
    (folder / "clients" / "seed-0").mkdir(parents=True)
    (folder / "clients" / "seed-0" / "run.json").write_text("{}")
    Mirror(folder, remote).put()
    assert "clients/seed-0/run.json" in remote.names()
