"""The untouched base model: nobody trains. The reference that every personal model is measured from."""

from __future__ import annotations

from typing import Literal

from fedgraft.protocols import Method, MethodConfig
from fedgraft.registry import METHODS

__all__ = ["Base", "BaseConfig"]


class BaseConfig(MethodConfig):
    """No options."""

    name: Literal["base"] = "base"


@METHODS.add
class Base(Method):
    """Judge the pre-trained model on every client's test split; no round is run."""

    name = "base"
    title = "Base"
    paper = "none (reference)"
    summary = "the pre-trained model as it is; no client trains"
    advice = "As the line that every personal model is measured from: what the base can do before anybody trains."
    config_class = BaseConfig

    def num_rounds(self, configured: int) -> int:
        """No round."""
        return 0
