"""What DeepSpeed must see of a model, whoever trains it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

__all__ = ["DeepSpeedRoot", "let_inputs_require_gradients"]


class DeepSpeedRoot(nn.Module):
    """The module that DeepSpeed wraps: it runs whatever is asked, so that its hooks see one forward pass a call.

    Args:
        model: An HF causal LM.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, compute: Callable[[], Any]) -> Any:
        """Run ``compute`` and give its result."""
        return compute()


def let_inputs_require_gradients(model: nn.Module) -> None:
    """Give every module of a model an input that asks for a gradient, where training runs.

    ZeRO 3 lets go of a module's weights when its inputs have theirs; of a first layer whose input asks for none it lets go
    before the weights' own gradients are there.
    """

    def ask(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        if torch.is_grad_enabled() and output.is_leaf:
            output.requires_grad_(True)

    embeddings: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    embeddings.register_forward_hook(ask)
