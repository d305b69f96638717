"""Replicas of several ranks: they work in step, live and die together, and train as one process does."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

import fedgraft
from fedgraft.actors.hosting import Finished, PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.testing import Double, Item
from fedgraft.errors import ClusterError
from fedgraft.platform.checkpoint import load_latest
from fedgraft.platform.progress import Event
from fedgraft.platform.state_store import ClientStateStore

pytestmark = pytest.mark.ray


@pytest.fixture
def pool() -> Iterator[RayPool]:
    made = RayPool(PoolOptions(replicas=2, ranks=2, max_failures=2, task_timeout_s=30.0, rank_grace_s=2.0))
    made.host(Double)
    yield made
    made.close()


def _run(pool: RayPool, items: list[Item]) -> dict[int, Finished]:
    return {finished.index: finished for finished in pool.map("work", items, pool.share(100))}


def test_ranks_know_their_place_and_the_leader_answers(pool: RayPool) -> None:
    places = pool.call("place")
    assert [(rank, size) for rank, size, _ in places] == [("0", "2"), ("0", "2")]
    assert len({meeting for _, _, meeting in places}) == 2  # each replica meets at a port of its own
    found = _run(pool, [Item(number=n) for n in range(5)])
    assert {index: (done.value, done.followers) for index, done in found.items()} == {n: (n + 100, (n + 1100,)) for n in range(5)}


@pytest.mark.parametrize("act", ["die", "hang"])
def test_ranks_live_and_die_together(
    pool: RayPool, tmp_path: Path, ray_processes: Callable[[str], list[psutil.Process]], act: str
) -> None:
    processes = ray_processes("Rank")
    assert len(processes) >= 4
    bad = Item(number=1, act=act, once=tmp_path / "done", rank=1)
    found = _run(pool, [Item(number=0), bad, Item(number=2)])
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(3)}
    assert found[1].num_tries == 2
    gone = [process for process in processes if not process.is_running()]
    assert len(gone) == 2  # the follower that did it, and its leader
    assert [rank for rank, *_ in pool.call("place")] == ["0", "0"]


def test_a_frozen_rank_is_noticed_before_its_leader_has_waited_for_it(tmp_path: Path) -> None:
    pool = RayPool(PoolOptions(replicas=1, ranks=2, max_failures=2, task_timeout_s=300.0, heartbeat_timeout_s=3.0))
    pool.host(Double)
    found = _run(pool, [Item(number=1, act="freeze", once=tmp_path / "done", rank=1)])
    pool.close()
    assert (found[0].value, found[0].followers, found[0].num_tries) == (101, (1101,), 2)


def test_too_many_ranks_are_refused_before_waiting() -> None:
    cores = int(ray.cluster_resources()["CPU"])
    with pytest.raises(ClusterError, match=rf"2 replicas of {cores} ranks each want {2 * cores} CPUs; the cluster has {cores}"):
        RayPool(PoolOptions(replicas=2, ranks=cores))


# ---- an experiment


@pytest.fixture(scope="module")
def make_config(
    make_base: Callable[..., Path], data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("experiments")

    def make(name: str, engine: dict[str, Any], executor: dict[str, Any]) -> Any:
        fields = {"prompt": "q", "response": "a"}
        return fedgraft.load_config(
            {
                "name": name,
                "model": {"path": str(make_base())},
                "data": {
                    "path": str(data_folder.parent / "clients.jsonl"),
                    "preset": "custom",
                    "fields": fields | {"label": "kind"},
                    "max_length": 32,
                },
                "method": {"name": "flex"},
                "training": {"learning_rate": 0.01},
                "federation": {"rounds": 2, "local_steps": 2, "batch_size": 5},
                "evaluation": {"max_new_tokens": 4, "at_start": False},
                "engine": engine,
                "executor": executor,
                "tracking": {"enabled": False},
                "output": {"folder": str(folder / "runs"), "cache": str(folder / "cache"), "report": False},
            }
        )

    return make


def _state(folder: Path) -> dict[str, Any]:
    run = folder / "flex" / "seed-0" if (folder / "flex").is_dir() else folder
    checkpoint = load_latest(run / "checkpoints", store=ClientStateStore(run / "clients"))
    assert checkpoint is not None
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    return {"params": checkpoint.state.params, "rows": rows, "info": json.loads((run / "run.json").read_text())}


def _nll(found: dict[str, Any]) -> dict[Any, float]:
    return {
        (row["client_id"], row["round"]): row["total"] / row["weight"]
        for row in found["rows"]
        if row["metric"] == "nll" and row["task"] == "client" and row["view"] == "personal"
    }


@pytest.fixture(scope="module")
def alone(make_config: Callable[..., Any]) -> dict[str, Any]:
    return _state(fedgraft.run(make_config("alone", {"name": "torch"}, {"kind": "in_process"})).folder)


def test_two_ranks_train_as_one_process_does_and_a_killed_one_changes_no_bit(
    make_config: Callable[..., Any],
    alone: dict[str, Any],
    assert_same_bits: Callable[..., None],
    ray_processes: Callable[[str], list[psutil.Process]],
) -> None:
    engine = {"name": "deepspeed", "stage": 2, "world_size": 2}  # stage 3: tests/slow/test_engine_ranks.py
    executor = {"kind": "ray", "replicas": 1}
    two = _state(fedgraft.run(make_config("two", engine, executor)).folder)
    assert two["info"]["engine"]["name"] == "deepspeed"
    assert two["info"]["frozen_hash_start"] == two["info"]["frozen_hash_end"] == alone["info"]["frozen_hash_start"]
    # Rows of 5 go 2 and 3 to the ranks: float32 sums in another order, magnified where AdamW divides by a small gradient.
    expected = _nll(alone)
    found = _nll(two)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, abs=2e-4)
    killed: list[int] = []

    def on_event(event: Event) -> None:
        if event.kind == "round" and not killed:
            killed.append(max(ray_processes("Rank"), key=lambda p: p.create_time()).pid)
            os.kill(killed[0], signal.SIGKILL)

    again = _state(fedgraft.run(make_config("killed", engine, executor), on_event=on_event).folder)
    assert killed
    assert_same_bits(again["params"], two["params"])
    assert _nll(again) == found
