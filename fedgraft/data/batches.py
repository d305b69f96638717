"""The order in which a split's examples are seen: shuffled epochs for training, sorted by length for evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

from fedgraft.data.prepared import TokenizedSplit
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = ["eval_batches", "pooled_batch", "train_batches", "train_order"]


def train_order(num_examples: int, num_steps: int, batch_size: int, seed: int) -> NDArray[np.int64]:
    """Give the examples of each step, shape (num_steps, min(batch_size, num_examples)).

    One seeded permutation of all examples follows another; a batch at the end of an epoch is filled up from the next one.
    A split smaller than a batch is seen as a whole in every step.

    Args:
        num_examples: >= 1.
        num_steps: >= 0.
        batch_size: >= 1.
        seed: Fixes the order; more steps with the same seed begin with the same ones.
    """
    size = min(batch_size, num_examples)
    rng = np.random.default_rng(seed)
    num_epochs = -(-num_steps * size // num_examples)
    epochs = [rng.permutation(num_examples) for _ in range(num_epochs)]
    stream = np.concatenate([np.empty(0, dtype=np.int64), *epochs])
    return stream[: num_steps * size].reshape(num_steps, size)


def train_batches(split: TokenizedSplit, num_steps: int, batch_size: int, seed: int, pad_token_id: int) -> Iterator[Batch]:
    """Yield one batch a step, in the order of ``train_order``; a pure function of its arguments."""
    for indices in train_order(len(split), num_steps, batch_size, seed):
        yield split.batch(indices, pad_token_id)


def pooled_batch(splits: Sequence[TokenizedSplit], indices: Sequence[int] | NDArray[np.int64], pad_token_id: int) -> Batch:
    """Put examples of several splits into one batch, in this order; they are numbered through all splits, one after another."""
    ends = np.cumsum([len(split) for split in splits])
    rows = []
    for index in indices:
        place = int(np.searchsorted(ends, index, side="right"))
        start = int(ends[place - 1]) if place else 0
        rows.append(splits[place].batch([int(index) - start], pad_token_id))
    width = max(row.input_ids.shape[1] for row in rows)

    def padded(name: str, value: int) -> torch.Tensor:
        found = [getattr(row, name) for row in rows]
        return torch.cat([pad(each, (0, width - each.shape[1]), value=value) for each in found])

    return Batch(
        input_ids=padded("input_ids", pad_token_id),
        attention_mask=padded("attention_mask", 0),
        labels=padded("labels", IGNORE_INDEX),
    )


def eval_batches(split: TokenizedSplit, batch_size: int, pad_token_id: int, max_examples: int | None = None) -> Iterator[Batch]:
    """Yield the first ``max_examples`` examples (all if ``None``) once each, sorted by length, so that little is padding."""
    count = len(split) if max_examples is None else min(max_examples, len(split))
    order = np.argsort(split.lengths[:count], kind="stable")
    for start in range(0, count, batch_size):
        yield split.batch(order[start : start + batch_size], pad_token_id)
