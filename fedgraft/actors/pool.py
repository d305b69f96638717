"""Replicas as Ray actors: started once, side by side, and reused; restarted when they die.

No polling: the pool waits on the results themselves, each wait with a limit that has a name. A call whose replica died or ran
past its deadline is run again on another one, from the same item, after the dead replica has been restored.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.actors.replica import Shared, start_replicas
from fedgraft.errors import BudgetViolation, ClusterError, FedgraftError, GroupViolation, ReplicaError

__all__ = ["RayPool"]

_log = logging.getLogger(__name__)
_END_S = 5.0
"""Longest wait for replicas to leave in good order; whatever they hold is gone with their processes anyway."""


@dataclass(kw_only=True, slots=True)
class _Flight:
    """A call that is under way: which item, on which replica, until when, and the references of its results.

    ``waiting`` are the ranks' small results that are not there yet, by reference; ``values`` those that are, by rank.
    """

    index: int
    replica: int
    handle: Any
    deadline: float
    limit: str
    waiting: dict[Any, int]
    values: dict[int, Any] = field(default_factory=dict)


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
        self._replicas = start_replicas(options, options.replicas)

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, side by side; one that died meanwhile is replaced."""
        self._factory = factory
        started = [replica.host(factory) for replica in self._replicas]
        for position, refs in enumerate(started):
            try:
                self._await_host(position, refs)
            except ClusterError as error:
                _log.warning("replica %d is replaced: %s", position, error.message)
                self._restore(position)

    def _await_host(self, position: int, refs: list[Any]) -> None:
        limit = self._options.start_timeout_s
        try:
            ray.get(refs, timeout=limit)
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
        started = [replica.call(name) for replica in self._replicas]
        return [self._await_call(position, name, refs) for position, refs in enumerate(started)]

    def _await_call(self, position: int, name: str, refs: list[Any]) -> Any:
        limit = self._options.task_timeout_s
        try:
            return ray.get(refs, timeout=limit)[0]
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError:
            self._restore(position)
        try:
            return ray.get(self._replicas[position].call(name), timeout=limit)[0]
        except RayTaskError as error:
            raise _cause(error) from None
        except RayError as error:
            raise ClusterError(
                f"replica {position} does not answer: {_brief(error)}", "fedgraft doctor --full examines this machine"
            ) from error

    def share(self, value: Any) -> Shared:
        """Put a value into the object store."""
        return Shared(ray.put(value))

    def map(self, name: str, items: Sequence[Any], shared: Shared) -> Iterator[Finished]:
        """Run the items on whichever replica is free; at most one call is under way on each."""
        queue = deque(range(len(items)))
        tries = [0] * len(items)
        idle = deque(range(self.size))
        flights: list[_Flight] = []
        while queue or flights:
            while queue and idle:
                index, replica = queue.popleft(), idle.popleft()
                tries[index] += 1
                flights.append(self._start(name, index, replica, items[index], shared))
            flight, error = self._next(flights)
            if flight.waiting and error is None:
                continue  # other ranks of the call are still at it
            flights.remove(flight)
            idle.append(flight.replica)
            if error is None:
                yield Finished(
                    index=flight.index,
                    value=flight.values[0],
                    handle=flight.handle,
                    num_tries=tries[flight.index],
                    replica=flight.replica,
                    followers=tuple(flight.values[rank] for rank in range(1, self._options.ranks)),
                )
            elif tries[flight.index] < self._options.max_failures:
                _log.warning("try %d of item %d failed (%s); it is run again", tries[flight.index], flight.index, error)
                queue.appendleft(flight.index)
            else:
                yield Finished(index=flight.index, error=error, num_tries=tries[flight.index], replica=flight.replica)

    def _start(self, name: str, index: int, replica: int, item: Any, shared: Shared) -> _Flight:
        refs, handle = self._replicas[replica].run(name, item, shared)
        limit = self._options.task_timeout_s
        return _Flight(
            index=index,
            replica=replica,
            handle=handle,
            deadline=time.monotonic() + limit,
            limit=f"federation.task_timeout_s = {limit:.0f} s",
            waiting={ref: rank for rank, ref in enumerate(refs)},
        )

    def _next(self, flights: list[_Flight]) -> tuple[_Flight, str | None]:
        """Wait for the next result of any call, or for the earliest deadline; give its call, and the error that ended it."""
        first = min(flights, key=lambda flight: flight.deadline)
        refs = {ref: flight for flight in flights for ref in flight.waiting}
        done, _ = ray.wait(list(refs), num_returns=1, timeout=max(first.deadline - time.monotonic(), 0.0))
        if not done:
            self._restore(first.replica)
            return first, f"no answer within {first.limit}"
        flight = refs[done[0]]
        rank = flight.waiting.pop(done[0])
        try:
            flight.values[rank] = ray.get(done[0])
        except RayTaskError as raised:
            cause = _cause(raised)
            if isinstance(cause, GroupViolation | BudgetViolation):
                raise cause from None  # no retry mends a broken promise
            if self._options.ranks > 1 or isinstance(cause, ReplicaError):
                self._restore(flight.replica)  # its ranks may wait for each other, or it says itself that it cannot go on
            return flight, f"{type(cause).__name__}: {cause}"
        except RayError as raised:
            # Dead actor, dead node, memory monitor, lost object: whatever it was, a new replica runs the item again.
            self._restore(flight.replica)
            return flight, f"replica {flight.replica} died: {_brief(raised)}"
        grace = self._options.rank_grace_s
        if flight.waiting and time.monotonic() + grace < flight.deadline:
            # Ranks work in step: one that is alone for long waits for something that will never come.
            flight.deadline = time.monotonic() + grace
            flight.limit = f"executor.rank_grace_s = {grace:.0f} s after another rank of the same replica had ended"
        return flight, None

    def _restore(self, position: int) -> None:
        """Replace a dead or hung replica, all its ranks, and give the new one what the others host."""
        self._replicas[position].kill()
        self._replicas[position] = start_replicas(self._options, 1)[0]
        if self._factory is not None:
            self._await_host(position, self._replicas[position].host(self._factory))

    def fetch(self, handle: Any) -> Any:
        """Fetch a large result from the object store."""
        try:
            return ray.get(handle, timeout=self._options.task_timeout_s)
        except RayError as error:
            raise LostResult(str(error)) from error

    def close(self) -> None:
        """End every replica's process; one that does not answer at once is not waited for."""
        ended = [ref for replica in self._replicas for ref in replica.end()]
        ray.wait(ended, num_returns=len(ended), timeout=_END_S)
        for replica in self._replicas:
            replica.kill()
        self._replicas = []


def _cause(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised, if it is one of ours, else Ray's wrapping of it."""
    cause = error.cause if isinstance(error.cause, Exception) else error
    return cause if isinstance(cause, FedgraftError) else error


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _check_resources(options: PoolOptions) -> None:
    """Refuse what no cluster of this size can give, instead of waiting for it forever."""
    total = ray.cluster_resources()
    cpus = options.replicas * options.ranks * options.threads
    for kind, wanted in (("CPU", cpus), ("GPU", options.replicas * options.gpus_per_replica)):
        has = float(total.get(kind, 0.0))
        if wanted > has:
            ranks = f" of {options.ranks} ranks each" if options.ranks > 1 else ""
            raise ClusterError(
                f"{options.replicas} replicas{ranks} want {wanted:g} {kind}s; the cluster has {has:g}",
                "lower executor.replicas, executor.threads, engine.world_size or executor.gpus_per_replica, or join a larger "
                "cluster",
            )
