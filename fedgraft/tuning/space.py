"""What a sweep varies: a dimension for each key path, and the points that a grid or draws make of them.

A point is a mapping of key paths to values. Keys come in the order of the space, so that a condition may speak of keys before it;
a key whose condition does not hold is absent from the point.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.seeding import derive_seed

__all__ = [
    "Dimension",
    "Point",
    "applicable",
    "corners",
    "draw_points",
    "grid_points",
    "holds",
    "point_text",
    "value_at",
    "with_values",
]

Point: TypeAlias = dict[str, Any]
"""Values by key path."""

_KINDS = ("grid", "choice", "uniform", "log_uniform", "integer")
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


class Dimension(BaseModel):
    """The values of one key path: exactly one of ``grid``, ``choice``, ``uniform``, ``log_uniform`` and ``integer``."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: tuple[Any, ...] | None = Field(None, min_length=1, description="Every value is tried with every other grid's.")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="Values that a search draws from.")
    uniform: tuple[float, float] | None = Field(None, description="Lowest and highest number of an even draw.")
    log_uniform: tuple[float, float] | None = Field(None, description="The same, even in the logarithm; above 0.")
    integer: tuple[int, int] | None = Field(None, description="First and last whole number; a grid takes all of them.")
    step: int = Field(1, ge=1, description="From one whole number to the next, with integer.")
    when: dict[str, tuple[Any, ...]] = Field(
        {}, description="Key paths and the values that they must have for this key to be there."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        """Read a plain list as a grid, one value of a condition as a list, and 1e-4, which YAML takes for a text, as a number."""
        given: Any = {"grid": value} if isinstance(value, list | tuple) else value
        if not isinstance(given, Mapping):
            raise ValueError(f"expected a list of values, or a mapping with one of {', '.join(_KINDS)}")
        found: dict[str, Any] = {
            key: [_number(item) for item in each] if isinstance(each, list | tuple) else each for key, each in given.items()
        }
        if isinstance(found.get("when"), dict):
            found["when"] = {key: each if isinstance(each, list | tuple) else [each] for key, each in found["when"].items()}
        return found

    @model_validator(mode="after")
    def _check(self) -> Self:
        stated = [kind for kind in _KINDS if getattr(self, kind) is not None]
        if len(stated) != 1:
            raise ValueError(f"expected one of {', '.join(_KINDS)}; found {' and '.join(stated) or 'none'}")
        if "step" in self.model_fields_set and self.integer is None:
            raise ValueError("step has no effect without integer; remove it")
        for name in ("uniform", "log_uniform", "integer"):
            limits = getattr(self, name)
            if limits is not None and not (limits[0] < limits[1] and all(math.isfinite(limit) for limit in limits)):
                raise ValueError(f"{name}: expected [lowest, highest], the first below the second")
        if self.log_uniform is not None and self.log_uniform[0] <= 0:
            raise ValueError("log_uniform: expected a lowest value above 0")
        for name in ("grid", "choice"):
            values = getattr(self, name)
            if values is not None and len({_key(value) for value in values}) != len(values):
                raise ValueError(f"{name}: expected different values")
        return self

    @property
    def kind(self) -> str:
        """Which of the kinds is stated."""
        return next(kind for kind in _KINDS if getattr(self, kind) is not None)

    def values(self) -> tuple[Any, ...] | None:
        """All values; ``None`` where there is a continuum."""
        if self.integer is not None:
            return tuple(range(self.integer[0], self.integer[1] + 1, self.step))
        return self.grid if self.grid is not None else self.choice

    def ends(self) -> tuple[Any, ...]:
        """The values that a wrong space shows itself at: all of a list, the ends of a range."""
        values = self.values()
        if values is not None:
            return values if self.integer is None else (values[0], values[-1])
        limits = self.uniform or self.log_uniform
        assert limits is not None
        return limits

    def draw(self, rng: np.random.Generator) -> Any:
        """Draw one value."""
        values = self.values()
        if values is not None:
            return values[int(rng.integers(len(values)))]
        if self.uniform is not None:
            return float(rng.uniform(*self.uniform))
        assert self.log_uniform is not None
        low, high = (math.log(limit) for limit in self.log_uniform)
        # The exponential of a logarithm may end a hair outside of the limits.
        return float(min(max(math.exp(rng.uniform(low, high)), self.log_uniform[0]), self.log_uniform[1]))


def grid_points(space: Mapping[str, Dimension], base: Mapping[str, Any]) -> list[Point]:
    """Every combination of the values of all dimensions, each point once.

    Args:
        space: Dimensions that have ``values``.
        base: The base configuration's tree, for conditions on keys that are not swept.
    """
    return _distinct(
        applicable(space, base, chosen) for chosen in _product(space, [dim.values() or () for dim in space.values()])
    )


def draw_points(space: Mapping[str, Dimension], base: Mapping[str, Any], num_draws: int, seed: int) -> list[Point]:
    """Draw the dimensions that are no grid ``num_draws`` times, each draw with every combination of the grids.

    The draws depend on ``seed`` and their number only. A point that comes twice, as with few choices it may, is there once.
    """
    drawn = {key: dim for key, dim in space.items() if dim.kind != "grid"}
    crossed = {key: dim for key, dim in space.items() if dim.kind == "grid"}
    found: list[Point] = []
    for number in range(num_draws):
        rng = np.random.default_rng(derive_seed(seed, "sweep/draw", round_idx=number))
        values = {key: dim.draw(rng) for key, dim in drawn.items()}
        for chosen in _product(crossed, [dim.values() or () for dim in crossed.values()]):
            found.append(applicable(space, base, values | chosen))
    return _distinct(found)


def corners(space: Mapping[str, Dimension], base: Mapping[str, Any], most: int = 256) -> list[Point]:
    """Combinations of the ends of all dimensions; where there are more than ``most``, each end at least once."""
    ends = [dim.ends() for dim in space.values()]
    if math.prod(len(each) for each in ends) <= most:
        return _distinct(applicable(space, base, chosen) for chosen in _product(space, ends))
    longest = max(len(each) for each in ends)
    turns = [{key: each[turn % len(each)] for key, each in zip(space, ends, strict=True)} for turn in range(longest)]
    return _distinct(applicable(space, base, chosen) for chosen in turns)


def holds(condition: Mapping[str, Sequence[Any]], tree: Mapping[str, Any]) -> bool:
    """Whether a configuration's tree has one of the listed values at every key path."""
    return all(value_at(tree, path) in values for path, values in condition.items())


def value_at(tree: Mapping[str, Any], path: str) -> Any:
    """The value at a key path, ``None`` where there is none."""
    at: Any = tree
    for part in path.split("."):
        if not isinstance(at, Mapping) or part not in at:
            return None
        at = at[part]
    return at


def with_values(tree: Mapping[str, Any], point: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a tree with a point's values in it; missing mappings on the way are made."""
    made = dict(tree)
    for path, value in point.items():
        at = made
        *above, last = path.split(".")
        for part in above:
            below = at.get(part)
            at[part] = dict(below) if isinstance(below, Mapping) else {}
            at = at[part]
        at[last] = value
    return made


def point_text(point: Mapping[str, Any]) -> str:
    """A point in one line: ``partition.alpha=0.1, method=flex score=random``."""
    parts = []
    for path, value in point.items():
        *_, above, last = ["", *path.split(".")]
        name = path if len(path) <= 16 else ".".join(part for part in (above, last) if part)
        parts.append(f"{name}={value_text(value)}")
    return ", ".join(parts)


def value_text(value: Any) -> str:
    """A value in few characters; of a mapping its name first, then what else it states."""
    if isinstance(value, Mapping):
        rest = [f"{key}={value_text(each)}" for key, each in value.items() if key != "name"]
        return " ".join([str(value["name"]), *rest] if "name" in value else rest)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def _product(space: Mapping[str, Dimension], values: Sequence[Sequence[Any]]) -> Iterator[Point]:
    for combination in itertools.product(*values):
        yield dict(zip(space, combination, strict=True))


def applicable(space: Mapping[str, Dimension], base: Mapping[str, Any], chosen: Mapping[str, Any]) -> Point:
    """The chosen values whose conditions hold, in the order of the space."""
    point: Point = {}
    for key, dim in space.items():
        if holds(dim.when, with_values(base, point)):
            point[key] = chosen[key]
    return point


def _distinct(points: Iterator[Point] | Sequence[Point]) -> list[Point]:
    return list({_key(point): point for point in points}.values())


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _number(value: Any) -> Any:
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
