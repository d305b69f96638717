"""The engine's settings: what auto means, what is refused before anything starts, and what DeepSpeed is told."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import fedgraft
from fedgraft.errors import ConfigError
from fedgraft.platform.loading import dump_config
from fedgraft.registry import METHODS
from fedgraft.training.config import EngineConfig, deepspeed_settings


def make(**options: Any) -> EngineConfig:
    return EngineConfig.model_validate(options)


@pytest.mark.parametrize(
    ("options", "has_gpu", "expected"),
    [
        ({}, False, "torch"),
        ({}, True, "deepspeed"),
        ({"world_size": 2}, False, "deepspeed"),
        ({"stage": 0}, False, "deepspeed"),
        ({"deepspeed": {"wall_clock_breakdown": True}}, False, "deepspeed"),
        ({"name": "torch"}, True, "torch"),
        ({"name": "deepspeed"}, False, "deepspeed"),
        ({"clients_at_once": 4}, True, "torch"),
        ({"clients_at_once": "auto"}, True, "torch"),
    ],
)
def test_auto_is_deepspeed_where_it_brings_something(options: dict[str, Any], has_gpu: bool, expected: str) -> None:
    assert make(**options).resolved(has_gpu=has_gpu).name == expected


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        ({}, 1),
        ({"world_size": 2}, 2),
        ({"stage": 0}, 0),
        ({"stage": 3, "world_size": 2}, 3),
        ({"deepspeed": {"zero_optimization": {"stage": 3}}}, 3),
    ],
)
def test_the_stage_is_the_stated_one(options: dict[str, Any], stage: int) -> None:
    assert make(**options).zero_stage == stage


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "torch", "stage": 2}, "stage has no effect with name: torch"),
        ({"name": "deepspeed", "clients_at_once": 2}, "only the torch engine, of one rank, trains several clients in a pass"),
        ({"world_size": 2, "clients_at_once": "auto"}, "remove it or world_size"),
        ({"stage": 1, "clients_at_once": 2}, "remove it or stage"),
        (
            {"clients_at_once": 2, "gradient_accumulation_steps": 2},
            "remove gradient_accumulation_steps, or set clients_at_once: 1",
        ),
        ({"clients_at_once": 2, "on_out_of_memory": "halve"}, "remove on_out_of_memory: halve"),
        ({"name": "torch", "world_size": 2}, "world_size has no effect with name: torch"),
        ({"offload_optimizer": True, "stage": 0}, "offload_optimizer needs ZeRO stage 1 or higher, this is stage 0"),
        ({"offload_param": True, "stage": 2}, "offload_param needs ZeRO stage 3 or higher, this is stage 2"),
        (
            {"deepspeed": {"zero_optimization": {"offload_param": {"device": "cpu"}}}},
            "offload_param needs ZeRO stage 3 or higher, this is stage 1",
        ),
        ({"stage": 1, "deepspeed": {"zero_optimization": {"stage": 2}}}, "stage is 1 and deepspeed.zero_optimization.stage is 2"),
        ({"deepspeed": {"zero_optimization": {"stage": 7}}}, "expected 0, 1, 2 or 3, got 7"),
        ({"deepspeed": {"zero_optimization": 2}}, "expected a mapping, got 2"),
        ({"deepspeed": {"zero_optimization": {"stag": 2}}}, "zero_optimization.stag = 2 is not a known key; did you mean stage?"),
        (
            {"deepspeed": {"zero_optimization": {"reduce_bucket_size": -1}}},
            "zero_optimization.reduce_bucket_size = -1: expected a whole number, 1 or more",
        ),
        (
            {"deepspeed": {"zero_optimization": {"stage": 2, "stage3_max_live_parameters": 5}}},
            "stage3_max_live_parameters has no effect in stage 2",
        ),
        ({"deepspeed": {"optimizer": {"type": "Adam"}}}, "deepspeed.optimizer cannot be set"),
        ({"deepspeed": {"fp16": {"enabled": True}}}, "deepspeed.fp16 cannot be set: only float32 and bfloat16"),
        ({"deepspeed": {"zero_optimisation": {}}}, "did you mean zero_optimization?"),
        ({"deepspeed": {"gradient_accumulation_steps": 4}}, "gradient_accumulation_steps is 1 and"),
        ({"on_out_of_memory": "halve", "world_size": 2}, "halve needs world_size: 1"),
        ({"on_out_of_memory": "halve", "stage": 3}, "halve cannot go on in ZeRO stage 3"),
        ({"expert_parallel_size": 2, "world_size": 3}, "expert_parallel_size 2 does not divide world_size 3"),
        ({"stage": 4}, "Input should be 0, 1, 2 or 3"),
        ({"worldsize": 2}, "Extra inputs are not permitted"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        make(**options)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"communication_data_type": "foo"}, "communication_data_type = 'foo': expected fp32 or bf16"),
        ({"communication_data_type": "fp16"}, "small gradients would vanish without loss scaling"),
        ({"aio": 3}, "aio cannot be set: only offload to disks reads it"),
        ({"dump_state": True}, "dump_state cannot be set"),
        ({"activation_checkpointing": {}}, "activation_checkpointing cannot be set"),
        ({"comms_logger": {"enabled": True}}, "comms_logger cannot be set"),
        ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16.bf16_master_weights_and_grads cannot be set"),
        ({"gradient_predivide_factor": "abc"}, "gradient_predivide_factor = 'abc': expected a number above 0"),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor = 0: expected a number above 0"),
        ({"gradient_predivide_factor": math.inf}, "gradient_predivide_factor = inf: expected a number above 0"),
        ({"gradient_predivide_factor": 2}, "needs zero_optimization.reduce_scatter: false in stage 1"),
        ({"prescale_gradients": 1}, "prescale_gradients = 1: expected true or false"),
        ({"prescale_gradients": True}, "needs zero_optimization.reduce_scatter: false in stage 1"),
        (
            {"prescale_gradients": True, "zero_optimization": {"stage": 3, "reduce_scatter": False}},
            "prescale_gradients does not work in stage 3",
        ),
        (
            {"prescale_gradients": True, "gradient_predivide_factor": 2, "zero_optimization": {"reduce_scatter": False}},
            "gradient_predivide_factor has no effect beside prescale_gradients: true",
        ),
        ({"wall_clock_breakdown": "yes"}, "wall_clock_breakdown = 'yes': expected true or false"),
        ({"memory_breakdown": 1}, "memory_breakdown = 1: expected true or false"),
        ({"flops_profiler": {"enabled": True, "nope": 1}}, "flops_profiler.nope: extra inputs are not permitted"),
        ({"flops_profiler": {"enabled": True, "output_file": "a"}}, "flops_profiler.output_file: extra inputs"),
        ({"flops_profiler": {"profile_step": 2}}, "flops_profiler.enabled: field required"),
        ({"flops_profiler": 3}, "flops_profiler: input should be a valid dictionary"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, "zero_quantized_weights cannot be set"),
        ({"zero_optimization": {"zero_hpz_partition_size": 2}}, "zero_hpz_partition_size cannot be set"),
        ({"zero_optimization": {"stage": 0, "cpu_offload": True}}, "cpu_offload cannot be set: it is an old name; use offload_o"),
        ({"zero_optimization": {"prefetch_bucket_size": 5}}, "did you mean stage3_prefetch_bucket_size?"),
        ({"zero_optimization": {"stage": True}}, "zero_optimization.stage: expected 0, 1, 2 or 3, got True"),
        ({"zero_optimization": {"overlap_comm": "auto"}}, "overlap_comm = 'auto': expected true or false"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "reduce_bucket_size = 'auto': expected a whole number, 1 or more",
        ),
        ({"zero_optimization": {"reduce_bucket_size": 1.5}}, "reduce_bucket_size = 1.5: expected a whole number, 1 or more"),
        (
            {"zero_optimization": {"stage": 0, "overlap_comm": True}},
            "overlap_comm has no effect in stage 0; set stage: 1 or 2 or 3",
        ),
        ({"zero_optimization": {"stage": 3, "parameter_alignment": True}}, "parameter_alignment has no effect in stage 3"),
        ({"zero_optimization": {"sub_group_size": 100}}, "sub_group_size has no effect in stage 1; set stage: 3"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "device = 'nvme': offload to disks is not supported"),
        ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "device = 'gpu': expected none or cpu"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "ratio": 0.5}}}, "offload_optimizer.ratio cannot be set"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "nvme_path": "x"}}}, "nvme_path cannot be set"),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": 1}}}, "pin_memory = 1: expected true or"),
        ({"zero_optimization": {"offload_optimizer": {"pin_memory": True}}}, "pin_memory has no effect without offload"),
        ({"zero_optimization": {"offload_optimizer": True}}, "offload_optimizer = True: expected a mapping"),
    ],
)
def test_keys_that_would_fail_or_do_nothing_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as raised:
        make(deepspeed=given)
    assert message in str(raised.value)


@pytest.mark.parametrize("option", ["offload_optimizer", "offload_param"])
def test_an_option_for_offload_is_not_undone_by_deepspeeds_key(option: str) -> None:
    def zero(**section: Any) -> dict[str, Any]:
        return {"stage": 3, option: True, "deepspeed": {"zero_optimization": {option: section}}}

    with pytest.raises(ValidationError, match=f"{option} is true and deepspeed.zero_optimization.{option}.device is none"):
        make(**zero(device="none"))
    for section in ({"device": "cpu", "pin_memory": True}, {"pin_memory": True}):
        settings = deepspeed_settings(make(**zero(**section)), batch_size=8, dtype="float32", max_grad_norm=None)
        assert settings["zero_optimization"][option] == {"device": "cpu", "pin_memory": True}


def test_a_section_that_is_no_mapping_is_said_whatever_else_is_asked() -> None:
    with pytest.raises(ValidationError, match="zero_optimization: expected a mapping, got 2"):
        make(on_out_of_memory="halve", deepspeed={"zero_optimization": 2})


def test_a_run_records_the_keys_and_not_the_file(tmp_path: Path) -> None:
    path, keys = tmp_path / "ds.json", {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}
    path.write_text(json.dumps(keys))
    config = fedgraft.load_config(None, [f"engine.deepspeed={path}"])
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    again = [config.absolute().engine, config.resolved_engine()]
    path.unlink()
    again.append(fedgraft.load_config(yaml.safe_load(dump_config(config.absolute()))).engine)
    assert [engine.deepspeed for engine in again] == [keys] * 3
    assert [engine.zero_stage for engine in again] == [2] * 3


def test_deepspeeds_own_file_is_read_and_named_in_errors(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}, "memory_breakdown": True}))
    config = make(deepspeed=path, world_size=2)
    settings = deepspeed_settings(config, batch_size=8, dtype="float32", max_grad_norm=None)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 1000}
    assert settings["memory_breakdown"] is True
    for text, message in (("[1]", f"expected a JSON object in {path}"), ("{", f"the file {path} cannot be read as JSON")):
        path.write_text(text)
        with pytest.raises(ValidationError) as raised:
            make(deepspeed=path)
        assert message in str(raised.value)


def test_what_fedgraft_decides_may_be_stated_if_it_agrees() -> None:
    stated = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "bf16": {"enabled": True}}
    config = make(world_size=2, gradient_accumulation_steps=2, deepspeed=stated)
    settings = deepspeed_settings(config, batch_size=8, dtype="bfloat16", max_grad_norm=1.0)
    assert (settings["gradient_clipping"], settings["bf16"]) == (1.0, {"enabled": True})
    for batch_size, dtype, norm, message in (
        (9, "bfloat16", 1.0, "deepspeed.train_batch_size is 8, federation.batch_size gives 9"),
        (8, "float32", 1.0, "model.dtype is float32"),
        (8, "bfloat16", 0.5, "deepspeed.gradient_clipping is 1.0, training.max_grad_norm gives 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            deepspeed_settings(config, batch_size=batch_size, dtype=dtype, max_grad_norm=norm)


def test_bfloat16_needs_masters() -> None:
    with pytest.raises(ValueError, match="stage 0 steps bfloat16 weights without float32 masters"):
        deepspeed_settings(make(stage=0), batch_size=8, dtype="bfloat16", max_grad_norm=None)


def test_offload_goes_to_the_cpu() -> None:
    settings = deepspeed_settings(
        make(stage=3, offload_optimizer=True, offload_param=True), batch_size=8, dtype="float32", max_grad_norm=None
    )
    zero = settings["zero_optimization"]
    assert [zero[name]["device"] for name in ("offload_optimizer", "offload_param")] == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["engine.world_size=2", "executor.kind=in_process"], "executor.kind: in_process is one process"),
        (["engine.device=cpu", "executor.gpus_per_replica=1"], "has no effect with engine.device: cpu"),
        (["engine.world_size=2", "executor.gpus_per_replica=1"], "each rank needs its own GPU"),
        (["engine.stage=0", "model.dtype=bfloat16"], "without float32 masters"),
        (["engine.deepspeed={train_batch_size: 99}"], "deepspeed.train_batch_size is 99, federation.batch_size gives 8"),
        (["engine.deepspeed=nowhere.json"], "the file nowhere.json cannot be read as JSON"),
    ],
)
def test_the_run_refuses_what_does_not_fit_together(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        fedgraft.load_config(None, overrides)
    assert message in str(raised.value)


def test_methods_that_need_whole_batches_are_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(METHODS.get("fedavg"), "uses_batch_statistics", True)
    for override in ("engine.world_size=2", "engine.gradient_accumulation_steps=2", "engine.on_out_of_memory=halve"):
        with pytest.raises(ConfigError, match="fedavg uses statistics of whole batches"):
            fedgraft.load_config(None, [override])
    fedgraft.load_config(None, ["engine.name=deepspeed"])
