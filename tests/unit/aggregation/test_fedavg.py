"""FedAvg's options, and what it makes of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft.aggregation.fedavg import FedAvgConfig
from fedgraft.types import SHARED, assigned

Maker = Callable[..., Any]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": ["experts"], "full": ["experts"]}, "experts is in both lora and full"),
        ({"lora": []}, "nothing would be trained"),
        ({"lora": [], "full": ["experts"], "adapter": {"rank": 2}}, "adapter has no effect"),
        ({"lora": ["heads"]}, "lora"),
        ({"adapter": {"rank": 0}}, "adapter.rank"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FedAvgConfig.model_validate({"name": "fedavg", **options})


def test_experts_are_assigned_and_all_else_is_shared(make_bench: Maker) -> None:
    worker = make_bench({"name": "fedavg", "adapter": {"rank": 2}, "lora": ["attention", "router"], "full": ["experts"]}).worker
    for ref in worker.engine.refs:
        expected = assigned(ref.layer, ref.expert) if ref.part == "experts" else SHARED  # type: ignore[arg-type]
        assert worker.groups[ref.key] == expected
    assert {ref.part for ref in worker.engine.refs} == {"attention", "router", "experts"}
    assert not worker.private
