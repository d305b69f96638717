"""Four replicas give the bits of one process, whoever answers first: extras, assignments, private state, through ``verify``."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

import fedgraft

pytestmark = pytest.mark.ray
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def agreement(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("chaos_agreement")


def test_four_replicas_agree_with_one_process(agreement: ModuleType, tmp_path: Path) -> None:
    material = agreement.make_material(tmp_path)
    reference = agreement.run_alone(material, "alone", **agreement.PARTS)
    config = material.config("replicas", executor={"kind": "ray", "replicas": 4}, **agreement.PARTS)
    found = fedgraft.verify(reference, fedgraft.run(fedgraft.load_config(config)).folder)
    assert [str(difference) for difference in found.differences] == []
    assert {run.name for run in found.runs} == {f"{label}/seed-0" for label in agreement.AGREEING}
    assert all(run.rounds > agreement.ROUNDS for run in found.runs)  # the state before round 1, too
