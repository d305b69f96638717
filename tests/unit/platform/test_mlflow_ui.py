"""Which store the interface is started on; the server itself is in ``comparison/test_tracking_server.py``."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.errors import ResultsError
from fedgraft.platform.mlflow_ui import Store, find_store


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    (tmp_path / "runs" / "sweep" / "trials" / "0001" / "flex" / "seed-0").mkdir(parents=True)
    (tmp_path / "runs" / "mlflow.db").write_bytes(b"")
    return tmp_path / "runs"


def test_the_runs_folder_and_any_folder_in_it(runs: Path) -> None:
    expected = Store(uri=f"sqlite:///{runs / 'mlflow.db'}", artifacts=runs / "mlartifacts")
    assert find_store(None) == expected
    assert find_store(runs) == expected
    assert find_store(runs / "sweep" / "trials" / "0001" / "flex" / "seed-0") == expected


def test_the_environment_counts_where_nothing_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://name:secret@host:5000")
    assert find_store(None) == Store(uri="http://name:secret@host:5000")
    assert find_store(None).shown == "http://name:***@host:5000"
    assert find_store(runs).uri == f"sqlite:///{runs / 'mlflow.db'}"


def test_what_was_tracked_elsewhere_says_where(runs: Path) -> None:
    run = runs / "sweep" / "trials" / "0001"
    (run / "config.yaml").write_text("tracking: {uri: 'http://there:1', enabled: true}\n")
    assert find_store(run).is_server
    (runs / "sweep" / "sweep.json").write_text(json.dumps({"tracking_uri": "sqlite:////elsewhere/x.db"}))
    assert find_store(runs / "sweep") == Store(uri="sqlite:////elsewhere/x.db", artifacts=Path("/elsewhere/mlartifacts"))


def test_a_configuration(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f"method: {{name: flex}}\noutput: {{folder: {runs}}}\n")
    assert find_store(path).uri == f"sqlite:///{runs / 'mlflow.db'}"
    path.write_text("method: {name: flex}\ntracking: {uri: 'sqlite:///mine.db'}\n")
    assert find_store(path) == Store(uri="sqlite:///mine.db", artifacts=tmp_path / "mlartifacts")
    path.write_text("method: {name: flex}\ntracking: {enabled: false}\n")
    with pytest.raises(ResultsError, match="nothing was tracked"):
        find_store(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "runs/mlflow.db does not exist"),
        (["nowhere"], "nowhere does not exist"),
        (["--port", "0"], "greater than or equal to 1"),
    ],
)
def test_nothing_to_show_is_one_message(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["ui", *arguments])
    said = " ".join(result.stderr.replace("\u2502", " ").split())
    assert (result.exit_code, message in said) == (2, True), result.stderr


def test_a_taken_port_is_one_message_and_starts_nothing(runs: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["ui", str(runs), "--port", str(port)])
    assert result.exit_code == 2
    assert f"--port {port} on 127.0.0.1 cannot be used: Address already in use" in result.stderr


def test_a_server_has_its_own_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://there:5000")
    result = CliRunner().invoke(app, ["ui"])
    assert result.exit_code == 0
    assert "http://there:5000 is a tracking server" in result.stdout
