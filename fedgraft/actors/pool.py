"""Replicas as Ray actors: started once, side by side, and reused; restarted when they die.

No polling: the pool waits on the results themselves, each wait with a limit that has a name. A call whose replica died or ran
past its deadline is run again on another one, from the same item, after the dead replica has been restored.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.errors import ClusterError, FedgraftError, GroupViolation

__all__ = ["RayPool", "Replica"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Shared:
    """A value in the object store. Wrapped, so that Ray does not fetch it anew for every call."""

    ref: Any


class Replica:
    """One replica: a process that hosts one object at a time. Made into an actor by ``RayPool``."""

    def __init__(self) -> None:
        self._hosted: Any = None
        self._shared: tuple[Any, Any] = (None, None)

    def host(self, factory: Callable[[], Any]) -> int:
        """Build the hosted object; gives the process id."""
        import os

        self._shared = (None, None)
        self._hosted = None
        self._hosted = factory()
        return os.getpid()

    def call(self, name: str) -> Any:
        """Run a method without arguments."""
        return getattr(self._hosted, name)()

    def run(self, name: str, item: Any, shared: _Shared) -> tuple[Any, Any]:
        """Run a method on an item; the shared value is fetched once and kept until another one comes."""
        if self._shared[0] != shared.ref:
            self._shared = (shared.ref, ray.get(shared.ref))
        small, large = getattr(self._hosted, name)(item, self._shared[1])
        return small, large


@dataclass(kw_only=True, slots=True)
class _Flight:
    """A call that is under way: which item, on which replica, since when, and the reference to its large result."""

    index: int
    replica: int
    handle: Any
    deadline: float


class RayPool:
    """See ``fedgraft.actors.hosting.Pool``.

    Args:
        options: Number of replicas, what each gets, and the limits.

    Raises:
        ClusterError: The cluster cannot give the replicas, said before waiting, or they do not start in time.
    """

    def __init__(self, options: PoolOptions) -> None:
        self.size = options.replicas
        self._options = options
        self._factory: Callable[[], Any] | None = None
        _check_resources(options)
        self._actors = [self._start() for _ in range(options.replicas)]

    def _start(self) -> Any:
        threads = str(self._options.threads)
        env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        actor = ray.remote(Replica).options(
            num_cpus=self._options.threads,
            num_gpus=self._options.gpus_per_replica,
            max_restarts=0,  # a restarted actor would be empty; the pool restores what it hosted
            runtime_env={"env_vars": env},
        )
        return actor.remote()

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, side by side; one that died meanwhile is replaced."""
        self._factory = factory
        refs = [actor.host.remote(factory) for actor in self._actors]
        for position, ref in enumerate(refs):
            try:
                self._await_host(position, ref)
            except ClusterError as error:
                _log.warning("replica %d is replaced: %s", position, error.message)
                self._restore(position)

    def _await_host(self, position: int, ref: Any) -> None:
        limit = self._options.start_timeout_s
        try:
            ray.get(ref, timeout=limit)
        except GetTimeoutError:
            raise ClusterError(
                f"replica {position} did not start within {limit:.0f} s",
                "raise executor.start_timeout_s, or ask for fewer replicas (executor.replicas)",
            ) from None
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise ClusterError(
                f"replica {position} died while it started: {_brief(error)}",
                "often too little memory: ask for fewer replicas (executor.replicas)",
            ) from error

    def call(self, name: str) -> list[Any]:
        """Run a method without arguments on every replica; one that died meanwhile is replaced and asked again."""
        refs = [actor.call.remote(name) for actor in self._actors]
        return [self._await_call(position, name, ref) for position, ref in enumerate(refs)]

    def _await_call(self, position: int, name: str, ref: Any) -> Any:
        limit = self._options.task_timeout_s
        try:
            return ray.get(ref, timeout=limit)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError:
            self._restore(position)
        try:
            return ray.get(self._actors[position].call.remote(name), timeout=limit)
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise ClusterError(
                f"replica {position} does not answer: {_brief(error)}", "fedgraft doctor --full examines this machine"
            ) from error

    def share(self, value: Any) -> _Shared:
        """Put a value into the object store."""
        return _Shared(ray.put(value))

    def map(self, name: str, items: Sequence[Any], shared: _Shared) -> Iterator[Finished]:
        """Run the items on whichever replica is free; at most one call is under way on each."""
        waiting = deque(range(len(items)))
        tries = [0] * len(items)
        idle = deque(range(self.size))
        flights: dict[Any, _Flight] = {}
        while waiting or flights:
            while waiting and idle:
                index, replica = waiting.popleft(), idle.popleft()
                tries[index] += 1
                run = self._actors[replica].run.options(num_returns=2)
                small, large = run.remote(name, items[index], shared)
                deadline = time.monotonic() + self._options.task_timeout_s
                flights[small] = _Flight(index=index, replica=replica, handle=large, deadline=deadline)
            next_deadline = min(flight.deadline for flight in flights.values())
            done, _ = ray.wait(list(flights), num_returns=1, timeout=max(next_deadline - time.monotonic(), 0.0))
            # Nothing by the earliest deadline: the call that it belongs to has run out of time.
            ref = done[0] if done else min(flights, key=lambda ref: flights[ref].deadline)
            flight = flights.pop(ref)
            error = None
            try:
                if not done:
                    raise GetTimeoutError
                value = ray.get(ref)
            except GetTimeoutError:
                error = f"no answer within federation.task_timeout_s = {self._options.task_timeout_s:.0f} s"
                self._restore(flight.replica)
            except RayTaskError as raised:
                cause = _cause(raised)
                if isinstance(cause, GroupViolation):
                    raise cause from None  # no retry mends a broken promise
                error = f"{type(cause).__name__}: {cause}"
            except RayError as raised:
                # Dead actor, dead node, memory monitor, lost object: whatever it was, a new replica runs the item again.
                error = f"replica {flight.replica} died: {_brief(raised)}"
                self._restore(flight.replica)
            idle.append(flight.replica)
            if error is None:
                yield Finished(
                    index=flight.index,
                    value=value,
                    handle=flight.handle,
                    num_tries=tries[flight.index],
                    replica=flight.replica,
                )
            elif tries[flight.index] < self._options.max_failures:
                _log.warning("try %d of item %d failed (%s); it is run again", tries[flight.index], flight.index, error)
                waiting.appendleft(flight.index)
            else:
                yield Finished(index=flight.index, error=error, num_tries=tries[flight.index], replica=flight.replica)

    def _restore(self, position: int) -> None:
        """Replace a dead or hung replica and give it what the others host."""
        ray.kill(self._actors[position])
        self._actors[position] = self._start()
        if self._factory is not None:
            self._await_host(position, self._actors[position].host.remote(self._factory))

    def fetch(self, handle: Any) -> Any:
        """Fetch a large result from the object store."""
        try:
            return ray.get(handle, timeout=self._options.task_timeout_s)
        except RayError as error:
            raise LostResult(str(error)) from error

    def close(self) -> None:
        """End every replica's process."""
        for actor in self._actors:
            ray.kill(actor)
        self._actors = []


def _cause(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised, if it is one of ours, else Ray's wrapping of it."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    return cause if isinstance(cause, FedgraftError) else error


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_resources(options: PoolOptions) -> None:
    """Refuse what no cluster of this size can give, instead of waiting for it forever."""
    total = ray.cluster_resources()
    for kind, wanted in (("CPU", options.replicas * options.threads), ("GPU", options.replicas * options.gpus_per_replica)):
        has = float(total.get(kind, 0.0))
        if wanted > has:
            raise ClusterError(
                f"{options.replicas} replicas want {wanted:g} {kind}s; the cluster has {has:g}",
                "lower executor.replicas, executor.threads or executor.gpus_per_replica, or join a larger cluster",
            )
