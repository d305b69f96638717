"""The configuration of a sweep: a base, a space over its key paths, how points are found and judged, what a trial may take."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from fedgraft.platform.results import QUANTITIES
from fedgraft.tuning.space import Dimension

__all__ = ["METRICS", "SPLIT_METRICS", "ResourcesConfig", "SweepConfig"]

METRICS = ("personal_nll", "worst_client_nll", "client_spread_nll", "token_accuracy", "retention_nll", "choice_accuracy")
"""What a sweep may go by: quantities of ``fedgraft.platform.results`` that need no decoding."""

SPLIT_METRICS = METRICS[:4]
"""Those that are taken on the clients' validation examples, so that choosing by them never looks at a test example."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GridSearch(_Frozen):
    """Every combination."""

    name: Literal["grid"] = "grid"


class RandomSearch(_Frozen):
    """Draws; what the space calls a grid is crossed with each of them."""

    name: Literal["random"] = "random"
    num_points: int = Field(ge=1, le=100_000, description="Draws.")
    seed: int = Field(0, ge=0, description="Decides about the draws.")


class OptunaSearch(_Frozen):
    """Points that Optuna proposes from the scores so far; needs the package optuna."""

    name: Literal["optuna"] = "optuna"
    num_points: int = Field(ge=1, le=100_000, description="Points, those that turn out to be invalid included.")
    seed: int = Field(0, ge=0, description="Of the sampler. With several trials at once what comes first decides, too.")


class NoScheduler(_Frozen):
    """Every trial runs to its end."""

    name: Literal["none"] = "none"

    def rungs(self, rounds: int) -> tuple[int, ...]:
        """Rounds after which a trial is judged; the last one always is."""
        return (rounds,)


class AshaScheduler(_Frozen):
    """Asynchronous successive halving: at each rung only the best 1/reduction of what came there so far go on."""

    name: Literal["asha"] = "asha"
    min_rounds: int = Field(1, ge=1, description="Rounds to the first rung.")
    reduction: int = Field(3, ge=2, le=64, description="Each rung is so many times as far as the one before.")

    def rungs(self, rounds: int) -> tuple[int, ...]:
        """Rounds after which a trial is judged; the last one always is."""
        found = []
        at = self.min_rounds
        while at < rounds:
            found.append(at)
            at *= self.reduction
        return (*found, rounds)


class MedianScheduler(_Frozen):
    """Stops a trial whose best score so far is worse than the median of the others' running means."""

    name: Literal["median"] = "median"
    min_rounds: int = Field(1, ge=1, description="Rounds to the first rung.")
    every: int = Field(1, ge=1, description="Rounds from one rung to the next.")
    min_points: int = Field(3, ge=1, description="Other points that must have come as far before any is stopped.")

    def rungs(self, rounds: int) -> tuple[int, ...]:
        """Rounds after which a trial is judged; the last one always is."""
        return (*range(self.min_rounds, rounds, self.every), rounds)


class ResourcesConfig(_Frozen):
    """What trials may take. A trial's cores and its replicas' GPUs follow from its own executor and engine."""

    concurrency: int | None = Field(None, ge=1, description="Most trials at a time; null: as many as there is room for.")
    gpus_per_trial: float = Field(
        0.0, ge=0, description="GPUs of a trial that trains in its own process (executor.kind: in_process); may be a fraction."
    )
    address: str | None = Field(
        None, description="Ray cluster to join; null: that of base.executor.address, RAY_ADDRESS, else one of its own."
    )
    max_restarts: int = Field(1, ge=0, description="How often a trial whose process died is started again, where it was.")


def _by_name(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


SearchConfig: TypeAlias = Annotated[
    Annotated[GridSearch | RandomSearch | OptunaSearch, Field(discriminator="name")], BeforeValidator(_by_name)
]
SchedulerConfig: TypeAlias = Annotated[
    Annotated[NoScheduler | AshaScheduler | MedianScheduler, Field(discriminator="name")], BeforeValidator(_by_name)
]


class SweepConfig(_Frozen):
    """A sweep. ``base`` is the tree of a run's configuration, as it was written; a trial is that with a point's values in it."""

    name: str = Field("sweep", pattern=r"^[A-Za-z0-9_.-]{1,64}$", description="First part of the sweep's folder name.")
    base: dict[str, Any] = Field(description="Configuration of a run, or (in a file) the file that holds it.")
    space: dict[str, Dimension] = Field(min_length=1, description="Values by key path of the base.")
    seeds: tuple[int, ...] | None = Field(
        None, min_length=1, description="Run seeds of every point, whose mean is the score; null: those of the base."
    )
    search: SearchConfig = Field(GridSearch(), description="How points are found.")
    scheduler: SchedulerConfig = Field(NoScheduler(), description="Which trials are stopped early.")
    metric: Literal[METRICS] = Field("personal_nll", description="What points are judged by.")  # type: ignore[valid-type]
    resources: ResourcesConfig = Field(ResourcesConfig(), description="What trials may take.")

    @field_validator("seeds")
    @classmethod
    def _check_seeds(cls, seeds: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if seeds is not None and (len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds)):
            raise ValueError("expected different seeds, each 0 or more")
        return seeds

    @property
    def mode(self) -> Literal["min", "max"]:
        """Whether less or more of the metric is better."""
        quantity = next(each for each in QUANTITIES if each.name == self.metric)
        return "min" if quantity.is_lower_better else "max"

    @property
    def split(self) -> Literal["validation", "test"]:
        """The client examples that the metric is taken on."""
        return "validation" if self.metric in SPLIT_METRICS else "test"
