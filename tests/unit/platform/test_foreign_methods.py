"""Methods of users that are wrong: files that cannot be loaded, classes that fit nowhere, hooks that raise or give nonsense."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
from fedgraft.errors import ConfigError, MethodError, QuorumError
from fedgraft.platform.loading import load_config
from fedgraft.protocols import Method, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ServerState


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was() -> Iterator[None]:
    known = dict(METHODS._classes)
    yield
    METHODS._classes = known


class MineConfig(FedAvgConfig):
    name: Literal["mine"] = "mine"  # type: ignore[assignment]


def mine(**hooks: Any) -> type[Method]:
    """FedAvg under another name, of this file, with some hooks replaced; registered."""
    made = type("Mine", (FedAvg,), {"name": "mine", "config_class": MineConfig, "__module__": __name__, **hooks})
    METHODS._classes.pop("mine", None)
    return METHODS.add(made)


def boom(*given: Any, **named: Any) -> Any:
    raise ZeroDivisionError("division by zero")


def nan_state(self: Any, state: ServerState, reduced: Any, updates: Any) -> ServerState:
    return ServerState(params={key: value * float("nan") for key, value in state.params.items()})


HOOKS = (
    "slots",
    "group",
    "lr_scale",
    "num_rounds",
    "init",
    "plan",
    "select",
    "assign",
    "task",
    "evaluation",
    "weigh",
    "aggregate",
)


@pytest.mark.parametrize("hook", [*HOOKS, "observe_state", "build", "request"])
def test_a_hook_that_raises_ends_the_run_in_its_name_and_line(hook: str, make_job: Callable[..., Any], run_job: Any) -> None:
    own = getattr(FedAvg, hook)
    namespace: dict[str, Any] = {"own": own, "boom": boom}
    exec(f"import functools\n@functools.wraps(own)\ndef {hook}(*given, **named):\n    return boom()\n", namespace)
    mine(**{hook: namespace[hook]})
    errors = (MethodError, QuorumError) if hook in ("build", "request") else MethodError  # in training a client's failure
    with pytest.raises(errors) as caught:
        run_job(make_job({"name": "mine"}, rounds=1))
    assert f"method 'mine': {hook}() raised ZeroDivisionError: division by zero" in str(caught.value)
    line = boom.__code__.co_firstlineno + 1
    assert f"line {line} of {__file__}" in str(caught.value)


@pytest.mark.parametrize(
    ("hook", "given", "expected"),
    [
        ("slots", None, "expected Slots"),
        ("group", "shared", "expected a Group"),
        ("lr_scale", float("nan"), "expected a finite number above 0"),
        ("num_rounds", -1, "expected a number of rounds"),
        ("init", {}, "expected a ServerState"),
        ("plan", None, "expected a RoundPlan"),
        ("select", None, "expected a tuple of client numbers"),
        ("select", ("0", "1"), "expected a tuple of client numbers"),
        ("assign", None, "expected a mapping of clients"),
        ("task", None, "expected a ClientTask"),
        ("evaluation", 3, "expected an EvaluationTask"),
        ("weigh", [1.0, 1.0, 1.0], "expected Weights"),
        ("weigh", Weights(default=(float("nan"), 1.0, 1.0)), "those of default are not"),
        ("weigh", Weights(default=(1.0, 1.0, 1.0), by_key={"x": (-1.0, 0.0, 0.0)}), "those of x are not"),
        ("aggregate", None, "expected a ServerState"),
        ("aggregate", ServerState(params={"x": 3}), "expected tensors only; x is a int"),  # type: ignore[dict-item]
        ("observe_state", {"x": torch.ones(1)}, "expected a mapping of kinds to JSON values"),
        ("observe_state", 7, "expected a mapping of kinds to JSON values"),
    ],
)
def test_a_hook_that_gives_nonsense_is_told_what_was_expected(
    hook: str, given: Any, expected: str, make_job: Callable[..., Any], run_job: Any
) -> None:
    namespace: dict[str, Any] = {"own": getattr(FedAvg, hook), "given": given}
    exec(f"import functools\n@functools.wraps(own)\ndef {hook}(*_, **__):\n    return given\n", namespace)
    mine(**{hook: namespace[hook]})
    with pytest.raises(MethodError, match=f"method 'mine': {hook}\\(\\) gave") as caught:
        run_job(make_job({"name": "mine"}, rounds=1))
    assert expected in caught.value.message


def test_a_state_of_nan_is_told_in_the_round_that_makes_it(make_job: Callable[..., Any], run_job: Any) -> None:
    mine(aggregate=nan_state)
    with pytest.raises(MethodError, match=r"aggregate\(\) gave .*expected numbers; .* holds NaN"):
        run_job(make_job({"name": "mine"}, rounds=1))


def test_diagnostics_that_are_no_json_are_their_clients_failure(make_job: Callable[..., Any], run_job: Any) -> None:
    def reply(self: Any, session: Any, update: Any) -> Any:
        session.diagnostics["mine"] = torch.ones(1)
        return update, {}

    mine(reply=reply)
    with pytest.raises(QuorumError, match="failed at reply: TypeError"):
        run_job(make_job({"name": "mine"}, rounds=1))


HEAD = """
from typing import Literal
from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS
class Options(MethodConfig):
    name: Literal["own"] = "own"
"""
CLASS = "class Own(Method):\n    name = 'own'\n    title = paper = summary = 'x'\n    config_class = Options\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def (", "SyntaxError"),
        ("import no_such_package", "No module named 'no_such_package'"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("x = 1", "registers no method"),
        (HEAD + CLASS, "registers no method"),
        (HEAD + "@METHODS.add\n" + CLASS.replace("'own'", "'fedavg'").replace("Options\n", "Options\n", 1), "of another name"),
        (
            HEAD.replace('"own"', '"fedavg"') + "@METHODS.add\n" + CLASS.replace("'own'", "'fedavg'"),
            "two methods are called 'fedavg'",
        ),
        (HEAD + "@METHODS.add\n" + CLASS.replace("'own'", "'Own Method'"), "lower-case letters"),
        (HEAD + "@METHODS.add\n" + CLASS.replace("    config_class = Options\n", ""), "config_class is None"),
        (HEAD + "@METHODS.add\n" + CLASS.replace(" = summary", ""), "has no summary"),
        (
            HEAD + "@METHODS.add\n" + CLASS + "    def weigh(self, updates):\n        return 1\n",
            "weigh(self, updates) does not take",
        ),
        (HEAD + "@METHODS.add\n" + CLASS + "    def check_run(self, rounds):\n        pass\n", "does not take (self, rounds"),
        (HEAD + "METHODS.add(3)", "3 is no method"),
        (HEAD + "@METHODS.add\nclass Own:\n    name = 'own'\n", "is no method"),
        ("\x00", "SyntaxError"),
        ("x = '\udcff'", "SyntaxError"),
    ],
)
def test_a_file_that_is_no_method_is_one_problem(source: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_bytes(source.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError) as caught:
        load_config({"method": {"name": "base"}}, [f"method_files=[{path}]"])
    (problem,) = caught.value.problems
    assert problem.path == "method_files[0]"
    assert problem.expected == "a Python file that can be imported"
    assert re.search(re.escape(said), problem.hint), problem.hint


def test_a_constructor_that_raises_is_told_where_the_configuration_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(HEAD + "@METHODS.add\n" + CLASS + "    def __init__(self, config):\n        1 / 0\n")
    with pytest.raises(ConfigError, match=r"__init__\(\) raised ZeroDivisionError"):
        load_config({}, [f"method_files=[{path}]", "method={name: own}"])


def test_fedgrafts_own_methods_are_not_guarded() -> None:
    assert "weigh" not in vars(METHODS.build(FedAvgConfig()))
    assert "weigh" in vars(METHODS.build(mine().config_class()))
