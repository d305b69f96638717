"""Methods that are not fedgraft's own: what their classes must look like, and hooks that fail in their name.

A hook of the server's half that raises, or that gives something else than it should, would end a run with an error from the
middle of the platform. Guarded, it ends it with one ``MethodError`` that names the method, the hook and the line. What a client's
hook does while a client trains is that client's failure, and is told by the worker.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from fedgraft.errors import FedgraftError, MethodError
from fedgraft.protocols import Method, MethodConfig, Weights
from fedgraft.types import ClientTask, EvaluationTask, Group, RoundPlan, ServerState, Slots

__all__ = ["check_class", "guarded", "is_foreign"]


def is_foreign(kind: type) -> bool:
    """Whether a class comes from a user's file or another package."""
    return not kind.__module__.startswith("fedgraft.")


def check_class(kind: Any) -> None:
    """Check that a class can be a method: its base, its name, its options, and the arguments of its hooks.

    Raises:
        MethodError: It cannot; says what to change.
    """
    if not (isinstance(kind, type) and issubclass(kind, Method)):
        raise MethodError(f"{kind!r} is no method", "METHODS.add takes a subclass of fedgraft.protocols.Method")
    name = getattr(kind, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[a-z][a-z0-9_]{0,63}", name):
        raise MethodError(f"method name {name!r}: expected lower-case letters, digits and _", "it names a folder, too")
    options = getattr(kind, "config_class", None)
    if not (isinstance(options, type) and issubclass(options, MethodConfig)):
        raise MethodError(f"method {name!r}: config_class is {options!r}", "set it to a subclass of MethodConfig")
    if options.model_fields["name"].default != name and is_foreign(kind):
        hint = f'give {options.__name__} the field name: Literal["{name}"] = "{name}"'
        raise MethodError(f"method {name!r}: its config_class is of another name", hint)
    missing = [field for field in ("title", "paper", "summary") if not isinstance(getattr(kind, field, None), str)]
    if missing:
        raise MethodError(f"method {name!r} has no {', '.join(missing)}", "set these class attributes to texts")
    for hook, own in vars(kind).items():
        if inspect.isfunction(own) and inspect.isfunction(expected := getattr(Method, hook, None)) and not hook.startswith("_"):
            _check_arguments(name, hook, own, expected)


def _check_arguments(name: str, hook: str, own: Callable[..., Any], expected: Callable[..., Any]) -> None:
    wanted = inspect.signature(expected)
    by_place = [each for each in wanted.parameters.values() if each.kind is not inspect.Parameter.KEYWORD_ONLY]
    by_name = [each.name for each in wanted.parameters.values() if each.kind is inspect.Parameter.KEYWORD_ONLY]
    try:
        inspect.signature(own).bind(*by_place, **dict.fromkeys(by_name))
    except TypeError as error:
        what = ", ".join(wanted.parameters)
        raise MethodError(
            f"method {name!r}: {hook}{inspect.signature(own)} does not take ({what}): {error}", "see Method"
        ) from None


def guarded(make: Callable[[], Method], kind: type[Method]) -> Method:
    """Make a method; one that is not fedgraft's own fails in its own name.

    Args:
        make: Calls the class.
        kind: The class.

    Raises:
        MethodError: Its constructor raises.
    """
    if not is_foreign(kind):
        return make()
    try:
        method = make()
    except FedgraftError:
        raise
    except Exception as error:
        raise _blame(kind, "__init__", error) from error
    for hook, check in _RESULTS.items():
        setattr(method, hook, _guard(kind, hook, getattr(method, hook), check))
    return method


def _guard(kind: type[Method], hook: str, call: Callable[..., Any], check: Callable[[Any], str]) -> Callable[..., Any]:
    @functools.wraps(call)
    def run(*given: Any, **named: Any) -> Any:
        try:
            found = call(*given, **named)
        except (FedgraftError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _blame(kind, hook, error) from error
        if wanted := check(found):
            shown = repr(found)
            shown = shown if len(shown) < 200 else f"{shown[:196]} ..."
            raise MethodError(f"method {kind.name!r}: {hook}() gave {shown}, expected {wanted}", f"mend {inspect.getfile(kind)}")
        return found

    return run


def _blame(kind: type[Method], hook: str, error: Exception) -> MethodError:
    file = inspect.getfile(kind)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    where = f"line {lines[-1]} of {file}" if lines else file
    text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return MethodError(f"method {kind.name!r}: {hook}() raised {text}", f"mend {where}")


def _is(kind: Any, text: str) -> Callable[[Any], str]:
    return lambda found: "" if isinstance(found, kind) else text


def _is_state(found: Any) -> str:
    if not isinstance(found, ServerState):
        return "a ServerState"
    for name, value in [*found.params.items(), *found.extras.items()]:
        if not isinstance(value, torch.Tensor):
            return f"tensors only; {name} is a {type(value).__name__}"
        if value.is_floating_point() and bool(torch.isnan(value).any()):
            return f"numbers; {name} holds NaN"
    return ""


def _is_weights(found: Any) -> str:
    if not isinstance(found, Weights):
        return "Weights"
    for name, values in {"default": found.default, **found.by_key}.items():
        if not all(isinstance(value, int | float) and math.isfinite(value) and value >= 0 for value in values):
            return f"weights that are finite and at least 0; those of {name} are not"
    return ""


def _is_json(found: Any) -> str:
    wanted = "a mapping of kinds to JSON values"
    if not isinstance(found, Mapping):
        return wanted
    try:
        json.dumps(dict(found))
    except (TypeError, ValueError, RecursionError):
        return wanted
    return ""


def _is_cohort(found: Any) -> str:
    is_one = isinstance(found, Sequence) and all(isinstance(client, int) and not isinstance(client, bool) for client in found)
    return "" if is_one else "a tuple of client numbers"


def _is_scale(found: Any) -> str:
    return "" if isinstance(found, int | float) and math.isfinite(found) and found > 0 else "a finite number above 0"


def _is_count(found: Any) -> str:
    return "" if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else "a number of rounds, 0 or more"


_RESULTS: dict[str, Callable[[Any], str]] = {
    "slots": _is(Slots, "Slots"),
    "group": _is(Group, "a Group: SHARED, FROZEN, PRIVATE or assigned(layer, expert)"),
    "lr_scale": _is_scale,
    "persists_moments": _is(bool, "True or False"),
    "is_personal": _is(bool, "True or False"),
    "num_rounds": _is_count,
    "init": _is_state,
    "plan": _is(RoundPlan, "a RoundPlan"),
    "select": _is_cohort,
    "assign": _is(Mapping, "a mapping of clients to assignments"),
    "task": _is(ClientTask, "a ClientTask"),
    "evaluation": _is(EvaluationTask, "an EvaluationTask"),
    "weigh": _is_weights,
    "aggregate": _is_state,
    "observe_state": _is_json,
    "request": _is(Mapping, "a mapping of slots to the server's names"),
    "build": _is(AbstractContextManager, "a context manager"),
    "setup": _is(object, ""),
    "observe": _is_json,
}
"""What each guarded hook must give: says what was expected, or nothing where it is right."""
