"""One round's way to the cohort and back: tasks out, replies in, failures tried again, updates weighed and summed.

Nothing here knows which method it is or who does the work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedgraft.actors.hosting import Finished, Pool
from fedgraft.errors import QuorumError
from fedgraft.platform.client_notes import BatchParts, Failures
from fedgraft.platform.grouping import passes, split
from fedgraft.platform.ledger import Entry, entries
from fedgraft.platform.reduction import RefusedUpdates, homes, sum_updates
from fedgraft.platform.replies import ReplyLimits, check_reply
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.scheduling import Schedule
from fedgraft.platform.task_checks import check_weights
from fedgraft.platform.task_shapes import TaskShapes
from fedgraft.protocols import Method, Reduced
from fedgraft.types import ClientFailure, ClientGroup, ClientTask, ClientUpdate, EvaluationTask, ServerState, TensorInfo

__all__ = ["Exchange", "Exchanged"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanged:
    """What came of it: the updates that count, in cohort order, their sums, and the rows of the ledger, in cohort order.

    ``judged`` are the answers to what was judged beside, in any order.
    """

    updates: list[ClientUpdate]
    reduced: Reduced
    rows: list[Entry]
    judged: list[Finished]


class Exchange:
    """Exchanges a run's rounds with its clients.

    Args:
        job: The run.
        pool: Hosts the job.
        method: Weighs; has its federation.
        failures: Takes clients' failures.
        batch_parts: Takes how clients' batches were cut.
        at_once: Clients that share a pass, >= 1.
    """

    def __init__(
        self, job: RunJob, pool: Pool, method: Method, *, failures: Failures, batch_parts: BatchParts, at_once: int
    ) -> None:
        self._job = job
        self._pool = pool
        self._method = method
        self._failures = failures
        self._batch_parts = batch_parts
        self._at_once = at_once
        self._limits = ReplyLimits.of(method.federation, job.federation.max_update_bytes)
        self._schedule = Schedule()
        self._shares_pass: dict[int, tuple[ClientTask, ...]] = {}
        self._made_again: list[tuple[ClientTask, ClientUpdate]] = []

    def run(
        self,
        tasks: Sequence[ClientTask],
        state: ServerState,
        shared: Any,
        shapes: TaskShapes,
        to_judge: Sequence[EvaluationTask] = (),
    ) -> Exchanged:
        """Let the cohort train, and weigh and sum what comes.

        Args:
            tasks: In cohort order, checked.
            state: The server's, which the tasks were made from.
            shared: The round's broadcast, as the pool shares it.
            shapes: Describes what goes down.
            to_judge: Models of this state and of private states that are there already, judged by replicas that have no client
                left to train.

        Raises:
            QuorumError: Too few clients answered, or an update was lost too often.
            MethodError, UpdateError, ClusterError: See ``sum_updates``.
        """
        judged: list[Finished] = []
        outcomes, handles, rows = self._train(tasks, state, shared, shapes, to_judge, judged)
        updates, reduced = self._average(state, tasks, outcomes, handles, shared)
        for task, again in self._made_again:
            rows += _charge(task, (*shapes.sent(task), *shapes.requested(again)), None, num_tries=1, attempt=2)
        self._made_again.clear()
        return Exchanged(updates=updates, reduced=reduced, rows=rows, judged=judged)

    def _train(
        self,
        tasks: Sequence[ClientTask],
        state: ServerState,
        shared: Any,
        shapes: TaskShapes,
        to_judge: Sequence[EvaluationTask],
        judged: list[Finished],
    ) -> tuple[list[ClientUpdate | ClientFailure], list[Any], list[Entry]]:
        """Let the cohort train; a client whose reply is a failure is tried again, up to ``max_failures`` times.

        Clients that share a pass share its retry, too: what each of them gets depends on who was in it, if only by rounding.
        """
        sent = [shapes.sent(task) for task in tasks]  # refuses before anything leaves
        outcomes: list[ClientUpdate | ClientFailure | None] = [None] * len(tasks)
        handles: list[Any] = [None] * len(tasks)
        rows: list[list[Entry]] = [[] for _ in tasks]
        left = passes(len(tasks), self._at_once)
        # Where updates are summed in the replicas, each had best train the clients that it will sum. What is sent is as large.
        largest = max(sum(info.num_bytes for info in each) for each in sent)
        own = homes(len(tasks), self._pool.size) if largest > self._pool.inline_bytes else None
        may_move = self._schedule.may_move(largest)
        self._shares_pass = {tasks[at].client_id: tuple(tasks[i] for i in each) for each in left for at in each}
        for attempt in range(1, self._job.federation.max_failures + 1):
            answered: set[int] = set()
            is_over: set[int] = set()
            if self._pool.size > 1:
                left = [left[place] for place in self._schedule.order([[tasks[i].client_id for i in each] for each in left])]
            owners = None if own is None else [own[each[0]] for each in left]
            groups = [tuple(tasks[i] for i in each) for each in left]
            beside = () if attempt > 1 else to_judge
            for finished in self._map(groups, shared, owners, may_move=may_move, last=beside):
                if finished.index >= len(left):
                    judged.append(replace(finished, index=finished.index - len(left)))
                    continue
                if finished.index in answered:
                    for position in left[finished.index]:
                        self._failures.note(_duplicate(tasks[position]))
                    continue
                answered.add(finished.index)
                if finished.error is not None:
                    is_over.add(finished.index)  # the pool has tried it max_failures times already
                for position, single in zip(left[finished.index], split(finished, len(left[finished.index])), strict=True):
                    task = tasks[position]
                    outcome = check_reply(task, state, single, self._limits)
                    outcomes[position] = outcome
                    if isinstance(outcome, ClientUpdate):
                        self._batch_parts.learn(task, outcome)
                        self._schedule.learn(task.client_id, outcome.seconds)
                    handles[position] = single.handle
                    down = (*sent[position], *shapes.requested(outcome))
                    # What a client had sent in a pass that is run again was sent for nothing.
                    rows[position] = [replace(row, is_retry=row.is_retry or row.direction == "up") for row in rows[position]]
                    rows[position] += _charge(task, down, outcome, num_tries=single.num_tries, attempt=attempt)
            failed = [any(isinstance(outcomes[i], ClientFailure) for i in each) for each in left]
            left = sorted(each for index, each in enumerate(left) if failed[index] and index not in is_over)
            if not left:
                break
        for last in outcomes:
            if isinstance(last, ClientFailure):
                self._failures.note(last)
        # In cohort order, whoever came first: the ledger is part of what must not depend on the replicas.
        return [last for last in outcomes if last is not None], handles, [row for each in rows for row in each]

    def _map(
        self,
        groups: Sequence[tuple[ClientTask, ...]],
        shared: Any,
        owners: Sequence[int] | None = None,
        *,
        may_move: bool = True,
        last: Sequence[EvaluationTask] = (),
    ) -> Iterator[Finished]:
        """Let replicas train clients, those of a group in one pass, and then judge models."""
        together = self._schedule.group([[task.client_id for task in group] for group in groups], self._pool.size)
        beside = ("evaluate", last) if last else None
        how: dict[str, Any] = {"group": together, "homes": owners, "may_move": may_move, "last": beside}
        if self._at_once == 1:
            return self._pool.map("update", [task for (task,) in groups], shared, **how)
        return self._pool.map("update_many", [ClientGroup(tasks=group) for group in groups], shared, **how)

    def _average(
        self,
        state: ServerState,
        tasks: Sequence[ClientTask],
        outcomes: list[ClientUpdate | ClientFailure],
        handles: list[Any],
        shared: Any,
    ) -> tuple[list[ClientUpdate], Reduced]:
        """Weigh and sum what came; an update whose tensors turn out bad becomes a failure, and the rest is weighed again.

        Handles are kept until the sum is whole: another pass needs them.
        """
        again = [0] * len(tasks)

        def make_again(positions: Sequence[int]) -> Mapping[int, Any]:
            wanted = []
            for position in positions:
                outcome = outcomes[position]
                assert isinstance(outcome, ClientUpdate)
                again[position] += 1
                if again[position] > self._job.federation.max_failures:
                    raise _lost(outcome)
                wanted.append(replace(tasks[position], num_parts=outcome.num_parts))
            return dict(zip(positions, self._make_again(wanted, shared), strict=True))

        while True:
            updates = [outcome for outcome in outcomes if isinstance(outcome, ClientUpdate)]
            self._check_quorum(updates, len(tasks), tasks[0].round_idx)
            weights = self._method.weigh(state, updates)
            check_weights(weights, len(updates))
            try:
                return updates, sum_updates(tasks, outcomes, weights, handles, pool=self._pool, make_again=make_again)
            except RefusedUpdates as refused:
                for position, failure in refused.failures.items():
                    outcomes[position] = failure
                    self._failures.note(failure)

    def _make_again(self, tasks: Sequence[ClientTask], shared: Any) -> list[Any]:
        """Run tasks again whose updates were lost with their node or replica, in the passes that they shared: same bits.

        Returns:
            The new handles, in the order of the tasks.
        """
        again = {task.client_id: task for task in tasks}
        groups = list(dict.fromkeys(tuple(each.client_id for each in self._shares_pass[client]) for client in again))
        passes = [tuple(again.get(each.client_id, each) for each in self._shares_pass[group[0]]) for group in groups]
        handles: dict[int, Any] = {}
        for finished in self._map(passes, shared):
            group = passes[finished.index]
            for task, single in zip(group, split(finished, len(group)), strict=True):
                if task.client_id not in again:
                    continue
                if single.error is not None or isinstance(single.value, ClientFailure):
                    raise _lost(task)
                self._made_again.append((task, single.value))
                handles[task.client_id] = single.handle
        self._made_again.sort(key=lambda each: each[0].client_id)
        return [handles[task.client_id] for task in tasks]

    def _check_quorum(self, updates: Sequence[ClientUpdate], cohort_size: int, round_idx: int) -> None:
        wanted = min(self._job.federation.min_clients, cohort_size)
        if len(updates) < wanted:
            last = self._failures.last
            raise QuorumError(
                f"round {round_idx} of {self._job.label}: {len(updates)} of {cohort_size} clients answered, "
                f"federation.min_clients is {wanted}; client {last['client_id']} failed at {last['stage']}: {last['error']}",
                "mend the cause or lower federation.min_clients, then resume",
            )


def _charge(task: ClientTask, sent: Sequence[TensorInfo], outcome: Any, *, num_tries: int, attempt: int) -> list[Entry]:
    """Ledger rows of one task: what went down, once more for every retry, marked so, and what came up."""
    rows: list[Entry] = []
    for number in range(num_tries):
        is_retry = attempt > 1 or number > 0
        rows += entries(task.round_idx, task.client_id, "down", sent, is_retry=is_retry)
    if isinstance(outcome, ClientUpdate):
        rows += entries(task.round_idx, task.client_id, "up", outcome.payload)
    return rows


def _duplicate(task: ClientTask) -> ClientFailure:
    error = "the client's reply came twice; the first one counts"
    return ClientFailure(client_id=task.client_id, round_idx=task.round_idx, stage="reply", error=error)


def _lost(whose: ClientTask | ClientUpdate) -> QuorumError:
    return QuorumError(f"the update of client {whose.client_id} was lost and could not be made again", "resume the run")
