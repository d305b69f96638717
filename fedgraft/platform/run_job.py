"""One run of one method, as whoever plans runs hands it to the loop."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedgraft.platform.config import EvaluationConfig, FederationConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.types import Budget

__all__ = ["RunJob"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RunJob:
    """One run of one method: what the loop needs beside a pool.

    ``purpose`` ``search`` judges on the validation split only and decodes nothing. ``start`` is a safetensors file of slot values
    that the server begins with (``None``: the start values of the slots). ``budgets`` has one entry a client, or none.
    """

    label: str
    purpose: Literal["run", "search"]
    folder: Path
    worker: WorkerSpec
    learning_rate: float
    rounds: int
    num_clients: int
    federation: FederationConfig
    evaluation: EvaluationConfig
    checkpoint_every: int
    start: Path | None = None
    budgets: tuple[Budget, ...] = ()
