"""Jobs whose driver outlives the command that began them: begun, listed, followed and stopped by an id, on a running cluster.

Such a driver is a detached actor: it has a name, belongs to nobody, and ends itself a while after its job's end. Its job is an
experiment's folder, so whatever lasts is in there, and only who wants to see it live needs the actor.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from fedgraft.actors.driver import About, Driver
from fedgraft.actors.fleet import brief
from fedgraft.actors.hosting import JobContext
from fedgraft.errors import ClusterError, ConfigError, FedgraftError, Problem, RunInterrupted
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import Follower, cluster, driver_options, end_driver

__all__ = ["Detached", "begin", "find_cluster", "follow", "list_detached", "stop"]

_NAMESPACE = "fedgraft"
_LINGERS_S = 30.0
"""How long a driver stays after its job's end; a follower asks every few seconds at the latest."""
_ANSWER_S = 20.0
"""Longest wait for one driver's word about its job."""
_NUM_EVENTS = 40
"""So many of the last events hold the last round's, whatever was evaluated since."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Detached:
    """A driver that was found on the cluster, and what it tells; ``about`` is ``None`` where it does not answer."""

    name: str
    about: About | None

    @property
    def status(self) -> str:
        """In one word."""
        if self.about is None:
            return "silent"
        return "over" if self.about.is_over else "stopping" if self.about.is_stopping else "running"


def find_cluster(executor: ExecutorConfig) -> ExecutorConfig:
    """The same executor with the address of a cluster that outlives this command.

    Raises:
        ConfigError: It is no matter of a cluster.
        ClusterError: None is named, and this process is in none.
    """
    if executor.kind == "in_process":
        problem = Problem(path="executor.kind", value="in_process", expected="ray, for a run that goes on without its command")
        raise ConfigError("--detach", (problem,))
    address = executor.address or os.environ.get("RAY_ADDRESS")
    if address == "local" or (not address and not ray.is_initialized()):
        raise ClusterError(
            "no running Ray cluster is named, and one of this command's own would end with it",
            "start one with: ray start --head; then name it: --address 127.0.0.1:6379, or RAY_ADDRESS=127.0.0.1:6379",
        )
    return executor.model_copy(update={"address": address})


def begin(name: str, job: Callable[[JobContext], Any], executor: ExecutorConfig, facts: Mapping[str, Any]) -> None:
    """Begin a job under a name and leave it to the cluster.

    Args:
        name: Nobody else's on the cluster.
        job: As for ``fedgraft.platform.launch.launch``.
        executor: As ``find_cluster`` gives it.
        facts: What others will be told of it.

    Raises:
        ClusterError: There is no such cluster, the driver does not start, or a job of this name is under way.
    """
    with cluster(executor):
        _make_way(name)
        options = driver_options() | {"name": name, "namespace": _NAMESPACE, "lifetime": "detached"}
        driver = ray.remote(Driver).options(**options).remote(job, facts=facts, lingers_s=_LINGERS_S)
        try:
            ray.get(driver.about.remote(0), timeout=executor.start_timeout_s)
        except (RayError, GetTimeoutError) as error:
            end_driver(driver)
            raise ClusterError(
                f"the driver actor did not start: {str(error).strip().splitlines()[-1]}",
                "see that fedgraft is installed on every node; executor.start_timeout_s is the longest wait",
            ) from error


def list_detached(executor: ExecutorConfig) -> list[Detached]:
    """Find all drivers that were left to the cluster, by name."""
    with cluster(executor):
        names = sorted(
            each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == _NAMESPACE
        )
        asked: dict[str, Any] = {}
        for name in names:
            try:
                asked[name] = ray.get_actor(name, namespace=_NAMESPACE).about.remote(_NUM_EVENTS)
            except ValueError:
                continue  # it has ended since
        if asked:
            ray.wait(list(asked.values()), num_returns=len(asked), timeout=_ANSWER_S)
        return [Detached(name=name, about=_answer(ref)) for name, ref in asked.items()]


def follow(name: str, executor: ExecutorConfig, on_event: Callable[[Any], None], on_facts: Callable[[Any], None]) -> Any:
    """Hand over a job's events, all from its beginning, until it is over; gives its result.

    ``on_facts`` gets the facts that it was begun with before its first event.

    Raises:
        FedgraftError: Whatever the job raised.
        ClusterError: There is no such job, or its driver died too often.
        RunInterrupted: Ctrl-C here; the job goes on.
    """
    with cluster(executor):
        driver = _driver(name)
        try:
            on_facts(_ask(driver, name).facts)
            follower = Follower(driver, on_event, silence_s=executor.heartbeat_s, start_timeout_s=executor.start_timeout_s)
            return follower.follow()
        except KeyboardInterrupt:
            raise RunInterrupted(
                f"left {name}, which goes on", f"look again: fedgraft attach {name}; end it: fedgraft stop {name}"
            ) from None


def stop(name: str, executor: ExecutorConfig, on_event: Callable[[Any], None], *, is_at_once: bool) -> Mapping[str, Any]:
    """Ask a job to end after its round and wait until it has, or end it at once; gives the facts that it was begun with.

    Raises:
        FedgraftError: It ended with another error than by being stopped.
        ClusterError: There is no such job.
    """
    with cluster(executor):
        driver = _driver(name)
        if is_at_once:
            try:
                facts = _ask(driver, name).facts
            except ClusterError:
                facts = {}  # that it does not answer is a reason to end it
            end_driver(driver)
            return facts
        facts = _ask(driver, name).facts
        follower = Follower(driver, on_event, silence_s=executor.heartbeat_s, start_timeout_s=executor.start_timeout_s)
        follower.stop()
        try:
            follower.follow()
        except RunInterrupted:
            pass
        finally:
            end_driver(driver)
        return facts


def _names() -> list[str]:
    return sorted(each["name"] for each in ray.util.list_named_actors(all_namespaces=True) if each["namespace"] == _NAMESPACE)


def _make_way(name: str) -> None:
    """Take away a driver whose job is over and that only lingers.

    Raises:
        ClusterError: A job of this name is under way.
    """
    try:
        driver = ray.get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        return
    if not _ask(driver, name).is_over:
        raise ClusterError(f"{name} is under way on this cluster", f"fedgraft attach {name}, or fedgraft stop {name}")
    end_driver(driver)
    deadline = time.monotonic() + _ANSWER_S
    while name in _names():
        if time.monotonic() > deadline:
            raise ClusterError(f"the driver of {name}, which is over, does not end", f"fedgraft stop --now {name}")
        time.sleep(0.1)


def _driver(name: str) -> Any:
    try:
        return ray.get_actor(name, namespace=_NAMESPACE)
    except ValueError:
        known = _names()
        raise ClusterError(
            f"no run {name!r} is under way on this cluster; there {'are ' + ', '.join(known) if known else 'is none'}",
            "one that is over is in its folder: fedgraft report FOLDER, or fedgraft run --resume FOLDER to go on",
        ) from None


def _ask(driver: Any, name: str) -> About:
    try:
        found: About = ray.get(driver.about.remote(_NUM_EVENTS), timeout=_ANSWER_S)
    except (RayError, GetTimeoutError) as error:
        raise ClusterError(
            f"the driver of {name} does not answer: {brief(error)}",
            f"fedgraft stop --now {name} ends it; it can be resumed",
        ) from error
    return found


def _answer(ref: Any) -> About | None:
    try:
        found: About = ray.get(ref, timeout=0)
    except (RayError, GetTimeoutError, FedgraftError):
        return None
    return found
