"""One local Ray cluster for all tests under this folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """Start Ray once; afterwards nothing of it may be left."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    # "local": without an address Ray joins whatever cluster on this machine last noted its own.
    ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    left = [child for child in psutil.Process().children(recursive=True) if "ray" in child.name().lower()]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, f"still running after the tests: {alive}"


@pytest.fixture(scope="session")
def ray_processes() -> Callable[[str], list[psutil.Process]]:
    """Processes of this cluster, and of no other one on the machine, by what Ray calls them: ``Rank``, ``Driver``."""

    def find(name: str) -> list[psutil.Process]:
        found = []
        for process in psutil.Process().children(recursive=True):
            try:
                if f"ray::{name}" in " ".join(process.cmdline()):
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
        return found

    return find
