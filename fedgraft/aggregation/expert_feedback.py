"""How well experts served a client: shares of tokens, gate-weighted means of what its model got right, and their balance.

Everything counts a token once: its chosen experts' weights are divided by their sum, whether the family does so or not.

Shape letters: S sequence, B rows of a batch, T tokens, P tokens that predict a label, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.moe.families import model_facts
from fedgraft.moe.trace import RouterWatch
from fedgraft.training.evaluate import evaluating
from fedgraft.training.step import StepOutput, response_loss, to_device
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = ["GateWeighted", "balance_loss", "gate_shares", "judge_experts", "normalised", "token_losses"]


@dataclass(frozen=True, kw_only=True, slots=True)
class GateWeighted:
    """A value of tokens, weighed by where they went: ``mass`` sum_x G_e(x), ``total`` sum_x G_e(x) v(x), both (L, E) float64.

    G_e(x) is the share of token x that goes to expert e; ``num_tokens`` counts the tokens.
    """

    mass: torch.Tensor
    total: torch.Tensor
    num_tokens: int

    @property
    def mean(self) -> torch.Tensor:
        """The gate-weighted mean for each expert, (L, E); 0 for one that no token went to."""
        return torch.where(self.mass > 0, self.total / self.mass.clamp_min(1e-300), 0.0)

    @property
    def share(self) -> torch.Tensor:
        """Share of the tokens that went to each expert, (L, E); a layer sums to 1, or to 0 without tokens."""
        return self.mass / max(1, self.num_tokens)


def gate_shares(probabilities_TE: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
    """Share of each token that goes to each expert: the weights of its chosen experts over their sum, (T, E); 0 elsewhere.

    Args:
        probabilities_TE: What each expert would weigh if all were chosen.
        chosen_TK: The experts that were.
    """
    weights_TK = probabilities_TE.gather(1, chosen_TK)
    weights_TK = weights_TK / weights_TK.sum(dim=1, keepdim=True).clamp_min(torch.finfo(weights_TK.dtype).tiny)
    return torch.zeros_like(probabilities_TE).scatter(1, chosen_TK, weights_TK)


def balance_loss(probabilities_TE: torch.Tensor, chosen_TK: torch.Tensor, *, num_held: int) -> torch.Tensor:
    """Balance over the experts that a client holds: H sum_e f_e P_e, with a gradient through P; a scalar.

    Fedus et al. (2021, arXiv 2101.03961, Eq. 4), f_e the share of the T K choices that fell on e, P_e the mean probability. It is
    1 where both are even, and H / K where all tokens choose the same K experts for certain.

    Args:
        probabilities_TE: Of real tokens, at least one; 0 for experts that are not held.
        chosen_TK: The experts chosen.
        num_held: H.
    """
    num_experts = probabilities_TE.shape[1]
    frequency_E = torch.bincount(chosen_TK.reshape(-1), minlength=num_experts) / chosen_TK.numel()
    return num_held * (frequency_E * probabilities_TE.mean(dim=0)).sum()


def normalised(feedback_LE: torch.Tensor) -> torch.Tensor:
    """Feedback as it is learned from: negative values are 0, and the largest of each layer is 1; a layer of zeros stays so."""
    positive_LE = feedback_LE.clamp_min(0)
    return positive_LE / positive_LE.amax(dim=1, keepdim=True).clamp_min(torch.finfo(positive_LE.dtype).tiny)


def token_losses(model: nn.Module, batches: Iterable[Batch], device: torch.device) -> torch.Tensor:
    """Cross-entropy of every token that predicts a label, nats, in the order of the batches; (P,) float64 on the CPU."""
    found = [torch.zeros(0, dtype=torch.float64)]
    with evaluating(model), torch.inference_mode():
        for batch in batches:
            _, output = response_loss(model, to_device(batch, device))
            found.append(_losses(output))
    return torch.cat(found)


def judge_experts(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    *,
    watch: RouterWatch,
    losses_before: torch.Tensor | None = None,
) -> GateWeighted:
    """Run over batches, and weigh what became of each token that predicts a label by the experts it went to.

    Args:
        model: An HF causal LM, with whatever masks act on it.
        batches: At least one label in all for a result that says something.
        device: The model's.
        watch: On the model's routers, entered.
        losses_before: Then the value of a token is by how much its loss is lower than this, as ``token_losses`` gave it for
            the same batches; else it is 1 where the model's first choice is the label, and 0 elsewhere.
    """
    facts = model_facts(model.config)
    mass_LE = torch.zeros(len(facts.layers), facts.num_experts, dtype=torch.float64)
    total_LE = torch.zeros_like(mass_LE)
    num_tokens = 0
    with evaluating(model), torch.inference_mode():
        for cpu_batch in batches:
            batch = to_device(cpu_batch, device)
            _, output = response_loss(model, batch)
            # The position before a label predicts it; a row's last position predicts nothing.
            predicts_T = F.pad(batch.labels[:, 1:] != IGNORE_INDEX, (0, 1)).reshape(-1)
            count = int(predicts_T.sum())
            if losses_before is None:
                value_P = (output.logits.argmax(dim=-1) == output.labels).double().cpu()
            else:
                value_P = losses_before[num_tokens : num_tokens + count] - _losses(output)
            for position, layer in enumerate(facts.layers):
                share_PE = gate_shares(watch.probabilities(layer)[predicts_T], watch.chosen[layer][predicts_T]).double().cpu()
                mass_LE[position] += share_PE.sum(dim=0)
                total_LE[position] += value_P @ share_PE
            num_tokens += count
    return GateWeighted(mass=mass_LE, total=total_LE, num_tokens=num_tokens)


def _losses(output: StepOutput) -> torch.Tensor:
    return F.cross_entropy(output.logits.float(), output.labels, reduction="none").double().cpu()
