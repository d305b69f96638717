"""How good a causal language model is, by likelihood: of the responses, and of the choices of a question.

Pure functions on a model of Transformers. The model is judged in eval mode without gradients, and every submodule gets
its own train or eval mode back. Logits that are not finite raise ``ModelError``: a mean over them would say nothing.

Shape letters: B rows of a batch, S sequence length, W the columns of a batch that are predicted, N label tokens of a
batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from fedgraft.errors import DataError, ModelError
from fedgraft.moe.prompts import announce_prompts
from fedgraft.types import IGNORE_INDEX, Batch, Weighted

__all__ = [
    "ChoiceTokens",
    "device_of",
    "evaluating",
    "is_informative",
    "require_finite",
    "score_batches",
    "score_choices",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceTokens:
    """A multiple-choice question in tokens: ``answer`` is the index of the right one of ``choices``.

    A choice follows the prompt without anything between them. Prompt and choices have at least one token each.

    Raises:
        DataError: Nothing to score, or ``answer`` is not an index of ``choices``.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    answer: int

    def __post_init__(self) -> None:
        if not self.prompt or not all(self.choices):
            raise DataError("a multiple-choice question: expected tokens in the prompt and in every choice, got none")
        if not 0 <= self.answer < len(self.choices):
            indices = f"0..{len(self.choices) - 1}"
            raise DataError(f"a multiple-choice question: expected an answer in {indices}, got {self.answer}")


def score_batches(model: torch.nn.Module, batches: Iterable[Batch]) -> dict[str, Weighted]:
    """Score a model by how it predicts the label tokens.

    Args:
        model: A causal language model.
        batches: Padded on the right, on any device. A batch without label tokens adds nothing.

    Returns:
        ``nll``, the negative log-likelihood in nats summed in float64 (the exponential of its mean is the perplexity),
        and ``token_accuracy``, how many label tokens are the model's first choice. The weight of both is the number of
        label tokens after the shift by one, so both are 0 over 0 when there is no label token.

    Raises:
        ModelError: A logit at a label token is not finite; names the batch and the row, from 0.
    """
    nll, hits, count = 0.0, 0.0, 0.0
    with evaluating(model):
        for idx, batch in enumerate(batches):
            if batch.num_label_tokens == 0:
                continue
            scores = _score_labels(model, batch, [f"batch {idx} row {row}" for row in range(batch.num_examples)])
            nll -= float(scores.log_probs.sum())
            hits += int(scores.is_top.sum())
            count += batch.num_label_tokens
    return {"nll": Weighted(total=nll, weight=count), "token_accuracy": Weighted(total=hits, weight=count)}


def score_choices(
    model: torch.nn.Module,
    questions: Sequence[ChoiceTokens],
    *,
    pad_token_id: int,
    batch_size: int,
) -> Weighted:
    """Let a model answer multiple-choice questions by likelihood.

    The choice with the highest mean log-likelihood of its tokens, given the prompt, is the answer (normalised by length
    in tokens); of equal ones the first.

    Args:
        model: A causal language model.
        questions: May differ in their number of choices.
        pad_token_id: Stands where nothing is read.
        batch_size: Choices in one forward, >= 1.

    Returns:
        Questions answered right over questions.

    Raises:
        ModelError: A logit at a token of a choice is not finite; names question and choice, from 0.
    """
    rows = [(idx, choice) for idx, question in enumerate(questions) for choice in range(len(question.choices))]
    rows.sort(key=lambda row: len(questions[row[0]].prompt) + len(questions[row[0]].choices[row[1]]), reverse=True)
    means = [[0.0] * len(question.choices) for question in questions]
    with evaluating(model):
        for start in range(0, len(rows), batch_size):
            part = rows[start : start + batch_size]
            batch = _choice_batch([(questions[idx], choice) for idx, choice in part], pad_token_id)
            scores = _score_labels(model, batch, [f"question {idx} choice {choice}" for idx, choice in part])
            for (idx, choice), total in zip(part, scores.log_probs.sum(dim=1).tolist(), strict=True):
                means[idx][choice] = total / len(questions[idx].choices[choice])
    hits = sum(mean.index(max(mean)) == question.answer for mean, question in zip(means, questions, strict=True))
    return Weighted(total=float(hits), weight=float(len(questions)))


def is_informative(accuracy: Weighted, num_choices: int) -> bool:
    """Tell whether an accuracy is more than two standard errors from that of guessing.

    The standard error is the one of guessing, sqrt(p (1 - p) / n) with p = 1 / ``num_choices``: the one estimated from
    the accuracy itself is 0 when all answers are right or all are wrong, and would call a single question informative.

    Args:
        accuracy: Right answers over questions.
        num_choices: Choices of each question, >= 1; with one choice nothing is informative.
    """
    if accuracy.weight <= 0:
        return False
    chance = 1 / num_choices
    return abs(accuracy.mean - chance) > 2 * math.sqrt(chance * (1 - chance) / accuracy.weight)


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into eval mode, and afterwards give every submodule its own mode back.

    Inference mode is entered later, around the forward alone: tensors that a lazy iterable of batches makes meanwhile
    would be inference tensors, which training cannot use.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def device_of(model: torch.nn.Module) -> torch.device:
    """Tell where a model's inputs belong: the device of its first parameter, the CPU if it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def require_finite(is_finite: torch.Tensor, names: Sequence[str]) -> None:
    """Refuse rows whose logits are not finite.

    Args:
        is_finite: Shape (B,).
        names: What each row is, for the message.

    Raises:
        ModelError: Names the first three bad rows and counts the others.
    """
    if bool(is_finite.all()):
        return
    bad = [name for name, is_fine in zip(names, is_finite.tolist(), strict=True) if not is_fine]
    listed = ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")
    raise ModelError(
        f"evaluation: expected finite logits, got NaN or infinity for {listed}",
        "the weights are broken or training diverged; try a lower learning rate, or float32 in place of a half type",
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _LabelScores:
    """Float64 log-likelihood (B, W), 0 where no label is, and whether a label is the model's first choice."""

    log_probs: torch.Tensor
    is_top: torch.Tensor


def _score_labels(model: torch.nn.Module, batch: Batch, names: Sequence[str]) -> _LabelScores:
    """Score the label tokens of a batch that has some; ``names`` tell its rows apart in errors."""
    device = device_of(model)
    with torch.inference_mode():
        columns = (batch.labels[:, 1:] != IGNORE_INDEX).any(dim=0).nonzero()
        start, stop = int(columns[0]), int(columns[-1]) + 1
        labels_BW = batch.labels[:, start + 1 : stop + 1].to(device)
        is_label_BW = labels_BW != IGNORE_INDEX
        labels_N = labels_BW[is_label_BW]
        # A causal model needs nothing right of the last label, and no logits left of the first: with a large
        # vocabulary these are the largest tensor of all.
        ids, mask = batch.input_ids[:, :stop].to(device), batch.attention_mask[:, :stop].to(device)
        announce_prompts(model, ids, mask.bool() & (batch.labels[:, :stop].to(device) == IGNORE_INDEX))
        output = model(
            input_ids=ids,
            attention_mask=mask,
            use_cache=False,
            logits_to_keep=stop - start,
        )
        logits_NV = output.logits[:, start - stop :][is_label_BW].float()
        is_finite_BW = torch.ones_like(is_label_BW)
        is_finite_BW[is_label_BW] = logits_NV.isfinite().all(dim=-1)
        require_finite(is_finite_BW.all(dim=1), names)
        log_probs_BW = torch.zeros(labels_BW.shape, dtype=torch.float64, device=device)
        log_probs_BW[is_label_BW] = -cross_entropy(logits_NV, labels_N, reduction="none").double()
        is_top_BW = torch.zeros_like(is_label_BW)
        is_top_BW[is_label_BW] = logits_NV.argmax(dim=-1) == labels_N
    return _LabelScores(log_probs=log_probs_BW, is_top=is_top_BW)


def _choice_batch(rows: Sequence[tuple[ChoiceTokens, int]], pad_token_id: int) -> Batch:
    """Prompt and one choice a row, padded on the right; the labels are the choice."""
    lengths = [len(question.prompt) + len(question.choices[choice]) for question, choice in rows]
    ids = torch.full((len(rows), max(lengths)), pad_token_id)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, ((question, choice), length) in enumerate(zip(rows, lengths, strict=True)):
        ids[row, :length] = torch.tensor(question.prompt + question.choices[choice])
        mask[row, :length] = 1
        labels[row, len(question.prompt) : length] = ids[row, len(question.prompt) : length]
    return Batch(input_ids=ids, attention_mask=mask, labels=labels)
