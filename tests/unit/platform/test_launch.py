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
def make_driver(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Driver]:
    monkeypatch.setattr(module.ray, "get_runtime_context", lambda: _Context)
    return Driver


def test_events_of_another_life_are_given_from_the_start(make_driver: Callable[..., Driver]) -> None:
    def job(context: JobContext) -> int:
        for number in range(3):
            context.emit(number)
        return 7

    driver = make_driver(job)
    assert driver.result() == 7
    first = driver.events("", 0, 1.0)
    assert (first.events, first.is_over) == ((0, 1, 2), True)
    assert driver.events(first.epoch, 2, 1.0).events == (2,)
    assert driver.events(first.epoch, 3, 0.01).events == ()
    assert driver.events("another life's", 40, 1.0).events == (0, 1, 2)
    assert make_driver(job).events("", 0, 1.0).epoch != first.epoch


def test_a_driver_tells_of_its_job(make_driver: Callable[..., Driver]) -> None:
    go = threading.Event()

    def job(context: JobContext) -> None:
        for number in range(3):
            context.emit(number)
        go.wait(10)

    driver = make_driver(job, facts={"folder": "/runs/one"})
    while len(driver.about(9).events) < 3:
        driver.events("", 0, 1.0)
    about = driver.about(2)
    assert (about.facts, about.events) == ({"folder": "/runs/one"}, (1, 2))
    assert driver.about(0).events == ()
    assert (about.is_over, about.is_stopping) == (False, False)
    driver.stop()
    assert driver.about(0).is_stopping
    go.set()
    driver.result()
    assert driver.about(0).is_over


@pytest.mark.parametrize("fails", [False, True])
def test_everybody_who_asks_gets_the_result_of_one_job(make_driver: Callable[..., Driver], fails: bool) -> None:
    go = threading.Event()
    calls: list[int] = []
    outcomes: list[Any] = []

    def job(context: JobContext) -> str:
        calls.append(1)
        go.wait(10)
        if fails:
            raise QuorumError("too few", "lower it")
        return "done"

    driver = make_driver(job)

    def ask() -> None:
        try:
            outcomes.append(driver.result())
        except QuorumError as error:
            outcomes.append(error.message)

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    assert not outcomes
    go.set()
    for thread in threads:
        thread.join(10)
    assert calls == [1]
    assert outcomes == ["too few" if fails else "done"] * 2


def test_a_folder_that_goes_away_with_a_job_is_known() -> None:
    copy = Path("/tmp/ray/session_1/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef")
    assert is_of_job(copy / "runs" / "quickstart-1")
    assert not is_of_job(Path("/mnt/runs/quickstart-1"))
