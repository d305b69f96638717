"""Letting only some experts of a layer take part in the backward pass, chosen anew for every batch.

Every router decides as always where its tokens go. Then somebody chooses the layer's active experts from the batch's own routing,
and the expert of a token that is not active either lends its output without a gradient (``detach``), or is left out of the
token's sum (``drop``). A pass that builds no graph is left alone.

Pairs of a token and one of its experts are computed in two calls of the layer's own experts module, so that families,
adapters and kernels need no code here. What autograd keeps of experts is what the active ones need; the forward pass itself
computes all of them in ``detach``, and its peak is that of the unrestricted model.

Shape letters: T tokens, D model, E experts, K top-k, S pairs of a token and an active expert, R the other pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self, TypeAlias

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.routing import expert_probabilities

__all__ = ["ActiveExperts", "ChooseActive", "renormalised"]

ChooseActive: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]
"""Layer index, each expert's share of a token (T, E) as float32 without graph, and the experts that any of these tokens was
sent to (E,) bool -> the active experts (E,) bool, on the same device. Padding is not among the tokens.
"""


@dataclass(frozen=True, slots=True)
class _Split:
    """The call of an experts module that is being made in two parts."""

    x_TD: torch.Tensor
    chosen_TK: torch.Tensor
    weights_TK: torch.Tensor
    is_active_TK: torch.Tensor


class ActiveExperts:
    """Restricts every forward pass that builds a graph to the layers' active experts; a context manager.

    A parameter of an expert that is not active gets a gradient of exactly zero, and the expert's input none through it. In
    ``detach`` the output of the layer is what it was, but for rounding, and the router learns from all experts. In ``drop`` the
    weights of a token's active experts are scaled up to the sum of all its weights; a token without any gets nothing from
    routed experts. Where all experts that the batch's tokens were sent to are active the pass keeps its bits.

    Args:
        model: An HF causal LM, with or without adapters; its weights and experts are not sharded.
        choose: Called once a layer and pass, in the order of the layers, once the layer's router has decided.
        mode: ``detach`` or ``drop``.
    """

    def __init__(self, model: nn.Module, choose: ChooseActive, *, mode: Literal["detach", "drop"] = "detach") -> None:
        self._model = model
        self._choose = choose
        self._mode = mode
        self._handles: list[Any] = []
        self._is_token_T: torch.Tensor | None = None
        self._active: dict[int, torch.Tensor] = {}
        self._splits: dict[int, _Split] = {}
        self._is_lending = False

    def __enter__(self) -> Self:
        decoder: nn.Module = self._model.model  # type: ignore[assignment]
        self._handles.append(decoder.register_forward_pre_hook(self._note_padding, with_kwargs=True))
        for layer in moe_layers(self._model):
            # With PEFT's wrappers, so that adapters act in both calls.
            experts = layer.block.get_submodule(layer.family.experts)
            self._handles.append(layer.router.register_forward_hook(partial(self._decide, layer)))
            self._handles.append(experts.register_forward_pre_hook(partial(self._split, layer.index)))
            self._handles.append(experts.register_forward_hook(partial(self._join, layer.index)))
        return self

    def __exit__(self, *error: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._is_token_T = None
        self._active.clear()
        self._splits.clear()

    def _note_padding(self, decoder: nn.Module, args: object, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        self._is_token_T = None if mask is None else mask.reshape(-1).bool()

    def _decide(self, layer: MoELayer, router: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
        self._active.pop(layer.index, None)
        if not torch.is_grad_enabled():
            return
        logits_TE, chosen_TK = output[0].detach(), output[-1]
        if self._is_token_T is not None:
            logits_TE, chosen_TK = logits_TE[self._is_token_T], chosen_TK[self._is_token_T]
        if not len(logits_TE):
            return
        shares_TE = expert_probabilities(layer.family.rule, logits_TE)
        union_E = torch.zeros(shares_TE.shape[1], dtype=torch.bool, device=shares_TE.device)
        union_E[chosen_TK.reshape(-1)] = True
        active_E = self._choose(layer.index, shares_TE, union_E)
        # Padding may go elsewhere; nothing depends on its output, so it brings no gradient there.
        if bool((union_E & ~active_E).any()):
            self._active[layer.index] = active_E

    def _split(self, index: int, experts: nn.Module, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
        """Replace the call's tokens by its active pairs, each a token of its own with one expert."""
        if self._is_lending or index not in self._active:
            return None
        x_TD, chosen_TK, weights_TK = args
        is_active_TK = self._active[index][chosen_TK]
        if self._mode == "drop":
            weights_TK = renormalised(weights_TK, is_active_TK)
        self._splits[index] = _Split(x_TD, chosen_TK, weights_TK, is_active_TK)
        if not bool(is_active_TK.any()):
            # One pair of no weight, so that weights stay in the graph: their gradient is zero, not missing.
            return x_TD[:1].detach(), chosen_TK[:1, :1], torch.zeros_like(weights_TK[:1, :1])
        return _pairs(x_TD, chosen_TK, weights_TK, is_active_TK)

    def _join(self, index: int, experts: nn.Module, args: object, output_SD: torch.Tensor) -> torch.Tensor | None:
        """Put the active pairs' outputs, and what the others lend, together to the tokens' sums, (T, D)."""
        if self._is_lending or index not in self._splits:
            return None
        split = self._splits.pop(index)
        num_tokens, top_k = split.chosen_TK.shape
        is_active_P = split.is_active_TK.reshape(-1)
        pairs_PD = output_SD.new_zeros(num_tokens * top_k, output_SD.shape[-1])
        has_active = bool(is_active_P.any())
        if has_active:
            pairs_PD = pairs_PD.index_copy(0, is_active_P.nonzero().squeeze(1), output_SD)
        if self._mode == "detach":
            lent_RD = self._lend(experts, split)
            pairs_PD = pairs_PD.index_copy(0, (~is_active_P).nonzero().squeeze(1), lent_RD.to(pairs_PD.dtype))
        sum_TD = pairs_PD.view(num_tokens, top_k, -1).sum(dim=1)
        return sum_TD if has_active else sum_TD + output_SD

    def _lend(self, experts: nn.Module, split: _Split) -> torch.Tensor:
        """Outputs of the experts that are not active, without graph, times their weights, with graph; (R, D)."""
        self._is_lending = True
        try:
            with torch.no_grad():
                unweighted_RD = experts(
                    *_pairs(split.x_TD, split.chosen_TK, torch.ones_like(split.weights_TK), ~split.is_active_TK)
                )
        finally:
            self._is_lending = False
        weighted: torch.Tensor = unweighted_RD * split.weights_TK[~split.is_active_TK].unsqueeze(-1)
        return weighted


def renormalised(weights_TK: torch.Tensor, is_active_TK: torch.Tensor) -> torch.Tensor:
    """Scale each token's weights of active experts up to the sum of all its weights; the others become 0.

    In a family that divides the weights of the chosen experts by their sum, that is to divide by the sum of those that are
    left. A token without active experts gets zeros.
    """
    kept_TK = torch.where(is_active_TK, weights_TK, 0)
    mass_T1 = kept_TK.sum(dim=-1, keepdim=True)
    return kept_TK * (weights_TK.sum(dim=-1, keepdim=True) / torch.where(mass_T1 > 0, mass_T1, 1))


def _pairs(
    x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor, which_TK: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Some pairs of a token and one of its experts as tokens of top-1: inputs (S, D), experts (S, 1), weights (S, 1)."""
    tokens_S = which_TK.nonzero()[:, 0]
    return x_TD[tokens_S], chosen_TK[which_TK].unsqueeze(1), weights_TK[which_TK].unsqueeze(1)
