"""The comparison of methods: what is recorded and run again, and the arithmetic of its tables."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import fedgraft
from fedgraft.platform.catalogue import list_methods

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RESULTS = BENCHMARKS / "results"


@pytest.fixture
def methods(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("methods")


@pytest.fixture
def stored(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("method_records")


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("method_tables")


def record(stored: ModuleType, label: str, seed: int, nll: list[float], partition: str = "pathological") -> dict[str, Any]:
    return {
        "partition": partition,
        "label": label,
        "seed": seed,
        "options": stored.METHODS[label],
        "rate": 0.01,
        "client_nll": nll,
        "rouge_l": 0.5,
        "retention_nll": 3.0,
        "bytes_up": 2_000_000,
        "bytes_down": 1_000_000,
        "cpu_seconds": 10.0 + seed,
        "data_fingerprint": f"data-{seed}",
        "base": "some base",
        "settings": stored.settings_of(partition),
        "versions": {"fedgraft": "1"},
    }


@pytest.fixture
def arguments(tmp_path: Path, methods: ModuleType, monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    """A command line over a model folder of a few bytes; records lie in the test's folder."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(methods, "RESULTS", tmp_path)
    monkeypatch.setattr(methods, "RECORDS", tmp_path / "methods-records.json")
    return argparse.Namespace(
        model=str(tmp_path),
        data="dolly.jsonl",
        retention="text.txt",
        runs=str(tmp_path / "runs"),
        only=["fedavg", "flex"],
        partitions=["pathological", "dirichlet-1.0"],
        seeds=[0, 1],
    )


# ---- records


def test_records_are_read_back_as_they_were_and_stand_one_on_a_line(stored: ModuleType, tmp_path: Path) -> None:
    records = [record(stored, label, seed, [1.0, 2.0]) for label in ("flex", "fedavg") for seed in (1, 0)]
    by_unit = {stored.Unit(each["partition"], each["label"], each["seed"]): each for each in records}
    stored.save(by_unit, tmp_path / "records.json")
    assert stored.load(tmp_path / "records.json") == by_unit
    lines = (tmp_path / "records.json").read_text().splitlines()
    found = [line for line in lines if '"client_nll"' in line]
    assert [json.loads(line.rstrip(","))["label"] for line in found] == ["fedavg", "fedavg", "flex", "flex"]
    assert sum('"max_train_examples"' in line for line in lines) == 1


def test_a_kept_record_is_read_with_the_new_ones(stored: ModuleType, tmp_path: Path) -> None:
    kept = record(stored, "flex", 2, [1.0])
    stored.keep(kept, tmp_path)
    assert stored.read_new(tmp_path) == {stored.Unit("pathological", "flex", 2): kept}
    assert stored.load(tmp_path / "none.json") == {}


def test_settings_hold_no_path(stored: ModuleType) -> None:
    assert all("/" not in json.dumps(stored.settings_of(partition)) for partition in stored.PARTITIONS)


def test_what_has_a_record_in_the_repository_or_the_run_folder_is_not_run_again(
    methods: ModuleType, stored: ModuleType, arguments: argparse.Namespace
) -> None:
    base = stored.base_digest(Path(arguments.model))
    first = record(stored, "fedavg", 0, [1.0]) | {"base": base}
    stored.save({stored.Unit("pathological", "fedavg", 0): first}, methods.RECORDS)
    stored.keep(record(stored, "flex", 0, [1.0], "dirichlet-1.0") | {"base": base}, Path(arguments.runs) / "records")
    assert methods.left_to_run(arguments) == [
        ("dirichlet-1.0", "fedavg", 0),
        ("pathological", "flex", 0),
        ("pathological", "fedavg", 1),
        ("dirichlet-1.0", "fedavg", 1),
        ("pathological", "flex", 1),
        ("dirichlet-1.0", "flex", 1),
    ]


@pytest.mark.parametrize("change", ["base", "options", "settings"])
def test_what_was_made_otherwise_is_run_again(
    methods: ModuleType, stored: ModuleType, arguments: argparse.Namespace, change: str
) -> None:
    base = stored.base_digest(Path(arguments.model))
    changed = {"base": "another", "options": {"name": "flex", "graft": 2}, "settings": stored.settings_of("dirichlet-0.1")}
    stored.keep(record(stored, "flex", 0, [1.0]) | {"base": base, change: changed[change]}, Path(arguments.runs) / "records")
    stored.keep(record(stored, "flex", 1, [1.0]) | {"base": base}, Path(arguments.runs) / "records")
    left = methods.left_to_run(arguments)
    assert ("pathological", "flex", 0) in left
    assert ("pathological", "flex", 1) not in left


def test_a_partition_that_asks_for_labels_gets_only_those(stored: ModuleType) -> None:
    units = list(stored.units_of(["pathological-long-search", "pathological"], ["scaffold", "flex"], [3]))
    assert units == [
        ("pathological", "scaffold", 3),
        ("pathological-long-search", "flex", 3),
        ("pathological", "flex", 3),
    ]


def test_every_method_is_compared_with_options_that_it_takes(
    methods: ModuleType, stored: ModuleType, arguments: argparse.Namespace
) -> None:
    assert {options["name"] for options in stored.METHODS.values()} == {info.name for info in list_methods() if info.is_builtin}
    for label in stored.METHODS:
        config = fedgraft.load_config(
            None, methods.overrides(arguments, stored.Unit("dirichlet-0.1", label, 7)), checks_files=False
        )
        assert list(config.methods()) == [label]
        assert config.seeds == (7,)


def test_rates_are_searched_longer_only_where_the_partition_says_so(
    methods: ModuleType, stored: ModuleType, arguments: argparse.Namespace
) -> None:
    rounds = {}
    for partition in stored.PARTITIONS:
        config = fedgraft.load_config(None, methods.overrides(arguments, stored.Unit(partition, "flex", 0)), checks_files=False)
        assert config.rate_search is not None
        rounds[partition] = config.rate_search.rounds
        assert config.federation.rounds == 4
    assert rounds == {"pathological": 1, "dirichlet-0.1": 1, "dirichlet-1.0": 1, "pathological-long-search": 4}


def test_a_file_that_is_not_there_is_named_before_anything_runs(
    methods: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(methods, "run_all", lambda arguments: pytest.fail("nothing is to run"))
    command = ["methods.py", "run", "--model", str(tmp_path), "--data", f"{tmp_path}/none.jsonl", "--retention", str(tmp_path)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as caught:
        methods.main()
    assert caught.value.code == 2
    assert f"{tmp_path}/none.jsonl does not exist" in capsys.readouterr().err


# ---- tables


@pytest.mark.parametrize(
    ("pairs", "mean", "error"),
    [
        ([[1.0, 3.0]], 2.0, 1.0),  # two clients: deviation sqrt(2), over sqrt(2)
        ([[1.0, 3.0], [1.0, 3.0]], 2.0, 1.0),  # seeds agree: the clients' error, not the smaller one of four values
        ([[0.0, 0.0], [2.0, 2.0]], 1.0, 1.0),  # clients agree: the seeds' error
        ([[-1.0, 1.0], [1.0, -1.0]], 0.0, 0.0),
    ],
)
def test_the_error_of_a_difference_is_the_larger_over_clients_and_over_seeds(
    tables: ModuleType, pairs: list[list[float]], mean: float, error: float
) -> None:
    assert tables.difference(pairs) == pytest.approx((mean, error))


@pytest.mark.parametrize(("mean", "found"), [(0.19, "tie"), (-0.19, "tie"), (0.21, "loss"), (-0.21, "win")])
def test_a_difference_within_two_errors_is_a_tie(tables: ModuleType, mean: float, found: str) -> None:
    assert tables.verdict(mean, 0.1) == found


def test_methods_are_paired_with_fedavg_by_seed(tables: ModuleType, stored: ModuleType) -> None:
    records = [
        record(stored, "fedavg", 0, [4.0, 5.0]),
        record(stored, "fedavg", 1, [3.0, 3.0]),
        record(stored, "flex", 1, [3.5, 3.1]),
        record(stored, "flex", 2, [9.0, 7.0]),  # FedAvg has no such seed
    ]
    found = tables.table_of(records)
    assert found["fedavg"]["seeds"] == [0, 1]
    assert found["fedavg"]["own_nll"] == pytest.approx(3.75)
    assert found["fedavg"]["worst_nll"] == pytest.approx(4.0)
    assert "difference_to_fedavg" not in found["fedavg"]
    flex = found["flex"]
    assert flex["difference_to_fedavg"] == pytest.approx(0.3)
    assert flex["difference_error"] == pytest.approx(0.2)
    assert flex["num_pairs"] == 1
    assert flex["verdict"] == "tie"
    assert flex["num_seeds"] == 2
    assert flex["own_nll"] == pytest.approx((3.3 + 8.0) / 2)
    assert flex["mb_up"] == pytest.approx(2.0)
    assert flex["cpu_seconds"] == pytest.approx(11.5)


def test_other_data_or_another_base_is_not_compared(tables: ModuleType, stored: ModuleType) -> None:
    one = record(stored, "fedavg", 0, [4.0, 5.0])
    for name in ("data_fingerprint", "base"):
        with pytest.raises(SystemExit, match="seed 0"):
            tables.table_of([one, record(stored, "flex", 0, [4.0, 5.0]) | {name: "other"}])


def test_a_row_without_records_stays_until_there_are_as_many_seeds(tables: ModuleType, stored: ModuleType) -> None:
    earlier = {
        "pathological": {
            "flex": {"num_seeds": 2, "own_nll": 1.0, "difference_to_fedavg": 0.3, "difference_error": 0.1, "is_earlier": True},
            "fedavg": {"num_seeds": 2, "own_nll": 1.0, "is_earlier": True},
            "local": {"num_seeds": 1},
        }
    }
    one = [record(stored, "flex", 0, [4.0, 5.0])]
    found = {"pathological": tables.table_of(one)}
    tables.add_earlier(found, earlier)
    assert found["pathological"]["flex"]["own_nll"] == 1.0
    assert found["pathological"]["flex"]["verdict"] == "loss"
    assert "verdict" not in found["pathological"]["fedavg"]
    assert "local" not in found["pathological"]
    assert "| flex (earlier) |" in tables.markdown(found["pathological"])
    found = {"pathological": tables.table_of([*one, record(stored, "flex", 1, [4.0, 5.0])])}
    tables.add_earlier(found, earlier)
    assert found["pathological"]["flex"]["own_nll"] == pytest.approx(4.5)


def test_the_best_difference_comes_first(tables: ModuleType, stored: ModuleType) -> None:
    records = [
        record(stored, "fedavg", 0, [4.0, 5.0]),
        record(stored, "fedavg", 1, [2.0, 2.0]),
        record(stored, "flex", 0, [3.9, 4.9]),  # better than FedAvg, though its one seed is the harder one
        record(stored, "local", 1, [2.5, 2.5]),
    ]
    lines = tables.markdown(tables.table_of(records)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| flex", "| fedavg", "| local"]


def test_the_line_under_a_table_counts_and_names_what_is_missing(tables: ModuleType, stored: ModuleType) -> None:
    values = {"fedavg": [4.0, 5.0], "flex": [3.9, 4.9], "local": [4.1, 5.1], "fedprox": [4.1, 4.9], "scaffold": [4.2, 5.2]}
    table = tables.table_of([record(stored, label, 0, nll) for label, nll in values.items()])
    line = tables.tally(table, ["flex", "base", "fedavg", "pm-moe"])
    assert line == "Against FedAvg: 1 better, 1 tied, 2 worse. Not run: base, pm-moe."
    assert tables.tally(table, ["flex"]).endswith("Not run: none.")


def test_what_is_published_is_what_the_records_say(tables: ModuleType, stored: ModuleType) -> None:
    known = stored.load(RESULTS / "methods-records.json")
    published = json.loads((RESULTS / "methods.json").read_text())["partitions"]
    page = (RESULTS / "methods.md").read_text()
    assert all(stored.fits(each) for each in known.values())
    for partition, rows in published.items():
        made = tables.table_of(each for unit, each in known.items() if unit.partition == partition)
        assert {label: row for label, row in rows.items() if not row.get("is_earlier")} == {
            label: row for label, row in made.items() if not rows[label].get("is_earlier")
        }
        assert f"{tables.markdown(rows)}\n\n{tables.tally(rows, stored.labels_of(partition))}" in page
