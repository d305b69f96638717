"""A method that keeps to budgets: every round each client holds as many random experts of each layer as it may."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Literal

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.types import Assignment, RoundPlan, ServerState


class RandomExpertsConfig(PartsConfig):
    """Options: those of FedAvg."""

    name: Literal["random_experts"] = "random_experts"


@METHODS.add
class RandomExperts(FedAvg):
    """FedAvg on random parts of the model; each expert is averaged over the clients that held it."""

    name = "random_experts"
    title = "FedAvg on random experts"
    paper = "none (example)"
    summary = "each client holds, trains and sends random experts, as many as its budget allows"
    config_class = RandomExpertsConfig
    budget_use = "holds"

    def assign(self, state: ServerState, plan: RoundPlan, cohort: tuple[int, ...]) -> Mapping[int, Assignment]:
        """Draw each client's experts, by seed, round and client; without a budget it holds all."""
        facts = self.federation.facts
        chosen: dict[int, Assignment] = {}
        for client in cohort:
            budget = self.federation.budget(client)
            if budget is None or budget.experts_per_layer is None:
                continue
            seed = derive_seed(self.federation.run_seed, "random_experts", round_idx=plan.round_idx, client_id=client)
            draw = random.Random(seed)
            experts = range(facts.num_experts)
            chosen[client] = {layer: tuple(sorted(draw.sample(experts, budget.experts_per_layer))) for layer in facts.layers}
        return chosen
