"""Started by test_fake_gpus.py: replicas on a cluster whose nodes say that they have GPUs."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

import fedgraft
from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.testing import Double
from fedgraft.errors import ClusterError, ConfigError


def main(folder: Path) -> None:
    small = {"object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False} | small)
    cluster.add_node(num_cpus=8, num_gpus=2, **small)
    cluster.add_node(num_cpus=1, **small)
    ray.init(address=cluster.address, log_to_driver=False)
    print("four halves:", json.dumps(_gpus(PoolOptions(replicas=4, gpus_per_replica=0.5))))
    print("one of two ranks:", json.dumps(_gpus(PoolOptions(replicas=1, ranks=2, gpus_per_replica=2.0))))

    begun = time.monotonic()
    for name, overrides in {
        "too many": ["executor.replicas=3", "executor.gpus_per_replica=1"],
        "too wide": ["executor.replicas=1", "engine.world_size=4", "executor.gpus_per_replica=4"],
        "too small": ["executor.gpu_gib=0.1"],
    }.items():
        try:
            fedgraft.run(fedgraft.load_config(folder / "run.yaml", overrides))
        except (ClusterError, ConfigError) as error:
            print(f"{name}:", error.exit_code, " ".join(str(error).split()))
    print("refused within 60 s:", time.monotonic() - begun < 60)
    print("folders:", len(list((folder / "runs").glob("*"))))
    # Left open, with GPUs that are said to be large: as many replicas as may share one.
    run_id = fedgraft.detach(fedgraft.load_config(folder / "run.yaml", ["executor.gpu_gib=80"]))
    written = fedgraft.load_config(folder / "runs" / run_id / "config.yaml")
    print("worked out:", written.executor.gpus_per_replica, written.executor.address)
    fedgraft.stop(run_id, is_at_once=True)
    ray.shutdown()
    cluster.shutdown()


def _gpus(options: PoolOptions) -> list[int]:
    """How many ranks have each GPU."""
    pool = RayPool(options)
    pool.host(Double)
    actors: list[Any] = [actor for replica in pool._fleet.replicas.values() for actor in replica._actors]
    found = ray.get([actor.__ray_call__.remote(lambda hosted: ray.get_gpu_ids()) for actor in actors])
    pool.close()
    return sorted(Counter(str(gpu) for each in found for gpu in each).values())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
