"""Local only: every client trains alone; nothing is ever sent. The reference that federation must beat."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from fedgraft.aggregation.fedavg import Part
from fedgraft.protocols import AdapterConfig, Method, MethodConfig
from fedgraft.registry import METHODS
from fedgraft.types import PRIVATE, Group, ModelFacts, ParamRef, Slots

__all__ = ["LocalOnly", "LocalOnlyConfig"]


class LocalOnlyConfig(MethodConfig):
    """Options of local training."""

    name: Literal["local_only"] = "local_only"
    adapter: AdapterConfig = Field(AdapterConfig(), description="The client's own LoRA.")
    lora: tuple[Part, ...] = Field(("attention",), min_length=1, description="Parts trained as LoRA.")


@METHODS.add
class LocalOnly(Method):
    """FedAvg's LoRA, every tensor of it private."""

    name = "local_only"
    title = "Local only"
    paper = "none (reference)"
    summary = "every client trains a LoRA of its own and sends nothing"
    advice = "As the reference that federation must beat: each client by itself."
    config_class = LocalOnlyConfig
    config: LocalOnlyConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """One LoRA, as FedAvg's."""
        return Slots(adapters=(self.config.adapter.spec("personal", *self.config.lora),))

    def group(self, ref: ParamRef) -> Group:
        """Everything is private."""
        return PRIVATE
