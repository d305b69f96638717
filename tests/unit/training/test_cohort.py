"""The cohort engine against the plain one: each client's update is that of training it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import GroupViolation, UpdateError
from fedgraft.moe.stacking import Segments, client_linear, grouped_linear
from fedgraft.moe.surgery import mask_experts
from fedgraft.protocols import TrainResult, TrainSpec
from fedgraft.training.cohort import CohortEngine, Training
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, Batch, GraftSpec, MixtureSpec, Params, Slots

LORA = AdapterSpec(name="shared", rank=4, alpha=8.0)
EVERYWHERE = AdapterSpec(name="shared", rank=4, alpha=8.0, targets=("attention", "router", "experts"))
ODD = AdapterSpec(name="shared", rank=3, alpha=3.0, targets=("experts",))
GRAFT = GraftSpec(num_grafts=2, layers=(0, 1), num_neurons=8, gate_bias=0.5)
CONVEX = GraftSpec(num_grafts=1, layers=(1,), num_neurons=6, mode="convex", gate_bias=-1.0)

SLOTS = {
    "attention": Slots(adapters=(LORA,)),
    "everywhere": Slots(adapters=(EVERYWHERE,)),
    "odd rank": Slots(adapters=(ODD,)),
    "graft": Slots(adapters=(LORA,), graft=GRAFT),
    "convex": Slots(adapters=(LORA,), graft=CONVEX),
    "router": Slots(adapters=(LORA,), full=("router",)),
    "split router": Slots(full=("router",), splits_router=True),
    "two": Slots(adapters=(LORA, AdapterSpec(name="private", rank=2, alpha=2.0))),
}


def client_values(engine: TorchEngine, seed: int) -> Params:
    """Slots of a client, none of them at its start value: LoRA B is not zero, and grafts differ."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: value + 0.2 * torch.randn(value.shape, generator=generator).to(value.dtype) for key, value in engine.initial.items()
    }


def alone(engine: TorchEngine, start: Params, training: Training) -> tuple[TrainResult, Params]:
    engine.load(engine.initial)
    engine.load(start)
    with mask_experts(engine.model, training.masked):
        result = engine.train(
            training.batches,
            training.spec,
            training.keys,
            seed=0,
            optimizer_state=training.optimizer_state,
            keep_optimizer_state=training.keep_optimizer_state,
        )
    return result, engine.read(engine.initial)


def together(engine: CohortEngine, starts: list[Params], trainings: list[Training]) -> list[Any]:
    for k, start in enumerate(starts):
        engine.load(engine.initial)
        engine.load(start)
        engine.stash(k)
    results = engine.train_many(trainings)
    found = []
    for k, result in enumerate(results):
        engine.restore(k)
        found.append((result, engine.read(engine.initial)))
    return found


@pytest.fixture
def compare(tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]) -> Callable[..., None]:
    def check(
        slots: Slots,
        *,
        family: str = "qwen2_moe",
        ragged: bool = True,
        size: int = 3,
        spec: TrainSpec | None = None,
        masked: Callable[[int], dict[int, list[int]]] = lambda k: {},
        is_trained: Callable[[int, str], bool] = lambda k, key: True,
        change: Callable[[int, Params], Params] = lambda k, values: values,
        state: Callable[[int, Params], Params] = lambda k, values: {},
        keeps: str = "",
    ) -> None:
        torch.manual_seed(0)
        plain, cohort = TorchEngine(tiny_model(family), slots, 3), CohortEngine(tiny_model(family), slots, 3, size)
        assert cohort.why_not is None
        shapes = [(9, 6, 4), (5, 7), (8, 8, 8, 3)] if ragged else [(8, 8)] * 3
        lengths = [3, 1, 2] if ragged else [3, 3, 3]
        spec = spec or TrainSpec(learning_rate=0.5, optimizer="sgd", max_grad_norm=1.0)
        # AdamW divides by the root of a gradient's square: where that is nearly zero, rounding is a part of a step.
        atol = 2e-5 if spec.optimizer == "sgd" else 0.02 * spec.learning_rate
        trainings = [
            Training(
                batches=[random_batch(shapes[k], seed=10 * k + step) for step in range(lengths[k])],
                spec=spec,
                keys=[key for key in plain.initial if is_trained(k, key)],
                masked=masked(k),
                optimizer_state=state(k, plain.initial),
                keep_optimizer_state=[key for key in plain.initial if keeps and keeps in key],
            )
            for k in range(3)
        ]
        starts = [change(k, client_values(plain, k)) for k in range(3)]
        base = cohort.frozen_hash()
        for k, (found, values) in enumerate(together(cohort, starts, trainings)):
            expected, wanted = alone(plain, starts[k], trainings[k])
            assert isinstance(found, TrainResult), found
            assert found.losses == pytest.approx(expected.losses, rel=1e-5)
            assert found.num_examples == expected.num_examples
            assert found.num_label_tokens == expected.num_label_tokens
            assert torch.equal(found.expert_tokens, expected.expert_tokens)
            moved = 0.0
            for key, value in wanted.items():
                torch.testing.assert_close(values[key], value, atol=atol, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}")
                moved = max(moved, float((value - starts[k][key]).nan_to_num().abs().max()))
            assert moved > 0.01
            assert set(found.optimizer_state) == set(expected.optimizer_state)
            for name, value in expected.optimizer_state.items():
                torch.testing.assert_close(found.optimizer_state[name], value, atol=1e-5, rtol=1e-3)
        assert cohort.frozen_hash() == base

    return check


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize("ragged", [True, False])
def test_clients_train_together_as_they_would_alone(name: str, ragged: bool, compare: Callable[..., None]) -> None:
    compare(SLOTS[name], ragged=ragged)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3"])
def test_in_every_family(family: str, compare: Callable[..., None]) -> None:
    compare(
        Slots(adapters=(EVERYWHERE,), graft=GraftSpec(num_grafts=1, layers=(1,), num_neurons=8, gate_bias=0.0)), family=family
    )


def test_in_the_family_with_biases(compare: Callable[..., None]) -> None:
    adapter = AdapterSpec(name="shared", rank=4, alpha=8.0, targets=("attention", "router"))
    compare(Slots(adapters=(adapter,), graft=GRAFT), family="gpt_oss")
    compare(Slots(full=("router",)), family="gpt_oss")


@pytest.mark.parametrize(
    "spec",
    [
        TrainSpec(learning_rate=0.5, optimizer="sgd", weight_decay=0.1, max_grad_norm=None),
        TrainSpec(learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.05),
    ],
)
def test_each_optimiser_and_a_place_that_stays_empty(spec: TrainSpec, compare: Callable[..., None]) -> None:
    compare(SLOTS["graft"], spec=spec, size=5)


def test_masked_experts_and_slots_that_are_not_trained(compare: Callable[..., None]) -> None:
    """Client 0 trains no attention, client 1 not its masked experts, client 2 all; weight decay moves nothing else."""
    masked: list[dict[int, list[int]]] = [{0: [0], 1: [3]}, {1: [1]}, {}]

    def is_trained(k: int, key: str) -> bool:
        if k == 0:
            return "self_attn" not in key
        return k == 2 or not (".experts." in key and key.startswith("model.layers.1.") and key.endswith("[1]"))

    spec = TrainSpec(learning_rate=0.02, weight_decay=0.1)
    compare(SLOTS["everywhere"], masked=masked.__getitem__, is_trained=is_trained, spec=spec)


def test_a_shut_graft_stays_as_it_is(compare: Callable[..., None]) -> None:
    def shut(k: int, values: Params) -> Params:
        return values | {
            key: torch.full_like(values[key], float("-inf")) for key in values if k == 1 and "layers.0.mlp.graft.gate_b" in key
        }

    compare(SLOTS["graft"], spec=TrainSpec(learning_rate=0.02, weight_decay=0.1), change=shut)


def test_moments_are_kept_and_taken_up(compare: Callable[..., None]) -> None:
    """Each client comes with moments after another number of steps."""

    def state(k: int, values: Params) -> Params:
        key = next(key for key in values if "graft.down_proj" in key)
        generator = torch.Generator().manual_seed(k)
        return {
            f"{key}|step": torch.tensor(float(3 * k + 1)),
            f"{key}|exp_avg": 1e-3 * torch.randn(values[key].shape, generator=generator),
            f"{key}|exp_avg_sq": 1e-5 * torch.rand(values[key].shape, generator=generator),
        }

    compare(SLOTS["graft"], spec=TrainSpec(learning_rate=0.02), state=state, keeps="graft")


def test_a_client_whose_loss_is_not_finite_ends_alone(
    tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    engine = CohortEngine(tiny_model("qwen2_moe"), SLOTS["everywhere"], 3, 3)
    plain = TorchEngine(tiny_model("qwen2_moe"), SLOTS["everywhere"], 3)
    starts = [client_values(plain, k) for k in range(3)]
    key = next(iter(starts[1]))
    starts[1][key] = torch.full_like(starts[1][key], float("nan"))

    def hook(step: int) -> None:
        if step == 1:
            raise ValueError("the hook of client 0")

    batches = [random_batch((6, 4), seed=seed) for seed in range(3)]
    spec = TrainSpec(learning_rate=0.02)
    trainings = [
        Training(batches=batches, spec=spec, keys=tuple(engine.initial), after_backward=hook if k == 0 else None)
        for k in range(3)
    ]
    first, second, (third, values) = together(engine, starts, trainings)
    assert str(first[0]) == "the hook of client 0"
    assert isinstance(second[0], UpdateError)
    assert "the loss of local step 1 is nan" in str(second[0])
    expected, wanted = alone(plain, starts[2], trainings[2])
    assert third.losses == pytest.approx(expected.losses, rel=1e-5)
    for name, value in wanted.items():
        torch.testing.assert_close(values[name], value, atol=2e-5, rtol=1e-4)


def test_a_broken_promise_ends_all(tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]) -> None:
    engine = CohortEngine(tiny_model("qwen2_moe"), SLOTS["attention"], 3, 2)

    def hook(step: int) -> None:
        raise GroupViolation("a promise", "keep it")

    spec = TrainSpec(learning_rate=0.02)
    for k in range(2):
        engine.load(engine.initial)
        engine.stash(k)
    with pytest.raises(GroupViolation):
        engine.train_many(
            [Training(batches=[random_batch((5,))], spec=spec, keys=tuple(engine.initial), after_backward=hook)] * 2
        )


def test_a_place_reads_and_changes_its_own_gradients(
    tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    """Gradients of one client set to zero leave it where it was, and the other client as it is alone."""
    slots = SLOTS["attention"]
    engine, plain = CohortEngine(tiny_model("qwen2_moe"), slots, 3, 2), TorchEngine(tiny_model("qwen2_moe"), slots, 3)
    starts = [client_values(plain, k) for k in range(2)]
    keys = tuple(engine.initial)
    seen: dict[str, Params] = {}

    def stop(step: int) -> None:
        place = engine.place(1)
        seen["gradients"] = place.read_gradients(keys)
        seen["values"] = place.read(keys)
        place.write_gradients({key: torch.zeros_like(value) for key, value in seen["gradients"].items()})

    spec = TrainSpec(learning_rate=0.5, optimizer="sgd", max_grad_norm=None)
    batches = [random_batch((6, 4), seed=1)]
    trainings = [Training(batches=batches, spec=spec, keys=keys, after_backward=stop if k else None) for k in range(2)]
    (_, first), (_, second) = together(engine, starts, trainings)
    _, wanted = alone(plain, starts[0], trainings[0])
    _, moved = alone(plain, starts[1], trainings[1])
    for key in keys:
        torch.testing.assert_close(first[key], wanted[key], atol=2e-5, rtol=1e-4)
        assert torch.equal(second[key], starts[1][key])
        assert torch.equal(seen["values"][key], starts[1][key])
        torch.testing.assert_close(starts[1][key] - 0.5 * seen["gradients"][key], moved[key], atol=2e-5, rtol=1e-4)


def test_terms_see_one_clients_part_of_the_output(
    tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    slots = SLOTS["attention"]
    engine, plain = CohortEngine(tiny_model("qwen2_moe"), slots, 3, 2), TorchEngine(tiny_model("qwen2_moe"), slots, 3)
    starts = [client_values(plain, k) for k in range(2)]
    spec = TrainSpec(learning_rate=0.02)

    def terms(batch: Batch, output: Any) -> dict[str, torch.Tensor]:
        own = output.hidden[batch.attention_mask.bool()].square().mean()
        return {"size": 0.3 * own + output.logits.square().mean() + 0.01 * output.labels.numel()}

    trainings = [
        Training(batches=[random_batch(shape, seed=k)], spec=spec, keys=tuple(engine.initial), terms=terms)
        for k, shape in enumerate([(9, 6, 4), (5, 7)])
    ]
    for k, (_, values) in enumerate(together(engine, starts, trainings)):
        plain.load(plain.initial)
        plain.load(starts[k])
        plain.train(trainings[k].batches, spec, trainings[k].keys, seed=0, terms=terms)
        for key, value in plain.read(plain.initial).items():
            torch.testing.assert_close(values[key], value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("slots", "said"),
    [
        (Slots(full=("experts",)), "trained in full"),
        (Slots(adapters=(AdapterSpec(name="a", rank=2, alpha=2.0, dropout=0.1),)), "dropout"),
        (Slots(graft=GraftSpec(num_grafts=1, layers=(0,), num_neurons=4, mode="row")), "mode row"),
        (Slots(mixture=MixtureSpec(num_slots=2, rank=2, alpha=2.0, targets=("q_proj",), top_k=1)), "mixture"),
    ],
)
def test_what_cannot_be_batched_is_said(slots: Slots, said: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    assert said in str(CohortEngine(tiny_model("qwen2_moe"), slots, 3, 2).why_not)


@pytest.mark.parametrize("width", [8, 7])
def test_grouped_products_are_loops_over_groups(width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 4]
    x = torch.randn(7, width, generator=generator, requires_grad=True)
    weights = torch.randn(3, 8, width, generator=generator, requires_grad=True)
    segments = Segments.of(sizes, torch.device("cpu"))
    expected = torch.cat([part @ weight.T for part, weight in zip(x.split(sizes), weights, strict=True)])
    for found in (client_linear(x, weights, segments), grouped_linear(x, weights, segments.offsets)):
        torch.testing.assert_close(found, expected)
        mine = torch.autograd.grad((found * found.detach()).sum(), (x, weights), retain_graph=True)
        theirs = torch.autograd.grad((expected * expected.detach()).sum(), (x, weights), retain_graph=True)
        for own, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(own, other)
