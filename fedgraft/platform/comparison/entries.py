"""Finds what is compared: the runs that folders of runs, experiments and sweeps hold, finished or not."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from fedgraft.errors import ResultsError
from fedgraft.platform.comparison.sweep_folder import TrialRecord, read_sweep
from fedgraft.platform.results import RunResult, read_json, read_run

__all__ = ["Entry", "Sources", "find_entries", "near_by", "run_entry"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One run, or a place where one should be.

    Attributes:
        source: Name of the experiment or sweep that it belongs to.
        label: What tables call the method.
        status: ``finished``, or why it is not: ``running``, ``pending``, ``stopped_early``, ``stopped``, ``failed``.
        run: What its folder holds; ``None`` where there is none yet, or it cannot be read.
        seed: ``None`` where no run of the trial has begun.
        trial: The trial of a sweep; empty elsewhere.
        point: The sweep's values by key path; ``None`` elsewhere.
        swept: All key paths that the sweep varies, also those that do not apply here.
        params: The run's resolved configuration by key path.
        rounds: Planned; ``rounds_done``: so far.
        rounds_done: So far.
        error: Why it failed, or cannot be read.
    """

    source: str
    label: str
    status: str
    run: RunResult | None = None
    seed: int | None = None
    trial: str = ""
    point: Mapping[str, Any] | None = None
    swept: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    rounds: int = 0
    rounds_done: int = 0
    error: str = ""

    @property
    def method(self) -> str:
        """The registered name of the method; the label where the run does not say."""
        return str(self.run.info.get("method", self.label)) if self.run is not None else self.label


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """Everything that was named: its runs, the keys that sweeps vary, and sweeps that still run."""

    entries: tuple[Entry, ...]
    sweep_keys: tuple[str, ...] = ()
    is_one_sweep: bool = False
    unfinished: tuple[str, ...] = ()


def find_entries(targets: Sequence[Path]) -> Sources:
    """Read what lies in folders of runs, experiments and sweeps; what is named twice counts once.

    Raises:
        ResultsError: A folder is none of them, or a finished run in it is not whole.
    """
    entries: dict[Path | tuple[object, ...], Entry] = {}
    keys: list[str] = []
    unfinished = []
    num_sweeps = 0
    for target in targets:
        folder = target.resolve()
        if (folder / "sweep.json").is_file():
            sweep = read_sweep(folder)
            num_sweeps += 1
            keys += [key for key in sweep.keys if key not in keys]
            if sweep.status != "finished":
                done = sum(trial.status == "finished" for trial in sweep.trials)
                unfinished.append(f"the sweep {folder.name} is {sweep.status}: {done} of {len(sweep.trials)} trials are finished")
            found = [entry for trial in sweep.trials for entry in _trial_entries(folder, trial, tuple(sweep.keys))]
        elif (folder / "comparison.json").is_file():
            found = list(_experiment_entries(folder, folder.name))
        elif (folder / "run.json").is_file():
            is_part = (folder.parent.parent / "comparison.json").is_file()
            found = [run_entry(folder, (folder.parent.parent if is_part else folder).name)]
        else:
            raise ResultsError(f"{target} holds neither sweep.json, comparison.json nor run.json", near_by(folder))
        for entry in found:
            where = (folder, entry.trial, entry.label, entry.seed)
            place = entry.run.folder.resolve() if entry.run is not None else where
            entries.setdefault(place, entry)
    return Sources(
        entries=tuple(entries.values()),
        sweep_keys=tuple(keys),
        is_one_sweep=num_sweeps == len(targets) == 1,
        unfinished=tuple(unfinished),
    )


def run_entry(folder: Path, source: str) -> Entry:
    """Read one run's folder.

    Raises:
        ResultsError: It is not there, or says that it is finished and is not whole. A run that is not finished may be
            written to at this moment: what cannot be read of it is noted in the entry's ``error``.
    """
    info = read_json(folder / "run.json")
    error = str(info.get("error") or "")
    run: RunResult | None = None
    try:
        run = read_run(folder)
    except ResultsError as reason:
        if info.get("status") == "finished":
            raise
        error = error or reason.message
    config = run.config if run is not None else ""
    return Entry(
        source=source,
        label=str(info.get("label", folder.name)),
        status=str(info.get("status", "unknown")),
        run=run,
        seed=int(info.get("seed") or 0),
        params=_params(config, str(info.get("label", "")), folder),
        rounds=int(info.get("rounds") or 0),
        rounds_done=int(run.metrics["round"].max()) if run is not None and len(run.metrics) else 0,
        error=error,
    )


def _experiment_entries(folder: Path, source: str) -> Iterator[Entry]:
    path = folder / "comparison.json"
    data = read_json(path)
    labels = [str(label) for label in data.get("labels", ())]
    if not labels:
        raise ResultsError(f"{path}: no labels", "is this an experiment's folder?")
    status = str(data.get("status", "finished"))
    for label in labels:
        found = [run_entry(folder / part, source) for part in data.get("runs", {}).get(label) or ()]
        yield from found
        for seed in data.get("seeds") or ():
            if int(seed) not in {entry.seed for entry in found}:
                yield Entry(source=source, label=label, status="pending" if status == "running" else status, seed=int(seed))


def _trial_entries(folder: Path, trial: TrialRecord, keys: tuple[str, ...]) -> Iterator[Entry]:
    """A trial that did not end as planned takes all of its seeds with it: a mean over some of them would favour it."""
    place = folder / trial.folder
    found = list(_experiment_entries(place, folder.name)) if (place / "comparison.json").is_file() else []
    if trial.status == "finished" and not any(entry.run is not None for entry in found):
        raise ResultsError(
            f"{folder / 'sweep.json'}: trial {trial.trial_id} is finished, and {place} holds no run of it",
            "put the trial's folder back, or compare the folders that are left",
        )
    for entry in found or [Entry(source=folder.name, label=trial.label, status=trial.status)]:
        yield replace(
            entry,
            label=trial.label,
            trial=trial.trial_id,
            point=trial.point,
            swept=keys,
            status=entry.status if trial.status == "finished" else trial.status,
            rounds=trial.rounds,
            rounds_done=entry.rounds_done if entry.run is not None else trial.rounds_done,
            error=entry.error or trial.error or "",
        )


def _params(config: str, label: str, folder: Path) -> dict[str, Any]:
    """The run's configuration by key path, its own method under ``method``; read as it is, so no code of a user's runs."""
    if not config:
        return {}
    try:
        tree = yaml.safe_load(config)
    except yaml.YAMLError as error:
        raise ResultsError(f"{folder / 'config.yaml'} is not YAML: {error}", "the file is torn; resume the run") from error
    if not isinstance(tree, dict):
        return {}
    compared = (tree.pop("compare", None) or {}).get("methods") or {}
    if label in compared:
        tree["method"] = compared[label]
    return dict(_flat(tree, ""))


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.loads(json.dumps(value, default=str))


def near_by(folder: Path) -> str:
    """Say which folder may have been meant: three of those in this one."""
    known = sorted({path.parent.name for name in ("comparison", "sweep") for path in folder.glob(f"*/{name}.json")})[-3:]
    return f"name one of the folders in it: {', '.join(known)}" if known else "name the folder of a run, experiment or sweep"
