"""The tree over a cohort: the same bits in any order, the right sum, and few partial sums at a time."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from fedgraft.aggregation.reduce import PartialSum, TreeSum, leaf, merge
from fedgraft.errors import UpdateError
from fedgraft.types import Params

CANCELLING = (1e16, 1.0, -1e16, 1.0, 3.0)


def one(value: float, weight: float = 1.0, key: str = "w") -> PartialSum:
    return leaf({key: torch.tensor([value], dtype=torch.float64)}, {key: weight})


def summed(size: int, order: tuple[int, ...], give: dict[int, PartialSum | None]) -> PartialSum:
    tree = TreeSum(size)
    for position in order:
        tree.add(position, give[position])
    return tree.result()


def test_plain_sums_of_these_values_do_depend_on_order() -> None:
    # Else the next test shows nothing.
    assert len({sum(order) for order in itertools.permutations(CANCELLING)}) > 2


def test_arrival_order_never_changes_a_bit() -> None:
    found = set()
    for order in itertools.permutations(range(5)):
        total = summed(5, order, {i: one(value) for i, value in enumerate(CANCELLING)})
        found.add(float(total.total["w"]))
        assert (total.weight["w"], total.count["w"]) == (5.0, 5)
    # The documented tree: ((0 + 1) + (2 + 3)) + 4.
    assert found == {((1e16 + 1.0) + (-1e16 + 1.0)) + 3.0}


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16])
def test_node_level_i_is_the_sum_of_its_two_children(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    values = (torch.rand(size, generator=generator, dtype=torch.float64) * 2e16 - 1e16).tolist()
    level = list(values)
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [pair[0] + pair[1] if len(pair) == 2 else pair[0] for pair in pairs]
    order = torch.randperm(size, generator=generator).tolist()
    found = summed(size, tuple(order), {i: one(value) for i, value in enumerate(values)})
    assert float(found.total["w"]) == level[0]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12])
def test_the_mean_is_the_plain_weighted_mean(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    tensors = [{"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)} for _ in range(size)]
    weights = [{"a": float(i + 1), "b": float(size - i) / 3} for i in range(size)]
    mean = summed(size, tuple(range(size)), {i: leaf(tensors[i], weights[i]) for i in range(size)}).mean()
    for key in ("a", "b"):
        flat = [
            sum(Fraction(weights[i][key]) * Fraction(float(tensors[i][key].reshape(-1)[n])) for i in range(size))
            / sum(Fraction(weights[i][key]) for i in range(size))
            for n in range(tensors[0][key].numel())
        ]
        assert mean[key].dtype == torch.float64
        assert mean[key].reshape(-1).tolist() == pytest.approx([float(value) for value in flat], rel=1e-12, abs=1e-12)


def test_weight_zero_is_absence_and_so_is_failure() -> None:
    values = {0: 0.1, 1: 0.7, 2: -3.3, 3: 1e10, 4: 0.2}
    for gone in range(5):
        present = {i: one(value, weight=i + 1.0) for i, value in values.items()}
        silent = summed(5, tuple(range(5)), present | {gone: one(math.nan, weight=0.0)})
        failed = summed(5, (4, 2, 0, 1, 3), {i: one(values[i], weight=i + 1.0) for i in values} | {gone: None})
        assert silent.total["w"].equal(failed.total["w"])
        assert silent.weight == failed.weight == {"w": 15.0 - (gone + 1)}
        assert silent.count == failed.count == {"w": 4}
    nobody = summed(3, (2, 0, 1), {0: None, 1: one(1.0, weight=0.0), 2: None})
    assert nobody.mean() == nobody.total == nobody.weight == nobody.count == {}
    assert summed(0, (), {}).total == {}


def test_keys_are_summed_over_those_who_sent_them() -> None:
    give: dict[int, PartialSum | None] = {0: one(1.0, 2.0, "a"), 1: one(5.0, 1.0, "b"), 2: one(4.0, 1.0, "a")}
    total = summed(3, (2, 1, 0), give)
    assert {key: float(value) for key, value in total.mean().items()} == {"a": 2.0, "b": 5.0}
    assert total.count == {"a": 2, "b": 1}


def test_subtrees_may_be_merged_elsewhere() -> None:
    values = [1e16, 1.0, -1e16, 1.0, 3.0, -7.0, 1e16, 2.0]
    whole = summed(8, tuple(range(8)), {i: one(value) for i, value in enumerate(values)})
    halves = [summed(4, (3, 1, 0, 2), {i: one(values[4 * h + i]) for i in range(4)}) for h in range(2)]
    merged = merge(*halves)
    assert merged is not None
    assert merged.total["w"].equal(whole.total["w"])
    assert (merged.weight, merged.count) == (whole.weight, whole.count)
    assert merge(None, None) is None
    assert merge(None, whole) is whole
    assert merge(whole, None) is whole


@pytest.mark.parametrize("size", [1, 2, 5, 8, 33, 100])
def test_in_order_few_partial_sums_wait(size: int) -> None:
    tree = TreeSum(size)
    most = 0
    for position in range(size):
        tree.add(position, one(1.0))
        most = max(most, tree.num_waiting)
    assert most <= math.log2(size) + 1
    assert float(tree.result().total["w"]) == size


def test_a_place_comes_once_and_all_places_come() -> None:
    tree = TreeSum(3)
    tree.add(1, one(1.0))
    with pytest.raises(UpdateError, match="place 1 of the cohort came twice"):
        tree.add(1, one(1.0))
    for wrong in (-1, 3):
        with pytest.raises(UpdateError, match="outside a cohort of 3"):
            tree.add(wrong, None)
    with pytest.raises(UpdateError, match=r"places \[0, 2\] of a cohort of 3 are missing"):
        tree.result()
    tree.add(0, None)
    tree.add(2, None)
    assert float(tree.result().total["w"]) == 1.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    tensors: Params = {"fine": torch.zeros(2), "bad": torch.tensor([0.0, value])}
    with pytest.raises(UpdateError, match="bad has values that are not finite"):
        leaf(tensors, {"fine": 1.0, "bad": 1.0})


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_weights_that_make_no_mean_are_refused(weight: float) -> None:
    with pytest.raises(UpdateError, match="w has weight"):
        leaf({"w": torch.ones(1)}, {"w": weight})


def test_shapes_must_agree() -> None:
    tree = TreeSum(2)
    tree.add(0, leaf({"w": torch.zeros(1)}, {"w": 1.0}))
    with pytest.raises(UpdateError, match="w: two clients sent shapes"):
        tree.add(1, leaf({"w": torch.zeros(3)}, {"w": 1.0}))


def test_the_contribution_is_copied() -> None:
    tensor = torch.ones(2)
    found = leaf({"w": tensor}, {"w": 3.0})
    tensor.zero_()
    assert found.total["w"].tolist() == [3.0, 3.0]
    sent = torch.ones(2, dtype=torch.float64)
    found = leaf({"w": sent}, {"w": 1.0})
    sent.zero_()
    assert found.total["w"].tolist() == [1.0, 1.0]
