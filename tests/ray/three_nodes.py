"""Started by test_three_nodes.py: a run on a cluster of a head and three nodes with disks of their own, one of which goes."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.cluster_utils import Cluster

import fedgraft
from fedgraft.platform.progress import Event

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
    # Each node has a cache of its own, as on a disk of its own.
    nodes = [cluster.add_node(num_cpus=2, env_vars={"FEDGRAFT_CACHE": str(folder / f"node-{n}")}, **small) for n in range(3)]
    config = fedgraft.load_config(folder / "run.yaml", [f"executor.address={cluster.address}"])
    seen: dict[str, Any] = {}

    def on_event(event: Event) -> None:
        if event.kind == "note":
            print("note:", event.data["text"])
        if event.kind == "round" and event.data["round"] == 1:
            seen.update(_ranks(folder))
            print("replicas by node:", json.dumps(sorted(sum(node == at for at, _ in seen.values()) for node in _ids(nodes))))
            print("foreign paths:", json.dumps(sorted({path for _, paths in seen.values() for path in paths})))
            states = list((folder / "runs").rglob("clients/*/*.safetensors"))
            print("states in the run folder:", len(states))
            lost = nodes[0]
            assert lost.node_id in {at for at, _ in seen.values()}
            cluster.remove_node(lost, allow_graceful=False)
        if event.kind == "round" and event.data["round"] == 5:
            found = _ranks(folder)
            counts = sorted(sum(node.node_id == at for at, _ in found.values()) for node in nodes[1:])
            print("replicas by node after the loss:", json.dumps(counts))

    begun = time.monotonic()
    result = fedgraft.run(config, on_event=on_event)
    print("seconds:", round(time.monotonic() - begun, 1), file=sys.stderr)
    print("status:", result.status)
    print("folder:", result.folder)
    print("bases:", json.dumps(sorted(len(list((folder / f"node-{n}" / "bases").glob("*/model.safetensors"))) for n in range(3))))
    ray.shutdown()
    cluster.shutdown()


def _ids(nodes: list[Any]) -> list[str]:
    return [node.node_id for node in nodes]


def _ranks(folder: Path) -> dict[int, tuple[str, list[str]]]:
    """The replicas' processes: their node, and what they have mapped under the folder that is not on their node's own disk."""
    disks = {node["NodeID"]: node for node in ray.nodes()}
    found: dict[int, tuple[str, list[str]]] = {}
    for actor in ray._private.state.actors().values():
        if actor["ActorClassName"] == "Rank" and actor["State"] == "ALIVE":
            node = actor["Address"]["NodeID"]
            assert node in disks
            process = psutil.Process(actor["Pid"])
            own = process.environ()["FEDGRAFT_CACHE"]
            mapped = [region.path for region in process.memory_maps() if region.path.startswith(str(folder))]
            assert any(path.startswith(own) for path in mapped), mapped
            found[actor["Pid"]] = (node, [path for path in mapped if not path.startswith(own)])
    return found


if __name__ == "__main__":
    os.environ["FEDGRAFT_CACHE"] = str(Path(sys.argv[1]) / "driver")
    main(Path(sys.argv[1]))
