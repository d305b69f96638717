"""Hashes of tensors: what a name, a shape, a dtype and bytes are worth, the same on every machine and device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from fedgraft.types import Params

if TYPE_CHECKING:
    from hashlib import _Hash

__all__ = ["add_tensor", "hash_params", "hash_tensors"]


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over name, shape, dtype and bytes of each tensor, in the order given, whatever device it is on."""
    digest = hashlib.sha256()
    for name, tensor in named:
        add_tensor(digest, name, tensor)
    return digest.hexdigest()


def hash_params(params: Params) -> str:
    """SHA-256 of tensors by key, whatever their order in the mapping."""
    return hash_tensors(sorted(params.items()))


def add_tensor(digest: _Hash, name: str, tensor: torch.Tensor) -> None:
    """Add a tensor's name, shape, dtype and bytes to a hash."""
    digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
    if tensor.numel():
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
