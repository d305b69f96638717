"""Spoilt configurations through the command: each is valid or one message with exit code 2; and the oddest of them by name."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.loading import load_config
from fedgraft.platform.pretraining.loading import load_pretrain_config
from fedgraft.registry import METHODS

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was() -> Iterator[None]:
    known = dict(METHODS._classes)
    yield
    METHODS._classes = known


@pytest.fixture
def fuzz(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("config_fuzz")


def problems(source: object, *overrides: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    assert str(caught.value).isascii()
    return {problem.path: problem for problem in caught.value.problems}


def test_every_mutation_is_valid_or_one_message_with_exit_code_2(fuzz: ModuleType) -> None:
    counts, bad = fuzz.run(80, seed=0)  # benchmarks/config_fuzz.py makes thousands
    print(counts)
    assert not bad, "\n\n".join(f"{mutation}\n{outcome.wrong}\n{outcome.text}" for mutation, outcome in bad[:5])
    assert counts["valid"] >= 4
    assert counts["refused"] >= 48
    assert counts["valid"] + counts["refused"] == 80


def test_mutations_start_from_every_shown_file_and_are_the_same_for_a_seed(fuzz: ModuleType) -> None:
    names = set(fuzz.bases())
    assert {"examples/pretrain.yaml", "fedgraft/platform/quickstart.yaml", "fedgraft/platform/pretrain.yaml"} <= names
    first = [mutation for _, mutation in zip(range(60), fuzz.mutations(3), strict=False)]
    assert {mutation.base for mutation in first} == names
    assert first == [mutation for _, mutation in zip(range(60), fuzz.mutations(3), strict=False)]
    assert len({mutation.how for mutation in first}) > 20


def test_aliases_of_aliases_are_refused_before_they_fill_memory(tmp_path: Path, fuzz: ModuleType) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text("a: &a [x]\n" + fuzz.BOMB + "method: {name: base}\n")
    started = time.process_time()
    found = problems(path)
    assert "aliases counted as often as they are used" in found["<file>"].hint
    assert time.process_time() - started < 5


def test_a_file_of_data_is_not_read_as_a_configuration(tmp_path: Path) -> None:
    path = tmp_path / "data.yaml"
    path.write_text("- x\n" * 300_000)
    found = problems(path)["<file>"]
    assert found.expected == "a YAML file of at most 1024 KiB"


@pytest.mark.parametrize("text", ["!!timestamp 1", "!!bool x", "!!int [1]", "!!float ''", "!!int ''", "x: !!binary 'a'"])
def test_a_tag_that_does_not_fit_its_value_is_no_yaml(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tag.yaml"
    path.write_text(f"name: {text}\nmethod: {{name: base}}\n" if ": " not in text else f"{text}\n")
    assert problems(path)["<file>"].expected == "YAML"


LONG = "a" * 300


@pytest.mark.parametrize("key", ["data.path", "data.retention.path", "model.path", "output.folder", "output.cache"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("~nobody-here/x", "home"),
        (LONG, "file name too long"),
        ('"a\\0b"', "null byte"),
    ],
)
def test_a_path_that_cannot_be_looked_up_says_why(key: str, value: str, reason: str) -> None:
    found = problems({"method": {"name": "base"}}, f"{key}={value}")[key]
    assert reason in f"{found.expected} {found.hint}"


@pytest.mark.parametrize("name", ["~nobody-here/x.yaml", LONG, "a\0b", "no/such.yaml", "."])
def test_a_configuration_at_an_odd_path_is_one_problem(name: str) -> None:
    for command in ("run", "pretrain"):
        done = CliRunner().invoke(app, [command, name])
        assert done.exit_code == 2, done.output
        assert "<file>: got" in done.stderr
    assert problems({"method": {"name": "base"}}, f"method_files=['{LONG}']")["method_files[0]"].hint.startswith(
        "file name too long"
    )
    with pytest.raises(ConfigError, match=r"tokenizer\.path"):
        load_pretrain_config({}, ["tokenizer={path: " + LONG + "}"])


@pytest.mark.parametrize("given", [".inf", "-.inf", ".nan", "1e400"])
@pytest.mark.parametrize(
    "key", ["federation.task_timeout_s", "training.max_grad_norm", "executor.start_timeout_s", "method.adapter.alpha"]
)
def test_numbers_are_finite(key: str, given: str) -> None:
    assert problems({"method": {"name": "flex"}}, f"{key}={given}")[key].expected.startswith("a number")


def test_what_a_key_holds_cannot_reach_the_terminal() -> None:
    found = problems({"method": {"name": "base"}, "\x1b[31mred\n": 1})
    assert list(found) == ["\\x1b[31mred"]
