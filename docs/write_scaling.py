"""Write docs/scaling.md: what a round takes at sizes that were not run, from the plan, and what was measured at a small one.

    python docs/write_scaling.py

The numbers come from the functions behind ``fedgraft run --dry-run`` and from benchmarks/results/scaling.json, which
benchmarks/scaling.py wrote. A test compares the page with what this would write.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import Qwen2MoeConfig, Qwen3MoeConfig

from fedgraft.platform.loading import load_config
from fedgraft.platform.machine import MachineFacts
from fedgraft.platform.plan import MethodPlan, Plan, make_plan
from fedgraft.platform.progress import bytes_text

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "scaling.md"
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"

NODE_GPUS = 8
# A node as clouds rent it. The speed is the usual data sheet's for bfloat16; the plan counts on 30 % of it.
NODE = MachineFacts(cores=128, memory_bytes=2 * 2**40, gpus=NODE_GPUS, gpu_bytes=80 * 2**30, speed=989e12)
CLIENTS = {10: 10, 1_000: 100, 100_000: 1_000}
"""Clients, and how many of them take part in a round."""
BATCH, LENGTH, STEPS = 8, 512, 10

MODELS: dict[str, Any] = {
    "Qwen1.5-MoE-A2.7B": Qwen2MoeConfig(
        vocab_size=151936,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=60,
        num_experts_per_tok=4,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
    ),
    # Its layers are those of Qwen2-MoE with one dense layer first; its two shared experts are one of twice the width.
    "DeepSeek-MoE-16B": Qwen2MoeConfig(
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=2816,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=64,
        num_experts_per_tok=6,
        mlp_only_layers=[0],
        qkv_bias=False,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        moe_intermediate_size=1536,
        mlp_only_layers=[],
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Sized:
    """A model's plan, and what one client of a round is in it."""

    name: str
    plan: Plan

    @property
    def method(self) -> MethodPlan:
        """The one method."""
        (found,) = self.plan.methods
        return found

    @property
    def ranks(self) -> int:
        """GPUs that a replica is spread over."""
        return self.method.need.ranks

    @property
    def replicas_per_node(self) -> int:
        """Replicas that the GPUs of a node hold."""
        return int(NODE_GPUS / self.plan.settled.executor.gpus + 1e-3)

    @property
    def gpu_seconds(self) -> float:
        """Seconds of one GPU for a client of a round; of a round of 10 clients, which the plan was made for."""
        assert self.plan.seconds is not None
        return self.plan.seconds * self.busy / self.clients

    @property
    def busy(self) -> int:
        """Ranks that the plan's time counts on."""
        return min(self.method.replicas * self.ranks, NODE.cores)

    @property
    def clients(self) -> int:
        """Clients of the planned round."""
        assert self.plan.num_clients is not None
        return self.plan.num_clients

    @property
    def private_bytes(self) -> int:
        """What one client keeps."""
        return 4 * self.method.values("private")


def plan_of(hf_config: Any, clients: int, cohort: int, machine: MachineFacts = NODE) -> Plan:
    """The plan of one round of FLEx on a node, judged never."""
    with tempfile.TemporaryDirectory() as folder:
        hf_config.save_pretrained(folder)
        config = load_config(
            {
                "model": {"path": folder, "dtype": "bfloat16"},
                "data": {"path": folder, "partition": {"name": "iid"}, "num_clients": clients, "max_length": LENGTH},
                "method": {"name": "flex", "adapter": {"rank": 8}},
                "federation": {"rounds": 1, "cohort_size": cohort, "local_steps": STEPS, "batch_size": BATCH},
                "evaluation": {"batch_size": BATCH},
            }
        )
        return make_plan(config, machine)


def page() -> str:
    """The text of the page."""
    measured = json.loads(RESULTS.read_text())
    sized = [Sized(name=name, plan=plan_of(hf_config, 10, 10)) for name, hf_config in MODELS.items()]
    return _TEXT.format(
        models=_models(sized),
        rounds=_rounds(sized, measured),
        limits=_limits(sized, measured),
        measured=_measured(measured),
        machine=measured["machine"],
        low=min(row["measured_replicas_s"] / row["planned_train_s"] for row in measured["rows"]),
        high=max(row["measured_replicas_s"] / row["planned_train_s"] for row in measured["rows"]),
        per_client=1e3 * measured["driver_s_per_client"],
        per_mb=1e3 * measured["driver_s_per_mb"],
        hashing=measured["hash_gb_per_s"],
        tokens=sized[0].plan.tokens_per_example,
        gpu=bytes_text(NODE.gpu_bytes or 0),
        speed=NODE.speed / 1e12,
        gpus=NODE_GPUS,
        batch=BATCH,
        length=LENGTH,
        steps=STEPS,
    )


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _models(sized: list[Sized]) -> str:
    rows = []
    for each in sized:
        model, rank, executor = each.plan.model, each.method.memory, each.plan.settled.executor
        per = "shared" if executor.gpus < 1 else "one" if executor.gpus == 1 else f"ZeRO {each.plan.settled.engine.zero_stage}"
        rows.append(
            [
                each.name,
                f"{model.num_parameters / 1e9:.1f} G, {model.active_parameters / 1e9:.1f} G active",
                bytes_text(model.weight_bytes),
                bytes_text(rank.device),
                bytes_text(rank.host),
                f"{executor.gpus:g} ({per})",
                str(each.replicas_per_node),
            ]
        )
    head = ["model", "parameters", "base", "a rank on its GPU", "a rank on the host", "GPUs of a replica", "replicas a node"]
    return _table(head, rows)


def _rounds(sized: list[Sized], measured: dict[str, Any]) -> str:
    rows = []
    for each in sized:
        for clients, cohort in CLIENTS.items():
            both = 2 * cohort * each.method.bytes_per_round
            slots = each.replicas_per_node
            waves = -(-cohort // slots)
            on_one = waves * each.gpu_seconds / each.ranks * _sharing(each)
            driver = _driver_seconds(each, cohort, measured)
            rows.append(
                [
                    each.name,
                    f"{clients:,} ({cohort:,})",
                    bytes_text(each.method.bytes_per_round),
                    bytes_text(both),
                    bytes_text(each.private_bytes),
                    bytes_text(each.private_bytes * clients),
                    _seconds(on_one),
                    _seconds(driver),
                ]
            )
    head = ["model", "clients (a round)", "to one client", "a round, both ways", "a client keeps", "all clients keep"]
    return _table([*head, "training, one node", "driver"], rows)


def _limits(sized: list[Sized], measured: dict[str, Any]) -> str:
    rows = []
    for each in sized:
        of_driver = _driver_seconds(each, 1, measured)
        busy = each.gpu_seconds / of_driver
        reading = [each.private_bytes * clients / 1e9 / measured["hash_gb_per_s"] for clients in (1_000, 100_000)]
        rows.append(
            [
                each.name,
                _seconds(each.gpu_seconds),
                f"{of_driver * 1e3:.1f} ms",
                f"{busy:,.0f}",
                *(_seconds(taken) for taken in reading),
            ]
        )
    head = ["model", "a client, one GPU", "a client, driver", "GPUs that keep one driver busy"]
    return _table([*head, "reading 1,000 states", "100,000"], rows)


def _measured(measured: dict[str, Any]) -> str:
    rows = [
        [
            str(row["cohort"]),
            str(row["rank"]),
            f"{row['planned_mb_up']:.3f}",
            f"{row['measured_mb_up']:.3f}",
            f"{row['planned_train_s']:.2f}",
            f"{row['measured_replicas_s']:.2f}",
            f"{row['measured_replicas_s'] / row['planned_train_s']:.2f}",
            f"{row['driver_s']:.3f}",
        ]
        for row in measured["rows"]
    ]
    head = ["clients a round", "LoRA rank", "MB up, planned", "MB up, ledger", "replicas CPU s, planned", "measured", "ratio"]
    return _table([*head, "driver CPU s"], rows)


def _sharing(each: Sized) -> float:
    """Replicas that share a GPU share its speed."""
    return max(1.0, each.replicas_per_node * each.ranks / NODE_GPUS)


def _driver_seconds(each: Sized, cohort: int, measured: dict[str, Any]) -> float:
    megabytes = each.method.bytes_per_round / 1e6
    return cohort * (measured["driver_s_per_client"] + max(0.0, measured["driver_s_per_mb"]) * megabytes)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


_TEXT = """# Scaling, on paper

Written by `docs/write_scaling.py`, from the functions behind `fedgraft run --dry-run` and from what
[benchmarks/scaling.py](../benchmarks/scaling.py) measured. Nothing of these sizes was run, and no GPU was at hand.

Assumed: FLEx, LoRA of rank 8 on attention, a grafted expert in every MoE layer; bfloat16; {steps} local steps of {batch}
examples of {tokens} tokens (at most {length}); nodes of {gpus} GPUs of {gpu}, each of {speed:.0f} TFLOP/s by the data sheet,
of which the plan counts on 30 %. GPUs of a replica are what is worked out where `executor.gpus_per_replica` is not set.

{models}

DeepSeek-MoE-16B is planned by its layers, which are those of Qwen2-MoE with a dense one first (its two shared experts count as
one of twice the width). Its own code comes with its weights and not with transformers, so fedgraft does not load it; it loads
DeepSeek V2 and V3. A rank on the host is what DeepSpeed, start values and a client's tensors
take there. A base that is sharded by ZeRO 3 is read from the node's disk once and gathered layer by layer in every pass: the
time of that is not in the plan, so times of the 235B model are too short.

## A round

{rounds}

*training, one node*: replicas side by side, clients one after another, nodes divide it. *driver*: CPU time of the driver
actor by the measured costs below; it goes on beside training. Judging is not in it.

What the table says:

- **Bytes are small beside the model.** A client gets and sends its LoRA only; grafts stay. The broadcast is put once and each
  node fetches it once through Ray's object store.
- **Private state is the large thing.** It lies with `output.storage` or on the shared folder, two versions of each client
  that took part. What 100,000 clients keep needs an object store, or a method that keeps less than a whole expert a layer.
- **The driver reads no private state in a round.** Its hash comes from the replica that wrote it. A resume reads and hashes
  the newest state of every client that ever took part, in the driver, to know that all are whole: the last columns of the
  next table, at the {hashing:.1f} GB a CPU second that were measured.

## Where the driver becomes the bottleneck

The driver plans, checks every reply's small half, charges the ledger, and writes. Tensors are summed in the replicas, block
by block of the fixed tree over places in the cohort ([architecture.md](architecture.md)), so the driver gets sums of blocks,
not a client's tensors. One driver keeps up while its time for a client is below the replicas' time for one divided by their
number:

{limits}

Beyond that number of GPUs, or for methods whose clients take milliseconds, more GPUs do not make a round faster. Also in the
driver, and not in its costs here: a round's evaluation rows (one a client and metric), MLflow's batch, and with
`output.storage` the copy of the records, which are sent whole whenever they have grown: a run of 100,000 clients' ledgers is
the first to feel that.

## Measured at a small size

The bundled model (hidden 64, 3 layers), FedAvg, 4 steps of 8 examples, 2 replicas, on {machine}. CPU seconds of a round, mean
of three rounds; the plan was given a speed measured in CPU seconds.

{measured}

- Bytes are equal, since both count the same tensors.
- Replicas took {low:.1f} to {high:.1f} times what the plan says of training; `--dry-run` promises a factor of three. At hidden
  64 a step is mostly Python: the plan counts products and calls (by products alone it said a fourth to a seventh of what was
  taken). Calls are not counted for the nodes above, whose GPUs multiply while they are made.
- The driver took {per_client:.1f} ms a client; what comes up made no difference that could be seen ({per_mb:+.1f} ms a MB, by
  least squares over four rows): its tensors are summed in the replicas. So bytes cost the driver nothing above, which holds
  as far as 13 MB a round.
- Memory was checked in [memory.md](memory.md), also at small sizes.

Not measured: nodes with networks between them, object stores in another place, GPUs, ZeRO 3 over nodes, more than 32 clients
a round.
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)


if __name__ == "__main__":
    main()
