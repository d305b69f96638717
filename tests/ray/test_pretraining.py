"""Pre-training with Ray Train and DeepSpeed on two workers: the steps of a plain loop, and going on after a kill."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedgraft
from fedgraft.errors import ClusterError, RunInterrupted
from fedgraft.platform.pretraining import command
from fedgraft.platform.pretraining.job import PretrainJob
from fedgraft.platform.pretraining.ray_train import JobResult, run_job
from fedgraft.platform.progress import Event
from fedgraft.training.pretrain import learning_rate_at

pytestmark = [
    pytest.mark.ray,
    pytest.mark.timeout(400),
    pytest.mark.filterwarnings("ignore:`use_.*` is deprecated"),  # Ray Train reads options of Ray Data
]

STEPS = 36
"""No whole number of times ten, which lie between checkpoints: the last step's is one more."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("".join(f"the number {i} comes before {i + 1}.\n" for i in range(300)))
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": f"a cow says moo {i} times"}) + "\n" for i in range(100)))
    return folder


def _config(texts: Path, folder: Path, *overrides: str) -> Any:
    return fedgraft.load_pretrain_config(
        {
            "seed": 3,
            "data": {"path": str(texts), "held_out_fraction": 0.05},
            "tokenizer": {"vocab_size": 280},
            "model": {
                "sizes": {
                    "hidden_size": 32,
                    "num_hidden_layers": 1,
                    "num_attention_heads": 4,
                    "num_key_value_heads": 2,
                    "num_experts": 4,
                    "num_experts_per_tok": 2,
                    "moe_intermediate_size": 16,
                    "shared_expert_intermediate_size": 16,
                    "max_position_embeddings": 64,
                }
            },
            "training": {
                "steps": STEPS,
                "batch_size": 8,
                "sequence_length": 32,
                "warmup_steps": 5,
                "zero_stage": 2,
                "router_aux_weight": 0.02,
            },
            "workers": {"count": 2},
            "output": {"folder": str(folder), "checkpoint_every": 10},
        },
        overrides,
    )


@dataclass
class Trained:
    """A model that nothing disturbed, what Ray Train kept of its training, and the rows and checkpoints of it."""

    folder: Path
    result: JobResult
    rows: list[dict[str, Any]] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def trained(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Watched through the call that the command makes, for it removes the checkpoints afterwards."""
    made = Trained(folder=tmp_path_factory.mktemp("model"), result=JobResult(step=0, is_finished=False, metrics={}))

    def watched(*arguments: Any, on_step: Callable[[dict[str, Any]], None], **options: Any) -> JobResult:
        def both(row: dict[str, Any]) -> None:
            made.rows.append(row)
            on_step(row)

        made.result = run_job(*arguments, on_step=both, **options)
        made.checkpoints = sorted(path.name for path in made.folder.glob("training/attempt-1/step-*"))
        return made.result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "run_job", watched)
        fedgraft.pretrain_model(_config(texts, made.folder))
    return made


@pytest.fixture(scope="module")
def undisturbed(trained: Trained) -> Path:
    return trained.folder


def test_two_workers_take_the_steps_of_one_plain_loop(undisturbed: Path) -> None:
    """Everything from Transformers and PyTorch: loss with its own balance, AdamW, clipping; one process, whole batches."""
    record = json.loads((undisturbed / "pretrain.json").read_text())
    config = fedgraft.load_pretrain_config(undisturbed / "training" / "config.yaml")
    spec = config.spec()
    job = PretrainJob(spec=spec, folder=undisturbed / "training", target=undisturbed / "unused")
    job.open()
    model: Any = job.build()
    model.train()
    assert model.config.router_aux_loss_coef == 0.02
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-8)
    losses, norms = [], []
    for step in range(1, 21):
        batch = job.batch(step)
        output = model(input_ids=batch.input_ids, labels=batch.labels, output_router_logits=True)
        losses.append(float(output.loss.detach() - 0.02 * output.aux_loss.detach()))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, spec.training)
        optimizer.zero_grad()
        output.loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
    print("losses under Ray Train:", record["losses"][:20:5], "of the plain loop:", losses[::5])
    assert record["losses"][:20] == pytest.approx(losses, rel=2e-4)
    rows = [json.loads(line) for line in (undisturbed / "training" / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] for row in rows[:20]] == pytest.approx(norms, rel=1e-3)
    assert len(record["losses"]) == len(rows) == STEPS
    assert record["final_loss"] < 0.7 * record["losses"][0]


def test_the_folder_is_whole_and_says_what_was_done(undisturbed: Path) -> None:
    record = json.loads((undisturbed / "pretrain.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(undisturbed).eval()
    tokenizer = AutoTokenizer.from_pretrained(undisturbed)
    assert len(tokenizer) == model.config.vocab_size == record["vocab_size"]
    assert record["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert record["num_tokens"] == STEPS * 8 * 32
    # The held-out loss once more, by Transformers, row by row.
    job = PretrainJob(spec=_config(undisturbed, undisturbed).spec(), folder=undisturbed / "training", target=undisturbed)
    job.open()
    with torch.no_grad():
        held_out = [
            float(model(input_ids=row[None], labels=row[None]).loss) for batch in job.held_out() for row in batch.input_ids
        ]
    assert len(held_out) == record["num_held_out_sequences"] > 0
    assert record["held_out_nll"] == pytest.approx(sum(held_out) / len(held_out), rel=1e-4)
    assert not list((undisturbed / "training").glob("attempt-*"))
    assert fedgraft.pretrain_model(resume=undisturbed).record == record


def test_stopped_and_with_a_worker_killed_it_ends_at_the_same_weights(texts: Path, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"

    def interrupt(event: Event) -> None:
        if event.kind == "pretrain" and event.data["step"] == 15:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RunInterrupted, match=r"stopped after step (1[5-9]|2\d|3[0-5]) of 36") as caught:
        fedgraft.pretrain_model(_config(texts, folder), on_event=interrupt)
    assert caught.value.hint == f"go on with: fedgraft pretrain --resume {folder}"
    assert not (folder / "config.json").exists()
    metrics = folder / "training" / "metrics.jsonl"
    taken = metrics.read_text().splitlines()

    killed: list[int] = []

    def kill(event: Event) -> None:
        if event.kind == "pretrain" and not killed:
            killed.append(_kill_a_worker())

    outcome = fedgraft.pretrain_model(resume=folder, on_event=kill)
    assert killed
    assert len(taken) < STEPS
    assert metrics.read_text().splitlines()[: len(taken)] == taken, "no step was taken twice: the seconds are those of then"
    expected, found = load_file(undisturbed / "model.safetensors"), load_file(folder / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    before = json.loads((undisturbed / "pretrain.json").read_text())
    assert outcome.record["losses"] == before["losses"]
    assert outcome.record["held_out_nll"] == before["held_out_nll"]


def test_ray_train_keeps_the_metrics_of_the_last_step(trained: Trained) -> None:
    """They are ``None`` for a training that reports no checkpoint, so the last step reports one."""
    result, rows = trained.result, trained.rows
    assert (result.step, result.is_finished) == (STEPS, True)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert {name: result.metrics[name] for name in ("step", "loss", "grad_norm")} == {
        name: rows[-1][name] for name in ("step", "loss", "grad_norm")
    }
    assert result.metrics["held_out_nll"] > 0
    assert trained.checkpoints == [f"step-{STEPS - STEPS % 10:08d}", f"step-{STEPS:08d}"]


def test_more_workers_than_cores_is_an_error_before_anything_is_written(texts: Path, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"8 workers need 8 CPUs .* cluster has 4") as caught:
        fedgraft.pretrain_model(_config(texts, tmp_path / "m", "workers.count=8"))
    assert "workers.count" in caught.value.hint
    with pytest.raises(ClusterError, match=r"need 2 GPUs .* cluster has 0"):
        fedgraft.pretrain_model(_config(texts, tmp_path / "m", "workers.gpus=1"))
    assert not (tmp_path / "m").exists()


def _kill_a_worker() -> int:
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.send_signal(signal.SIGKILL)
            return process.pid
    raise AssertionError("no worker of Ray Train is alive")
