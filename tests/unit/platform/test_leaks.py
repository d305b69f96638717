"""Many rounds in one process: no open file and no tensor more at the end than after the first few."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch

from fedgraft.platform.config import EvaluationConfig

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
WARM, LAST = 6, 24


def held() -> dict[str, int]:
    gc.collect()
    tensors = [each for each in gc.get_objects() if issubclass(type(each), torch.Tensor)]
    return {
        "files": psutil.Process().num_fds(),
        "threads": psutil.Process().num_threads(),
        "tensors": len(tensors),
        "bytes": sum(each.untyped_storage().nbytes() for each in tensors if not each.is_meta),
    }


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "fedavg"}, {"name": "flex", "calibration_examples": 4}], ids=["fedavg", "flex"])
def test_rounds_leave_nothing_behind(method: dict[str, Any], make_job: Callable[..., Any], run_job: Any) -> None:
    seen: dict[int, dict[str, int]] = {}
    job = make_job(
        method,
        rounds=LAST,
        federation={"cohort_size": 2},
        evaluation=EvaluationConfig(every=3, at_start=False, generate="never", choices="never"),
    )

    def before(loop: Any) -> None:
        inner = loop._pool

        class Forgetful:  # the tests' own pool keeps every reply
            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def map(self, *given: Any, **how: Any) -> Any:
                for finished in inner.map(*given):
                    inner.replies.clear()
                    yield finished

        loop._pool = Forgetful()
        emit = loop._emit

        def watch(event: Any) -> None:
            if event.kind == "round" and event.data["round"] in (WARM, LAST):
                seen[event.data["round"]] = held()
            emit(event)

        loop._emit = watch

    run_job(job, before=before)
    assert seen[LAST]["tensors"] <= seen[WARM]["tensors"]
    assert seen[LAST]["bytes"] <= seen[WARM]["bytes"]
    assert seen[LAST]["files"] <= seen[WARM]["files"]
    assert seen[LAST]["threads"] <= seen[WARM]["threads"]


@pytest.fixture
def leaks(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("leaks")


def samples(*, grows: float = 0.0, files: int = 10) -> list[dict[str, Any]]:
    rows = []
    for count in range(0, 200, 10):
        size = {"uss": 300 + grows * count / 100, "pss": 310.0, "files": files if count >= 150 else 10, "threads": 5}
        rows.append({"method": "flex", "round": count, "seconds": 0.0, "driver": size, "store": 1.0})
    return rows


def test_the_benchmark_tells_growth_by_process_and_says_what_broke(leaks: ModuleType) -> None:
    found = leaks.growth(samples(grows=3.0), "flex", "driver", 50)
    assert found["slope"] == pytest.approx(3.0)
    assert found["rounds"] == 130
    assert found["files"] == {"start": 10, "end": 10, "most": 10}
    table = {"flex": {"driver": found, "store": leaks.growth(samples(), "flex", "store", 50)}}
    (said,) = leaks.judge(table)
    assert "driver grows by 3.0 MiB per 100 rounds" in said
    assert leaks.judge({"flex": {"driver": leaks.growth(samples(grows=0.5), "flex", "driver", 50)}}) == []
    (said,) = leaks.judge({"flex": {"driver": leaks.growth(samples(files=14), "flex", "driver", 50)}})
    assert "14 open files, 10 after the warm-up" in said
    assert leaks.growth(samples(), "flex", "driver", 180) is None
