"""Run by test_memory_plan.py in a process of its own: what a training and an evaluation really take, beside the plan of them.

    python memory_probe.py '{"hidden_size": 256, ...}' METHOD DTYPE BATCH LENGTH

Prints one JSON line, bytes: ``live`` is the most that PyTorch's own count of allocations has at a time, ``grown`` the most that
the process's private memory (resident less shared pages) grew by.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from fedgraft.moe.base import open_base
from fedgraft.platform.loading import load_config
from fedgraft.platform.memory import rank_memory
from fedgraft.platform.model_sizes import read_hf_config, size_model, size_slots
from fedgraft.protocols import TrainSpec
from fedgraft.registry import METHODS
from fedgraft.training.evaluate import score_batches
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, Batch


def private() -> int:
    resident, shared = Path("/proc/self/statm").read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def grown_by(work: Callable[[], object]) -> int:
    """The most that private memory grew by, looked at every millisecond from another thread."""
    start = most = private()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.001):
            most = max(most, private())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    is_over.set()
    watcher.join()
    return max(most, private()) - start


def live_in(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    events = [each for each in found.profiler.kineto_results.events() if each.name() == "[memory]"]  # type: ignore[union-attr]
    total = most = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def batches(vocabulary: int, rows: int, length: int, count: int) -> Iterator[Batch]:
    for _ in range(count):
        ids = torch.randint(vocabulary, (rows, length))
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0
        yield Batch(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, IGNORE_INDEX))


def measure(sizes: dict[str, int], method: str, dtype: str, rows: int, length: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    width = sizes["moe_intermediate_size"]
    hf = Qwen2MoeConfig(
        **sizes,
        num_attention_heads=4,
        num_key_value_heads=4,
        shared_expert_intermediate_size=width,
        intermediate_size=width,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory(prefix="fedgraft-probe-") as folder:
        model = AutoModelForCausalLM.from_config(hf, dtype=dtype)
        hf.save_pretrained(folder)
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, Path(folder) / "model.safetensors")
        del model
        overrides = (
            *(f"model.path={folder}", f"model.dtype={dtype}", f"method={{name: {method}}}", f"data.max_length={length}"),
            *(f"federation.batch_size={rows}", f"evaluation={{batch_size: {rows}, generate: never}}"),
        )
        config = load_config(None, overrides)
        assert config.method is not None
        built = METHODS.build(config.method)
        facts = size_model(config.model, read_hf_config(config.model))
        slots = size_slots(built, hf, dtype, facts.facts)
        planned = rank_memory(config, facts, slots, on_gpu=False)
        spec, engines = TrainSpec(learning_rate=1e-3), []

        def train(count: int) -> None:
            keys = [ref.key for ref in engines[0].refs]
            engines[0].train(batches(hf.vocab_size, rows, length, count), spec, keys, seed=0)

        def build_and_train() -> None:
            engines.append(TorchEngine(open_base(Path(folder)), built.slots(facts.facts), 0))
            train(2)

        # Libraries are imported and threads started before anything is counted.
        small = TorchEngine(open_base(Path(folder)), built.slots(facts.facts), 0)
        small.train(batches(hf.vocab_size, 1, 8, 1), spec, [ref.key for ref in small.refs], seed=0)
        del small
        grown = grown_by(build_and_train)
        live = live_in(lambda: train(1))
        judged = live_in(lambda: score_batches(engines[0].model, batches(hf.vocab_size, rows, length, 1)))
    in_step = planned.gradients + planned.optimizer + planned.training
    return {
        "live": live,
        "planned_live": in_step,
        "judged": judged,
        "planned_judged": planned.evaluation,
        "grown": grown,
        "planned_grown": in_step + planned.weights + planned.graft + planned.heap + 4 * slots.values,
    }


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
