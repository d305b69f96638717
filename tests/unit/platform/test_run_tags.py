"""What MLflow is told of a run."""

from __future__ import annotations

from pathlib import Path

from fedgraft.platform.loading import load_config
from fedgraft.platform.run_tags import run_params, run_tags


def test_a_run_of_a_comparison_has_its_own_method_rate_and_seed_only() -> None:
    config = load_config(
        {
            "compare": {"methods": {"graft": {"name": "flex", "n_graft": 2}, "mean": {"name": "fedavg"}}},
            "seeds": [3, 4],
            "data": {"partition": {"name": "dirichlet", "alpha": 0.1}, "num_clients": 8},
            "tracking": {"uri": "http://name:secret@host"},
        }
    )
    params = run_params(config, method=config.methods()["graft"], seed=4, rate=0.02)
    assert (params["method"]["name"], params["method"]["n_graft"]) == ("flex", 2)
    assert params["data"]["partition"]["alpha"] == 0.1
    assert (params["seed"], params["training"]["learning_rate"]) == (4, 0.02)
    assert params["training"]["optimizer"] == "adamw"
    assert not {"compare", "seeds", "tracking"} & set(params)
    whole = run_params(config)
    assert set(whole["compare"]["methods"]) == {"graft", "mean"}
    assert "secret" not in str(whole)


def test_tags_name_method_data_model_and_seed(tmp_path: Path) -> None:
    config = load_config(
        {"method": {"name": "flex"}, "model": {"name": "org/moe"}, "data": {"path": "/there/dolly15k.jsonl.gz"}},
        checks_files=False,
    )
    tags = run_tags(
        config, "run", tmp_path, label="graft", method=config.method, seed=0, more={"sweep": "alpha-1", "trial": "0003"}
    )
    told = {key: value for key, value in tags.items() if ".version." not in key}
    assert told == {
        "fedgraft.kind": "run", "fedgraft.method": "flex", "fedgraft.dataset": "dolly15k", "fedgraft.model": "org/moe",
        "fedgraft.seed": "0", "fedgraft.label": "graft", "fedgraft.folder": str(tmp_path), "fedgraft.sweep": "alpha-1",
        "fedgraft.trial": "0003",
    }  # fmt: skip
    assert "fedgraft.version.torch" in tags
    over = run_tags(config, "experiment", tmp_path)
    assert (over["fedgraft.kind"], "fedgraft.method" in over, "fedgraft.seed" in over) == ("experiment", False, False)
