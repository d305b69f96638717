"""Which call a free replica begins next."""

from __future__ import annotations

import pytest

from fedgraft.actors.calls import CallQueue


def test_without_homes_items_go_out_in_order_and_together() -> None:
    queue = CallQueue(5, 2)
    assert [queue.take(replica, {3, 8}) for replica in (3, 8, 3, 8)] == [(0, 1), (2, 3), (4,), None]
    assert not queue
    assert not CallQueue(0, 2)


def test_its_own_come_first_and_only_those_of_one_home_go_together() -> None:
    queue = CallQueue(6, 2, [7, 9, 7, 7, 9, 9])
    assert [queue.take(9, {7, 9}) for _ in range(3)] == [(1, 4), (5,), (0, 2)]
    assert queue.take(7, {7, 9}) == (3,)
    assert queue.take(7, {7, 9}) is None


@pytest.mark.parametrize("home_is_there", [True, False])
def test_what_may_not_move_waits_as_long_as_its_home_is_there(home_is_there: bool) -> None:
    queue = CallQueue(3, 1, [7, 9, 9], may_move=False)
    assert queue.take(7, {7, 9}) == (0,)
    assert queue.take(7, {7, 9} if home_is_there else {7}) == (None if home_is_there else (1,))
    assert queue.take(9, {9}) == ((1,) if home_is_there else (2,))


def test_what_failed_comes_before_all_others_each_by_itself() -> None:
    queue = CallQueue(4, 2, [0, 0, 1, 1])
    assert queue.take(0, {0, 1}) == (0, 1)
    queue.put_back((0, 1))
    assert [queue.take(0, {0, 1}) for _ in range(3)] == [(0,), (1,), (2, 3)]


def test_what_comes_last_is_begun_by_who_finds_nothing_else_to_do() -> None:
    queue = CallQueue(3, 2, [7, 9, 9], num_last=2)
    assert queue.count == 5
    assert [queue.take(7, {7, 9}) for _ in range(4)] == [(0,), (1, 2), (3,), (4,)]
    assert not queue
    strict = CallQueue(2, 1, [9, 9], may_move=False, num_last=1)
    assert [strict.take(7, {7, 9}) for _ in range(2)] == [(2,), None]
    strict.put_back((2,))
    assert strict.take(9, {7, 9}) == (2,)
