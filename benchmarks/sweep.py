"""What a trial of a sweep costs beside its training: seconds of set-up, with a process a point and with a sweep.

    python benchmarks/sweep.py --out benchmarks/results/sweep.json
    python benchmarks/sweep.py --points 6 --kind ray

The same points are run twice on the bundled model. *Before*: `fedgraft run` for each point, one after another, which is what one
writes without sweeps. *After*: `fedgraft sweep` over them with one trial at a time, so that both have the same cores. Training
is the seconds of all rounds, by the runs' own records; set-up is the rest of a command's wall-clock time, divided by the points:
Ray's start, imports, base, data, building models, MLflow, for the sweep also Tune, and (alike in both, kept small) evaluation.
``first_s`` and ``later_s`` are the set-up seconds that the sweep's journal gives its first trial and, as a median, the others:
those find a warm process; evaluation counts as training there. The bundled model is made before the clock starts. One JSON line
on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from fedgraft.platform.bundled_model import ensure_bundled_model
from fedgraft.platform.cache_folder import default_cache
from fedgraft.platform.results import read_run

BASE: dict[str, Any] = {
    "method": {"name": "fedavg"},
    "data": {"num_clients": 4, "bundled": {"train_per_domain": 60, "test_per_domain": 12, "num_retention": 24}},
    "federation": {"rounds": 2, "local_steps": 4, "batch_size": 8},
    "evaluation": {"generate": "never", "choices": "never", "at_start": False, "validation": True},
    "output": {"report": False},
}


def timed(folder: Path, *arguments: str) -> float:
    """Wall-clock seconds of a command of fedgraft."""
    started = time.perf_counter()
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    done = subprocess.run(
        [sys.executable, "-m", "fedgraft", *arguments], cwd=folder, env=clean, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return time.perf_counter() - started


def training_seconds(folder: Path) -> float:
    """Seconds that all runs under a folder spent in rounds."""
    runs = [read_run(path.parent) for path in sorted(folder.rglob("seed-*/run.json"))]
    return float(sum(run.metrics["seconds"].sum() for run in runs))


def before(folder: Path, base: dict[str, Any], rates: list[float]) -> tuple[float, float]:
    """Wall-clock and training seconds of a command a point."""
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    wall = sum(timed(folder, "run", "base.yaml", f"training.learning_rate={rate}", "-q") for rate in rates)
    return wall, training_seconds(folder / "runs")


def after(folder: Path, base: dict[str, Any], rates: list[float]) -> tuple[float, float, list[dict[str, Any]]]:
    """The same of a sweep, and what its journal says of each trial."""
    tree = {"base": base, "space": {"training.learning_rate": rates}, "resources": {"concurrency": 1}}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree))
    wall = timed(folder, "sweep", "sweep.yaml", "-q")
    (journal,) = (folder / "runs").glob("*/sweep.json")
    return wall, training_seconds(folder / "runs"), json.loads(journal.read_text())["trials"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--kind", choices=("in_process", "ray"), default="in_process", help="executor.kind")
    parser.add_argument("--out", type=Path, help="also write the line to this file")
    chosen = parser.parse_args()
    ensure_bundled_model(default_cache())
    base = BASE | {"executor": {"kind": chosen.kind} | ({"replicas": 1} if chosen.kind == "ray" else {})}
    rates = [round(0.001 * (number + 1), 4) for number in range(chosen.points)]
    with tempfile.TemporaryDirectory() as scratch:
        places = [Path(scratch) / name for name in ("before", "after")]
        for place in places:
            place.mkdir()
        alone, alone_trained = before(places[0], base, rates)
        swept, swept_trained, trials = after(places[1], base, rates)
    setups = [float(trial["setup_seconds"]) for trial in trials]
    count = len(rates)
    row = {
        "benchmark": "sweep",
        "points": count,
        "kind": chosen.kind,
        "cores": os.cpu_count(),
        "before": {"wall_s": alone, "training_s": alone_trained, "setup_per_point_s": (alone - alone_trained) / count},
        "after": {
            "wall_s": swept,
            "training_s": swept_trained,
            "setup_per_point_s": (swept - swept_trained) / count,
            "first_s": setups[0],
            "later_s": statistics.median(setups[1:]) if count > 1 else None,
        },
        "setup_ratio": (alone - alone_trained) / (swept - swept_trained),
    }
    line = json.dumps(row)
    print(line)
    if chosen.out is not None:
        chosen.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
