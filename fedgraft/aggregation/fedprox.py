"""FedProx: FedAvg with a proximal term that holds clients near the global model.

Li, Sahu, Zaheer, Sanjabi, Talwalkar, Smith 2020, "Federated Optimization in Heterogeneous Networks", arXiv 1812.06127, Eq. 2:
client i minimises F_i(theta) + (mu / 2) ||theta - theta_t||^2. The option ``mu`` is the paper's mu; mu = 0 is FedAvg. theta
is what the client received from the server: private tensors of a method that has some are left free.

Ours: the default mu = 0.01 (that of public federated LLM code; the paper tunes it), clients weighted by examples (the paper
samples them with that probability and averages plainly), all clients take the same number of local steps (the paper lets slow
ones take fewer).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.aggregation.federated_optimizer import FederatedOptimizer, Optimized, OptimizerOptions
from fedgraft.errors import MethodError
from fedgraft.protocols import Session
from fedgraft.registry import METHODS
from fedgraft.types import ParamRef

__all__ = ["FedProx", "FedProxConfig", "FedProxOptimizer", "FedProxOptions"]

_ANCHORS = "fedprox/anchors"


class FedProxOptions(OptimizerOptions):
    """Options of FedProx as an optimiser."""

    name: Literal["fedprox"] = "fedprox"
    mu: float = Field(0.01, ge=0, le=1e6, description="Weight of the proximal term (mu / 2) ||theta - theta_t||^2; 0 is FedAvg.")

    def build(self) -> FedProxOptimizer:
        """Make the optimiser."""
        return FedProxOptimizer(self.mu)


class FedProxOptimizer(FederatedOptimizer):
    """Adds the proximal term to the local loss.

    Args:
        mu: Its weight, >= 0.
    """

    def __init__(self, mu: float) -> None:
        self._mu = mu

    def terms(self, session: Session) -> Mapping[str, torch.Tensor]:
        """``mu / 2`` times the squared distance from what was received, as the model holds it.

        Raises:
            MethodError: The engine keeps only a part of a weight on this rank.
        """
        if self._mu == 0 or not session.received:
            return {}
        parameters = dict(session.engine.model.named_parameters())
        if _ANCHORS not in session.scratch:
            session.scratch[_ANCHORS] = _anchors(session, parameters)
        anchors: list[tuple[ParamRef, torch.Tensor]] = session.scratch[_ANCHORS]
        squares = [_wide(ref.view(parameters[ref.name]) - anchor).square().sum() for ref, anchor in anchors]
        return {"proximal": self._mu / 2 * torch.stack(squares).sum()}


def _anchors(session: Session, parameters: Mapping[str, torch.Tensor]) -> list[tuple[ParamRef, torch.Tensor]]:
    """What each received slot holds before the first step, in the model's own dtype: there the distance starts at exactly 0."""
    refs = [ref for ref in session.engine.refs if ref.key in session.received]
    sharded = [ref.key for ref in refs if tuple(ref.view(parameters[ref.name]).shape) != ref.shape]
    if sharded:
        raise MethodError(
            f"fedprox measures distances of whole weights, and this engine spreads {', '.join(sharded[:3])} over ranks",
            "set engine.stage to 0, 1 or 2 and engine.expert_parallel_size to null",
        )
    values = session.engine.read([ref.key for ref in refs])
    return [(ref, values[ref.key].to(parameters[ref.name])) for ref in refs]


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


class FedProxConfig(FedProxOptions, PartsConfig):
    """Options of FedProx."""

    name: Literal["fedprox"] = "fedprox"


@METHODS.add
class FedProx(Optimized, FedAvg):
    """FedAvg with a proximal term."""

    name = "fedprox"
    title = "FedProx"
    paper = "Li et al. 2020, arXiv 1812.06127"
    summary = "FedAvg whose clients are held near the global model by a proximal term"
    advice = "A cheap guard where clients differ and take many local steps; nothing more is sent than in FedAvg."
    reconstructed = "the default mu, weights by examples, the same number of local steps for all clients"
    config_class = FedProxConfig
    config: FedProxConfig
    needs_whole_model = True

    @property
    def optimizer(self) -> FederatedOptimizer:
        """FedProx's."""
        return self.config.build()
