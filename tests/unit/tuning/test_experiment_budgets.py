"""Budgets from the configuration to every run's record, drawn anew by each seed and the same for all methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fedgraft
from fedgraft.platform.budgets import BudgetsConfig, draw_budgets
from fedgraft.platform.progress import Event
from fedgraft.registry import METHODS

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_every_run_keeps_its_clients_budgets(
    make_base: Callable[..., Path], data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))  # the example adds to them
    options: dict[str, Any] = {"lora": ["attention", "experts"], "adapter": {"rank": 2}}
    config = fedgraft.load_config(
        {
            "name": "unit",
            "seeds": [0, 1],
            "model": {"path": str(make_base())},
            "data": {
                "path": str(data_folder.parent / "clients.jsonl"),
                "preset": "custom",
                "fields": {"prompt": "q", "response": "a", "label": "kind"},
                "max_length": 32,
            },
            "compare": {"methods": {"parts": {"name": "random_experts"} | options, "whole": {"name": "fedavg"} | options}},
            "method_files": [str(ROOT / "examples" / "random_experts.py")],
            "federation": {
                "rounds": 1,
                "local_steps": 1,
                "batch_size": 4,
                "budgets": {"expert_fraction": [0.5, 0.75, 1.0]},
            },
            "evaluation": {"generate": "never", "at_start": False, "choices": "never"},
            "executor": {"kind": "in_process"},
            "tracking": {"enabled": False},
            "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")},
        }
    )
    notes: list[tuple[str, str]] = []

    def on_event(event: Event) -> None:
        if event.kind == "note":
            notes.append((event.label, str(event.data["text"])))

    result = fedgraft.run(config, on_event=on_event)
    assert isinstance(result, fedgraft.ComparisonResult)
    choices = BudgetsConfig(expert_fraction=(0.5, 0.75, 1.0)).choices(4)
    values = 2 * (2 * (2 * (32 + 32) + 2 * (32 + 16)))  # rank, layers, attention's four maps
    one = 2 * ((32 + 48) + (24 + 32))  # rank, an expert's two maps
    for seed in (0, 1):
        drawn = [budget.experts_per_layer for budget in draw_budgets(choices, seed, 3)]
        for label, use in (("parts", "holds"), ("whole", "none")):
            run = result.runs[label][seed]
            assert run.info["budget_use"] == use
            assert [each["experts_per_layer"] for each in run.info["budgets"]] == drawn
            rows = run.ledger
            sent = rows[rows["direction"] == "down"].groupby("client_id")["bytes"].sum().to_dict()
            held = drawn if use == "holds" else [4, 4, 4]
            assert sent == {client: 4 * (values + 2 * count * one) for client, count in enumerate(held) if count is not None}
    drawn = [budget.experts_per_layer for budget in draw_budgets(choices, 0, 3)]
    number = {count: drawn.count(count) for count in sorted({count for count in drawn if count is not None})}
    (first, clients), *rest = number.items()
    text = ", ".join([f"{first} experts a layer: {clients} clients", *(f"{count}: {times}" for count, times in rest)])
    page = (result.folder / "report.html").read_text()
    assert f"parts (holds): {text}; whole: not used, every client holds everything" in page
    assert notes == [("whole", "fedavg does not use budgets: every client holds and trains everything")] * 2
    assert [budget.experts_per_layer for budget in draw_budgets(choices, 0, 3)] != [4, 4, 4], "else this shows nothing"
