"""A real tracking server: `fedgraft ui` starts it, runs are tracked and compared over HTTP, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

import fedgraft
from fedgraft.platform.config import RunConfig
from fedgraft.platform.loading import dump_config, load_config
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.run_tags import run_params, run_tags
from fedgraft.platform.tracking import Tracker, TrackingConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning"),  # MLflow's own, met when it is asked
]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A runs folder whose database exists already, with an experiment of artifacts beside it."""
    root = tmp_path_factory.mktemp("runs")
    Tracker.start(TrackingConfig(), root, "first", {}).finish("finished")
    return root


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def ui(database: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    command = [sys.executable, "-m", "fedgraft", "ui", str(database), "--port", str(port)]
    process = subprocess.Popen(command, cwd=database, env=clean | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        for member in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            member.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _track(uri: str, folder: Path, label: str, config: RunConfig, status: str = "finished", **more: str) -> str:
    """Track a run as an experiment does, with its records as artifacts."""
    method = config.method
    assert method is not None
    tags = run_tags(config, "run", folder, label=label, method=method, seed=0, more=more)
    tracking = TrackingConfig(uri=uri, experiment="over http")
    tracker = Tracker.start(tracking, folder, f"{label}/seed-0", run_params(config, method=method, seed=0, rate=0.02), tags)
    assert tracker.run_id is not None
    tracker.log_round(2, {"nll": 1.5})
    RunFolder(folder).write_info(mlflow_run_id=tracker.run_id)
    tracker.finish(status, RunFolder(folder).records())
    return tracker.run_id


def test_ui_serves_tracks_compares_and_ends(
    ui: subprocess.Popen[str], port: int, tmp_path: Path, run_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ui.stdout is not None
    said = ui.stdout.readline() + ui.stdout.readline()
    assert f"open http://127.0.0.1:{port} in a browser" in said
    family = psutil.Process(ui.pid).children(recursive=True)
    assert family
    (listening,) = {
        each.laddr for member in family for each in member.net_connections() if each.laddr.port == port and not each.raddr
    }
    assert listening.ip == "127.0.0.1"

    uri = f"http://127.0.0.1:{port}"
    ids = {}
    for label, score in (("fedavg", 2.0), ("flex", 1.5), ("hfedmoe", 1.0)):
        config = load_config(
            {"method": {"name": label}, "data": {"partition": {"name": "dirichlet", "alpha": 0.1}, "num_clients": 8}}
        )
        folder = run_folder(tmp_path / label / "seed-0", label, 0, lambda _, client, score=score: score + 0.01 * client**2)
        (folder / "config.yaml").write_text(dump_config(config))
        stopped = {"stopped_early": "true"} if label == "hfedmoe" else {}
        ids[label] = _track(uri, folder, label, config, "stopped" if stopped else "finished", **stopped)
    # One folder is gone, as on another machine: its records come over HTTP.
    (tmp_path / "flex").rename(tmp_path / "elsewhere")

    from mlflow import MlflowClient

    run = MlflowClient(tracking_uri=uri).get_run(ids["flex"])
    assert run.data.params["method.name"] == "flex"
    assert run.data.params["data.partition.alpha"] == "0.1"
    assert run.data.params["training.learning_rate"] == "0.02"
    assert not [key for key in run.data.params if key.startswith(("compare", "tracking", "versions"))]
    tags = {key.removeprefix("fedgraft."): value for key, value in run.data.tags.items() if key.startswith("fedgraft.")}
    expected = {"kind": "run", "method": "flex", "dataset": "bundled", "model": "bundled", "seed": "0", "label": "flex"}
    assert expected.items() <= tags.items()

    found = fedgraft.compare(mlflow="params.`data.partition.alpha` = '0.1'", uri=uri)
    assert list(found.settings.index) == ["fedavg", "flex"]
    assert found.settings.loc["flex", "personal_nll"] == pytest.approx(1.5 + 0.01 * 140 / 8)
    assert found.left_out["status"].tolist() == ["stopped_early"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert list(fedgraft.compare(mlflow="tags.\"fedgraft.method\" = 'flex'").settings.index) == ["flex"]

    taken = subprocess.run(
        [sys.executable, "-m", "fedgraft", "ui", "--port", str(port)],
        cwd=tmp_path, env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/x.db"}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert (taken.returncode, f"--port {port}" in taken.stderr) == (2, True)

    ui.send_signal(signal.SIGINT)
    assert ui.wait(60) == 0
    assert [member for member in family if member.is_running() and member.status() != psutil.STATUS_ZOMBIE] == []
