from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.data.batches import eval_batches, train_batches, train_order
from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.data.prepared import TokenizedSplit


@pytest.fixture
def split(write_lines: Callable[..., Path], tokenizer: Any, tmp_path: Path) -> TokenizedSplit:
    records = [{"instruction": "p", "response": "x" * (1 + n % 9), "category": "a"} for n in range(26)]
    return prepare(DataConfig(path=write_lines(records)), tokenizer, 0, tmp_path / "p").split(0, "train")


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (10, 10), (7, 3), (5, 1), (3, 2)])
def test_epochs_follow_one_another_without_short_batches(count: int, batch_size: int) -> None:
    num_steps = 3 * count
    order = train_order(count, num_steps, batch_size, seed=4)
    assert order.shape == (num_steps, batch_size)
    for start in range(0, num_steps * batch_size, count):  # every epoch holds every example once
        assert sorted(order.ravel()[start : start + count].tolist()) == list(range(count))


def test_a_small_split_is_seen_whole_in_every_step() -> None:
    order = train_order(3, 5, 8, seed=0)
    assert [sorted(step) for step in order.tolist()] == [[0, 1, 2]] * 5


def test_order_is_a_function_of_the_seed_and_its_beginning_of_nothing_else() -> None:
    np.random.seed(0)  # a global generator must not matter
    first = train_order(20, 9, 6, seed=1)
    np.random.seed(1)
    assert np.array_equal(first, train_order(20, 9, 6, seed=1))
    assert np.array_equal(first[:4], train_order(20, 4, 6, seed=1))
    assert not np.array_equal(first, train_order(20, 9, 6, seed=2))
    epochs = first.ravel()[:40].reshape(2, 20)
    assert not np.array_equal(epochs[0], epochs[1])


def test_no_steps_give_no_batches(split: TokenizedSplit) -> None:
    assert list(train_batches(split, 0, 4, 0, 0)) == []


def test_train_batches_hold_the_examples_of_the_order(split: TokenizedSplit) -> None:
    batches = list(train_batches(split, 7, 4, 3, 0))
    assert len(batches) == 7
    for batch, indices in zip(batches, train_order(len(split), 7, 4, 3), strict=True):
        assert torch.equal(batch.input_ids, split.batch(indices, 0).input_ids)
        assert batch.attention_mask.sum(dim=1).tolist() == split.lengths[indices].tolist()


def test_evaluation_sees_everything_once_by_length(split: TokenizedSplit) -> None:
    batches = list(eval_batches(split, 5, 0))
    assert [batch.num_examples for batch in batches] == [5] * (len(split) // 5) + [len(split) % 5] * bool(len(split) % 5)
    lengths = [int(length) for batch in batches for length in batch.attention_mask.sum(dim=1)]
    assert all(short <= long for short, long in pairwise(lengths))
    assert Counter(lengths) == Counter(split.lengths.tolist())
    assert sum(batch.num_label_tokens for batch in batches) == split.num_response_tokens


def test_evaluation_limit_takes_the_first_examples(split: TokenizedSplit) -> None:
    batches = list(eval_batches(split, 4, 0, max_examples=6))
    lengths = sorted(int(length) for batch in batches for length in batch.attention_mask.sum(dim=1))
    assert lengths == sorted(split.lengths[:6].tolist())
    assert sum(batch.num_examples for batch in eval_batches(split, 4, 0, max_examples=10_000)) == len(split)
