"""FLEx on every family: the graft is the chosen expert, whatever the family stores, and private training goes through."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedgraft.aggregation.flex import _take_neurons
from fedgraft.errors import ModelError
from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.graft import grafts_of

Maker = Callable[..., Any]
FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}
NEW = ("mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", NEW)
def test_the_graft_is_the_chosen_expert_and_trains(family: str, make_bench: Maker, make_base: Maker) -> None:
    bench = make_bench(FLEX, base_folder=make_base(family))
    params = bench.worker.initial_params()
    start = bench.worker.describe()["frozen_hash"]
    set_up, _ = bench.train(0, 1, params, plan=replace(bench.task(0, 1, {}).plan, num_steps=0))
    private = bench.private(0)
    choice = set_up.diagnostics["graft_choice"]["experts"]
    model = bench.worker.engine.model
    layers = moe_layers(model)
    assert len(layers) == len(choice) == 2
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(1)) * 3
    for layer, (expert,) in zip(layers, choice, strict=True):
        graft = grafts_of(model)[layer.index]
        names = {"gate_up_proj", "down_proj", *(("gate_up_proj_bias", "down_proj_bias") if family == "gpt_oss" else ())}
        stem = f"{layer.block_path}.graft."
        assert {key.removeprefix(stem) for key in private if key.startswith(stem)} == names | {"gate_weight", "gate_bias"}
        with torch.no_grad():
            for name in names:
                graft.get_parameter(name).copy_(private[stem + name])
            assert torch.equal(graft.expert_sum(x, torch.ones(9, 1)), layer.expert_output(expert, x))
    trained, delta = bench.train(0, 2, params)
    assert all(float(value.abs().max()) > 0 for key, value in delta.items() if ".lora_B." in key)
    after = bench.private(0)
    assert all(not torch.equal(after[key], private[key]) for key in private if ".graft." in key)
    assert trained.diagnostics["frozen_hash"] == start
    counts = trained.expert_tokens
    assert counts.shape == (2, 4)
    assert counts.sum(dim=1).tolist() == [int(counts[0].sum())] * 2
    assert int(counts[0].sum()) > 0
    assert int(counts[0].sum()) % 2 == 0  # top-2


def test_row_is_refused_before_the_first_round(make_bench: Maker, make_base: Maker) -> None:
    with pytest.raises(ModelError, match="mode 'row' cannot be had in deepseek_v3"):
        make_bench(FLEX | {"mode": "row"}, base_folder=make_base("deepseek_v3"))
    make_bench(FLEX | {"mode": "row"}, base_folder=make_base("gpt_oss"))


def neurons_of(layer: MoELayer, expert: int, neurons: list[int], x: torch.Tensor) -> torch.Tensor:
    """What some neurons of an expert add, by keeping only their columns of the model's own down projection; no output bias."""
    hidden = layer.expert_hidden(expert, x)[:, neurons]
    return hidden @ layer.experts.down_proj[expert][neurons]  # type: ignore[index, no-any-return]


def test_single_neurons_bring_their_biases(tiny_model: Maker) -> None:
    layer = moe_layers(tiny_model("gpt_oss"))[0]
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(2))
    picks = {1: [3, 4, 20], 2: [0]}
    copied = _take_neurons(layer, [(expert, torch.tensor(neurons)) for expert, neurons in picks.items()])
    with torch.no_grad():
        both = x @ copied["gate_up_proj"].T + copied["gate_up_proj_bias"]
        found = layer.neurons(both[:, :4], both[:, 4:]) @ copied["down_proj"].T
        expected = neurons_of(layer, 1, picks[1], x) + neurons_of(layer, 2, picks[2], x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        biases = layer.experts.down_proj_bias
        torch.testing.assert_close(copied["down_proj_bias"], 0.75 * biases[1] + 0.25 * biases[2])  # type: ignore[index]
    whole = _take_neurons(layer, [(1, torch.arange(24))])
    assert torch.equal(whole["down_proj_bias"], layer.experts.down_proj_bias[1])  # type: ignore[index]
