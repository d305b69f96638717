"""What expert parallelism refuses, and its path through DeepSpeed with all experts on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.families import FAMILIES, moe_layers
from fedgraft.protocols import TrainSpec
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.expert_parallel import PRESETS, finish_settings, refuse_expert_parallel, spread_experts, spread_tensors
from fedgraft.training.ranks import open_ranks
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, Batch, GraftSpec, Slots

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

LORA = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),))
FLEX = Slots(adapters=LORA.adapters, graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24, gate_bias=0.0))
ON_EXPERTS = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("attention", "experts")),))


@pytest.mark.parametrize(
    ("family", "overrides", "slots", "size", "stage", "message"),
    [
        ("olmoe", {}, LORA, 2, 0, r"no preset for olmoe; it has for deepseek_v2.*\n.*remove engine.expert_parallel_size"),
        ("gpt_oss", {}, LORA, 2, 0, "no preset for gpt_oss"),
        ("qwen3_moe", {"hidden_act": "gelu"}, LORA, 2, 0, "hidden_act 'gelu'"),
        (
            "qwen3_moe",
            {"num_experts": 6},
            LORA,
            4,
            0,
            r"size 4 does not divide the 6 experts.*num_experts in.*\n.*one of 2, 3, 6",
        ),
        ("mixtral", {}, ON_EXPERTS, 2, 0, r"stay frozen, but the method has adapter 'shared' on them.*\n.*target attention"),
        ("mixtral", {}, Slots(full=("experts", "router")), 2, 3, "training them in full"),
        ("deepseek_v2", {}, LORA, 2, 1, r"ZeRO stage 1 refuses.*\n.*engine.stage: 0"),
        ("deepseek_v2", {}, LORA, 2, 2, "ZeRO stage 2 refuses"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    family: str, overrides: dict[str, Any], slots: Slots, size: int, stage: int, message: str, tiny_config: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=message):
        refuse_expert_parallel(tiny_config(family, **overrides), slots, size=size, stage=stage)


@pytest.mark.parametrize("family", sorted(PRESETS))
@pytest.mark.parametrize("stage", [0, 3])
def test_what_can_be_had_is_let_through(family: str, stage: int, tiny_config: Callable[..., Any]) -> None:
    full = Slots(adapters=LORA.adapters, graft=FLEX.graft, full=("router",))
    refuse_expert_parallel(tiny_config(family), full, size=2, stage=stage)


def test_the_families_are_those_that_deepspeed_has_presets_for() -> None:
    from deepspeed.module_inject.auto_ep_presets.registry import PRESET_MODELS

    theirs = {family: name for name, preset in PRESET_MODELS.items() for family in preset.hf_model_types}
    assert {family: name for family, name in theirs.items() if family in FAMILIES} == PRESETS


@pytest.mark.parametrize("stage", [1, 2])
def test_the_configuration_refuses_stages_that_need_trained_experts(stage: int) -> None:
    with pytest.raises(ValidationError, match=rf"expert_parallel_size: ZeRO stage {stage} refuses.*set stage: 0, or 3"):
        EngineConfig(world_size=2, expert_parallel_size=2, stage=stage)
    with pytest.raises(ValidationError, match=f"ZeRO stage {stage} refuses"):
        EngineConfig(world_size=2, expert_parallel_size=2, deepspeed={"zero_optimization": {"stage": stage}})


def test_expert_parallelism_alone_means_stage_0() -> None:
    config = EngineConfig(name="deepspeed", world_size=4, expert_parallel_size=2)
    assert config.zero_stage == 0
    assert deepspeed_settings(config, batch_size=4, dtype="float32", max_grad_norm=None)["expert_parallel"] == {"autoep_size": 2}
    with pytest.raises(ValueError, match=r"set engine.stage: 3, or model.dtype"):
        deepspeed_settings(config, batch_size=4, dtype="bfloat16", max_grad_norm=None)


def test_until_deepspeed_has_set_up_the_model_is_the_plain_one(
    tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    batch = random_batch()
    plain, spread = tiny_model("qwen3_moe"), tiny_model("qwen3_moe")
    spread_experts(spread, 2)
    with torch.inference_mode():
        found, expected = (
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits for model in (spread, plain)
        )
    assert torch.equal(found, expected)
    assert spread_tensors(spread) == {}
    for ours, theirs in zip(moe_layers(spread), moe_layers(plain), strict=True):
        assert torch.equal(ours.expert_weights(3)[0], theirs.expert_weights(3)[0])


@pytest.mark.parametrize(("expert_size", "is_grouped"), [(24, True), (25, False)])  # rows of 96 and of 100 bytes
def test_rows_that_grouped_products_cannot_take_go_expert_by_expert(
    expert_size: int, is_grouped: bool, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model("qwen3_moe", moe_intermediate_size=expert_size)
    assert finish_settings({"bf16": 1}, model) == {"bf16": 1}
    spread_experts(model, 2)
    settings = {"bf16": 1, "expert_parallel": {"autoep_size": 2}}
    found = finish_settings(settings, model)
    assert found["expert_parallel"]["use_grouped_mm"] is is_grouped
    assert settings == {"bf16": 1, "expert_parallel": {"autoep_size": 2}}  # a second set-up starts from them


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_autoep_on_one_rank_trains_as_the_reference_does(
    family: str, tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch], tiny_config: Callable[..., Any]
) -> None:
    slots = FLEX if family == "qwen3_moe" else LORA
    spec = TrainSpec(learning_rate=0.5, optimizer="sgd", max_grad_norm=0.5)
    settings = deepspeed_settings(EngineConfig(name="deepspeed", stage=0), batch_size=3, dtype="float32", max_grad_norm=0.5)
    engine = DeepSpeedEngine(
        tiny_model(family),
        slots,
        3,
        settings=settings | {"expert_parallel": {"autoep_size": 1}},
        spec=spec,
        ranks=open_ranks("cpu", 60.0),
        device="cpu",
        policy=lambda ref: SlotPolicy(),
    )
    plain = TorchEngine(tiny_model(family), slots, 3)
    assert all(layer.experts.is_spread for layer in moe_layers(engine.model))
    assert engine.frozen_hash() == plain.frozen_hash()
    generator = torch.Generator().manual_seed(4)
    start = {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in plain.initial.items()}
    results = []
    for each in (engine, plain):
        each.load(start)
        results.append((each.train([random_batch(seed=seed) for seed in range(2)], spec, tuple(start), seed=1), each.read(start)))
    (ours, found), (theirs, expected) = results
    assert torch.equal(ours.expert_tokens, theirs.expert_tokens)
    assert ours.losses == pytest.approx(theirs.losses, rel=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=2e-5)
    assert any(not torch.allclose(expected[key], value, atol=1e-3) for key, value in start.items())
    engine.close()
