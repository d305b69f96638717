"""Folders of runs, experiments and sweeps as the platform writes them, with numbers that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

Score = Callable[[int, int], float]
"""A client's NLL in the last round, by seed and client."""


def _lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(folder: Path, label: str, seed: int, score: Score, **more: Any) -> Path:
    """One run of two rounds: NLL falls from 3.0 to its score; round 1 is better than the last by 1."""
    folder.mkdir(parents=True)
    options: dict[str, Any] = {"status": "finished", "num_clients": 8, "bytes": 1024, "data": "data", "retention": 3.0}
    options |= {"config": {}, "skew": 0.0} | more
    num_clients, rounds = options["num_clients"], 0 if label == "base" else 2
    names = options.get("client_names") or [f"client {idx}" for idx in range(num_clients)]
    info = {"run_id": folder.name, "label": label, "method": options.get("method", label), "seed": seed, "rounds": rounds}
    info |= {"status": options["status"], "num_clients": num_clients, "client_names": names, "learning_rate": 0.01}
    info |= {"seconds": 60.0, "data_fingerprint": options["data"] and f"{options['data']}-{seed}", "error": options.get("error")}
    (folder / "run.json").write_text(json.dumps(info))
    evaluations = []
    for idx in range(rounds + 1):
        for client in range(num_clients):
            last = score(seed, client)
            value = last if idx == rounds else last - 1.0 if idx else 3.0
            head = {"round": idx, "view": "personal", "client_id": client, "split": "test", "weight": 10.0}
            evaluations.append(head | {"task": "client", "metric": "nll", "total": value * 10})
            evaluations.append(head | {"task": "client", "metric": "token_accuracy", "total": 10 * math.exp(-value)})
            evaluations.append(head | {"task": "retention", "metric": "nll", "total": 10 * options["retention"]})
    _lines(folder / "evaluations.jsonl", evaluations)
    _lines(folder / "metrics.jsonl", [{"round": idx, "train_loss": 1.0, "cohort": [0]} for idx in range(1, rounds + 1)])
    transfer = {"client_id": 0, "group": "shared", "is_retry": False, "bytes": options["bytes"]}
    ledger = [transfer | {"round": idx, "direction": way} for idx in range(1, rounds + 1) for way in ("up", "down")]
    _lines(folder / "ledger.jsonl", ledger if options["bytes"] else [])
    # With skew s a client's examples are of its own label by s, and of all labels alike by the rest.
    shares = {
        i: {f"l{j}": round(80 * (options["skew"] * (i == j) + (1 - options["skew"]) / num_clients)) for j in range(num_clients)}
        for i in range(num_clients)
    }
    clients = [{"client_id": idx, "name": names[idx], "train": shares[idx]} for idx in range(num_clients)]
    (folder / "partition.json").write_text(json.dumps({"labels": [], "clients": clients}))
    (folder / "config.yaml").write_text(yaml.safe_dump(options["config"]))
    return folder


def write_experiment(folder: Path, runs: Mapping[str, Score], seeds: Sequence[int] = (0, 1), **more: Any) -> Path:
    """An experiment: methods by label, each with every seed."""
    for label, score in runs.items():
        for seed in seeds:
            write_run(folder / label / f"seed-{seed}", label, seed, score, **more)
    listed = {label: [f"{label}/seed-{seed}" for seed in seeds] for label in runs}
    data = {"labels": list(runs), "base": None, "runs": listed, "seeds": list(seeds), "status": "finished"}
    (folder / "comparison.json").write_text(json.dumps(data))
    return folder


@dataclass
class Trial:
    """A trial of ``write_sweep``."""

    point: dict[str, Any]
    label: str
    score: Score
    status: str = "finished"
    error: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


def write_sweep(folder: Path, keys: Sequence[str], trials: Sequence[Trial], seeds: Sequence[int] = (0, 1), **more: Any) -> Path:
    """A sweep's folder by its contract; trials that are pending have no folder."""
    records = []
    for number, trial in enumerate(trials):
        name = f"{number:04d}"
        if trial.status != "pending":
            data = json.dumps([trial.point[key] for key in trial.point if key.startswith("data.")])
            status = "finished" if trial.status == "finished" else "stopped"
            options = {"data": f"data {data}", "status": status} | trial.more
            write_experiment(folder / "trials" / name, {trial.label: trial.score}, seeds, **options)
        record = {"trial_id": name, "point": trial.point, "label": trial.label, "folder": f"trials/{name}"}
        record |= {"status": trial.status, "rounds": 2, "rounds_done": 0 if trial.status == "pending" else 2}
        records.append(record | {"error": trial.error, "score": 1.0, "mlflow_run_ids": {}})
    head = {"format": 1, "name": "alpha", "status": "finished", "keys": list(keys), "metric": "personal_nll", "mode": "min"}
    head |= {"scheduler": "asha", "search": "grid", "seeds": list(seeds), "mlflow_run_id": None, "tracking_uri": None}
    (folder / "sweep.json").write_text(json.dumps(head | {"trials": records} | more))
    return folder


@pytest.fixture(scope="session")
def run_folder() -> Callable[..., Path]:
    return write_run


@pytest.fixture(scope="session")
def experiment_folder() -> Callable[..., Path]:
    return write_experiment


@pytest.fixture(scope="session")
def sweep_folder() -> Callable[..., Path]:
    return write_sweep


@pytest.fixture(scope="session")
def trial() -> type[Trial]:
    return Trial
