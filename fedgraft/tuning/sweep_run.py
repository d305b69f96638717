"""Runs the trials of a sweep on Ray Tune, and writes down what comes of each."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray
from ray import tune

from fedgraft.platform.progress import Event
from fedgraft.tuning.journal import Journal, TrialRecord
from fedgraft.tuning.placement import require_room
from fedgraft.tuning.searching import Husk, ListedTrials, OptunaTrials, make_scheduler
from fedgraft.tuning.space import Point, applicable
from fedgraft.tuning.sweep_config import SweepConfig
from fedgraft.tuning.sweep_loading import PlannedTrial
from fedgraft.tuning.trainable import EVENTS, FAILURE, SweepTrial
from fedgraft.tuning.trial import TrialJob

__all__ = ["TrialJobs", "run_trials"]

_LOOK_S = 0.5
"""Shortest time between two looks at the trials' events."""

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # results are in the trials' own folders
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}
_SHOWN = ("run_started", "round", "evaluation", "failure", "note", "run_finished", "pretrain")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialJobs:
    """What is to be run.

    Attributes:
        config: The sweep.
        journal: Of the sweep; has a record for every trial.
        trials: Those that are left of the ones in the journal.
        longest: Rounds of the longest trial.
        propose: Makes a trial of a proposed point (all values, then those that apply), with Optuna.
    """

    config: SweepConfig
    journal: Journal
    trials: Sequence[PlannedTrial]
    longest: int
    propose: Callable[[Point, Point], PlannedTrial | None]


def run_trials(jobs: TrialJobs, kinds: Sequence[PlannedTrial], notify: Callable[[Event], None]) -> None:
    """Run what is left, until all is over or Ctrl-C.

    Args:
        jobs: What.
        kinds: Trials that stand for all that may come; the cluster must have room for each of them.
        notify: Gets events, labelled with their trials.

    Raises:
        ClusterError: No set of nodes has what a trial wants.
    """
    require_room(kinds, [node["Resources"] for node in ray.nodes() if node["Alive"]])
    config, journal = jobs.config, jobs.journal
    notify(Event(kind="plan", data={"total_rounds": _rounds_left(jobs)}))
    maker = _ConfigMaker(jobs)
    records = list(journal.trials.values())
    listed = [maker.config(trial) for trial in jobs.trials]
    if config.search.name == "optuna":
        search: ListedTrials = OptunaTrials(config, listed, records, maker.propose)
        num_samples = len(listed) + config.search.num_points
    else:
        search = ListedTrials(listed)
        num_samples = len(listed)
    scribe = _Scribe(journal, notify)
    if not num_samples:
        return
    pending = "1" if config.search.name == "optuna" else str(len(listed))
    with _quiet_tune(pending):
        tuner = tune.Tuner(
            SweepTrial,
            tune_config=tune.TuneConfig(
                search_alg=search,
                scheduler=make_scheduler(config, jobs.longest, records),
                num_samples=num_samples,
                max_concurrent_trials=config.resources.concurrency,
                reuse_actors=True,
                trial_name_creator=_name,
                trial_dirname_creator=_name,
            ),
            run_config=tune.RunConfig(
                name=_session(journal),
                storage_path=str(journal.folder / "tune"),
                callbacks=[scribe],
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # trials keep checkpoints of their own
                failure_config=tune.FailureConfig(max_failures=config.resources.max_restarts),
                verbose=0,
            ),
        )
        tuner.fit()
    scribe.take_events()


def _name(trial: Any) -> str:
    return str(trial.config["job"]["trial_id"])


def _session(journal: Journal) -> str:
    """A folder of its own for every time that the sweep is run: nothing of an earlier one is read."""
    return f"session-{len(list((journal.folder / 'tune').glob('session-*')))}"


def _rounds_left(jobs: TrialJobs) -> int:
    records = jobs.journal.trials
    left = sum(trial.rounds - records[trial.trial_id].rounds_done for trial in jobs.trials)
    if jobs.config.search.name == "optuna":
        left += (jobs.config.search.num_points - len(records)) * jobs.longest
    return left * len(jobs.journal.facts["seeds"])


class _ConfigMaker:
    """Makes what a trial's process gets."""

    def __init__(self, jobs: TrialJobs) -> None:
        self._jobs = jobs

    def config(self, trial: PlannedTrial) -> dict[str, Any]:
        """JSON values only: Tune writes it down."""
        journal, config = self._jobs.journal, self._jobs.config
        judged = journal.trials[trial.trial_id].rungs
        job = TrialJob(
            trial_id=trial.trial_id,
            sweep_folder=str(journal.folder),
            kind=trial.config.executor.kind,
            rungs=tuple(rung for rung in trial.rungs if str(rung) not in judged or rung == trial.rungs[-1]),
            metric=config.metric,
            split=config.split,
            mlflow_run_id=journal.mlflow_run_id,
        )
        return {"job": asdict(job), "bundles": list(trial.bundles)}

    def propose(self, proposed: Point) -> dict[str, Any] | None:
        """Make a trial of what Optuna proposes."""
        point = applicable(self._jobs.config.space, self._jobs.config.base, proposed)
        trial = self._jobs.propose(proposed, point)
        return None if trial is None else self.config(trial)


class _Scribe(Husk, tune.Callback):  # type: ignore[misc]
    """Writes down what Tune tells, and hands over the trials' events."""

    def __init__(self, journal: Journal, notify: Callable[[Event], None]) -> None:
        self._journal = journal
        self._notify = notify
        self._looked = 0.0
        files = {trial: journal.folder / record.folder / EVENTS for trial, record in journal.trials.items()}
        self._offsets = {trial: path.stat().st_size for trial, path in files.items() if path.is_file()}  # of an earlier command
        self._seed: dict[str, Any] = {}
        self._rounds: dict[str, dict[Any, int]] = {}

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Look at what the trials wrote, not too often."""
        if time.monotonic() - self._looked >= _LOOK_S:
            self._looked = time.monotonic()
            self.take_events()

    def take_events(self) -> None:
        """Hand over what came."""
        is_new_round = False
        for record in self._journal.trials.values():
            if record.status == "pending":
                continue
            for event in self._read(record):
                is_new_round |= event.kind == "round"
                self._count(record, event)
                if event.kind in _SHOWN:
                    self._notify(Event(kind=event.kind, label=f"{record.trial_id} {record.label}", data=event.data))
        if is_new_round:
            self._journal.save()

    def _read(self, record: TrialRecord) -> list[Event]:
        """The whole lines that a trial's process added since the last look."""
        path = self._journal.folder / record.folder / EVENTS
        if not path.is_file():
            return []
        with path.open("rb") as stream:
            stream.seek(self._offsets.get(record.trial_id, 0))
            lines = stream.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offsets[record.trial_id] = self._offsets.get(record.trial_id, 0) + len(whole)
        found = []
        for line in whole.splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # torn: its process was killed while it wrote, and another one went on in the next line
            found.append(Event(kind=event["kind"], data=event["data"]))
        return found

    def _count(self, record: TrialRecord, event: Event) -> None:
        """Note a round; a trial has done as many as the seed that is least far."""
        trial_id = record.trial_id
        rounds = self._rounds.setdefault(trial_id, {})
        if event.kind == "run_started":
            self._seed.pop(trial_id, None)  # rounds of a rate search do not count
            if event.data.get("purpose") == "run":
                self._seed[trial_id] = event.data["seed"]
        elif event.kind == "round" and trial_id in self._seed:
            rounds[self._seed[trial_id]] = int(event.data["round"])  # type: ignore[call-overload]
            if len(rounds) == len(self._journal.facts["seeds"]):
                record.rounds_done = max(record.rounds_done, min(rounds.values()))

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has its process."""
        self._record(trial).status = "running"
        self._journal.save()

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A trial came to a rung."""
        record = self._record(trial)
        record.rounds_done, record.score = int(result["rounds"]), float(result["score"])
        record.rungs[str(record.rounds_done)] = record.score
        record.setup_seconds = (record.setup_seconds or 0.0) + result["setup_seconds"]
        record.train_seconds = (record.train_seconds or 0.0) + result["train_seconds"]
        record.node = f"{result['node']} {result['node_id'][:8]}"
        record.mlflow_run_ids = result["mlflow_run_ids"]
        if result["is_last"]:
            record.status = "finished"
        self._journal.save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial is over: it has its last rung, or the scheduler stopped it."""
        record = self._record(trial)
        if record.status == "running":
            record.status = "stopped_early"
            text = f"stopped early after round {record.rounds_done} of {record.rounds}"
            self._notify(Event(kind="note", label=f"{record.trial_id} {record.label}", data={"text": text}))
        self._journal.save()

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed for good."""
        record = self._record(trial)
        failure = self._journal.folder / record.folder / FAILURE
        record.status = "failed"
        record.error = json.loads(failure.read_text())["error"] if failure.is_file() else _death(Path(trial.local_path))
        self._notify(Event(kind="note", label=f"{record.trial_id} {record.label}", data={"text": f"failed: {record.error}"}))
        self._journal.save()

    def _record(self, trial: Any) -> TrialRecord:
        return self._journal.trials[_name(trial)]


def _death(folder: Path) -> str:
    """What Ray says of a trial's process that raised nothing itself."""
    path = folder / "error.txt"
    lines = [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    return f"its process died: {lines[-1]}" if lines else "its process died"


@contextmanager
def _quiet_tune(pending: str) -> Iterator[None]:
    """Set what Tune reads from the environment and silence its log, whose errors are in the journal, while it runs."""
    settings = {**_TUNE_SETTINGS, "TUNE_MAX_PENDING_TRIALS_PG": pending}
    before = {name: os.environ.get(name) for name in settings}
    log = logging.getLogger("ray.tune")
    level = log.level
    os.environ.update(settings)
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
