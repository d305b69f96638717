"""The workloads of ``peers.py`` in pfl-research, in its own environment: one process, or several under ``torchrun``."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import peer_work as work
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

FOREVER = 1_000_000_000


class Times(TrainingProcessCallback):
    """Notes when a round has ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_begin(self, *, model: Any) -> Metrics:
        return Metrics()

    def after_central_iteration(self, aggregate_metrics: Any, model: Any, *, central_iteration: int) -> tuple[bool, Metrics]:
        self.ends.append(time.time())
        return False, Metrics()


def main() -> None:
    """Run all rounds."""
    asked = work.given()
    workload = asked["workload"]
    net: Any = work.make_model(workload)
    net.loss = lambda *tensors: work.loss_of(workload, net, *tensors)
    net.metrics = lambda *tensors: {"loss": Weighted(0.0, len(tensors[0]))}  # asked for by the library, never called
    np.random.seed(0)
    users = get_user_sampler("minimize_reuse", list(range(asked["clients"])))
    data = FederatedDataset(lambda client: Dataset(work.data_of(workload, client), user_id=str(client)), users)
    model = PyTorchModel(net, work.optimizer_of(workload), torch.optim.SGD(work.trained(net).values(), lr=1.0))
    size = work.EXAMPLES["a"] if workload == "a" else work.BATCH
    times = Times()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=asked["rounds"],
            evaluation_frequency=FOREVER,
            train_cohort_size=asked["cohort"],
            val_cohort_size=0,
        ),
        SimulatedBackend(data, data),
        model,
        NNTrainHyperParams(local_num_epochs=1, local_learning_rate=work.RATES[workload], local_batch_size=size),
        NNEvalHyperParams(local_batch_size=size),
        callbacks=[times],
        send_metrics_to_platform=False,
    )
    if os.environ.get("RANK", "0") == "0":
        work.finish(times.ends, {name: value.detach().numpy() for name, value in work.trained(net).items()})


if __name__ == "__main__":
    main()
