"""From bytes and FLOPs to experts: how many routed experts a layer a client's budget allows, by the sizes of model and method.

Both resources are taken as linear in the number of experts e that a client holds (or trains) in each of the L MoE layers,

    memory(e) = fixed + e * (bytes of one expert in every layer),    FLOPs(e) = fixed + e * (FLOPs of one expert in every layer),

and e is the largest whole number that keeps to every limit that is set. Memory counts weights in the base's format, float32
LoRA, gradients, and AdamW's two moments; activations, caches and the process are not in it (``fedgraft.platform.memory`` counts
those of a replica). FLOPs are those of a round of local training, as the plan counts them; an expert costs what the tokens cost
that even routing over all E experts would send to it, top-k / E of them. Where a method holds all experts and
only trains fewer in a step, weights and passes of all are in the fixed part, and so are the moments of all: an expert that was
active in one step keeps its moments in the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from fedgraft.data.config import DataConfig
from fedgraft.data.corpus import CLIENT_DOMAINS, generate
from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.budgets import BudgetsConfig, draw_budgets
from fedgraft.platform.config import RunConfig
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes, read_hf_config, size_model, size_slots
from fedgraft.platform.progress import bytes_text
from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS
from fedgraft.types import Budget, ModelFacts

__all__ = [
    "BudgetCost",
    "BudgetUse",
    "client_budgets",
    "cost_of",
    "flops_per_token",
    "resolve_budget",
    "run_budgets",
    "tokens_per_example",
]

BudgetUse = Literal["none", "holds", "trains"]
_WIDE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BudgetCost:
    """What a client needs without any routed expert, and for one expert in every MoE layer: bytes, and FLOPs of a round."""

    fixed_bytes: int
    expert_bytes: int
    fixed_flops: float
    expert_flops: float

    def bytes_of(self, experts: int) -> int:
        """Bytes with so many experts in every layer."""
        return self.fixed_bytes + experts * self.expert_bytes

    def flops_of(self, experts: int) -> float:
        """FLOPs of a round with so many experts in every layer."""
        return self.fixed_flops + experts * self.expert_flops


def flops_per_token(active: int, trained: int, *, own: int = 0, is_training: bool) -> int:
    """Count a token's FLOPs: 2 active forward; training adds 2 active for activations' gradients and 6 trained for slots.

    A frozen weight costs 2 forward and 2 backward (it passes the gradient on, but needs none itself); a trained value costs
    2 forward, 2 backward and 2 for its own gradient. ``trained`` counts the values that a token passes through; ``own`` of them
    are weights of the model itself, trained in full, which ``active`` counts as well.
    """
    frozen = active - own
    return 4 * frozen + 6 * trained if is_training else 2 * (frozen + trained)


def tokens_per_example(data: DataConfig) -> int:
    """Tokens of an example: of the bundled corpus from a sample, four characters a token and 8 for the chat template; else
    the longest allowed.
    """
    if not data.is_bundled:
        return data.max_length
    texts = [len(each.prompt) + len(each.response) for name in CLIENT_DOMAINS for each in generate(name, "test", 16, 0)]
    return min(data.max_length, 8 + round(sum(texts) / len(texts) / 4))


def cost_of(model: ModelPlan, slots: SlotSizes, *, num_moments: int, tokens: int, use: BudgetUse) -> BudgetCost:
    """Work out what experts cost a client.

    Args:
        model: The base.
        slots: The method's.
        num_moments: Tensors that the optimiser keeps beside each trained one: 2 for AdamW, 0 for SGD without momentum.
        tokens: Of a round of local training: steps x examples x tokens of an example.
        use: ``trains``: a client holds all experts and moments of all, and some have a gradient in a step; else it holds some.
    """
    facts = model.facts
    routed = facts.num_routed_values
    kept = model.itemsize * routed + _WIDE * slots.expert_lora  # what holding all experts takes
    gradient = _WIDE * slots.expert_wide + model.itemsize * slots.expert_full
    total = model.weight_bytes + _WIDE * (slots.lora + slots.graft)
    total += (1 + num_moments) * (_WIDE * slots.trained_wide + model.itemsize * slots.trained_full)
    bounded = gradient if use == "trains" else kept + (1 + num_moments) * gradient

    active, trained = routed * facts.top_k / facts.num_experts, slots.expert_wide + slots.expert_full
    share = facts.top_k / facts.num_experts
    # Who holds all experts saves an expert's own gradient alone: tokens pass through it, and back, all the same.
    per_token = 2 * trained * share if use == "trains" else 4 * (active - slots.expert_full * share) + 6 * trained * share
    flops = tokens * per_token
    whole = tokens * flops_per_token(model.active_parameters, slots.active, own=slots.active_own, is_training=True)
    return BudgetCost(
        fixed_bytes=total - bounded,
        expert_bytes=bounded // facts.num_experts,
        fixed_flops=whole - flops,
        expert_flops=flops / facts.num_experts,
    )


def resolve_budget(budget: Budget, cost: BudgetCost | None, num_experts: int) -> Budget:
    """Fill in ``experts_per_layer``: the most experts a layer that keep to every limit of the budget.

    Args:
        budget: Limits that are set; without any it holds all experts.
        cost: What experts cost; needed where bytes or FLOPs are set.
        num_experts: Experts of a layer, the most there can be.

    Returns:
        The budget with a number from below 0 (not even the rest of the model fits) to ``num_experts``.
    """
    limits = [num_experts if budget.experts_per_layer is None else budget.experts_per_layer]
    for limit, fixed, each in (
        (budget.memory_bytes, cost.fixed_bytes if cost else 0, cost.expert_bytes if cost else 0),
        (budget.flops, cost.fixed_flops if cost else 0.0, cost.expert_flops if cost else 0.0),
    ):
        if limit is None:
            continue
        assert cost is not None
        if each > 0:
            limits.append(math.floor((limit - fixed) / each))
        elif limit < fixed:
            limits.append(-1)
    return replace(budget, experts_per_layer=min(limits))


def client_budgets(
    config: BudgetsConfig,
    facts: ModelFacts,
    *,
    use: BudgetUse,
    cost: BudgetCost | None,
    run_seed: int,
    num_clients: int,
    label: str,
    source: str,
) -> tuple[Budget, ...]:
    """Give each client its budget, with experts worked out; as it is drawn for a method that does not use budgets.

    Raises:
        ConfigError: A client could hold fewer than top-k experts a layer, or is given more than there are.
        DataError: The profile cannot be read.
    """
    drawn = draw_budgets(config.choices(facts.num_experts), run_seed, num_clients)
    if use == "none":
        return drawn
    resolved = tuple(resolve_budget(budget, cost, facts.num_experts) for budget in drawn)
    for client, budget in enumerate(resolved):
        count = budget.experts_per_layer or 0
        if count < facts.top_k or count > facts.num_experts:
            raise ConfigError(source, (_problem(client, drawn[client], count, cost, facts, label),))
    return resolved


def run_budgets(
    config: RunConfig,
    method: MethodConfig,
    *,
    seed: int,
    num_clients: int,
    label: str,
    source: str,
    sizes: tuple[ModelPlan, SlotSizes] | None = None,
) -> tuple[Budget, ...]:
    """Give the budgets of one run of a configuration; none where it sets none.

    Args:
        config: The run's.
        method: Whose run.
        seed: The run's seed.
        num_clients: Size of the population.
        label: The method's label, for errors.
        source: The configuration's file, for errors.
        sizes: Of model and slots, where they are known already.

    Raises:
        ConfigError: As ``client_budgets``.
        DataError: The profile cannot be read.
    """
    budgets = config.federation.budgets
    if budgets is None:
        return ()
    built: Method = METHODS.build(method)
    hf_config = None if sizes is not None else read_hf_config(config.model)
    model = sizes[0] if sizes is not None else size_model(config.model, hf_config)
    cost = None
    if budgets.needs_sizes and built.budget_use != "none":
        slots = sizes[1] if sizes is not None else size_slots(built, hf_config, config.model.dtype, model.facts)
        federation = config.federation
        cost = cost_of(
            model,
            slots,
            num_moments=2 if config.training.optimizer == "adamw" else 0,
            tokens=federation.local_steps * federation.batch_size * tokens_per_example(config.data),
            use=built.budget_use,
        )
    return client_budgets(
        budgets,
        model.facts,
        use=built.budget_use,
        cost=cost,
        run_seed=seed,
        num_clients=num_clients,
        label=label,
        source=source,
    )


def _problem(client: int, drawn: Budget, count: int, cost: BudgetCost | None, facts: ModelFacts, label: str) -> Problem:
    if drawn.experts_per_layer is not None:
        value = f"{drawn.experts_per_layer} experts a layer for client {client}"
        return Problem(
            path="federation.budgets",
            value=value,
            expected=f"{facts.top_k} (experts of a token) to {facts.num_experts} (experts of a layer)",
        )
    assert cost is not None
    stated, needed = [], []
    if drawn.memory_bytes is not None:
        stated.append(bytes_text(drawn.memory_bytes))
        needed.append(bytes_text(cost.bytes_of(facts.top_k)))
    if drawn.flops is not None:
        stated.append(f"{drawn.flops:.3g} FLOPs a round")
        needed.append(f"{cost.flops_of(facts.top_k):.3g} FLOPs a round")
    room = f"room for {count} experts a layer" if count > 0 else "no room for any expert"
    return Problem(
        path="federation.budgets",
        value=f"{' and '.join(stated)} for client {client}: {room}",
        expected=f"at least {' and '.join(needed)}, what {label} needs with {facts.top_k} experts a layer",
        hint="raise the smallest budget, or take a smaller model, fewer slots or fewer local steps",
    )
