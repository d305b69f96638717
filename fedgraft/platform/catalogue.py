"""The methods there are, as ``fedgraft methods`` shows them."""

from __future__ import annotations

from dataclasses import dataclass

import fedgraft.aggregation  # noqa: F401  (its files register the methods)
from fedgraft.registry import METHODS, load_entry_points

__all__ = ["MethodInfo", "list_methods"]


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInfo:
    """One method: its name in a configuration, its paper, one line on it, and what is our reconstruction (may be empty).

    ``options`` are the keys that its part of a configuration knows.
    """

    name: str
    title: str
    paper: str
    summary: str
    reconstructed: str
    options: tuple[str, ...]


def list_methods() -> list[MethodInfo]:
    """List all registered methods by name: fedgraft's own, and those of installed packages.

    Raises:
        MethodError: An installed package's method cannot be imported.
    """
    load_entry_points()
    found = []
    for name in METHODS.names():
        method = METHODS.get(name)
        found.append(
            MethodInfo(
                name=name,
                title=method.title,
                paper=method.paper,
                summary=method.summary,
                reconstructed=method.reconstructed,
                options=tuple(option for option in method.config_class.model_fields if option != "name"),
            )
        )
    return found
