"""Looking into MoE blocks while a model runs: what goes in, what comes out, and where it goes, token by token.

Shape letters: T tokens, D model, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.graft import without_grafts
from fedgraft.moe.routing import expert_probabilities
from fedgraft.moe.sharding import gathered
from fedgraft.types import Batch

__all__ = ["RouterWatch", "RoutingTrace", "trace_routing", "visit_blocks"]


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

        def hook(block: nn.Module, args: tuple[torch.Tensor, ...], output: Any, layer: MoELayer = layer) -> None:
            own: torch.Tensor = output[0] if isinstance(output, tuple) else output  # GPT-OSS gives its router's weights, too
            x_TD = args[0].reshape(-1, args[0].shape[-1])[mask[0]]
            with gathered(block.parameters()):
                visit(layer, x_TD, own.reshape(-1, own.shape[-1])[mask[0]])

        # Prepended, so that it sees the block's own output, before a graft's hook.
        handles.append(layer.block.register_forward_hook(hook, prepend=True))
    _run(model, batches, mask, handles, with_grafts=with_grafts)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingTrace:
    """Where one layer sent each token: ``chosen`` (T, K) experts and their ``weights`` (T, K), on the CPU."""

    chosen: torch.Tensor
    weights: torch.Tensor
    num_experts: int

    @property
    def counts(self) -> torch.Tensor:
        """Tokens sent to each expert, (E,) int64; they sum to T * K."""
        return torch.bincount(self.chosen.reshape(-1), minlength=self.num_experts)


class RouterWatch:
    """Keeps what every router of a model gave in the last forward pass, with its graph; a context manager.

    ``logits`` (T, E) and ``chosen`` (T, K) by layer index, T all tokens of the batch row by row, padding among them; masks and
    adapters have acted by then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = {layer.index: layer for layer in moe_layers(model)}
        self._handles: list[Any] = []
        self.logits: dict[int, torch.Tensor] = {}
        self.chosen: dict[int, torch.Tensor] = {}

    def __enter__(self) -> Self:
        for index, layer in self._layers.items():

            def note(router: nn.Module, args: object, output: tuple[torch.Tensor, ...], index: int = index) -> None:
                self.logits[index], self.chosen[index] = output[0], output[-1]

            self._handles.append(layer.router.register_forward_hook(note))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.logits.clear()
        self.chosen.clear()

    def probabilities(self, index: int) -> torch.Tensor:
        """Each expert's share of a token if all were chosen, (T, E), float32; 0 where it is masked."""
        return expert_probabilities(self._layers[index].family.rule, self.logits[index])


def trace_routing(model: nn.Module, batches: Iterable[Batch], *, with_grafts: bool = True) -> dict[int, RoutingTrace]:
    """Run the model over batches and note which experts every layer chose for every token, padding left out.

    Args:
        model: An HF causal LM in eval mode, with whatever masks and adapters act on it.
        batches: What it runs over; tokens are listed row by row, in this order.
        with_grafts: Whether grafts act meanwhile on what later layers see.

    Returns:
        One trace a MoE layer, by layer index. Memory grows with tokens times top-k.
    """
    mask: list[torch.Tensor] = []
    layers = moe_layers(model)
    found: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer.index: [] for layer in layers}
    handles: list[Any] = []
    for layer in layers:

        def note(chosen_TK: torch.Tensor, weights_TK: torch.Tensor, index: int = layer.index) -> None:
            found[index].append((chosen_TK[mask[0]].cpu(), weights_TK[mask[0]].cpu()))

        handles.append(layer.watch_routing(note))
    _run(model, batches, mask, handles, with_grafts=with_grafts)
    traces: dict[int, RoutingTrace] = {}
    for layer in layers:
        chosen = [chosen for chosen, _ in found[layer.index]] or [torch.empty(0, layer.top_k, dtype=torch.int64)]
        weights = [weights for _, weights in found[layer.index]] or [torch.empty(0, layer.top_k)]
        traces[layer.index] = RoutingTrace(chosen=torch.cat(chosen), weights=torch.cat(weights), num_experts=layer.num_experts)
    return traces


def _run(model: nn.Module, batches: Iterable[Batch], mask: list[torch.Tensor], handles: list[Any], *, with_grafts: bool) -> None:
    """Run the decoder over batches for its hooks; ``mask`` holds the current batch's attention mask (T,) meanwhile."""
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
