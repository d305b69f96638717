"""Anchor clients: disjoint labels, separate clusters, cohorts in fixed numbers."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedgraft.aggregation.anchors import cluster_anchors, draw_order, farthest_first, label_anchors, split_cohort
from fedgraft.errors import MethodError


def test_anchors_have_disjoint_labels_where_such_clients_exist() -> None:
    labels = [
        {"a": 5, "b": 5, "c": 5, "d": 5},
        {"a": 30, "b": 10},
        {"c": 1, "a": 9},
        {"c": 40, "d": 40},
        {"b": 20},
        {"a": 3, "d": 3},
    ]
    chosen = label_anchors(labels, 3)
    assert chosen[0] == 4
    for one, other in itertools.combinations(label_anchors(labels, 2), 2):
        assert not set(labels[one]) & set(labels[other])
    assert len(set(label_anchors(labels, 6))) == 6
    # Amounts do not matter, shares do.
    assert label_anchors([{name: 7 * count for name, count in each.items()} for each in labels], 3) == chosen


def test_a_mixed_client_is_no_anchor_while_equally_far_ones_have_one_label() -> None:
    labels = [{"a": 4}, {"b": 1, "c": 1}, {"b": 5}, {"d": 1, "c": 3}, {"c": 2}]
    # All but client 0 are as far from it as can be; client 1, the first of them, would stand between b and c.
    assert label_anchors(labels, 3) == (0, 2, 4)
    assert farthest_first(torch.ones(3, 3) - torch.eye(3), 2, 0, prefer_S=torch.tensor([0.0, 0.5, 0.9])) == (0, 2)


def test_labels_that_tell_nobody_apart_are_refused() -> None:
    for labels in ([{"all": 4}] * 3, [{}] * 3):
        with pytest.raises(MethodError, match="by labels, and the data has fewer than two"):
            label_anchors(labels, 2)


def test_a_draw_depends_on_who_is_drawn_from_and_not_on_their_order() -> None:
    orders = {tuple(draw_order((7, 2, 5, 9), seed)) for seed in range(50)}
    assert orders == {tuple(draw_order((9, 5, 7, 2), seed)) for seed in range(50)}
    assert all(sorted(order) == [2, 5, 7, 9] for order in orders)
    assert len(orders) > 12


def test_farthest_first_takes_who_is_farthest_from_the_nearest() -> None:
    points = torch.tensor([[0.0], [1.0], [4.0], [9.0], [9.5]])
    distance = torch.cdist(points, points)
    assert farthest_first(distance, 4, 0) == (0, 4, 2, 1)
    assert farthest_first(torch.zeros(3, 3), 3, 1) == (1, 0, 2)  # all alike: each once, lowest first


def test_one_anchor_comes_from_each_cluster_and_lies_in_its_middle() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    noise = torch.randn(7, 3, 2, generator=generator)
    points = centres + torch.cat([torch.zeros(1, 3, 2), noise, -noise])  # the means are the centres, where row 0 to 2 lie
    assert sorted(cluster_anchors(points.reshape(-1, 2), 3)) == [0, 1, 2]
    assert sorted(cluster_anchors(torch.zeros(4, 2), 4)) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_anchors", [0, 1, 3, 5])
def test_a_cohort_has_the_anchors_that_are_wanted_as_far_as_there_are_any(num_anchors: int) -> None:
    for size in range(1, 10):
        for wanted in range(9):
            anchors, others = split_cohort(size, num_anchors, 9, wanted)
            assert anchors + others == size
            assert 0 <= anchors <= num_anchors
            assert 0 <= others <= 9 - num_anchors
            if wanted <= min(size, num_anchors) and size - wanted <= 9 - num_anchors:
                assert anchors == wanted
