"""How many replicas fit on nodes, counted by hand."""

from __future__ import annotations

import pytest

import fedgraft.actors.places as module
from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.places import check_places, choose_nodes, cluster_text, count_places, places, places_by_node
from fedgraft.errors import ClusterError


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


# ---- a cluster that only says what it has


class _Ray:
    """What places ask of Ray."""

    def __init__(self, nodes: list[dict[str, float]], most: dict[str, float] | None = None) -> None:
        self._nodes = nodes
        self._most = most
        self._private = self
        self.state = self

    def is_initialized(self) -> bool:
        return bool(self._nodes)

    def nodes(self) -> list[dict[str, object]]:
        return [{"Alive": True, "NodeID": str(at), "Resources": node} for at, node in enumerate(self._nodes)] + [
            {"Alive": False, "NodeID": "gone", "Resources": {"CPU": 1000.0}}
        ]

    def cluster_resources(self) -> dict[str, float]:
        return {kind: sum(node.get(kind, 0.0) for node in self._nodes) for kind in ("CPU", "GPU")}

    def get_max_resources_from_cluster_config(self) -> dict[str, float] | None:
        return self._most


def test_what_an_autoscaler_may_add_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    head = [{"CPU": 8.0}]
    wanted = PoolOptions(replicas=6, threads=4, gpus_per_replica=1.0)
    monkeypatch.setattr(module, "ray", _Ray(head))
    assert places(wanted) == 0
    with pytest.raises(ClusterError, match=r"want 24 CPUs; the cluster has 8 \(1 node with 8 CPUs and 0 GPUs\)"):
        check_places(wanted)
    monkeypatch.setattr(module, "ray", _Ray(head, {"CPU": 136.0, "GPU": 8.0}))
    assert places(wanted) == 8
    check_places(wanted)
    assert "up to 136 CPUs and 8 GPUs with what its autoscaler may add" in cluster_text()
    with pytest.raises(ClusterError, match="9 replicas want 9 GPUs; the cluster has 8"):
        check_places(PoolOptions(replicas=9, threads=4, gpus_per_replica=1.0))


def test_memory_bounds_the_replicas_of_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    options = PoolOptions(replicas=1, threads=1)
    nodes = [{"CPU": 8.0, "memory": 10.0}, {"CPU": 2.0, "memory": 100.0}, {"CPU": 0.0, "memory": 100.0}]
    monkeypatch.setattr(module, "ray", _Ray(nodes))
    assert places_by_node(options, rank_bytes=3, shared_bytes=4) == 2 + 2  # (10 - 4) // 3, and two cores
    two = PoolOptions(replicas=1, threads=1, ranks=2)
    assert places_by_node(two, rank_bytes=3, shared_bytes=4) == 2
    assert places_by_node(options, rank_bytes=3000, shared_bytes=4) == 1  # the memory monitor will tell
    monkeypatch.setattr(module, "ray", _Ray(nodes[:1]))
    assert places_by_node(options, rank_bytes=3, shared_bytes=4) is None  # one node: its free memory tells more
    monkeypatch.setattr(module, "ray", _Ray([]))
    assert places_by_node(options, rank_bytes=3, shared_bytes=4) is None
