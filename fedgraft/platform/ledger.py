"""The ledger: bytes by round, client, direction and group, counted from the payload itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

from fedgraft.errors import GroupViolation
from fedgraft.types import Group, Params, TensorInfo

__all__ = ["Entry", "describe", "dtype_name", "entries", "num_bytes", "refuse_private"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Bytes of one group that went one way between the server and one client in one round."""

    round: int
    client_id: int
    direction: Literal["up", "down"]
    group: str
    bytes: int
    is_retry: bool = False

    def as_json(self) -> dict[str, object]:
        """The row as it stands in ``ledger.jsonl``."""
        return {
            "round": self.round,
            "client_id": self.client_id,
            "direction": self.direction,
            "group": self.group,
            "bytes": self.bytes,
            "is_retry": self.is_retry,
        }


def describe(tensors: Params, groups: Mapping[str, Group], *, kind: str | None = None) -> tuple[TensorInfo, ...]:
    """List the tensors of a payload with their bytes and groups.

    Args:
        tensors: The payload.
        groups: Group of every slot by key.
        kind: ``None`` for parameters; a name such as ``extras`` for tensors that are no slot.

    Raises:
        GroupViolation: A tensor is of a group that must not be sent, or is unknown.
    """
    found = []
    for key, tensor in tensors.items():
        group = groups.get(key)
        if kind is None and group is None:
            raise GroupViolation(f"{key!r} is no slot of this model and was about to be sent", "send it as an extra")
        if group is not None and not group.is_sent:
            raise GroupViolation(f"{key!r} is {group} and was about to be sent", "tag it shared or assigned, or keep it")
        found.append(
            TensorInfo(
                key=key,
                shape=tuple(tensor.shape),
                dtype=dtype_name(tensor.dtype),
                num_bytes=tensor.nbytes,
                group=str(group.kind) if kind is None and group is not None else str(kind),
            )
        )
    return tuple(found)


def refuse_private(tensors: Params, private: Params, frozen: Params) -> None:
    """Refuse extras or statistics that carry a client's private state or a frozen tensor, under its own name or another.

    Values are compared whatever their shape. What a method alters first (scales, adds noise to) is not caught: a method is
    trusted code, and this check is against mistakes.

    Raises:
        GroupViolation: A tensor has the key, or the values, of a private or frozen one. Constant tensors are let through:
            zeros give nothing away.
    """
    for kind, secrets in (("private", private), ("frozen", frozen)):
        for key, tensor in tensors.items():
            for name, secret in secrets.items():
                if key == name or (tensor.numel() == secret.numel() > 1 and _has_values(tensor, secret)):
                    raise GroupViolation(f"{key!r} carries the {kind} {name!r} and was about to be sent", "keep it on the client")


def _has_values(tensor: torch.Tensor, secret: torch.Tensor) -> bool:
    flat = secret.reshape(-1)
    return torch.equal(tensor.reshape(-1).to(flat), flat) and bool((flat != flat[0]).any())


@cache
def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype as it stands in a payload: ``float32``."""
    return str(dtype).removeprefix("torch.")


def num_bytes(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's values."""
    return tensor.numel() * tensor.element_size()


def entries(
    round_idx: int, client_id: int, direction: Literal["up", "down"], infos: Iterable[TensorInfo], *, is_retry: bool = False
) -> list[Entry]:
    """Sum a payload's bytes by group: one entry a group."""
    sums: dict[str, int] = {}
    for info in infos:
        sums[info.group] = sums.get(info.group, 0) + info.num_bytes
    return [
        Entry(round=round_idx, client_id=client_id, direction=direction, group=group, bytes=size, is_retry=is_retry)
        for group, size in sorted(sums.items())
    ]
