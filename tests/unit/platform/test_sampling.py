"""Cohorts are a pure, fair function of seed and round."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from fedgraft.platform.sampling import sample_cohort


@pytest.mark.parametrize("size", [None, 5, 9])
def test_everybody_takes_part_where_nobody_is_left_out(size: int | None) -> None:
    assert sample_cohort(0, 3, 5, size) == (0, 1, 2, 3, 4)


def test_a_cohort_has_its_size_no_client_twice_in_order() -> None:
    for round_idx in range(1, 50):
        cohort = sample_cohort(1, round_idx, 20, 7)
        assert len(set(cohort)) == 7
        assert list(cohort) == sorted(cohort)
        assert set(cohort) <= set(range(20))
        assert all(type(client) is int for client in cohort)


def test_the_same_round_draws_the_same_whatever_was_drawn_before() -> None:
    forward = [sample_cohort(4, r, 30, 5) for r in range(1, 9)]
    np.random.seed(3)
    backward = [sample_cohort(4, r, 30, 5) for r in range(8, 0, -1)]
    assert forward == backward[::-1]
    assert len(set(forward)) > 4
    assert forward != [sample_cohort(5, r, 30, 5) for r in range(1, 9)]


def test_every_client_is_drawn_alike() -> None:
    rounds, clients, size = 2000, 10, 3
    counts = Counter(client for r in range(rounds) for client in sample_cohort(0, r, clients, size))
    expected = rounds * size / clients
    deviation = (rounds * (size / clients) * (1 - size / clients)) ** 0.5
    assert all(abs(counts[client] - expected) < 4 * deviation for client in range(clients))
