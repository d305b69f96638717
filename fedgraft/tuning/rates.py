"""Choosing a learning rate from a grid by validation NLL, once for each method and seed.

One rate for all methods misleads: full-expert training breaks down where LoRA is best. The test split is never looked at.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedgraft.errors import QuorumError
from fedgraft.platform.config import RateSearchConfig
from fedgraft.platform.results import client_values, read_run
from fedgraft.platform.run_folder import write_json

__all__ = ["choose_rate", "read_choice", "validation_loss"]

_RECORD = "rates.json"


def read_choice(folder: Path) -> dict[str, Any]:
    """What a search found: ``rates``, ``validation_nll``, ``chosen``, ``is_edge``, ``rounds``; empty before it is over."""
    path = folder / _RECORD
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def choose_rate(
    label: str, search: RateSearchConfig, folder: Path, try_rate: Callable[[float, Path], float | None]
) -> dict[str, Any]:
    """Try every rate of the grid and write down the best; a search that is over is not made again.

    Args:
        label: The method's, for the message.
        search: Grid and rounds.
        folder: Of this search; each try gets ``lr-<rate>`` in it.
        try_rate: Trains with a rate in a folder and gives the validation NLL, ``None`` where training broke down.

    Returns:
        As ``read_choice``. The lower rate wins among equals; ``is_edge`` says that a better one may lie outside the grid.

    Raises:
        QuorumError: Training broke down at every rate.
    """
    found = read_choice(folder)
    if found:
        return found
    losses = [try_rate(rate, folder / f"lr-{rate:g}") for rate in search.rates]
    scores = [math.inf if loss is None else loss for loss in losses]
    best = min(range(len(scores)), key=lambda i: (scores[i], i))
    if scores[best] == math.inf:
        grid = ", ".join(f"{rate:g}" for rate in search.rates)
        raise QuorumError(
            f"{label}: training broke down at every rate of the grid ({grid})", "add lower rates to rate_search.rates"
        )
    found = {
        "rates": list(search.rates),
        "validation_nll": losses,
        "chosen": search.rates[best],
        "is_edge": best in (0, len(losses) - 1),
        "rounds": search.rounds,
    }
    write_json(found, folder / _RECORD)
    return found


def validation_loss(folder: Path) -> float | None:
    """Mean over clients of the personal models' validation NLL after a try's last round; ``None`` if not finite."""
    values = client_values(read_run(folder), split="validation")
    last = values[values["round"] == values["round"].max()]
    loss = float(last["value"].mean())
    return loss if math.isfinite(loss) else None
