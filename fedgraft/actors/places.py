"""How many replicas a cluster has room for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping

import ray

from fedgraft.actors.hosting import PoolOptions
from fedgraft.errors import ClusterError

__all__ = ["check_places", "choose_nodes", "cluster_text", "count_places", "free_places", "places", "places_by_node"]

_LESS = "lower executor.replicas, executor.threads, engine.world_size or executor.gpus_per_replica, or join a larger cluster"


def count_places(nodes: Iterable[Mapping[str, float]], options: PoolOptions) -> int:
    """Count the replicas that nodes have room for, whoever uses them now.

    Args:
        nodes: The whole resources of every living node, by name (``CPU``, ``GPU``).
        options: What each rank of a replica takes; a rank lies on one node, the ranks of a replica may lie on several.
    """
    return sum(_ranks_on(node, options) for node in nodes) // options.ranks


def _ranks_on(node: Mapping[str, float], options: PoolOptions) -> int:
    """Ranks that a node's cores and GPUs have room for."""
    bundle = {"CPU": float(options.threads), "GPU": options.gpus_per_replica / options.ranks}
    needed = {kind: amount for kind, amount in bundle.items() if amount > 0}
    slack = 1 + 1e-9  # a third of a GPU three times is a whole one
    return min(math.floor(node.get(kind, 0.0) / amount * slack) for kind, amount in needed.items())


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


def places_by_node(options: PoolOptions, rank_bytes: int, shared_bytes: int) -> int | None:
    """Count the replicas that several nodes have room for, in memory, too.

    Args:
        options: What each rank of a replica takes.
        rank_bytes: Memory of a rank's own.
        shared_bytes: What a node's replicas have in common.

    Returns:
        At least 1; ``None`` where this process is in no cluster, or in one of a single node, whose free memory tells more.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    if len(nodes) < 2:
        return None
    held = [int(max(0.0, node.get("memory", 0.0) - shared_bytes) // max(1, rank_bytes)) for node in nodes]
    ranks = sum(min(_ranks_on(node, options), room) for node, room in zip(nodes, held, strict=True))
    return max(1, ranks // options.ranks)


def places(options: PoolOptions) -> int:
    """Count the replicas that the cluster has room for: its living nodes, or more where an autoscaler may add some."""
    found = count_places([node["Resources"] for node in ray.nodes() if node["Alive"]], options)
    most = _most_resources()
    if most is None:
        return found
    grown = [most.get("CPU", 0.0) // (options.threads * options.ranks)]
    grown += [most.get("GPU", 0.0) // options.gpus_per_replica] if options.gpus_per_replica else []
    return max(found, int(min(grown)))


def cluster_text() -> str:
    """What the cluster has, node by node, alike ones together: ``2 nodes with 8 CPUs and 1 GPU``."""
    counted = Counter(
        f"{node['Resources'].get('CPU', 0.0):g} CPUs and {node['Resources'].get('GPU', 0.0):g} GPUs"
        for node in ray.nodes()
        if node["Alive"]
    )
    listed = [f"{count} node{'s' if count > 1 else ''} with {text}" for text, count in sorted(counted.items())]
    most = _most_resources()
    if most is not None:
        listed.append(f"up to {most.get('CPU', 0.0):g} CPUs and {most.get('GPU', 0.0):g} GPUs with what its autoscaler may add")
    return ", ".join(listed)


def _most_resources() -> dict[str, float] | None:
    """The most that an autoscaler may bring the cluster to; ``None`` where there is none, or it has no limit to tell."""
    found: dict[str, float] | None = ray._private.state.state.get_max_resources_from_cluster_config()
    return found or None


def check_places(options: PoolOptions) -> None:
    """Refuse what no cluster of this size can give, instead of waiting for it forever.

    Raises:
        ClusterError: There are not enough cores or GPUs, or no way to lay the ranks on the nodes.
    """
    total, most = ray.cluster_resources(), _most_resources() or {}
    ranks = f" of {options.ranks} ranks each" if options.ranks > 1 else ""
    replicas = f"{options.replicas} replica{'s' if options.replicas > 1 else ''}"
    cpus = options.replicas * options.ranks * options.threads
    for kind, wanted in (("CPU", cpus), ("GPU", options.replicas * options.gpus_per_replica)):
        has = max(float(total.get(kind, 0.0)), float(most.get(kind, 0.0)))
        if wanted > has * (1 + 1e-9):
            raise ClusterError(f"{replicas}{ranks} want {wanted:g} {kind}s; the cluster has {has:g} ({cluster_text()})", _LESS)
    found = places(options)
    if found < options.replicas:
        gpus = f" and {options.gpus_per_replica / options.ranks:g} GPUs" if options.gpus_per_replica else ""
        raise ClusterError(
            f"{replicas}{ranks} with {options.threads} CPUs{gpus} a rank are wanted; "
            f"the nodes have room for {found}, as a rank lies on one node ({cluster_text()})",
            _LESS,
        )
