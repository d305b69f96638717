"""Which clients of a cohort train in one pass: consecutive places, so that nothing but configuration and cohort decides."""

from __future__ import annotations

from dataclasses import replace

from fedgraft.actors.hosting import Finished, ItemOf

__all__ = ["passes", "split"]


def passes(num_clients: int, at_once: int) -> list[tuple[int, ...]]:
    """Cut the places of a cohort into groups of ``at_once`` >= 1, the last one smaller if need be."""
    return [tuple(range(start, min(start + at_once, num_clients))) for start in range(0, num_clients, at_once)]


def split(finished: Finished, size: int) -> list[Finished]:
    """Give each client of a pass its own part of what came back; what went wrong with all of them went wrong with each.

    Args:
        finished: Of one call; its value and large result are lists of ``size`` where the call was one of several clients.
        size: Clients of the pass.
    """
    if finished.error is not None:
        return [finished] * size
    if not isinstance(finished.value, list):
        return [finished] if size == 1 else [replace(finished, error="the reply is not one of several clients")] * size
    return [replace(finished, value=value, handle=ItemOf(finished.handle, at)) for at, value in enumerate(finished.value)]
