"""From a YAML file and overrides to the frozen ``RunConfig``, with every problem of the file reported at once.

Overrides are ``key.path=value``, the value read as YAML: ``data.path=/x``, ``seeds=[0,1]``, ``rate_search=null``. A relative
path, in a file as on the command line, is relative to the current directory, not to the file; ``~`` is the home folder.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, cast

import yaml
from pydantic import BaseModel

import fedgraft.aggregation  # noqa: F401  (its files register the methods that a configuration may name)
from fedgraft.errors import ConfigError, MethodError, Problem
from fedgraft.platform.config import RunConfig
from fedgraft.platform.validation import Found, KeyPath, did_you_mean, key_places, path_text, show_value, validate
from fedgraft.protocols import MethodConfig
from fedgraft.registry import METHODS, load_entry_points, load_method_file

__all__ = ["check_inputs", "dump_config", "load_config"]

_PACKAGED = "quickstart.yaml"
_ROOT_CHECKED = ("federation", "training", "rate_search")  # sections whose combinations the whole tree checks


@dataclass(slots=True)
class _Draft:
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


def load_config(
    source: Path | str | Mapping[str, Any] | None = None, overrides: Sequence[str] = (), *, checks_files: bool = True
) -> RunConfig:
    """Read a configuration, apply overrides, and check all of it.

    An override of ``method`` over a configuration that compares several methods replaces the comparison by that one
    method, and an override of ``compare`` over one with a single method replaces the method.

    Args:
        source: A YAML file, a mapping of the same form, or ``None`` for the packaged quickstart.
        overrides: ``key.path=value`` each, applied in order; missing mappings on the way are made.
        checks_files: Also check that the files and folders it names exist, as ``check_inputs`` does.

    Returns:
        The configuration, defaults filled in.

    Raises:
        ConfigError: Anything is wrong; it carries every problem with its key path.
        MethodError: An installed package's method cannot be imported.
    """
    draft = _read(source)
    _apply_overrides(draft, overrides)
    load_entry_points()
    _load_method_files(draft)
    methods = _build_methods(draft)
    config = _build_tree(draft, methods)
    if checks_files:
        reported = {each.path for each in draft.found}
        named = _missing_inputs(draft.tree if config is None else config.model_dump())
        draft.found += [each for each in named if each.path not in reported]
    if draft.found or config is None:
        raise draft.error()
    return _expand_home(config)


def check_inputs(config: RunConfig, source: str = "configuration") -> None:
    """Check that what a configuration names is there: data, retention set, questions, model folder, method files.

    Args:
        config: Any valid configuration; names on the hub are not looked up.
        source: What to call it in the message.

    Raises:
        ConfigError: Something is missing; it carries every problem.
    """
    draft = _Draft(source=source, tree=config.model_dump())
    draft.found += _missing_inputs(draft.tree)
    if draft.found:
        raise draft.error()


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML, defaults filled in; ``load_config`` of it gives an equal one.

    A default is left out where stating it would be refused because it has no effect beside another option.
    """
    full = config.model_dump(mode="json")
    if _gives(full, config):
        return _to_yaml(full)
    stated = config.model_dump(mode="json", exclude_unset=True)
    for path in _leaf_paths(full):
        before = _get(stated, path)
        if before is not None:
            continue
        candidate = _with(stated, path, _get(full, path))
        if _gives(candidate, config):
            stated = candidate
    return _to_yaml(_in_order_of(full, stated))


# Reading.


def _read(source: Path | str | Mapping[str, Any] | None) -> _Draft:
    if isinstance(source, BaseModel | Mapping):
        draft = _Draft(source="<dict>")
        draft.tree = _plain(source, (), draft.found)
        return draft
    if source is None:
        name, text = f"{_PACKAGED} (packaged)", resources.files("fedgraft.platform").joinpath(_PACKAGED).read_text("utf-8")
    else:
        path = Path(source).expanduser()
        name, text = str(path), _read_text(path)
    draft = _Draft(source=name)
    value = _parse(text, draft.lines, draft.found, name)
    if value is None:
        value = {}
    if not isinstance(value, dict):
        found = Found(path=(), value=show_value(value), expected="a mapping of keys to values")
        raise ConfigError(name, (found.problem(),))
    draft.tree = _plain(value, (), draft.found)
    return draft


def _read_text(path: Path) -> str:
    expected, hint = "a YAML file", ""
    if path.is_file():
        try:
            return path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            expected, hint = "a text file in UTF-8 that can be read", str(error)
    elif path.is_dir():
        hint = "this is a folder"
    else:
        expected = "a YAML file that exists"
        folder = path.parent
        names = [each.name for each in folder.glob("*.y*ml")] if folder.is_dir() else []
        hint = did_you_mean(path.name, names) or f"relative to {Path.cwd()}"
    raise ConfigError(str(path), (Problem(path="<file>", value=show_value(str(path)), expected=expected, hint=hint),))


def _parse(text: str, lines: dict[KeyPath, int], found: list[Found], source: str) -> Any:
    """Read YAML; note the line of every key, and keys that stand twice."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _note_lines(node, (), lines, found, set())
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}" if mark is not None else "somewhere"
        reason = ": ".join(part for part in (error.context, error.problem) if part)
        problem = Problem(path="<file>", value=f"a syntax error in {where}", expected="YAML", hint=reason)
    except (yaml.YAMLError, ValueError) as error:
        # A date that is none and a number of too many digits are plain ValueErrors of the constructor.
        problem = Problem(path="<file>", value="text that YAML cannot read", expected="YAML", hint=str(error).splitlines()[0])
    except RecursionError:
        problem = Problem(path="<file>", value="values nested too deeply", expected="YAML")
    raise ConfigError(source, (problem,))


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


# Overrides.


def _apply_overrides(draft: _Draft, overrides: Sequence[str]) -> None:
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


def _set(draft: _Draft, parts: Sequence[str], value: Any) -> KeyPath:
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


# Building.


def _load_method_files(draft: _Draft) -> None:
    files = draft.tree.get("method_files")
    for idx, name in enumerate(files if isinstance(files, list) else ()):
        if not isinstance(name, str | Path):
            continue  # the tree's own check says so
        path = Path(name).expanduser()
        try:
            load_method_file(path)
        except MethodError as error:
            expected = "a Python file that can be imported" if path.is_file() else "a Python file that exists"
            hint = error.message if path.is_file() else ""
            draft.found.append(Found(path=("method_files", idx), value=show_value(str(name)), expected=expected, hint=hint))


def _build_methods(draft: _Draft) -> dict[KeyPath, MethodConfig]:
    """Validate every method with the class that its name picks; a wrong one is stood in for, so that the rest is checked."""
    tree = draft.tree
    entries: dict[KeyPath, Any] = {}
    if tree.get("method") is not None:
        entries[("method",)] = tree["method"]
    compare = tree.get("compare")
    if isinstance(compare, dict) and isinstance(compare.get("methods"), dict):
        entries |= {("compare", "methods", label): entry for label, entry in compare["methods"].items()}
    if (tree.get("method") is None) == (compare is None):
        both = tree.get("method") is not None
        found = Found(
            path=("compare",) if both else ("method",),
            value="both method and compare" if both else "neither method nor compare",
            expected="exactly one of method (one method) and compare (several)",
            hint="" if both else f"for example method.name=flex; methods: {', '.join(METHODS.names())}",
        )
        draft.found.append(found)
    stand_in = MethodConfig(name="base")
    built: dict[KeyPath, MethodConfig] = {}
    for path, entry in entries.items():
        method, found_here = _build_method(entry, path)
        draft.found += found_here
        built[path] = method if method is not None else stand_in
    return built


def _build_method(entry: Any, path: KeyPath) -> tuple[MethodConfig | None, list[Found]]:
    known = METHODS.names()
    if not isinstance(entry, dict):
        hint = f"write {{name: {entry}}}" if isinstance(entry, str) and entry in known else ""
        expected = f"a mapping with a name, one of {', '.join(known)}"
        return None, [Found(path=path, value=show_value(entry), expected=expected, hint=hint)]
    name = entry.get("name")
    if not isinstance(name, str) or name not in known:
        near = did_you_mean(name, known) if isinstance(name, str) else ""
        expected = f"a method's name{f'; {near} known' if near else ''}: {', '.join(known)}"
        shown = show_value(name) if "name" in entry else "nothing"
        return None, [Found(path=(*path, "name"), value=shown, expected=expected)]
    return validate(METHODS.get(name).config_class, entry, path, _places())


def _build_tree(draft: _Draft, methods: Mapping[KeyPath, MethodConfig]) -> RunConfig | None:
    """Validate the whole tree, the methods already built."""
    tree = dict(draft.tree)
    if ("method",) in methods:
        tree["method"] = methods[("method",)]
    below = {path[-1]: method for path, method in methods.items() if path[0] == "compare"}
    if below:
        tree["compare"] = tree["compare"] | {"methods": below}
    if (tree.get("method") is None) == (tree.get("compare") is None):
        tree |= {"method": MethodConfig(name="base"), "compare": None}  # reported before
    config, found = validate(RunConfig, tree, (), _places())
    draft.found += found
    if found:
        # The checks across sections only run on a tree whose sections are all right, so they get one.
        wrong = {each.path[0] for each in found if each.path}
        intact = {key: tree[key] for key in _ROOT_CHECKED if key in tree and key not in wrong}
        _, more = validate(RunConfig, intact | {"method": MethodConfig(name="base")})
        known = {each.path for each in found}
        draft.found += [each for each in more if each.path not in known]
    return config


def _places() -> dict[str, list[str]]:
    """Where each key is known, for one that stands in the wrong place."""
    places = key_places(RunConfig)
    options: dict[str, list[str]] = {}
    for name in METHODS.names():
        for option in METHODS.get(name).config_class.model_fields:
            options.setdefault(option, []).append(name)
    options.pop("name", None)
    places.pop("name", None)
    for option, names in options.items():
        places.setdefault(option, []).append(f"method.{option} (of {', '.join(names)})")
    return places


# Files.


def _missing_inputs(tree: Mapping[str, Any]) -> Iterator[Found]:
    for path in (("data", "path"), ("data", "retention", "path"), ("data", "questions", "path")):
        given = _get(tree, path)
        if isinstance(given, str | Path) and not Path(given).expanduser().exists():
            yield Found(path=path, value=show_value(str(given)), expected="a file or folder that exists", hint=_nearest(given))
    given = _get(tree, ("model", "path"))
    if isinstance(given, str | Path):
        folder = Path(given).expanduser()
        expected = "a Hugging Face folder that exists" if not folder.is_dir() else "a folder with a config.json"
        if not (folder / "config.json").is_file():
            hint = "" if folder.is_dir() else _nearest(given)
            yield Found(path=("model", "path"), value=show_value(str(given)), expected=expected, hint=hint)
    for idx, name in enumerate(_get(tree, ("method_files",)) or ()):
        if isinstance(name, str | Path) and not Path(name).expanduser().is_file():
            expected = "a Python file that exists"
            yield Found(path=("method_files", idx), value=show_value(str(name)), expected=expected, hint=_nearest(name))
    for path in (("output", "folder"), ("output", "cache")):
        given = _get(tree, path)
        if isinstance(given, str | Path) and Path(given).expanduser().is_file():
            yield Found(path=path, value=show_value(str(given)), expected="a folder, not a file")


def _nearest(given: str | Path) -> str:
    """Name a neighbour with nearly the same name, else what a relative path is relative to."""
    path = Path(given).expanduser()
    try:
        names = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
    except OSError:
        names = []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"did you mean {str(path.parent / near[0])!r}?"
    return "" if path.is_absolute() else f"relative to {Path.cwd()}"


def _expand_home(config: RunConfig) -> RunConfig:
    return cast(RunConfig, _expanded(config))


def _expanded(value: Any) -> Any:
    """Replace ``~`` in every path of a tree."""
    if isinstance(value, BaseModel):
        changed = {name: _expanded(item) for name, item in value}
        update = {name: item for name, item in changed.items() if item is not getattr(value, name)}
        return value.model_copy(update=update) if update else value
    if isinstance(value, Path):
        return value.expanduser() if value.parts[:1] and value.parts[0].startswith("~") else value
    if isinstance(value, tuple):
        items = tuple(_expanded(item) for item in value)
        return items if any(new is not old for new, old in zip(items, value, strict=True)) else value
    if isinstance(value, dict):
        below = {key: _expanded(item) for key, item in value.items()}
        return below if any(below[key] is not value[key] for key in value) else value
    return value


# Writing.


def _to_yaml(tree: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=False, width=130))


def _gives(tree: Mapping[str, Any], config: RunConfig) -> bool:
    """Whether a tree is read as this configuration; a method's class may have been loaded anew since, so values count."""
    try:
        return RunConfig.model_validate(tree).model_dump() == config.model_dump()
    except ValueError:
        return False


def _leaf_paths(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaf_paths(value, (*path, key))
        else:
            yield (*path, key)


def _get(tree: Any, path: Sequence[str]) -> Any:
    for part in path:
        if not isinstance(tree, Mapping) or part not in tree:
            return None
        tree = tree[part]
    return tree


def _with(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of a tree with one value more."""
    below = tree.get(path[0])
    changed = value if len(path) == 1 else _with(below if isinstance(below, Mapping) else {}, path[1:], value)
    return {**tree, path[0]: changed}


def _in_order_of(full: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: _in_order_of(value, stated[key]) if isinstance(value, dict) and isinstance(stated[key], dict) else stated[key]
        for key, value in full.items()
        if key in stated
    }
