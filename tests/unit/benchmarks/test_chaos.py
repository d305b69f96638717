"""The chaos benchmark's own parts: it must see what happens, kill at the named points only, and find what is wrong."""

from __future__ import annotations

import importlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the chaos benchmark reads /proc and inotify")


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(BENCHMARKS)
    names = ("watch", "processes", "monkey", "checks")
    return SimpleNamespace(**{name: importlib.import_module(f"chaos_{name}") for name in names})


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start a Python program; whatever is left of it afterwards is killed."""
    started: list[subprocess.Popen[str]] = []

    def begin(text: str) -> subprocess.Popen[str]:
        started.append(subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def _changes(watch: Any, seconds: float = 0.5) -> list[tuple[str, bool]]:
    found, deadline = [], time.monotonic() + seconds
    while time.monotonic() < deadline:
        found += [(change.path.name, change.is_whole) for change in watch.read(0.05)]
    return found


# ---- seeing


def test_a_watch_tells_made_from_renamed_also_in_folders_made_later(chaos: SimpleNamespace, tmp_path: Path) -> None:
    watch = chaos.watch.Watch(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    time.sleep(0.05)
    assert ("a", False) in _changes(watch)
    scratch = tmp_path / "a" / "b" / ".x.1"
    scratch.write_text("")
    scratch.rename(tmp_path / "a" / "b" / "x")
    found = _changes(watch)
    watch.close()
    assert (".x.1", False) in found
    assert found[-1] == ("x", True)


def test_a_herd_is_the_command_with_its_children_and_who_lost_them(
    chaos: SimpleNamespace, start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    marker = str(tmp_path / "marker")
    child = f"import time; time.sleep(60)  # {marker}"
    text = f"import subprocess, sys, time; p = subprocess.Popen([sys.executable, '-c', {child!r}]); print(p.pid, flush=True)"
    command = start(text + "; time.sleep(60)")
    other = start("import time; time.sleep(60)")
    assert command.stdout is not None
    pid = int(command.stdout.readline())
    herd = chaos.processes.Herd(marker)
    herd.lead(command.pid)
    assert herd.find(lambda told: marker in told) == sorted([command.pid, pid])  # the command has the child's text in its own
    command.kill()
    command.wait()
    assert [int(line.split()[0]) for line in herd.survivors(0.3)] == [pid]
    assert [int(line.split()[0]) for line in chaos.processes.Herd(marker).survivors(0.0)] == [pid]  # never seen before
    herd.end()
    assert herd.survivors(5.0) == []
    assert other.poll() is None


# ---- striking


def _strike(chaos: SimpleNamespace, kind: str, change: Any, writers: dict[str, int] | None = None) -> bool:
    scene = chaos.monkey.Scene(chaos.processes.Herd("nobody"), change, random.Random(0), writers or {})
    return bool(chaos.monkey.KINDS[kind](scene))


def test_private_unrenamed_hits_only_before_the_rename(
    chaos: SimpleNamespace, start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    folder = tmp_path / "clients" / "000003"
    folder.mkdir(parents=True)
    victim = start("import time; time.sleep(60)")
    final = folder / "round-000002.safetensors"
    scratch = folder / f".{final.name}.{victim.pid}"
    final.write_text("")
    assert not _strike(chaos, "private_unrenamed", chaos.watch.Change(final, True))
    assert not _strike(chaos, "private_unrenamed", chaos.watch.Change(scratch, False))  # renamed already
    assert victim.poll() is None
    assert not chaos.processes.is_frozen(victim.pid)  # and let go on
    scratch.write_text("")
    assert _strike(chaos, "private_unrenamed", chaos.watch.Change(scratch, False))
    assert victim.wait(5) == -signal.SIGKILL


def test_checkpoint_unrenamed_waits_for_the_tensors_and_lets_go_of_what_was_renamed(
    chaos: SimpleNamespace, start: Callable[[str], subprocess.Popen[str]], tmp_path: Path
) -> None:
    text = f"""
import os, pathlib, time
folder = pathlib.Path({str(tmp_path)!r}) / "checkpoints" / f".writing-{{os.getpid()}}"
folder.mkdir(parents=True)
print(flush=True)
time.sleep(0.2)
(folder / "state.safetensors").write_text("")
time.sleep(60)
"""
    late = start("import time; time.sleep(60)")
    gone = chaos.watch.Change(tmp_path / "checkpoints" / f".writing-{late.pid}", False)
    assert not _strike(chaos, "checkpoint_unrenamed", gone)
    assert late.poll() is None
    assert not chaos.processes.is_frozen(late.pid)
    victim = start(text)
    assert victim.stdout is not None
    victim.stdout.readline()
    folder = tmp_path / "checkpoints" / f".writing-{victim.pid}"
    while not _strike(chaos, "checkpoint_unrenamed", chaos.watch.Change(folder, False)):
        assert victim.poll() is None
    assert victim.wait(5) == -signal.SIGKILL
    assert (folder / "state.safetensors").is_file()


def test_a_run_that_only_mlflow_knows_is_told_from_one_that_its_folder_names(chaos: SimpleNamespace, tmp_path: Path) -> None:
    assert chaos.monkey.unremembered_runs(tmp_path) == set()  # no database yet
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (run_uuid)")
        database.executemany("INSERT INTO runs VALUES (?)", [("aaa",), ("bbb",), ("ccc",)])
        database.commit()
    (tmp_path / "it-1" / "flex").mkdir(parents=True)
    (tmp_path / "it-1" / "comparison.json").write_text(json.dumps({"mlflow_run_id": "aaa"}))
    (tmp_path / "it-1" / "flex" / "run.json").write_text(json.dumps({"mlflow_run_id": "ccc"}))
    assert chaos.monkey.unremembered_runs(tmp_path) == {"bbb"}


def test_a_kill_after_the_reply_has_left_is_not_counted_and_has_its_turn_again(
    chaos: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {"private_unreplied": lambda scene: scene.change is not None and "/clients/" in str(scene.change.path)}
    monkeypatch.setattr(chaos.monkey, "KINDS", kinds)
    monkey = chaos.monkey.Monkey(chaos.processes.Herd("nobody"), ["private_unreplied"], random.Random(0), max_wait_s=0.0)
    state = Path("/run/clients/000001/round-000002.safetensors")

    def checkpoint(at: int) -> Any:
        return chaos.watch.Change(Path(f"/x/flex/seed-0/checkpoints/round-{at:06d}"), True)

    assert not monkey.see(chaos.watch.Change(state, True))  # not before the first checkpoint
    monkey.see(checkpoint(1))
    assert monkey.see(chaos.watch.Change(state, True))
    monkey.see(checkpoint(2))  # nobody wrote the state again: the reply had left
    assert (monkey.strikes, monkey.missed) == ([], ["private_unreplied"])
    assert monkey.see(chaos.watch.Change(state, True))
    monkey.see(chaos.watch.Change(state, True))
    assert monkey.survived == []
    monkey.see(checkpoint(3))
    assert [(strike.kind, strike.after) for strike in monkey.survived] == [("private_unreplied", "flex round 2")]


def test_what_an_orphaned_driver_still_writes_is_no_recovery(chaos: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chaos.monkey, "KINDS", {"command": lambda scene: scene.change is None})
    monkey = chaos.monkey.Monkey(chaos.processes.Herd("nobody"), ["command"], random.Random(0), max_wait_s=0.0)
    checkpoint = chaos.watch.Change(Path("/x/flex/seed-0/checkpoints/round-000001"), True)
    monkey.see(checkpoint)
    assert monkey.see(None)
    monkey.see(checkpoint)
    assert monkey.survived == []
    monkey.restarted()
    monkey.see(checkpoint)
    assert [strike.kind for strike in monkey.survived] == ["command"]


# ---- finding what is wrong


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    """An experiment of one run of two rounds with MLflow's tables beside it: as small as the checks allow."""
    folder = tmp_path / "it-1"
    run = folder / "flex" / "seed-0"
    run.mkdir(parents=True)
    (folder / "comparison.json").write_text(json.dumps({"runs": {"flex": ["flex/seed-0"]}}))
    (run / "run.json").write_text(json.dumps({"rounds": 2}))
    rows = [{"round": at, "train_loss": 1.0 / at, "bytes_up": 8, "bytes_down": 8} for at in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database:
        database.execute("CREATE TABLE runs (run_uuid, name, status)")
        database.execute("CREATE TABLE metrics (run_uuid, key, step, value)")
        database.execute("CREATE TABLE latest_metrics (run_uuid, key, step)")
        database.executemany("INSERT INTO runs VALUES (?, ?, 'FINISHED')", [("p", "it"), ("r", "flex/seed-0")])
        points = [("r", key, row["round"], row[key]) for row in rows for key in ("train_loss", "bytes_up", "bytes_down")]
        database.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", points)
        database.executemany("INSERT INTO latest_metrics VALUES ('r', ?, 2)", [("train_loss",), ("bytes_up",), ("bytes_down",)])
        database.commit()
    return folder


def _wrong(chaos: SimpleNamespace, folder: Path) -> list[str]:
    left = [str(path.relative_to(folder)) for path in folder.rglob("*") if chaos.checks.is_scratch(path)]
    return [*chaos.checks.lost_rounds(folder), *chaos.checks.tracking_faults(folder), *left]


def _sql(folder: Path, text: str) -> None:
    with closing(sqlite3.connect(folder.parent / "mlflow.db")) as database:
        database.execute(text)
        database.commit()


def test_an_experiment_in_order_has_nothing_wrong(chaos: SimpleNamespace, experiment: Path) -> None:
    assert _wrong(chaos, experiment) == []


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("INSERT INTO runs VALUES ('q', 'flex/seed-0', 'FINISHED')", "2 runs are called flex/seed-0"),
        ("INSERT INTO runs VALUES ('q', 'else', 'FINISHED')", "runs are ['else', 'flex/seed-0', 'it']"),
        ("UPDATE runs SET status = 'RUNNING' WHERE run_uuid = 'p'", "run it is RUNNING"),
        ("DELETE FROM runs WHERE run_uuid = 'r'", "no run is called flex/seed-0"),
        ("INSERT INTO metrics VALUES ('r', 'train_loss', 2, 0.5)", "train_loss of step 2 more than once"),
        ("DELETE FROM metrics WHERE step = 1", "train_loss of flex/seed-0 is not what metrics.jsonl has"),
        ("UPDATE metrics SET value = 7 WHERE key = 'bytes_up'", "bytes_up of flex/seed-0 is not what"),
        ("UPDATE latest_metrics SET step = 1", "last steps"),
    ],
)
def test_what_mlflow_should_not_have_is_found(chaos: SimpleNamespace, experiment: Path, statement: str, expected: str) -> None:
    _sql(experiment, statement)
    assert any(expected in line for line in _wrong(chaos, experiment)), _wrong(chaos, experiment)


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [((1,), "round 2 is 0 times"), ((1, 2, 2), "round 2 is 2 times"), ((2, 1), "out of order")],
)
def test_rounds_that_are_lost_or_doubled_are_found(
    chaos: SimpleNamespace, experiment: Path, rounds: tuple[int, ...], expected: str
) -> None:
    path = experiment / "flex" / "seed-0" / "metrics.jsonl"
    by_round = {json.loads(line)["round"]: line for line in path.read_text().splitlines(keepends=True)}
    path.write_text("".join(by_round[at] for at in rounds))
    assert any(expected in line for line in chaos.checks.lost_rounds(experiment))


@pytest.mark.parametrize("name", [".round-000001.safetensors.77", ".writing-77", ".run.json.77", "metrics.tmp"])
def test_what_a_kill_left_half_written_is_found(chaos: SimpleNamespace, experiment: Path, name: str) -> None:
    (experiment / "flex" / name).mkdir()
    assert _wrong(chaos, experiment) == [f"flex/{name}"]
