"""A model with slots: LoRA, grafts, mixtures, gates, parts trained in full, and the list of every tensor that may be exchanged.

Names come from the model after the slots are in it, never from a guess: PEFT nests its wrappers of fused experts in an
order that depends on the targets. A fused tensor is listed once per expert, so that every expert has keys of its own.

Shape letters: D model, F expert hidden, E experts, R rank.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import nn

from fedgraft.errors import ModelError
from fedgraft.moe.example_gate import EXAMPLE_GATE, attach_example_gate, example_gate_of, gate_start
from fedgraft.moe.families import Family, MoELayer, family_of, model_facts, moe_layers
from fedgraft.moe.graft import GRAFT, attach_grafts
from fedgraft.moe.mixture import MIXTURE, attach_mixtures
from fedgraft.seeding import derive_seed
from fedgraft.types import AdapterSpec, ModelFacts, ParamRef, Params, Slots

__all__ = ["add_slots", "count_slot_elements", "frozen_names", "initial_params"]

_PARTS = ("attention", "router", "experts")
_DRAWN = tuple(f".{MIXTURE}.{name}" for name in ("lora_A", "shared_A", "token_projection"))


def add_slots(model: nn.Module, slots: Slots) -> tuple[ParamRef, ...]:
    """Build a method's slots into a model, in place, and list them.

    The base's own tensors stay frozen and stay where they are (e.g. in a file's memory map), but for the parts in
    ``slots.full``, which become private copies.

    Args:
        model: An untouched HF causal LM of a known family.
        slots: What to add.

    Returns:
        One reference a slot, in the model's parameter order, fused experts in expert order.

    Raises:
        ModelError: A target names no part, or matches nothing in this model.
    """
    model.requires_grad_(False)
    layers = moe_layers(model)
    for part in slots.full:
        _check_part(part)
        for parameter in _full_parameters(model, layers, part):
            parameter.data = parameter.data.clone()
            parameter.requires_grad_(True)
    if slots.graft is not None:
        attach_grafts(model, slots.graft)
    if slots.mixture is not None:
        attach_mixtures(model, slots.mixture)
    if slots.example_gate is not None:
        attach_example_gate(model, slots.example_gate)
    for adapter in slots.adapters:
        _add_adapter(model, layers, adapter)
    names = tuple(adapter.name for adapter in slots.adapters)
    if names:
        from peft.tuners.lora import LoraLayer  # peft takes seconds to import, and only replicas need it

        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter([name for name in names if name in module.lora_A])
    for name, parameter in model.named_parameters():
        # What is trained is float32 whatever the base is; parts trained in full keep the dtype of the model around them.
        if ".lora_" in name or any(f".{part}." in name for part in (GRAFT, MIXTURE, EXAMPLE_GATE)):
            parameter.data = parameter.data.float()
    # set_adapter flips requires_grad; a slot is trainable, everything else is not, whatever PEFT thinks.
    refs = tuple(_references(model, layers, slots))
    slot_names = {ref.name for ref in refs}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in slot_names)
    model.eval()  # the slots' modules are new, and a client may be judged before anything is trained
    return refs


def initial_params(model: nn.Module, refs: tuple[ParamRef, ...], run_seed: int) -> Params:
    """Give the start value of every slot: a function of the run's seed and the model only.

    LoRA A is uniform in +-1/sqrt(in features) (Kaiming with a = sqrt(5), as PEFT does), B is zero, so the model starts as
    the base; so do a mixture's, every slot's A drawn on its own, and its token projection like an A. The weights of a gate over
    examples are drawn as its spec says. Grafts and full parts start as they are in the model.
    """
    parameters = dict(model.named_parameters())
    start: Params = {}
    for ref in refs:
        value = ref.view(parameters[ref.name].detach()).clone()
        if ".lora_A." in ref.name or ref.name.endswith(_DRAWN):
            generator = torch.Generator().manual_seed(derive_seed(run_seed, f"initial/{ref.key}"))
            bound = 1 / math.sqrt(value.shape[-1])
            value = (torch.rand(value.shape, generator=generator) * 2 - 1).mul_(bound).to(value.dtype)
        elif ref.part == EXAMPLE_GATE and value.dim() > 1:
            generator = torch.Generator().manual_seed(derive_seed(run_seed, f"initial/{ref.key}"))
            value = gate_start(tuple(value.shape), example_gate_of(model).spec.start, generator).to(value.dtype)
        start[ref.key] = value.float().cpu() if value.dtype in (torch.bfloat16, torch.float16) else value.cpu()
    return start


def frozen_names(model: nn.Module, refs: tuple[ParamRef, ...]) -> tuple[str, ...]:
    """Names of the parameters that are no slot, in the model's order."""
    slots = {ref.name for ref in refs}
    return tuple(name for name, _ in model.named_parameters() if name not in slots)


def count_slot_elements(facts: ModelFacts, slots: Slots) -> dict[str, int]:
    """Count the values of a method's slots by part, from sizes alone, before any model is loaded.

    Returns:
        Values in ``attention``, ``router``, ``experts`` (adapters and full parts together), ``graft``, ``graft_gate``,
        ``mixture`` (all slots and shared LoRAs) and ``mixture_gate``; ``example_gate`` where there is one.
    """
    hidden, num_moe = facts.hidden_size, len(facts.layers)
    count = dict.fromkeys((*_PARTS, "graft", "graft_gate", "mixture", "mixture_gate"), 0)
    sides = {
        "attention": facts.num_layers * sum(each.in_features + each.out_features for each in facts.attention),
        "router": num_moe * (hidden + facts.num_experts),
        "experts": num_moe * facts.num_experts * ((hidden + 2 * facts.expert_size) + (facts.expert_size + hidden)),
    }
    weights = {
        "attention": facts.num_layers * sum(each.num_elements for each in facts.attention),
        "router": num_moe * facts.num_experts * (hidden + facts.has_router_bias),
        "experts": num_moe * facts.num_experts * facts.expert_elements,
    }
    for adapter in slots.adapters:
        for target in adapter.targets:
            count[target] += adapter.rank * sides[target]
    for part in slots.full:
        count[part] += weights[part]
    if slots.graft is not None:
        graft = slots.graft
        biases = 2 * graft.num_neurons + hidden if facts.has_expert_bias else 0
        count["graft"] = len(graft.layers) * graft.num_grafts * (3 * hidden * graft.num_neurons + biases)
        count["graft_gate"] = len(graft.layers) * graft.num_grafts * (hidden + 1)
    if slots.mixture is not None:
        mixture = slots.mixture
        maps = [each for each in facts.attention if each.name.rpartition(".")[2] in mixture.targets]
        num_loras = facts.num_layers * (mixture.num_slots + mixture.has_shared)
        count["mixture"] = num_loras * mixture.rank * sum(each.in_features + each.out_features for each in maps)
        if mixture.num_slots and mixture.gate == "token":
            count["mixture_gate"] = facts.num_layers * mixture.rank * sum(each.in_features for each in maps)
    if slots.example_gate is not None:
        widths = (hidden, *slots.example_gate.hidden, slots.example_gate.num_outputs)
        count[EXAMPLE_GATE] = sum((a + 1) * b for a, b in pairwise(widths))
    return count


def _check_part(part: str) -> None:
    if part not in _PARTS:
        raise ModelError(f"no part of a model is called {part!r}", f"known parts: {', '.join(_PARTS)}")


def _add_adapter(model: nn.Module, layers: tuple[MoELayer, ...], adapter: AdapterSpec) -> None:
    """Inject one LoRA with PEFT. Modules and parameters are given by their full names, so nothing else can match."""
    family = family_of(model.config)
    modules: list[str] = []
    parameters: list[str] = []
    for target in adapter.targets:
        _check_part(target)
        if target == "attention":
            modules += _attention_paths(model, family)
        elif target == "router":
            parameters += [f"{layer.block_path}.{family.router}.weight" for layer in layers]
        else:
            stem = [f"{layer.block_path}.{family.experts}" for layer in layers]
            parameters += [f"{path}.{name}" for path in stem for name in ("gate_up_proj", "down_proj")]
    if parameters and adapter.dropout > 0:
        raise ModelError(
            f"adapter {adapter.name!r} has dropout {adapter.dropout} on router or experts",
            "PEFT cannot apply dropout to fused parameters: set dropout to 0",
        )
    from peft import LoraConfig, inject_adapter_in_model  # as above

    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        target_modules=modules,
        target_parameters=parameters or None,
    )
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on one model; here that is what a shared beside a personal LoRA is.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(config, model, adapter_name=adapter.name)


def _attention_paths(model: nn.Module, family: Family) -> list[str]:
    """Full names of the attention projections that this model has, without PEFT's wrappers.

    Raises:
        ModelError: Some layer has none of them.
    """
    known = {name.replace(".base_layer", "") for name, _ in model.named_modules()}
    found: list[str] = []
    for index in range(int(model.config.num_hidden_layers)):  # type: ignore[union-attr, arg-type]
        paths = [path for name in family.attention if (path := f"model.layers.{index}.{name}") in known]
        if not paths:
            raise ModelError(
                f"target attention matches nothing in layer {index} of this {family.model_type} model",
                f"its attention modules are expected under {', '.join(family.attention)}",
            )
        found += paths
    return found


def _full_parameters(model: nn.Module, layers: tuple[MoELayer, ...], part: str) -> Iterator[nn.Parameter]:
    family = family_of(model.config)
    if part == "attention":
        for path in _attention_paths(model, family):
            yield from model.get_submodule(path).parameters()
        return
    for layer in layers:
        yield from (layer.router if part == "router" else layer.experts).parameters()


def _references(model: nn.Module, layers: tuple[MoELayer, ...], slots: Slots) -> Iterator[ParamRef]:
    """List the slots; a fused expert tensor gives one reference an expert."""
    family = family_of(model.config)
    num_experts = model_facts(model.config).num_experts
    adapters = {adapter.name: adapter for adapter in slots.adapters}
    by_prefix = {f"{layer.block_path}.": layer for layer in layers}
    for name, parameter in model.named_parameters():
        layer = next((found for prefix, found in by_prefix.items() if name.startswith(prefix)), None)
        part = _part_of(name, layer, family.attention)
        adapter = next((a for a in adapters if f".lora_A.{a}." in name or f".lora_B.{a}." in name), None)
        own = ("graft", "graft_gate", "mixture", "mixture_gate", EXAMPLE_GATE)
        if adapter is None and part not in own and part not in slots.full:
            continue
        index = layer.index if layer is not None else None
        shape = tuple(parameter.shape)
        if part in ("mixture", "mixture_gate"):
            yield from _mixture_references(name, shape, part)
            continue
        if part == "router" and adapter is None and slots.splits_router:
            for expert in range(num_experts):
                yield ParamRef(
                    key=f"{name}[{expert}]",
                    name=name,
                    part=part,
                    shape=(1, *shape[1:]),
                    layer=index,
                    expert=expert,
                    dim=0,
                    start=expert,
                    stop=expert + 1,
                )
            continue
        if part != "experts":
            yield ParamRef(key=name, name=name, part=part, shape=shape, adapter=adapter, layer=index)
            continue
        for expert in range(num_experts):
            dim, start, stop, step = _expert_slice(name, shape, expert, num_experts)
            size = len(range(start, stop, step))
            yield ParamRef(
                key=f"{name}[{expert}]",
                name=name,
                part=part,
                shape=(*shape[:dim], size, *shape[dim + 1 :]),
                adapter=adapter,
                layer=index,
                expert=expert,
                dim=dim,
                start=start,
                stop=stop,
                step=step,
            )


def _mixture_references(name: str, shape: tuple[int, ...], part: str) -> Iterator[ParamRef]:
    """One reference a slot, or the whole tensor where all slots have it in common; ``layer`` is the decoder layer."""
    layer = int(name.removeprefix("model.layers.").partition(".")[0])
    if not name.endswith((".lora_A", ".lora_B")):
        yield ParamRef(key=name, name=name, part=part, shape=shape, layer=layer)
        return
    for slot in range(shape[0]):
        yield ParamRef(
            key=f"{name}[{slot}]",
            name=name,
            part=part,
            shape=(1, *shape[1:]),
            layer=layer,
            expert=slot,
            dim=0,
            start=slot,
            stop=slot + 1,
        )


def _part_of(name: str, layer: MoELayer | None, attention: tuple[str, ...]) -> str:
    if layer is not None:
        below = name[len(layer.block_path) + 1 :]
        if below.startswith(f"{GRAFT}.gate_weight") or below.startswith(f"{GRAFT}.gate_bias"):
            return "graft_gate"
        if below.startswith(f"{GRAFT}."):
            return "graft"
        for part, attribute in (("router", layer.family.router), ("experts", layer.family.experts)):
            if below.startswith(f"{attribute}."):
                return part
        return "shared_expert" if layer.family.shared_expert and below.startswith(layer.family.shared_expert) else "other"
    if f".{EXAMPLE_GATE}." in name:
        return EXAMPLE_GATE
    if f".{MIXTURE}." in name:
        return "mixture_gate" if name.endswith(".token_projection") else "mixture"
    plain = name.replace(".base_layer", "")
    return "attention" if any(f".{module}." in plain for module in attention) else "other"


def _expert_slice(name: str, shape: tuple[int, ...], expert: int, num_experts: int) -> tuple[int, int, int, int]:
    """Where expert e lies in a fused tensor, as (dim, start, stop, step).

    PEFT's A over fused experts is (E * R, in), expert by expert; its B is (out, R * E) with the experts innermost.
    """
    if ".lora_A." in name:
        rank = shape[0] // num_experts
        return 0, expert * rank, (expert + 1) * rank, 1
    if ".lora_B." in name:
        return 1, expert, shape[1], num_experts
    return 0, expert, expert + 1, 1
