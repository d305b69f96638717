"""Phase two of a round: the cohort's tensors, summed through the fixed tree, where they lie.

A block is a complete subtree: the places i * 2^k to (i + 1) * 2^k of the cohort. A replica sums a block and keeps the sum; the
driver merges a few such sums and never holds the cohort. Small tensors came with their replies; the driver sums them itself, as
one block. Nothing of this changes a bit: the tree is the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fedgraft.actors.hosting import Fetch, LostResult, Pool
from fedgraft.aggregation.reduce import sum_trees, tree_of
from fedgraft.errors import ClusterError, MethodError, UpdateError
from fedgraft.platform.replies import EXTRA, address, announced_key, structure_problem, values_problem
from fedgraft.platform.task_checks import spread_names
from fedgraft.protocols import Reduced, Weights
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate, Params, TensorInfo

__all__ = ["Block", "Part", "RefusedUpdates", "merge_sums", "sum_block", "sum_updates"]

_FEW = 16
"""As many partial sums the driver merges itself; more are summed in the replicas first."""
_MIN_BLOCK = 4
_BLOCKS_A_REPLICA = 4
"""So that a replica that has ended early takes over from one that is slow."""
_TRIES = 5
"""How often sums of blocks may be lost with their nodes in one round."""


class RefusedUpdates(Exception):
    """The tensors of these places in the cohort must not be summed; the round weighs and sums again without them."""

    def __init__(self, failures: dict[int, ClientFailure]) -> None:
        super().__init__(failures)
        self.failures = failures


@dataclass(frozen=True, slots=True)
class Part:
    """One place of a block: what its tensors are announced to be, and under which names with which weights each is summed."""

    payload: tuple[TensorInfo, ...]
    names: tuple[tuple[tuple[str, float], ...], ...]


@dataclass(frozen=True, slots=True)
class Block:
    """A complete subtree of the cohort's tree, place by place; ``None`` for a client that failed. Handles lack these places."""

    parts: tuple[Part | None, ...]


def sum_block(block: Block, fetch: Fetch) -> tuple[dict[int, str], Params]:
    """Sum a block; runs wherever the tensors are.

    Returns:
        What is wrong with the tensors of which place of the block, and, where that is nothing, the sums by name in float64.
    """
    leaves: dict[str, list[tuple[torch.Tensor, float] | None]] = {}
    problems: dict[int, str] = {}
    size = len(block.parts)
    handle = 0
    for place, part in enumerate(block.parts):
        if part is None:
            continue
        tensors: Params = fetch(handle)
        handle += 1
        problem = structure_problem(part.payload, tensors)
        if problem is not None:
            problems[place] = problem
            continue
        for info, names in zip(part.payload, part.names, strict=True):
            key = announced_key(info)
            is_summed = False
            for name, weight in names:
                if weight:
                    leaves.setdefault(name, [None] * size)[place] = (tensors[key], weight)
                    is_summed = True
            if not is_summed and (problem := values_problem(key, tensors[key])):
                problems[place] = problem
    total = sum_trees(leaves)
    for name, found in leaves.items():
        # One value that is not finite makes the sum of all so, for finite weights; finite values may add up to one as well.
        if not math.isfinite(float(total[name].sum())):
            for place, leaf_value in enumerate(found):
                if leaf_value is not None and (problem := values_problem(_key_of(block, place, name), leaf_value[0])):
                    problems.setdefault(place, problem)
    return problems, {} if problems else total


def _key_of(block: Block, place: int, name: str) -> str:
    part = block.parts[place]
    assert part is not None
    return next(announced_key(info) for info, names in zip(part.payload, part.names, strict=True) if name in dict(names))


def sum_updates(
    tasks: Sequence[ClientTask],
    outcomes: Sequence[ClientUpdate | ClientFailure],
    weights: Weights,
    handles: list[Any],
    *,
    pool: Pool,
    make_again: Callable[[int], Any],
) -> Reduced:
    """Sum the cohort's updates.

    Args:
        tasks: In cohort order.
        outcomes: Small halves of the replies, in cohort order.
        weights: Of the updates among them.
        handles: Of the large halves, in cohort order; one that is made again is replaced.
        pool: Has the large halves, and sums.
        make_again: Runs the task of a place again, as its tensors are lost; gives the new handle.

    Raises:
        RefusedUpdates: Tensors are not what replies announced, or have values that are not finite.
        MethodError: The method would sum two tensors of one client under one name.
        UpdateError: Two clients sent a key in two shapes.
        ClusterError: No replica could sum a block.
    """
    parts = list(_parts(tasks, outcomes, weights))
    weight, count = _sum_weights(parts)
    largest = max((sum(info.num_bytes for info in part.payload) for part in parts if part is not None), default=0)
    if largest <= pool.inline_bytes:
        total = _sum_here(parts, handles, pool, make_again, outcomes)
    else:
        total = _sum_there(parts, handles, pool, make_again, outcomes)
    mean = {name: total[name].div_(weight[name]) for name in weight}
    return Reduced(
        delta={key: value for key, value in mean.items() if not key.startswith(EXTRA)},
        extras={key.removeprefix(EXTRA): value for key, value in mean.items() if key.startswith(EXTRA)},
        num_contributors=count,
    )


def _parts(
    tasks: Sequence[ClientTask], outcomes: Sequence[ClientUpdate | ClientFailure], weights: Weights
) -> Iterator[Part | None]:
    place = 0
    shapes: dict[str, tuple[int, ...]] = {}
    for task, outcome in zip(tasks, outcomes, strict=True):
        if isinstance(outcome, ClientFailure):
            yield None
            continue
        payload = tuple(info for info in outcome.payload if info.group != "statistics")
        names = []
        seen: set[str] = set()
        for info in payload:
            found = spread_names(weights, address(task, outcome, announced_key(info)))
            for name in found:
                if name in seen:
                    raise MethodError(f"two tensors of client {outcome.client_id} would be summed as {name}", "see spread")
                seen.add(name)
                if (shape := shapes.setdefault(name, info.shape)) != info.shape:
                    raise UpdateError(f"{name}: two clients sent shapes {shape} and {info.shape}")
            names.append(tuple((name, weights.of(name)[place]) for name in found))
        yield Part(payload, tuple(names))
        place += 1


def _sum_weights(parts: Sequence[Part | None]) -> tuple[dict[str, float], dict[str, int]]:
    """Sum of weights and number of contributors of every name that somebody contributes to, through the tree as well."""
    by_name: dict[str, list[float | None]] = {}
    for place, part in enumerate(parts):
        for names in () if part is None else part.names:
            for name, weight in names:
                if weight:
                    by_name.setdefault(name, [None] * len(parts))[place] = weight
    known: dict[tuple[float | None, ...], tuple[float, int]] = {}  # most names have the same weights
    weights: dict[str, float] = {}
    counts: dict[str, int] = {}
    for name, given in by_name.items():
        values = tuple(given)
        if values not in known:
            known[values] = (tree_of(values, float.__add__) or 0.0, sum(value is not None for value in values))
        weights[name], counts[name] = known[values]
    return weights, counts


def _sum_here(
    parts: Sequence[Part | None],
    handles: list[Any],
    pool: Pool,
    make_again: Callable[[int], Any],
    outcomes: Sequence[ClientUpdate | ClientFailure],
) -> Params:
    """Sum the whole cohort in this process."""
    positions = [position for position, part in enumerate(parts) if part is not None]

    def fetch(place: int) -> Params:
        position = positions[place]
        while True:
            try:
                return pool.fetch(handles[position])  # type: ignore[no-any-return]
            except LostResult:
                handles[position] = make_again(position)

    problems, total = sum_block(Block(tuple(parts)), fetch)
    _refuse(problems, outcomes)
    return total


def _sum_there(
    parts: Sequence[Part | None],
    handles: list[Any],
    pool: Pool,
    make_again: Callable[[int], Any],
    outcomes: Sequence[ClientUpdate | ClientFailure],
) -> Params:
    """Sum blocks in the replicas, and their sums here."""
    why = ""
    for _ in range(_TRIES):
        try:
            sums = _sum_blocks(parts, handles, pool, make_again, outcomes)
            if len(sums) > _FEW:
                sums = _merge_there(sums, pool)
            return merge_sums(len(sums), lambda place, sums=sums: pool.fetch(sums[place]))[1]  # type: ignore[misc]
        except LostResult as error:
            why = str(error)  # of a sum of ours: the updates are still there, or are made again
    raise ClusterError(f"sums over parts of the cohort were lost {_TRIES} times: {why}", "mend the cause, then resume the run")


def _sum_blocks(
    parts: Sequence[Part | None],
    handles: list[Any],
    pool: Pool,
    make_again: Callable[[int], Any],
    outcomes: Sequence[ClientUpdate | ClientFailure],
) -> list[Any]:
    """Let the replicas sum the cohort's blocks; gives the handles of the sums, in cohort order."""
    size = _block_size(len(parts), pool.size)
    starts = range(0, len(parts), size)
    sums: list[Any] = [None] * len(starts)
    problems: dict[int, str] = {}
    left = list(range(len(starts)))
    while left:
        blocks = [Block(tuple(parts[starts[i] : starts[i] + size])) for i in left]
        places = [_positions(parts, starts[i], size) for i in left]
        lost: dict[int, int] = {}
        held = [[handles[position] for position in each] for each in places]
        for finished in pool.apply(sum_block, blocks, held):
            start = starts[left[finished.index]]
            if finished.lost is not None:
                lost[left[finished.index]] = places[finished.index][finished.lost]
            elif finished.error is not None:
                raise ClusterError(f"a part of the cohort could not be summed: {finished.error}", "mend the cause, then resume")
            else:
                problems |= {start + place: problem for place, problem in finished.value.items()}
                sums[left[finished.index]] = finished.handle
        for position in sorted(set(lost.values())):
            handles[position] = make_again(position)
        left = sorted(lost)
    _refuse(problems, outcomes)
    return sums


def _merge_there(sums: Sequence[Any], pool: Pool) -> list[Any]:
    """Let the replicas merge sums of neighbouring blocks."""
    size = _power_of_two(len(sums) / _FEW)
    groups = [sums[start : start + size] for start in range(0, len(sums), size)]
    merged: list[Any] = [None] * len(groups)
    for finished in pool.apply(merge_sums, [len(group) for group in groups], groups):
        if finished.lost is not None:
            raise LostResult(str(finished.error))
        if finished.error is not None:
            raise ClusterError(f"a part of the cohort could not be summed: {finished.error}", "mend the cause, then resume")
        merged[finished.index] = finished.handle
    return merged


def merge_sums(count: int, fetch: Fetch) -> tuple[None, Params]:
    """Merge the sums of neighbouring blocks, first to last."""
    sums: list[Params] = [fetch(place) for place in range(count)]
    names = dict.fromkeys(name for each in sums for name in each)
    return None, sum_trees({name: [(each[name], 1.0) if name in each else None for each in sums] for name in names})


def _block_size(count: int, replicas: int) -> int:
    return _power_of_two(max(_MIN_BLOCK, count / (_BLOCKS_A_REPLICA * replicas)))


def _power_of_two(least: float) -> int:
    return 1 << (math.ceil(least) - 1).bit_length()


def _positions(parts: Sequence[Part | None], start: int, size: int) -> list[int]:
    return [start + place for place, part in enumerate(parts[start : start + size]) if part is not None]


def _refuse(problems: dict[int, str], outcomes: Sequence[ClientUpdate | ClientFailure]) -> None:
    failures = {
        position: ClientFailure(
            client_id=outcomes[position].client_id, round_idx=outcomes[position].round_idx, stage="reply", error=problem
        )
        for position, problem in sorted(problems.items())
    }
    if failures:
        raise RefusedUpdates(failures)
