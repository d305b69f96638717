"""Longest first, and short clients together: places and sizes by hand; in the loop, nothing but who runs when."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest

from fedgraft.actors.hosting import Finished, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.scheduling import Schedule
from fedgraft.platform.tracking import Tracker
from fedgraft.types import ClientUpdate

FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}


def learned(**seconds: float) -> Schedule:
    schedule = Schedule()
    for name, value in seconds.items():
        schedule.learn(int(name[1:]), value)
    return schedule


def test_longest_first_unknown_in_the_middle_equal_ones_as_they_were() -> None:
    schedule = learned(c1=1.0, c2=5.0, c3=3.0)
    assert schedule.order([[1], [9], [2], [8], [3]]) == [2, 1, 3, 4, 0]  # 8 and 9 count as 3 s, and stay before client 3
    assert Schedule().order([[4], [2], [7]]) == [0, 1, 2]


def test_a_pass_of_several_clients_takes_as_long_as_all_of_them() -> None:
    assert learned(c1=1.0, c2=1.5, c3=2.0).order([[3], [1, 2]]) == [1, 0]


def test_what_was_learned_fades() -> None:
    schedule = learned(c1=8.0, c2=5.0)
    assert schedule.order([[2], [1]]) == [1, 0]
    schedule.learn(1, 3.0)  # 5.5
    assert schedule.order([[2], [1]]) == [1, 0]
    schedule.learn(1, 1.0)  # 3.25
    assert schedule.order([[2], [1]]) == [0, 1]


@pytest.mark.parametrize(
    ("seconds", "clients", "replicas", "expected"),
    [(0.009, 20, 2, 5), (0.001, 20, 2, 10), (0.001, 21, 2, 11), (1.0, 20, 2, 1), (0.02, 20, 16, 2), (0.0, 20, 2, 1)],
)
def test_short_clients_go_together_up_to_a_replicas_share(seconds: float, clients: int, replicas: int, expected: int) -> None:
    schedule = learned(**{f"c{i}": seconds for i in range(clients)})
    assert schedule.group([[i] for i in range(clients)], replicas) == expected


def test_before_anything_is_known_every_client_goes_alone() -> None:
    assert Schedule().group([[1], [2], [3]], 2) == 1


class Watched(LocalPool):
    """Two replicas as far as the loop knows; client 1 takes long, client 0 next to nothing."""

    size = 2

    def __init__(self) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.begun: list[list[int]] = []
        self.groups: list[int] = []

    def map(self, name: str, items: Sequence[Any], shared: Any, *, group: int = 1, **how: Any) -> Iterator[Finished]:
        if name != "update":
            yield from super().map(name, items, shared)
            return
        self.begun.append([task.client_id for task in items])
        self.groups.append(group)
        for finished in super().map(name, items, shared):
            assert isinstance(finished.value, ClientUpdate)
            seconds = {0: 0.001, 1: 0.03, 2: 0.002}[finished.value.client_id]
            yield replace(finished, value=replace(finished.value, seconds=seconds))


def test_the_loop_begins_with_the_longest_and_the_bits_stay(
    make_job: Callable[..., Any], run_job: Callable[..., Any], assert_same_bits: Callable[..., None]
) -> None:
    straight = run_job(make_job(FLEX))
    pool = Watched()
    job = make_job(FLEX)
    loop = RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=lambda event: None, is_stopping=lambda: False)
    state = loop.run()
    assert pool.begun == [[0, 1, 2], [1, 2, 0], [1, 2, 0]]
    assert pool.groups == [1, 2, 2]
    assert_same_bits(state.params, straight.state.params)
