"""Sizes of a base model and of a method's slots, from ``config.json`` alone: everything is built on PyTorch's meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

from fedgraft.errors import ModelError
from fedgraft.moe.base import read_config
from fedgraft.moe.families import family_of, model_facts
from fedgraft.moe.slots import add_slots
from fedgraft.platform.bundled_model import bundled_hf_config
from fedgraft.platform.config import ModelConfig
from fedgraft.protocols import Method
from fedgraft.types import FROZEN, PRIVATE, ModelFacts, ParamRef, Slots

__all__ = ["ModelPlan", "SlotCount", "SlotSizes", "read_hf_config", "size_model", "size_slots"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPlan:
    """The base model from its configuration alone.

    ``active_parameters`` are those that one token passes through as products: routed experts count top-k of E, a table of
    input embeddings that is no output layer does not count. ``weight_bytes`` lie once per node on a CPU, ``itemsize`` bytes
    a value; ``largest_layer`` is the values of the largest decoder layer, or of the embeddings where they are larger.

    Widths, in values: ``attention_size`` of all heads together, ``cache_size`` of the keys and values that decoding keeps
    of a token and layer, ``shared_size`` of the shared expert's neurons, ``dense_size`` of those of a layer without experts.
    """

    name: str
    facts: ModelFacts
    num_parameters: int
    active_parameters: int
    weight_bytes: int
    vocabulary: int
    itemsize: int
    largest_layer: int
    attention_size: int
    cache_size: int
    shared_size: int
    dense_size: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotCount:
    """Values and bytes of a method's slots of one group (``shared``, ``assigned``, ``private``, ``frozen``)."""

    group: str
    num_values: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SlotSizes:
    """A method's slots in values, by kind: ``lora`` (mixtures and gates over examples too), ``graft`` (with its gates), ``full``
    (parts trained in full).

    ``trained_*`` leave out what the method tags frozen. ``sent`` may leave the client, ``private`` stays, ``persisted`` are
    those whose moments are kept between rounds. ``merged`` are the base's values under a LoRA over fused experts, whose sum with
    it PEFT builds anew in every pass. ``active`` are the slots' values that one token passes through, ``active_own`` those of
    them that are weights of the model itself. ``expert_*`` are the slots of all routed experts together: ``expert_lora`` values
    of LoRA over them, and of those and of experts trained in full what trains (``expert_wide``, ``expert_full``).
    """

    slots: Slots
    groups: tuple[SlotCount, ...] = ()
    lora: int = 0
    graft: int = 0
    full: int = 0
    trained_wide: int = 0
    trained_full: int = 0
    sent: int = 0
    private: int = 0
    persisted: int = 0
    merged: int = 0
    active: int = 0
    active_own: int = 0
    expert_lora: int = 0
    expert_wide: int = 0
    expert_full: int = 0

    @property
    def values(self) -> int:
        """Values of all slots."""
        return self.lora + self.graft + self.full

    @property
    def trained(self) -> int:
        """Values of the slots that train."""
        return self.trained_wide + self.trained_full


def read_hf_config(model: ModelConfig) -> Any:
    """Read a model's HF config.

    Raises:
        ModelError: It cannot be read, or the family is unknown.
    """
    if model.is_bundled:
        return bundled_hf_config()
    return read_config(model.source, trusts_remote_code=model.trust_remote_code)


def size_model(model: ModelConfig, hf_config: Any) -> ModelPlan:
    """Count a model's parameters and read its widths, without loading it."""
    family_of(hf_config)
    facts = model_facts(hf_config)
    built = _on_meta(hf_config, model.dtype)
    parameters = list(built.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    routed = facts.num_routed_values
    vocabulary = int(hf_config.vocab_size)
    table = vocabulary * facts.hidden_size
    looked_up = 0 if hf_config.tie_word_embeddings else table
    layers: list[nn.Module] = list(built.model.layers)  # type: ignore[union-attr, arg-type]
    size, cache = _attention_sizes(hf_config, facts)
    return ModelPlan(
        name="bundled" if model.is_bundled else model.source,
        facts=facts,
        num_parameters=total,
        active_parameters=total - looked_up - routed + routed * facts.top_k // facts.num_experts,
        weight_bytes=sum(parameter.numel() * parameter.element_size() for parameter in parameters),
        vocabulary=vocabulary,
        itemsize=getattr(torch, model.dtype).itemsize,
        largest_layer=max(table, *(sum(each.numel() for each in layer.parameters()) for layer in layers)),
        attention_size=size,
        cache_size=cache,
        shared_size=int(getattr(hf_config, "shared_expert_intermediate_size", 0) or facts.num_shared_experts * facts.expert_size)
        if facts.num_shared_experts
        else 0,
        dense_size=0 if len(facts.layers) == facts.num_layers else int(hf_config.intermediate_size),
    )


def size_slots(method: Method, hf_config: Any, dtype: str, facts: ModelFacts) -> SlotSizes:
    """Build a method's slots without values and count them by group and kind."""
    slots = method.slots(facts)
    model = _on_meta(hf_config, dtype)
    with torch.device("meta"):
        refs = add_slots(model, slots)
    by_group: dict[str, int] = {}
    names = ("lora", "graft", "full", "trained_wide", "trained_full", "sent", "private", "persisted")
    count = dict.fromkeys((*names, "expert_lora", "expert_wide", "expert_full"), 0)
    active = active_own = 0.0
    for ref in refs:
        group, size = method.group(ref), ref.num_elements
        by_group[str(group.kind)] = by_group.get(str(group.kind), 0) + size
        kind = "graft" if ref.part in ("graft", "graft_gate") else "lora" if _is_lora(ref) else "full"
        count[kind] += size
        if group != FROZEN:
            count["trained_full" if kind == "full" else "trained_wide"] += size
        count["sent"] += size * group.is_sent
        count["private"] += size * (group == PRIVATE)
        count["persisted"] += size * (group == PRIVATE and method.persists_moments(ref))
        if ref.part == "experts":
            count["expert_lora"] += size * (kind == "lora")
            count["expert_full" if kind == "full" else "expert_wide"] += size * (group != FROZEN)
        passed = size * (facts.top_k / facts.num_experts if ref.part == "experts" else 1.0)
        active += passed
        active_own += passed * (kind == "full")
    wide = torch.float32.itemsize  # what is trained is sent as float32, whatever the base is
    has_merged = any("experts" in adapter.targets for adapter in slots.adapters)
    return SlotSizes(
        slots=slots,
        groups=tuple(
            SlotCount(group=name, num_values=by_group[name], num_bytes=by_group[name] * wide) for name in sorted(by_group)
        ),
        merged=facts.num_routed_values if has_merged else 0,
        active=round(active),
        active_own=round(active_own),
        **count,
    )


def _is_lora(ref: ParamRef) -> bool:
    return ref.adapter is not None or ref.part in ("mixture", "mixture_gate", "example_gate")


def _on_meta(hf_config: Any, dtype: str) -> nn.Module:
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(hf_config, dtype=getattr(torch, dtype))
    except Exception as error:  # sizes and names that fit together in the file, and in no model
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ModelError(f"the model cannot be built from its config.json: {text}", "check the file") from error
    model.tie_weights()  # type: ignore[operator]
    return model


def _attention_sizes(hf_config: Any, facts: ModelFacts) -> tuple[int, int]:
    """Width of all heads together, and of a token's keys and values as transformers caches them (latent ones unfolded)."""
    heads = int(hf_config.num_attention_heads)
    width = {each.name.rpartition(".")[2]: each.out_features for each in facts.attention}
    if "kv_b_proj" in width:
        queries = width["q_b_proj"] if "q_b_proj" in width else width["q_proj"]
        return queries, width["kv_b_proj"] + heads * int(hf_config.qk_rope_head_dim)
    return width["q_proj"], width["k_proj"] + width["v_proj"]
