"""What a client's reply must be before it counts: of the right client and round, in the shapes asked for, finite, not too large.

A reply that does not fit is a ``ClientFailure`` with stage ``reply``: named, counted, never averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedgraft.actors.hosting import Finished
from fedgraft.platform.ledger import dtype_name
from fedgraft.types import ClientFailure, ClientTask, ClientUpdate, Federation, Params, ServerState, TensorInfo

__all__ = ["EXTRA", "ReplyLimits", "address", "announced_key", "check_reply", "structure_problem", "values_problem"]

EXTRA = "extras/"
"""Prefix of extras among the tensors of a reply; parameters stand under their keys."""

_FLOATING = ("bfloat16", "float32", "float64")
_SLOT_COPIES = 4
"""Without a limit of the user's, a reply may be as large as this many float32 copies of all slots: deltas, control variates,
statistics; no method of ours sends more than two."""
_SMALL_BYTES = 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplyLimits:
    """What replies of a run may be at most: ``max_bytes`` of all tensors together, and the shape of ``expert_tokens``."""

    max_bytes: int
    shape_LE: tuple[int, int]

    @classmethod
    def of(cls, federation: Federation, max_bytes: int | None) -> ReplyLimits:
        """The limits of a federation; ``max_bytes`` is the user's own, if there is one."""
        slots = sum(4 * torch.Size(ref.shape).numel() for ref in federation.refs)
        return cls(
            max_bytes=max_bytes or _SLOT_COPIES * slots + _SMALL_BYTES,
            shape_LE=(len(federation.facts.layers), federation.facts.num_experts),
        )


def address(task: ClientTask, outcome: ClientUpdate, key: str) -> str:
    """The server's name for what a client calls ``key``."""
    return outcome.requested.get(key) or task.addresses.get(key, key)


def check_reply(task: ClientTask, state: ServerState, finished: Finished, limits: ReplyLimits) -> ClientUpdate | ClientFailure:
    """Give the reply if it fits the task, else a failure that says what is wrong with it."""
    outcome = finished.value
    if finished.error is not None:
        return _failure(task, "replica", finished.error)
    if not all(_agree(outcome, follower) for follower in finished.followers):
        return _failure(task, "reply", "the ranks of the replica do not agree on how the task went")
    if not isinstance(outcome, ClientUpdate | ClientFailure):
        return _failure(task, "reply", f"the reply is a {type(outcome).__name__}, not an update")
    if (outcome.client_id, outcome.round_idx) != (task.client_id, task.round_idx):
        return _failure(task, "reply", f"the reply is of client {outcome.client_id} in round {outcome.round_idx}")
    if isinstance(outcome, ClientFailure):
        return outcome
    problem = _payload_problem(task, outcome, state, limits.max_bytes) or _counts_problem(outcome, limits.shape_LE)
    return outcome if problem is None else _failure(task, "reply", problem)


def _payload_problem(task: ClientTask, update: ClientUpdate, state: ServerState, max_bytes: int) -> str | None:
    known = set(task.keys) | set(update.requested)
    params = [info for info in update.payload if info.group in ("shared", "assigned")]
    unknown = [info.key for info in params if info.key not in known]
    unknown += [name for name in update.requested.values() if name not in state.params]
    if unknown:
        return f"the reply has tensors that were not sent to this client: {', '.join(unknown[:3])}"
    for info in params:
        expected = state.params[address(task, update, info.key)].shape
        if info.shape != expected:
            return f"{info.key} has shape {info.shape}, sent was {tuple(expected)}"
        if info.dtype not in _FLOATING:
            return f"{info.key} has dtype {info.dtype}, expected one of {', '.join(_FLOATING)}"
    size = sum(info.num_bytes for info in update.payload)
    if size > max_bytes:
        return f"the reply has {size} bytes, and at most {max_bytes} are taken (federation.max_update_bytes)"
    return None


def _counts_problem(update: ClientUpdate, shape_LE: tuple[int, int]) -> str | None:
    for key, value in update.statistics.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            return f"the statistic {key} has values that are not finite"
    if update.expert_tokens.shape != shape_LE or (update.expert_tokens.numel() and int(update.expert_tokens.min()) < 0):
        return f"expert_tokens has shape {tuple(update.expert_tokens.shape)} or negative counts, expected {shape_LE} counts"
    if update.num_examples < 0 or update.num_steps < 0:
        return f"the reply counts {update.num_examples} examples and {update.num_steps} steps"
    return None


def announced_key(info: TensorInfo) -> str:
    """What a tensor of the payload is called among the tensors of the reply."""
    return info.key if info.group in ("shared", "assigned") else EXTRA + info.key


def structure_problem(payload: Sequence[TensorInfo], tensors: Params) -> str | None:
    """Say what is wrong with the large half of a reply: names, shapes, dtypes other than announced.

    Args:
        payload: What was announced, without statistics.
        tensors: What there is.
    """
    announced = {announced_key(info): info for info in payload}
    if alien := sorted(announced.keys() ^ tensors.keys()):
        return f"the tensors are not those that were announced: {', '.join(alien[:3])}"
    for key, info in announced.items():
        tensor = tensors[key]
        dtype = dtype_name(tensor.dtype)
        if tensor.shape != info.shape or dtype != info.dtype:
            return f"{key} has shape {tuple(tensor.shape)} and dtype {dtype}, announced were {info.shape} and {info.dtype}"
    return None


def values_problem(key: str, tensor: torch.Tensor) -> str | None:
    """Say so where a tensor has values that are not finite."""
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        return f"{key} has values that are not finite"
    return None


def _failure(task: ClientTask, stage: str, error: str) -> ClientFailure:
    return ClientFailure(client_id=task.client_id, round_idx=task.round_idx, stage=stage, error=error)


def _agree(leader: ClientUpdate | ClientFailure, follower: ClientUpdate | ClientFailure) -> bool:
    """Whether two ranks tell the same of a task: sums over ranks are the same in all of them."""
    if isinstance(leader, ClientFailure) or isinstance(follower, ClientFailure):
        return isinstance(leader, ClientFailure) and isinstance(follower, ClientFailure)
    same_steps = (leader.num_steps, leader.metrics) == (follower.num_steps, follower.metrics)
    return same_steps and torch.equal(leader.expert_tokens, follower.expert_tokens)
