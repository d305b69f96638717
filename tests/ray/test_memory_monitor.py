"""Ray's memory monitor kills a replica, for real, on a cluster of its own with a limit just above what the machine uses now."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

pytestmark = pytest.mark.ray  # not among the slow tests, which run side by side: the limit is that of the whole machine


@pytest.mark.skipif(psutil.virtual_memory().available < 4 * 2**30, reason="needs 4 GiB of free memory to spend 1 or 2 of them")
def test_a_replica_that_the_monitor_killed_is_replaced(tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    memory = psutil.virtual_memory()
    limit = (memory.total - memory.available + 2**30) / memory.total
    env = clean | {"RAY_memory_usage_threshold": str(limit), "RAY_memory_monitor_refresh_ms": "100"}
    script = str(Path(__file__).with_name("swelling_replica.py"))
    done = subprocess.run(
        [sys.executable, script, str(tmp_path)], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(maxsplit=3) for line in done.stdout.splitlines() if line[:1].isdigit()]
    assert sorted((row[0], row[1], row[3]) for row in rows) == [("0", "100", "None"), ("1", "101", "None"), ("2", "102", "None")]
    assert next(int(row[2]) for row in rows if row[0] == "1") >= 2
    assert "memory" in done.stderr  # the warning names the monitor as the cause
