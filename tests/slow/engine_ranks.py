"""What one rank of two does for ``test_engine_ranks.py``: ``python engine_ranks.py CASE OUT`` with RANK and the like set.

CASE is a pickled mapping; what this rank found at each of its stages goes to ``OUT/<stage>-<rank>.pt``. ``train_with`` and
``evaluate_with`` know nothing of ranks, so that the test runs them on the reference engine as well.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedgraft.errors import FedgraftError
from fedgraft.moe.base import open_base
from fedgraft.platform.worker import ClientWorker, WorkerSpec
from fedgraft.protocols import Engine, TrainResult, TrainSpec
from fedgraft.training.config import EngineConfig, deepspeed_settings
from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
from fedgraft.training.ranks import Ranks, close_ranks, open_ranks
from fedgraft.types import Batch, Broadcast, EvaluationTask, ParamRef, Params, Weighted

SGD = TrainSpec(learning_rate=0.05, optimizer="sgd", max_grad_norm=None)
ADAMW = TrainSpec(learning_rate=0.02, weight_decay=0.1, max_grad_norm=0.5)

Make = Callable[[TrainSpec, Callable[[ParamRef], SlotPolicy]], Engine]


def plain(ref: ParamRef) -> SlotPolicy:
    return SlotPolicy()


def keeps_grafts(ref: ParamRef) -> SlotPolicy:
    return SlotPolicy(persists_moments=ref.part == "graft", lr_scale=0.5 if ref.part == "graft_gate" else 1.0)


def start(engine: Engine, seed: int) -> Params:
    """A client's own values for every slot, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    return {key: value + 0.05 * torch.randn(value.shape, generator=generator) for key, value in engine.initial.items()}


def host(engine: Engine, seed: int, batches: Sequence[Batch], spec: TrainSpec, **options: Any) -> tuple[TrainResult, Params]:
    """Load a client's values, train, read back."""
    keys = tuple(ref.key for ref in engine.refs)
    engine.load(engine.initial)
    engine.load(start(engine, seed))
    result = engine.train(batches, spec, options.pop("keys", keys), seed=1, **options)
    return result, engine.read(keys)


def constant_term(engine: Engine) -> Callable[[Batch, Any], Mapping[str, torch.Tensor]]:
    """A term of the first LoRA's weights alone, taken through a forward pass because sharded weights have no values else."""
    module = next(found for name, found in engine.model.named_modules() if name.endswith("lora_A.shared"))
    columns: int = module.in_features

    def terms(batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        weight = module(torch.eye(columns).requires_grad_())
        return {"size": 0.7 * weight.square().sum()}

    return terms


def mean_term(batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
    """A mean over the label tokens at hand."""
    return {"logits": 0.1 * output.logits.float().square().mean(dim=1).mean()}


def breaks_at(token: int) -> Callable[[Batch, Any], Mapping[str, torch.Tensor]]:
    """Not finite where a row begins with this token."""

    def terms(batch: Batch, output: Any) -> Mapping[str, torch.Tensor]:
        return {"bad": torch.tensor(float("nan") if bool((batch.input_ids[:, 0] == token).any()) else 0.0)}

    return terms


def train_with(make: Make, batches: Sequence[Batch], many_rows: Sequence[Batch], *, num_parts: Sequence[int]) -> dict[str, Any]:
    """Train in all ways, by name: with SGD for each number of parts, then with AdamW, both after other clients and errors.

    Batches of ``many_rows`` have a row for every part of every rank.
    """
    found: dict[str, Any] = {}
    engine = make(SGD, plain)
    for parts in num_parts:
        spec = replace(SGD, num_parts=parts)
        found[f"sgd {parts}"] = host(engine, 4, batches, spec)
        found[f"constant {parts}"] = host(engine, 4, batches, spec, terms=constant_term(engine))
        found[f"mean {parts}"] = host(engine, 4, many_rows, spec, terms=mean_term)
        found[f"mean of few {parts}"] = _tried(lambda spec=spec: host(engine, 4, batches, spec, terms=mean_term))
        found[f"hook {parts}"], found[f"gradients {parts}"] = _with_hook(engine, batches, spec)
    found["errors"] = [_error(engine, batches, row) for row in (0, 2)]
    found["other sgd"] = host(engine, 5, batches[::-1], SGD)
    found["sgd again"] = host(engine, 4, batches, SGD)
    engine.close()

    engine = make(ADAMW, keeps_grafts)
    scale = {ref.key: keeps_grafts(ref).lr_scale for ref in engine.refs}
    kept = tuple(ref.key for ref in engine.refs if keeps_grafts(ref).persists_moments)
    for parts in num_parts:
        spec = replace(ADAMW, num_parts=parts, lr_scale=scale)
        found[f"adamw {parts}"] = host(engine, 4, batches, spec, keep_optimizer_state=kept)
        found[f"some {parts}"] = host(engine, 4, batches, spec, keys=tuple(ref.key for ref in engine.refs)[::2])
    moments = found["adamw 1"][0].optimizer_state
    spec = replace(ADAMW, lr_scale=scale)
    found["other adamw"] = host(engine, 5, batches[::-1], spec)
    found["continued"] = host(engine, 6, batches, spec, optimizer_state=moments)
    found["adamw again"] = host(engine, 4, batches, spec, keep_optimizer_state=kept)
    engine.close()
    return found


def _with_hook(engine: Engine, batches: Sequence[Batch], spec: TrainSpec) -> tuple[Any, list[Params]]:
    keys = tuple(ref.key for ref in engine.refs)
    seen: list[Params] = []

    def change(step: int) -> None:
        seen.append(engine.read_gradients(keys))
        engine.write_gradients({key: 0.5 * seen[-1][key] + 0.01 for key in keys[::2]})

    return host(engine, 4, batches, spec, after_backward=change), seen


def _error(engine: Engine, batches: Sequence[Batch], row: int) -> Any:
    """What an engine says of a batch of which one row gives no finite loss."""
    return _tried(lambda: host(engine, 4, batches, SGD, terms=breaks_at(int(batches[0].input_ids[row, 0]))))


def _tried(train: Callable[[], Any]) -> Any:
    """What it gives, or what it says."""
    try:
        return train()
    except FedgraftError as error:
        return f"{type(error).__name__}: {error}"


def evaluate_with(worker: ClientWorker, tasks: Sequence[EvaluationTask], params: Params) -> list[dict[Any, Weighted]]:
    """Judge a model, by task and metric."""
    replies = [worker.evaluate(task, Broadcast(round_idx=1, params=params))[0] for task in tasks]
    return [{(row.task, row.metric): row.value for row in reply.rows} for reply in replies]


def shares(engine: Engine) -> list[tuple[list[int], Weighted]]:
    """Of 0, 1, 2 and 5 items: this rank's, and the sum over all ranks of its own."""
    found = []
    for count in (0, 1, 2, 5):
        own = list(engine.own_share(range(10, 10 + count)))
        total = engine.add_up({"other": Weighted(total=1.0, weight=1.0), "sum": Weighted(total=sum(own), weight=len(own))})
        found.append((own, total["sum"]))
    assert engine.add_up({}) == {}
    return found


def run(case: Mapping[str, Any], config: EngineConfig, ranks: Ranks) -> dict[str, Any]:
    """Do all of one ZeRO stage."""

    def make(spec: TrainSpec, policy: Callable[[ParamRef], SlotPolicy]) -> Engine:
        settings = deepspeed_settings(config, batch_size=3, dtype="float32", max_grad_norm=spec.max_grad_norm)
        model = open_base(Path(case["base"]), "cpu")
        return DeepSpeedEngine(model, case["slots"], 3, settings=settings, spec=spec, ranks=ranks, device="cpu", policy=policy)

    found = train_with(make, case["batches"], case["many_rows"], num_parts=(1, 2))
    spec: WorkerSpec = case["worker"]
    worker = replace(spec, engine=config, timeout_s=60.0).build()
    found["evaluated"] = evaluate_with(worker, case["tasks"], case["params"])
    found["shares"] = shares(worker.engine)
    worker.close()
    return found


def main(case_file: Path, out: Path) -> None:
    """Do one stage after another."""
    torch.set_num_threads(1)
    case = pickle.loads(case_file.read_bytes())
    ranks = open_ranks("cpu", 60.0, world_size=2)
    for config in case["engines"]:
        torch.save(run(case, config, ranks), out / f"{config.stage}-{ranks.rank}.pt")
    close_ranks()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
