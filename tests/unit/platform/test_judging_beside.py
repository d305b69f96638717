"""Models of a round are judged while the next round trains, and nothing that is written down differs for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedgraft.actors.hosting import Finished, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.errors import RunInterrupted
from fedgraft.platform.checkpoint import load_latest
from fedgraft.platform.config import EvaluationConfig
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.tracking import Tracker

FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}
EVERY = EvaluationConfig(every=1, at_start=True, generate="never", choices="never")
RECORDS = ("evaluations", "diagnostics", "hashes", "ledger")


class Wide(LocalPool):
    """Says that it has two replicas, and notes what each call of ``map`` was for."""

    size = 2

    def __init__(self) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.calls: list[tuple[str, int]] = []
        self.fails_in = 0

    def map(
        self, name: str, items: Sequence[Any], shared: Any, *, last: tuple[str, Sequence[Any]] | None = None, **how: Any
    ) -> Iterator[Finished]:
        self.calls.append((name, 0 if last is None else len(last[1])))
        if name == "update" and items[0].round_idx == self.fails_in:
            raise KeyboardInterrupt
        yield from super().map(name, items, shared, last=last, **how)


class Noting(Tracker):
    """Keeps what it gets."""

    def __init__(self) -> None:
        super().__init__(None, "", None)
        self.rounds: list[tuple[int, list[str]]] = []

    def log_round(self, round_idx: int, metrics: Mapping[str, float]) -> None:
        self.rounds.append((round_idx, sorted(metrics)))


def loop_of(job: RunJob, pool: LocalPool, tracker: Tracker, is_stopping: Callable[[], bool] = lambda: False) -> RoundLoop:
    return RoundLoop(job, pool, tracker=tracker, emit=lambda event: None, is_stopping=is_stopping)


def rows_of(job: RunJob) -> dict[str, list[dict[str, Any]]]:
    folder = RunFolder(job.folder)
    found = {record: list(folder.rows(record)) for record in RECORDS}
    # A round's own notes and those of its models come in another order; within each they do not.
    found["diagnostics"].sort(key=lambda row: row["round"])
    return found


@pytest.fixture
def straight(make_job: Callable[..., RunJob]) -> tuple[RunJob, Noting]:
    job, tracker = make_job(FLEX, evaluation=EVERY), Noting()
    loop_of(job, LocalPool(PoolOptions(replicas=1)), tracker).run()
    return job, tracker


def test_judged_beside_the_next_round_everything_is_the_same(
    straight: tuple[RunJob, Noting], make_job: Callable[..., RunJob]
) -> None:
    job, pool, tracker = make_job(FLEX, evaluation=EVERY), Wide(), Noting()
    loop_of(job, pool, tracker).run()
    # Before the first round and after the last there is nothing to judge beside.
    assert [name for name, _ in pool.calls] == ["evaluate", "update", "update", "update", "evaluate"]
    beside = [count for name, count in pool.calls if name == "update"]
    assert beside[0] == 0
    assert beside[1] == beside[2] > 0
    assert rows_of(job) == rows_of(straight[0])
    assert tracker.rounds == straight[1].rounds
    assert [round_idx for round_idx, _ in tracker.rounds] == [0, 1, 2, 3]


@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_run_that_ended_before_its_models_were_judged_judges_them_first(
    moment: str, straight: tuple[RunJob, Noting], make_job: Callable[..., RunJob], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, pool, tracker = make_job(FLEX, evaluation=EVERY), Wide(), Noting()
    append = RunFolder.append

    def dies(self: RunFolder, record: str, rows: Any) -> None:
        rows = list(rows)
        if record == "evaluations" and rows and rows[0]["round"] == 1:
            if moment == "after":
                append(self, record, rows)
            raise KeyboardInterrupt
        append(self, record, rows)

    if moment == "before":
        pool.fails_in = 2
    else:
        monkeypatch.setattr(RunFolder, "append", dies)
    with pytest.raises(KeyboardInterrupt):
        loop_of(job, pool, tracker).run()
    monkeypatch.undo()
    checkpoint = load_latest(job.folder / "checkpoints", store=ClientStateStore(job.worker.state_folder))
    assert checkpoint is not None
    assert checkpoint.round_idx == 1
    assert any(row["round"] == 1 for row in rows_of(job)["evaluations"]) == (moment == "after")

    again = Wide()
    loop_of(job, again, tracker).run()
    assert again.calls[0][0] == ("update" if moment == "after" else "evaluate")
    assert rows_of(job) == rows_of(straight[0])
    expected = dict(straight[1].rounds)
    assert dict(tracker.rounds) == expected, "what is logged again is the same"


def test_a_run_that_is_stopped_is_judged_to_its_last_round(make_job: Callable[..., RunJob]) -> None:
    job, tracker = make_job(FLEX, evaluation=EVERY), Noting()
    asked = iter([False, False, True])
    with pytest.raises(RunInterrupted):
        loop_of(job, Wide(), tracker, lambda: next(asked)).run()
    assert {row["round"] for row in rows_of(job)["evaluations"]} == {0, 1, 2}
    assert [round_idx for round_idx, _ in tracker.rounds] == [0, 1, 2]


def test_what_is_asked_for_up_to_a_round_is_judged_when_it_is_reached(make_job: Callable[..., RunJob]) -> None:
    job = replace(make_job(FLEX, evaluation=EVERY), rounds=3)
    loop_of(job, Wide(), Noting()).run(until=2)
    assert {row["round"] for row in rows_of(job)["evaluations"]} == {0, 1, 2}
