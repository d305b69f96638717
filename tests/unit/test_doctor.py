"""Each check against a machine that is made worse on purpose."""

from __future__ import annotations

import http.server
import os
import sqlite3
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from packaging.requirements import Requirement

from fedgraft.platform import doctor
from fedgraft.platform.doctor import (
    Check,
    check_folder,
    check_package,
    check_ray,
    check_tracking,
    examine,
    has_failed,
    run_within,
)


@pytest.fixture
def no_ray(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Importing or starting Ray takes seconds; here it always works."""
    seen: list[list[str]] = []

    def run(command: list[str], seconds: float) -> str:
        seen.append(command)
        return ""

    monkeypatch.setattr(doctor, "run_within", run)
    monkeypatch.setattr(doctor, "ray_processes", lambda: iter(()))
    return seen


def test_this_machine_can_run_fedgraft_and_is_left_as_it_was(
    no_ray: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    checks = examine(runs=tmp_path / "runs")
    names = [check.name for check in checks]
    for name in ("Python", "torch", "ray", "mlflow", "cores", "memory", "runs folder", "cache folder", "GPUs", "Ray", "MLflow"):
        assert name in names
    assert "pytest" not in names, "extras are no requirements"
    assert not has_failed(checks), [check for check in checks if check.status == "fail"]
    assert list(tmp_path.iterdir()) == []
    assert all(check.advice for check in checks if check.status != "ok")


def test_a_check_that_breaks_is_a_failed_check(no_ray: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def check_machine() -> list[Check]:
        raise OSError("no such sensor")

    monkeypatch.setattr(doctor, "check_machine", check_machine)
    (found,) = (check for check in examine(runs=tmp_path) if check.status == "fail")
    assert found.name == "machine"
    assert "no such sensor" in found.found


@pytest.mark.parametrize(
    ("requirement", "status", "found", "advice"),
    [
        ("pydantic>=2", "ok", "2.", ""),
        ("pydantic>=1,<2", "warn", "tested with <2,>=1", "pip install 'pydantic<2,>=1'"),
        ("no-such-package-here>=3", "fail", "not installed", "pip install 'no-such-package-here>=3'"),
    ],
)
def test_packages_are_compared_with_their_tested_range(requirement: str, status: str, found: str, advice: str) -> None:
    check = check_package(Requirement(requirement))
    assert check.status == status
    assert found in check.found
    assert check.advice == advice


def test_a_python_outside_the_range_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.8.1")
    (check,) = doctor.check_python()
    assert check.status == "fail"
    assert ">=3.11" in check.advice


@pytest.mark.parametrize(("free", "status"), [(8, "ok"), (2, "warn"), (0.5, "fail")])
def test_little_memory(monkeypatch: pytest.MonkeyPatch, free: float, status: str) -> None:
    monkeypatch.setattr(doctor, "free_memory", lambda: int(free * 2**30))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 1)
    checks = {check.name: check for check in doctor.check_machine()}
    assert checks["memory"].status == status
    assert checks["cores"].status == "warn"


def test_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_folder("runs", tmp_path / "a" / "b", "set x").status == "ok"
    assert list(tmp_path.iterdir()) == []
    file = tmp_path / "file"
    file.write_text("")
    assert check_folder("runs", file, "set x").advice == "set x to a folder"
    assert check_folder("runs", file / "below", "set x").status == "fail"

    class Usage:
        free = 2**20

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    assert check_folder("runs", tmp_path, "set x").status == "fail"
    Usage.free = 2**30
    assert check_folder("runs", tmp_path, "set x").status == "warn"


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.NamedTemporaryFile", refuse)
    check = check_folder("runs", tmp_path, "set x")
    assert check.status == "fail"
    assert "Permission denied" in check.found
    assert "set x" in check.advice


def test_ray_is_imported_or_started(no_ray: list[list[str]]) -> None:
    assert [check.status for check in check_ray(environment={})] == ["ok"]
    check_ray(full=True, environment={})
    assert "ray.init" not in no_ray[0][-1]
    assert "ray.init" in no_ray[1][-1]


def test_a_ray_that_fails_an_address_and_leftovers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "run_within", lambda command, seconds: "gave no answer in 120 s")
    monkeypatch.setattr(doctor, "ray_processes", lambda: iter([(7, "raylet"), (8, "gcs_server")]))
    ray, left = check_ray(environment={})
    assert (ray.status, ray.found) == ("fail", "gave no answer in 120 s")
    assert "raylet (7)" in left.found
    assert "ray stop" in left.advice
    assert [check.name for check in check_ray(environment={"RAY_ADDRESS": "auto"})] == ["Ray", "RAY_ADDRESS"]


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_with_its_children(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert run_within([sys.executable, "-c", code], 2.0) == "gave no answer in 2 s"
    assert time.monotonic() - started < 20
    child = int(note.read_text())
    for _ in range(50):
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.1)
    else:
        pytest.fail("the child lives on")
    assert run_within([sys.executable, "-c", "raise ValueError('no')"], 20) == "ValueError: no"
    assert run_within([sys.executable, "-c", "import os; assert 'RAY_ADDRESS' not in os.environ"], 20) == ""


@pytest.mark.slow
def test_the_default_database_and_one_that_is_locked(tmp_path: Path) -> None:
    (check,) = check_tracking(tmp_path, {})
    assert check.status == "ok"
    assert "made by the first run" in check.found
    assert list(tmp_path.iterdir()) == []
    database = sqlite3.connect(tmp_path / "mlflow.db", isolation_level=None)
    database.execute("CREATE TABLE x (y)")
    assert "can be written to" in check_tracking(tmp_path, {})[0].found
    database.execute("BEGIN EXCLUSIVE")
    (check,) = check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'mlflow.db'}"})
    assert check.status == "fail"
    assert "locked" in check.found
    database.rollback()
    database.close()
    (tmp_path / "broken.db").write_text("this is no database, but it is long enough to be looked at as one" * 20)
    assert check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path / 'broken.db'}"})[0].status == "fail"


def test_a_tracking_server(tmp_path: Path) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *values: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        uri = f"http://127.0.0.1:{server.server_port}"
        try:
            (check,) = check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": uri})
        finally:
            server.shutdown()
            thread.join()
    assert (check.status, check.found) == ("ok", f"{uri} answers (200)")
    (check,) = check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": uri})
    assert check.status == "fail"
    assert "MLFLOW_TRACKING_URI" in check.advice


def test_other_stores(tmp_path: Path) -> None:
    uri = "postgresql://me:secret@127.0.0.1:1/db"
    (check,) = check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": uri})
    assert check.status == "fail"
    assert "secret" not in check.found
    assert check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": "databricks://x"})[0].status == "warn"
    assert check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": str(tmp_path)})[0].status == "ok"
    assert check_tracking(tmp_path, {"MLFLOW_TRACKING_URI": tmp_path.as_uri()})[0].status == "ok"


def test_leftovers_are_looked_for_among_this_users_processes() -> None:
    assert all(pid != os.getpid() for pid, _ in doctor.ray_processes())
