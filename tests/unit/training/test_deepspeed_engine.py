"""The DeepSpeed engine, alone in this process, against the reference engine on the same tasks, at every ZeRO stage."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import ModelError, UpdateError
from fedgraft.protocols import Engine, TrainSpec
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import open_ranks
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, Batch, GraftSpec, ParamRef, Params, Slots

# DeepSpeed calls what PyTorch deprecates, and hooks modules whose inputs need no gradient.
pytestmark = [
    pytest.mark.slow,  # DeepSpeed takes seconds to set up
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

FLEX = Slots(
    adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24)
)
EXPERTS = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("experts",)),))
FULL = Slots(full=("experts", "router"))
PLAIN = TrainSpec(learning_rate=0.02)
# float32 sums of the same numbers in another order (the clipping norm); AdamW divides by a gradient's size, so where that is
# near zero its rounding grows. The steps themselves are about 0.05.
CLOSE = {"atol": 1e-5, "rtol": 2e-5}


@pytest.fixture
def make_engine(tiny_model: Callable[..., PreTrainedModel]) -> Iterator[Callable[..., DeepSpeedEngine]]:
    made: list[DeepSpeedEngine] = []

    def make(
        stage: int,
        slots: Slots = FLEX,
        *,
        spec: TrainSpec = PLAIN,
        dtype: str = "float32",
        policy: Callable[[ParamRef], SlotPolicy] = lambda ref: SlotPolicy(),
        **options: Any,
    ) -> DeepSpeedEngine:
        # A threshold of 0, or these small tensors would stay whole.
        zero = {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        config = EngineConfig(name="deepspeed", stage=stage, deepspeed={"zero_optimization": zero}, **options)
        settings = deepspeed_settings(config, batch_size=3, dtype=dtype, max_grad_norm=spec.max_grad_norm)
        model = tiny_model("qwen2_moe").to(getattr(torch, dtype))
        engine = DeepSpeedEngine(
            model, slots, 3, settings=settings, spec=spec, ranks=open_ranks("cpu", 60.0), device="cpu", policy=policy
        )
        made.append(engine)
        engine.load(engine.initial)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def reference(tiny_model: Callable[..., PreTrainedModel]) -> Callable[..., TorchEngine]:
    def make(slots: Slots = FLEX, dtype: str = "float32") -> TorchEngine:
        engine = TorchEngine(tiny_model("qwen2_moe").to(getattr(torch, dtype)), slots, 3)
        engine.load(engine.initial)
        return engine

    return make


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    return [random_batch((9, 6, 4), seed=seed) for seed in range(3)]


def every_key(engine: Engine) -> tuple[str, ...]:
    return tuple(ref.key for ref in engine.refs)


def start(engine: Engine, seed: int) -> Params:
    """A client's own values for every slot, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in engine.initial.items()}


def host_and_train(engine: Engine, seed: int, batches: list[Batch], **options: Any) -> Params:
    engine.load(engine.initial)
    engine.load(start(engine, seed))
    spec = options.pop("spec", PLAIN)
    engine.train(batches, spec, options.pop("keys", every_key(engine)), seed=1, **options)
    return engine.read(every_key(engine))


def assert_close(found: Params, expected: Params, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **(tolerance or CLOSE), msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("slots", "optimizer"), [(FLEX, "adamw"), (FLEX, "sgd"), (EXPERTS, "adamw"), (FULL, "adamw")],
    ids=["flex", "flex-sgd", "experts", "full"],
)  # fmt: skip
def test_every_stage_trains_as_the_reference_does(
    stage: int, slots: Slots, optimizer: Any, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine],
    batches: list[Batch],
) -> None:  # fmt: skip
    spec = TrainSpec(learning_rate=0.05, optimizer=optimizer, weight_decay=0.1, max_grad_norm=0.5)
    engine, plain = make_engine(stage, slots, spec=spec), reference(slots)
    expected = host_and_train(plain, 4, batches, spec=spec)
    assert_close(host_and_train(engine, 4, batches, spec=spec), expected)
    assert max(float((expected[key] - value).abs().max()) for key, value in start(plain, 4).items()) > 0.01


def test_without_zero_the_arithmetic_is_the_same(
    make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch],
    assert_same_bits: Callable[[Params, Params], None],
) -> None:  # fmt: skip
    spec = TrainSpec(learning_rate=0.05, max_grad_norm=None)
    assert_same_bits(
        host_and_train(make_engine(0, spec=spec), 4, batches, spec=spec), host_and_train(reference(), 4, batches, spec=spec)
    )


@pytest.mark.parametrize(
    ("stage", "slots"),
    [(0, FLEX), (1, FLEX), (2, FLEX), (3, FLEX), (1, EXPERTS), (3, EXPERTS), (2, FULL), (3, FULL)],
    ids=["flex-0", "flex-1", "flex-2", "flex-3", "experts-1", "experts-3", "full-2", "full-3"],
)
def test_what_a_client_leaves_does_not_reach_the_next(
    stage: int, slots: Slots, make_engine: Callable[..., DeepSpeedEngine], batches: list[Batch],
    assert_same_bits: Callable[[Params, Params], None],
) -> None:  # fmt: skip
    engine = make_engine(stage, slots)
    first = host_and_train(engine, 4, batches)
    second = host_and_train(engine, 5, batches[::-1])
    again = host_and_train(engine, 4, batches)
    assert_same_bits(again, first)
    fresh = host_and_train(make_engine(stage, slots), 4, batches)
    assert_same_bits(first, fresh)
    assert any(not torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("stage", "dtype"), [(0, "float32"), *((stage, dtype) for stage in (1, 2, 3) for dtype in ("float32", "bfloat16"))]
)
def test_what_is_loaded_is_there_before_and_after_a_step(
    stage: int, dtype: str, make_engine: Callable[..., DeepSpeedEngine], batches: list[Batch]
) -> None:
    """The silent trap: a master weight that was not written brings the old value back at the next step."""
    spec = TrainSpec(learning_rate=1e-12)
    engine = make_engine(stage, dtype=dtype, spec=spec)
    host_and_train(engine, 4, batches)  # leaves other values and moments behind
    wanted = start(engine, 5)
    engine.load(wanted)
    assert_close(engine.read(every_key(engine)), wanted, atol=0, rtol=0)
    with torch.no_grad():
        before = engine.model(input_ids=batches[0].input_ids).logits.clone()
    engine.train(batches[:1], spec, every_key(engine), seed=1)
    # a rate of 1e-12 moves nothing that float32 can show, and the masters are float32 whatever the model is
    assert_close(engine.read(every_key(engine)), wanted, atol=1e-8, rtol=0)
    with torch.no_grad():
        after = engine.model(input_ids=batches[0].input_ids).logits
    torch.testing.assert_close(after, before, atol=0, rtol=0)


@pytest.mark.parametrize("stage", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_bfloat16_keeps_float32_masters(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    engine = make_engine(stage, dtype="bfloat16")
    moved = host_and_train(engine, 4, batches)
    expected = host_and_train(reference(), 4, batches)
    begin = start(engine, 4)
    # AdamW's first steps are about the rate in every value, whatever the gradient's size; where its sign is rounding noise
    # in bfloat16 they differ, so the whole move is compared, not each value.
    ours = torch.cat([(moved[key] - begin[key]).flatten() for key in moved])
    theirs = torch.cat([(expected[key] - begin[key]).flatten() for key in moved])
    assert float(torch.nn.functional.cosine_similarity(ours, theirs, dim=0)) > 0.9
    # values between two bfloat16 numbers survive: the masters are not rounded
    assert any(not torch.equal(value, value.bfloat16().float()) for value in moved.values())


@pytest.mark.parametrize(
    ("stage", "slots"), [(0, "lora"), (1, "lora"), (2, "lora"), (2, "full"), pytest.param(3, "full", marks=pytest.mark.slow)]
)
def test_slots_outside_the_task_stay_as_they_are(
    stage: int,
    slots: str,
    make_engine: Callable[..., DeepSpeedEngine],
    reference: Callable[..., TorchEngine],
    batches: list[Batch],
) -> None:
    spec = TrainSpec(learning_rate=0.05, weight_decay=0.1, max_grad_norm=0.5)
    engine, plain = (make(EXPERTS if slots == "lora" else FULL) for make in (partial(make_engine, stage, spec=spec), reference))
    keys = tuple(ref.key for ref in engine.refs if ref.expert in (0, 2))
    found = host_and_train(engine, 4, batches, spec=spec, keys=keys)
    assert_close(found, host_and_train(plain, 4, batches, spec=spec, keys=keys))
    begin = start(engine, 4)
    for ref in engine.refs:
        if ref.key not in keys:
            assert torch.equal(found[ref.key], begin[ref.key]), ref.key


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_method_may_change_gradients(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    def halves(engine: Engine) -> Callable[[int], None]:
        def change(step: int) -> None:
            keys = every_key(engine)[::2]
            engine.write_gradients({key: 0.5 * value + 0.01 for key, value in engine.read_gradients(keys).items()})

        return change

    spec = TrainSpec(learning_rate=0.5, optimizer="sgd", max_grad_norm=None)  # AdamW would hide a gradient's size
    engine, plain = make_engine(stage, spec=spec), reference()
    found = host_and_train(engine, 4, batches, spec=spec, after_backward=halves(engine))
    assert_close(found, host_and_train(plain, 4, batches, spec=spec, after_backward=halves(plain)))
    unchanged = host_and_train(plain, 4, batches, spec=spec)
    assert any(not torch.allclose(found[key], unchanged[key]) for key in found)


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_kept_moments_continue(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    def keeps(ref: ParamRef) -> SlotPolicy:
        return SlotPolicy(persists_moments=ref.part == "graft", lr_scale=0.5 if ref.part == "graft_gate" else 1.0)

    engine, plain = make_engine(stage, policy=keeps), reference()
    scale = {ref.key: keeps(ref).lr_scale for ref in engine.refs}
    spec = TrainSpec(learning_rate=0.02, lr_scale=scale)
    kept = tuple(ref.key for ref in engine.refs if keeps(ref).persists_moments)
    results = []
    for each in (engine, plain):
        each.load(start(each, 4))
        first = each.train(batches, spec, every_key(each), seed=1, keep_optimizer_state=kept)
        each.load(each.initial)  # another client in between
        each.train(batches[::-1], spec, every_key(each), seed=1)
        each.load(start(each, 6))
        each.train(batches, spec, every_key(each), seed=1, optimizer_state=first.optimizer_state)
        results.append((first.optimizer_state, each.read(every_key(each))))
    (ours, found), (theirs, expected) = results
    assert_close({key: value.float() for key, value in ours.items()}, {key: value.float() for key, value in theirs.items()})
    assert_close(found, expected)


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_parts_of_a_batch_give_the_batchs_step(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    spec = TrainSpec(learning_rate=0.5, optimizer="sgd", num_parts=2, max_grad_norm=None)
    whole = TrainSpec(learning_rate=0.5, optimizer="sgd", max_grad_norm=None)
    expected = host_and_train(reference(), 4, batches, spec=whole)
    assert_close(host_and_train(make_engine(stage, spec=spec), 4, batches, spec=spec), expected)
    assert_close(host_and_train(reference(), 4, batches, spec=spec), expected)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_step_that_breaks_off_leaves_nothing_behind(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], batches: list[Batch],
    assert_same_bits: Callable[[Params, Params], None],
) -> None:  # fmt: skip
    def breaks(step: int) -> None:
        if step == 1:
            raise RuntimeError("a hook failed")

    engine = make_engine(stage)
    expected = host_and_train(engine, 4, batches)
    with pytest.raises(RuntimeError, match="a hook failed"):
        host_and_train(engine, 5, batches, after_backward=breaks)
    assert_same_bits(host_and_train(engine, 4, batches), expected)


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_is_an_error_and_does_no_harm(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], batches: list[Batch],
    assert_same_bits: Callable[[Params, Params], None],
) -> None:  # fmt: skip
    engine = make_engine(stage)
    expected = host_and_train(engine, 4, batches)
    with pytest.raises(UpdateError, match="step 1 is nan"):
        host_and_train(engine, 4, batches, terms=lambda batch, output: {"bad": torch.tensor(float("nan"))})
    assert_same_bits(host_and_train(engine, 4, batches), expected)


@pytest.mark.parametrize("stage", [0, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_frozen_base_keeps_its_hash(
    stage: int, make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    engine = make_engine(stage)
    host_and_train(engine, 4, batches)
    assert engine.frozen_hash() == reference().frozen_hash()


def test_offload_keeps_the_numbers(
    make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    expected = host_and_train(reference(), 4, batches)
    assert_close(host_and_train(make_engine(2, offload_optimizer=True), 4, batches), expected)
    assert_close(host_and_train(make_engine(3, offload_optimizer=True, offload_param=True), 4, batches), expected)


def test_tokens_are_counted_as_the_reference_counts_them(
    make_engine: Callable[..., DeepSpeedEngine], reference: Callable[..., TorchEngine], batches: list[Batch]
) -> None:
    counts = []
    for engine in (make_engine(2), reference()):
        engine.load(start(engine, 4))
        counts.append(engine.train(batches, TrainSpec(learning_rate=0.02), every_key(engine), seed=1))
    assert torch.equal(counts[0].expert_tokens, counts[1].expert_tokens)
    assert counts[0].losses == pytest.approx(counts[1].losses, rel=1e-5)
    assert (counts[0].num_examples, counts[0].num_label_tokens) == (counts[1].num_examples, counts[1].num_label_tokens)


def test_what_sharded_weights_cannot_do_is_refused(make_engine: Callable[..., DeepSpeedEngine]) -> None:
    row = Slots(graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24, mode="row"))
    with pytest.raises(ModelError, match=r"mode row reads the router's weights[^\n]*\n.*engine.stage"):
        make_engine(3, row)
