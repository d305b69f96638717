"""The command as a user types it, in processes of its own: the quickstart, and the Dolly example on a local model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest

import fedgraft
from fedgraft.platform.results import summary

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared"


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of bases for all tests of this file: the bundled model is pre-trained once, in nobody's home."""
    return tmp_path_factory.mktemp("cache")


def _fedgraft(*arguments: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fedgraft", *arguments]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_"))}
    return subprocess.run(command, cwd=folder, env=clean | env, capture_output=True, text=True, timeout=900, check=False)


def _experiment(folder: Path) -> fedgraft.ComparisonResult:
    (found,) = (folder / "runs").glob("*/comparison.json")
    return fedgraft.read_comparison(found.parent)


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own, met when it is asked
def test_quickstart_from_an_empty_cache(tmp_path: Path, cache: Path) -> None:
    short = ["federation.rounds=2", "federation.local_steps=4", "rate_search={rates: [0.003, 0.01], rounds: 1}"]
    short += ["evaluation.max_generate=8", "data.bundled.test_per_domain=16"]
    done = _fedgraft("run", *short, folder=tmp_path, FEDGRAFT_CACHE=str(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    result = _experiment(tmp_path)
    assert result.labels == ("base", "local", "fedavg", "flex", "flex-random", "private-lora")
    assert result.status == "finished"
    assert result.report is not None
    assert "http" not in _loaded_addresses(result.report)
    for label, (run,) in result.runs.items():
        assert run.status == "finished", label
        assert run.info["num_clients"] == 8
        assert run.info["frozen_hash_start"] == run.info["frozen_hash_end"]
    sent = {label: set(run.ledger["group"]) for label, (run,) in result.runs.items() if len(run.ledger)}
    assert sent == {"fedavg": {"shared"}, "flex": {"shared"}, "flex-random": {"shared"}, "private-lora": {"shared"}}
    # What is trained at all must beat the base on its own clients' text, which is written in a style the base has not seen.
    nll = summary(result)["last_personal_nll"]
    assert nll["local"] < nll["base"]
    assert nll["flex"] < nll["base"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedgraft'")
    runs = client.search_runs([experiment.experiment_id])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert (len(runs), len(parents)) == (7, 1)
    flex = next(run for run in runs if run.info.run_name == "flex/seed-0")
    assert [point.step for point in client.get_metric_history(flex.info.run_id, "train_loss")] == [1, 2]
    # A second start finds the bundled model made.
    again = _fedgraft(
        "run",
        *("method.name=fedavg", "federation.rounds=1", "rate_search=null", "executor.kind=in_process", "output.report=false"),
        folder=tmp_path,
        FEDGRAFT_CACHE=str(cache),
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert len(list((cache / "bundled").glob("*/pretrain.json"))) == 1


def _loaded_addresses(report: Path) -> str:
    """What a browser would load: src and href of anything but links within the page."""
    import re

    found = re.findall(r"""(?:src|href)\s*=\s*["']([^"'#][^"']*)""", report.read_text())
    return " ".join(found)


def test_dolly_example_on_a_local_model(tmp_path: Path) -> None:
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared with a small model and Dolly is not beside this checkout")
    example = ROOT / "examples" / "dolly_flex.yaml"
    done = _fedgraft(
        "run",
        str(example),
        f"model.path={SHARED / 'models' / 'base'}",
        "model.dtype=float32",
        f"data.path={SHARED / 'data' / 'instruct' / 'dolly15k.jsonl.gz'}",
        *("data.max_length=96", "data.max_train_examples=24", "data.max_test_examples=6", "data.max_validation_examples=4"),
        *("federation.rounds=2", "federation.local_steps=2", "evaluation.max_generate=4", "evaluation.max_new_tokens=8"),
        *("method.calibration_examples=8", "training.learning_rate=0.003"),
        folder=tmp_path,
        FEDGRAFT_CACHE=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run = _experiment(tmp_path).runs["flex"][0]
    assert sorted(run.client_names.values()) == [
        "brainstorming",
        "classification",
        "closed_qa",
        "creative_writing",
        "general_qa",
        "information_extraction",
        "open_qa",
        "summarization",
    ]
    assert run.info["frozen_hash_start"] == run.info["frozen_hash_end"]
    assert set(run.ledger["group"]) == {"shared"}
    # LoRA of rank 8 on q, k, v, o of 4 layers of width 256, float32, eight clients, two rounds.
    assert run.ledger.groupby("direction")["bytes"].sum().to_dict() == {
        "down": 4 * 4 * 8 * 512 * 4 * 8 * 2,
        "up": 4 * 4 * 8 * 512 * 4 * 8 * 2,
    }
    choices = [row["values"] for _, row in run.diagnostics.iterrows() if row["kind"] == "graft_choice"]
    assert len(choices) == 8
    assert all(sum(bool(experts) for experts in values["experts"]) == 2 for values in choices)  # half of four layers


def test_bad_configuration_ends_with_code_2_and_no_traceback(tmp_path: Path) -> None:
    done = _fedgraft("run", "federation.rouns=3", "method.name=felx", folder=tmp_path)
    assert done.returncode == 2
    assert "rounds" in done.stderr
    assert "flex" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not (tmp_path / "runs").exists()


def test_payload_and_records_are_json(tmp_path: Path, cache: Path) -> None:
    short = ["method.name=fedavg", "federation.rounds=1", "federation.local_steps=1", "rate_search=null"]
    small = ["executor.kind=in_process", "output.report=false", "tracking.enabled=false"]
    fewer = ["data.bundled.test_per_domain=4", "evaluation={generate: never}"]
    done = _fedgraft("run", *short, *small, *fewer, folder=tmp_path, FEDGRAFT_CACHE=str(cache))
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (tmp_path / "runs").rglob("*"):
        assert path.suffix in {"", ".json", ".jsonl", ".yaml", ".safetensors"}, path
        if path.suffix == ".json":
            json.loads(path.read_text())
