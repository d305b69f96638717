"""A whole experiment in this process: rates that break down, resuming, what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft.errors import CheckpointError, ConfigError, FedgraftError, RunInterrupted
from fedgraft.platform.progress import Event
from fedgraft.tuning.locks import hold

Make = Callable[..., fedgraft.RunConfig]


@pytest.fixture
def make_config(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> Make:
    clients = tmp_path / "clients.jsonl"
    clients.write_text((data_folder.parent / "clients.jsonl").read_text())

    def make(**sections: Any) -> fedgraft.RunConfig:
        fields = {"prompt": "q", "response": "a", "label": "kind"}
        config = {
            "name": "unit",
            "model": {"path": str(make_base())},
            "data": {"path": str(clients), "preset": "custom", "fields": fields, "max_length": 32},
            "method": {"name": "fedavg"},
            "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4},
            "evaluation": {"generate": "never"},
            "executor": {"kind": "in_process"},
            "tracking": {"enabled": False},
            "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "report": False},
        }
        return fedgraft.load_config(config | sections)

    return make


def test_a_rate_at_which_training_breaks_down_is_out(make_config: Make) -> None:
    notes: list[str] = []

    def on_event(event: Event) -> None:
        if event.kind == "note":
            notes.append(str(event.data["text"]))

    result = fedgraft.run(make_config(rate_search={"rates": [0.01, 1e30], "rounds": 1}), on_event=on_event)
    assert isinstance(result, fedgraft.RunResult)
    assert result.info["learning_rate"] == 0.01
    comparison = json.loads((result.folder.parents[1] / "comparison.json").read_text())
    assert comparison["rate_search"]["fedavg"]["validation_nll"][1] is None
    assert comparison["rate_search"]["fedavg"]["chosen_by_seed"] == {"0": 0.01}
    assert any("1e+30 is out" in note for note in notes)


def test_two_do_not_work_in_one_folder(make_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgraft.tuning.experiment._OTHER_S", 0.3)
    folder = fedgraft.run(make_config()).folder.parents[1]
    (folder / ".run.json.4711").write_text("torn")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with hold(folder / "config.yaml"), pytest.raises(FedgraftError, match="another process is at work in") as raised:
        fedgraft.run(resume=folder)
    assert str(folder) in raised.value.message
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert fedgraft.run(resume=folder).status == "finished"  # given back
    assert not (folder / ".run.json.4711").exists()  # what a killed one left is removed, but only by whoever holds the folder


def test_the_search_never_looks_at_a_test_example(make_config: Make) -> None:
    result = fedgraft.run(make_config(rate_search={"rates": [0.001, 0.01], "rounds": 1}))
    rows = [
        json.loads(line)
        for path in (result.folder.parents[1] / "search").rglob("evaluations.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert rows
    assert {row["split"] for row in rows} == {"validation"}
    assert {row["task"] for row in rows} == {"client"}


def test_every_seed_searches_on_its_own_split(make_config: Make) -> None:
    result = fedgraft.run(make_config(seeds=[0, 3], rate_search={"rates": [0.001, 0.01], "rounds": 1}))
    assert isinstance(result, fedgraft.ComparisonResult)
    assert set(result.rate_search["fedavg"]["chosen_by_seed"]) == {"0", "3"}
    for run in result.runs["fedavg"]:
        chosen = result.rate_search["fedavg"]["chosen_by_seed"][str(run.info["seed"])]
        assert run.info["learning_rate"] == chosen
    prints = {run.info["data_fingerprint"] for run in result.runs["fedavg"]}
    assert len(prints) == 2


def _stop_after_round_1(config: fedgraft.RunConfig, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run until the first round is over, as a Ctrl-C would; the folder can be resumed."""
    from fedgraft.platform import rounds

    original = rounds.RoundLoop._round

    def once(self: Any, evaluator: Any, state: Any, round_idx: int, total: int) -> Any:
        if round_idx == 2:
            raise RunInterrupted("stopped", "")
        return original(self, evaluator, state, round_idx, total)

    with monkeypatch.context() as patch:
        patch.setattr(rounds.RoundLoop, "_round", once)
        with pytest.raises(RunInterrupted, match="fedgraft run --resume") as stopped:
            fedgraft.run(config)
    return Path(str(stopped.value.hint).split()[-1])


def test_resuming_works_from_another_folder(make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    data = make_config().data.model_dump(mode="json", exclude_unset=True) | {"path": "clients.jsonl"}
    folder = _stop_after_round_1(make_config(data=data), monkeypatch)
    status = json.loads((folder / "comparison.json").read_text())["status"]
    assert status == "stopped"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    result = fedgraft.run(resume=folder)
    assert result.status == "finished"
    assert list(result.metrics["round"]) == [1, 2]
    assert result.info["error"] is None


def test_resuming_on_other_data_is_refused(make_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = _stop_after_round_1(make_config(), monkeypatch)
    clients = tmp_path / "clients.jsonl"
    clients.write_text("".join(clients.read_text().splitlines(keepends=True)[:-3]))
    with pytest.raises(CheckpointError, match="was begun on other data"):
        fedgraft.run(resume=folder)


@pytest.mark.slow
def test_a_report_of_grafts_needs_no_general_text(make_config: Make) -> None:
    output = make_config().output.model_dump(mode="json") | {"report": True}
    result = fedgraft.run(make_config(method={"name": "flex"}, output=output))
    assert result.report is not None
    page = result.report.read_text()
    assert "mean opening of the graft gate" in page
    assert "general text</text>" not in page


def test_more_clients_wanted_than_there_are(make_config: Make) -> None:
    config = make_config(federation={"rounds": 1, "min_clients": 100})
    with pytest.raises(ConfigError, match=r"federation.min_clients: got 100; expected at most 3"):
        fedgraft.run(config)


@pytest.mark.parametrize("label", ["data", "search", "..", ".hidden", "a/b"])
def test_a_label_that_would_leave_its_folder_is_refused(make_config: Make, label: str) -> None:
    with pytest.raises(ConfigError, match="names a folder"):
        make_config(method=None, compare={"methods": {label: {"name": "fedavg"}}})


def test_a_folder_that_is_no_experiment_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no config\.yaml"):
        fedgraft.run(resume=tmp_path)
