"""The workloads of ``peers.py`` in Flower's simulation, in its own environment."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import peer_flower_client
import peer_work as work
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

ends: list[float] = []
final: dict[str, Any] = {}
server = ServerApp()


class Timed(FedAvg):
    """Notes when a round has been summed."""

    def aggregate_train(self, server_round: int, replies: Iterable[Any]) -> Any:
        """As FedAvg."""
        found = super().aggregate_train(server_round, replies)
        ends.append(time.time())
        return found


@server.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    asked = work.given()
    model = work.make_model(asked["workload"])
    start = ArrayRecord(torch_state_dict={name: value.detach() for name, value in work.trained(model).items()})
    strategy = Timed(
        fraction_train=1e-9, min_train_nodes=asked["cohort"], min_available_nodes=asked["clients"], fraction_evaluate=0.0
    )
    result = strategy.start(
        grid=grid, initial_arrays=start, num_rounds=asked["rounds"], train_config=ConfigRecord({"workload": asked["workload"]})
    )
    final.update(result.arrays.to_torch_state_dict())


if __name__ == "__main__":
    resources = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 2}}
    run_simulation(
        server_app=server,
        client_app=peer_flower_client.app,
        num_supernodes=work.given()["clients"],
        backend_config=resources,
    )
    work.finish(ends, {name: value.numpy() for name, value in final.items()})
