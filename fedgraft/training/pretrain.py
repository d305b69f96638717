"""Pre-training of a small Mixture-of-Experts language model from scratch: one loop, fixed number of steps.

Shape letters: B batch, S sequence, T counted tokens, D model, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import ModelError
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = ["PretrainResult", "PretrainSpec", "learning_rate_at", "parameter_groups", "pretrain", "weighted_token_loss"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainSpec:
    """How to pre-train.

    The rate rises linearly over ``warmup_steps`` to ``learning_rate`` and falls along a cosine to
    ``final_lr_fraction`` of it at step ``num_steps``. AdamW with ``weight_decay`` on matrices only. ``prompt_weight`` in
    [0, 1] is what a prompt token counts in the loss where a response token counts 1. ``router_aux_weight`` weighs the
    router's load-balancing loss (Fedus et al., 2021, https://arxiv.org/abs/2101.03961, Eq. 4-6, which is 1 at perfect
    balance with top-1 routing and k with top-k).
    """

    num_steps: int
    learning_rate: float
    warmup_steps: int
    final_lr_fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    prompt_weight: float = 0.1
    router_aux_weight: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainResult:
    """What pre-training gave: the weighted token loss of each step (nats) and the tokens it went over, padding left out."""

    losses: tuple[float, ...]
    num_tokens: int

    @property
    def final_loss(self) -> float:
        """Mean loss of the last twentieth of the steps, nats a token; NaN after no step."""
        tail = self.losses[-max(1, len(self.losses) // 20) :]
        return sum(tail) / len(tail) if tail else float("nan")


def learning_rate_at(step: int, spec: PretrainSpec) -> float:
    """Give the rate of a step, counted from 1."""
    if step <= spec.warmup_steps:
        return spec.learning_rate * step / spec.warmup_steps
    progress = (step - spec.warmup_steps) / max(1, spec.num_steps - spec.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return spec.learning_rate * (spec.final_lr_fraction + (1 - spec.final_lr_fraction) * cosine)


def weighted_token_loss(model: nn.Module, batch: Batch, spec: PretrainSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the weighted mean cross-entropy over a batch's tokens (nats) and the router's load-balancing loss.

    Every token but the first of a row is predicted; padding never counts. The model gets no attention mask: the batch is
    padded on the right, so a causal model cannot see padding from a token that counts, and attention without a mask is
    faster. The router's loss does leave padding out.
    """
    output = model.model(input_ids=batch.input_ids, use_cache=False, output_router_logits=True)  # type: ignore[operator]
    targets_BS = batch.input_ids[:, 1:]
    counted_BS = batch.attention_mask[:, 1:].bool()
    logits_TV = model.lm_head(output.last_hidden_state[:, :-1][counted_BS])  # type: ignore[operator]
    is_response_T = batch.labels[:, 1:][counted_BS] != IGNORE_INDEX
    weights_T = torch.where(is_response_T, 1.0, spec.prompt_weight)
    losses_T = F.cross_entropy(logits_TV.float(), targets_BS[counted_BS], reduction="none")
    config: Any = model.config
    # The module of a model takes seconds to import; a driver that pre-trains nothing needs none.
    from transformers.models.qwen2_moe.modeling_qwen2_moe import load_balancing_loss_func

    balance = load_balancing_loss_func(output.router_logits, config.num_experts, config.num_experts_per_tok, batch.attention_mask)
    return (losses_T * weights_T).sum() / weights_T.sum(), balance


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Give an optimiser's groups of what asks for a gradient: matrices (and fused experts) decay, vectors do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def pretrain(
    model: nn.Module,
    batches: Iterable[Batch],
    spec: PretrainSpec,
    on_step: Callable[[int, int, float], None] | None = None,
) -> PretrainResult:
    """Train all parameters of a model in place, and leave it in eval mode.

    The end is a number of steps and never the clock, so the result does not depend on how fast the machine is. It does
    depend on the number of threads (sums are cut differently) and on the package versions. Nothing here is random.

    Args:
        model: A Qwen2-MoE causal LM of Transformers, on the CPU, without dropout.
        batches: At least ``spec.num_steps``, padded on the right; labels mark the response. More are not read.
        spec: Steps, rates, weights.
        on_step: Called after each step with (step from 1, number of steps, that step's loss in nats a token).

    Raises:
        ModelError: The loss is not finite, or the batches end too early.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = parameter_groups(model, spec.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=spec.learning_rate, betas=spec.betas, eps=1e-8, foreach=True)
    losses: list[float] = []
    num_tokens = 0
    model.train()
    source = iter(batches)
    for step in range(1, spec.num_steps + 1):
        batch = next(source, None)
        if batch is None:
            raise ModelError(f"pre-training: expected {spec.num_steps} batches, got {step - 1}", "give more batches")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, spec)
        optimizer.zero_grad(set_to_none=True)
        loss, balance = weighted_token_loss(model, batch, spec)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ModelError(f"pre-training: the loss of step {step} is {value}", "lower the learning rate")
        total = loss + spec.router_aux_weight * balance
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm)
        optimizer.step()
        losses.append(value)
        num_tokens += int(batch.attention_mask.sum())
        if on_step is not None:
            on_step(step, spec.num_steps, value)
    model.eval()
    optimizer.zero_grad(set_to_none=True)
    return PretrainResult(losses=tuple(losses), num_tokens=num_tokens)
