"""Centralised training: all clients' training examples in one place, as if there were no privacy to keep.

The upper reference of a comparison, no federated method: one model, trained on the pooled examples for as many steps and examples
as all clients of a federated run take together. It runs on Ray Train (see ``fedgraft.platform.centralised``), not in rounds.
"""

from __future__ import annotations

from typing import Literal

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.registry import METHODS

__all__ = ["Centralised", "CentralisedConfig"]


class CentralisedConfig(PartsConfig):
    """The same options as FedAvg: which parts are trained, and how."""

    name: Literal["centralised"] = "centralised"


@METHODS.add
class Centralised(FedAvg):
    """FedAvg's slots, trained on everybody's examples at once; no round is run, only judged."""

    name = "centralised"
    title = "Centralised"
    paper = "none (upper reference)"
    summary = "train one model on all clients' pooled examples, with as many steps and examples as all of them take together"
    advice = "As the upper reference: what one model could reach without any privacy to keep."
    config_class = CentralisedConfig
    is_centralised = True

    def num_rounds(self, configured: int) -> int:
        """No round: the training is over before the clients are judged."""
        return 0
