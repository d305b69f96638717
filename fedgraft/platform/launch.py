"""Running a job: in this process, or in a driver actor on a Ray cluster that is joined or started for it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from fedgraft.actors.driver import Driver
from fedgraft.actors.hosting import JobContext
from fedgraft.actors.local import LocalPool
from fedgraft.actors.replica import remove_groups
from fedgraft.errors import ClusterError, FedgraftError
from fedgraft.platform.config import ExecutorConfig, RunConfig
from fedgraft.platform.machine import gpu_memory
from fedgraft.platform.packing import Gpus, is_to_work_out
from fedgraft.platform.progress import Event

__all__ = ["Follower", "cluster", "cluster_gpus", "driver_options", "end_driver", "is_joined", "is_of_job", "launch"]

_POLL_S = 5.0
"""Longest wait for one batch of events; a batch returns as soon as there is one, so this only bounds a silent driver's death."""
_GPU_ANSWER_S = 60.0
"""Longest wait for GPUs to say how large they are."""
_DRIVER_RESTARTS = 3
"""How often a driver that died is started again: what kills it four times will do so a fifth time."""


def launch(job: Callable[[JobContext], Any], executor: ExecutorConfig, on_event: Callable[[Any], None]) -> Any:
    """Run a job and give its result.

    The first Ctrl-C or SIGTERM asks the job to stop at the next safe point; a second one ends it at once. Either way what was
    started here is ended here.

    Args:
        job: Called with its context; it must survive the trip to another process. If the driver dies, it is called again in a
            new one, so it must find out by itself what is done.
        executor: Where.
        on_event: Gets the job's events in this process.

    Raises:
        FedgraftError: Whatever the job raised; it is not run again for that.
        ClusterError: Ray does not start, cannot be joined, or the driver died too often.
        KeyboardInterrupt: It was ended at once.
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
        driver = ray.remote(Driver).options(**driver_options()).remote(job)
        follower = Follower(driver, on_event, silence_s=executor.heartbeat_s, start_timeout_s=executor.start_timeout_s)
        try:
            with _first_interrupt(follower.stop, on_event):
                return follower.follow()
        finally:
            end_driver(driver)


def driver_options() -> dict[str, Any]:
    """What Ray is told of a driver actor.

    No CPU is reserved: it waits while replicas work, and their cores are counted on their own. It lies where the command runs,
    if that node takes it: what the command has just written lies there, too.
    """
    here = NodeAffinitySchedulingStrategy(node_id=ray.get_runtime_context().get_node_id(), soft=True)
    return {
        "num_cpus": 0,
        "max_concurrency": 8,
        "max_restarts": _DRIVER_RESTARTS,
        "max_task_retries": -1,
        "scheduling_strategy": here,
    }


def end_driver(driver: Any) -> None:
    """End a driver at once, whatever it does, with its replicas and their places."""
    ray.kill(driver)
    remove_groups(driver._actor_id.hex())


class Follower:
    """Hands over a driver's events until its job is over, across the driver's restarts.

    Args:
        driver: The actor.
        on_event: Gets the events.
        silence_s: A driver that says nothing for so long, though it was asked twice, is frozen; it is restarted.
        start_timeout_s: Longest time that a driver may take to start, also again.
    """

    def __init__(self, driver: Any, on_event: Callable[[Any], None], *, silence_s: float, start_timeout_s: float) -> None:
        self._driver = driver
        self._on_event = on_event
        self._silence_s = silence_s
        self._start_timeout_s = start_timeout_s
        self._is_to_stop = False

    def stop(self) -> None:
        """Ask the job to stop at the next safe point; a restarted driver is asked again."""
        self._is_to_stop = True
        self._driver.stop.remote()

    def follow(self) -> Any:
        """Hand over events until the job is over, and give its result.

        Raises:
            FedgraftError: Whatever the job raised.
            ClusterError: The driver is gone, or does not start.
        """
        try:
            return self._follow()
        except RayTaskError as error:
            if isinstance(error.cause, FedgraftError):
                raise error.cause from None
            raise
        except RayError as error:
            if getattr(error, "actor_init_failed", False):
                raise ClusterError(
                    f"the driver actor cannot be made: {str(error).strip().splitlines()[-1]}",
                    "the same fedgraft must be installed on every node of the cluster",
                ) from error
            raise ClusterError(
                f"the driver actor died and is not restarted more than {_DRIVER_RESTARTS} times: {str(error).splitlines()[0]}",
                "often too little memory; the run can be resumed",
            ) from error

    def _follow(self) -> Any:
        epoch, seen = "", 0
        heard = time.monotonic()
        silent: tuple[object, ...] | None = None
        while True:
            try:
                batch = ray.get(self._driver.events.remote(epoch, seen, _POLL_S), timeout=_POLL_S + self._silence_s)
            except GetTimeoutError:
                # It may be starting, which takes its time on a busy machine: only one that was there all the while is frozen.
                before, silent = silent, self._life()
                if silent is not None and silent == before:
                    self._note(f"the driver actor has given no sign of life for {self._silence_s:.0f} s; it is ended")
                    ray.kill(self._driver, no_restart=False)
                if silent is None and time.monotonic() - heard > self._start_timeout_s:
                    raise ClusterError(
                        f"the driver actor did not start within executor.start_timeout_s = {self._start_timeout_s:.0f} s",
                        "raise it, or free the machine",
                    ) from None
                continue
            silent, heard = None, time.monotonic()
            if batch.epoch != epoch:
                if epoch:
                    self._note("the driver actor died and was restarted; it goes on from the last completed round")
                if self._is_to_stop:
                    self._driver.stop.remote()
                epoch, seen = batch.epoch, 0
            seen += len(batch.events)
            for event in batch.events:
                self._on_event(event)
            if batch.is_over:
                return ray.get(self._driver.result.remote())  # not before: a waiting call would hold one of its threads

    def _life(self) -> tuple[object, ...] | None:
        """Which process the driver is now; none while it starts."""
        found = ray._private.state.actors(self._driver._actor_id.hex())
        return (found["Pid"], found["StartTime"]) if found["State"] == "ALIVE" else None

    def _note(self, text: str) -> None:
        self._on_event(Event(kind="note", data={"text": text}))


def is_joined() -> bool:
    """Whether this process is in a cluster already."""
    return bool(ray.is_initialized())


def is_of_job(folder: Path) -> bool:
    """Whether a folder lies in the copy of a working directory that Ray made for a submitted job, and that goes away with it."""
    return any(part.startswith("_ray_pkg_") for part in folder.parts)


def cluster_gpus(config: RunConfig) -> tuple[Gpus, ...]:
    """What each node of the cluster that this process is in has; GPUs are asked for their memory if that is to be known."""
    asks = is_to_work_out(config) and config.executor.gpu_gib is None
    nodes = [node for node in ray.nodes() if node["Alive"]]
    refs = {}
    for node in nodes:
        if asks and node["Resources"].get("GPU", 0.0) >= 1:
            there = NodeAffinitySchedulingStrategy(node_id=node["NodeID"], soft=False)
            # Next to nothing of one GPU of the node: enough to see it.
            task = ray.remote(gpu_memory).options(num_cpus=0, num_gpus=0.001, scheduling_strategy=there)
            refs[node["NodeID"]] = task.remote()
    if refs:
        ray.wait(list(refs.values()), num_returns=len(refs), timeout=_GPU_ANSWER_S)
    return tuple(
        Gpus(
            cores=float(node["Resources"].get("CPU", 0.0)),
            gpus=float(node["Resources"].get("GPU", 0.0)),
            gpu_bytes=_answer(refs.get(node["NodeID"])),
        )
        for node in nodes
    )


def _answer(ref: Any) -> int | None:
    """A GPU's memory; ``None`` where it was not asked, does not answer (others use it), or is none that PyTorch sees."""
    if ref is None:
        return None
    try:
        found: int | None = ray.get(ref, timeout=0)
    except (GetTimeoutError, RayError):
        ray.cancel(ref, force=True)
        return None
    return found


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
    # Without an address Ray would join whatever cluster last wrote its own into a file on this machine, alive or not.
    address = executor.address or os.environ.get("RAY_ADDRESS") or "local"
    # Ray reads these once, when it starts: no usage report over the network, and quiet workers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "1")
    # Large tensors in large pages, in driver and replicas: being given 100 MB in small ones takes longer than to add them up.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options["include_dashboard"] = False
    try:
        ray.init(address=address, **options)
    except SystemExit:  # how Ray takes a SIGTERM while it starts
        raise KeyboardInterrupt from None
    except Exception as error:  # Ray raises plain ones, too; whatever it is, there is no cluster
        where = "start a local Ray cluster" if address == "local" else f"join the Ray cluster at {address}"
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
    """Let the first Ctrl-C or SIGTERM call ``stop`` and the second one raise KeyboardInterrupt; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        for each in before:
            signal.signal(each, signal.default_int_handler)
        stop()
        again = "Ctrl-C again stops" if number == signal.SIGINT else "SIGTERM or Ctrl-C stops"
        on_event(Event(kind="note", data={"text": f"stopping after this round; {again} at once"}))

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
