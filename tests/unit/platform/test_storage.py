"""A disk that takes no more: nothing torn stays, the error names the file, and the run goes on to the same bits afterwards."""

from __future__ import annotations

import errno
import json
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.errors import StorageError
from fedgraft.platform import rounds
from fedgraft.platform.checkpoint import Checkpoint, load_latest, save
from fedgraft.platform.run_folder import RunFolder, write_json
from fedgraft.platform.state_store import ClientStateStore, write_tensors
from fedgraft.platform.storage import is_disk_full
from fedgraft.types import ServerState


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse to make any file longer: writes fail half-way, as on a full disk, wherever the test runs."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("only a user who may mount can make a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # tensors that were read are still mapped


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def state(value: float, size: int = 10) -> ServerState:
    return ServerState(params={"w": torch.full((size,), value)}, extras={}, memory={}, notes={})


def test_lines_are_written_all_or_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append("metrics", [{"round": 1}])
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with largest_file(200), pytest.raises(StorageError, match=r"metrics\.jsonl cannot be written: .*File too large"):
        folder.append("metrics", [{"round": 2, "text": "x" * 100} for _ in range(300)])
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    folder.append("metrics", [{"round": 2}])
    assert [json.loads(line)["round"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_whole_files_stay_as_they_were(tmp_path: Path) -> None:
    write_json({"a": 1}, tmp_path / "run.json")
    write_tensors({"w": torch.zeros(3)}, tmp_path / "w.safetensors")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with largest_file(1000):
        with pytest.raises(StorageError, match=r"run\.json cannot be written"):
            write_json({"a": "x" * 5000}, tmp_path / "run.json")
        with pytest.raises(StorageError, match=r"w\.safetensors cannot be written"):
            write_tensors({"w": torch.zeros(3000)}, tmp_path / "w.safetensors")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(tmp_path: Path) -> None:
    store = ClientStateStore(tmp_path / "clients")
    folder = tmp_path / "checkpoints"
    save(folder, Checkpoint(round_idx=1, state=state(1.0), versions={}), store=store)
    before = names(folder)
    with largest_file(2000), pytest.raises(StorageError, match="round-000002 cannot be written"):
        save(folder, Checkpoint(round_idx=2, state=state(2.0, 3000), versions={}), store=store)
    assert names(folder) == before
    assert sorted(path.name for path in folder.iterdir()) == ["round-000001"]
    found = load_latest(folder, store=store)
    assert found is not None
    assert found.round_idx == 1


def test_a_full_disk_is_told_as_such(small_disk: Path) -> None:
    folder = RunFolder(small_disk / "run")
    folder.append("metrics", [{"round": 1}])
    store = ClientStateStore(small_disk / "clients")
    save(folder.checkpoint_folder, Checkpoint(round_idx=1, state=state(1.0), versions={}), store=store)
    (small_disk / "filler").write_bytes(b"x" * 200 * 1024)
    for write in (
        lambda: folder.append("metrics", [{"round": 2, "text": "x" * 100_000}]),
        lambda: folder.write_info(text="x" * 100_000),
        lambda: store.write(0, 2, {"w": torch.zeros(30_000)}),
        lambda: save(folder.checkpoint_folder, Checkpoint(round_idx=2, state=state(2.0, 30_000), versions={}), store=store),
    ):
        before = names(small_disk)
        with pytest.raises(StorageError, match="cannot be written: no space is left there") as caught:
            write()
        assert "free space under" in caught.value.hint
        assert ".writing" not in str(caught.value)
        assert names(small_disk) == before
    assert [json.loads(line)["round"] for line in (folder.path / "metrics.jsonl").read_text().splitlines()] == [1]
    found = load_latest(folder.checkpoint_folder, store=store)
    assert found is not None
    assert found.round_idx == 1


def test_who_says_that_a_disk_is_full() -> None:
    assert is_disk_full(OSError(errno.ENOSPC, "no"))
    assert is_disk_full(OSError(errno.EDQUOT, "no"))
    assert not is_disk_full(OSError(errno.EACCES, "no"))
    assert not is_disk_full(ValueError("(os error 28)"))


@pytest.mark.parametrize("what", ["checkpoint", "client", "record"])
def test_a_run_goes_on_to_the_same_bits_once_there_is_space(
    what: str,
    make_job: Callable[..., Any],
    run_job: Callable[..., Any],
    assert_same_bits: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    method = {"name": "flex"}
    straight = run_job(make_job(method))
    job = make_job(method)
    real = {"checkpoint": rounds.save, "client": ClientStateStore.write, "record": RunFolder.append}[what]

    def fails(*args: Any, **fields: Any) -> Any:
        # Round 2's file meets the limit while it is written; everything before it was written for real.
        is_due = {
            "checkpoint": lambda: args[1].round_idx == 2,
            "client": lambda: args[2] == 2,
            "record": lambda: args[1] == "ledger" and args[2][0]["round"] == 2,
        }[what]
        if not is_due():
            return real(*args, **fields)
        with largest_file(100):
            return real(*args, **fields)

    where, name = {
        "checkpoint": (rounds, "save"),
        "client": (ClientStateStore, "write"),
        "record": (RunFolder, "append"),
    }[what]
    monkeypatch.setattr(where, name, fails)
    with pytest.raises(StorageError, match="cannot be written"):
        run_job(job)
    monkeypatch.undo()
    again = run_job(job)
    assert_same_bits(again.state.params, straight.state.params)
    assert again.private_files() == straight.private_files()
    for record in ("ledger", "evaluations"):
        assert again.rows(record) == straight.rows(record)
    assert [row["round"] for row in again.rows("metrics")] == [1, 2, 3]
