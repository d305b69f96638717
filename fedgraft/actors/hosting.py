"""What hosts promise, whether they are Ray actors or this process. Nothing here knows what is hosted.

A pool builds one hosted object a replica and maps named calls over items. Each call gives a small result, which comes to the
caller, and a large one, which stays where it was made until it is fetched by its handle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

__all__ = ["Finished", "JobContext", "LostResult", "Pool", "PoolOptions"]


class LostResult(Exception):
    """A large result is gone, e.g. with the node that held it; the call that made it must be run again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PoolOptions:
    """How replicas are made: their number, threads and GPUs each, and the waits in seconds with their settings' names."""

    replicas: int
    threads: int = 1
    gpus_per_replica: float = 0.0
    max_failures: int = 3
    task_timeout_s: float = 3600.0
    start_timeout_s: float = 300.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """One call of a map: the item's place, and its small result and handle, or the error after the last try.

    ``num_tries`` counts how often the call was started; ``replica`` says who finished it.
    """

    index: int
    value: Any = None
    handle: Any = None
    error: str | None = None
    num_tries: int = 1
    replica: int = 0


class Pool(Protocol):
    """Replicas that host one object each."""

    size: int

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, in place of what was there; the same factory restores a dead one."""

    def call(self, name: str) -> list[Any]:
        """Run ``hosted.name()`` on every replica and give the results in replica order."""

    def share(self, value: Any) -> Any:
        """Put a value once for all replicas and give what ``map`` takes as ``shared``."""

    def map(self, name: str, items: Sequence[Any], shared: Any) -> Iterator[Finished]:
        """Run ``hosted.name(item, shared value)`` for every item, wherever a replica is free, in completion order.

        The hosted method returns a pair: the small and the large result.
        """

    def fetch(self, handle: Any) -> Any:
        """Give a large result.

        Raises:
            LostResult: It is gone.
        """

    def close(self) -> None:
        """End every replica."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JobContext:
    """What a job gets from whoever runs it: a way to report, to open a pool, and to learn that it should stop."""

    emit: Callable[[Any], None]
    open_pool: Callable[[PoolOptions], Pool]
    is_stopping: Callable[[], bool]
