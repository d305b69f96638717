"""Tensors in Ray's object store without a copy on the way out.

Ray pickles a tensor through PyTorch's own format: one copy when it is put, one whenever it is fetched. Here its bytes lie in the
store as they are, and whoever fetches them on the same node maps them. So a fetched tensor is one memory for all processes of a
node: it is read, never written to.
"""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import numpy as np
import torch
from ray.util import register_serializer

__all__ = ["num_bytes", "share_tensors"]

_Flat: TypeAlias = tuple["np.ndarray[Any, np.dtype[np.uint8]]", str, tuple[int, ...]]


def share_tensors() -> None:
    """Let this process put and fetch tensors as plain bytes. Ray must be connected."""
    with warnings.catch_warnings():
        # PyTorch says once in a process that such memory is not to be written to; that is what the text above says, too.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable", category=UserWarning)
        torch.from_numpy(np.frombuffer(bytes(1), dtype=np.uint8))
    register_serializer(torch.Tensor, serializer=_flatten, deserializer=_restore)


def num_bytes(value: Any) -> int:
    """Count the bytes of all tensors in dictionaries and lists; 0 where there is anything else."""
    if isinstance(value, torch.Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return sum(map(num_bytes, parts))


def _flatten(tensor: torch.Tensor) -> _Flat:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)


def _restore(flat: _Flat) -> torch.Tensor:
    data, dtype, shape = flat
    if not data.size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    return torch.from_numpy(data).view(getattr(torch, dtype)).reshape(shape)
