"""The memory benchmark on real processes: a mapped base is nobody's own memory, a copied one is."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from ray import cloudpickle

from fedgraft.protocols import TrainSpec

pytestmark = pytest.mark.ray
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    module = importlib.import_module("memory")
    cloudpickle.register_pickle_by_value(module)  # replicas do not have the benchmarks on their path
    yield module
    cloudpickle.unregister_pickle_by_value(module)


def test_a_mapped_base_is_shared_and_one_trained_in_full_is_not(memory: ModuleType, tmp_path: Path) -> None:
    base, num_bytes = memory.make_base(tmp_path, 0.01)

    def growth(method: dict[str, Any]) -> dict[str, list[float]]:
        spec = memory.Spec(row=memory.ROWS["torch"], base=base, method=method, steps=1, train=TrainSpec(learning_rate=1e-3))
        row = memory.measure(spec, num_bytes)
        assert row["same_base"]
        assert len(set(row["pids"])) == 2
        found: dict[str, list[float]] = row["growth_percent"]
        return found

    assert num_bytes > 100e6
    assert max(growth({"name": "fedavg"})["read"]) < 12  # 4 MB of 143 here; the rest is room for another allocator
    # The routed experts are 70 % of this base; each process gets a copy of its own, and one of the start values.
    assert min(growth({"name": "fedavg", "lora": [], "full": ["experts"]})["loaded"]) > 100
