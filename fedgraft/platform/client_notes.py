"""What a run writes down about its clients at once, not with a round: failures, and batches cut for want of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fedgraft.platform.progress import Event
from fedgraft.platform.run_folder import RunFolder
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate

__all__ = ["BatchParts", "Failures"]


class Failures:
    """Clients' failures of a run, in ``run.json``.

    Args:
        folder: Of the run.
        emit: Gets an event a failure.
        label: Of the run.
        done: Rounds that are done; failures of later ones, of an earlier process, are forgotten.
    """

    def __init__(self, folder: RunFolder, emit: Callable[[Event], None], label: str, *, done: int) -> None:
        self._folder = folder
        self._emit = emit
        self._label = label
        before = folder.read_info().get("failures", []) if done else []
        self._failures: list[dict[str, Any]] = [failure for failure in before if failure["round_idx"] <= done]

    @property
    def last(self) -> dict[str, Any]:
        """The newest one; there must be one."""
        return self._failures[-1]

    def note(self, failure: ClientFailure) -> None:
        """Write a failure down and tell of it."""
        data: dict[str, Any] = {"client_id": failure.client_id, "stage": failure.stage, "error": failure.error}
        self._failures.append(data | {"round_idx": failure.round_idx})
        self.write()
        self._emit(Event(kind="failure", label=self._label, data=data))

    def write(self) -> None:
        """Write all of them into the run's file."""
        self._folder.write_info(failures=self._failures)


class BatchParts:
    """Into how many parts the batches of clients that ran out of memory were cut, by client and round: it decides their bits.

    Args:
        folder: Of the run; what it has noted is gone on from.
        default: Parts of everybody's batches.
        note: Gets a sentence for the user.
    """

    def __init__(self, folder: RunFolder, default: int, note: Callable[[str], None]) -> None:
        self._folder = folder
        self._default = default
        self._note = note
        noted: dict[str, dict[str, int]] = folder.read_info().get("batch_parts", {})
        self._parts = {int(client): {int(at): parts for at, parts in rounds.items()} for client, rounds in noted.items()}

    def known(self, client_id: int, round_idx: int) -> int | None:
        """How many parts this client's batches were cut into by this round: a run that goes on does what it did."""
        known = [parts for at, parts in self._parts.get(client_id, {}).items() if at <= round_idx]
        return max(known, default=None)

    def learn(self, task: ClientTask, update: ClientUpdate) -> None:
        """Write down at once that a client ran out of memory."""
        if update.num_parts == (task.num_parts or self._default):
            return
        self._parts.setdefault(task.client_id, {})[task.round_idx] = update.num_parts
        listed = {str(client): {str(at): parts for at, parts in rounds.items()} for client, rounds in self._parts.items()}
        self._folder.write_info(batch_parts=listed)
        text = f"client {task.client_id} ran out of memory and cuts its batches into {update.num_parts} parts from round "
        self._note(f"{text}{task.round_idx} on")
