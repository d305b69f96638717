"""How many replicas fit on nodes, counted by hand."""

from __future__ import annotations

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.places import count_places


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
