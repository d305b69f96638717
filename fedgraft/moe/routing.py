"""How a token's router logits become its experts and their weights, said once for every family.

Transformers computes this inside each family's router. The restatement here gives the same bits, and adds one thing: a logit
of minus infinity is an expert that is never chosen, in families that add a bias to their scores as well.

Shape letters: T tokens, E experts, K top-k, G groups of experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fedgraft.errors import ModelError

__all__ = [
    "RoutingRule",
    "check_experts_left",
    "choose_among",
    "choose_experts",
    "configured_groups",
    "expert_probabilities",
    "num_groups",
    "routed_scale",
]

RoutingRule = Literal["softmax", "softmax_of_top_k", "sigmoid"]
"""softmax over all experts, then top-k; top-k of the logits, then softmax over them; sigmoid of each, then top-k."""


def expert_probabilities(rule: RoutingRule, logits_TE: torch.Tensor) -> torch.Tensor:
    """Give the weights that experts would have if all were chosen, (T, E), float32, before any scaling; rows sum to 1."""
    if rule == "sigmoid":
        scores = logits_TE.float().sigmoid()
        return scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    return torch.softmax(logits_TE.float(), dim=-1)


def choose_experts(
    router: nn.Module, rule: RoutingRule, logits_TE: torch.Tensor, top_k: int, *, normalises: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts as the family's own router does.

    Args:
        router: The family's router module; groups, scaling and the bias of choice are read from it.
        rule: The family's rule.
        logits_TE: Raw scores; minus infinity masks an expert.
        top_k: Experts a token.
        normalises: Whether the weights of the chosen experts are divided by their sum.

    Returns:
        Weights (T, K) and indices (T, K).
    """
    is_masked = torch.isneginf(logits_TE)
    if rule == "softmax_of_top_k":
        values, chosen = torch.topk(logits_TE, top_k, dim=-1)
        return torch.softmax(values, dim=-1, dtype=values.dtype), chosen
    if rule == "sigmoid":
        scores = logits_TE.sigmoid()
        # The bias decides who is chosen, never the weight; added to a masked score of 0 it could choose a masked expert.
        choice = (scores + _correction_bias(router)).masked_fill(is_masked, float("-inf"))
        choice = choice.masked_fill(~_in_best_groups(router, choice, members=2), float("-inf"))
        chosen = torch.topk(choice, top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if normalises:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return weights * routed_scale(router), chosen
    choice = torch.softmax(logits_TE, dim=-1, dtype=torch.float32)
    if num_groups(router) > 1:
        choice = choice.masked_fill(~_in_best_groups(router, choice, members=1), 0.0)
    # -1, because the softmax of an expert that may be chosen can underflow to the 0 of a masked one.
    choice = choice.masked_fill(is_masked, -1.0)
    weights, chosen = torch.topk(choice, top_k, dim=-1, sorted=not hasattr(router, "topk_method"))
    if normalises:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    scale = routed_scale(router)
    return (weights if scale == 1 else weights * scale), chosen


def choose_among(
    router: nn.Module, rule: RoutingRule, logits_TS: torch.Tensor, kept: Sequence[int], top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose among the experts ``kept`` only, without groups.

    Args:
        router: The family's router module, for the bias of its choice.
        rule: The family's rule.
        logits_TS: Their raw scores, (T, S), in the order of ``kept``.
        kept: S experts.
        top_k: Experts a token, at most S.

    Returns:
        Weights (T, K), neither normalised nor scaled, and positions (T, K) in ``kept``.
    """
    if rule != "sigmoid":
        values, chosen = torch.topk(torch.softmax(logits_TS, dim=-1), top_k, dim=-1)
        return values, chosen
    scores = logits_TS.sigmoid()
    chosen = torch.topk(scores + _correction_bias(router)[list(kept)], top_k, dim=-1).indices
    return scores.gather(1, chosen), chosen


def routed_scale(router: nn.Module) -> float:
    """Give the constant that multiplies all weights of chosen experts; 1 in most families."""
    return float(getattr(router, "routed_scaling_factor", 1.0))


def num_groups(router: nn.Module) -> int:
    """Count the groups that a router limits its choice to; 1 where it chooses among all experts."""
    if getattr(router, "topk_method", "group_limited_greedy") == "greedy":
        return 1
    return int(getattr(router, "num_group", None) or 1)


def configured_groups(config: Any, rule: RoutingRule) -> int:
    """Count the groups that the routers of an HF config will have, as ``num_groups`` does once they are built."""
    # A sigmoid router has no method to choose: DeepSeek-V3's always goes by groups.
    if rule != "sigmoid" and getattr(config, "topk_method", "greedy") == "greedy":
        return 1
    return int(getattr(config, "n_group", None) or 1)


def check_experts_left(router: nn.Module, rule: RoutingRule, num_experts: int, masked: Collection[int], top_k: int) -> None:
    """Refuse a mask that leaves some token fewer than ``top_k`` experts.

    A router with groups chooses its best groups first, so every group it may choose must hold enough.

    Raises:
        ModelError: Too few experts, or groups, are left.
    """
    left = num_experts - len(set(masked))
    if left < top_k:
        raise ModelError(
            f"num_experts_per_tok is {top_k}, but only {left} of {num_experts} experts are left",
            f"leave at least {top_k} experts in every MoE layer",
        )
    groups = num_groups(router)
    if groups == 1:
        return
    size, wanted = num_experts // groups, int(router.topk_group)  # type: ignore[arg-type]
    needed = 2 if rule == "sigmoid" else 1  # a sigmoid router scores a group by its best two
    sizes = [sum(g * size <= e < (g + 1) * size for e in range(num_experts) if e not in set(masked)) for g in range(groups)]
    usable = sorted(count for count in sizes if count >= needed)
    if len(usable) < wanted or sum(usable[:wanted]) < top_k:
        raise ModelError(
            f"the router chooses {top_k} experts out of its best {wanted} of {groups} groups, but the groups keep only "
            f"{', '.join(map(str, sizes))} experts",
            f"leave more experts in each group of {size}",
        )


def _correction_bias(router: nn.Module) -> torch.Tensor:
    bias: torch.Tensor = router.e_score_correction_bias  # type: ignore[assignment]
    return bias


def _in_best_groups(router: nn.Module, choice_TE: torch.Tensor, *, members: int) -> torch.Tensor:
    """Which experts lie in the groups whose ``members`` best experts score highest, (T, E) bool."""
    groups = int(router.num_group)  # type: ignore[arg-type]
    choice_TGM = choice_TE.view(choice_TE.shape[0], groups, -1)
    scores_TG = choice_TGM.topk(members, dim=-1).values.sum(dim=-1)
    best = torch.topk(scores_TG, int(router.topk_group), dim=-1, sorted=False).indices  # type: ignore[arg-type]
    kept_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter(1, best, True)
    return kept_TG.unsqueeze(-1).expand_as(choice_TGM).reshape(choice_TE.shape)
