"""What the methods' papers say of MoE models under heterogeneous text, looked for without training; one JSON line.

    python benchmarks/phenomena.py --model FOLDER --data dolly15k.jsonl.gz [--only NAME ...]

Eight clients with one category of Dolly each (for the similarity also Dirichlet 1.0), seeds 0, 1, 2; five random draws a control.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from phenomena_experts import gradient_kept, permuted_client
from scipy.stats import spearmanr

from fedgraft.aggregation.assignment import (
    CountBounds,
    choose_at_random,
    choose_best,
    choose_exactly,
    coefficient_of_variation,
    load_bounds,
)
from fedgraft.aggregation.flex_moe import next_deficit
from fedgraft.data.batches import eval_batches
from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.data.prepared import PreparedData
from fedgraft.data.tokenise import load_tokenizer, pad_token_id
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.criteria import ablation_changes, importance, random_importance
from fedgraft.moe.expert_statistics import observe_statistics
from fedgraft.moe.families import moe_layers
from fedgraft.moe.surgery import mask_experts
from fedgraft.moe.trace import trace_routing
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Batch

DRAWS = 5
KEPT = (4, 8, 12)
BATCH_SIZES = (1, 2, 4, 8, 16, 32)


def prepared(arguments: argparse.Namespace, tokenizer: Any, partition: dict[str, Any], seed: int, folder: Path) -> PreparedData:
    """Clients' examples under one partition and seed."""
    config = DataConfig.model_validate(
        {
            "path": arguments.data,
            "preset": "dolly",
            "num_clients": 8,
            "max_length": 96,
            "max_train_examples": 64,
            "max_validation_examples": 16,
            "max_test_examples": 32,
            "partition": partition,
        }
    )
    prepare(config, tokenizer, seed, folder)
    return PreparedData.open(folder)


def batches_of(data: PreparedData, client: int, split: Any, pad: int, size: int = 16) -> list[Batch]:
    """All of a client's split."""
    return list(eval_batches(data.split(client, split), size, pad))


def usage(model: torch.nn.Module, batches: list[Batch]) -> np.ndarray[Any, Any]:
    """Share of tokens routed to each expert, (L, E); rows sum to top-k."""
    traces = trace_routing(model, batches)
    return np.stack([trace.counts.numpy() / len(trace.chosen) for trace in traces.values()])


def touched_by_batch_size(model: torch.nn.Module, data: PreparedData, pad: int) -> dict[str, float]:
    """HFedMoE (card: Fig. 3a): share of a layer's experts that some token of a batch is routed to, by examples of a batch."""
    found = {}
    for size in BATCH_SIZES:
        shares = []
        for client in range(data.num_clients):
            for batch in batches_of(data, client, "train", pad, size)[:4]:
                traces = trace_routing(model, [batch])
                shares += [float((trace.counts > 0).double().mean()) for trace in traces.values()]
        found[str(size)] = statistics.fmean(shares)
    return found


def subsets(model: torch.nn.Module, data: PreparedData, pad: int, seed: int) -> dict[str, float]:
    """FedMoE: NLL with a client's most used experts only, with as many random ones, and with all; mean over clients."""
    layers = [layer.index for layer in moe_layers(model)]
    num_experts = moe_layers(model)[0].num_experts
    rows: dict[str, list[float]] = {}
    for client in range(data.num_clients):
        p_LE = usage(model, batches_of(data, client, "train", pad))
        test = batches_of(data, client, "test", pad)
        rows.setdefault("all", []).append(score_batches(model, test)["nll"].mean)
        for kept in KEPT:
            best = {index: set(np.argsort(-p_LE[place], kind="stable")[:kept].tolist()) for place, index in enumerate(layers)}
            rows.setdefault(f"best {kept}", []).append(_masked_nll(model, test, best, num_experts))
            for draw in range(DRAWS):
                generator = np.random.default_rng((seed, client, kept, draw))
                random = {index: set(generator.permutation(num_experts)[:kept].tolist()) for index in layers}
                rows.setdefault(f"random {kept}", []).append(_masked_nll(model, test, random, num_experts))
    return {name: statistics.fmean(values) for name, values in rows.items()}


def _masked_nll(model: torch.nn.Module, test: list[Batch], kept: dict[int, set[int]], num_experts: int) -> float:
    masked = {index: set(range(num_experts)) - experts for index, experts in kept.items()}
    with mask_experts(model, masked):
        return score_batches(model, test)["nll"].mean


def similarity(model: torch.nn.Module, data: PreparedData, pad: int) -> float:
    """FedMoE: mean cosine of the usage of two clients, all layers flattened."""
    flat = [usage(model, batches_of(data, client, "train", pad)).reshape(-1) for client in range(data.num_clients)]
    unit = np.stack([row / np.linalg.norm(row) for row in flat])
    cosines = unit @ unit.T
    return float(cosines[np.triu_indices(len(flat), k=1)].mean())


def against_ablation(model: torch.nn.Module, data: PreparedData, pad: int) -> dict[str, float]:
    """Criteria for experts, beside random choice and an ablation oracle: Spearman correlation, over the experts of a layer, with
    how much a client's NLL rises when the expert is masked; mean over layers and three clients.
    """
    names = ("usage", "gate", "reap", "ean", "easy_ep", "wanda", "recon", "scale_free", "max_activation")
    found: dict[str, list[float]] = {name: [] for name in (*names, "random")}
    for client in range(3):
        batches = batches_of(data, client, "train", pad)[:2]

        def judge(batches: list[Batch] = batches) -> float:
            return score_batches(model, batches)["nll"].mean

        truth = ablation_changes(model, judge)
        statistics_by_layer = observe_statistics(model, batches)
        for layer in moe_layers(model):
            harm = truth[layer.index].numpy()
            for name in names:
                scores = importance(name, statistics_by_layer[layer.index], layer).numpy()  # type: ignore[arg-type]
                found[name].append(float(spearmanr(scores, harm).statistic))
            draws = [random_importance(layer.num_experts, 10 * client + draw).numpy() for draw in range(DRAWS)]
            found["random"] += [float(spearmanr(scores, harm).statistic) for scores in draws]
    return {name: statistics.fmean(values) for name, values in found.items()}


def load_balance(seed: int) -> dict[str, float]:
    """FLEX-MoE: coefficient of variation of the experts' cumulative load after 100 rounds, without any training.

    50 clients, 10 a round, 8 experts, 3 a client; fitness is fixed and skewed, as where labels are.
    """
    generator = np.random.default_rng(seed)
    fitness_CE = torch.from_numpy(generator.dirichlet(np.full(8, 0.3), size=50) + generator.dirichlet(np.full(8, 0.5)))
    cohorts = [generator.permutation(50)[:10] for _ in range(100)]
    found = {}
    for name, slack, kappa in (
        ("greedy", None, 0.0),
        ("random", None, 0.0),
        ("exact, kappa 0", 0.1, 0.0),
        ("exact, kappa 1", 0.4, 1.0),
    ):
        load, deficit = torch.zeros(8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.float64)
        for number, cohort in enumerate(cohorts):
            score = fitness_CE[cohort] + kappa * deficit
            counts = [3] * len(cohort)
            if name == "random":
                chosen = choose_at_random(8, counts, [1000 * seed + 10 * number + place for place in range(10)])
            elif slack is None:
                chosen = choose_best(score, counts)
            else:
                chosen = choose_exactly(score, rows=CountBounds.exactly(counts), columns=load_bounds(counts, 8, slack))
            now = chosen.sum(dim=0).double()
            load, deficit = load + now, next_deficit(deficit, now.unsqueeze(0))
        found[name] = coefficient_of_variation(load)
    return found


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A base model, and clients of one seed: with a category each (``apart``), and under Dirichlet 1.0 (``mixed``)."""

    model: torch.nn.Module
    apart: PreparedData
    mixed: PreparedData
    pad: int
    seed: int

    def of_each(self, split: Any) -> dict[int, list[Batch]]:
        """All clients' examples of a split."""
        return {client: batches_of(self.apart, client, split, self.pad) for client in range(self.apart.num_clients)}

    def steps(self) -> list[Batch]:
        """Two batches of four examples of each client, as in local training."""
        clients = range(self.apart.num_clients)
        return [batch for client in clients for batch in batches_of(self.apart, client, "train", self.pad, 4)[:2]]


MEASURES: dict[str, Callable[[Setting], dict[str, float]]] = {
    "touched_share_by_batch_size": lambda at: touched_by_batch_size(at.model, at.apart, at.pad),
    "nll_of_sub_models": lambda at: subsets(at.model, at.apart, at.pad, at.seed),
    "usage_cosine": lambda at: {
        "pathological": similarity(at.model, at.apart, at.pad),
        "dirichlet-1.0": similarity(at.model, at.mixed, at.pad),
    },
    "rank_correlation_with_ablation": lambda at: against_ablation(at.model, at.apart, at.pad),
    "cumulative_load_cv": lambda at: load_balance(at.seed),
    "gradient_kept": lambda at: gradient_kept(at.model, at.steps(), at.seed),
    "permuted_client": lambda at: permuted_client(at.model, at.of_each("train"), at.of_each("test"), at.seed),
}


def measure(arguments: argparse.Namespace, names: list[str], seeds: list[int]) -> dict[str, Any]:
    """Give mean and spread over seeds of what was asked for."""
    by_seed: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        base = cache_base(arguments.model, "float32", Path(scratch) / "base")
        tokenizer = load_tokenizer(base)
        for seed in seeds:
            apart = prepared(arguments, tokenizer, {"name": "natural"}, seed, Path(scratch) / f"natural-{seed}")
            mixed = prepared(arguments, tokenizer, {"name": "dirichlet", "alpha": 1.0}, seed, Path(scratch) / f"mixed-{seed}")
            setting = Setting(model=open_base(base), apart=apart, mixed=mixed, pad=pad_token_id(tokenizer), seed=seed)
            by_seed.append({name: MEASURES[name](setting) for name in names})
    return {name: {key: _over_seeds([each[name][key] for each in by_seed]) for key in by_seed[0][name]} for name in names}


def _over_seeds(values: list[float]) -> dict[str, float | None]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def main() -> None:
    """Measure what was asked for, beside what the file has already, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "phenomena.json")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(MEASURES), help="the others stay as the file has them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known = json.loads(arguments.out.read_text())["measured"] if arguments.out.is_file() else {}
    values = measure(arguments, arguments.only or list(MEASURES), arguments.seeds)
    found = known | {name: {"seeds": arguments.seeds, "values": each} for name, each in values.items()}
    record = {"benchmark": "phenomena", "measured": {name: found[name] for name in MEASURES if name in found}}
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record))


if __name__ == "__main__":
    main()
