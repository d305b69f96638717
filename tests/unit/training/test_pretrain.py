"""The pre-training loop on a model of a few thousand parameters."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from fedgraft.errors import ModelError
from fedgraft.training.pretrain import PretrainSpec, learning_rate_at, pretrain, weighted_token_loss
from fedgraft.types import IGNORE_INDEX, Batch

SPEC = PretrainSpec(num_steps=8, learning_rate=1e-2, warmup_steps=3)


def tiny_model(seed: int = 0) -> torch.nn.Module:
    config = Qwen2MoeConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=8,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=True,
        max_position_embeddings=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def copying(num_batches: int, seed: int = 0) -> Iterator[Batch]:
    """Rows ``a b 1 a b``: the last two tokens are the response; the second row is one token shorter, then padded."""
    rng = torch.Generator().manual_seed(seed)
    for _ in range(num_batches):
        words = torch.randint(2, 24, (8, 2), generator=rng)
        ids = torch.cat([words, torch.ones(8, 1, dtype=torch.long), words], dim=1)
        mask = torch.ones_like(ids)
        ids[1, 4], mask[1, 4] = 0, 0
        labels = ids.clone()
        labels[:, :3] = IGNORE_INDEX
        labels[1, 4] = IGNORE_INDEX
        yield Batch(input_ids=ids, attention_mask=mask, labels=labels)


def weights(model: torch.nn.Module) -> list[torch.Tensor]:
    return [value.clone() for value in model.state_dict().values()]


def test_the_loss_falls_below_that_of_guessing_and_steps_are_reported() -> None:
    seen: list[tuple[int, int, float]] = []
    spec = dataclasses.replace(SPEC, num_steps=120, prompt_weight=0.0)
    model = tiny_model()
    result = pretrain(model, copying(120), spec, lambda *step: seen.append(step))
    assert result.losses[0] == pytest.approx(math.log(24), abs=0.3)
    assert result.final_loss < 0.6 * math.log(24)
    assert seen == [(step, 120, loss) for step, loss in enumerate(result.losses, start=1)]
    assert result.num_tokens == 120 * (8 * 5 - 1)
    assert not model.training


def test_same_settings_give_the_same_bits_and_other_ones_do_not() -> None:
    def train(spec: PretrainSpec, seed: int = 0) -> list[torch.Tensor]:
        model = tiny_model()
        pretrain(model, copying(spec.num_steps, seed), spec)
        return weights(model)

    first = train(SPEC)
    assert all(torch.equal(a, b) for a, b in zip(first, train(SPEC), strict=True))
    for changed in (
        dataclasses.replace(SPEC, learning_rate=2e-2),
        dataclasses.replace(SPEC, warmup_steps=6),
        dataclasses.replace(SPEC, final_lr_fraction=0.5),
        dataclasses.replace(SPEC, betas=(0.8, 0.9)),
        dataclasses.replace(SPEC, weight_decay=0.5),
        dataclasses.replace(SPEC, max_grad_norm=1e-3),
        dataclasses.replace(SPEC, prompt_weight=1.0),
        dataclasses.replace(SPEC, router_aux_weight=1.0),
    ):
        assert not all(torch.equal(a, b) for a, b in zip(first, train(changed), strict=True)), changed


def test_the_weighted_loss_equals_the_one_computed_row_by_row_with_a_mask() -> None:
    model = tiny_model().eval()
    batch = next(copying(1))
    with torch.no_grad():
        loss, _ = weighted_token_loss(model, batch, dataclasses.replace(SPEC, prompt_weight=0.25))
    total = weight = 0.0
    for row in range(8):
        length = int(batch.attention_mask[row].sum())
        ids = batch.input_ids[row : row + 1, :length]  # alone and unpadded
        log_probs = model(input_ids=ids).logits.detach().log_softmax(-1)
        for position in range(1, length):
            counts = 1.0 if position >= 3 else 0.25
            total -= counts * float(log_probs[0, position - 1, ids[0, position]])
            weight += counts
    assert float(loss) == pytest.approx(total / weight, rel=1e-5)


def test_padding_changes_neither_loss() -> None:
    model = tiny_model().eval()
    batch = next(copying(1))
    wider = Batch(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 6)),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 6)),
        labels=torch.nn.functional.pad(batch.labels, (0, 6), value=IGNORE_INDEX),
    )
    with torch.no_grad():
        narrow, wide = weighted_token_loss(model, batch, SPEC), weighted_token_loss(model, wider, SPEC)
    assert [float(value) for value in narrow] == pytest.approx([float(value) for value in wide], rel=1e-5)


def test_the_rate_rises_to_its_peak_and_falls_to_its_end() -> None:
    spec = PretrainSpec(num_steps=110, learning_rate=1.0, warmup_steps=10, final_lr_fraction=0.1)
    assert [learning_rate_at(step, spec) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate_at(60, spec) == pytest.approx(0.55)  # half way along the cosine
    assert learning_rate_at(110, spec) == pytest.approx(0.1)


def test_it_ends_with_a_reason() -> None:
    with pytest.raises(ModelError, match="expected 8 batches, got 2"):
        pretrain(tiny_model(), copying(2), SPEC)
    broken = tiny_model()
    with torch.no_grad():
        next(iter(broken.parameters())).fill_(float("nan"))
    with pytest.raises(ModelError, match="loss of step 1 is nan"):
        pretrain(broken, copying(8), SPEC)
