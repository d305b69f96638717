"""Configurations from files and overrides, and what users read when something is wrong with them."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgraft.aggregation.fedavg import FedAvgConfig
from fedgraft.aggregation.flex import FlexConfig
from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.config import RunConfig
from fedgraft.platform.loading import check_inputs, dump_config, load_config
from fedgraft.platform.validation import show_value
from fedgraft.registry import METHODS


@pytest.fixture(autouse=True)
def _registry_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))


FLEX: dict[str, Any] = {"method": {"name": "flex"}}


def problems(source: object = None, *overrides: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)  # type: ignore[arg-type]
    found = {problem.path: problem for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems), "a place was reported twice"
    return found


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


# What loads.


def test_without_a_file_the_packaged_quickstart_is_loaded() -> None:
    config = load_config()
    assert config.name == "quickstart"
    assert [method.name for method in config.methods().values()] == [
        "base",
        "local_only",
        "fedavg",
        "flex",
        "flex",
        "private_lora",
    ]
    assert config.model.is_bundled
    assert config.data.is_bundled
    assert config.rate_search is not None


def test_override_values_are_yaml() -> None:
    config = load_config(
        FLEX,
        [
            "seeds=[0, 1]",
            "federation.rounds=3",
            "data.partition={name: dirichlet, alpha: 0.1}",
            "data.num_clients=4",
            "training.max_grad_norm=null",
            "training.learning_rate=1e-4",
            "name=a-b",
        ],
    )
    assert config.seeds == (0, 1)
    assert config.federation.rounds == 3
    assert config.data.partition.name == "dirichlet"
    assert config.training.max_grad_norm is None
    assert config.training.learning_rate == 1e-4
    assert config.name == "a-b"


def test_only_the_first_equals_sign_splits_an_override() -> None:
    config = load_config(FLEX, ["tracking.uri=http://host/?a=b"])
    assert config.tracking.uri == "http://host/?a=b"


def test_later_overrides_win_and_missing_mappings_are_made() -> None:
    config = load_config(FLEX, ["method.adapter.rank=2", "method.adapter.rank=4", "rate_search.rates=[0.1, 0.2]"])
    assert config.method == FlexConfig.model_validate({"name": "flex", "adapter": {"rank": 4}})
    assert config.rate_search is not None
    assert config.rate_search.rates == (0.1, 0.2)


def test_an_override_reaches_one_method_of_a_comparison() -> None:
    config = load_config(None, ["compare.methods.flex.n_graft=2"])
    methods = config.methods()
    assert isinstance(methods["flex"], FlexConfig)
    assert isinstance(methods["flex-random"], FlexConfig)
    assert methods["flex"].n_graft == 2
    assert methods["flex-random"].n_graft == 1


def test_an_override_finds_a_label_with_dots() -> None:
    source = {"compare": {"methods": {"flex-0.5": {"name": "flex"}, "flex-0": {"name": "flex"}}}}
    config = load_config(source, ["compare.methods.flex-0.5.n_graft=3"])
    assert [method.n_graft for method in config.methods().values()] == [3, 1]  # type: ignore[attr-defined]


def test_a_method_override_replaces_a_comparison_and_the_other_way_round() -> None:
    assert load_config(None, ["method.name=fedavg"]).methods() == {"fedavg": FedAvgConfig()}
    config = load_config(FLEX, ["compare.methods.a.name=fedavg", "compare.methods.b.name=base"])
    assert list(config.methods()) == ["a", "b"]
    found = problems(None, "method.name=fedavg", "compare.methods.a.name=base")
    assert "both" in found["compare"].value


def test_source_is_left_alone_and_may_hold_config_objects() -> None:
    source: dict[str, Any] = {"method": FlexConfig(n_graft=2), "federation": {"rounds": 2}}
    before = copy.deepcopy(source)
    config = load_config(source, ["federation.rounds=5"])
    assert source == before
    assert config.method == FlexConfig(n_graft=2)
    assert load_config(config.model_dump(exclude_unset=True), ["method.n_graft=3"]).method == FlexConfig(n_graft=3)


def test_home_is_expanded_and_relative_paths_are_left_to_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    config = load_config({**FLEX, "model": {"path": "~/model"}, "output": {"cache": "~/cache", "folder": "there"}})
    assert config.model.path == tmp_path / "model"
    assert config.output.cache == tmp_path / "cache"
    assert config.output.folder == Path("there")


# One problem each.


@pytest.mark.parametrize(
    ("override", "path", "value", "expected"),
    [
        ("federation.rounds=-1", "federation.rounds", "-1", "a whole number from 0 to 1000000"),
        ("federation.rounds=2.5", "federation.rounds", "2.5", "a whole number from 0"),
        ("federation.rounds=many", "federation.rounds", "'many'", "a whole number"),
        ("federation.rounds=yes", "federation.rounds", "true", "a whole number"),
        ("rate_search.rates=[true, 2]", "rate_search.rates[0]", "true", "a number"),
        ("federation.cohort_size=0", "federation.cohort_size", "0", "at least 1, or null"),
        ("executor.threads=999", "executor.threads", "999", "from 1 to 256"),
        ("training.weight_decay=11", "training.weight_decay", "11", "a number from 0 to 10"),
        ("executor.kind=rya", "executor.kind", "'rya'", "one of ray, in_process; did you mean 'ray'?"),
        ("data.partition.name=dirichlt", "data.partition.name", "'dirichlt'", "did you mean 'dirichlet'?"),
        ("data.partition={alpha: 1}", "data.partition.name", "nothing", "one of natural, dirichlet"),
        ("data.partition={name: dirichlet, alpha: 0}", "data.partition.alpha", "0", "a number above 0 and at most 1000000"),
        ("data.partition={name: dirichlet, alhpa: 1}", "data.partition.alhpa", "1", "did you mean 'alpha'?"),
        ("federation.round=3", "federation.round", "3", "did you mean 'rounds'?"),
        ("rounds=3", "rounds", "3", "did you mean federation.rounds"),
        ("n_graft=3", "n_graft", "3", "did you mean method.n_graft (of flex, private_lora)"),
        ("zzz=3", "zzz", "3", "a known key: name, seeds, model"),
        ("seeds=3", "seeds", "3", "a list"),
        ("seeds=[0, 0]", "seeds", "[0, 0]", "different seeds"),
        ("seeds=[0, x]", "seeds[1]", "'x'", "a whole number"),
        ("model=big", "model", "'big'", "a mapping with some of the keys path, name"),
        ("name=3", "name", "3", "text"),
        ("name=a b", "name", "'a b'", "text of the form"),
        ("output.report=7", "output.report", "7", "true or false"),
        ("data.preset=custom", "data", "{", "options that go together"),
        ("compare.methods.flex.n_grafts=2", "compare.methods.flex.n_grafts", "2", "did you mean 'n_graft'?"),
        ("compare.methods.flex.adapter.rank=0", "compare.methods.flex.adapter.rank", "0", "from 1 to 4096"),
        ("compare.methods.fedavg.lora=[atention]", "compare.methods.fedavg.lora[0]", "'atention'", "did you mean 'attention'"),
        (
            "compare.methods.x.name=fedavgg",
            "compare.methods.x.name",
            "'fedavgg'",
            "did you mean 'fedavg' or 'fedavgm'? known: base,",
        ),
        ("compare.methods.x={n_graft: 1}", "compare.methods.x.name", "nothing", "a method's name: base, centralised"),
        ("compare.methods.x=flex", "compare.methods.x", "'flex'", "a mapping with a name"),
        ("compare.methods={}", "compare.methods", "{}", "at least one"),
        ("compare.methods.a/b.name=base", "compare.methods", "{", "letters, digits, spaces"),
        ("method.name=flexx", "method.name", "'flexx'", "did you mean 'flex' or"),
        ("federation", "<overrides>", "'federation'", "key.path=value"),
        ("=3", "<overrides>", "'=3'", "key.path=value"),
        ("federation..rounds=3", "<overrides>", "'federation..rounds=3'", "key.path=value"),
        ("federation.rounds.x=3", "federation.rounds.x", "a value there: 6", "a mapping at federation.rounds to set x in"),
        ("rate_search.rates.0=3", "rate_search.rates.0", "a list there: [", "a mapping at rate_search.rates to set 0 in"),
        ("data={path: a, path: b}", "data.path", "this key in line 1 and again", "each key once"),
        ("data.path=[1", "data.path", "'[1'", "a YAML value"),
        ("rate_search={}", "rate_search.rates", "nothing", "a value for this key"),
        ("training.learning_rate=0.1", "training.learning_rate", "0.1", "options that go together"),
    ],
)
def test_a_problem_names_its_place_its_value_and_what_was_expected(override: str, path: str, value: str, expected: str) -> None:
    found = problems(None, override)
    assert list(found) == [path]
    assert found[path].value.startswith(value)
    assert expected in found[path].expected
    if path != "<overrides>":
        assert "from the command line" in found[path].hint or path in ("data", "compare.methods")


def test_options_of_a_method_that_have_no_effect_are_explained() -> None:
    found = problems({"method": {"name": "flex", "gate_closed": True, "gate_bias": 1}})
    assert list(found) == ["method"]
    assert "gate_bias has no effect with gate_closed: true" in found["method"].hint


@pytest.mark.parametrize(
    "source", [{}, {"method": None}, {"method": {"name": "base"}, "compare": {"methods": {"a": {"name": "base"}}}}]
)
def test_exactly_one_of_method_and_compare(source: dict[str, Any]) -> None:
    (found,) = problems(source).values()
    assert found.expected == "exactly one of method (one method) and compare (several)"


# Several problems at once.


def test_all_problems_of_a_file_are_reported_in_its_order_with_their_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """\
name: x
federation:
  rounds: -1
  cohort_size: 2
  batch_sise: 4
data:
  path: nowhere.jsonl
  partition: {name: dirichlet, alpha: none}
compare:
  methods:
    a: {name: flexx}
    b: {name: flex, n_graft: 99, mode: aditive}
    c: {name: fedavg}
training:
  learning_rate: 0.1
rate_search:
  rates: [0.1, 0.2]
method_files: [mine.py]
""",
    )
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["engine.name=torhc"])
    lines = {problem.path: problem for problem in caught.value.problems}
    assert list(lines) == [
        "federation.rounds",
        "federation.batch_sise",
        "data.path",
        "data.partition.alpha",
        "compare.methods.a.name",
        "compare.methods.b.n_graft",
        "compare.methods.b.mode",
        "training.learning_rate",
        "method_files[0]",
        "engine.name",
    ]
    assert lines["federation.rounds"].hint == "line 3"
    assert "line 12" in lines["compare.methods.b.n_graft"].hint
    assert "from the command line" in lines["engine.name"].hint
    text = str(caught.value)
    assert text.startswith(f"{path}: 10 problems\n")
    assert "  federation.rounds: got -1; expected a whole number from 0 to 1000000 (line 3)" in text
    assert text.isascii()


def test_missing_files_are_reported_together_with_the_nearest_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dolly15k.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").write_text("")
    source = {
        **FLEX,
        "data": {"path": "dolly5k.jsonl", "retention": {"path": "r.txt"}, "questions": {"path": str(tmp_path / "q.jsonl")}},
        "model": {"path": "empty"},
        "output": {"folder": "taken"},
        "method_files": ["m.py"],
    }
    found = problems(source)
    assert set(found) == {
        "data.path",
        "data.retention.path",
        "data.questions.path",
        "model.path",
        "output.folder",
        "method_files[0]",
    }
    assert found["data.path"].hint == "did you mean 'dolly15k.jsonl'?"
    assert found["data.retention.path"].hint == f"relative to {tmp_path}"
    assert found["model.path"].expected == "a folder with a config.json"
    assert found["output.folder"].expected == "a folder, not a file"
    without = {key: value for key, value in source.items() if key != "method_files"}
    config = load_config(without, checks_files=False)
    with pytest.raises(ConfigError) as caught:
        check_inputs(config)
    assert {problem.path for problem in caught.value.problems} == set(found) - {"method_files[0]"}
    check_inputs(load_config())


# Files that are no YAML mapping.


def test_a_syntax_error_says_line_and_column(tmp_path: Path) -> None:
    found = problems(write(tmp_path, "name: x\nseeds: [0, 1\nmodel: {}\n"))
    assert "line 3, column 6" in found["<file>"].value


@pytest.mark.parametrize(
    ("text", "path", "part"),
    [
        ("- a\n", "<root>", "a mapping of keys to values"),
        ("", "method", "exactly one of"),
        ("name: a\nname: b\nmethod: {name: base}\n", "name", "each key once"),
        ("method: {name: base, name: base}\n", "method.name", "each key once"),
        ("method: {name: base}\n3: x\n", "3", "a text"),
        ("method: {name: base}\nname: 2020-13-45\n", "<file>", "YAML"),
        ("method: {name: base}\ndata: &a [*a]\n", "data[0]", "a value"),
        ("method: !!python/object:os.system {}\n", "<file>", "YAML"),
        ("[" * 5000, "<file>", "YAML"),
        ("a: \x00", "<file>", "YAML"),
    ],
)
def test_other_files_are_refused_with_a_reason(tmp_path: Path, text: str, path: str, part: str) -> None:
    found = problems(write(tmp_path, text))
    assert part in found[path].expected


def test_merge_keys_are_no_duplicates(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "compare:\n  methods:\n    a: &a {name: flex, n_graft: 2}\n    b: {<<: *a, n_graft: 3}\n",
    )
    assert [method.n_graft for method in load_config(path).methods().values()] == [2, 3]  # type: ignore[attr-defined]


def test_a_missing_file_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path, "method: {name: base}\n")
    assert "did you mean 'config.yaml'?" in problems(tmp_path / "confg.yaml")["<file>"].hint
    assert "folder" in problems(tmp_path)["<file>"].hint
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\xff")
    assert "UTF-8" in problems(tmp_path / "bytes.yaml")["<file>"].expected


# A user's own method.

OWN = """
from typing import Literal
from pydantic import Field, model_validator
from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS

class OwnConfig(MethodConfig):
    name: Literal["own_loading_test"] = "own_loading_test"
    share: float = Field(default=0.5, gt=0, le=1)
    choice: int | Literal["auto"] = "auto"

    @model_validator(mode="after")
    def _check(self):
        if self.share == 0.25:
            raise KeyError("a bug in a user's check")
        return self

@METHODS.add
class Own(Method):
    name = "own_loading_test"
    title = paper = summary = "own"
    config_class = OwnConfig
"""


def test_options_of_a_users_method_are_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own_loading_test.py").write_text(OWN)
    source = {"method": {"name": "own_loading_test", "share": 0.3}, "method_files": ["own_loading_test.py"]}
    assert load_config(source).method.share == 0.3  # type: ignore[union-attr]
    assert problems(source, "method.share=2")["method.share"].expected == "a number above 0 and at most 1"
    assert "did you mean 'share'?" in problems(source, "method.shar=1")["method.shar"].expected
    found = problems(source, "method.choice=atuo")["method.choice"].expected
    assert "a whole number" in found
    assert "auto" in found
    assert "KeyError" in problems(source, "method.share=0.25")["method"].hint


def test_a_broken_method_file_is_a_problem(tmp_path: Path) -> None:
    path = tmp_path / "broken_loading_test.py"
    path.write_text("1 / 0\n")
    found = problems({**FLEX, "method_files": [str(path)]})["method_files[0]"]
    assert found.expected == "a Python file that can be imported"
    assert "ZeroDivisionError" in found.hint


def test_a_heartbeat_that_would_have_no_effect_is_refused() -> None:
    found = problems(None, "executor={kind: in_process, heartbeat_timeout_s: 30}")
    assert "heartbeat_timeout_s has no effect with kind: in_process" in found["executor"].hint
    found = problems(None, "executor.heartbeat_timeout_s=30", "federation.task_timeout_s=30")
    assert "federation.task_timeout_s is not longer" in found["executor.heartbeat_timeout_s"].hint
    assert (
        "from 5 to 100000000, or null"
        in problems(None, "executor.heartbeat_timeout_s=4")["executor.heartbeat_timeout_s"].expected
    )
    assert load_config(None, ["executor.heartbeat_timeout_s=30"], checks_files=False).executor.heartbeat_s == 30
    assert load_config(None, checks_files=False).executor.heartbeat_s == 60


# Writing.


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["method={name: flex, granularity: neuron, graft_neuron_fraction: 0.5}"],
        ["method={name: flex, gate_closed: true}", "rate_search=null", "training.learning_rate=1e-5"],
        ["method={name: private_lora, private_rank: 3}", "training.optimizer=sgd"],
        ["method={name: fedavg, lora: [], full: [experts]}"],
        ["method.name=base", "data.partition={name: quantity, sizes: dirichlet, alpha: 2}"],
        ["data.path=/x", "data.preset=custom", "data.fields={prompt: a, response: b}", "model.path=/y", "seeds=[3, 4]"],
        ["executor={kind: in_process}", "output.cache=/c", "federation.task_timeout_s=1e+8", "name='007'"],
    ],
)
def test_a_dump_loads_back_to_an_equal_config(overrides: list[str], tmp_path: Path) -> None:
    config = load_config(None, overrides, checks_files=False)
    text = dump_config(config)
    path = write(tmp_path, text)
    assert load_config(path, checks_files=False) == config
    assert dump_config(load_config(path, checks_files=False)) == text


def test_a_dump_states_defaults_as_plain_yaml() -> None:
    tree = yaml.safe_load(dump_config(load_config(None, ["data.path=/x"], checks_files=False)))
    assert tree["federation"]["batch_size"] == 8
    assert tree["data"]["path"] == "/x"
    assert tree["seeds"] == [0]
    assert tree["federation"]["cohort_size"] is None
    assert tree["compare"]["methods"]["flex"]["mode"] == "additive"
    assert "learning_rate" not in tree["training"], "stating it beside rate_search would be refused"


def test_values_are_shown_short_and_in_ascii() -> None:
    assert show_value("a\nb\u00e9") == "'a\\nb\\xe9'"
    assert show_value({"a": [1, None, True]}) == "{a: [1, null, true]}"
    assert len(show_value(list(range(1000)))) <= 72


# Whatever stands in a file, the answer is a config or a ConfigError.

JUNK = [
    None,
    True,
    -1,
    0,
    3.5,
    float("nan"),
    float("inf"),
    10**30,
    "",
    "text",
    "1e-3",
    [],
    [1, "a", None],
    {},
    {"name": 3},
    {"a": {}},
]
BASES: list[dict[str, Any]] = [
    {
        "name": "a",
        "seeds": [0, 1],
        "data": {"partition": {"name": "dirichlet", "alpha": 0.3}, "num_clients": 5, "retention": {"max_examples": 3}},
        "federation": {"rounds": 2, "cohort_size": 3, "min_clients": 2},
        "method": {"name": "flex", "n_graft": 2, "adapter": {"rank": 4}},
        "executor": {"kind": "ray", "replicas": 2},
        "tracking": {"enabled": False},
        "method_files": [],
    },
    {
        "compare": {
            "methods": {"x": {"name": "fedavg", "lora": ["attention"]}, "y": {"name": "private_lora", "private_rank": 2}}
        },
        "rate_search": {"rates": [0.1, 0.2], "rounds": 1},
        "data": {"path": "/d", "preset": "custom", "fields": {"prompt": "p", "response": "r"}, "partition": {"name": "natural"}},
        "model": {"name": "hub/model"},
    },
]


def mutate(tree: dict[str, Any], rng: random.Random) -> None:
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            places.append((value, key))
            walk(value[key])

    walk(tree)
    holder, key = rng.choice(places)
    kind = rng.choice(["drop", "rename", "retype", "add"])
    if kind == "drop":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[rng.choice([str(key)[:-1], f"{key}s", 7, "method", "name"])] = holder.pop(key)
    elif kind == "add" and isinstance(holder, dict):
        holder[rng.choice(["extra", "alpha", "full", "preset"])] = copy.deepcopy(rng.choice(JUNK))
    else:
        holder[key] = copy.deepcopy(rng.choice(JUNK))


@pytest.mark.parametrize("seed", range(60))
def test_a_mutated_config_loads_or_is_a_config_error(seed: int) -> None:
    rng = random.Random(seed)
    tree = copy.deepcopy(rng.choice(BASES))
    for _ in range(rng.randint(1, 3)):
        mutate(tree, rng)
    error: ConfigError | None = None
    try:
        config = load_config(tree, checks_files=rng.random() < 0.5)
    except ConfigError as caught:
        error = caught
    if error is not None:
        assert error.problems
        assert all(problem.path and problem.value and problem.expected for problem in error.problems)
        assert str(error).isascii()
    else:
        assert isinstance(config, RunConfig)
        dump_config(config)


@pytest.mark.parametrize(
    ("method", "training", "said"),
    [
        ("{name: flex, persist_optimizer: true}", "{optimizer: sgd}", "persist_optimizer has no effect"),
        ("{name: scaffold, control: option_ii}", "{optimizer: adamw}", "control: option_ii needs training.optimizer: sgd"),
        ("{name: scaffold, control: option_ii}", "{optimizer: sgd}", "training.max_grad_norm: null"),
        ("{name: flex, server: {name: scaffold, control: option_ii}}", "{optimizer: adamw}", "flex: control: option_ii needs"),
        ("{name: centralised}", "{optimizer: sgd}", "trains with adamw only"),
    ],
)
def test_a_method_refuses_a_local_optimiser_that_it_cannot_work_with(method: str, training: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config({}, [f"method={method}", f"training={training}"])
    assert said in str(caught.value)


def test_option_ii_of_scaffold_works_with_plain_sgd() -> None:
    plain = "training={optimizer: sgd, max_grad_norm: null}"
    config = load_config({}, ["method={name: scaffold, control: option_ii}", plain])
    assert config.training.spec().optimizer == "sgd"
