"""A trial as Ray Tune sees it. Little is imported here, so that the time a process takes to import the rest can be told."""

from __future__ import annotations

import json
import time
import traceback
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray.tune import PlacementGroupFactory

from fedgraft.errors import FedgraftError
from fedgraft.platform.run_folder import write_json

if TYPE_CHECKING:
    from fedgraft.tuning.trial import KeptPool, TrialRun

__all__ = ["EVENTS", "FAILURE", "SweepTrial"]

EVENTS = "events.jsonl"
"""In a trial's folder: what its process tells while it runs, for the command to show."""

FAILURE = "failure.json"
"""In a trial's folder: what its process raised. While it is there the trial is not tried again."""


class SweepTrial(tune.Trainable):  # type: ignore[misc]
    """One trial after another, each from rung to rung; a rung is a step.

    What costs time and can be shared between trials stays in the process: imports, bases that were opened, replicas.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> PlacementGroupFactory:
        """The trial's placement group; see ``trial_rules.trial_bundles``."""
        return PlacementGroupFactory(list(config["bundles"]), strategy="PACK")

    def setup(self, config: dict[str, Any]) -> None:
        """Make room for what is kept; the trial begins with its first step, whose errors Tune takes for the trial's."""
        self._known: dict[Any, Any] = {}
        self._pool: KeptPool | None = None
        self._run: TrialRun | None = None

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Make room for another trial."""
        self._end_run()
        return True

    def step(self) -> dict[str, Any]:
        """Run to the next rung."""
        failure = Path(self.config["job"]["sweep_folder"]) / "trials" / self.config["job"]["trial_id"] / FAILURE
        if failure.is_file():  # Tune starts a trial again whose process died, and cannot tell that from an error
            raise FedgraftError(f"trial {self.config['job']['trial_id']} failed", f"see {failure}")
        started = time.perf_counter()
        try:
            if self._run is None:
                self._run = self._begin()
            result = self._run.step()
        except Exception as error:
            text = str(error) if isinstance(error, FedgraftError) else f"{type(error).__name__}: {error}"
            write_json({"error": text, "traceback": traceback.format_exc().splitlines()}, failure)
            raise
        result["setup_seconds"] = max(0.0, time.perf_counter() - started - result["train_seconds"])
        result |= {"node": ray.util.get_node_ip_address(), "node_id": ray.get_runtime_context().get_node_id()}
        return result | {"done": result["is_last"]}

    def cleanup(self) -> None:
        """Let everything go."""
        self._end_run()
        if self._pool is not None:
            self._pool.close()

    def _begin(self) -> TrialRun:
        # Not at the top: what these import takes seconds, and belongs to the set-up that is measured.
        from fedgraft.actors.local import LocalPool
        from fedgraft.actors.pool import RayPool
        from fedgraft.tuning.trial import KeptPool, TrialJob, TrialRun

        job = TrialJob(**self.config["job"])
        if self._pool is None:
            self._pool = KeptPool(LocalPool, RayPool)
        with (job.folder / EVENTS).open("a") as stream:
            stream.write("\n")  # ends a line that a killed process left torn
        return TrialRun(job, self._pool, partial(_write_event, job.folder / EVENTS), self._known)

    def _end_run(self) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.close()


def _write_event(path: Path, event: Any) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps({"kind": event.kind, "data": dict(event.data)}, default=str) + "\n")
