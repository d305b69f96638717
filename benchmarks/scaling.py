"""What the plan says of a round, beside what a round took, and what a client costs the driver.

    python benchmarks/scaling.py --out benchmarks/results/scaling.json

Runs FedAvg on the bundled model with a driver actor and two replicas, at two cohorts and two sizes of what clients send. Bytes
come from the run's ledger. Times are CPU seconds of processes, which other work on the machine does not lengthen much: of the
driver, and of the replicas together, a round, without the first one. The plan is given speeds that were measured in CPU
seconds, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import torch

import fedgraft
from fedgraft.platform.plan import make_plan, this_machine
from fedgraft.platform.progress import Event

ROUNDS = 5
SETTINGS = [(cohort, rank) for cohort in (8, 32) for rank in (4, 64)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(Path(folder), cohort, rank) for cohort, rank in SETTINGS]
    per_client, per_mb = driver_cost(rows)
    record = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}",
        "rounds": ROUNDS,
        "rows": rows,
        "driver_s_per_client": per_client,
        "driver_s_per_mb": per_mb,
        "hash_gb_per_s": hash_speed(),
    }
    print(json.dumps(record))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


def measure(folder: Path, cohort: int, rank: int) -> dict[str, Any]:
    """One setting: planned and measured bytes and CPU seconds of a round."""
    config = fedgraft.load_config(
        None,
        [
            f"name=scaling-{cohort}-{rank}",
            f"method={{name: fedavg, adapter: {{rank: {rank}}}}}",
            "rate_search=null",
            "training.learning_rate=0.001",
            "data.partition={name: iid}",
            "data.num_clients=32",
            f"federation={{rounds: {ROUNDS}, cohort_size: {cohort}, local_steps: 4, batch_size: 8}}",
            f"evaluation={{every: {ROUNDS}, at_start: false, generate: never, choices: never}}",
            "executor.replicas=2",
            "tracking.enabled=false",
            f"output={{folder: {folder}, report: false}}",
        ],
    )
    plan = make_plan(config, this_machine(cpu_speed(64, 64), op_seconds()))
    (method,) = plan.methods
    taken: list[dict[str, float]] = []

    def on_event(event: Event) -> None:
        if event.kind == "round":
            taken.append({name: cpu_seconds(f"ray::{name}") for name in ("Driver", "Rank")})

    result = fedgraft.run(config, on_event=on_event)
    up = result.ledger[(result.ledger["direction"] == "up") & (result.ledger["round"] == 1)]
    # The last round is judged, too, and the first one warms up.
    rounds = ROUNDS - 2
    return {
        "cohort": cohort,
        "rank": rank,
        "planned_mb_up": cohort * method.bytes_per_round / 1e6,
        "measured_mb_up": float(up["bytes"].sum()) / 1e6,
        "planned_train_s": training_seconds(config, plan),
        "measured_replicas_s": (taken[-2]["Rank"] - taken[0]["Rank"]) / rounds,
        "driver_s": (taken[-2]["Driver"] - taken[0]["Driver"]) / rounds,
        "wall_s": float(result.metrics["seconds"].iloc[1:-1].mean()),
    }


def training_seconds(config: Any, plan: Any) -> float:
    """CPU seconds of one round's training, as the plan has them: on one replica, a second round less the first.

    Both are judged once, after the last round.
    """
    seconds = []
    for rounds in (1, 2):
        changes = {
            "executor": config.executor.model_copy(update={"replicas": 1}),
            "federation": config.federation.model_copy(update={"rounds": rounds}),
            "evaluation": config.evaluation.model_copy(update={"every": rounds}),
        }
        found = make_plan(config.model_copy(update=changes), plan.machine).seconds
        assert found is not None
        seconds.append(found)
    return seconds[1] - seconds[0]


def cpu_seconds(name: str) -> float:
    """CPU time of this command's processes that Ray calls so."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            if name in " ".join(process.cmdline()):
                times = process.cpu_times()
                total += times.user + times.system
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return total


def cpu_speed(hidden: int, expert: int, seconds: float = 1.0) -> float:
    """FLOPs per CPU second of products of the model's size; as ``fedgraft.platform.machine.measure_speed`` by the clock."""
    rows = 512
    left, right = torch.ones(rows, hidden), torch.ones(hidden, 2 * expert)
    torch.mm(left, right)
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        torch.mm(left, right)
        count += 1
    return count * 2.0 * rows * hidden * 2 * expert / (time.process_time() - started)


def op_seconds(seconds: float = 0.1) -> float:
    """CPU seconds of a product of next to nothing; as ``fedgraft.platform.machine.measure_op`` by the clock."""
    small = torch.ones(8, 8)
    count, started = 0, time.process_time()
    while time.process_time() - started < seconds:
        torch.mm(small, small)
        count += 1
    return (time.process_time() - started) / count


def hash_speed(gigabytes: float = 1.0) -> float:
    """Gigabytes that SHA-256 takes in a CPU second, as a checkpoint hashes clients' private states."""
    block, count = os.urandom(2**24), round(gigabytes * 1e9 / 2**24)
    digest, started = hashlib.sha256(), time.process_time()
    for _ in range(count):
        digest.update(block)
    return count * len(block) / 1e9 / (time.process_time() - started)


def driver_cost(rows: list[dict[str, Any]]) -> tuple[float, float]:
    """Seconds of the driver for a client and for a megabyte that comes up: the least squares of t = a + clients x c + MB x m."""
    design = torch.tensor([[1.0, row["cohort"], row["measured_mb_up"]] for row in rows], dtype=torch.float64)
    taken = torch.tensor([[row["driver_s"]] for row in rows], dtype=torch.float64)
    found = torch.linalg.lstsq(design, taken).solution
    return float(found[1]), float(found[2])


if __name__ == "__main__":
    main()
