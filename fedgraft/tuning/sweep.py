"""A sweep from start to finish: its folder, its trials on Ray Tune, its journal, and going on with one that was stopped.

<output.folder>/<name>-<time>/
    sweep.yaml      the sweep, base inlined
    sweep.json      what is known of its trials; see ``fedgraft.tuning.journal``
    trials/0000/    one experiment a trial: one method, all seeds
    data/           prepared data that trials share
    tune/           what Ray Tune keeps for itself; never read
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgraft.errors import ClusterError, ConfigError, FedgraftError, RunInterrupted
from fedgraft.platform.comparison import write_sweep_report
from fedgraft.platform.config import ExecutorConfig, RunConfig
from fedgraft.platform.launch import cluster
from fedgraft.platform.loading import check_inputs, dump_config
from fedgraft.platform.plan import settle
from fedgraft.platform.progress import Event
from fedgraft.platform.run_tags import run_tags
from fedgraft.platform.tracking import Tracker
from fedgraft.tuning.experiment import new_folder
from fedgraft.tuning.journal import Journal, TrialRecord
from fedgraft.tuning.locks import hold
from fedgraft.tuning.space import Point, value_at
from fedgraft.tuning.sweep_loading import PlannedTrial, Sweep, dump_sweep, load_sweep, make_trial, trial_id
from fedgraft.tuning.sweep_plan import plan_sweep
from fedgraft.tuning.sweep_run import TrialJobs, run_trials
from fedgraft.tuning.trainable import FAILURE

__all__ = ["SweepResult", "sweep"]


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepResult:
    """A sweep as its folder has it.

    Attributes:
        folder: Of the sweep.
        status: ``finished``; ``failed`` where every trial failed.
        metric: What points were judged by.
        mode: ``min`` or ``max``: what is better.
        trials: In the order of their names.
        report: The HTML report; ``None`` where none was written.
    """

    folder: Path
    status: str
    metric: str
    mode: str
    trials: tuple[TrialRecord, ...]
    report: Path | None = None

    def of(self, *statuses: str) -> tuple[TrialRecord, ...]:
        """Trials of some statuses."""
        return tuple(trial for trial in self.trials if trial.status in statuses)


def sweep(
    config: Sweep | None = None,
    *,
    resume: Path | str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> SweepResult:
    """Run a sweep, or go on with one.

    Args:
        config: What ``load_sweep`` gives; ``None`` only with ``resume``.
        resume: Folder of a sweep that was stopped or killed. Trials that are over are left alone; those that were under way go
            on from their own checkpoints; those that failed are tried again.
        on_event: Gets the trials' events while it runs, labelled with their trials, in this process.

    Raises:
        ConfigError: The sweep, or something that it names, is wrong.
        ClusterError: Ray does not start, or no node has what a trial wants.
        RunInterrupted: Ctrl-C; the sweep can be resumed.
        FedgraftError: Another command runs this sweep, or every trial failed.
    """
    notify = on_event or (lambda event: None)
    if resume is not None:
        folder = Path(resume).resolve()
        journal = Journal.load(folder)
        config = load_sweep(folder / "sweep.yaml")
    elif config is None:
        raise FedgraftError("nothing to sweep: neither a sweep nor a folder to resume was given")
    else:
        plan = plan_sweep(config)  # refuses what cannot run before anything of it is made
        if isinstance(plan.refusal, ConfigError):
            raise plan.refusal
        folder = new_folder(_root(config), config.config.name)
        journal = _begin(config, folder)
    with hold(folder / ".lock", timeout_s=0, busy=f"the sweep in {folder} is run by another command"):
        return _Command(config, journal, notify).run()


def _root(config: Sweep) -> Path:
    """Folder of all runs; the sweep's own is in it, and so is MLflow's default database."""
    return (config.trials or config.corners)[0].config.output.folder


def _begin(config: Sweep, folder: Path) -> Journal:
    (folder / "sweep.yaml").write_text(dump_sweep(config.config))
    stated = config.config
    example = (config.trials or config.corners)[0].config
    journal = Journal(
        folder,
        {
            "name": stated.name,
            "keys": list(stated.space),
            "metric": stated.metric,
            "mode": stated.mode,
            "scheduler": stated.scheduler.name,
            "search": stated.search.name,
            "seeds": list(example.seeds),
            "tracking_uri": None,
        },
    )
    for trial in config.trials:
        journal.trials[trial.trial_id] = _record(trial)
    journal.save()
    return journal


def _record(trial: PlannedTrial, proposed: Mapping[str, Any] | None = None) -> TrialRecord:
    return TrialRecord(
        trial_id=trial.trial_id,
        point=trial.point,
        label=trial.label,
        folder=f"trials/{trial.trial_id}",
        rounds=trial.rounds,
        proposed=dict(proposed) if proposed is not None else None,
    )


class _Command:
    """One pass over a sweep's folder."""

    def __init__(self, config: Sweep, journal: Journal, notify: Callable[[Event], None]) -> None:
        self._sweep = config
        self._config = config.config
        self._journal = journal
        self._folder = journal.folder
        self._notify = notify
        self._known = {trial.trial_id: trial for trial in config.trials}

    def run(self) -> SweepResult:
        """Run what is left."""
        left = [self._planned(record) for record in self._journal.trials.values() if not record.is_over]
        example = (self._sweep.trials or self._sweep.corners)[0].config
        check_inputs(example, str(self._folder / "sweep.yaml"))
        tracker = self._tracker(example)
        self._journal.status, self._journal.mlflow_run_id = "running", tracker.run_id
        self._journal.facts["tracking_uri"] = tracker.uri or None
        self._journal.save()
        jobs = TrialJobs(
            config=self._config, journal=self._journal, trials=[trial for trial in left if trial is not None],
            longest=max(trial.rounds for trial in (*self._sweep.trials, *self._sweep.corners)), propose=self._propose,
        )  # fmt: skip
        status = "failed"
        try:
            with cluster(self._executor(example)):
                run_trials(jobs, [*self._sweep.trials, *self._sweep.corners], self._notify)
            status = self._outcome()
        except (KeyboardInterrupt, RunInterrupted):
            status = "stopped"
            raise RunInterrupted("the sweep was stopped", f"go on with: fedgraft sweep --resume {self._folder}") from None
        except ClusterError as error:
            raise ClusterError(error.message, f"{error.hint}; go on with: fedgraft sweep --resume {self._folder}") from None
        finally:
            self._close(status, tracker)
        return self._result()

    def _executor(self, example: RunConfig) -> ExecutorConfig:
        """Which cluster: the sweep's address, else that of its base."""
        address = self._config.resources.address or example.executor.address
        return ExecutorConfig(address=address, start_timeout_s=example.executor.start_timeout_s)

    def _planned(self, record: TrialRecord) -> PlannedTrial | None:
        """The trial of a record, its folder ready; ``None`` for a point that is invalid and stays failed."""
        trial = self._known.get(record.trial_id)
        if trial is None or trial.point != record.point:
            try:
                trial = make_trial(self._config, int(record.trial_id), record.point)
            except ConfigError:
                if record.status == "failed":
                    return None
                raise
        folder = self._folder / record.folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "config.yaml").is_file():
            (folder / "config.yaml").write_text(dump_config(settle(trial.config)))
        (folder / FAILURE).unlink(missing_ok=True)
        record.status, record.error = "pending", None
        return trial

    def _propose(self, proposed: Point, point: Point) -> PlannedTrial | None:
        """Put a proposed point into the journal; ``None`` where it is invalid, which is a trial that failed."""
        number = len(self._journal.trials)
        try:
            trial = make_trial(self._config, number, point)
        except ConfigError as error:
            name = trial_id(number)
            self._journal.add(
                TrialRecord(
                    trial_id=name,
                    point=point,
                    label="invalid",
                    folder=f"trials/{name}",
                    status="failed",
                    error=str(error),
                    proposed=proposed,
                )
            )
            self._notify(Event(kind="note", label=name, data={"text": f"the proposed point is invalid: {error}"}))
            return None
        record = _record(trial, proposed)
        self._journal.add(record)
        return self._planned(record)

    def _tracker(self, example: RunConfig) -> Tracker:
        """The sweep's own MLflow run: new, or the one that the journal remembers."""
        tree = {key: value for key, value in self._config.model_dump(mode="json").items() if key != "base"}
        return Tracker.start(
            example.tracking,
            _root(self._sweep),
            self._folder.name,
            tree,
            run_tags(example, "sweep", self._folder, more={"sweep": self._folder.name}),
            run_id=self._journal.mlflow_run_id,
        )

    def _outcome(self) -> str:
        records = self._journal.trials.values()
        if any(record.status in ("pending", "running", "stopped") for record in records):
            raise RunInterrupted("", "")
        return "failed" if all(record.status == "failed" for record in records) else "finished"

    def _close(self, status: str, tracker: Tracker) -> None:
        """Leave journal and MLflow in a state that says how it ended."""
        for record in self._journal.trials.values():
            if record.status == "running":
                record.status = "stopped"
        self._journal.status = status
        self._close_runs()
        self._journal.save()
        tracker.finish(status, [self._folder / "sweep.yaml", self._folder / "sweep.json"])

    def _close_runs(self) -> None:
        """Mark the MLflow runs of trials that their own process could not close: stopped early, killed, interrupted."""
        tracking = (self._sweep.trials or self._sweep.corners)[0].config.tracking
        for record in self._journal.trials.values():
            if record.status in ("finished", "pending"):
                continue
            # From the trial's own folder: the journal learns of them at the first rung only.
            infos = [json.loads(path.read_text()) for path in (self._folder / record.folder).glob("*/seed-*/run.json")]
            record.mlflow_run_ids |= {str(info["seed"]): info["mlflow_run_id"] for info in infos if info.get("mlflow_run_id")}
            for run_id in record.mlflow_run_ids.values():
                tags = {"fedgraft.stopped_early": "true"} if record.status == "stopped_early" else None
                run = Tracker.start(tracking, _root(self._sweep), "", {}, tags, run_id=run_id)
                run.finish({"stopped_early": "finished", "failed": "failed"}.get(record.status, "stopped"))

    def _result(self) -> SweepResult:
        journal = self._journal
        has_report = any(trial.status == "finished" for trial in journal.trials.values())
        has_report &= value_at(self._config.base, "output.report") is not False
        report = write_sweep_report(self._folder) if has_report else None
        self._notify(Event(kind="done", data={"folder": str(self._folder), "report": str(report or "")}))
        result = SweepResult(
            folder=self._folder,
            report=report,
            status=journal.status,
            metric=journal.facts["metric"],
            mode=journal.facts["mode"],
            trials=tuple(journal.trials.values()),
        )
        if journal.status == "failed":
            first = result.trials[0]
            raise FedgraftError(
                f"all {len(result.trials)} trials failed; {first.trial_id}: {first.error}",
                f"mend the cause, then go on with: fedgraft sweep --resume {self._folder}",
            )
        return result
