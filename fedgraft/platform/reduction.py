"""Phase two of a round: the cohort's tensors, summed through the fixed tree, where they lie.

A block is a complete subtree: the places i * 2^k to (i + 1) * 2^k of the cohort. Each replica has a stretch of the cohort as its
own, trains those clients if it can, and sums the few blocks that they make up; the driver merges the sums and never holds the
cohort. Small tensors came with their replies; the driver sums them itself, as one block. Nothing of this changes a bit: the tree
is the same.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fedgraft.actors.hosting import Fetch, LostResult, Pool
from fedgraft.aggregation.reduce import sum_trees, tree_of
from fedgraft.errors import ClusterError, MethodError, UpdateError
from fedgraft.platform.replies import EXTRA, address, announced_key, structure_problem, values_problem
from fedgraft.platform.task_checks import spread_names
from fedgraft.protocols import Reduced, Weights
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate, Params, TensorInfo

__all__ = ["Block", "MakeAgain", "Part", "RefusedUpdates", "homes", "merge_sums", "sum_block", "sum_updates"]

MakeAgain: TypeAlias = Callable[[Sequence[int]], Mapping[int, Any]]
"""Runs the tasks of some places of the cohort again, as their tensors are lost; gives the new handles by place."""


_FEW = 16
"""As many partial sums the driver merges itself; more are summed in the replicas first."""
_UNITS_A_REPLICA = 4
"""Stretches are cut at multiples of a power of two, so that few blocks make up each; they are alike to a quarter."""
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
    make_again: MakeAgain,
) -> Reduced:
    """Sum the cohort's updates.

    Args:
        tasks: In cohort order.
        outcomes: Small halves of the replies, in cohort order.
        weights: Of the updates among them.
        handles: Of the large halves, in cohort order; one that is made again is replaced.
        pool: Has the large halves, and sums.
        make_again: Runs tasks again.

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
    make_again: MakeAgain,
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
                handles[position] = make_again([position])[position]

    problems, total = sum_block(Block(tuple(parts)), fetch)
    _refuse(problems, outcomes)
    return total


def _sum_there(
    parts: Sequence[Part | None],
    handles: list[Any],
    pool: Pool,
    make_again: MakeAgain,
    outcomes: Sequence[ClientUpdate | ClientFailure],
) -> Params:
    """Sum blocks in the replicas, and their sums here."""
    why = ""
    for _ in range(_TRIES):
        try:
            blocks = _blocks(len(parts), pool.size)
            sums = _sum_blocks(parts, blocks, handles, pool, make_again, outcomes)
            levels = [block.level for block in blocks]
            if len(sums) > _FEW:
                levels, sums = _merge_there(blocks, sums, pool)
            return merge_sums(levels, lambda place, sums=sums: pool.fetch(sums[place]))[1]  # type: ignore[misc]
        except LostResult as error:
            why = str(error)  # of a sum of ours: the updates are still there, or are made again
    raise ClusterError(f"sums over parts of the cohort were lost {_TRIES} times: {why}", "mend the cause, then resume the run")


def _sum_blocks(
    parts: Sequence[Part | None],
    blocks: Sequence[_Subtree],
    handles: list[Any],
    pool: Pool,
    make_again: MakeAgain,
    outcomes: Sequence[ClientUpdate | ClientFailure],
) -> list[Any]:
    """Let the replicas sum the cohort's blocks; gives the handles of the sums, in cohort order."""
    sums: list[Any] = [None] * len(blocks)
    problems: dict[int, str] = {}
    left = list(range(len(blocks)))
    while left:
        wanted = [Block(tuple(parts[blocks[i].start : blocks[i].stop])) for i in left]
        places = [_positions(parts, blocks[i]) for i in left]
        lost: dict[int, list[int]] = {}
        held = [[handles[position] for position in each] for each in places]
        # The replicas may have become fewer since; then whoever is there takes a share.
        where = [blocks[i].home % pool.size for i in left]
        for finished in pool.apply(sum_block, wanted, held, homes=where):
            start = blocks[left[finished.index]].start
            if finished.lost:
                lost[left[finished.index]] = [places[finished.index][place] for place in finished.lost]
            elif finished.error is not None:
                raise ClusterError(f"a part of the cohort could not be summed: {finished.error}", "mend the cause, then resume")
            else:
                problems |= {start + place: problem for place, problem in finished.value.items()}
                sums[left[finished.index]] = finished.handle
        if lost:
            for position, handle in make_again(sorted(position for each in lost.values() for position in each)).items():
                handles[position] = handle
        left = sorted(lost)
    _refuse(problems, outcomes)
    return sums


def _merge_there(blocks: Sequence[_Subtree], sums: Sequence[Any], pool: Pool) -> tuple[list[int], list[Any]]:
    """Let the replicas merge sums of neighbouring blocks; gives levels and handles of what comes of it."""
    level = 0
    while len({block.start >> level for block in blocks}) > _FEW:
        level += 1
    groups: dict[int, list[int]] = {}
    for place, block in enumerate(blocks):
        groups.setdefault(block.start >> level, []).append(place)
    levels = [max(level, blocks[places[0]].level) for places in groups.values()]
    items = [[blocks[place].level for place in places] for places in groups.values()]
    merged: list[Any] = [None] * len(items)
    for finished in pool.apply(merge_sums, items, [[sums[place] for place in places] for places in groups.values()]):
        if finished.lost:
            raise LostResult(str(finished.error))
        if finished.error is not None:
            raise ClusterError(f"a part of the cohort could not be summed: {finished.error}", "mend the cause, then resume")
        merged[finished.index] = finished.handle
    return levels, merged


def merge_sums(levels: Sequence[int], fetch: Fetch) -> tuple[None, Params]:
    """Merge the sums of neighbouring blocks of these levels, first to last."""
    sums: list[Params] = [fetch(place) for place in range(len(levels))]
    names = dict.fromkeys(name for each in sums for name in each)
    leaves = {name: [(each[name], 1.0) if name in each else None for each in sums] for name in names}
    return None, sum_trees(leaves, levels)


@dataclass(frozen=True, slots=True)
class _Subtree:
    """The places from ``start`` on, 2^level of them (fewer at the cohort's end), and the replica that has them as its own."""

    start: int
    level: int
    home: int

    @property
    def stop(self) -> int:
        return self.start + (1 << self.level)


def homes(count: int, replicas: int) -> list[int]:
    """Share the places of a cohort out to replicas in stretches: gives the number of the replica for each place."""
    unit = _power_of_two(count / (_UNITS_A_REPLICA * replicas))
    units = math.ceil(count / unit)
    return [place // unit * replicas // units for place in range(count)]


def _blocks(count: int, replicas: int) -> list[_Subtree]:
    """Cut each replica's stretch into the largest subtrees that lie in it, in the order of the cohort."""
    sizes = Counter(homes(count, replicas))
    end = _power_of_two(count)  # what lies behind the cohort is empty, and may be anybody's
    found = []
    start = 0
    for home, size in sorted(sizes.items()):
        stop = start + size if start + size < count else end
        while start < stop:
            level = (start & -start or end).bit_length() - 1
            while start + (1 << level) > stop:
                level -= 1
            if start < count:
                found.append(_Subtree(start, level, home))
            start += 1 << level
    return found


def _power_of_two(least: float) -> int:
    return 1 << (max(1, math.ceil(least)) - 1).bit_length()


def _positions(parts: Sequence[Part | None], block: _Subtree) -> list[int]:
    return [block.start + place for place, part in enumerate(parts[block.start : block.stop]) if part is not None]


def _refuse(problems: dict[int, str], outcomes: Sequence[ClientUpdate | ClientFailure]) -> None:
    failures = {
        position: ClientFailure(
            client_id=outcomes[position].client_id, round_idx=outcomes[position].round_idx, stage="reply", error=problem
        )
        for position, problem in sorted(problems.items())
    }
    if failures:
        raise RefusedUpdates(failures)
