"""Kills from outside, at seeded times and at named points, each known to have hit before it counts.

The monkey sees what anybody on the machine can see: names of files as they are made and renamed, and titles of processes. At a
named point it stops the process first (SIGSTOP) and looks whether it is still there; only then it kills. What came too late is
undone and tried again.
"""

from __future__ import annotations

import random
import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from chaos_processes import Herd, freeze, kill, thaw, title
from chaos_watch import Change

__all__ = ["EARLY", "KINDS", "Monkey", "Scene", "Strike", "unremembered_runs"]

_IDLE, _AT_WORK, _STARTING, _DRIVER = "ray::Rank", "ray::Rank.run", "ray::Rank.host", "ray::Driver"
_PRIVATE = re.compile(r"/clients/(\d{6})/(\.?)round-(\d{6})\.safetensors(?:\.(\d+))?$")
_WRITING = re.compile(r"/checkpoints/\.writing-(\d+)$")
_CHECKPOINT = re.compile(r"/checkpoints/round-(\d{6})$")
_REPLY_S = 2.0
"""Longest time that a stopped driver is kept waiting for a replica to make its reply."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What a strike may look at: the processes, a change that has just been seen (none: time has passed), and chance.

    ``writers`` are the processes that began to write a file, by the name that it gets in the end.
    """

    herd: Herd
    change: Change | None
    chance: random.Random
    writers: Mapping[str, int]

    def pick(self, wanted: str) -> int | None:
        """One process whose title begins so, by chance."""
        found = self.herd.find(lambda told: told.startswith(wanted))
        return self.chance.choice(found) if found else None

    def match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        """The change's path, if it is of this form."""
        return pattern.search(str(self.change.path)) if self.change is not None else None


def _replica_at_work(scene: Scene) -> bool:
    pid = scene.pick(_AT_WORK) if scene.change is None else None
    return pid is not None and _kill_if(pid, lambda: title(pid) == _AT_WORK)


def _replica_starting(scene: Scene) -> bool:
    pid = scene.pick(_STARTING) if scene.change is None else None
    return pid is not None and _kill_if(pid, lambda: title(pid) == _STARTING)


def _replica_stopped(scene: Scene) -> bool:
    pid = scene.pick(_AT_WORK) if scene.change is None else None
    if pid is None or not freeze(pid):
        return False
    if title(pid) == _AT_WORK:
        return True  # it stays like this: whoever waits for it must find out
    thaw(pid)
    return False


def _private_unrenamed(scene: Scene) -> bool:
    """Between a private state's write and its rename."""
    found = scene.match(_PRIVATE)
    if found is None or not found[2] or not found[4] or scene.change is None:
        return False
    path = scene.change.path
    return _kill_if(int(found[4]), path.is_file)


def _private_unreplied(scene: Scene) -> bool:
    """Between a private state's rename and the reply that tells of it."""
    pid = _writer(scene)
    return pid is not None and _kill_if(pid, lambda: title(pid) == _AT_WORK)


def _reply_unacknowledged(scene: Scene) -> bool:
    """The replica has made its reply; the driver has not seen it yet, and finds the replica dead."""
    pid, driver = _replied_behind_the_driver(scene)
    if pid is None or driver is None:
        return False
    kill(pid)
    thaw(driver)
    return True


def _reply_lost_with_driver(scene: Scene) -> bool:
    """The replica has made its reply; the driver dies without having seen it."""
    _, driver = _replied_behind_the_driver(scene)
    if driver is not None:
        kill(driver)
    return driver is not None


def _replied_behind_the_driver(scene: Scene) -> tuple[int | None, int | None]:
    """Stop the driver while a replica is at work, wait until that one has replied; give both, or nothing and undo it."""
    pid = _writer(scene)
    driver = scene.pick(_DRIVER) if pid is not None else None
    if pid is None or driver is None or not freeze(driver):
        return None, None
    if title(pid) == _AT_WORK:  # it had not replied when the driver stood still
        deadline = time.monotonic() + _REPLY_S
        while time.monotonic() < deadline:
            if title(pid) == _IDLE:
                time.sleep(0.05)  # the result leaves the process right after its title has changed
                return pid, driver
            time.sleep(0.001)
    thaw(driver)
    return None, None


def _checkpoint_unrenamed(scene: Scene) -> bool:
    """Between a checkpoint's write and its rename: the tensors are there, under the scratch name."""
    found = scene.match(_WRITING)
    if found is None or scene.change is None:
        return False
    pid, folder = int(found[1]), scene.change.path
    for _ in range(200):
        if not freeze(pid):
            return False
        if (folder / "state.safetensors").is_file():
            kill(pid)
            return True
        is_over = not folder.is_dir()
        thaw(pid)
        if is_over:
            return False
        time.sleep(0.0005)
    return False


def _tracking_unremembered(scene: Scene) -> bool:
    """Between MLflow's making of a run and the note of its id in the folder: the driver dies."""
    if scene.change is None or not scene.change.path.name.startswith("mlflow.db"):
        return False
    root, pid = scene.change.path.parent, scene.pick(_DRIVER)
    return pid is not None and _kill_if(pid, lambda: bool(unremembered_runs(root)))


def unremembered_runs(root: Path) -> set[str]:
    """Ids of the runs that MLflow's database in a runs folder has and no file of the experiments in it names."""
    try:
        with closing(sqlite3.connect(f"file:{root / 'mlflow.db'}?mode=ro", uri=True, timeout=0)) as database:
            ids = {row[0] for row in database.execute("SELECT run_uuid FROM runs")}
    except sqlite3.OperationalError:  # not there yet, or in the middle of a transaction
        return set()
    told = "".join(path.read_text() for name in ("comparison.json", "run.json") for path in root.rglob(name))
    return {run_id for run_id in ids if run_id not in told}


def _driver(scene: Scene) -> bool:
    pid = scene.pick(_DRIVER) if scene.change is None else None
    return pid is not None and _kill_if(pid, lambda: True)


def _node(scene: Scene) -> bool:
    """The raylet: to Ray this is the node."""
    found = scene.herd.find(lambda told: "/raylet" in told.split(" ")[0]) if scene.change is None else []
    return bool(found) and _kill_if(found[0], lambda: True)


def _head(scene: Scene) -> bool:
    """Ray's own control process."""
    found = scene.herd.find(lambda told: "/gcs_server" in told.split(" ")[0]) if scene.change is None else []
    return bool(found) and _kill_if(found[0], lambda: True)


def _command(scene: Scene) -> bool:
    pid = scene.herd.command if scene.change is None else None
    return pid is not None and _kill_if(pid, lambda: True)


def _writer(scene: Scene) -> int | None:
    """The replica that has just put a private state in its place, if it can be told: replicas that write are at work."""
    found = scene.match(_PRIVATE)
    if found is None or found[2] or scene.change is None or not scene.change.is_whole:
        return None
    return scene.writers.get(str(scene.change.path))


def _kill_if(pid: int, is_there: Callable[[], bool]) -> bool:
    """Stop a process, look whether it is where it was wanted, then kill it or let it go on."""
    if not freeze(pid):
        return False
    if is_there():
        kill(pid)
        return True
    thaw(pid)
    return False


KINDS: dict[str, Callable[[Scene], bool]] = {
    "replica_at_work": _replica_at_work,
    "replica_starting": _replica_starting,
    "replica_stopped": _replica_stopped,
    "private_unrenamed": _private_unrenamed,
    "private_unreplied": _private_unreplied,
    "reply_unacknowledged": _reply_unacknowledged,
    "reply_lost_with_driver": _reply_lost_with_driver,
    "checkpoint_unrenamed": _checkpoint_unrenamed,
    "tracking_unremembered": _tracking_unremembered,
    "driver": _driver,
    "node": _node,
    "head": _head,
    "command": _command,
}
"""Called for every change in the folder and now and then between them; true once it has hit."""


EARLY = ("tracking_unremembered",)
"""Kinds whose moment comes before the first checkpoint; each has its turn at once where it is the first."""
_REPEATED = frozenset({"private_unrenamed", "private_unreplied", "reply_lost_with_driver"})
"""Kinds after which the same client must do the same round again: its file is seen to be written once more."""


@dataclass(slots=True)
class Strike:
    """One kill: its kind, the last whole checkpoint before it, and how long it took until the next one.

    ``repeats`` is a file that must be written again before that checkpoint; else the kill came too late to matter. Checkpoints
    that are written while ``awaits_start`` come from a driver that has not noticed yet that its command is gone.
    """

    kind: str
    after: str
    at_s: float
    repeats: str | None = None
    awaits_start: bool = False
    recovered_s: float | None = None


@dataclass(slots=True)
class Monkey:
    """Carries out a list of kinds one after another; each has its turn once the one before it is got over.

    Args:
        herd: The processes.
        kinds: What to do, in this order.
        chance: Decides waits and victims.
        max_wait_s: Longest seeded wait between a checkpoint and the next turn.

    ``strikes`` have been made, ``missed`` came too late to matter; ``unprovoked`` are ends that no strike explains.
    """

    herd: Herd
    kinds: Sequence[str]
    chance: random.Random
    max_wait_s: float = 0.5
    strikes: list[Strike] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    unprovoked: list[str] = field(default_factory=list)
    _last: str = "the start"
    _due: float | None = None
    _writers: dict[str, int] = field(default_factory=dict)
    _started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.kinds and self.kinds[0] in EARLY:
            self._due = self._started

    @property
    def survived(self) -> list[Strike]:
        """The strikes that were followed by a checkpoint: those that are known to have hit a run at work."""
        return [strike for strike in self.strikes if strike.recovered_s is not None]

    def see(self, change: Change | None) -> bool:
        """Look at a change, or at nothing but the time; gives whether something was killed or stopped."""
        now = time.monotonic()
        if change is not None:
            self._note(change, now)
        if len(self.strikes) == len(self.kinds) or self._due is None or now < self._due:
            return False
        kind = self.kinds[len(self.strikes)]
        if not KINDS[kind](Scene(self.herd, change, self.chance, self._writers)):
            return False
        repeats = _final_name(change) if kind in _REPEATED and change is not None else None
        self.strikes.append(Strike(kind, self._last, round(now - self._started, 2), repeats, kind == "command"))
        self._due = None
        return True

    def restarted(self) -> None:
        """The command has been started again."""
        for strike in self.strikes:
            strike.awaits_start = False

    def _note(self, change: Change, now: float) -> None:
        found = _PRIVATE.search(str(change.path))
        if found is not None and found[4]:
            self._writers[_final_name(change)] = int(found[4])
        open_strike = self.strikes[-1] if self.strikes and self.strikes[-1].recovered_s is None else None
        if open_strike is not None and change.is_whole and open_strike.repeats == str(change.path):
            open_strike.repeats = None
        found = _CHECKPOINT.search(str(change.path))
        if found is None or not change.is_whole:
            return
        if open_strike is not None and open_strike.awaits_start:
            return
        self._last = f"{change.path.parents[2].name} round {int(found[1])}"
        if open_strike is not None and open_strike.repeats is not None:
            self.missed.append(open_strike.kind)  # the reply had left before: this was just some kill, and has its turn again
            self.strikes.remove(open_strike)
        elif open_strike is not None:
            open_strike.recovered_s = round(now - self._started - open_strike.at_s, 2)
        if self._due is None:
            self._due = now + self.chance.uniform(0, self.max_wait_s)


def _final_name(change: Change) -> str:
    """The path that a private state's file gets when it is whole."""
    return re.sub(r"/\.(round-\d{6}\.safetensors)\.\d+$", r"/\1", str(change.path))
