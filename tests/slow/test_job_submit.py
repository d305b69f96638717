"""``ray job submit --working-dir . -- python -m fedgraft run CONFIG`` on a head of the test's own, and joining it directly."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import yaml

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).parent / "ray"
START_S = 180.0


@dataclass
class Head:
    """A Ray head in a process group of its own, and the environment of a user who may talk to it."""

    address: str
    dashboard: str
    environment: dict[str, str]

    def submit(self, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = [str(RAY), "job", "submit", "--address", self.dashboard, "--working-dir", str(folder), "--", *arguments]
        return subprocess.run(
            command, env=self.environment | environment, cwd=folder, capture_output=True, text=True, timeout=400
        )


def _free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [int(probe.getsockname()[1]) for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """With token authentication, as Ray itself has it by default for what it starts."""
    port, dashboard, agent, client = _free_ports(4)
    temporary = f"/tmp/fgj{os.getpid()}"  # sockets have paths of at most 107 characters
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
    }
    command = [
        *(str(RAY), "start", "--head", "--block", "--num-cpus=3", "--node-ip-address=127.0.0.1", f"--port={port}"),
        *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1", f"--dashboard-agent-listen-port={agent}"),
        *(f"--ray-client-server-port={client}", f"--temp-dir={temporary}", "--object-store-memory=200000000"),
    ]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    made = Head(address=f"127.0.0.1:{port}", dashboard=f"http://127.0.0.1:{dashboard}", environment=environment)
    try:
        _wait_for(made)
        yield made
    finally:
        family = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        _, alive = psutil.wait_procs(family, timeout=30)
        for child in alive:
            child.kill()


def _wait_for(head: Head) -> None:
    deadline = time.monotonic() + START_S
    command = [str(RAY), "job", "list", "--address", head.dashboard]
    while True:
        done = subprocess.run(command, env=head.environment, capture_output=True, text=True, timeout=START_S)
        if done.returncode == 0:
            return
        assert time.monotonic() < deadline, done.stderr
        time.sleep(1)


@pytest.fixture(scope="module")
def folder(make_base: Callable[..., Path], data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user would submit: a folder with a configuration."""
    made = tmp_path_factory.mktemp("submitted")
    config = {
        "name": "submitted",
        "model": {"path": str(make_base())},
        "data": {
            "path": str(data_folder.parent / "clients.jsonl"),
            "preset": "custom",
            "fields": {"prompt": "q", "response": "a", "label": "kind"},
            "max_length": 32,
        },
        "method": {"name": "flex"},
        "training": {"learning_rate": 0.01},
        "federation": {"rounds": 2, "local_steps": 1, "batch_size": 4},
        "evaluation": {"generate": "never", "at_start": False},
        "executor": {"kind": "ray", "replicas": 1},
        "tracking": {"uri": f"sqlite:///{made}/mlflow.db"},
        "output": {"folder": str(made / "runs"), "cache": str(made / "cache"), "report": False},
    }
    (made / "job").mkdir()
    (made / "job" / "run.yaml").write_text(yaml.safe_dump(config))
    return made


def test_a_submitted_job_runs_on_the_cluster_and_its_log_is_followed(head: Head, folder: Path) -> None:
    done = head.submit(folder / "job", sys.executable, "-m", "fedgraft", "run", "run.yaml")
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "round 2/2" in output  # the log came through
    assert "succeeded" in output
    (run,) = (folder / "runs").iterdir()
    info = json.loads((run / "flex" / "seed-0" / "run.json").read_text())
    assert (info["status"], info["rounds"]) == ("finished", 2)
    assert (folder / "mlflow.db").is_file()
    assert info["mlflow_run_id"]


def test_a_mistake_in_the_configuration_fails_the_job_with_one_message(head: Head, folder: Path) -> None:
    done = head.submit(folder / "job", sys.executable, "-m", "fedgraft", "run", "run.yaml", "federation.rouns=3")
    output = done.stdout + done.stderr
    assert done.returncode != 0
    assert "federation.rouns" in output
    assert "exit code 2" in output
    assert "Traceback" not in output


def test_who_has_no_token_is_refused(head: Head, folder: Path) -> None:
    """The trap: a cluster that asks for a token, and a ``ray job submit`` that sends none."""
    done = head.submit(folder / "job", "true", RAY_AUTH_MODE="disabled", RAY_AUTH_TOKEN="")
    assert done.returncode != 0
    assert "401" in done.stderr or "nauth" in done.stderr or "oken" in done.stderr


def test_a_command_joins_by_address_and_leaves_the_cluster_running(head: Head, folder: Path) -> None:
    before = {path.name for path in (folder / "runs").iterdir()}
    command = [sys.executable, "-m", "fedgraft", "run", "run.yaml", f"executor.address={head.address}", "name=joined"]
    done = subprocess.run(command, env=head.environment, cwd=folder / "job", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = {path.name for path in (folder / "runs").iterdir()} - before
    assert made.startswith("joined-")
    listed = subprocess.run(
        [str(RAY), "job", "list", "--address", head.dashboard], env=head.environment, capture_output=True, text=True, timeout=60
    )
    assert listed.returncode == 0
