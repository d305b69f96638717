"""What one rank of two does for ``test_expert_parallel.py``: ``python two_ranks.py CASES OUT`` with RANK and the like set.

CASES is a pickled list of mappings; each case's results go to ``OUT/<number>-<rank>.pt``.
"""

from __future__ import annotations

import gc
import os
import pickle
import sys
import weakref
from pathlib import Path
from typing import Any

import torch

from fedgraft.errors import FedgraftError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import moe_layers
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.decode import decode_greedy
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import Ranks, close_ranks, open_ranks
from fedgraft.types import Batch


def logits(model: Any, batch: Batch) -> torch.Tensor:
    with torch.inference_mode():
        found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found.clone()  # type: ignore[no-any-return]


def run(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Build the case's engine; look, train, look again."""
    spec, batches = case["spec"], case["batches"]
    config = EngineConfig(name="deepspeed", world_size=ranks.world_size, **case["engine"])
    settings = deepspeed_settings(config, batch_size=4, dtype=case.get("dtype", "float32"), max_grad_norm=spec.max_grad_norm)
    model = open_base(Path(case["base"]), "cpu")
    whole = [weakref.ref(layer.experts.gate_up_proj) for layer in moe_layers(model)]
    engine = DeepSpeedEngine(
        model, case["slots"], 3, settings=settings, spec=spec, ranks=ranks, device="cpu", policy=lambda ref: SlotPolicy()
    )
    found: dict[str, Any] = {"hash": engine.frozen_hash(), "names": [name for name, _ in model.named_parameters()]}
    gc.collect()
    found["kept"] = [each() is not None for each in whole]
    if case.get("rounds otherwise"):
        for layer in moe_layers(model):
            layer.experts.spread.register_forward_hook(lambda module, args, output: output + 1e-3 * ranks.rank)
    engine.load(case["start"])
    keys = tuple(ref.key for ref in engine.refs)
    found["start"] = engine.read(keys)
    found["before"] = logits(model, batches[0])
    if case.get("differ"):
        try:
            logits(model, batches[ranks.rank])
        except FedgraftError as error:
            found["error"] = str(error)
        return found
    if case.get("rounds otherwise"):
        return found
    if case.get("breaks"):
        try:
            engine.train(batches, spec, keys, seed=1, after_backward=fail)
        except ZeroDivisionError:
            found["broke"] = True
        engine.load(case["start"])
    result = engine.train(batches, spec, keys, seed=1)
    found["trained"] = engine.read(keys)
    found["losses"], found["counts"] = result.losses, result.expert_tokens
    found["after"] = logits(model, batches[0])
    found["hash after"] = engine.frozen_hash()
    if case.get("reads"):
        found["answers"] = decode_greedy(
            model, [[5, 6, 7], [8, 9]], max_new_tokens=5, eos_token_id=1, pad_token_id=0, batch_size=2
        )
        found["experts"] = [torch.stack([layer.expert_weights(e)[0] for e in range(4)]) for layer in moe_layers(model)]
        found["outputs"] = [layer.expert_output(3, case["tokens"]) for layer in moe_layers(model)]
    engine.close()
    return found


def fail(step: int) -> None:
    """Break a local step off."""
    raise ZeroDivisionError


def main(cases: Path, out: Path) -> None:
    """Run all cases, one after another."""
    torch.set_num_threads(1)
    ranks = open_ranks("cpu", 60.0, int(os.environ["WORLD_SIZE"]))
    with cases.open("rb") as file:
        todo = pickle.load(file)
    for number, case in enumerate(todo):
        found = run(case, ranks)
        torch.save(found, out / f"{number}-{ranks.rank}.pt")
    close_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
