"""FedAvg: the weighted mean of what the clients trained.

McMahan, Moore, Ramage, Hampson, Aguera y Arcas 2017, "Communication-Efficient Learning of Deep Networks from Decentralized
Data", Algorithm 1: theta_{t+1} = sum_i (n_i / n) theta_i, here as theta_t + sum_i (n_i / n) (theta_i - theta_t) with n_i the
client's number of training examples. With LoRA on attention this is what federated LLM work calls FedIT.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedgraft.protocols import AdapterConfig, Method, MethodConfig
from fedgraft.registry import METHODS
from fedgraft.types import ModelFacts, Slots

__all__ = ["FedAvg", "FedAvgConfig", "Part", "PartsConfig"]

Part = Literal["attention", "router", "experts"]


class PartsConfig(MethodConfig):
    """Which parts of a model are trained, and how."""

    adapter: AdapterConfig = Field(AdapterConfig(), description="LoRA of the parts in lora.")
    lora: tuple[Part, ...] = Field(("attention",), description="Parts trained and averaged as LoRA.")
    full: tuple[Part, ...] = Field((), description="Parts whose own weights are trained and averaged.")

    @model_validator(mode="after")
    def _parts_make_sense(self) -> Self:
        both = sorted(set(self.lora) & set(self.full))
        if both:
            raise ValueError(f"{', '.join(both)} is in both lora and full; train a part one way")
        if not self.lora and not self.full:
            raise ValueError("lora and full are both empty: nothing would be trained")
        if not self.lora and "adapter" in self.model_fields_set:
            raise ValueError("adapter has no effect where lora is empty")
        return self


class FedAvgConfig(PartsConfig):
    """Options of FedAvg."""

    name: Literal["fedavg"] = "fedavg"


@METHODS.add
class FedAvg(Method):
    """Every slot is shared, or assigned to its expert; the server adds the mean delta."""

    name = "fedavg"
    title = "FedAvg"
    paper = "McMahan et al. 2017, arXiv 1602.05629"
    summary = "average what all clients trained: LoRA on attention, or also on router and experts, or full weights"
    advice = (
        "As the first thing to compare with. Choose the same parts (``lora``, ``full``) as the method you compare, so "
        "that only the method differs."
    )
    config_class: ClassVar[type[MethodConfig]] = FedAvgConfig
    config: PartsConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """One LoRA over the parts in ``lora``; the parts in ``full`` themselves."""
        adapters = (self.config.adapter.spec("shared", *self.config.lora),) if self.config.lora else ()
        return Slots(adapters=adapters, full=self.config.full)
