"""What is compared, what is left out, and what is said of both: sweeps, experiments and runs with numbers made by hand."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.console import Console
from typer.testing import CliRunner

from fedgraft.cli import app
from fedgraft.errors import ResultsError
from fedgraft.platform.comparison import Comparison, charts, compare, write_sweep_report
from fedgraft.platform.comparison.frames import label_distance
from fedgraft.platform.results import read_run

Make = Callable[..., Path]
ALPHA, METHOD = "data.partition.alpha", "method.name"


def printed(found: Comparison) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        console.print(found.table())
    return capture.get()


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory, sweep_folder: Make, trial: Any) -> Path:
    """Two methods at three alphas; of alpha 10 one trial was stopped early with the best score of all, and one failed."""
    trials = []
    for alpha in (0.1, 1.0, 10.0):
        for label, gain in (("fedavg", 0.5), ("flex", 1.0)):

            def score(seed: int, client: int, level: float = 2.6 - gain + alpha / 100) -> float:
                return level + 0.1 * seed + 0.01 * client**2

            status = {("flex", 10.0): "stopped_early", ("fedavg", 10.0): "failed"}.get((label, alpha), "finished")
            point = {ALPHA: alpha, METHOD: label} | ({"method.n_graft": 2} if label == "flex" else {})
            # The configuration's default of a key that does not apply to fedavg must not show.
            more = {
                "config": {"method": {"n_graft": 9}},
                "bytes": 1000 if label == "flex" else 4000,
                "skew": 0.5 if alpha == 0.1 else 0.25,
            }
            made = trial(point, label, score, status, "QuorumError: 1 answered" if status == "failed" else None, more)
            trials.append(made)
    folder: Path = sweep_folder(tmp_path_factory.mktemp("runs") / "alpha-1", [ALPHA, METHOD, "method.n_graft"], trials)
    return folder


@pytest.fixture(scope="module")
def found(sweep: Path) -> Comparison:
    return compare([sweep])


def test_a_sweep_gives_a_row_a_point_and_method(found: Comparison) -> None:
    assert found.keys == (ALPHA, "method.n_graft")
    assert list(found.settings.index) == ["fedavg (alpha 0.1)", "flex (alpha 0.1)", "fedavg (alpha 1)", "flex (alpha 1)"]
    row = found.settings.loc["flex (alpha 0.1)"]
    clients = sum(0.01 * client**2 for client in range(8)) / 8
    assert row["personal_nll"] == pytest.approx(1.601 + 0.05 + clients)  # the last round; the best one is better by 1
    assert row["personal_nll_std"] == pytest.approx(0.1 / math.sqrt(2))
    assert (row["num_seeds"], row["bytes_up"], row["bytes_down"]) == (2, 2000, 2000)
    assert (row["data"], row["method.n_graft"]) == ("alpha 0.1", 2)
    assert pd.isna(found.settings.loc["fedavg (alpha 1)", "method.n_graft"])
    assert len(found.clients) == 4 * 2 * 8
    assert set(found.clients.columns) >= {ALPHA, "method", "seed", "client_id", "client", "personal_nll"}


def test_what_did_not_end_as_planned_is_listed_and_in_no_average(found: Comparison) -> None:
    left = found.left_out
    assert left.groupby("status").size().to_dict() == {"failed": 2, "stopped_early": 2}
    assert left.loc[left["status"] == "stopped_early", "personal_nll"].notna().all()
    assert not found.settings.index.str.contains("alpha 10").any()
    assert 10.0 not in set(found.clients[ALPHA])
    assert not found.tests["setting"].str.contains("alpha 10").any()
    text = printed(found)
    assert "stopped early" in text
    assert "QuorumError: 1 answered" in text


def test_tests_and_bests_stay_on_the_same_clients(found: Comparison) -> None:
    assert found.tests[["setting", "baseline", "num_pairs"]].to_numpy().tolist() == [
        ["flex (alpha 0.1)", "fedavg (alpha 0.1)", 16],
        ["flex (alpha 1)", "fedavg (alpha 1)", 16],
    ]
    named = compare([Path(found.runs["folder"][0]).parents[3]], baseline="fedavg (alpha 0.1)")
    reasons = named.tests.set_index("setting")["reason"]
    assert "had different data" in reasons["flex (alpha 1)"]
    assert reasons["flex (alpha 0.1)"] == ""


def test_a_running_sweep_shows_what_is_finished(tmp_path: Path, sweep_folder: Make, trial: Any) -> None:
    trials = [
        trial({ALPHA: 0.1}, "flex", lambda seed, client: 2.0),
        trial({ALPHA: 1.0}, "flex", lambda seed, client: 1.0, "running"),
        trial({ALPHA: 10.0}, "flex", lambda seed, client: 1.0, "pending"),
    ]
    folder = sweep_folder(tmp_path / "s", [ALPHA], trials, status="running")
    found = compare([folder])
    assert found.settings["personal_nll"].to_dict() == {"flex (alpha 0.1)": 2.0}
    assert found.left_out["status"].tolist() == ["running", "running", "pending"]
    assert "the sweep s is running: 1 of 3 trials are finished" in printed(found)
    assert charts.heatmap_keys(found) is None
    assert len(found.tests) == 0


def test_one_key_and_one_method_is_a_line_not_a_map(tmp_path: Path, sweep_folder: Make, trial: Any) -> None:
    trials = [trial({"federation.rounds": n}, "flex", lambda seed, client, n=n: 2.0 - 0.1 * n) for n in (2, 4, 8)]
    found = compare([sweep_folder(tmp_path / "s", ["federation.rounds"], trials)])
    keys = [chart.key for chart in charts.comparison_charts(found)]
    assert "key" in keys
    assert "heatmap" not in keys
    assert found.baseline is None  # one method: the first setting
    assert found.tests["baseline"].tolist() == ["flex (rounds 2)"] * 2


def test_three_keys_give_facets_and_two_can_be_chosen(tmp_path: Path, sweep_folder: Make, trial: Any) -> None:
    keys = ["training.weight_decay", "federation.rounds", "federation.batch_size"]
    points = [dict(zip(keys, (a, b, c), strict=True)) for a in (0.0, 0.1) for b in (1, 2) for c in (4, 8)]
    trials = [trial(point, "flex", lambda seed, client: 1.0 + client) for point in points]
    folder = sweep_folder(tmp_path / "s", keys, trials, seeds=[0])
    found = compare([folder])
    assert [grid.title for grid in heatmap(found)["grids"]] == ["batch_size 4", "batch_size 8"]
    axes = ("federation.batch_size", "federation.rounds")
    chosen = heatmap(dataclasses.replace(found, axes=axes))
    assert [grid.title for grid in chosen["grids"]] == ["weight_decay 0", "weight_decay 0.1"]
    assert (chosen["rows"], chosen["columns"]) == (["4", "8"], ["1", "2"])
    assert (chosen["ylabel"], chosen["xlabel"]) == ("federation.batch_size", "federation.rounds")
    with pytest.raises(ResultsError, match=r"--keys: got federation\.round; expected two of: method, training\.weight_decay"):
        compare([folder], keys=("federation.round",))


def heatmap(found: Comparison) -> dict[str, Any]:
    (chart,) = [chart for chart in charts.comparison_charts(found) if chart.key == "heatmap"]
    return dict(chart.draw.keywords)  # type: ignore[attr-defined]


def test_the_map_of_one_key_and_several_methods(found: Comparison) -> None:
    shown = heatmap(found)
    assert (shown["rows"], shown["columns"]) == (["fedavg", "flex"], ["0.1", "1"])
    (grid,) = shown["grids"]
    assert grid.values[1, 0] == pytest.approx(found.settings.loc["flex (alpha 0.1)", "personal_nll"])
    assert charts.skew_of(found) == (ALPHA, f"{ALPHA} (small: clients differ more)", True)


def test_fronts_are_drawn_among_the_same_clients(found: Comparison) -> None:
    (chart,) = [chart for chart in charts.comparison_charts(found) if chart.key == "bytes"]
    panels = chart.draw.keywords["panels"]  # type: ignore[attr-defined]
    assert {title: [point.label for point in points] for title, points in panels.items()} == {
        "alpha 0.1": ["fedavg", "flex"], "alpha 1": ["fedavg", "flex"],
    }  # fmt: skip
    assert [point.x for point in panels["alpha 1"]] == [16000, 4000]


def test_the_front_is_what_nothing_beats_in_both() -> None:
    points = [(1.0, 3.0), (2.0, 2.0), (2.0, 2.5), (3.0, 2.0), (4.0, 1.0), (5.0, 1.5)]
    assert charts.figures.front(points, is_lower_better=True) == [(1.0, 3.0), (2.0, 2.0), (4.0, 1.0)]
    assert charts.figures.front(points, is_lower_better=False) == [(1.0, 3.0)]


def test_distance_of_labels(tmp_path: Path, run_folder: Make) -> None:
    # Eight labels, a share s of each client's examples of its own: |s + (1-s)/8 - 1/8| + 7 |(1-s)/8 - 1/8|, halved, is 7s/8.
    run = read_run(run_folder(tmp_path / "r", "flex", 0, lambda seed, client: 1.0, skew=0.5))
    assert label_distance(run) == pytest.approx(7 / 16)
    (tmp_path / "r" / "partition.json").unlink()
    assert math.isnan(label_distance(read_run(tmp_path / "r")))


def test_settings_of_experiments_are_told_apart_by_their_configurations(tmp_path: Path, experiment_folder: Make) -> None:
    def make(name: str, alpha: float, n_graft: int) -> Path:
        config = {"name": name, "output": {"folder": name}, "data": {"partition": {"alpha": alpha}}}
        config |= {"compare": {"methods": {"flex": {"name": "flex", "n_graft": n_graft}}}}
        data = f"data {alpha}"
        return experiment_folder(tmp_path / name, {"flex": lambda seed, client: alpha + n_graft}, config=config, data=data)

    found = compare([make("a", 0.1, 1), make("b", 1.0, 1), make("c", 1.0, 2)])
    assert found.keys == (ALPHA, "method.n_graft")
    assert found.settings["personal_nll"].round(9).to_dict() == {
        "flex (alpha 0.1, n_graft 1)": 1.1, "flex (alpha 1, n_graft 1)": 2.0, "flex (alpha 1, n_graft 2)": 3.0,
    }  # fmt: skip
    assert found.settings["data"].tolist() == ["alpha 0.1", "alpha 1", "alpha 1"]


def test_more_seeds_of_a_setting_join_and_the_same_seed_stays_apart(tmp_path: Path, experiment_folder: Make) -> None:
    first = experiment_folder(tmp_path / "first", {"flex": lambda seed, client: 1.0}, seeds=[0, 1])
    more = experiment_folder(tmp_path / "more", {"flex": lambda seed, client: 3.0}, seeds=[2])
    again = experiment_folder(tmp_path / "again", {"flex": lambda seed, client: 5.0}, seeds=[0])
    joined = compare([first, more, first / "flex" / "seed-0"])  # named twice, counted once
    assert joined.settings[["personal_nll", "num_seeds"]].to_numpy().tolist() == [[pytest.approx(5 / 3), 3]]
    apart = compare([first, again])
    assert apart.settings["personal_nll"].to_dict() == {"first: flex": 1.0, "again: flex": 5.0}


def test_an_experiment_that_still_runs(tmp_path: Path, experiment_folder: Make) -> None:
    folder = experiment_folder(tmp_path / "x", {"flex": lambda seed, client: 1.0, "fedavg": lambda seed, client: 2.0})
    data = json.loads((folder / "comparison.json").read_text())
    data |= {"status": "running", "labels": ["flex", "fedavg", "scaffold"]}
    data["runs"]["scaffold"] = []
    (folder / "comparison.json").write_text(json.dumps(data))
    path = folder / "fedavg" / "seed-1" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    lines = folder / "fedavg" / "seed-1" / "evaluations.jsonl"
    lines.write_text(lines.read_text() + '{"round": 2, "vi')  # being written at this moment
    found = compare([folder])
    assert found.settings["num_seeds"].to_dict() == {"flex": 2, "fedavg": 1}
    assert found.left_out[["label", "status"]].to_numpy().tolist() == [
        ["fedavg", "running"], ["scaffold", "pending"], ["scaffold", "pending"],
    ]  # fmt: skip
    assert "settings have 1 to 2 seeds" in printed(found)


def test_missing_and_not_finite_scores_are_named(tmp_path: Path, experiment_folder: Make) -> None:
    runs = {"flex": lambda seed, client: 1.0, "broken": lambda seed, client: math.nan}
    found = compare([experiment_folder(tmp_path / "x", runs)], baseline="flex")
    assert math.isnan(found.settings.loc["broken", "personal_nll"])
    assert "no own NLL (not measured, or not a number): broken" in printed(found)
    (row,) = found.tests.to_dict("records")
    assert (row["outcome"], row["reason"]) == ("refused", "no client has personal_nll with broken and with flex")
    with pytest.raises(ResultsError, match="no finished run has rouge_l"):
        compare([tmp_path / "x"], metric="rouge_l")


def test_csv_has_a_row_a_client_and_one_for_what_was_left_out(found: Comparison, tmp_path: Path) -> None:
    table = pd.read_csv(found.to_csv(tmp_path / "new" / "all.csv"))
    assert len(table) == 4 * 2 * 8 + 4
    whole = table[table["client_id"].notna()]
    means = whole.groupby(["setting", "seed"])["personal_nll"].mean()
    assert means.to_numpy() == pytest.approx(whole.groupby(["setting", "seed"])["run_personal_nll"].first().to_numpy())
    assert table.loc[table["client_id"].isna(), "status"].value_counts().to_dict() == {"failed": 2, "stopped_early": 2}
    assert {ALPHA, "method", "seed", "client", "run_retention_nll", "bytes_up"} <= set(table.columns)


def test_the_report_stands_alone(found: Comparison, sweep: Path) -> None:
    page = write_sweep_report(sweep).read_text()
    for key in ("summary", "tests", "heatmap", "bytes", "heterogeneity", "clients", "retention", "left-out"):
        assert f'<section id="{key}">' in page, key
    assert "stopped early" in page
    assert "src=" not in page
    assert "nan" not in page.replace("finance", "")


@pytest.mark.slow
def test_figures_are_written_for_a_paper(found: Comparison, tmp_path: Path) -> None:
    written = found.write_figures(tmp_path / "figures", width=5.0)
    names = {path.name for path in written}
    assert names == {
        f"{key}.{end}" for key in ("heatmap", "bytes", "heterogeneity", "clients", "retention") for end in ("svg", "png")
    }
    text = (tmp_path / "figures" / "clients.svg").read_text()
    assert 'width="360pt"' in text  # 5 inches
    assert "<text" not in text  # letters are outlines
    assert "<image" not in text
    assert "#0203" not in text  # no stand-in colour of the page
    with pytest.raises(ResultsError, match="expected 4 to 20 inches"):
        found.write_figures(tmp_path, width=1.0)


def nothing_finished(tmp_path: Path, sweep_folder: Make, trial: Any) -> Path:
    trials = [trial({ALPHA: 0.1}, "flex", lambda seed, client: 1.0, "failed"), trial({ALPHA: 1.0}, "flex", None, "pending")]
    return sweep_folder(tmp_path / "none", [ALPHA], trials, status="failed")


def test_errors_are_one_message_and_code_2(tmp_path: Path, sweep_folder: Make, trial: Any, run_folder: Make) -> None:
    none = nothing_finished(tmp_path, sweep_folder, trial)
    run = run_folder(tmp_path / "run", "flex", 0, lambda seed, client: 1.0)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "sweep.json").write_text('{"format": 1, "name": "x", "status": "done", "keys": []}')
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "sweep.json").write_text('{"format": 2}')
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ([str(none)], "none of 3 runs is finished (2 failed, 1 pending)"),
        ([str(empty)], "holds neither sweep.json, comparison.json nor run.json"),
        ([str(tmp_path)], "name one of the folders in it: new, none, torn"),
        ([str(tmp_path / "torn")], "status: Input should be 'running', 'finished', 'stopped' or 'failed'"),
        ([str(tmp_path / "new")], "format: got 2; expected 1"),
        ([], "expected either folders to compare or a query"),
        ([str(run), "--mlflow", "x"], "expected either folders to compare or a query"),
        ([str(run), "--uri", "sqlite:///x.db"], "--uri has no effect without --mlflow"),
        ([str(run), "--metric", "best"], "--metric: got 'best'; expected one of: personal_nll"),
        ([str(run), "--keys", "a,b"], "has an effect on --html and --figures only"),
        ([str(run), "--keys", "a,b", "--html", "x.html"], "--keys: got a, b; expected two of: method"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(app, ["compare", *arguments])
        said = " ".join(result.stderr.replace("\u2502", " ").split())
        assert (result.exit_code, message in said) == (2, True), (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_the_command_prints_and_writes(sweep: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["compare", str(sweep), "--csv", str(tmp_path / "a.csv")])
    assert result.exit_code == 0, result.stderr
    assert "last score of each setting" in result.stdout
    assert str(tmp_path / "a.csv") in result.stdout
    assert (tmp_path / "a.csv").is_file()
