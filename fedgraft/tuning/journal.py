"""What is known of a sweep's trials: ``sweep.json``, written by the command and by nobody else, whole after every change."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedgraft.errors import CheckpointError
from fedgraft.platform.run_folder import write_json
from fedgraft.tuning.space import Point

__all__ = ["Journal", "Status", "TrialRecord"]

Status: TypeAlias = Literal["pending", "running", "finished", "stopped_early", "failed", "stopped"]

_FORMAT = 1


@dataclass(kw_only=True, slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        trial_id: Names its folder.
        point: Values by key path.
        label: Its method in few words.
        folder: In the sweep's folder.
        status: ``stopped_early`` is the scheduler's doing; ``stopped`` trials go on when the sweep is resumed.
        rounds: Planned.
        rounds_done: Of the seed that is least far.
        error: Of a failed trial.
        score: Mean over the seeds of the sweep's metric after the last rung.
        rungs: That mean after every rung, by round; what a resumed sweep tells its scheduler.
        setup_seconds: Of the trial's process: imports, base, data, models, replicas; not what a reused process had already.
        train_seconds: Rounds and evaluations.
        node: Address of the node that it ran on last.
        mlflow_run_ids: By seed.
        proposed: What Optuna proposed, by key path; also values that the point lacks because their condition does not hold.
    """

    trial_id: str
    point: Point
    label: str
    folder: str
    status: Status = "pending"
    rounds: int = 0
    rounds_done: int = 0
    error: str | None = None
    score: float | None = None
    rungs: dict[str, float] = field(default_factory=dict)
    setup_seconds: float | None = None
    train_seconds: float | None = None
    node: str | None = None
    mlflow_run_ids: dict[str, str] = field(default_factory=dict)
    proposed: dict[str, Any] | None = None

    @property
    def is_over(self) -> bool:
        """Whether a resumed sweep leaves it alone."""
        return self.status in ("finished", "stopped_early")


class Journal:
    """All trials of a sweep, and what holds for the whole of it.

    Args:
        folder: Of the sweep.
        facts: ``name``, ``keys``, ``metric``, ``mode``, ``scheduler``, ``search``, ``seeds``, ``tracking_uri``.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]) -> None:
        self.folder = folder
        self.facts = dict(facts)
        self.status = "running"
        self.mlflow_run_id: str | None = None
        self.trials: dict[str, TrialRecord] = {}

    @classmethod
    def load(cls, folder: Path) -> Journal:
        """Read the journal of a sweep that was begun.

        Raises:
            CheckpointError: There is none, it is torn, or of another format.
        """
        path = folder / "sweep.json"
        try:
            data = json.loads(path.read_text())
            trials = [TrialRecord(**{key: each[key] for key in _FIELDS if key in each}) for each in data.pop("trials")]
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder} holds no sweep.json", "name the folder of a sweep, e.g. runs/heterogeneity-..."
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is torn or was changed: {error}", "start the sweep anew") from error
        if data.pop("format", None) != _FORMAT:
            raise CheckpointError(f"{path} is not of format {_FORMAT}", "resume it with the version of fedgraft that began it")
        journal = cls(folder, {key: value for key, value in data.items() if key not in ("status", "mlflow_run_id")})
        journal.status, journal.mlflow_run_id = data["status"], data["mlflow_run_id"]
        journal.trials = {trial.trial_id: trial for trial in trials}
        return journal

    def add(self, record: TrialRecord) -> None:
        """Put a new trial into the journal."""
        self.trials[record.trial_id] = record
        self.save()

    def save(self) -> None:
        """Write it all; a reader finds the old or the new journal, whole."""
        write_json(
            {
                "format": _FORMAT,
                **self.facts,
                "status": self.status,
                "mlflow_run_id": self.mlflow_run_id,
                "trials": [asdict(trial) for trial in self.trials.values()],
            },
            self.folder / "sweep.json",
        )


_FIELDS = tuple(each.name for each in fields(TrialRecord))
