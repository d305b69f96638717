"""The centralised reference: pooled examples, the steps of a plain loop, and a run that starts from what it left."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import fedgraft
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import ConfigError, RunInterrupted
from fedgraft.platform.centralised import CentralisedJob, centralised_job, train_centrally
from fedgraft.platform.pretraining.config import WorkersConfig
from fedgraft.platform.worker import WorkerSpec
from fedgraft.training.step import response_loss

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


@pytest.fixture
def job(worker_spec: Callable[..., WorkerSpec], tmp_path: Path) -> CentralisedJob:
    spec = worker_spec({"name": "centralised", "lora": ["attention", "experts"]})
    return centralised_job(spec, target=tmp_path / "run" / "slots.safetensors", learning_rate=0.02, num_steps=20)


def train(job: CentralisedJob, is_stopping: Callable[[], bool] = lambda: False) -> tuple[float | None, list[int]]:
    steps: list[int] = []
    loss = train_centrally(job, in_process=True, workers=WorkersConfig(), on_step=steps.append, is_stopping=is_stopping)
    return loss, steps


def test_every_clients_examples_are_seen_once_an_epoch(job: CentralisedJob, data_folder: Path) -> None:
    job.open()
    data = PreparedData.open(data_folder)
    splits = [data.split(client, "train") for client in range(data.num_clients)]
    expected = Counter(
        tuple(row.input_ids[0].tolist()) for split in splits for row in (split.batch([i], 0) for i in range(len(split)))
    )
    total = sum(expected.values())
    seen: Counter[tuple[int, ...]] = Counter()
    for step in range(1, total // job.batch_size + 1):
        batch = job.batch(step)
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            row = tuple(ids[mask.bool()].tolist())
            seen[row] += 1
            assert (labels[mask == 0] == -100).all()
            counted = labels != -100
            assert counted.any()
            assert torch.equal(labels[counted], ids[counted])
    assert sum(seen.values()) == total // job.batch_size * job.batch_size
    assert all(count <= expected[row] for row, count in seen.items())


def test_it_is_a_plain_loop_over_pooled_batches(job: CentralisedJob) -> None:
    loss, steps = train(job)
    assert steps == list(range(1, 21))
    job.open()
    model: Any = job.build()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.0)
    start = {ref.key: ref.view(dict(model.named_parameters())[ref.name]).detach().clone() for ref in job._refs}
    model.train()
    for step in steps:
        optimizer.zero_grad()
        response_loss(model, job.batch(step))[0].backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
    model.eval()
    found = load_file(job.target)
    parameters = dict(model.named_parameters())
    assert found.keys() == start.keys()
    for ref in job._refs:
        # float32 sums in another order, over 20 steps of AdamW
        torch.testing.assert_close(found[ref.key], ref.view(parameters[ref.name]).detach(), atol=2e-4, rtol=1e-3)
    assert any(not torch.allclose(found[key], start[key], atol=0.01) for key in found)
    total = count = 0.0
    with torch.no_grad():
        for batch in job.held_out():
            total += float(response_loss(model, batch)[0]) * batch.num_label_tokens
            count += batch.num_label_tokens
    assert loss == pytest.approx(total / count, rel=1e-3)


def test_it_can_be_stopped(job: CentralisedJob) -> None:
    with pytest.raises(RunInterrupted, match="after step 1 of 20"):
        train(job, is_stopping=lambda: True)
    assert not job.target.exists()


def _config(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path, **more: Any) -> Any:
    return fedgraft.load_config(
        {
            "model": {"path": str(make_base())},
            "data": {
                "path": str(data_folder.parent / "clients.jsonl"),
                "preset": "custom",
                "fields": {"prompt": "q", "response": "a", "label": "kind"},
                "max_length": 32,
            },
            "compare": {"methods": {"base": {"name": "base"}, "pooled": {"name": "centralised"}}},
            "federation": {"rounds": 3, "local_steps": 4, "batch_size": 4, "cohort_size": 2},
            "evaluation": {"generate": "never"},
            "executor": {"kind": "in_process"},
            "tracking": {"enabled": False},
            "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "report": False},
            **more,
        }
    )


def test_an_experiment_judges_it_beside_the_others(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    config = _config(make_base, data_folder, tmp_path, rate_search={"rates": [1e-5, 0.02], "rounds": 1})
    result = fedgraft.run(config, on_event=lambda event: stages.append(str(event.data.get("text", ""))))
    # 3 rounds x 4 steps x 2 clients a round, and 1 x 4 x 2 for each rate of the search
    assert "pooled: step 24 of 24, learning rate 0.02" in stages
    assert "pooled: step 8 of 8, learning rate 1e-05" in stages
    run = result.runs["pooled"][0]
    info = json.loads((run.folder / "run.json").read_text())
    assert (info["learning_rate"], info["rounds"], info["status"]) == (0.02, 0, "finished")

    def nll(label: str) -> float:
        rows = [json.loads(line) for line in (result.folder / label / "seed-0" / "evaluations.jsonl").read_text().splitlines()]
        own = [row for row in rows if row["metric"] == "nll" and row["task"] == "client"]
        return sum(row["total"] for row in own) / sum(row["weight"] for row in own)

    assert nll("pooled") < nll("base") - 0.1
    before = (run.folder / "centralised.safetensors").read_bytes()
    (run.folder / "run.json").write_text(json.dumps(info | {"status": "stopped"}))
    fedgraft.run(resume=result.folder)
    assert (run.folder / "centralised.safetensors").read_bytes() == before


def test_another_optimizer_is_refused(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="pooled trains with adamw only"):
        _config(make_base, data_folder, tmp_path, training={"optimizer": "sgd"})
