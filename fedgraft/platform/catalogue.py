"""What methods there are, for ``fedgraft methods`` and ``fedgraft.methods()``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.registry import METHODS, load_entry_points, load_method_file

__all__ = ["MethodInfo", "list_methods"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInfo:
    """One method: its registered name, title, paper, one line, what in it is reconstructed, and its options.

    ``options`` maps each option to its description.
    """

    name: str
    title: str
    paper: str
    summary: str
    reconstructed: str
    options: dict[str, str]


def list_methods(method_files: Sequence[Path] = ()) -> list[MethodInfo]:
    """List all methods: fedgraft's own, those of installed packages, and those in files of yours.

    Raises:
        MethodError: A package's or a file's method cannot be loaded.
    """
    load_entry_points()
    for path in method_files:
        load_method_file(path)
    return [
        MethodInfo(
            name=name,
            title=method.title,
            paper=method.paper,
            summary=method.summary,
            reconstructed=method.reconstructed,
            options={key: field.description or "" for key, field in method.config_class.model_fields.items() if key != "name"},
        )
        for name in METHODS.names()
        for method in (METHODS.get(name),)
    ]
