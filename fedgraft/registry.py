"""Names of methods: the table that ``aggregation`` fills, and user code may fill too."""

from __future__ import annotations

import difflib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from fedgraft.errors import MethodError
from fedgraft.foreign import check_class, guarded
from fedgraft.protocols import Method, MethodConfig

__all__ = ["METHODS", "MethodRegistry", "load_entry_points", "load_method_file"]


class MethodRegistry:
    """Method classes by name, each with its config class. A second class under a name is refused."""

    def __init__(self) -> None:
        self._classes: dict[str, type[Method]] = {}

    def add(self, method: type[Method]) -> type[Method]:
        """Register a method under its ``name``; usable as a decorator.

        Raises:
            MethodError: The name is taken by another class, or the class cannot be a method.
        """
        check_class(method)
        known = self._classes.get(method.name)
        if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
            raise MethodError(
                f"two methods are called {method.name!r}: {known.__module__}.{known.__qualname__} and "
                f"{method.__module__}.{method.__qualname__}",
                "give one of them another name",
            )
        self._classes[method.name] = method
        return method

    def names(self) -> tuple[str, ...]:
        """All registered names, sorted."""
        return tuple(sorted(self._classes))

    def get(self, name: str) -> type[Method]:
        """Give the class of a method.

        Raises:
            MethodError: No method has this name; the message lists the known ones.
        """
        if name not in self._classes:
            near = difflib.get_close_matches(name, self.names(), n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise MethodError(f"no method is called {name!r}", f"{hint}known methods: {', '.join(self.names())}")
        return self._classes[name]

    def build(self, config: MethodConfig) -> Method:
        """Make the method that a config names."""
        kind = self.get(config.name)
        return guarded(lambda: kind(config), kind)

    def parse(self, options: Mapping[str, Any]) -> Method:
        """Make the method that a mapping of valid options names, e.g. what ``MethodConfig.to_options`` gave."""
        kind = self.get(str(options["name"]))
        config = kind.config_class.model_validate(options)
        return guarded(lambda: kind(config), kind)

    def of_module(self, name: str) -> tuple[str, ...]:
        """Names of the methods whose classes were made in a module."""
        return tuple(known for known, kind in sorted(self._classes.items()) if kind.__module__ == name)


METHODS = MethodRegistry()
"""The registry that ``fedgraft methods`` shows. The files of ``fedgraft.aggregation`` add to it on import."""


def load_method_file(path: Path) -> ModuleType:
    """Import a user's Python file, which registers its method with ``METHODS.add``.

    Args:
        path: The file. It runs as Python code: name only files that you trust.

    Raises:
        MethodError: The file is missing, importing it raised, or it registers no method.
    """
    if not path.is_file():
        raise MethodError(f"method file {path} does not exist", "check method_files in the configuration")
    name = f"fedgraft_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise MethodError(f"method file {path} is not a Python file", "give it the ending .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that ends itself would end the command without a word
        del sys.modules[name]
        raise MethodError(f"method file {path} raised {type(error).__name__}: {error}", "mend the file") from error
    if not METHODS.of_module(name):
        del sys.modules[name]
        raise MethodError(f"method file {path} registers no method", "put @METHODS.add before its class, or do not name it")
    return module


def load_entry_points() -> None:
    """Import every installed package's method named under the entry point group ``fedgraft.methods``.

    Raises:
        MethodError: An entry point cannot be imported or is not a ``Method``.
    """
    for entry in importlib.metadata.entry_points(group="fedgraft.methods"):
        try:
            loaded = entry.load()
        except Exception as error:
            raise MethodError(
                f"entry point {entry.name!r} ({entry.value}) raised {type(error).__name__}: {error}",
                "mend or uninstall the package that declares it",
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Method)):
            raise MethodError(f"entry point {entry.name!r} ({entry.value}) is not a fedgraft Method", "point it at the class")
        METHODS.add(loaded)
