"""Who gets what, under limits on both sides: experts for clients, or clients for experts.

A transportation problem: choose pairs (row, column), each at most once, with the largest total score, so that every row has a
number of columns within its bounds and every column a number of rows within its own,

    max sum_rc s_rc x_rc,   a_r <= sum_c x_rc <= b_r,   l_c <= sum_r x_rc <= u_c,   x_rc in {0, 1}.

The matrix of the constraints is totally unimodular and the bounds are whole numbers, so every vertex of the relaxation
0 <= x <= 1 is a choice of whole pairs (Hoffman and Kruskal 1956): a linear program solved by the simplex method is exact, and no
search over whole numbers is needed. An interior point need not be a vertex; here HiGHS' dual simplex is asked for, its answer is
checked, and a mixed-integer search takes over should it ever not be whole.

Everything is a pure function of its arguments. Shape letters: R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from fedgraft.errors import MethodError

__all__ = [
    "CountBounds",
    "choose_at_random",
    "choose_best",
    "choose_exactly",
    "coefficient_of_variation",
    "draw_orders",
    "load_bounds",
]

_ALMOST = 1e-9  # 1.12 * 6.25 is a little more than 7
_WHOLE = 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class CountBounds:
    """Least and largest number of partners of each row, or of each column; whole numbers with 0 <= lower <= upper.

    Raises:
        MethodError: The two differ in length, or a lower bound is negative or above its upper bound.
    """

    lower: tuple[int, ...]
    upper: tuple[int, ...]

    def __post_init__(self) -> None:
        fits = len(self.lower) == len(self.upper)
        if not fits or any(not 0 <= low <= high for low, high in zip(self.lower, self.upper, strict=True)):
            raise MethodError(
                f"bounds of an assignment: lower {list(self.lower)[:8]}, upper {list(self.upper)[:8]}",
                "give both for each, with 0 <= lower <= upper",
            )

    @classmethod
    def exactly(cls, counts: Sequence[int]) -> Self:
        """Bounds that leave no choice: ``counts`` partners each."""
        return cls(lower=tuple(counts), upper=tuple(counts))

    @classmethod
    def between(cls, lower: int, upper: int, size: int) -> Self:
        """The same bounds for all of ``size``."""
        return cls(lower=(lower,) * size, upper=(upper,) * size)

    @property
    def is_exact(self) -> bool:
        """Whether no number of partners is left open."""
        return self.lower == self.upper

    def hold(self, counts: Sequence[int]) -> bool:
        """Whether these numbers of partners keep to the bounds."""
        each = zip(self.lower, counts, self.upper, strict=True)
        return all(low <= count <= high for low, count, high in each)


def choose_exactly(
    score_RC: torch.Tensor,
    *,
    rows: CountBounds,
    columns: CountBounds,
    sides: tuple[str, str] = ("row", "column"),
    among_equals: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose pairs with the largest total score within both bounds.

    Where the rows have exact numbers and taking each one's best columns keeps to the columns' bounds, that is the answer, among
    equals as ``choose_best`` has it; so bounds that do not bind change nothing. Among other choices of the same total, HiGHS
    decides, always in the same way.

    Args:
        score_RC: What each pair is worth, finite; (R, C).
        rows: Bounds on the number of columns of each row.
        columns: Bounds on the number of rows of each column.
        sides: What a row and a column are, for messages.
        among_equals: Second scores for ``choose_best``.

    Returns:
        Chosen pairs, (R, C) bool.

    Raises:
        MethodError: A score is not finite, or no choice keeps to the bounds.
    """
    score = _checked(score_RC, sides)
    if (len(rows.lower), len(columns.lower)) != score.shape:
        raise MethodError(
            f"an assignment with scores of shape {score.shape} has bounds for {len(rows.lower)} {sides[0]}s and "
            f"{len(columns.lower)} {sides[1]}s",
            "give one bound a row and one a column",
        )
    _require_possible(rows, columns, sides)
    if rows.is_exact:
        best = choose_best(score_RC, rows.lower, among_equals=among_equals)
        if columns.hold(best.sum(dim=0).tolist()):
            return best
    chosen = _solve(_rescaled(score, rows, columns), rows, columns)
    if chosen is None:
        raise MethodError(
            f"no assignment gives every {sides[0]} {_range(rows)} {sides[1]}s and every {sides[1]} {_range(columns)} {sides[0]}s",
            f"widen the bounds of the {sides[1]}s or of the {sides[0]}s",
        )
    return torch.from_numpy(chosen)


def choose_best(score_RC: torch.Tensor, counts: Sequence[int], *, among_equals: torch.Tensor | None = None) -> torch.Tensor:
    """Let every row take its best columns, whatever their load: the greedy choice.

    Args:
        score_RC: (R, C), finite.
        counts: Columns of each row, 0 to C.
        among_equals: A second score (R, C) that decides among equals; then, or without it, the lower column comes first.

    Returns:
        Chosen pairs, (R, C) bool.

    Raises:
        MethodError: A score is not finite, or a row is to have more columns than there are.
    """
    score = _checked(score_RC, ("row", "column"))
    _require_enough(counts, score.shape[1])
    second = np.zeros_like(score) if among_equals is None else _checked(among_equals, ("row", "column"))
    chosen = np.zeros(score.shape, dtype=bool)
    for row, count in enumerate(counts):
        chosen[row, np.lexsort((-second[row], -score[row]))[:count]] = True  # a stable sort, the last key first
    return torch.from_numpy(chosen)


def choose_at_random(num_columns: int, counts: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """Let every row draw its columns uniformly, whatever their load.

    Args:
        num_columns: C.
        counts: Columns of each row, 0 to C.
        seeds: One a row, so that what a row draws does not depend on who else is there.

    Returns:
        Chosen pairs, (R, C) bool.

    Raises:
        MethodError: A row is to have more columns than there are.
    """
    _require_enough(counts, num_columns)
    chosen = torch.zeros(len(counts), num_columns, dtype=torch.bool)
    for row, (count, seed) in enumerate(zip(counts, seeds, strict=True)):
        order = torch.randperm(num_columns, generator=torch.Generator().manual_seed(seed))
        chosen[row, order[:count]] = True
    return chosen


def draw_orders(num_columns: int, seeds: Sequence[int]) -> torch.Tensor:
    """Second scores that order the columns by chance, for each row in its own way: a permutation a row, (R, C) float64.

    Args:
        num_columns: C.
        seeds: One a row.
    """
    drawn = [torch.randperm(num_columns, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn).double() if drawn else torch.zeros(0, num_columns, dtype=torch.float64)


def load_bounds(counts: Sequence[int], num_columns: int, slack: float) -> CountBounds:
    """Bounds that keep the columns' loads within a share of their mean.

    With m = sum(counts) / C: from floor((1 - slack) m) to ceil((1 + slack) m), cut to what is possible, 0 to R. They can always
    be met: loads of floor(m) and ceil(m) exist for any ``counts`` <= C (Gale 1957, Ryser 1957: no loads of the same sum are
    easier to reach than even ones), and are within them.

    Args:
        counts: Columns of each row, 0 to C.
        num_columns: C, >= 1.
        slack: >= 0; infinity bounds nothing.
    """
    mean = sum(counts) / num_columns
    low = max(0.0, (1 - slack) * mean) if mean else 0.0
    high = min(float(len(counts)), (1 + slack) * mean) if mean else 0.0
    return CountBounds.between(int(np.floor(low + _ALMOST)), int(np.ceil(high - _ALMOST)), num_columns)


def coefficient_of_variation(load: torch.Tensor) -> float:
    """Standard deviation of loads over their mean, of the population; 0 where all are equal, and where all are 0.

    Args:
        load: One number a column, >= 0.
    """
    mean = float(load.double().mean())
    return float(load.double().std(correction=0)) / mean if mean else 0.0


# ---- below: checks, and the solver


def _checked(score_RC: torch.Tensor, sides: tuple[str, str]) -> NDArray[np.float64]:
    score: NDArray[np.float64] = score_RC.detach().cpu().double().numpy()
    if not np.isfinite(score).all():
        row, column = (int(place) for place in np.argwhere(~np.isfinite(score))[0])
        raise MethodError(
            f"an assignment's score of {sides[0]} {row} for {sides[1]} {column} is {score[row, column]}", "give finite scores"
        )
    return score


def _require_enough(counts: Sequence[int], num_columns: int) -> None:
    if wrong := [count for count in counts if not 0 <= count <= num_columns]:
        raise MethodError(f"an assignment asks for {wrong[0]} of {num_columns} columns", f"ask for 0 to {num_columns}")


def _require_possible(rows: CountBounds, columns: CountBounds, sides: tuple[str, str]) -> None:
    """Refuse bounds that counting alone shows to be impossible, with the numbers that clash."""
    for (side, bounds), (other, size) in (
        ((sides[0], rows), (sides[1], len(columns.lower))),
        ((sides[1], columns), (sides[0], len(rows.lower))),
    ):
        if bounds.lower and max(bounds.lower) > size:
            raise MethodError(
                f"an assignment gives a {side} at least {max(bounds.lower)} {other}s, and there are {size}",
                f"lower that bound to {size} or less",
            )
    for (side, bounds), (other, others) in (((sides[0], rows), (sides[1], columns)), ((sides[1], columns), (sides[0], rows))):
        least, room = sum(bounds.lower), sum(min(high, len(bounds.lower)) for high in others.upper)
        if least > room:
            raise MethodError(
                f"an assignment gives the {side}s {least} {other}s in all, and the {other}s take {room} {side}s in all",
                f"lower the bounds of the {side}s, or raise those of the {other}s",
            )


def _rescaled(score: NDArray[np.float64], rows: CountBounds, columns: CountBounds) -> NDArray[np.float64]:
    """Scores of magnitude 1 with the same best choice: the solver's tolerances are absolute.

    What a row (a column) gives to each of its pairs alike adds the same to every choice if its number of pairs is fixed.
    """
    if rows.is_exact and score.size:
        score = score - score.mean(axis=1, keepdims=True)
    elif columns.is_exact and score.size:
        score = score - score.mean(axis=0, keepdims=True)
    largest = float(np.abs(score).max(initial=0.0))
    return score / largest if largest else score


def _solve(score: NDArray[np.float64], rows: CountBounds, columns: CountBounds) -> NDArray[np.bool_] | None:
    """A vertex by the dual simplex; a mixed-integer search if it is not whole; ``None`` where nothing keeps to the bounds."""
    # SciPy's solvers take half a second to import, and every replica has this module.
    from scipy.optimize import Bounds as VariableBounds
    from scipy.optimize import LinearConstraint, linprog, milp
    from scipy.sparse import csr_array, vstack

    num_rows, num_columns = score.shape
    pairs = np.arange(score.size)
    ones = np.ones(score.size)
    by_row = csr_array((ones, (pairs // num_columns, pairs)), shape=(num_rows, score.size))
    by_column = csr_array((ones, (pairs % num_columns, pairs)), shape=(num_columns, score.size))
    sums: Any = vstack([by_row, by_column], format="csr")
    lower, upper = np.array([*rows.lower, *columns.lower]), np.array([*rows.upper, *columns.upper])
    found = linprog(
        -score.reshape(-1),
        A_ub=vstack([sums, -sums], format="csr"),
        b_ub=np.concatenate([upper, -lower]),
        bounds=(0, 1),
        method="highs-ds",
    )
    chosen = _whole(found.x, score, rows, columns)
    if chosen is not None or found.status == 2:  # 2: infeasible
        return chosen
    again = milp(
        -score.reshape(-1),
        integrality=np.ones(score.size),
        bounds=VariableBounds(0, 1),
        constraints=LinearConstraint(sums, lower, upper),
        options={"mip_rel_gap": 0.0},
    )
    return _whole(again.x, score, rows, columns)


def _whole(
    x: NDArray[np.float64] | None, score: NDArray[np.float64], rows: CountBounds, columns: CountBounds
) -> NDArray[np.bool_] | None:
    """The pairs that a solution chooses, if it is whole and keeps to the bounds."""
    if x is None or np.abs(x - np.round(x)).max(initial=0.0) > _WHOLE:
        return None
    chosen: NDArray[np.bool_] = np.round(x).astype(bool).reshape(score.shape)
    fits = rows.hold(chosen.sum(axis=1).tolist()) and columns.hold(chosen.sum(axis=0).tolist())
    return chosen if fits else None


def _range(bounds: CountBounds) -> str:
    low, high = min(bounds.lower), max(bounds.upper)
    return str(low) if low == high else f"{low} to {high}"
