"""Runs that are kept in a store: the same bits, and enough in there to go on with elsewhere."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft.errors import ConfigError, StorageError
from fedgraft.platform.progress import Event
from fedgraft.platform.remote import RemoteFolder


@pytest.fixture
def make_config(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(name: str, storage: str | None = None, **more: Any) -> Any:
        return fedgraft.load_config(
            {
                "name": name,
                "model": {"path": str(make_base())},
                "data": {
                    "path": str(data_folder.parent / "clients.jsonl"),
                    "preset": "custom",
                    "fields": {"prompt": "q", "response": "a", "label": "kind"},
                    "max_length": 32,
                },
                "method": {"name": "flex"},
                "federation": {"rounds": 3, "local_steps": 1, "batch_size": 4},
                "evaluation": {"every": 3, "at_start": False, "generate": "never"},
                "executor": {"kind": "in_process"},
                "tracking": {"enabled": False},
                "output": {
                    "folder": str(tmp_path / "runs"),
                    "cache": str(tmp_path / "cache"),
                    "report": False,
                    "storage": storage,
                },
                **more,
            }
        )

    return make


def test_a_run_is_gone_on_with_from_the_store_alone(
    make_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """Nobody tidies up after it."""

    def on_event(event: Event) -> None:
        if event.kind == "round" and event.data["round"] == 3:
            raise Killed  # of round 3 nothing is kept

    storage = f"file://{tmp_path}/store"
    with pytest.raises(Killed):
        fedgraft.run(make_config("kept", storage, training={"learning_rate": 0.01}), on_event=on_event)
    (name,) = {each.name for each in (tmp_path / "store").iterdir()} - {"bases", "data", "methods"}
    shutil.rmtree(tmp_path / "runs")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    elsewhere = make_config("alone", training={"learning_rate": 0.01})
    rounds: list[object] = []
    result = fedgraft.run(
        resume=f"{storage}/{name}", on_event=lambda event: rounds.append(event.data["round"]) if event.kind == "round" else None
    )
    assert rounds == [3]
    assert result.folder == tmp_path / "runs" / name / "flex" / "seed-0"
    assert result.status == "finished"
    assert fedgraft.verify(result.folder, fedgraft.run(elsewhere).folder).is_same
    assert RemoteFolder(storage).child(name, "flex", "seed-0", "clients").names()


def test_a_store_that_cannot_be_reached_is_said_before_anything_runs(make_config: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file")
    with pytest.raises(StorageError, match="store/kept-.* cannot be") as caught:
        fedgraft.run(make_config("kept", f"file://{tmp_path}/store"))
    assert caught.value.exit_code == 8


@pytest.mark.parametrize("storage", ["/mnt/runs", "s4://bucket/runs", "s3://", "file://"])
def test_what_is_no_uri_of_a_store_is_refused(make_config: Callable[..., Any], storage: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_config("kept", storage)
    (problem,) = caught.value.problems
    assert (problem.path, problem.expected) == ("output.storage", "a URI such as s3://BUCKET/PATH")


def test_a_rate_search_leaves_no_states_in_the_store(make_config: Callable[..., Any], tmp_path: Path) -> None:
    storage = f"file://{tmp_path}/store"
    result = fedgraft.run(make_config("searched", storage, rate_search={"rates": [0.001, 0.01], "rounds": 1}))
    names = RemoteFolder(storage).child(result.folder.parents[1].name).names()
    assert any(name.startswith("search/") for name in names)
    assert not [name for name in names if name.startswith("search/") and "clients" in name]
    assert any("/clients/" in name for name in names)
