"""The cohort benchmark's machinery at a size of no interest: it measures both ways, and sees an update that is not the same."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fedgraft.training.cohort import CohortEngine


@pytest.fixture
def cohort(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(Path(__file__).parents[3] / "benchmarks")
    return importlib.import_module("cohort")


@pytest.mark.parametrize("slots", ["fedavg", "flex", "everywhere"])
def test_it_measures_both_ways(slots: str, cohort: ModuleType) -> None:
    found = cohort.measure(cohort.SIZES["tiny"], slots, 3, 1, is_ragged=True)
    assert found["clients"] == 3
    assert math.isfinite(found["speedup_wall"])
    assert found["largest_difference"] < 1e-5 < found["largest_move"]
    assert found["routed_elsewhere"] == 0 < found["routed"]


def test_it_sees_an_update_that_differs(cohort: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    restore = CohortEngine.restore

    def wrong(self: CohortEngine, number: int) -> None:
        restore(self, number)
        with torch.no_grad():
            self._parameters[self._slot_names[0]].add_(2e-5)

    monkeypatch.setattr(CohortEngine, "restore", wrong)
    with pytest.raises(AssertionError, match="largest_difference"):
        cohort.measure(cohort.SIZES["tiny"], "fedavg", 2, 1, is_ragged=False)
