"""The ranks of a replica: several processes that train one model together, or one process alone.

Whoever starts the processes tells each its place through the variables that PyTorch's own launcher uses: ``RANK``,
``WORLD_SIZE``, ``MASTER_ADDR``, ``MASTER_PORT``.
"""

from __future__ import annotations

import atexit
import logging
import os
import warnings
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
from torch import distributed as dist

from fedgraft.errors import ClusterError

__all__ = ["Ranks", "close_ranks", "open_ranks", "this_rank"]


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's ``rank``, from 0, among ``world_size``; rank 0 leads: it alone stores and sends."""

    rank: int
    world_size: int

    @property
    def is_leader(self) -> bool:
        """Whether this rank stores and sends."""
        return self.rank == 0


def this_rank(world_size: int) -> Ranks:
    """Read this process's place among ``world_size`` ranks from the environment; one alone asks nobody.

    Raises:
        ClusterError: The environment says something else.
    """
    if world_size == 1:
        return Ranks(rank=0, world_size=1)  # whatever a launcher of something else has left in the environment
    found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    if not all(found.values()) or found["WORLD_SIZE"] != str(world_size):
        said = ", ".join(f"{name}={value or '(not set)'}" for name, value in found.items())
        raise ClusterError(
            f"a replica of {world_size} ranks was not told its place: {said}", "let fedgraft start the ranks (executor.kind: ray)"
        )
    return Ranks(rank=int(found["RANK"]), world_size=world_size)


def open_ranks(device: Literal["cpu", "cuda"], timeout_s: float, world_size: int = 1) -> Ranks:
    """Join the replica's process group (gloo on CPUs, nccl on GPUs), once a process, and prepare DeepSpeed's import.

    Args:
        device: Decides the backend.
        timeout_s: Longest wait of one collective call, seconds.
        world_size: Ranks of the replica.

    Raises:
        ClusterError: The environment does not tell this process its place among several, or they do not meet.
    """
    ranks = this_rank(world_size)
    if dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")  # whoever opened the group has said which device is whose
    else:
        os.environ["LOCAL_RANK"] = "0"  # DeepSpeed asks for it; every rank of ours sees its own devices only
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if not dist.is_initialized():
        atexit.register(close_ranks)
        backend, timeout = ("nccl" if device == "cuda" else "gloo"), timedelta(seconds=timeout_s)
        if ranks.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        else:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            try:
                dist.init_process_group(
                    backend, init_method="env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timeout
                )
            except (RuntimeError, ValueError) as error:
                raise ClusterError(f"rank {ranks.rank} of {ranks.world_size} did not meet the others: {error}") from error
    _prepare_deepspeed()
    return ranks


def close_ranks() -> None:
    """Leave the process group, at the end of the process: DeepSpeed remembers the groups of the first one and takes no second.

    It is also done when Python ends; without it some processes end with an abort.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def _prepare_deepspeed() -> None:
    """Keep DeepSpeed from compiling its shared-memory sums (a minute once per user) and from repeating PyTorch's remarks."""
    warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.", category=FutureWarning)
    import deepspeed

    for logger in ("DeepSpeed", "deepspeed"):
        logging.getLogger(logger).setLevel(logging.ERROR)  # after the import, which sets it back
    for name in deepspeed.ops.__compatible_ops__:
        if "shm" in name:
            deepspeed.ops.__compatible_ops__[name] = False
