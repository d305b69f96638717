"""Experts taken out, put in, copied, permuted, and masked.

Everything but a mask belongs to a model that has no adapter yet: a LoRA over fused experts is as wide as the number of
experts. No tensor is written to: a changed one is a new parameter, so that a base mapped from a file stays as it is there.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import nn

from fedgraft.errors import ModelError
from fedgraft.moe.families import MoELayer, family_of, model_facts, moe_layers, unwrap
from fedgraft.moe.routing import check_experts_left, num_groups

__all__ = [
    "Expert",
    "ExpertMask",
    "add_expert",
    "copy_expert",
    "mask_experts",
    "permute_experts",
    "read_expert",
    "remove_expert",
    "write_expert",
]

_MASKS = "fedgraft_masks"


@dataclass(frozen=True, kw_only=True, slots=True)
class Expert:
    """One expert in a form that no family owns, and its row of the router.

    ``gate_up`` (2F, D) with the gate's rows first, ``down`` (D, F), biases (2F) and (D) where the family has them. ``row``
    (D), ``row_bias`` and ``choice_bias`` (scalars) are the router's weight, its bias, and DeepSeek-V3's bias of choice;
    ``row`` is ``None`` for an expert without its row.
    """

    gate_up: torch.Tensor
    down: torch.Tensor
    gate_up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None
    row: torch.Tensor | None = None
    row_bias: torch.Tensor | None = None
    choice_bias: torch.Tensor | None = None


# ---- masks


class ExpertMask:
    """Experts that no token is sent to until ``remove`` is called; also a context manager. Made by ``mask_experts``."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Undo exactly this mask; a second call does nothing."""
        while self._undo:
            self._undo.pop()()

    def _add(self, layer: MoELayer, experts: frozenset[int]) -> None:
        is_masked_E = torch.zeros(layer.num_experts, dtype=torch.bool, device=layer.router_rows.device)
        is_masked_E[sorted(experts)] = True
        # Prepended, so that whoever watches the routing sees what is left of it.
        handle = layer.router.register_forward_hook(_masking_hook(layer, is_masked_E), prepend=True)
        masks = _masks_of(layer)
        masks.append(experts)
        self._undo += [handle.remove, lambda: masks.remove(experts)]


def mask_experts(model: nn.Module, masked: Mapping[int, Collection[int]]) -> ExpertMask:
    """Send no token to some experts: their router logits become minus infinity before anything is chosen.

    No weight is copied or changed, and the mask acts in training as in evaluation: a masked expert's weights and row get no
    gradient. Masks add up; each is undone on its own, in any order. Weights of the others: where a family normalises the
    weights of the chosen experts (Mixtral, GPT-OSS, Qwen and OLMoE with ``norm_topk_prob``) or scores each by itself
    (DeepSeek-V3), a token that chose no masked expert keeps its output; where the weights are a softmax over all experts
    (DeepSeek-V2, Qwen and OLMoE without ``norm_topk_prob``) they grow by 1 / (1 - p), p the masked experts' probability.

    Args:
        model: An HF causal LM, with or without adapters.
        masked: Experts by layer index; layers that are not named keep all.

    Returns:
        The mask, acting already: ``remove()`` it, or use it in a ``with``.

    Raises:
        ModelError: A layer or expert that the model has not, or too few experts left for top-k.
    """
    layers = {layer.index: layer for layer in moe_layers(model)}
    wanted = {index: frozenset(experts) for index, experts in masked.items()}
    for index, experts in wanted.items():
        layer = _layer(layers, index)
        for expert in experts:
            _check_expert(layer, expert)
        both = experts.union(*_masks_of(layer))
        check_experts_left(unwrap(layer.router), layer.family.rule, layer.num_experts, both, layer.top_k)
    made = ExpertMask()
    for index, experts in wanted.items():
        made._add(layers[index], experts)
    return made


def _masks_of(layer: MoELayer) -> list[frozenset[int]]:
    """The masks that act on a layer now: a list that the router carries."""
    router = unwrap(layer.router)
    if not hasattr(router, _MASKS):
        setattr(router, _MASKS, [])
    found: list[frozenset[int]] = getattr(router, _MASKS)
    return found


def _masking_hook(layer: MoELayer, is_masked_E: torch.Tensor) -> Callable[..., tuple[torch.Tensor, ...]]:
    def hook(router: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_TE = output[0].masked_fill(is_masked_E.to(output[0].device), float("-inf"))
        weights_TK, chosen_TK = layer.choose(logits_TE)
        return logits_TE, weights_TK.to(output[1].dtype), chosen_TK

    return hook


# ---- reading and writing


def read_expert(layer: MoELayer, expert: int) -> Expert:
    """Copy an expert and its router row out of a layer, without any adapter over them.

    Raises:
        ModelError: The layer has no such expert.
    """
    _check_expert(layer, expert)
    router = unwrap(layer.router)
    gate_up, down = layer.expert_weights(expert)
    biases = layer.expert_biases(expert)
    rows = {name: getattr(router, name)[expert].detach().clone() for name in layer.family.router_tensors}
    return Expert(
        gate_up=gate_up.detach().clone(),
        down=down.detach().clone(),
        gate_up_bias=None if biases is None else biases[0].detach().clone(),
        down_bias=None if biases is None else biases[1].detach().clone(),
        row=rows["weight"],
        row_bias=rows.get("bias"),
        choice_bias=rows.get("e_score_correction_bias"),
    )


def write_expert(layer: MoELayer, expert: int, value: Expert) -> None:
    """Put an expert, and its router row where it has one, in the place of another.

    The layer's fused parameters are replaced by changed copies; references to the old ones are out of date.

    Raises:
        ModelError: The layer has no such expert, has adapters, or the value's shapes or biases do not fit.
    """
    _check_expert(layer, expert)
    _check_bare(layer)

    def put(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        changed = old.clone()
        changed[expert] = new.to(device=old.device, dtype=old.dtype)
        return changed

    for module, name, new in _placed(layer, value):
        _change(module, name, lambda old, new=new: put(old, new))  # type: ignore[misc]


def copy_expert(model: nn.Module, source: tuple[int, int], target: tuple[int, int], *, with_row: bool) -> None:
    """Copy an expert over another one, in the same layer or in another.

    Args:
        model: An HF causal LM without adapters.
        source: Layer index and expert.
        target: Layer index and expert that is replaced.
        with_row: Whether the router's row is copied, too; else the target keeps its own.

    Raises:
        ModelError: As ``write_expert``.
    """
    layers = {layer.index: layer for layer in moe_layers(model)}
    value = read_expert(_layer(layers, source[0]), source[1])
    if not with_row:
        value = replace(value, row=None, row_bias=None, choice_bias=None)
    write_expert(_layer(layers, target[0]), target[1], value)


# ---- the number and order of experts


def add_expert(model: nn.Module, experts: Mapping[int, Expert]) -> None:
    """Give every MoE layer one more expert, the last, with a router row of its own; the config counts it.

    Args:
        model: An HF causal LM without adapters and masks.
        experts: One a MoE layer, by layer index: a config knows one number of experts for all layers.

    Raises:
        ModelError: A layer is missing or unknown, an expert does not fit or has no row, or the router has groups.
    """
    layers = moe_layers(model)
    _check_all_layers(layers, experts)
    placed = []
    for layer in layers:
        if experts[layer.index].row is None:
            raise ModelError(f"the expert for layer {layer.index} has no router row", "give Expert.row")
        _check_resizable(layer)
        placed.append(_placed(layer, experts[layer.index]))

    def append(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        return torch.cat([old, new.to(device=old.device, dtype=old.dtype)[None]])

    for tensors in placed:
        for module, name, new in tensors:
            _change(module, name, lambda old, new=new: append(old, new))  # type: ignore[misc]
    _count_experts(model, layers, layers[0].num_experts)


def remove_expert(model: nn.Module, experts: int | Mapping[int, int]) -> dict[int, Expert]:
    """Take one expert out of every MoE layer, its router row with it; the config counts one less.

    Args:
        model: An HF causal LM without adapters and masks.
        experts: The expert, or one a MoE layer by layer index.

    Returns:
        What was taken out, by layer index; ``add_expert`` takes it as it is.

    Raises:
        ModelError: A layer is missing, an expert unknown, too few would be left for top-k, or the router has groups.
    """
    layers = moe_layers(model)
    by_layer = {layer.index: experts for layer in layers} if isinstance(experts, int) else dict(experts)
    _check_all_layers(layers, by_layer)
    for layer in layers:
        _check_expert(layer, by_layer[layer.index])
        _check_resizable(layer)
        check_experts_left(unwrap(layer.router), layer.family.rule, layer.num_experts, (by_layer[layer.index],), layer.top_k)
    removed = {layer.index: read_expert(layer, by_layer[layer.index]) for layer in layers}
    for layer in layers:
        kept = [e for e in range(layer.num_experts) if e != by_layer[layer.index]]
        _select(layer, kept)
    _count_experts(model, layers, layers[0].num_experts)
    return removed


def permute_experts(model: nn.Module, orders: Mapping[int, Sequence[int]]) -> None:
    """Reorder experts together with their router rows: expert ``orders[l][i]`` of layer l becomes expert i.

    The model computes what it computed before. A router with groups allows only orders that keep groups together.

    Raises:
        ModelError: A layer is unknown, an order is no permutation, the layer has adapters or a mask, or a group is torn.
    """
    layers = {layer.index: layer for layer in moe_layers(model)}
    for index, order in orders.items():
        layer = _layer(layers, index)
        if sorted(order) != list(range(layer.num_experts)):
            raise ModelError(
                f"{list(order)} is no order of the {layer.num_experts} experts of layer {index}", "name every expert once"
            )
        _check_bare(layer)
        _check_unmasked(layer)
        size = layer.num_experts // num_groups(unwrap(layer.router))
        if any(len({expert // size for expert in order[i : i + size]}) > 1 for i in range(0, len(order), size)):
            raise ModelError(
                f"{list(order)} tears the groups of {size} experts that layer {index}'s router chooses from",
                "permute within groups, or whole groups",
            )
    for index, order in orders.items():
        _select(layers[index], order)


def _select(layer: MoELayer, kept: Sequence[int]) -> None:
    for module, name in _tensors(layer):
        _change(module, name, lambda old: old[torch.tensor(list(kept), device=old.device)])


def _tensors(layer: MoELayer) -> list[tuple[nn.Module, str]]:
    """Every parameter and buffer of a layer that has one entry an expert."""
    experts = [(layer.experts, name) for name in layer.family.expert_tensors]
    return [*experts, *((unwrap(layer.router), name) for name in layer.family.router_tensors)]


def _placed(layer: MoELayer, value: Expert) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """An expert's tensors in the layer's own layout, with the module and name each belongs to."""
    family = layer.family
    given: dict[str, torch.Tensor | None] = {
        "gate_up_proj": value.gate_up,
        "down_proj": value.down,
        "gate_up_proj_bias": value.gate_up_bias,
        "down_proj_bias": value.down_bias,
    }
    rows = {"weight": value.row, "bias": value.row_bias, "e_score_correction_bias": value.choice_bias}
    found: list[tuple[nn.Module, str, torch.Tensor]] = []
    for module, names, tensors in (
        (layer.experts, family.expert_tensors, given),
        (unwrap(layer.router), family.router_tensors if value.row is not None else (), rows),
    ):
        for name in names:
            tensor = tensors[name]
            if tensor is None:
                raise ModelError(f"a {family.model_type} expert needs {name}, which this one lacks", "name one of its own family")
            if name.startswith("gate_up_proj") and family.is_interleaved:
                gate, up = tensor.chunk(2)
                tensor = torch.stack([gate, up], dim=1).flatten(0, 1)
            if family.is_transposed and tensor.dim() == 2:
                tensor = tensor.T
            expected = getattr(module, name).shape[1:]
            if tensor.shape != expected:
                raise ModelError(
                    f"layer {layer.index}: {name} of an expert has shape {tuple(expected)}, got {tuple(tensor.shape)}",
                    "name an expert of the same sizes",
                )
            found.append((module, name, tensor))
    lacking = [name for name, tensor in given.items() if tensor is not None and name not in family.expert_tensors]
    if lacking:
        raise ModelError(
            f"{family.model_type} has no place for an expert's {', '.join(lacking)}", "name an expert without biases"
        )
    return found


def _change(module: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Put a changed copy in the place of a parameter or buffer."""
    old: torch.Tensor = getattr(module, name)
    new = change(old.detach())
    if isinstance(old, nn.Parameter):
        setattr(module, name, nn.Parameter(new, requires_grad=old.requires_grad))
    else:
        module._buffers[name] = new


def _count_experts(model: nn.Module, layers: tuple[MoELayer, ...], count: int) -> None:
    """Write the number of experts wherever the model keeps it."""
    config: Any = model.config
    setattr(config, family_of(config).num_experts, count)
    holders: list[Any] = [model, *(module for layer in layers for module in (unwrap(layer.router), layer.experts))]
    for holder in holders:
        if hasattr(holder, "num_experts"):
            holder.num_experts = count
    assert model_facts(config).num_experts == count


def _layer(layers: Mapping[int, MoELayer], index: int) -> MoELayer:
    if index not in layers:
        raise ModelError(f"layer {index} has no experts", f"MoE layers are {', '.join(map(str, layers))}")
    return layers[index]


def _check_expert(layer: MoELayer, expert: int) -> None:
    if not 0 <= expert < layer.num_experts:
        raise ModelError(f"layer {layer.index} has no expert {expert}", f"its experts are 0 to {layer.num_experts - 1}")


def _check_all_layers(layers: tuple[MoELayer, ...], given: Mapping[int, object]) -> None:
    indices = [layer.index for layer in layers]
    if sorted(given) != indices:
        raise ModelError(
            f"experts are given for layers {sorted(given)}, but the MoE layers are {indices}",
            "name one expert for each: the model's config holds one number of experts for all",
        )


def _check_bare(layer: MoELayer) -> None:
    for module in (layer.block.get_submodule(layer.family.experts), layer.router):
        if unwrap(module) is not module:
            raise ModelError(
                f"layer {layer.index} has an adapter over its experts or router", "change experts before adapters are added"
            )


def _check_unmasked(layer: MoELayer) -> None:
    if _masks_of(layer):
        raise ModelError(f"layer {layer.index} has masked experts", "remove the mask first: it names experts by number")


def _check_resizable(layer: MoELayer) -> None:
    _check_bare(layer)
    _check_unmasked(layer)
    groups = num_groups(unwrap(layer.router))
    if groups > 1:
        raise ModelError(
            f"the router of layer {layer.index} chooses from {groups} groups of equal size (n_group), so one expert cannot be "
            "added or taken out",
            "mask the expert instead",
        )
