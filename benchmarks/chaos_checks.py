"""What must hold of a run that was killed again and again: the bits of the undisturbed one, and nothing left over."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import fedgraft

__all__ = ["Findings", "examine", "is_scratch", "lost_rounds", "tracking_faults"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was found wrong, each empty where nothing is; and how much was looked at."""

    differences: tuple[str, ...]
    lost_rounds: tuple[str, ...]
    tracking: tuple[str, ...]
    left_files: tuple[str, ...]
    rounds: int
    tensors: int
    private_states: int

    @property
    def wrong(self) -> list[str]:
        """All that is wrong."""
        return [*self.differences, *self.lost_rounds, *self.tracking, *self.left_files]

    def as_json(self) -> dict[str, Any]:
        """The record of it."""
        return asdict(self)


def examine(folder: Path, reference: Path) -> Findings:
    """Compare an experiment with the undisturbed one of the same configuration.

    Args:
        folder: The experiment's; MLflow's database lies beside it.
        reference: The undisturbed one's.
    """
    verification = fedgraft.verify(reference, folder)
    return Findings(
        differences=tuple(str(difference) for difference in verification.differences),
        lost_rounds=tuple(lost_rounds(folder)),
        tracking=tuple(tracking_faults(folder)),
        left_files=tuple(str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if is_scratch(path)),
        rounds=sum(run.rounds for run in verification.runs),
        tensors=sum(run.tensors for run in verification.runs),
        private_states=sum(run.private_states for run in verification.runs),
    )


def _runs(folder: Path) -> dict[str, Path]:
    """The runs' folders by name, ``label/seed-n``."""
    listed = json.loads((folder / "comparison.json").read_text())["runs"]
    return {name: folder / name for names in listed.values() for name in names}


def _lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def lost_rounds(folder: Path) -> list[str]:
    """Rounds that are not exactly once in a run's metrics, or not in order."""
    wrong = []
    for name, run in _runs(folder).items():
        found = [line["round"] for line in _lines(run)]
        wanted = list(range(1, int(json.loads((run / "run.json").read_text())["rounds"]) + 1))
        counts = Counter(found)
        wrong += [f"{name}: round {at} is {counts[at]} times in metrics.jsonl" for at in wanted if counts[at] != 1]
        if sorted(found) == wanted != found:
            wrong.append(f"{name}: rounds are out of order in metrics.jsonl")
    return wrong


def tracking_faults(folder: Path) -> list[str]:
    """What MLflow has, read from its tables: one finished run a run and one of the experiment, each step once, the right loss."""
    with closing(sqlite3.connect(f"file:{folder.parent / 'mlflow.db'}?mode=ro", uri=True)) as database:
        runs = database.execute("SELECT run_uuid, name, status FROM runs").fetchall()
        points = database.execute("SELECT run_uuid, key, step, value FROM metrics").fetchall()
        latest = database.execute("SELECT run_uuid, key, step FROM latest_metrics").fetchall()
    wrong = [f"MLflow: run {name} is {status}" for _, name, status in runs if status != "FINISHED"]
    names = Counter(name for _, name, _ in runs)
    wrong += [f"MLflow: {count} runs are called {name}" for name, count in names.items() if count != 1]
    expected = _runs(folder)
    wrong += [f"MLflow: no run is called {name}" for name in expected if name not in names]
    if len(names) != len(expected) + 1:
        wrong.append(f"MLflow: runs are {sorted(names)}, expected {sorted(expected)} and one of the experiment")
    for uuid, name, _ in runs:
        mine = [(key, step, value) for of, key, step, value in points if of == uuid]
        repeated = [at for at, count in Counter((key, step) for key, step, _ in mine).items() if count != 1]
        wrong += [f"MLflow: {name} has {key} of step {step} more than once" for key, step in repeated]
        if name not in expected:
            continue
        lines = _lines(expected[name])
        for key in ("train_loss", "bytes_up", "bytes_down"):
            told = {step: value for found, step, value in mine if found == key}
            if told != {line["round"]: line[key] for line in lines}:
                wrong.append(f"MLflow: {key} of {name} is not what metrics.jsonl has")
        last = {key: step for of, key, step in latest if of == uuid}
        steps = {key: max(step for found, step, _ in mine if found == key) for key, _, _ in mine}
        if last != steps:
            wrong.append(f"MLflow: {name} shows {last} as last steps, logged were {steps}")
    return wrong


def is_scratch(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix == ".tmp"
