"""Whole nodes are lost, on a cluster of their own in a process of its own: this session's cluster has one node."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray


def test_a_lost_node_costs_replicas_and_never_a_result(tmp_path: Path) -> None:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    # Where Ray notes the address of its latest cluster, which others on this machine would join; a short path, for its sockets.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("lost_nodes.py")), str(tmp_path)],
            env=clean | {"RAY_TMPDIR": temporary, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["values"] == "[100, 101, 102, 103, 104, 105] size: 1"
    assert "cannot be replaced (the cluster has room for 1 replica); going on with 1 replica" in lines["notes"]
    assert int(lines["lost results"]) == int(lines["results on the node that goes"]) >= 1
    assert lines["refused"].startswith("ClusterError 3 replica")
    assert lines["refused within 60 s"] == "True"
