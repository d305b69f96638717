"""Whether clients' routing drifts apart over rounds, under FedAlign-MoE and under FedAvg over the same experts and routers.

    python benchmarks/phenomena_rounds.py --model FOLDER --data dolly15k.jsonl.gz [--seeds 0 1 2] [--partitions pathological]

The settings are those of methods.py at the learning rate 0.01, which its search gave both methods on every seed. After its local
steps each client measures its routing shares on 64 of its own examples; the divergence is Jensen and Shannon's, in bits, the mean
over pairs of clients and over layers. Seeds that are measured join those in benchmarks/results/phenomena-rounds.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from method_records import PARTITIONS, settings_of

import fedgraft
from fedgraft.data.batches import eval_batches
from fedgraft.data.prepared import PreparedData
from fedgraft.data.tokenise import load_tokenizer, pad_token_id
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.regions import profile_experts
from fedgraft.platform.results import RunResult, summary

ARMS: dict[str, dict[str, Any]] = {
    "fedavg-experts": {"name": "measured_fedavg", "lora": ["attention", "experts"], "full": ["router"]},
    "fedalign-moe": {"name": "measured_fedalign_moe"},
}
PROBES = 64
KIND = "marginals"  # under which measured_methods.py notes the routing


def overrides(arguments: argparse.Namespace, partition: str, seed: int, folder: Path) -> list[str]:
    """Overrides of the packaged quickstart for both methods on one partition and seed."""
    settings = settings_of(partition)
    del settings["retention"]
    settings["model"] |= {"path": arguments.model}
    settings["data"] |= {"path": arguments.data}
    settings["evaluation"] |= {"generate": "never"}
    for unused in ("max_generate", "max_new_tokens"):
        del settings["evaluation"][unused]
    settings |= {
        "rate_search": None,
        "training.learning_rate": 0.01,
        "method_files": [str(Path(__file__).parent / "measured_methods.py")],
        "tracking.enabled": False,
        "output.report": False,
        "output.folder": str(folder),
        "seeds": [seed],
        "compare": {"methods": ARMS},
    }
    return [f"{key}={json.dumps(value)}" for key, value in settings.items()]


def mean_divergence(shares_CLE: np.ndarray[Any, Any]) -> float:
    """Jensen and Shannon's divergence of two clients' routing, bits, mean over pairs and layers; in [0, 1]."""

    def entropy(p: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return -np.sum(np.where(p > 0, p * np.log2(np.where(p > 0, p, 1)), 0), axis=-1)

    pairs = itertools.combinations(np.asarray(shares_CLE, dtype=float), 2)
    return statistics.fmean(float(np.mean(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2)) for p, q in pairs)


def divergence_by_round(run: RunResult) -> list[float]:
    """The divergence after the local steps of each round."""
    rows = run.diagnostics[run.diagnostics["kind"] == KIND]
    by_round = rows.sort_values(["round", "client_id"]).groupby("round")["values"]
    return [mean_divergence(np.asarray([each["shares"] for each in values])) for _, values in by_round]


def of_the_base(model: torch.nn.Module, data: PreparedData, pad: int) -> float:
    """The divergence before any training: what the clients' data alone make."""
    shares = []
    for client in range(data.num_clients):
        batches = list(eval_batches(data.split(client, "train"), 16, pad, PROBES))
        shares.append(profile_experts(model, batches).marginals.numpy())
    return mean_divergence(np.asarray(shares))


def measure(arguments: argparse.Namespace, partition: str, seed: int) -> dict[str, Any]:
    """Train both methods on one partition with one seed."""
    with tempfile.TemporaryDirectory() as scratch:
        result = fedgraft.run(fedgraft.load_config(None, overrides(arguments, partition, seed, Path(scratch))))
        assert isinstance(result, fedgraft.ComparisonResult)
        base = cache_base(arguments.model, "float32", Path(scratch) / "base")
        data = PreparedData.open(result.folder / "data" / f"seed-{seed}")
        found: dict[str, Any] = {"untrained": of_the_base(open_base(base), data, pad_token_id(load_tokenizer(base)))}
        rows = summary(result)
        for label, runs in result.runs.items():
            found[label] = {"divergence": divergence_by_round(runs[0]), "own_nll": float(rows.loc[label, "last_personal_nll"])}
    return {"partition": partition, "seed": seed, **found}


def main() -> None:
    """Measure what was asked for, add it to what is there, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--partitions", nargs="+", choices=list(PARTITIONS), default=["pathological"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "phenomena-rounds.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for partition, seed in itertools.product(arguments.partitions, arguments.seeds):
        found = measure(arguments, partition, seed)
        known = json.loads(arguments.out.read_text())["measured"] if arguments.out.is_file() else []
        kept = [each for each in known if (each["partition"], each["seed"]) != (partition, seed)]
        measured = sorted([*kept, found], key=lambda each: (each["partition"], each["seed"]))
        arguments.out.write_text(json.dumps({"benchmark": "phenomena-rounds", "measured": measured}, indent=1) + "\n")
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
