"""Sums over a cohort, wherever they are made: the bits of the plain tree, refusals by place, lost tensors and lost sums."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.aggregation import reduce
from fedgraft.aggregation.reduce import TreeSum, leaf, sum_tree, tree_of
from fedgraft.errors import ClusterError, MethodError, UpdateError
from fedgraft.platform.reduction import RefusedUpdates, homes, sum_updates
from fedgraft.protocols import Reduced, Weights
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate, Params, RoundPlan, TensorInfo

PLAN = RoundPlan(round_idx=1, num_steps=1, learning_rate=0.1)


class FarPool(LocalPool):
    """Sums where a pool of actors does: what its replicas made is not here. May lose results, by the order they are asked for."""

    inline_bytes = 0

    def __init__(self, size: int = 2, *, loses: Sequence[int] = ()) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.size = size
        self.loses = set(loses)
        self.gone: list[Any] = []
        self.fetched: list[Any] = []
        self.applied: list[list[int]] = []

    def apply(
        self, function: Any, items: Sequence[Any], handles: Sequence[Sequence[Any]], *, homes: Sequence[int] | None = None
    ) -> Iterator[Finished]:
        assert homes is None or all(0 <= home < self.size for home in homes)
        self.applied.append([len(each) for each in handles])
        yield from reversed(list(super().apply(function, items, handles)))  # whoever comes first

    def fetch(self, handle: Any) -> Any:
        self.fetched.append(handle)
        if len(self.fetched) - 1 in self.loses or any(handle is other for other in self.gone):
            raise LostResult("its node is gone")
        return handle


def cohort(tensors: Sequence[Params | None]) -> tuple[list[ClientTask], list[ClientUpdate | ClientFailure]]:
    tasks, outcomes = [], []
    for client, sent in enumerate(tensors):
        keys = tuple(key for key in sent or {} if not key.startswith("extras/"))
        tasks.append(ClientTask(client_id=client, plan=PLAN, keys=keys))
        payload = [
            TensorInfo(
                key=key.removeprefix("extras/"),
                shape=tuple(value.shape),
                dtype=str(value.dtype).removeprefix("torch."),
                num_bytes=value.nbytes,
                group="extras" if key.startswith("extras/") else "shared",
            )
            for key, value in (sent or {}).items()
        ]
        payload.append(TensorInfo(key="seen", shape=(), dtype="int64", num_bytes=8, group="statistics"))
        outcomes.append(
            ClientFailure(client_id=client, round_idx=1, stage="train", error="no")
            if sent is None
            else ClientUpdate(
                client_id=client,
                round_idx=1,
                num_examples=client + 1,
                num_steps=1,
                expert_tokens=torch.zeros(1, 1, dtype=torch.int64),
                metrics={},
                payload=tuple(payload),
            )
        )
    return tasks, outcomes


def some_tensors(count: int, seed: int = 0) -> list[Params | None]:
    generator = torch.Generator().manual_seed(seed)
    made: list[Params | None] = []
    for client in range(count):
        scale = 10.0 ** (client % 7)
        sent = {
            "w": torch.randn(70_001, generator=generator) * scale,
            "b": torch.randn(3, 2, generator=generator).to(torch.bfloat16),
            "extras/c": torch.randn(5, generator=generator, dtype=torch.float64) / scale,
        }
        if client % 3 == 1:
            del sent["b"]
        made.append(None if client % 11 == 5 else sent)
    return made


def plain(tensors: Sequence[Params | None], weights: Callable[[int, str], dict[str, float]]) -> tuple[Params, dict[str, int]]:
    """The tree as it is documented, one whole client after another."""
    tree = TreeSum(len(tensors))
    for client, sent in enumerate(tensors):
        if sent is None:
            tree.add(client, None)
            continue
        named = {name: value for key, value in sent.items() for name in weights(client, key)}
        given = {name: weight for key in sent for name, weight in weights(client, key).items()}
        tree.add(client, leaf(named, given))
    total = tree.result()
    return total.mean(), total.count


def summed(tensors: Sequence[Params | None], weights: Weights, pool: LocalPool, again: list[int] | None = None) -> Reduced:
    tasks, outcomes = cohort(tensors)
    handles: list[Any] = list(tensors)

    def make_again(positions: Sequence[int]) -> dict[int, Any]:
        (again if again is not None else []).extend(positions)
        return {position: dict(tensors[position] or {}) for position in positions}

    return sum_updates(tasks, outcomes, weights, handles, pool=pool, make_again=make_again)


def weights_of(tensors: Sequence[Params | None]) -> Weights:
    return Weights(default=tuple(client + 0.3 for client, sent in enumerate(tensors) if sent is not None))


@pytest.mark.parametrize("size", [1, 3, 40])
@pytest.mark.parametrize("count", [1, 2, 5, 16, 37, 100])
def test_blocks_in_any_number_of_replicas_give_the_bits_of_the_plain_tree(count: int, size: int) -> None:
    tensors = some_tensors(count)
    expected, contributors = plain(tensors, lambda client, key: {key: client + 0.3})
    far, near = (summed(tensors, weights_of(tensors), pool) for pool in (FarPool(size), LocalPool(PoolOptions(replicas=1))))
    for found in (far, near):
        assert found.num_contributors == contributors
        assert {**found.delta, **{f"extras/{key}": value for key, value in found.extras.items()}}.keys() == expected.keys()
        for key, value in expected.items():
            other = found.extras["c"] if key == "extras/c" else found.delta[key]
            assert other.dtype == torch.float64
            assert torch.equal(other, value), key


def test_the_sums_of_these_tensors_do_depend_on_the_tree() -> None:
    # Else the test above shows nothing.
    tensors = [sent for sent in some_tensors(16) if sent is not None]
    line = sum((sent["w"].double() * (client + 0.3) for client, sent in enumerate(tensors)), torch.zeros(70_001).double())
    tree = sum_tree([(sent["w"], client + 0.3) for client, sent in enumerate(tensors)])
    assert tree is not None
    assert not torch.equal(line, tree)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_change_no_bit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = [None if place in (2, 3, 6) else (torch.randn(5, 13) * 10.0**place, place + 0.1) for place in range(9)]
    whole = sum_tree(leaves)
    monkeypatch.setattr(reduce, "_CHUNK", chunk)
    cut = sum_tree(leaves)
    assert whole is not None
    assert cut is not None
    assert cut.shape == (5, 13)
    assert torch.equal(whole, cut)
    assert sum_tree([None, None, None]) is None


@pytest.mark.parametrize("size", range(1, 18))
def test_the_order_of_the_additions_is_the_trees(size: int) -> None:
    def pairs(level: list[str]) -> str:
        while len(level) > 1:
            couples = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [f"({couple[0]}+{couple[1]})" if len(couple) == 2 else couple[0] for couple in couples]
        return level[0]

    names = [str(place) for place in range(size)]
    assert tree_of(names, lambda left, right: f"({left}+{right})") == pairs(names)


def test_no_replica_gets_the_whole_cohort_and_the_caller_fetches_few_sums() -> None:
    tensors: list[Params | None] = [{"w": torch.ones(3)} for _ in range(1000)]
    pool = FarPool(40)
    found = summed(tensors, Weights(default=(1.0,) * 1000), pool)
    assert torch.equal(found.delta["w"], torch.ones(3).double())
    blocks, merges = pool.applied
    assert sum(blocks) == 1000
    assert max(blocks) <= 32  # a replica's share is 25
    assert all(size & (size - 1) == 0 for size in blocks), "complete subtrees"
    assert sum(merges) == len(blocks)
    assert len(merges) <= 16
    assert all(handle is not sent for handle in pool.fetched[-16:] for sent in tensors), "the caller fetches sums only"


@pytest.mark.parametrize("replicas", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 2, 3, 13, 50, 64, 1000])
def test_each_replica_sums_one_stretch_of_the_cohort_in_few_blocks(count: int, replicas: int) -> None:
    shares = homes(count, replicas)
    assert len(shares) == count
    assert shares == sorted(shares)
    assert set(shares) <= set(range(replicas))
    sizes = [shares.count(home) for home in range(replicas)]
    if count >= 8 * replicas:
        # Stretches are cut at multiples of a unit of at most half an even share.
        assert max(sizes) <= count / replicas * 1.5
        assert min(sizes) > 0
    found: list[tuple[int, int]] = []

    class Noting(FarPool):
        def apply(self, function: Any, items: Sequence[Any], handles: Any, *, homes: Any = None) -> Iterator[Finished]:
            found.extend((home, len(item.parts)) for home, item in zip(homes or [], items, strict=homes is not None))
            yield from super().apply(function, items, handles, homes=homes)

    summed([{"w": torch.ones(3)}] * count, Weights(default=(1.0,) * count), Noting(replicas))
    assert [sum(size for home, size in found if home == replica) for replica in range(replicas)] == sizes
    assert len(found) <= 2 * replicas * math.log2(max(2, count))


def test_by_key_weights_spread_names_and_weight_zero_far_away() -> None:
    tensors = some_tensors(9)
    places = [client for client, sent in enumerate(tensors) if sent is not None]
    by_key = {"w/0": tuple(float(client % 2) for client in places), "w/1": tuple(float(1 - client % 2) for client in places)}
    weights = Weights(default=tuple(client + 1.0 for client in places), by_key=by_key, spread={"w": ("w/0", "w/1")})

    def of(client: int, key: str) -> dict[str, float]:
        return {"w/0": float(client % 2), "w/1": float(1 - client % 2)} if key == "w" else {key: client + 1.0}

    expected, contributors = plain(tensors, of)
    found = summed(tensors, weights, FarPool())
    assert found.num_contributors == contributors
    assert sorted(found.delta) == ["b", "w/0", "w/1"]
    for key, value in found.delta.items():
        assert torch.equal(value, expected[key]), key
    with pytest.raises(MethodError, match="two tensors of client 0 would be summed as b"):
        summed(tensors, Weights(default=(1.0,) * len(places), spread={"w": ("b",)}), FarPool())


@pytest.mark.parametrize("weight", [1.0, 0.0])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_by_place_all_at_once(value: float, weight: float) -> None:
    tensors = some_tensors(12)
    for position in (2, 9):
        sent = tensors[position]
        assert sent is not None
        sent["w"][69_999] = value
    weights = Weights(default=tuple(weight if client in (2, 9) else 1.0 for client in range(12) if client != 5))
    for pool in (FarPool(), LocalPool(PoolOptions(replicas=1))):
        with pytest.raises(RefusedUpdates) as raised:
            summed(tensors, weights, pool)
        assert {position: failure.client_id for position, failure in raised.value.failures.items()} == {2: 2, 9: 9}
        assert {failure.error for failure in raised.value.failures.values()} == {"w has values that are not finite"}


def test_infinities_that_cancel_or_add_up_from_finite_values_are_told_apart() -> None:
    large = torch.full((2,), 1.7e308, dtype=torch.float64)
    found = summed([{"w": large}, {"w": large}], Weights(default=(1.0, 1.0)), FarPool())
    assert torch.isinf(found.delta["w"]).all()  # both are finite: as the plain tree has it
    infinite: list[Params | None] = [{"w": torch.tensor([math.inf])}, {"w": torch.tensor([-math.inf])}]
    with pytest.raises(RefusedUpdates) as raised:
        summed(infinite, Weights(default=(1.0, 1.0)), FarPool())
    assert sorted(raised.value.failures) == [0, 1]


def test_two_shapes_under_one_name_end_the_round() -> None:
    tensors: list[Params | None] = [{"extras/c": torch.zeros(2)}, {"extras/c": torch.zeros(3)}]
    with pytest.raises(UpdateError, match=r"extras/c: two clients sent shapes \(2,\) and \(3,\)"):
        summed(tensors, Weights(default=(1.0, 1.0)), FarPool())


def test_lost_tensors_are_made_again_and_lost_sums_are_summed_again() -> None:
    tensors = some_tensors(37)
    expected, _ = plain(tensors, lambda client, key: {key: client + 0.3})
    straight = FarPool()
    summed(tensors, weights_of(tensors), straight)
    asked = len(straight.fetched)
    sums = len(straight.applied[0])
    again: list[int] = []
    pool = FarPool()
    pool.gone = [tensors[20], tensors[4]]
    found = summed(tensors, weights_of(tensors), pool, again)
    assert again == [4, 20]
    assert torch.equal(found.delta["w"], expected["w"])
    pool = FarPool(loses=(asked - sums,))  # the first of the sums
    found = summed(tensors, weights_of(tensors), pool, again)
    assert len(again) == 2, "no client trains again for a sum"
    assert torch.equal(found.delta["w"], expected["w"])
    with pytest.raises(ClusterError, match="were lost 5 times: its node is gone"):
        summed(tensors, weights_of(tensors), FarPool(loses=[asked - sums + i * (asked - sums + 1) for i in range(5)]))


def test_a_function_that_fails_in_every_replica_ends_the_round(monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(self: Any, function: Any, items: Sequence[Any], handles: Any, **how: Any) -> Iterator[Finished]:
        yield Finished(index=0, error="replica 0 died")

    monkeypatch.setattr(FarPool, "apply", apply)
    with pytest.raises(ClusterError, match="a part of the cohort could not be summed: replica 0 died"):
        summed(some_tensors(3), weights_of(some_tensors(3)), FarPool())
