"""Grafted experts: one or more client-owned experts beside a frozen MoE block, each behind its own graft gate.

FLEx (arXiv 2506.00965): the block's output M(x) becomes y = M(x) + sum_j g_j(x) P_j(x), g_j(x) = sigmoid(w_j . x + b_j).
The sigmoid form mirrors Qwen's gated shared expert and is our reconstruction, as are the other modes.

A bias of minus infinity closes a gate exactly: g = 0, the block's output is untouched bit for bit, and no gradient
reaches graft or gate. So a layer without a graft is a graft whose gate is closed.

Shape letters: T tokens, D model, F graft neurons, G grafts, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import ModelError
from fedgraft.moe.families import MoELayer, family_of, model_facts, moe_layers
from fedgraft.types import GraftSpec

__all__ = ["Graft", "attach_grafts", "grafts_of", "without_grafts"]

GRAFT = "graft"
"""Name of the submodule that a grafted MoE block gains."""


class Graft(nn.Module):
    """The grafts of one MoE layer: ``gate_up_proj`` (G, 2F, D), ``down_proj`` (G, D, F), ``gate_weight`` (G, D),
    ``gate_bias`` (G); in a family whose experts have biases ``gate_up_proj_bias`` (G, 2F) and ``down_proj_bias`` (G, D) as well.

    The module sees its MoE layer but does not own it, so the layer's names in the model stay as they were.
    """

    def __init__(self, layer: MoELayer, spec: GraftSpec, hidden_size: int, top_k: int, norm_topk_prob: bool) -> None:
        super().__init__()
        reference = layer.expert_weights(0)[0]
        options: dict[str, Any] = {"dtype": reference.dtype, "device": reference.device}
        size, neurons = spec.num_grafts, spec.num_neurons
        self.gate_up_proj = nn.Parameter(torch.zeros(size, 2 * neurons, hidden_size, **options))
        self.down_proj = nn.Parameter(torch.zeros(size, hidden_size, neurons, **options))
        self.has_bias = layer.family.has_expert_bias
        if self.has_bias:
            self.gate_up_proj_bias = nn.Parameter(torch.zeros(size, 2 * neurons, **options))
            self.down_proj_bias = nn.Parameter(torch.zeros(size, hidden_size, **options))
        self.gate_weight = nn.Parameter(torch.zeros(size, hidden_size, **options))
        bias = float("-inf") if spec.is_gate_closed else spec.gate_bias
        self.gate_bias = nn.Parameter(torch.full((size,), bias, **options))
        self.mode = spec.mode
        self.top_k = top_k
        self.norm_topk_prob = norm_topk_prob
        self.is_enabled = True
        self._layer = (layer,)  # a tuple, so that nn.Module does not register the block as a child of its child

    def gate(self, x_TD: torch.Tensor) -> torch.Tensor:
        """How far each gate opens on each token, (T, G): sigmoid form, or the graft's softmax share in mode ``row``."""
        scores = F.linear(x_TD.to(self.gate_weight.dtype), self.gate_weight, self.gate_bias)
        if self.mode == "row":
            logits = torch.cat([self._layer[0].router_logits(x_TD).float(), scores.float()], dim=-1)
            return torch.softmax(logits, dim=-1)[:, -scores.shape[-1] :].to(scores.dtype)
        opened = torch.sigmoid(scores)
        return opened / opened.shape[-1] if self.mode == "convex" else opened

    def expert_sum(self, x_TD: torch.Tensor, weight_TG: torch.Tensor) -> torch.Tensor:
        """sum_j weight_j(x) P_j(x), (T, D)."""
        x_TD = x_TD.to(self.down_proj.dtype)
        total = torch.zeros_like(x_TD)
        for j in range(self.gate_up_proj.shape[0]):
            up_bias, down_bias = (self.gate_up_proj_bias[j], self.down_proj_bias[j]) if self.has_bias else (None, None)
            gate, up = F.linear(x_TD, self.gate_up_proj[j], up_bias).chunk(2, dim=-1)
            hidden = self._layer[0].neurons(gate, up)
            total = total + weight_TG[:, j : j + 1] * F.linear(hidden, self.down_proj[j], down_bias)
        return total

    def forward(self, x_TD: torch.Tensor, output_TD: torch.Tensor) -> torch.Tensor:
        """Turn the block's output M(x) into y, both (T, D); computed in the graft's dtype, given back in the block's."""
        if self.is_closed:
            return output_TD  # asked here, not before the call: sharded parameters are whole only inside of it
        dtype = output_TD.dtype
        gate_TG = self.gate(x_TD)
        if self.mode == "row":
            return self._row(x_TD, output_TD, gate_TG).to(dtype)
        if self.mode == "convex":
            output_TD = (1 - gate_TG.sum(dim=-1, keepdim=True)) * output_TD
        return (output_TD + self.expert_sum(x_TD, gate_TG)).to(dtype)

    def _row(self, x_TD: torch.Tensor, output_TD: torch.Tensor, share_TG: torch.Tensor) -> torch.Tensor:
        """Softmax over N + G rows, the grafts always kept: the routed part shrinks by what the grafts take."""
        shared = self._layer[0].shared_output(x_TD)
        routed = output_TD if shared is None else output_TD - shared
        taken = share_TG.sum(dim=-1, keepdim=True)
        if self.norm_topk_prob:
            # Renormalised families divide by the mass of what is kept: the top-k rows and the grafts.
            probs = torch.softmax(self._layer[0].router_logits(x_TD).float(), dim=-1).to(x_TD.dtype)
            kept = torch.topk(probs, self.top_k, dim=-1).values.sum(dim=-1, keepdim=True) * (1 - taken)
            routed = routed * (kept / (kept + taken))
            share_TG = share_TG / (kept + taken)
        else:
            routed = routed * (1 - taken)
        if (scale := self._layer[0].scale) != 1:
            share_TG = share_TG * scale  # a row's weight is scaled as those of the others
        total = routed + self.expert_sum(x_TD, share_TG)
        return total if shared is None else total + shared

    @property
    def is_closed(self) -> bool:
        """Whether every gate is shut for good, so that the block's output passes untouched."""
        return bool(torch.isneginf(self.gate_bias).all())


def attach_grafts(model: nn.Module, spec: GraftSpec) -> None:
    """Give every MoE layer named in ``spec`` a ``Graft`` beside its block, added to the block's output by a forward hook.

    No existing parameter changes its name or its value.

    Raises:
        ModelError: Mode ``row`` in a family whose experts do not share one softmax.
    """
    family = family_of(model.config)
    if spec.mode == "row" and family.rule == "sigmoid":
        raise ModelError(
            f"mode 'row' cannot be had in {family.model_type}: its router scores every expert by a sigmoid of its own, so a "
            "graft's row would take nothing from the experts",
            "set mode to additive or convex",
        )
    facts = model_facts(model.config)
    for layer in moe_layers(model):
        if layer.index in spec.layers:
            graft = Graft(layer, spec, facts.hidden_size, facts.top_k, facts.norm_topk_prob)
            layer.block.add_module(GRAFT, graft)
            layer.block.register_forward_hook(_apply_graft)


def _apply_graft(
    block: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor | tuple[torch.Tensor, ...]
) -> torch.Tensor | tuple[torch.Tensor, ...]:
    graft = block.get_submodule(GRAFT)
    assert isinstance(graft, Graft)
    if not graft.is_enabled:
        return output
    # GPT-OSS's block gives its router's weights beside its output.
    own, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
    x_TD = args[0].reshape(-1, args[0].shape[-1])
    mixed: torch.Tensor = graft(x_TD, own.reshape(-1, own.shape[-1])).reshape(own.shape)
    return mixed if rest is None else (mixed, *rest)


def grafts_of(model: nn.Module) -> dict[int, Graft]:
    """The grafts of a model by layer index; empty where it has none."""
    found = {layer.index: getattr(layer.block, GRAFT, None) for layer in moe_layers(model)}
    return {index: graft for index, graft in found.items() if isinstance(graft, Graft)}


@contextmanager
def without_grafts(model: nn.Module) -> Iterator[None]:
    """Switch the grafts of a model off for a while: it then computes what it computed before it was grafted."""
    grafts = grafts_of(model).values()
    before = [graft.is_enabled for graft in grafts]
    for graft in grafts:
        graft.is_enabled = False
    try:
        yield
    finally:
        for graft, was_enabled in zip(grafts, before, strict=True):
            graft.is_enabled = was_enabled
