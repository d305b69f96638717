"""Mixtures of LoRA experts: beside a linear map y = W x of the attention, several low-rank maps that a gate weighs.

h = W x + c B_s A_s x + c sum_j p_j B_j A_j x, with c = alpha / rank, A_s and B_s one LoRA that is always on (if asked for), and
p_j the weight of slot j. A gate of kind ``token`` (FedAMoLE, arXiv 2411.19128) scores slot j on token x by how its own first
map A_j x agrees with the projection T x of the token, (A_j x) . (T x) / sqrt(rank); p is the softmax over the slots in use, cut
to the top-k and divided by its sum. Since T and A_j have the same shape in every client, it works for any number of slots. With
a gate of kind ``example`` whoever runs the model gives one weight an example and slot, the same in all modules.

B starts at zero, so a fresh mixture leaves the model as it was. Dropout acts on what LoRAs read, never on what the gate reads.

Shape letters: B rows, S slots, T tokens (of any leading shape), K top-k, R rank, I input and O output features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import ModelError
from fedgraft.moe.families import family_of, unwrap
from fedgraft.types import Batch, MixtureSpec

__all__ = [
    "MIXTURE",
    "Mixture",
    "MixtureWatch",
    "active_slots",
    "attach_mixtures",
    "example_weights",
    "linear_of",
    "mean_inputs",
    "mixtures_of",
    "set_example_weights",
    "token_weights",
    "without_mixtures",
]

MIXTURE = "mixture"
"""Name of the submodule that a linear map with a mixture gains."""


class Mixture(nn.Module):
    """The LoRA experts of one linear map: ``lora_A`` (S, R, I), ``lora_B`` (S, O, R) if it has slots; ``shared_A`` (R, I),
    ``shared_B`` (O, R) if ``has_shared``; ``token_projection`` (R, I) if the gate is of kind ``token``.

    ``num_active``: slots 0 to ``num_active - 1`` are in use, the others are as if they were not there.

    Args:
        in_features: I.
        out_features: O.
        spec: Slots, rank and gate.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    shared_A: nn.Parameter
    shared_B: nn.Parameter
    token_projection: nn.Parameter

    def __init__(self, in_features: int, out_features: int, spec: MixtureSpec) -> None:
        super().__init__()
        slots, rank = spec.num_slots, spec.rank
        shapes: dict[str, tuple[int, ...] | None] = {
            "lora_A": (slots, rank, in_features) if slots else None,
            "lora_B": (slots, out_features, rank) if slots else None,
            "shared_A": (rank, in_features) if spec.has_shared else None,
            "shared_B": (out_features, rank) if spec.has_shared else None,
            "token_projection": (rank, in_features) if slots and spec.gate == "token" else None,
        }
        for name, shape in shapes.items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.zeros(shape)))
        self.spec = spec
        self.in_features = in_features
        self.out_features = out_features
        self.num_active = slots
        self.is_enabled = True
        self.example_weights: torch.Tensor | None = None
        self.watcher: Callable[[torch.Tensor, torch.Tensor], None] | None = None
        self._scale = spec.alpha / spec.rank
        self._dropout = nn.Dropout(spec.dropout)

    def forward(self, x_TI: torch.Tensor, output_TO: torch.Tensor) -> torch.Tensor:
        """Turn the linear map's output W x into h; computed in the mixture's dtype, given back in the map's."""
        dtype = output_TO.dtype
        x_TI = x_TI.to((self.shared_A if self.spec.has_shared else self.lora_A).dtype)
        if self.spec.has_shared:
            # The order of PEFT's LoRA, operation by operation: a mixture without slots is that LoRA to the bit.
            output_TO = output_TO + F.linear(F.linear(self._dropout(x_TI), self.shared_A), self.shared_B) * self._scale
        if self.num_active and (self.spec.gate == "token" or self.example_weights is not None):
            output_TO = output_TO + self._expert_sum(x_TI)
        return output_TO.to(dtype)

    def _expert_sum(self, x_TI: torch.Tensor) -> torch.Tensor:
        """c sum_j p_j B_j A_j x, (T, O): all slots in two products, since p_j is 0 where a slot is not chosen."""
        count, rank = self.num_active, self.spec.rank
        lora_A = self.lora_A[:count].reshape(count * rank, self.in_features)
        lora_B = self.lora_B[:count].permute(1, 0, 2).reshape(self.out_features, count * rank)
        hidden_TSR = _by_slot(F.linear(self._dropout(x_TI), lora_A), rank)
        if self.spec.gate == "example":
            weight_TS = self._row_weights(x_TI)
        else:
            is_dropped = self.training and self.spec.dropout > 0
            embedding_TSR = _by_slot(F.linear(x_TI, lora_A), rank) if is_dropped else hidden_TSR
            weight_TS = self._gate(embedding_TSR, F.linear(x_TI, self.token_projection))
        return F.linear((hidden_TSR * weight_TS.unsqueeze(-1)).flatten(-2), lora_B) * self._scale

    def _gate(self, embedding_TSR: torch.Tensor, token_TR: torch.Tensor) -> torch.Tensor:
        probs_TS, chosen_TK, weight_TS = token_weights(embedding_TSR, token_TR, self.spec.top_k)
        if self.watcher is not None:
            self.watcher(probs_TS.flatten(0, -2), chosen_TK.flatten(0, -2))
        return weight_TS.to(embedding_TSR.dtype)

    def _row_weights(self, x_BTI: torch.Tensor) -> torch.Tensor:
        """The given weights for every token of a row, (B, 1, S)."""
        weight_BS = self.example_weights
        assert weight_BS is not None
        if x_BTI.dim() != 3 or len(weight_BS) != len(x_BTI) or weight_BS.shape[1] < self.num_active:
            raise ModelError(
                f"a mixture got weights {tuple(weight_BS.shape)} for an input {tuple(x_BTI.shape)} with {self.num_active} slots "
                "in use",
                "give one row of weights for each row of the batch, and a column for each slot",
            )
        return weight_BS[:, : self.num_active].to(x_BTI.dtype).unsqueeze(1)


def _by_slot(flat_TX: torch.Tensor, rank: int) -> torch.Tensor:
    return flat_TX.reshape(*flat_TX.shape[:-1], -1, rank)


def token_weights(
    embedding_TSR: torch.Tensor, token_TR: torch.Tensor, top_k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weigh slots by how their embeddings agree with each token's.

    Args:
        embedding_TSR: A_j x for each slot.
        token_TR: T x.
        top_k: Slots a token, >= 1; all where there are fewer.

    Returns:
        Softmax over the slots (T, S), float32; the chosen slots (T, K); their weights, which sum to 1, 0 elsewhere (T, S).
    """
    logits_TS = (embedding_TSR * token_TR.unsqueeze(-2)).sum(dim=-1) / math.sqrt(token_TR.shape[-1])
    probs_TS = torch.softmax(logits_TS.float(), dim=-1)
    kept_TK, chosen_TK = probs_TS.topk(min(top_k, probs_TS.shape[-1]), dim=-1)
    share_TK = kept_TK / kept_TK.sum(dim=-1, keepdim=True)
    return probs_TS, chosen_TK, torch.zeros_like(probs_TS).scatter(-1, chosen_TK, share_TK)


def attach_mixtures(model: nn.Module, spec: MixtureSpec) -> None:
    """Give each attention map named in ``spec.targets`` a ``Mixture``, added to the map's output by a forward hook.

    No existing parameter changes its name or its value.

    Raises:
        ModelError: A target is no attention map of this model, or the spec has nothing to attach.
    """
    if (not spec.num_slots and not spec.has_shared) or spec.top_k < 1:
        raise ModelError(
            f"a mixture of {spec.num_slots} slots, top-{spec.top_k}, without a shared LoRA does nothing",
            "take at least one slot and a top-k of 1, or a shared LoRA",
        )
    known = dict(_attention_maps(model))
    names = {path.rpartition(".")[2] for path in known}
    unknown = [target for target in spec.targets if target not in names]
    if unknown or not spec.targets:
        raise ModelError(
            f"a mixture cannot be put beside {', '.join(unknown) or 'nothing'} of this {model.config.model_type} model",  # type: ignore[union-attr]
            f"its attention maps are {', '.join(sorted(names))}",
        )
    for path, linear in known.items():
        if path.rpartition(".")[2] in spec.targets:
            weight: torch.Tensor = linear.weight  # type: ignore[assignment]
            mixture = Mixture(weight.shape[1], weight.shape[0], spec).to(weight.device)
            linear.add_module(MIXTURE, mixture)
            linear.register_forward_hook(_apply_mixture)


def _attention_maps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The attention's linear maps by dotted path, wrappers left out; a layer may lack some."""
    for index in range(int(model.config.num_hidden_layers)):  # type: ignore[union-attr, arg-type]
        layer = model.get_submodule(f"model.layers.{index}")
        for name in family_of(model.config).attention:
            try:
                linear = unwrap(layer.get_submodule(name))
            except AttributeError:
                continue
            yield f"model.layers.{index}.{name}", linear


def _apply_mixture(linear: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
    mixture = linear.get_submodule(MIXTURE)
    assert isinstance(mixture, Mixture)
    if not mixture.is_enabled:
        return output
    mixed: torch.Tensor = mixture(args[0], output)
    return mixed


def linear_of(name: str) -> str:
    """Dotted path of the linear map that a mixture's module, parameter or slot belongs to; PEFT's wrappers are left out."""
    return name.replace(".base_layer", "").partition(f".{MIXTURE}")[0]


def mixtures_of(model: nn.Module) -> dict[str, Mixture]:
    """The mixtures of a model by the dotted path of their linear map, in the model's order; empty where it has none."""
    return {linear_of(name): module for name, module in model.named_modules() if isinstance(module, Mixture)}


@contextmanager
def active_slots(model: nn.Module, count: int | Mapping[str, int]) -> Iterator[None]:
    """Use only the first slots of every mixture for a while.

    Args:
        model: With mixtures.
        count: How many, 0 to S; or how many by the path of the linear map, those not named keep theirs.

    Raises:
        ModelError: More than a mixture has, or a path without one.
    """
    mixtures = mixtures_of(model)
    wanted = dict.fromkeys(mixtures, count) if isinstance(count, int) else dict(count)
    for path, number in wanted.items():
        if path not in mixtures:
            raise ModelError(f"{path} has no mixture", f"there are some at {', '.join(list(mixtures)[:4]) or 'no place'}")
        if not 0 <= number <= mixtures[path].spec.num_slots:
            raise ModelError(f"{path} has {mixtures[path].spec.num_slots} slots, {number} were asked for", "take fewer")
    before = {path: mixtures[path].num_active for path in wanted}
    for path, number in wanted.items():
        mixtures[path].num_active = number
    try:
        yield
    finally:
        for path, number in before.items():
            mixtures[path].num_active = number


def set_example_weights(model: nn.Module, weight_BS: torch.Tensor | None) -> None:
    """Give the weights of the slots for each row of the passes to come, (B, S); ``None``: only shared LoRAs act.

    They may carry a graph, and are taken as they are, neither cut to top-k nor normalised; columns of slots that are not in use
    are ignored. Every token of a row gets the row's weights, also one that is decoded on its own with a cache.
    """
    for mixture in mixtures_of(model).values():
        mixture.example_weights = weight_BS


@contextmanager
def example_weights(model: nn.Module, weight_BS: torch.Tensor | None) -> Iterator[None]:
    """As ``set_example_weights``, for a while; then the weights are what they were before. May be nested."""
    before = {path: mixture.example_weights for path, mixture in mixtures_of(model).items()}
    set_example_weights(model, weight_BS)
    try:
        yield
    finally:
        for path, mixture in mixtures_of(model).items():
            mixture.example_weights = before[path]


@contextmanager
def without_mixtures(model: nn.Module) -> Iterator[None]:
    """Switch the mixtures of a model off for a while, shared LoRAs too: it then computes what it computed without them."""
    mixtures = mixtures_of(model).values()
    before = [mixture.is_enabled for mixture in mixtures]
    for mixture in mixtures:
        mixture.is_enabled = False
    try:
        yield
    finally:
        for mixture, was_enabled in zip(mixtures, before, strict=True):
            mixture.is_enabled = was_enabled


class MixtureWatch:
    """Keeps what every gate of kind ``token`` gave in the last forward pass, with its graph; a context manager.

    ``probabilities`` (T, S) over the slots in use and ``chosen`` (T, K) by the path of the linear map, T all tokens of the batch
    row by row, padding among them; mixtures with no slot in use are missing.
    """

    def __init__(self, model: nn.Module) -> None:
        self._mixtures = mixtures_of(model)
        self.probabilities: dict[str, torch.Tensor] = {}
        self.chosen: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Self:
        for path, mixture in self._mixtures.items():

            def note(probs_TS: torch.Tensor, chosen_TK: torch.Tensor, path: str = path) -> None:
                self.probabilities[path], self.chosen[path] = probs_TS, chosen_TK

            mixture.watcher = note
        return self

    def __exit__(self, *error: object) -> None:
        for mixture in self._mixtures.values():
            mixture.watcher = None
        self.clear()

    def clear(self) -> None:
        """Forget the last pass, and let go of its graph."""
        self.probabilities.clear()
        self.chosen.clear()


def mean_inputs(model: nn.Module, batches: Iterable[Batch]) -> dict[str, torch.Tensor]:
    """Run the model over batches and average what goes into each linear map that has a mixture.

    Args:
        model: An HF causal LM in eval mode, its mixtures as they are to act meanwhile.
        batches: What it runs over.

    Returns:
        Mean over all tokens but padding, (I), float64 on the CPU, by the path of the linear map; empty without a token.
    """
    device = next(model.parameters()).device
    mask: list[torch.Tensor] = []
    sums: dict[str, torch.Tensor] = {}
    num_tokens = 0
    handles = []
    paths = mixtures_of(model)
    for path, linear in _attention_maps(model):
        if path not in paths:
            continue

        def add(module: nn.Module, args: tuple[torch.Tensor, ...], path: str = path) -> None:
            total = args[0].reshape(-1, args[0].shape[-1])[mask[0]].double().sum(dim=0).cpu()
            sums[path] = sums[path] + total if path in sums else total

        handles.append(linear.register_forward_pre_hook(add))
    try:
        with torch.inference_mode():
            for batch in batches:
                mask[:] = [batch.attention_mask.reshape(-1).bool().to(device)]
                num_tokens += int(batch.attention_mask.sum())
                model.model(  # type: ignore[operator]
                    input_ids=batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device), use_cache=False
                )
    finally:
        for handle in handles:
            handle.remove()
    return {path: total.clone() / num_tokens for path, total in sums.items()}
