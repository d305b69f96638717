"""The configuration of a run: one frozen tree. Each component's own part lives beside the component.

Only ``platform`` and ``tuning`` see the whole tree; everything else gets plain typed arguments.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator, model_validator

import fedgraft.aggregation  # noqa: F401  (its files register the methods that the validators look up)
from fedgraft.data.config import DataConfig
from fedgraft.errors import MethodError
from fedgraft.platform.budgets import BudgetsConfig
from fedgraft.platform.remote import is_uri, known_schemes
from fedgraft.platform.tracking import TrackingConfig
from fedgraft.protocols import MethodConfig, TrainSpec
from fedgraft.registry import METHODS
from fedgraft.training.config import EngineConfig, deepspeed_settings

__all__ = [
    "BudgetsConfig",
    "CompareConfig",
    "EngineConfig",
    "EvaluationConfig",
    "ExecutorConfig",
    "FederationConfig",
    "ModelConfig",
    "OutputConfig",
    "RateSearchConfig",
    "RunConfig",
    "TrainingConfig",
]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(_Frozen):
    """Which MoE language model: a folder, a hub name, or (neither) the bundled one, pre-trained once on this machine."""

    path: Path | None = Field(None, description="Local Hugging Face folder; wins over name.")
    name: str | None = Field(None, description="Model on the Hugging Face hub.")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="Number format of the weights.")
    trust_remote_code: bool = Field(False, description="Let Python code in the model's folder run.")

    @property
    def is_bundled(self) -> bool:
        """Whether the bundled model is meant."""
        return self.path is None and self.name is None

    @property
    def source(self) -> str:
        """Folder or hub name; empty for the bundled model."""
        return str(self.path) if self.path is not None else (self.name or "")


class FederationConfig(_Frozen):
    """Rounds, who takes part, and how much a client does in a round."""

    rounds: int = Field(10, ge=0, le=1_000_000, description="Rounds of training.")
    cohort_size: int | None = Field(None, ge=1, description="Clients drawn a round; null: all of them.")
    min_clients: int = Field(1, ge=1, description="Fewest updates a round may go on with.")
    max_failures: int = Field(3, ge=1, description="Tries of one client's task before it counts as failed.")
    local_steps: int = Field(10, ge=1, le=1_000_000, description="Optimiser steps of a client in a round.")
    batch_size: int = Field(8, ge=1, le=65_536, description="Examples of a local step.")
    task_timeout_s: float = Field(3600.0, gt=0, le=1e8, description="Longest time that one client's task may take.")
    max_update_bytes: int | None = Field(
        None, ge=1, description="Largest reply of a client, bytes; null: four float32 copies of all slots, and 64 MiB."
    )
    budgets: BudgetsConfig | None = Field(None, description="What clients may hold or train; null: everything.")


class TrainingConfig(_Frozen):
    """The local optimiser."""

    learning_rate: float = Field(3e-3, gt=0, le=10, description="Learning rate, constant over steps and rounds.")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="Local optimiser, fresh in every round.")
    weight_decay: float = Field(0.0, ge=0, le=10, description="Decoupled weight decay.")
    max_grad_norm: float | None = Field(1.0, gt=0, description="Clip the norm of the whole gradient; null: no clipping.")

    def spec(self) -> TrainSpec:
        """The numbers of a local training, with this learning rate."""
        return TrainSpec(
            learning_rate=self.learning_rate,
            optimizer=self.optimizer,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )


class EvaluationConfig(_Frozen):
    """When and how models are judged."""

    every: int = Field(1, ge=1, description="Evaluate after every so many rounds; the last round always counts.")
    at_start: bool = Field(True, description="Also judge the global model before round 1.")
    generate: Literal["never", "end", "always"] = Field("end", description="When answers are decoded for ROUGE-L.")
    max_new_tokens: int = Field(32, ge=1, le=4096, description="Longest decoded answer.")
    max_generate: int | None = Field(None, ge=1, description="Most answers decoded a client.")
    choices: Literal["never", "end", "always"] = Field("end", description="When multiple choice is asked.")
    batch_size: int = Field(32, ge=1, le=4096, description="Examples of an evaluation batch.")
    global_view: bool = Field(True, description="Judge the global model beside the personal ones, where they differ.")
    validation: bool = Field(
        False, description="Also judge on the clients' validation examples; the trials of a sweep are chosen by these."
    )


class ExecutorConfig(_Frozen):
    """Who does the clients' work: replicas as Ray actors, or this process."""

    kind: Literal["ray", "in_process"] = Field("ray", description="ray: a driver actor and replica actors.")
    replicas: int | None = Field(None, ge=1, le=10_000, description="Replicas; null: as many as cores, clients and memory allow.")
    threads: int = Field(1, ge=1, le=256, description="Threads of each rank of a replica; sums depend on it, so results do.")
    gpus_per_replica: float | None = Field(
        None,
        ge=0,
        description="GPUs of a replica, shared by its ranks; a fraction shares one; null: worked out from the memory plan, 0 "
        "where there are none.",
    )
    gpu_gib: float | None = Field(None, gt=0, description="Memory of a GPU, GiB, to plan with; null: the GPUs are asked.")
    placement: Literal["spread", "pack"] | None = Field(
        None,
        description="Replicas on as many nodes as there are, or on as few; null: as Ray does (half of a node, then the next).",
    )
    rank_grace_s: float = Field(
        60.0, gt=0, le=1e8, description="How long the other ranks of a task may take once one has ended it."
    )
    heartbeat_timeout_s: float | None = Field(
        None, ge=5, le=1e8, description="Silence after which a working replica or the driver counts as frozen; null: 60 s."
    )
    address: str | None = Field(None, description="Ray cluster to join; null: RAY_ADDRESS, else one of its own.")
    start_timeout_s: float = Field(300.0, gt=0, le=1e8, description="Longest wait for Ray and its actors to start.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.kind == "in_process":
            for name in ("replicas", "address", "heartbeat_timeout_s", "placement", "gpu_gib"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name} has no effect with kind: in_process; remove it, or set kind: ray")
            if self.gpus:
                raise ValueError("gpus_per_replica has no effect with kind: in_process; set engine.device: cuda")
        return self

    @property
    def gpus(self) -> float:
        """GPUs of a replica; 0 also where they are still to be worked out."""
        return self.gpus_per_replica or 0.0

    @property
    def heartbeat_s(self) -> float:
        """The silence that counts as frozen, seconds."""
        return self.heartbeat_timeout_s if self.heartbeat_timeout_s is not None else 60.0


class RateSearchConfig(_Frozen):
    """Choose each method's learning rate from one grid, by the personal models' NLL on the validation split."""

    rates: tuple[float, ...] = Field(description="The grid; at least two rates, ascending.")
    rounds: int = Field(2, ge=1, description="Rounds that each rate is tried for.")

    @field_validator("rates")
    @classmethod
    def _check_rates(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(rates) < 2 or any(rate <= 0 for rate in rates) or list(rates) != sorted(set(rates)):
            raise ValueError("expected at least two positive learning rates, ascending, each once")
        return rates


def build_method_config(value: Any) -> MethodConfig:
    """Validate a method's options with the class that its name picks.

    Raises:
        ValueError: No name, or no method of that name (pydantic's own error for wrong options).
    """
    if isinstance(value, MethodConfig):
        return value
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise ValueError(f"expected a mapping with a name, one of: {', '.join(METHODS.names())}")
    try:
        method = METHODS.get(value["name"])
    except MethodError as error:
        raise ValueError(f"{error.message}; {error.hint}") from None
    return method.config_class.model_validate(value)


class CompareConfig(_Frozen):
    """Several methods on the same footing: same clients, rounds, steps and seeds."""

    methods: dict[str, SerializeAsAny[MethodConfig]] = Field(description="Methods by the label they get in tables.")

    @field_validator("methods", mode="before")
    @classmethod
    def _build(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not value:
            raise ValueError("expected a mapping of labels to methods, at least one")
        return {label: build_method_config(method) for label, method in value.items()}

    @field_validator("methods")
    @classmethod
    def _check_labels(cls, methods: dict[str, MethodConfig]) -> dict[str, MethodConfig]:
        for label in methods:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.+-]{0,63}", label) or label in ("data", "search"):
                raise ValueError(
                    f"label {label!r} names a folder: expected letters, digits, spaces and -_.+, a letter or digit first, "
                    "and neither data nor search"
                )
        return methods


class OutputConfig(_Frozen):
    """Where runs and caches lie."""

    folder: Path = Field(Path("runs"), description="Folder of all runs; each gets a folder of its own in it.")
    cache: Path | None = Field(None, description="Cache of bases; null: the user's cache folder, of each node its own.")
    storage: str | None = Field(
        None,
        description="URI of a store that all nodes reach (s3://BUCKET/PATH, file:///PATH): runs are kept there, too, clients' "
        "states lie there, and nodes fetch base and data from it; null: all nodes see the same folders.",
    )
    report: bool = Field(True, description="Write report.html.")
    checkpoint_every: int = Field(1, ge=1, description="Rounds between checkpoints.")

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str | None) -> str | None:
        if storage is None:
            return None
        scheme, _, rest = storage.partition("://")
        if not is_uri(storage) or not rest.strip("/") or scheme not in known_schemes():
            near = (
                "file:///FOLDER is a folder that all nodes share" if not is_uri(storage) else "s3, gs and file are such schemes"
            )
            raise ValueError(f"{near}: expected a URI such as s3://BUCKET/PATH")
        return storage


class RunConfig(_Frozen):
    """Everything a run depends on. Exactly one of ``method`` and ``compare`` is given."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="First part of the run's folder name.")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="Run seeds; means and spreads are over them.")
    model: ModelConfig = Field(ModelConfig(), description="The base model.")
    data: DataConfig = Field(DataConfig(), description="Examples, clients, splits.")
    federation: FederationConfig = Field(FederationConfig(), description="Rounds and cohorts.")
    training: TrainingConfig = Field(TrainingConfig(), description="The local optimiser.")
    method: SerializeAsAny[MethodConfig] | None = Field(None, description="The one method of this run.")
    compare: CompareConfig | None = Field(None, description="Several methods, instead of one.")
    rate_search: RateSearchConfig | None = Field(None, description="Choose the learning rate on validation data.")
    evaluation: EvaluationConfig = Field(EvaluationConfig(), description="When and how models are judged.")
    engine: EngineConfig = Field(EngineConfig(), description="What trains.")
    executor: ExecutorConfig = Field(ExecutorConfig(), description="Who does the work.")
    tracking: TrackingConfig = Field(TrackingConfig(), description="MLflow.")
    output: OutputConfig = Field(OutputConfig(), description="Folders.")
    method_files: tuple[Path, ...] = Field((), description="Python files with methods of your own; they run as code.")

    @field_validator("method", mode="before")
    @classmethod
    def _build_method(cls, value: Any) -> Any:
        return None if value is None else build_method_config(value)

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError("expected different seeds, each 0 or more")
        return seeds

    @model_validator(mode="after")
    def _one_or_several_methods(self) -> Self:
        if (self.method is None) == (self.compare is None):
            raise ValueError("expected exactly one of method (one method) and compare (several)")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.rate_search is not None and "learning_rate" in self.training.model_fields_set:
            raise ValueError("training.learning_rate has no effect beside rate_search; remove one of the two")
        if self.federation.cohort_size is not None and self.federation.min_clients > self.federation.cohort_size:
            raise ValueError("federation.min_clients is larger than federation.cohort_size: no round could go on")
        silence = self.executor.heartbeat_timeout_s
        if silence is not None and silence >= self.federation.task_timeout_s:
            raise ValueError("executor.heartbeat_timeout_s has no effect: federation.task_timeout_s is not longer; lower it")
        used = [label for label, method in self.methods().items() if METHODS.get(method.name).budget_use != "none"]
        if self.federation.budgets is not None and not used:
            raise ValueError(
                f"federation.budgets has no effect: {', '.join(self.methods())} does not use budgets; remove it, or run a method "
                "that does (fedgraft methods)"
            )
        return self

    @model_validator(mode="after")
    def _engine_fits_the_rest(self) -> Self:
        engine = self.resolved_engine()
        if self.executor.kind == "in_process" and engine.world_size > 1:
            raise ValueError(
                f"engine.world_size is {engine.world_size}, and executor.kind: in_process is one process; set kind: ray"
            )
        if engine.device == "cpu" and self.executor.gpus:
            raise ValueError("executor.gpus_per_replica has no effect with engine.device: cpu; remove one of the two")
        gpus = self.executor.gpus
        if gpus and engine.world_size > 1 and gpus != engine.world_size:
            raise ValueError(
                f"executor.gpus_per_replica is {gpus:g} and engine.world_size is {engine.world_size}: each rank needs its own GPU"
            )
        if engine.name == "deepspeed":
            deepspeed_settings(
                engine,
                batch_size=self.federation.batch_size,
                dtype=self.model.dtype,
                max_grad_norm=self.training.max_grad_norm,
            )
        for label, method in self.methods().items():
            is_spread = engine.name == "deepspeed" and (engine.zero_stage == 3 or (engine.expert_parallel_size or 1) > 1)
            if is_spread and METHODS.build(method).needs_whole_model:  # options may decide
                raise ValueError(
                    f"{label} looks into MoE blocks while they run, which neither ZeRO stage 3 nor expert parallelism allow; "
                    "set engine.stage to 0, 1 or 2 and engine.expert_parallel_size to 1"
                )
            is_cut = engine.world_size > 1 or engine.gradient_accumulation_steps > 1 or engine.on_out_of_memory == "halve"
            if is_cut and METHODS.build(method).uses_batch_statistics:
                raise ValueError(
                    f"{label} uses statistics of whole batches: set engine.world_size and engine.gradient_accumulation_steps "
                    "to 1 and engine.on_out_of_memory to fail"
                )
        return self

    @model_validator(mode="after")
    def _methods_fit_the_rest(self) -> Self:
        federation = self.federation
        for label, method in self.methods().items():
            if self.training.optimizer == "sgd" and METHODS.get(method.name).is_centralised:
                raise ValueError(f"{label} trains with adamw only; set training.optimizer: adamw")
            built = METHODS.build(method)
            try:
                built.check_training(self.training.spec())
                built.check_run(rounds=federation.rounds, has_budgets=federation.budgets is not None)
            except ValueError as error:
                raise ValueError(f"{label}: {error}") from None
        return self

    def absolute(self) -> RunConfig:
        """The same configuration with absolute paths, so that it means the same from any folder."""

        def fix(part: Any, *names: str) -> Any:
            found = {name: getattr(part, name).resolve() for name in names if getattr(part, name) is not None}
            return part.model_copy(update=found)

        data = fix(self.data, "path").model_copy(
            update={"retention": fix(self.data.retention, "path"), "questions": fix(self.data.questions, "path")}
        )
        budgets = self.federation.budgets
        federation = (
            self.federation if budgets is None else self.federation.model_copy(update={"budgets": fix(budgets, "profile")})
        )
        return self.model_copy(
            update={
                "model": fix(self.model, "path"),
                "data": data,
                "federation": federation,
                "output": fix(self.output, "folder", "cache"),
                "method_files": tuple(path.resolve() for path in self.method_files),
            }
        )

    def resolved_engine(self) -> EngineConfig:
        """The engine with ``auto`` decided: a replica has a GPU if it is given one, or if one is named as its device."""
        in_process_gpu = self.executor.kind == "in_process" and self.engine.device == "auto" and torch.cuda.is_available()
        has_gpu = self.executor.gpus > 0 or self.engine.device == "cuda" or in_process_gpu
        return self.engine.resolved(has_gpu=has_gpu and self.engine.device != "cpu")

    def methods(self) -> dict[str, MethodConfig]:
        """The methods of this run by label; a single one is labelled by its name."""
        if self.compare is not None:
            return dict(self.compare.methods)
        assert self.method is not None
        return {self.method.name: self.method}
