"""The one loop over rounds: plan, let the cohort train, weigh, reduce, step, evaluate, checkpoint, record.

No method loops over rounds, and nothing here knows which method it runs or who does the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors.torch import load_file

from fedgraft.actors.hosting import Finished, Pool
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import CheckpointError, GroupViolation, QuorumError, RunInterrupted
from fedgraft.platform.checkpoint import Checkpoint, hash_state, load_latest, save
from fedgraft.platform.config import EvaluationConfig, FederationConfig
from fedgraft.platform.evaluation import Evaluator
from fedgraft.platform.grouping import passes, split
from fedgraft.platform.ledger import Entry, describe, entries
from fedgraft.platform.progress import Event
from fedgraft.platform.reduction import RefusedUpdates, homes, sum_updates
from fedgraft.platform.replies import ReplyLimits, check_reply
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.sampling import sample_cohort
from fedgraft.platform.scheduling import Schedule
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.task_checks import check_budget, check_cohort, check_task, check_weights, is_held
from fedgraft.platform.tracking import Tracker
from fedgraft.platform.worker import WorkerSpec
from fedgraft.protocols import Method, Reduced, merge_metrics
from fedgraft.registry import METHODS
from fedgraft.types import (
    Assignment,
    Broadcast,
    Budget,
    ClientFailure,
    ClientGroup,
    ClientTask,
    ClientUpdate,
    Federation,
    Group,
    ParamRef,
    RoundPlan,
    ServerState,
    TensorInfo,
)

__all__ = ["RoundLoop", "RunJob"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """One run of one method: what the loop needs beside a pool.

    ``purpose`` ``search`` judges on the validation split only and decodes nothing. ``start`` is a safetensors file of slot values
    that the server begins with (``None``: the start values of the slots). ``budgets`` has one entry a client, or none.
    """

    label: str
    purpose: Literal["run", "search"]
    folder: Path
    worker: WorkerSpec
    learning_rate: float
    rounds: int
    num_clients: int
    federation: FederationConfig
    evaluation: EvaluationConfig
    checkpoint_every: int
    start: Path | None = None
    budgets: tuple[Budget, ...] = ()


_Shape: TypeAlias = tuple[tuple[str, ...], tuple[tuple[str, str], ...], tuple[str, ...], tuple[str, ...]]


class RoundLoop:
    """Runs one job on a pool, from its last checkpoint if it has one.

    Args:
        job: What to run.
        pool: Replicas, not yet hosting this job.
        tracker: Gets one batch a round.
        emit: Gets an event a round, an evaluation and a failure.
        is_stopping: Asked before every round; then the run ends, resumable.
        on_checkpoint: Called when a checkpoint has been written.

    Attributes:
        hosting_s: Seconds that the replicas took to build what they host.
    """

    def __init__(
        self,
        job: RunJob,
        pool: Pool,
        *,
        tracker: Tracker,
        emit: Callable[[Event], None],
        is_stopping: Callable[[], bool],
        on_checkpoint: Callable[[], None] = lambda: None,
    ) -> None:
        self._job = job
        self._on_checkpoint = on_checkpoint
        self._pool = pool
        self._tracker = tracker
        self._emit = emit
        self._is_stopping = is_stopping
        self._method: Method = METHODS.parse(job.worker.method)
        self._folder = RunFolder(job.folder)
        self._store = ClientStateStore(job.worker.state_folder)
        self._groups: dict[str, Group] = {}
        self._refs: dict[str, ParamRef] = {}
        self._versions: dict[int, int] = {}
        self._failures: list[dict[str, Any]] = []
        self._made_again: list[tuple[ClientTask, ClientUpdate]] = []
        self._parts: dict[int, dict[int, int]] = {}
        self._until = 0
        self._at_once = 1
        self._shares_pass: dict[int, tuple[ClientTask, ...]] = {}
        self._schedule = Schedule()
        self._keys: tuple[str, ...] = ()
        self._checked: set[_Shape] = set()
        self._sent: dict[_Shape, tuple[TensorInfo, ...]] = {}
        self.hosting_s = 0.0

    def run(self, until: int | None = None) -> ServerState:
        """Run all rounds that are left, or those up to round ``until``, which is kept as a checkpoint whatever the distance.

        Returns:
            The server's last state.

        Raises:
            QuorumError: Too few clients answered; the run can be resumed.
            RunInterrupted: It was asked to stop; the run can be resumed.
            GroupViolation: A frozen tensor changed.
        """
        job, method = self._job, self._method
        started = time.perf_counter()
        self._pool.host(job.worker.build)
        self.hosting_s = time.perf_counter() - started
        facts = self._pool.call("describe")
        self._groups = facts[0]["groups"]
        self._refs = {ref.key: ref for ref in facts[0]["refs"]}
        method.federation = self._federation(facts[0])
        self._limits = ReplyLimits.of(method.federation, job.federation.max_update_bytes)
        self._at_once = self._clients_at_once(facts[0].get("one_by_one"))
        frozen = facts[0]["frozen_hash"]
        rounds = method.num_rounds(job.rounds)
        evaluator = Evaluator(
            pool=self._pool,
            config=job.evaluation,
            method=method,
            groups=self._groups,
            num_clients=job.num_clients,
            is_search=job.purpose == "search",
        )
        checkpoint = load_latest(self._folder.checkpoint_folder, store=self._store)
        known = self._folder.read_info().get("frozen_hash_start", frozen)
        if checkpoint is not None and known != frozen:
            raise CheckpointError(
                f"{job.label} was begun on another base model (hash {known[:12]}, now {frozen[:12]})",
                "put the model back as it was, or start a new run",
            )
        if checkpoint is None or (checkpoint.round_idx == 0 and rounds == 0):
            self._folder.truncate(-1)
            state = self._first_state()
            self._note_hashes(0, state, ())
            done = 0
            if rounds == 0 or (job.evaluation.at_start and job.purpose == "run"):
                self._evaluate(evaluator, state, 0, is_last=rounds == 0)
        else:
            state, done, self._versions = checkpoint.state, checkpoint.round_idx, dict(checkpoint.versions)
            self._folder.truncate(done)
            self._failures = list(self._folder.read_info().get("failures", []))
            self._failures = [failure for failure in self._failures if failure["round_idx"] <= done]
        noted: dict[str, dict[str, int]] = self._folder.read_info().get("batch_parts", {})
        self._parts = {int(client): {int(at): parts for at, parts in rounds.items()} for client, rounds in noted.items()}
        self._folder.write_info(
            frozen_hash_start=frozen,
            engine=job.worker.engine.model_dump(mode="json"),
            device=facts[0]["device"],
            rounds=rounds,
            has_private=method.is_personal(self._groups),
            has_shared=any(group.is_sent for group in self._groups.values()),
        )
        self._note_budgets(is_new=done == 0, rounds=rounds)
        self._until = rounds if until is None else min(until, rounds)
        for round_idx in range(done + 1, self._until + 1):
            if self._is_stopping():
                raise RunInterrupted(f"{job.label} stopped after round {round_idx - 1} of {rounds}", "it can be resumed")
            state = self._round(evaluator, state, round_idx, rounds)
        if self._until == rounds:
            self._check_frozen(frozen, [fact["frozen_hash"] for fact in self._pool.call("describe")])
            self._folder.write_info(frozen_hash_end=frozen)
        self._folder.sync()
        self._folder.write_info(failures=self._failures)
        return state

    def _clients_at_once(self, one_by_one: str | None) -> int:
        """How many clients share a pass; said where it is one although more were asked for."""
        wanted = self._job.worker.engine.clients_at_once
        assert isinstance(wanted, int), "resolved before a run begins"
        if wanted == 1 or one_by_one is None:
            return wanted
        self._note(f"clients train one after another, although engine.clients_at_once is {wanted}: {one_by_one}")
        return 1

    def _federation(self, facts: Mapping[str, Any]) -> Federation:
        """What the method's server half may know: sizes, slots, and how many examples of which label each client has."""
        job = self._job
        data = PreparedData.open(job.worker.data_folder)
        clients = data.manifest.clients[: job.num_clients]
        return Federation(
            facts=facts["facts"],
            refs=facts["refs"],
            groups=facts["groups"],
            run_seed=job.worker.run_seed,
            rounds=self._method.num_rounds(job.rounds),
            num_examples=tuple(client.train.stop - client.train.start for client in clients),
            labels=tuple(client.train.histogram for client in clients),
            budgets=job.budgets,
        )

    def _note_budgets(self, *, is_new: bool, rounds: int) -> None:
        """Write the clients' budgets down; say so where the method does not use them, and where it would and there are none.

        Raises:
            CheckpointError: The run was begun with other budgets.
        """
        job, method = self._job, self._method
        is_to_say = is_new and rounds > 0 and job.purpose == "run"
        if not job.budgets:
            if is_to_say and method.budget_use != "none" and not method.bounds_experts:
                self._note("no budgets are set: every client holds and trains all experts")
            return
        found = [asdict(budget) for budget in job.budgets]
        before = self._folder.read_info().get("budgets", found)
        if before != found and not is_new:
            raise CheckpointError(
                f"{job.label} was begun with other budgets of its clients",
                "put the device profile back as it was, or start a new run",
            )
        self._folder.write_info(budget_use=method.budget_use, budgets=found)
        if is_to_say and method.budget_use == "none":
            self._note(f"{method.name} does not use budgets: every client holds and trains everything")

    def _note(self, text: str) -> None:
        self._emit(Event(kind="note", label=self._job.label, data={"text": text}))

    def _first_state(self) -> ServerState:
        """The state before round 1; what comes trained from elsewhere is kept as a checkpoint at once."""
        state = self._method.init(self._pool.call("initial_params")[0], self._job.num_clients)
        if self._job.start is None:
            return state
        trained = load_file(self._job.start)
        state = replace(state, params={key: trained[key] for key in state.params})
        self._folder.sync()
        save(self._folder.checkpoint_folder, Checkpoint(round_idx=0, state=state, versions={}), store=self._store)
        return state

    def _round(self, evaluator: Evaluator, state: ServerState, round_idx: int, rounds: int) -> ServerState:
        job, method = self._job, self._method
        started = time.perf_counter()
        default = RoundPlan(round_idx=round_idx, num_steps=job.federation.local_steps, learning_rate=job.learning_rate)
        plan = method.plan(state, default)
        drawn = sample_cohort(job.worker.run_seed, round_idx, job.num_clients, job.federation.cohort_size)
        cohort = method.select(state, plan, drawn)
        check_cohort(cohort, job.num_clients)
        assignments = method.assign(state, plan, cohort)
        is_last = round_idx == rounds
        self._begin_round(state)
        tasks = [self._task(state, plan, client_id, assignments.get(client_id), is_last=is_last) for client_id in cohort]
        shared = self._pool.share(Broadcast(round_idx=round_idx, params=state.params, extras=state.extras))
        outcomes, handles, rows = self._train(tasks, state, shared)
        updates, reduced = self._average(state, tasks, outcomes, handles, shared)
        for task, again in self._made_again:
            down = (*self._describe_sent(task, state), *self._describe_requested(again, state))
            rows += _charge(task, down, None, num_tries=1, attempt=2)
        self._made_again.clear()
        new_state = method.aggregate(state, reduced, updates)
        for update in updates:
            if update.state_version is not None:
                self._versions[update.client_id] = update.state_version
                if update.state_digest is not None:
                    self._store.note_digest(update.client_id, update.state_version, update.state_digest)
        metrics = self._record(round_idx, updates, rows, time.perf_counter() - started)
        self._note_hashes(round_idx, new_state, updates)
        seen = method.observe_state(new_state)
        server = [{"round": round_idx, "client_id": None, "kind": kind, "values": values} for kind, values in seen.items()]
        self._folder.append("diagnostics", server)
        if round_idx % job.evaluation.every == 0 or round_idx == rounds:
            metrics |= self._evaluate(evaluator, new_state, round_idx, is_last=round_idx == rounds)
        # Before the checkpoint: after a kill between the two the round is run again, and tracking knows its steps.
        self._tracker.log_round(round_idx, metrics)
        if round_idx % job.checkpoint_every == 0 or round_idx == self._until:
            self._folder.sync()
            checkpoint = Checkpoint(round_idx=round_idx, state=new_state, versions=self._versions)
            save(self._folder.checkpoint_folder, checkpoint, store=self._store)
            self._on_checkpoint()
        return new_state

    def _begin_round(self, state: ServerState) -> None:
        """Forget what was found out about the last round's tasks: most clients of a round are sent the same."""
        self._keys = tuple(key for key in state.params if key in self._refs)
        self._checked.clear()
        self._sent.clear()

    def _held(self, assignment: Assignment | None) -> tuple[str, ...]:
        if assignment is None:
            return self._keys
        return tuple(key for key in self._keys if is_held(self._refs[key], assignment))

    def _task(
        self, state: ServerState, plan: RoundPlan, client_id: int, assignment: Assignment | None, *, is_last: bool
    ) -> ClientTask:
        task = ClientTask(
            client_id=client_id,
            plan=plan,
            keys=self._held(assignment),
            extra_keys=tuple(state.extras),
            assignment=assignment,
            budget=self._method.federation.budget(client_id),
            state_version=self._versions.get(client_id),
            hashes_frozen=is_last,
            num_parts=self._known_parts(client_id, plan.round_idx),
        )
        task = self._method.task(state, task)
        shape = _shape(task)
        if task.assignment is not None or shape not in self._checked:
            check_task(task, self._method.federation, state)
            self._checked.add(shape)
        check_budget(task, self._method.federation, self._method.budget_use)
        return task

    def _train(
        self, tasks: Sequence[ClientTask], state: ServerState, shared: Any
    ) -> tuple[list[ClientUpdate | ClientFailure], list[Any], list[Entry]]:
        """Let the cohort train; a client whose reply is a failure is tried again, up to ``max_failures`` times.

        Clients that share a pass share its retry, too: what each of them gets depends on who was in it, if only by rounding.
        """
        sent = [self._describe_sent(task, state) for task in tasks]  # refuses before anything leaves
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
            for finished in self._map([tuple(tasks[i] for i in each) for each in left], shared, owners, may_move=may_move):
                if finished.index in answered:
                    for position in left[finished.index]:
                        self._note_failure(_duplicate(tasks[position]))
                    continue
                answered.add(finished.index)
                if finished.error is not None:
                    is_over.add(finished.index)  # the pool has tried it max_failures times already
                for position, single in zip(left[finished.index], split(finished, len(left[finished.index])), strict=True):
                    task = tasks[position]
                    outcome = check_reply(task, state, single, self._limits)
                    outcomes[position] = outcome
                    if isinstance(outcome, ClientUpdate):
                        self._note_parts(task, outcome)
                        self._schedule.learn(task.client_id, outcome.seconds)
                    handles[position] = single.handle
                    down = (*sent[position], *self._describe_requested(outcome, state))
                    # What a client had sent in a pass that is run again was sent for nothing.
                    rows[position] = [replace(row, is_retry=row.is_retry or row.direction == "up") for row in rows[position]]
                    rows[position] += _charge(task, down, outcome, num_tries=single.num_tries, attempt=attempt)
            failed = [any(isinstance(outcomes[i], ClientFailure) for i in each) for each in left]
            left = sorted(each for index, each in enumerate(left) if failed[index] and index not in is_over)
            if not left:
                break
        for last in outcomes:
            if isinstance(last, ClientFailure):
                self._note_failure(last)
        # In cohort order, whoever came first: the ledger is part of what must not depend on the replicas.
        return [last for last in outcomes if last is not None], handles, [row for each in rows for row in each]

    def _map(
        self,
        groups: Sequence[tuple[ClientTask, ...]],
        shared: Any,
        owners: Sequence[int] | None = None,
        *,
        may_move: bool = True,
    ) -> Iterator[Finished]:
        """Let replicas train clients, those of a group in one pass."""
        together = self._schedule.group([[task.client_id for task in group] for group in groups], self._pool.size)
        how: dict[str, Any] = {"group": together, "homes": owners, "may_move": may_move}
        if self._at_once == 1:
            return self._pool.map("update", [task for (task,) in groups], shared, **how)
        return self._pool.map("update_many", [ClientGroup(tasks=group) for group in groups], shared, **how)

    def _note_failure(self, failure: ClientFailure) -> None:
        data: dict[str, Any] = {"client_id": failure.client_id, "stage": failure.stage, "error": failure.error}
        self._failures.append(data | {"round_idx": failure.round_idx})
        self._folder.write_info(failures=self._failures)
        self._emit(Event(kind="failure", label=self._job.label, data=data))

    def _known_parts(self, client_id: int, round_idx: int) -> int | None:
        """How many parts this client's batches were cut into by this round: a run that goes on does what it did."""
        known = [parts for at, parts in self._parts.get(client_id, {}).items() if at <= round_idx]
        return max(known, default=None)

    def _note_parts(self, task: ClientTask, update: ClientUpdate) -> None:
        """Write down at once that a client ran out of memory: the parts of its batches decide its bits."""
        before = task.num_parts or self._job.worker.engine.gradient_accumulation_steps
        if update.num_parts == before:
            return
        self._parts.setdefault(task.client_id, {})[task.round_idx] = update.num_parts
        listed = {str(client): {str(at): parts for at, parts in rounds.items()} for client, rounds in self._parts.items()}
        self._folder.write_info(batch_parts=listed)
        text = f"client {task.client_id} ran out of memory and cuts its batches into {update.num_parts} parts from round "
        self._emit(Event(kind="note", label=self._job.label, data={"text": f"{text}{task.round_idx} on"}))

    def _describe_sent(self, task: ClientTask, state: ServerState) -> tuple[TensorInfo, ...]:
        """List what goes down to a client: parameters by group, extras."""
        if task.extras:
            return self._describe_task(task, state)
        shape = _shape(task)
        if shape not in self._sent:
            self._sent[shape] = self._describe_task(task, state)
        return self._sent[shape]

    def _describe_task(self, task: ClientTask, state: ServerState) -> tuple[TensorInfo, ...]:
        return (
            *describe({key: state.params[task.addresses.get(key, key)] for key in task.keys}, self._groups),
            *describe({key: state.extras[key] for key in task.extra_keys} | task.extras, {}, kind="extras"),
        )

    def _describe_requested(self, outcome: ClientUpdate | ClientFailure, state: ServerState) -> tuple[TensorInfo, ...]:
        """List what a client asked for itself, in a second exchange of the round."""
        if isinstance(outcome, ClientFailure) or not outcome.requested:
            return ()
        return describe({key: state.params[name] for key, name in outcome.requested.items()}, self._groups)

    def _check_quorum(self, updates: Sequence[ClientUpdate], cohort_size: int, round_idx: int) -> None:
        wanted = min(self._job.federation.min_clients, cohort_size)
        if len(updates) < wanted:
            last = self._failures[-1]
            raise QuorumError(
                f"round {round_idx} of {self._job.label}: {len(updates)} of {cohort_size} clients answered, "
                f"federation.min_clients is {wanted}; client {last['client_id']} failed at {last['stage']}: {last['error']}",
                "mend the cause or lower federation.min_clients, then resume",
            )

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
                    self._note_failure(failure)

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

    def _record(self, round_idx: int, updates: Sequence[ClientUpdate], rows: Sequence[Entry], seconds: float) -> dict[str, float]:
        """Write the round's lines and report its event; gives what tracking gets."""
        merged = merge_metrics(updates)
        up, down = (sum(row.bytes for row in rows if row.direction == way and not row.is_retry) for way in ("up", "down"))
        tokens = torch.stack([update.expert_tokens for update in updates]).sum(dim=0)
        loss = merged["train_loss"].mean
        line = {
            "round": round_idx,
            "train_loss": loss,
            "bytes_up": up,
            "bytes_down": down,
            "bytes_retried": sum(row.bytes for row in rows if row.is_retry),
            "cohort": [update.client_id for update in updates],
            "client_train_loss": {str(update.client_id): update.metrics["train_loss"].mean for update in updates},
            "expert_tokens": tokens.tolist(),
            "seconds": seconds,
            "client_seconds": {str(update.client_id): update.seconds for update in updates},
        }
        self._folder.append("metrics", [line])
        self._folder.append("ledger", [row.as_json() for row in rows])
        notes: list[dict[str, Any]] = [
            {"round": round_idx, "client_id": None, "kind": "routing", "values": {"entropy": usage_entropy(tokens)}}
        ]
        for update in updates:
            for kind, values in update.diagnostics.items():
                if kind == "frozen_hash":
                    self._check_frozen(self._folder.read_info()["frozen_hash_start"], [str(values)])
                    continue
                notes.append({"round": round_idx, "client_id": update.client_id, "kind": kind, "values": values})
        self._folder.append("diagnostics", notes)
        data = {"round": round_idx, "train_loss": loss, "bytes_up": up, "bytes_down": down, "seconds": seconds}
        self._emit(Event(kind="round", label=self._job.label, data=data))
        return {"train_loss": loss, "bytes_up": float(up), "bytes_down": float(down), "seconds": seconds}

    def _note_hashes(self, round_idx: int, state: ServerState, updates: Sequence[ClientUpdate]) -> None:
        """Write down what the server's state and the private states written in a round are, for ``fedgraft verify``."""
        private = {str(update.client_id): update.state_hash for update in updates if update.state_hash is not None}
        self._folder.append("hashes", [{"round": round_idx, "server": hash_state(state), "private": private}])

    def _evaluate(self, evaluator: Evaluator, state: ServerState, round_idx: int, *, is_last: bool) -> dict[str, float]:
        started = time.perf_counter()
        found = evaluator.judge(state, self._versions, round_idx, is_last=is_last)
        self._folder.append("evaluations", found.rows)
        self._folder.append("diagnostics", found.diagnostics)
        summary = found.summary
        data: dict[str, object] = {"round": round_idx, "seconds": time.perf_counter() - started, **summary}
        self._emit(Event(kind="evaluation", label=self._job.label, data=data))
        if round_idx == 0:
            self._tracker.log_round(0, {f"eval.{name}": value for name, value in summary.items()})
        return {f"eval.{name}": value for name, value in summary.items()}

    def _check_frozen(self, expected: str, found: Sequence[str]) -> None:
        if any(value != expected for value in found):
            raise GroupViolation(
                f"{self._job.label}: frozen tensors changed on a replica (hash {expected[:12]} became "
                f"{next(value for value in found if value != expected)[:12]})",
                "a hook of the method wrote into the base model",
            )


def usage_entropy(tokens_LE: torch.Tensor) -> list[float]:
    """Entropy of expert use by layer, nats; 0 where one expert gets everything, log E where all get the same."""
    shares = tokens_LE.double() / tokens_LE.sum(dim=1, keepdim=True).clamp_min(1)
    logs = torch.where(shares > 0, shares.log(), torch.zeros_like(shares))
    return [max(0.0, float(value)) if math.isfinite(float(value)) else 0.0 for value in -(shares * logs).sum(dim=1)]


def _charge(task: ClientTask, sent: Sequence[TensorInfo], outcome: Any, *, num_tries: int, attempt: int) -> list[Entry]:
    """Ledger rows of one task: what went down, once more for every retry, marked so, and what came up."""
    rows: list[Entry] = []
    for number in range(num_tries):
        is_retry = attempt > 1 or number > 0
        rows += entries(task.round_idx, task.client_id, "down", sent, is_retry=is_retry)
    if isinstance(outcome, ClientUpdate):
        rows += entries(task.round_idx, task.client_id, "up", outcome.payload)
    return rows


def _shape(task: ClientTask) -> _Shape:
    """What decides about a task's names, beside what its client alone is sent or assigned."""
    return task.keys, tuple(task.addresses.items()), task.extra_keys, task.publishes


def _duplicate(task: ClientTask) -> ClientFailure:
    error = "the client's reply came twice; the first one counts"
    return ClientFailure(client_id=task.client_id, round_idx=task.round_idx, stage="reply", error=error)


def _lost(whose: ClientTask | ClientUpdate) -> QuorumError:
    return QuorumError(f"the update of client {whose.client_id} was lost and could not be made again", "resume the run")
