"""Signals and a driver's events, without Ray: the first signal asks to stop, the second one ends; nobody misses an event."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedgraft.actors.driver as module
from fedgraft.actors.driver import Driver
from fedgraft.actors.hosting import JobContext
from fedgraft.errors import QuorumError
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import is_of_job, launch

HERE = ExecutorConfig(kind="in_process")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_to_stop_and_the_second_ends(number: signal.Signals, second: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    events: list[Any] = []
    seen: list[bool] = []

    def job(context: JobContext) -> str:
        seen.append(context.is_stopping())
        os.kill(os.getpid(), number)
        seen.append(context.is_stopping())
        if len(seen) > 2:
            os.kill(os.getpid(), second)
        return "done"

    assert launch(job, HERE, events.append) == "done"
    assert seen == [False, True]
    (note,) = events
    assert note.data["text"].startswith("stopping after this round; ")
    with pytest.raises(KeyboardInterrupt):
        launch(job, HERE, events.append)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


class _Context:
    was_current_actor_reconstructed = False


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: _Context)
    return Driver()


def test_events_of_another_life_are_given_from_the_start(driver: Driver) -> None:
    def job(context: JobContext) -> int:
        for number in range(3):
            context.emit(number)
        return 7

    assert driver.run(job) == 7
    first = driver.events("", 0, 1.0)
    assert (first.events, first.is_over) == ((0, 1, 2), True)
    assert driver.events(first.epoch, 2, 1.0).events == (2,)
    assert driver.events(first.epoch, 3, 0.01).events == ()
    assert driver.events("another life's", 40, 1.0).events == (0, 1, 2)
    assert Driver().events("", 0, 0.01).epoch != first.epoch


@pytest.mark.parametrize("fails", [False, True])
def test_a_call_that_comes_twice_runs_the_job_once(driver: Driver, fails: bool) -> None:
    begun, go = threading.Event(), threading.Event()
    calls: list[int] = []
    outcomes: list[Any] = []

    def job(context: JobContext) -> str:
        calls.append(1)
        begun.set()
        go.wait(10)
        if fails:
            raise QuorumError("too few", "lower it")
        return "done"

    def run(call: Callable[..., Any]) -> None:
        try:
            outcomes.append(call(job))
        except QuorumError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=run, args=(driver.run,)) for _ in range(2)]
    threads[0].start()
    begun.wait(10)
    threads[1].start()
    go.set()
    for thread in threads:
        thread.join(10)
    assert calls == [1]
    assert outcomes == ["too few" if fails else "done"] * 2


def test_a_folder_that_goes_away_with_a_job_is_known() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")
    assert is_of_job(copy / "runs" / "quickstart-1")
    assert not is_of_job(Path("/mnt/runs/quickstart-1"))
