"""The scheduler is asked by rungs, knows trials by their own names, and is the same after a resume. Ray is not started."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.tune.search import Searcher

from fedgraft.errors import CheckpointError, FedgraftError
from fedgraft.tuning.journal import Journal, TrialRecord
from fedgraft.tuning.locks import hold
from fedgraft.tuning.searching import ListedTrials, OptunaTrials, make_scheduler
from fedgraft.tuning.sweep_config import AshaScheduler, MedianScheduler, SweepConfig

SCORES = {"a": (3.0, 2.0), "b": (1.0, 0.5), "c": (2.0, 1.5), "d": (0.5, 0.4)}


def config(scheduler: dict[str, Any]) -> SweepConfig:
    return SweepConfig.model_validate({"base": {}, "space": {"x": [1, 2]}, "scheduler": scheduler})


def told(scheduler: Any, trial_id: str, rounds: int, score: float) -> str:
    """What the scheduler says to a result, as Tune would ask: each trial of this command has a name of Tune's own."""
    trial = SimpleNamespace(trial_id=f"tune-{trial_id}", config={"job": {"trial_id": trial_id}})
    return str(scheduler.on_trial_result(None, trial, {"rounds": rounds, "score": score}))


def test_rungs() -> None:
    assert AshaScheduler(min_rounds=1, reduction=3).rungs(20) == (1, 3, 9, 20)
    assert AshaScheduler(min_rounds=2, reduction=2).rungs(8) == (2, 4, 8)
    assert MedianScheduler(min_rounds=2, every=3).rungs(8) == (2, 5, 8)
    assert AshaScheduler().rungs(0) == (0,)


def test_asha_keeps_the_best_half_of_what_came_to_a_rung() -> None:
    scheduler = make_scheduler(config({"name": "asha", "min_rounds": 1, "reduction": 2}), 4, [])
    decisions = {name: told(scheduler, name, 1, scores[0]) for name, scores in SCORES.items()}
    # By hand, lower is better: a is first; b beats a; c (2.0) is worse than the median of 3 and 1, which it equals; d is best.
    assert decisions == {"a": "CONTINUE", "b": "CONTINUE", "c": "CONTINUE", "d": "CONTINUE"}
    assert told(scheduler, "e", 1, 1.6) == "STOP"  # the median of 3, 1, 2, 0.5 is 1.5
    assert told(scheduler, "f", 1, 1.4) == "CONTINUE"  # of 3, 1, 2, 0.5, 1.6 it is 1.6


@pytest.mark.parametrize("scheduler", [{"name": "asha", "min_rounds": 1, "reduction": 2}, {"name": "median", "min_points": 2}])
def test_a_resumed_scheduler_decides_as_one_that_went_on(scheduler: dict[str, Any]) -> None:
    stated = config(scheduler)
    whole = make_scheduler(stated, 4, [])
    for name in ("a", "b", "c"):
        told(whole, name, 1, SCORES[name][0])
    told(whole, "b", 2, SCORES["b"][1])
    records = [
        TrialRecord(trial_id=name, point={}, label="", folder="", rungs={"1": SCORES[name][0]}) for name in ("a", "b", "c")
    ]
    records[1].rungs["2"] = SCORES["b"][1]
    again = make_scheduler(stated, 4, records)
    later = [("c", 2, 1.5), ("a", 2, 0.1), ("e", 1, 2.5), ("f", 1, 0.1), ("b", 3, 9.0), ("f", 2, 5.0)]
    expected = [told(whole, *each) for each in later]
    assert [told(again, *each) for each in later] == expected
    assert set(expected) == {"CONTINUE", "STOP"}
    fresh = make_scheduler(stated, 4, [])
    assert [told(fresh, *each) for each in later] != expected  # so the past does decide


def test_a_rung_that_comes_twice_is_judged_once() -> None:
    scheduler = make_scheduler(config({"name": "median", "min_points": 1}), 4, [])
    told(scheduler, "a", 1, 1.0)
    assert told(scheduler, "b", 1, 2.0) == "STOP"
    assert told(scheduler, "a", 1, 5.0) == "CONTINUE"  # its process died and came to the same rung again
    assert told(scheduler, "c", 1, 2.2) == "STOP"  # against 1.0 and 2.0; with the 5.0 it would be against 3.0 and 2.0


def test_tune_gets_nothing_of_ours_to_pickle() -> None:
    search = ListedTrials([{"secret": "token"}])
    assert b"token" not in pickle.dumps(search)
    assert search.suggest("x") == {"secret": "token"}
    assert search.suggest("y") == Searcher.FINISHED


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    made = Journal(tmp_path, {"name": "s", "keys": ["x"], "metric": "personal_nll", "mode": "min"})
    made.add(TrialRecord(trial_id="0000", point={"x": {"name": "flex"}}, label="flex", folder="trials/0000", rungs={"1": 0.5}))
    return made


def test_a_journal_is_read_as_it_was_written(journal: Journal) -> None:
    journal.trials["0000"].status = "stopped_early"
    journal.save()
    again = Journal.load(journal.folder)
    assert (again.trials, again.facts, again.status) == (journal.trials, journal.facts, "running")
    assert again.trials["0000"].is_over


def test_a_torn_journal_and_another_format_are_refused(journal: Journal, tmp_path: Path) -> None:
    path = journal.folder / "sweep.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    with pytest.raises(CheckpointError, match="is not of format 1"):
        Journal.load(journal.folder)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(CheckpointError, match="is torn"):
        Journal.load(journal.folder)
    with pytest.raises(CheckpointError, match=r"holds no sweep\.json"):
        Journal.load(tmp_path / "nowhere")


def test_a_lock_is_refused_while_it_is_held(tmp_path: Path) -> None:
    path = tmp_path / "a" / ".lock"
    with hold(path), pytest.raises(FedgraftError, match="the sweep is run"), hold(path, timeout_s=0, busy="the sweep is run"):
        pass
    with hold(path, timeout_s=0):
        pass


class Points:
    """Stands for the command: makes a trial of every proposal but those whose rate is above 0.5."""

    def __init__(self) -> None:
        self.proposed: list[dict[str, Any]] = []

    def begin(self, proposed: dict[str, Any]) -> dict[str, Any] | None:
        self.proposed.append(proposed)
        return None if proposed["rate"] > 0.5 else {"job": {"trial_id": str(len(self.proposed))}}


def test_optuna_proposes_within_the_space_and_learns_from_what_is_over() -> None:
    pytest.importorskip("optuna", reason="the package optuna is not installed")
    space = {
        "method": {"choice": [{"name": "fedavg"}, {"name": "flex"}]},
        "rate": {"log_uniform": [0.001, 1.0]},
        "steps": {"integer": [2, 8], "step": 2},
    }
    stated = SweepConfig.model_validate({"base": {}, "space": space, "search": {"name": "optuna", "num_points": 12, "seed": 1}})
    points = Points()
    search = OptunaTrials(stated, [{"job": {"trial_id": "left"}}], [], points.begin)
    assert search.suggest("t") == {"job": {"trial_id": "left"}}
    search.on_trial_complete("t", {"score": 1.0, "is_last": True})
    names = []
    while (found := search.suggest(f"t{len(names)}")) != Searcher.FINISHED:
        names.append(found)
        search.on_trial_complete(f"t{len(names) - 1}", {"score": 1.0, "is_last": len(names) % 2 == 0})
    assert len(points.proposed) == 12  # invalid ones count
    assert 0 < len(names) < 12
    assert {point["method"]["name"] for point in points.proposed} == {"fedavg", "flex"}
    assert {point["steps"] for point in points.proposed} <= {2, 4, 6, 8}
    assert all(0.001 <= point["rate"] <= 1.0 for point in points.proposed)

    # After many results with one best corner, most proposals are near it; without them they are not.
    records = [
        TrialRecord(
            trial_id=str(number),
            point={},
            label="",
            folder="",
            status="finished",
            score=0.0 if point["steps"] == 2 else 10.0 + point["steps"],
            proposed=point | {"rate": min(point["rate"], 0.5)},
        )
        for number, point in enumerate(points.proposed * 3)
    ]
    many = SweepConfig.model_validate(
        {**stated.model_dump(exclude_unset=True), "search": {"name": "optuna", "num_points": 56, "seed": 1}}
    )
    shares = []
    for known in (records, []):
        later = Points()
        search = OptunaTrials(many, [], known, later.begin)
        for number in range(20):
            search.suggest(f"later-{number}")
        shares.append(sum(point["steps"] == 2 for point in later.proposed) / len(later.proposed))
    assert shares[0] > shares[1] + 0.2
