"""A gate over whole examples: a small MLP that reads a prompt's embedding and weighs the slots of a mixture.

The embedding of an example is the mean over its prompt's tokens of what the frozen base gives (its last hidden state, or its
input embeddings); adapters, grafts and mixtures are off meanwhile, and the response is never read. The gate hangs on the
decoder as ``model.example_gate``; it takes no part in the model's own pass: whoever runs the model asks it for weights, and gives
them to the mixtures (``fedgraft.moe.mixture``).

Shape letters: B rows, S sequence length, D model width, N outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from fedgraft.errors import ModelError
from fedgraft.moe.graft import without_grafts
from fedgraft.moe.mixture import without_mixtures
from fedgraft.types import IGNORE_INDEX, Batch, ExampleGateSpec

__all__ = [
    "EXAMPLE_GATE",
    "ExampleGate",
    "PromptEmbedder",
    "attach_example_gate",
    "example_gate_of",
    "gate_start",
    "one_hot_weights",
    "only_base",
    "prompts_of",
    "top_k_weights",
    "without_adapter",
]

EXAMPLE_GATE = "example_gate"
"""Name of the submodule that the decoder of a causal LM gains."""

_ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu}


class ExampleGate(nn.Module):
    """An MLP D -> hidden sizes -> N with biases; dropout before every layer but the first.

    Args:
        in_features: D.
        spec: Sizes, activation, dropout.
    """

    def __init__(self, in_features: int, spec: ExampleGateSpec) -> None:
        super().__init__()
        widths = (in_features, *spec.hidden, spec.num_outputs)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.spec = spec

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        """Scores before the softmax, (B, N), in the dtype of the gate's weights."""
        x_BD = x_BD.to(self.layers[0].weight.dtype)  # type: ignore[arg-type]
        activate = _ACTIVATIONS[self.spec.activation]
        for position, layer in enumerate(self.layers):
            if position:
                x_BD = F.dropout(activate(x_BD), self.spec.dropout, self.training)  # type: ignore[operator]
            x_BD = layer(x_BD)
        return x_BD


def attach_example_gate(model: nn.Module, spec: ExampleGateSpec) -> None:
    """Hang a gate on the decoder of a causal LM; no existing parameter changes its name or its value.

    Raises:
        ModelError: The gate would choose among nothing, or has a hidden layer without neurons.
    """
    if spec.num_outputs < 1 or any(width < 1 for width in spec.hidden):
        raise ModelError(
            f"a gate of sizes {spec.hidden} and {spec.num_outputs} outputs weighs nothing", "take at least one of each"
        )
    device = next(model.parameters()).device
    gate = ExampleGate(int(model.config.hidden_size), spec).to(device)  # type: ignore[union-attr, arg-type]
    model.model.add_module(EXAMPLE_GATE, gate)  # type: ignore[union-attr]


def example_gate_of(model: nn.Module) -> ExampleGate:
    """The gate of a model.

    Raises:
        ModelError: It has none.
    """
    gate = getattr(model.model, EXAMPLE_GATE, None)
    if not isinstance(gate, ExampleGate):
        raise ModelError("this model has no gate over examples", "the method's slots must ask for one (Slots.example_gate)")
    return gate


def gate_start(shape: tuple[int, ...], kind: Literal["orthogonal", "uniform"], generator: torch.Generator) -> torch.Tensor:
    """Start value of a gate's weight (out, in): orthogonal, or uniform in +-1/sqrt(in); biases start at zero."""
    if kind == "orthogonal":
        return nn.init.orthogonal_(torch.empty(shape), generator=generator)
    return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[-1])


def top_k_weights(logits_BN: torch.Tensor, allowed_N: torch.Tensor, top_k: int) -> torch.Tensor:
    """Softmax over the allowed outputs, cut to the ``top_k`` largest and not divided by their sum again.

    Args:
        logits_BN: The gate's scores.
        allowed_N: Bool; the others get no weight. At least one is true.
        top_k: >= 1; all allowed ones where there are fewer; the lower one among equals.

    Returns:
        Weights (B, N), 0 where an output is not used; with a graph if the scores have one.
    """
    probs_BN = torch.softmax(logits_BN.float().masked_fill(~allowed_N, -torch.inf), dim=-1)
    count = min(top_k, int(allowed_N.sum()))
    chosen_BK = torch.argsort(probs_BN, dim=-1, descending=True, stable=True)[:, :count]
    return torch.zeros_like(probs_BN).scatter(-1, chosen_BK, probs_BN.gather(-1, chosen_BK))


@contextmanager
def without_adapter(model: nn.Module, name: str | None = None) -> Iterator[None]:
    """Scale the LoRA called ``name`` (``None``: every LoRA) by 0 for a while: the model computes as if it were not there.

    What may be trained stays as it is, unlike with PEFT's own switch.
    """
    from peft.tuners.lora import LoraLayer  # peft takes seconds to import, and only replicas need it

    before: list[tuple[dict[str, float], dict[str, float]]] = []
    for module in model.modules():
        if isinstance(module, LoraLayer):
            silenced = {each: value for each, value in module.scaling.items() if name is None or each == name}
            before.append((module.scaling, silenced))
            module.scaling.update(dict.fromkeys(silenced, 0.0))
    try:
        yield
    finally:
        for scaling, values in before:
            scaling.update(values)


@contextmanager
def only_base(model: nn.Module) -> Iterator[None]:
    """Switch adapters, grafts and mixtures off for a while, and dropout with them."""
    training = [module for module in model.modules() if module.training]
    with ExitStack() as stack:
        stack.enter_context(without_adapter(model))
        stack.enter_context(without_grafts(model))
        stack.enter_context(without_mixtures(model))
        model.eval()
        try:
            yield
        finally:
            for module in training:
                module.training = True


def prompts_of(batch: Batch) -> torch.Tensor:
    """Which tokens of a batch are prompt, (B, S) bool: those that are read and are no response."""
    return batch.attention_mask.bool() & (batch.labels == IGNORE_INDEX)


class PromptEmbedder:
    """Embeds examples by their prompts, without gradient, and remembers what it has embedded.

    Args:
        model: An HF causal LM, with whatever slots; only its frozen base is used.
        kind: ``hidden``: the base's last hidden state; ``tokens``: its input embeddings, which cost no pass.
    """

    def __init__(self, model: nn.Module, kind: Literal["hidden", "tokens"]) -> None:
        self._model = model
        self._kind = kind
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    def embed(self, input_ids: torch.Tensor, is_prompt: torch.Tensor) -> torch.Tensor:
        """Mean over the prompt's tokens, (B, D) float32 on the model's device; zeros for a row without a prompt.

        Args:
            input_ids: (B, S).
            is_prompt: (B, S), bool; padding on either side is false.
        """
        rows = [tuple(ids[mask].tolist()) for ids, mask in zip(input_ids.cpu(), is_prompt.cpu(), strict=True)]
        missing = list(dict.fromkeys(row for row in rows if row not in self._known))
        if missing:
            self._known.update(zip(missing, self._compute(missing), strict=True))
        return torch.stack([self._known[row] for row in rows])

    @torch.no_grad()
    def _compute(self, rows: list[tuple[int, ...]]) -> torch.Tensor:
        device = next(self._model.parameters()).device
        ids = torch.zeros(len(rows), max(1, *map(len, rows)), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for place, row in enumerate(rows):
            ids[place, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[place, : max(1, len(row))] = 1  # a row of padding alone would be no number; its weight below is 0
        ids, mask = ids.to(device), mask.to(device)
        if self._kind == "tokens":
            x_BSD = self._model.get_input_embeddings()(ids)  # type: ignore[operator]
        else:
            with only_base(self._model):
                x_BSD = self._model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state  # type: ignore[operator]
        length_B = torch.tensor([len(row) for row in rows], device=device)
        weight_BS = mask * (length_B > 0).unsqueeze(1) / length_B.clamp_min(1).unsqueeze(1)
        mean_BD: torch.Tensor = (x_BSD.float() * weight_BS.unsqueeze(-1)).sum(dim=1)
        return mean_BD


def one_hot_weights(index: int, *, rows: int, slots: int, device: torch.device) -> torch.Tensor:
    """Weights (B, S) of a mixture that use one slot for every row."""
    weight_BS = torch.zeros(rows, slots, device=device)
    weight_BS[:, index] = 1
    return weight_BS
