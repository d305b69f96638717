"""Whether two runs have the same bits, and whether one still has its own: ``fedgraft verify RUN_A [RUN_B]``.

Hashes are computed again from the tensors that lie there, never taken from a record alone. What depends on a clock or on who did
the work is left out: seconds, retries of clients that a killed replica cost, where the run lies.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from fedgraft.errors import CheckpointError
from fedgraft.moe.hashing import hash_params
from fedgraft.platform.checkpoint import Checkpoint, hash_state, load
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.state_store import ClientStateStore, read_tensors
from fedgraft.types import Params

__all__ = ["Difference", "RunCheck", "Verification", "verification_table", "verify"]

_TIMES = frozenset({"seconds", "client_seconds", "bytes_retried"})
"""Fields of records that clocks and retries decide."""
_FACTS = ("method", "seed", "learning_rate", "rounds", "num_clients", "data_fingerprint", "frozen_hash_start", "frozen_hash_end")
"""What two runs must have in common before their bits can."""
_ORDER = ("metrics", "ledger", "private", "server", "diagnostics", "evaluations")
"""In which order a round makes them: what differs first is nearest to the cause."""
_MAX_NAMED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """One place where a run is not what it should be. ``round_idx`` is ``None`` for what belongs to no round."""

    run: str
    round_idx: int | None
    where: str
    what: str

    def __str__(self) -> str:
        at = "" if self.round_idx is None else f", round {self.round_idx}"
        return f"{self.run}{at}: {self.where}: {self.what}"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunCheck:
    """What was compared of one run, and what differs, first things first (at most 20 are kept).

    ``rounds`` whose hashes and records were read; ``rows`` of records; ``tensors`` and ``private_states`` hashed again.
    """

    name: str
    rounds: int
    rows: int
    tensors: int
    private_states: int
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The outcome: one check a run. ``second`` is ``None`` where a folder was held against its own hashes only.

    ``notes`` say what differs and may explain a difference, such as package versions; they are no differences themselves.
    """

    first: Path
    second: Path | None
    runs: tuple[RunCheck, ...]
    notes: tuple[str, ...] = ()

    @property
    def differences(self) -> tuple[Difference, ...]:
        """Of all runs, in the order of the runs."""
        return tuple(difference for run in self.runs for difference in run.differences)

    @property
    def is_same(self) -> bool:
        """Whether nothing differs."""
        return not self.differences


def verify(first: Path | str, second: Path | str | None = None) -> Verification:
    """Hold a folder of runs against its own hashes and, if there is a second one, against that.

    Args:
        first: A run's folder, an experiment's or a sweep's. Runs of a rate search are not looked at.
        second: Another one; runs are paired by their place in the folder, two single runs whatever their labels.

    Raises:
        CheckpointError: A folder holds no run.
    """
    paths = [Path(first).resolve()] + ([Path(second).resolve()] if second is not None else [])
    found = [_runs(path) for path in paths]
    if len(found) == 1:
        checks = [_check_alone(name, folder) for name, folder in found[0].items()]
        return Verification(first=paths[0], second=None, runs=tuple(checks))
    if all(len(runs) == 1 for runs in found):
        (name,), (other,) = found
        found[1] = {name: found[1][other]}
    checks, notes = [], []
    for name in dict.fromkeys((*found[0], *found[1])):
        if any(name not in runs for runs in found):
            path = paths[0] if name not in found[0] else paths[1]
            missing = Difference(run=name, round_idx=None, where=str(path), what="has no such run")
            checks.append(RunCheck(name=name, rounds=0, rows=0, tensors=0, private_states=0, differences=(missing,)))
            continue
        pair = _Run(found[0][name]), _Run(found[1][name])
        checks.append(_compare(name, *pair))
        notes += [f"{name}: {note}" for note in _notes(*pair)]
    return Verification(first=paths[0], second=paths[1], runs=tuple(checks), notes=tuple(notes))


def verification_table(found: Verification) -> Table:
    """One line a run: what was compared, and how it came out."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("run")
    for title in ("rounds", "rows of records", "tensors hashed", "private states hashed"):
        table.add_column(title, justify="right")
    table.add_column("")
    for run in found.runs:
        counts = [str(count) for count in (run.rounds, run.rows, run.tensors, run.private_states)]
        ends = Text("differs", style="red") if run.differences else Text("same", style="green")
        table.add_row(run.name, *counts, ends)
    return table


def _runs(path: Path) -> dict[str, Path]:
    """Run folders by their place under a folder."""
    found = {
        str(info.parent.relative_to(path)): info.parent
        for info in sorted(path.rglob("run.json"))
        if "search" not in info.relative_to(path).parts
    }
    if not found:
        raise CheckpointError(f"{path} holds no run (no run.json in it)", "name the folder of a run, an experiment or a sweep")
    return found


@dataclass(slots=True)
class _Run:
    """A run's folder as it lies there."""

    folder: Path
    info: Mapping[str, Any] = field(init=False)
    rows: dict[str, dict[int, list[dict[str, Any]]]] = field(init=False)

    def __post_init__(self) -> None:
        self.info = RunFolder(self.folder).read_info()
        self.rows = {
            name: _read_rows(self.folder / f"{name}.jsonl") for name in ("metrics", "ledger", "diagnostics", "evaluations")
        }
        hashes = _read_rows(self.folder / "hashes.jsonl")
        self.rows["server"] = {at: [{"server": row["server"]} for row in rows] for at, rows in hashes.items()}
        self.rows["private"] = {at: [dict(row["private"]) for row in rows] for at, rows in hashes.items()}

    @property
    def store(self) -> ClientStateStore:
        return ClientStateStore(self.folder / "clients")

    def checkpoint_paths(self) -> dict[int, Path]:
        folder = RunFolder(self.folder).checkpoint_folder
        return {int(path.name.removeprefix("round-")): path for path in sorted(folder.glob("round-*"))}


def _read_rows(path: Path) -> dict[int, list[dict[str, Any]]]:
    """Lines by round, without what clocks and retries decide; an unreadable line stands as a row of its own."""
    found: dict[int, list[dict[str, Any]]] = {}
    for number, line in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            row = json.loads(line)
            at = int(row.pop("round"))
        except (ValueError, KeyError, AttributeError):
            found.setdefault(-1, []).append({"unreadable line": number})
            continue
        if not row.get("is_retry"):
            found.setdefault(at, []).append({key: value for key, value in row.items() if key not in _TIMES})
    return found


def _check_alone(name: str, folder: Path) -> RunCheck:
    run = _Run(folder)
    differences, tensors, private = _own_hashes(name, run)
    rounds = len(run.rows["server"])
    rows = sum(len(rows) for by_round in run.rows.values() for rows in by_round.values())
    return RunCheck(
        name=name, rounds=rounds, rows=rows, tensors=tensors, private_states=private, differences=tuple(differences[:_MAX_NAMED])
    )


def _own_hashes(name: str, run: _Run) -> tuple[list[Difference], int, int]:
    """Hash the tensors of the run's checkpoints and private states again, and hold them against its records."""
    found: list[Difference] = []
    tensors = private = 0
    if not run.rows["server"]:
        found.append(Difference(run=name, round_idx=None, where=str(run.folder), what="has no hashes.jsonl to be held against"))
        return found, 0, 0
    for at, path in run.checkpoint_paths().items():
        where = str(path.relative_to(run.folder))
        try:
            checkpoint = load(path, run.store)
        except CheckpointError as error:
            found.append(Difference(run=name, round_idx=at, where=where, what=error.message))
            continue
        state = checkpoint.state
        tensors += len(state.params) + len(state.extras) + len(state.memory)
        recorded = [row["server"] for row in run.rows["server"].get(at, [])]
        if recorded[-1:] != [hash_state(state)]:
            found.append(Difference(run=name, round_idx=at, where=where, what="its tensors do not have the hash of hashes.jsonl"))
        wrong, count = _own_private(name, run, checkpoint)
        found += wrong
        private += count
    return found, tensors, private


def _own_private(name: str, run: _Run, checkpoint: Checkpoint) -> tuple[list[Difference], int]:
    found = []
    for client, version in checkpoint.versions.items():
        recorded = [row.get(str(client)) for row in run.rows["private"].get(version, [])]
        if recorded[-1:] != [hash_params(run.store.read(client, version))]:
            where = str(run.store.path(client, version).relative_to(run.folder))
            found.append(Difference(run=name, round_idx=version, where=where, what="does not have the hash of hashes.jsonl"))
    return found, len(checkpoint.versions)


def _compare(name: str, first: _Run, second: _Run) -> RunCheck:
    facts = [
        Difference(
            run=name,
            round_idx=None,
            where=f"run.json, {key}",
            what=f"{_short(first.info.get(key))} and {_short(second.info.get(key))}",
        )
        for key in _FACTS
        if first.info.get(key) != second.info.get(key)
    ]
    records = list(_record_differences(name, first, second))
    own: list[Difference] = []
    tensors = private = 0
    for run in (first, second):
        differences, some, others = _own_hashes(f"{name} in {run.folder}", run)
        own += differences
        tensors, private = tensors + some, private + others
    states = list(_tensor_differences(name, first, second))
    rounds = len(first.rows["server"].keys() & second.rows["server"].keys())
    rows = sum(len(rows) for by_round in first.rows.values() for rows in by_round.values())
    # A file that is not what its own run wrote comes first: what else differs may follow from it.
    differences = [*own, *facts, *records, *states]
    return RunCheck(
        name=name, rounds=rounds, rows=rows, tensors=tensors, private_states=private, differences=tuple(differences[:_MAX_NAMED])
    )


def _record_differences(name: str, first: _Run, second: _Run) -> Iterator[Difference]:
    """Records by round, then in the order in which a round makes them; one difference a round and record."""
    last = [max(run.rows["metrics"], default=0) for run in (first, second)]
    if last[0] != last[1]:
        yield Difference(run=name, round_idx=None, where="metrics.jsonl", what=f"ends after round {last[0]} and {last[1]}")
    rounds = sorted({at for run in (first, second) for by_round in run.rows.values() for at in by_round})
    for at in rounds:
        if at > min(last):
            return
        for record in _ORDER:
            pair = first.rows[record].get(at, []), second.rows[record].get(at, [])
            what = _row_difference(*pair)
            if what:
                where = "hashes.jsonl" if record in ("private", "server") else f"{record}.jsonl"
                yield Difference(run=name, round_idx=at, where=where, what=what)


def _row_difference(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> str | None:
    if _text(first) == _text(second):  # as text, for NaN differs from itself
        return None
    if len(first) != len(second):
        return f"{len(first)} and {len(second)} rows"
    for one, other in zip(first, second, strict=True):
        for key in dict.fromkeys((*one, *other)):
            if _text(one.get(key)) != _text(other.get(key)):
                of = ", ".join(
                    f"{k} {one[k]}" for k in ("client_id", "view", "task", "metric", "group", "kind") if one.get(k) is not None
                )
                return f"{key} is {_short(one.get(key))} and {_short(other.get(key))}{f' ({of})' if of and key not in of else ''}"
    return "the rows are in another order"


def _tensor_differences(name: str, first: _Run, second: _Run) -> Iterator[Difference]:
    """The first tensor that differs in each checkpoint that both have, and in each private state of it."""
    paths = first.checkpoint_paths(), second.checkpoint_paths()
    for at in sorted(paths[0].keys() & paths[1].keys()):
        pair = [_read_loosely(by_round[at] / "state.safetensors") for by_round in paths]
        if pair[0] is None or pair[1] is None:
            continue  # its own run has been told of it
        what = _first_difference(pair[0], pair[1])
        if what:
            yield Difference(run=name, round_idx=at, where="checkpoint", what=what)
    stores = first.store, second.store
    for client, version in sorted(_current(first).items() & _current(second).items()):
        states = [_read_loosely(store.path(client, version)) for store in stores]
        if states[0] is not None and states[1] is not None and (what := _first_difference(states[0], states[1])):
            yield Difference(run=name, round_idx=version, where=f"private state of client {client}", what=what)


def _read_loosely(path: Path) -> Params | None:
    """Tensors of a file even where its checksum is wrong, to name the one that is; ``None`` if they cannot be read."""
    try:
        return read_tensors(path)
    except CheckpointError:
        return None


def _current(run: _Run) -> dict[int, int]:
    """Versions of the private states that the last readable checkpoint names."""
    for path in reversed(run.checkpoint_paths().values()):
        try:
            record = json.loads((path / "state.json").read_text())
            return {int(client): int(version) for client, version in record["versions"].items()}
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            continue  # its own run has been told of it
    return {}


def _first_difference(first: Params, second: Params) -> str | None:
    """Name the first tensor, by key, that is not the same in both, with its first element that differs."""
    if alien := sorted(first.keys() ^ second.keys()):
        return f"{alien[0]} is in one of them only"
    for key in sorted(first):
        one, other = first[key], second[key]
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return f"{key} has {one.dtype} {tuple(one.shape)} and {other.dtype} {tuple(other.shape)}"
        if not one.numel():
            continue
        size = one.element_size()
        bytes_NB, others_NB = (each.contiguous().reshape(-1).view(torch.uint8).reshape(-1, size) for each in (one, other))
        wrong = (bytes_NB != others_NB).any(dim=1).nonzero().flatten()
        if len(wrong):
            at = int(wrong[0])
            values = one.reshape(-1)[at].item(), other.reshape(-1)[at].item()
            return f"{key}, element {at} of {one.numel()}: {values[0]!r} and {values[1]!r} ({len(wrong)} elements differ)"
    return None


def _notes(first: _Run, second: _Run) -> Iterator[str]:
    for key in ("versions", "engine", "device"):
        pair = [run.info.get(key) for run in (first, second)]
        if pair[0] == pair[1]:
            continue
        if isinstance(pair[0], Mapping) and isinstance(pair[1], Mapping):
            for name in dict.fromkeys((*pair[0], *pair[1])):
                if pair[0].get(name) != pair[1].get(name):
                    yield f"{key}.{name} was {pair[0].get(name)} and {pair[1].get(name)}"
        else:
            yield f"{key} was {pair[0]} and {pair[1]}"
    for run in (first, second):
        if run.info.get("status") != "finished":
            yield f"{run.folder} is {run.info.get('status')}, not finished"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _short(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
