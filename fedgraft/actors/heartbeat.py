"""Signs of life: whether a rank that works is busy or frozen.

A beat is a call that a rank answers after a while, in a thread beside the one that works. One is under way for every rank of a
replica that works, and whoever waits for results waits for the beats, too. Nothing polls.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import ray
from ray.exceptions import RayError

__all__ = ["Beating", "Heartbeats"]


class Beating(Protocol):
    """A replica that can be asked for signs of life."""

    def beat(self, rank: int, after_s: float) -> Any:
        """Ask a rank to answer after a while; gives a reference."""

    @property
    def num_ranks(self) -> int:
        """Ranks of the replica."""


class Heartbeats:
    """The beats under way.

    Args:
        timeout_s: A rank that works and is silent for so long counts as frozen. A quarter of it lies between two beats.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._beats: dict[tuple[int, int], tuple[Any, float]] = {}
        self._replicas: dict[int, Beating] = {}

    def watch(self, position: int, replica: Beating) -> None:
        """Begin to watch a replica that is given work; a beat of before may still be under way."""
        self._replicas[position] = replica
        for rank in range(replica.num_ranks):
            known = self._beats.get((position, rank))
            self._beats[position, rank] = (known[0] if known else self._ask(position, rank), time.monotonic())

    def rest(self, position: int) -> None:
        """Stop watching a replica that has nothing to do."""
        self._replicas.pop(position, None)

    def rest_all(self) -> None:
        """Stop watching."""
        self._replicas.clear()

    def forget(self, position: int) -> None:
        """Drop what is under way to a replica that is gone."""
        self.rest(position)
        for key in [key for key in self._beats if key[0] == position]:
            del self._beats[key]

    def refs(self) -> dict[Any, tuple[int, int]]:
        """References of the beats of all replicas that work, each with the replica's position and the rank."""
        return {ref: key for key, (ref, _) in self._beats.items() if key[0] in self._replicas}

    def take(self, ref: Any) -> None:
        """Take a beat that has come, and ask for the next one. A dead rank's is dropped: its results tell the same."""
        key = self.refs()[ref]
        try:
            ray.get(ref)
        except RayError:
            del self._beats[key]
            return
        self._beats[key] = (self._ask(*key), time.monotonic())

    def first(self) -> tuple[float, int] | None:
        """Give the time (of ``time.monotonic``) at which the next replica counts as frozen, and its position."""
        due = [(since + self._timeout_s, key[0]) for key, (_, since) in self._beats.items() if key[0] in self._replicas]
        return min(due, default=None)

    def _ask(self, position: int, rank: int) -> Any:
        return self._replicas[position].beat(rank, self._timeout_s / 4)
