"""Plain re-statements of MoE blocks, against which the package is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral")


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in the table, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def plain_expert() -> Callable[[Any, int, torch.Tensor], torch.Tensor]:
    """down(silu(gate x) * (up x)) of one expert of an HF block, written out with slices of its own tensors."""

    def output(block: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate_up, down = block.experts.gate_up_proj[expert], block.experts.down_proj[expert]
        size = gate_up.shape[0] // 2
        gate, up = x @ gate_up[:size].T, x @ gate_up[size:].T
        return (gate * torch.sigmoid(gate) * up) @ down.T

    return output


@pytest.fixture(scope="session")
def plain_routed(plain_expert: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Routed part of an HF block, token by token; ``kept`` prunes: logits of the others are minus infinity."""

    def output(block: Any, x: torch.Tensor, top_k: int, *, normalise: bool, kept: tuple[int, ...] | None = None) -> torch.Tensor:
        logits = x @ block.gate.weight.T
        if kept is not None:
            mask = torch.full((logits.shape[1],), float("-inf"))
            mask[list(kept)] = 0
            logits = logits + mask
        rows = []
        for row, logit in zip(x, logits, strict=True):
            chances = torch.softmax(logit, dim=0)
            weights, chosen = torch.topk(chances, min(top_k, len(kept)) if kept is not None else top_k)
            if normalise:
                weights = weights / weights.sum()
            parts = [w * plain_expert(block, int(e), row[None])[0] for w, e in zip(weights, chosen, strict=True)]
            rows.append(torch.stack(parts).sum(dim=0))
        return torch.stack(rows)

    return output


@pytest.fixture(scope="session")
def plain_shared() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Output of Qwen2's gated shared expert; zero where a block has none."""

    def output(block: Any, x: torch.Tensor) -> torch.Tensor:
        if not hasattr(block, "shared_expert"):
            return torch.zeros_like(x)
        expert = block.shared_expert
        hidden = F.silu(x @ expert.gate_proj.weight.T) * (x @ expert.up_proj.weight.T)
        return torch.sigmoid(x @ block.shared_expert_gate.weight.T) * (hidden @ expert.down_proj.weight.T)

    return output


@pytest.fixture(scope="session")
def block_inputs() -> Callable[..., dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of every MoE block of an HF model on one batch, (T, D) each, padding left out, by layer index."""

    def collect(model: Any, batch: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        kept = batch.attention_mask.reshape(-1).bool()

        def hook(index: int) -> Any:
            def save(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                width = output.shape[-1]
                found[index] = (args[0].reshape(-1, width)[kept].clone(), output.reshape(-1, width)[kept].clone())

            return save

        handles = [
            layer.mlp.register_forward_hook(hook(index))
            for index, layer in enumerate(model.model.layers)
            if hasattr(layer.mlp, "experts")
        ]
        with torch.no_grad():
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for handle in handles:
            handle.remove()
        return found

    return collect
