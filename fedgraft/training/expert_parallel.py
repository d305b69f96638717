"""Expert parallelism: each rank of a replica holds a part of every layer's frozen experts, and tokens travel to them.

DeepSpeed's AutoEP would replace a whole MoE block, with a router of its own. Here it replaces the experts alone: a block's
``experts`` module becomes ``SpreadExperts``, whose only child is what AutoEP takes for a block; the layer that AutoEP puts
there keeps its experts and its all-to-all, and is told where the family's own router sent each token. So router, shared
experts, grafts, routing counts and every parameter's name stay as they were, routing has the bits of the plain model, and
transformers' registry of recorded outputs is not touched.

Shape letters: T tokens, D model, F expert hidden, E experts, K top-k.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from fedgraft.errors import ModelError, ReplicaError
from fedgraft.moe.families import MoELayer, family_of, model_facts, moe_layers, unwrap
from fedgraft.moe.sharding import gathered
from fedgraft.types import Slots

__all__ = [
    "PRESETS",
    "SpreadExperts",
    "SpreadTensor",
    "finish_settings",
    "refuse_expert_parallel",
    "spread_experts",
    "spread_tensors",
]

_log = logging.getLogger(__name__)

PRESETS: Mapping[str, str] = {
    "deepseek_v2": "deepseek_v2",
    "deepseek_v3": "deepseek_v3",
    "mixtral": "mixtral",
    "qwen2_moe": "qwen3_moe",
    "qwen3_moe": "qwen3_moe",
}
"""AutoEP's preset of each family, by ``model_type``; said here so that a run can be refused before DeepSpeed is imported."""

_STAGES = (0, 3)
_PLACE = "spread"
"""Name of the child of ``SpreadExperts`` that AutoEP replaces."""
_ROW_BYTES = 16
"""PyTorch's grouped products want rows of a multiple of this many bytes."""


def refuse_expert_parallel(config: Any, slots: Slots, *, size: int, stage: int) -> None:
    """Refuse what AutoEP cannot do, from the model's HF config alone, before a model is loaded.

    Args:
        config: The model's HF config.
        slots: What the method builds into the model.
        size: Ranks that share the experts of a layer.
        stage: The ZeRO stage.

    Raises:
        ModelError: The family has no preset, its experts another activation than SiLU, the number of experts is no multiple of
            ``size``, slots lie on the experts, or the stage needs trained experts.
    """
    family, facts = family_of(config), model_facts(config)
    what = f"engine.expert_parallel_size {size}"
    if family.model_type not in PRESETS:
        raise ModelError(
            f"{what}: DeepSpeed's AutoEP has no preset for {family.model_type}; it has for {', '.join(sorted(PRESETS))}",
            "remove engine.expert_parallel_size, or shard all parameters with engine.stage: 3",
        )
    if (activation := getattr(config, "hidden_act", "silu")) not in ("silu", "swish"):
        raise ModelError(
            f"{what}: AutoEP's {family.model_type} experts compute silu, this model's config.json has hidden_act {activation!r}",
            "remove engine.expert_parallel_size",
        )
    if facts.num_experts % size:
        divisors = [str(n) for n in range(2, facts.num_experts + 1) if facts.num_experts % n == 0]
        raise ModelError(
            f"{what} does not divide the {facts.num_experts} experts of a layer ({family.num_experts} in config.json)",
            f"set it to one of {', '.join(divisors)}",
        )
    on_experts = [f"adapter {each.name!r}" for each in slots.adapters if "experts" in each.targets]
    on_experts += ["training them in full"] if "experts" in slots.full else []
    if on_experts:
        raise ModelError(
            f"{what}: experts that ranks share stay frozen, but the method has {' and '.join(on_experts)} on them",
            "target attention or router, or remove engine.expert_parallel_size (engine.stage: 3 shards trained experts, too)",
        )
    if stage not in _STAGES:
        raise ModelError(
            f"{what}: ZeRO stage {stage} refuses shared experts that are not trained; stages 0 and 3 can",
            "set engine.stage: 0 (or 3, which shards all other parameters as well)",
        )


class SpreadTensor:
    """A fused tensor of experts whose rows lie on several ranks: ``[e]`` gives expert e's, whole, in every rank.

    All ranks must ask for the same experts in the same order.

    Args:
        layer: AutoEP's layer of the block.
        parts: Its parameters, (E / ranks, ., .) each, that one after another make up an expert's matrix.
    """

    def __init__(self, layer: nn.Module, parts: tuple[nn.Parameter, ...]) -> None:
        self._layer = layer
        self._parts = parts

    def __len__(self) -> int:
        return int(self._layer.num_experts)  # type: ignore[arg-type]

    def __getitem__(self, expert: int) -> torch.Tensor:
        if not -len(self) <= expert < len(self):
            raise IndexError(f"expert {expert} of {len(self)}")
        layer: Any = self._layer
        owner, place = divmod(expert % len(self), layer.num_local_experts)
        with gathered(self._parts):
            row = torch.cat([part.detach()[place if owner == layer.ep_rank else 0] for part in self._parts])
        dist.broadcast(row, dist.get_global_rank(layer.ep_group, owner), group=layer.ep_group)
        return row

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self[expert] for expert in range(len(self)))

    def add_to(self, digest: Any, name: str) -> None:
        """Add the tensor to a SHA-256 as if it were whole in this rank: name, shape, dtype, and the bytes of all rows."""
        digest.update(f"{name}|{tuple(self.shape)}|{self.dtype}".encode())
        for row in self:
            digest.update(row.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    @property
    def shape(self) -> torch.Size:
        """The whole tensor's."""
        sizes = [torch.Size(getattr(part, "ds_shape", part.shape)) for part in self._parts]
        return torch.Size((len(self), sum(size[1] for size in sizes), sizes[0][2]))

    @property
    def dtype(self) -> torch.dtype:
        """The values' type."""
        return self._parts[0].dtype


class _GivenRouting(nn.Module):
    """Stands where AutoEP has a router of its own, and gives what the family's router chose."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.given: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, x_TD: torch.Tensor, expert_bias: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Weights (T, K), chosen experts (T, K) and tokens of each expert (E)."""
        assert self.given is not None
        chosen_TK, weight_TK = self.given
        self.given = None  # or the layer would hold on to the graph
        counts_E = torch.bincount(chosen_TK.reshape(-1), minlength=self.num_experts).to(torch.int32)
        return weight_TK.contiguous(), chosen_TK.contiguous(), counts_E


class _Source(nn.Module):
    """What AutoEP takes for a MoE block: the family's experts, beside the router it reads sizes from."""

    def __init__(self, router: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts
        self.__dict__["gate"] = router  # not registered: it would have a second name in the model


class SpreadExperts(nn.Module):
    """The experts of one MoE block, over several ranks once DeepSpeed has set up; called as the family's own are.

    In eval mode every rank must run the same rows, and goes on with rank 0's bits: a product of matrices may round a row by its
    place in them, and ranks that decide from a last bit (a greedy token, the best expert) must decide alike.
    """

    def __init__(self, layer: MoELayer) -> None:
        super().__init__()
        experts: Any = layer.experts
        self.num_experts = layer.num_experts
        self.act_fn = experts.act_fn
        self.spread: nn.Module = _Source(unwrap(layer.router), experts)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == _PLACE and not isinstance(value, _Source):
            # AutoEP puts its layer here by assignment. It brought a router along, under one or two names.
            routing = _GivenRouting(value.num_experts)
            own = value.router
            for alias in [alias for alias, child in value.named_children() if child is own]:
                setattr(value, alias, routing)
        super().__setattr__(name, value)

    @property
    def is_spread(self) -> bool:
        """Whether ranks hold a part each; before DeepSpeed has set up, each holds all."""
        return not isinstance(self.spread, _Source)

    @property
    def gate_up_proj(self) -> Any:
        """As the family has it, (E, 2F, D), to be read expert by expert."""
        return self._tensor("gate_up_proj", ("w1", "w3"))

    @property
    def down_proj(self) -> Any:
        """As the family has it, (E, D, F), to be read expert by expert."""
        return self._tensor("down_proj", ("w2",))

    def forward(self, x_TD: torch.Tensor, chosen_TK: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        """The chosen experts' weighted sum of each token, (T, D)."""
        layer: Any = self.spread
        if not self.is_spread:
            plain: torch.Tensor = layer.experts(x_TD, chosen_TK, weight_TK)
            return plain
        if not self.training:
            _require_same_rows(x_TD)
        layer.router.given = (chosen_TK, weight_TK)
        output_TD: torch.Tensor = layer(x_TD.unsqueeze(0)).squeeze(0)
        if not self.training and not output_TD.requires_grad:
            output_TD = output_TD.contiguous()
            dist.broadcast(output_TD, 0)
        return output_TD

    def _tensor(self, name: str, parts: tuple[str, ...]) -> Any:
        experts: Any = self.spread.get_submodule("experts")
        return (
            SpreadTensor(self.spread, tuple(getattr(experts, part) for part in parts))
            if self.is_spread
            else getattr(experts, name)
        )


def spread_experts(model: nn.Module, size: int) -> None:
    """Prepare a model with slots for AutoEP, in place: DeepSpeed's set-up then spreads its experts over ``size`` ranks."""
    layers = moe_layers(model)
    whole = sum(each.numel() * each.element_size() for layer in layers for each in layer.experts.parameters()) / 1e6
    _log.warning(
        "expert parallelism: each rank copies its share of the experts (%.0f MB of %.0f MB) into memory of its own",
        whole / size,
        whole,
    )
    for layer in layers:
        setattr(layer.block, layer.family.experts, SpreadExperts(layer).train(layer.block.training))


def spread_tensors(model: nn.Module) -> dict[str, SpreadTensor]:
    """The fused tensors that ranks share by now, by the names they had in the whole model; empty without expert parallelism."""
    found: dict[str, SpreadTensor] = {}
    for layer in moe_layers(model):
        experts = layer.experts
        if isinstance(experts, SpreadExperts) and experts.is_spread:
            stem = f"{layer.block_path}.{layer.family.experts}"
            found |= {f"{stem}.{name}": getattr(experts, name) for name in ("gate_up_proj", "down_proj")}
    return found


def finish_settings(settings: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Give DeepSpeed's settings with what AutoEP must know of the model, or without its section where nothing is left to spread.

    Args:
        settings: With a section ``expert_parallel`` where it is wanted.
        model: A model with slots, after ``spread_experts``.
    """
    section = settings.get("expert_parallel")
    if section is None:
        return settings
    rest = {key: value for key, value in settings.items() if key != "expert_parallel"}
    layers = moe_layers(model)
    if layers[0].experts.is_spread:
        return rest  # a second set-up of the same model finds AutoEP's layers in place
    facts, family = model_facts(model.config), layers[0].family
    width = next(layers[0].experts.parameters()).element_size()
    return rest | {
        "expert_parallel": dict(section)
        | {
            "enabled": True,
            "preset_model": PRESETS[family.model_type],
            "moe_layer_pattern": rf"inner\.model\.layers\.\d+\.{family.block}\.{family.experts}\.{_PLACE}",
            "top_k": facts.top_k,
            "use_grouped_mm": all(size * width % _ROW_BYTES == 0 for size in (facts.hidden_size, facts.expert_size)),
        }
    }


def _require_same_rows(x_TD: torch.Tensor) -> None:
    """Refuse rows that differ between ranks, in all ranks together.

    Raises:
        ReplicaError: They differ in number or in their sum; equal rows have equal sums, bit for bit.
    """
    own = torch.tensor([float(x_TD.shape[0]), 0.0], dtype=torch.float64, device=x_TD.device)
    own[1] = x_TD.detach().double().sum().nan_to_num()
    extremes = torch.cat([own, -own])
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    if not torch.equal(extremes[:2], -extremes[2:]):
        raise ReplicaError("with expert parallelism all ranks must evaluate the same rows, and these differ between ranks")
