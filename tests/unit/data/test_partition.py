from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgraft.data.config import (
    DirichletPartition,
    IidPartition,
    NaturalPartition,
    PartitionConfig,
    PathologicalPartition,
    QuantityPartition,
)
from fedgraft.data.examples import NO_LABEL
from fedgraft.data.partition import Shares, assign, draw_shares, partition
from fedgraft.errors import DataError

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
labels_of_a_pool = st.lists(st.sampled_from("abcdef"), min_size=60, max_size=150)
num_clients = st.integers(1, 7)
seeds = st.integers(0, 2**40)
kinds = st.sampled_from(
    [
        DirichletPartition(alpha=0.05, min_examples=3),
        DirichletPartition(alpha=10.0, min_examples=8),
        QuantityPartition(sigma=3.0, min_examples=4),
        QuantityPartition(sizes="dirichlet", alpha=0.1, min_examples=4),
        IidPartition(),
        PathologicalPartition(classes_per_client=1),
    ]
)


@FEW
@given(labels_of_a_pool, kinds, num_clients, seeds)
def test_every_index_goes_to_one_client_at_most(labels: list[str], kind: PartitionConfig, clients: int, seed: int) -> None:
    parts = partition(labels, kind, clients, seed)
    assert len(parts) == clients
    given_away = np.concatenate(parts)
    assert len(set(given_away.tolist())) == len(given_away)
    assert all((np.diff(part) > 0).all() for part in parts)
    covers_all = not isinstance(kind, PathologicalPartition) or clients >= len(set(labels))
    if covers_all:
        assert sorted(given_away.tolist()) == list(range(len(labels)))
    assert min(map(len, parts)) >= getattr(kind, "min_examples", 0)


@FEW
@given(labels_of_a_pool, st.integers(1, 3), num_clients, seeds)
def test_pathological_clients_hold_few_labels(labels: list[str], held: int, clients: int, seed: int) -> None:
    held = min(held, len(set(labels)))
    kind = PathologicalPartition(classes_per_client=held)
    for part in partition(labels, kind, clients, seed):
        assert len({labels[index] for index in part}) <= held
    holders = (draw_shares(Counter(labels), kind, clients, seed).matrix_CN > 0).sum(axis=1)
    assert holders.max() - holders.min() <= 1
    assert holders.sum() == held * clients


@FEW
@given(labels_of_a_pool, kinds, num_clients, seeds)
def test_no_other_call_changes_a_partition(labels: list[str], kind: PartitionConfig, clients: int, seed: int) -> None:
    first = partition(labels, kind, clients, seed)
    partition(labels, kind, clients, seed + 1)
    np.random.random(3)  # a global generator must not matter
    again = partition(labels, kind, clients, seed)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", [DirichletPartition(alpha=0.5), QuantityPartition(), IidPartition(), PathologicalPartition()])
def test_another_seed_gives_another_partition(kind: PartitionConfig) -> None:
    labels = list("abcde" * 40)
    first, other = (partition(labels, kind, 4, seed) for seed in (0, 1))
    assert any(not np.array_equal(one, two) for one, two in zip(first, other, strict=True))


def test_natural_gives_a_client_all_of_one_label() -> None:
    labels = list("bacbcc")
    assert [part.tolist() for part in partition(labels, NaturalPartition(), None, 0)] == [[1], [0, 3], [2, 4, 5]]
    shares = draw_shares(Counter(labels), NaturalPartition(), 2, 0)
    assert shares.names == ("b", "c")
    assert [part.tolist() for part in assign(labels, shares, 0)] == [[0, 3], [2, 4, 5]]


def test_natural_breaks_ties_by_name() -> None:
    assert draw_shares(Counter("zyxw"), NaturalPartition(), 2, 0).names == ("w", "x")


def test_large_alpha_approaches_equal_parts() -> None:
    labels = list("abcd" * 250)
    for part in partition(labels, DirichletPartition(alpha=1e5), 5, 3):
        histogram = Counter(labels[index] for index in part)
        assert all(abs(histogram[name] - 50) <= 2 for name in "abcd"), histogram


def test_small_alpha_is_more_uneven_than_large() -> None:
    counts = Counter(dict.fromkeys("abcdefgh", 100))

    def largest_share(alpha: float) -> float:
        drawn = [draw_shares(counts, DirichletPartition(alpha=alpha), 8, seed).matrix_CN for seed in range(20)]
        return float(np.mean([matrix.max(axis=1).mean() for matrix in drawn]))

    assert largest_share(0.05) > 0.8 > 0.4 > largest_share(5.0)


def test_dirichlet_shares_have_the_variance_of_the_distribution() -> None:
    # Var of one share of Dirichlet(a, ..., a) over N clients: (1/N)(1 - 1/N) / (N a + 1).
    counts = Counter({f"{number:04}": 1 for number in range(4000)})
    shares = draw_shares(counts, DirichletPartition(alpha=0.5), 4, 0).matrix_CN
    assert shares.mean() == pytest.approx(0.25)
    assert shares.var() == pytest.approx(0.25 * 0.75 / 3, rel=0.05)


def test_iid_sizes_differ_by_one_at_most() -> None:
    sizes = [len(part) for part in partition(list("ab" * 50), IidPartition(), 7, 0)]
    assert sum(sizes) == 100
    assert max(sizes) - min(sizes) <= 1


def test_quantity_is_uneven_in_size_and_even_in_labels() -> None:
    labels = list("ab" * 2000)
    parts = partition(labels, QuantityPartition(sigma=1.5), 6, 1)
    sizes = [len(part) for part in parts]
    assert max(sizes) > 4 * min(sizes)
    largest = max(parts, key=len)
    assert np.mean([labels[index] == "a" for index in largest]) == pytest.approx(0.5, abs=0.05)


def test_two_pools_are_cut_by_the_same_shares() -> None:
    train, test = list("abc" * 400), list("abc" * 100)
    shares = draw_shares(Counter(train), DirichletPartition(alpha=0.5), 4, 0)
    pools = zip(assign(train, shares, 0), assign(test, shares, 0, pool="test"), strict=True)
    for train_part, test_part in pools:
        train_counts = Counter(train[index] for index in train_part)
        test_counts = Counter(test[index] for index in test_part)
        for name in "abc":
            assert abs(train_counts[name] / 4 - test_counts[name]) <= 1.5, (train_counts, test_counts)


def test_top_up_prefers_labels_that_the_client_may_hold() -> None:
    labels = ["a"] * 20 + ["b"] * 40
    shares = Shares(classes=("a", "b"), matrix_CN=np.array([[0.9, 0.1, 0.0], [0.0, 0.0, 1.0]]), names=("most a", "some a", "b"))
    parts = assign(labels, shares, 0, min_examples=6)
    assert [Counter(labels[index] for index in part) for part in parts] == [{"a": 14}, {"a": 6}, {"b": 40}]


def test_the_floor_wins_over_labels_where_nobody_else_holds_them() -> None:
    labels = ["a"] * 50 + ["b"] * 2
    shares = draw_shares(Counter(labels), NaturalPartition(), None, 0)
    assert [len(part) for part in assign(labels, shares, 0, min_examples=6)] == [46, 6]


@pytest.mark.parametrize("kind", [DirichletPartition(), PathologicalPartition(), QuantityPartition()])
def test_another_seed_gives_other_shares(kind: PartitionConfig) -> None:
    first, again, other = (draw_shares(Counter("abcde"), kind, 4, seed).matrix_CN for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize(
    ("labels", "kind", "clients", "message"),
    [
        (["a", "b"], NaturalPartition(), 3, r"3 clients were asked for, but there are 2 labels \(a, b\)"),
        ([NO_LABEL] * 9, NaturalPartition(), None, "the examples have none"),
        ([NO_LABEL] * 9, DirichletPartition(), 3, "the examples have none"),
        (["a", "b"], IidPartition(), None, "needs a number of clients"),
        (["a", "b"], PathologicalPartition(classes_per_client=3), 2, "3 classes per client, but there are 2"),
        (["a", "b"] * 5, DirichletPartition(min_examples=4), 3, "10 examples for 3 clients"),
    ],
)
def test_impossible_partitions_are_refused(labels: list[str], kind: PartitionConfig, clients: int | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        partition(labels, kind, clients, 0)


def test_a_thousand_clients_are_topped_up_in_time() -> None:
    labels = list("abcdefgh" * 2500)
    parts = partition(labels, DirichletPartition(alpha=0.05, min_examples=8), 1000, 0)
    assert min(map(len, parts)) >= 8
