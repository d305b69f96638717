"""Where each family of Hugging Face MoE models keeps its parts: one table entry a family.

Transformers holds the experts of a layer in fused 3-D parameters, ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F);
the first F rows of ``gate_up_proj`` are the gate, the other F the up projection. GPT-OSS stores both transposed, gate and up
interleaved, with biases; whatever a family stores, an expert is given in the form above.

Every family's router is called with (T, D) and gives raw logits (T, E), the weights (T, K) and the indices (T, K) of the
chosen experts, in this order.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from fedgraft.errors import ModelError
from fedgraft.moe.routing import RoutingRule, choose_experts, configured_groups, expert_probabilities, routed_scale
from fedgraft.moe.sharding import full_shape
from fedgraft.types import ModelFacts, Projection

__all__ = ["FAMILIES", "Family", "MoELayer", "family_of", "model_facts", "moe_layers", "unwrap"]

_PLAIN_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_LATENT_ATTENTION = (
    "self_attn.q_proj",
    "self_attn.q_a_proj",
    "self_attn.q_b_proj",
    "self_attn.kv_a_proj_with_mqa",
    "self_attn.kv_b_proj",
    "self_attn.o_proj",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names of a family's parts, as attribute paths below a decoder layer; ``None`` where it has no such part.

    ``attention`` lists every projection that a model of the family may have. ``num_experts``, ``expert_size`` and
    ``num_shared_experts`` name fields of the HF config. ``normalises``: whether the weights of a token's chosen experts are
    divided by their sum (``config``: as its ``norm_topk_prob`` says). ``is_transposed``: an expert's matrices are stored
    (in, out); ``is_interleaved``: gate and up columns take turns.
    """

    model_type: str
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    shared_expert: str | None = None
    shared_expert_gate: str | None = None
    attention: tuple[str, ...] = _PLAIN_ATTENTION
    has_latent_attention: bool = False
    num_experts: str = "num_experts"
    expert_size: str = "moe_intermediate_size"
    num_shared_experts: str | None = None
    rule: RoutingRule = "softmax"
    normalises: Literal["config", "always", "never"] = "config"
    routes_in_float32: bool = False
    is_transposed: bool = False
    is_interleaved: bool = False
    has_expert_bias: bool = False
    has_router_bias: bool = False

    @property
    def expert_tensors(self) -> tuple[str, ...]:
        """Names of the fused parameters of the experts module, experts first in each."""
        biases = ("gate_up_proj_bias", "down_proj_bias") if self.has_expert_bias else ()
        return ("gate_up_proj", "down_proj", *biases)

    @property
    def router_tensors(self) -> tuple[str, ...]:
        """Names of the router's parameters and buffers, a row an expert in each."""
        bias = ("bias",) if self.has_router_bias else ()
        return ("weight", *bias, *(("e_score_correction_bias",) if self.rule == "sigmoid" else ()))


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="qwen2_moe", shared_expert="shared_expert", shared_expert_gate="shared_expert_gate"),
        Family(model_type="qwen3_moe"),
        Family(model_type="olmoe", expert_size="intermediate_size"),
        Family(
            model_type="mixtral",
            num_experts="num_local_experts",
            expert_size="intermediate_size",
            normalises="always",
        ),
        Family(
            model_type="deepseek_v2",
            shared_expert="shared_experts",
            num_shared_experts="n_shared_experts",
            attention=_LATENT_ATTENTION,
            has_latent_attention=True,
            num_experts="n_routed_experts",
            normalises="never",  # transformers has no code for its norm_topk_prob
            routes_in_float32=True,
        ),
        Family(
            model_type="deepseek_v3",
            shared_expert="shared_experts",
            num_shared_experts="n_shared_experts",
            attention=_LATENT_ATTENTION,
            has_latent_attention=True,
            num_experts="n_routed_experts",
            rule="sigmoid",
            routes_in_float32=True,
        ),
        Family(
            model_type="gpt_oss",
            router="router",
            num_experts="num_local_experts",
            expert_size="intermediate_size",
            rule="softmax_of_top_k",
            normalises="always",
            is_transposed=True,
            is_interleaved=True,
            has_expert_bias=True,
            has_router_bias=True,
        ),
    )
}
"""The families fedgraft can look into, by ``model_type`` of the HF config."""


def family_of(config: Any) -> Family:
    """Give the table entry of a model.

    Args:
        config: The model's HF config.

    Raises:
        ModelError: The family is not in the table; the message says what an entry needs.
    """
    model_type = str(getattr(config, "model_type", "unknown"))
    if model_type not in FAMILIES:
        raise ModelError(
            f"model family {model_type!r} is not known; known: {', '.join(sorted(FAMILIES))}",
            "add a Family entry (block, router, experts, attention modules, routing rule, config field names) to "
            "fedgraft/moe/families.py; tests/unit/moe says whether it is right",
        )
    return FAMILIES[model_type]


def model_facts(config: Any) -> ModelFacts:
    """Read the sizes of a model from its HF config, without loading it.

    Raises:
        ModelError: The family is unknown, the model has no expert, or its config.json asks for what transformers cannot do.
    """
    family = family_of(config)
    num_experts = int(getattr(config, family.num_experts, 0))
    num_layers = int(config.num_hidden_layers)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    stride = int(getattr(config, "decoder_sparse_step", 1) or 1)
    first = int(getattr(config, "first_k_dense_replace", 0) or 0)
    layers = tuple(i for i in range(first, num_layers) if i not in dense and (i + 1) % stride == 0) if num_experts else ()
    if not layers:
        raise ModelError(
            f"this {family.model_type} model has no MoE layer: {_why_dense(config, family)}", "name a model with experts"
        )
    if int(getattr(config, "moe_layer_freq", 1) or 1) != 1:
        raise ModelError(
            f"moe_layer_freq is {config.moe_layer_freq}, but transformers builds {family.model_type} with experts in every "
            f"layer from {first} on",
            "name a model whose config.json has moe_layer_freq 1",
        )
    top_k = config.num_experts_per_tok
    if top_k is None or not 1 <= int(top_k) <= num_experts:
        raise ModelError(
            f"num_experts_per_tok is {top_k}, but this {family.model_type} model has {num_experts} experts in a layer "
            f"({family.num_experts})",
            f"set num_experts_per_tok in config.json to 1 to {num_experts}",
        )
    normalises = family.normalises == "always" or (family.normalises == "config" and bool(config.norm_topk_prob))
    shared = getattr(config, family.num_shared_experts, 0) if family.num_shared_experts else family.shared_expert is not None
    return ModelFacts(
        family=family.model_type,
        layers=layers,
        num_experts=num_experts,
        top_k=int(top_k),
        hidden_size=int(config.hidden_size),
        expert_size=int(getattr(config, family.expert_size)),
        norm_topk_prob=normalises,
        attention=_latent_attention(config) if family.has_latent_attention else _plain_attention(config),
        num_layers=num_layers,
        num_shared_experts=int(shared or 0),
        has_expert_bias=family.has_expert_bias,
        has_router_bias=family.has_router_bias,
        num_groups=configured_groups(config, family.rule),
    )


def _why_dense(config: Any, family: Family) -> str:
    names = (family.num_experts, "num_hidden_layers", "first_k_dense_replace", "mlp_only_layers", "decoder_sparse_step")
    return ", ".join(f"{name} is {getattr(config, name)}" for name in names if hasattr(config, name))


def _plain_attention(config: Any) -> tuple[Projection, ...]:
    hidden = int(config.hidden_size)
    head_dim = int(getattr(config, "head_dim", None) or hidden // config.num_attention_heads)
    queries, keys = head_dim * int(config.num_attention_heads), head_dim * int(config.num_key_value_heads)
    has_output_bias = bool(getattr(config, "attention_bias", False))
    has_bias = has_output_bias or bool(getattr(config, "qkv_bias", False))
    sizes = ((hidden, queries, has_bias), (hidden, keys, has_bias), (hidden, keys, has_bias), (queries, hidden, has_output_bias))
    return tuple(
        Projection(name=name, in_features=inner, out_features=outer, has_bias=bias)
        for name, (inner, outer, bias) in zip(_PLAIN_ATTENTION, sizes, strict=True)
    )


def _latent_attention(config: Any) -> tuple[Projection, ...]:
    """Sizes of multi-head latent attention: queries through a latent only where ``q_lora_rank`` is set."""
    hidden, heads, has_bias = int(config.hidden_size), int(config.num_attention_heads), bool(config.attention_bias)
    queries = heads * int(config.qk_nope_head_dim + config.qk_rope_head_dim)
    latent, values = int(config.kv_lora_rank), int(config.v_head_dim)
    rank = config.q_lora_rank
    sizes = {
        "q_proj": (hidden, queries, False) if rank is None else None,
        "q_a_proj": (hidden, int(rank), has_bias) if rank is not None else None,
        "q_b_proj": (int(rank), queries, False) if rank is not None else None,
        "kv_a_proj_with_mqa": (hidden, latent + int(config.qk_rope_head_dim), has_bias),
        "kv_b_proj": (latent, heads * (int(config.qk_nope_head_dim) + values), False),
        "o_proj": (heads * values, hidden, has_bias),
    }
    return tuple(
        Projection(name=f"self_attn.{name}", in_features=size[0], out_features=size[1], has_bias=size[2])
        for name, size in sizes.items()
        if size is not None
    )


def unwrap(module: nn.Module) -> nn.Module:
    """Give the module below PEFT's wrappers."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


@dataclass(frozen=True, slots=True)
class MoELayer:
    """One MoE layer of a loaded model: its index, the dotted path of its decoder layer, and its modules."""

    index: int
    path: str
    family: Family
    block: nn.Module

    @property
    def block_path(self) -> str:
        """Dotted path of the MoE block in the model."""
        return f"{self.path}.{self.family.block}"

    @property
    def router(self) -> nn.Module:
        """The router, with PEFT's wrapper where it has one."""
        return self.block.get_submodule(self.family.router)

    @property
    def experts(self) -> nn.Module:
        """The fused experts without wrappers."""
        return unwrap(self.block.get_submodule(self.family.experts))

    @property
    def num_experts(self) -> int:
        """Experts that are routed to; shared ones do not count."""
        return int(full_shape(self.router_rows)[0])

    @property
    def top_k(self) -> int:
        """Experts a token."""
        return int(unwrap(self.router).top_k)  # type: ignore[arg-type]

    @property
    def router_rows(self) -> torch.Tensor:
        """The router's weight, a row an expert, (E, D)."""
        return unwrap(self.router).weight  # type: ignore[return-value]

    @property
    def scale(self) -> float:
        """The constant that multiplies the weights of all chosen experts; 1 but in DeepSeek."""
        return routed_scale(unwrap(self.router))

    @property
    def normalises(self) -> bool:
        """Whether the weights of a token's chosen experts are divided by their sum."""
        if self.family.normalises == "config":
            return bool(unwrap(self.router).norm_topk_prob)
        return self.family.normalises == "always"

    @property
    def masking_is_local(self) -> bool:
        """Whether masking experts that a token did not choose leaves its output as it was.

        Not where the weights are a softmax over all experts that is not normalised after the choice: there the other weights
        grow by 1 / (1 - p), p the masked experts' probability.
        """
        return self.normalises or self.family.rule != "softmax"

    def router_logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The router's raw scores of tokens without any adapter, (T, E), float32 or the weight's dtype, as in the family."""
        router = unwrap(self.router)
        weight, bias = self.router_rows, router.bias if self.family.has_router_bias else None
        if self.family.routes_in_float32:
            x_TD, weight = x_TD.float(), weight.float()
        return F.linear(x_TD, weight, bias)  # type: ignore[arg-type]

    def probabilities(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Each expert's share of a token if all were chosen, (T, E), float32; rows sum to 1."""
        return expert_probabilities(self.family.rule, self.router_logits(x_TD))

    def choose(self, logits_TE: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights (T, K) and indices (T, K) of each token's experts; a logit of minus infinity masks an expert."""
        return choose_experts(unwrap(self.router), self.family.rule, logits_TE, self.top_k, normalises=self.normalises)

    def watch_routing(self, callback: Callable[[torch.Tensor, torch.Tensor], None]) -> RemovableHandle:
        """Call ``callback`` with the chosen experts (T, K) and their weights (T, K) at every forward pass.

        Masks and adapters have acted by then. Padding is among the tokens. ``remove()`` of what is returned ends it.
        """

        def hook(router: nn.Module, args: object, output: tuple[torch.Tensor, ...]) -> None:
            callback(output[-1].detach(), output[-2].detach())

        return self.router.register_forward_hook(hook)

    def expert_weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's ``gate_up_proj`` (2F, D), gate rows first, and ``down_proj`` (D, F); views where the family allows."""
        experts = self.experts
        gate_up, down = experts.gate_up_proj[expert], experts.down_proj[expert]  # type: ignore[index]
        if self.family.is_transposed:
            gate_up, down = gate_up.T, down.T
        return self._gate_first(gate_up), down

    def expert_biases(self, expert: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """One expert's biases of ``gate_up_proj`` (2F), gate first, and ``down_proj`` (D); ``None`` in most families."""
        if not self.family.has_expert_bias:
            return None
        experts = self.experts
        return self._gate_first(experts.gate_up_proj_bias[expert]), experts.down_proj_bias[expert]  # type: ignore[index]

    def expert_hidden(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The neurons of one expert on all tokens, act(gate) * up, (T, F)."""
        gate_up, _ = self.expert_weights(expert)
        biases = self.expert_biases(expert)
        gate, up = F.linear(x_TD, gate_up, None if biases is None else biases[0]).chunk(2, dim=-1)
        return self.neurons(gate, up)

    def expert_output(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """One expert on all tokens, without any routing weight, (T, D)."""
        biases = self.expert_biases(expert)
        down = self.expert_weights(expert)[1]
        return F.linear(self.expert_hidden(expert, x_TD), down, None if biases is None else biases[1])

    def neurons(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What an expert's neurons make of their gate and up values, all of one shape: act(gate) * up in most families."""
        experts: Any = self.experts
        if self.family.is_interleaved:
            hidden: torch.Tensor = experts._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
            return hidden
        return experts.act_fn(gate) * up  # type: ignore[no-any-return]

    def shared_output(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """The always-on shared experts' part of the block's output, (T, D); ``None`` where the family has none."""
        if self.family.shared_expert is None:
            return None
        output: torch.Tensor = self.block.get_submodule(self.family.shared_expert)(x_TD)
        if self.family.shared_expert_gate is not None:
            output = torch.sigmoid(self.block.get_submodule(self.family.shared_expert_gate)(x_TD)) * output
        return output

    def _gate_first(self, gate_up: torch.Tensor) -> torch.Tensor:
        return torch.cat([gate_up[::2], gate_up[1::2]]) if self.family.is_interleaved else gate_up


def moe_layers(model: nn.Module) -> tuple[MoELayer, ...]:
    """List the MoE layers of a loaded model, in order.

    Raises:
        ModelError: The family is unknown, or a layer that should have experts has none.
    """
    return tuple(_walk(model))


def _walk(model: nn.Module) -> Iterator[MoELayer]:
    family = family_of(model.config)
    facts = model_facts(model.config)
    for index in facts.layers:
        path = f"model.layers.{index}"
        block = model.get_submodule(f"{path}.{family.block}")
        if not hasattr(block, family.experts):
            raise ModelError(f"layer {index} of this {family.model_type} model has no experts", "check the model's config.json")
        yield MoELayer(index=index, path=path, family=family, block=block)
