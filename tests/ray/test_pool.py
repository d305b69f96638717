"""The pool of actors: order does not matter, a dead or hung replica costs a retry, never a result."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import ray
import torch
from ray.exceptions import ObjectLostError

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.replica import Kept, Shared
from fedgraft.actors.testing import Double, Item, add_up
from fedgraft.errors import ClusterError, FedgraftError, GroupViolation, StorageError

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def lasting_pool() -> Iterator[RayPool]:
    """Two replicas for all tests of this file: each starts in seconds."""
    made = RayPool(PoolOptions(replicas=2, max_failures=2, task_timeout_s=30.0))
    yield made
    made.close()


@pytest.fixture
def pool(lasting_pool: RayPool) -> RayPool:
    """Whole again: what an earlier test killed is replaced here."""
    lasting_pool.host(Double)
    return lasting_pool


def _run(pool: RayPool, items: list[Item], shared: int = 100) -> dict[int, Finished]:
    return {finished.index: finished for finished in pool.map("work", items, pool.share(shared))}


def test_every_item_is_answered_once_and_large_results_are_fetched_by_handle(pool: RayPool) -> None:
    found = _run(pool, [Item(number=n) for n in range(7)])
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(7)}
    assert pool.fetch(found[3].handle) == [3] * 200_000
    assert all(done.num_tries == 1 for done in found.values())


def test_replicas_are_processes_of_their_own(pool: RayPool) -> None:
    pids = pool.call("pid")
    assert len(set(pids)) == 2
    assert os.getpid() not in pids


def test_a_new_shared_value_replaces_the_old_one(pool: RayPool) -> None:
    assert _run(pool, [Item(number=1)], shared=10)[0].value == 11
    assert _run(pool, [Item(number=1)], shared=20)[0].value == 21


def test_a_killed_replica_is_replaced_and_its_item_run_again(pool: RayPool, tmp_path: Path) -> None:
    before = set(pool.call("pid"))
    items = [Item(number=n, act="die" if n == 2 else "", once=tmp_path / "died") for n in range(5)]
    found = _run(pool, items)
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(5)}
    assert found[2].num_tries == 2
    after = set(pool.call("pid"))
    assert len(after - before) == 1
    assert not any(psutil.pid_exists(pid) for pid in before - after)


def test_a_hang_ends_at_the_deadline_and_is_run_again(tmp_path: Path) -> None:
    pool = RayPool(PoolOptions(replicas=1, max_failures=2, task_timeout_s=3.0))
    pool.host(Double)
    found = _run(pool, [Item(number=5, act="hang", once=tmp_path / "hung"), Item(number=6)])
    pool.close()
    assert (found[0].value, found[0].num_tries) == (105, 2)
    assert found[1].value == 106


def test_an_item_that_always_raises_is_an_error_that_names_the_cause(pool: RayPool) -> None:
    found = _run(pool, [Item(number=0), Item(number=1, act="raise")])
    assert found[0].value == 100
    assert found[1].error is not None
    assert "item 1 is bad" in found[1].error
    assert found[1].num_tries == 2


def test_more_than_the_cluster_has_is_refused_at_once() -> None:
    with pytest.raises(ClusterError, match="want 64 CPUs; the cluster has 4"):
        RayPool(PoolOptions(replicas=64))
    with pytest.raises(ClusterError, match="GPU"):
        RayPool(PoolOptions(replicas=1, gpus_per_replica=1.0))


def test_closing_ends_the_processes() -> None:
    pool = RayPool(PoolOptions(replicas=1))
    pool.host(Double)
    (pid,) = pool.call("pid")
    process = psutil.Process(pid)
    pool.close()
    psutil.wait_procs([process], timeout=10)
    assert not process.is_running()
    assert ray.is_initialized()


def test_a_replica_that_died_while_idle_is_replaced(pool: RayPool) -> None:
    before = pool.call("pid")
    psutil.Process(before[1]).kill()
    psutil.Process(before[1]).wait(10)
    after = pool.call("pid")
    assert after[0] == before[0]
    assert after[1] != before[1]
    psutil.Process(after[0]).kill()
    psutil.Process(after[0]).wait(10)
    pool.host(Double)
    assert {index: done.value for index, done in _run(pool, [Item(number=n) for n in range(4)]).items()} == {
        n: n + 100 for n in range(4)
    }


@pytest.mark.parametrize(("act", "error"), [("violate", GroupViolation), ("fill", StorageError)])
def test_what_no_retry_mends_ends_the_map_at_once(pool: RayPool, act: str, error: type[FedgraftError]) -> None:
    with pytest.raises(error, match="item 3 "):
        _run(pool, [Item(number=3, act=act)])


def test_a_frozen_replica_is_noticed_and_a_busy_one_is_not_disturbed(tmp_path: Path) -> None:
    pool = RayPool(PoolOptions(replicas=2, max_failures=2, task_timeout_s=300.0, heartbeat_timeout_s=4.0))
    pool.host(Double)
    before = pool.call("pid")
    # The busy one cannot answer for longer than the quarter of the limit that lies between two signs of life.
    busy = Item(number=0, act="hold", seconds=2.5)
    begun = time.monotonic()
    found = _run(pool, [busy, Item(number=1, act="freeze", once=tmp_path / "frozen"), busy])
    assert time.monotonic() - begun < 200
    assert {index: (done.value, done.num_tries) for index, done in found.items()} == {0: (100, 1), 1: (101, 2), 2: (100, 1)}
    after = pool.call("pid")
    pool.close()
    assert len(set(before) & set(after)) == 1
    (gone,) = set(before) - set(after)
    _, alive = psutil.wait_procs([psutil.Process(gone)] if psutil.pid_exists(gone) else [], timeout=30)
    assert not alive  # a stopped process ends by SIGKILL only, which Ray sends a moment later


@ray.remote(num_cpus=0)
class _Owner:
    def put(self, value: int) -> list[ray.ObjectRef]:
        return [ray.put(value)]


def test_a_shared_value_that_is_lost_is_put_again_at_nobodys_expense() -> None:
    pool = RayPool(PoolOptions(replicas=1, max_failures=1))
    pool.host(Double)
    shared = pool.share(100)
    owner = _Owner.remote()
    (lost,) = ray.get(owner.put.remote(100))
    ray.kill(owner)  # an object goes with the process that owns it, once its death is known
    with pytest.raises(ObjectLostError):
        for _ in range(300):
            ray.get(lost)
            time.sleep(0.1)
    shared.place = Shared(lost)
    found = {done.index: done for done in pool.map("work", [Item(number=n) for n in range(3)], shared)}
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(3)}
    assert [found[n].num_tries for n in range(3)] == [2, 1, 1]
    with pytest.raises(LostResult):
        pool.fetch(lost)
    pool.close()


def test_the_memory_monitors_kill_is_a_death_like_any_other(pool: RayPool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Ray raises this class for a worker that its monitor killed; test_memory_monitor.py lets the monitor do it.
    real, raised = ray.get, []

    def get(refs: object, **options: object) -> object:
        if isinstance(refs, ray.ObjectRef) and not raised and real(refs, **options) == [(101, None)]:
            raised.append(refs)
            raise ray.exceptions.OutOfMemoryError("killed by the memory monitor")
        return real(refs, **options)

    before = set(pool.call("pid"))
    monkeypatch.setattr(ray, "get", get)
    found = _run(pool, [Item(number=n) for n in range(3)])
    monkeypatch.undo()
    assert raised
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(3)}
    assert found[1].num_tries == 2
    assert len(before & set(pool.call("pid"))) == 1


@pytest.fixture
def made(pool: RayPool) -> list[Finished]:
    """Four large tensors, w = place + 10 everywhere, by whichever replica was free, that took too long to be made again."""
    return _make(pool, seconds=0.1)


def _make(pool: RayPool, seconds: float, homes: list[int] | None = None) -> list[Finished]:
    items = [Item(number=n, seconds=seconds) for n in range(4)]
    found = list(pool.map("tensors", items, pool.share(torch.full((100_000,), 10.0)), homes=homes, may_move=False))
    return sorted(found, key=lambda done: done.index)


def test_what_is_soon_made_again_stays_with_its_maker(pool: RayPool) -> None:
    made = _make(pool, seconds=0.0, homes=[0, 1, 1, 0])
    handles = [done.handle for done in made]
    assert all(isinstance(handle, Kept) for handle in handles)
    pids = pool.call("pid")
    assert [done.value for done in made] == [pids[home] for home in (0, 1, 1, 0)]
    # Of its own, of another's, and fetched by the caller: the same values.
    found = {done.index: done for done in pool.apply(add_up, [Item(number=2)] * 2, [handles[:2], handles[2:]], homes=[1, 0])}
    assert [done.value for _, done in sorted(found.items())] == [pids[1], pids[0]]
    assert [float(pool.fetch(found[i].handle)["w"].max()) for i in range(2)] == [21.0, 25.0]
    assert [float(pool.fetch(handle)["w"][0]) for handle in handles] == [10.0, 11.0, 12.0, 13.0]
    # They go with the shared value that they were made from.
    _make(pool, seconds=0.0)
    with pytest.raises(LostResult):
        pool.fetch(handles[0])


def test_all_that_a_dead_replica_kept_is_lost_at_once(pool: RayPool) -> None:
    handles = [done.handle for done in _make(pool, seconds=0.0, homes=[0, 1, 0, 1])]
    os.kill(pool.call("pid")[0], signal.SIGKILL)
    (found,) = pool.apply(add_up, [Item(number=4)], [handles], homes=[1])
    assert (found.lost, found.num_tries) == ((0, 2), 1)
    assert float(pool.fetch(handles[3])["w"][0]) == 13.0
    with pytest.raises(LostResult):
        pool.fetch(handles[2])


def test_a_replica_with_nothing_left_of_its_own_takes_what_others_wait_for(pool: RayPool) -> None:
    items = [Item(number=n, seconds=0.3) for n in range(4)]
    found = list(pool.map("tensors", items, pool.share(torch.ones(3)), homes=[0, 0, 0, 0]))
    assert {done.value for done in found} == set(pool.call("pid"))


def test_functions_run_in_replicas_on_what_other_replicas_made(pool: RayPool, made: list[Finished]) -> None:
    handles = [done.handle for done in made]
    items = [Item(number=2), Item(number=1), Item(number=4), Item(number=0)]
    held = [handles[:2], handles[3:], handles, []]
    found = {done.index: done for done in pool.apply(add_up, items, held)}
    assert {done.value for done in found.values()} <= set(pool.call("pid"))
    sums = [float(pool.fetch(found[i].handle)["w"].max()) for i in range(4)]
    assert sums == [21.0, 13.0, 46.0, 0.0]


def test_tensors_are_mapped_where_they_lie(pool: RayPool, made: list[Finished]) -> None:
    first, second = pool.fetch(made[1].handle), pool.fetch(made[1].handle)
    assert first["w"].data_ptr() == second["w"].data_ptr(), "one memory for all who fetch it on this node"
    assert (first["w"].dtype, first["w"].shape, set(first["w"].tolist())) == (torch.float32, (100_000,), {11.0})
    assert (first["none"].shape, first["half"].tolist(), first["half"].dtype) == ((0, 3), [1.0, 1.0], torch.bfloat16)


def test_a_replica_that_dies_in_a_function_costs_a_retry(pool: RayPool, made: list[Finished], tmp_path: Path) -> None:
    handles = [done.handle for done in made]
    items = [Item(number=4, act="die" if n == 1 else "", once=tmp_path / "died") for n in range(3)]
    found = {done.index: done for done in pool.apply(add_up, items, [handles] * 3)}
    assert [found[n].num_tries for n in range(3)] == [1, 2, 1]
    assert all(float(pool.fetch(done.handle)["w"][0]) == 46.0 for done in found.values())
    # What the dead replica had made is still in the store.
    assert [float(pool.fetch(handle)["w"][0]) for handle in handles] == [10.0, 11.0, 12.0, 13.0]
    (bad,) = pool.apply(add_up, [Item(number=0, act="raise")], [[]])
    assert (bad.num_tries, bad.lost) == (2, ())
    assert "item 0 is bad" in str(bad.error)


def test_a_lost_result_is_named_by_its_place_and_nothing_is_tried_again(pool: RayPool, made: list[Finished]) -> None:
    owner = _Owner.remote()
    (lost,) = ray.get(owner.put.remote(100))
    ray.kill(owner)
    with pytest.raises(ObjectLostError):
        for _ in range(300):
            ray.get(lost)
            time.sleep(0.1)
    before = pool.call("pid")
    (found,) = pool.apply(add_up, [Item(number=3)], [[made[0].handle, made[1].handle, lost]])
    assert (found.lost, found.num_tries) == ((2,), 1)
    assert found.error
    assert pool.call("pid") == before, "no replica is to blame"


def test_other_calls_come_last_and_are_numbered_on(pool: RayPool) -> None:
    items = [Item(number=n) for n in range(3)]
    last = ("tensors", [Item(number=5), Item(number=6, act="raise")])
    found = {done.index: done for done in pool.map("work", items, pool.share(torch.ones(3)), group=2, last=last)}
    assert sorted(found) == list(range(5))
    assert [float(found[n].value[0]) for n in range(3)] == [1.0, 2.0, 3.0]
    assert [float(pool.fetch(found[n].handle)["w"][0]) for n in (3, 4)] == [6.0, 7.0]
    assert found[3].value in pool.call("pid")


def test_items_that_go_together_are_answered_one_by_one(pool: RayPool) -> None:
    found = {done.index: done for done in pool.map("work", [Item(number=n) for n in range(7)], pool.share(100), group=3)}
    assert {index: done.value for index, done in found.items()} == {n: n + 100 for n in range(7)}
    assert all(done.num_tries == 1 for done in found.values())
    assert [pool.fetch(found[n].handle)[0] for n in range(7)] == list(range(7))
    assert found[0].replica == found[1].replica == found[2].replica


def test_of_items_that_went_together_only_the_bad_one_fails(pool: RayPool, tmp_path: Path) -> None:
    items = [Item(number=n, act={1: "raise", 4: "die"}.get(n, ""), once=tmp_path / "died") for n in range(6)]
    found = {done.index: done for done in pool.map("work", items, pool.share(100), group=3)}
    assert {n: found[n].value for n in (0, 2, 3, 4, 5)} == {n: n + 100 for n in (0, 2, 3, 4, 5)}
    assert "item 1 is bad" in str(found[1].error)
    # Once with the others at nobody's expense, then alone: twice for the bad one, as max_failures says.
    assert [found[n].num_tries for n in range(6)] == [2, 3, 2, 2, 2, 2]
