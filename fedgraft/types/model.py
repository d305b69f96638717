"""A model as a federation sees it: tensors by key, their groups, and the slots that are trained.

Shape letters: E experts of a layer, K top-k, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, TypeAlias

import torch

__all__ = [
    "FROZEN",
    "IGNORE_INDEX",
    "PRIVATE",
    "SHARED",
    "AdapterSpec",
    "Assignment",
    "ExampleGateSpec",
    "GraftSpec",
    "Group",
    "GroupKind",
    "MixtureSpec",
    "ModelFacts",
    "ParamRef",
    "Params",
    "Projection",
    "Slots",
    "assigned",
]

Params: TypeAlias = dict[str, torch.Tensor]
"""Tensors by key. A key names a whole parameter of the model, or one expert's slice of a fused one, or an extra."""

Assignment: TypeAlias = Mapping[int, tuple[int, ...]]
"""Experts that a client holds, ascending, by the model's layer index; a layer that is not named keeps all of its experts."""

IGNORE_INDEX = -100
"""Label of a position that the loss does not count (prompt and padding), as in PyTorch's cross-entropy."""


class GroupKind(StrEnum):
    """Where a tensor may be: frozen and private ones are never sent; the platform enforces it, not the method."""

    FROZEN = "frozen"
    SHARED = "shared"
    ASSIGNED = "assigned"
    PRIVATE = "private"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The parameter group of a tensor; ``assigned`` ones belong to one expert of one layer."""

    kind: GroupKind
    layer: int | None = None
    expert: int | None = None

    @property
    def is_sent(self) -> bool:
        """Whether tensors of this group may leave the server or a client."""
        return self.kind in (GroupKind.SHARED, GroupKind.ASSIGNED)

    def __str__(self) -> str:
        return f"assigned({self.layer}, {self.expert})" if self.kind is GroupKind.ASSIGNED else str(self.kind)


FROZEN = Group(kind=GroupKind.FROZEN)
SHARED = Group(kind=GroupKind.SHARED)
PRIVATE = Group(kind=GroupKind.PRIVATE)


def assigned(layer: int, expert: int) -> Group:
    """Give the group of one expert: ``layer`` is the model's layer index, ``expert`` counts from 0."""
    return Group(kind=GroupKind.ASSIGNED, layer=layer, expert=expert)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParamRef:
    """One exchangeable tensor of a model: a whole parameter, or a strided slice of a fused one.

    Transformers keeps the experts of a layer in one tensor, so expert e is a slice. ``key`` is what travels;
    ``name`` is the parameter in ``model.named_parameters()``. ``part`` says what it is: ``attention``, ``router``,
    ``experts``, ``shared_expert``, ``graft``, ``graft_gate``, ``mixture``, ``mixture_gate``, ``example_gate`` or ``other``;
    ``adapter`` names its LoRA, if it is of one. ``expert`` of a mixture's tensor is its slot, ``layer`` then the decoder layer.
    """

    key: str
    name: str
    part: str
    shape: tuple[int, ...]
    adapter: str | None = None
    layer: int | None = None
    expert: int | None = None
    dim: int | None = None
    start: int = 0
    stop: int = 0
    step: int = 1

    def view(self, parameter: torch.Tensor) -> torch.Tensor:
        """Give the part of ``parameter`` that this reference stands for, as a view that can be written to."""
        if self.dim is None:
            return parameter
        index = [slice(None)] * parameter.ndim
        index[self.dim] = slice(self.start, self.stop, self.step)
        return parameter[tuple(index)]

    @property
    def num_elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True, slots=True)
class Projection:
    """One linear map of an attention block: its module's name below the decoder layer, and its sizes."""

    name: str
    in_features: int
    out_features: int
    has_bias: bool = False

    @property
    def num_elements(self) -> int:
        """Values of its weight and bias."""
        return self.out_features * (self.in_features + self.has_bias)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """What a method may ask of a model before it is loaded: sizes only.

    ``layers`` are the model's own indices of its MoE layers, ascending; ``num_layers`` counts dense ones as well.
    ``attention`` lists the projections of one decoder layer (all layers have the same). ``norm_topk_prob`` says whether the
    weights of a token's chosen experts are divided by their sum. ``num_groups`` is how many groups a router limits its choice to;
    1 where it chooses among all experts of a layer.
    """

    family: str
    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    norm_topk_prob: bool
    attention: tuple[Projection, ...]
    num_layers: int
    num_shared_experts: int = 0
    has_expert_bias: bool = False
    has_router_bias: bool = False
    num_groups: int = 1

    @property
    def expert_elements(self) -> int:
        """Values of one expert: gate, up and down projection, with biases where the family has them."""
        biases = 2 * self.expert_size + self.hidden_size if self.has_expert_bias else 0
        return 3 * self.hidden_size * self.expert_size + biases

    @property
    def num_routed_values(self) -> int:
        """Values of all routed experts of the model."""
        return len(self.layers) * self.num_experts * self.expert_elements


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """One LoRA over parts of the model: ``targets`` among ``attention``, ``router``, ``experts``.

    Rank >= 1; the update is scaled by ``alpha / rank``; ``dropout`` in [0, 1) acts on the LoRA input.
    """

    name: str
    rank: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ("attention",)


@dataclass(frozen=True, kw_only=True, slots=True)
class GraftSpec:
    """Grafted experts beside each MoE layer of ``layers``.

    ``mode``: ``additive`` y = M(x) + sum_j g_j(x) P_j(x); ``convex`` y = (1 - sum_j g_j) M(x) + sum_j g_j P_j(x) with
    g_j scaled by 1 / num_grafts; ``row`` one new router row a graft, softmax over N + num_grafts with the grafts always kept.
    ``num_neurons`` is how many of an expert's neurons a graft has; ``gate_bias`` the initial bias b of
    g(x) = sigmoid(w.x + b); ``is_gate_closed`` fixes g at exactly 0.
    """

    num_grafts: int
    layers: tuple[int, ...]
    num_neurons: int
    mode: Literal["additive", "convex", "row"] = "additive"
    gate_bias: float = -4.0
    is_gate_closed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureSpec:
    """A mixture of LoRA experts beside linear maps of the attention: ``num_slots`` of them at each map in ``targets``.

    ``targets`` are last names of attention projections (``q_proj``). ``gate`` ``token``: each module scores its slots for every
    token by a projection of its own (FedAMoLE), and uses ``top_k`` of them; ``example``: whoever runs the model gives one weight
    an example and slot, the same in all modules, 0 where a slot is not used. ``has_shared`` adds one LoRA that is always on;
    then ``num_slots`` may be 0. Rank >= 1; updates are scaled by ``alpha / rank``; ``dropout`` in [0, 1) acts on the LoRA inputs.
    """

    num_slots: int
    rank: int
    alpha: float
    targets: tuple[str, ...]
    top_k: int
    gate: Literal["token", "example"] = "token"
    has_shared: bool = False
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleGateSpec:
    """A gate that weighs ``num_outputs`` things for a whole example: an MLP with layers of ``hidden`` neurons in between.

    ``start`` is how its weights begin, ``activation`` what stands between layers; ``dropout`` in [0, 1) acts on hidden layers.
    """

    num_outputs: int
    hidden: tuple[int, ...]
    activation: Literal["relu", "leaky_relu"] = "relu"
    start: Literal["orthogonal", "uniform"] = "uniform"
    dropout: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Slots:
    """What a replica's model is built with, once, for a method: adapters, grafts, a mixture, a gate, parts trained in full.

    ``full`` names parts (``experts``, ``router``, ``attention``) whose own weights are copied out of the shared base
    and trained. ``splits_router`` lists a router that is trained in full once per expert, row by row, instead of whole.
    """

    adapters: tuple[AdapterSpec, ...] = ()
    graft: GraftSpec | None = None
    mixture: MixtureSpec | None = None
    example_gate: ExampleGateSpec | None = None
    full: tuple[str, ...] = ()
    splits_router: bool = False
