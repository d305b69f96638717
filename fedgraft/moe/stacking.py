"""K clients in one pass over one frozen base: slots with a leading client axis, put under a model's modules for a while.

Shared weights are applied once to all clients' tokens. What is a client's own (LoRA of attention, router and experts, a router
trained in full, grafts and their gates, masks of experts) is applied to that client's tokens only, as a batched product where
all have as many tokens, else as a grouped one; LoRA in its two factors, never as a dense delta.

Tokens lie client by client: the rows of a batch are those of client 0, then those of client 1. MoE blocks see real tokens only,
attention sees the padded rows.

Shape letters: K clients, R rows of all clients, S sequence, T tokens, P token-expert pairs, D model, F expert hidden, E experts,
O outputs, r rank, G grafts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.moe.families import MoELayer, moe_layers, unwrap
from fedgraft.moe.graft import Graft, grafts_of
from fedgraft.types import Slots

__all__ = ["Segments", "Stacking", "client_linear", "why_not_stacked"]


@dataclass(frozen=True, slots=True)
class Segments:
    """How many tokens each of the clients has, in order; ``offsets`` (K) int32 are the ends of their stretches."""

    sizes: tuple[int, ...]
    offsets: torch.Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Segments:
        """Give the segments of these sizes."""
        return cls(tuple(sizes), torch.tensor(sizes, dtype=torch.int64).cumsum(0).to(torch.int32).to(device))

    @property
    def is_even(self) -> bool:
        """Whether all clients have as many tokens."""
        return len(set(self.sizes)) == 1

    def spread(self, value_K: torch.Tensor) -> torch.Tensor:
        """Give every token its client's row of ``value_K`` (K, ...): (T, ...)."""
        if self.is_even:
            count = self.sizes[0]
            return value_K.unsqueeze(1).expand(-1, count, *value_K.shape[1:]).reshape(-1, *value_K.shape[1:])
        sizes = torch.tensor(self.sizes, device=value_K.device)
        return value_K.repeat_interleave(sizes, dim=0)


def client_linear(x_TD: torch.Tensor, weight_KOD: torch.Tensor, segments: Segments) -> torch.Tensor:
    """Apply each client's own weight to its own tokens, (T, O)."""
    if segments.is_even:
        product = torch.bmm(x_TD.reshape(len(segments.sizes), -1, x_TD.shape[-1]), weight_KOD.mT)
        return product.reshape(-1, weight_KOD.shape[1])
    return grouped_linear(x_TD, weight_KOD, segments.offsets)


def grouped_linear(x_TD: torch.Tensor, weight_GOD: torch.Tensor, offsets_G: torch.Tensor) -> torch.Tensor:
    """Apply weight g to the tokens before ``offsets_G[g]`` and not before the previous offset, (T, O); groups may be empty."""
    if _is_aligned(x_TD) and _is_aligned(weight_GOD):
        return F.grouped_mm(x_TD, weight_GOD.mT, offs=offsets_G)
    ends = offsets_G.tolist()
    parts = [F.linear(x_TD[start:end], weight_GOD[g]) for g, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(parts)


def _is_aligned(tensor: torch.Tensor) -> bool:
    """Whether PyTorch's grouped product takes a tensor: rows of whole 16 bytes, and the operation itself since 2.10."""
    sizes = (tensor.shape[-1], tensor.shape[-2])
    return hasattr(F, "grouped_mm") and all(size * tensor.element_size() % 16 == 0 for size in sizes[: tensor.dim() - 1])


def why_not_stacked(model: nn.Module, slots: Slots) -> str | None:
    """Say why clients with these slots cannot share a pass over this model; ``None`` where they can."""
    if slots.mixture is not None:
        return "a mixture of LoRA experts is not batched over clients"
    if slots.example_gate is not None:
        return "a gate over examples is not batched over clients"
    own = [part for part in slots.full if part != "router"]
    if own:
        return f"{' and '.join(own)} trained in full are each client's own, so a pass has nothing to share"
    if slots.graft is not None and slots.graft.mode == "row":
        return "grafts in mode row are not batched over clients"
    if any(adapter.dropout > 0 for adapter in slots.adapters):
        return "LoRA dropout draws each client's numbers in that client's order"
    transposed = any(layer.family.is_transposed for layer in moe_layers(model))
    if transposed and any("experts" in adapter.targets for adapter in slots.adapters):
        return "experts that are stored transposed are not batched over clients with LoRA of their own"
    rates = {name: float(getattr(model.config, name, 0) or 0) for name in ("attention_dropout", "hidden_dropout", "dropout")}
    if any(rates.values()):
        return f"the model's own dropout ({', '.join(name for name, rate in rates.items() if rate)}) is one for all clients"
    return None


class Stacking:
    """The sites of a model where clients differ.

    Args:
        model: With slots in it, as ``add_slots`` left it; ``why_not_stacked`` has found nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        from peft.tuners.lora import LoraLayer  # takes seconds to import, and only replicas need it
        from peft.tuners.lora.layer import ParamWrapper

        self._values: Mapping[str, torch.Tensor] = {}
        self._num_clients = 0
        self._rows: Segments
        self._tokens: Segments
        self._real: torch.Tensor | None = None
        self._masks: dict[int, torch.Tensor] = {}
        self._sites: list[tuple[nn.Module, Callable[..., Any]]] = []
        self._layers = moe_layers(model)
        slot_names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        for path, module in model.named_modules():
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper) and isinstance(module, nn.Module):
                self._sites.append((module, self._linear(path, module)))
        grafts = grafts_of(model)
        for layer in self._layers:
            self._sites.append((layer.block, self._block(layer)))
            router, experts = layer.router, layer.block.get_submodule(layer.family.experts)
            self._sites.append((router, self._router(layer, slot_names)))
            found = _loras(experts, f"{layer.block_path}.{layer.family.experts}")
            if found:
                self._sites.append((experts, self._experts(layer, found)))
            if layer.index in grafts:
                self._sites.append((grafts[layer.index], self._graft(layer, grafts[layer.index])))

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Let the model's modules compute with the stacked values; their own ``forward`` comes back afterwards."""
        try:
            for module, forward in self._sites:
                module.forward = forward
            yield
        finally:
            for module, _ in self._sites:
                module.__dict__.pop("forward", None)

    def attend(
        self,
        values: Mapping[str, torch.Tensor],
        attention_mask_RS: torch.Tensor,
        rows: Sequence[int],
        masks: Mapping[int, torch.Tensor],
    ) -> None:
        """Say what the coming pass computes with.

        Args:
            values: Every slot's parameter by its name in the model, with a leading axis of K clients.
            attention_mask_RS: Of all clients' rows.
            rows: How many of the rows are each client's, (K).
            masks: By layer index, which experts each client must not use, (K, E) bool; layers without masks may be left out.
        """
        device = attention_mask_RS.device
        self._values, self._masks, self._num_clients = values, dict(masks), len(rows)
        self._rows = Segments.of([count * attention_mask_RS.shape[1] for count in rows], device)
        is_real = attention_mask_RS.bool()
        if bool(is_real.all()):
            self._real, self._tokens = None, self._rows
            return
        self._real = is_real.reshape(-1).nonzero().squeeze(1)
        counts = [int(part.sum()) for part in torch.split(is_real, list(rows))]
        self._tokens = Segments.of(counts, device)

    @property
    def client_T(self) -> torch.Tensor:
        """The client of every token that routers see, (T)."""
        return self._tokens.spread(torch.arange(self._num_clients, device=self._tokens.offsets.device))

    def _linear(self, path: str, module: Any) -> Callable[..., torch.Tensor]:
        """A linear map with LoRA."""
        adapters = _adapters(module, path)

        def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            result: torch.Tensor = module.base_layer(x, *args, **kwargs)
            flat_TO = result.reshape(-1, result.shape[-1])
            for lora in adapters:
                flat_TO = self._add_lora(flat_TO, x.reshape(-1, x.shape[-1]), lora, self._rows)
            return flat_TO.reshape(result.shape)

        return forward

    def _add_lora(self, result_TO: torch.Tensor, x_TD: torch.Tensor, lora: _Lora, segments: Segments) -> torch.Tensor:
        down, up = self._values[lora.down], self._values[lora.up]
        x_TD = x_TD.to(down.dtype)
        if segments.is_even and result_TO.dtype == down.dtype:
            count = len(segments.sizes)
            low = torch.bmm(x_TD.reshape(count, -1, x_TD.shape[-1]), down.mT)
            result = torch.baddbmm(result_TO.reshape(count, -1, result_TO.shape[-1]), low, up.mT, alpha=lora.scaling)
            return result.reshape(result_TO.shape)
        added = client_linear(client_linear(x_TD, down, segments), up, segments) * lora.scaling
        return (result_TO + added).to(result_TO.dtype)

    def _block(self, layer: MoELayer) -> Callable[..., Any]:
        """A MoE block: padding does not go in, and comes out as zeros, which nobody reads."""
        original = layer.block.forward

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._real is None:
                return original(hidden, *args, **kwargs)
            flat_TD = hidden.reshape(-1, hidden.shape[-1])
            output = original(flat_TD[self._real].unsqueeze(0), *args, **kwargs)
            own, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            padded = torch.zeros_like(flat_TD).index_copy(0, self._real, own.reshape(-1, own.shape[-1])).reshape(hidden.shape)
            return padded if rest is None else (padded, *rest)

        return forward

    def _router(self, layer: MoELayer, slot_names: set[str]) -> Callable[..., tuple[torch.Tensor, ...]]:
        """A router, with LoRA, or weights of each client's own, or masks."""
        original = layer.router.forward
        path = f"{layer.block_path}.{layer.family.router}"
        loras = _loras(layer.router, path).get("weight", [])
        inner = path + ".base_layer" * (layer.router is not unwrap(layer.router))
        weight, bias = f"{inner}.weight", f"{inner}.bias"
        is_own = weight in slot_names

        def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
            mask_KE = self._masks.get(layer.index)
            if not is_own and not loras and mask_KE is None:
                return original(hidden, *args, **kwargs)  # type: ignore[no-any-return]
            x_TD = hidden.reshape(-1, hidden.shape[-1])
            if is_own:
                own = self._values[weight]
                wide = torch.float32 if layer.family.routes_in_float32 else own.dtype
                logits_TE = client_linear(x_TD.to(wide), own.to(wide), self._tokens)
                if layer.family.has_router_bias:
                    logits_TE = logits_TE + self._tokens.spread(self._values[bias])
            else:
                logits_TE = layer.router_logits(x_TD)
            for lora in loras:
                logits_TE = self._add_lora(logits_TE, x_TD, lora, self._tokens)
            if mask_KE is not None:
                logits_TE = logits_TE.masked_fill(self._tokens.spread(mask_KE), float("-inf"))
            weights_TK, chosen_TK = layer.choose(logits_TE)
            return logits_TE, weights_TK.to(logits_TE.dtype), chosen_TK

        return forward

    def _experts(self, layer: MoELayer, loras: Mapping[str, Sequence[_Lora]]) -> Callable[..., torch.Tensor]:
        """Fused experts with LoRA: pairs of token and expert sorted by expert, and within one by client."""
        num_experts = layer.num_experts

        def forward(x_TD: torch.Tensor, chosen_TK: torch.Tensor, weights_TK: torch.Tensor) -> torch.Tensor:
            top_k = chosen_TK.shape[-1]
            group_P = (chosen_TK * self._num_clients + self.client_T.unsqueeze(1)).reshape(-1)
            order_P = torch.argsort(group_P, stable=True)
            counts = torch.bincount(group_P, minlength=num_experts * self._num_clients)
            offsets = counts.cumsum(0).to(torch.int32)
            expert_offsets = offsets.reshape(num_experts, -1)[:, -1].contiguous()

            def project(name: str, x_PD: torch.Tensor) -> torch.Tensor:
                weight = getattr(layer.experts, name)
                result = grouped_linear(x_PD.to(weight.dtype), weight, expert_offsets)
                for lora in loras.get(name, ()):
                    down, up = self._values[lora.down], self._values[lora.up]
                    # PEFT keeps A as (E r, D) and B as (O, r E).
                    down = down.reshape(len(down), num_experts, -1, down.shape[-1]).transpose(0, 1).flatten(0, 1)
                    up = up.reshape(*up.shape[:2], -1, num_experts).permute(3, 0, 1, 2).flatten(0, 1).contiguous()
                    low = grouped_linear(x_PD.to(down.dtype), down.contiguous(), offsets)
                    result = result + (grouped_linear(low, up, offsets) * lora.scaling).to(result.dtype)
                return result

            gate, up = project("gate_up_proj", x_TD[order_P // top_k]).chunk(2, dim=-1)
            output_PD = project("down_proj", layer.neurons(gate, up)) * weights_TK.reshape(-1)[order_P].unsqueeze(1)
            back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(len(order_P), device=order_P.device))
            return output_PD[back_P].reshape(-1, top_k, output_PD.shape[-1]).sum(dim=1).to(x_TD.dtype)

        return forward

    def _graft(self, layer: MoELayer, graft: Graft) -> Callable[..., torch.Tensor]:
        """Grafts beside a block, each client's own."""
        prefix = f"{layer.block_path}.graft."

        def mixed(x_TD: torch.Tensor, output_TD: torch.Tensor) -> torch.Tensor:
            tokens = self._tokens
            value = {name: self._values[prefix + name] for name, _ in graft.named_parameters()}
            x_TD = x_TD.to(value["down_proj"].dtype)
            scores_TG = client_linear(x_TD, value["gate_weight"], tokens) + tokens.spread(value["gate_bias"])
            gate_TG = torch.sigmoid(scores_TG)
            if graft.mode == "convex":
                gate_TG = gate_TG / gate_TG.shape[-1]
                output_TD = (1 - gate_TG.sum(dim=-1, keepdim=True)) * output_TD
            total_TD = output_TD
            for j in range(gate_TG.shape[-1]):
                gate_up = client_linear(x_TD, value["gate_up_proj"][:, j], tokens)
                if graft.has_bias:
                    gate_up = gate_up + tokens.spread(value["gate_up_proj_bias"][:, j])
                gate, up = gate_up.chunk(2, dim=-1)
                grafted = client_linear(layer.neurons(gate, up), value["down_proj"][:, j], tokens)
                if graft.has_bias:
                    grafted = grafted + tokens.spread(value["down_proj_bias"][:, j])
                total_TD = total_TD + gate_TG[:, j : j + 1] * grafted
            return total_TD

        def forward(x_TD: torch.Tensor, output_TD: torch.Tensor) -> torch.Tensor:
            if self._real is None:
                return mixed(x_TD, output_TD).to(output_TD.dtype)
            found = mixed(x_TD[self._real], output_TD[self._real]).to(output_TD.dtype)
            return output_TD.index_copy(0, self._real, found)

        return forward


@dataclass(frozen=True, slots=True)
class _Lora:
    """Names of one adapter's two factors in the model, and what multiplies their product."""

    down: str
    up: str
    scaling: float


def _adapters(module: Any, path: str) -> list[_Lora]:
    return [
        _Lora(f"{path}.lora_A.{name}.weight", f"{path}.lora_B.{name}.weight", float(module.scaling[name]))
        for name in module.active_adapters
        if name in module.lora_A
    ]


def _loras(module: Any, path: str) -> dict[str, list[_Lora]]:
    """LoRA of a module's fused parameters by the parameter's name: PEFT nests one wrapper a parameter."""
    found: dict[str, list[_Lora]] = {}
    while hasattr(module, "parameter_name"):
        found[module.parameter_name] = _adapters(module, path)
        module, path = module.base_layer, f"{path}.base_layer"
    return found
