"""A configuration on its way: a YAML file as keys, values and line numbers, with overrides applied and every problem noted."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.paths import Place, look_up
from fedgraft.platform.validation import Found, KeyPath, did_you_mean, path_text, show_value

__all__ = ["Draft", "apply_overrides", "expanded", "nearest_path", "read_draft", "to_yaml"]

_MAX_VALUES = 100_000
_MAX_BYTES = 2**20


@dataclass(slots=True)
class Draft:
    """A configuration on its way: its keys and values, where they were written, and what is wrong with them."""

    source: str
    tree: dict[str, Any] = field(default_factory=dict)
    lines: dict[KeyPath, int] = field(default_factory=dict)
    overridden: list[KeyPath] = field(default_factory=list)
    found: list[Found] = field(default_factory=list)

    def error(self) -> ConfigError:
        """All problems, in the order of the file."""
        ordered = sorted(self.found, key=lambda each: self._position(each.path))
        return ConfigError(self.source, tuple(each.problem(self._note(each.path)) for each in ordered))

    def _position(self, path: KeyPath) -> tuple[int, ...]:
        position: list[int] = []
        value: Any = self.tree
        for part in path:
            keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
            position.append(keys.index(part) if part in keys else len(keys))
            value = value[part] if part in keys else None
        return tuple(position)

    def _note(self, path: KeyPath) -> str:
        if any(path[: len(given)] == given for given in self.overridden):
            return "from the command line"
        return f"line {self.lines[path]}" if path in self.lines else ""


def read_draft(source: Path | str | Mapping[str, Any] | None, packaged: str) -> Draft:
    """Read a configuration as it was written, without judging its keys.

    Args:
        source: A YAML file, a mapping or a model of the same form, or ``None`` for the packaged file.
        packaged: Its name.

    Raises:
        ConfigError: There is no such file, or it is no YAML mapping.
    """
    if isinstance(source, BaseModel | Mapping):
        draft = Draft(source="<dict>")
        draft.tree = _plain(source, (), draft.found)
        return draft
    if source is None:
        name, text = f"{packaged} (packaged)", resources.files("fedgraft.platform").joinpath(packaged).read_text("utf-8")
    else:
        name, text = str(source), _read_text(look_up(source))
    draft = Draft(source=name)
    value = _parse(text, draft.lines, draft.found, name)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        found = Found(path=(), value=show_value(value), expected="a mapping of keys to values")
        raise ConfigError(name, (found.problem(),))
    draft.tree = _plain(value, (), draft.found)
    return draft


def _read_text(place: Place) -> str:
    path, expected, hint = place.path, "a YAML file", ""
    if place.kind == "file":
        try:
            if path.stat().st_size > _MAX_BYTES:  # YAML is read at a few hundred kilobytes a second: it would look like a hang
                expected, hint = f"a YAML file of at most {_MAX_BYTES // 1024} KiB", "is this a file of data?"
            else:
                return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            expected, hint = "a text file in UTF-8 that can be read", str(error)
    elif place.kind == "folder":
        hint = "this is a folder"
    elif place.kind == "other":
        hint = "this is a pipe or a device; write it into a file first"
    else:
        expected = "a YAML file that exists"
        folder = path.parent
        names = [each.name for each in folder.glob("*.y*ml")] if look_up(folder).kind == "folder" else []
        hint = place.reason or did_you_mean(path.name, names) or f"relative to {Path.cwd()}"
    raise ConfigError(str(path), (Problem(path="<file>", value=show_value(str(path)), expected=expected, hint=hint),))


def _parse(text: str, lines: dict[KeyPath, int], found: list[Found], source: str) -> Any:
    """Read YAML; note the line of every key, and keys that stand twice."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MAX_VALUES:
            raise yaml.YAMLError(f"more than {_MAX_VALUES} values, aliases counted as often as they are used")
        _note_lines(node, (), lines, found, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "somewhere"
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        problem = Problem(path="<file>", value=f"a syntax error in {where}", expected="YAML", hint=reason)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError) as error:
        # A date that is none, a number of too many digits, a tag that its value does not fit: whatever the constructor runs into.
        hint = (
            str(error).partition("\n")[0]
            if isinstance(error, yaml.YAMLError | ValueError)
            else "a tag (!!) does not fit its value"
        )
        problem = Problem(path="<file>", value="text that YAML cannot read", expected="YAML", hint=hint)
    except RecursionError:
        problem = Problem(path="<file>", value="values nested too deeply", expected="YAML")
    raise ConfigError(source, (problem,))


def _count_values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for: ten lines of aliases of aliases can stand for more than any memory holds."""
    if id(node) not in known:
        known[id(node)] = 1  # an alias inside its own anchor counts once; it is refused later, in ``_plain``
        if isinstance(node, yaml.CollectionNode):
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            known[id(node)] += sum(_count_values(part, known) for part in parts)
    return known[id(node)]


def _note_lines(node: yaml.Node, path: KeyPath, lines: dict[KeyPath, int], found: list[Found], active: set[int]) -> None:
    if id(node) in active:
        return  # an alias inside its own anchor; refused later, in ``_plain``
    active.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            place, line = (*path, str(key.value)), key.start_mark.line + 1
            name = (key.tag, key.value)
            if name in seen:
                text = f"this key in line {seen[name]} and again in line {line}"
                found.append(Found(path=place, value=text, expected="each key once"))
            seen[name] = line
            lines[place] = line
            _note_lines(value, place, lines, found, active)
    elif isinstance(node, yaml.SequenceNode):
        for idx, value in enumerate(node.value):
            lines[(*path, idx)] = value.start_mark.line + 1
            _note_lines(value, (*path, idx), lines, found, active)
    active.discard(id(node))


def _plain(value: Any, path: KeyPath, found: list[Found], active: frozenset[int] = frozenset()) -> Any:
    """Copy a tree into dicts and lists. Keys must be texts; a config object becomes the mapping that makes it."""
    if id(value) in active:
        found.append(Found(path=path, value="an alias of itself", expected="a value"))
        return None
    if isinstance(value, BaseModel):
        value = {
            name: getattr(value, name) for name in type(value).model_fields if name in value.model_fields_set or name == "name"
        }
    inside = active | {id(value)}
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                hint = "put it in quotes"
                found.append(Found(path=(*path, str(key)), value=f"the key {show_value(key)}", expected="a text", hint=hint))
        return {key: _plain(item, (*path, key), found, inside) for key, item in value.items() if isinstance(key, str)}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, idx), found, inside) for idx, item in enumerate(value)]
    return value


def apply_overrides(draft: Draft, overrides: Sequence[str]) -> None:
    """Put values from the command line, ``key.path=value`` each, into a draft; what cannot be put is noted."""
    roots = {override.partition("=")[0].partition(".")[0].strip() for override in overrides}
    for mine, other in (("method", "compare"), ("compare", "method")):
        if mine in roots and other not in roots:
            draft.tree.pop(other, None)
    for override in overrides:
        key, equals, text = override.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            found = Found(path=("<overrides>",), value=show_value(override), expected="key.path=value")
            draft.found.append(found)
            continue
        twice: list[Found] = []
        try:
            value = _plain(_parse(text, {}, twice, "<overrides>"), tuple(parts), draft.found)
        except ConfigError as error:
            hint = error.problems[0].hint
            draft.found.append(Found(path=tuple(parts), value=show_value(text), expected="a YAML value", hint=hint))
            draft.overridden.append(tuple(parts))
            continue
        draft.found += [replace(each, path=(*parts, *each.path)) for each in twice]
        draft.overridden.append(_set(draft, parts, value))


def _set(draft: Draft, parts: Sequence[str], value: Any) -> KeyPath:
    """Put a value at a key path and give the path's keys. A key that itself has dots is found if it is there already."""
    at, rest = draft.tree, list(parts)
    done: KeyPath = ()
    while True:
        size = next((n for n in range(len(rest), 0, -1) if ".".join(rest[:n]) in at), 1)
        key, rest = ".".join(rest[:size]), rest[size:]
        done = (*done, key)
        if not rest:
            break
        below = at.get(key)
        if below is None:
            below = at[key] = {}
        if not isinstance(below, dict):
            kind = "a list" if isinstance(below, list) else "a value"
            text = f"a mapping at {path_text(done)} to set {'.'.join(rest)} in"
            draft.found.append(Found(path=tuple(parts), value=f"{kind} there: {show_value(below)}", expected=text))
            return tuple(parts)
        at = below
    at[key] = value
    return done


def nearest_path(given: str | Path) -> str:
    """Say why a path cannot be looked up, or name a neighbour with nearly the same name, or what it is relative to."""
    place = look_up(given)
    if place.reason:
        return place.reason
    path = place.path
    try:
        names = [each.name for each in path.parent.iterdir()] if look_up(path.parent).kind == "folder" else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {str(path.parent / near[0])!r}?"
    return "" if path.is_absolute() else f"relative to {Path.cwd()}"


def expanded(value: Any) -> Any:
    """Replace ``~`` in every path of a tree."""
    if isinstance(value, BaseModel):
        changed = {name: expanded(item) for name, item in value}
        update = {name: item for name, item in changed.items() if item is not getattr(value, name)}
        return value.model_copy(update=update) if update else value
    if isinstance(value, Path):
        return value.expanduser() if value.parts[:1] and value.parts[0].startswith("~") else value
    if isinstance(value, tuple):
        items = tuple(expanded(item) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        below = {key: expanded(item) for key, item in value.items()}
        return below if any(below[key] is not value[key] for key in value) else value
    return value


def to_yaml(tree: Mapping[str, Any]) -> str:
    """Write a tree as YAML, its keys in their order."""
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=False, width=130))
