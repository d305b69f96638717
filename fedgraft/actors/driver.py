"""The driver actor: a process on the cluster that runs whatever job it is given and says how it goes.

The job's events wait in the driver until the command fetches them; a fetch returns as soon as there is one (no polling), so the
command may go away and another may take over.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from fedgraft.actors.hosting import JobContext
from fedgraft.actors.pool import RayPool

__all__ = ["Driver"]


class Driver:
    """Runs one job in one thread while others ask for its events or tell it to stop. Made into an actor by the launcher."""

    def __init__(self) -> None:
        self._events: list[Any] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._stop = threading.Event()

    def run(self, job: Callable[[JobContext], Any]) -> Any:
        """Run the job to its end and give its result; errors reach the caller as they were raised."""
        try:
            return job(JobContext(emit=self._emit, open_pool=RayPool, is_stopping=self._stop.is_set))
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()

    def _emit(self, event: Any) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def events(self, start: int, timeout_s: float) -> tuple[list[Any], bool]:
        """Wait for events from number ``start`` on.

        Returns:
            The events, none if ``timeout_s`` passed without one, and whether the job is over.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > start or self._is_over, timeout=timeout_s)
            return self._events[start:], self._is_over

    def stop(self) -> None:
        """Ask the job to end at the next safe point; what is finished stays."""
        self._stop.set()
