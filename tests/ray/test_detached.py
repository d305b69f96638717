"""Runs that are left to a cluster: they go on without their command, are listed, followed and stopped, and can be resumed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import yaml

import fedgraft
from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.testing import Counting
from fedgraft.errors import ClusterError, MethodError
from fedgraft.platform import detached
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.progress import Event
from fedgraft.tuning.locks import hold

pytestmark = pytest.mark.ray

RAY = ExecutorConfig(kind="ray")
ROUNDS = 20


def _follow(name: str, events: list[Any]) -> Any:
    return detached.follow(name, RAY, events.append, lambda facts: None)


def _wait(is_true: Callable[[], Any], limit_s: float = 60.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := is_true()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return found


def test_whoever_follows_gets_everything_and_the_end(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=3, options=PoolOptions(replicas=1))
    detached.begin("counting", job, RAY, {"folder": str(tmp_path)})
    _wait(lambda: len(job.done()) == 3)
    events: list[Any] = []
    assert _follow("counting", events) == [100, 101, 102]
    assert events == [0, 1, 2]
    (found,) = detached.list_detached(RAY)
    assert (found.name, found.status) == ("counting", "over")
    assert found.about is not None
    assert found.about.facts == {"folder": str(tmp_path)}
    # One that is over only lingers, and makes way for the next.
    job = Counting(folder=tmp_path, steps=9, options=PoolOptions(replicas=1), act="raise")
    detached.begin("counting", job, RAY, {})
    with pytest.raises(MethodError, match="step 3 is wrong"):
        _follow("counting", [])
    detached.stop("counting", RAY, events.append, is_at_once=True)
    assert _wait(lambda: not detached.list_detached(RAY))


def test_one_that_is_under_way_is_not_begun_twice_and_ends_at_once(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=1000, options=PoolOptions(replicas=1), step_s=0.1)
    detached.begin("endless", job, RAY, {})
    with pytest.raises(ClusterError, match="endless is under way on this cluster"):
        detached.begin("endless", job, RAY, {})
    with pytest.raises(ClusterError, match="no run 'other' is under way on this cluster; there are endless"):
        detached.stop("other", RAY, lambda event: None, is_at_once=False)
    (pids,) = _wait(job.lives)
    assert len(pids) == 2
    detached.stop("endless", RAY, lambda event: None, is_at_once=True)
    _wait(lambda: not any(psutil.pid_exists(pid) for pid in pids))
    assert _wait(lambda: not detached.list_detached(RAY))


@pytest.fixture
def config(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "left",
        "model": {"path": str(make_base())},
        "data": {
            "path": str(data_folder.parent / "clients.jsonl"),
            "preset": "custom",
            "fields": {"prompt": "q", "response": "a", "label": "kind"},
            "max_length": 32,
        },
        "method": {"name": "flex"},
        "training": {"learning_rate": 0.01},
        "federation": {"rounds": ROUNDS, "local_steps": 1, "batch_size": 4, "cohort_size": 2},
        "evaluation": {"every": ROUNDS, "at_start": False, "generate": "never"},
        "executor": {"kind": "ray", "replicas": 1},
        "tracking": {"enabled": False},
        "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "report": False},
    }


def test_a_run_goes_on_without_its_command_and_is_stopped_and_resumed(
    config: dict[str, Any], tmp_path: Path, ray_processes: Callable[[str], list[psutil.Process]]
) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "fedgraft", "run", "run.yaml", "--detach", "--address", address]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    run_id = done.stdout.strip()
    folder = tmp_path / "runs" / run_id
    assert f"fedgraft attach {run_id}" in done.stderr

    def progress() -> int:
        (found,) = fedgraft.status(runs=tmp_path / "runs")
        assert (found.run_id, found.status, found.folder) == (run_id, "running", str(folder))
        words = found.progress.split()
        return int(words[2]) if words[:2] == ["flex:", "round"] else 0

    _wait(lambda: progress() >= 2, 120)
    # Nothing of the command is left, and driver and replica come again.
    (process,) = ray_processes("Driver")
    process.kill()
    before = _lines(folder)
    _wait(lambda: _lines(folder) > before, 120)
    told: list[Event] = []
    assert fedgraft.stop(run_id, on_event=told.append) == folder
    (found,) = fedgraft.status(runs=tmp_path / "runs")
    assert (found.run_id, found.status) == (run_id, "stopped")
    stopped_at = _lines(folder)
    assert 2 <= stopped_at < ROUNDS
    with pytest.raises(ClusterError, match="there is none"):
        fedgraft.attach(run_id)

    assert fedgraft.detach(resume=folder) == run_id
    result = fedgraft.attach(run_id)
    assert result is not None
    assert result.status == "finished"
    alone = fedgraft.run(fedgraft.load_config(config | {"name": "alone", "executor": {"kind": "in_process"}}))
    assert fedgraft.verify(folder, alone.folder).is_same


def _lines(folder: Path) -> int:
    path = folder / "flex" / "seed-0" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.is_file() else 0


def test_what_a_folder_says_of_a_run_that_no_driver_has(tmp_path: Path) -> None:
    for name, said in (("ended", "failed"), ("cut", "running"), ("torn", "")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text("")
        (tmp_path / name / "comparison.json").write_text(f'{{"status": "{said}"}}' if said else "{")
    with hold(tmp_path / "cut" / "config.yaml"):
        # A driver that another test has left may still linger.
        found = {each.run_id: each.status for each in fedgraft.status(runs=tmp_path) if each.status != "over"}
    assert found == {"ended": "failed", "cut": "running", "torn": "unreadable"}
    assert [each.status for each in fedgraft.status(runs=tmp_path) if each.run_id == "cut"] == ["cut off"]
