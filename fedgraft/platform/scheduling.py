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

    def order(self, client_ids: Sequence[int]) -> list[int]:
        """Give the places of clients, longest first; unknown ones count as the mean, and equal ones keep their order."""
        known = [self._seconds[client] for client in client_ids if client in self._seconds]
        mean = sum(known) / len(known) if known else 0.0
        return sorted(range(len(client_ids)), key=lambda place: -self._seconds.get(client_ids[place], mean))

    def group(self, client_ids: Sequence[int], replicas: int) -> int:
        """How many of these clients a call takes: no more than every replica's share, 1 before anything is known."""
        known = [self._seconds[client] for client in client_ids if client in self._seconds]
        if not known:
            return 1
        mean = max(sum(known) / len(known), 1e-9)
        return max(1, min(int(_CALL_S / mean), math.ceil(len(client_ids) / replicas)))
