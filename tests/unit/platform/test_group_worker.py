"""Clients that share a pass: each method's runs are those of one client after another, to rounding, and failures their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fedgraft.actors.hosting import Finished, ItemOf
from fedgraft.platform.group_worker import GroupWorker
from fedgraft.platform.grouping import passes, split
from fedgraft.platform.rounds import RoundLoop
from fedgraft.protocols import TrainSpec
from fedgraft.training.config import EngineConfig
from fedgraft.types import ClientFailure, Params

SGD = TrainSpec(learning_rate=0.5, optimizer="sgd")
ADAMW = TrainSpec(learning_rate=0.02)
LORA = {"rank": 4, "alpha": 8.0}

BATCHED: dict[str, tuple[dict[str, Any], TrainSpec]] = {
    "fedavg": ({"name": "fedavg"}, SGD),
    "adamw": ({"name": "fedavg"}, ADAMW),
    "everywhere": ({"name": "fedavg", "adapter": LORA, "lora": ["attention", "router", "experts"]}, SGD),
    "router in full": ({"name": "fedavg", "full": ["router"]}, SGD),
    "fedprox": ({"name": "fedprox", "mu": 0.5}, SGD),
    "scaffold": ({"name": "scaffold"}, SGD),
    "fedavgm": ({"name": "fedavgm"}, SGD),
    "fedyogi": ({"name": "fedyogi"}, SGD),
    "local_only": ({"name": "local_only"}, SGD),
    "private_lora": ({"name": "private_lora"}, SGD),
    "flex": ({"name": "flex", "gate_bias": 0.0, "graft_layer_fraction": 0.5}, SGD),
    "flex, moments kept": ({"name": "flex", "gate_bias": 0.0, "persist_optimizer": True}, ADAMW),
    "flex, scaffold": ({"name": "flex", "gate_bias": 0.0, "server": {"name": "scaffold"}}, SGD),
}


def at_once(count: int) -> EngineConfig:
    return EngineConfig(name="torch", device="cpu", clients_at_once=count)


def private(job: Any) -> dict[str, Params]:
    root: Path = job.worker.state_folder
    return {path.name: load_file(sorted(path.iterdir())[-1]) for path in sorted(root.glob("*"))}


@pytest.mark.parametrize("name", BATCHED)
def test_a_run_is_that_of_one_client_after_another(name: str, make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    method, spec = BATCHED[name]
    fields = {"train": spec, "batch_size": 3}
    alone = run_job(make_job(method, worker=fields, rounds=2, learning_rate=spec.learning_rate))
    together = run_job(make_job(method, worker=fields | {"engine": at_once(2)}, rounds=2, learning_rate=spec.learning_rate))
    assert isinstance(together.pool._hosted, GroupWorker)
    assert not together.events or all(event.kind != "note" for event in together.events)
    atol = 2e-5 if spec is SGD else 0.02 * spec.learning_rate
    moved = 0.0
    for part in ("params", "extras", "memory"):
        found, expected = getattr(together.state, part), getattr(alone.state, part)
        assert sorted(found) == sorted(expected)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=atol, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
    own, other = private(together.job), private(alone.job)
    assert own.keys() == other.keys()
    for client, tensors in other.items():
        assert own[client].keys() == tensors.keys()
        for key, value in tensors.items():
            torch.testing.assert_close(own[client][key], value, atol=atol, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")
            moved = max(moved, float(value.abs().nan_to_num(posinf=0.0).max()))
    start = alone.pool.worker.initial_params()
    moved = max([moved, *(float((alone.state.params[key] - start[key]).abs().max()) for key in alone.state.params)])
    assert moved > 1e-3
    for line, expected in zip(together.rows("metrics"), alone.rows("metrics"), strict=True):
        assert line["expert_tokens"] == expected["expert_tokens"]
        assert line["cohort"] == expected["cohort"]
        assert (line["bytes_up"], line["bytes_down"], line["bytes_retried"]) == (expected["bytes_up"], expected["bytes_down"], 0)
        assert line["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-4)
    assert together.rows("ledger") == alone.rows("ledger")


def test_a_method_with_hooks_of_its_own_falls_back_and_says_so(make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    method = {"name": "hfedmoe"}
    job = make_job(method, worker={"engine": at_once(2)}, rounds=1)
    ran = run_job(job)
    notes = [event.data["text"] for event in ran.events if event.kind == "note"]
    expected = "clients train one after another, although engine.clients_at_once is 2: hfedmoe has its own build"
    assert notes.count(expected) == 1
    alone = run_job(make_job(method, rounds=1))
    for key, value in alone.state.params.items():
        assert torch.equal(ran.state.params[key], value)


def test_dropout_falls_back_and_says_so(make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    method = {"name": "fedavg", "adapter": LORA | {"dropout": 0.1}}
    ran = run_job(make_job(method, worker={"engine": at_once(2)}, rounds=1))
    assert any("LoRA dropout" in event.data.get("text", "") for event in ran.events)


def test_the_same_bits_in_any_order(make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    jobs = [make_job({"name": "flex"}, worker={"engine": at_once(2)}, rounds=2) for _ in range(2)]
    first, second = run_job(jobs[0]), run_job(jobs[1], in_reverse=True)
    for key, value in first.state.params.items():
        assert torch.equal(second.state.params[key], value)
    assert first.private_files() == second.private_files()


@pytest.mark.parametrize("times", [1, 9])
def test_a_failing_client_takes_nobody_with_it(
    times: int, make_job: Callable[..., Any], run_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: its pass is run again and the run has the bits of one without a failure. Always: it is a named failure."""
    calm = run_job(make_job({"name": "fedavg"}, worker={"engine": at_once(2)}, rounds=2))
    job = make_job({"name": "fedavg"}, worker={"engine": at_once(2)}, rounds=2, federation={"min_clients": 2})
    left = [times]
    original = GroupWorker._reply

    def fails(self: GroupWorker, session: Any, task: Any, result: Any, start: Any) -> Any:
        if task.client_id == 1 and left[0]:
            left[0] -= 1
            raise RuntimeError("client 1 has no luck")
        return original(self, session, task, result, start)

    monkeypatch.setattr(GroupWorker, "_reply", fails)
    ran = run_job(job)
    lines = ran.rows("metrics")
    if times == 1:
        for key, value in calm.state.params.items():
            assert torch.equal(ran.state.params[key], value)
        assert [sorted(line["cohort"]) for line in lines] == [[0, 1, 2]] * 2
        assert lines[0]["bytes_retried"] > 0
        assert lines[0]["bytes_up"] == calm.rows("metrics")[0]["bytes_up"]
    else:
        assert sorted(lines[0]["cohort"]) == [0, 2]
        failures = [event.data for event in ran.events if event.kind == "failure"]
        assert {failure["client_id"] for failure in failures} == {1}
        assert "client 1 has no luck" in failures[0]["error"]


def test_a_lost_update_is_made_again_in_its_pass(make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    from fedgraft.actors.hosting import LostResult

    calm = run_job(make_job({"name": "flex"}, worker={"engine": at_once(2)}, rounds=1))
    lost: list[Any] = []

    def lose(loop: RoundLoop) -> None:
        fetch = loop._pool.fetch

        def once(handle: Any) -> Any:
            if not lost:
                lost.append(handle)
                raise LostResult("gone")
            return fetch(handle)

        loop._pool.fetch = once  # type: ignore[method-assign]

    ran = run_job(make_job({"name": "flex"}, worker={"engine": at_once(2)}, rounds=1), before=lose)
    assert isinstance(lost[0], ItemOf)
    for key, value in calm.state.params.items():
        assert torch.equal(ran.state.params[key], value)


def test_out_of_memory_says_what_to_lower(
    make_job: Callable[..., Any], run_job: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedgraft.errors import QuorumError

    def full(self: Any, trainings: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr("fedgraft.training.cohort.CohortEngine.train_many", full)
    job = make_job({"name": "fedavg"}, worker={"engine": at_once(2)}, rounds=1, federation={"max_failures": 1, "min_clients": 1})
    with pytest.raises(QuorumError, match=r"clients trained at once: lower engine\.clients_at_once"):
        run_job(job)


def test_passes_are_consecutive_places() -> None:
    assert passes(7, 3) == [(0, 1, 2), (3, 4, 5), (6,)]
    assert passes(2, 1) == [(0,), (1,)]


def test_what_comes_back_is_split() -> None:
    failure = ClientFailure(client_id=1, round_idx=1, stage="train", error="no")
    parts = split(Finished(index=0, value=["a", failure], handle="handle", num_tries=2), 2)
    assert [part.value for part in parts] == ["a", failure]
    assert [part.handle for part in parts] == [ItemOf("handle", 0), ItemOf("handle", 1)]
    assert [part.num_tries for part in parts] == [2, 2]
    dead = Finished(index=0, error="dead")
    assert split(dead, 2) == [dead, dead]
    assert all(part.error for part in split(Finished(index=0, value="nonsense"), 2))
    assert split(replace(dead, error=None, value="a"), 1)[0].value == "a"
