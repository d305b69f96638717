"""What does the round loop cost where clients take next to no time? Workload A beside the plain loop, in one run.

    python benchmarks/overhead.py                                  100 and 1000 clients, in-process, with actors, with all on
    python benchmarks/overhead.py --clients 100 --rounds 100 --repeats 5

Workload A: N clients with ten examples of 20 values and one of ten labels each, 20 of them drawn a round; a client takes one step
of SGD over its ten examples with a perceptron of two layers (20-32-10); the server takes the mean. The plain loop is what one
would write by hand: one model, one sum, the same cohorts. fedgraft runs the same client as a hosted object under the real
``RoundLoop``: tasks, replies checked, weights, sums in float64 through the fixed tree, the server's step, records and the state's
hash.

    in_process   this process, no checkpoint and no tracking, no evaluation
    actors       two replicas on Ray, the same
    all_on       in this process with a checkpoint after every round and MLflow (SQLite), as a user's run has it by default

``over_plain`` is the median, turn by turn, of a part's time over the plain loop's; ``cpu_ms`` is what the loop's own thread
computed (replicas and Ray not counted), which is steadier on a busy machine. Every turn begins anew, and its final parameters
must be those of the plain loop to 1e-5. All parts run in turn, ``--repeats`` times. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hosted import (
    Hosted,
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
from torch import nn

from fedgraft.platform.sampling import sample_cohort
from fedgraft.platform.tracking import Tracker, TrackingConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.types import Broadcast, ClientTask, Params

COHORT, EXAMPLES, RATE = 20, 10, 0.1
TOLERANCE = 1e-5
LIMITS = {"in_process": 1.5, "actors": 5.0}


class Perceptron(nn.Module):
    """Two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(20, 32)
        self.second = nn.Linear(32, 10)

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(torch.relu(self.first(x_BD)))
        return found


class Clients:
    """Data of the clients, made when they are first asked for, and the local step that plain loop and fedgraft share."""

    def __init__(self) -> None:
        self.model = Perceptron()
        self.parameters = dict(self.model.named_parameters())
        self._data: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def start(self) -> Params:
        return {key: value.detach().clone() for key, value in self.parameters.items()}

    def train(self, client_id: int, params: Params) -> float:
        """Take one step from ``params``; the model has the result."""
        if client_id not in self._data:
            drawn = np.random.RandomState(client_id)
            x, y = drawn.randn(EXAMPLES, 20).astype(np.float32), drawn.randint(0, 10, EXAMPLES).astype(np.int64)
            self._data[client_id] = torch.from_numpy(x), torch.from_numpy(y)
        with torch.no_grad():
            for key, parameter in self.parameters.items():
                parameter.copy_(params[key])
        x_BD, y_B = self._data[client_id]
        optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(x_BD), y_B)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return float(loss.detach())


class PerceptronHost(Hosted):
    """The same client as a hosted object."""

    def __init__(self) -> None:
        self._clients = Clients()
        super().__init__(self._clients.start(), EXAMPLES)

    def train(self, task: ClientTask, broadcast: Broadcast) -> tuple[Params, float]:
        loss = self._clients.train(task.client_id, broadcast.params)
        with torch.no_grad():
            return {key: value - broadcast.params[key] for key, value in self._clients.parameters.items()}, loss


class PerceptronSpec(WorkerSpec):
    """Builds it."""

    def build(self) -> PerceptronHost:  # type: ignore[override]
        torch.set_num_threads(1)
        return PerceptronHost()


def plain_loop(clients: Clients, params: Params, first: int, last: int, num_clients: int) -> Params:
    """Rounds by hand."""
    for round_idx in range(first, last + 1):
        total: Params = {}
        cohort = sample_cohort(0, round_idx, num_clients, COHORT)
        for client in cohort:
            clients.train(client, params)
            with torch.no_grad():
                for key, value in clients.parameters.items():
                    if key in total:
                        total[key].add_(value, alpha=EXAMPLES)
                    else:
                        total[key] = value * EXAMPLES
        params = {key: value / (EXAMPLES * len(cohort)) for key, value in total.items()}
    return params


def measure(folder: Path, num_clients: int, rounds: int, repeats: int) -> dict[str, Any]:
    """All parts in turn."""
    torch.set_num_threads(1)
    data = write_data(folder, num_clients, EXAMPLES)
    timed: dict[str, Timed] = {}
    for name, replicas, checkpoint_every in (("in_process", 0, None), ("actors", 2, None), ("all_on", 0, 1)):
        more = {} if checkpoint_every is None else {"checkpoint_every": checkpoint_every}
        job = job_of(folder / name, data, PerceptronSpec, num_clients=num_clients, cohort=COHORT, **more)
        timed[name] = Timed(job, pool_of(replicas))
    timed["all_on"].tracker = Tracker.start(TrackingConfig(), folder / "mlflow", "overhead", {})
    clients = Clients()
    start = clients.start()
    ends: dict[str, Params] = {}
    apart: dict[str, float] = dict.fromkeys(timed, 0.0)
    cpu: dict[str, list[float]] = {name: [] for name in ("plain", *timed)}
    turn = 0

    def plain() -> float:
        params = plain_loop(clients, start, 1, 1, num_clients)
        started, cpu_started = time.perf_counter(), time.thread_time()
        ends["plain"] = plain_loop(clients, params, 2, 1 + rounds, num_clients)
        cpu["plain"].append((time.thread_time() - cpu_started) / rounds)
        return (time.perf_counter() - started) / rounds

    def ours(name: str) -> float:
        nonlocal turn
        turn += 1
        each = timed[name]
        each.job = replace(each.job, folder=folder / f"{name}-{turn}")
        state, found = run_rounds(each, 1 + rounds)
        apart[name] = max(apart[name], *(float((state.params[key] - ends["plain"][key]).abs().max()) for key in start))
        cpu[name].append(statistics.mean(each.cpu))
        return sum(found) / len(found)

    parts: dict[str, Callable[[], float]] = {"plain": plain} | {name: partial(ours, name) for name in timed}
    try:
        found = interleaved(parts, repeats)
    finally:
        for each in timed.values():
            each.pool.close()
        timed["all_on"].tracker.finish("finished")
    assert max(apart.values()) <= TOLERANCE, f"final parameters differ from the plain loop's: {apart}"
    seconds = {name: each["median"] for name, each in found.items()}
    ratios = {name: ratio(found, name, "plain") for name in timed}
    cpu_ms = {name: round(1e3 * statistics.median(values), 3) for name, values in cpu.items()}
    return {
        "clients": num_clients,
        "cohort": COHORT,
        "round_ms": {name: round(1e3 * value, 3) for name, value in seconds.items()},
        "round_ms_all": {name: [round(1e3 * value, 3) for value in each["all"]] for name, each in found.items()},
        "over_plain": ratios,
        "cpu_ms": cpu_ms,
        "cpu_over_plain": {name: round(cpu_ms[name] / cpu_ms["plain"], 3) for name in ("in_process", "all_on")},
        "holds": {name: ratios[name] <= limit for name, limit in LIMITS.items()},
        "largest_difference": max(apart.values()),
        "rounds": rounds * repeats,
    }


def run(*, clients: list[int], rounds: int, repeats: int) -> dict[str, Any]:
    """One row a number of clients."""
    for name in (PerceptronSpec.__module__, Hosted.__module__):
        cloudpickle.register_pickle_by_value(sys.modules[name])
    rows = []
    with ray_of_its_own(2):
        for count in clients:
            with tempfile.TemporaryDirectory(prefix="fedgraft-overhead-") as folder:
                rows.append(measure(Path(folder), count, rounds, repeats))
            print(json.dumps(rows[-1]), file=sys.stderr)
    return {
        "benchmark": "overhead",
        "machine": machine(),
        "versions": versions("torch", "ray", "mlflow"),
        "features": {
            "in_process": ["records", "state_hash", "float64 tree"],
            "actors": ["records", "state_hash", "float64 tree"],
            "all_on": ["records", "state_hash", "float64 tree", "checkpoints", "tracking"],
        },
        "limits": LIMITS,
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[100, 1000])
    parser.add_argument("--rounds", type=int, default=20, help="rounds of a part that count")
    parser.add_argument("--repeats", type=int, default=9)
    print_record(parser, run)


if __name__ == "__main__":
    main()
