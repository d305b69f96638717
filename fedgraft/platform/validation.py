"""Says in plain words what is wrong with a part of a configuration: pydantic's errors with key paths that a user can find."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedgraft.errors import Problem

__all__ = ["Found", "KeyPath", "did_you_mean", "key_places", "path_text", "show_value", "validate"]

KeyPath: TypeAlias = tuple[str | int, ...]
"""Keys and list positions from the root of the configuration to a value."""

ModelT = TypeVar("ModelT", bound=BaseModel)

_NOTHING = object()
_MAX_SHOWN = 72


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A problem with its place, so that problems can be put in the order of the file."""

    path: KeyPath
    value: str
    expected: str
    hint: str = ""

    def problem(self, note: str = "") -> Problem:
        """Give the problem as users see it; ``note`` says where its key was written."""
        hint = "; ".join(part for part in (self.hint, note) if part)
        return Problem(
            path=_one_line(path_text(self.path)), value=self.value, expected=_one_line(self.expected), hint=_one_line(hint)
        )


@dataclass(slots=True)
class _Place:
    """What pydantic's location of an error stands for: tags of unions are no keys."""

    path: list[str | int]
    owner: type[BaseModel] | None
    field: FieldInfo | None
    value: Any
    members: tuple[type[BaseModel], ...] = ()


def validate(
    kind: type[ModelT], raw: Mapping[str, Any], prefix: KeyPath = (), places: Mapping[str, Sequence[str]] | None = None
) -> tuple[ModelT | None, list[Found]]:
    """Build one part of the configuration, or say everything that is wrong with it.

    Args:
        kind: The part's class.
        raw: Its keys and values as they came from YAML.
        prefix: Where this part lies in the whole configuration.
        places: By name of a key, the key paths where it is known (see ``key_places``); shown for a misplaced key.

    Returns:
        The part, or ``None`` and at least one problem.
    """
    found = list(_booleans_as_numbers(kind, raw, prefix))
    try:
        built = kind.model_validate(dict(raw))
    except ValidationError as error:
        details = error.errors(include_url=False)
        return None, _merge(
            found + [_translate(kind, raw, detail, prefix, places or {}) for detail in details if not _follows(detail, details)]
        )
    except Exception as error:  # a check of a user's own method class may raise anything
        text = f"{type(error).__name__}: {error}".splitlines()[0]
        found.append(Found(path=prefix, value=show_value(raw), expected="options that its own checks accept", hint=text))
    return (None, found) if found else (built, [])


def key_places(kind: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """List every key below ``kind`` by name, each with the key paths where it is known."""
    places: dict[str, list[str]] = {}
    for name, info in kind.model_fields.items():
        places.setdefault(name, []).append(f"{prefix}{name}")
        for member in _members(info.annotation):
            for key, paths in key_places(member, f"{prefix}{name}.").items():
                known = places.setdefault(key, [])
                known += [path for path in paths if path not in known]
    return places


def did_you_mean(name: str, known: Sequence[str], most: int = 2) -> str:
    """Give ``did you mean 'x'?`` for the nearest known names, or nothing."""
    near = difflib.get_close_matches(name, known, n=most, cutoff=0.6)
    return f"did you mean {' or '.join(repr(each) for each in near)}?" if near else ""


def path_text(path: KeyPath) -> str:
    """Write a key path as users do: ``compare.methods.flex.lora[0]``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text or "<root>"


def show_value(value: object) -> str:
    """Show a value on one line, as YAML writes it, in ASCII, not too long."""
    if isinstance(value, str):
        text = ascii(value)
    else:
        try:
            text = yaml.safe_dump(_plain(value), default_flow_style=True, width=10**9, sort_keys=False).strip()
        except (yaml.YAMLError, RecursionError):
            text = repr(value)
        text = ascii(text.removesuffix("...").strip())[1:-1]
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 4]} ..."


def _one_line(text: str) -> str:
    """Keys and other people's messages as one line of printable ASCII: they may hold anything, terminal codes too."""
    return re.sub(r"[^ -~]", lambda found: ascii(found.group())[1:-1], " ".join(text.split()))


def _plain(value: object) -> object:
    if isinstance(value, BaseModel):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _translate(
    kind: type[BaseModel], raw: Mapping[str, Any], detail: ErrorDetails, prefix: KeyPath, places: Mapping[str, Sequence[str]]
) -> Found:
    place = _locate(kind, raw, detail["loc"])
    path = (*prefix, *place.path)
    value = "nothing" if place.value is _NOTHING else show_value(place.value)
    error, context = detail["type"], detail.get("ctx") or {}
    optional = ", or null" if place.field is not None and _is_optional(place.field.annotation) else ""
    if error == "extra_forbidden":
        return Found(path=path, value=value, expected=_known_key(place, places))
    if error == "missing":
        about = place.field.description if place.field is not None and place.field.description else ""
        return Found(path=path, value="nothing", expected="a value for this key", hint=about.rstrip("."))
    if error in ("union_tag_invalid", "union_tag_not_found"):
        key = str(context.get("discriminator", "'name'")).strip("'")
        tags = _quoted(str(context.get("expected_tags", ""))) or _tags(place.members, key)
        given = place.value.get(key) if isinstance(place.value, Mapping) else place.value
        return Found(
            path=(*path, key),
            value="nothing" if error == "union_tag_not_found" else show_value(given),
            expected=_one_of(str(given), tags),
        )
    if error in ("literal_error", "enum"):
        return Found(path=path, value=value, expected=_one_of(str(place.value), _quoted(str(context["expected"]))) + optional)
    if error in ("value_error", "assertion_error"):
        return _own_check(raw, path, prefix, place, detail["msg"])
    expected, hint = _expected(error, place, context, detail["msg"])
    return Found(path=path, value=value, expected=expected + optional, hint=hint)


def _expected(error: str, place: _Place, context: Mapping[str, Any], message: str) -> tuple[str, str]:
    """What was expected instead of a value of the wrong type or range, and a hint."""
    if error.startswith(("int_", "float_", "greater_than", "less_than", "finite_number", "multiple_of", "decimal_")):
        return _number(error, place.field), ""
    if error.startswith("bool_"):
        return "true or false", ""
    if error in ("string_type", "string_sub_type"):
        hint = "put it in quotes" if isinstance(place.value, int | float) and not isinstance(place.value, bool) else ""
        return "text", hint
    if error.startswith("path_"):
        return "a path", ""
    if error == "string_pattern_mismatch":
        return f"text of the form {context['pattern']}", ""
    if error in ("too_short", "string_too_short"):
        least = context.get("min_length", 1)
        return (f"at least {least} entr{'y' if least == 1 else 'ies'}" if error == "too_short" else "text, not empty"), ""
    if error in ("tuple_type", "list_type", "set_type", "frozen_set_type"):
        return "a list", f"write [{show_value(place.value)}]" if isinstance(place.value, str | int | float) else ""
    if error in ("model_type", "model_attributes_type", "dict_type", "mapping_type"):
        keys = ", ".join(place.members[0].model_fields) if len(place.members) == 1 else ""
        return f"a mapping{f' with some of the keys {keys}' if keys else ''}", ""
    return message.removeprefix("Input should be ").removeprefix("Value should be "), ""


def _own_check(raw: Mapping[str, Any], path: KeyPath, prefix: KeyPath, place: _Place, message: str) -> Found:
    """Translate what a validator of ours (or of a user's method) said."""
    text = re.sub(r"^(Value error|Assertion failed), ", "", message)
    named = re.match(r"[a-z_]+(\.[a-z_]+)+", text)
    if not place.path and named is not None:
        # A check of the whole tree names the key that is wrong.
        path = (*prefix, *named.group().split("."))
        value: object = raw
        for part in named.group().split("."):
            value = value.get(part, _NOTHING) if isinstance(value, Mapping) else _NOTHING
        shown = "nothing" if value is _NOTHING else show_value(value)
        return Found(path=path, value=shown, expected="options that go together", hint=text)
    shown = "nothing" if place.value is _NOTHING else show_value(place.value)
    about, marker, expected = text.partition("expected ")
    if marker:
        return Found(path=path, value=shown, expected=expected, hint=about.strip().rstrip(":"))
    expected = "options that go together" if isinstance(place.value, Mapping) else "another value"
    return Found(path=path, value=shown, expected=expected, hint=text)


def _known_key(place: _Place, places: Mapping[str, Sequence[str]]) -> str:
    key = str(place.path[-1])
    known = list(place.owner.model_fields) if place.owner is not None else []
    near = [repr(name) for name in difflib.get_close_matches(key, known, n=2, cutoff=0.6)]
    near += list(places.get(key, ()))[:3]
    if near:
        return f"a known key; did you mean {' or '.join(near)}?"
    return f"a known key: {', '.join(known)}"


def _number(error: str, info: FieldInfo | None) -> str:
    """A number's type and range in words, from the field's own limits."""
    is_whole = error.startswith("int_") or (info is not None and int in _leaves(info.annotation))
    limits: dict[str, Any] = {}
    for limit in info.metadata if info is not None else ():
        for name in ("gt", "ge", "lt", "le"):
            value = getattr(limit, name, None)  # of annotated_types: Gt, Ge, Lt, Le, Interval
            if value is not None:
                limits[name] = value
    shown = {name: _figure(value) for name, value in limits.items()}
    text = "a whole number" if is_whole else "a number"
    if "ge" in shown and "le" in shown:
        return f"{text} from {shown['ge']} to {shown['le']}"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    ranges = [f"{word} {shown[name]}" for name, word in words.items() if name in shown]
    return f"{text} {' and '.join(ranges)}" if ranges else text


def _figure(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else f"{value:g}"


def _one_of(given: str, choices: Sequence[str]) -> str:
    near = did_you_mean(given, choices, most=1)
    return f"one of {', '.join(choices)}{f'; {near}' if near else ''}"


def _locate(kind: type[BaseModel], raw: Mapping[str, Any], location: Sequence[str | int]) -> _Place:
    """Follow pydantic's location through classes and values."""
    place = _Place(path=[], owner=None, field=None, value=raw)
    annotation: Any = kind
    for part in location:
        models = [each for each in _alternatives(annotation) if _is_model(each)]
        tagged = [each for each in models if part in _names_in_unions(each)] if len(models) > 1 else []
        if tagged:
            annotation = tagged[0]
            continue
        if models and isinstance(part, str):
            place.owner = next((each for each in models if part in each.model_fields), models[0])
            place.field = place.owner.model_fields.get(part)
            annotation = place.field.annotation if place.field is not None else None
        elif _has(place.value, part):
            annotation = next((each for item in _alternatives(annotation) for each in get_args(item)[-1:]), None)
            if annotation is Ellipsis:
                annotation = None
        else:
            continue  # the name of a union's member or of a validator
        place.path.append(part)
        place.value = place.value[part] if _has(place.value, part) else _NOTHING
    place.members = tuple(each for each in _alternatives(annotation) if _is_model(each))
    return place


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and 0 <= part < len(value)


def _alternatives(annotation: Any) -> Iterator[Any]:
    """The members of a union, without ``Annotated``; a plain type is its own only one."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _alternatives(get_args(annotation)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _alternatives(member)
    elif origin is tuple:
        yield list[get_args(annotation)[0]]  # type: ignore[misc]
    elif annotation is not None:
        yield annotation


def _members(annotation: Any) -> list[type[BaseModel]]:
    return [each for each in _alternatives(annotation) if _is_model(each)]


def _leaves(annotation: Any) -> list[Any]:
    return [leaf for each in _alternatives(annotation) for leaf in (each, *get_args(each))]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _is_optional(annotation: Any) -> bool:
    return type(None) in set(_alternatives(annotation))


def _names_in_unions(model: type[BaseModel]) -> set[object]:
    """What pydantic calls a member of a union in a location: its class name, or its tag."""
    tags = {info.default for info in model.model_fields.values() if isinstance(info.default, str)}
    return {model.__name__, *tags}


def _tags(members: Sequence[type[BaseModel]], key: str) -> list[str]:
    return [str(member.model_fields[key].default) for member in members if key in member.model_fields]


def _booleans_as_numbers(kind: type[BaseModel], raw: Mapping[str, Any], prefix: KeyPath) -> Iterator[Found]:
    """Find true and false where a number belongs: YAML reads ``yes`` and ``on`` so, and pydantic would take 1 and 0."""
    for path in _boolean_leaves(raw, ()):
        place = _locate(kind, raw, path)
        annotation = place.field.annotation if place.field is not None else None
        leaves = _leaves(annotation)
        if bool not in leaves and (int in leaves or float in leaves) and not _members(annotation):
            yield Found(path=(*prefix, *path), value=show_value(place.value), expected=_number("", place.field))


def _boolean_leaves(raw: object, path: KeyPath) -> Iterator[KeyPath]:
    if isinstance(raw, bool):
        yield path
    elif isinstance(raw, Mapping):
        for key, value in raw.items():
            yield from _boolean_leaves(value, (*path, key))
    elif isinstance(raw, list | tuple):
        for idx, value in enumerate(raw):
            yield from _boolean_leaves(value, (*path, idx))


def _follows(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> bool:
    """Whether a list is called too short only because entries of it are wrong: pydantic does not count those."""
    location = detail["loc"]
    return detail["type"] == "too_short" and any(
        len(other["loc"]) > len(location) and other["loc"][: len(location)] == location for other in details
    )


def _merge(found: list[Found]) -> list[Found]:
    """One problem a place: a value that fits no member of a union fails once a member."""
    merged: dict[KeyPath, Found] = {}
    for each in found:
        known = merged.get(each.path)
        if known is None:
            merged[each.path] = each
        elif each.expected not in known.expected:
            merged[each.path] = Found(
                path=each.path,
                value=known.value,
                expected=f"{known.expected}, or {each.expected}",
                hint=known.hint or each.hint,
            )
    return list(merged.values())


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text) or [part.strip() for part in re.split(r",| or ", text) if part.strip()]
