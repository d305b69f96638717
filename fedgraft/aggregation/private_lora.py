"""FLEx without its graft, with a private LoRA in its place: the control that shows the graft's own share of a gain.

Not a published method but the comparison FLEx's reviewers asked for: attention LoRA is averaged as in FedAvg, and each client
keeps a second attention LoRA to itself, with as many parameters as the graft it replaces (arXiv 2506.00965, card's
"FedLoRA-only-attention + local LoRA").
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from fedgraft.aggregation.flex import num_grafted_layers
from fedgraft.moe.slots import count_slot_elements
from fedgraft.protocols import AdapterConfig, Method, MethodConfig
from fedgraft.registry import METHODS
from fedgraft.types import PRIVATE, SHARED, AdapterSpec, GraftSpec, Group, ModelFacts, ParamRef, Slots

__all__ = ["PrivateLora", "PrivateLoraConfig", "matched_rank"]


class PrivateLoraConfig(MethodConfig):
    """Options of the control. The private rank follows from the graft it replaces, unless it is given."""

    name: Literal["private_lora"] = "private_lora"
    adapter: AdapterConfig = Field(AdapterConfig(), description="The averaged LoRA on attention.")
    private_rank: int | None = Field(None, ge=1, description="Rank of the private LoRA; null: matched to a graft.")
    private_lr_scale: float = Field(1.0, gt=0, le=1000, description="The private LoRA's learning rate over the shared one's.")
    n_graft: int = Field(1, ge=1, le=8, description="Grafts to match: their number.")
    graft_layer_fraction: float = Field(1.0, gt=0, le=1, description="Grafts to match: share of MoE layers.")
    graft_neuron_fraction: float = Field(1.0, gt=0, le=1, description="Grafts to match: share of an expert's neurons.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        matched = {"n_graft", "graft_layer_fraction", "graft_neuron_fraction"} & self.model_fields_set
        if self.private_rank is not None and matched:
            raise ValueError(f"{', '.join(sorted(matched))} has no effect beside private_rank; remove one of the two")
        return self


def matched_rank(facts: ModelFacts, n_graft: int, layer_fraction: float, neuron_fraction: float) -> int:
    """Rank at which a LoRA on attention has the number of parameters nearest to a graft's, gates included; >= 1."""
    layers = facts.layers[: num_grafted_layers(layer_fraction, len(facts.layers))]
    neurons = max(1, round(neuron_fraction * facts.expert_size))
    graft = count_slot_elements(facts, Slots(graft=GraftSpec(num_grafts=n_graft, layers=layers, num_neurons=neurons)))
    unit = count_slot_elements(facts, Slots(adapters=(AdapterSpec(name="unit", rank=1, alpha=1.0),)))["attention"]
    return max(1, round((graft["graft"] + graft["graft_gate"]) / unit))


@METHODS.add
class PrivateLora(Method):
    """Two LoRAs on attention: one shared, one private."""

    name = "private_lora"
    title = "FedAvg + private LoRA"
    paper = "none (control for FLEx)"
    summary = "FLEx without its graft: averaged attention LoRA beside a private one of the same size as the graft"
    advice = (
        "Beside every personalised method, with ``private_rank`` such that the private parameters are as many: it tells "
        "whether a gain is the method's or that of having something private at all."
    )
    config_class = PrivateLoraConfig
    config: PrivateLoraConfig

    def slots(self, facts: ModelFacts) -> Slots:
        """The averaged LoRA and the private one; both scale their update by alpha / rank of the averaged one."""
        config = self.config
        rank = config.private_rank or matched_rank(
            facts, config.n_graft, config.graft_layer_fraction, config.graft_neuron_fraction
        )
        # The same scale for both: alpha / rank of the averaged LoRA, so that a larger rank is not a smaller step.
        private = AdapterSpec(
            name="personal",
            rank=rank,
            alpha=config.adapter.alpha * rank / config.adapter.rank,
            dropout=config.adapter.dropout,
        )
        return Slots(adapters=(config.adapter.spec("shared", "attention"), private))

    def group(self, ref: ParamRef) -> Group:
        """The LoRA called ``personal`` stays with the client."""
        return PRIVATE if ref.adapter == "personal" else SHARED

    def lr_scale(self, ref: ParamRef) -> float:
        """The private LoRA may have a rate of its own."""
        return self.config.private_lr_scale if ref.adapter == "personal" else 1.0
