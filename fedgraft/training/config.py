"""How a replica trains: the engine, its ranks, ZeRO stage and offload, and DeepSpeed's own settings, checked before a run.

DeepSpeed's settings come as its JSON file or as the same keys in YAML. What fedgraft decides itself (optimiser, batch, precision)
may be stated there if it agrees, and is refused if it does not: a setting that is silently replaced misleads.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from fedgraft.training.deepspeed_keys import PASSED, check_exchange, check_top_keys, check_zero, read_deepspeed

__all__ = ["REDUCE_BUCKET_SIZE", "EngineConfig", "deepspeed_settings"]

REDUCE_BUCKET_SIZE = 20_000_000
"""Values of gradients that DeepSpeed sums at a time, unless its own key says otherwise."""


class EngineConfig(BaseModel):
    """What trains. ``auto`` is DeepSpeed where a replica has a GPU or several ranks, or where a setting of it is stated;
    else plain PyTorch, since on one CPU DeepSpeed brings nothing but start-up time. So it is where ``clients_at_once`` is not 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: Literal["auto", "torch", "deepspeed"] = Field("auto", description="Training engine.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="Where replicas put their model.")
    world_size: int = Field(1, ge=1, le=1024, description="Ranks of a replica: processes that share its optimiser and model.")
    clients_at_once: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        1,
        description="Clients that a replica trains in one pass over the shared base; auto: as many as its memory holds, at most "
        "16. Needs the torch engine.",
    )
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
        if value is None:
            return None
        found = read_deepspeed(value)
        check_top_keys(found)
        return found

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        stated = self._stated_for_deepspeed()
        if self.name == "torch" and (stated or self.world_size > 1):
            raise ValueError(
                f"{', '.join(stated or ('world_size',))} has no effect with name: torch; set name: deepspeed, or remove it"
            )
        if self.clients_at_once != 1:
            self._check_clients_at_once(stated)
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

    def _check_clients_at_once(self, stated: tuple[str, ...]) -> None:
        """Clients share a pass in the torch engine only, and a pass takes whole batches."""
        if self.name == "deepspeed" or self.world_size > 1 or stated:
            which = "name: deepspeed" if self.name == "deepspeed" else f"{', '.join(stated) or 'world_size'}"
            raise ValueError(
                f"clients_at_once is {self.clients_at_once}, and only the torch engine, of one rank, trains several clients in a "
                f"pass; remove it or {which}"
            )
        if self.gradient_accumulation_steps > 1 or self.on_out_of_memory == "halve":
            which = "gradient_accumulation_steps" if self.gradient_accumulation_steps > 1 else "on_out_of_memory: halve"
            raise ValueError(
                f"clients_at_once is {self.clients_at_once}, and a pass of several clients takes whole batches; remove {which}, "
                "or set clients_at_once: 1"
            )

    def _stated_for_deepspeed(self) -> tuple[str, ...]:
        """Settings that only DeepSpeed has and that were given a value."""
        names = ("stage", "offload_optimizer", "offload_param", "expert_parallel_size", "deepspeed")
        values = {name: getattr(self, name) for name in names}
        return tuple(name for name, value in values.items() if value is not None and value is not False)

    def _check_deepspeed(self) -> None:
        given = read_deepspeed(self.deepspeed)
        zero = given.get("zero_optimization", {})
        if self.stage is not None and zero.get("stage", self.stage) != self.stage:
            raise ValueError(f"stage is {self.stage} and deepspeed.zero_optimization.stage is {zero['stage']}; give one of them")
        stage = self.zero_stage
        if type(stage) is not int or stage not in (0, 1, 2, 3):
            raise ValueError(f"deepspeed.zero_optimization.stage: expected 0, 1, 2 or 3, got {stage!r}")
        check_zero(zero, stage, {name: getattr(self, name) for name in ("offload_optimizer", "offload_param")})
        check_exchange(given, stage)
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
            is_deepspeed = is_deepspeed and self.clients_at_once == 1
            found["name"] = "deepspeed" if is_deepspeed else "torch"
        if self.device == "auto":
            found["device"] = "cuda" if has_gpu else "cpu"
        return self.model_copy(update=found) if found else self


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
    settings = {key: value for key, value in given.items() if key in PASSED}
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
