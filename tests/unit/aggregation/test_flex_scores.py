"""FLEx with importances in the place of its reconstruction loss: it grafts the experts that the criterion ranks highest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from fedgraft.data.prepared import PreparedData
from fedgraft.moe.base import open_base
from fedgraft.moe.criteria import Importance, importance
from fedgraft.moe.expert_statistics import observe_statistics
from fedgraft.moe.families import moe_layers
from fedgraft.platform.worker import ClientWorker
from fedgraft.types import Broadcast


@pytest.mark.parametrize("score", get_args(Importance))
def test_the_most_important_experts_are_grafted(
    score: Importance, make_bench: Callable[..., Any], make_base: Callable[..., Any], data_folder: Any
) -> None:
    bench = make_bench({"name": "flex", "score": score, "n_graft": 2, "adapter": {"rank": 2}}, num_steps=1)
    worker: ClientWorker = bench.worker
    update, _ = bench.train(1, 1, worker.initial_params())
    choice = update.diagnostics["graft_choice"]
    split = PreparedData.open(data_folder).split(1, "train")
    model = open_base(make_base())
    seen = observe_statistics(model, [split.batch(range(len(split)), 0)])  # fewer than calibration_examples: all of them
    chosen = []
    for layer in moe_layers(model):
        found = importance(score, seen[layer.index], layer)
        chosen.append(torch.argsort(found, descending=True)[:2].tolist())
        assert len(set(found.tolist())) == 4, "ties would show nothing"
    assert choice["experts"] == chosen


def test_importances_choose_differently(make_bench: Callable[..., Any]) -> None:
    found = set()
    for score in ("reap", "recon"):
        bench = make_bench({"name": "flex", "score": score, "n_graft": 2, "adapter": {"rank": 2}}, num_steps=0)
        params = bench.worker.initial_params()
        update, _ = bench.worker.update(bench.task(1, 1, params), Broadcast(round_idx=1, params=params))
        found.add(repr(update.diagnostics["graft_choice"]["experts"]))
    assert len(found) == 2
