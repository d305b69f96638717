"""Every method that uses budgets keeps to them, with default options: the platform would end the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.registry import METHODS
from fedgraft.types import Budget

USING = [name for name in METHODS.names() if METHODS.get(name).budget_use != "none"]


@pytest.mark.parametrize("name", USING)
def test_a_method_that_uses_budgets_keeps_to_them(name: str, make_job: Callable[..., Any], run_job: Callable[..., Any]) -> None:
    budgets = tuple(Budget(experts_per_layer=count) for count in (2, 3, 4))
    ran = run_job(replace(make_job({"name": name}), rounds=3, budgets=budgets))
    assert ran.folder.read_info()["budget_use"] == METHODS.get(name).budget_use
    assert [row["round"] for row in ran.rows("metrics")] == [1, 2, 3]
    assert not ran.folder.read_info().get("failures")
    if METHODS.get(name).budget_use == "holds":
        facts = ran.pool.worker.engine.facts
        for task, _, _ in ran.pool.replies:
            assignment = task.assignment or {}
            held = [len(assignment.get(layer, range(facts.num_experts))) for layer in facts.layers]
            assert sum(held) <= budgets[task.client_id].experts_per_layer * len(facts.layers)
