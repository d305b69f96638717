"""Every example loads, and begins with the command that runs it."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

import pytest
import yaml

from fedgraft.platform.loading import dump_config, load_config
from fedgraft.registry import METHODS
from fedgraft.tuning.sweep_loading import dump_sweep, load_sweep
from fedgraft.tuning.sweep_plan import plan_sweep

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "examples").glob("sweep_*.yaml"))
OTHERS = {"pretrain.yaml"}  # see test_pretraining
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.yaml") if path not in SWEEPS and path.name not in OTHERS)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))  # own_method.yaml adds to them


def test_there_are_examples() -> None:
    assert {"dolly_flex.yaml", "dolly_compare.yaml", "dirichlet.yaml", "in_process.yaml"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_loads_and_begins_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    command = shlex.split(first[2:])
    assert command[:2] == ["fedgraft", "run"]
    assert (ROOT / command[2]).resolve() == path
    config = load_config(command[2], command[3:])
    again = load_config(yaml.safe_load(dump_config(config)))
    assert dump_config(again) == dump_config(config)
    for method in config.methods().values():
        assert METHODS.build(method).name == method.name
    assert path.read_text().isascii()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_an_example_of_a_sweep_loads_fits_its_model_and_begins_with_its_command(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    command = shlex.split(first.removeprefix("# "))
    assert command[:2] == ["fedgraft", "sweep"]
    assert (ROOT / command[2]).resolve() == path
    sweep = load_sweep(command[2], command[3:])
    assert load_sweep(yaml.safe_load(dump_sweep(sweep.config))).config == sweep.config
    assert plan_sweep(sweep).num_trials == len(sweep.trials) > 1
    assert path.read_text().isascii()


def test_what_is_swept_by_the_examples() -> None:
    keys = {path.name: set(load_sweep(path).config.space) for path in SWEEPS}
    assert {"data.partition.alpha", "method"} <= keys["sweep_heterogeneity.yaml"]
    assert {"federation.budgets.experts_per_layer", "method"} <= keys["sweep_budgets.yaml"]
    grafts = {"method.graft_layer_fraction", "method.graft_neuron_fraction", "method.n_graft"}
    assert grafts <= keys["sweep_grafts.yaml"]
    assert "sweep_small.yaml" in keys


def test_the_packaged_quickstart_begins_with_its_command() -> None:
    text = resources.files("fedgraft.platform").joinpath("quickstart.yaml").read_text("utf-8")
    assert text.splitlines()[0] == "# fedgraft run"
    assert load_config() == load_config(yaml.safe_load(text))


def test_dolly_names_the_hub_and_takes_local_paths_instead(tmp_path: Path) -> None:
    config = load_config("examples/dolly_flex.yaml")
    assert config.model.source == "Qwen/Qwen1.5-MoE-A2.7B"
    assert config.data.name == "databricks/databricks-dolly-15k"
    assert config.data.preset == "dolly"
    assert config.data.partition.name == "natural"
    assert list(config.methods()) == ["flex"]
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "dolly.jsonl").write_text("")
    local = load_config("examples/dolly_flex.yaml", [f"model.path={tmp_path}", f"data.path={tmp_path / 'dolly.jsonl'}"])
    assert local.model.source == str(tmp_path)
    assert local.data.path == tmp_path / "dolly.jsonl"


def test_the_comparison_has_three_seeds_six_methods_and_a_rate_search() -> None:
    config = load_config("examples/dolly_compare.yaml")
    assert config.seeds == (0, 1, 2)
    assert list(config.methods()) == ["base", "local", "fedavg", "flex", "flex-random", "private-lora"]
    assert config.rate_search is not None


def test_the_example_of_an_own_method_is_short_and_registers_it() -> None:
    assert len((ROOT / "examples" / "own_method.py").read_text().splitlines()) < 50
    config = load_config("examples/own_method.yaml")
    method = METHODS.build(config.methods()["capped"])
    assert method.name == "capped_fedavg"
    assert method.config.max_examples == 50  # type: ignore[attr-defined]
