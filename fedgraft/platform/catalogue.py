"""What methods there are, for ``fedgraft methods`` and ``fedgraft.methods()``, and the documentation's page of each."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.errors import FedgraftError
from fedgraft.moe.families import model_facts
from fedgraft.platform.bundled_model import bundled_hf_config
from fedgraft.platform.model_sizes import size_slots
from fedgraft.protocols import Method
from fedgraft.registry import METHODS, load_entry_points, load_method_file

__all__ = ["MethodInfo", "OptionInfo", "find_method", "list_methods", "method_page"]

_BUDGETS = {
    "none": "does not use them: every client holds everything, and a run with budgets says so",
    "holds": "bound the experts that a client holds, trains and sends",
    "trains": "bound the experts that have a gradient in a local step of a client, which still holds all of them",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class OptionInfo:
    """One option of a method: its key path below ``method``, its type and default as text, and what it does."""

    path: str
    type: str
    default: str
    description: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodInfo:
    """One method: its registered name, title, paper, one line, what in it is reconstructed, and its options.

    ``advice`` says when to use it; ``budget_use`` what a client's budget bounds; ``about`` is the text of its module.
    """

    name: str
    title: str
    paper: str
    summary: str
    reconstructed: str
    advice: str
    budget_use: str
    about: str
    is_builtin: bool
    options: tuple[OptionInfo, ...]


def list_methods(method_files: Sequence[Path] = ()) -> list[MethodInfo]:
    """List all methods: fedgraft's own, those of installed packages, and those in files of yours.

    Raises:
        MethodError: A package's or a file's method cannot be loaded.
    """
    load_entry_points()
    for path in method_files:
        load_method_file(path)
    return [_describe(METHODS.get(name)) for name in METHODS.names()]


def find_method(found: Sequence[MethodInfo], name: str) -> MethodInfo:
    """Pick one method by name.

    Raises:
        MethodError: None is called so; the nearest name is suggested.
    """
    METHODS.get(name)
    return next(info for info in found if info.name == name)


def method_page(info: MethodInfo, measured: Mapping[str, str] | None = None) -> str:
    """Write a method's page of the documentation, Markdown.

    Args:
        info: The method.
        measured: Text of what was measured, by heading; comes last.
    """
    parts = [f"# {info.title} (`{info.name}`)", f"{info.summary[0].upper()}{info.summary[1:]}.", f"Paper: {info.paper}."]
    if info.advice:
        parts += ["## When to use it", info.advice]
    parts += ["## How it works", info.about]
    if info.reconstructed:
        parts += ["## What is reconstructed", f"Ours, where the source is silent: {info.reconstructed}."]
    parts += ["## What is trained, sent and kept", _sizes(METHODS.get(info.name))]
    parts += ["Budgets: " + _BUDGETS[info.budget_use] + "."]
    parts += ["## Options", _table(info.options) if info.options else "None."]
    parts += ["## Use it", f"```yaml\nmethod:\n  name: {info.name}\n```"]
    for heading, text in (measured or {}).items():
        parts += [f"## {heading}", text]
    return "\n\n".join(parts) + "\n"


def _describe(method: type[Method]) -> MethodInfo:
    return MethodInfo(
        name=method.name,
        title=method.title,
        paper=method.paper,
        summary=method.summary,
        reconstructed=method.reconstructed,
        advice=method.advice,
        budget_use=method.budget_use,
        about=inspect.getdoc(sys.modules[method.__module__]) or inspect.getdoc(method) or "",
        is_builtin=method.__module__.startswith("fedgraft.aggregation."),
        options=tuple(_options(method.config_class)),
    )


def _options(config: type[BaseModel], prefix: str = "") -> Iterator[OptionInfo]:
    for key, field in config.model_fields.items():
        if key == "name" and not prefix:
            continue
        default = field.get_default(call_default_factory=True, validated_data={})
        if isinstance(default, BaseModel) and "name" not in type(default).model_fields:
            yield from _options(type(default), f"{prefix}{key}.")
            continue
        yield OptionInfo(
            path=f"{prefix}{key}",
            type=_type_text(config, key),
            default=_default_text(default),
            description=field.description or "",
        )


def _type_text(config: type[BaseModel], key: str) -> str:
    """An option's values in words, from its JSON schema: choices, or a type with its range."""
    schema = config.model_json_schema()
    definitions: dict[str, Any] = schema.get("$defs", {})
    return _schema_text(schema["properties"][key], definitions)


def _schema_text(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in schema:
        target = str(schema["$ref"]).rpartition("/")[2]
        return _schema_text(definitions[target], definitions)
    if "properties" in schema:
        name = schema["properties"].get("name", {})
        return f"{{name: {name['const']}, ...}}" if "const" in name else "mapping"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(dict.fromkeys(_schema_text(each, definitions) for each in schema[several]))
    if "enum" in schema or "const" in schema:
        return ", ".join(str(each) for each in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return "list of " + _schema_text(schema.get("items", {}), definitions)
    bounds = {"minimum": ">= {:g}", "exclusiveMinimum": "> {:g}", "maximum": "<= {:g}", "exclusiveMaximum": "< {:g}"}
    ranges = [text.format(schema[name]) for name, text in bounds.items() if name in schema]
    words = {"boolean": "true, false", "number": "number", "integer": "integer", "string": "text", "null": "null"}
    return " ".join([words.get(str(schema.get("type")), "value"), ", ".join(ranges)]).strip()


def _default_text(default: Any) -> str:
    if default is PydanticUndefined:
        return "(needed)"
    if isinstance(default, BaseModel):
        return str(getattr(default, "name", default))
    if isinstance(default, tuple | list):
        return f"[{', '.join(str(each) for each in default)}]"
    return "null" if default is None else str(default).lower() if isinstance(default, bool) else str(default)


def _table(options: Sequence[OptionInfo]) -> str:
    rows = [("option", "values", "default", "what it does")]
    rows += [(f"`{each.path}`", each.type, each.default, each.description) for each in options]
    lines = ["| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|---|", *lines[1:]])


def _sizes(method: type[Method]) -> str:
    """Values of a method's slots by group, on the bundled model, with default options."""
    config = bundled_hf_config()
    try:
        made = method(method.config_class(name=method.name))
        sizes = size_slots(made, config, "float32", model_facts(config))
    except (ValidationError, FedgraftError):
        return "That depends on options that must be given."
    if not sizes.groups:
        return "Nothing: no client trains."
    meaning = {
        "shared": "shared (sent and averaged)",
        "assigned": "assigned to an expert (sent by who holds it)",
        "private": "private (never leaves its client)",
        "frozen": "frozen",
    }
    listed = [f"{meaning[count.group]} {count.num_values:,} values" for count in sizes.groups]
    return f"With default options, on the bundled model: {'; '.join(listed)}."
