"""K clients in one pass against the same clients one after another: seconds, and whether every client gets the same update.

    python benchmarks/cohort.py [--sizes b small] [--slots fedavg flex everywhere] [--clients 1 4 16] [--repeats 5]
    python benchmarks/cohort.py --sizes full --slots flex --clients 16 --device cuda

Both train the same clients from the same start with the same engine options on one thread, in turns; ratios are medians over the
turns, of wall time and of this process's CPU time (which a busy machine disturbs less). ``b`` is workload B's model: 4 layers,
hidden 128, 8 experts top-2, rows of 64 tokens; ``small`` is hidden 64 with rows of 32; ``full`` is for a GPU: hidden 2048, 60
experts top-4, 4 layers, bfloat16, rows of 512. ``ragged`` rows have 1/4 to all of the length. Before the timing both train under
SGD: in float32 no value of any client's update may differ by 1e-5, and tokens that were routed elsewhere are counted. Timed is
AdamW. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedgraft.protocols import TrainResult, TrainSpec
from fedgraft.training.cohort import CohortEngine, Training
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, AdapterSpec, Batch, GraftSpec, Params, Slots


@dataclass(frozen=True, slots=True)
class Size:
    """A model, and the rows of a client's batch: ``batch`` of ``length`` tokens, ``steps`` times."""

    hidden: int
    layers: int
    experts: int
    length: int
    batch: int = 4
    steps: int = 5
    vocabulary: int = 512
    top_k: int = 2
    expert_hidden: int | None = None
    dtype: torch.dtype = torch.float32


SIZES = {
    "b": Size(128, 4, 8, 64),
    "small": Size(64, 4, 8, 32),
    "tiny": Size(32, 2, 4, 8, steps=2),
    "full": Size(2048, 4, 60, 512, batch=2, vocabulary=151_936, top_k=4, expert_hidden=1408, dtype=torch.bfloat16),
}


def make_slots(name: str, size: Size) -> Slots:
    """LoRA of rank 8: of the attention (``fedavg``), with a graft of one expert beside every layer (``flex``), or everywhere."""
    targets = ("attention", "router", "experts") if name == "everywhere" else ("attention",)
    adapter = AdapterSpec(name="shared", rank=8, alpha=16.0, targets=targets)
    layers = tuple(range(size.layers))
    graft = (
        GraftSpec(num_grafts=1, layers=layers, num_neurons=size.expert_hidden or size.hidden, gate_bias=-4.0)
        if name == "flex"
        else None
    )
    return Slots(adapters=(adapter,), graft=graft)


def make_model(size: Size, device: str) -> Qwen2MoeForCausalLM:
    """A random model; its experts differ."""
    torch.manual_seed(0)
    model = Qwen2MoeForCausalLM(
        Qwen2MoeConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.hidden,
            intermediate_size=size.hidden,
            moe_intermediate_size=size.expert_hidden or size.hidden,
            shared_expert_intermediate_size=size.hidden,
            num_hidden_layers=size.layers,
            num_attention_heads=16 if size.hidden >= 1024 else 4,
            num_key_value_heads=16 if size.hidden >= 1024 else 4,
            num_experts=size.experts,
            num_experts_per_tok=size.top_k,
            max_position_embeddings=size.length,
        )
    )
    return model.to(device=device, dtype=size.dtype)


def make_batches(size: Size, client: int, *, is_ragged: bool) -> list[Batch]:
    """One client's batches: random tokens, all of them labels."""
    generator = torch.Generator().manual_seed(client)
    found = []
    for _ in range(size.steps):
        ids = torch.randint(3, size.vocabulary, (size.batch, size.length), generator=generator)
        lengths = torch.full((size.batch,), size.length)
        if is_ragged:
            lengths = torch.randint(size.length // 4, size.length + 1, (size.batch,), generator=generator)
        width = int(lengths.max())
        mask = (torch.arange(width) < lengths.unsqueeze(1)).long()
        ids = ids[:, :width] * mask
        found.append(Batch(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE_INDEX)))
    return found


def measure(
    size: Size, slots_name: str, num_clients: int, repeats: int, *, is_ragged: bool, device: str = "cpu"
) -> dict[str, Any]:
    """Train the clients both ways, in turns."""
    slots = make_slots(slots_name, size)
    plain = TorchEngine(make_model(size, device), slots, 0)
    cohort = CohortEngine(make_model(size, device), slots, 0, num_clients)
    assert cohort.why_not is None
    batches = [make_batches(size, client, is_ragged=is_ragged) for client in range(num_clients)]
    keys = tuple(plain.initial)

    def one_by_one(spec: TrainSpec) -> list[tuple[TrainResult, Params]]:
        found = []
        for own in batches:
            plain.load(plain.initial)
            found.append((plain.train(own, spec, keys, seed=0), plain.read(keys)))
        return found

    def together(spec: TrainSpec) -> list[tuple[TrainResult, Params]]:
        for place in range(num_clients):
            cohort.load(cohort.initial)
            cohort.stash(place)
        results = cohort.train_many([Training(batches=own, spec=spec, keys=keys) for own in batches])
        found = []
        for place, result in enumerate(results):
            assert isinstance(result, TrainResult), result
            cohort.restore(place)
            found.append((result, cohort.read(keys)))
        return found

    sgd = TrainSpec(learning_rate=0.1, optimizer="sgd")
    agreement = compare(one_by_one(sgd), together(sgd), plain.initial)
    if size.dtype is torch.float32:
        assert agreement["largest_difference"] < 1e-5, agreement
    adamw = TrainSpec(learning_rate=1e-3)
    wall, cpu, seconds = [], [], []
    for turn in range(repeats + 1):
        marks = [(time.perf_counter(), time.process_time())]
        for way in (one_by_one, together):
            way(adamw)
            if device == "cuda":
                torch.cuda.synchronize()
            marks.append((time.perf_counter(), time.process_time()))
        if turn:  # the first one warms up
            (w0, c0), (w1, c1), (w2, c2) = marks
            wall.append((w1 - w0) / (w2 - w1))
            cpu.append((c1 - c0) / (c2 - c1))
            seconds.append(c2 - c1)
    return {
        "clients": num_clients,
        "speedup_wall": round(statistics.median(wall), 3),
        "speedup_cpu": round(statistics.median(cpu), 3),
        "cpu_range": [round(min(cpu), 3), round(max(cpu), 3)],
        "cpu_s_together": round(statistics.median(seconds), 4),
        **agreement,
    }


def compare(alone: list[tuple[TrainResult, Params]], found: list[tuple[TrainResult, Params]], start: Params) -> dict[str, Any]:
    """Largest difference of any value of any client's update, the largest move, and tokens routed elsewhere, of how many."""
    largest = moved = 0.0
    elsewhere = tokens = 0
    for (one, values), (other, own) in zip(alone, found, strict=True):
        largest = max([largest, *(float((own[key] - values[key]).abs().max()) for key in values)])
        moved = max([moved, *(float((values[key] - start[key]).abs().max()) for key in values)])
        elsewhere += int((one.expert_tokens - other.expert_tokens).abs().sum()) // 2
        tokens += int(one.expert_tokens.sum())
    return {"largest_difference": largest, "largest_move": moved, "routed_elsewhere": elsewhere, "routed": tokens}


def main() -> None:
    """Measure what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["b", "small"], choices=list(SIZES))
    parser.add_argument("--slots", nargs="+", default=["fedavg", "flex", "everywhere"], choices=["fedavg", "flex", "everywhere"])
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 4, 16])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in arguments.sizes:
        for slots in arguments.slots:
            for is_ragged in (False, True):
                label = f"{name}/{slots}{'/ragged' if is_ragged else ''}"
                clients = arguments.clients if not is_ragged else arguments.clients[-1:]
                found[label] = [
                    measure(SIZES[name], slots, each, arguments.repeats, is_ragged=is_ragged, device=arguments.device)
                    for each in clients
                ]
    machine = {"cores": os.cpu_count(), "threads": 1, "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({"benchmark": "cohort", "repeats": arguments.repeats, "machine": machine, "results": found}))


if __name__ == "__main__":
    main()
