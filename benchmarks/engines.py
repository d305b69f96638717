"""Every engine on the same tasks: ZeRO stage x ranks x number format x offload, beside the plain PyTorch engine.

    python benchmarks/engines.py                     # the bundled model's shape, random weights
    python benchmarks/engines.py --model FOLDER --steps 10

Each row is a replica of its own (processes without Ray): it hosts client A, then B, then A again, each for some local steps of
FLEx (LoRA on attention, one grafted expert a layer). One JSON line: seconds to build, milliseconds to host a client and for a
step (medians), whether A came out with the same bits both times, and how far its weights are from those of the torch engine.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROWS: tuple[dict[str, Any], ...] = (
    {"name": "torch"},
    {"name": "torch", "dtype": "bfloat16"},
    *({"name": "deepspeed", "stage": stage, "world_size": world} for world in (1, 2) for stage in (0, 1, 2, 3)),
    *({"name": "deepspeed", "stage": stage, "world_size": world, "dtype": "bfloat16"} for world in (1, 2) for stage in (1, 2, 3)),
    {"name": "deepspeed", "stage": 2, "world_size": 2, "offload_optimizer": True},
    {"name": "deepspeed", "stage": 3, "world_size": 2, "offload_optimizer": True, "offload_param": True},
    {"name": "deepspeed", "stage": 2, "world_size": 1, "gradient_accumulation_steps": 2},
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="Hugging Face folder of a MoE; else random weights in the bundled model's shape")
    parser.add_argument("--steps", type=int, default=4, help="local steps of a client")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64, help="tokens of an example")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row is not None:
        run_rank(json.loads(options.row), options)
        return
    with tempfile.TemporaryDirectory() as scratch:
        options.folder = Path(scratch)
        rows = [run_row(row, options) for row in ROWS]
    record = {"benchmark": "engines", "steps": options.steps, "batch": options.batch, "length": options.length, "rows": rows}
    line = json.dumps(record)
    print(line)
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    if any(row.get("aba_same_bits") is not True for row in rows):
        sys.exit("a row did not give client A the same bits twice")


def run_row(row: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Start the ranks of one row and give the leader's record."""
    world = row.get("world_size", 1)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, __file__, "--row", json.dumps(row), "--folder", str(options.folder)]
    command += ["--steps", str(options.steps), "--batch", str(options.batch), "--length", str(options.length)]
    command += ["--model", options.model] if options.model else []
    place = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(command, env=os.environ | place | {"RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=600) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        if process.returncode:
            sys.exit(f"{row} failed:\n{errors.decode()[-2000:]}")
    found: dict[str, Any] = json.loads(outputs[0][0].decode().strip().splitlines()[-1])
    print(f"{row}: {found}", file=sys.stderr)
    return row | found


def run_rank(row: dict[str, Any], options: argparse.Namespace) -> None:
    """One process of a row; the leader prints the record."""
    import torch

    from fedgraft.moe.base import cache_base, open_base
    from fedgraft.moe.families import model_facts
    from fedgraft.protocols import Engine, TrainSpec
    from fedgraft.training.config import EngineConfig, deepspeed_settings
    from fedgraft.training.deepspeed_engine import DeepSpeedEngine, SlotPolicy
    from fedgraft.training.ranks import close_ranks, open_ranks
    from fedgraft.training.torch_engine import TorchEngine
    from fedgraft.types import AdapterSpec, Batch, GraftSpec, Slots

    torch.set_num_threads(1)
    row = dict(row)
    dtype = row.pop("dtype", "float32")
    config = EngineConfig.model_validate({"device": "cpu"} | row)
    rank = int(os.environ["RANK"])
    source = options.model or str(random_model(options.folder))
    base = cache_base(source, dtype, options.folder / "bases")
    started = time.perf_counter()
    model: Any = open_base(base)
    facts = model_facts(model.config)
    slots = Slots(
        adapters=(AdapterSpec(name="shared", rank=8, alpha=16.0),),
        graft=GraftSpec(num_grafts=1, layers=facts.layers, num_neurons=facts.expert_size),
    )
    spec = TrainSpec(learning_rate=3e-3, num_parts=config.gradient_accumulation_steps)
    engine: Engine
    if config.name == "torch":
        engine = TorchEngine(model, slots, 0)
    else:
        settings = deepspeed_settings(config, batch_size=options.batch, dtype=dtype, max_grad_norm=1.0)
        ranks = open_ranks("cpu", 300.0, config.world_size)
        engine = DeepSpeedEngine(
            model, slots, 0, settings=settings, spec=spec, ranks=ranks, device="cpu", policy=lambda ref: SlotPolicy()
        )
    built = time.perf_counter() - started
    keys = tuple(ref.key for ref in engine.refs)
    hosting: list[float] = []
    stepping: list[float] = []

    def client(seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        own = {key: value + 0.01 * torch.randn(value.shape, generator=generator) for key, value in engine.initial.items()}
        ids = torch.randint(5, model.config.vocab_size, (options.steps, options.batch, options.length), generator=generator)
        batches = [Batch(input_ids=each, attention_mask=torch.ones_like(each), labels=each) for each in ids]
        begin = time.perf_counter()
        engine.load(engine.initial)
        engine.load(own)
        hosting.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        engine.train(batches, spec, keys, seed=0)
        stepping.append((time.perf_counter() - begin) / options.steps)
        return engine.read(keys)

    first, _, again = client(1), client(2), client(1)
    reference = options.folder / f"reference-{dtype}.safetensors"
    if rank == 0:
        from safetensors.torch import load_file, save_file

        if config.name == "torch":
            save_file(first, reference)
        expected = load_file(reference)
        moved = torch.cat([(first[key] - expected[key]).flatten() for key in keys])
        record = {
            "build_s": round(built, 2),
            "host_ms": round(1000 * statistics.median(hosting), 2),
            "step_ms": round(1000 * statistics.median(stepping), 2),
            "aba_same_bits": all(torch.equal(first[key], again[key]) for key in keys),
            "largest_difference_to_torch": float(moved.abs().max()),
            "mean_difference_to_torch": float(moved.abs().mean()),
        }
        print(json.dumps(record))
    engine.close()
    close_ranks()


def random_model(folder: Path) -> Path:
    """Random weights in the bundled model's shape, written once."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    from fedgraft.platform.bundled_model import bundled_hf_config

    target = folder / "model"
    if not (target / "config.json").is_file():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(bundled_hf_config())
        scratch = folder / f"writing-{os.getpid()}"
        model.save_pretrained(scratch)
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE())).save_pretrained(scratch)
        with contextlib.suppress(OSError):  # the other rank was quicker
            scratch.rename(target)
    return target


if __name__ == "__main__":
    main()
