"""One local step's loss, and how a batch is cut into parts for ranks and for gradient accumulation.

Shape letters: B batch, S sequence, T tokens, D model, V vocabulary, N label tokens, L MoE layers, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import UpdateError
from fedgraft.moe.families import model_facts, moe_layers
from fedgraft.moe.prompts import announce_prompts
from fedgraft.protocols import Objective, Terms
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = [
    "RoutingCounter",
    "StepOutput",
    "is_out_of_memory",
    "part_loss",
    "part_of_batch",
    "require_labels",
    "response_loss",
    "to_device",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What a step computed, for a method's extra terms.

    ``hidden`` (B, S, D) is the last layer's output; ``logits`` (N, V) and ``labels`` (N) are those of the positions that
    the loss counts, in batch order.
    """

    hidden: torch.Tensor
    logits: torch.Tensor
    labels: torch.Tensor


def response_loss(model: nn.Module, batch: Batch, num_label_tokens: int | None = None) -> tuple[torch.Tensor, StepOutput]:
    """Cross-entropy over the response tokens of a batch, nats: their mean, or their sum over ``num_label_tokens``.

    The language-model head is applied only where a label counts: prompts and padding are most of a batch.

    Args:
        model: An HF causal LM.
        batch: On the model's device.
        num_label_tokens: Label tokens of the whole batch that this one is a part of; ``None``: it is the whole.
    """
    is_prompt = batch.attention_mask.bool() & (batch.labels == IGNORE_INDEX)
    announce_prompts(model, batch.input_ids, is_prompt)
    hidden_BSD = model.model(  # type: ignore[operator]
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    ).last_hidden_state
    labels = batch.labels[:, 1:]
    counted = labels != IGNORE_INDEX
    logits_NV = model.lm_head(hidden_BSD[:, :-1][counted])  # type: ignore[operator]
    labels_N = labels[counted]
    output = StepOutput(hidden=hidden_BSD, logits=logits_NV, labels=labels_N)
    if num_label_tokens is None:
        return F.cross_entropy(logits_NV.float(), labels_N), output
    return F.cross_entropy(logits_NV.float(), labels_N, reduction="sum") / num_label_tokens, output


def part_loss(
    model: nn.Module, part: Batch, num_label_tokens: int | None, terms: Terms | None, objective: Objective | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a part's cross-entropy, and that plus its share of the method's extra terms.

    A term counts in proportion to the part's label tokens, so that a term which does not depend on the batch counts once.

    Args:
        model: An HF causal LM.
        part: Rows of a batch, on the model's device.
        num_label_tokens: Of the whole batch; ``None``: the part is the whole.
        terms: The method's.
        objective: The method's own loss; ``None``: the response-only cross-entropy.
    """
    loss, output = (objective or response_loss)(model, part, num_label_tokens)
    found: Mapping[str, torch.Tensor] = terms(part, output) if terms is not None else {}
    share = None if num_label_tokens is None else output.labels.numel() / num_label_tokens
    total = loss
    for term in found.values():
        if share is not None:
            # A mean over no label tokens is no number. It stays in the graph: ranks must make the same collective calls.
            term = share * term if share else 0.0 * term.nan_to_num()
        total = total + term
    return loss, total


def part_of_batch(batch: Batch, index: int, count: int) -> Batch | None:
    """Give rows ``index`` of ``count`` about equal parts of a batch, without columns that are all padding.

    ``None`` where the batch has too few rows for this part.
    """
    start, stop = (place * batch.num_examples // count for place in (index, index + 1))
    if start == stop:
        return None
    mask = batch.attention_mask[start:stop]
    width = int(mask.any(dim=0).nonzero().max()) + 1
    return Batch(
        input_ids=batch.input_ids[start:stop, :width],
        attention_mask=mask[:, :width],
        labels=batch.labels[start:stop, :width],
    )


class RoutingCounter:
    """Counts the tokens that each router sends to each expert, padding left out."""

    def __init__(self, model: nn.Module) -> None:
        facts = model_facts(model.config)
        self._layers = moe_layers(model)
        self._counts = torch.zeros(len(self._layers), facts.num_experts, dtype=torch.int64)
        self._mask: torch.Tensor | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> RoutingCounter:
        for position, layer in enumerate(self._layers):

            def count(chosen_TK: torch.Tensor, weights_TK: torch.Tensor, position: int = position) -> None:
                counts = torch.bincount(chosen_TK[self._mask].reshape(-1), minlength=self._counts.shape[1])
                self._counts[position] += counts.cpu()

            self._handles.append(layer.watch_routing(count))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def attend(self, batch: Batch, *, counts: bool = True) -> None:
        """Say which tokens of the coming forward pass count: those that are no padding, or none."""
        self._mask = batch.attention_mask.reshape(-1).bool() & counts

    def counts(self) -> torch.Tensor:
        """Tokens by layer and expert, (L, E) int64."""
        return self._counts


def require_labels(batch: Batch, step: int) -> int:
    """Give the label tokens of a batch, at least one: a mean over none is no loss.

    Args:
        batch: Of a local step, whole.
        step: Its number, from 0.

    Raises:
        UpdateError: There is none.
    """
    count = batch.num_label_tokens
    if not count:
        raise UpdateError(
            f"the batch of local step {step + 1} has no label token", "raise data.max_length, or check the responses"
        )
    return count


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Give the batch on a device; itself where it is there already."""
    if batch.input_ids.device == device:
        return batch
    return Batch(
        input_ids=batch.input_ids.to(device),
        attention_mask=batch.attention_mask.to(device),
        labels=batch.labels.to(device),
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch could not allocate memory, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
