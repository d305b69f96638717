"""Where each family of Hugging Face MoE models keeps its parts: one table entry a family.

Transformers holds the experts of a layer in fused 3-D parameters, ``gate_up_proj`` (E, 2F, D) and ``down_proj`` (E, D, F);
the first F rows of ``gate_up_proj`` are the gate, the other F the up projection.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import ModelError
from fedgraft.types import ModelFacts

__all__ = ["FAMILIES", "Family", "MoELayer", "family_of", "model_facts", "moe_layers", "unwrap"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """Names of a family's parts, as attribute paths below a decoder layer; ``None`` where it has no such part.

    ``num_experts`` and ``expert_size`` name fields of the HF config.
    """

    model_type: str
    block: str = "mlp"
    router: str = "gate"
    experts: str = "experts"
    shared_expert: str | None = None
    shared_expert_gate: str | None = None
    attention: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    num_experts: str = "num_experts"
    expert_size: str = "moe_intermediate_size"
    always_normalises: bool = False


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
            always_normalises=True,
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
            "add a Family entry (block, router, experts, attention modules, config field names) to fedgraft/moe/families.py",
        )
    return FAMILIES[model_type]


def model_facts(config: Any) -> ModelFacts:
    """Read the sizes of a model from its HF config, without loading it.

    Raises:
        ModelError: The family is unknown, or the model has no expert.
    """
    family = family_of(config)
    num_experts = int(getattr(config, family.num_experts, 0))
    num_layers = int(config.num_hidden_layers)
    dense = set(getattr(config, "mlp_only_layers", None) or ())
    stride = int(getattr(config, "decoder_sparse_step", 1) or 1)
    layers = tuple(i for i in range(num_layers) if i not in dense and (i + 1) % stride == 0) if num_experts else ()
    if not layers:
        raise ModelError(f"this {family.model_type} model has no MoE layer", "name a model with experts")
    head_dim = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    attention_size, key_value_size = head_dim * int(config.num_attention_heads), head_dim * int(config.num_key_value_heads)
    has_output_bias = bool(getattr(config, "attention_bias", False))
    num_biases = attention_size + 2 * key_value_size if has_output_bias or getattr(config, "qkv_bias", False) else 0
    return ModelFacts(
        family=family.model_type,
        layers=layers,
        num_experts=num_experts,
        top_k=int(config.num_experts_per_tok),
        hidden_size=int(config.hidden_size),
        expert_size=int(getattr(config, family.expert_size)),
        norm_topk_prob=family.always_normalises or bool(getattr(config, "norm_topk_prob", False)),
        attention_size=attention_size,
        num_key_value_features=key_value_size,
        num_layers=num_layers,
        num_attention_biases=num_biases + (int(config.hidden_size) if has_output_bias else 0),
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
        """The router, with PEFT's wrapper where it has one; its ``weight`` is (E, D)."""
        return self.block.get_submodule(self.family.router)

    @property
    def experts(self) -> nn.Module:
        """The fused experts without wrappers."""
        return unwrap(self.block.get_submodule(self.family.experts))

    def router_logits(self, x_TD: torch.Tensor) -> torch.Tensor:
        """The router's raw scores of tokens, (T, E), in the weight's dtype."""
        weight: torch.Tensor = unwrap(self.router).weight  # type: ignore[assignment]
        return F.linear(x_TD, weight)

    def expert_weights(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of one expert's ``gate_up_proj`` (2F, D) and ``down_proj`` (D, F)."""
        experts = self.experts
        return experts.gate_up_proj[expert], experts.down_proj[expert]  # type: ignore[index]

    def expert_hidden(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """The neurons of one expert on all tokens, act(gate) * up, (T, F)."""
        gate_up, _ = self.expert_weights(expert)
        gate, up = F.linear(x_TD, gate_up).chunk(2, dim=-1)
        return self.activation(gate) * up

    def expert_output(self, expert: int, x_TD: torch.Tensor) -> torch.Tensor:
        """One expert on all tokens, without any routing weight, (T, D)."""
        return F.linear(self.expert_hidden(expert, x_TD), self.expert_weights(expert)[1])

    def activation(self, x: torch.Tensor) -> torch.Tensor:
        """The experts' activation function."""
        return self.experts.act_fn(x)  # type: ignore[operator, no-any-return]

    def shared_output(self, x_TD: torch.Tensor) -> torch.Tensor | None:
        """The always-on shared expert's part of the block's output, (T, D); ``None`` where the family has none."""
        if self.family.shared_expert is None:
            return None
        output: torch.Tensor = self.block.get_submodule(self.family.shared_expert)(x_TD)
        if self.family.shared_expert_gate is not None:
            output = torch.sigmoid(self.block.get_submodule(self.family.shared_expert_gate)(x_TD)) * output
        return output


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
