"""The driver actor dies or is stopped: its job goes on by itself, its replicas do not stay, and whoever follows is told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.testing import Counting
from fedgraft.errors import MethodError, RunInterrupted
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import launch
from fedgraft.platform.progress import Event

pytestmark = pytest.mark.ray

RAY = ExecutorConfig(kind="ray")


def _told(events: list[Any]) -> list[Any]:
    return [event.data["text"] if isinstance(event, Event) else event for event in events]


def test_a_killed_driver_is_restarted_and_goes_on_where_it_was(tmp_path: Path) -> None:
    # The replicas of the first life take the whole cluster, and Ray keeps placement groups of a dead actor.
    options = PoolOptions(replicas=2, ranks=2, start_timeout_s=120)
    assert ray.cluster_resources()["CPU"] == 4
    job = Counting(folder=tmp_path, steps=4, options=options, act="die", at=1)
    events: list[Any] = []
    assert launch(job, RAY, events.append) == [100, 101, 102, 103]
    first, second = job.lives()
    assert not set(first) & set(second)
    assert not any(psutil.pid_exists(pid) for pid in first)
    told = _told(events)
    assert "the driver actor died and was restarted; it goes on from the last completed round" in told
    steps = [each for each in told if isinstance(each, int)]
    assert steps[-2:] == [2, 3]
    assert len(steps) == len(set(steps))
    _nothing_is_left(second)


def test_an_error_of_the_job_is_not_run_again(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=4, options=PoolOptions(replicas=1), act="raise")
    with pytest.raises(MethodError, match="step 0 is wrong"):
        launch(job, RAY, lambda event: None)
    assert len(job.lives()) == 1
    _nothing_is_left(job.lives()[0])


def test_a_driver_that_was_asked_to_stop_is_asked_again_after_a_restart(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=1000, options=PoolOptions(replicas=1), step_s=0.1)
    told: list[Any] = []

    def on_event(event: Any) -> None:
        told.append(event)
        if event == 1:
            # The driver is dead before it can take the word.
            os.kill(job.lives()[0][0], signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunInterrupted):
        launch(job, RAY, on_event)
    assert len(job.lives()) <= 2
    assert 2 <= len(job.done()) < 1000
    assert "stopping after this round; SIGTERM or Ctrl-C stops at once" in _told(told)
    assert signal.getsignal(signal.SIGTERM) is not signal.default_int_handler


def test_the_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=2, options=PoolOptions(replicas=1), act="hang", at=0)

    def on_event(event: Any) -> None:
        if event == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        launch(job, RAY, on_event)
    _nothing_is_left(job.lives()[0])


def _nothing_is_left(pids: list[int]) -> None:
    deadline = time.monotonic() + 30
    while left := [pid for pid in pids if psutil.pid_exists(pid)]:
        assert time.monotonic() < deadline, f"still there: {left}"
        time.sleep(0.1)
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != ray.cluster_resources()["CPU"]:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.1)
