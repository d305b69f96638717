"""The upper reference of a comparison: a method's slots trained on all clients' pooled examples, as ``fedgraft pretrain`` trains.

With actors it runs on the workers of a Ray Train ``TorchTrainer``, as many as a replica has ranks; in one process the same loop
runs here. What it leaves is a file of slot values that a run starts from, and judges.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from fedgraft.data.batches import pooled_batch, train_order
from fedgraft.data.prepared import PreparedData, TokenizedSplit
from fedgraft.data.tokenise import load_tokenizer, pad_token_id
from fedgraft.errors import ModelError, RunInterrupted
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts
from fedgraft.moe.slots import add_slots, initial_params
from fedgraft.platform.pretraining.config import WorkersConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.registry import METHODS, load_entry_points, load_method_file
from fedgraft.seeding import derive_seed
from fedgraft.training.pretrain import PretrainSpec
from fedgraft.training.ranks import open_ranks
from fedgraft.training.sharded import ShardedSpec, ShardedTraining
from fedgraft.types import FROZEN, Batch, ParamRef

__all__ = ["CentralisedJob", "centralised_job", "train_centrally"]


@dataclass(slots=True)
class CentralisedJob:
    """What workers train; see ``fedgraft.platform.pretraining.job.TrainingJob``.

    ``worker`` names base, data and method as for a replica; slot values are written to ``target``.
    """

    spec: ShardedSpec
    worker: WorkerSpec
    num_steps: int
    batch_size: int
    target: Path
    keeps_trained_only: bool = True
    _train: list[TokenizedSplit] = field(default_factory=list)
    _validation: list[TokenizedSplit] = field(default_factory=list)
    _pad_token_id: int = 0
    _refs: tuple[ParamRef, ...] = ()

    def open(self) -> None:
        """Map the clients' examples."""
        data = PreparedData.open(self.worker.data_folder)
        clients = range(data.num_clients)
        self._train = [data.split(client_id, "train") for client_id in clients]
        self._validation = [split for client_id in clients if len(split := data.split(client_id, "validation"))]
        self._pad_token_id = pad_token_id(load_tokenizer(self.worker.base_folder))

    def build(self) -> nn.Module:
        """Give the base with the method's slots at their start values, all in the same state in every worker."""
        load_entry_points()
        for path in self.worker.method_files:
            load_method_file(path)
        method = METHODS.parse(self.worker.method)
        model = open_base(self.worker.base_folder)
        refs = add_slots(model, method.slots(model_facts(model.config)))
        parameters = dict(model.named_parameters())
        start = initial_params(model, refs, self.worker.run_seed)
        self._refs = tuple(ref for ref in refs if method.group(ref) != FROZEN)
        with torch.no_grad():
            for ref in refs:
                ref.view(parameters[ref.name].data).copy_(start[ref.key])
        trained = {ref.name for ref in self._refs}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        return model

    def batch(self, step: int) -> Batch:
        """Give the pooled rows of a step, from 1, in seeded epochs over all clients' examples."""
        total = sum(len(split) for split in self._train)
        order = train_order(total, self.num_steps, self.batch_size, derive_seed(self.worker.run_seed, "centralised/batches"))
        return pooled_batch(self._train, order[step - 1], self._pad_token_id)

    def held_out(self) -> Iterator[Batch]:
        """Give all clients' validation examples."""
        total = sum(len(split) for split in self._validation)
        for start in range(0, total, self.batch_size):
            yield pooled_batch(self._validation, range(start, min(start + self.batch_size, total)), self._pad_token_id)

    def finish(self, weights: dict[str, torch.Tensor]) -> None:
        """Write the slot values, keyed as clients exchange them."""
        found = {ref.key: ref.view(weights[ref.name]).float().contiguous() for ref in self._refs}
        broken = [key for key, value in found.items() if not bool(torch.isfinite(value).all())]
        if broken:
            raise ModelError(f"centralised training: {broken[0]} is not finite", "lower the learning rate")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.target.with_suffix(".tmp")
        save_file(found, scratch)
        scratch.replace(self.target)


def centralised_job(worker: WorkerSpec, *, target: Path, learning_rate: float, num_steps: int) -> CentralisedJob:
    """Describe a centralised training.

    Args:
        worker: As for a replica of the same run.
        target: File of slot values that it leaves.
        learning_rate: Constant.
        num_steps: Optimiser steps on batches of ``worker.batch_size`` pooled examples.
    """
    engine = worker.engine
    training = PretrainSpec(
        num_steps=num_steps,
        learning_rate=learning_rate,
        warmup_steps=0,
        final_lr_fraction=1.0,
        betas=(0.9, 0.999),
        weight_decay=worker.train.weight_decay,
        max_grad_norm=worker.train.max_grad_norm or 0.0,
        router_aux_weight=0.0,
    )
    spec = ShardedSpec(
        training=training,
        batch_size=worker.batch_size,
        num_parts=engine.gradient_accumulation_steps,
        zero_stage=engine.zero_stage if engine.name == "deepspeed" else 1,
        dtype=worker.dtype,
        seed=worker.run_seed,
    )
    return CentralisedJob(spec=spec, worker=worker, num_steps=num_steps, batch_size=worker.batch_size, target=target)


def train_centrally(
    job: CentralisedJob,
    *,
    in_process: bool,
    workers: WorkersConfig,
    on_step: Callable[[int], None],
    is_stopping: Callable[[], bool],
) -> float | None:
    """Train a job to its end; one that was stopped or killed goes on from its last checkpoint.

    Args:
        job: What to train.
        in_process: Run the loop in this process instead of Ray Train's workers (no checkpoints).
        workers: On how many ranks.
        on_step: Told each step that is done.
        is_stopping: Asked after each step.

    Returns:
        The mean NLL on the pooled validation examples, nats a label token; ``None`` where there are none.

    Raises:
        RunInterrupted: It was asked to stop.
        ModelError: The loss is not finite.
    """
    if in_process:
        return _train_here(job, on_step, is_stopping)
    from fedgraft.platform.pretraining.ray_train import newest_checkpoint, run_job  # Ray Train takes a second to import

    folder = job.target.parent / f"{job.target.stem}-training"
    folder.mkdir(parents=True, exist_ok=True)
    found = newest_checkpoint(folder, world_size=workers.count, zero_stage=job.spec.zero_stage, on_refused=lambda text: None)
    stop = threading.Event()

    def watch(row: dict[str, Any]) -> None:
        on_step(int(row["step"]))
        if is_stopping():
            stop.set()

    result = run_job(
        job,
        workers,
        folder=folder,
        checkpoint_every=max(1, job.num_steps // 4),
        checkpoint=found[1] if found is not None else None,
        on_step=watch,
        stop=stop,
    )
    if not result.is_finished:
        raise RunInterrupted(f"centralised training stopped after step {result.step} of {job.num_steps}", "it can be resumed")
    value = result.metrics.get("held_out_nll")
    return None if value is None else float(value)


def _train_here(job: CentralisedJob, on_step: Callable[[int], None], is_stopping: Callable[[], bool]) -> float | None:
    torch.set_num_threads(job.worker.threads)
    ranks = open_ranks("cpu" if job.worker.engine.device == "cpu" else "cuda", job.worker.timeout_s)
    job.open()
    model = job.build()
    training = ShardedTraining(model if job.worker.engine.device == "cpu" else model.cuda(), job.spec, ranks)
    try:
        for step in range(1, job.num_steps + 1):
            training.step(step, job.batch(step))
            on_step(step)
            if is_stopping() and step < job.num_steps:
                raise RunInterrupted(f"centralised training stopped after step {step} of {job.num_steps}", "it begins anew")
        total = count = 0.0
        for batch in job.held_out():
            total += training.score(batch)
            count += batch.num_label_tokens
        weights = training.weights(trained_only=True)
        assert weights is not None
        job.finish(weights)
    finally:
        training.close()
    return total / count if count else None
