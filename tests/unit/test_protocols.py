"""A method with no hook changed is FedAvg."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.protocols import AdapterConfig, Method, MethodConfig, Reduced, Weights, add_delta, merge_metrics
from fedgraft.types import (
    SHARED,
    AdapterSpec,
    ClientTask,
    ClientUpdate,
    ParamRef,
    RoundPlan,
    ServerState,
    Slots,
    Weighted,
    assigned,
)


class Plain(Method):
    name = title = paper = summary = "plain"
    config_class = MethodConfig


PLAIN = Plain(MethodConfig(name="plain"))


def update(client_id: int, num_examples: int, **metrics: Weighted) -> ClientUpdate:
    return ClientUpdate(
        client_id=client_id,
        round_idx=1,
        num_examples=num_examples,
        num_steps=1,
        expert_tokens=torch.zeros(1, 1, dtype=torch.int64),
        metrics=metrics,
        payload=(),
    )


def ref(**fields: Any) -> ParamRef:
    return ParamRef(key="k", name="n", part="experts", shape=(1,), **fields)


def test_the_defaults_are_fedavg() -> None:
    state = ServerState(params={"w": torch.tensor([1.0, 2.0])})
    plan = RoundPlan(round_idx=1, num_steps=2, learning_rate=0.1)
    task = ClientTask(client_id=0, plan=plan, keys=("w",))
    updates = [update(0, 30), update(4, 10)]
    assert PLAIN.slots(None) == Slots()  # type: ignore[arg-type]
    assert PLAIN.init(state.params, 3) == state
    assert PLAIN.plan(state, plan) is plan
    assert PLAIN.select(state, plan, (3, 1)) == (3, 1)
    assert PLAIN.task(state, task) is task
    assert PLAIN.num_rounds(7) == 7
    assert PLAIN.weigh(state, updates) == Weights(default=(30.0, 10.0))
    reduced = Reduced(delta={"w": torch.tensor([0.5, -1.0], dtype=torch.float64)}, extras={}, num_contributors={"w": 2})
    assert PLAIN.aggregate(state, reduced, updates).params["w"].tolist() == [1.5, 1.0]
    assert state.params["w"].tolist() == [1.0, 2.0]  # the old state stays
    assert PLAIN.local(None, lambda: "trained") == "trained"  # type: ignore[arg-type, return-value]
    assert PLAIN.reply(None, updates[0]) == (updates[0], {})  # type: ignore[arg-type]
    assert PLAIN.terms(None, None, None) == PLAIN.observe(None) == {}  # type: ignore[arg-type]
    assert PLAIN.lr_scale(ref()) == 1.0
    assert PLAIN.persists_moments(ref()) is False


def test_an_experts_slot_is_assigned_and_others_are_shared() -> None:
    assert PLAIN.group(ref(layer=3, expert=1)) == assigned(3, 1)
    assert PLAIN.group(ref(layer=3)) == SHARED
    assert PLAIN.group(ref()) == SHARED


def test_a_delta_is_added_in_float64_and_keys_without_one_stay() -> None:
    big = torch.tensor([2.0**24], dtype=torch.float32)
    kept = torch.ones(2)
    # In float32, 2^24 + 0.75 + ... would be rounded before the sum is complete; one rounding gives 2^24 + 2.
    new = add_delta(
        {"w": big, "half": torch.ones(1, dtype=torch.bfloat16), "kept": kept},
        {"w": torch.tensor([1.5]).double(), "half": torch.ones(1)},
    )
    assert new["w"].tolist() == [2.0**24 + 2]
    assert new["w"].dtype == torch.float32
    assert (new["half"].dtype, new["half"].tolist()) == (torch.bfloat16, [2.0])
    assert new["kept"] is kept


def test_weights_by_key_replace_the_default() -> None:
    weights = Weights(default=(1.0, 2.0), by_key={"e": (0.0, 5.0)})
    assert weights.of("w") == (1.0, 2.0)
    assert weights.of("e") == (0.0, 5.0)


def test_metrics_are_summed_by_name() -> None:
    merged = merge_metrics(
        [
            update(0, 1, loss=Weighted(total=4.0, weight=2.0)),
            update(1, 1, loss=Weighted(total=2.0, weight=1.0), tokens=Weighted(total=7.0, weight=1.0)),
        ]
    )
    assert merged == {"loss": Weighted(total=6.0, weight=3.0), "tokens": Weighted(total=7.0, weight=1.0)}


def test_an_adapters_options_become_its_slot() -> None:
    config = AdapterConfig(rank=4, alpha=12.0, dropout=0.25)
    expected = AdapterSpec(name="mine", rank=4, alpha=12.0, dropout=0.25, targets=("attention", "router"))
    assert config.spec("mine", "attention", "router") == expected
    for wrong in ({"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"rnak": 4}):
        with pytest.raises(ValidationError):
            AdapterConfig.model_validate(wrong)
