"""The replicas of a pool: started side by side, given what they host, replaced when lost, let go where no place is left."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from fedgraft.actors.hosting import Note, PoolOptions
from fedgraft.actors.places import check_places, places
from fedgraft.actors.replica import Replica, start_replicas
from fedgraft.errors import ClusterError, FedgraftError

__all__ = ["Fleet", "brief", "cause_of"]

_log = logging.getLogger(__name__)

_END_S = 5.0
"""Longest wait for replicas to leave in good order; whatever they hold is gone with their processes anyway."""
_SLICE_S = 5.0
"""How often the wait for a new replica asks whether the cluster still has room for it."""
_QUIET_S = 15.0
"""How long a replacement may take before the user is told what is waited for."""
_TRIES = 3
"""Starts of one replacement: a node that has just died takes replicas with it until its loss is noticed."""


class Fleet:
    """Replicas by position, all hosting the same.

    Args:
        options: Number of replicas, what each gets, and the limits.
        note: Gets what a user should know: a replica that was let go, a wait that takes long.
        may_shrink: Begin with fewer replicas where the cluster has no room for all, instead of refusing.

    Raises:
        ClusterError: The cluster cannot give the replicas, said before waiting, or they do not start in time.
    """

    def __init__(self, options: PoolOptions, note: Note, *, may_shrink: bool = False) -> None:
        self._options = options
        self._note = note
        self._factory: Callable[[], Any] | None = None
        self._owner = _owner()
        count = options.replicas
        room = places(options)
        if may_shrink and 0 < room < count:
            note(f"the cluster has room for {room} of {count} replicas; going on with {room}")
            count = room
        else:
            check_places(options)
        started = start_replicas(options, count, owner=self._owner)
        self.replicas: dict[int, Replica] = dict(enumerate(started))

    def host(self, factory: Callable[[], Any]) -> None:
        """Build the hosted object on every replica, side by side; one that died meanwhile is replaced."""
        self._factory = factory
        started = {position: replica.host(factory) for position, replica in self.replicas.items()}
        deadline = time.monotonic() + self._options.start_timeout_s
        for position, refs in started.items():
            error = self._await(refs, deadline)
            if error is not None:
                self.replace(position, error)

    def replace(self, position: int, why: str) -> bool:
        """End a replica, all its ranks, whatever it does, and put a new one in its place that hosts what the others do.

        Returns:
            Whether there is one again; there is not where the cluster has no room left while others can go on.

        Raises:
            ClusterError: It was the last one, and none can be placed.
            FedgraftError: What the new one raised when it was to build the hosted object.
        """
        _log.warning("replica %d is replaced: %s", position, why)
        self.replicas.pop(position).kill()
        begun = time.monotonic()
        deadline = begun + self._options.start_timeout_s
        error = why
        for _ in range(_TRIES):
            if self._is_hopeless():
                room = places(self._options)
                error = f"the cluster has room for {room} replica{'s' if room != 1 else ''}"
                break
            found, error = self._start_one(position, begun, deadline)
            if found is not None:
                self.replicas[position] = found
                return True
            if time.monotonic() > deadline:
                break
        if not self.replicas:
            raise ClusterError(
                f"replica {position} was lost ({why}) and none can be started in its place: {error}",
                "free the cluster or join a larger one; if too little memory is the cause, lower executor.replicas; "
                "executor.start_timeout_s is the longest wait",
            )
        left = len(self.replicas)
        self._note(
            f"replica {position} was lost ({why}) and cannot be replaced ({error}); going on with {left} "
            f"replica{'s' if left != 1 else ''}"
        )
        return False

    def _start_one(self, position: int, begun: float, deadline: float) -> tuple[Replica | None, str]:
        """Start one replica and wait until it hosts; gives it, or why there is none."""
        is_told = False

        def is_hopeless() -> bool:
            nonlocal is_told
            if not is_told and time.monotonic() - begun > _QUIET_S:
                is_told = True
                self._note(f"waiting for a place for replica {position}; at most {self._options.start_timeout_s:.0f} s")
            return self._is_hopeless()

        try:
            taken = [replica.node for replica in self.replicas.values()]
            found = start_replicas(self._options, 1, owner=self._owner, is_hopeless=is_hopeless, taken=taken)[0]
        except ClusterError as raised:
            return None, raised.message
        error = None if self._factory is None else self._await(found.host(self._factory), deadline, is_hopeless)
        if error is None:
            return found, ""
        found.kill()
        return None, error

    def _await(self, refs: list[Any], deadline: float, is_hopeless: Callable[[], bool] = lambda: False) -> str | None:
        """Wait until all ranks host; gives what kept them from it, if something did."""
        left = refs
        while left:
            wait = max(0.0, min(_SLICE_S, deadline - time.monotonic()))
            done, left = ray.wait(left, num_returns=1, timeout=wait)
            try:
                ray.get(done)
            except RayTaskError as error:
                raise cause_of(error) from None
            except RayError as error:
                return f"it died while it started: {brief(error)}"
            if left and time.monotonic() >= deadline:
                return f"it did not start within executor.start_timeout_s = {self._options.start_timeout_s:.0f} s"
            if not done and is_hopeless():
                return "the cluster has no room for it any more"
        return None

    def _is_hopeless(self) -> bool:
        """Whether the nodes are too few for one replica more than there are."""
        return places(self._options) <= len(self.replicas)

    def close(self) -> None:
        """End every replica's process; one that does not answer at once is not waited for."""
        ended = [ref for replica in self.replicas.values() for ref in replica.end()]
        if ended:
            ray.wait(ended, num_returns=len(ended), timeout=_END_S)
        for replica in self.replicas.values():
            replica.kill()
        self.replicas = {}


def cause_of(error: RayTaskError) -> BaseException:
    """The exception that the remote code raised, if it is one of ours, else Ray's wrapping of it."""
    return error.cause if isinstance(error.cause, FedgraftError) else error


def brief(error: BaseException) -> str:
    """First line of an error's text, or its class where it has none."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _owner() -> str:
    """Whose the replicas are: this actor's, else this job's."""
    context = ray.get_runtime_context()
    return context.get_actor_id() or f"job-{context.get_job_id()}"
