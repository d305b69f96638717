"""Plain re-statements of MoE blocks, against which the package is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

FAMILIES = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss")
CHOOSES_NORMALISATION = ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3")
NEVER_NORMALISES = ("deepseek_v2",)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    """Each family in the table, one after the other."""
    return str(request.param)


@pytest.fixture(scope="session")
def all_families() -> tuple[str, ...]:
    """Every family that these tests cover."""
    return FAMILIES


@pytest.fixture(params=[False, True], ids=["plain", "normalised"])
def normalised(request: pytest.FixtureRequest, family: str) -> tuple[bool, dict[str, bool]]:
    """Whether weights are normalised, and the config's field for it; what a family cannot do is skipped."""
    wanted = bool(request.param)
    if family in CHOOSES_NORMALISATION:
        return wanted, {"norm_topk_prob": wanted}
    if wanted == (family in NEVER_NORMALISES):
        pytest.skip(f"{family} {'never' if wanted else 'always'} normalises")
    return wanted, {}


def router_of(block: Any) -> Any:
    return block.router if hasattr(block, "router") else block.gate


@pytest.fixture(scope="session")
def plain_logits() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Raw router scores of an HF block."""

    def logits(block: Any, x: torch.Tensor) -> torch.Tensor:
        router = router_of(block)
        found: torch.Tensor = x @ router.weight.T
        return found + router.bias if hasattr(router, "bias") else found

    return logits


@pytest.fixture(scope="session")
def run_block() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Output of an HF block on tokens (T, D)."""

    def run(block: Any, x: torch.Tensor) -> torch.Tensor:
        output = block(x[None])
        found: torch.Tensor = output[0][0] if isinstance(output, tuple) else output[0]
        return found

    return run


@pytest.fixture(scope="session")
def plain_neurons() -> Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]:
    """What a block's experts make of gate and up: silu(gate) * up, or GPT-OSS's clamped form."""

    def neurons(block: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        if hasattr(block, "router"):
            gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
            return (up + 1) * gate * torch.sigmoid(1.702 * gate)
        return gate * torch.sigmoid(gate) * up

    return neurons


@pytest.fixture(scope="session")
def plain_hidden(plain_neurons: Callable[..., torch.Tensor]) -> Callable[[Any, int, torch.Tensor], torch.Tensor]:
    """Neurons of one expert of an HF block, written out with slices of its own tensors."""

    def output(block: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        gate_up = block.experts.gate_up_proj[expert]
        if hasattr(block, "router"):
            both = x @ gate_up + block.experts.gate_up_proj_bias[expert]
            return plain_neurons(block, both[:, 0::2], both[:, 1::2])
        size = gate_up.shape[0] // 2
        return plain_neurons(block, x @ gate_up[:size].T, x @ gate_up[size:].T)

    return output


@pytest.fixture(scope="session")
def plain_expert(plain_hidden: Callable[..., torch.Tensor]) -> Callable[[Any, int, torch.Tensor], torch.Tensor]:
    """Output of one expert of an HF block, written out with slices of its own tensors."""

    def output(block: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
        hidden, down = plain_hidden(block, expert, x), block.experts.down_proj[expert]
        return hidden @ down + block.experts.down_proj_bias[expert] if hasattr(block, "router") else hidden @ down.T

    return output


@pytest.fixture(scope="session")
def plain_routed(
    plain_expert: Callable[..., torch.Tensor], plain_logits: Callable[..., torch.Tensor]
) -> Callable[..., torch.Tensor]:
    """Routed part of an HF block, token by token; ``kept`` prunes: logits of the others are minus infinity."""

    def output(block: Any, x: torch.Tensor, top_k: int, *, normalise: bool, kept: tuple[int, ...] | None = None) -> torch.Tensor:
        router = router_of(block)
        bias = getattr(router, "e_score_correction_bias", None)
        rows = []
        for row, logit in zip(x, plain_logits(block, x), strict=True):
            candidates = list(kept) if kept is not None else list(range(len(logit)))
            logit = logit[candidates]
            scores = torch.softmax(logit, dim=0) if bias is None else 1 / (1 + torch.exp(-logit))
            rank = scores if bias is None else scores + bias[candidates]
            chosen = sorted(range(len(candidates)), key=lambda i, r=rank: -float(r[i]))[:top_k]  # type: ignore[misc]
            weights = scores[chosen]
            if normalise:
                weights = weights / weights.sum()
            weights = weights * getattr(router, "routed_scaling_factor", 1.0)
            parts = [w * plain_expert(block, candidates[i], row[None])[0] for w, i in zip(weights, chosen, strict=True)]
            rows.append(torch.stack(parts).sum(dim=0))
        return torch.stack(rows)

    return output


@pytest.fixture(scope="session")
def plain_shared() -> Callable[[Any, torch.Tensor], torch.Tensor]:
    """Output of Qwen2's gated shared expert or of DeepSeek's shared experts; zero where a block has none."""

    def output(block: Any, x: torch.Tensor) -> torch.Tensor:
        expert = getattr(block, "shared_expert", getattr(block, "shared_experts", None))
        if expert is None:
            return torch.zeros_like(x)
        hidden = F.silu(x @ expert.gate_proj.weight.T) * (x @ expert.up_proj.weight.T)
        result = hidden @ expert.down_proj.weight.T
        return torch.sigmoid(x @ block.shared_expert_gate.weight.T) * result if hasattr(block, "shared_expert_gate") else result

    return output


@pytest.fixture(scope="session")
def block_inputs() -> Callable[..., dict[int, tuple[torch.Tensor, torch.Tensor]]]:
    """Input and output of every MoE block of an HF model on one batch, (T, D) each, padding left out, by layer index."""

    def collect(model: Any, batch: Any) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        found: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        kept = batch.attention_mask.reshape(-1).bool()

        def hook(index: int) -> Any:
            def save(module: Any, args: tuple[torch.Tensor, ...], output: Any) -> None:
                output = output[0] if isinstance(output, tuple) else output
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
