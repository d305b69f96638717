"""The shared loop under DeepSpeed, alone in this process, against a plain loop with Transformers' own losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

from fedgraft.errors import CheckpointError, ModelError
from fedgraft.training.balance import RouterBalance
from fedgraft.training.pretrain import PretrainSpec, learning_rate_at
from fedgraft.training.ranks import Ranks, open_ranks
from fedgraft.training.sharded import ShardedSpec, ShardedTraining, StepReport, check_checkpoint
from fedgraft.types import IGNORE_INDEX, Batch

# DeepSpeed calls what PyTorch deprecates, and hooks modules whose inputs need no gradient.
pytestmark = [
    pytest.mark.slow,  # DeepSpeed takes seconds to set up
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

ALONE = Ranks(rank=0, world_size=1)
TRAINING = PretrainSpec(num_steps=4, learning_rate=0.01, warmup_steps=2, weight_decay=0.1, router_aux_weight=0.0)
SPEC = ShardedSpec(training=TRAINING, batch_size=4, zero_stage=1)


@pytest.fixture(scope="module", autouse=True)
def _ranks() -> None:
    open_ranks("cpu", 60.0)  # for good: DeepSpeed takes no second group in one process


@pytest.fixture
def make_training(tiny_model: Callable[..., PreTrainedModel]) -> Iterator[Callable[..., ShardedTraining]]:
    made: list[ShardedTraining] = []

    def make(spec: ShardedSpec = SPEC, family: str = "qwen2_moe", **overrides: Any) -> ShardedTraining:
        model = tiny_model(family, **overrides).requires_grad_(True)
        made.append(ShardedTraining(model, spec, ALONE))
        return made[-1]

    yield make
    for training in made:
        training.close()


def packed(step: int) -> Batch:
    ids = torch.randint(3, 259, (4, 10), generator=torch.Generator().manual_seed(step))
    return Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids.clone())


def padded(step: int) -> Batch:
    """Rows of 10, 4, 7 and 9 tokens, of which 8, 1, 5 and 2 count."""
    batch = packed(step)
    for row, (length, start) in enumerate(((10, 2), (4, 3), (7, 2), (9, 7))):
        batch.attention_mask[row, length:] = 0
        batch.labels[row, length:] = IGNORE_INDEX
        batch.labels[row, :start] = IGNORE_INDEX
    return batch


def plain_loop(
    model: PreTrainedModel, batches: list[Batch], aux_weight: float = 0.0
) -> tuple[list[float], list[float], list[float], dict[str, torch.Tensor]]:
    """Transformers' own loss and load-balancing loss, PyTorch's AdamW and clipping: losses, balances, norms, weights."""
    model.train().requires_grad_(True)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": TRAINING.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=TRAINING.betas, eps=1e-8)
    losses, balances, norms = [], [], []
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, TRAINING)
        optimizer.zero_grad()
        output = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels, output_router_logits=True
        )
        config: Any = model.config
        balance = load_balancing_loss_func(
            output.router_logits, config.num_experts, config.num_experts_per_tok, batch.attention_mask
        )
        assert isinstance(balance, torch.Tensor)
        loss = output.loss - config.router_aux_loss_coef * output.aux_loss  # Transformers has added it already
        (loss + aux_weight * balance).backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), TRAINING.max_grad_norm)))
        optimizer.step()
        losses.append(float(loss.detach()))
        balances.append(float(balance.detach()))
    return losses, balances, norms, dict(model.named_parameters())


def run(training: ShardedTraining, batches: list[Batch], start: int = 0) -> list[StepReport]:
    return [training.step(step, batch) for step, batch in enumerate(batches, start=1) if step > start]


def weights(training: ShardedTraining) -> dict[str, torch.Tensor]:
    found = training.weights()
    assert found is not None
    return found


@pytest.mark.parametrize("stage", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_every_stage_takes_the_steps_of_a_plain_loop(
    make_training: Callable[..., ShardedTraining],
    tiny_model: Callable[..., PreTrainedModel],
    stage: int,
) -> None:
    batches = [(packed if step % 2 else padded)(step) for step in range(4)]
    expected, _, norms, expected_weights = plain_loop(tiny_model("qwen2_moe"), batches)
    training = make_training(dataclasses.replace(SPEC, zero_stage=stage))
    reports = run(training, batches)
    assert [report.loss for report in reports] == pytest.approx(expected, rel=1e-5)
    assert [report.learning_rate for report in reports] == [learning_rate_at(step, TRAINING) for step in range(1, 5)]
    assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=1e-4)
    assert reports[0].num_tokens == int(batches[0].attention_mask.sum())
    found = weights(training)
    assert set(found) == set(expected_weights)
    for name, value in expected_weights.items():
        # AdamW divides by a gradient's size, so where that is near zero its rounding grows; four steps add up to 0.03.
        torch.testing.assert_close(found[name], value.detach(), atol=2e-4, rtol=1e-4)


def test_the_load_balancing_loss_is_that_of_transformers_and_is_trained_on(
    make_training: Callable[..., ShardedTraining], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    # Over several layers Transformers mixes their experts' counts; with one layer both are the paper's.
    batches = [padded(step) for step in range(4)]
    losses, balances, norms, expected = plain_loop(tiny_model("qwen2_moe", num_hidden_layers=1), batches, aux_weight=0.5)
    spec = dataclasses.replace(SPEC, training=dataclasses.replace(TRAINING, router_aux_weight=0.5))
    training = make_training(spec, num_hidden_layers=1)
    reports = run(training, batches)
    assert [report.loss for report in reports] == pytest.approx(losses, rel=1e-5)
    assert [report.balance for report in reports] == pytest.approx(balances, rel=1e-5)
    assert [report.grad_norm for report in reports] == pytest.approx(norms, rel=1e-4)
    router = "model.layers.0.mlp.gate.weight"
    torch.testing.assert_close(weights(training)[router], expected[router].detach(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_shares_of_two_ranks_add_up_to_the_balance_of_the_whole_batch(
    tiny_model: Callable[..., PreTrainedModel], family: str
) -> None:
    model, batch = tiny_model(family), padded(0)
    halves = [
        Batch(input_ids=batch.input_ids[rows], attention_mask=batch.attention_mask[rows], labels=batch.labels[rows])
        for rows in (slice(0, 1), slice(1, 4))
    ]
    counts: list[torch.Tensor] = []

    def share(part: Batch, gather: Callable[[torch.Tensor], torch.Tensor]) -> float:
        balance = RouterBalance(model, gather)
        balance.attend(part)
        with torch.no_grad():
            model(input_ids=part.input_ids, attention_mask=part.attention_mask)
        found = float(balance.share())
        balance.close()
        return found

    def note(value: torch.Tensor) -> torch.Tensor:
        counts.append(value)
        return value

    whole = share(batch, note)
    assert whole > 0
    assert sum(share(half, lambda value: counts[0]) for half in halves) == pytest.approx(whole, rel=1e-5)


def test_passes_add_up_to_the_batch(make_training: Callable[..., ShardedTraining]) -> None:
    batches = [padded(step) for step in range(3)]
    one = run(make_training(), batches)
    three = run(make_training(dataclasses.replace(SPEC, num_parts=3)), batches)
    assert [report.loss for report in three] == pytest.approx([report.loss for report in one], rel=1e-5)
    assert [report.grad_norm for report in three] == pytest.approx([report.grad_norm for report in one], rel=1e-4)


@pytest.mark.parametrize(
    ("stage", "dtype"),
    [
        (1, "bfloat16"),
        pytest.param(0, "float32", marks=pytest.mark.slow),
        pytest.param(2, "float32", marks=pytest.mark.slow),
        pytest.param(3, "float32", marks=pytest.mark.slow),
    ],
)
def test_what_stops_and_goes_on_has_the_same_bits(
    make_training: Callable[..., ShardedTraining],
    assert_same_bits: Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor]], None],
    tmp_path: Path,
    stage: int,
    dtype: str,
) -> None:
    spec = dataclasses.replace(
        SPEC, zero_stage=stage, dtype=dtype, training=dataclasses.replace(TRAINING, router_aux_weight=0.01)
    )
    batches = [padded(step) for step in range(4)]
    straight = make_training(spec)
    expected = run(straight, batches)
    first = make_training(spec)
    run(first, batches[:2])
    first.save(tmp_path, 2)
    second = make_training(spec)
    assert second.load(tmp_path) == 2
    assert run(second, batches, start=2) == expected[2:]
    assert_same_bits(weights(second), weights(straight))


def test_a_checkpoint_that_is_torn_or_of_others_is_refused(make_training: Callable[..., ShardedTraining], tmp_path: Path) -> None:
    make_training().save(tmp_path, 7)
    assert check_checkpoint(tmp_path, world_size=1, zero_stage=1) == 7
    for world_size, zero_stage, text in ((1, 2, "at ZeRO stage 1, these are 1 at stage 2"), (2, 1, "made by 1 workers")):
        with pytest.raises(CheckpointError, match=text):
            check_checkpoint(tmp_path, world_size=world_size, zero_stage=zero_stage)
    file = max(tmp_path.rglob("*.pt"), key=lambda path: path.stat().st_size)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="has checksum"):
        check_checkpoint(tmp_path, world_size=1, zero_stage=1)
    file.unlink()
    with pytest.raises(CheckpointError, match="is not whole"):
        check_checkpoint(tmp_path, world_size=1, zero_stage=1)


def test_frozen_parameters_stay_and_nothing_to_train_is_an_error(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model("qwen2_moe")
    with pytest.raises(ModelError, match="nothing to train"):
        ShardedTraining(model, SPEC, ALONE)
    for layer in model.model.layers:
        layer.mlp.gate.weight.requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = ShardedTraining(model, SPEC, ALONE)
    run(training, [packed(0)])
    changed = {name for name, value in weights(training).items() if not torch.equal(value, before[name])}
    training.close()
    assert changed == {f"model.layers.{layer}.mlp.gate.weight" for layer in range(2)}


def test_score_is_the_sum_over_label_tokens(
    make_training: Callable[..., ShardedTraining], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    batch = padded(3)
    model = tiny_model("qwen2_moe")
    with torch.no_grad():
        mean = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    training = make_training()
    assert training.score(batch) == pytest.approx(float(mean) * batch.num_label_tokens, rel=1e-5)
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_a_loss_that_is_not_finite_names_the_step(make_training: Callable[..., ShardedTraining]) -> None:
    training = make_training()
    with torch.no_grad():
        training.model.get_parameter("lm_head.weight").fill_(float("nan"))
    with pytest.raises(ModelError, match="loss of step 3 is nan"):
        training.step(3, packed(0))


def test_rotary_tables_stay_in_float32_where_weights_are_bfloat16(make_training: Callable[..., ShardedTraining]) -> None:
    training = make_training(dataclasses.replace(SPEC, dtype="bfloat16"))
    assert weights(training)["lm_head.weight"].dtype == torch.bfloat16
    tables = {name: table.dtype for name, table in training.model.named_buffers() if "inv_freq" in name}
    assert tables
    assert set(tables.values()) == {torch.float32}
