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


def this_rank() -> Ranks:
    """Read this process's place from the environment; one process alone where nothing is said."""
    return Ranks(rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1")))


def open_ranks(device: Literal["cpu", "cuda"], timeout_s: float) -> Ranks:
    """Join the replica's process group (gloo on CPUs, nccl on GPUs), once a process, and prepare DeepSpeed's import.

    Args:
        device: Decides the backend.
        timeout_s: Longest wait of one collective call, seconds.
    """
    ranks = this_rank()
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it; every rank sees its own devices only
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    for name in ("DeepSpeed", "deepspeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not dist.is_initialized():
        atexit.register(close_ranks)
        backend, timeout = ("nccl" if device == "cuda" else "gloo"), timedelta(seconds=timeout_s)
        if ranks.world_size == 1:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)  # type: ignore[attr-defined]
        else:
            if device == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend, init_method="env://", rank=ranks.rank, world_size=ranks.world_size, timeout=timeout)
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

    for name in deepspeed.ops.__compatible_ops__:
        if "shm" in name:
            deepspeed.ops.__compatible_ops__[name] = False
