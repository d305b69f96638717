"""What does a round cost where no client trains? Tensors to every client, the same back, summed, through the real round path.

    python benchmarks/message_path.py                              50 clients x 50 MB; 500 clients x 5 MB beside 50 x 5 MB
    python benchmarks/message_path.py --mb 5 --clients 50 --more 500 --rounds 5

Clients return what they got, from two replicas, through ``RayPool`` and ``RoundLoop``: cohort, tasks, replies checked, sums
through the fixed tree in float64, the server's step, and the records of a round (metrics, ledger, hash of the state). Off:
tracking, evaluation, and checkpoints but the one that ends a part. In the same run, a round of plain Ray by hand: one put, two
actors that each add up what half of the clients return (nothing is kept, so nothing can be weighed or retried), the driver adds
two sums.

After every part the parameters must be what arithmetic says: each round doubles them. Driver memory is its private memory (USS)
at its peak, over what it was with Ray connected. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the platform's own driver has it

import numpy as np
import ray
import torch
from hosted import (
    Hosted,
    PeakMemory,
    Timed,
    interleaved,
    job_of,
    machine,
    pool_of,
    print_record,
    ratio,
    ray_of_its_own,
    run_rounds,
    versions,
    write_data,
)
from ray import cloudpickle

from fedgraft.platform.worker import WorkerSpec
from fedgraft.types import Broadcast, ClientTask, Params

TENSORS = 10
REPLICAS = 2
LIMIT_S = 0.75


class Echo(Hosted):
    """Returns what it got."""

    def train(self, task: ClientTask, broadcast: Broadcast) -> tuple[Params, float]:
        return {key: broadcast.params[key] for key in task.keys}, 0.0


class EchoSpec(WorkerSpec):
    """``batch_size`` stands for the bytes of all tensors."""

    def build(self) -> Echo:  # type: ignore[override]
        torch.set_num_threads(1)
        return Echo(start_values(self.batch_size), num_examples=1)


def start_values(num_bytes: int) -> Params:
    """Ten tensors of ``num_bytes`` together."""
    size = num_bytes // (4 * TENSORS)
    return {f"t{i}": torch.full((size,), 1e-6 * (i + 1)) for i in range(TENSORS)}


class Adder:
    """A worker of plain Ray: clients one after another, one sum."""

    def echo(self, arrays: list[Any]) -> list[Any]:
        return arrays

    def work(self, arrays: list[Any], num_clients: int) -> list[Any]:
        total = [np.zeros(array.shape) for array in arrays]
        for _ in range(num_clients):
            for own, array in zip(total, self.echo(arrays), strict=True):
                own += array
        return total


def plain_round(actors: Sequence[Any], arrays: list[Any], num_clients: int) -> list[Any]:
    """One round by hand; gives the doubled arrays."""
    shared = ray.put(arrays)
    shares = [num_clients // len(actors) + (i < num_clients % len(actors)) for i in range(len(actors))]
    sums = ray.get([actor.work.remote(shared, share) for actor, share in zip(actors, shares, strict=True)])
    return [
        (array + sum(parts[1:], parts[0]) / num_clients).astype(np.float32) for array, *parts in zip(arrays, *sums, strict=True)
    ]


def measure(folder: Path, num_clients: int, num_bytes: int, rounds: int, repeats: int) -> dict[str, Any]:
    """Both kinds of rounds in turn; checks what they end with."""
    data = write_data(folder, num_clients, 1)
    run = folder / f"run-{num_clients}-{num_bytes}"
    job = job_of(run, data, EchoSpec, num_clients=num_clients, cohort=num_clients, batch_size=num_bytes)
    actors = [ray.remote(num_cpus=0)(Adder).remote() for _ in range(REPLICAS)]
    ray.get([actor.echo.remote([]) for actor in actors])
    arrays = [value.numpy() for value in start_values(num_bytes).values()]
    pool = pool_of(REPLICAS)
    timed = Timed(job, pool)
    done = 0
    seconds: list[float] = []
    with PeakMemory() as before:
        time.sleep(0.2)
    peak = 0.0

    def ours() -> float:
        nonlocal done, peak
        done += rounds + 1
        with PeakMemory() as memory:
            state, found = run_rounds(timed, done)
        peak = max(peak, memory.private - before.private)
        for key, value in start_values(num_bytes).items():
            assert torch.equal(state.params[key], value * 2.0**done), f"{key} is not what {done} rounds make of it"
        seconds.extend(found)
        return sum(found) / len(found)

    def plain() -> float:
        now, started = arrays, time.perf_counter()
        for _ in range(rounds):
            now = plain_round(actors, now, num_clients)
        took = (time.perf_counter() - started) / rounds
        assert all(np.array_equal(new, old * np.float32(2.0**rounds)) for new, old in zip(now, arrays, strict=True))
        return took

    try:
        found = interleaved({"fedgraft": ours, "plain_ray": plain}, repeats)
    finally:
        pool.close()
        for actor in actors:
            ray.kill(actor)
    return {
        "clients": num_clients,
        "mb": num_bytes / 1e6,
        "round_s": round(found["fedgraft"]["median"], 4),
        "round_s_min": round(min(seconds), 4),
        "plain_ray_round_s": round(found["plain_ray"]["median"], 4),
        "over_plain_ray": ratio(found, "fedgraft", "plain_ray"),
        "driver_mib": round(peak, 1),
        "rounds": rounds * repeats,
    }


def run(*, clients: int, mb: float, more: int, more_mb: float, rounds: int, repeats: int) -> dict[str, Any]:
    """All parts on a Ray of their own."""
    cloudpickle.register_pickle_by_value(sys.modules[EchoSpec.__module__])
    cloudpickle.register_pickle_by_value(sys.modules[Hosted.__module__])
    rows = []
    with tempfile.TemporaryDirectory(prefix="fedgraft-messages-") as name, ray_of_its_own(2 * REPLICAS):
        parts = [(clients, mb), (clients, more_mb), (more, more_mb)]
        for number, (count, size) in enumerate(parts):
            folder = Path(name) / str(number)
            folder.mkdir()
            rows.append(measure(folder, count, int(size * 1e6), rounds, repeats))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {
        "benchmark": "message_path",
        "machine": machine(),
        "versions": versions("torch", "ray"),
        "replicas": REPLICAS,
        "features": {"records": True, "state_hash": True, "checkpoints": False, "tracking": False, "evaluation": False},
        "rows": rows,
        "limit_s": LIMIT_S,
        "holds": rows[0]["round_s"] <= LIMIT_S,
        "driver_growth_mib": round(rows[2]["driver_mib"] - rows[1]["driver_mib"], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--mb", type=float, default=50.0, help="what a client returns, MB")
    parser.add_argument("--more", type=int, default=500, help="clients of the part that shows the driver's memory")
    parser.add_argument("--more-mb", type=float, default=5.0, help="what a client returns there, MB")
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a part that count")
    parser.add_argument("--repeats", type=int, default=5)
    print_record(parser, run)


if __name__ == "__main__":
    main()
