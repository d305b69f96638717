"""Doubles for tests of hosts: an object that answers, dies, hangs or raises when an item says so.

They live in the package because replicas are processes of their own: what they host must be importable there.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from fedgraft.errors import GroupViolation

__all__ = ["Double", "Item"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What a double is to do: answer with ``number``, after it did ``act`` once.

    ``act`` is ``die`` (SIGKILL to its own process), ``hang`` (for an hour), ``raise`` or ``violate`` (always, not once), or
    nothing. ``once`` is a file whose presence says that it was done. Only ``rank`` does it, if one is named.
    """

    number: int
    act: str = ""
    once: Path | None = None
    rank: int | None = None


class Double:
    """Hosted by a pool in tests."""

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def place(self) -> tuple[str, str, str]:
        """What this process was told of its place: rank, world size, and where the ranks meet."""
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", ""), meeting

    def work(self, item: Item, shared: int) -> tuple[int, list[int]]:
        """Give number + shared (and 1000 a rank), and a large result of it."""
        rank = int(os.environ.get("RANK", "0"))
        if item.rank is not None and item.rank != rank:
            return item.number + shared + rank * 1000, [item.number] * 3
        if item.act == "raise":
            raise ValueError(f"item {item.number} is bad")
        if item.act == "violate":
            raise GroupViolation(f"item {item.number} sends what it must not", "keep it")
        if item.act and item.once is not None and not item.once.exists():
            item.once.touch()
            if item.act == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(3600)
        return item.number + shared + rank * 1000, [item.number] * 3
