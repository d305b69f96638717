"""A whole experiment through the driver actor: the same bits as in this process, whatever the replicas, kills and resumes."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import psutil
import pytest

import fedgraft
from fedgraft.errors import FedgraftError, RunInterrupted
from fedgraft.platform.progress import Event

pytestmark = pytest.mark.ray

_NOT_COMPARED = {"seconds", "client_seconds", "bytes_retried", "started_at", "run_id", "mlflow_run_id"}
"""Times, names, and what faults cost."""


@pytest.fixture(scope="module")
def make_config(
    make_base: Callable[..., Path], data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("experiments")

    def make(name: str, **executor: Any) -> Any:
        fields = {"prompt": "q", "response": "a"}
        return fedgraft.load_config(
            {
                "name": name,
                "model": {"path": str(make_base())},
                "data": {
                    "path": str(data_folder.parent / "clients.jsonl"),
                    "preset": "custom",
                    "fields": fields | {"label": "kind"},
                    "max_length": 32,
                    "retention": {
                        "path": str(data_folder.parent / "general.jsonl"),
                        "preset": "custom",
                        "fields": fields,
                    },
                },
                "compare": {"methods": {"fedavg": {"name": "fedavg"}, "flex": {"name": "flex"}}},
                "training": {"learning_rate": 0.01},
                "federation": {"rounds": 3, "local_steps": 2, "batch_size": 4, "cohort_size": 2},
                "evaluation": {"max_new_tokens": 4},
                "executor": executor,
                "tracking": {"enabled": False},
                "output": {"folder": str(folder / "runs"), "cache": str(folder / "cache"), "report": False},
            }
        )

    return make


def _fingerprint(folder: Path) -> dict[str, Any]:
    """What must not depend on who did the work: tensors by hash, records without times and retries."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*/seed-*/**/*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            kept = [{key: value for key, value in row.items() if key not in _NOT_COMPARED} for row in rows]
            if path.stem == "ledger":
                kept = [row for row in kept if not row["is_retry"]]
            found[name] = kept
    return found


@pytest.fixture(scope="module")
def reference(make_config: Callable[..., Any]) -> dict[str, Any]:
    result = fedgraft.run(make_config("alone", kind="in_process"))
    return _fingerprint(result.folder)


def test_two_replicas_one_of_them_killed_give_the_bits_of_this_process(
    make_config: Callable[..., Any], reference: dict[str, Any], ray_processes: Callable[[str], list[psutil.Process]]
) -> None:
    assert len([name for name in reference if name.endswith(".safetensors")]) >= 4
    kills: list[int] = []

    def on_event(event: Event) -> None:
        if event.kind == "round" and event.label == "flex" and not kills:
            kills.append(ray_processes("Rank")[0].pid)
            os.kill(kills[0], signal.SIGKILL)

    result = fedgraft.run(make_config("killed", kind="ray", replicas=2), on_event=on_event)
    assert kills
    assert result.status == "finished"
    assert _fingerprint(result.folder) == reference


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own
def test_a_killed_driver_changes_no_bit_and_goes_on_with_its_mlflow_runs(
    make_config: Callable[..., Any], reference: dict[str, Any], ray_processes: Callable[[str], list[psutil.Process]]
) -> None:
    config = make_config("driver", kind="ray", replicas=1)
    config = config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": True})})
    killed: list[int] = []
    notes: list[str] = []

    def on_event(event: Event) -> None:
        if event.kind == "note":
            notes.append(str(event.data["text"]))
        if event.kind == "round" and event.label == "flex" and event.data["round"] == 2 and not killed:
            (driver,) = ray_processes("Driver")
            killed.append(driver.pid)
            driver.kill()

    result = fedgraft.run(config, on_event=on_event)
    assert killed
    assert any("the driver actor died and was restarted" in note for note in notes)
    assert result.status == "finished"
    assert _fingerprint(result.folder) == reference
    client = mlflow.MlflowClient(f"sqlite:///{result.folder.parent / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedgraft'")
    runs = {run.info.run_name: run.info for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["driver", "fedavg/seed-0", "flex/seed-0"]
    assert len(client.search_runs([experiment.experiment_id])) == 3
    steps = [point.step for point in client.get_metric_history(runs["flex/seed-0"].run_id, "train_loss")]
    assert steps == [1, 2, 3]
    assert {info.status for info in runs.values()} == {"FINISHED"}


def test_a_stopped_run_goes_on_to_the_same_bits(make_config: Callable[..., Any], reference: dict[str, Any]) -> None:
    config = make_config("stopped", kind="ray", replicas=1)

    def on_event(event: Event) -> None:
        if event.kind == "round" and event.label == "flex":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterrupted, match="fedgraft run --resume") as stopped:
        fedgraft.run(config, on_event=on_event)
    folder = Path(str(stopped.value.hint).split()[-1])
    rows = (folder / "flex" / "seed-0" / "metrics.jsonl").read_text().splitlines()
    assert 1 <= len(rows) < 3
    result = fedgraft.run(resume=folder)
    assert result.status == "finished"
    assert _fingerprint(folder) == reference


def test_an_error_of_the_run_reaches_the_caller_as_it_was_raised(make_config: Callable[..., Any], tmp_path: Path) -> None:
    config = make_config("broken", kind="ray", replicas=1)
    broken = config.model_copy(update={"model": config.model.model_copy(update={"path": tmp_path / "nowhere"})})
    with pytest.raises(FedgraftError, match="nowhere"):
        fedgraft.run(broken)
