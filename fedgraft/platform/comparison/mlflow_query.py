"""Finds runs by a query to MLflow, and fetches their records where their folders are not on this machine."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fedgraft.errors import ResultsError
from fedgraft.platform.comparison.entries import Entry, Sources, run_entry
from fedgraft.platform.results import read_json
from fedgraft.platform.tracking import describe_store_error, import_mlflow, store_errors, store_of

__all__ = ["query_entries"]

_MOST = 1000
_UNFINISHED = {"RUNNING": "running", "KILLED": "stopped", "FAILED": "failed", "SCHEDULED": "pending"}


@contextmanager
def query_entries(query: str, uri: str | None) -> Iterator[Sources]:
    """Find the runs of a query and read them.

    A run whose folder (tag ``fedgraft.folder``) is on this machine is read there; of any other the artifacts are fetched
    into a folder that is gone when the context ends.

    Args:
        query: As MLflow's search takes it, e.g. ``tags."fedgraft.method" = 'flex'``. Runs over others (experiments and
            sweeps) that it finds are left out.
        uri: The store; ``None``: ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.

    Raises:
        ResultsError: The store cannot be reached, the query is wrong, nothing is found, or a run cannot be read.
    """
    address = store_of(uri)
    mlflow = import_mlflow()
    try:
        client = mlflow.MlflowClient(tracking_uri=address, registry_uri=address)
        experiments = [experiment.experiment_id for experiment in client.search_experiments(max_results=_MOST)]
        found = (
            list(client.search_runs(experiments, query, max_results=_MOST, order_by=["attributes.start_time ASC"]))
            if experiments
            else []
        )
    except store_errors() as error:
        raise ResultsError(
            f"--mlflow {query!r} at {describe_store_error(address, error)}",
            'check --uri and the query, e.g. --mlflow "tags.\\"fedgraft.method\\" = \'flex\'"',
        ) from error
    if len(found) == _MOST:
        raise ResultsError(f"--mlflow {query!r} finds {_MOST} runs or more", "narrow the query")
    runs = [run for run in found if run.data.tags.get("fedgraft.kind") == "run"]
    if not runs:
        over = f"; it finds {len(found)} others, such as experiments" if found else ""
        raise ResultsError(f"--mlflow {query!r}: no run of fedgraft is found{over}", "search by tags or parameters of runs")
    with tempfile.TemporaryDirectory(prefix="fedgraft-compare-") as scratch:
        entries = [_entry(client, address, run, Path(scratch) / run.info.run_id) for run in runs]
        yield Sources(entries=tuple(entries))


def _entry(client: Any, address: str, run: Any, scratch: Path) -> Entry:
    tags = run.data.tags
    folder = Path(tags.get("fedgraft.folder", ""))
    if not _is_here(folder, run.info.run_id):
        folder = scratch
        if run.info.status == "FINISHED" and tags.get("fedgraft.stopped_early") != "true":
            _fetch(client, address, run.info.run_id, scratch)
    source = tags.get("fedgraft.sweep") or tags.get("mlflow.parentRunId") or run.info.run_id
    status = "stopped_early" if tags.get("fedgraft.stopped_early") == "true" else _UNFINISHED.get(run.info.status, "finished")
    named = {"source": source[:40], "trial": tags.get("fedgraft.trial", ""), "status": status}
    if not (folder / "run.json").is_file():  # not finished, so it has stored nothing yet
        seed = tags.get("fedgraft.seed")
        label = tags.get("fedgraft.label", tags.get("fedgraft.method", "?"))
        return Entry(label=label, seed=int(seed) if seed else None, **named)
    return replace(run_entry(folder, source), **named)


def _is_here(folder: Path, run_id: str) -> bool:
    path = folder / "run.json"
    return folder.is_absolute() and path.is_file() and read_json(path).get("mlflow_run_id") == run_id


def _fetch(client: Any, address: str, run_id: str, folder: Path) -> None:
    folder.mkdir(parents=True)
    try:
        for each in client.list_artifacts(run_id):
            if not each.is_dir:
                client.download_artifacts(run_id, each.path, str(folder))
    except store_errors() as error:
        raise ResultsError(f"fetching the records of run {run_id} from {describe_store_error(address, error)}") from error
    if not (folder / "run.json").is_file():
        raise ResultsError(
            f"run {run_id} at {address} has no run.json among its artifacts", "compare its folder where it was run"
        )
