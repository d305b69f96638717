"""DeepSpeed's own keys: which of them work here, and what they take.

DeepSpeed ignores what it does not know, finds most mistakes only when an engine starts, and has keys that do nothing or harm with
fedgraft. So these tables name every key that may be given; all others are refused with a reason, before anything starts.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["PASSED", "check_exchange", "check_top_keys", "check_zero", "read_deepspeed"]

_REFUSED = {
    "optimizer": "fedgraft makes the optimiser from training.optimizer, training.learning_rate and training.weight_decay",
    "scheduler": "the learning rate of a round comes from the method's plan",
    "fp16": "only float32 and bfloat16 are supported; set model.dtype",
    "amp": "only float32 and bfloat16 are supported; set model.dtype",
    "torch_autocast": "the numbers' format is that of model.dtype",
    "zero_allow_untested_optimizer": "fedgraft sets it",
    "zero_force_ds_cpu_optimizer": "fedgraft sets it",
    "managed_gradient_accumulation": "fedgraft accumulates itself",
    "expert_parallel": "use engine.expert_parallel_size",
    "checkpoint": "fedgraft writes its own checkpoints",
    "steps_per_print": "fedgraft reports progress itself",
    "data_types": "the numbers' format is that of model.dtype",
    "compression_training": "compression changes the weights that clients exchange",
    "elasticity": "a replica's ranks are fixed by engine.world_size",
    "autotuning": "a run's settings must not depend on a clock",
    "curriculum_learning": "the order of examples comes from the run's seed",
    "data_efficiency": "the order of examples comes from the run's seed",
    "activation_checkpointing": "only models that call DeepSpeed's own checkpoint function read it, and these do not",
    "aio": "only offload to disks reads it, which is not supported",
    "comms_logger": "fedgraft silences the log that it writes to",
    "dump_state": "fedgraft silences the log that it writes to",
}
_CHECKED = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16")
PASSED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
)
"""Keys that DeepSpeed is given as they are stated, once they are checked."""

_ANY, _BELOW_3, _ONLY_3 = (1, 2, 3), (1, 2), (3,)
# What a key of zero_optimization takes, and the stages that read it. Each was tried in each of its stages, with one rank and two.
_ZERO: dict[str, tuple[Literal["flag", "count", "size", "offload"], tuple[int, ...]]] = {
    "contiguous_gradients": ("flag", _ANY),
    "overlap_comm": ("flag", _ANY),
    "reduce_bucket_size": ("count", _ANY),
    "reduce_scatter": ("flag", _ANY),
    "offload_optimizer": ("offload", _ANY),
    "parameter_alignment": ("flag", _BELOW_3),
    "use_multi_rank_bucket_allreduce": ("flag", _BELOW_3),
    "enable_sanity_checks": ("flag", _ONLY_3),
    "memory_efficient_linear": ("flag", _ONLY_3),
    "offload_param": ("offload", _ONLY_3),
    "stage3_allgather_sequential": ("flag", _ONLY_3),
    "stage3_max_live_parameters": ("size", _ONLY_3),
    "stage3_max_reuse_distance": ("size", _ONLY_3),
    "stage3_model_persistence_threshold": ("size", _ONLY_3),
    "stage3_param_persistence_threshold": ("size", _ONLY_3),
    "stage3_prefetch_bucket_size": ("size", _ONLY_3),
    "stage3_use_all_reduce_for_fetch_params": ("flag", _ONLY_3),
    "sub_group_size": ("count", _ONLY_3),
}
_OWN_CHECKPOINTS = "fedgraft writes its own checkpoints"
_QUANTIZED = "rounded weights or gradients would change what clients learn, and they need compiled CUDA code"
_ZERO_REFUSED = {
    "allgather_bucket_size": "PyTorch gathers whole groups of parameters at once, so it changes nothing",
    "allgather_partitions": "DeepSpeed reads it nowhere",
    "compute_grad_norm": "the norm is needed for clipping (training.max_grad_norm)",
    "cpu_offload": "it is an old name; use offload_optimizer",
    "cpu_offload_param": "it is an old name; use offload_param",
    "cpu_offload_use_pin_memory": "it is an old name; use pin_memory in offload_optimizer or offload_param",
    "elastic_checkpoint": _OWN_CHECKPOINTS,
    "ignore_unused_parameters": "a slot without a gradient is no mistake: an expert may see no token",
    "leaf_module": "the experts of a layer are one module already",
    "legacy_stage1": "DeepSpeed has dropped it",
    "load_from_fp32_weights": _OWN_CHECKPOINTS,
    "log_trace_cache_warnings": "it only adds lines to DeepSpeed's output on its own caches",
    "override_module_apply": "it is for models that are built inside DeepSpeed, and fedgraft's are built before",
    "pipeline_loading_checkpoint": _OWN_CHECKPOINTS,
    "round_robin_gradients": "it reorders the parameters of a rank, and values would be read from the wrong places",
    "save_muon_momentum_buffer_in_memory": "the optimiser is AdamW or SGD (training.optimizer)",
    "stage3_gather_16bit_weights_on_model_save": _OWN_CHECKPOINTS,
    "stage3_gather_fp16_weights_on_model_save": _OWN_CHECKPOINTS,
    "stage3_module_granularity_threshold": "modules fetched as a whole lose weights before their gradients are there",
    "zenflow": "it steps parameters at different times, so ranks and stages would no longer agree",
    "zero_hpz_partition_size": "a second copy of the shares on each node is not supported",
    "zero_quantized_gradients": _QUANTIZED,
    "zero_quantized_nontrainable_weights": _QUANTIZED,
    "zero_quantized_weights": _QUANTIZED,
}
_OFFLOAD_REFUSED = {
    **dict.fromkeys(
        ("nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "fast_init", "pipeline_read", "pipeline_write"),
        "offload to disks (nvme) is not supported; give device: cpu only",
    ),
    **dict.fromkeys(
        ("ratio", "super_offload", "cpuadam_cores_perc"), "it needs DeepSpeed's own Adam, and fedgraft steps with PyTorch's"
    ),
}


class _FlopsProfiler(BaseModel):
    """DeepSpeed's section, which it does not check itself. No output_file: all replicas would write the same one."""

    model_config = ConfigDict(extra="forbid", strict=True)

    enabled: Literal[True]
    profile_step: int = Field(1, ge=1)
    module_depth: int = Field(-1, ge=-1)
    top_modules: int = Field(1, ge=1)
    recompute_fwd_factor: float = Field(0.0, ge=0, allow_inf_nan=False)
    detailed: bool = True


def read_deepspeed(given: Mapping[str, Any] | Path | None) -> dict[str, Any]:
    """Give DeepSpeed's keys as a mapping, read from its JSON file where one is named.

    Raises:
        ValueError: The file cannot be read, or holds no JSON object; pydantic turns it into one error with the key path.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    try:
        found = json.loads(given.expanduser().read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the file {given} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {given}, got {type(found).__name__}")
    return found


def check_top_keys(given: Mapping[str, Any]) -> None:
    """Check the keys and everything that does not depend on the ZeRO stage.

    Raises:
        ValueError: A key is unknown, not supported, or of the wrong type.
    """
    for key, value in given.items():
        _require_known("deepspeed", key, value, (*_CHECKED, *PASSED), _REFUSED)
    if not isinstance(zero := given.get("zero_optimization", {}), Mapping):
        raise ValueError(f"deepspeed.zero_optimization: expected a mapping, got {zero!r}")
    bf16 = given.get("bf16", {})
    if isinstance(bf16, Mapping) and (others := sorted(set(bf16) - {"enabled"})):
        raise ValueError(f"deepspeed.bf16.{others[0]} cannot be set: the masters are float32; only enabled may be stated")
    _check_reports(given)


def check_zero(zero: Mapping[str, Any], stage: int, options: Mapping[str, bool]) -> None:
    """Check the section ``zero_optimization``.

    Args:
        zero: DeepSpeed's keys.
        stage: ZeRO stage, 0 to 3.
        options: The engine's own ``offload_optimizer`` and ``offload_param``, which must not say the opposite.

    Raises:
        ValueError: A key is unknown, not supported, of the wrong type, without effect in this stage, or contradicts an option.
    """
    for name, is_wanted in options.items():
        lowest = min(_ZERO[name][1])
        if (is_wanted or _is_offloaded(zero.get(name))) and stage < lowest:
            raise ValueError(f"{name} needs ZeRO stage {lowest} or higher, this is stage {stage}; raise stage or remove it")
    for key, value in zero.items():
        place = f"deepspeed.zero_optimization.{key}"
        _require_known("deepspeed.zero_optimization", key, value, ("stage", *_ZERO), _ZERO_REFUSED)
        if key == "stage":
            continue
        kind, stages = _ZERO[key]
        if kind == "offload":
            _check_offload(key, value, is_wanted=options[key])
        elif kind == "flag":
            _require_flag(place, value)
        elif not _is_whole(value) or value < (kind == "count"):
            raise ValueError(f"{place} = {value!r}: expected a whole number, {int(kind == 'count')} or more")
        if stage not in stages:
            raise ValueError(
                f"{place} has no effect in stage {stage}; set stage: {' or '.join(str(each) for each in stages)}, or remove it"
            )


def _check_offload(name: str, section: Any, *, is_wanted: bool) -> None:
    place = f"deepspeed.zero_optimization.{name}"
    if not isinstance(section, Mapping):
        raise ValueError(f"{place} = {section!r}: expected a mapping with device and pin_memory")
    for key, value in section.items():
        _require_known(place, key, value, ("device", "pin_memory"), _OFFLOAD_REFUSED)
    device = section.get("device", "cpu" if is_wanted else "none")
    if device == "nvme":
        raise ValueError(f"{place}.device = 'nvme': offload to disks is not supported; use cpu or none")
    if device not in ("none", "cpu"):
        raise ValueError(f"{place}.device = {device!r}: expected none or cpu")
    if is_wanted and device == "none":
        raise ValueError(f"{name} is true and {place}.device is none; remove one of the two")
    if "pin_memory" in section:
        _require_flag(f"{place}.pin_memory", section["pin_memory"])
        if device == "none":
            raise ValueError(f"{place}.pin_memory has no effect without offload; set device: cpu, or remove it")


def check_exchange(given: Mapping[str, Any], stage: int) -> None:
    """Check the keys of how gradients are summed over ranks; what works depends on the stage.

    Raises:
        ValueError: A value that DeepSpeed does not take, or that would be ignored or give wrong sums.
    """
    kind = given.get("communication_data_type", "fp32")
    if kind == "fp16":
        raise ValueError(
            "deepspeed.communication_data_type = 'fp16': small gradients would vanish without loss scaling; use bf16"
        )
    if kind not in ("fp32", "bf16"):
        raise ValueError(f"deepspeed.communication_data_type = {kind!r}: expected fp32 or bf16")
    _require_flag("deepspeed.prescale_gradients", given.get("prescale_gradients", False))
    factor = given.get("gradient_predivide_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"deepspeed.gradient_predivide_factor = {factor!r}: expected a number above 0")
    is_prescaled = given.get("prescale_gradients", False)
    stated = ["prescale_gradients"] * is_prescaled + ["gradient_predivide_factor"] * (factor != 1)
    if stated and stage == 3:
        # DeepSpeed's sums ignore the one there, and are wrong with the other.
        raise ValueError(f"deepspeed.{stated[0]} does not work in stage 3; set a lower stage, or remove it")
    if stated and stage > 0 and given.get("zero_optimization", {}).get("reduce_scatter", True):
        raise ValueError(
            f"deepspeed.{stated[0]} needs zero_optimization.reduce_scatter: false in stage {stage}; set that, or remove it"
        )
    if len(stated) == 2:
        raise ValueError(
            "deepspeed.gradient_predivide_factor has no effect beside prescale_gradients: true; remove one of the two"
        )


def _check_reports(given: Mapping[str, Any]) -> None:
    """Check what DeepSpeed prints of time, memory and operations."""
    for name in ("wall_clock_breakdown", "memory_breakdown"):
        _require_flag(f"deepspeed.{name}", given.get(name, False))
    try:
        if "flops_profiler" in given:
            _FlopsProfiler.model_validate(given["flops_profiler"])
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(("deepspeed.flops_profiler", *(str(part) for part in first["loc"])))
        raise ValueError(f"{place}: {first['msg'].lower()}; known keys: {', '.join(_FlopsProfiler.model_fields)}") from None


def _is_offloaded(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"


def _is_whole(value: Any) -> bool:
    """Whether it is a whole number; JSON files write large ones as 5e8."""
    return isinstance(value, int | float) and not isinstance(value, bool) and float(value).is_integer()


def _require_known(place: str, key: str, value: Any, known: Collection[str], refused: Mapping[str, str]) -> None:
    if key in refused:
        raise ValueError(f"{place}.{key} cannot be set: {refused[key]}")
    if key not in known:
        near = difflib.get_close_matches(str(key), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        raise ValueError(f"{place}.{key} = {value!r} is not a known key; {hint}")


def _require_flag(place: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{place} = {value!r}: expected true or false")
