"""Looking at parameters that may be sharded over the ranks of a replica (ZeRO stage 3).

Outside of a module's own forward pass such a parameter is empty in every rank. Whoever reads one gathers it first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["full_shape", "gathered", "is_sharded"]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether DeepSpeed keeps only a part of this parameter in each rank."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of the whole parameter, wherever its values are."""
    return getattr(parameter, "ds_shape", parameter.shape)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Make these parameters whole in every rank for a while, for reading; nothing happens to those that are not sharded.

    All ranks of the replica must come here together.
    """
    # Inside of a module's forward pass its weights are whole already, and not ours to let go of.
    sharded = [each for each in parameters if is_sharded(each) and each.ds_status.name != "AVAILABLE"]  # type: ignore[attr-defined]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters  # only where DeepSpeed is at work already

    with GatheredParameters(sharded, modifier_rank=None):
        yield
