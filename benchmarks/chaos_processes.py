"""The processes of one command, seen and signalled from outside: found by parentage and title, never by a hook in them.

Ray gives its workers titles: ``ray::Rank`` is an idle replica, ``ray::Rank.run`` one that is at a task, ``ray::Driver...`` the
driver actor. Linux only: everything is read from /proc.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil

__all__ = ["Herd", "freeze", "is_frozen", "kill", "thaw", "title"]

_FREEZE_S = 0.2


def title(pid: int) -> str:
    """A process's title or command line; empty where it has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""


def is_frozen(pid: int) -> bool:
    """Whether every thread of a process is stopped."""
    try:
        states = [
            (task / "stat").read_text().rpartition(") ")[2][:1] for task in Path(f"/proc/{pid}/task").iterdir()
        ]  # the name in parentheses may hold anything
    except OSError:
        return False
    return bool(states) and set(states) == {"T"}


def freeze(pid: int) -> bool:
    """Stop a process and wait until it stands still; false where it does not, or has gone."""
    try:
        os.kill(pid, signal.SIGSTOP)
    except ProcessLookupError:
        return False
    deadline = time.monotonic() + _FREEZE_S
    while time.monotonic() < deadline:
        if is_frozen(pid):
            return True
        time.sleep(0.0002)
    return False


def thaw(pid: int) -> None:
    """Let a stopped process go on."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def kill(pid: int) -> None:
    """End a process, stopped or not, without a word to it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


class Herd:
    """A command and everything that it started, by process id; remembers whom it has seen.

    Args:
        marker: Text that stands in the environment or the command line of all of them, such as the path of their Ray folder:
            what has lost its parents is found by it.
    """

    def __init__(self, marker: str) -> None:
        self._marker = marker.encode()
        self._root: psutil.Process | None = None
        self._seen: dict[int, float] = {}
        self._members: list[int] = []

    def lead(self, pid: int) -> None:
        """The command's process of now."""
        self._root = psutil.Process(pid)
        self.refresh()

    def refresh(self) -> None:
        """Look who belongs to the command now. It takes milliseconds, too long for a moment when one must be quick."""
        self._members = []
        if self._root is None:
            return
        with contextlib.suppress(psutil.NoSuchProcess):
            found = [self._root, *self._root.children(recursive=True)]
            self._seen |= {process.pid: process.create_time() for process in found}
            self._members = [process.pid for process in found]

    @property
    def command(self) -> int | None:
        """The command's own process, if it was alive at the last look."""
        return self._members[0] if self._members else None

    def find(self, wanted: Callable[[str], bool]) -> list[int]:
        """Members, as of the last look, whose title is as wanted now; by process id."""
        return sorted(pid for pid in self._members if wanted(title(pid)))

    def survivors(self, wait_s: float) -> list[str]:
        """Who of all that were ever seen, or carry the marker, is alive after at most ``wait_s``: ``pid title``."""
        deadline = time.monotonic() + wait_s
        while True:
            alive = [pid for pid, born in self._seen.items() if _is_alive(pid, born)]
            alive += [pid for pid in self._marked() if pid not in alive]
            if not alive or time.monotonic() > deadline:
                return [f"{pid} {title(pid)}" for pid in alive]
            time.sleep(0.2)

    def end(self) -> None:
        """Kill whoever is left of it, and nobody else."""
        for line in self.survivors(0.0):
            kill(int(line.split()[0]))

    def _marked(self) -> list[int]:
        found = []
        for pid in psutil.pids():
            if pid == os.getpid():
                continue
            try:
                told = Path(f"/proc/{pid}/environ").read_bytes() + Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if self._marker in told:
                found.append(pid)
        return found


def _is_alive(pid: int, born: float) -> bool:
    try:
        process = psutil.Process(pid)
        return process.create_time() == born and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
