"""How many replicas fit on nodes, counted by hand."""

from __future__ import annotations

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.places import choose_nodes, count_places


def test_a_rank_lies_on_one_node() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 4.0}]
    assert count_places(nodes, PoolOptions(replicas=1)) == 8
    assert count_places(nodes, PoolOptions(replicas=1, threads=3)) == 2  # not 8 // 3 + ...: one CPU of each is left over
    assert count_places(nodes, PoolOptions(replicas=1, threads=5)) == 0
    assert count_places([], PoolOptions(replicas=1)) == 0


def test_ranks_of_a_replica_may_lie_on_several_nodes() -> None:
    nodes = [{"CPU": 3.0}, {"CPU": 2.0}]
    assert count_places(nodes, PoolOptions(replicas=1, ranks=2)) == 2
    assert count_places(nodes, PoolOptions(replicas=1, ranks=5)) == 1
    assert count_places(nodes, PoolOptions(replicas=1, ranks=6)) == 0


def test_the_scarcer_resource_decides() -> None:
    nodes = [{"CPU": 16.0, "GPU": 2.0}, {"CPU": 16.0}]
    assert count_places(nodes, PoolOptions(replicas=1, gpus_per_replica=1.0)) == 2
    assert count_places(nodes, PoolOptions(replicas=1, gpus_per_replica=2.0, ranks=2)) == 1
    assert count_places(nodes, PoolOptions(replicas=1, gpus_per_replica=1 / 3)) == 6
    assert count_places([{"CPU": 1.0, "GPU": 2.0}], PoolOptions(replicas=1, gpus_per_replica=1.0)) == 1


def test_spread_takes_the_node_with_the_fewest_and_pack_the_fewest_nodes() -> None:
    free = {"a": 2, "b": 8, "c": 2}
    assert choose_nodes(free, 3, "spread") == ["b", "a", "c"]
    assert choose_nodes(free, 5, "spread") == ["b", "a", "c", "b", "a"]
    assert choose_nodes(free, 3, "pack") == ["b", "b", "b"]
    assert choose_nodes(free, 10, "pack") == ["b"] * 8 + ["a", "a"]
    assert choose_nodes(free, 2, None) == [None, None]


def test_a_replacement_looks_at_where_the_others_are() -> None:
    free = {"a": 1, "b": 3}
    assert choose_nodes(free, 1, "spread", ["b", "b", None]) == ["a"]
    assert choose_nodes(free, 1, "pack", ["a"]) == ["a"]
    assert choose_nodes(free, 1, "pack", ["gone"]) == ["b"]


def test_what_finds_no_room_now_is_left_to_ray() -> None:
    assert choose_nodes({"a": 1, "b": 0}, 2, "spread") == ["a", None]
    assert choose_nodes({}, 1, "pack") == [None]
