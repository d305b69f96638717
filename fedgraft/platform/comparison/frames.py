"""Entries as data frames: a row a client, a row a run, a row a setting (method and point, over seeds)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from fedgraft.platform.comparison.entries import Entry
from fedgraft.platform.comparison.keys import key_text, point_of, setting_name, short_keys, value_text
from fedgraft.platform.results import QUANTITIES, RunResult, client_values, round_values

__all__ = ["COSTS", "Frames", "build_frames", "label_distance"]

COSTS = ("bytes_up", "bytes_down", "seconds")
_CLIENT_METRICS = {
    "personal_nll": ("client", "nll"),
    "token_accuracy": ("client", "token_accuracy"),
    "rouge_l": ("client", "rouge_l"),
    "retention_nll": ("retention", "nll"),
}
_NUMBERS = (*(quantity.name for quantity in QUANTITIES), *COSTS, "label_distance")


@dataclass(frozen=True, slots=True)
class Frames:
    """What ``build_frames`` makes; the columns are those of ``Comparison``."""

    settings: pd.DataFrame
    runs: pd.DataFrame
    clients: pd.DataFrame


def build_frames(entries: Sequence[Entry], keys: Sequence[str]) -> Frames:
    """Put entries into frames.

    Only finished runs have numbers of their own here: what was stopped or failed has a row, its last value in
    ``personal_nll``, ``is_averaged`` false, and no part in ``settings`` and ``clients``.
    """
    points = [point_of(entry, keys) for entry in entries]
    names = _setting_names(entries, points, keys)
    groups = _data_groups(entries)
    named = _data_names(groups, points, keys)
    table, judged = _judged([entry.run for entry in entries])
    rows, clients = [], []
    for number, (entry, point, name, group) in enumerate(zip(entries, points, names, groups, strict=True)):
        is_averaged = entry.status == "finished" and entry.run is not None
        head: dict[str, Any] = {"setting": name, "label": entry.label, "method": entry.method, **point, "data": named[group]}
        head |= {"seed": entry.seed, "source": entry.source, "trial": entry.trial}
        row = head | {"status": entry.status, "is_averaged": is_averaged, "rounds_done": entry.rounds_done}
        row |= {"rounds": entry.rounds or entry.rounds_done, "error": entry.error, "folder": ""}
        row |= dict.fromkeys(_NUMBERS, math.nan) | {"last_round": -1, "learning_rate": math.nan, "data_fingerprint": ""}
        row |= table.get(number, {})
        if entry.run is not None:
            row |= _costs(entry.run)
            if is_averaged:
                client_names = entry.run.client_names
                clients += [
                    head | {"client_id": idx, "client": client_names.get(idx, f"client {idx}"), **values}
                    for idx, values in judged.get(number, {}).items()
                ]
        rows.append(row)
    runs = pd.DataFrame(rows).astype({"seed": "Int64", **dict.fromkeys(_NUMBERS, float)})
    columns = ["setting", "label", "method", *keys, "data", "seed", "source", "trial", "client_id", "client", *_CLIENT_METRICS]
    return Frames(_settings(runs, keys), runs, pd.DataFrame(clients, columns=columns))


def label_distance(run: RunResult) -> float:
    """Measure how unlike clients' labels are: the mean total variation distance of a client's labels from all clients'.

    0: every client has the same shares of labels. Near 1: no two clients share a label, and there are many. Of training
    examples, every client counting once; NaN where the run has no partition.
    """
    clients = run.partition.get("clients") or []
    counts = [Counter(client.get("train") or {}) for client in clients]
    counts = [count for count in counts if count.total()]
    if not counts:
        return math.nan
    everything: Counter[str] = sum(counts, Counter())
    total = everything.total()

    def distance(count: Counter[str]) -> float:
        own = count.total()
        return sum(abs(count[label] / own - everything[label] / total) for label in everything) / 2

    return sum(map(distance, counts)) / len(counts)


def _judged(runs: Sequence[RunResult | None]) -> tuple[dict[int, dict[str, Any]], dict[int, dict[int, dict[str, float]]]]:
    """Give the quantities and the clients' values of the last round that judged clients, by place in ``runs``.

    The last rounds of all runs are summed up at once, as if they were the rounds of one run: what a quantity is stays
    with ``fedgraft.platform.results``, and a sweep of hundreds of runs takes no hundreds of small sums.
    """
    parts, lasts = [], {}
    for number, run in enumerate(runs):
        if run is None:
            continue
        rows = run.evaluations
        rounds = rows.loc[(rows["task"] == "client") & (rows["metric"] == "nll") & (rows["split"] == "test"), "round"]
        if len(rounds):
            lasts[number] = int(rounds.max())
            parts.append(rows[rows["round"] == lasts[number]].assign(round=number))
    first = next((run for run in runs if run is not None), None)
    if first is None or not parts:
        return {}, {}
    stacked = replace(first, evaluations=pd.concat(parts, ignore_index=True))
    table = round_values(stacked)
    rows_by_run = {int(str(number)): row for number, row in table.to_dict("index").items()}
    quantities: dict[int, dict[str, Any]] = {
        number: {str(name): value for name, value in row.items()} | {"last_round": lasts[number]}
        for number, row in rows_by_run.items()
    }
    clients: dict[int, dict[int, dict[str, float]]] = {}
    for name, (task, metric) in _CLIENT_METRICS.items():
        values = client_values(stacked, task, metric)
        values = values[values["client_id"] >= 0]
        for number, client, value in zip(values["round"], values["client_id"], values["value"], strict=True):
            clients.setdefault(int(number), {}).setdefault(int(client), {})[name] = float(value)
    return quantities, clients


def _costs(run: RunResult) -> dict[str, Any]:
    values: dict[str, Any] = {
        f"bytes_{way}": float(run.ledger.loc[run.ledger["direction"] == way, "bytes"].sum()) for way in ("up", "down")
    }
    values["seconds"] = float(run.info.get("seconds") or math.nan)
    values["label_distance"] = label_distance(run)
    values["learning_rate"] = float(run.info.get("learning_rate") or math.nan)
    values["data_fingerprint"] = str(run.info.get("data_fingerprint") or "")
    values["folder"] = str(run.folder)
    return values


def _settings(runs: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Means over seeds, in the order of first appearance; ``<number>_std`` is the sample deviation, NaN with one seed."""
    rows = {}
    for name, found in runs[runs["is_averaged"]].groupby("setting", sort=False):
        first = found.iloc[0]
        row: dict[str, Any] = {column: first[column] for column in ("label", "method", *keys, "data")}
        row |= {"num_seeds": len(found), "seeds": tuple(int(seed) for seed in found["seed"])}
        row["last_rounds"] = tuple(int(last) for last in found["last_round"])
        for column in _NUMBERS:
            row[column] = found[column].mean()
            row[f"{column}_std"] = found[column].std()
        rows[name] = row
    columns = ["label", "method", *keys, "data", "num_seeds", "seeds", "last_rounds"]
    columns += [part for column in _NUMBERS for part in (column, f"{column}_std")]
    return pd.DataFrame.from_dict(rows, orient="index", columns=columns).rename_axis("setting")


def _setting_names(entries: Sequence[Entry], points: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[str]:
    """Name each entry's setting; equal settings from several places that have a seed in common stay apart."""
    told: dict[str, set[str]] = {}
    for key in keys:
        for label in {entry.label for entry in entries}:
            if len({key_text(point[key]) for entry, point in zip(entries, points, strict=True) if entry.label == label}) > 1:
                told.setdefault(label, set()).add(key)
    names = [setting_name(entry.label, point, told.get(entry.label, ())) for entry, point in zip(entries, points, strict=True)]
    places: dict[tuple[str, int | None], set[str]] = {}
    for entry, name in zip(entries, names, strict=True):
        places.setdefault((name, entry.seed), set()).add(f"{entry.source} {entry.trial}".strip())
    apart = {name for (name, seed), found in places.items() if len(found) > 1 and seed is not None}
    return [
        f"{entry.source} {entry.trial}".strip() + f": {name}" if name in apart else name
        for entry, name in zip(entries, names, strict=True)
    ]


def _data_groups(entries: Sequence[Entry]) -> list[int]:
    """Number the clients' data: entries that share a seed's fingerprint belong together, and so do those linked by others."""
    parent: dict[Hashable, Hashable] = {}

    def root(node: Hashable) -> Hashable:
        parent.setdefault(node, node)
        while parent[node] != node:
            node = parent[node]
        return node

    nodes: list[Hashable] = []
    for entry in entries:
        place = ("place", entry.source, entry.trial)  # all runs of an experiment or trial have one data configuration
        fingerprint = entry.run.info.get("data_fingerprint") if entry.run is not None else None
        if fingerprint:
            parent[root(place)] = root(("data", fingerprint))
        nodes.append(place)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(node), len(numbers)) for node in nodes]


def _data_names(groups: Sequence[int], points: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[int, str]:
    """Name each group of data by the keys that are one value within it and another outside; else by a number."""
    values = {key: {group: set[str]() for group in groups} for key in keys}
    shown: dict[tuple[str, int], str] = {}
    for group, point in zip(groups, points, strict=True):
        for key in keys:
            values[key][group].add(key_text(point[key]))
            shown[key, group] = value_text(point[key])
    telling = [
        key
        for key in keys
        if all(len(found) == 1 for found in values[key].values()) and len(set().union(*values[key].values())) > 1
    ]
    short = short_keys(keys)
    named = {group: ", ".join(f"{short[key]} {shown[key, group]}" for key in telling) for group in dict.fromkeys(groups)}
    if len(named) == 1:
        return dict.fromkeys(named, "")
    twice = {name for name, count in Counter(named.values()).items() if count > 1 or not name}
    return {
        group: f"{name}, data {place}".removeprefix(", ") if name in twice else name
        for place, (group, name) in enumerate(named.items(), start=1)
    }
