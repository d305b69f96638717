"""The reference engine against HF's own loss and plain PyTorch training of the same tensors."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import UpdateError
from fedgraft.protocols import TrainSpec
from fedgraft.training.step import StepOutput, response_loss
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, AdapterSpec, Batch, GraftSpec, Params, Slots

ATTENTION = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),))


@pytest.fixture
def make_engine(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., TorchEngine]:
    def make(slots: Slots = ATTENTION, *, family: str = "qwen2_moe", run_seed: int = 3) -> TorchEngine:
        engine = TorchEngine(tiny_model(family), slots, run_seed)
        engine.load(engine.initial)
        return engine

    return make


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    return [random_batch((9, 6, 4), seed=seed) for seed in range(3)]


def everything(engine: TorchEngine) -> Params:
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe", "olmoe", "mixtral"])
def test_the_response_loss_is_hugging_faces(
    family: str, tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    model: Any = tiny_model(family)
    batch = random_batch((9, 7, 2))
    expected = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    loss, output = response_loss(model, batch)
    assert float(loss) == pytest.approx(float(expected.loss), rel=1e-6)
    counted = batch.labels[:, 1:] != IGNORE_INDEX
    assert output.labels.tolist() == batch.labels[:, 1:][counted].tolist()
    torch.testing.assert_close(output.logits, expected.logits[:, :-1][counted], atol=1e-5, rtol=1e-5)
    assert output.hidden.shape == (3, 9, 32)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_equals_a_plain_loop(
    optimizer: str, make_engine: Callable[..., TorchEngine], tiny_model: Callable[..., PreTrainedModel], batches: list[Batch]
) -> None:
    engine = make_engine(Slots(full=("attention",)))
    rates = {key: 3.0 for key in engine.initial if "v_proj" in key}
    spec = TrainSpec(learning_rate=0.01, optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.5, lr_scale=rates)  # type: ignore[arg-type]
    result = engine.train(batches, spec, list(engine.initial), seed=0)

    plain: Any = tiny_model("qwen2_moe")
    chosen = {
        name: parameter.requires_grad_(True)
        for name, parameter in plain.named_parameters()
        if "_proj." in name and "attn" in name
    }
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    loop = kind(
        [{"params": [p], "lr": 0.03 if "v_proj" in name else 0.01} for name, p in chosen.items()], lr=0.01, weight_decay=0.1
    )
    losses = []
    for batch in batches:
        loop.zero_grad()
        loss = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen.values(), 0.5)
        loop.step()
        losses.append(float(loss.detach()))
    assert set(chosen) == set(engine.initial)
    for key, value in engine.read(chosen).items():
        torch.testing.assert_close(value, chosen[key].detach(), atol=2e-5, rtol=1e-4, msg=key)
        assert not torch.equal(value, engine.initial[key])
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.num_examples == 9
    assert result.num_label_tokens == sum(batch.num_label_tokens for batch in batches)


def test_everything_but_the_trained_keys_stays_byte_for_byte(
    make_engine: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    slots = Slots(
        adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("attention", "experts")),),
        graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=4, gate_bias=0.0),
    )
    engine = make_engine(slots)
    for graft_key in [ref.key for ref in engine.refs if ref.part == "graft"]:
        shape = engine.initial[graft_key].shape
        engine.load({graft_key: torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.3})
    trained = [ref.key for ref in engine.refs if ref.part == "attention" or ref.expert == 2]
    before, slots_before = everything(engine), engine.read([ref.key for ref in engine.refs])
    names = {ref.name for ref in engine.refs if ref.key in trained}
    engine.train(batches, TrainSpec(learning_rate=0.05, weight_decay=0.1), trained, seed=0)
    for name, value in everything(engine).items():
        assert name in names or torch.equal(value, before[name]), name
    after = engine.read(slots_before)
    for ref in engine.refs:
        same = torch.equal(after[ref.key], slots_before[ref.key])
        assert same == (ref.key not in trained), ref.key
    assert not engine.model.training
    assert all(parameter.grad is None for parameter in engine.model.parameters())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_training_one_experts_slice_is_as_if_the_others_were_not_trainable(
    optimizer: str, make_engine: Callable[..., TorchEngine], tiny_model: Callable[..., PreTrainedModel], batches: list[Batch]
) -> None:
    engine = make_engine(Slots(full=("experts",)))
    keys = [ref.key for ref in engine.refs if ref.expert == 1]
    spec = TrainSpec(learning_rate=0.02, optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.3)  # type: ignore[arg-type]
    result = engine.train(batches, spec, keys, seed=0)
    # Reference: the other experts' gradients are zero, and they are put back after every step.
    plain: Any = tiny_model("qwen2_moe")
    chosen = {n: p.requires_grad_(True) for n, p in plain.named_parameters() if ".experts." in n}
    start = {name: parameter.detach().clone() for name, parameter in chosen.items()}
    others = [0, 2, 3]
    kind = torch.optim.AdamW if optimizer == "adamw" else torch.optim.SGD
    loop = kind(list(chosen.values()), lr=0.02, weight_decay=0.1)
    losses = []
    for batch in batches:
        loop.zero_grad()
        loss = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        for parameter in chosen.values():
            assert parameter.grad is not None
            parameter.grad[others] = 0
        torch.nn.utils.clip_grad_norm_(chosen.values(), 0.3)
        loop.step()
        with torch.no_grad():
            for name, parameter in chosen.items():
                parameter[others] = start[name][others]
        losses.append(float(loss.detach()))
    assert result.losses == pytest.approx(losses, rel=1e-5)
    for key, value in engine.read(keys).items():
        torch.testing.assert_close(value[0], chosen[key.removesuffix("[1]")][1].detach(), atol=2e-5, rtol=1e-4)


def test_no_key_means_no_change(make_engine: Callable[..., TorchEngine], batches: list[Batch]) -> None:
    engine = make_engine()
    before = everything(engine)
    result = engine.train(batches, TrainSpec(learning_rate=1.0), [], seed=0)
    assert len(result.losses) == 3
    assert all(torch.equal(value, before[name]) for name, value in everything(engine).items())


def test_the_clip_is_over_all_trained_tensors(make_engine: Callable[..., TorchEngine], batches: list[Batch]) -> None:
    for limit in (1e-3, None):
        engine = make_engine()
        spec = TrainSpec(learning_rate=1.0, optimizer="sgd", max_grad_norm=limit)
        engine.train(batches[:1], spec, list(engine.initial), seed=0)
        moved = math.sqrt(
            sum(
                float((value - engine.initial[key]).double().square().sum()) for key, value in engine.read(engine.initial).items()
            )
        )
        # One SGD step of rate 1 moves by the gradient, whose norm the clip sets.
        assert moved == pytest.approx(1e-3, rel=1e-2) if limit else moved > 0.01


def test_hooks_see_every_step_and_can_change_loss_and_gradient(
    make_engine: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    engine = make_engine()
    keys = list(engine.initial)
    steps: list[int] = []

    def zero(step: int) -> None:
        steps.append(step)
        for parameter in engine.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    engine.train(batches, TrainSpec(learning_rate=0.1, optimizer="sgd"), keys, seed=0, after_backward=zero)
    assert steps == [0, 1, 2]
    assert all(torch.equal(value, engine.initial[key]) for key, value in engine.read(keys).items())

    def minus(batch: Batch, output: StepOutput) -> dict[str, torch.Tensor]:
        # The loss once more with a minus sign: nothing is left to learn from.
        return {"minus": -torch.nn.functional.cross_entropy(output.logits.float(), output.labels)}

    result = engine.train(batches, TrainSpec(learning_rate=0.1, optimizer="sgd"), keys, seed=0, terms=minus)
    assert all(torch.equal(value, engine.initial[key]) for key, value in engine.read(keys).items())
    assert min(result.losses) > 1  # the response loss is reported without the terms


def test_a_loss_that_is_not_finite_is_refused_with_its_step(
    make_engine: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    engine = make_engine()
    seen = iter([0.0, math.inf])
    with pytest.raises(UpdateError, match="the loss of local step 2 is inf"):
        engine.train(
            batches,
            TrainSpec(learning_rate=0.1),
            list(engine.initial),
            seed=0,
            terms=lambda batch, output: {"bad": torch.tensor(next(seen))},
        )


def test_routed_tokens_are_counted_without_padding(
    make_engine: Callable[..., TorchEngine], tiny_model: Callable[..., PreTrainedModel], batches: list[Batch]
) -> None:
    engine = make_engine()
    result = engine.train(batches, TrainSpec(learning_rate=1e-9), list(engine.initial), seed=0)
    plain: Any = tiny_model("qwen2_moe")
    expected = torch.zeros(2, 4, dtype=torch.int64)
    for batch in batches:
        with torch.no_grad():
            routed = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True)
        for layer, logits in enumerate(routed.router_logits):
            chosen = torch.topk(logits, 2, dim=-1).indices[batch.attention_mask.reshape(-1).bool()]
            expected[layer] += torch.bincount(chosen.reshape(-1), minlength=4)
    assert torch.equal(result.expert_tokens, expected)
    assert result.expert_tokens.sum(dim=1).tolist() == [2 * sum(int(b.attention_mask.sum()) for b in batches)] * 2


def test_dropout_follows_the_seed_and_leaves_the_callers_generator_alone(
    make_engine: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    slots = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, dropout=0.5),))
    found = []
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    for seed in (0, 0, 1):
        engine = make_engine(slots)
        engine.train(batches, TrainSpec(learning_rate=0.05), list(engine.initial), seed=seed)
        found.append(torch.cat([value.reshape(-1) for value in engine.read(engine.initial).values()]))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    engine = make_engine(slots)
    torch.manual_seed(11)
    engine.train(batches, TrainSpec(learning_rate=0.05), list(engine.initial), seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_kept_moments_go_on_where_they_stopped(make_engine: Callable[..., TorchEngine], batches: list[Batch]) -> None:
    spec = TrainSpec(learning_rate=0.05)
    whole = make_engine()
    keys = list(whole.initial)
    whole.train(batches, spec, keys, seed=0)
    for persists in (True, False):
        halves = make_engine()
        first = halves.train(batches[:2], spec, keys, seed=0, keep_optimizer_state=keys if persists else ())
        assert bool(first.optimizer_state) == persists
        halves.train(batches[2:], spec, keys, seed=0, optimizer_state=first.optimizer_state)
        same = [torch.equal(value, whole.read([key])[key]) for key, value in halves.read(keys).items()]
        assert all(same) if persists else not any(same)


def test_load_refuses_what_fits_no_slot(make_engine: Callable[..., TorchEngine]) -> None:
    engine = make_engine()
    key = next(iter(engine.initial))
    with pytest.raises(UpdateError, match=r"no slot is called 'lm_head\.weight'"):
        engine.load({"lm_head.weight": torch.zeros(259, 32)})
    with pytest.raises(UpdateError, match=r"expected shape \(2, 32\), got \(32, 2\)"):
        engine.load({key: torch.zeros(32, 2)})
    value = torch.full((2, 32), 3.0)
    engine.load({key: value})
    copy = engine.read([key])[key]
    copy.zero_()
    value.zero_()
    assert torch.equal(engine.read([key])[key], torch.full((2, 32), 3.0))  # both ways a copy


def test_the_frozen_hash_covers_every_byte_of_the_rest_and_nothing_else(make_engine: Callable[..., TorchEngine]) -> None:
    engine = make_engine(Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("attention", "experts")),)))
    start = engine.frozen_hash()
    slots = {ref.name for ref in engine.refs}
    digest = hashlib.sha256()
    for name, parameter in engine.model.named_parameters():
        if name not in slots:
            digest.update(f"{name}|{tuple(parameter.shape)}|{parameter.dtype}".encode() + parameter.detach().numpy().tobytes())
    assert start == digest.hexdigest()
    for name, parameter in engine.model.named_parameters():
        flat = parameter.data.view(-1)
        old = float(flat[-1])
        flat[-1] = old + 1e-3
        assert (engine.frozen_hash() == start) == (name in slots), name
        flat[-1] = old
    assert engine.frozen_hash() == start
