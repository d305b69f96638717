"""Shares, balance and gate-weighted means, against the families' own routing and against what must add up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fedgraft.aggregation.expert_feedback import balance_loss, gate_shares, judge_experts, normalised, token_losses
from fedgraft.moe.surgery import mask_experts
from fedgraft.moe.trace import RouterWatch, trace_routing
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Batch

Maker = Callable[..., Any]
CPU = torch.device("cpu")


@pytest.fixture
def batches(random_batch: Maker) -> list[Batch]:
    return [random_batch(), random_batch((7, 5), seed=1)]


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_shares_are_the_routers_own_weights_made_to_sum_to_one(tiny_model: Maker, batches: list[Batch], family: str) -> None:
    model, batch = tiny_model(family), batches[0]
    is_token_T = batch.attention_mask.reshape(-1).bool()
    with RouterWatch(model) as watch, mask_experts(model, {1: [2]}):
        with torch.inference_mode():
            model.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
        traces = trace_routing(model, [batch])
        for layer, trace in traces.items():
            shares_TE = gate_shares(watch.probabilities(layer)[is_token_T], watch.chosen[layer][is_token_T])
            expected_TE = torch.zeros_like(shares_TE)
            for token in range(len(expected_TE)):
                weights = trace.weights[token] / trace.weights[token].sum()
                expected_TE[token, trace.chosen[token]] = weights.to(expected_TE.dtype)
            torch.testing.assert_close(shares_TE, expected_TE, rtol=1e-5, atol=1e-6)
            if layer == 1:
                assert shares_TE[:, 2].abs().max() == 0


def test_balance_is_one_where_even_and_h_over_k_where_all_agree() -> None:
    even_TE = torch.tensor([[0.25, 0.25, 0.25, 0.25, 0.0]] * 2)
    assert float(balance_loss(even_TE, torch.tensor([[0, 1], [2, 3]]), num_held=4)) == pytest.approx(1.0)
    certain_TE = torch.tensor([[0.5, 0.5, 0.0, 0.0, 0.0]] * 3)
    assert float(balance_loss(certain_TE, torch.tensor([[0, 1]] * 3), num_held=4)) == pytest.approx(4 / 2)


def test_balance_has_a_gradient_through_the_probabilities_only() -> None:
    p_TE = torch.tensor([[0.7, 0.2, 0.1], [0.6, 0.1, 0.3]], requires_grad=True)
    balance_loss(p_TE, torch.tensor([[0], [0]]), num_held=3).backward()  # type: ignore[no-untyped-call]
    # d/dp of 3 sum_e f_e mean_t p_te with f = (1, 0, 0).
    torch.testing.assert_close(p_TE.grad, torch.tensor([[1.5, 0.0, 0.0]] * 2))


def test_normalised_feedback_has_a_one_in_every_layer_that_has_something() -> None:
    found = normalised(torch.tensor([[0.2, -0.1, 0.4], [0.0, 0.0, 0.0], [-1.0, -2.0, -3.0]], dtype=torch.float64))
    expected = torch.tensor([[0.5, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)


def test_token_losses_are_those_of_the_evaluation(tiny_model: Maker, batches: list[Batch]) -> None:
    model = tiny_model("qwen2_moe")
    losses_P = token_losses(model, batches, CPU)
    found = score_batches(model, batches)["nll"]
    assert len(losses_P) == found.weight
    assert float(losses_P.sum()) == pytest.approx(found.total, rel=1e-6)
    assert token_losses(model, [], CPU).shape == (0,)


def test_what_experts_got_right_adds_up_to_what_the_model_got_right(tiny_model: Maker, batches: list[Batch]) -> None:
    model = tiny_model("qwen2_moe")
    # Labels that the model gets right in part: its own first choices, every other one.
    with torch.inference_mode():
        for batch in batches:
            choice = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.argmax(dim=-1)
            labels = batch.labels[:, 1:]
            is_told = (labels >= 0) & (torch.arange(labels.shape[1]) % 2 == 0)
            labels[is_told] = choice[:, :-1][is_told]
    expected = score_batches(model, batches)["token_accuracy"]
    assert 0 < expected.mean < 1
    with RouterWatch(model) as watch:
        found = judge_experts(model, batches, CPU, watch=watch)
    for values, total in ((found.total, expected.total), (found.mass, expected.weight)):
        torch.testing.assert_close(values.sum(dim=1), torch.full((2,), total, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.share.sum(dim=1), torch.ones(2, dtype=torch.float64), rtol=1e-5, atol=0)
    assert found.mean.min() >= 0
    assert found.mean.max() <= 1


def test_a_loss_that_fell_alike_everywhere_fell_alike_for_every_expert_in_use(tiny_model: Maker, batches: list[Batch]) -> None:
    model = tiny_model("qwen2_moe")
    with RouterWatch(model) as watch, mask_experts(model, {0: [3]}):
        before_P = token_losses(model, batches, CPU) + 0.25
        found = judge_experts(model, batches, CPU, watch=watch, losses_before=before_P)
        one_P = before_P.index_fill(0, torch.tensor([0]), 1e3)
        moved = judge_experts(model, batches, CPU, watch=watch, losses_before=one_P).mean > found.mean + 1
        traces = trace_routing(model, batches[:1])
    in_use = found.mass > 0
    assert in_use[1].sum() >= 3
    assert not in_use[0, 3]
    torch.testing.assert_close(found.mean[in_use], torch.full_like(found.mean[in_use], 0.25), rtol=1e-5, atol=0)
    assert found.mean[0, 3] == 0
    # The first label is token 4 of the first row, and token 3 predicts it: only the experts that it went to notice.
    for row, trace in enumerate(traces.values()):
        assert moved[row].nonzero().flatten().tolist() == sorted(trace.chosen[3].tolist())
