"""What benchmarks/methods.py keeps of finished runs: one record for a partition, a label and a seed.

A running comparison writes a file a record; ``write`` merges them into benchmarks/results/methods-records.json, one line each,
from which a later run goes on. A record counts while the settings that it was made with are the ones asked for now.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

__all__ = [
    "BUDGET",
    "METHODS",
    "PARTITIONS",
    "Unit",
    "base_digest",
    "fits",
    "keep",
    "labels_of",
    "load",
    "read_new",
    "save",
    "settings_of",
    "units_of",
]

PARTITIONS: dict[str, dict[str, Any]] = {
    "pathological": {"partition": {"name": "natural"}},
    "dirichlet-0.1": {"partition": {"name": "dirichlet", "alpha": 0.1}},
    "dirichlet-1.0": {"partition": {"name": "dirichlet", "alpha": 1.0}},
    "pathological-long-search": {
        "partition": {"name": "natural"},
        "search_rounds": 4,
        "labels": ["fedavg", "fedavg-finetune", "flex", "private-lora"],
    },
}
"""How Dolly's eight categories are shared by eight clients (pathological: one category each), for how many rounds rates are
searched (one, if not told), and for which labels (all, if not told)."""

METHODS: dict[str, dict[str, Any]] = yaml.safe_load((Path(__file__).parent / "methods.yaml").read_text())
BUDGET = "experts_per_layer"


class Unit(NamedTuple):
    """What is run and recorded as one."""

    partition: str
    label: str
    seed: int


def units_of(partitions: Iterable[str], labels: Iterable[str], seeds: Iterable[int]) -> Iterator[Unit]:
    """Give what is to be run, a seed of everything before the next; labels that a partition does not ask for are left out."""
    for seed, label, partition in itertools.product(seeds, labels, partitions):
        if label in labels_of(partition):
            yield Unit(partition, label, seed)


def labels_of(partition: str) -> list[str]:
    """Give the labels that are compared on a partition."""
    return list(PARTITIONS[partition].get("labels", METHODS))


def settings_of(partition: str) -> dict[str, Any]:
    """Give all that the numbers of a partition depend on beside the method, its options and the seed; no path is in it."""
    return {
        "model": {"dtype": "float32"},
        "data": {
            "preset": "dolly",
            "num_clients": 8,
            "max_length": 80,
            "max_train_examples": 160,
            "max_validation_examples": 16,
            "max_test_examples": 24,
            "partition": PARTITIONS[partition]["partition"],
        },
        "retention": {"max_examples": 8},
        "federation": {"rounds": 4, "local_steps": 5, "batch_size": 4},
        "rate_search": {"rates": [0.001, 0.003, 0.01], "rounds": PARTITIONS[partition].get("search_rounds", 1)},
        "evaluation": {
            "every": 4,
            "at_start": False,
            "generate": "end",
            "max_generate": 6,
            "max_new_tokens": 20,
            "choices": "never",
            "global_view": False,
            "batch_size": 16,
        },
        "executor": {"kind": "in_process", "threads": 1},
    }


def base_digest(folder: Path) -> str:
    """Give a digest of a model folder's weights and configuration."""
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def fits(record: Mapping[str, Any], base: str | None = None) -> bool:
    """Whether a record is of the settings, options and (if told) the base model that would be used now."""
    return (
        record["label"] in METHODS
        and record["partition"] in PARTITIONS
        and record["settings"] == settings_of(record["partition"])
        and record["options"] == METHODS[record["label"]]
        and base in (None, record["base"])
    )


def keep(record: Mapping[str, Any], folder: Path) -> None:
    """Write one record; a reader sees all of it or nothing."""
    path = folder / record["partition"] / f"{record['label']}-seed-{record['seed']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".part")
    scratch.write_text(json.dumps(record) + "\n")
    scratch.replace(path)


def read_new(folder: Path) -> dict[Unit, dict[str, Any]]:
    """Read the records that ``keep`` wrote."""
    return _by_unit(json.loads(path.read_text()) for path in sorted(folder.glob("*/*.json")))


def load(path: Path) -> dict[Unit, dict[str, Any]]:
    """Read a file that ``save`` wrote; nothing where there is none."""
    if not path.is_file():
        return {}
    stored = json.loads(path.read_text())
    shared = {name: stored[name] for name in _SHARED}
    return _by_unit(record | {name: shared[name][record[name]] for name in _SHARED} for record in stored["records"])


def save(records: Mapping[Unit, Mapping[str, Any]], path: Path) -> None:
    """Write records, one a line and in a fixed order; what many of them share is written once."""
    shared: dict[str, dict[str, Any]] = {name: {} for name in _SHARED}
    lines = []
    for unit in sorted(records, key=_place):
        record = dict(records[unit])
        for name in _SHARED:
            digest = hashlib.sha256(json.dumps(record[name], sort_keys=True).encode()).hexdigest()[:8]
            shared[name][digest] = record[name]
            record[name] = digest
        lines.append(json.dumps(record))
    head = "".join(f'"{name}": {json.dumps(shared[name], indent=1, sort_keys=True)},\n' for name in _SHARED)
    path.write_text("{" + head + '"records": [\n' + ",\n".join(lines) + "\n]}\n")


_SHARED = ("settings", "versions")


def _place(unit: Unit) -> tuple[int, int, int]:
    partitions, labels = list(PARTITIONS), list(METHODS)
    return partitions.index(unit.partition), labels.index(unit.label), unit.seed


def _by_unit(records: Iterable[dict[str, Any]]) -> dict[Unit, dict[str, Any]]:
    return {Unit(record["partition"], record["label"], record["seed"]): record for record in records}
