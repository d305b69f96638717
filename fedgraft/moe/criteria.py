"""Criteria for experts, by name: what to graft, keep, train or merge, all derived from one observer pass.

Each is computed from ``LayerStatistics``: a client's own, or the sum over clients. ``CRITERIA_BY_NAME`` says what each needs and
whether it is additive over clients, so that sums are enough for a choice for all of them. An importance is highest for the expert
that matters most; a similarity is highest for the pair that is most alike; a control is what results must be held against.

Sources: ``frequency`` and ``gate`` ESFT (Wang et al. 2024, arXiv 2407.01906), ``ean`` and ``reap`` (Lasby et al. 2025, arXiv
2510.13999), ``easy_ep`` (Dong et al. 2025, arXiv 2504.06792), ``wanda`` MoE-Pruner (Xie et al. 2024, arXiv 2410.12013),
``max_activation`` super experts (Su et al. 2025, arXiv 2507.23279), ``hc`` HC-SMoE (Chen et al. 2024, arXiv 2410.08589),
``router_logit`` M-SMoE (Li et al. 2023, arXiv 2310.01334), the reconstruction losses ``fedgraft.moe.scoring``.

Observed scores often fail to foretell what removing an expert does: hold them against ``random`` with several seeds and, on a
small model, against ``ablation``, by layer.

Shape letters: D model, F expert hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import torch
from torch import nn

from fedgraft.moe.expert_statistics import LayerStatistics
from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.scoring import CRITERIA, Criterion
from fedgraft.moe.surgery import mask_experts

__all__ = [
    "CRITERIA_BY_NAME",
    "Importance",
    "ScoreCriterion",
    "ablation_changes",
    "importance",
    "random_importance",
    "similarity",
    "wanda_scores",
]

Importance: TypeAlias = Literal["frequency", "gate", "ean", "reap", "easy_ep", "wanda", "max_activation"]
"""Importances beside the reconstruction losses and ``usage``, which ``fedgraft.moe.scoring.Criterion`` names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreCriterion:
    """One criterion: its formula in words, what it needs of a pass, and whether sums over clients are enough for it."""

    name: str
    text: str
    kind: Literal["importance", "similarity", "control"]
    needs: Literal["routing", "routed outputs", "all outputs", "a pass an expert", "nothing"]
    is_additive: bool


_ALL: tuple[ScoreCriterion, ...] = (
    *(
        ScoreCriterion(
            name=name,
            text=text.removeprefix("minus ") if text.startswith("minus ") else f"minus {text}",
            kind="importance",
            needs="routing" if name == "usage" else "all outputs",
            is_additive=True,
        )
        for name, text in CRITERIA.items()
    ),
    ScoreCriterion(
        name="frequency",
        text="tokens sent to e over top-k times all tokens (ESFT-Token)",
        kind="importance",
        needs="routing",
        is_additive=True,
    ),
    ScoreCriterion(
        name="gate",
        text="sum of g over all tokens (ESFT-Gate), g = 0 where e is not chosen",
        kind="importance",
        needs="routing",
        is_additive=True,
    ),
    ScoreCriterion(
        name="ean",
        text="sum of ||f|| over the tokens sent to e (expert activation norm)",
        kind="importance",
        needs="routed outputs",
        is_additive=True,
    ),
    ScoreCriterion(
        name="reap",
        text="mean of g ||f|| over the tokens sent to e",
        kind="importance",
        needs="routed outputs",
        is_additive=True,
    ),
    ScoreCriterion(
        name="easy_ep",
        text="sum of g ||f|| (1 - cos(h, h + z)), h the residual stream before the block, z what the block adds",
        kind="importance",
        needs="routed outputs",
        is_additive=True,
    ),
    ScoreCriterion(
        name="wanda",
        text="sum over all weights of e of |W_ij| times the norm of the gated input j",
        kind="importance",
        needs="routed outputs",
        is_additive=True,
    ),
    ScoreCriterion(
        name="max_activation",
        text="largest |f| over the tokens sent to e; stands out in super experts; the maximum over clients",
        kind="importance",
        needs="routed outputs",
        is_additive=False,
    ),
    ScoreCriterion(
        name="hc",
        text="minus the distance of the experts' mean outputs on all tokens",
        kind="similarity",
        needs="all outputs",
        is_additive=True,
    ),
    ScoreCriterion(
        name="router_logit",
        text="cosine of the experts' router logits over all tokens",
        kind="similarity",
        needs="routing",
        is_additive=True,
    ),
    ScoreCriterion(name="random", text="uniform in [0, 1) by a seed", kind="control", needs="nothing", is_additive=False),
    ScoreCriterion(
        name="ablation",
        text="how much the loss grows without e",
        kind="control",
        needs="a pass an expert",
        is_additive=False,
    ),
)

CRITERIA_BY_NAME: Mapping[str, ScoreCriterion] = MappingProxyType({each.name: each for each in _ALL})
"""Every criterion."""


def importance(name: Criterion | Importance, found: LayerStatistics, layer: MoELayer | None = None) -> torch.Tensor:
    """Give each expert's importance, (E,) float64; the highest matters most, an expert that got no token least or 0.

    Args:
        name: One of the importances.
        found: Statistics of a client, or summed over clients.
        layer: The layer itself, for ``wanda``, which looks at weights.

    Raises:
        ValueError: The name is no importance, or ``wanda`` was given no layer.
    """
    if name in CRITERIA:
        return -found.scores.criterion(name)
    if name not in get_args(Importance):
        known = ", ".join(each.name for each in CRITERIA_BY_NAME.values() if each.kind == "importance")
        raise ValueError(f"no importance is called {name!r}; known: {known}")
    if name == "wanda":
        if layer is None:
            raise ValueError("wanda looks at the experts' weights: give the layer")
        return torch.stack([_sum(wanda_scores(layer, e, found)) for e in range(found.gate.numel())])
    counts = found.scores.tokens
    by_name = {
        "frequency": counts / max(found.top_k * found.num_tokens, 1),
        "gate": found.gate,
        "ean": found.norm,
        "reap": found.gated_norm / counts.clamp_min(1),
        "easy_ep": found.changed_norm,
        "max_activation": found.max_abs,
    }
    value: torch.Tensor = by_name[name].clone()
    return value


def similarity(name: Literal["hc", "router_logit"], found: LayerStatistics) -> torch.Tensor:
    """Give how alike each two experts are, (E, E) float64, symmetric; the highest value is on the diagonal.

    Raises:
        ValueError: The name is no similarity.
    """
    if name == "hc":
        mean_ED = found.output / max(found.num_tokens, 1)
        distance_EE: torch.Tensor = torch.linalg.vector_norm(mean_ED[:, None] - mean_ED[None], dim=-1)
        return -distance_EE
    if name == "router_logit":
        size_E = found.logit_gram.diagonal().clamp_min(0).sqrt()
        return found.logit_gram / (size_E[:, None] * size_E[None]).clamp_min(1e-300)
    raise ValueError(f"no similarity is called {name!r}; known: hc, router_logit")


def wanda_scores(layer: MoELayer, expert: int, found: LayerStatistics) -> tuple[torch.Tensor, torch.Tensor]:
    """Score every weight of an expert, |W_ij| ||x_j g||: ``gate_up`` (2F, D), gate rows first, and ``down`` (D, F), float64."""
    gate_up, down = layer.expert_weights(expert)
    inner, outer = found.input_square[expert].sqrt(), found.hidden_square[expert].sqrt()
    return gate_up.detach().double().cpu().abs() * inner, down.detach().double().cpu().abs() * outer


def _sum(scores: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = scores[0].sum() + scores[1].sum()
    return total


def random_importance(num_experts: int, seed: int) -> torch.Tensor:
    """Uniform in [0, 1), (E,) float64: the control that every criterion must beat."""
    return torch.rand(num_experts, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ablation_changes(model: nn.Module, judge: Callable[[], float]) -> dict[int, torch.Tensor]:
    """Measure what each expert is worth: the loss of the model without it minus that of the whole model.

    Args:
        model: An HF causal LM; experts are masked one after the other, and none is when this returns.
        judge: Gives the model's loss as it is now.

    Returns:
        By layer index (E,) float64; the highest matters most, and a negative one does harm. L times E + 1 judgements.

    Raises:
        ModelError: A layer has no more experts than top-k, so none can be missed.
    """
    whole = judge()
    found: dict[int, torch.Tensor] = {}
    for layer in moe_layers(model):
        changes = []
        for expert in range(layer.num_experts):
            with mask_experts(model, {layer.index: (expert,)}):
                changes.append(judge() - whole)
        found[layer.index] = torch.tensor(changes, dtype=torch.float64)
    return found
