"""Every method on the DeepSpeed engine, one rank, as on the reference: updates, private state, and what evaluation says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedgraft.protocols import TrainSpec
from fedgraft.registry import METHODS
from fedgraft.training.config import EngineConfig
from fedgraft.types import Broadcast, ClientUpdate, EvaluationTask, Params

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]
# Two rounds of AdamW from float32 sums in another order. Where a gradient is nearly zero AdamW goes by its sign alone, so one
# value in fifty may lie further off, by no more than a step of the rate (0.02).
CLOSE = {"atol": 2e-5, "rtol": 1e-3}
STEP = 0.02


def _engine(stage: int) -> EngineConfig:
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else None
    return EngineConfig(name="deepspeed", device="cpu", stage=stage, deepspeed=zero)  # type: ignore[arg-type]


def _two_rounds(bench: Any) -> tuple[ClientUpdate, Params, Params, Any]:
    params = bench.worker.initial_params()
    _, delta = bench.train(1, 1, params)
    params = {key: value + delta.get(key, 0) for key, value in params.items()}
    bench.train(0, 1, params)  # another client on the same replica in between
    update, delta = bench.train(1, 2, params)
    private = bench.private(1) if bench.worker.private else {}
    task = EvaluationTask(
        round_idx=2, view="personal" if private else "global", tasks=("client", "retention"), keys=tuple(params), client_id=1,
        state_version=update.state_version, metrics=("nll", "token_accuracy", "rouge_l"),
    )  # fmt: skip
    rows = bench.worker.evaluate(task, Broadcast(round_idx=2, params=params))[0].rows
    return update, delta, private, {(row.task, row.metric): row.value for row in rows}


QUICK = ("fedavg", "flex", "scaffold")
CASES = [
    pytest.param(name, stage, marks=[pytest.mark.slow] * (stage == 3 or name not in QUICK))
    for name in METHODS.names()
    for stage in (1, 3)
    if name != "base" and (stage == 1 or not METHODS.get(name).needs_whole_model)
]


@pytest.mark.parametrize(("name", "stage"), CASES)
def test_a_method_does_the_same_on_both_engines(name: str, stage: int, make_bench: Callable[..., Any]) -> None:
    # FedJETs' experts start at zero and get a part of each gradient: too many are nearly zero for AdamW.
    spec = TrainSpec(learning_rate=0.02, optimizer="sgd" if name == "fedjets" else "adamw")
    plain = _two_rounds(make_bench({"name": name}, train=spec))
    bench = make_bench({"name": name}, train=spec, engine=_engine(stage))
    ours = _two_rounds(bench)
    bench.worker.end()
    for found, expected in zip(ours[1:3], plain[1:3], strict=True):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            is_off = ~torch.isclose(found[key], value, **CLOSE)
            assert float(is_off.double().mean()) <= 0.02, key
            assert float((found[key] - value).nan_to_num().abs().max()) <= STEP, key
    assert ours[0].payload == plain[0].payload
    assert torch.equal(ours[0].expert_tokens, plain[0].expert_tokens)
    assert ours[0].diagnostics["frozen_hash"] == plain[0].diagnostics["frozen_hash"]
    assert ours[3].keys() == plain[3].keys()
    for key, value in plain[3].items():
        assert ours[3][key].weight == value.weight
        assert ours[3][key].mean == pytest.approx(value.mean, rel=1e-4)
