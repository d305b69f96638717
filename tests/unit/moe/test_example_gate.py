"""The gate over examples against plain arithmetic, and its embeddings against the untouched base."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.example_gate import (
    PromptEmbedder,
    attach_example_gate,
    example_gate_of,
    prompts_of,
    top_k_weights,
    without_adapter,
)
from fedgraft.moe.families import model_facts
from fedgraft.moe.mixture import set_example_weights
from fedgraft.moe.slots import add_slots, count_slot_elements, initial_params
from fedgraft.types import AdapterSpec, Batch, ExampleGateSpec, GraftSpec, MixtureSpec, Slots

Maker = Callable[..., PreTrainedModel]
BatchMaker = Callable[..., Batch]
GATE = ExampleGateSpec(num_outputs=5, hidden=(7, 3), start="orthogonal")
SLOTS = Slots(
    adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0), AdapterSpec(name="own", rank=3, alpha=4.0)),
    graft=GraftSpec(num_grafts=1, layers=(0,), num_neurons=4),
    mixture=MixtureSpec(num_slots=2, rank=2, alpha=4.0, targets=("q_proj",), top_k=1, gate="example"),
    example_gate=GATE,
)


def filled(tiny_model: Maker) -> PreTrainedModel:
    """A model whose slots all do something."""
    model = tiny_model("qwen2_moe")
    refs = add_slots(model, SLOTS)
    generator = torch.Generator().manual_seed(3)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for ref in refs:
            ref.view(parameters[ref.name]).copy_(torch.randn(ref.shape, generator=generator) * 0.3)
    return model


def hidden_of(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    return found


def test_the_gate_is_an_mlp(tiny_model: Maker) -> None:
    model = filled(tiny_model)
    gate = example_gate_of(model)
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    values = [value.detach().double() for value in gate.parameters()]
    weights = list(zip(values[::2], values[1::2], strict=True))
    expected = x.double()
    for position, (weight, bias) in enumerate(weights):
        expected = expected @ weight.T + bias
        if position < len(weights) - 1:
            expected = torch.where(expected > 0, expected, torch.zeros_like(expected))
    torch.testing.assert_close(gate(x).double(), expected, atol=1e-5, rtol=1e-5)


def test_its_slots_are_counted_named_and_drawn_from_the_seed(tiny_model: Maker) -> None:
    model = tiny_model("qwen2_moe")
    refs = add_slots(model, Slots(example_gate=GATE))
    assert {ref.part for ref in refs} == {"example_gate"}
    assert {(ref.layer, ref.expert, ref.adapter) for ref in refs} == {(None, None, None)}
    counted = count_slot_elements(model_facts(model.config), Slots(example_gate=GATE))
    assert counted["example_gate"] == sum(ref.num_elements for ref in refs) == (33 * 7) + (8 * 3) + (4 * 5)
    start, again, other = (initial_params(model, refs, seed) for seed in (1, 1, 2))
    for key, value in start.items():
        assert torch.equal(value, again[key])
        if key.endswith("bias"):
            assert not value.any()
            continue
        assert not torch.equal(value, other[key])
        square = value @ value.T if value.shape[0] <= value.shape[1] else value.T @ value
        torch.testing.assert_close(square, torch.eye(len(square)), atol=1e-5, rtol=0)
    plain = tiny_model("qwen2_moe")
    found = initial_params(plain, add_slots(plain, Slots(example_gate=ExampleGateSpec(num_outputs=5, hidden=(7,)))), 1)
    first = found["model.example_gate.layers.0.weight"]
    assert 0.8 / math.sqrt(32) < float(first.abs().max()) <= 1 / math.sqrt(32)


def test_a_gate_that_is_missing_or_empty_is_refused(tiny_model: Maker) -> None:
    model = tiny_model("qwen2_moe")
    with pytest.raises(ModelError, match="no gate over examples"):
        example_gate_of(model)
    with pytest.raises(ModelError, match="weighs nothing"):
        attach_example_gate(model, ExampleGateSpec(num_outputs=3, hidden=(0,)))


def test_top_k_weights_are_not_divided_by_their_sum() -> None:
    logits = torch.tensor([[math.log(4), math.log(3), math.log(2), math.log(1)]])
    every = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(top_k_weights(logits, every, 2), torch.tensor([[0.4, 0.3, 0.0, 0.0]]))
    some = torch.tensor([False, True, False, True])
    torch.testing.assert_close(top_k_weights(logits, some, 3), torch.tensor([[0.0, 0.75, 0.0, 0.25]]))
    alone = torch.tensor([False, False, True, False])
    assert torch.equal(top_k_weights(logits, alone, 2), torch.tensor([[0.0, 0.0, 1.0, 0.0]]))


def test_an_embedding_is_the_untouched_bases_mean_over_the_prompt(tiny_model: Maker, random_batch: BatchMaker) -> None:
    model, base = filled(tiny_model), tiny_model("qwen2_moe")
    batch = random_batch()
    set_example_weights(model, torch.ones(3, 2))
    model.train()
    found = PromptEmbedder(model, "hidden").embed(batch.input_ids, prompts_of(batch))
    assert model.training
    model.eval()
    set_example_weights(model, torch.ones(1, 2))
    for row, length in enumerate((9, 6, 4)):
        ids = batch.input_ids[row, : length // 2].tolist()
        torch.testing.assert_close(found[row], hidden_of(base, ids).mean(dim=0), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(found[row], hidden_of(model, ids).mean(dim=0), atol=1e-2)
    tokens = PromptEmbedder(model, "tokens").embed(batch.input_ids, prompts_of(batch))
    table = base.get_input_embeddings().weight
    torch.testing.assert_close(tokens[0], table[batch.input_ids[0, :4]].mean(dim=0))


def test_an_embedding_depends_on_the_prompt_alone(tiny_model: Maker, random_batch: BatchMaker) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    mask = prompts_of(batch)
    plain = PromptEmbedder(model, "hidden").embed(batch.input_ids, mask)
    others = torch.where(mask, batch.input_ids, 11)  # other responses, other padding
    assert torch.equal(PromptEmbedder(model, "hidden").embed(others, mask), plain)
    left_ids, left_mask = torch.zeros(3, 4, dtype=torch.int64), torch.zeros(3, 4, dtype=torch.bool)
    for row, size in enumerate((4, 3, 2)):
        left_ids[row, 4 - size :], left_mask[row, 4 - size :] = batch.input_ids[row, :size], True
    assert torch.equal(PromptEmbedder(model, "hidden").embed(left_ids, left_mask), plain)
    assert not torch.allclose(PromptEmbedder(model, "hidden").embed(batch.input_ids + 1, mask), plain, atol=1e-2)
    nothing = PromptEmbedder(model, "hidden").embed(batch.input_ids, torch.zeros_like(mask))
    assert torch.equal(nothing, torch.zeros(3, 32))


def test_what_was_embedded_once_is_not_run_again(tiny_model: Maker, random_batch: BatchMaker) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    embedder = PromptEmbedder(model, "hidden")
    first = embedder.embed(batch.input_ids, prompts_of(batch))
    handle = model.model.register_forward_pre_hook(lambda *_: pytest.fail("the base ran again"))
    assert torch.equal(embedder.embed(batch.input_ids, prompts_of(batch)), first)
    handle.remove()


def test_an_adapter_is_silenced_and_comes_back(tiny_model: Maker, random_batch: BatchMaker) -> None:
    model, base = filled(tiny_model), tiny_model("qwen2_moe")
    ids = random_batch().input_ids[0].tolist()
    refs = add_slots(base, Slots(adapters=SLOTS.adapters, graft=SLOTS.graft))
    values = dict(model.named_parameters())
    targets = dict(base.named_parameters())
    with torch.no_grad():
        for ref in refs:
            targets[ref.name].copy_(values[ref.name] * (0 if ".lora_B.own." in ref.name else 1))
    before = hidden_of(model, ids)
    with without_adapter(model, "own"):
        assert torch.equal(hidden_of(model, ids), hidden_of(base, ids))
    assert not torch.allclose(before, hidden_of(base, ids), atol=1e-2)
    assert torch.equal(hidden_of(model, ids), before)
