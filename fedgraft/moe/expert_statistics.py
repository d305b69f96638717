"""What experts do on a client's tokens, as sums: one observer pass of the untouched model that all criteria are derived from.

Every field is a sum over tokens (one is a maximum), so the statistics of pooled data are the sums of the clients' statistics, up
to rounding in float64: clients may send sums, and a server may choose for all of them.

F is the routed part of a block's output, f_e expert e's output (times the family's constant for routed experts, where it has
one), g_e its weight for a token that is sent to it: F = sum_e g_e f_e over the chosen experts. Weights are as the family makes
them: some divide them by their sum over the chosen experts, some do not.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from fedgraft.moe.families import MoELayer, model_facts, moe_layers
from fedgraft.moe.scoring import LayerScores, accumulate
from fedgraft.moe.trace import visit_blocks
from fedgraft.types import Batch

__all__ = ["LayerStatistics", "add_statistics", "observe_statistics"]

_NORM = "post_attention_layernorm"  # reads the residual stream before the block; so called in every family of the table


@dataclass
class LayerStatistics:
    """Sums of one layer, float64, on the CPU.

    ``scores`` has the sums over all tokens: ||F - f||^2, <F, f>, ||f||^2, ||F||^2, p and its products, and the counts of routed
    tokens (``tokens``). Over the tokens that were sent to e, (E,): ``gate`` sum g, ``norm`` sum ||f||, ``gated_norm``
    sum g ||f||, ``changed_norm`` sum g ||f|| (1 - cos(h, h + z)) with h the residual stream before the block and z the block's
    whole output, ``max_abs`` the largest absolute value of f (a maximum, not a sum), ``input_square`` (E, D) sum (g x)^2 and
    ``hidden_square`` (E, F) sum (g a)^2 with a the expert's neurons. Over all tokens: ``output`` (E, D) sum f, ``logit_gram``
    (E, E) sum of products of router logits.
    """

    scores: LayerScores
    gate: torch.Tensor
    norm: torch.Tensor
    gated_norm: torch.Tensor
    changed_norm: torch.Tensor
    max_abs: torch.Tensor
    output: torch.Tensor
    input_square: torch.Tensor
    hidden_square: torch.Tensor
    logit_gram: torch.Tensor
    top_k: int = 1

    @classmethod
    def empty(cls, num_experts: int, hidden_size: int, expert_size: int, top_k: int) -> LayerStatistics:
        """All zero."""

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(num_experts, *shape, dtype=torch.float64)

        return cls(
            scores=LayerScores.empty(num_experts),
            gate=zeros(),
            norm=zeros(),
            gated_norm=zeros(),
            changed_norm=zeros(),
            max_abs=zeros(),
            output=zeros(hidden_size),
            input_square=zeros(hidden_size),
            hidden_square=zeros(expert_size),
            logit_gram=zeros(num_experts),
            top_k=top_k,
        )

    @property
    def num_tokens(self) -> int:
        """All tokens that were seen."""
        return self.scores.num_tokens


def observe_statistics(model: nn.Module, batches: Iterable[Batch]) -> dict[int, LayerStatistics]:
    """Run the untouched model over examples and take every layer's statistics, on all tokens but padding.

    Every expert computes every token, as in ``observe_experts``, whose sums are part of this.

    Args:
        model: An HF causal LM in eval mode; grafts are switched off meanwhile.
        batches: The client's own examples.

    Returns:
        Statistics by layer index. Memory is that of one batch, not of the set.
    """
    layers = moe_layers(model)
    facts = model_facts(model.config)  # sharded weights have no sizes of their own
    sizes = (facts.num_experts, facts.hidden_size, facts.expert_size, facts.top_k)
    found = {layer.index: LayerStatistics.empty(*sizes) for layer in layers}
    mask: list[torch.Tensor] = []
    residual: dict[int, torch.Tensor] = {}

    def noted() -> Iterator[Batch]:
        for batch in batches:
            mask[:] = [batch.attention_mask.reshape(-1).bool()]
            yield batch

    handles: list[Any] = []
    for layer in layers:

        def keep(module: nn.Module, args: tuple[torch.Tensor, ...], index: int = layer.index) -> None:
            residual[index] = args[0].reshape(-1, args[0].shape[-1])[mask[0].to(args[0].device)]

        handles.append(model.get_submodule(f"{layer.path}.{_NORM}").register_forward_pre_hook(keep))

    def visit(layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        _accumulate(found[layer.index], layer, x_TD, z_TD, residual.pop(layer.index))

    try:
        visit_blocks(model, noted(), visit)
    finally:
        for handle in handles:
            handle.remove()
    return found


def add_statistics(first: LayerStatistics, second: LayerStatistics) -> LayerStatistics:
    """The statistics of the tokens of both; the same layer of the same model."""

    def add(name: str, left: Any, right: Any) -> Any:
        if name == "max_abs":
            return torch.maximum(left, right)
        return left if name == "top_k" else left + right

    def merged(left: Any, right: Any) -> dict[str, Any]:
        return {each.name: add(each.name, getattr(left, each.name), getattr(right, each.name)) for each in fields(left)[1:]}

    inner, other = first.scores, second.scores
    scores = LayerScores(loss=inner.loss + other.loss, **merged(inner, other))
    return LayerStatistics(scores=scores, **merged(first, second))


def _accumulate(found: LayerStatistics, layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor, h_TD: torch.Tensor) -> None:
    """Add one batch."""
    logits_TE = layer.router_logits(x_TD)
    weights_TK, chosen_TK = layer.choose(logits_TE)
    gate_TE = torch.zeros(logits_TE.shape, dtype=torch.float64, device=x_TD.device)
    gate_TE.scatter_(1, chosen_TK, weights_TK.double() / layer.scale)
    is_sent_TE = torch.zeros(logits_TE.shape, dtype=torch.bool, device=x_TD.device).scatter_(1, chosen_TK, True)
    changed_T = 1 - torch.cosine_similarity(h_TD.double(), h_TD.double() + z_TD.double(), dim=-1)

    def see(expert: int, output_TD: torch.Tensor) -> None:
        is_sent_T, gate_T = is_sent_TE[:, expert], gate_TE[:, expert]
        size_T = output_TD.norm(dim=-1)
        found.norm[expert] += float(size_T[is_sent_T].sum())
        found.gated_norm[expert] += float((gate_T * size_T).sum())
        found.changed_norm[expert] += float((gate_T * size_T * changed_T).sum())
        found.output[expert] += output_TD.sum(dim=0).cpu()
        if bool(is_sent_T.any()):
            largest = output_TD[is_sent_T].abs().max().cpu()
            found.max_abs[expert] = torch.maximum(found.max_abs[expert], largest)
        own_SD, gate_S1 = x_TD[is_sent_T], gate_T[is_sent_T, None]
        found.input_square[expert] += (gate_S1 * own_SD.double()).square().sum(dim=0).cpu()
        found.hidden_square[expert] += (gate_S1 * layer.expert_hidden(expert, own_SD).double()).square().sum(dim=0).cpu()

    accumulate(found.scores, layer, x_TD, z_TD, see=see)
    found.gate += gate_TE.sum(dim=0).cpu()
    found.logit_gram += (logits_TE.double().T @ logits_TE.double()).cpu()
