"""A run that is killed five times, each time otherwise, ends as if nothing had happened; the real command, watched from outside.

Lost nodes and frozen replicas are struck in ``tests/ray``. The longer one, with all kinds and several seeds, is
``benchmarks/chaos.py``.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedgraft

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="kills are aimed through /proc and inotify")]
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROUNDS = 14
KINDS = (
    "command",  # first, as two small agents of a Ray whose head was killed live on for a minute
    "replica_at_work",
    "private_unrenamed",
    "reply_unacknowledged",
    "checkpoint_unrenamed",
)


@pytest.fixture
def chaos(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("chaos")


@pytest.mark.timeout(900)
def test_no_kill_changes_a_bit_and_verify_would_see_one(chaos: ModuleType, tmp_path: Path) -> None:
    material = chaos.make_material(tmp_path)
    reference = chaos.run_alone(material, "undisturbed", rounds=ROUNDS, methods=chaos.METHODS)
    config = chaos.chaos_config(material, "struck", ROUNDS)
    trial = chaos.strike_at(material, reference, config, KINDS, seed=0, limit_s=500.0)
    assert {kind: found for kind, found in trial["wrong"].items() if found} == {}
    assert Counter(strike.kind for strike in trial["strikes"]) == Counter(KINDS)  # each one is known to have hit
    assert trial["unprovoked"] == []
    assert trial["rounds"] >= 2 * ROUNDS
    assert trial["private_states"] >= 2 * chaos.NUM_CLIENTS
    assert -9 in trial["codes"]  # the command itself was killed,
    assert trial["codes"][-1] == 0  # and came to its end
    _assert_a_flipped_bit_is_found(reference, trial["folder"], tmp_path / "tampered")


def _assert_a_flipped_bit_is_found(reference: Path, struck: Path, copy: Path) -> None:
    shutil.copytree(struck, copy)
    state = sorted((copy / "flex" / "seed-0" / "clients" / "000003").glob("round-*.safetensors"))[-1]
    tensors = load_file(state)
    key = min(tensors)
    tensors[key].view(torch.int32).view(-1)[0] ^= 1
    save_file(tensors, state)
    found = fedgraft.verify(reference, copy)
    assert not found.is_same
    assert any("000003" in str(difference) for difference in found.differences), found.differences
    verify: list[Any] = [sys.executable, "-m", "fedgraft", "verify"]
    assert subprocess.run([*verify, reference, copy], capture_output=True, check=False).returncode == 7
    assert subprocess.run([*verify, reference, struck], capture_output=True, check=False).returncode == 0
