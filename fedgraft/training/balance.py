"""The router's load-balancing loss over whatever rows a rank holds, for every family and any number of ranks.

Shape letters: T counted tokens, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.routing import expert_probabilities
from fedgraft.types import Batch

__all__ = ["RouterBalance"]

Sum = Callable[[torch.Tensor], torch.Tensor]


class RouterBalance:
    """Watches a model's routers during forward passes and gives their load-balancing loss.

    Fedus et al. (2021, https://arxiv.org/abs/2101.03961, Eq. 4-6), the mean over MoE layers: E sum_e f_e P_e, where f_e is
    how many of an expert's tokens there are for each token and P_e the mean probability of the expert. It is K at perfect
    balance. The f_e are counted over all ranks, as Qiu et al. (2025, https://arxiv.org/abs/2501.11873) recommend, so that the
    loss of a batch does not depend on how many ranks share it.

    Args:
        model: A loaded model of a known family.
        sum_over_ranks: Gives the sum of a tensor over all ranks, without gradient; every rank calls it as often.
    """

    def __init__(self, model: nn.Module, sum_over_ranks: Sum) -> None:
        self._layers = moe_layers(model)
        self._sum = sum_over_ranks
        self._mask: torch.Tensor | None = None
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._handles = [layer.router.register_forward_hook(self._hook(layer)) for layer in self._layers]

    def attend(self, batch: Batch) -> None:
        """Say which tokens of the coming forward pass count: those that are no padding."""
        self._mask = batch.attention_mask.reshape(-1).bool()
        self._seen = {}

    def share(self) -> torch.Tensor:
        """Give this rank's share of the loss of the forward pass since ``attend``; the shares of all ranks add up to it."""
        assert self._mask is not None, "attend() comes before the forward pass"
        counts_LE = torch.stack([self._seen[layer.index][0] for layer in self._layers]).double()
        num_experts = counts_LE.shape[1]
        num_tokens = self._mask.sum().double().reshape(1)
        total = self._sum(torch.cat([counts_LE.reshape(-1), num_tokens]))
        frequency_LE = (total[:-1] / total[-1]).reshape(len(self._layers), num_experts).float()
        sums_LE = torch.stack([self._seen[layer.index][1] for layer in self._layers])
        self._mask = None
        return num_experts * (frequency_LE * sums_LE).sum() / float(total[-1]) / len(self._layers)

    def close(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, layer: MoELayer) -> Callable[..., None]:
        def watch(router: nn.Module, args: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self._mask is None:
                return  # a pass that only judges
            logits_TE, chosen_TK = output[0][self._mask], output[-1][self._mask]
            counts_E = torch.bincount(chosen_TK.reshape(-1), minlength=logits_TE.shape[-1])
            self._seen[layer.index] = (counts_E, expert_probabilities(layer.family.rule, logits_TE).sum(dim=0))

        return watch
