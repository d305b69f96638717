"""Who is begun first, and how many clients go to a replica in one call: only where and when, never what comes out.

Longest first: a long client that is begun last keeps one replica busy while the others wait for it. How long a client takes is
learned from its earlier rounds. Clients that take less than the way to a replica and back go together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Schedule"]

_CALL_S = 0.05
"""A call should take so long: a hundred times the way there and back, and still short beside a round that many calls make up."""
_MOVE_S_A_BYTE = 2e-9
"""To the object store and back out: two copies, into pages that may be new."""
_MEMORY = 0.5
"""Weight of what was learned before against what a client has just taken."""


class Schedule:
    """Seconds by client, learned as the rounds go."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def learn(self, client_id: int, seconds: float) -> None:
        """Note what a client's task took where it ran."""
        before = self._seconds.get(client_id, seconds)
        self._seconds[client_id] = _MEMORY * before + (1 - _MEMORY) * seconds

    def order(self, passes: Sequence[Sequence[int]]) -> list[int]:
        """Give the places of passes, longest first; unknown clients count as the mean, and equal passes keep their order.

        Args:
            passes: The clients of each; one client, unless several train at once.
        """
        mean = self._mean(passes)
        seconds = [sum(self._seconds.get(client, mean) for client in each) for each in passes]
        return sorted(range(len(passes)), key=lambda place: -seconds[place])

    def group(self, passes: Sequence[Sequence[int]], replicas: int) -> int:
        """How many of these passes a call takes: no more than every replica's share, 1 before anything is known."""
        mean = self._mean(passes) * sum(map(len, passes)) / max(1, len(passes))
        if not mean:
            return 1
        return max(1, min(int(_CALL_S / mean), math.ceil(len(passes) / replicas)))

    def may_move(self, num_bytes: int) -> bool:
        """Whether a client had rather run elsewhere than wait for the replica that is to sum what it sends, ``num_bytes``.

        It had not where clients take less, in the mean, than such an update takes on the way. While nothing is known it had.
        """
        return not self._seconds or sum(self._seconds.values()) / len(self._seconds) > _MOVE_S_A_BYTE * num_bytes

    def _mean(self, passes: Sequence[Sequence[int]]) -> float:
        known = [self._seconds[client] for each in passes for client in each if client in self._seconds]
        return sum(known) / len(known) if known else 0.0
