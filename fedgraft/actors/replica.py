"""One replica as Ray actors: a single process, or a group of ranks in one placement group that live and die together."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray.exceptions import ObjectLostError, RayError
from ray.util import get_placement_group
from ray.util.placement_group import (
    get_current_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from fedgraft.actors.hosting import Fetch, ItemOf, LostResult, LostShared, PoolOptions
from fedgraft.actors.places import choose_nodes, free_places
from fedgraft.actors.tensors import num_bytes, share_tensors
from fedgraft.errors import ClusterError

__all__ = ["Kept", "Large", "LostHandle", "Rank", "Replica", "Shared", "remove_groups", "start_replicas"]

_NODE_LABEL = "ray.io/node-id"
_KEPT_SHARE = 0.2
"""Share of a node's memory in which its replicas may keep results, each as much as its cores; the rest goes to the store."""
_SLICE_S = 5.0
"""How often the wait for a place asks whether there still is one to wait for."""


@dataclass(frozen=True, slots=True)
class Shared:
    """A value in the object store. Wrapped, so that Ray does not fetch it anew for every call."""

    ref: Any


@dataclass(frozen=True, slots=True)
class Kept:
    """The handle of a large result that its maker keeps in its own memory: ``key`` is the process and a number in it."""

    maker: Any
    key: tuple[str, int]


@dataclass(frozen=True, slots=True)
class Large:
    """Handles of large results, wrapped for the same reason: each is fetched when it is asked for."""

    handles: tuple[Any, ...]

    def of_process(self, process: str) -> tuple[int, ...]:
        """Give the places of the handles whose results one process keeps."""
        plain = [handle.handle if isinstance(handle, ItemOf) else handle for handle in self.handles]
        return tuple(place for place, handle in enumerate(plain) if isinstance(handle, Kept) and handle.key[0] == process)


class LostHandle(LostResult):
    """The results of the handles at ``places`` are gone."""

    def __init__(self, places: tuple[int, ...], why: str) -> None:
        super().__init__(places, why)
        self.places = places

    def __str__(self) -> str:
        return str(self.args[1])


class Rank:
    """One process of a replica: it hosts one object at a time. Made into an actor by ``start_replicas``."""

    def __init__(self, options: PoolOptions) -> None:
        share_tensors()
        self._options = options
        self._hosted: Any = None
        self._shared: tuple[Any, Any] = (None, None)
        self._is_leader = True
        self._process = uuid.uuid4().hex
        self._kept: dict[tuple[str, int], Any] = {}
        self._kept_bytes = 0
        self._num_kept = 0
        self._may_keep = int(_KEPT_SHARE * psutil.virtual_memory().total * options.threads / (os.cpu_count() or 1))

    def meeting_point(self) -> tuple[str, int]:
        """Give this node's address and a port that is free on it, for the ranks to meet at."""
        address = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, int(probe.getsockname()[1])

    def join(self, rank: int, world_size: int, address: str, port: int) -> None:
        """Tell what is hosted here its place among the ranks."""
        found = {"RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": address, "MASTER_PORT": port, "LOCAL_RANK": 0}
        os.environ.update({name: str(value) for name, value in found.items()})
        self._is_leader = rank == 0

    def host(self, factory: Callable[[], Any]) -> int:
        """Build the hosted object; gives the process id."""
        self._take_shared(None, None)
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "close"):
            hosted.close()
        del hosted
        self._hosted = factory()
        return os.getpid()

    @ray.method(concurrency_group="beat")  # type: ignore[untyped-decorator]
    def beat(self, after_s: float) -> None:
        """Answer after a while, whatever the working thread does: a sign of life."""
        time.sleep(after_s)

    def end(self) -> None:
        """Let the hosted object leave in good order, before the process is ended."""
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "end"):
            hosted.end()

    def call(self, name: str) -> Any:
        """Run a method without arguments."""
        return getattr(self._hosted, name)()

    def run(self, name: str, items: Sequence[Any], shared: Shared) -> tuple[Any, ...]:
        """Run a method on some items, one after another; the shared value is fetched once and kept until another one comes.

        Returns:
            All small results, each with the key of the large one where this process keeps it, else ``None``; then the large
            ones that it does not keep, each an object of its own.

        Raises:
            LostShared: The shared value is gone from the object store.
        """
        if self._shared[0] != shared.ref:
            try:
                self._take_shared(shared.ref, ray.get(shared.ref))
            except ObjectLostError as error:
                raise LostShared(str(error)) from None
        found = [self._run_one(name, item) for item in items]
        return [(small, key) for small, key, _ in found], *(large for _, _, large in found)

    def _take_shared(self, ref: Any, value: Any) -> None:
        """Take another shared value in place of what there was; nobody asks any more for what came of the last one."""
        self._shared = (ref, value)
        self._kept, self._kept_bytes = {}, 0

    def _run_one(self, name: str, item: Any) -> tuple[Any, tuple[str, int] | None, Any]:
        started = time.perf_counter()
        small, large = getattr(self._hosted, name)(item, self._shared[1])
        seconds = time.perf_counter() - started
        size = num_bytes(large)
        if not self._is_leader or size <= self._options.inline_bytes:
            return small, None, large if self._is_leader else None
        if seconds > self._options.keep_s_per_byte * size or self._kept_bytes + size > self._may_keep:
            return small, None, large
        self._num_kept += 1
        key = (self._process, self._num_kept)
        self._kept[key] = large
        self._kept_bytes += size
        return small, key, None

    @ray.method(concurrency_group="give")  # type: ignore[untyped-decorator]
    def give(self, key: tuple[str, int]) -> Any:
        """Give a large result that is kept here, whatever the working thread does. It must not be written to.

        Raises:
            LostResult: It is not, any more.
        """
        try:
            return self._kept[key]
        except KeyError:
            raise LostResult("it was made for another shared value") from None

    def apply(self, function: Callable[[Any, Fetch], tuple[Any, Any]], item: Any, large: Large) -> tuple[list[Any], Any]:
        """Run a function on an item and large results of earlier calls, whoever made them.

        Raises:
            LostHandle: One that the function asked for is gone, and with it all others that its maker kept.
        """

        lists: dict[Any, Any] = {}  # of several results that lie in one object

        def get(handle: Any) -> Any:
            if not isinstance(handle, Kept):
                return ray.get(handle)
            return self._kept[handle.key] if handle.key in self._kept else ray.get(handle.maker.give.remote(handle.key))

        def fetch(place: int) -> Any:
            handle = large.handles[place]
            plain = handle.handle if isinstance(handle, ItemOf) else handle
            try:
                if plain is handle:
                    return get(handle)
                if plain not in lists:
                    lists[plain] = get(plain)
                return lists[plain][handle.place]
            except RayError as error:
                places = large.of_process(plain.key[0]) if isinstance(plain, Kept) else (place,)
                raise LostHandle(places, str(error)) from None

        small, result = function(item, fetch)
        return [(small, None)], result


class Replica:
    """The actors of one replica, leader first.

    ``group`` is the placement group that ends with it, if it has one of its own; ``node`` the node that was chosen for it.
    """

    def __init__(self, actors: list[Any], group: Any = None, node: str | None = None) -> None:
        self._actors = actors
        self._group = group
        self.node = node

    @property
    def leader(self) -> Any:
        """The actor whose results are the replica's."""
        return self._actors[0]

    @property
    def num_ranks(self) -> int:
        """Actors of the replica."""
        return len(self._actors)

    def beat(self, rank: int, after_s: float) -> Any:
        """Ask a rank for a sign of life after a while; gives a reference."""
        return self._actors[rank].beat.remote(after_s)

    def meeting_point(self) -> Any:
        """Ask the leader where the ranks can meet; gives a reference."""
        return self._actors[0].meeting_point.remote()

    def join(self, address: str, port: int) -> list[Any]:
        """Tell every rank its place; gives one reference a rank."""
        size = len(self._actors)
        return [actor.join.remote(rank, size, address, port) for rank, actor in enumerate(self._actors)]

    def host(self, factory: Callable[[], Any]) -> list[Any]:
        """Start building the hosted object in every rank; gives one reference a rank."""
        return [actor.host.remote(factory) for actor in self._actors]

    def call(self, name: str) -> list[Any]:
        """Start a call without arguments in every rank; gives one reference a rank."""
        return [actor.call.remote(name) for actor in self._actors]

    def run(self, name: str, items: Sequence[Any], shared: Shared) -> tuple[list[Any], Sequence[Any]]:
        """Start a call on some items in every rank.

        Returns:
            The reference of each rank's small results, and of each of the leader's large ones that it does not keep.
        """
        found = [actor.run.options(num_returns=1 + len(items)).remote(name, items, shared) for actor in self._actors]
        return [small for small, *_ in found], found[0][1:]

    def apply(
        self, function: Callable[[Any, Fetch], tuple[Any, Any]], item: Any, large: Large
    ) -> tuple[list[Any], Sequence[Any]]:
        """Start a function in the leader, the other ranks stay at rest; gives the references of its results as ``run`` does."""
        small, result = self._actors[0].apply.options(num_returns=2).remote(function, item, large)
        return [small], [result]

    def end(self) -> list[Any]:
        """Start the end of every rank; gives one reference a rank."""
        return [actor.end.remote() for actor in self._actors]

    def kill(self) -> None:
        """End every process of the replica at once, whatever it is doing."""
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def start_replicas(
    options: PoolOptions,
    count: int,
    *,
    owner: str = "",
    is_hopeless: Callable[[], bool] = lambda: False,
    taken: Iterable[str | None] = (),
) -> list[Replica]:
    """Start the actors of ``count`` replicas side by side; they may still be starting when this returns.

    Args:
        options: What each gets.
        count: Replicas to start.
        owner: Whose the placement groups are, see ``remove_groups``.
        is_hopeless: Asked every few seconds while a place is waited for; true ends the wait.
        taken: Nodes of the replicas that are there already.

    Raises:
        ClusterError: No place for all ranks of a replica together was found in ``executor.start_timeout_s``.
    """
    outer = _outer_group(options)
    nodes: list[str | None] = [None] * count
    if options.placement is not None and outer is None:
        nodes = choose_nodes(free_places(options), count, options.placement, taken)
    if options.ranks == 1:
        return [Replica([_actor(options, outer, node=node)], node=node) for node in nodes]
    deadline = time.monotonic() + options.start_timeout_s
    gpus = options.gpus_per_replica / options.ranks
    bundle = {"CPU": float(options.threads)} | ({"GPU": gpus} if gpus else {})
    names = [f"{_group_prefix(owner)}{uuid.uuid4().hex}" for _ in range(0 if outer else count)]
    groups = [_ranks_group(bundle, options.ranks, name, node) for name, node in zip(names, nodes, strict=False)]
    replicas = [Replica([_actor(options, outer) for _ in range(options.ranks)]) for _ in range(count if outer else 0)]
    try:
        for group, node in zip(groups, nodes, strict=False):
            if not _found_place(group, deadline, is_hopeless):
                raise ClusterError(
                    f"no place for {options.ranks} ranks with {bundle} each was found in {options.start_timeout_s:.0f} s",
                    "lower executor.replicas, engine.world_size or executor.threads, or free the cluster",
                )
            replicas.append(Replica([_actor(options, group, rank) for rank in range(options.ranks)], group, node))
        meetings = [replica.meeting_point() for replica in replicas]
        places = ray.get(meetings, timeout=max(1.0, deadline - time.monotonic()))
        joined = [ref for replica, place in zip(replicas, places, strict=True) for ref in replica.join(*place)]
        ray.get(joined, timeout=max(1.0, deadline - time.monotonic()))
    except (ClusterError, RayError) as error:
        for replica in replicas:
            replica.kill()
        for group in groups[len(replicas) :]:  # none where the outer group is used
            remove_placement_group(group)
        if isinstance(error, ClusterError):
            raise
        raise ClusterError(
            f"the ranks of a replica did not find each other within executor.start_timeout_s = {options.start_timeout_s:.0f} s: "
            f"{type(error).__name__}",
            "raise it, or free the machine",
        ) from error
    return replicas


def remove_groups(owner: str) -> None:
    """Remove the placement groups of an owner that has died.

    Ray ends the actors that a dead actor had made, but keeps its placement groups, and with them the cores, until the whole job
    ends.
    """
    for group in placement_group_table().values():
        if group["name"].startswith(_group_prefix(owner)) and group["state"] != "REMOVED":
            remove_placement_group(get_placement_group(group["name"]))


def _group_prefix(owner: str) -> str:
    return f"fedgraft/{owner}/"


def _ranks_group(bundle: dict[str, float], ranks: int, name: str, node: str | None) -> Any:
    """A group for the ranks of one replica, close together; on a node that was chosen, which has room for all of them."""
    selector = None if node is None else [{_NODE_LABEL: node}] * ranks
    return placement_group([bundle] * ranks, strategy="PACK", name=name, bundle_label_selector=selector)


def _found_place(group: Any, deadline: float, is_hopeless: Callable[[], bool]) -> bool:
    while not group.wait(max(1.0, min(_SLICE_S, deadline - time.monotonic()))):
        if time.monotonic() > deadline or is_hopeless():
            return False
    return True


def _outer_group(options: PoolOptions) -> Any:
    """The placement group that the caller is in, where its replicas are to take their places from it."""
    if not options.in_group:
        return None
    group = get_current_placement_group()
    if group is None:
        raise ClusterError("the replicas are to use a placement group, and there is none here", "this is a bug in fedgraft")
    return group


def _actor(options: PoolOptions, group: Any = None, rank: int = -1, node: str | None = None) -> Any:
    """Start a rank: in one bundle of a group (-1: any that is free), on a node if it still has room, or wherever there is."""
    threads = str(options.threads)
    env = {"MALLOC_ARENA_MAX": "2", "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    place: dict[str, Any] = {}
    if group is not None:
        place["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
    elif node is not None:
        place["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node_id=node, soft=True)
    # Beats and kept results are answered in threads of their own; calls still run one after another, in one thread.
    actor = ray.remote(concurrency_groups={"beat": 1, "give": 1})(Rank).options(
        num_cpus=options.threads,
        num_gpus=options.gpus_per_replica / options.ranks,
        max_restarts=0,  # a restarted actor would be empty; the pool restores what it hosted
        runtime_env={"env_vars": env},
        **place,
    )
    return actor.remote(options)
