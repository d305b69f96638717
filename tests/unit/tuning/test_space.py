"""Points of a space: counts by hand, conditions, draws that depend on the seed only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from fedgraft.tuning.space import Dimension, applicable, corners, draw_points, grid_points, point_text, value_at, with_values


def space(**dims: Any) -> dict[str, Dimension]:
    return {key.replace("__", "."): Dimension.model_validate(dim) for key, dim in dims.items()}


def test_a_grid_has_every_combination_in_order() -> None:
    points = grid_points(space(a=[1, 2], b={"integer": [3, 7], "step": 2}), {})
    assert points == [{"a": a, "b": b} for a in (1, 2) for b in (3, 5, 7)]


def test_a_key_whose_condition_fails_is_absent_and_points_are_not_repeated() -> None:
    found = grid_points(
        space(
            method=[{"name": "fedavg"}, {"name": "flex"}],
            method__n_graft={"grid": [1, 2], "when": {"method.name": "flex"}},
            rounds={"grid": [5], "when": {"kind": ["x", "y"]}},  # of the base
        ),
        {"kind": "y"},
    )
    assert found == [
        {"method": {"name": "fedavg"}, "rounds": 5},
        {"method": {"name": "flex"}, "method.n_graft": 1, "rounds": 5},
        {"method": {"name": "flex"}, "method.n_graft": 2, "rounds": 5},
    ]
    assert applicable(space(a={"grid": [1], "when": {"kind": "x"}}), {"kind": "z"}, {"a": 1}) == {}


def test_draws_cross_the_grids_and_depend_on_seed_and_number_only() -> None:
    dims = space(
        m={"grid": ["p", "q"]}, rate={"log_uniform": ["1e-4", 1e-2]}, share={"uniform": [0, 1]}, k={"choice": [4, 8, 16]}
    )
    few, many = draw_points(dims, {}, 3, seed=5), draw_points(dims, {}, 40, seed=5)
    assert few == many[:6]
    assert draw_points(dims, {}, 3, seed=6) != few
    assert [point["m"] for point in few] == ["p", "q"] * 3
    assert few[0]["rate"] == few[1]["rate"]
    rates = np.log10([point["rate"] for point in many[::2]])
    assert rates.min() >= -4
    assert rates.max() <= -2
    # Even in the logarithm: the mean of 40 draws is within four standard errors of the middle; even draws would give -2.3.
    assert abs(rates.mean() + 3) < 4 * 2 / math.sqrt(12 * 40)
    assert {point["k"] for point in many} == {4, 8, 16}


def test_corners_have_every_end() -> None:
    dims = space(a={"uniform": [0, 1]}, b={"integer": [1, 9]}, c={"choice": ["x", "y", "z"]})
    found = corners(dims, {})
    assert len(found) == 12
    few = corners(dims, {}, most=4)
    assert {point["a"] for point in few} == {0, 1}
    assert {point["b"] for point in few} == {1, 9}
    assert {point["c"] for point in few} == {"x", "y", "z"}


def test_values_go_into_a_copy_of_the_tree() -> None:
    tree: dict[str, Any] = {"data": {"partition": {"name": "dirichlet"}}, "seeds": None}
    made = with_values(tree, {"data.partition.alpha": 0.1, "seeds": [1], "federation.rounds": 3})
    assert made == {
        "data": {"partition": {"name": "dirichlet", "alpha": 0.1}}, "seeds": [1], "federation": {"rounds": 3},
    }  # fmt: skip
    assert tree == {"data": {"partition": {"name": "dirichlet"}}, "seeds": None}
    assert value_at(made, "data.partition.alpha") == 0.1
    assert value_at(made, "data.nothing.alpha") is None


def test_a_point_in_one_line() -> None:
    point = {"data.partition.alpha": 0.1, "method": {"score": "random", "name": "flex"}, "seeds": [1, 2]}
    assert point_text(point) == "partition.alpha=0.1, method=flex score=random, seeds=[1, 2]"


@pytest.mark.parametrize(
    ("dim", "text"),
    [
        ({"grid": [1], "choice": [2]}, "found grid and choice"),
        ({"when": {"a": 1}}, "found none"),
        ({"grid": [1, 1]}, "different values"),
        ({"uniform": [2, 1]}, "the first below the second"),
        ({"uniform": [0, math.inf]}, "the first below the second"),
        ({"log_uniform": [0, 1]}, "above 0"),
        ({"grid": [1], "step": 2}, "step has no effect"),
        ({"grid": []}, "at least 1"),
        ({"gird": [1]}, "gird"),
        (3, "a list of values"),
    ],
)
def test_a_wrong_dimension_is_refused(dim: Any, text: str) -> None:
    with pytest.raises(ValidationError, match=text):
        Dimension.model_validate(dim)
