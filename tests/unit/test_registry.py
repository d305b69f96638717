"""Names of methods, and methods that users bring along."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from fedgraft import registry as module
from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
from fedgraft.errors import MethodError
from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS, MethodRegistry, load_entry_points, load_method_file


class ToyConfig(MethodConfig):
    name: Literal["toy"] = "toy"
    size: int = 3


class Toy(Method):
    name = "toy"
    title = "Toy"
    paper = "none"
    summary = "a toy"
    config_class = ToyConfig


class Impostor(Toy):
    pass


@pytest.fixture
def registry() -> MethodRegistry:
    made = MethodRegistry()
    made.add(Toy)
    made.add(FedAvg)
    return made


@pytest.fixture
def _clean_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test registers globally is gone afterwards."""
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("fedgraft_user_"):
            del sys.modules[name]


def test_a_second_class_under_a_name_is_refused(registry: MethodRegistry) -> None:
    with pytest.raises(MethodError, match=r"two methods are called 'toy': .*\.Toy and .*\.Impostor"):
        registry.add(Impostor)
    assert registry.get("toy") is Toy
    assert registry.add(Toy) is Toy  # the same class once more is no second one
    assert registry.names() == ("fedavg", "toy")


def test_a_file_that_is_run_again_replaces_its_own_class(registry: MethodRegistry) -> None:
    again = type("Toy", (Toy,), {"__module__": Toy.__module__, "__qualname__": Toy.__qualname__})
    registry.add(again)
    assert registry.get("toy") is again


def test_an_unknown_name_gets_the_nearest_and_all(registry: MethodRegistry) -> None:
    with pytest.raises(MethodError, match="no method is called 'fedavgg'") as caught:
        registry.get("fedavgg")
    assert caught.value.hint == "did you mean 'fedavg'? known methods: fedavg, toy"
    with pytest.raises(MethodError) as caught:
        registry.get("zzzzzz")
    assert caught.value.hint == "known methods: fedavg, toy"


def test_methods_are_made_from_configs_and_mappings(registry: MethodRegistry) -> None:
    built = registry.build(ToyConfig(size=5))
    assert isinstance(built, Toy)
    assert built.config == ToyConfig(size=5)
    parsed = registry.parse({"name": "toy", "size": 4})
    assert isinstance(parsed, Toy)
    assert parsed.config == ToyConfig(size=4)
    assert isinstance(registry.parse(FedAvgConfig().model_dump(mode="json")), FedAvg)


def test_every_registered_method_describes_itself() -> None:
    import fedgraft.aggregation  # noqa: F401

    assert {"base", "fedavg", "flex", "local_only", "private_lora"} <= set(METHODS.names())
    for name in METHODS.names():
        method = METHODS.get(name)
        assert method.name == name
        assert method.config_class().name == name
        for text in (method.title, method.paper, method.summary):
            assert text.strip()
            assert "\n" not in text


SOURCE = """
from typing import Literal
from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS

class MineConfig(MethodConfig):
    name: Literal["mine"] = "mine"

@METHODS.add
class Mine(Method):
    name = "mine"
    title = paper = summary = "mine"
    config_class = MineConfig
"""


@pytest.mark.usefixtures("_clean_methods")
def test_a_users_file_registers_its_method_and_may_be_loaded_twice(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(SOURCE)
    load_method_file(path)
    assert "mine" in METHODS.names()
    load_method_file(path)
    assert METHODS.get("mine").title == "mine"


@pytest.mark.usefixtures("_clean_methods")
@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("def", "raised SyntaxError"),
        ("raise SystemExit(0)", "raised SystemExit"),
        ("x = 1", "registers no method"),
    ],
)
def test_a_users_file_that_fails_is_named(source: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text(source)
    with pytest.raises(MethodError, match=message):
        load_method_file(path)
    assert "fedgraft_user_broken" not in sys.modules


def test_a_missing_file_or_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="does not exist"):
        load_method_file(tmp_path / "none.py")
    path = tmp_path / "method.txt"
    path.write_text(SOURCE)
    with pytest.raises(MethodError, match="is not a Python file"):
        load_method_file(path)


class Entry:
    name, value = "extra", "package:Thing"

    def __init__(self, found: object) -> None:
        self._found = found

    def load(self) -> object:
        if isinstance(self._found, Exception):
            raise self._found
        return self._found


@pytest.mark.usefixtures("_clean_methods")
def test_entry_points_of_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    def install(found: object) -> None:
        monkeypatch.setattr(
            importlib.metadata, "entry_points", lambda *, group: [Entry(found)] if group == "fedgraft.methods" else []
        )

    install(Toy)
    load_entry_points()
    assert METHODS.get("toy") is Toy
    for wrong in (ToyConfig, Toy(ToyConfig()), 3):
        install(wrong)
        with pytest.raises(MethodError, match=r"'extra' .* is not a fedgraft Method"):
            load_entry_points()
    install(ImportError("gone"))
    with pytest.raises(MethodError, match=r"'extra' .* raised ImportError: gone"):
        load_entry_points()
    assert module.__all__
