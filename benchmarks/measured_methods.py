"""FedAvg and FedAlign-MoE as they are, and a note of each client's routing after its local steps; for phenomena_rounds.py."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedgraft.aggregation.fedalign_moe import FedAlignMoe, FedAlignMoeConfig
from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
from fedgraft.moe.regions import profile_experts
from fedgraft.protocols import Session
from fedgraft.registry import METHODS
from fedgraft.types import ClientUpdate, Params

__all__ = ["MeasuredFedAlignMoe", "MeasuredFedAvg"]

KIND = "marginals"  # under which phenomena_rounds.py finds the routing shares (L, E)


class MeasuredFedAvgConfig(FedAvgConfig):
    """Options of FedAvg."""

    name: Literal["measured_fedavg"] = "measured_fedavg"
    probe_examples: int = Field(64, ge=1, description="Examples on which a client's routing is measured.")


@METHODS.add
class MeasuredFedAvg(FedAvg):
    """FedAvg with a note of the routing."""

    name = "measured_fedavg"
    config_class = MeasuredFedAvgConfig
    config: MeasuredFedAvgConfig

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Measure the trained model's routing on the client's own examples."""
        batches = session.calibration_batches(self.config.probe_examples)
        session.diagnostics[KIND] = {"shares": profile_experts(session.engine.model, batches).marginals.tolist()}
        return super().reply(session, update)


class MeasuredFedAlignMoeConfig(FedAlignMoeConfig):
    """Options of FedAlign-MoE."""

    name: Literal["measured_fedalign_moe"] = "measured_fedalign_moe"  # type: ignore[assignment]


@METHODS.add
class MeasuredFedAlignMoe(FedAlignMoe):
    """FedAlign-MoE with a note of the routing."""

    name = "measured_fedalign_moe"
    config_class = MeasuredFedAlignMoeConfig
    config: MeasuredFedAlignMoeConfig

    def reply(self, session: Session, update: ClientUpdate) -> tuple[ClientUpdate, Params]:
        """Note what FedAlign-MoE measures in any case."""
        update, params = super().reply(session, update)
        session.diagnostics[KIND] = {"shares": update.statistics["marginals"].tolist()}
        return update, params
