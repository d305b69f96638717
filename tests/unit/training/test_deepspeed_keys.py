"""Every DeepSpeed key that may be given, in a real engine: training must give what the reference engine gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.protocols import Engine, TrainSpec
from fedgraft.training import deepspeed_keys
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import open_ranks
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, Batch, GraftSpec, Params, Slots

# DeepSpeed calls what PyTorch deprecates, and hooks modules whose inputs need no gradient.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]

SLOTS = Slots(
    adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24)
)
SPEC = TrainSpec(learning_rate=0.02, num_parts=2)
# Values that are not DeepSpeed's own, small enough that these small tensors meet them.
ANY_STAGE = {
    "contiguous_gradients": False,
    "overlap_comm": True,
    "reduce_bucket_size": 50,
    "reduce_scatter": False,
    "offload_optimizer": {"device": "cpu", "pin_memory": True},
}
BELOW_3 = {"parameter_alignment": True, "use_multi_rank_bucket_allreduce": False}
ONLY_3 = {
    "enable_sanity_checks": True,
    "memory_efficient_linear": False,
    "offload_param": {"device": "cpu", "pin_memory": True},
    "stage3_allgather_sequential": True,
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 0,
    "stage3_model_persistence_threshold": 10,
    "stage3_param_persistence_threshold": 10,
    "stage3_prefetch_bucket_size": 0,
    "stage3_use_all_reduce_for_fetch_params": True,
    "sub_group_size": 100,
}
ZERO: dict[int, dict[str, Any]] = {0: {}, 1: ANY_STAGE | BELOW_3, 2: ANY_STAGE | BELOW_3, 3: ANY_STAGE | ONLY_3}
REPORTS = {"flops_profiler": {"enabled": True}, "wall_clock_breakdown": True, "memory_breakdown": True}

Train = Callable[[int, dict[str, Any]], Params]


def _values(engine: Engine, batches: list[Batch]) -> Params:
    generator = torch.Generator().manual_seed(4)
    engine.load({key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in engine.initial.items()})
    keys = tuple(ref.key for ref in engine.refs)
    engine.train(batches, SPEC, keys, seed=1)
    return engine.read(keys)


@pytest.fixture
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    return [random_batch((9, 6, 4, 5), seed=seed) for seed in range(3)]


@pytest.fixture
def train(tiny_model: Callable[..., PreTrainedModel], batches: list[Batch]) -> Train:
    def run(stage: int, given: dict[str, Any]) -> Params:
        config = EngineConfig(name="deepspeed", stage=stage, gradient_accumulation_steps=2, deepspeed=given)
        settings = deepspeed_settings(config, batch_size=4, dtype="float32", max_grad_norm=SPEC.max_grad_norm)
        engine = DeepSpeedEngine(
            tiny_model("qwen2_moe"), SLOTS, 3, settings=settings, spec=SPEC, ranks=open_ranks("cpu", 60.0), device="cpu",
            policy=lambda ref: SlotPolicy(),
        )  # fmt: skip
        try:
            return _values(engine, batches)
        finally:
            engine.close()

    return run


@pytest.fixture
def expected(tiny_model: Callable[..., PreTrainedModel], batches: list[Batch]) -> Params:
    return _values(TorchEngine(tiny_model("qwen2_moe"), SLOTS, 3), batches)


def _assert_close(found: Params, expected: Params, atol: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=atol, rtol=2e-5, msg=f"{key}: {found[key]} is not {value}")


def test_every_key_of_deepspeeds_schema_is_either_taken_or_refused_with_a_reason() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

    known = {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()}
    taken, refused = set(deepspeed_keys._ZERO), set(deepspeed_keys._ZERO_REFUSED)
    assert taken | refused == known - {"stage"}
    assert not taken & refused
    offload = set(DeepSpeedZeroOffloadOptimizerConfig.model_fields) | set(DeepSpeedZeroOffloadParamConfig.model_fields)
    assert set(deepspeed_keys._OFFLOAD_REFUSED) == offload - {"device", "pin_memory"}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_all_keys_of_a_stage_together_give_the_same_values(stage: int, train: Train, expected: Params) -> None:
    assert set(ZERO[stage]) == {key for key, (_, stages) in deepspeed_keys._ZERO.items() if stage in stages}
    scaling = {} if stage == 3 else {"gradient_predivide_factor": 2.0}
    _assert_close(train(stage, {"zero_optimization": ZERO[stage], "communication_data_type": "fp32"} | scaling), expected)


@pytest.mark.slow  # each of DeepSpeed's reports of memory collects garbage first
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_reports_are_printed_and_change_nothing(
    stage: int, train: Train, expected: Params, capsys: pytest.CaptureFixture[str]
) -> None:
    _assert_close(train(stage, dict(REPORTS)), expected)
    printed = capsys.readouterr().out
    for words in ("DeepSpeed Flops Profiler", "time (ms)", "Engine before backward"):
        assert words in printed


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "key"), [(stage, key) for stage, keys in ZERO.items() for key in keys])
def test_each_key_alone_gives_the_same_values(stage: int, key: str, train: Train, expected: Params) -> None:
    _assert_close(train(stage, {"zero_optimization": {key: ZERO[stage][key]}}), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("scaling", [{"prescale_gradients": True}, {"gradient_predivide_factor": 3.0}])
def test_scaled_sums_give_the_same_values(stage: int, scaling: dict[str, Any], train: Train, expected: Params) -> None:
    zero = {"reduce_scatter": False} if stage else {}
    _assert_close(train(stage, {"zero_optimization": zero} | scaling), expected)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bfloat16_sums_round_the_gradients(stage: int, train: Train, expected: Params) -> None:
    found = train(stage, {"communication_data_type": "bf16"})
    assert any(not torch.equal(found[key], value) for key, value in expected.items())
    _assert_close(found, expected, atol=0.02)  # an AdamW step is about 0.02, whatever a gradient's size
