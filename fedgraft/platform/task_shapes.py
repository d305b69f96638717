"""What the clients of one round are sent: most are sent the same, so it is checked and described once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from fedgraft.platform.ledger import describe
from fedgraft.platform.task_checks import check_task, is_held
from fedgraft.types import (
    Assignment,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    Federation,
    Group,
    ParamRef,
    ServerState,
    TensorInfo,
)

__all__ = ["TaskShapes"]

_Shape: TypeAlias = tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]


class TaskShapes:
    """Names and sizes of what goes down in a round.

    Args:
        state: The server's, at the beginning of the round.
        refs: Of all slots, by key.
        groups: Of all slots, by key.
        federation: What tasks are checked against.
    """

    def __init__(
        self, state: ServerState, refs: Mapping[str, ParamRef], groups: Mapping[str, Group], federation: Federation
    ) -> None:
        self._state = state
        self._refs = refs
        self._groups = groups
        self._federation = federation
        self._keys = tuple(key for key in state.params if key in refs)
        self._checked: set[_Shape] = set()
        self._sent: dict[_Shape, tuple[TensorInfo, ...]] = {}

    def held(self, assignment: Assignment | None) -> tuple[str, ...]:
        """Keys of the slots that a client holds; all without an assignment."""
        if assignment is None:
            return self._keys
        return tuple(key for key in self._keys if is_held(self._refs[key], assignment))

    def check(self, task: ClientTask) -> None:
        """Check a task's names.

        Raises:
            MethodError: The method asks for what there is not.
        """
        shape = _shape(task)
        if task.assignment is not None or shape not in self._checked:
            check_task(task, self._federation, self._state)
            self._checked.add(shape)

    def sent(self, task: ClientTask) -> tuple[TensorInfo, ...]:
        """List what goes down to a client: parameters by group, extras."""
        if task.extras:
            return self._describe(task)
        shape = _shape(task)
        if shape not in self._sent:
            self._sent[shape] = self._describe(task)
        return self._sent[shape]

    def _describe(self, task: ClientTask) -> tuple[TensorInfo, ...]:
        state = self._state
        return (
            *describe({key: state.params[task.addresses.get(key, key)] for key in task.keys}, self._groups),
            *describe({key: state.extras[key] for key in task.extra_keys} | task.extras, {}, kind="extras"),
        )

    def requested(self, outcome: ClientUpdate | ClientFailure) -> tuple[TensorInfo, ...]:
        """List what a client asked for itself, in a second exchange of the round."""
        if isinstance(outcome, ClientFailure) or not outcome.requested:
            return ()
        return describe({key: self._state.params[name] for key, name in outcome.requested.items()}, self._groups)


def _shape(task: ClientTask) -> _Shape:
    """What decides about a task's names, beside what its client alone is sent or assigned."""
    return task.keys, tuple(task.addresses.items()), task.extra_keys, task.publishes
