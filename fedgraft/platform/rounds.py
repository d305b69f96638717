"""The one loop over rounds: plan, let the cohort train, weigh, reduce, step, evaluate, checkpoint, record.

No method loops over rounds, and nothing here knows which method it runs or who does the work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from safetensors.torch import load_file

from fedgraft.actors.hosting import Pool
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import CheckpointError, GroupViolation, RunInterrupted
from fedgraft.platform.checkpoint import Checkpoint, hash_state, load_latest, save
from fedgraft.platform.client_notes import BatchParts, Failures
from fedgraft.platform.evaluation import Evaluator, Found
from fedgraft.platform.exchange import Exchange
from fedgraft.platform.ledger import Entry
from fedgraft.platform.progress import Event
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.sampling import sample_cohort
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.task_checks import check_budget, check_cohort
from fedgraft.platform.task_shapes import TaskShapes
from fedgraft.platform.tracking import Tracker
from fedgraft.protocols import Method, merge_metrics
from fedgraft.registry import METHODS
from fedgraft.types import (
    Assignment,
    Broadcast,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    Federation,
    Group,
    ParamRef,
    RoundPlan,
    ServerState,
)

__all__ = ["RoundLoop"]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    """A round that is over but for its models' judgement: they are judged beside the next round's training, or when it stops.

    ``metrics`` are what tracking gets of the round itself. ``is_again``: an earlier process may have begun to write it down.
    """

    round_idx: int
    tasks: list[EvaluationTask]
    metrics: dict[str, float]
    started: float
    is_again: bool = False


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
        self._until = 0
        self._waiting: _Waiting | None = None
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
        at_once = self._clients_at_once(facts[0].get("one_by_one"))
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
                tasks = evaluator.tasks(state, self._versions, 0, is_last=rounds == 0)
                self._waiting = _Waiting(round_idx=0, tasks=tasks, metrics={}, started=time.perf_counter())
                self._judge_what_waits(evaluator, state)
        else:
            state, done, self._versions = checkpoint.state, checkpoint.round_idx, dict(checkpoint.versions)
            self._folder.truncate(done)
            self._judge_what_was_left(evaluator, state, done, rounds)
        failures = Failures(self._folder, self._emit, job.label, done=done)
        self._batch_parts = BatchParts(self._folder, job.worker.engine.gradient_accumulation_steps, self._note)
        self._exchange = Exchange(job, self._pool, method, failures=failures, batch_parts=self._batch_parts, at_once=at_once)
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
                self._judge_what_waits(evaluator, state)
                raise RunInterrupted(f"{job.label} stopped after round {round_idx - 1} of {rounds}", "it can be resumed")
            state = self._round(evaluator, state, round_idx, rounds)
        if self._until == rounds:
            self._check_frozen(frozen, [fact["frozen_hash"] for fact in self._pool.call("describe")])
            self._folder.write_info(frozen_hash_end=frozen)
        self._folder.sync()
        failures.write()
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
        shapes = TaskShapes(state, self._refs, self._groups, method.federation)
        tasks = [self._task(state, plan, client_id, assignments.get(client_id), shapes, is_last=is_last) for client_id in cohort]
        shared = self._pool.share(Broadcast(round_idx=round_idx, params=state.params, extras=state.extras))
        waiting = self._waiting
        exchanged = self._exchange.run(tasks, state, shared, shapes, () if waiting is None else waiting.tasks)
        if waiting is not None:
            self._note_judged(evaluator.gather(waiting.tasks, exchanged.judged), waiting)
        updates = exchanged.updates
        new_state = method.aggregate(state, exchanged.reduced, updates)
        for update in updates:
            if update.state_version is not None:
                self._versions[update.client_id] = update.state_version
                if update.state_digest is not None:
                    self._store.note_digest(update.client_id, update.state_version, update.state_digest)
        metrics = self._record(round_idx, updates, exchanged.rows, time.perf_counter() - started)
        self._note_hashes(round_idx, new_state, updates)
        seen = method.observe_state(new_state)
        server = [{"round": round_idx, "client_id": None, "kind": kind, "values": values} for kind, values in seen.items()]
        self._folder.append("diagnostics", server)
        if self._is_judged(round_idx, rounds):
            self._waiting = _Waiting(
                round_idx=round_idx,
                tasks=evaluator.tasks(new_state, self._versions, round_idx, is_last=is_last),
                metrics=metrics,
                started=time.perf_counter(),
            )
            if self._pool.size == 1 or round_idx == self._until:
                self._judge_what_waits(evaluator, new_state)
        else:
            # Before the checkpoint: after a kill between the two the round is run again, and tracking knows its steps.
            self._tracker.log_round(round_idx, metrics)
        if round_idx % job.checkpoint_every == 0 or round_idx == self._until:
            self._folder.sync()
            checkpoint = Checkpoint(round_idx=round_idx, state=new_state, versions=self._versions)
            save(self._folder.checkpoint_folder, checkpoint, store=self._store)
            self._on_checkpoint()
        return new_state

    def _task(
        self,
        state: ServerState,
        plan: RoundPlan,
        client_id: int,
        assignment: Assignment | None,
        shapes: TaskShapes,
        *,
        is_last: bool,
    ) -> ClientTask:
        task = ClientTask(
            client_id=client_id,
            plan=plan,
            keys=shapes.held(assignment),
            extra_keys=tuple(state.extras),
            assignment=assignment,
            budget=self._method.federation.budget(client_id),
            state_version=self._versions.get(client_id),
            hashes_frozen=is_last,
            num_parts=self._batch_parts.known(client_id, plan.round_idx),
        )
        task = self._method.task(state, task)
        shapes.check(task)
        check_budget(task, self._method.federation, self._method.budget_use)
        return task

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

    def _is_judged(self, round_idx: int, rounds: int) -> bool:
        return round_idx % self._job.evaluation.every == 0 or round_idx == rounds

    def _judge_what_waits(self, evaluator: Evaluator, state: ServerState) -> None:
        """Judge the models of the last round now, if they are not yet."""
        waiting = self._waiting
        if waiting is not None:
            self._note_judged(evaluator.judge(waiting.tasks, state), waiting)

    def _judge_what_was_left(self, evaluator: Evaluator, state: ServerState, done: int, rounds: int) -> None:
        """Judge the models of the round that a run goes on from, where it ended between checkpoint and judgement."""
        if (
            done == 0
            or not self._is_judged(done, rounds)
            or any(row["round"] == done for row in self._folder.rows("evaluations"))
        ):
            return
        (line,) = (row for row in self._folder.rows("metrics") if row["round"] == done)
        metrics = {name: float(line[name]) for name in ("train_loss", "bytes_up", "bytes_down", "seconds")}
        tasks = evaluator.tasks(state, self._versions, done, is_last=done == rounds)
        self._waiting = _Waiting(round_idx=done, tasks=tasks, metrics=metrics, started=time.perf_counter(), is_again=True)
        self._judge_what_waits(evaluator, state)

    def _note_judged(self, found: Found, waiting: _Waiting) -> None:
        """Write down and tell what was judged. The rows come last: they say that nothing of it is missing."""
        round_idx, summary = waiting.round_idx, {f"eval.{name}": value for name, value in found.summary.items()}
        self._tracker.log_round(round_idx, waiting.metrics | summary)
        known = [row for row in self._folder.rows("diagnostics") if row["round"] == round_idx] if waiting.is_again else []
        self._folder.append("diagnostics", [row for row in found.diagnostics if row not in known])
        self._folder.append("evaluations", found.rows)
        data: dict[str, object] = {"round": round_idx, "seconds": time.perf_counter() - waiting.started, **found.summary}
        self._emit(Event(kind="evaluation", label=self._job.label, data=data))
        self._waiting = None

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
