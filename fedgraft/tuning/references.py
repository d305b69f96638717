"""Centralised references of an experiment: trained before the replicas start, because both want the same cores.

<label>/seed-0/centralised.safetensors            slot values that the run starts from
search/<label>/seed-0/lr-0.003/centralised.safetensors   one try of a rate
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedgraft.errors import ModelError
from fedgraft.platform.centralised import centralised_job, train_centrally
from fedgraft.platform.config import RunConfig
from fedgraft.platform.pretraining.config import WorkersConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.tuning.rates import choose_rate

__all__ = ["Reference", "train_reference"]

_FILE = "centralised.safetensors"


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference that is trained: at which rate, and where its slot values lie."""

    learning_rate: float
    start: Path


def train_reference(
    config: RunConfig,
    label: str,
    worker: WorkerSpec,
    *,
    num_clients: int,
    folder: Path,
    search_folder: Path,
    on_progress: Callable[[int, int, float], None],
    is_stopping: Callable[[], bool],
) -> Reference:
    """Train a centralised reference, with its rate chosen on all clients' validation examples where the experiment searches.

    It takes ``rounds x local_steps x cohort`` steps on batches of the federation's size: as many steps and examples as all
    clients together. What is trained already is not trained again.

    Args:
        config: Of the experiment.
        label: The method's.
        worker: As for a replica of this run.
        num_clients: In the data.
        folder: Of the run.
        search_folder: Of its search.
        on_progress: Gets step, number of steps and rate.
        is_stopping: Asked after each step.

    Raises:
        QuorumError: Training broke down at every rate of the grid.
        ModelError: It broke down without a search.
        RunInterrupted: It was asked to stop.
    """
    federation, engine = config.federation, worker.engine
    a_round = federation.local_steps * min(federation.cohort_size or num_clients, num_clients)
    workers = WorkersConfig(count=engine.world_size, threads=config.executor.threads, gpus=1 if config.executor.gpus else 0)

    def train(rate: float, rounds: int, target: Path) -> float | None:
        num_steps = rounds * a_round
        job = centralised_job(worker, target=target, learning_rate=rate, num_steps=num_steps)
        return train_centrally(
            job,
            in_process=config.executor.kind == "in_process",
            workers=workers,
            on_step=lambda step: on_progress(step, num_steps, rate),
            is_stopping=is_stopping,
        )

    rate = config.training.learning_rate
    search = config.rate_search
    if search is not None:
        rounds = search.rounds

        def try_rate(rate: float, place: Path) -> float | None:
            try:
                return train(rate, rounds, place / _FILE)
            except ModelError:
                return None

        rate = float(choose_rate(label, search, search_folder, try_rate)["chosen"])
    start = folder / _FILE
    if not start.is_file():
        train(rate, federation.rounds, start)
    return Reference(learning_rate=rate, start=start)
