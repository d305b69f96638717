"""How the benchmarks measure: time on a device's own time line, the peak of memory, and how fast a large product is.

Imported by the benchmarks beside it, which are run as scripts.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from fedgraft.types import Batch

__all__ = ["PEAKS", "Clock", "Memory", "free", "measure_matmul", "median", "peak_of", "peak_pss", "ray_of_its_own", "timed"]

PEAKS = {  # dense bf16 FLOPs a second by the vendors' data sheets; the first name contained in the device's own is taken
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
}


class Clock:
    """Marks on a device's own time line: CUDA events, which do not hold the device up, or the CPU's clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((name, event))
        else:
            self._marks.append((name, time.perf_counter()))

    def around(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Give the batches and mark each step's ``start``; where the last one ends there is a ``start``, too."""
        for batch in batches:
            self.mark("start")
            yield batch
        self.mark("start")

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of every step, and of its forward, backward and optimiser parts."""
        _synchronize(self._device)
        found = []
        for i in range(0, len(self._marks) - 1, 3):
            names = [name for name, _ in self._marks[i : i + 4]]
            assert names == ["start", "forward", "backward", "start"], names
            parts = [self._between(self._marks[i + k][1], self._marks[i + k + 1][1]) for k in range(3)]
            found.append({"step": sum(parts), "forward": parts[0], "backward": parts[1], "optimizer": parts[2]})
        return found

    def _between(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) if self._device.type == "cuda" else 1e3 * (end - start)


class Memory:
    """The most memory that was taken since this was made: of the GPU's allocator, or of the process on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
            self.measure = "torch.cuda.max_memory_allocated"
            return
        self.start = psutil.Process().memory_info().rss
        try:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the high-water mark starts again from here
            self.measure = "VmHWM of the process, reset before the first client"
        except OSError:
            self.measure = "ru_maxrss of the process since its start: also what earlier variants took"

    def report(self) -> dict[str, Any]:
        """Bytes before and at the peak, and what was measured."""
        if self._device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self._device)
        elif self.measure.startswith("VmHWM"):
            lines = Path("/proc/self/status").read_text().splitlines()
            peak = 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Linux counts both from per-core counters that may be some pages apart; what was there at the start is part of the peak.
        return {"start_bytes": self.start, "peak_bytes": max(peak, self.start), "memory": self.measure}


def measure_matmul(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of a large square product of random numbers, median of ten."""
    rows = 8192 if device.type == "cuda" else 1024
    left, right = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    took = [timed(device, lambda: left @ right)[1] for _ in range(12)][2:]
    return 2e3 * rows**3 / statistics.median(took)


def peak_of(device_name: str, dtype: torch.dtype) -> tuple[str, float] | None:
    """The table's entry for a device, its name and FLOPs a second in bf16; ``None``: not listed, or another dtype."""
    if dtype != torch.bfloat16:
        return None
    return next(((name, peak) for name, peak in PEAKS.items() if name in device_name), None)


def timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float]:
    """Run something between two waits for the device; gives its result and milliseconds."""
    _synchronize(device)
    started = time.perf_counter()
    result = work()
    _synchronize(device)
    return result, 1e3 * (time.perf_counter() - started)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Let a variant's model go before the next one is made: hooks and modules refer to each other in circles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def median(values: list[float]) -> float:
    return round(statistics.median(values), 3)


def peak_pss(pid: int, is_running: Callable[[], bool], every_s: float = 1.0) -> int:
    """Watch a process and all its children until ``is_running`` is false; gives the most bytes (PSS) that they took together.

    A page that several processes share counts once. Looking costs processor time itself: the kernel walks every page table.
    """
    most = 0
    while is_running():
        try:
            root = psutil.Process(pid)
            most = max(most, sum(_pss_of(process) for process in (root, *root.children(recursive=True))))
        except psutil.Error:
            break  # it has just ended
        time.sleep(every_s)
    return most


def _pss_of(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0  # it has just ended


@contextmanager
def ray_of_its_own(num_cpus: int = 2, **more: Any) -> Iterator[None]:
    """A Ray on this machine for a while; one that is there already is used."""
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    if ray.is_initialized():
        yield
        return
    ray.init(num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, **more)
    try:
        yield
    finally:
        ray.shutdown()
