"""The driver actor is stopped by a signal that it cannot see: it is ended and goes on in a new life."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.testing import Counting
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import launch

pytestmark = pytest.mark.slow


def test_a_frozen_driver_is_ended_and_restarted(tmp_path: Path) -> None:
    job = Counting(folder=tmp_path, steps=3, options=PoolOptions(replicas=1), act="freeze", at=1)
    events: list[Any] = []
    assert launch(job, ExecutorConfig(kind="ray", heartbeat_timeout_s=5), events.append) == [100, 101, 102]
    notes = [event.data["text"] for event in events if not isinstance(event, int)]
    assert "the driver actor has given no sign of life for 5 s; it is ended" in notes
    first, second = job.lives()
    assert not set(first) & set(second)
    assert not any(psutil.pid_exists(pid) for pid in first)
