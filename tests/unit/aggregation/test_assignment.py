"""Assignments under limits on both sides, against brute force, another solver, and what counting says."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp

from fedgraft.aggregation.assignment import (
    CountBounds,
    choose_at_random,
    choose_best,
    choose_exactly,
    coefficient_of_variation,
    draw_orders,
    load_bounds,
)
from fedgraft.errors import MethodError

ALL_4x4 = np.array(list(itertools.product((0.0, 1.0), repeat=16)))
BY_ROW = ALL_4x4.reshape(-1, 4, 4).sum(axis=2)
BY_COLUMN = ALL_4x4.reshape(-1, 4, 4).sum(axis=1)


def best_of_all(score: np.ndarray, rows: CountBounds, columns: CountBounds) -> float | None:
    """The largest total among all 65,536 choices; ``None`` where none keeps to the bounds."""
    fits = ((rows.lower <= BY_ROW) & (rows.upper >= BY_ROW)).all(axis=1)
    fits &= ((columns.lower <= BY_COLUMN) & (columns.upper >= BY_COLUMN)).all(axis=1)
    return float((ALL_4x4[fits] @ score.reshape(-1)).max()) if fits.any() else None


def drawn_bounds(rng: np.random.Generator, *, exact: bool) -> CountBounds:
    low = rng.integers(0, 4, size=4)
    high = low if exact else np.minimum(4, low + rng.integers(0, 3, size=4))
    return CountBounds(lower=tuple(low.tolist()), upper=tuple(high.tolist()))


@pytest.mark.parametrize("exact", ["rows", "columns", "neither"])
def test_it_is_the_best_of_all_choices_and_refuses_only_where_there_is_none(exact: str) -> None:
    rng = np.random.default_rng(len(exact))
    seen = {True: 0, False: 0}
    for _ in range(30):
        # Scores of both signs: with open bounds a pair may be worth less than none.
        score = rng.normal(size=(4, 4))
        rows, columns = drawn_bounds(rng, exact=exact == "rows"), drawn_bounds(rng, exact=exact == "columns")
        expected = best_of_all(score, rows, columns)
        seen[expected is None] += 1
        if expected is None:
            with pytest.raises(MethodError, match="assignment"):
                choose_exactly(torch.tensor(score), rows=rows, columns=columns)
            continue
        chosen = choose_exactly(torch.tensor(score), rows=rows, columns=columns)
        assert chosen.dtype == torch.bool
        assert rows.hold(chosen.sum(dim=1).tolist())
        assert columns.hold(chosen.sum(dim=0).tolist())
        assert float((chosen * torch.tensor(score)).sum()) == pytest.approx(expected, abs=1e-12)
    assert min(seen.values()) >= 3


def test_vertices_are_whole_over_fifty_instances_and_as_good_as_an_integer_search(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    found = []
    with monkeypatch.context() as patched:
        patched.setattr("scipy.optimize.milp", None)  # the relaxation alone has to do
        for _ in range(50):
            score = rng.random((8, 20))
            chosen = choose_exactly(torch.tensor(score), rows=CountBounds.exactly([5] * 8), columns=CountBounds.between(1, 3, 20))
            found.append((score, chosen))
    sums = np.vstack([np.kron(np.eye(8), np.ones(20)), np.kron(np.ones(8), np.eye(20))])
    for place, (score, chosen) in enumerate(found):
        limits = LinearConstraint(sums, [*[5] * 8, *[1] * 20], [*[5] * 8, *[3] * 20])
        assert chosen.sum(dim=1).tolist() == [5] * 8
        assert 1 <= int(chosen.sum(dim=0).min()) <= int(chosen.sum(dim=0).max()) <= 3
        if place < 15:
            other: OptimizeResult = milp(
                -score.reshape(-1), integrality=np.ones(160), bounds=Bounds(0, 1), constraints=limits, options={"mip_rel_gap": 0}
            )
            assert float((chosen * torch.tensor(score)).sum()) == pytest.approx(-other.fun, abs=1e-9)


def test_an_answer_that_is_not_whole_is_searched_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    score = np.array([[3.0, 2, 0, 0], [3, 1, 0, 0], [0, 0, 1, 5], [1, 1, 1, 1]])
    rows, columns = CountBounds.exactly([1] * 4), CountBounds.exactly([1] * 4)

    def halves(*args: Any, **kwargs: Any) -> OptimizeResult:
        return OptimizeResult(x=np.full(16, 0.25), status=0)

    monkeypatch.setattr("scipy.optimize.linprog", halves)
    chosen = choose_exactly(torch.tensor(score), rows=rows, columns=columns)
    assert float((chosen * torch.tensor(score)).sum()) == best_of_all(score, rows, columns) == 11


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_the_size_of_scores_does_not_matter(scale: float) -> None:
    rng = np.random.default_rng(3)
    score = rng.random((4, 4))
    rows, columns = CountBounds.exactly([2] * 4), CountBounds.between(2, 2, 4)
    chosen = choose_exactly(torch.tensor(score * scale), rows=rows, columns=columns)
    assert float((chosen * torch.tensor(score)).sum()) == pytest.approx(best_of_all(score, rows, columns), abs=1e-12)
    # A large number in common to a row's pairs changes no choice either.
    raised = choose_exactly(torch.tensor(score * scale + 1000 * scale), rows=rows, columns=columns)
    assert torch.equal(raised, chosen)


def test_columns_may_choose_rows() -> None:
    score = torch.rand(6, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    few, many = CountBounds.exactly([2] * 6), CountBounds.between(3, 5, 3)
    there = choose_exactly(score, rows=few, columns=many)
    back = choose_exactly(score.T, rows=many, columns=few).T
    assert there.sum(dim=1).tolist() == back.sum(dim=1).tolist() == [2] * 6
    assert float((there * score).sum()) == pytest.approx(float((back * score).sum()))


def test_bounds_that_do_not_bind_leave_the_greedy_choice_also_among_equals() -> None:
    generator = torch.Generator().manual_seed(5)
    for _ in range(10):
        score = torch.randint(0, 3, (6, 5), generator=generator).double()  # full of equals
        counts = torch.randint(1, 5, (6,), generator=generator).tolist()
        free = load_bounds(counts, 5, 1e9)
        assert (free.lower, free.upper) == ((0,) * 5, (6,) * 5)
        assert torch.equal(choose_exactly(score, rows=CountBounds.exactly(counts), columns=free), choose_best(score, counts))
        order = draw_orders(5, range(6))
        assert order.sort(dim=1).values.tolist() == [[0, 1, 2, 3, 4]] * 6
        found = choose_exactly(score, rows=CountBounds.exactly(counts), columns=free, among_equals=order)
        # The order decides among equals only: scores are whole, and these steps are less than one.
        assert torch.equal(found, choose_best(score + order / 10, counts))


def test_the_greedy_choice_takes_the_best_and_the_lower_among_equals() -> None:
    score = torch.tensor([[0.5, 0.9, 0.5, 0.1], [1.0, 1.0, 1.0, 1.0]])
    assert choose_best(score, [2, 3]).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0]]
    other = torch.tensor([[0.0, 0.0, 1.0, 9.0], [0.0, 3.0, 1.0, 2.0]])
    assert choose_best(score, [2, 3], among_equals=other).int().tolist() == [[0, 1, 1, 0], [0, 1, 1, 1]]


def test_a_row_draws_the_same_whoever_is_there() -> None:
    both = choose_at_random(6, [2, 4], [11, 12])
    assert both.sum(dim=1).tolist() == [2, 4]
    assert torch.equal(choose_at_random(6, [4], [12])[0], both[1])
    drawn = choose_at_random(6, [3] * 3000, range(3000)).double().mean(dim=0)
    # Each column is in half of the draws; 3000 of them have a standard error of 0.009.
    torch.testing.assert_close(drawn, torch.full((6,), 0.5, dtype=torch.float64), atol=0.04, rtol=0)


# ---- bounds


def test_load_bounds_are_the_cards() -> None:
    # 10 clients of 3 experts among 8: m = 3.75, 0.9 m = 3.375, 1.1 m = 4.125.
    assert load_bounds([3] * 10, 8, 0.1) == CountBounds.between(3, 5, 8)
    # 1.12 * 6.25 = 7 is a little more than 7 in floating point, and must not make room for one more.
    assert (1 + 0.12) * 6.25 > 7
    assert load_bounds([5] * 10, 8, 0.12) == CountBounds.between(5, 7, 8)
    assert load_bounds([4] * 3, 4, 0.0) == CountBounds.between(3, 3, 4)
    assert load_bounds([1, 2], 4, math.inf) == CountBounds.between(0, 2, 4)
    assert load_bounds([0, 0], 4, math.inf) == CountBounds.between(0, 0, 4)


def test_load_bounds_can_always_be_met() -> None:
    rng = np.random.default_rng(6)
    for _ in range(60):
        num_columns = int(rng.integers(2, 9))
        counts = rng.integers(0, num_columns + 1, size=int(rng.integers(1, 8))).tolist()
        score = torch.tensor(rng.random((len(counts), num_columns)))
        columns = load_bounds(counts, num_columns, float(rng.choice([0, 0.1, 0.5])))
        chosen = choose_exactly(score, rows=CountBounds.exactly(counts), columns=columns)
        assert chosen.sum(dim=1).tolist() == counts


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        (CountBounds.exactly([3, 1]), CountBounds.between(0, 2, 2), "gives a client at least 3 experts, and there are 2"),
        (CountBounds.exactly([1, 1]), CountBounds.between(0, 9, 3), "has bounds for 2 clients and 3 experts"),
        (CountBounds.exactly([2, 2]), CountBounds.between(0, 1, 2), "gives the clients 4 experts in all, and the experts take 2"),
        (CountBounds.exactly([1, 0]), CountBounds.between(1, 2, 2), "gives the experts 2 clients in all, and the clients take 1"),
    ],
)
def test_impossible_bounds_are_one_clear_error(rows: CountBounds, columns: CountBounds, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        choose_exactly(torch.zeros(2, 2), rows=rows, columns=columns, sides=("client", "expert"))


def test_bounds_that_only_a_solver_finds_impossible_are_refused_too() -> None:
    # The sums agree, but the first column's only taker would have to take it twice.
    rows = CountBounds.exactly([0, 0, 3])
    columns = CountBounds(lower=(2, 0, 1), upper=(2, 1, 1))
    with pytest.raises(MethodError, match="no assignment gives every client 0 to 3 experts and every expert 0 to 2 clients"):
        choose_exactly(torch.zeros(3, 3), rows=rows, columns=columns, sides=("client", "expert"))


def test_wrong_bounds_counts_and_scores_are_refused() -> None:
    for lower, upper in (((2,), (1,)), ((-1,), (1,)), ((1, 1), (1,))):
        with pytest.raises(MethodError, match="0 <= lower <= upper"):
            CountBounds(lower=lower, upper=upper)
    with pytest.raises(MethodError, match="asks for 3 of 2 columns"):
        choose_best(torch.zeros(1, 2), [3])
    with pytest.raises(MethodError, match="asks for -1 of 2 columns"):
        choose_at_random(2, [-1], [0])
    score = torch.tensor([[0.0, float("nan")]])
    with pytest.raises(MethodError, match="score of client 0 for expert 1 is nan"):
        choose_exactly(score, rows=CountBounds.exactly([1]), columns=CountBounds.between(0, 1, 2), sides=("client", "expert"))


# ---- what it is for


def test_coefficient_of_variation() -> None:
    assert coefficient_of_variation(torch.tensor([3, 3, 3])) == 0
    assert coefficient_of_variation(torch.zeros(4)) == 0
    assert coefficient_of_variation(torch.tensor([0, 4])) == pytest.approx(1.0)  # mean 2, deviations 2
    assert coefficient_of_variation(torch.tensor([1, 2, 3, 6])) == pytest.approx(math.sqrt(3.5) / 3)


def cumulative_balance(kind: str, slack: float, weight: float) -> tuple[float, float, int]:
    """Mean CV of a round, CV over all rounds, and experts that nobody ever held: 40 clients of 3 of 8 experts, 10 a round."""
    rng = np.random.default_rng(7)
    # All clients like the first experts best.
    fitness = torch.tensor(rng.random((40, 8)) + np.linspace(1, 0, 8))
    deficit, total, by_round = torch.zeros(8, dtype=torch.float64), torch.zeros(8), []
    for _ in range(40):
        clients = np.sort(rng.permutation(40)[:10])
        score, counts = fitness[clients] + weight * deficit, [3] * 10
        if kind == "greedy":
            chosen = choose_best(score, counts)
        else:
            chosen = choose_exactly(score, rows=CountBounds.exactly(counts), columns=load_bounds(counts, 8, slack))
        load = chosen.sum(dim=0)
        by_round.append(coefficient_of_variation(load))
        deficit = (deficit + load.double().mean() - load).clamp_min(0)
        total += load
    return float(np.mean(by_round)), coefficient_of_variation(total), int((total == 0).sum())


def test_the_program_balances_where_greed_starves_and_deficits_even_out_the_rest() -> None:
    greedy, plain, mended = (cumulative_balance(*case) for case in (("greedy", 0, 0), ("exact", 0.1, 0.0), ("exact", 0.1, 1.0)))
    assert greedy[0] > 3 * plain[0]
    assert greedy[1] > 3 * plain[1]
    assert mended[1] < 0.2 * plain[1]
    assert mended[2] == plain[2] == 0 < greedy[2]
    assert cumulative_balance("exact", 1e9, 0.0) == greedy
