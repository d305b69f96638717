"""The command itself is ended, with a cluster of its own: nothing of it is left, and what it did is gone on with."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.testing import Counting
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import launch

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("signals", [[signal.SIGKILL], [signal.SIGTERM, signal.SIGTERM]])
def test_nothing_is_left_of_a_command_that_was_ended(tmp_path: Path, signals: list[signal.Signals]) -> None:
    job = Counting(folder=tmp_path, steps=0, options=PoolOptions(replicas=2))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    script = str(Path(__file__).with_name("counting_command.py"))
    command = subprocess.Popen([sys.executable, script, str(tmp_path)], env=clean, stderr=subprocess.DEVNULL)
    try:
        _wait(lambda: len(job.done()) >= 2, 200)
        started = {process: process.name() for process in psutil.Process(command.pid).children(recursive=True)}
        for part in ("raylet", "gcs_server", "ray::Driver", "ray::Rank"):
            assert any(name.startswith(part) for name in started.values()), started
        for number in signals:
            command.send_signal(number)
            time.sleep(0.5)
        command.wait(60)
        # Two small agents of Ray look for its head for a minute before they go, too.
        _, left = psutil.wait_procs([process for process in started if "Agent" not in started[process]], timeout=30)
        assert not left, [started[process] for process in left]
    finally:
        command.kill()
        command.wait()
    done = job.done()
    go_on = replace(job, steps=len(done) + 2)
    assert launch(go_on, ExecutorConfig(kind="ray"), lambda event: None) == list(range(100, 102 + len(done)))


def _wait(is_true: Callable[[], bool], limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)
