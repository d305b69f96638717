"""Lines and facts of a run folder survive a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedgraft.platform import storage
from fedgraft.platform.run_folder import RECORDS, RunFolder, write_json


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "a" / "run")


def lines(folder: RunFolder, record: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder.path / f"{record}.jsonl").read_text().splitlines()]


def test_lines_are_appended(folder: RunFolder) -> None:
    folder.append("metrics", [{"round": 1, "x": "a\nb"}])
    folder.append("metrics", [])
    folder.append("metrics", [{"round": 2}, {"round": 2, "x": None}])
    assert lines(folder, "metrics") == [{"round": 1, "x": "a\nb"}, {"round": 2}, {"round": 2, "x": None}]


def test_truncate_drops_later_rounds_of_every_record(folder: RunFolder) -> None:
    for record in RECORDS:
        folder.append(record, [{"round": r, "n": n} for r in (0, 1, 2, 3) for n in range(2)])
    folder.truncate(1)
    for record in RECORDS:
        assert lines(folder, record) == [{"round": r, "n": n} for r in (0, 1) for n in range(2)]
    folder.truncate(-1)
    assert all(lines(folder, record) == [] for record in RECORDS)
    assert {path.name for path in folder.path.iterdir()} == {f"{record}.jsonl" for record in RECORDS}


def test_truncate_drops_a_torn_last_line(folder: RunFolder) -> None:
    folder.append("ledger", [{"round": 1}, {"round": 2}])
    with (folder.path / "ledger.jsonl").open("a") as stream:
        stream.write('{"round": 2, "bytes": 1')
    folder.truncate(2)
    folder.append("ledger", [{"round": 3}])
    assert lines(folder, "ledger") == [{"round": 1}, {"round": 2}, {"round": 3}]


def test_a_last_line_torn_before_its_end_of_line_is_still_a_line(folder: RunFolder) -> None:
    folder.append("ledger", [{"round": 1}])
    path = folder.path / "ledger.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    folder.truncate(1)
    folder.append("ledger", [{"round": 2}])
    assert lines(folder, "ledger") == [{"round": 1}, {"round": 2}]


def test_facts_are_set_one_by_one(folder: RunFolder) -> None:
    assert folder.read_info() == {}
    folder.write_info(a=1, b=[1])
    folder.write_info(b=2, c={"d": None})
    assert folder.read_info() == {"a": 1, "b": 2, "c": {"d": None}}
    assert RunFolder(folder.path).read_info() == {"a": 1, "b": 2, "c": {"d": None}}


def test_a_kill_while_writing_facts_leaves_the_old_ones(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.write_info(a=1)

    def die(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            folder.write_info(a=2)
    assert folder.read_info() == {"a": 1}
    folder.write_info(a=3)
    assert folder.read_info() == {"a": 3}


def test_values_that_are_no_json_leave_the_old_facts(folder: RunFolder) -> None:
    folder.write_info(a=1)
    with pytest.raises(TypeError):
        folder.write_info(a=object())
    assert folder.read_info() == {"a": 1}


def test_json_is_written_below_new_folders(tmp_path: Path) -> None:
    write_json({"a": [1.5]}, tmp_path / "x" / "y.json")
    assert json.loads((tmp_path / "x" / "y.json").read_text()) == {"a": [1.5]}


def test_folders_of_clients_and_checkpoints_lie_inside(folder: RunFolder) -> None:
    assert folder.state_folder == folder.path / "clients"
    assert folder.checkpoint_folder == folder.path / "checkpoints"


def test_a_record_without_lines_is_there(tmp_path: Path) -> None:
    """As the ledger of local training, which sends nothing."""
    folder = RunFolder(tmp_path)
    folder.append("ledger", [])
    assert (tmp_path / "ledger.jsonl").read_text() == ""
    folder.append("ledger", [{"round": 1}])
    folder.append("ledger", [])
    folder.sync()
    assert (tmp_path / "ledger.jsonl").read_text() == '{"round": 1}\n'
