"""Judging models between rounds: which models, on which tasks, and what of it is said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from fedgraft.actors.hosting import Finished, Pool
from fedgraft.errors import FedgraftError
from fedgraft.platform.config import EvaluationConfig
from fedgraft.platform.task_checks import check_evaluation
from fedgraft.protocols import Method
from fedgraft.types import (
    Broadcast,
    EvaluationReply,
    EvaluationRow,
    EvaluationTask,
    Group,
    ServerState,
    Weighted,
)

__all__ = ["Evaluator", "Found"]

Split: TypeAlias = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Rows for ``evaluations.jsonl`` and ``diagnostics.jsonl``, and the numbers of the progress line.

    ``summary`` has ``nll`` (mean over the clients' personal models), ``worst_nll``, and where they were taken
    ``token_accuracy``, ``rouge_l``, ``retention_nll``, ``choice_accuracy``.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    diagnostics: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)


class Evaluator:
    """Sends evaluation tasks to the replicas and gathers their rows.

    Personal models are what a method makes of the server's parameters and a client's private state. Where it makes none, the
    global model is every client's, and is judged once for both views.

    Args:
        pool: Replicas that host the run's worker.
        config: When and how.
        method: Whose models they are; it may change what each is judged with.
        groups: Groups of the slots.
        num_clients: Size of the population.
        is_search: Judge on the validation split, NLL only.
    """

    def __init__(
        self,
        *,
        pool: Pool,
        config: EvaluationConfig,
        method: Method,
        groups: Mapping[str, Group],
        num_clients: int,
        is_search: bool,
    ) -> None:
        self._pool = pool
        self._config = config
        self._num_clients = num_clients
        self._is_search = is_search
        self._method = method
        self._keys = frozenset(groups)
        self._has_private = method.is_personal(groups)
        self._has_shared = any(group.is_sent for group in groups.values())
        self._split: Split = "validation" if is_search else "test"

    def judge(self, tasks: Sequence[EvaluationTask], state: ServerState) -> Found:
        """Judge models now.

        Args:
            tasks: What ``tasks`` gave, at least one.
            state: The server's that they were made for.

        Raises:
            FedgraftError: A model could not be judged.
        """
        shared = self._pool.share(Broadcast(round_idx=tasks[0].round_idx, params=state.params, extras=state.extras))
        return self.gather(tasks, self._pool.map("evaluate", tasks, shared))

    def gather(self, tasks: Sequence[EvaluationTask], results: Iterable[Finished]) -> Found:
        """Make rows of the replicas' answers.

        Args:
            tasks: Of one round.
            results: One a task, in any order, by the place of its task.

        Raises:
            FedgraftError: A model could not be judged.
        """
        round_idx = tasks[0].round_idx if tasks else 0
        replies: list[EvaluationReply | None] = [None] * len(tasks)
        for finished in results:
            if finished.error is not None:
                task = tasks[finished.index]
                who = "the global model" if task.client_id is None else f"client {task.client_id}"
                raise FedgraftError(f"evaluation of {who} after round {round_idx} failed: {finished.error}", "resume the run")
            replies[finished.index] = finished.value
        found = Found()
        rows: list[EvaluationRow] = []
        for task, reply in zip(tasks, replies, strict=True):
            assert reply is not None
            rows += reply.rows
            if task.split != self._split:
                continue  # what a method notes about a model it notes once
            for kind, values in reply.diagnostics.items():
                found.diagnostics.append({"round": round_idx, "client_id": task.client_id, "kind": kind, "values": values})
        if round_idx == 0 or not self._has_private:
            # The global model is every client's model: the same numbers stand for both views.
            rows += [_as_personal(row) for row in rows if row.task == "client"]
        found.rows.extend(_as_json(row) for row in rows)
        found.summary.update(_summarise([row for row in rows if row.task != "client" or row.split == self._split]))
        return found

    def tasks(self, state: ServerState, versions: Mapping[int, int], round_idx: int, *, is_last: bool) -> list[EvaluationTask]:
        """Say what is to be judged after a round, and with which private states: it does not change any more."""
        config = self._config
        metrics: tuple[str, ...] = ("nll", "token_accuracy")
        if not self._is_search and (config.generate == "always" or (config.generate == "end" and is_last)):
            metrics = (*metrics, "rouge_l")
        general: tuple[str, ...] = ()
        if not self._is_search:
            # Also of the untouched model: an accuracy tells something only where the base is not at chance.
            asks = config.choices != "never" and (config.choices == "always" or is_last or round_idx == 0)
            general = ("retention", "choice") if asks else ("retention",)

        def make(
            client_id: int | None, view: Any, tasks: tuple[str, ...], names: tuple[str, ...], split: Split = self._split
        ) -> EvaluationTask:
            task = EvaluationTask(
                round_idx=round_idx,
                view=view,
                tasks=tasks,
                keys=tuple(key for key in state.params if key in self._keys),
                client_id=client_id,
                split=split,
                metrics=names,
                state_version=None if client_id is None or view == "global" else versions.get(client_id),
            )
            task = self._method.evaluation(state, task)
            check_evaluation(task, self._method.federation, state)
            return task

        found: list[EvaluationTask] = []
        has_personal = self._has_private and round_idx > 0
        wants_global = not has_personal or (self._has_shared and config.global_view and not self._is_search)
        clients = range(self._num_clients)
        if has_personal:
            found += [make(client, "personal", ("client", *general), metrics) for client in clients]
        if wants_global:
            names = metrics if not has_personal else metrics[:2]
            found += [make(client, "global", ("client",), names) for client in clients]
            if general:
                found.append(make(None, "global", general, metrics[:2]))
        if config.validation and not self._is_search:
            view = "personal" if has_personal else "global"
            found += [make(client, view, ("client",), metrics[:2], "validation") for client in clients]
        return found


def _as_personal(row: EvaluationRow) -> EvaluationRow:
    return EvaluationRow(
        round_idx=row.round_idx,
        view="personal",
        task=row.task,
        client_id=row.client_id,
        split=row.split,
        metric=row.metric,
        value=row.value,
    )


def _as_json(row: EvaluationRow) -> dict[str, Any]:
    return {
        "round": row.round_idx,
        "view": row.view,
        "task": row.task,
        "client_id": row.client_id,
        "split": row.split,
        "metric": row.metric,
        "total": row.value.total,
        "weight": row.value.weight,
    }


def _summarise(rows: Sequence[EvaluationRow]) -> dict[str, float]:
    """Means over clients of each client's own mean; the worst client is the one with the highest NLL."""
    summary: dict[str, float] = {}
    personal = [row for row in rows if row.view == "personal" and row.task == "client"]
    for metric in ("nll", "token_accuracy", "rouge_l"):
        means = [row.value.mean for row in personal if row.metric == metric and row.value.weight]
        if means:
            summary[metric] = sum(means) / len(means)
            if metric == "nll":
                summary["worst_nll"] = max(means)
    for task, metric, name in (("retention", "nll", "retention_nll"), ("choice", "choice_accuracy", "choice_accuracy")):
        by_view: dict[str, list[Weighted]] = {}
        for row in rows:
            if row.task == task and row.metric == metric and row.value.weight:
                by_view.setdefault(row.view, []).append(row.value)
        values = by_view.get("personal") or by_view.get("global") or []
        if values:
            summary[name] = sum(value.mean for value in values) / len(values)
    return summary
