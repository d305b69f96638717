"""What hosts promise, whether they are Ray actors or this process. Nothing here knows what is hosted.

A pool builds one hosted object a replica and maps named calls over items. Each call gives a small result, which comes to the
caller, and a large one, which stays where it was made until it is fetched by its handle, or until ``map`` is called with
another shared value.

A replica may be several processes, its ranks. Each hosts an object of its own and all run the same calls in the same order;
rank 0 leads, and its results are the replica's. They find each other through the environment variables ``RANK``,
``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``, and they live and die together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

__all__ = ["Fetch", "Finished", "ItemOf", "JobContext", "LostResult", "LostShared", "Note", "Pool", "PoolOptions"]

Note = Callable[[str], None]
"""Takes one sentence that the user should read."""


class LostResult(Exception):
    """A large result is gone, e.g. with the node that held it; the call that made it must be run again."""


Fetch: TypeAlias = Callable[[int], Any]
"""Gives the large result of one of the handles that a call was given."""


class LostShared(Exception):
    """A replica could not get the shared value of a call any more; it must be put again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolOptions:
    """How replicas are made: their number, ranks, threads of a rank, GPUs of a replica, and the waits in seconds.

    ``rank_grace_s``: how long the other ranks of a call may take after the first one has ended it. ``heartbeat_timeout_s``: how
    long a rank may give no sign of life while it works; a quarter of it is spent between two signs, so a rank that cannot answer
    for three quarters of it (a long call in C that holds Python's lock, a busy machine) is never taken for a frozen one.
    ``in_group``: every rank takes a bundle of the placement group that the caller is in, instead of what is free on the cluster.
    ``placement``: ``spread`` over as many nodes as there are, ``pack`` onto as few; ``None``: wherever Ray puts them.
    ``inline_bytes``: results up to this come to the caller, as Ray sends those of up to 100 KiB. ``keep_s_per_byte``: a larger
    one that took no more than so many seconds a byte stays in its maker's memory and goes with it, as to put it into the object
    store takes 1 s a GB; one that took longer goes there and outlives its maker.
    """

    replicas: int
    ranks: int = 1
    threads: int = 1
    gpus_per_replica: float = 0.0
    max_failures: int = 3
    task_timeout_s: float = 3600.0
    start_timeout_s: float = 300.0
    rank_grace_s: float = 60.0
    heartbeat_timeout_s: float = 60.0
    in_group: bool = False
    placement: str | None = None
    inline_bytes: int = 64 << 10
    keep_s_per_byte: float = 20e-9


@dataclass(frozen=True, slots=True)
class ItemOf:
    """The handle of one part of a large result that is a list: ``fetch`` gives its item ``place``."""

    handle: Any
    place: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One call of a map: the item's place, and its small result and handle, or the error after the last try.

    ``num_tries`` counts how often the call was started; ``replica`` says who finished it. ``followers`` are the small results
    of the other ranks. ``lost`` are the places of handles whose results are gone: ``error`` is set then, and no retry was made.
    """

    index: int
    value: Any = None
    handle: Any = None
    error: str | None = None
    num_tries: int = 1
    replica: int = 0
    followers: tuple[Any, ...] = ()
    lost: tuple[int, ...] = ()


class Pool(Protocol):
    """Replicas that host one object each. Results of up to ``inline_bytes`` come to the caller with the small ones."""

    inline_bytes: int

    @property
    def size(self) -> int:
        """Replicas there are now; fewer than at the start once the cluster has no room to replace a lost one."""

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, in place of what was there; the same factory restores a dead one.

        An object that has a method ``close`` is closed before another one takes its place.
        """

    def call(self, name: str) -> list[Any]:
        """Run ``hosted.name()`` on every replica and give the results in replica order."""

    def share(self, value: Any) -> Any:
        """Put a value once for all replicas and give what ``map`` takes as ``shared``."""

    def map(
        self,
        name: str,
        items: Sequence[Any],
        shared: Any,
        *,
        group: int = 1,
        homes: Sequence[int] | None = None,
        may_move: bool = True,
        last: tuple[str, Sequence[Any]] | None = None,
    ) -> Iterator[Finished]:
        """Run ``hosted.name(item, shared value)`` for every item, wherever a replica is free, in completion order.

        The hosted method returns a pair: the small and the large result. Items are begun in the order given; ``group`` of them
        are sent to a replica at once, which saves the way there and back where each is short. ``homes`` names the replica,
        0 <= home < ``size``, that had best run each item, as its large result will be asked for there: it takes its own items
        first and, once it has none left and they ``may_move``, those of others. ``last`` names another method and items for it
        that replicas run when nothing else is left for them; they are numbered after ``items``.
        """

    def apply(
        self,
        function: Callable[[Any, Fetch], tuple[Any, Any]],
        items: Sequence[Any],
        handles: Sequence[Sequence[Any]],
        *,
        homes: Sequence[int] | None = None,
    ) -> Iterator[Finished]:
        """Run ``function(item, fetch)`` for every item in the process of a replica that is free, in completion order.

        Args:
            function: Can be imported there. Returns a pair as a hosted method does. ``fetch(i)`` gives it the large result of
                the item's handle i, which it must not write to.
            items: One a call.
            handles: Of large results, for each item.
            homes: The replica of each item, where most of its large results lie; no other one takes it.
        """

    def fetch(self, handle: Any) -> Any:
        """Give a large result, or a ``ItemOf`` of one.

        Raises:
            LostResult: It is gone.
        """

    def close(self) -> None:
        """End every replica; a hosted object with a method ``end`` is asked to leave first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobContext:
    """What a job gets from whoever runs it: a way to report, to open a pool, and to learn that it should stop.

    A pool notes in plain words what became of its replicas, where a user should know.
    """

    emit: Callable[[Any], None]
    open_pool: Callable[[PoolOptions, Note], Pool]
    is_stopping: Callable[[], bool]
