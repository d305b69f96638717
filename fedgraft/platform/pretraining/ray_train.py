"""Any training job on the workers of a Ray Train ``TorchTrainer``, with checkpoints, and a way to stop and to go on.

Ray Train keeps metrics only beside a checkpoint: ``result.metrics`` is what was reported with the last one, and ``None`` for a
training that reported no checkpoint. So every report here carries one, the last step's too. What each step gave is a line of
``metrics.jsonl``, which the first worker writes and the command follows.

    <folder>/attempt-<k>/step-<n>/   checkpoints of the k-th start, as Ray Train stores them
    <folder>/metrics.jsonl           one line a step
    <folder>/stop                    there while workers are asked to stop
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.torch import TorchConfig, TorchTrainer
from torch import distributed as dist

from fedgraft.errors import CheckpointError, ClusterError, FedgraftError, ModelError
from fedgraft.platform.pretraining.config import WorkersConfig
from fedgraft.platform.pretraining.job import TrainingJob
from fedgraft.training.ranks import Ranks, open_ranks
from fedgraft.training.sharded import ShardedTraining, StepReport, check_checkpoint

__all__ = ["JobResult", "check_resources", "newest_checkpoint", "read_metrics", "run_job"]

_METRICS = "metrics.jsonl"
_STOP = "stop"
_POLL_S = 0.3
_COLLECTIVE_TIMEOUT_S = 1800


@dataclass(frozen=True, kw_only=True, slots=True)
class JobResult:
    """How a job ended: at its last step, or earlier because it was asked to stop; ``metrics`` as Ray Train kept them."""

    step: int
    is_finished: bool
    metrics: dict[str, Any]


def check_resources(workers: WorkersConfig) -> None:
    """Check that the cluster this process has joined can hold all workers.

    Raises:
        ClusterError: It has too few cores or GPUs.
    """
    found = ray.cluster_resources()
    for resource, wanted, keys in (
        ("CPU", workers.count * workers.threads, "workers.count x workers.threads"),
        ("GPU", workers.count * workers.gpus, "workers.count x workers.gpus"),
    ):
        available = found.get(resource, 0.0)
        if wanted > available:
            raise ClusterError(
                f"{workers.count} workers need {wanted} {resource}s ({keys}), but the Ray cluster has {available:g}",
                "lower workers.count, workers.threads or workers.gpus, or name a larger cluster with workers.address",
            )


def newest_checkpoint(
    folder: Path, *, world_size: int, zero_stage: int, on_refused: Callable[[str], None]
) -> tuple[int, Path] | None:
    """Find the newest whole checkpoint of all attempts: its step and folder; ``None`` where there is none at all.

    Args:
        folder: Of the job.
        world_size: Workers that will go on.
        zero_stage: Theirs.
        on_refused: Told of each damaged one that is passed over.

    Raises:
        CheckpointError: There are checkpoints, and none can be used.
    """
    found = sorted(folder.glob("attempt-*/step-*"), key=lambda path: path.name, reverse=True)
    for path in found:
        try:
            return check_checkpoint(path, world_size=world_size, zero_stage=zero_stage), path
        except CheckpointError as error:
            on_refused(error.message)
    if found:
        raise CheckpointError(f"no checkpoint in {folder} can be used", "start anew in another output.folder")
    return None


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of all steps so far; a torn last line is left out."""
    path = folder / _METRICS
    rows: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def run_job(
    job: TrainingJob,
    workers: WorkersConfig,
    *,
    folder: Path,
    checkpoint_every: int,
    checkpoint: Path | None,
    on_step: Callable[[dict[str, Any]], None],
    stop: threading.Event,
) -> JobResult:
    """Train a job to its end, or until it is asked to stop; this process is in the cluster already.

    Args:
        job: What to train.
        workers: On how many ranks.
        folder: Of the job, on storage that all nodes share.
        checkpoint_every: Steps between checkpoints; the last step has one too.
        checkpoint: Where to go on from; ``None``: from the start.
        on_step: Gets every line of ``metrics.jsonl``, in this thread.
        stop: Once set, workers finish their step, write a checkpoint and end.

    Raises:
        FedgraftError: What a worker raised on purpose.
        ClusterError: A worker was lost more often than ``workers.max_failures``, or failed.
    """
    (folder / _STOP).unlink(missing_ok=True)
    trainer = TorchTrainer(
        _on_worker,
        train_loop_config={
            "job": job,
            "folder": str(folder),
            "every": checkpoint_every,
            "checkpoint": str(checkpoint) if checkpoint is not None else None,
            "threads": workers.threads,
            "gpus": workers.gpus,
        },
        torch_config=TorchConfig(backend="nccl" if workers.gpus else "gloo", timeout_s=_COLLECTIVE_TIMEOUT_S),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers.count,
            use_gpu=bool(workers.gpus),
            resources_per_worker={"CPU": workers.threads, **({"GPU": workers.gpus} if workers.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name=f"attempt-{1 + max((_number(path) for path in folder.glob('attempt-*')), default=0)}",
            storage_path=str(folder),
            failure_config=ray.train.FailureConfig(max_failures=workers.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            worker_runtime_env={"env_vars": _environment(workers)},
        ),
    )
    fit = _Fit(trainer)
    start = 0 if checkpoint is None else _number(checkpoint)
    shown = start
    while True:
        is_over = not fit.wait(_POLL_S)
        if stop.is_set():
            (folder / _STOP).touch()
        for row in read_metrics(folder):
            if row["step"] > shown:
                shown = row["step"]
                on_step(row)
        if is_over:
            break
    (folder / _STOP).unlink(missing_ok=True)
    return _result(fit.result(), job.spec.training.num_steps)


class _Fit:
    """``trainer.fit()`` in a thread: in the main one it would take Ctrl-C for itself and end the process."""

    def __init__(self, trainer: Any) -> None:
        self._result: Any = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(trainer,), daemon=True)
        self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Wait; whether it still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self) -> Any:
        """Give the result, or raise."""
        if self._error is not None:
            raise _as_ours(self._error) from self._error
        return self._result

    def _run(self, trainer: Any) -> None:
        try:
            self._result = trainer.fit()
        except Exception as error:  # handed over to the thread that asks for the result
            self._error = error


def _as_ours(error: Exception) -> FedgraftError:
    failures = getattr(error, "worker_failures", None) or {}
    for rank, failure in sorted(failures.items()):
        if isinstance(failure, FedgraftError):
            return failure
        text = str(failure).strip().splitlines()[-1:] or [type(failure).__name__]
        return ClusterError(f"worker {rank} failed: {text[0]}", "often too little memory; Ray's own logs say more")
    return ClusterError(f"Ray Train failed: {str(error).splitlines()[0]}", "Ray's own logs say more")


def _result(result: Any, num_steps: int) -> JobResult:
    ended = result.return_value or {}
    if "error" in ended:
        kind, message, hint = ended["error"]
        raise (CheckpointError if kind == "CheckpointError" else ModelError)(message, hint)
    step = int(ended["step"])
    return JobResult(step=step, is_finished=step == num_steps, metrics=dict(result.metrics or {}))


def _environment(workers: WorkersConfig) -> dict[str, str]:
    found = {"OMP_NUM_THREADS": str(workers.threads), "TOKENIZERS_PARALLELISM": "false"}
    return found if workers.gpus else found | {"DS_ACCELERATOR": "cpu"}


def _number(path: Path) -> int:
    found = re.search(r"-(\d+)$", path.name)
    return int(found.group(1)) if found else 0


# In a worker.


def _on_worker(config: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank. An error of ours that every rank meets alike is returned: a new start would only meet it again."""
    try:
        return _train(config)
    except FedgraftError as error:
        return {"error": (type(error).__name__, error.message, error.hint)}


def _train(config: dict[str, Any]) -> dict[str, Any]:
    job: TrainingJob = config["job"]
    folder, num_steps = Path(config["folder"]), job.spec.training.num_steps
    torch.set_num_threads(config["threads"])
    size = ray.train.get_context().get_world_size()
    ranks = open_ranks("cuda" if config["gpus"] else "cpu", _COLLECTIVE_TIMEOUT_S, size)
    job.open()
    training = ShardedTraining(job.build().to(ray.train.torch.get_device()), job.spec, ranks)
    start = _restore(training, config["checkpoint"])
    lines = _Lines(folder / _METRICS, start) if ranks.is_leader else None
    report: StepReport | None = None
    for step in range(start + 1, num_steps + 1):
        began = time.perf_counter()
        report = training.step(step, job.batch(step))
        if lines is not None:
            lines.add(report, time.perf_counter() - began)
        is_stopping = _all_agree((folder / _STOP).exists(), training.device, ranks)
        if step < num_steps and (is_stopping or step % config["every"] == 0):
            _checkpoint(training, step, _metrics(report))
        if is_stopping and step < num_steps:
            return {"step": step}
    _checkpoint(training, num_steps, _metrics(report) | _judge(training, job))
    weights = training.weights(trained_only=job.keeps_trained_only)
    if weights is not None:
        job.finish(weights)
    training.close()
    return {"step": num_steps}


def _restore(training: ShardedTraining, given: str | None) -> int:
    """Go on from this attempt's last checkpoint (a worker was lost), else from the one the command chose."""
    latest = ray.train.get_checkpoint()
    if latest is not None:
        with latest.as_directory() as path:
            return training.load(Path(path))
    return training.load(Path(given)) if given is not None else 0


def _checkpoint(training: ShardedTraining, step: int, metrics: dict[str, Any]) -> None:
    """Hand this rank's files to Ray Train, which puts those of all ranks into one folder."""
    with tempfile.TemporaryDirectory(prefix="fedgraft-checkpoint-") as scratch:
        training.save(Path(scratch), step)
        checkpoint = ray.train.Checkpoint.from_directory(scratch)
        ray.train.report(metrics | {"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}")


def _metrics(report: StepReport | None) -> dict[str, Any]:
    return {} if report is None else dataclasses.asdict(report)


def _judge(training: ShardedTraining, job: TrainingJob) -> dict[str, Any]:
    total = count = 0.0
    for batch in job.held_out():
        total += training.score(batch)
        count += batch.num_label_tokens
    return {"held_out_nll": total / count, "held_out_tokens": int(count)} if count else {}


def _all_agree(flag: bool, device: torch.device, ranks: Ranks) -> bool:
    """Take the first rank's word: the others may see a file a moment later."""
    if ranks.world_size == 1:
        return flag
    value = torch.tensor([int(flag)], device=device)
    dist.broadcast(value, src=0)
    return bool(value.item())


class _Lines:
    """Appends a line a step; lines of steps that a resumed training takes again are dropped first."""

    def __init__(self, path: Path, last_step: int) -> None:
        self._path = path
        kept = [row for row in read_metrics(path.parent) if row["step"] <= last_step]
        scratch = path.with_suffix(".tmp")
        scratch.write_text("".join(json.dumps(row) + "\n" for row in kept))
        os.replace(scratch, path)

    def add(self, report: StepReport, seconds: float) -> None:
        with self._path.open("a") as stream:
            stream.write(json.dumps(dataclasses.asdict(report) | {"seconds": round(seconds, 4)}) + "\n")
