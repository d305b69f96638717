"""The restated routing rule against every family's own router, traces of it, and what a mask leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.families import model_facts, moe_layers, unwrap
from fedgraft.moe.routing import check_experts_left, expert_probabilities, num_groups
from fedgraft.moe.trace import trace_routing
from fedgraft.types import Batch

GROUPS = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}


def assert_same_choice(model: Any, scale: float) -> None:
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(1)) * scale
    layers = moe_layers(model)
    assert layers
    for layer in layers:
        with torch.no_grad():
            logits, weights, chosen = layer.router(x.to(layer.router_rows.dtype))
            own_logits = layer.router_logits(x.to(layer.router_rows.dtype))
            own_weights, own_chosen = layer.choose(own_logits)
        assert torch.equal(own_logits, logits)
        assert torch.equal(own_chosen, chosen)
        assert torch.equal(own_weights.to(weights.dtype), weights)
        assert len(set(chosen.reshape(-1).tolist())) == layer.num_experts


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (GROUPS | {"topk_method": "group_limited_greedy"}, {"deepseek_v2": 4, "deepseek_v3": 4}),
        (GROUPS | {"topk_method": "greedy"}, {"deepseek_v2": 1, "deepseek_v3": 4}),  # DeepSeek-V3's router has no such choice
        (GROUPS | {"n_group": 1, "topk_group": 1}, {"deepseek_v2": 1, "deepseek_v3": 1}),
    ],
)
def test_a_config_says_how_many_groups_its_routers_choose_from(
    overrides: dict[str, Any], expected: dict[str, int], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    for family, count in expected.items():
        model = tiny_model(family, **overrides)
        assert model_facts(model.config).num_groups == count
        assert {num_groups(unwrap(layer.router)) for layer in moe_layers(model)} == {count}


def test_other_families_choose_without_groups(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert model_facts(tiny_model(family).config).num_groups == 1


@pytest.mark.parametrize("scale", [1.0, 20.0])  # with 20 most scores are exactly 0 or 1
def test_the_choice_is_the_routers_own_bit_for_bit(
    family: str, normalised: tuple[bool, dict[str, bool]], scale: float, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    assert_same_choice(tiny_model(family, **normalised[1]), scale)


def test_the_choice_in_bfloat16_is_the_routers_own(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family).to(torch.bfloat16)
    assert_same_choice(model, 1.0)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("deepseek_v2", {"topk_method": "group_limited_greedy", "num_experts_per_tok": 3}),
        ("deepseek_v2", {"topk_method": "greedy", "num_experts_per_tok": 3}),  # groups in the config that the router does not use
        ("deepseek_v3", {}),
        ("deepseek_v3", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    ],
)
def test_the_choice_from_groups_is_the_routers_own(
    family: str, overrides: dict[str, Any], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    assert_same_choice(tiny_model(family, **GROUPS, **overrides), 1.0)


def test_probabilities_are_the_weights_if_all_were_chosen(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family, num_experts_per_tok=4)
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(model):
        _, weights, chosen = layer.router(x)
        expected = torch.zeros(7, 4).scatter(1, chosen, weights / layer.scale)
        torch.testing.assert_close(layer.probabilities(x), expected)
    assert expert_probabilities("sigmoid", torch.full((1, 2), -1e4)).isfinite().all()


def test_a_trace_sums_to_tokens_times_top_k(
    family: str, tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    model = tiny_model(family)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    recorded: dict[int, list[torch.Tensor]] = {}
    handles = []
    for layer in moe_layers(model):

        def keep(module: Any, args: Any, output: Any, index: int = layer.index) -> None:
            recorded.setdefault(index, []).append(output[0])

        handles.append(layer.router.register_forward_hook(keep))
    traces = trace_routing(model, batches)
    assert list(traces) == [layer.index for layer in moe_layers(model)]
    masks = [batch.attention_mask.reshape(-1).bool() for batch in batches]
    for layer in moe_layers(model):
        trace = traces[layer.index]
        assert tuple(trace.chosen.shape) == tuple(trace.weights.shape) == (9 + 5 + 7, 2)
        assert int(trace.counts.sum()) == 21 * 2
        logits = torch.cat([logits[mask] for logits, mask in zip(recorded[layer.index], masks, strict=True)])
        bias = getattr(layer.router, "e_score_correction_bias", None)
        rank = logits if bias is None else torch.sigmoid(logits) + bias
        best = torch.topk(rank, 2, dim=1).indices
        assert torch.equal(trace.chosen.sort().values, best.sort().values)
        assert trace.counts.tolist() == [int((best == e).sum()) for e in range(4)]
        if layer.normalises:
            torch.testing.assert_close(trace.weights.float().sum(dim=1), torch.full((21,), layer.scale))
    for handle in handles:
        handle.remove()
    assert not any(layer.router._forward_hooks for layer in moe_layers(model))  # a trace leaves nothing behind


def test_a_trace_of_nothing_is_empty(tiny_model: Callable[..., PreTrainedModel]) -> None:
    traces = trace_routing(tiny_model("olmoe"), [])
    assert [trace.counts.tolist() for trace in traces.values()] == [[0, 0, 0, 0]] * 2


def grouped(**fields: Any) -> nn.Module:
    router = nn.Module()
    for name, value in fields.items():
        setattr(router, name, value)
    return router


@pytest.mark.parametrize(
    ("rule", "masked", "fits"),
    [
        ("softmax", {0, 1}, True),
        ("softmax", {0, 1, 2}, True),  # groups of 0, 1, 2, 2; the best two among three hold at least 3
        ("softmax", {0, 2, 4}, False),  # 1, 1, 1, 2: the best two may hold 2 only
        ("sigmoid", {0, 1}, True),
        ("sigmoid", {0, 2}, True),  # groups with one left are never chosen
        ("sigmoid", {0, 2, 4}, False),
    ],
)
def test_groups_must_keep_enough(rule: Any, masked: set[int], fits: bool) -> None:
    router = grouped(num_group=4, topk_group=2)
    if fits:
        check_experts_left(router, rule, 8, masked, 3)
    else:
        with pytest.raises(ModelError, match=r"chooses 3 experts out of its best 2 of 4 groups"):
            check_experts_left(router, rule, 8, masked, 3)


def test_top_k_above_the_experts_left_is_refused() -> None:
    router = nn.Module()
    check_experts_left(router, "softmax", 4, (0, 3), 2)
    with pytest.raises(ModelError, match="num_experts_per_tok is 2, but only 1 of 4 experts are left"):
        check_experts_left(router, "softmax", 4, (0, 1, 3, 3), 2)
    # groups of a greedy router do not count
    check_experts_left(grouped(num_group=4, topk_group=1, topk_method="greedy"), "softmax", 8, range(0, 8, 2), 2)
