"""Locks on files: given back by the system when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedgraft.errors import FedgraftError

__all__ = ["hold"]

_POLL_S = 0.2


@contextmanager
def hold(path: Path, *, timeout_s: float | None = None, busy: str = "") -> Iterator[None]:
    """Hold a lock while the block runs.

    Args:
        path: The lock's file; made, with its folder, where missing.
        timeout_s: Longest wait for another process that holds it, 0: none; ``None``: without a limit.
        busy: What to say when the wait is over; the lock's file is named after it.

    Raises:
        FedgraftError: Another process still held it after ``timeout_s``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        if timeout_s is None:
            fcntl.flock(stream, fcntl.LOCK_EX)
        else:
            _wait(stream.fileno(), timeout_s, f"{busy} ({path} is locked)")
        yield  # closing the file gives the lock back


def _wait(descriptor: int, timeout_s: float, busy: str) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise FedgraftError(busy, "wait until it has ended, or end it") from None
        time.sleep(_POLL_S)
