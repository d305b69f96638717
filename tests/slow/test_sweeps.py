"""Sweeps in processes of their own: killed and resumed, and spread over the nodes of a cluster."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest
import yaml

import fedgraft
from fedgraft.platform.results import read_run

pytestmark = pytest.mark.slow

ROUNDS = 6


@pytest.fixture
def base(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    fields = {"prompt": "q", "response": "a", "label": "kind"}
    return {
        "model": {"path": str(make_base())},
        "data": {"path": str(data_folder.parent / "clients.jsonl"), "preset": "custom", "fields": fields, "max_length": 32},
        "training": {"learning_rate": 0.01},
        "federation": {"rounds": ROUNDS, "local_steps": 2, "batch_size": 4},
        "evaluation": {"generate": "never", "choices": "never", "at_start": False},
        "executor": {"kind": "in_process"},
        "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
    }


def _start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    command = [sys.executable, "-m", "fedgraft", "sweep", *arguments]
    with (tmp_path / "log.txt").open("a") as log:
        return subprocess.Popen(command, cwd=tmp_path, env=clean, stdout=log, stderr=subprocess.STDOUT, text=True)


def _journal(tmp_path: Path) -> dict[str, Any] | None:
    found = sorted((tmp_path / "runs").glob("*/sweep.json"))
    return json.loads(found[0].read_text()) if found else None


def _wait(tmp_path: Path, process: subprocess.Popen[str], is_there: Callable[[dict[str, Any]], bool]) -> None:
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline:
        journal = _journal(tmp_path)
        if journal is not None and is_there(journal):
            return
        assert process.poll() is None, (tmp_path / "log.txt").read_text()
        time.sleep(0.02)
    raise AssertionError((tmp_path / "log.txt").read_text())


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts commands, and ends those that are left."""
    processes: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        processes.append(_start(tmp_path, *arguments))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own
def test_a_killed_sweep_goes_on_where_it_was(
    base: dict[str, Any], tmp_path: Path, started: Callable[..., subprocess.Popen[str]]
) -> None:
    space = {"method": [{"name": "fedavg"}, {"name": "flex", "calibration_examples": 8}]}
    tree = {"name": "killed", "base": base, "space": space, "seeds": [0, 1], "resources": {"concurrency": 1}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    process = started("sweep.yaml")

    def is_half_way(journal: dict[str, Any]) -> bool:
        folder = next((tmp_path / "runs").glob("killed-*"))
        lines = folder / "trials" / "0001" / "flex" / "seed-0" / "metrics.jsonl"
        return journal["trials"][0]["status"] == "finished" and lines.is_file() and len(lines.read_text().splitlines()) >= 2

    _wait(tmp_path, process, is_half_way)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = next((tmp_path / "runs").glob("killed-*"))
    half = read_run(folder / "trials" / "0001" / "flex" / "seed-0")
    assert half.status != "finished"
    kept = folder / "trials" / "0000" / "fedavg" / "seed-1" / "metrics.jsonl"
    before = kept.stat().st_mtime_ns

    process = started("--resume", str(folder))
    assert process.wait(timeout=400) == 0, (tmp_path / "log.txt").read_text()
    journal = _journal(tmp_path)
    assert journal is not None
    assert journal["status"] == "finished"
    assert [trial["status"] for trial in journal["trials"]] == ["finished", "finished"]
    assert kept.stat().st_mtime_ns == before
    ended = read_run(folder / "trials" / "0001" / "flex" / "seed-0")
    assert ended.info["started_at"] == half.info["started_at"]
    # Rounds that were there already are the same lines, with the seconds they took then: they were not run again.
    count = len(half.metrics) - 1  # the last one may lie after the last checkpoint
    assert count >= 1
    assert ended.metrics["seconds"].tolist()[:count] == half.metrics["seconds"].tolist()[:count]
    # The same bits as a run that nobody killed.
    straight = fedgraft.load_config(
        yaml.safe_load((folder / "trials" / "0001" / "config.yaml").read_text()), ["tracking.enabled=false"]
    )
    whole = fedgraft.run(straight)
    assert isinstance(whole, fedgraft.ComparisonResult)
    for seed, run in enumerate(whole.runs["flex"]):
        other = read_run(folder / "trials" / "0001" / "flex" / f"seed-{seed}")
        assert list(other.metrics["round"]) == list(range(1, ROUNDS + 1))
        assert list(other.metrics["train_loss"]) == list(run.metrics["train_loss"])
        assert list(other.evaluations["total"]) == list(run.evaluations["total"])
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedgraft'")
    runs = client.search_runs([experiment.experiment_id])
    places = [(run.data.tags["fedgraft.trial"], run.data.params["seed"]) for run in runs if "fedgraft.trial" in run.data.tags]
    assert sorted(places) == [(trial, seed) for trial in ("0000", "0001") for seed in ("0", "1")]
    assert len(runs) == 5
    assert {run.info.status for run in runs} == {"FINISHED"}


NODES = """
import json, sys
import ray
from ray.cluster_utils import Cluster

if __name__ == "__main__":
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0, "include_dashboard": False})
    for gpus in (1, 1):
        cluster.add_node(num_cpus=1, num_gpus=gpus)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    import fedgraft
    from fedgraft.errors import ClusterError
    tree = json.load(open(sys.argv[1]))
    result = fedgraft.sweep(fedgraft.load_sweep(tree))
    gpus = {f"{n['NodeManagerAddress']} {n['NodeID'][:8]}": n["Resources"].get("GPU", 0) for n in ray.nodes()}
    try:
        fedgraft.sweep(fedgraft.load_sweep(tree, ["resources.gpus_per_trial=2"]))
    except ClusterError as error:
        refused = str(error)
    print(json.dumps([[t.status for t in result.trials], [t.node for t in result.trials], gpus, refused]))
    ray.shutdown()
    cluster.shutdown()
"""


def test_trials_go_to_all_nodes_that_have_what_they_want(base: dict[str, Any], tmp_path: Path) -> None:
    base |= {"tracking": {"enabled": False}, "method": {"name": "fedavg"}, "federation": {"rounds": 1, "local_steps": 1}}
    # Fake GPUs: a trial trains on its core, but its place must have one.
    tree = {"base": base, "space": {"federation.local_steps": [1, 2, 3, 4]}, "resources": {"gpus_per_trial": 1}}
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    script = tmp_path / "nodes.py"
    script.write_text(NODES)
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))} | {
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "tree.json")],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    statuses, nodes, gpus, refused = json.loads(done.stdout.splitlines()[-1])
    assert statuses == ["finished"] * 4
    assert sorted(gpus.values()) == [0, 1, 1]
    with_gpu = {node for node, count in gpus.items() if count}
    assert set(nodes) == with_gpu  # both of them, and never the one without
    assert "4 of 4 trials find no place" in refused
