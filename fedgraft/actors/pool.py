"""The pool of actors: calls go to whichever replica is free; one that dies, hangs or freezes costs a retry, never a result.

No polling: the pool waits on the results themselves and on signs of life, each wait with a limit that has a name. A call whose
replica was lost is run again on another one, from the same item, after the lost replica has been replaced.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from fedgraft.actors.calls import CallQueue
from fedgraft.actors.fleet import Fleet, brief, cause_of
from fedgraft.actors.heartbeat import Heartbeats
from fedgraft.actors.hosting import Fetch, Finished, ItemOf, LostResult, LostShared, Note, PoolOptions
from fedgraft.actors.replica import Kept, Large, LostHandle, Replica, Shared
from fedgraft.actors.tensors import share_tensors
from fedgraft.errors import BudgetViolation, ClusterError, GroupViolation, ReplicaError, StorageError

__all__ = ["RayPool"]

_log = logging.getLogger(__name__)

_FINAL = (BudgetViolation, GroupViolation, StorageError)
"""What no retry mends: a broken promise, a full disk."""
_MAX_PUTS = 3
"""How often a shared value is put again before its loss counts as the failure of a try."""


@dataclass(kw_only=True, slots=True)
class _Flight:
    """A call that is under way: on which items, on which replica, until when, and the references of its results.

    ``waiting`` are the ranks' small results that are not there yet, by reference; ``values`` those that are, by rank.
    ``error`` is what ended it before its end, ``was_lost`` whether that was the loss of the shared value, ``lost`` the places of
    handles that it needed and that are gone. ``leader`` is the actor that keeps large results which are not in the store.
    """

    items: tuple[int, ...]
    replica: int
    leader: Any
    handles: Sequence[Any]
    deadline: float
    limit: str
    waiting: dict[Any, int]
    values: dict[int, Any] = field(default_factory=dict)
    error: str | None = None
    was_lost: bool = False
    lost: tuple[int, ...] = ()

    @property
    def is_over(self) -> bool:
        return self.error is not None or not self.waiting


_Start: TypeAlias = Callable[[tuple[int, ...], Replica], tuple[list[Any], Sequence[Any]]]
"""Starts a call on some items in a replica; gives the reference of each rank's small results, and of each item's large one."""


@dataclass(slots=True)
class _Put:
    """A shared value and where it lies in the object store now. Stays with the caller; replicas get the place only."""

    value: Any
    place: Shared
    num_puts: int = 1


class RayPool:
    """See ``fedgraft.actors.hosting.Pool``.

    Args:
        options: Number of replicas, what each gets, and the limits.
        note: Gets what a user should know; without it, it goes to the log.
        may_shrink: Begin with fewer replicas where the cluster has no room for all, instead of refusing.

    Raises:
        ClusterError: The cluster cannot give the replicas, said before waiting, or they do not start in time.
    """

    def __init__(self, options: PoolOptions, note: Note | None = None, *, may_shrink: bool = False) -> None:
        share_tensors()
        self._options = options
        self.inline_bytes = options.inline_bytes
        self._fleet = Fleet(options, note or _log.warning, may_shrink=may_shrink)
        self._beats = Heartbeats(options.heartbeat_timeout_s)

    @property
    def size(self) -> int:
        """Replicas there are now."""
        return len(self._fleet.replicas)

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, side by side; one that died meanwhile is replaced."""
        before = dict(self._fleet.replicas)
        self._fleet.host(factory)
        for position, replica in before.items():
            if self._fleet.replicas.get(position) is not replica:
                self._beats.forget(position)

    def call(self, name: str) -> list[Any]:
        """Run a method without arguments on every replica; one that is lost meanwhile is replaced and asked again, once."""
        self._beats.rest_all()
        flights = [self._ask(name, position) for position in self._fleet.replicas]
        results: dict[int, Any] = {}
        asked_again: set[int] = set()
        while flights:
            flight = self._next(flights)
            if not flight.is_over:
                continue
            flights.remove(flight)
            position = flight.replica
            if flight.error is None:
                results[position] = flight.values[0]
            elif position in asked_again:
                raise ClusterError(
                    f"replica {position} does not answer: {flight.error}", "fedgraft doctor --full examines this machine"
                )
            elif position in self._fleet.replicas:
                asked_again.add(position)
                flights.append(self._ask(name, position))
        return [results[position] for position in sorted(results)]

    def _ask(self, name: str, position: int) -> _Flight:
        return self._take_off((), position, self._fleet.replicas[position].call(name), ())

    def share(self, value: Any) -> _Put:
        """Put a value into the object store.

        Raises:
            ClusterError: The store and the disk that it spills to are full.
        """
        return _Put(value, _put(value))

    def map(
        self,
        name: str,
        items: Sequence[Any],
        shared: _Put,
        *,
        group: int = 1,
        homes: Sequence[int] | None = None,
        may_move: bool = True,
        last: tuple[str, Sequence[Any]] | None = None,
    ) -> Iterator[Finished]:
        """Run the items on whichever replica is free; at most one call is under way on each."""

        def start(indices: tuple[int, ...], replica: Replica) -> tuple[list[Any], Sequence[Any]]:
            if indices[0] >= len(items):
                assert last is not None
                return replica.run(last[0], [last[1][index - len(items)] for index in indices], shared.place)
            return replica.run(name, [items[index] for index in indices], shared.place)

        queue = self._queue(len(items), group, homes, may_move, num_last=0 if last is None else len(last[1]))
        return self._each(queue, start, shared)

    def apply(
        self,
        function: Callable[[Any, Fetch], tuple[Any, Any]],
        items: Sequence[Any],
        handles: Sequence[Sequence[Any]],
        *,
        homes: Sequence[int] | None = None,
    ) -> Iterator[Finished]:
        """Run a function in the leaders of whichever replicas are free."""

        def start(indices: tuple[int, ...], replica: Replica) -> tuple[list[Any], Sequence[Any]]:
            (index,) = indices
            return replica.apply(function, items[index], Large(tuple(handles[index])))

        return self._each(self._queue(len(items), 1, homes, may_move=False), start, None)

    def _queue(self, count: int, group: int, homes: Sequence[int] | None, may_move: bool, *, num_last: int = 0) -> CallQueue:
        """Calls on ``count`` items, ``group`` of one home together, then on ``num_last`` one by one."""
        positions = sorted(self._fleet.replicas)
        named = None if homes is None else [positions[home] for home in homes]
        return CallQueue(count, group, named, may_move=may_move, num_last=num_last)

    def _each(self, queue: CallQueue, start: _Start, shared: _Put | None) -> Iterator[Finished]:
        self._beats.rest_all()  # of calls that nobody waits for any more
        tries, failures = [0] * queue.count, [0] * queue.count
        idle = deque(self._fleet.replicas)
        flights: list[_Flight] = []
        while queue or flights:
            for position in list(idle):
                indices = queue.take(position, self._fleet.replicas)
                if indices is None:
                    continue
                idle.remove(position)
                for index in indices:
                    tries[index] += 1
                refs, handles = start(indices, self._fleet.replicas[position])
                flights.append(self._take_off(indices, position, refs, handles))
            flight = self._next(flights)
            if not flight.is_over:
                continue  # other ranks of the call are still at it
            flights.remove(flight)
            if flight.replica in self._fleet.replicas:
                idle.append(flight.replica)
            if flight.error is None:
                yield from self._finished(flight, tries)
                continue
            was_put = flight.was_lost and shared is not None and self._put_again(shared)
            if len(flight.items) > 1:
                # Nobody knows whose fault it was: each is run again by itself, and only then counted.
                _log.warning("a call on %d items failed (%s); they are run again one by one", len(flight.items), flight.error)
                queue.put_back(flight.items)
                continue
            (index,) = flight.items
            if flight.lost:
                yield Finished(index=index, error=flight.error, num_tries=tries[index], replica=flight.replica, lost=flight.lost)
                continue
            if not was_put:
                failures[index] += 1
            if failures[index] < self._options.max_failures:
                _log.warning("try %d of item %d failed (%s); it is run again", tries[index], index, flight.error)
                queue.put_back((index,))
            else:
                yield Finished(index=index, error=flight.error, num_tries=tries[index], replica=flight.replica)

    def _finished(self, flight: _Flight, tries: Sequence[int]) -> Iterator[Finished]:
        followers = [flight.values[rank] for rank in sorted(flight.values) if rank]
        for place, index in enumerate(flight.items):
            value, key = flight.values[0][place]
            yield Finished(
                index=index,
                value=value,
                handle=flight.handles[place] if key is None else Kept(flight.leader, key),
                num_tries=tries[index],
                replica=flight.replica,
                followers=tuple(values[place][0] for values in followers),
            )

    def _put_again(self, shared: _Put) -> bool:
        """Put a shared value that a replica could not find; false where that has not helped often enough."""
        if shared.num_puts > _MAX_PUTS:
            return False
        shared.place = _put(shared.value)
        shared.num_puts += 1
        return True

    def _take_off(self, items: tuple[int, ...], position: int, refs: Sequence[Any], handles: Sequence[Any]) -> _Flight:
        limit = self._options.task_timeout_s * max(len(items), 1)
        self._beats.watch(position, self._fleet.replicas[position])
        return _Flight(
            items=items,
            replica=position,
            leader=self._fleet.replicas[position].leader,
            handles=handles,
            deadline=time.monotonic() + limit,
            limit=f"federation.task_timeout_s = {limit:.0f} s",
            waiting={ref: rank for rank, ref in enumerate(refs)},
        )

    def _next(self, flights: list[_Flight]) -> _Flight:
        """Wait for the next result of any call, for the earliest deadline, or for a replica that freezes; give its call."""
        while True:
            first = min(flights, key=lambda flight: flight.deadline)
            frozen_at, frozen = self._beats.first() or (first.deadline, first.replica)
            beats = self._beats.refs()
            results = {ref: flight for flight in flights for ref in flight.waiting}
            until = min(first.deadline, frozen_at)
            # Results come first in the list, so that a beat never keeps one waiting.
            done, _ = ray.wait([*results, *beats], num_returns=1, timeout=max(until - time.monotonic(), 0.0))
            if done and done[0] in beats:
                self._beats.take(done[0])
                continue
            if done:
                flight = results[done[0]]
                self._take(flight, done[0])
            elif frozen_at < first.deadline:
                flight = next(flight for flight in flights if flight.replica == frozen)
                limit = self._options.heartbeat_timeout_s
                self._fail(flight, f"no sign of life for executor.heartbeat_timeout_s = {limit:.0f} s")
            else:
                flight = first
                self._fail(flight, f"no answer within {first.limit}")
            if flight.is_over:
                self._beats.rest(flight.replica)
            return flight

    def _take(self, flight: _Flight, ref: Any) -> None:
        """Take the result of one rank, or what became of it."""
        rank = flight.waiting.pop(ref)
        try:
            flight.values[rank] = ray.get(ref)
        except RayTaskError as raised:
            cause = cause_of(raised)
            if isinstance(cause, _FINAL):
                raise cause from None
            if not flight.items:
                raise cause from None  # of ``call``: what every replica is asked has no other one to try
            flight.was_lost = isinstance(raised.cause, LostShared)
            flight.lost = raised.cause.places if isinstance(raised.cause, LostHandle) else ()
            # The ranks of a replica may wait for each other, and a replica may say itself that it cannot go on.
            is_broken = (self._options.ranks > 1 and not flight.lost) or isinstance(cause, ReplicaError)
            self._fail(flight, f"{type(cause).__name__}: {cause}", is_broken=is_broken)
            return
        except RayError as raised:
            # Dead actor, dead node, memory monitor, lost object: whatever it was, a new replica runs the item again.
            self._fail(flight, f"replica {flight.replica} died: {brief(raised)}")
            return
        grace = self._options.rank_grace_s
        if flight.waiting and time.monotonic() + grace < flight.deadline:
            # Ranks work in step: one that is alone for long waits for something that will never come.
            flight.deadline = time.monotonic() + grace
            flight.limit = f"executor.rank_grace_s = {grace:.0f} s after another rank of the same replica had ended"

    def _fail(self, flight: _Flight, error: str, *, is_broken: bool = True) -> None:
        """End a call with an error; a broken replica is replaced."""
        flight.error = error
        if is_broken:
            self._beats.forget(flight.replica)
            self._fleet.replace(flight.replica, error)

    def fetch(self, handle: Any) -> Any:
        """Fetch a large result from the object store, or from who keeps it."""
        if isinstance(handle, ItemOf):
            return self.fetch(handle.handle)[handle.place]
        try:
            ref = handle.maker.give.remote(handle.key) if isinstance(handle, Kept) else handle
            return ray.get(ref, timeout=self._options.task_timeout_s)
        except RayError as error:
            raise LostResult(str(error)) from error

    def close(self) -> None:
        """End every replica's process; one that does not answer at once is not waited for."""
        self._fleet.close()


def _put(value: Any) -> Shared:
    try:
        return Shared(ray.put(value))
    except (ObjectStoreFullError, OutOfDiskError) as error:
        raise ClusterError(
            f"the object store has no room for what clients are sent: {brief(error)}",
            "free memory and the disk that Ray spills to (under its temporary folder)",
        ) from error
