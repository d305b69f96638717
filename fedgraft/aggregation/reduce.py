"""Sums over a cohort, through a fixed binary tree over its positions.

Floating sums depend on order. Here node (level, i) is always the sum of (level - 1, 2i) and (level - 1, 2i + 1), so the bits
depend neither on who arrives first nor on who adds: a replica, a node or the driver may merge any complete subtree. While
clients arrive, at most one partial sum a level waits, not the cohort.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from fedgraft.errors import UpdateError
from fedgraft.types import Params

__all__ = ["PartialSum", "TreeSum", "leaf", "merge", "sum_tree", "sum_trees", "tree_of"]

T = TypeVar("T")

_SMALL = 1 << 12
"""Values of a tensor up to which a call costs more than its work."""

_CHUNK = 1 << 17
"""Values of a chunk: its partial sums stay in a core's cache, so that a tensor is read from memory once, whatever the cohort."""


@dataclass(kw_only=True, slots=True)
class PartialSum:
    """The sum over a subtree: by key, sum of weight * tensor in float64, sum of weights, and number of contributors."""

    total: Params = field(default_factory=dict)
    weight: dict[str, float] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)

    def mean(self) -> Params:
        """Weighted means by key, float64."""
        return {key: total / self.weight[key] for key, total in self.total.items()}


def leaf(tensors: Params, weights: dict[str, float]) -> PartialSum:
    """One client's contribution.

    Args:
        tensors: What it sent.
        weights: Its weight by key, >= 0; a key with weight 0 is as if it had not been sent.

    Raises:
        UpdateError: A tensor has values that are not finite, which are never averaged, or a weight is negative or not finite.
    """
    found = PartialSum()
    for key, tensor in tensors.items():
        weight = weights[key]
        if not (math.isfinite(weight) and weight >= 0):
            raise UpdateError(f"{key} has weight {weight}", "a method's weigh gives weights that are finite and >= 0")
        if weight == 0:
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise UpdateError(f"{key} has values that are not finite", "lower the learning rate")
        found.total[key] = tensor.double() * weight
        found.weight[key] = weight
        found.count[key] = 1
    return found


def merge(left: PartialSum | None, right: PartialSum | None) -> PartialSum | None:
    """Add two neighbouring subtrees, left before right; ``None`` is an empty one. The arguments may be consumed."""
    if left is None or right is None:
        return right if left is None else left
    for key, total in right.total.items():
        if key in left.total:
            if left.total[key].shape != total.shape:
                raise UpdateError(f"{key}: two clients sent shapes {tuple(left.total[key].shape)} and {tuple(total.shape)}")
            left.total[key] = left.total[key] + total
            left.weight[key] += right.weight[key]
            left.count[key] += right.count[key]
        else:
            left.total[key] = total
            left.weight[key] = right.weight[key]
            left.count[key] = right.count[key]
    return left


class TreeSum:
    """Sums a cohort's contributions as they come, in any order, to the same bits.

    Args:
        size: Clients of the cohort; every position must be given once, with ``None`` for one that failed.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._waiting: dict[tuple[int, int], PartialSum | None] = {}
        self._given: set[int] = set()
        self._depth = max(size - 1, 0).bit_length()

    def add(self, position: int, contribution: PartialSum | None) -> None:
        """Put in the contribution of one place in the cohort.

        Raises:
            UpdateError: The place is outside the cohort, or was given before.
        """
        if not 0 <= position < self._size:
            raise UpdateError(f"place {position} is outside a cohort of {self._size}")
        if position in self._given:
            raise UpdateError(f"place {position} of the cohort came twice")
        self._given.add(position)
        self._insert(0, position, contribution)

    def _insert(self, level: int, index: int, node: PartialSum | None) -> None:
        while level < self._depth:
            sibling = (level, index ^ 1)
            if (index ^ 1) << level >= self._size:  # the sibling's leaves all lie outside the cohort
                level, index = level + 1, index >> 1
                continue
            if sibling not in self._waiting:
                self._waiting[level, index] = node
                return
            other = self._waiting.pop(sibling)
            node = merge(other, node) if index & 1 else merge(node, other)
            level, index = level + 1, index >> 1
        self._waiting[level, index] = node

    @property
    def num_waiting(self) -> int:
        """Partial sums that are held now."""
        return sum(node is not None for node in self._waiting.values())

    def result(self) -> PartialSum:
        """The sum over the whole cohort.

        Raises:
            UpdateError: A place is missing.
        """
        missing = sorted(set(range(self._size)) - self._given)
        if missing:
            raise UpdateError(f"places {missing[:5]} of a cohort of {self._size} are missing")
        return self._waiting.get((self._depth, 0)) or PartialSum()


def tree_of(leaves: Iterable[T | None], add: Callable[[T, T], T], levels: Iterable[int] | None = None) -> T | None:
    """Add up leaves in the order of their places, as the tree does; ``None`` is an empty place, or nobody at all.

    Args:
        leaves: One a place.
        add: Adds two neighbouring subtrees, left before right; may consume them.
        levels: Of leaves that are complete subtrees themselves, without a gap between them: of 2^level places each.
    """
    waiting: list[tuple[int, T | None]] = []  # by level, falling: the subtrees that are whole and wait for their right sibling
    for leaf_value, leaf_level in zip(leaves, itertools.repeat(0) if levels is None else levels, strict=False):
        level, node = leaf_level, leaf_value
        while waiting and waiting[-1][0] == level:
            node = _added(waiting.pop()[1], node, add)
            level += 1
        waiting.append((level, node))
    node = None
    while waiting:  # what is missing on the right lies outside of the cohort
        node = _added(waiting.pop()[1], node, add)
    return node


def _added(left: T | None, right: T | None, add: Callable[[T, T], T]) -> T | None:
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def sum_tree(leaves: Sequence[tuple[torch.Tensor, float] | None], levels: Sequence[int] | None = None) -> torch.Tensor | None:
    """Sum one key over a complete subtree: the bits of ``leaf`` and ``merge``, a chunk of the tensors at a time.

    Args:
        leaves: Tensor and weight of every place, all tensors of one shape; ``None`` where a client did not send the key.
        levels: See ``tree_of``.

    Returns:
        The sum of weight * tensor in float64; ``None`` where nobody sent it. Values that are not finite stay so in the sum.
    """
    given = [leaf_value for leaf_value in leaves if leaf_value is not None]
    if not given:
        return None
    shape = given[0][0].shape
    flat = [None if leaf_value is None else (leaf_value[0].reshape(-1), leaf_value[1]) for leaf_value in leaves]
    size = shape.numel()
    total = torch.empty(size, dtype=torch.float64)
    most = max(len(leaves) - 1, 0).bit_length() + 1 if levels is None else len(leaves)  # subtrees that wait for a sibling
    free = [torch.empty(min(_CHUNK, size), dtype=torch.float64) for _ in range(most)]
    for start in range(0, size, _CHUNK):
        stop = min(start + _CHUNK, size)
        spare = [buffer[: stop - start] for buffer in free]

        def weighted(
            place: tuple[torch.Tensor, float] | None, start: int = start, stop: int = stop, spare: list[torch.Tensor] = spare
        ) -> torch.Tensor | None:
            if place is None:
                return None
            product = spare.pop().copy_(place[0][start:stop])
            return product if place[1] == 1.0 else product.mul_(place[1])

        def add(left: torch.Tensor, right: torch.Tensor, spare: list[torch.Tensor] = spare) -> torch.Tensor:
            left.add_(right)
            spare.append(right)
            return left

        found = tree_of(map(weighted, flat), add, levels)
        assert found is not None
        total[start:stop] = found
    return total.reshape(shape)


def sum_trees(leaves: Mapping[str, Sequence[tuple[torch.Tensor, float] | None]], levels: Sequence[int] | None = None) -> Params:
    """Sum many keys over a subtree, each as ``sum_tree`` does; small ones of the same clients with the same weights go together.

    Args:
        leaves: By key, tensor and weight of every place; somebody sent every key.
        levels: See ``tree_of``.
    """
    found: Params = {}
    together: dict[tuple[float | None, ...], list[str]] = {}
    for key, places in leaves.items():
        tensors = [place[0] for place in places if place is not None]
        if tensors[0].numel() <= _SMALL and all(tensor.is_floating_point() for tensor in tensors):
            together.setdefault(tuple(None if place is None else place[1] for place in places), []).append(key)
    for weights, keys in together.items():
        found.update(_sum_together({key: leaves[key] for key in keys}, weights, levels))
    for key, places in leaves.items():
        if key not in found:
            summed = sum_tree(places, levels)
            assert summed is not None
            found[key] = summed
    return {key: found[key] for key in leaves}


def _sum_together(
    leaves: Mapping[str, Sequence[tuple[torch.Tensor, float] | None]],
    weights: Sequence[float | None],
    levels: Sequence[int] | None,
) -> Params:
    """Sum keys that the same places hold with the same weights, as one long vector a place."""
    given = [weight for weight in weights if weight is not None]
    columns = [[place[0] for place in places if place is not None] for places in leaves.values()]
    rows = [column[i].reshape(-1) for i in range(len(given)) for column in columns]
    # Wider than every part before anything is computed: concatenation takes the widest dtype, and each value stays what it was.
    products = torch.cat(rows).double().view(len(given), -1).mul_(torch.tensor(given, dtype=torch.float64)[:, None])
    waiting = iter(products.unbind())
    total = tree_of((None if weight is None else next(waiting) for weight in weights), torch.Tensor.add_, levels)
    assert total is not None
    parts = torch.split(total, [column[0].numel() for column in columns])
    return {key: part.reshape(column[0].shape).clone() for key, part, column in zip(leaves, parts, columns, strict=True)}
