"""Exports of whole runs: what is written gives the logits of the very model that the platform judged."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fedgraft
from fedgraft.cli import app
from fedgraft.data.batches import eval_batches
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import CheckpointError, FedgraftError, ModelError
from fedgraft.platform.checkpoint import load_latest
from fedgraft.platform.loading import dump_config
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.platform.worker import ClientWorker
from fedgraft.registry import METHODS, load_method_file
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Broadcast, EvaluationTask

# PEFT asks a model of transformers 5 for it on wrapping; what the tests call themselves warns, the package's own calls do not.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

IDS = torch.tensor([[3 + 7 * i % 250 for i in range(24)]])


@dataclass
class Trained:
    """A run of one round as an experiment leaves it, and the worker that did it."""

    folder: Path
    base: Path
    worker: ClientWorker

    def logits(self, client_id: int | None) -> torch.Tensor:
        """Those of the model that the platform puts together to judge this client, or the global model."""
        store = ClientStateStore(self.folder / "clients")
        checkpoint = load_latest(self.folder / "checkpoints", store=store)
        assert checkpoint is not None
        task = EvaluationTask(
            round_idx=checkpoint.round_idx,
            view="global" if client_id is None else "personal",
            tasks=(),
            keys=tuple(checkpoint.state.params),
            client_id=client_id,
            state_version=None if client_id is None else checkpoint.versions.get(client_id),
        )
        self.worker.evaluate(task, Broadcast(round_idx=checkpoint.round_idx, params=checkpoint.state.params))
        return _logits(self.worker.engine.model)


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture
def train(
    make_job: Callable[..., Any],
    run_job: Callable[..., Any],
    make_base: Callable[..., Path],
    data_folder: Path,
    tmp_path: Path,
) -> Callable[..., Trained]:
    """Run a method and give its folder the records that an experiment gives it."""

    def make(method: dict[str, Any], **options: Any) -> Trained:
        folder = tmp_path / "runs" / "unit" / method["name"] / "seed-7"
        files = options.pop("method_files", [])
        job = make_job(method, folder=folder, **{"rounds": 1, **options})
        base = make_base().parents[1] / "hf"  # as from_pretrained reads it; the worker has the mapped copy
        fields = {"prompt": "q", "response": "a", "label": "kind"}
        config = fedgraft.load_config(
            {
                "model": {"path": str(base)},
                "data": {"path": str(data_folder.parent / "clients.jsonl"), "preset": "custom", "fields": fields},
                "method": method,
                "method_files": files,
                "output": {"cache": str(tmp_path / "cache")},
            }
        )
        ran = run_job(job)
        (folder / "config.yaml").write_text(dump_config(config))
        RunFolder(folder).write_info(
            run_id=f"unit/{method['name']}/seed-7",
            label=method["name"],
            seed=job.worker.run_seed,
            num_clients=3,
            client_names=["colours", "numbers", "beasts"],
            status="finished",
        )
        (tmp_path / "runs" / "unit" / "comparison.json").write_text("{}")
        return Trained(folder=folder, base=base, worker=ran.pool.worker)

    return make


ALL = ["attention", "router", "experts"]
SUM = 1e-5  # of the largest logit: the same products in float32, summed in another order
SAME = 0.0  # the same arithmetic on the same numbers

CASES = {
    "fedavg global": ({"name": "fedavg"}, None, False, "adapter", SAME),
    "fedavg merged": ({"name": "fedavg"}, None, True, "model", SUM),
    "fedavg everywhere": ({"name": "fedavg", "lora": ALL}, 1, False, "adapter", SAME),
    "fedavg everywhere merged": ({"name": "fedavg", "lora": ALL}, 1, True, "model", SUM),
    "fedavg full": ({"name": "fedavg", "lora": [], "full": ALL}, None, False, "model", SAME),
    "fedavg full and lora": ({"name": "fedavg", "lora": ["attention"], "full": ["router"]}, None, False, "model", SUM),
    "local": ({"name": "local_only", "lora": ["router", "attention"]}, 2, False, "adapter", SAME),
    "private_lora": ({"name": "private_lora", "private_rank": 3}, 0, False, "adapter", SUM),
    "private_lora global": ({"name": "private_lora", "private_rank": 3}, None, False, "adapter", SAME),
    "flex": ({"name": "flex", "graft_lr_scale": 5}, 0, False, "graft", SAME),
    "flex merged": ({"name": "flex"}, 2, True, "graft", SUM),
    "flex global": ({"name": "flex"}, None, False, "adapter", SAME),
    "flex row": ({"name": "flex", "mode": "row", "n_graft": 2, "gate_bias": 0.5}, 1, False, "graft", SAME),
    "flex convex global": ({"name": "flex", "mode": "convex", "gate_bias": 0.5}, None, False, "graft", SAME),
    "flex in one layer": ({"name": "flex", "graft_layer_fraction": 0.5}, 1, False, "graft", SAME),
    "fedavg_finetune": ({"name": "fedavg_finetune", "lora": ALL}, 1, False, "adapter", SAME),
    "fedavg_finetune global": ({"name": "fedavg_finetune"}, None, False, "adapter", SAME),
    "flex closed": ({"name": "flex", "gate_closed": True}, 1, False, "adapter", SAME),
}
QUICK = {
    "fedavg merged", "fedavg everywhere", "fedavg full and lora", "fedavg_finetune", "private_lora", "flex", "flex global",
}  # fmt: skip


@pytest.mark.parametrize("case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES])
def test_an_export_has_the_logits_of_the_platforms_model(case: str, train: Callable[..., Trained]) -> None:
    method, client, merge, form, tolerance = CASES[case]
    rounds = 2 if method["name"] == "fedavg_finetune" else 1  # one is averaged
    trained = train(method, rounds=rounds)
    made = fedgraft.export(trained.folder, client=client, merge=merge)
    expected = trained.logits(client)
    base = AutoModelForCausalLM.from_pretrained(trained.base, dtype=torch.float32)
    assert _distance(_logits(base), expected) > 100 * SUM  # there is something to lose
    assert (made.form, made.round_idx, made.client_id) == (form, rounds, client)
    assert _distance(_logits(fedgraft.load_export(made.folder)), expected) <= tolerance
    if form == "adapter":
        assert _distance(_logits(PeftModel.from_pretrained(base, made.folder)), expected) <= tolerance
        assert json.loads((made.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(trained.base)
    if form == "model":
        assert _distance(_logits(AutoModelForCausalLM.from_pretrained(made.folder)), expected) <= tolerance
        tokenizer = AutoTokenizer.from_pretrained(made.folder)
        assert tokenizer("red one").input_ids == trained.worker.tokenizer("red one").input_ids
        assert (made.folder / "generation_config.json").is_file()
    if form == "graft":  # who does not know grafts must not take the folder for the model
        for loader in (AutoModelForCausalLM.from_pretrained, lambda path: PeftModel.from_pretrained(base, path)):
            with pytest.raises((OSError, ValueError)):
                loader(made.folder)
    suffixes = {path.suffix for path in made.folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".md", ".jinja"}  # nothing pickled
    assert (made.difference <= tolerance * made.largest_logit) == (tolerance > 0 or made.difference == 0)


_HALF_FROZEN = """
from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
from fedgraft.registry import METHODS
from fedgraft.types import FROZEN


class HalfConfig(FedAvgConfig):
    name: str = "half_frozen"


@METHODS.add
class HalfFrozen(FedAvg):
    name = "half_frozen"
    title = "LoRA with A frozen at its random start"
    config_class = HalfConfig

    def group(self, ref):
        return FROZEN if ".lora_A." in ref.name else super().group(ref)
"""


def test_start_values_come_from_the_runs_seed(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))  # other tests go over all methods
    path = tmp_path / "half_frozen.py"
    path.write_text(_HALF_FROZEN)
    load_method_file(path)
    trained = train({"name": "half_frozen"}, method_files=[str(path)])
    made = fedgraft.export(trained.folder)
    assert torch.equal(_logits(fedgraft.load_export(made.folder)), trained.logits(None))


def test_clients_differ_and_what_does_not_act_is_left_out(train: Callable[..., Trained]) -> None:
    trained = train({"name": "private_lora", "private_rank": 3})
    first, second = (_logits(fedgraft.load_export(fedgraft.export(trained.folder, client=i).folder)) for i in (0, 1))
    assert _distance(first, second) > 1e-3
    ranks = {
        name: json.loads((trained.folder / "exports" / name / "adapter_config.json").read_text())["r"]
        for name in ("client-0", fedgraft.export(trained.folder).folder.name)
    }
    assert ranks == {"client-0": 8 + 3, "global": 8}


def test_only_the_layers_with_a_graft_are_written(train: Callable[..., Trained]) -> None:
    trained = train({"name": "flex", "graft_layer_fraction": 0.5})
    made = fedgraft.export(trained.folder, client=0)
    choice = next(
        json.loads(line)["values"]
        for line in (trained.folder / "diagnostics.jsonl").read_text().splitlines()
        if json.loads(line)["kind"] == "graft_choice" and json.loads(line)["client_id"] == 0
    )
    grafted = [layer for layer, experts in zip(choice["layers"], choice["experts"], strict=True) if experts]
    assert json.loads((made.folder / "graft.json").read_text())["layers"] == grafted
    assert len(grafted) == 1


def test_the_card_says_where_it_comes_from(train: Callable[..., Trained]) -> None:
    trained = train({"name": "fedavg"})
    made = fedgraft.export(trained.folder, client=1, output=trained.folder.parent / "out")
    card = (made.folder / "README.md").read_text()
    for text in (
        "FedAvg",
        "arXiv 1602.05629",
        "client 1 (numbers)",
        "unit/fedavg/seed-7",
        "| seed | 7 |",
        "1 of 1",
        str(trained.base),
    ):
        assert text in card
    assert f'PeftModel.from_pretrained(base, "{made.folder}")' in card
    assert "keeps nothing on clients" in card
    assert "keeps nothing" not in (fedgraft.export(trained.folder).folder / "README.md").read_text()


# ---- what is refused


def test_no_run_several_runs_no_client(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train({"name": "local_only"})
    experiment = trained.folder.parents[1]
    assert fedgraft.export(experiment, client=0).folder.parent == trained.folder / "exports"
    shutil.copytree(trained.folder, experiment / "other" / "seed-7")
    with pytest.raises(FedgraftError, match="has 2 runs") as several:
        fedgraft.export(experiment, client=0)
    assert str(trained.folder) in several.value.hint
    assert str(experiment / "other" / "seed-7") in several.value.hint
    with pytest.raises(FedgraftError, match="no run folder") as root:
        fedgraft.export(experiment.parent, client=0)
    assert str(experiment) in root.value.hint
    with pytest.raises(FedgraftError, match="nothing-here does not exist"):
        fedgraft.export(tmp_path / "nothing-here")
    for client in (3, -1):
        with pytest.raises(FedgraftError, match=f"client {client} does not exist .* 3 clients"):
            fedgraft.export(trained.folder, client=client)
    with pytest.raises(FedgraftError, match="no global model"):
        fedgraft.export(trained.folder)


def test_a_client_that_never_trained(train: Callable[..., Trained]) -> None:
    trained = train({"name": "local_only"}, federation={"cohort_size": 1})
    (seen,) = (int(path.name) for path in (trained.folder / "clients").iterdir())
    fedgraft.export(trained.folder, client=seen)
    with pytest.raises(CheckpointError, match="has not trained") as error:
        fedgraft.export(trained.folder, client=(seen + 1) % 3)
    assert error.value.hint.startswith(f"name one that has: {seen};")


def test_a_client_that_never_fine_tuned_has_no_model_of_its_own(train: Callable[..., Trained]) -> None:
    trained = train({"name": "fedavg_finetune"}, rounds=3, federation={"cohort_size": 1})
    store = ClientStateStore(trained.folder / "clients")
    versions = load_latest(trained.folder / "checkpoints", store=store).versions
    (tuned,) = (client for client, version in versions.items() if store.read(client, version))
    assert len(versions) > 1, "somebody else took part in averaging"
    fedgraft.export(trained.folder, client=tuned)
    for client in {0, 1, 2} - {tuned}:
        with pytest.raises(CheckpointError, match="has not trained for itself") as error:
            fedgraft.export(trained.folder, client=client)
        assert error.value.hint == f"name one that has: {tuned}; or export the global model, without --client"


def test_no_checkpoint(train: Callable[..., Trained]) -> None:
    trained = train({"name": "fedavg"})
    shutil.rmtree(trained.folder / "checkpoints")
    with pytest.raises(CheckpointError, match="has no checkpoint .status: finished.*") as error:
        fedgraft.export(trained.folder)
    assert "fedgraft run --resume" in error.value.hint
    with pytest.raises(CheckpointError, match="trained nothing"):
        fedgraft.export(train({"name": "base"}, rounds=0).folder)
    (trained.folder / "run.json").write_text('{"label": ')
    with pytest.raises(CheckpointError, match=r"run\.json is not JSON"):
        fedgraft.export(trained.folder)


def test_a_base_that_went_away_moved_or_changed(
    train: Callable[..., Trained],
    tiny_model: Callable[..., Any],
    save_model: Callable[..., Path],
    tmp_path: Path,
) -> None:
    trained = train({"name": "fedavg"})
    config = trained.folder / "config.yaml"
    gone, moved = tmp_path / "gone", tmp_path / "moved"
    config.write_text(config.read_text().replace(str(trained.base), str(gone)))
    with pytest.raises(ModelError, match=f"no longer in {gone}") as error:
        fedgraft.export(trained.folder)
    assert "--base FOLDER" in error.value.hint
    shutil.copytree(trained.base, moved)
    made = fedgraft.export(trained.folder, base=moved)
    expected = trained.logits(None)
    assert torch.equal(_logits(fedgraft.load_export(made.folder)), expected)
    shutil.rmtree(moved)
    with pytest.raises(ModelError, match=f"base {moved} cannot be loaded"):
        fedgraft.load_export(made.folder)
    assert torch.equal(_logits(fedgraft.load_export(made.folder, base=trained.base)), expected)
    other = save_model(tiny_model("qwen2_moe", seed=6), tmp_path / "other")
    with pytest.raises(ModelError, match=f"{other} is not the one that the run was trained on"):
        fedgraft.export(trained.folder, base=other, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_that_holds_something(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train({"name": "fedavg"})
    output = tmp_path / "out"
    output.mkdir()
    assert fedgraft.export(trained.folder, output=output).folder == output  # empty: taken
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(FedgraftError, match=f"{output} is there and not empty"):
        fedgraft.export(trained.folder, output=output)
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FedgraftError, match="cannot be made"):
        fedgraft.export(trained.folder, output=tmp_path / "file" / "out")


def test_a_wrong_export_is_not_kept(train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from fedgraft.platform import export as module

    trained = train({"name": "fedavg"})
    write = module.write_export

    def spoil(*args: Any, **options: Any) -> Any:
        form = write(*args, **options)
        config = args[4] / "adapter_config.json"
        config.write_text(config.read_text().replace('"lora_alpha": 16.0', '"lora_alpha": 17.0'))
        return form

    monkeypatch.setattr(module, "write_export", spoil)
    with pytest.raises(ModelError, match="logits differ"):
        fedgraft.export(trained.folder, output=tmp_path / "sub" / "out")
    assert list((tmp_path / "sub").iterdir()) == []


def test_the_command(train: Callable[..., Trained], tmp_path: Path) -> None:
    trained = train({"name": "flex"})
    runner = CliRunner()
    done = runner.invoke(app, ["export", str(trained.folder), "--client", "1", "-o", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert str(tmp_path / "out") in done.stdout
    assert "form: graft; round 1" in done.stdout
    assert (tmp_path / "out" / "graft.json").is_file()
    again = runner.invoke(app, ["export", str(trained.folder), "--client", "1", "-o", str(tmp_path / "out")])
    assert again.exit_code == 1
    assert again.stderr.count("\n") == 2
    assert "is there and not empty" in again.stderr


# ---- elsewhere

_PROGRAM = """
import sys

import torch
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
{snippet}
tensors = load_file(sys.argv[1])
with torch.no_grad():
    logits = model(input_ids=tensors["ids"]).logits
assert ("fedgraft" in sys.modules) == (sys.argv[3] == "graft"), "loaded with something else than the card says"
text = tokenizer("red one").input_ids
save_file({{"logits": logits, "text": torch.tensor(text)}}, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "merge", "form", "tolerance"),
    [
        ({"name": "fedavg", "lora": ALL}, False, "adapter", SAME),
        ({"name": "private_lora", "private_rank": 3}, False, "adapter", SUM),
        ({"name": "private_lora", "private_rank": 3}, True, "model", SUM),
        ({"name": "flex"}, False, "graft", SAME),
    ],
)
def test_the_cards_code_loads_it_in_a_fresh_process(
    method: dict[str, Any], merge: bool, form: str, tolerance: float, train: Callable[..., Trained], tmp_path: Path
) -> None:
    trained = train(method)
    made = fedgraft.export(trained.folder, client=1, merge=merge)
    assert made.form == form
    (snippet,) = re.findall(r"```python\n(.*?)```", (made.folder / "README.md").read_text(), re.DOTALL)
    program, given, found = tmp_path / "load.py", tmp_path / "ids.safetensors", tmp_path / "logits.safetensors"
    program.write_text(_PROGRAM.format(snippet=snippet))
    save_file({"ids": IDS}, given)
    done = subprocess.run(
        [sys.executable, program, given, found, form], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    tensors = load_file(found)
    assert _distance(tensors["logits"], trained.logits(1)) <= tolerance
    assert tensors["text"].tolist() == trained.worker.tokenizer("red one").input_ids


@pytest.mark.slow
def test_the_command_exports_a_real_experiment(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> None:
    fields = {"prompt": "q", "response": "a", "label": "kind"}
    config = fedgraft.load_config(
        {
            "name": "unit",
            "model": {"path": str(make_base().parents[1] / "hf")},
            "data": {"path": str(data_folder.parent / "clients.jsonl"), "preset": "custom", "fields": fields, "max_length": 32},
            "compare": {"methods": {"grafts": {"name": "flex"}, "two loras": {"name": "private_lora", "private_rank": 3}}},
            "federation": {"rounds": 2, "local_steps": 2, "batch_size": 4},
            "training": {"learning_rate": 0.02},
            "evaluation": {"generate": "never"},
            "executor": {"kind": "in_process"},
            "tracking": {"enabled": False},
            "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "report": False},
        }
    )
    result = fedgraft.run(config)
    command = [sys.executable, "-m", "fedgraft", "export"]
    options: dict[str, Any] = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 300, "check": False}
    several = subprocess.run([*command, result.folder], **options)
    assert several.returncode == 1
    assert "two loras" in several.stderr
    data = PreparedData.open(result.folder / "data" / "seed-0")
    for label, (run,) in result.runs.items():
        done = subprocess.run([*command, run.folder, "--client", "1", "--output", tmp_path / label], **options)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        model = fedgraft.load_export(tmp_path / label)
        batches = eval_batches(data.split(1, "test"), config.evaluation.batch_size, 0)
        rows = run.evaluations
        rows = rows[(rows["round"] == 2) & (rows["view"] == "personal") & (rows["client_id"] == 1) & (rows["task"] == "client")]
        recorded = rows[rows["metric"] == "nll"]["value"].item()
        assert score_batches(model, batches)["nll"].mean == pytest.approx(recorded, rel=1e-6)


def test_a_model_that_is_more_than_its_slots_is_not_exported(
    train: Callable[..., Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = train({"name": "fedavg"})
    monkeypatch.setattr(METHODS.get("fedavg"), "is_slots_only", False)
    with pytest.raises(FedgraftError, match=r"a model of FedAvg is more than weights.*\n.*checkpoints are safetensors"):
        fedgraft.export(trained.folder)
    assert not (trained.folder / "exports").exists()
    monkeypatch.setattr(METHODS.get("fedavg"), "is_slots_only", True)
    assert fedgraft.export(trained.folder).folder.is_dir()
