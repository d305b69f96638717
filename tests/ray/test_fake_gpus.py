"""Fractions of GPUs, and several for one replica, on nodes that only say that they have some; in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.ray


def test_gpus_are_shared_and_wrong_requests_are_refused(
    make_base: Callable[..., Path], data_folder: Path, tmp_path: Path
) -> None:
    config = {
        "name": "gpus",
        "model": {"path": str(make_base())},
        "data": {
            "path": str(data_folder.parent / "clients.jsonl"),
            "preset": "custom",
            "fields": {"prompt": "q", "response": "a", "label": "kind"},
        },
        "method": {"name": "fedavg"},
        "tracking": {"enabled": False},
        "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("fake_gpus.py")), str(tmp_path)],
            env=clean | {"RAY_TMPDIR": temporary, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["four halves"] == "[2, 2]"
    assert lines["one of two ranks"] == "[1, 1]"
    has = "1 node with 0 CPUs and 0 GPUs, 1 node with 1 CPUs and 0 GPUs, 1 node with 8 CPUs and 2 GPUs"
    assert lines["too many"].startswith(f"3 3 replicas want 3 GPUs; the cluster has 2 ({has})")
    assert lines["too wide"].startswith("3 1 replica of 4 ranks each want 4 GPUs; the cluster has 2")
    assert lines["too small"].startswith("2 GPUs: 1 problem executor.gpus_per_replica: got a replica of fedavg that needs")
    assert lines["refused within 60 s"] == "True"
    assert lines["folders"] == "0"
    assert lines["worked out"] == "0.25 None"
