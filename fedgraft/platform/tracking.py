"""MLflow tracking: one MLflow run a federated run, and one call to the store a round.

The client API of MLflow is used, never its fluent functions, so nothing here is global and several runs can be tracked
side by side. A tracking store that fails in the middle of a run costs the tracking, never the run: everything that is
logged here is in the run folder, too.

MLflow's SQL stores turn an infinity into 1.8e308 without a word. Values that are not finite are therefore not logged as
metrics; they are named in the run's tag ``fedgraft.not_finite`` instead, and stand as they are in ``metrics.jsonl``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from fedgraft.errors import FedgraftError, ResultsError

__all__ = [
    "ARTIFACTS",
    "DATABASE",
    "Tracker",
    "TrackingConfig",
    "describe_store_error",
    "hide_password",
    "import_mlflow",
    "store_errors",
    "store_of",
]

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
"""Of a runs folder that has no other store."""

_log = logging.getLogger(__name__)

_FOLDER_TAG = "fedgraft.folder"
_NOT_FINITE_TAG = "fedgraft.not_finite"
_MAX_KEY = 250  # MLflow's limits: mlflow.utils.validation
_MAX_VALUE = 6000
_MAX_PER_BATCH = 100
_MAX_METRICS = 1000
_STATUS = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED", "running": "RUNNING"}


class TrackingConfig(BaseModel):
    """Whether and where runs are tracked.

    Attributes:
        enabled: Off: nothing is tracked and MLflow is not imported.
        uri: The tracking server or database, as MLflow writes it. ``None``: the environment variable
            ``MLFLOW_TRACKING_URI``, else ``mlflow.db`` under the runs root with artifacts in ``mlartifacts`` beside it.
        experiment: MLflow's experiment; made where it does not exist.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    enabled: bool = True
    uri: str | None = None
    experiment: str = Field(default="fedgraft", min_length=1)


class Tracker:
    """One tracked run. Made by ``Tracker.start``; a tracker that is off has the same methods and does nothing."""

    def __init__(self, client: Any, uri: str, run_id: str | None, steps: Sequence[int] = (), note: str = "") -> None:
        self._client = client
        self._uri = uri
        self._run_id = run_id
        self._steps = set(steps)
        self._not_finite = [note] if note else []
        self._is_on = client is not None

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        runs_root: Path,
        run_name: str,
        params: Mapping[str, object],
        tags: Mapping[str, str] | None = None,
        parent_run_id: str | None = None,
        run_id: str | None = None,
    ) -> Tracker:
        """Open a run in MLflow, or go on with one.

        Args:
            config: Where to track.
            runs_root: The folder of the default database; made where missing. Ignored where a URI is given.
            run_name: Shown in MLflow.
            params: Nested mappings are flattened to key paths (``model.lora.rank``); lists are written as JSON. A value
                over 6000 characters is cut with a note, as MLflow refuses it. Those that a run has are not logged again.
            tags: Written to the run, when it goes on, too. A run whose ``fedgraft.folder`` is the same is gone on with: it was
                made by a process that died before anybody wrote its id down.
            parent_run_id: The MLflow run under which this one is shown, such as a comparison's.
            run_id: An MLflow run to go on with: rounds that it already has are not logged again.

        Raises:
            FedgraftError: The store cannot be reached, or has no run ``run_id``.
        """
        if not config.enabled:
            return cls(None, "", None)
        uri, artifacts = _where(config, runs_root)
        mlflow = import_mlflow()
        hint = (
            "check tracking.uri (or MLFLOW_TRACKING_URI) and that the server runs, "
            "or switch tracking off with tracking.enabled=false"
        )
        try:
            with warnings.catch_warnings():
                # MLflow's tables use a loader that SQLAlchemy calls deprecated; nothing that a user could change.
                warnings.filterwarnings("ignore", category=DeprecationWarning, message="The ``noload`` loader")
                client = mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)
                all_tags = {key: str(value) for key, value in (tags or {}).items()}
                if run_id is not None:
                    return cls._go_on(client, uri, run_id, all_tags)
                if parent_run_id is not None:
                    all_tags["mlflow.parentRunId"] = parent_run_id
                experiment_id = _experiment_id(client, config.experiment, artifacts)
                run = _unremembered(client, experiment_id, all_tags.get(_FOLDER_TAG))
                is_new = run is None
                run = run or client.create_run(experiment_id, tags=all_tags, run_name=run_name)
            entries = [mlflow.entities.Param(_key(key), _value(value)) for key, value in _flatten(params)]
            entries = [entry for entry in entries if entry.key not in run.data.params]
            for start in range(0, len(entries), _MAX_PER_BATCH):
                client.log_batch(run.info.run_id, params=entries[start : start + _MAX_PER_BATCH])
            if not is_new:
                return cls._go_on(client, uri, run.info.run_id, all_tags)
        except store_errors() as error:
            raise FedgraftError(f"MLflow tracking at {hide_password(uri)} cannot start: {_brief(error)}", hint) from error
        return cls(client, uri, run.info.run_id)

    @classmethod
    def _go_on(cls, client: Any, uri: str, run_id: str, tags: Mapping[str, str]) -> Tracker:
        run = client.get_run(run_id)
        client.update_run(run_id, status="RUNNING")
        for key, value in tags.items():
            client.set_tag(run_id, key, value)
        steps = {point.step for key in run.data.metrics for point in client.get_metric_history(run_id, key)}
        return cls(client, uri, run_id, tuple(steps), run.data.tags.get(_NOT_FINITE_TAG, ""))

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the run; ``None`` where tracking is off. Keep it to go on with the run."""
        return self._run_id

    @property
    def uri(self) -> str:
        """Where the run is tracked, without a password; empty where tracking is off."""
        return hide_password(self._uri)

    @property
    def is_on(self) -> bool:
        """Whether calls still reach MLflow: false where tracking is off, or after it failed."""
        return self._is_on

    def log_round(self, round_idx: int, metrics: Mapping[str, float]) -> None:
        """Log a round's metrics with one call to the store.

        A round that MLflow already has is skipped, so a resumed run has every step once. Values that are not finite are
        left out and named in the tag ``fedgraft.not_finite``.

        Args:
            round_idx: >= 0, MLflow's step.
            metrics: Values by name; MLflow takes 1000 in one call, more are left out with a warning. A character
                of a name that MLflow refuses becomes ``_``.
        """
        if not self._is_on or round_idx in self._steps:
            return
        if len(metrics) > _MAX_METRICS:
            _log.warning("round %d: MLflow takes %d of the %d metrics", round_idx, _MAX_METRICS, len(metrics))
            metrics = dict(list(metrics.items())[:_MAX_METRICS])
        entities = import_mlflow().entities
        stamp = int(time.time() * 1000)
        points = [
            entities.Metric(_key(name), float(value), stamp, round_idx) for name, value in metrics.items() if math.isfinite(value)
        ]
        bad = [f"{name}={float(value)}" for name, value in metrics.items() if not math.isfinite(value)]
        tags = []
        if bad:
            _log.warning("round %d: not finite, so not logged to MLflow: %s", round_idx, ", ".join(bad))
            self._not_finite.append(f"round {round_idx}: {', '.join(bad)}")
            tags = [entities.RunTag(_NOT_FINITE_TAG, "; ".join(self._not_finite)[:_MAX_VALUE])]
        self._guard(partial(self._client.log_batch, self._run_id, metrics=points, tags=tags))
        self._steps.add(round_idx)

    def finish(self, status: str, artifacts: Sequence[Path] = ()) -> None:
        """Close the run, then store its files: a file that cannot be stored must not leave it open.

        Args:
            status: ``finished``, ``stopped`` or ``failed``.
            artifacts: Files and folders; those that do not exist are skipped.
        """
        if status not in _STATUS:
            raise FedgraftError(f"run status {status!r} is unknown; known: {', '.join(_STATUS)}")
        if not self._is_on:
            return
        self._guard(partial(self._client.set_terminated, self._run_id, status=_STATUS[status]))
        for path in artifacts:
            if path.is_dir():
                self._guard(partial(self._client.log_artifacts, self._run_id, str(path), path.name))
            elif path.exists():
                self._guard(partial(self._client.log_artifact, self._run_id, str(path)))

    def _guard(self, call: Callable[[], object]) -> None:
        """Run a call to MLflow; the first failure is logged and switches tracking off for the rest of the run."""
        if not self._is_on:
            return
        try:
            call()
        except (import_mlflow().exceptions.MlflowException, OSError) as error:
            self._is_on = False
            _log.warning(
                "MLflow tracking at %s failed and is off for the rest of this run; the run goes on, and its folder has "
                "all metrics. Check that the server or the database is reachable. Cause: %s",
                self.uri,
                _brief(error),
            )


def store_of(uri: str | None) -> str:
    """Give the store that is meant: ``uri``, else ``MLFLOW_TRACKING_URI``, else the database under ``runs``.

    Raises:
        ResultsError: There is none of them.
    """
    found = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if found:
        return found
    path = Path("runs").resolve() / DATABASE
    if not path.is_file():
        raise ResultsError(
            f"no MLflow store: neither an address, nor MLFLOW_TRACKING_URI, nor {path}", "name the store, or run fedgraft first"
        )
    return f"sqlite:///{path}"


def store_errors() -> tuple[type[Exception], ...]:
    """Give what MLflow raises when its store cannot be used."""
    return (import_mlflow().exceptions.MlflowException, OSError, ImportError, _sql_error())


def describe_store_error(uri: str, error: Exception) -> str:
    """Say in one line which store failed and why, without a password."""
    return f"{hide_password(uri)}: {_brief(error)}"


def import_mlflow() -> Any:
    """Import MLflow at first use: 1.1 s on top of torch and pandas, which no command should pay that does not track.

    It is also the only way to set the variables below before MLflow reads them. A user's own settings win.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    # MLflow's 7 retries of 120 s would hold a run for minutes when the server is gone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import mlflow

    # Table creation at INFO, and a traceback of 80 lines at ERROR for what is raised to us anyway.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return mlflow


def _sql_error() -> type[Exception]:
    """Give SQLAlchemy's base error: MLflow wraps it when logging, but not when it opens a database."""
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def _where(config: TrackingConfig, runs_root: Path) -> tuple[str, str | None]:
    """Give the tracking URI and, for the default database, the artifact location."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        return uri, None
    root = runs_root.resolve()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FedgraftError(f"MLflow tracking cannot make the runs folder {root}: {error}") from error
    return f"sqlite:///{root / DATABASE}", (root / ARTIFACTS).as_uri()


def _experiment_id(client: Any, name: str, artifacts: str | None) -> str:
    """Find the experiment or make it; two runs that start together may both try."""
    exceptions = import_mlflow().exceptions
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts))
        except exceptions.MlflowException:
            found = client.get_experiment_by_name(name)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise FedgraftError(
            f"MLflow experiment {name!r} is deleted", "restore it in MLflow, or choose another tracking.experiment"
        )
    return str(found.experiment_id)


def _unremembered(client: Any, experiment_id: str, folder: str | None) -> Any:
    """Find the run of a folder that does not know it: its maker died between making it and writing its id down."""
    if folder is None or ("'" in folder and '"' in folder):
        return None  # MLflow's filters cannot say a text with both kinds of quotes
    quote = '"' if "'" in folder else "'"
    found = client.search_runs([experiment_id], filter_string=f"tags.`{_FOLDER_TAG}` = {quote}{folder}{quote}", max_results=1)
    return found[0] if found else None


def _flatten(params: Mapping[str, object], prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in params.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            rows += _flatten(value, f"{path}.")
        else:
            rows.append((path, value))
    return rows


def _key(name: str) -> str:
    """Make a name that MLflow accepts; one that is too long ends in a hash, so that two stay two."""
    name = re.sub(r"[^\w.\-/ :]", "_", name)
    if len(name) <= _MAX_KEY:
        return name
    return f"{name[: _MAX_KEY - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    note = " ... (cut; config.yaml has all of it)"
    return text if len(text) <= _MAX_VALUE else text[: _MAX_VALUE - len(note)] + note


def hide_password(uri: str) -> str:
    """Give a URI that can be shown."""
    return re.sub(r"(://[^/:@]*):[^/@]*@", r"\1:***@", uri)


def _brief(error: Exception) -> str:
    first = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {hide_password(first[0])[:300]}"
