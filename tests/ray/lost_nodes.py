"""Started by test_lost_nodes.py: a pool on a cluster of three nodes of its own, two of which go."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from fedgraft.actors.hosting import LostResult, PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.testing import Double, Item
from fedgraft.errors import ClusterError

# A lost node is noticed in about 3 s, not 15.
QUICK = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 2000,
    "health_check_failure_threshold": 2,
}


def main(folder: Path) -> None:
    small = {"object_store_memory": 80 * 2**20}
    head = {"num_cpus": 0, "include_dashboard": False, "_system_config": QUICK}
    cluster = Cluster(initialize_head=True, head_node_args=head | small)
    nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
    ray.init(address=cluster.address, log_to_driver=False)
    notes: list[str] = []
    pool = RayPool(PoolOptions(replicas=2, max_failures=3, start_timeout_s=60, task_timeout_s=120), notes.append)
    pool.host(Double)
    shared = pool.share(100)
    home = ray.get(pool._fleet.replicas[0]._actors[0].__ray_call__.remote(_node))
    first = list(pool.map("work", [Item(number=n) for n in range(4)], shared))
    print("results on the node that goes:", len([done for done in first if done.replica == 0]))

    # A node goes while its replica is at work: the call is run again elsewhere, by fewer replicas.
    items = [Item(number=0, act="hang", once=folder / "hangs"), *(Item(number=n) for n in range(1, 6))]
    found = []
    for done in pool.map("work", items, shared):
        found.append(done)
        if len(found) == 1:
            assert done.replica == 1
            cluster.remove_node(next(node for node in nodes if node.node_id == home), allow_graceful=False)
    print("values:", sorted(done.value for done in found), "size:", pool.size)
    print("notes:", notes)
    lost = 0
    for handle in [done.handle for done in first]:
        try:
            assert len(pool.fetch(handle)) == 200_000
        except LostResult:
            lost += 1
    print("lost results:", lost)

    # The last one goes: no replica can be placed, and that is said at once.
    begun = time.monotonic()
    (left,) = cluster.worker_nodes
    cluster.remove_node(left, allow_graceful=False)
    try:
        print(list(pool.map("work", [Item(number=1)], shared)))
    except ClusterError as error:
        print("refused:", type(error).__name__, error.exit_code, error)
    print("refused within 60 s:", time.monotonic() - begun < 60)
    pool.close()
    ray.shutdown()
    cluster.shutdown()


def _node(hosted: object) -> str:
    return str(ray.get_runtime_context().get_node_id())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
