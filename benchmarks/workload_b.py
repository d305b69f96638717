"""Federated LoRA on a small MoE: fedgraft's own worker under its round loop, beside the loop one would write by hand.

    python benchmarks/workload_b.py                       plain, in this process, two replicas; five turns
    python benchmarks/workload_b.py --cohort 4            with clients trained four at a time (engine.clients_at_once)

Workload B: a Qwen2-MoE of 4 layers, hidden 128, 8 experts of which a token takes 2, vocabulary 512; LoRA of rank 8 on q, k, v
and o; 16 clients with 20 sequences of 64 tokens, 8 drawn a round; 5 steps of AdamW on 4 sequences; the server takes the mean. The
base is written once and is the same for all parts.

    plain        transformers, PEFT and PyTorch by hand: one model, one sum, one core
    in_process   ``RoundLoop`` over ``ClientWorker`` in one process
    actors       the same with two replicas on a Ray of their own

Each part is a process of its own, started in turn, ``--turns`` times, with one thread a process: a round's time is the median
over all turns, without first rounds; ``start_s`` is from the start of the process to the end of round 1 (imports, Ray, the model,
and the round); ``pss_mib`` the most memory that its process tree took. All parts see the same cohorts, batches and start, and
their LoRA must agree with the plain loop's to 1e-5. Off: checkpoints, tracking, evaluation. One JSON line on stdout.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CLIENTS, DRAWN, STEPS, BATCH = 16, 8, 5, 4
VOCABULARY, LENGTH, RATE, DECAY = 512, 64, 1e-3, 0.01
TOLERANCE = 1e-5
LIMITS = {"round_over_plain": 0.42, "start_in_process": 1.3, "start_actors": 2.3, "pss_mib": 1500}
PARTS = ("plain", "in_process", "actors")
_STARTED = "WORKLOAD_B_STARTED"
"""Environment variable with the time (``time.time``) at which a part's process was started."""


def write_base(folder: Path) -> Path:
    """Write the random base with a tokenizer of one word a token, as replicas map it."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig

    from fedgraft.moe.base import cache_base

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
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder / "model")
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1").save_pretrained(folder / "model")
    return cache_base(str(folder / "model"), "float32", folder / "cache")


def tokens_of(client: int) -> Any:
    """A client's sequences, (20, 64)."""
    import numpy as np

    return np.random.RandomState(1000 + client).randint(0, VOCABULARY, (STEPS * BATCH, LENGTH))


def run_plain(folder: Path, rounds: int) -> tuple[list[float], dict[str, Any]]:
    """Rounds by hand; gives the times at which they ended, and the LoRA by fedgraft's keys."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from fedgraft.data.batches import train_batches
    from fedgraft.data.prepared import PreparedData
    from fedgraft.platform.sampling import sample_cohort
    from fedgraft.seeding import derive_seed

    data = PreparedData.open(next(folder.glob("data-*")))
    params = load_file(folder / "start.safetensors")
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    names = dict(model.named_parameters())
    slots = {key: names[f"base_model.model.{key}".replace(".shared.", ".default.")] for key in params}
    assert sum(parameter.requires_grad for parameter in names.values()) == len(slots)
    model.train()
    ends = []
    for round_idx in range(1, rounds + 1):
        total: dict[str, Any] = {}
        cohort = sample_cohort(0, round_idx, CLIENTS, DRAWN)
        for client in cohort:
            with torch.no_grad():
                for key, parameter in slots.items():
                    parameter.copy_(params[key])
            optimizer = torch.optim.AdamW(slots.values(), lr=RATE, weight_decay=DECAY)
            seed = derive_seed(0, "batches", round_idx=round_idx, client_id=client)
            for batch in train_batches(data.split(client, "train"), STEPS, BATCH, seed, 0):
                optimizer.zero_grad()
                model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
                optimizer.step()
            with torch.no_grad():
                for key, parameter in slots.items():
                    delta = parameter.double() - params[key].double()
                    total[key] = total[key] + delta if key in total else delta
        params = {key: (params[key].double() + value / len(cohort)).float() for key, value in total.items()}
        ends.append(time.time())
    return ends, params


def run_fedgraft(folder: Path, rounds: int, *, replicas: int, cohort: int | None) -> tuple[list[float], dict[str, Any]]:
    """Rounds of fedgraft; gives the times at which they ended, and the LoRA."""
    from fedgraft.actors.hosting import PoolOptions
    from fedgraft.actors.local import LocalPool

    if not replicas:
        return _run_on(LocalPool(PoolOptions(replicas=1)), folder, rounds, cohort)
    from measuring import ray_of_its_own

    from fedgraft.actors.pool import RayPool

    with ray_of_its_own(replicas):
        # Replicas start while this process imports the rest.
        return _run_on(RayPool(PoolOptions(replicas=replicas)), folder, rounds, cohort)


def _run_on(pool: Any, folder: Path, rounds: int, cohort: int | None) -> tuple[list[float], dict[str, Any]]:
    from fedgraft.platform.config import EvaluationConfig, FederationConfig
    from fedgraft.platform.progress import Event
    from fedgraft.platform.rounds import RoundLoop
    from fedgraft.platform.run_job import RunJob
    from fedgraft.platform.tracking import Tracker
    from fedgraft.platform.worker import WorkerSpec
    from fedgraft.protocols import TrainSpec
    from fedgraft.training.config import EngineConfig

    forever = 1_000_000
    engine: dict[str, Any] = {"name": "torch", "device": "cpu"} | ({} if cohort is None else {"clients_at_once": cohort})
    with tempfile.TemporaryDirectory(dir=folder) as name:
        run = Path(name)
        worker = WorkerSpec(
            base_folder=next((folder / "cache").iterdir()),
            data_folder=next(folder.glob("data-*")),
            state_folder=run / "clients",
            method={"name": "fedavg"},
            method_files=(),
            run_seed=0,
            batch_size=BATCH,
            train=TrainSpec(learning_rate=RATE, weight_decay=DECAY, max_grad_norm=None),
            engine=EngineConfig(**engine),
        )
        job = RunJob(
            label="workload-b",
            purpose="run",
            folder=run,
            worker=worker,
            learning_rate=RATE,
            rounds=forever,
            num_clients=CLIENTS,
            federation=FederationConfig(rounds=forever, cohort_size=DRAWN, local_steps=STEPS, batch_size=BATCH),
            evaluation=EvaluationConfig(every=forever, at_start=False, generate="never", choices="never"),
            checkpoint_every=forever,
        )
        ends: list[float] = []

        def note(event: Event) -> None:
            if event.kind == "round":
                ends.append(time.time())

        try:
            state = RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=note, is_stopping=lambda: False).run(rounds)
        finally:
            pool.close()
        return ends, state.params


def run_part(part: str, folder: Path, rounds: int, cohort: int | None) -> dict[str, Any]:
    """One part in this process; its LoRA goes to a file."""
    import torch
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    started = float(os.environ[_STARTED])
    if part == "plain":
        ends, params = run_plain(folder, rounds)
    else:
        ends, params = run_fedgraft(folder, rounds, replicas=2 if part == "actors" else 0, cohort=cohort)
    save_file({key: value.contiguous() for key, value in params.items()}, folder / f"{part}.safetensors")
    return {"start_s": ends[0] - started, "round_s": [after - before for before, after in itertools.pairwise(ends)]}


def prepare(folder: Path) -> None:
    """Write base, data and the LoRA that every part starts from."""
    from hosted import write_data
    from safetensors.torch import save_file

    from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
    from fedgraft.moe.base import open_base
    from fedgraft.moe.families import model_facts
    from fedgraft.training.torch_engine import TorchEngine

    base = write_base(folder)
    write_data(folder, CLIENTS, STEPS * BATCH, tokens_of)
    model = open_base(base, "cpu")
    engine = TorchEngine(model, FedAvg(FedAvgConfig()).slots(model_facts(model.config)), 0)
    save_file(engine.initial, folder / "start.safetensors")


def start_part(part: str, folder: Path, rounds: int, cohort: int | None) -> dict[str, Any]:
    """Run a part in a process of its own and watch its memory."""
    from measuring import peak_pss

    command = [sys.executable, __file__, "--part", part, "--folder", str(folder), "--rounds", str(rounds)]
    command += [] if cohort is None else ["--cohort", str(cohort)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", _STARTED: repr(time.time())}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        pss = peak_pss(process.pid, lambda: process.poll() is None)
        assert process.stdout is not None
        lines = process.stdout.read().splitlines()
        process.wait()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{part} ended with {process.returncode}:\n{errors.read()[-3000:]}")
    found: dict[str, Any] = json.loads(lines[-1])
    return found | {"pss_mib": pss / 2**20}


def run(*, turns: int, rounds: int, parts: Sequence[str], cohort: int | None) -> dict[str, Any]:
    """All parts in turn."""
    from hosted import machine, versions
    from safetensors.torch import load_file

    found: dict[str, list[dict[str, Any]]] = {part: [] for part in parts}
    with tempfile.TemporaryDirectory(prefix="fedgraft-workload-b-") as name:
        folder = Path(name)
        prepare(folder)
        apart: dict[str, float] = {}
        for turn in range(turns):
            for part in parts:
                found[part].append(start_part(part, folder, rounds, cohort))
                print(json.dumps({"turn": turn, "part": part, **found[part][-1]}), file=sys.stderr)
            plain = load_file(folder / "plain.safetensors")
            for part in parts:
                other = load_file(folder / f"{part}.safetensors")
                apart[part] = max(apart.get(part, 0.0), *(float((other[key] - plain[key]).abs().max()) for key in plain))
    assert max(apart.values()) <= TOLERANCE, f"final LoRA differs from the plain loop's: {apart}"
    return {
        "benchmark": "workload_b",
        "machine": machine(),
        "versions": versions("torch", "transformers", "peft", "ray"),
        "features": {
            "clients_at_once": cohort or 1,
            "records": True,
            "state_hash": True,
            "checkpoints": False,
            "tracking": False,
        },
        "rounds": rounds,
        "turns": turns,
        **summary_of(found),
        "largest_difference": apart,
        "limits": LIMITS,
    }


def summary_of(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Medians by part, and their ratios to the plain loop's of the same turn."""
    per_turn = {part: [statistics.median(each["round_s"]) for each in turns] for part, turns in found.items()}
    starts = {part: [each["start_s"] for each in turns] for part, turns in found.items()}

    def ratios(values: dict[str, list[float]]) -> dict[str, float]:
        return {
            part: round(statistics.median(a / b for a, b in zip(values[part], values["plain"], strict=True)), 3)
            for part in values
            if part != "plain"
        }

    return {
        "round_s": {part: round(statistics.median(values), 4) for part, values in per_turn.items()},
        "round_over_plain": ratios(per_turn),
        "start_s": {part: round(statistics.median(values), 2) for part, values in starts.items()},
        "start_over_plain": ratios(starts),
        "pss_mib": {part: round(max(each["pss_mib"] for each in turns)) for part, turns in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a part; the first is not in round_s")
    parser.add_argument("--cohort", type=int, help="clients that an engine trains at once (engine.clients_at_once)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if given.part is not None:
        print(json.dumps(run_part(given.part, given.folder, given.rounds, given.cohort)))
        return
    if "plain" not in given.parts:
        parser.error("the plain part is what the others are compared with: name it too")
    record = json.dumps(run(turns=given.turns, rounds=given.rounds, parts=given.parts, cohort=given.cohort))
    if given.out is not None:
        given.out.write_text(record + "\n")
    print(record)


if __name__ == "__main__":
    main()
