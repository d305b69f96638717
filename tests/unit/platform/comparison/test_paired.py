"""Paired tests, against published corrections, scipy's own values and pairs made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from rich.console import Console
from scipy import stats

from fedgraft.errors import ResultsError
from fedgraft.platform.comparison import Comparison, compare
from fedgraft.platform.comparison.paired import holm

MakeExperiment = Callable[..., Path]


def noise(seed: int, client: int) -> float:
    return 0.1 * math.sin(7 * seed + 3 * client)


def test_holm_is_the_step_down_correction() -> None:
    # Holm (1979): 0.01 x 4, then 0.013 x 3 = 0.039 raised to 0.04, 0.03 x 2 = 0.06, 0.04 raised to 0.06.
    assert holm(np.array([0.03, 0.01, 0.04, 0.013])).tolist() == pytest.approx([0.06, 0.04, 0.06, 0.04])
    corrected = holm(np.array([0.04, math.nan, 0.9]))
    assert corrected[[0, 2]].tolist() == pytest.approx([0.08, 0.9])  # what was not tested counts for nothing
    assert math.isnan(corrected[1])
    assert holm(np.array([0.7, 0.8])).tolist() == [1.0, 1.0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, experiment_folder: MakeExperiment) -> Comparison:
    """Three methods, eight clients, two seeds: ``b`` is better by 0.2 and a little noise, ``c`` is ``fedavg`` exactly."""
    folder = experiment_folder(
        tmp_path_factory.mktemp("runs") / "x",
        {
            "b": lambda seed, client: 1.8 + 0.05 * client + noise(seed, client),
            "fedavg": lambda seed, client: 2.0 + 0.05 * client,
            "c": lambda seed, client: 2.0 + 0.05 * client,
        },
    )
    return compare([folder])


def test_pairs_are_clients_with_seeds_against_fedavg(found: Comparison) -> None:
    assert (found.baseline, found.is_baseline_named) == ("fedavg", False)
    row = found.tests.set_index("setting").loc["b"]
    differences = np.array([-0.2 + noise(seed, client) for seed in (0, 1) for client in range(8)])
    assert (row["num_pairs"], row["num_clients"], row["num_seeds"], row["seeds_better"]) == (16, 8, 2, 2)
    assert row["difference"] == pytest.approx(differences.mean())
    assert row["wilcoxon_p"] == pytest.approx(stats.wilcoxon(differences).pvalue)
    expected = stats.ttest_1samp(differences, 0.0)
    assert row["t_p"] == pytest.approx(expected.pvalue)
    assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    by_seed = differences.reshape(2, 8).mean(axis=1)
    assert row["seed_p"] == pytest.approx(stats.ttest_1samp(by_seed, 0.0).pvalue)
    assert row["wilcoxon_holm"] == pytest.approx(2 * row["wilcoxon_p"])  # two comparisons, and the other's p is 1
    assert row["outcome"] == "better"


def test_settings_that_are_alike_are_not_told_apart(found: Comparison) -> None:
    row = found.tests.set_index("setting").loc["c"]
    assert (row["wilcoxon_p"], row["t_p"], row["seeds_better"], row["outcome"]) == (1.0, 1.0, 0, "not told apart")


def test_more_is_better_for_an_accuracy(found: Comparison) -> None:
    folder = Path(found.runs["folder"][0]).parents[1]
    row = compare([folder], metric="token_accuracy").tests.set_index("setting").loc["b"]
    assert row["difference"] > 0
    assert (row["outcome"], row["seeds_better"]) == ("better", 2)


def test_a_baseline_can_be_named(found: Comparison) -> None:
    folder = Path(found.runs["folder"][0]).parents[1]
    named = compare([folder], baseline="b")
    assert named.is_baseline_named
    assert named.tests["setting"].tolist() == ["fedavg", "c"]
    assert named.tests["outcome"].tolist() == ["worse", "worse"]
    with pytest.raises(ResultsError, match=r"--baseline: got 'flx'; expected one of: b, fedavg, c"):
        compare([folder], baseline="flx")


def test_few_pairs_say_that_no_p_can_be_small(tmp_path: Path, experiment_folder: MakeExperiment) -> None:
    runs = {"fedavg": lambda seed, client: 2.0 + 0.1 * client, "flex": lambda seed, client: 1.0 + 0.11 * client}
    folder = experiment_folder(tmp_path / "x", runs, seeds=[0], num_clients=4)
    found = compare([folder])
    (row,) = found.tests.to_dict("records")
    assert (row["wilcoxon_p"], row["outcome"]) == (pytest.approx(0.125), "not told apart")
    assert math.isnan(row["seed_p"])
    text = printed(found)
    assert "Wilcoxon's p cannot fall below 0.05" in text
    assert "one seed: no spread over seeds" in text


def printed(found: Comparison) -> str:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(found.table())
    return " ".join(capture.get().split())


def refusal(found: Comparison, setting: str) -> str:
    row = found.tests.set_index("setting").loc[setting]
    assert row["outcome"] == "refused"
    assert pd.isna(row["wilcoxon_p"])
    assert str(row["reason"]) in printed(found)
    return str(row["reason"])


@pytest.mark.parametrize(
    ("more", "baseline", "reason"),
    [
        ({"num_clients": 6, "data": "other"}, None, r"flex and fedavg were judged on different clients (seed 0: 6 and 8)"),
        ({"data": "other"}, "fedavg", r"flex and fedavg had different data (seed 0: fingerprints other-0 and data-0)"),
        ({"client_names": [f"other {idx}" for idx in range(8)]}, None, "different clients (seed 0: others of the same number)"),
        ({"data": None}, None, "had different data (seed 0"),
        ({"seeds": [2, 3]}, None, "flex and fedavg have no seed in common"),
    ],
)
def test_other_clients_are_refused_by_name_and_means_still_shown(
    tmp_path: Path, experiment_folder: MakeExperiment, more: dict[str, Any], baseline: str | None, reason: str
) -> None:
    first = experiment_folder(tmp_path / "first", {"fedavg": lambda seed, client: 2.0})
    second = experiment_folder(tmp_path / "second", {"flex": lambda seed, client: 1.0}, **more)
    found = compare([first, second], baseline=baseline)
    assert reason in refusal(found, "flex")
    assert found.settings["personal_nll"].to_dict() == {"fedavg": 2.0, "flex": 1.0}


def test_a_client_without_a_value_is_no_pair(tmp_path: Path, experiment_folder: MakeExperiment) -> None:
    runs = {"fedavg": lambda seed, client: 2.0, "flex": lambda seed, client: math.nan if client == 0 else 1.0 + 0.01 * client}
    found = compare([experiment_folder(tmp_path / "x", runs)])
    (row,) = found.tests.to_dict("records")
    assert (row["num_pairs"], row["num_clients"]) == (14, 7)
    assert "flex: 2 clients without a number" in printed(found)
    assert found.settings.loc["flex", "personal_nll"] == pytest.approx(1.04)  # of clients 1 to 7


def test_a_methods_label_stands_for_its_setting_on_the_same_data(tmp_path: Path, experiment_folder: MakeExperiment) -> None:
    runs = {"fedavg": lambda seed, client: 2.0, "flex": lambda seed, client: 1.0}
    folders = [experiment_folder(tmp_path / name, runs, data=f"data of {name}") for name in ("a", "b")]
    found = compare(folders)
    assert found.tests[["setting", "baseline"]].to_numpy().tolist() == [["a: flex", "a: fedavg"], ["b: flex", "b: fedavg"]]
