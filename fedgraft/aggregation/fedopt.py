"""FedAdagrad, FedYogi, FedAdam: adaptive optimisers on the server.

Reddi, Charles, Zaheer, Garrett, Rush, Konecny, Kumar, McMahan 2021, "Adaptive Federated Optimization", arXiv 2003.00295,
Algorithm 2. With Delta the mean delta of the round: m = beta1 m + (1 - beta1) Delta; FedAdagrad v = v + Delta^2; FedYogi v =
v - (1 - beta2) Delta^2 sign(v - Delta^2); FedAdam v = beta2 v + (1 - beta2) Delta^2; theta = theta + eta m / (sqrt(v) + tau),
with v = tau^2 at first and no bias correction. Options: ``server_lr`` eta, ``tau``, ``beta1``, ``beta2``.

The mean is plain over clients, as in the paper (``weighting``). Public federated LLM code squares m in the place of Delta and
starts m with the first Delta: ``second_moment: momentum`` with ``momentum_start: delta``. The defaults eta = tau = 0.001,
beta1 = 0.9, beta2 = 0.99 (FedAdagrad: beta1 = 0) are that code's; the paper tunes eta and tau for every task. m starts at
zero here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.aggregation.federated_optimizer import FederatedOptimizer, Optimized, OptimizerOptions
from fedgraft.aggregation.server_optimizers import Rule, Weighting, adaptive, client_weights, server_step
from fedgraft.protocols import Reduced, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ClientUpdate, Federation, ServerState

__all__ = [
    "AdaptiveOptimizer",
    "AdaptiveOptions",
    "FedAdagrad",
    "FedAdagradConfig",
    "FedAdagradOptions",
    "FedAdam",
    "FedAdamConfig",
    "FedAdamOptions",
    "FedYogi",
    "FedYogiConfig",
    "FedYogiOptions",
]

_RECONSTRUCTED = "where m starts, second_moment: momentum (the variant of public federated LLM code), the default rates"


class AdaptiveOptions(OptimizerOptions):
    """What the three optimisers have in common."""

    server_lr: float = Field(1e-3, gt=0, le=1000, description="eta: the server adds eta m / (sqrt(v) + tau).")
    tau: float = Field(1e-3, gt=0, le=1000, description="Added to the root of v; v starts at its square.")
    beta1: float = Field(0.9, ge=0, lt=1, description="Share of the old momentum m.")
    second_moment: Literal["delta", "momentum"] = Field(
        "delta", description="What is squared for v: the round's mean delta, the paper's, or m, that of public LLM code."
    )
    momentum_start: Literal["zero", "delta"] = Field("zero", description="m before the first round: zero, or that round's delta.")
    weighting: Weighting = Field("clients", description="Weigh clients all alike, or by training examples.")

    @model_validator(mode="after")
    def _momentum_is_there(self) -> Self:
        idle = [f"second_moment: {self.second_moment}"] * (self.second_moment != "delta")
        idle += [f"momentum_start: {self.momentum_start}"] * (self.momentum_start != "zero")
        if self.beta1 == 0 and idle:
            raise ValueError(f"{' and '.join(idle)} has no effect with beta1: 0, where m is the delta itself; remove it")
        return self

    @abstractmethod
    def rule(self) -> Rule:
        """What the server does with one key."""

    def build(self) -> AdaptiveOptimizer:
        """Make the optimiser."""
        return AdaptiveOptimizer(self)

    def _rule(self, kind: Literal["adagrad", "yogi", "adam"], beta2: float) -> Rule:
        return adaptive(
            kind,
            rate=self.server_lr,
            tau=self.tau,
            beta1=self.beta1,
            beta2=beta2,
            second_moment=self.second_moment,
            momentum_start=self.momentum_start,
        )


class AdaptiveOptimizer(FederatedOptimizer):
    """Keeps first and second moments of the mean deltas.

    Args:
        options: As they are documented.
    """

    def __init__(self, options: AdaptiveOptions) -> None:
        self._options = options

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Alike or by examples."""
        return Weights(default=client_weights(self._options.weighting, updates))

    def aggregate(self, state: ServerState, reduced: Reduced, federation: Federation) -> ServerState:
        """Step as the rule says."""
        return server_step(state, reduced.delta, self._options.rule())


class FedAdagradOptions(AdaptiveOptions):
    """Options of FedAdagrad as an optimiser."""

    name: Literal["fedadagrad"] = "fedadagrad"
    beta1: float = Field(0.0, ge=0, lt=1, description="Share of the old momentum m; the paper's FedAdagrad has none.")

    def rule(self) -> Rule:
        """The sum of squares."""
        return self._rule("adagrad", 0.0)


class FedYogiOptions(AdaptiveOptions):
    """Options of FedYogi as an optimiser."""

    name: Literal["fedyogi"] = "fedyogi"
    beta2: float = Field(0.99, ge=0, lt=1, description="1 - beta2 is the step of v towards the newest square, by sign.")

    def rule(self) -> Rule:
        """Yogi's additive change of v."""
        return self._rule("yogi", self.beta2)


class FedAdamOptions(AdaptiveOptions):
    """Options of FedAdam as an optimiser."""

    name: Literal["fedadam"] = "fedadam"
    beta2: float = Field(0.99, ge=0, lt=1, description="Share of the old v.")

    def rule(self) -> Rule:
        """Adam's moving average of squares."""
        return self._rule("adam", self.beta2)


class FedAdagradConfig(FedAdagradOptions, PartsConfig):
    """Options of FedAdagrad."""

    name: Literal["fedadagrad"] = "fedadagrad"


class FedYogiConfig(FedYogiOptions, PartsConfig):
    """Options of FedYogi."""

    name: Literal["fedyogi"] = "fedyogi"


class FedAdamConfig(FedAdamOptions, PartsConfig):
    """Options of FedAdam."""

    name: Literal["fedadam"] = "fedadam"


class _FedOpt(Optimized, FedAvg):
    """What the three methods have in common: FedAvg's slots."""

    paper = "Reddi et al. 2021, arXiv 2003.00295"
    advice = "Worth a try where FedAvg is unsteady or coordinates differ in scale; server_lr and tau need tuning for every task."
    reconstructed = _RECONSTRUCTED

    @property
    def optimizer(self) -> FederatedOptimizer:
        """The adaptive one that the config names."""
        assert isinstance(self.config, AdaptiveOptions)
        return self.config.build()


@METHODS.add
class FedAdagrad(_FedOpt):
    """FedAvg with Adagrad on the server."""

    name = "fedadagrad"
    title = "FedAdagrad"
    summary = "FedAvg with Adagrad on the server"
    config_class = FedAdagradConfig


@METHODS.add
class FedYogi(_FedOpt):
    """FedAvg with Yogi on the server."""

    name = "fedyogi"
    title = "FedYogi"
    summary = "FedAvg with Yogi on the server"
    config_class = FedYogiConfig


@METHODS.add
class FedAdam(_FedOpt):
    """FedAvg with Adam on the server."""

    name = "fedadam"
    title = "FedAdam"
    summary = "FedAvg with Adam on the server"
    config_class = FedAdamConfig
