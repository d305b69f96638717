"""FedAvgM: FedAvg with momentum on the server.

Hsu, Qi, Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification", arXiv
1909.06335, Section 4.3: v = beta v + Delta w, w = w - v; with Delta = trained - initial, m = beta m + Delta and theta = theta
+ m. The option ``beta`` is the paper's beta; ``server_lr`` multiplies m (1 in the paper); beta = 0 with rate 1 is FedAvg.

A constant Delta moves the paper's form by Delta / (1 - beta) a round, ten times FedAvg's step at beta = 0.9. Public federated
LLM code averages instead, m = beta m + (1 - beta) Delta with m = Delta in the first round: that is ``form: average``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.aggregation.federated_optimizer import FederatedOptimizer, Optimized, OptimizerOptions
from fedgraft.aggregation.server_optimizers import Weighting, client_weights, momentum, server_step
from fedgraft.protocols import Reduced, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ClientUpdate, Federation, ServerState

__all__ = ["FedAvgM", "FedAvgMConfig", "FedAvgMOptimizer", "FedAvgMOptions"]


class FedAvgMOptions(OptimizerOptions):
    """Options of FedAvgM as an optimiser."""

    name: Literal["fedavgm"] = "fedavgm"
    server_lr: float = Field(1.0, gt=0, le=1000, description="The server adds this times the momentum.")
    beta: float = Field(0.9, ge=0, lt=1, description="Share of the old momentum; 0 is FedAvg.")
    form: Literal["sum", "average"] = Field(
        "sum",
        description="sum: m = beta m + Delta, the paper's; average: m = beta m + (1 - beta) Delta, that of public LLM code.",
    )
    weighting: Weighting = Field("examples", description="Weigh clients by training examples, or all alike.")

    @model_validator(mode="after")
    def _form_has_an_effect(self) -> Self:
        if self.form == "average" and self.beta == 0:
            raise ValueError("form: average has no effect with beta: 0; remove one of the two")
        return self

    def build(self) -> FedAvgMOptimizer:
        """Make the optimiser."""
        return FedAvgMOptimizer(self)


class FedAvgMOptimizer(FederatedOptimizer):
    """Keeps a momentum of the mean deltas.

    Args:
        options: As they are documented.
    """

    def __init__(self, options: FedAvgMOptions) -> None:
        self._options = options

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """By examples or alike."""
        return Weights(default=client_weights(self._options.weighting, updates))

    def aggregate(self, state: ServerState, reduced: Reduced, federation: Federation) -> ServerState:
        """Step along the momentum."""
        options = self._options
        return server_step(state, reduced.delta, momentum(options.server_lr, options.beta, form=options.form))


class FedAvgMConfig(FedAvgMOptions, PartsConfig):
    """Options of FedAvgM."""

    name: Literal["fedavgm"] = "fedavgm"


@METHODS.add
class FedAvgM(Optimized, FedAvg):
    """FedAvg with server momentum."""

    name = "fedavgm"
    title = "FedAvgM"
    paper = "Hsu, Qi, Brown 2019, arXiv 1909.06335"
    summary = "FedAvg with momentum on the server"
    advice = (
        "Helps where rounds pull in changing directions; over few rounds a large beta overshoots, so try form: average there."
    )
    reconstructed = "form: average, the variant of public federated LLM code"
    config_class = FedAvgMConfig
    config: FedAvgMConfig

    @property
    def optimizer(self) -> FederatedOptimizer:
        """FedAvgM's."""
        return self.config.build()
