"""Which call a free replica begins next."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

__all__ = ["CallQueue"]


class CallQueue:
    """Calls on items that wait for a replica: in the order of the items, a replica's own before those of others.

    Args:
        count: Items, 0 to count - 1.
        group: How many items of one home go together in a call.
        homes: The replica that had best run each item; ``None``: whoever is free.
        may_move: Whoever has nothing left of its own takes what others wait for; else an item waits as long as its home is there.
        num_last: Items from ``count`` on, each a call by itself, that anybody begins who finds nothing else to do.
    """

    def __init__(
        self, count: int, group: int, homes: Sequence[int] | None = None, *, may_move: bool = True, num_last: int = 0
    ) -> None:
        self.count = count + num_last
        self._homes = homes
        self._may_move = may_move
        by_home: dict[int | None, list[int]] = {}
        for index in range(count):
            by_home.setdefault(self._home((index,)), []).append(index)
        calls = [tuple(own[first : first + group]) for own in by_home.values() for first in range(0, len(own), group)]
        self._calls = sorted(calls)
        self._last = deque((count + place,) for place in range(num_last))

    def __bool__(self) -> bool:
        return bool(self._calls or self._last)

    def take(self, replica: int, there_are: Collection[int]) -> tuple[int, ...] | None:
        """Take the next call for a replica, its items; ``None`` where it has none.

        Args:
            replica: Who is free.
            there_are: All replicas.
        """
        own = (call for call in self._calls if self._home(call) in (None, replica))
        found = next(own, None)
        if found is None:
            left = (call for call in self._calls if self._may_move or self._home(call) not in there_are)
            found = next(left, None)
        if found is not None:
            self._calls.remove(found)
        elif self._last:
            found = self._last.popleft()
        return found

    def put_back(self, items: Sequence[int]) -> None:
        """Let items of a call that failed be run again, each by itself, before all others."""
        self._calls[:0] = [(index,) for index in items]

    def _home(self, call: Sequence[int]) -> int | None:
        return None if self._homes is None or call[0] >= len(self._homes) else self._homes[call[0]]
