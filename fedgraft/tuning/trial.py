"""One trial as its process runs it: an experiment of one method and all seeds, brought from rung to rung.

All seeds run up to a rung before the trial is judged there, so a scheduler never sees a lucky first seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

from fedgraft.actors.hosting import JobContext, Note, Pool, PoolOptions
from fedgraft.errors import FedgraftError
from fedgraft.platform.leftovers import remove_leftovers
from fedgraft.platform.progress import Event
from fedgraft.platform.results import read_comparison, round_values
from fedgraft.platform.run_folder import RunFolder
from fedgraft.tuning.execution import Execution, Outer
from fedgraft.tuning.locks import hold

__all__ = ["KeptPool", "TrialJob", "TrialRun"]

_LOCK_WAIT_S = 60.0
"""A trial's earlier process may outlive the killed command for some seconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialJob:
    """What a trial's process needs to know; JSON values only, since Tune writes it down.

    ``rungs`` are those that are left, the last one always among them. ``kind`` is the executor's.
    """

    trial_id: str
    sweep_folder: str
    kind: Literal["in_process", "ray"]
    rungs: tuple[int, ...]
    metric: str
    split: str
    mlflow_run_id: str | None

    @property
    def folder(self) -> Path:
        """The trial's own folder."""
        return Path(self.sweep_folder) / "trials" / self.trial_id


_Maker: TypeAlias = Callable[[PoolOptions, Note], Pool]


def _ignore(text: str) -> None:
    """Where no trial has begun, there is nobody to tell."""


class KeptPool:
    """Opens pools, and keeps the last one for the next trial: replicas that are started have imported everything.

    Args:
        local: Makes a pool of this process.
        remote: Makes a pool of actors.
    """

    def __init__(self, local: _Maker, remote: _Maker) -> None:
        self._makers = {"in_process": local, "ray": remote}
        self._asked: tuple[str, PoolOptions] | None = None
        self._pool: Pool | None = None
        self._note: Note = _ignore

    def open(self, kind: Literal["in_process", "ray"], options: PoolOptions, note: Note) -> Pool:
        """Give the kept pool where it is of the same kind and options, else a new one in its place."""
        self._note = note
        if self._pool is None or (kind, options) != self._asked:
            self.close()
            self._pool, self._asked = self._makers[kind](options, lambda text: self._note(text)), (kind, options)
        return _Borrowed(self._pool)

    def close(self) -> None:
        """End the replicas."""
        if self._pool is not None:
            self._pool.close()
        self._pool = None


class _Borrowed:
    """A pool whose end is somebody else's business."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def close(self) -> None:
        """Leave the pool open: the next trial of this process gets it."""


class TrialRun:
    """A trial that is under way.

    Args:
        job: Which.
        pool: Gives its replicas.
        emit: Takes its events.
        known: Bases that this process has opened before; added to.
    """

    def __init__(self, job: TrialJob, pool: KeptPool, emit: Callable[[Event], None], known: dict[Any, Any]) -> None:
        self._job = job
        self._held = ExitStack()
        busy = f"trial {job.trial_id} is still run by another process"
        self._held.enter_context(hold(job.folder / "config.yaml", timeout_s=_LOCK_WAIT_S, busy=busy))
        remove_leftovers(job.folder)
        outer = Outer(
            mlflow_run_id=job.mlflow_run_id,
            name=Path(job.sweep_folder).name,
            trial=job.trial_id,
            data=Path(job.sweep_folder) / "data",
            known=known,
        )
        context = JobContext(emit=emit, open_pool=partial(pool.open, job.kind), is_stopping=lambda: False)
        self._execution = Execution(job.folder, context, outer)
        self._left = list(job.rungs)
        self._is_open = False

    def step(self) -> dict[str, Any]:
        """Bring all seeds to the next rung.

        Returns:
            ``rounds`` (the rung), ``score`` (mean over seeds), ``is_last``, ``train_seconds`` of this step, ``mlflow_run_ids`` by
            seed.

        Raises:
            FedgraftError: A seed failed, or the run does not have the metric.
        """
        rung = self._left.pop(0)
        is_last = not self._left
        before = self._execution.train_seconds
        try:
            if not self._is_open:
                self._execution.open()
                self._is_open = True
            self._execution.advance(None if is_last else rung)
            score = self._score(rung)
        except Exception as error:
            self._execution.fail(error)
            raise
        if is_last:
            self._execution.finish()
        return {
            "rounds": rung,
            "score": score,
            "is_last": is_last,
            "train_seconds": self._execution.train_seconds - before,
            "mlflow_run_ids": {str(info["seed"]): info["mlflow_run_id"] for info in self._infos() if info.get("mlflow_run_id")},
        }

    def close(self) -> None:
        """Let the trial go; what it holds of the pool is the pool's."""
        self._execution.close()
        self._held.close()

    def _infos(self) -> list[dict[str, Any]]:
        return [RunFolder(path.parent).read_info() for path in sorted(self._job.folder.glob("*/seed-*/run.json"))]

    def _score(self, rung: int) -> float:
        """Mean over the seeds of the metric after a round."""
        result = read_comparison(self._job.folder)
        (runs,) = result.runs.values()
        values = []
        for run in runs:
            table = round_values(run, self._job.split)
            value = float(table[self._job.metric].get(rung, math.nan))
            if not math.isfinite(value):
                raise FedgraftError(
                    f"seed {run.info['seed']} has no finite {self._job.metric} after round {rung}",
                    "choose another metric, or see what went wrong in the trial's folder",
                )
            values.append(value)
        return sum(values) / len(values)
