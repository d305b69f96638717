"""From a YAML file and overrides to the frozen ``RunConfig``, with every problem of the file reported at once.

Overrides are ``key.path=value``, the value read as YAML: ``data.path=/x``, ``seeds=[0,1]``, ``rate_search=null``. A relative
path, in a file as on the command line, is relative to the current directory, not to the file; ``~`` is the home folder.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import fedgraft.aggregation  # noqa: F401  (its files register the methods that a configuration may name)
from fedgraft.errors import MethodError
from fedgraft.platform.config import RunConfig
from fedgraft.platform.draft import Draft, apply_overrides, expanded, nearest_path, read_draft, to_yaml
from fedgraft.platform.paths import look_up, unknown_homes
from fedgraft.platform.validation import Found, KeyPath, did_you_mean, key_places, show_value, validate
from fedgraft.protocols import MethodConfig
from fedgraft.registry import METHODS, load_entry_points, load_method_file

__all__ = ["check_inputs", "dump_config", "load_config"]

_PACKAGED = "quickstart.yaml"
_ROOT_CHECKED = ("federation", "training", "rate_search")  # sections whose combinations the whole tree checks


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
    draft = read_draft(source, _PACKAGED)
    apply_overrides(draft, overrides)
    load_entry_points()
    _load_method_files(draft)
    methods = _build_methods(draft)
    config = _build_tree(draft, methods)
    if checks_files:
        reported = {each.path for each in draft.found}
        named = _missing_inputs(draft.tree if config is None else config.model_dump())
        draft.found += [each for each in named if each.path not in reported]
    if config is not None:
        reported = {each.path for each in draft.found}
        draft.found += [each for each in unknown_homes(config) if each.path not in reported]
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
    draft = Draft(source=source, tree=config.model_dump())
    draft.found += _missing_inputs(draft.tree)
    if draft.found:
        raise draft.error()


def dump_config(config: RunConfig) -> str:
    """Write a configuration as YAML, defaults filled in; ``load_config`` of it gives an equal one.

    A default is left out where stating it would be refused because it has no effect beside another option.
    """
    full = config.model_dump(mode="json")
    if _gives(full, config):
        return to_yaml(full)
    stated = config.model_dump(mode="json", exclude_unset=True)
    for path in _leaf_paths(full):
        before = _get(stated, path)
        if before is not None:
            continue
        candidate = _with(stated, path, _get(full, path))
        if _gives(candidate, config):
            stated = candidate
    return to_yaml(_in_order_of(full, stated))


# Building.


def _load_method_files(draft: Draft) -> None:
    files = draft.tree.get("method_files")
    for idx, name in enumerate(files if isinstance(files, list) else ()):
        if not isinstance(name, str | Path):
            continue  # the tree's own check says so
        place = look_up(name)
        expected, hint = "a Python file that exists", ""
        if place.kind == "file":
            try:
                load_method_file(place.path)
                continue
            except MethodError as error:
                expected, hint = "a Python file that can be imported", error.message
        else:
            hint = nearest_path(name)
        draft.found.append(Found(path=("method_files", idx), value=show_value(str(name)), expected=expected, hint=hint))


def _build_methods(draft: Draft) -> dict[KeyPath, MethodConfig]:
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


def _build_tree(draft: Draft, methods: Mapping[KeyPath, MethodConfig]) -> RunConfig | None:
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
    for path in (
        ("data", "path"),
        ("data", "retention", "path"),
        ("data", "questions", "path"),
        ("federation", "budgets", "profile"),
    ):
        given = _get(tree, path)
        if isinstance(given, str | Path) and look_up(given).kind not in ("file", "folder"):
            yield _missing(path, given, "a file or folder that exists")
    given = _get(tree, ("model", "path"))
    if isinstance(given, str | Path):
        folder = look_up(given)
        if folder.kind != "folder":
            yield _missing(("model", "path"), given, "a Hugging Face folder that exists")
        elif look_up(folder.path / "config.json").kind != "file":
            yield Found(path=("model", "path"), value=show_value(str(given)), expected="a folder with a config.json")
    files = _get(tree, ("method_files",))
    for idx, name in enumerate(files if isinstance(files, list | tuple) else ()):
        if isinstance(name, str | Path) and look_up(name).kind != "file":
            yield _missing(("method_files", idx), name, "a Python file that exists")
    for path in (("output", "folder"), ("output", "cache")):
        given = _get(tree, path)
        if not isinstance(given, str | Path):
            continue
        place = look_up(given)
        if place.kind in ("file", "other"):
            yield Found(path=path, value=show_value(str(given)), expected="a folder, not a file")
        elif place.reason:
            yield Found(path=path, value=show_value(str(given)), expected="a folder that can be made", hint=place.reason)


def _missing(path: KeyPath, given: str | Path, expected: str) -> Found:
    return Found(path=path, value=show_value(str(given)), expected=expected, hint=nearest_path(given))


def _expand_home(config: RunConfig) -> RunConfig:
    return cast(RunConfig, expanded(config))


# Writing.


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
