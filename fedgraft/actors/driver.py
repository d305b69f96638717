"""The driver actor: a process on the cluster that runs whatever job it is given and says how it goes.

The job's events wait in the driver until the command fetches them; a fetch returns as soon as there is one (no polling), so the
command may go away and another may take over.

Ray restarts a driver that died and gives it the same job again, which must know how to go on. Each life has an epoch of its own:
who follows the events learns from it that they begin anew. What a dead driver had said and nobody had fetched yet is gone with
it; whatever must last is the job's to write down.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray

from fedgraft.actors.hosting import JobContext
from fedgraft.actors.pool import RayPool
from fedgraft.actors.replica import remove_groups

__all__ = ["About", "Driver", "Events"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Events of one life of a driver, from the number that was asked for, or all of them if another life was asked for."""

    epoch: str
    events: tuple[Any, ...]
    is_over: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class About:
    """What a driver tells of its job: the facts it was begun with, its last events, and whether it is over or asked to stop."""

    facts: Mapping[str, Any]
    events: tuple[Any, ...]
    is_over: bool
    is_stopping: bool


class Driver:
    """Runs one job in a thread of its own while others ask for its events or tell it to stop. Made into an actor by the launcher.

    The job comes with the actor, not with a call: Ray keeps it, so a driver that died begins it again although whoever started
    it may be gone.

    Args:
        job: Called once in this life of the driver.
        facts: What ``about`` tells of the job; JSON values.
        lingers_s: How long a driver that nobody owns stays after its job's end, for those who follow it; then it ends itself.
            ``None``: it stays until its owner ends it.
    """

    def __init__(
        self,
        job: Callable[[JobContext], Any],
        *,
        facts: Mapping[str, Any] | None = None,
        lingers_s: float | None = None,
    ) -> None:
        self._epoch = uuid.uuid4().hex
        self._facts = dict(facts or {})
        self._events: list[Any] = []
        self._changed = threading.Condition()
        self._is_over = False
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self._stop = threading.Event()
        threading.Thread(target=self._carry_out, args=(job, lingers_s), name="job", daemon=True).start()

    def _carry_out(self, job: Callable[[JobContext], Any], lingers_s: float | None) -> None:
        try:
            context = ray.get_runtime_context()
            is_restarted = context.was_current_actor_reconstructed
            if is_restarted:
                remove_groups(context.get_actor_id() or "")  # they hold the cores that the new replicas need
            open_pool = partial(RayPool, may_shrink=is_restarted)
            self._outcome = job(JobContext(emit=self._emit, open_pool=open_pool, is_stopping=self._stop.is_set)), None
        except BaseException as error:  # it is raised where the result is asked for
            self._outcome = None, error
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        if lingers_s is not None:
            time.sleep(lingers_s)
            ray.kill(ray.get_runtime_context().current_actor)

    def result(self) -> Any:
        """Wait for the job's end and give its result; errors reach the caller as they were raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_over)
        result, error = self._outcome
        if error is not None:
            raise error
        return result

    def about(self, num_events: int) -> About:
        """Tell of the job, with its last events."""
        with self._changed:
            events = tuple(self._events[-num_events:]) if num_events else ()
            return About(facts=self._facts, events=events, is_over=self._is_over, is_stopping=self._stop.is_set())

    def _emit(self, event: Any) -> None:
        with self._changed:
            self._events.append(event)
            self._changed.notify_all()

    def events(self, epoch: str, start: int, timeout_s: float) -> Events:
        """Wait for events from number ``start`` of a life on; of another life, all of its events.

        Returns:
            The events, none if ``timeout_s`` passed without one, and whether the job is over.
        """
        first = start if epoch == self._epoch else 0
        with self._changed:
            self._changed.wait_for(lambda: len(self._events) > first or self._is_over, timeout=timeout_s)
            return Events(epoch=self._epoch, events=tuple(self._events[first:]), is_over=self._is_over)

    def stop(self) -> None:
        """Ask the job to end at the next safe point; what is finished stays."""
        self._stop.set()
