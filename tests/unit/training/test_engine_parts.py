"""Both engines, alone in this process: batches cut into parts, extra terms, offload, and moments that are kept."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import UpdateError
from fedgraft.protocols import Engine, TrainSpec
from fedgraft.training import step
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import open_ranks
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, AdapterSpec, Batch, GraftSpec, ParamRef, Params, Slots

# DeepSpeed calls what PyTorch deprecates, and hooks modules whose inputs need no gradient.
pytestmark = [
    pytest.mark.slow,  # DeepSpeed takes seconds to set up
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

FLEX = Slots(
    adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24)
)
SGD = TrainSpec(learning_rate=0.05, optimizer="sgd", max_grad_norm=None)
ADAMW = TrainSpec(learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.5)
# SGD moves in proportion to the gradient, so a wrong mean shows at once; what is left are float32 sums in another order.
TIGHT = {"atol": 1e-6, "rtol": 0.0}
# AdamW divides by a gradient's size, so where that is near zero its rounding grows; the steps themselves are about 0.02.
CLOSE = {"atol": 1e-5, "rtol": 2e-5}
ENGINES = ("torch", 0, 1, 2)

Terms = Callable[[Batch, Any], Mapping[str, torch.Tensor]]


def plain(ref: ParamRef) -> SlotPolicy:
    return SlotPolicy()


def keeps_grafts(ref: ParamRef) -> SlotPolicy:
    return SlotPolicy(persists_moments=ref.part == "graft")


@pytest.fixture
def make_engine(tiny_model: Callable[..., PreTrainedModel]) -> Iterator[Callable[..., Engine]]:
    """``torch``, or DeepSpeed with this ZeRO stage."""
    made: list[Engine] = []

    def make(
        kind: str | int,
        spec: TrainSpec = SGD,
        *,
        dtype: str = "float32",
        policy: Callable[[ParamRef], SlotPolicy] = plain,
        **options: Any,
    ) -> Engine:
        model = tiny_model("qwen2_moe").to(getattr(torch, dtype))
        engine: Engine
        if kind == "torch":
            engine = TorchEngine(model, FLEX, 3)
        else:
            # A threshold of 0, or these small tensors would stay whole.
            zero = {"stage3_param_persistence_threshold": 0} if kind == 3 else {}
            config = EngineConfig(name="deepspeed", stage=kind, deepspeed={"zero_optimization": zero}, **options)
            settings = deepspeed_settings(config, batch_size=3, dtype=dtype, max_grad_norm=spec.max_grad_norm)
            ranks = open_ranks("cpu", 60.0)
            engine = DeepSpeedEngine(model, FLEX, 3, settings=settings, spec=spec, ranks=ranks, device="cpu", policy=policy)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.close()


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    """Of 3 and 2 rows."""
    return [random_batch((9, 6, 4), seed=0), random_batch((8, 5), seed=1)]


def every_key(engine: Engine) -> tuple[str, ...]:
    return tuple(ref.key for ref in engine.refs)


def start(engine: Engine, seed: int) -> Params:
    """A client's own values for every slot, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in engine.initial.items()}


def host(engine: Engine, seed: int, batches: Sequence[Batch], spec: TrainSpec, **options: Any) -> tuple[Any, Params]:
    engine.load(engine.initial)
    engine.load(start(engine, seed))
    result = engine.train(batches, spec, every_key(engine), seed=1, **options)
    return result, engine.read(every_key(engine))


def assert_close(found: Params, expected: Params, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def distance(one: Params, other: Params) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def constant_term(engine: Engine) -> Terms:
    """A term of the first LoRA's weights alone."""
    weight = next(found for name, found in engine.model.named_parameters() if name.endswith("lora_A.shared.weight"))
    return lambda batch, output: {"size": 0.7 * weight.square().sum()}


def mean_term(engine: Engine) -> Terms:
    """A mean over the label tokens at hand."""
    return lambda batch, output: {"logits": 0.1 * output.logits.float().square().mean(dim=1).mean()}


# ---- parts


@pytest.mark.parametrize("kind", ENGINES)
def test_more_parts_than_rows_give_the_batchs_step(
    kind: str | int, make_engine: Callable[..., Engine], batches: list[Batch]
) -> None:
    whole, expected = host(make_engine("torch"), 4, batches, SGD)
    result, found = host(make_engine(kind), 4, batches, replace(SGD, num_parts=5))
    assert_close(found, expected, **TIGHT)
    assert result.losses == pytest.approx(whole.losses, rel=1e-5)
    assert torch.equal(result.expert_tokens, whole.expert_tokens)
    assert (result.num_examples, result.num_label_tokens) == (whole.num_examples, whole.num_label_tokens)


@pytest.mark.parametrize(
    ("term", "parts"), [(constant_term, 2), (constant_term, 5), (mean_term, 2), (mean_term, 3)],
    ids=["constant-2", "constant-5", "mean-2", "mean-3"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ENGINES)
def test_terms_of_parts_add_up_to_those_of_the_batch(
    kind: str | int, term: Callable[[Engine], Terms], parts: int, make_engine: Callable[..., Engine], batches: list[Batch]
) -> None:
    batches = batches[:1]  # 3 rows, of 4, 3 and 2 label tokens
    plain_engine, engine = make_engine("torch"), make_engine(kind)
    _, expected = host(plain_engine, 4, batches, SGD, terms=term(plain_engine))
    _, found = host(engine, 4, batches, replace(SGD, num_parts=parts), terms=term(engine))
    assert_close(found, expected, **TIGHT)
    assert distance(expected, host(plain_engine, 4, batches, SGD)[1]) > 1e-3


def test_a_constant_term_counts_once(make_engine: Callable[..., Engine], batches: list[Batch]) -> None:
    """Its gradient is 2 x 0.7 x the weights, whatever the batch and its parts."""
    engine = make_engine("torch")
    key = next(key for key in every_key(engine) if key.endswith("lora_A.shared.weight"))
    spec = replace(SGD, num_parts=3)
    _, without = host(engine, 4, batches[:1], spec)
    _, found = host(engine, 4, batches[:1], spec, terms=constant_term(engine))
    pull = spec.learning_rate * 2 * 0.7 * start(engine, 4)[key]
    torch.testing.assert_close(without[key] - found[key], pull, **TIGHT)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_mean_over_label_tokens_counts_nothing_where_there_are_none(
    kind: str | int, make_engine: Callable[..., Engine], batches: list[Batch]
) -> None:
    """The middle row has no label, and with four parts of three rows one part has no row."""
    labels = batches[0].labels.clone()
    labels[1] = IGNORE_INDEX
    batch = replace(batches[0], labels=labels)
    _, expected = host(make_engine("torch"), 4, [batch], SGD, terms=mean_term(make_engine("torch")))
    engine = make_engine(kind)
    _, found = host(engine, 4, [batch], replace(SGD, num_parts=4), terms=mean_term(engine))
    assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("kind", ENGINES)
def test_a_part_that_is_not_finite_does_no_harm(
    kind: str | int, make_engine: Callable[..., Engine], batches: list[Batch],
    assert_same_bits: Callable[[Params, Params], None],
) -> None:  # fmt: skip
    """The first parts' gradients are there already when the last one breaks the step off."""
    engine, spec = make_engine(kind), replace(SGD, num_parts=3)
    _, expected = host(engine, 4, batches, spec)
    last = int(batches[0].input_ids[2, 0])

    def bad(batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        return {"bad": torch.tensor(float("nan") if bool((batch.input_ids[:, 0] == last).any()) else 0.0)}

    with pytest.raises(UpdateError, match="step 1 is nan"):
        host(engine, 5, batches, spec, terms=bad)
    # What the broken step held is collected in the middle of the next training, at the latest.
    assert_same_bits(host(engine, 4, batches, spec, after_backward=lambda step: gc.collect())[1], expected)


# ---- offload


def offloaded(stage: int) -> dict[str, Any]:
    return {"offload_optimizer": True, "offload_param": stage == 3}


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_with_sgd(
    stage: int, make_engine: Callable[..., Engine], batches: list[Batch], assert_same_bits: Callable[[Params, Params], None]
) -> None:
    _, expected = host(make_engine("torch"), 4, batches, SGD)
    engine = make_engine(stage, **offloaded(stage))
    _, found = host(engine, 4, batches, SGD)
    assert_close(found, expected, **TIGHT)
    _, other = host(engine, 5, batches[::-1], SGD)
    assert distance(other, found) > 1e-3
    assert_same_bits(host(engine, 4, batches, SGD)[1], found)


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_with_kept_moments(
    stage: int, make_engine: Callable[..., Engine], batches: list[Batch], assert_same_bits: Callable[[Params, Params], None]
) -> None:
    engine, plain_engine = make_engine(stage, ADAMW, policy=keeps_grafts, **offloaded(stage)), make_engine("torch")
    kept = tuple(ref.key for ref in engine.refs if ref.part == "graft")
    runs = []
    for each in (engine, plain_engine, engine):
        first, trained = host(each, 4, batches, ADAMW, keep_optimizer_state=kept)
        host(each, 5, batches[::-1], ADAMW)  # another client in between
        _, continued = host(each, 6, batches, ADAMW, optimizer_state=first.optimizer_state)
        runs.append((first.optimizer_state, trained, continued))
    ours, theirs, again = runs
    assert theirs[0]
    for found, expected, repeated in zip(ours, theirs, again, strict=True):
        assert_close(found, expected, **CLOSE)
        assert_same_bits(repeated, found)
    _, afresh = host(plain_engine, 6, batches, ADAMW)
    assert distance(theirs[2], afresh) > 1e-3  # moments matter here


# ---- moments of a bfloat16 model


@pytest.mark.parametrize("stage", [1, 2])
def test_kept_moments_of_a_bfloat16_model_are_float32(
    stage: int, make_engine: Callable[..., Engine], batches: list[Batch], assert_same_bits: Callable[[Params, Params], None]
) -> None:
    spec = TrainSpec(learning_rate=0.02, max_grad_norm=None)
    engine = make_engine(stage, spec, dtype="bfloat16", policy=keeps_grafts)
    kept = tuple(ref.key for ref in engine.refs if ref.part == "graft")
    first, _ = host(engine, 4, batches, spec, keep_optimizer_state=kept)
    state = first.optimizer_state
    moments = {name: value for name, value in state.items() if not name.endswith("|step")}
    assert {name.rpartition("|")[2] for name in moments} == {"exp_avg", "exp_avg_sq"}
    assert all(value.dtype == torch.float32 for value in moments.values())
    assert all(not torch.equal(value, value.bfloat16().float()) for value in moments.values())  # not rounded on the way
    host(engine, 5, batches[::-1], spec)

    unchanged, _ = host(engine, 4, [], spec, optimizer_state=state, keep_optimizer_state=kept)
    assert_same_bits(unchanged.optimizer_state, state)

    gradients: Params = {}
    after, _ = host(
        engine, 6, batches[:1], spec, optimizer_state=state, keep_optimizer_state=kept,
        after_backward=lambda step: gradients.update(engine.read_gradients(kept)),
    )  # fmt: skip
    for key in kept:
        g = gradients[key]
        wanted = {  # AdamW with its usual betas
            f"{key}|step": state[f"{key}|step"] + 1,
            f"{key}|exp_avg": 0.9 * state[f"{key}|exp_avg"] + 0.1 * g,
            f"{key}|exp_avg_sq": 0.999 * state[f"{key}|exp_avg_sq"] + 0.001 * g.square(),
        }
        found = {name: after.optimizer_state[name] for name in wanted}
        assert_close(found, wanted, atol=1e-9, rtol=1e-5)


# ---- out of memory


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A device that holds the step of so many rows, as PyTorch would say it."""
    whole = step.response_loss

    def set_rows(rows: int) -> None:
        def loss(model: Any, batch: Batch, num_label_tokens: int | None = None) -> Any:
            if batch.num_examples > rows:
                raise torch.OutOfMemoryError("there is no memory")
            return whole(model, batch, num_label_tokens)

        monkeypatch.setattr(step, "response_loss", loss)

    return set_rows


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_client_that_does_not_fit_trains_in_parts(
    stage: int, make_bench: Callable[..., Any], narrow: Callable[[int], None]
) -> None:
    """Of three rows in two parts the second does not fit, when the first has left its gradients behind."""
    engine = EngineConfig(name="deepspeed", device="cpu", stage=stage, on_out_of_memory="halve")
    whole, halving = (make_bench({"name": "fedavg"}, batch_size=3, train=SGD, **each) for each in ({}, {"engine": engine}))
    params = whole.worker.initial_params()
    wanted, expected = whole.train(0, 1, params)
    narrow(1)
    update, found = halving.train(0, 1, params)
    assert (wanted.num_parts, update.num_parts) == (1, 3)
    assert_close(found, expected, **TIGHT)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-4
    narrow(3)
    again, repeated = halving.train(0, 1, params)  # the next client begins with whole batches
    assert again.num_parts == 1
    assert_close(repeated, expected, **TIGHT)
    halving.worker.close()
