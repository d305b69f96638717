"""Tracking against a real SQLite store of MLflow's."""

from __future__ import annotations

import logging
import math
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from fedgraft.errors import FedgraftError
from fedgraft.platform.tracking import Tracker, TrackingConfig

pytestmark = pytest.mark.slow  # a store with its tables takes seconds


CONFIG = TrackingConfig()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One database for the file: to make its tables takes a second."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def client(root: Path):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root / 'mlflow.db'}")


def points(root: Path, run_id: str | None, key: str) -> list[tuple[int, float]]:
    assert run_id is not None
    return [(point.step, point.value) for point in client(root).get_metric_history(run_id, key)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of all public calls that reach MLflow's store, in order."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    made: list[str] = []

    def wrap(name: str, method: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **kwargs: object) -> object:
            made.append(name)
            return method(*args, **kwargs)

        return counted

    for name in ("log_batch", "log_metric", "log_param", "set_tag", "create_run", "update_run_info"):
        monkeypatch.setattr(SqlAlchemyStore, name, wrap(name, getattr(SqlAlchemyStore, name)))
    return made


def test_a_run_is_tracked_once_with_flat_params_and_its_steps(root: Path, tmp_path: Path) -> None:
    params = {"model": {"lora": {"rank": 8}, "targets": ["attention", "router"]}, "path": None, "on": True, "text": "x"}
    tracker = Tracker.start(CONFIG, root, "graft seed 0", params, {"method": "graft"})
    for round_idx, value in ((0, 3.0), (1, 2.5), (2, 2.25)):
        tracker.log_round(round_idx, {"train/loss": value})
    report = tmp_path / "report.html"
    report.write_text("<html>")
    tracker.finish("finished", [report, tmp_path / "missing"])
    assert tracker.run_id is not None
    run = client(root).get_run(tracker.run_id)
    assert run.data.params == {
        "model.lora.rank": "8",
        "model.targets": '["attention", "router"]',
        "path": "null",
        "on": "true",
        "text": "x",
    }
    assert run.info.run_name == "graft seed 0"
    assert run.info.status == "FINISHED"
    assert run.data.tags["method"] == "graft"
    assert points(root, tracker.run_id, "train/loss") == [(0, 3.0), (1, 2.5), (2, 2.25)]
    assert [file.path for file in client(root).list_artifacts(tracker.run_id)] == ["report.html"]
    assert list((root / "mlartifacts").rglob("report.html"))


def test_a_round_is_one_call_to_the_store(root: Path, calls: list[str]) -> None:
    tracker = Tracker.start(CONFIG, root, "x", {})
    calls.clear()
    for round_idx in range(1, 4):
        tracker.log_round(round_idx, {f"metric/{number}": float(number) for number in range(40)} | {"bad": math.nan})
    assert calls == ["log_batch"] * 3


def test_going_on_keeps_the_run_and_has_every_step_once(root: Path) -> None:
    first = Tracker.start(CONFIG, root, "x", {"a": 1})
    for round_idx in (1, 2, 3):
        first.log_round(round_idx, {"loss": float(round_idx)})
    first.finish("stopped")
    assert first.run_id is not None
    assert client(root).get_run(first.run_id).info.status == "KILLED"
    experiment = client(root).get_experiment_by_name("fedgraft").experiment_id
    count = len(client(root).search_runs([experiment]))
    # The checkpoint was of round 2, so round 3 is trained again; the params may have changed (more rounds).
    second = Tracker.start(CONFIG, root, "x", {"a": 2}, run_id=first.run_id)
    assert client(root).get_run(first.run_id).info.status == "RUNNING"
    for round_idx in (3, 4):
        second.log_round(round_idx, {"loss": float(round_idx)})
    second.finish("finished")
    assert second.run_id == first.run_id
    assert len(client(root).search_runs([experiment])) == count
    assert points(root, first.run_id, "loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]


@pytest.mark.parametrize("folder", ["/runs/a b/flex", "/runs/o'neil/100%", '/runs/"x"/flex'])
def test_a_run_whose_maker_died_before_its_id_was_kept_is_found_by_its_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    from mlflow import MlflowClient

    tags = {"fedgraft.folder": folder}
    Tracker.start(CONFIG, root, "of another folder", {}, {"fedgraft.folder": "/runs/else"})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MlflowClient, "log_batch", _die)
        Tracker.start(CONFIG, root, "flex", {"rate": 1.0, "rounds": 3}, tags)
    again = Tracker.start(CONFIG, root, "flex", {"rate": 1.0, "rounds": 3}, tags)
    again.log_round(1, {"loss": 2.0})
    third = Tracker.start(CONFIG, root, "flex", {"rate": 1.0, "rounds": 3}, tags)
    third.log_round(1, {"loss": 2.0})
    third.log_round(2, {"loss": 1.0})
    assert third.run_id == again.run_id
    experiment = client(root).get_experiment_by_name(CONFIG.experiment)
    found = [
        run for run in client(root).search_runs([experiment.experiment_id]) if run.data.tags.get("fedgraft.folder") == folder
    ]
    assert [run.info.run_id for run in found] == [again.run_id]
    assert found[0].data.params == {"rate": "1.0", "rounds": "3"}
    assert points(root, again.run_id, "loss") == [(1, 2.0), (2, 1.0)]


def _die(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_run_can_stand_under_another(root: Path) -> None:
    parent = Tracker.start(CONFIG, root, "comparison", {})
    child = Tracker.start(CONFIG, root, "graft", {}, parent_run_id=parent.run_id)
    assert child.run_id is not None
    assert client(root).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_values_that_are_not_finite_are_named_in_a_tag_and_not_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.start(CONFIG, root, "x", {})
    with caplog.at_level(logging.WARNING, "fedgraft"):
        tracker.log_round(1, {"loss": math.inf, "other": 1.0})
    tracker.log_round(2, {"loss": 2.0, "other": math.nan})
    assert "loss=inf" in caplog.text
    # MLflow would have stored 1.8e308 for the infinity.
    assert points(root, tracker.run_id, "loss") == [(2, 2.0)]
    assert points(root, tracker.run_id, "other") == [(1, 1.0)]
    assert tracker.run_id is not None
    tag = client(root).get_run(tracker.run_id).data.tags["fedgraft.not_finite"]
    assert tag == "round 1: loss=inf; round 2: other=nan"


def test_long_values_many_params_and_odd_names_are_taken(root: Path) -> None:
    params: dict[str, object] = {f"p{number}": number for number in range(250)}
    params |= {"long": "y" * 9000, "odd#name[1]": 1, "k" * 300: 1}
    tracker = Tracker.start(CONFIG, root, "x", params)
    tracker.log_round(1, {"client/maths (2)": 1.0})
    assert tracker.run_id is not None
    run = client(root).get_run(tracker.run_id)
    assert len(run.data.params) == 253
    assert run.data.params["long"].endswith("config.yaml has all of it)")
    assert run.data.params["odd_name_1_"] == "1"
    assert run.data.metrics == {"client/maths _2_": 1.0}


def test_a_store_that_breaks_is_logged_once_and_does_not_stop_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker.start(CONFIG, tmp_path, "x", {})
    (tmp_path / "mlflow.db").unlink()
    (tmp_path / "mlflow.db").write_text("not a database")
    with caplog.at_level(logging.WARNING, "fedgraft"):
        for round_idx in (1, 2):
            tracker.log_round(round_idx, {"loss": 1.0})
        tracker.finish("finished")
    records = [record for record in caplog.records if record.name.startswith("fedgraft")]
    assert len(records) == 1
    assert str(tmp_path) in records[0].getMessage()
    assert not tracker.is_on


def test_an_unreachable_server_is_a_clear_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = TrackingConfig(uri=f"http://name:secret@127.0.0.1:{port}")
    with pytest.raises(FedgraftError, match=r"tracking\.enabled=false") as caught:
        Tracker.start(config, tmp_path, "x", {})
    assert f"127.0.0.1:{port}" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("uri", ["sqlite:////proc/none/x.db", "sqlite:////etc/hostname"])
def test_a_database_that_cannot_be_opened_is_a_clear_error(tmp_path: Path, uri: str) -> None:
    with pytest.raises(FedgraftError, match="cannot start"):
        Tracker.start(TrackingConfig(uri=uri), tmp_path, "x", {})


def test_going_on_with_an_unknown_run_is_a_clear_error(root: Path) -> None:
    with pytest.raises(FedgraftError, match="cannot start"):
        Tracker.start(CONFIG, root, "x", {}, run_id="0" * 32)


def test_the_environment_names_the_store_and_the_config_wins(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    tracker = Tracker.start(TrackingConfig(experiment="of the environment"), tmp_path / "unused", "x", {})
    assert tracker.uri.endswith(f"{root.name}/mlflow.db")
    assert not (tmp_path / "unused").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////proc/none/x.db")
    config = TrackingConfig(uri=f"sqlite:///{root / 'mlflow.db'}", experiment="of the environment")
    assert Tracker.start(config, tmp_path / "unused", "x", {}).is_on


def test_a_tracker_that_is_off_does_nothing_and_imports_nothing(tmp_path: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from fedgraft.platform.tracking import Tracker, TrackingConfig
tracker = Tracker.start(TrackingConfig(enabled=False), Path({str(tmp_path)!r}), "x", {{"a": 1}})
tracker.log_round(1, {{"loss": 1.0}})
tracker.finish("finished", [Path({str(tmp_path)!r})])
assert tracker.run_id is None and not tracker.is_on and tracker.uri == ""
assert "mlflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_status_and_an_unknown_option_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FedgraftError, match="finished, stopped, failed"):
        Tracker.start(TrackingConfig(enabled=False), tmp_path, "x", {}).finish("done")
    with pytest.raises(ValidationError):
        TrackingConfig.model_validate({"url": "x"})
