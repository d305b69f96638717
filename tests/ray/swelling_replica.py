"""Started by test_memory_monitor.py: a pool whose replica takes more memory than Ray's monitor lets it."""

from __future__ import annotations

import sys
from pathlib import Path

import ray

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.testing import Double, Item


def main(folder: Path) -> None:
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=80 * 2**20)
    pool = RayPool(PoolOptions(replicas=1, max_failures=5, task_timeout_s=60))
    pool.host(Double)
    items = [Item(number=0), Item(number=1, act="swell", once=folder / "swollen"), Item(number=2)]
    for done in pool.map("work", items, pool.share(100)):
        print(done.index, done.value, done.num_tries, done.error)
    pool.close()
    ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
