"""Watching routers with their graph, announced prompts, and routers listed row by row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.moe.families import moe_layers
from fedgraft.moe.prompts import announce_prompts, watch_prompts
from fedgraft.moe.slots import add_slots, initial_params
from fedgraft.moe.surgery import mask_experts
from fedgraft.moe.trace import RouterWatch
from fedgraft.protocols import TrainSpec
from fedgraft.training.decode import decode_greedy
from fedgraft.training.evaluate import ChoiceTokens, score_batches, score_choices
from fedgraft.training.step import response_loss
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, Batch, Slots

Plain = Callable[..., torch.Tensor]
Model = Callable[..., PreTrainedModel]
Rows = Callable[..., Batch]


def run(model: Any, batch: Batch) -> Any:
    return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits


# ---- routers


def test_the_watch_keeps_every_routers_logits_and_choice(
    family: str, tiny_model: Model, random_batch: Rows, plain_logits: Plain
) -> None:
    model: Any = tiny_model(family)
    batch = random_batch((9, 5))
    inputs: dict[int, torch.Tensor] = {}
    for layer in moe_layers(model):
        layer.block.register_forward_hook(lambda block, args, output, at=layer.index: inputs.update({at: args[0]}))
    with RouterWatch(model) as watch:
        run(model, random_batch((4,), seed=5))
        run(model, batch)  # the last pass is what is kept
        assert sorted(watch.logits) == sorted(watch.chosen) == sorted(inputs)
        for layer in moe_layers(model):
            expected = plain_logits(layer.block, inputs[layer.index].reshape(-1, 32))
            assert watch.logits[layer.index].shape == (2 * 9, 4)  # padding among the tokens
            torch.testing.assert_close(watch.logits[layer.index].float(), expected.float(), rtol=1e-4, atol=1e-5)
            ranked = expected
            if family == "deepseek_v3":
                ranked = torch.sigmoid(expected) + layer.router.e_score_correction_bias  # type: ignore[operator]
            chosen = torch.zeros(18, 4, dtype=torch.bool).scatter_(1, watch.chosen[layer.index], True)
            best = torch.zeros(18, 4, dtype=torch.bool).scatter_(1, ranked.topk(2, dim=1).indices, True)
            assert torch.equal(chosen, best)
            shares = watch.probabilities(layer.index)
            torch.testing.assert_close(shares.sum(dim=1), torch.ones(18))
            assert torch.equal(shares.argmax(dim=1), expected.argmax(dim=1))
    assert (watch.logits, watch.chosen) == ({}, {})
    run(model, batch)
    assert watch.logits == {}, "nothing is watched any more"


def test_a_masked_expert_has_no_share_and_is_not_chosen(family: str, tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model(family)
    batch = random_batch()
    layer = moe_layers(model)[-1].index
    for opened_first in (True, False):
        mask = None if opened_first else mask_experts(model, {layer: (1,)})
        with RouterWatch(model) as watch:
            mask = mask or mask_experts(model, {layer: (1,)})
            run(model, batch)
            assert not watch.probabilities(layer)[:, 1].any()
            assert torch.isneginf(watch.logits[layer][:, 1]).all()
            assert not (watch.chosen[layer] == 1).any()
            other = moe_layers(model)[0].index
            assert (watch.probabilities(other) > 0).all()
        mask.remove()


@pytest.mark.parametrize("full", [True, False], ids=["full router", "LoRA on the router"])
def test_gradients_flow_through_what_is_watched(full: bool, tiny_model: Model, random_batch: Rows, plain_logits: Plain) -> None:
    model: Any = tiny_model("qwen2_moe")
    slots = Slots(full=("router",)) if full else Slots(adapters=(AdapterSpec(name="a", rank=2, alpha=2.0, targets=("router",)),))
    refs = add_slots(model, slots)
    layers = moe_layers(model)
    inputs: dict[int, torch.Tensor] = {}
    for layer in layers:
        layer.block.register_forward_hook(lambda block, args, output, at=layer.index: inputs.update({at: args[0]}))
    with RouterWatch(model) as watch:
        run(model, random_batch((6,)))
        # The gradient of the mean logit of expert 2 in the last layer is the mean input, in row 2 alone.
        watch.logits[layers[-1].index][:, 2].mean().backward()  # type: ignore[no-untyped-call]
    if full:
        rows = layers[-1].router_rows.grad
        assert rows is not None
        expected = torch.zeros_like(rows)
        expected[2] = inputs[layers[-1].index].reshape(-1, 32).mean(dim=0)
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-6)
        return
    parameters = dict(model.named_parameters())
    moved = {ref.name for ref in refs if (grad := parameters[ref.name].grad) is not None and bool(grad.any())}
    assert any("lora_B" in name and f"layers.{layers[-1].index}." in name for name in moved)


# ---- prompts


def test_training_judging_and_decoding_announce_what_they_read(tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model("qwen2_moe")
    batch = random_batch((9, 6, 4))
    seen: list[tuple[list[list[int]], list[list[bool]]]] = []
    passes: list[list[list[int]]] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        assert len(seen) > len(passes) or kwargs["input_ids"].shape[1] == 1, "announced before the pass begins"
        passes.append(kwargs["input_ids"].tolist())

    handle = model.model.register_forward_pre_hook(note, with_kwargs=True)
    with watch_prompts(model, lambda ids, is_prompt: seen.append((ids.tolist(), is_prompt.tolist()))):
        response_loss(model, batch)
        # Rows of 9, 6 and 4 tokens whose second halves are responses.
        is_prompt = [[at < length // 2 for at in range(9)] for length in (9, 6, 4)]
        assert seen == [(batch.input_ids.tolist(), is_prompt)]
        assert passes == [batch.input_ids.tolist()]
        seen.clear()
        passes.clear()
        score_batches(model, [batch])
        assert [ids for ids, _ in seen] == passes
        width = len(passes[0][0])
        assert [found for _, found in seen] == [[row[:width] for row in is_prompt]]
        seen.clear()
        passes.clear()
        question = ChoiceTokens(prompt=(5, 6, 7), choices=((8, 9), (10,)), answer=0)
        score_choices(model, [question], pad_token_id=0, batch_size=4)
        assert [sum(row) for _, found in seen for row in found] == [3, 3]
        assert [ids for ids, _ in seen] == passes
        seen.clear()
        passes.clear()
        decode_greedy(model, [[5, 6, 7, 8], [9, 10]], max_new_tokens=3, eos_token_id=1, pad_token_id=0, batch_size=2)
        assert seen == [([[5, 6, 7, 8], [0, 0, 9, 10]], [[True] * 4, [False, False, True, True]])]
        assert len(passes) == 3, "a token's own step is not announced"
        seen.clear()
        passes.clear()
    handle.remove()
    response_loss(model, batch)
    assert seen == [], "who no longer watches is told nothing"


def test_every_watcher_is_told_and_leaves_alone() -> None:
    model = torch.nn.Linear(1, 1)
    told: list[str] = []
    ids, is_prompt = torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool)
    with watch_prompts(model, lambda *args: told.append("outer")):
        with pytest.raises(ValueError, match="boom"), watch_prompts(model, lambda *args: told.append("inner")):
            announce_prompts(model, ids, is_prompt)
            raise ValueError("boom")
        announce_prompts(model, ids, is_prompt)
    announce_prompts(model, ids, is_prompt)
    assert told == ["outer", "inner", "outer"]


# ---- routers row by row


def test_a_router_is_listed_row_by_row_and_only_chosen_rows_train(family: str, tiny_model: Model, random_batch: Rows) -> None:
    whole = {ref.key: ref for ref in add_slots(tiny_model(family), Slots(full=("router",)))}
    model: Any = tiny_model(family)
    engine = TorchEngine(model, Slots(full=("router",), splits_router=True), 0)
    assert [ref.key for ref in engine.refs] == [f"{key}[{e}]" for key in whole for e in range(4)]
    start = dict(model.named_parameters())
    for ref in engine.refs:
        assert (ref.part, ref.shape) == ("router", (1, *whole[ref.name].shape[1:]))
        assert ref.layer == whole[ref.name].layer
        assert ref.key == f"{ref.name}[{ref.expert}]"
        assert torch.equal(engine.initial[ref.key], start[ref.name][[ref.expert or 0]])
    trained = [ref.key for ref in engine.refs if ref.expert in (0, 2)]
    engine.train([random_batch(), random_batch(seed=1)], TrainSpec(learning_rate=0.1, weight_decay=0.1), trained, seed=0)
    after = engine.read(ref.key for ref in engine.refs)
    for ref in engine.refs:
        assert torch.equal(after[ref.key], engine.initial[ref.key]) == (ref.expert not in (0, 2)), ref.key


def test_splitting_a_router_changes_no_value(tiny_model: Model) -> None:
    first: Any = tiny_model("gpt_oss")
    whole = initial_params(first, add_slots(first, Slots(full=("router", "experts"))), 3)
    second: Any = tiny_model("gpt_oss")
    rows = initial_params(second, add_slots(second, Slots(full=("router", "experts"), splits_router=True)), 3)
    joined = {key: torch.cat([rows[f"{key}[{e}]"] for e in range(4)]) if key not in rows else rows[key] for key in whole}
    assert all(torch.equal(value, joined[key]) for key, value in whole.items())
    assert len(rows) == len(whole) + 2 * 2 * 3  # two tensors in two layers, four keys in the place of one
