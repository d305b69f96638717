"""A method of one's own: FedAvg in which a client with very many examples counts as one with ``max_examples``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from fedgraft.protocols import AdapterConfig, Method, MethodConfig, Weights
from fedgraft.registry import METHODS
from fedgraft.types import ClientUpdate, ModelFacts, ServerState, Slots


class CappedConfig(MethodConfig):
    """Options, checked when the configuration is read."""

    name: Literal["capped_fedavg"] = "capped_fedavg"
    adapter: AdapterConfig = Field(default=AdapterConfig(), description="The averaged LoRA on attention.")
    max_examples: int = Field(default=100, ge=1, description="Examples that a client counts with at most.")


@METHODS.add
class CappedFedAvg(Method):
    """Only the weights differ from FedAvg: w_i = min(n_i, max_examples)."""

    name = "capped_fedavg"
    title = "FedAvg with capped weights"
    paper = "none (example)"
    summary = "average attention LoRA; no client counts for more than max_examples examples"
    config_class = CappedConfig
    config: CappedConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """One LoRA on attention; it is shared, because every slot is unless a method says otherwise."""
        return Slots(adapters=(self.config.adapter.spec("shared", "attention"),))

    def weigh(self, state: ServerState, updates: Sequence[ClientUpdate]) -> Weights:
        """Cap the number of examples."""
        return Weights(default=tuple(float(min(update.num_examples, self.config.max_examples)) for update in updates))
