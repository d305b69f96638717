"""How many replicas a cluster has room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import ray

from fedgraft.actors.hosting import PoolOptions
from fedgraft.errors import ClusterError

__all__ = ["check_places", "choose_nodes", "count_places", "free_places", "places"]

_LESS = "lower executor.replicas, executor.threads, engine.world_size or executor.gpus_per_replica, or join a larger cluster"


def count_places(nodes: Iterable[Mapping[str, float]], options: PoolOptions) -> int:
    """Count the replicas that nodes have room for, whoever uses them now.

    Args:
        nodes: The whole resources of every living node, by name (``CPU``, ``GPU``).
        options: What each rank of a replica takes; a rank lies on one node, the ranks of a replica may lie on several.
    """
    bundle = {"CPU": float(options.threads), "GPU": options.gpus_per_replica / options.ranks}
    needed = {kind: amount for kind, amount in bundle.items() if amount > 0}
    slack = 1 + 1e-9  # a third of a GPU three times is a whole one
    ranks = sum(min(math.floor(node.get(kind, 0.0) / amount * slack) for kind, amount in needed.items()) for node in nodes)
    return ranks // options.ranks


def choose_nodes(
    free: Mapping[str, int], count: int, placement: str | None, taken: Iterable[str | None] = ()
) -> list[str | None]:
    """Choose a node for each of ``count`` replicas; ``None`` where Ray is to choose.

    Args:
        free: How many more replicas each node has room for, by its id.
        count: Replicas to place.
        placement: ``spread``: each on a node that has the fewest, ``pack``: node after node, the roomiest first. Nodes that are
            alike come in the order of their ids.
        taken: Nodes of the replicas that are there already.
    """
    left = {node: room for node, room in free.items() if room > 0}
    has = Counter(node for node in taken if node is not None)
    chosen: list[str | None] = []
    for _ in range(count):
        if placement is None or not left:
            chosen.append(None)
            continue
        if placement == "spread":
            node = min(left, key=lambda each: (has[each], -left[each], each))
        else:
            node = min(left, key=lambda each: (not has[each], -free[each], each))
        chosen.append(node)
        has[node] += 1
        left[node] -= 1
        if not left[node]:
            del left[node]
    return chosen


def free_places(options: PoolOptions) -> dict[str, int]:
    """Count the replicas that each living node has room for now, with all their ranks on it, by the node's id."""
    free = ray._private.state.available_resources_per_node()
    return {node["NodeID"]: count_places([free.get(node["NodeID"], {})], options) for node in ray.nodes() if node["Alive"]}


def places(options: PoolOptions) -> int:
    """Count the replicas that the cluster's living nodes have room for."""
    return count_places([node["Resources"] for node in ray.nodes() if node["Alive"]], options)


def check_places(options: PoolOptions) -> None:
    """Refuse what no cluster of this size can give, instead of waiting for it forever.

    Raises:
        ClusterError: There are not enough cores or GPUs, or no way to lay the ranks on the nodes.
    """
    total = ray.cluster_resources()
    ranks = f" of {options.ranks} ranks each" if options.ranks > 1 else ""
    cpus = options.replicas * options.ranks * options.threads
    for kind, wanted in (("CPU", cpus), ("GPU", options.replicas * options.gpus_per_replica)):
        has = float(total.get(kind, 0.0))
        if wanted > has:
            raise ClusterError(f"{options.replicas} replicas{ranks} want {wanted:g} {kind}s; the cluster has {has:g}", _LESS)
    found = places(options)
    if found < options.replicas:
        raise ClusterError(
            f"{options.replicas} replicas{ranks} with {options.threads} CPUs a rank are wanted; "
            f"the nodes have room for {found}, as a rank lies on one node",
            _LESS,
        )
