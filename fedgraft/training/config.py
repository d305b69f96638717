"""How a replica trains: the engine, its ranks, ZeRO stage and offload, and DeepSpeed's own settings, checked before a run.

DeepSpeed's settings come as its JSON file or as the same keys in YAML. What fedgraft decides itself (optimiser, batch, precision)
may be stated there if it agrees, and is refused if it does not: a setting that is silently replaced misleads.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

__all__ = ["REDUCE_BUCKET_SIZE", "EngineConfig", "deepspeed_settings"]

REDUCE_BUCKET_SIZE = 20_000_000
"""Values of gradients that DeepSpeed sums at a time, unless its own key says otherwise."""

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
_PASSED = (
    "zero_optimization",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "wall_clock_breakdown",
    "memory_breakdown",
    "flops_profiler",
)

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


class EngineConfig(BaseModel):
    """What trains. ``auto`` is DeepSpeed where a replica has a GPU or several ranks, or where a setting of it is stated;
    else plain PyTorch, since on one CPU DeepSpeed brings nothing but start-up time.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Literal["auto", "torch", "deepspeed"] = Field("auto", description="Training engine.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where replicas put their model.")
    world_size: int = Field(1, ge=1, le=1024, description="Ranks of a replica: processes that share its optimiser and model.")
    gradient_accumulation_steps: int = Field(
        1, ge=1, le=65_536, description="Parts that each rank cuts its share of a batch into."
    )
    on_out_of_memory: Literal["fail", "halve"] = Field(
        "fail", description="halve: after an out-of-memory error a client trains again with twice as many parts; recorded."
    )
    stage: Literal[0, 1, 2, 3] | None = Field(
        None, description="ZeRO stage; null: 1 with one rank, 2 with several, 0 where they share experts. 3 also shards the base."
    )
    offload_optimizer: bool = Field(False, description="Keep optimiser state in CPU memory (ZeRO stage 1 to 3).")
    offload_param: bool = Field(False, description="Keep parameters in CPU memory until they are used (ZeRO stage 3).")
    expert_parallel_size: int | None = Field(
        None, ge=2, description="Ranks that share the experts of a layer (DeepSpeed AutoEP)."
    )
    deepspeed: dict[str, Any] | Path | None = Field(None, description="DeepSpeed's own keys, or a JSON file of them.")

    @field_validator("deepspeed")
    @classmethod
    def _read_file(cls, value: dict[str, Any] | Path | None) -> dict[str, Any] | None:
        """Read a file once: the run records its keys, so that a resumed run and other nodes do not depend on the file."""
        return None if value is None else read_deepspeed(value)

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        stated = self._stated_for_deepspeed()
        if self.name == "torch" and (stated or self.world_size > 1):
            raise ValueError(
                f"{', '.join(stated or ('world_size',))} has no effect with name: torch; set name: deepspeed, or remove it"
            )
        if self.on_out_of_memory == "halve" and self.world_size > 1:
            raise ValueError(
                "on_out_of_memory: halve needs world_size: 1, because a rank that runs out of memory alone leaves the others "
                "waiting; raise gradient_accumulation_steps instead"
            )
        if self.on_out_of_memory == "halve" and self.name != "torch" and self.zero_stage == 3:
            raise ValueError(
                "on_out_of_memory: halve cannot go on in ZeRO stage 3, whose buffers are left half filled; set stage: 2 or "
                "lower, or raise gradient_accumulation_steps instead"
            )
        if self.expert_parallel_size is not None and self.world_size % self.expert_parallel_size:
            raise ValueError(f"expert_parallel_size {self.expert_parallel_size} does not divide world_size {self.world_size}")
        if self.expert_parallel_size is not None and self.zero_stage in (1, 2):
            raise ValueError(
                f"expert_parallel_size: ZeRO stage {self.zero_stage} refuses shared experts that are not trained; set stage: 0, "
                "or 3, which shards all other parameters as well"
            )
        if self.name != "torch":
            self._check_deepspeed()
        return self

    def _stated_for_deepspeed(self) -> tuple[str, ...]:
        """Settings that only DeepSpeed has and that were given a value."""
        names = ("stage", "offload_optimizer", "offload_param", "expert_parallel_size", "deepspeed")
        values = {name: getattr(self, name) for name in names}
        return tuple(name for name, value in values.items() if value is not None and value is not False)

    def _check_deepspeed(self) -> None:
        given = read_deepspeed(self.deepspeed)
        for key, value in given.items():
            _require_known("deepspeed", key, value, (*_CHECKED, *_PASSED), _REFUSED)
        zero = given.get("zero_optimization", {})
        if not isinstance(zero, Mapping):
            raise ValueError(f"deepspeed.zero_optimization: expected a mapping, got {zero!r}")
        if self.stage is not None and zero.get("stage", self.stage) != self.stage:
            raise ValueError(f"stage is {self.stage} and deepspeed.zero_optimization.stage is {zero['stage']}; give one of them")
        stage = self.zero_stage
        if type(stage) is not int or stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
        _check_zero(zero, stage, {name: getattr(self, name) for name in ("offload_optimizer", "offload_param")})
        _check_exchange(given, stage, is_scattered=zero.get("reduce_scatter", True))
        _check_reports(given)
        bf16 = given.get("bf16", {})
        if isinstance(bf16, Mapping) and (others := sorted(set(bf16) - {"enabled"})):
            raise ValueError(f"deepspeed.bf16.{others[0]} cannot be set: fedgraft keeps float32 masters; only enabled may be stated")
        steps = given.get("gradient_accumulation_steps", self.gradient_accumulation_steps)
        if steps != self.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps is {self.gradient_accumulation_steps} and "
                f"deepspeed.gradient_accumulation_steps is {steps!r}; make them equal"
            )

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage as stated here or in DeepSpeed's keys; else 1 with one rank, 2 with several, 0 if they share experts."""
        if self.stage is not None:
            return self.stage
        zero = read_deepspeed(self.deepspeed).get("zero_optimization", {})
        alone = 1 if self.world_size == 1 else 2
        return zero.get("stage", alone if self.expert_parallel_size is None else 0)  # type: ignore[no-any-return]

    def resolved(self, *, has_gpu: bool) -> EngineConfig:
        """Decide what ``auto`` means, for the name and the device, once: it is recorded and the same on every replica.

        Args:
            has_gpu: Whether a replica gets a GPU.
        """
        found: dict[str, Any] = {}
        if self.name == "auto":
            is_deepspeed = has_gpu or self.world_size > 1 or bool(self._stated_for_deepspeed())
            found["name"] = "deepspeed" if is_deepspeed else "torch"
        if self.device == "auto":
            found["device"] = "cuda" if has_gpu else "cpu"
        return self.model_copy(update=found) if found else self


def _require_known(place: str, key: str, value: Any, known: Collection[str], refused: Mapping[str, str]) -> None:
    if key in refused:
        raise ValueError(f"{place}.{key} cannot be set: {refused[key]}")
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        raise ValueError(f"{place}.{key} = {value!r} is not a known key; {hint}")


def _require_flag(place: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{place} = {value!r}: expected true or false")


def _check_zero(zero: Mapping[str, Any], stage: int, options: Mapping[str, bool]) -> None:
    """Check the section ``zero_optimization`` beside the engine's own offload options."""
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


def _check_exchange(given: Mapping[str, Any], stage: int, *, is_scattered: bool) -> None:
    """Check how gradients are summed over ranks."""
    kind = given.get("communication_data_type", "fp32")
    if kind == "fp16":
        raise ValueError("deepspeed.communication_data_type = 'fp16': small gradients would vanish without loss scaling; use bf16")
    if kind not in ("fp32", "bf16"):
        raise ValueError(f"deepspeed.communication_data_type = {kind!r}: expected fp32 or bf16")
    _require_flag("deepspeed.prescale_gradients", given.get("prescale_gradients", False))
    factor = given.get("gradient_predivide_factor", 1.0)
    if isinstance(factor, bool) or not isinstance(factor, int | float) or not math.isfinite(factor) or factor <= 0:
        raise ValueError(f"deepspeed.gradient_predivide_factor = {factor!r}: expected a number above 0")
    stated = [name for name in ("prescale_gradients", "gradient_predivide_factor") if name in given]
    if stated and stage == 3:
        # DeepSpeed's sums ignore the one there, and are wrong with the other.
        raise ValueError(f"deepspeed.{stated[0]} does not work in stage 3; set a lower stage, or remove it")
    if stated and stage > 0 and is_scattered:
        raise ValueError(
            f"deepspeed.{stated[0]} needs zero_optimization.reduce_scatter: false in stage {stage}; set that, or remove it"
        )
    if given.get("prescale_gradients") and "gradient_predivide_factor" in given:
        raise ValueError("deepspeed.gradient_predivide_factor has no effect beside prescale_gradients: true; remove one of the two")


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
        found = json.loads(given.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"the file {given} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"expected a JSON object in {given}, got {type(found).__name__}")
    return found


def deepspeed_settings(config: EngineConfig, *, batch_size: int, dtype: str, max_grad_norm: float | None) -> dict[str, Any]:
    """Give the dictionary that ``deepspeed.initialize`` takes, with fedgraft's own decisions in it.

    Args:
        config: A resolved engine configuration.
        batch_size: Examples of a local step, over all ranks.
        dtype: ``float32`` or ``bfloat16``.
        max_grad_norm: Clips the norm of the whole gradient; ``None``: no clipping.

    Raises:
        ValueError: A stated key disagrees with the rest of the configuration.
    """
    given = read_deepspeed(config.deepspeed)
    is_bf16 = dtype == "bfloat16"
    parts = config.gradient_accumulation_steps
    micro = -(-batch_size // (config.world_size * parts))
    decided: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch_size, "federation.batch_size"),
        "train_micro_batch_size_per_gpu": (
            micro,
            "federation.batch_size / (engine.world_size x engine.gradient_accumulation_steps)",
        ),
        "gradient_clipping": (max_grad_norm or 0.0, "training.max_grad_norm"),
    }
    for key, (value, source) in decided.items():
        if key in given and given[key] != value:
            raise ValueError(f"deepspeed.{key} is {given[key]!r}, {source} gives {value!r}; remove it or make them equal")
    stated_bf16 = given.get("bf16", {}).get("enabled", is_bf16) if isinstance(given.get("bf16", {}), Mapping) else None
    if stated_bf16 != is_bf16:
        raise ValueError(f"deepspeed.bf16 is {given['bf16']!r}, model.dtype is {dtype}; remove it or make them agree")
    if is_bf16 and config.zero_stage == 0:
        raise ValueError(
            "stage 0 steps bfloat16 weights without float32 masters, which loses small steps; set engine.stage: "
            f"{1 if config.expert_parallel_size is None else 3}, or model.dtype: float32"
        )
    zero = dict(given.get("zero_optimization", {})) | {"stage": config.zero_stage}
    # DeepSpeed's own default, 500 M values, takes 2 GB of a GPU; what is trained here is rarely larger than this.
    zero.setdefault("reduce_bucket_size", REDUCE_BUCKET_SIZE)
    for name, wanted in (("offload_optimizer", config.offload_optimizer), ("offload_param", config.offload_param)):
        if wanted:
            zero[name] = {"device": "cpu", "pin_memory": False} | dict(zero.get(name) or {})
    settings = {key: value for key, value in given.items() if key in _PASSED}
    settings |= {
        # A batch may be smaller than batch_size and is cut by fedgraft; DeepSpeed only has to see consistent numbers.
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_grad_norm or 0.0,
        "bf16": {"enabled": is_bf16},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if config.expert_parallel_size is not None:
        settings["expert_parallel"] = {"autoep_size": config.expert_parallel_size}  # the engine adds what the model decides
    return settings
