"""A client that runs out of memory: by default its failure; by choice smaller parts, written down, and done again on resume."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedgraft.actors.hosting import LostResult
from fedgraft.errors import QuorumError
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_job import RunJob
from fedgraft.training import step
from fedgraft.training.config import EngineConfig
from fedgraft.types import Batch

FEDAVG = {"name": "fedavg"}


def halving(job: RunJob) -> RunJob:
    engine = EngineConfig(name="torch", device="cpu", on_out_of_memory="halve")
    return replace(job, worker=replace(job.worker, engine=engine))


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A device that holds the step of so many rows, as PyTorch would say it."""
    whole = step.response_loss

    def set_rows(rows: int, error: Callable[[str], Exception] = torch.OutOfMemoryError) -> None:
        def loss(model: Any, batch: Batch, num_label_tokens: int | None = None) -> Any:
            if batch.num_examples > rows:
                raise error("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
            return whole(model, batch, num_label_tokens)

        monkeypatch.setattr(step, "response_loss", loss)

    return set_rows


def test_by_default_it_is_the_clients_failure(
    make_job: Callable[..., RunJob], run_job: Callable[..., Any], narrow: Callable[..., None]
) -> None:
    narrow(2)
    with pytest.raises(QuorumError, match=r"failed at train: OutOfMemoryError"):
        run_job(make_job(FEDAVG))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError])
def test_by_choice_it_trains_in_parts_that_fit(
    error: Callable[[str], Exception], make_job: Callable[..., RunJob], run_job: Callable[..., Any], narrow: Callable[..., None]
) -> None:
    whole = run_job(make_job(FEDAVG))
    narrow(2, error)
    ran = run_job(halving(make_job(FEDAVG)))
    info = json.loads((ran.job.folder / "run.json").read_text())
    assert info["batch_parts"] == {str(client): {"1": 2} for client in range(3)}  # batches of 4 rows
    notes = [event.data["text"] for event in ran.events if event.kind == "note"]
    assert "client 1 ran out of memory and cuts its batches into 2 parts from round 1 on" in notes
    assert [task.num_parts for task, *_ in ran.pool.replies] == [None] * 3 + [2] * 6
    for key, value in whole.state.params.items():
        torch.testing.assert_close(ran.state.params[key], value, atol=2e-5, rtol=1e-4)


def test_halves_until_one_row_and_no_further(
    make_job: Callable[..., RunJob], run_job: Callable[..., Any], narrow: Callable[..., None]
) -> None:
    narrow(1)
    ran = run_job(halving(make_job(FEDAVG)))
    assert [update.num_parts for _, update, _ in ran.pool.replies] == [4] * 9
    narrow(0)
    with pytest.raises(QuorumError, match="OutOfMemoryError"):
        run_job(halving(make_job(FEDAVG)))


def test_a_resumed_run_cuts_as_it_did(
    make_job: Callable[..., RunJob], run_job: Callable[..., Any], narrow: Callable[..., None],
    assert_same_bits: Callable[..., None],
) -> None:  # fmt: skip
    """Memory may be free again when a run goes on; the parts that were used decide the bits, so they are used again."""
    narrow(2)
    straight = run_job(halving(make_job(FEDAVG)))
    job = halving(make_job(FEDAVG))

    def dies_in_round_two(loop: RoundLoop) -> None:
        record = loop._record

        def fail(round_idx: int, *arguments: Any) -> Any:
            if round_idx == 2:
                raise KeyboardInterrupt
            return record(round_idx, *arguments)

        loop._record = fail  # type: ignore[method-assign]

    with pytest.raises(KeyboardInterrupt):
        run_job(job, before=dies_in_round_two)
    narrow(100)
    resumed = run_job(job)
    assert [task.num_parts for task, *_ in resumed.pool.replies] == [2] * 6
    assert_same_bits(resumed.state.params, straight.state.params)


def test_nothing_of_the_failed_step_is_held_while_it_is_tried_again(
    make_bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = step.response_loss
    held: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []

    def loss(model: Any, batch: Batch, num_label_tokens: int | None = None) -> Any:
        if batch.num_examples > 2:
            large = torch.zeros(1000)
            held.append(weakref.ref(large))
            raise torch.OutOfMemoryError("not enough")
        alive.extend(each() is not None for each in held)
        return whole(model, batch, num_label_tokens)

    monkeypatch.setattr(step, "response_loss", loss)
    bench = make_bench(FEDAVG, engine=EngineConfig(name="torch", device="cpu", on_out_of_memory="halve"))
    update, _ = bench.train(0, 1, bench.worker.initial_params())
    assert update.num_parts == 2
    assert held
    assert alive
    assert not any(alive)


def test_a_lost_update_is_made_again_in_the_same_parts(
    make_job: Callable[..., RunJob], run_job: Callable[..., Any], narrow: Callable[..., None],
    assert_same_bits: Callable[..., None],
) -> None:  # fmt: skip
    narrow(2)
    lost: list[int] = []

    def loses_one(loop: RoundLoop) -> None:
        fetch = loop._pool.fetch

        def once(handle: Any) -> Any:
            if not lost:
                lost.append(1)
                narrow(100)  # memory is free again
                raise LostResult("its node is gone")
            return fetch(handle)

        loop._pool.fetch = once  # type: ignore[method-assign]

    again = run_job(halving(make_job(FEDAVG, rounds=1)), before=loses_one)
    assert lost
    assert [task.num_parts for task, *_ in again.pool.replies][-1] == 2
    narrow(2)
    expected = run_job(halving(make_job(FEDAVG, rounds=1)))
    assert_same_bits(again.state.params, expected.state.params)
