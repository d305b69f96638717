"""One replica as Ray actors: a single process, or a group of ranks in one placement group that live and die together."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fedgraft.actors.hosting import PoolOptions
from fedgraft.errors import ClusterError

__all__ = ["Rank", "Replica", "Shared", "start_replicas"]


@dataclass(frozen=True, slots=True)
class Shared:
    """A value in the object store. Wrapped, so that Ray does not fetch it anew for every call."""

    ref: Any


class Rank:
    """One process of a replica: it hosts one object at a time. Made into an actor by ``start_replicas``."""

    def __init__(self) -> None:
        self._hosted: Any = None
        self._shared: tuple[Any, Any] = (None, None)

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

    def host(self, factory: Callable[[], Any]) -> int:
        """Build the hosted object; gives the process id."""
        self._shared = (None, None)
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "close"):
            hosted.close()
        del hosted
        self._hosted = factory()
        return os.getpid()

    def end(self) -> None:
        """Let the hosted object leave in good order, before the process is ended."""
        hosted, self._hosted = self._hosted, None
        if hasattr(hosted, "end"):
            hosted.end()

    def call(self, name: str) -> Any:
        """Run a method without arguments."""
        return getattr(self._hosted, name)()

    def run(self, name: str, item: Any, shared: Shared) -> tuple[Any, Any]:
        """Run a method on an item; the shared value is fetched once and kept until another one comes."""
        if self._shared[0] != shared.ref:
            self._shared = (shared.ref, ray.get(shared.ref))
        small, large = getattr(self._hosted, name)(item, self._shared[1])
        return small, large


class Replica:
    """The actors of one replica, leader first."""

    def __init__(self, actors: list[Any], group: Any = None) -> None:
        self._actors = actors
        self._group = group

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

    def run(self, name: str, item: Any, shared: Shared) -> tuple[list[Any], Any]:
        """Start a call on an item in every rank; gives the references of their small results, and of the leader's large one."""
        pairs = [actor.run.options(num_returns=2).remote(name, item, shared) for actor in self._actors]
        return [small for small, _ in pairs], pairs[0][1]

    def end(self) -> list[Any]:
        """Start the end of every rank; gives one reference a rank."""
        return [actor.end.remote() for actor in self._actors]

    def kill(self) -> None:
        """End every process of the replica at once, whatever it is doing."""
        for actor in self._actors:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)


def start_replicas(options: PoolOptions, count: int) -> list[Replica]:
    """Start the actors of ``count`` replicas side by side; they may still be starting when this returns.

    Raises:
        ClusterError: No place for all ranks of a replica together was found in ``executor.start_timeout_s``.
    """
    if options.ranks == 1:
        return [Replica([_actor(options)]) for _ in range(count)]
    deadline = time.monotonic() + options.start_timeout_s
    gpus = options.gpus_per_replica / options.ranks
    bundle = {"CPU": float(options.threads)} | ({"GPU": gpus} if gpus else {})
    groups = [placement_group([bundle] * options.ranks, strategy="PACK") for _ in range(count)]
    replicas: list[Replica] = []
    try:
        for group in groups:
            if not group.wait(max(1.0, deadline - time.monotonic())):
                raise ClusterError(
                    f"no place for {options.ranks} ranks with {bundle} each was found in {options.start_timeout_s:.0f} s",
                    "lower executor.replicas, engine.world_size or executor.threads, or free the cluster",
                )
            replicas.append(Replica([_actor(options, group, rank) for rank in range(options.ranks)], group))
        meetings = [replica.meeting_point() for replica in replicas]
        places = ray.get(meetings, timeout=max(1.0, deadline - time.monotonic()))
        joined = [ref for replica, place in zip(replicas, places, strict=True) for ref in replica.join(*place)]
        ray.get(joined, timeout=max(1.0, deadline - time.monotonic()))
    except (ClusterError, RayError) as error:
        for replica in replicas:
            replica.kill()
        for group in groups[len(replicas) :]:
            remove_placement_group(group)
        if isinstance(error, ClusterError):
            raise
        raise ClusterError(
            f"the ranks of a replica did not find each other within executor.start_timeout_s = {options.start_timeout_s:.0f} s: "
            f"{type(error).__name__}",
            "raise it, or free the machine",
        ) from error
    return replicas


def _actor(options: PoolOptions, group: Any = None, rank: int = 0) -> Any:
    threads = str(options.threads)
    env = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    place: dict[str, Any] = {}
    if group is not None:
        place["scheduling_strategy"] = PlacementGroupSchedulingStrategy(placement_group=group, placement_group_bundle_index=rank)
    actor = ray.remote(Rank).options(
        num_cpus=options.threads,
        num_gpus=options.gpus_per_replica / options.ranks,
        max_restarts=0,  # a restarted actor would be empty; the pool restores what it hosted
        runtime_env={"env_vars": env},
        **place,
    )
    return actor.remote()
