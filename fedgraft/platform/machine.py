"""What the machine offers that a run is planned for: cores, free memory of the container, GPUs, and a measured speed."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

__all__ = ["MachineFacts", "free_memory", "gpu_memory", "measure_op", "measure_speed", "usable_cores"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineFacts:
    """What one node offers: cores and free memory of the container, GPUs, and a measured speed in FLOPs a second.

    ``gpu_bytes`` is the memory of the smallest GPU, ``None`` where none is seen. ``op_seconds`` is what a product takes whose
    work is nothing: what a call costs.
    """

    cores: int
    memory_bytes: int
    gpus: int
    speed: float
    gpu_bytes: int | None = None
    op_seconds: float = 0.0


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and a container's quota where there is one."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(quota) == 2 and quota[0].isdigit() and int(quota[1]) > 0:
        cores = min(cores, max(1, int(quota[0]) // int(quota[1])))
    return cores


def free_memory() -> int:
    """Bytes of memory that are free, or that a container may still take where that is less."""
    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        most, taken = _read_words(Path(limit)), _read_words(Path(used))
        if most and taken and most[0].isdigit() and taken[0].isdigit():
            free = min(free, max(0, int(most[0]) - int(taken[0])))
    return free


def gpu_memory() -> int | None:
    """Bytes of the smallest GPU that this process sees, ``None`` where it sees none."""
    found = [int(torch.cuda.get_device_properties(index).total_memory) for index in range(torch.cuda.device_count())]
    return min(found, default=None)


def measure_speed(hidden: int, expert: int, threads: int, seconds: float = 0.2) -> float:
    """Measure how fast this machine multiplies matrices of the model's size, in FLOPs a second, on ``threads`` threads."""
    before = torch.get_num_threads()
    rows = 512
    left, right = torch.ones(rows, hidden), torch.ones(hidden, 2 * expert)
    torch.set_num_threads(threads)
    try:
        torch.mm(left, right)
        count, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            torch.mm(left, right)
            count += 1
        took = time.perf_counter() - started
    finally:
        torch.set_num_threads(before)
    return max(1, count) * 2.0 * rows * hidden * 2 * expert / took


def measure_op(seconds: float = 0.02) -> float:
    """Measure the seconds of a product of next to nothing: what PyTorch takes to begin and end one."""
    small = torch.ones(8, 8)
    torch.mm(small, small)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        torch.mm(small, small)
        count += 1
    return (time.perf_counter() - started) / max(1, count)


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
