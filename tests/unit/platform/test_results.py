"""Reading run folders and summing them up, against means worked out by hand."""

from __future__ import annotations

import io
import json
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from fedgraft.errors import FedgraftError
from fedgraft.platform import results

# Personal NLL (total, weight) of clients 0 and 1 by round. Client means: round 0: 3, 3; round 1: 1, 2; round 2: 1.5, 2.5.
NLL = {0: [(30, 10), (300, 100)], 1: [(10, 10), (200, 100)], 2: [(15, 10), (250, 100)]}


def lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_run(folder: Path, label: str = "graft", shift: float = 0.0, choice: float = 60.0, **info: object) -> Path:
    folder.mkdir(parents=True)
    values = {"run_id": folder.name, "label": label, "method": label, "seed": 0, "status": "finished", "rounds": 2}
    values |= {"num_clients": 2, "client_names": ["law", "medicine"], "learning_rate": 2e-4, "seconds": 7.0}
    (folder / "run.json").write_text(json.dumps(values | info), encoding="utf-8")
    rounds = range(1 + int((values | info)["rounds"]))
    rows: list[dict] = []

    def add(round_idx: int, task: str, client: int | None, metric: str, total: float, weight: float, **more: str) -> None:
        view = "personal" if round_idx and client is not None else "global"
        row = {"round": round_idx, "view": view, "task": task, "client_id": client, "split": "test", "metric": metric}
        rows.append(row | {"total": total, "weight": weight} | more)

    for round_idx in rounds:
        for client, (total, weight) in enumerate(NLL[round_idx]):
            add(round_idx, "client", client, "nll", total + shift * weight, weight)
            add(round_idx, "client", client, "rouge_l", 2.0 + client, 10)
            if round_idx:
                add(round_idx, "retention", client, "nll", 20 + 4 * client, 10)
        add(round_idx, "retention", None, "nll", 50, 10)
        add(round_idx, "choice", None, "choice_accuracy", choice, 200)
        # The global model beside the personal ones must not be mixed with them.
        if round_idx:
            add(round_idx, "client", 0, "nll", 900, 10, view="global")
    lines(folder / "evaluations.jsonl", rows)
    lines(folder / "metrics.jsonl", [{"round": idx, "train_loss": 3.0 - idx, "cohort": [0, 1]} for idx in rounds if idx])
    ledger = [
        {"round": idx, "client_id": client, "direction": way, "group": "shared", "bytes": size, "is_retry": False}
        for idx in rounds
        if idx
        for client in (0, 1)
        for way, size in (("up", 100), ("down", 300))
    ]
    lines(folder / "ledger.jsonl", ledger)
    lines(folder / "diagnostics.jsonl", [])
    return folder


def make_comparison(folder: Path, runs: dict[str, list[Path]], **more: object) -> Path:
    listed = {label: [str(path.relative_to(folder)) for path in paths] for label, paths in runs.items()}
    data = {"labels": list(runs), "base": None, "runs": listed, "rate_search": {}, "seeds": [0], "status": "finished"}
    (folder / "comparison.json").write_text(json.dumps(data | more), encoding="utf-8")
    return folder


def test_a_mean_over_clients_counts_every_client_once(tmp_path: Path) -> None:
    run = results.read_run(make_run(tmp_path / "run"))
    row = results.summary(run).loc["graft"]
    # A mean over tokens would be (15 + 250) / 110 = 2.409.
    assert row["last_personal_nll"] == pytest.approx(2.0)
    assert row["last_worst_client_nll"] == pytest.approx(2.5)
    assert row["last_client_spread_nll"] == pytest.approx(math.sqrt(0.5))
    assert row["last_rouge_l"] == pytest.approx(0.25)
    assert row["last_worst_client_rouge_l"] == pytest.approx(0.2)
    assert row["last_rounds"] == (2,)


def test_best_is_the_round_of_the_lowest_personal_nll(tmp_path: Path) -> None:
    row = results.summary(results.read_run(make_run(tmp_path / "run"))).loc["graft"]
    assert row["best_rounds"] == (1,)
    assert row["best_personal_nll"] == pytest.approx(1.5)


def test_validation_examples_choose_the_best_round_where_all_rounds_have_them(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "evaluations.jsonl"
    row = {"view": "personal", "task": "client", "client_id": 0, "split": "validation", "metric": "nll", "weight": 1.0}
    rows = [row | {"round": idx, "total": 9.0 - idx} for idx in (0, 1, 2)]
    before = path.read_text()
    path.write_text(before + "".join(json.dumps(each) + "\n" for each in rows))
    assert results.best_round(results.read_run(folder)) == 2
    path.write_text(before + json.dumps(rows[2]) + "\n")
    assert results.best_round(results.read_run(folder)) == 1


def test_retention_is_that_of_personal_models_and_of_the_global_one_before(tmp_path: Path) -> None:
    table = results.round_values(results.read_run(make_run(tmp_path / "run")))
    assert table["retention_nll"].to_dict() == pytest.approx({0: 5.0, 1: 2.2, 2: 2.2})


def test_bytes_and_seconds_are_of_the_whole_run(tmp_path: Path) -> None:
    row = results.summary(results.read_run(make_run(tmp_path / "run"))).loc["graft"]
    assert (row["bytes_up"], row["bytes_down"], row["seconds"]) == (400, 1200, 7.0)


def test_several_seeds_give_mean_and_sample_deviation(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", shift=0.0), make_run(tmp_path / "b", shift=0.4, seed=1)]
    comparison = results.read_comparison(make_comparison(tmp_path, {"graft": runs}, seeds=[0, 1]))
    row = results.summary(comparison).loc["graft"]
    assert row["num_seeds"] == 2
    assert row["last_personal_nll"] == pytest.approx(2.2)
    assert row["last_personal_nll_std"] == pytest.approx(0.4 / math.sqrt(2))


def test_one_seed_has_no_deviation(tmp_path: Path) -> None:
    row = results.summary(results.read_run(make_run(tmp_path / "run"))).loc["graft"]
    assert math.isnan(row["last_personal_nll_std"])


# Two standard errors of chance with 200 questions: 2 * sqrt(0.25 * 0.75 / 200) = 0.0612, so 62.2 right answers.
@pytest.mark.parametrize(("right", "is_informative"), [(62, False), (63, True), (37, True), (38, False)])
def test_choice_tells_nothing_within_two_standard_errors_of_chance(tmp_path: Path, right: int, is_informative: bool) -> None:
    run = results.read_run(make_run(tmp_path / "run", choice=right))
    assert results.is_choice_informative(run) is is_informative


def test_the_base_of_a_comparison_decides_whether_choice_is_informative(tmp_path: Path) -> None:
    runs = {"graft": [make_run(tmp_path / "a", choice=50)], "base": [make_run(tmp_path / "b", "base", 0, 90, rounds=0)]}
    comparison = results.read_comparison(make_comparison(tmp_path, runs, base="base"))
    assert results.is_choice_informative(comparison) is True


def test_rank_calls_a_constant_difference_worse_and_a_wavering_one_a_tie(tmp_path: Path) -> None:
    best, worse, tied = (make_run(tmp_path / name, name, shift) for name, shift in (("a", 0), ("b", 0.1), ("c", 0)))
    # c: client 0 worse by 1.0, client 1 better by 0.9; mean difference 0.05, standard error 1.9 / 2 = 0.95.
    path = tied / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["metric"] == "nll" and row["task"] == "client" and row["view"] == "personal" and row["round"] == 2:
            row["total"] += (1.0, -0.9)[row["client_id"]] * row["weight"]
    lines(path, rows)
    ranks = results.rank(results.read_comparison(make_comparison(tmp_path, {"b": [worse], "a": [best], "c": [tied]})))
    assert ranks["outcome"].to_dict() == {"a": "best", "c": "tie", "b": "worse"}
    assert ranks.loc["c", "difference"] == pytest.approx(0.05)
    assert ranks.loc["c", "standard_error"] == pytest.approx(0.95)


def test_two_methods_with_the_same_values_are_a_tie(tmp_path: Path) -> None:
    runs = {label: [make_run(tmp_path / label, label)] for label in ("a", "b")}
    ranks = results.rank(results.read_comparison(make_comparison(tmp_path, runs)))
    assert ranks["outcome"].to_dict() == {"a": "best", "b": "tie"}


def test_rank_over_seeds_takes_the_larger_standard_error(tmp_path: Path) -> None:
    best = [make_run(tmp_path / "a0", "a"), make_run(tmp_path / "a1", "a")]
    other = [make_run(tmp_path / "b0", "b", 0.0), make_run(tmp_path / "b1", "b", 0.4)]
    ranks = results.rank(results.read_comparison(make_comparison(tmp_path, {"a": best, "b": other})))
    # Over clients the difference is 0.2 for both; over seeds it is 0 and 0.4: standard error 0.2.
    assert ranks.loc["b", "standard_error"] == pytest.approx(0.2)
    assert ranks.loc["b", "outcome"] == "tie"


def test_one_model_for_all_is_compared_with_every_personal_model(tmp_path: Path) -> None:
    runs = {"graft": [make_run(tmp_path / "a")], "base": [make_run(tmp_path / "b", "base", rounds=0)]}
    ranks = results.rank(results.read_comparison(make_comparison(tmp_path, runs, base="base")), "retention")
    # 5.0 against 2.0 and 2.4: 3.0 and 2.6, standard error 0.4 / 2.
    assert ranks.loc["base", "difference"] == pytest.approx(2.8)
    assert ranks.loc["base", "standard_error"] == pytest.approx(0.2)
    assert ranks.loc["base", "outcome"] == "worse"


@pytest.mark.parametrize("at", ["last", "best"])
def test_the_terminal_table_fits_100_characters_and_marks_the_best(tmp_path: Path, at: str) -> None:
    runs = {
        "a method with a long label": [make_run(tmp_path / "a", "a method with a long label")],
        "base": [make_run(tmp_path / "b", "base", 0.5, rounds=0)],
    }
    comparison = results.read_comparison(make_comparison(tmp_path, runs, base="base"))
    output = io.StringIO()
    Console(file=output, width=100, force_terminal=True, color_system="truecolor").print(results.summary_table(comparison, at))
    text = output.getvalue()
    best = "2.000" if at == "last" else "1.500"
    assert re.search(rf"\x1b\[1m *{best}", text)
    assert not re.search(r"\x1b\[1m *3\.500", text)
    assert max(len(re.sub(r"\x1b\[[\d;]*m", "", line)) for line in text.splitlines()) <= 100
    assert "lower" in text
    assert "higher" in text
    assert "one seed: no spread over seeds" in text
    assert "2e-4" in text
    assert "\u2026" not in text.replace("a method with a lon\u2026", "")


def test_missing_and_torn_files_are_named_with_their_line(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"round": 3, "train_')
    with pytest.raises(FedgraftError, match=r"metrics\.jsonl, line 3"):
        results.read_run(folder)
    path.unlink()
    with pytest.raises(FedgraftError, match=r"metrics\.jsonl does not exist"):
        results.read_run(folder)
    (folder / "run.json").write_text("[]")
    with pytest.raises(FedgraftError, match=r"run\.json should hold a JSON object"):
        results.read_run(folder)
    with pytest.raises(FedgraftError, match=r"run\.json does not exist"):
        results.read_run(tmp_path / "nowhere")


def test_a_run_that_failed_before_its_first_round_can_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"run_id": "x", "label": "graft", "status": "failed", "rounds": 9}))
    run = results.read_run(folder)
    assert results.last_round(run) == -1
    assert math.isnan(results.summary(run).loc["graft", "last_personal_nll"])
    results.summary_table(run)


def test_a_comparison_without_runs_for_a_label_is_refused(tmp_path: Path) -> None:
    make_comparison(tmp_path, {"graft": []})
    with pytest.raises(FedgraftError, match="no runs listed for graft"):
        results.read_comparison(tmp_path)


def test_failures_are_counted_by_client_and_stage(tmp_path: Path) -> None:
    def failed(client: int, stage: str, times: int) -> list[dict]:
        return [{"client_id": client, "stage": stage, "error": "e", "round_idx": 1 + time} for time in range(times)]

    first = results.read_run(make_run(tmp_path / "a", failures=failed(1, "train", 2) + failed(0, "replica", 1)))
    second = results.read_run(make_run(tmp_path / "b", failures=failed(1, "train", 1) + failed(1, "reply", 1)))
    counts = results.failure_counts([first, second])
    assert [tuple(row) for row in counts.itertuples(index=False)] == [(0, "replica", 1), (1, "reply", 1), (1, "train", 3)]
    assert results.summary(first).loc["graft", "client_failures"] == 3
    shown = io.StringIO()
    Console(file=shown, width=120).print(results.summary_table(first))
    assert "no update: how often a client failed in a round" in shown.getvalue()
    whole = results.read_run(make_run(tmp_path / "c"))
    assert not len(results.failure_counts([whole]))
    quiet = io.StringIO()
    Console(file=quiet, width=120).print(results.summary_table(whole))
    assert "update" not in quiet.getvalue()
