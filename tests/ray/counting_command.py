"""Started by test_killed_command.py: a command that counts on a cluster of its own, until somebody ends it."""

from __future__ import annotations

import sys
from pathlib import Path

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.testing import Counting
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import launch

if __name__ == "__main__":
    job = Counting(folder=Path(sys.argv[1]), steps=100_000, options=PoolOptions(replicas=2), step_s=0.05)
    launch(job, ExecutorConfig(kind="ray", address="local"), lambda event: None)
