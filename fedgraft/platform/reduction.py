"""Phase two of a round: the cohort's tensors, fetched one client at a time, summed through the fixed tree.

The driver holds one client's tensors and a few partial sums, never the cohort.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedgraft.aggregation.reduce import TreeSum, leaf
from fedgraft.errors import MethodError
from fedgraft.platform.replies import EXTRA, address, tensor_problem
from fedgraft.platform.task_checks import spread_names
from fedgraft.protocols import Reduced, Weights
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate, Params

__all__ = ["RefusedUpdate", "sum_updates"]


class RefusedUpdate(Exception):
    """The tensors of one place in the cohort must not be summed; the round weighs and sums again without them."""

    def __init__(self, position: int, failure: ClientFailure) -> None:
        super().__init__(position, failure)
        self.position = position
        self.failure = failure


def sum_updates(
    tasks: Sequence[ClientTask],
    outcomes: Sequence[ClientUpdate | ClientFailure],
    weights: Weights,
    fetch: Callable[[int], Params],
) -> Reduced:
    """Sum the cohort's updates.

    Args:
        tasks: In cohort order.
        outcomes: Small halves of the replies, in cohort order.
        weights: Of the updates among them.
        fetch: Gives the large half of a place in the cohort.

    Raises:
        RefusedUpdate: Tensors are not what the reply announced, or have values that are not finite.
        MethodError: The method would sum two tensors of one client under one name.
    """
    tree = TreeSum(len(outcomes))
    place = 0
    for position, outcome in enumerate(outcomes):
        if isinstance(outcome, ClientFailure):
            tree.add(position, None)
            continue
        tensors = fetch(position)
        problem = tensor_problem(outcome, tensors)
        if problem is not None:
            failure = ClientFailure(client_id=outcome.client_id, round_idx=outcome.round_idx, stage="reply", error=problem)
            raise RefusedUpdate(position, failure)
        named = _by_server_name(tasks[position], outcome, tensors, weights)
        tree.add(position, leaf(named, {name: weights.of(name)[place] for name in named}))
        place += 1
    total = tree.result()
    mean = total.mean()
    return Reduced(
        delta={key: value for key, value in mean.items() if not key.startswith(EXTRA)},
        extras={key.removeprefix(EXTRA): value for key, value in mean.items() if key.startswith(EXTRA)},
        num_contributors=total.count,
    )


def _by_server_name(task: ClientTask, update: ClientUpdate, tensors: Params, weights: Weights) -> Params:
    named: Params = {}
    for key, tensor in tensors.items():
        for name in spread_names(weights, address(task, update, key)):
            if name in named:
                raise MethodError(f"two tensors of client {update.client_id} would be summed as {name}", "see spread")
            named[name] = tensor
    return named
