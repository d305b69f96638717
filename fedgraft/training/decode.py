"""Greedy answers of a causal language model, and how close texts come to their references.

Shape letters: B rows of a batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedgraft.errors import DataError
from fedgraft.moe.prompts import announce_prompts
from fedgraft.training.evaluate import device_of, evaluating, require_finite
from fedgraft.types import Weighted

__all__ = ["decode_greedy", "rouge_l"]


def decode_greedy(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    batch_size: int,
) -> list[list[int]]:
    """Continue each prompt with the most likely token, again and again.

    A loop of our own on the model's KV cache: it gives the tokens of ``generate(do_sample=False)`` in the same time
    (most of it is the model's forward), without what a ``generation_config.json`` may slip in (penalties, suppressed
    or forced tokens). Prompts are padded on the left and sorted by length; positions count from each prompt's first
    token, so the answers are those of one prompt at a time, up to rounding of the logits.

    Args:
        model: A causal language model with a KV cache.
        prompts: At least one token each. The longest plus ``max_new_tokens`` must fit the model's context.
        max_new_tokens: Tokens, >= 0.
        eos_token_id: Ends an answer.
        pad_token_id: Stands left of a shorter prompt, where nothing is read; may equal ``eos_token_id``.
        batch_size: Prompts in one forward, >= 1. More is faster: a small model's step costs little more for 128
            rows than for 32.

    Returns:
        The new tokens of each prompt in the order given, without the end token and anything after it.

    Raises:
        DataError: A prompt has no token.
        ModelError: A logit of an unfinished answer is not finite; names the prompts by index.
    """
    for idx, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"decoding: expected at least one token in each prompt, got none in prompt {idx}")
    order = sorted(range(len(prompts)), key=lambda idx: len(prompts[idx]), reverse=True)
    answers: dict[int, list[int]] = {}
    with evaluating(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            rows = _decode_batch(
                model,
                [prompts[idx] for idx in indices],
                max_new_tokens=max_new_tokens,
                eos_token_id=eos_token_id,
                pad_token_id=pad_token_id,
                names=[f"prompt {idx}" for idx in indices],
            )
            answers.update(zip(indices, rows, strict=True))
    return [answers[idx] for idx in range(len(prompts))]


def rouge_l(predictions: Sequence[str], references: Sequence[str]) -> Weighted:
    """Compare texts by their longest common subsequence of words: ROUGE-L F-measure of rouge-score, stemming on.

    Lin 2004, https://aclanthology.org/W04-1013, section 3.1 with beta = 1. Words are runs of a-z and 0-9 of the
    lower-cased text; all else only separates them. So "42" and "43" differ as much as any two words and "= 42" equals
    "42", but a sign is lost ("-42" equals "42"), "3.5" is the two words "3" and "5", and text without ASCII letters or
    digits scores 0, even against itself.

    Args:
        predictions: The model's texts.
        references: As many, in the same order.

    Returns:
        The sum of the F-measures, each in 0..1, over the number of texts.
    """
    # NLTK and scikit-learn come with it: over a second for every replica and driver, of which few ever score a text.
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import DefaultTokenizer

    # The tokeniser is handed over because RougeScorer logs a line for each scorer that makes its own.
    scorer = RougeScorer(["rougeL"], tokenizer=DefaultTokenizer(use_stemmer=True))
    pairs = zip(predictions, references, strict=True)
    total = math.fsum(scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs)
    return Weighted(total=total, weight=float(len(predictions)))


def _decode_batch(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_id: int,
    pad_token_id: int,
    names: Sequence[str],
) -> list[list[int]]:
    num_rows, width = len(prompts), max(map(len, prompts))
    with torch.inference_mode():
        ids = torch.full((num_rows, width), pad_token_id)
        mask = torch.ones((num_rows, width + max_new_tokens), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt)
            mask[row, : width - len(prompt)] = 0
        device = device_of(model)
        ids, mask = ids.to(device), mask.to(device)
        positions = (mask[:, :width].cumsum(dim=1) - 1).clamp_(min=0)
        is_done = torch.zeros(num_rows, dtype=torch.bool, device=device)
        new_tokens = torch.full((num_rows, max_new_tokens), pad_token_id, device=device)
        cache = None
        announce_prompts(model, ids, mask[:, :width].bool())
        for step in range(max_new_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask[:, : width + step],
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits_BV = output.logits[:, -1]
            require_finite(logits_BV.isfinite().all(dim=-1) | is_done, names)
            tokens = logits_BV.argmax(dim=-1)
            new_tokens[:, step] = tokens
            is_done |= tokens == eos_token_id
            if bool(is_done.all()):
                break
            ids, positions = tokens[:, None], positions[:, -1:] + 1
        rows: list[list[int]] = new_tokens.tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in rows]
