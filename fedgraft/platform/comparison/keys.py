"""Which settings differ between runs, and what to call runs that agree in all of them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedgraft.platform.comparison.entries import Entry, Sources

__all__ = [
    "is_number",
    "key_text",
    "label_of",
    "place_of",
    "point_of",
    "setting_name",
    "short_keys",
    "value_text",
    "varying_keys",
]

_METHOD_KEYS = ("method", "method.name", "seed", "seeds")
"""What the columns for method and seed say already."""

_NO_SETTING = ("name", "seeds", "seed", "output", "tracking", "executor", "method_files", "method.name")
"""Parts of a configuration that do not change what is learned, or have a column of their own."""


def varying_keys(sources: Sources) -> tuple[str, ...]:
    """Give the key paths by which runs are told apart, besides method and seed.

    Of one sweep, the keys that it varies. Of anything else, also every key whose values differ: method options between
    runs of one label, all others between any two runs.
    """
    swept = [key for key in sources.sweep_keys if key not in _METHOD_KEYS]
    if sources.is_one_sweep:
        return tuple(swept)
    values: dict[tuple[str, str], set[str]] = {}
    order: dict[str, None] = dict.fromkeys(swept)
    entries = [entry for entry in sources.entries if entry.params]
    for path in sorted({path for entry in entries for path in entry.params}):
        if any(path == part or path.startswith(f"{part}.") for part in _NO_SETTING):
            continue
        for entry in entries:
            of = entry.label if path.startswith("method.") else ""
            values.setdefault((path, of), set()).add(key_text(entry.params.get(path)))
        if any(len(found) > 1 for (name, _), found in values.items() if name == path):
            order[path] = None
    return tuple(order)


def point_of(entry: Entry, keys: Sequence[str]) -> dict[str, Any]:
    """Give an entry's values of ``keys``; ``None`` where a key does not apply.

    A key that the entry's own sweep varies and that its point leaves out does not apply to it, whatever default the
    configuration has.
    """
    point = entry.point or {}
    return {key: point[key] if key in point else None if key in entry.swept else entry.params.get(key) for key in keys}


def key_text(value: Any) -> str:
    """Write any value so that equal values have equal texts."""
    return json.dumps(value, sort_keys=True, default=str)


def value_text(value: Any) -> str:
    """Write a value for people: ``0.1``, ``natural``, ``-`` where a key does not apply."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def is_number(value: Any) -> bool:
    """Whether a value can stand on an axis."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Give each key path its last part, or as many of its last parts as tell it from the others."""
    short = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            tail = ".".join(parts[-count:])
            if sum(other == tail or other.endswith(f".{tail}") for other in keys) == 1:
                break
        short[key] = tail
    return short


def place_of(setting: str) -> str:
    """Give the place in a setting's name, ``alpha-1 0003: ``; empty but where equal settings of several places stand apart."""
    place, found, _ = setting.partition(": ")
    return f"{place}: " if found else ""


def label_of(setting: str, label: str) -> str:
    """Name a setting where its keys have columns of their own."""
    return place_of(setting) + label


def setting_name(label: str, point: Mapping[str, Any], told: Iterable[str]) -> str:
    """Name runs of one method and point: ``flex (alpha 0.1)``; only keys in ``told`` are mentioned."""
    short = short_keys(tuple(point))
    parts = [f"{short[key]} {value_text(point[key])}" for key in point if key in set(told) and point[key] is not None]
    return f"{label} ({', '.join(parts)})" if parts else label
