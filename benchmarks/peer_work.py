"""The workloads of ``peers.py`` for frameworks other than fedgraft: model, data and local step of one client, and the plain loop.

It runs in environments that have no fedgraft, so it imports none. A: a perceptron of two layers (20-32-10), one step of SGD over
a client's ten examples. B: LoRA of rank 8 on the attention of a Qwen2-MoE of 4 layers, 5 steps of AdamW on 4 sequences of 64
tokens.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

STARTED = "PEERS_STARTED"
"""Environment variable with the time (``time.time``) at which a framework's process was started."""
RATES = {"a": 0.1, "b": 1e-3}
EXAMPLES = {"a": 10, "b": 20}
BATCH = 4
VOCABULARY, LENGTH = 512, 64


def given() -> dict[str, Any]:
    """What ``peers.py`` asks for: workload, clients, cohort, rounds, out."""
    found: dict[str, Any] = json.loads(os.environ["PEERS_GIVEN"])
    return found


def make_model(workload: str) -> torch.nn.Module:
    """The model that everybody starts from."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if workload == "a":
        return torch.nn.Sequential(torch.nn.Linear(20, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10))
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        shared_expert_intermediate_size=128,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=LENGTH,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = Qwen2MoeForCausalLM(config)
    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    return model


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """What travels."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def data_of(workload: str, client: int) -> list[torch.Tensor]:
    """A client's examples: x and y, or sequences."""
    if workload == "a":
        drawn = np.random.RandomState(client)
        x, y = drawn.randn(10, 20).astype(np.float32), drawn.randint(0, 10, 10).astype(np.int64)
        return [torch.from_numpy(x), torch.from_numpy(y)]
    drawn = np.random.RandomState(1000 + client)
    return [torch.from_numpy(drawn.randint(0, VOCABULARY, (EXAMPLES["b"], LENGTH)).astype(np.int64))]


def loss_of(workload: str, model: torch.nn.Module, *tensors: torch.Tensor) -> torch.Tensor:
    """The loss of a batch."""
    if workload == "a":
        return torch.nn.functional.cross_entropy(model(tensors[0]), tensors[1])
    loss: torch.Tensor = model(input_ids=tensors[0], labels=tensors[0]).loss
    return loss


def optimizer_of(workload: str) -> Callable[..., torch.optim.Optimizer]:
    """The local optimiser."""
    return torch.optim.SGD if workload == "a" else torch.optim.AdamW


def train(workload: str, model: torch.nn.Module, data: Sequence[torch.Tensor]) -> None:
    """One client's local steps, from what the model holds."""
    optimizer = optimizer_of(workload)(trained(model).values(), lr=RATES[workload])
    size = EXAMPLES["a"] if workload == "a" else BATCH
    for first in range(0, len(data[0]), size):
        optimizer.zero_grad()
        loss_of(workload, model, *(tensor[first : first + size] for tensor in data)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def finish(ends: Sequence[float], params: dict[str, Any]) -> None:
    """Tell ``peers.py`` when rounds ended (``time.time``) and what came out."""
    started = float(os.environ[STARTED])
    out = Path(given()["out"])
    np.savez(out.with_suffix(".npz"), **{name: np.asarray(value) for name, value in params.items()})
    out.write_text(json.dumps({"start_s": ends[0] - started, "round_s": [after - before for before, after in pairwise(ends)]}))


def main() -> None:
    """The plain loop."""
    asked = given()
    workload = asked["workload"]
    model = make_model(workload)
    slots = trained(model)
    params = {name: value.detach().clone() for name, value in slots.items()}
    draw = random.Random(0)
    known: dict[int, list[torch.Tensor]] = {}
    ends = []
    for _ in range(asked["rounds"]):
        total: dict[str, torch.Tensor] = {}
        for client in draw.sample(range(asked["clients"]), asked["cohort"]):
            with torch.no_grad():
                for name, value in slots.items():
                    value.copy_(params[name])
            train(workload, model, known.setdefault(client, data_of(workload, client)))
            with torch.no_grad():
                for name, value in slots.items():
                    total[name] = total[name] + value if name in total else value.detach().clone()
        params = {name: value / asked["cohort"] for name, value in total.items()}
        ends.append(time.time())
    finish(ends, params)


if __name__ == "__main__":
    main()
