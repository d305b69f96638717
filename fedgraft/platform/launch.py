"""Running a job: in this process, or in a driver actor on a Ray cluster that is joined or started for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedgraft.actors.driver import Driver
from fedgraft.actors.hosting import JobContext
from fedgraft.actors.local import LocalPool
from fedgraft.errors import ClusterError, FedgraftError
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.progress import Event

__all__ = ["cluster", "launch"]

_POLL_S = 5.0
"""Longest wait for one batch of events; a batch returns as soon as there is one, so this only bounds a silent driver's death."""


def launch(job: Callable[[JobContext], Any], executor: ExecutorConfig, on_event: Callable[[Any], None]) -> Any:
    """Run a job and give its result.

    The first Ctrl-C asks the job to stop at the next safe point; a second one ends it at once. Either way what was started
    here is ended here.

    Args:
        job: Called with its context; it must survive the trip to another process.
        executor: Where.
        on_event: Gets the job's events in this process.

    Raises:
        FedgraftError: Whatever the job raised.
        ClusterError: Ray does not start, cannot be joined, or the driver died.
    """
    if executor.kind == "in_process":
        stop = threading.Event()
        threads = torch.get_num_threads()
        try:
            with _first_interrupt(stop.set, on_event):
                return job(JobContext(emit=on_event, open_pool=LocalPool, is_stopping=stop.is_set))
        finally:
            torch.set_num_threads(threads)  # a notebook goes on with what it had
    with cluster(executor):
        # No CPU is reserved for the driver: it waits while replicas work, and the replicas' cores are counted on their own.
        driver = ray.remote(Driver).options(num_cpus=0, max_concurrency=4).remote()
        try:
            result = driver.run.remote(job)
            with _first_interrupt(lambda: driver.stop.remote(), on_event):
                _follow(driver, result, on_event)
            return ray.get(result)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, FedgraftError):
                raise cause from None
            raise
        except RayError as error:
            raise ClusterError(
                f"the driver actor died: {str(error).splitlines()[0]}",
                "often too little memory; the run can be resumed with fedgraft run --resume",
            ) from error
        finally:
            ray.kill(driver)


def _follow(driver: Any, result: Any, on_event: Callable[[Any], None]) -> None:
    """Hand over events until the job is over. The driver answers as soon as it has one."""
    seen = 0
    while True:
        events, is_over = ray.get(driver.events.remote(seen, _POLL_S))
        seen += len(events)
        for event in events:
            on_event(event)
        if is_over or (not events and ray.wait([result], timeout=0)[0]):  # the job may have failed before it began
            return


@contextmanager
def cluster(executor: ExecutorConfig) -> Iterator[None]:
    """Join the cluster that is named (``executor.address``, ``RAY_ADDRESS``), one this process is in, or a new local one.

    Only a cluster that was started here is shut down.

    Raises:
        ClusterError: It cannot be started or joined.
    """
    if ray.is_initialized():
        yield
        return
    address = executor.address or os.environ.get("RAY_ADDRESS")
    # Ray reads these once, when it starts: no usage report over the network, and quiet workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError, GetTimeoutError) as error:
        where = f"join the Ray cluster at {address}" if address else "start a local Ray cluster"
        raise ClusterError(
            f"cannot {where}: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "check executor.address and RAY_ADDRESS, run fedgraft doctor --full, or set executor.kind=in_process",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _first_interrupt(stop: Callable[[], object], on_event: Callable[[Any], None]) -> Iterator[None]:
    """Let the first Ctrl-C call ``stop`` and the second one raise KeyboardInterrupt; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop()
        on_event(Event(kind="note", data={"text": "stopping after this round; Ctrl-C again stops at once"}))

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
