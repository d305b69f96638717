"""Mixtures of predictions by a gate over examples, against their formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.aggregation.example_mixtures import attention_targets, label_pass, label_rows, mixed_log_probs, mixture_loss
from fedgraft.moe.example_gate import PromptEmbedder, example_gate_of, prompts_of
from fedgraft.moe.families import model_facts
from fedgraft.moe.mixture import active_slots, example_weights
from fedgraft.moe.slots import add_slots
from fedgraft.training.step import part_of_batch, response_loss
from fedgraft.types import Batch, ExampleGateSpec, MixtureSpec, Slots

Maker = Callable[..., PreTrainedModel]


def filled(tiny_model: Maker) -> Any:
    model = tiny_model("qwen2_moe")
    mixture = MixtureSpec(num_slots=2, rank=2, alpha=4.0, targets=("q_proj", "v_proj"), top_k=2, gate="example")
    refs = add_slots(model, Slots(mixture=mixture, example_gate=ExampleGateSpec(num_outputs=4, hidden=(6,))))
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ref in refs:
            ref.view(parameters[ref.name]).copy_(torch.randn(ref.shape, generator=generator) * 0.4)
    return model


def test_probabilities_and_logits_are_mixed() -> None:
    one, other = torch.tensor([[0.0, math.log(3)]]), torch.tensor([[math.log(9), 0.0]])
    weights = torch.tensor([[math.log(0.25), math.log(0.75)]])
    mixed = mixed_log_probs([one, other], weights, "probabilities").exp()
    torch.testing.assert_close(mixed, torch.tensor([[0.25 * 0.25 + 0.75 * 0.9, 0.25 * 0.75 + 0.75 * 0.1]]))
    logit = 0.75 * math.log(9) - 0.25 * math.log(3)
    expected = math.exp(logit) / (1 + math.exp(logit))
    torch.testing.assert_close(mixed_log_probs([one, other], weights, "logits").exp()[0, 0], torch.tensor(expected))


def test_a_weight_that_vanishes_gives_a_finite_gradient() -> None:
    scores = torch.tensor([[0.0, -200.0]], requires_grad=True)
    logits = torch.randn(2, 1, 5, generator=torch.Generator().manual_seed(0))
    mixed = mixed_log_probs(list(logits), torch.log_softmax(scores, dim=-1), "probabilities")
    mixed[0, 2].backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mixed.detach(), torch.log_softmax(logits[0], dim=-1))
    assert torch.isfinite(scores.grad).all()  # type: ignore[arg-type]


def test_a_pass_over_labels_is_the_usual_one(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    _, expected = response_loss(model, batch)
    found = label_pass(model, batch)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.labels, expected.labels)
    assert label_rows(batch).tolist() == [0] * 5 + [1] * 3 + [2] * 2


@pytest.mark.parametrize("mix", ["probabilities", "logits"])
def test_the_loss_is_that_of_the_gated_mixture(mix: Any, tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = filled(tiny_model), random_batch()
    embedder, experts = PromptEmbedder(model, "hidden"), (1, 3)
    with torch.no_grad():
        loss, output = mixture_loss(model, batch, None, embedder=embedder, experts=experts, mix=mix)
        scores = example_gate_of(model)(embedder.embed(batch.input_ids, prompts_of(batch))).double()
        single = []
        for slot in range(2):
            weights = torch.zeros(3, 2)
            weights[:, slot] = 1
            with example_weights(model, weights):
                single.append(response_loss(model, batch)[1].logits.double())
        total = 0.0
        for token, (row, label) in enumerate(zip(label_rows(batch).tolist(), output.labels.tolist(), strict=True)):
            raw = [math.exp(float(scores[row, expert])) for expert in experts]
            gate = [value / sum(raw) for value in raw]
            if mix == "probabilities":
                shares = [torch.softmax(logits[token], dim=-1)[label] for logits in single]
                total -= math.log(sum(g * float(share) for g, share in zip(gate, shares, strict=True)))
            else:
                total -= float(torch.log_softmax(gate[0] * single[0][token] + gate[1] * single[1][token], dim=-1)[label])
    assert float(loss) == pytest.approx(total / 10, rel=1e-5)


def test_one_expert_gives_its_own_loss_and_the_parts_of_a_batch_add_up(
    tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model, batch = filled(tiny_model), random_batch()
    embedder = PromptEmbedder(model, "hidden")
    one_hot = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    with torch.no_grad():
        with example_weights(model, one_hot):
            expected, _ = response_loss(model, batch)
        with active_slots(model, 1):
            alone, _ = mixture_loss(model, batch, None, embedder=embedder, experts=(2,), mix="probabilities")
        torch.testing.assert_close(alone, expected)
        whole, _ = mixture_loss(model, batch, None, embedder=embedder, experts=(0, 1), mix="probabilities")
        parts = [part_of_batch(batch, index, 2) for index in range(2)]
        found = [
            mixture_loss(model, part, 10, embedder=embedder, experts=(0, 1), mix="probabilities")[0] for part in parts if part
        ]
    torch.testing.assert_close(sum(found), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_every_attention_map_may_have_experts(family: str, tiny_model: Maker) -> None:
    facts = model_facts(tiny_model(family).config)
    targets = attention_targets(facts, None)
    assert attention_targets(facts, ("q_proj",)) == ("q_proj",)
    spec = MixtureSpec(num_slots=1, rank=1, alpha=1.0, targets=targets, top_k=1, gate="example")
    refs = add_slots(tiny_model(family), Slots(mixture=spec))
    assert len(refs) == 2 * facts.num_layers * len(facts.attention)
