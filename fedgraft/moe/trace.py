"""Looking into MoE blocks while a model runs: what goes in and what comes out, token by token.

Shape letters: T tokens, D model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.graft import without_grafts
from fedgraft.types import Batch

__all__ = ["visit_blocks"]


def visit_blocks(
    model: nn.Module,
    batches: Iterable[Batch],
    visit: Callable[[MoELayer, torch.Tensor, torch.Tensor], None],
    *,
    with_grafts: bool = False,
) -> None:
    """Run the model over batches and show every MoE block's input and own output to ``visit``.

    Args:
        model: An HF causal LM in eval mode.
        batches: What it runs over.
        visit: Called with the layer, its input (T, D) and the block's output before any graft (T, D), padding left out.
        with_grafts: Whether grafts act meanwhile on what later layers see; off, the model is the untouched base.
    """
    mask: list[torch.Tensor] = []
    handles: list[Any] = []
    for layer in moe_layers(model):

        def hook(block: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor, layer: MoELayer = layer) -> None:
            x_TD = args[0].reshape(-1, args[0].shape[-1])[mask[0]]
            visit(layer, x_TD, output.reshape(-1, output.shape[-1])[mask[0]])

        # Prepended, so that it sees the block's own output, before a graft's hook.
        handles.append(layer.block.register_forward_hook(hook, prepend=True))
    device = next(model.parameters()).device
    try:
        with torch.inference_mode(), nullcontext() if with_grafts else without_grafts(model):
            for batch in batches:
                mask[:] = [batch.attention_mask.reshape(-1).bool().to(device)]
                model.model(  # type: ignore[operator]
                    input_ids=batch.input_ids.to(device),
                    attention_mask=batch.attention_mask.to(device),
                    use_cache=False,
                )
    finally:
        for handle in handles:
            handle.remove()
