"""Ten thousand clients on one machine: does the driver's memory or a client's cost grow with the population?

    python benchmarks/many_clients.py                       100 and 10 000 clients, 100 drawn a round, checkpoints on
    python benchmarks/many_clients.py --many 1000 --rounds 5

Clients are those of ``overhead.py`` (one step of a perceptron of two layers), and each keeps a private state of its own, a file
that its next round starts from, as a personalised method's clients do. Two replicas, records, the state's hash, and a checkpoint
every ``--every`` rounds that names every client's private state. ``driver_mib`` is the private memory (USS) of the process with
the loop at its peak, over what it was before the run; ``client_ms`` a round's time by its clients. Both populations run in turn,
``--repeats`` times, each turn on from where the last one ended. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import overhead
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
from overhead import EXAMPLES, PerceptronHost
from ray import cloudpickle

from fedgraft.moe.hashing import hash_params
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.worker import WorkerSpec
from fedgraft.types import Broadcast, ClientTask, ClientUpdate, Params

LIMIT = 2.0
LIMIT_MIB = 64.0
"""Most that the driver may take more for the larger population: names and counts of its clients, not their tensors."""


class Remembering(PerceptronHost):
    """A client that also counts its rounds, in its private state."""

    def __init__(self, store: ClientStateStore) -> None:
        super().__init__()
        self._store = store

    def update(self, task: ClientTask, broadcast: Broadcast) -> tuple[ClientUpdate, Params]:
        update, tensors = super().update(task, broadcast)
        version = task.state_version
        own = {"rounds": torch.zeros(16)} if version is None else self._store.read(task.client_id, version)
        own = {"rounds": own["rounds"] + 1}
        self._store.write(task.client_id, task.round_idx, own)
        return replace(update, state_version=task.round_idx, state_hash=hash_params(own)), tensors


class RememberingSpec(WorkerSpec):
    """Builds it."""

    def build(self) -> Remembering:  # type: ignore[override]
        torch.set_num_threads(1)
        return Remembering(ClientStateStore(self.state_folder))


def run(*, few: int, many: int, cohort: int, rounds: int, repeats: int, every: int) -> dict[str, Any]:
    """Both populations in turn."""
    for module in (__name__, overhead.__name__, Hosted.__module__):
        cloudpickle.register_pickle_by_value(sys.modules[module])
    with tempfile.TemporaryDirectory(prefix="fedgraft-many-") as name, ray_of_its_own(4):
        folder = Path(name)
        timed: dict[int, Timed] = {}
        for count in (few, many):
            data = write_data(folder, count, EXAMPLES)
            job = job_of(folder / str(count), data, RememberingSpec, num_clients=count, cohort=cohort, checkpoint_every=every)
            timed[count] = Timed(job, pool_of(2))
        done = dict.fromkeys(timed, 0)
        peaks = dict.fromkeys(timed, 0.0)
        seen: dict[int, set[int]] = {count: set() for count in timed}

        def part(count: int) -> float:
            done[count] += rounds + 1
            with PeakMemory() as before:
                time.sleep(0.2)
            with PeakMemory() as memory:
                _, seconds = run_rounds(timed[count], done[count])
            peaks[count] = max(peaks[count], memory.private - before.private)
            lines = (folder / str(count) / "metrics.jsonl").read_text().splitlines()
            seen[count] = {client for line in lines for client in json.loads(line)["cohort"]}
            return sum(seconds) / len(seconds) / cohort

        parts: dict[str, Callable[[], float]] = {str(count): partial(part, count) for count in timed}
        try:
            found = interleaved(parts, repeats)
        finally:
            for each in timed.values():
                each.pool.close()
        check_states(folder, timed, done, seen)
    cost = ratio(found, str(many), str(few))
    growth = round(peaks[many] - peaks[few], 1)
    return {
        "benchmark": "many_clients",
        "machine": machine(),
        "versions": versions("torch", "ray"),
        "features": {"records": True, "state_hash": True, "checkpoint_every": every, "private_state": True, "tracking": False},
        "cohort": cohort,
        "rounds": rounds * repeats,
        "client_ms": {name: round(1e3 * each["median"], 3) for name, each in found.items()},
        "cost_ratio": cost,
        "driver_mib": {str(count): round(peak, 1) for count, peak in peaks.items()},
        "driver_growth_mib": growth,
        "clients_seen": {str(count): len(clients) for count, clients in seen.items()},
        "limits": {"cost_ratio": LIMIT, "driver_growth_mib": LIMIT_MIB},
        "holds": cost <= LIMIT and growth <= LIMIT_MIB,
    }


def check_states(folder: Path, timed: dict[int, Timed], done: dict[int, int], seen: dict[int, set[int]]) -> None:
    """Every client that took part has counted the rounds it took part in: no private state was lost or mixed up."""
    for count, each in timed.items():
        lines = (folder / str(count) / "metrics.jsonl").read_text().splitlines()
        assert len(lines) == done[count]
        cohorts = [json.loads(line)["cohort"] for line in lines]
        store = ClientStateStore(each.job.worker.state_folder)
        for client in sorted(seen[count])[:50]:
            took_part = [number + 1 for number, cohort in enumerate(cohorts) if client in cohort]
            rounds = store.read(client, took_part[-1])["rounds"]
            assert rounds.eq(len(took_part)).all(), f"client {client} of {count} counts {rounds[0]} of {len(took_part)} rounds"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--few", type=int, default=100)
    parser.add_argument("--many", type=int, default=10_000)
    parser.add_argument("--cohort", type=int, default=100, help="clients drawn a round")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of a part that count")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--every", type=int, default=5, help="rounds between two checkpoints")
    print_record(parser, run)


if __name__ == "__main__":
    main()
