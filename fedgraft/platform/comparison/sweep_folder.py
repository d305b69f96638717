"""Reads ``sweep.json``: which points a sweep tries, and what became of each trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from fedgraft.errors import ResultsError
from fedgraft.platform.results import read_json

__all__ = ["SweepRecord", "TrialRecord", "read_sweep"]

_FORMAT = 1

TrialStatus = Literal["pending", "running", "finished", "stopped_early", "failed", "stopped"]


class TrialRecord(BaseModel):
    """One trial: a point of the sweep with all its seeds, in an experiment folder of its own.

    Attributes:
        trial_id: Its number, as text.
        point: Values by key path; a key that does not apply to this point is absent.
        label: Tells the method shortly.
        folder: Relative to the sweep's.
        status: ``stopped_early`` is the scheduler's doing, ``stopped`` the user's.
        rounds: Planned.
        rounds_done: So far.
        error: Why it failed.
        score: The sweep's own, on validation data.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")  # what a later fedgraft adds does not concern a reader

    trial_id: str
    point: dict[str, Any]
    label: str
    folder: str
    status: TrialStatus
    rounds: int = 0
    rounds_done: int = 0
    error: str | None = None
    score: float | None = None


class SweepRecord(BaseModel):
    """A sweep as ``sweep.json`` has it."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int
    name: str
    status: Literal["running", "finished", "stopped", "failed"]
    keys: list[str]
    metric: str = ""
    seeds: list[int] = []
    trials: list[TrialRecord] = []


def read_sweep(folder: Path) -> SweepRecord:
    """Read a sweep's record.

    Args:
        folder: Holds ``sweep.json``.

    Raises:
        ResultsError: The file is missing or torn, of another format, or lacks a field; all wrong fields are named.
    """
    path = folder / "sweep.json"
    data = read_json(path)
    if data.get("format") != _FORMAT:
        raise ResultsError(
            f"{path}: format: got {data.get('format')!r}; expected {_FORMAT}", "read it with the fedgraft that wrote it"
        )
    try:
        return SweepRecord.model_validate(data)
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
        raise ResultsError(f"{path}: {wrong}", "is this the folder of a sweep?") from error
