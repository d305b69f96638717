"""One local Ray cluster for all tests under this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator

import psutil
import pytest
import ray


@pytest.fixture(scope="session", autouse=True)
def ray_cluster() -> Iterator[None]:
    """Start Ray once; afterwards nothing of it may be left."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
    left = [child for child in psutil.Process().children(recursive=True) if "ray" in child.name().lower()]
    _, alive = psutil.wait_procs(left, timeout=20)
    assert not alive, f"still running after the tests: {alive}"
