"""Doubles for tests of hosts: an object that answers, dies, hangs or raises when an item says so, and a job that its driver runs.

They live in the package because replicas and drivers are processes of their own: what they host must be importable there.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from fedgraft.actors.hosting import Fetch, JobContext, PoolOptions
from fedgraft.errors import GroupViolation, MethodError, RunInterrupted, StorageError

__all__ = ["Counting", "Double", "Item", "act_once", "add_up"]


def act_once(act: str, once: Path) -> None:
    """Do to this process what ``act`` names, unless ``once`` says by its presence that it was done.

    ``die``: SIGKILL. ``freeze``: SIGSTOP. ``hang``: sleep for an hour, alive. ``swell``: take memory
    until 2 GiB of the machine's are left, and keep it.
    """
    if once.exists():
        return
    once.touch()
    if act == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif act == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif act == "swell":
        kept = []
        while psutil.virtual_memory().available > 2 * 2**30:
            kept.append(b"x" * 2**26)  # written to, for only then a page counts
            time.sleep(0.01)  # the monitor looks every 100 ms
        time.sleep(3600)
    elif act == "hang":
        time.sleep(3600)
    else:
        raise ValueError(f"no double does {act!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Item:
    """What a double is to do: answer with ``number``, after it did ``act`` once.

    ``act`` is one of ``act_once`` (with the file ``once``), or, always and not once, ``raise``, ``violate``, ``fill`` (a full
    disk) or ``hold`` (Python's lock for ``seconds`` in one call in C), or nothing. Only ``rank`` does it, if one is named.
    """

    number: int
    act: str = ""
    once: Path | None = None
    rank: int | None = None
    seconds: float = 0.0


class Double:
    """Hosted by a pool in tests."""

    def pid(self) -> int:
        """This process."""
        return os.getpid()

    def place(self) -> tuple[str, str, str]:
        """What this process was told of its place: rank, world size, and where the ranks meet."""
        meeting = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", ""), meeting

    def work(self, item: Item, shared: int) -> tuple[int, list[int]]:
        """Give number + shared (and 1000 a rank), and a large result of it."""
        rank = int(os.environ.get("RANK", "0"))
        if item.rank is None or item.rank == rank:
            if item.act == "raise":
                raise ValueError(f"item {item.number} is bad")
            if item.act == "violate":
                raise GroupViolation(f"item {item.number} sends what it must not", "keep it")
            if item.act == "fill":
                raise StorageError(f"item {item.number} cannot be written", "free space")
            if item.act == "hold":
                ctypes.PyDLL(None).usleep(int(item.seconds * 1e6))  # PyDLL keeps the lock, as CDLL does not
            elif item.act and item.once is not None:
                act_once(item.act, item.once)
        return item.number + shared + rank * 1000, [item.number] * 200_000

    def tensors(self, item: Item, shared: torch.Tensor) -> tuple[int, dict[str, torch.Tensor]]:
        """Take ``item.seconds``; give this process and a large tensor: the shared one, with the item's number added."""
        time.sleep(item.seconds)
        return os.getpid(), {"w": shared + item.number, "none": torch.empty(0, 3), "half": torch.ones(2, dtype=torch.bfloat16)}


def add_up(item: Item, fetch: Fetch) -> tuple[int, dict[str, torch.Tensor]]:
    """Do ``item.act`` once, then add up ``item.number`` large results of ``Double.tensors``; gives this process and the sum."""
    if item.act == "raise":
        raise ValueError(f"item {item.number} is bad")
    if item.act and item.once is not None:
        act_once(item.act, item.once)
    total = torch.zeros(())
    for place in range(item.number):
        total = total + fetch(place)["w"]
    return os.getpid(), {"w": total}


@dataclass(frozen=True, kw_only=True, slots=True)
class Counting:
    """A job in steps that knows how to go on: each step is an item on a pool, and a line of ``folder/done``.

    Its events are the numbers of the steps and the notes of the pool. After step ``at`` it does ``act`` once, to the process
    that runs it; ``raise`` raises a MethodError every time. ``folder/lives`` gets a line whenever the job is begun, with the
    processes of that life: the driver's own, then the replicas'.
    """

    folder: Path
    steps: int
    options: PoolOptions
    act: str = ""
    at: int = -1
    step_s: float = 0.0

    def __call__(self, context: JobContext) -> list[int]:
        """Count on from what is done; gives all that is done."""
        pool = context.open_pool(self.options, context.emit)
        try:
            pool.host(Double)
            with (self.folder / "lives").open("a") as stream:
                stream.write(" ".join(str(pid) for pid in (os.getpid(), *pool.call("pid"))) + "\n")
            for step in range(len(self.done()), self.steps):
                if context.is_stopping():
                    raise RunInterrupted(f"stopped before step {step}", "go on")
                (finished,) = pool.map("work", [Item(number=step)], pool.share(100))
                with (self.folder / "done").open("a") as stream:
                    stream.write(f"{finished.value}\n")
                context.emit(step)
                time.sleep(self.step_s)
                if self.act == "raise":
                    raise MethodError(f"step {step} is wrong", "nothing helps")
                if step == self.at:
                    act_once(self.act, self.folder / "acted")
        finally:
            pool.close()
        return self.done()

    def done(self) -> list[int]:
        """The results of the steps that are done."""
        path = self.folder / "done"
        return [int(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def lives(self) -> list[list[int]]:
        """The processes of each life, the driver's first."""
        path = self.folder / "lives"
        return [[int(pid) for pid in line.split()] for line in path.read_text().splitlines()] if path.is_file() else []
