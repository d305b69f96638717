"""Every error survives the trip between processes, and tells the command how to end."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest

from fedgraft import errors
from fedgraft.errors import ConfigError, FedgraftError, Problem

CLASSES = sorted(
    (value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, FedgraftError)),
    key=lambda cls: cls.__name__,
)
PROBLEMS = (
    Problem(path="data.alpha", value="-1", expected="a number above 0", hint="did you mean 1?"),
    Problem(path="seed", value="'x'", expected="an integer"),
)


def make(cls: type[FedgraftError]) -> FedgraftError:
    return cls("run.yaml", PROBLEMS) if cls is ConfigError else cls("it broke: {0} %s", "mend it")  # type: ignore[arg-type]


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    names = r"\w+Error|BudgetViolation|GroupViolation|RunInterrupted"
    drawn = dict(re.findall(rf"^ {{4,6}}({names}) +(\d+)", errors.__doc__ or "", re.M))
    assert drawn == {cls.__name__: str(cls.exit_code) for cls in CLASSES}
    assert {cls.__name__ for cls in CLASSES} | {"Problem"} == set(errors.__all__)
    assert all(cls.__bases__ == ((Exception,) if cls is FedgraftError else (FedgraftError,)) for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_error_pickles_with_all_it_has(cls: type[FedgraftError], protocol: int) -> None:
    error = make(cls)
    for again in (pickle.loads(pickle.dumps(error, protocol)), copy.copy(error)):
        assert type(again) is cls
        assert str(again) == str(error)
        assert again.exit_code == cls.exit_code
        assert vars(again) == vars(error)
        assert again.args == error.args


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not ConfigError], ids=lambda cls: cls.__name__)
def test_message_and_hint(cls: type[FedgraftError]) -> None:
    error = make(cls)
    assert (error.message, error.hint) == ("it broke: {0} %s", "mend it")
    assert str(error) == "it broke: {0} %s\n  what to do: mend it"
    assert str(cls("it broke")) == "it broke"
    assert pickle.loads(pickle.dumps(cls("it broke"))).hint == ""


def test_a_config_error_lists_all_problems() -> None:
    assert str(ConfigError("run.yaml", PROBLEMS)) == (
        "run.yaml: 2 problems\n"
        "  data.alpha: got -1; expected a number above 0 (did you mean 1?)\n"
        "  seed: got 'x'; expected an integer"
    )
    assert str(ConfigError("run.yaml", PROBLEMS[1:])).startswith("run.yaml: 1 problem\n")
    assert pickle.loads(pickle.dumps(ConfigError("run.yaml", PROBLEMS))).problems == PROBLEMS
