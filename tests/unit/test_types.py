"""Small data types by hand."""

from __future__ import annotations

import dataclasses
import math
import pickle

import pytest
import torch

from fedgraft import types
from fedgraft.types import FROZEN, IGNORE_INDEX, PRIVATE, SHARED, Batch, ClientTask, ParamRef, RoundPlan, Weighted, assigned


def test_only_shared_and_assigned_are_sent() -> None:
    assert [group.is_sent for group in (FROZEN, PRIVATE, SHARED, assigned(2, 5))] == [False, False, True, True]
    assert [str(group) for group in (FROZEN, PRIVATE, SHARED, assigned(2, 5))] == [
        "frozen",
        "private",
        "shared",
        "assigned(2, 5)",
    ]
    assert assigned(2, 5) == assigned(2, 5) != assigned(2, 4)


def ref(**fields: object) -> ParamRef:
    return ParamRef(key="k", name="n", part="experts", shape=(2, 3), **fields)  # type: ignore[arg-type]


def test_a_reference_is_a_writable_view() -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    assert ref().view(whole) is whole
    assert ref().num_elements == 6
    strided = ref(dim=0, start=1, stop=4, step=2).view(whole)
    assert strided.tolist() == [[3.0, 4.0, 5.0], [9.0, 10.0, 11.0]]
    columns = ref(dim=1, start=2, stop=3).view(whole)
    assert columns.tolist() == [[2.0], [5.0], [8.0], [11.0]]
    columns.zero_()
    assert whole[:, 2].tolist() == [0.0] * 4
    assert ParamRef(key="k", name="n", part="other", shape=()).num_elements == 1


def test_weighted_sums() -> None:
    total = Weighted(total=3.0, weight=2.0) + Weighted(total=1.0, weight=6.0)
    assert total == Weighted(total=4.0, weight=8.0)
    assert total.mean == 0.5
    assert math.isnan(Weighted(total=0.0, weight=0.0).mean)


def test_a_batch_counts_labels_after_the_shift() -> None:
    labels = torch.tensor([[7, 8, IGNORE_INDEX], [IGNORE_INDEX, IGNORE_INDEX, 0]])
    batch = Batch(input_ids=torch.zeros(2, 3, dtype=torch.int64), attention_mask=torch.ones(2, 3), labels=labels)
    assert (batch.num_examples, batch.num_label_tokens) == (2, 2)  # the first column is predicted by nothing


def test_messages_are_frozen_and_travel() -> None:
    plan = RoundPlan(round_idx=3, num_steps=2, learning_rate=0.1)
    task = ClientTask(client_id=1, plan=plan, keys=("a",), assignment={0: (1, 2)})
    assert task.round_idx == 3
    assert pickle.loads(pickle.dumps(task)) == task
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.client_id = 2  # type: ignore[misc]
    for name in types.__all__:
        value = getattr(types, name)
        if dataclasses.is_dataclass(value):
            assert value.__dataclass_params__.frozen, name  # type: ignore[attr-defined]
            assert all(field.kw_only for field in dataclasses.fields(value)), name
