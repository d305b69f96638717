"""A run on three nodes with disks of their own and a store beside them, on a cluster of a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import fedgraft
from fedgraft.platform.mirror import fetch_experiment

pytestmark = pytest.mark.ray


@pytest.fixture
def config(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "name": "nodes",
        "model": {"path": str(make_base())},
        "data": {
            "path": str(data_folder.parent / "clients.jsonl"),
            "preset": "custom",
            "fields": {"prompt": "q", "response": "a", "label": "kind"},
            "max_length": 32,
        },
        "method": {"name": "flex"},
        "training": {"learning_rate": 0.01},
        "federation": {"rounds": 5, "local_steps": 1, "batch_size": 4},
        "evaluation": {"every": 5, "at_start": False, "generate": "never"},
        "executor": {"kind": "ray", "replicas": 3, "placement": "spread"},
        "tracking": {"enabled": False},
        "output": {"folder": str(tmp_path / "runs"), "report": False, "storage": f"file://{tmp_path}/store"},
    }


def test_three_nodes_give_the_bits_of_one_and_one_of_them_may_go(config: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    clean = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp") as temporary:  # short, for its sockets
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("three_nodes.py")), str(tmp_path)],
            env=clean | {"RAY_TMPDIR": temporary, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0", "RAY_USAGE_STATS_ENABLED": "0"},
            capture_output=True,
            text=True,
            timeout=400,
            check=False,
        )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["replicas by node"] == "[1, 1, 1]"
    assert lines["foreign paths"] == "[]"
    assert lines["states in the run folder"] == "0"  # they are in the store
    assert lines["replicas by node after the loss"] == "[1, 2]"
    assert lines["status"] == "finished"
    assert lines["bases"] == "[1, 1, 1]"
    ran = Path(lines["folder"])

    alone = config | {"name": "alone", "executor": {"kind": "in_process"}, "output": config["output"] | {"storage": None}}
    reference = fedgraft.run(fedgraft.load_config(alone))
    found = fedgraft.verify(ran, reference.folder)
    assert found.is_same, found.differences
    assert found.runs[0].private_states == 12  # of both runs: three clients at two checkpoints
    # What is in the store is enough to go on with, on a machine that has nothing of the run.
    kept = fetch_experiment(f"file://{tmp_path}/store/{ran.parents[1].name}", tmp_path / "elsewhere")
    assert fedgraft.verify(kept, reference.folder).is_same
