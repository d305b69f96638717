"""What methods share that mix whole-model LoRA experts by a gate over examples: passes, rows, mixtures of predictions.

Shape letters: B rows, S sequence, N label tokens, V vocabulary, K experts, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.moe.example_gate import PromptEmbedder, example_gate_of, one_hot_weights, prompts_of
from fedgraft.moe.mixture import example_weights
from fedgraft.training.step import StepOutput
from fedgraft.types import IGNORE_INDEX, Batch, ModelFacts, ParamRef

__all__ = ["attention_targets", "embed_batches", "label_pass", "label_rows", "mixed_log_probs", "mixture_loss", "slot_keys"]


def attention_targets(facts: ModelFacts, wanted: Sequence[str] | None) -> tuple[str, ...]:
    """Last names of the attention maps that get experts; ``None``: of all that the model has."""
    return tuple(wanted) if wanted is not None else tuple(dict.fromkeys(each.name.rpartition(".")[2] for each in facts.attention))


def slot_keys(refs: Iterable[ParamRef], slot: int) -> tuple[str, ...]:
    """Keys of one slot of every mixture: one whole expert."""
    return tuple(ref.key for ref in refs if ref.part == "mixture" and ref.expert == slot)


def label_pass(model: nn.Module, batch: Batch) -> StepOutput:
    """One forward pass with the mixtures' weights as they are, announcing nothing; logits where a label counts."""
    hidden_BSD = model.model(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labels = batch.labels[:, 1:]
    counted = labels != IGNORE_INDEX
    return StepOutput(hidden=hidden_BSD, logits=model.lm_head(hidden_BSD[:, :-1][counted]), labels=labels[counted])  # type: ignore[operator]


def label_rows(batch: Batch) -> torch.Tensor:
    """The row that each label token is in, (N,), in batch order."""
    return (batch.labels[:, 1:] != IGNORE_INDEX).nonzero()[:, 0]


def mixed_log_probs(
    logits_KNV: Sequence[torch.Tensor], log_weight_NK: torch.Tensor, mix: Literal["probabilities", "logits"]
) -> torch.Tensor:
    """Log-probabilities of a mixture of K predictions, (N, V) float32.

    ``probabilities``: log sum_k w_k softmax(f_k), in the log domain; ``logits``: log softmax(sum_k w_k f_k).

    Args:
        logits_KNV: K tensors (N, V).
        log_weight_NK: Logarithms of weights that sum to 1 over K, as ``log_softmax`` gives them.
        mix: Which of the two.
    """
    if mix == "logits":
        weight_KN1 = log_weight_NK.float().exp().T.unsqueeze(-1)
        return torch.log_softmax((weight_KN1 * torch.stack(list(logits_KNV)).float()).sum(dim=0), dim=-1)
    parts = [
        torch.log_softmax(logits.float(), dim=-1) + log_weight_NK[:, k : k + 1].float() for k, logits in enumerate(logits_KNV)
    ]
    return torch.logsumexp(torch.stack(parts), dim=0)


def embed_batches(embedder: PromptEmbedder, batches: Iterable[Batch]) -> torch.Tensor:
    """Embeddings of all rows of some batches, one after the other; ``(0, 0)`` where there are none."""
    found = [embedder.embed(batch.input_ids, prompts_of(batch)) for batch in batches]
    return torch.cat(found) if found else torch.zeros(0, 0)


def mixture_loss(
    model: nn.Module,
    batch: Batch,
    num_label_tokens: int | None,
    *,
    embedder: PromptEmbedder,
    experts: Sequence[int],
    mix: Literal["probabilities", "logits"],
) -> tuple[torch.Tensor, StepOutput]:
    """Negative log-likelihood of the labels under a gated mixture of experts; an ``Objective`` once its options are given.

    One pass an expert, each with its slot alone. The gate sees a prompt's embedding, its softmax is over ``experts``; with one
    expert it plays no part.

    Args:
        model: With a mixture of as many active slots as there are experts, and a gate over all experts.
        batch: On the model's device.
        num_label_tokens: Of the whole batch that this one is a part of; ``None``: it is the whole.
        embedder: Of this model.
        experts: The gate's output that stands for each slot.
        mix: What is mixed, see ``mixed_log_probs``.
    """
    outputs = []
    for slot in range(len(experts)):
        weights = one_hot_weights(slot, rows=batch.num_examples, slots=len(experts), device=batch.input_ids.device)
        with example_weights(model, weights):
            outputs.append(label_pass(model, batch))
    first = outputs[0]
    if len(experts) == 1:
        log_probs_NV = torch.log_softmax(first.logits.float(), dim=-1)
    else:
        scores_BK = example_gate_of(model)(embedder.embed(batch.input_ids, prompts_of(batch)))[:, list(experts)]
        log_weight_NK = torch.log_softmax(scores_BK.float(), dim=-1)[label_rows(batch)]
        log_probs_NV = mixed_log_probs([output.logits for output in outputs], log_weight_NK, mix)
    count = num_label_tokens if num_label_tokens is not None else first.labels.numel()
    loss = F.nll_loss(log_probs_NV, first.labels, reduction="sum") / count
    return loss, StepOutput(hidden=first.hidden, logits=log_probs_NV, labels=first.labels)
