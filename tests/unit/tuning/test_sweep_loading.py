"""Sweeps as files: what is refused, all at once, and what a trial is made of."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedgraft.errors import ClusterError, ConfigError
from fedgraft.tuning.placement import bundles_text, has_room, require_room
from fedgraft.tuning.sweep_loading import dump_sweep, load_sweep
from fedgraft.tuning.sweep_plan import plan_sweep

BASE: dict[str, Any] = {"method": {"name": "fedavg"}, "federation": {"rounds": 4}, "executor": {"kind": "in_process"}}


def problems(tree: dict[str, Any], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_sweep(tree, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_trial_has_one_method_all_seeds_and_judges_on_validation_examples() -> None:
    sweep = load_sweep(
        {
            "space": {
                "method": [{"name": "fedavg"}, {"name": "flex", "score": "random"}],
                "method.n_graft": {"grid": [2], "when": {"method.name": "flex"}},
            },
            "seeds": [3, 4],
            "scheduler": {"name": "asha", "min_rounds": 1, "reduction": 2},
        },
        ["base.rate_search=null", "base.evaluation.every=1"],  # the base is the packaged quickstart, which compares methods
    )
    first, second = sweep.trials
    assert (first.label, second.label) == ("fedavg", "flex score=random n_graft=2")
    assert (first.trial_id, second.trial_id) == ("0000", "0001")
    assert second.config.method is not None
    assert second.config.method.n_graft == 2  # type: ignore[attr-defined]
    assert second.config.compare is None
    assert second.config.seeds == (3, 4)
    assert second.config.evaluation.validation
    assert not second.config.output.report
    assert (second.rounds, second.rungs) == (6, (1, 2, 4, 6))
    assert second.config.executor.replicas == 1
    assert second.bundles == ({}, {"CPU": 1.0})


def test_what_is_written_is_read_as_the_same_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE | {"output": {"folder": "runs"}}))
    (tmp_path / "sweep.yaml").write_text("base: base.yaml\nspace: {federation.local_steps: {integer: [1, 3]}}\n")
    sweep = load_sweep("sweep.yaml", ["base.federation.rounds=7", "seeds=[5]"])
    assert [trial.point["federation.local_steps"] for trial in sweep.trials] == [1, 2, 3]
    assert {trial.rounds for trial in sweep.trials} == {7}
    assert sweep.config.base["output"]["folder"] == str(tmp_path / "runs")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_sweep(yaml.safe_load(dump_sweep(sweep.config)))
    assert again.config == sweep.config
    assert [trial.config for trial in again.trials] == [trial.config for trial in sweep.trials]


def test_all_problems_of_all_points_are_told_at_once() -> None:
    tree = {
        "base": BASE | {"training": {"learning_rat": 1}},
        "space": {"data.max_lenght": [16, 32], "method.name": ["fedavgg", "flex"]},
    }
    text = problems(tree)
    assert "base.training.learning_rat: got 1; expected a known key; did you mean 'learning_rate'?" in text
    assert "space.data.max_lenght: got 16; expected a known key; did you mean 'max_length'?" in text
    assert "space.method.name: got 'fedavgg'" in text
    assert "in 2 of 4 points, the first data.max_lenght=16, method.name=fedavgg" in text


def test_an_invalid_corner_of_a_continuum_is_found_before_any_trial() -> None:
    tree = {
        "base": BASE,
        "space": {"training.learning_rate": {"uniform": [0.01, 20]}},
        "search": {"name": "random", "num_points": 1},
    }
    assert "space.training.learning_rate: got 20.0; expected a number above 0 and at most 10" in problems(tree)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"space": {"federation.local_steps": {"uniform": [1, 2]}}}, "space.federation.local_steps: got uniform"),
        ({"space": {"federation.local_steps": {"choice": [1, 2]}}}, "nothing to draw with search.name: grid"),
        ({"search": {"name": "random", "num_points": 2}}, "search.name: got random; expected something to draw"),
        (
            {"space": {"federation.local_steps": {"grid": [1], "when": {"method.nam": "flex"}}}},
            "a condition that some point meets",
        ),
        (
            {"space": {"federation.local_steps": {"grid": [1], "when": {"federation.rounds": 3}}, "federation.rounds": [3]}},
            "earlier in the space",
        ),
        ({"space": {"seeds": [[1], [2]]}}, "seeds are the sweep's own key"),
        ({"space": {"federation": [{"rounds": 1}], "federation.rounds": [2]}}, "do not lie in each other"),
        ({"metric": "rouge_l"}, "metric: got 'rouge_l'; expected one of personal_nll"),
        (
            {"metric": "choice_accuracy", "base": BASE | {"evaluation": {"choices": "never"}}},
            "base.evaluation.choices: got never",
        ),
        (
            {"metric": "retention_nll", "base": BASE | {"data": {"bundled": {"num_retention": 0}}}},
            "base.data.retention: got nothing; expected a general set",
        ),
        ({"base": BASE | {"evaluation": {"validation": False}}}, "base.evaluation.validation: got false"),
        ({"scheduler": {"name": "asha", "min_rounds": 4}}, "scheduler.min_rounds: got 4; expected a first rung before"),
        ({"scheduler": {"name": "median"}}, "expected at least 4 points"),
        ({"scheduler": "asha", "base": BASE | {"evaluation": {"every": 2}}}, "base.evaluation.every: got 2"),
        ({"scheduler": {"name": "none", "min_rounds": 2}}, "scheduler.min_rounds"),
        ({"seeds": [0, 0]}, "different seeds"),
        ({"seeds": [0], "base": BASE | {"seeds": [1]}}, "base.seeds: got [1]"),
        (
            {"resources": {"gpus_per_trial": 0.5}, "base": BASE | {"executor": {"kind": "ray"}}},
            "executor.gpus_per_replica for trials",
        ),
        ({"base": BASE | {"engine": {"device": "cuda"}}}, "resources.gpus_per_trial above 0"),
        ({"base": BASE | {"output": {"storage": "file:///store"}}}, "output.storage: got file:///store; expected nothing"),
        ({"base": BASE | {"executor": {"placement": "pack"}}}, "executor.placement: got pack; expected nothing"),
        ({"base": {"compare": {"methods": {"a": {"name": "fedavg"}}}}}, "base.compare: got several methods"),
        ({"base": BASE | {"method": {"name": "centralised"}, "executor": {"kind": "ray"}}}, "base.executor.kind: got ray"),
        ({"sched": "asha"}, "did you mean 'scheduler'"),
        ({"space": {}}, "space"),
    ],
)
def test_what_cannot_be_meant_is_refused(keys: dict[str, Any], text: str) -> None:
    assert text in problems({"base": BASE, "space": {"federation.local_steps": [1, 2]}} | keys)


def test_optuna_is_asked_for_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = {"base": BASE, "space": {"federation.local_steps": {"integer": [1, 4]}}, "search": {"name": "optuna", "num_points": 3}}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'fedgraft[optuna]'" in problems(tree)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    sweep = load_sweep(tree)
    assert (sweep.trials, len(sweep.corners)) == ((), 2)
    assert "space.federation.local_steps: got grid; expected choice" in problems(
        tree | {"space": {"federation.local_steps": [1, 2]}}
    )


def test_room_is_counted_bundle_by_bundle() -> None:
    nodes = [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]
    assert has_room([{}, {"CPU": 2.0}, {"CPU": 2.0}, {"CPU": 2.0}], nodes)
    assert not has_room([{"CPU": 3.0}, {"CPU": 3.0}], nodes)  # 6 cores, but not 3 twice
    assert has_room([{"CPU": 1.0, "GPU": 0.5}] * 2, nodes)
    assert not has_room([{"CPU": 1.0, "GPU": 0.5}] * 3, nodes)
    assert bundles_text([{}, {"CPU": 1.0}, {"CPU": 1.0}]) == "2 x (1 CPU)"
    sweep = load_sweep({"base": BASE, "space": {"executor.threads": [1, 9]}})
    with pytest.raises(ClusterError, match=r"1 of 2 trials find no place: 0001 \(fedavg\) wants 1 x \(9 CPU\)") as caught:
        require_room(sweep.trials, nodes)
    assert caught.value.exit_code == 3
    assert "4 CPU; 2 CPU, 1 GPU" in str(caught.value)


def test_a_plan_adds_up() -> None:
    space = {"federation.rounds": [2, 4]}
    sweep = load_sweep({"base": BASE, "space": space, "seeds": [0, 1], "resources": {"concurrency": 1}})
    plan = plan_sweep(sweep)
    assert (plan.num_trials, plan.at_once) == (2, 1)
    seconds = list(plan.seconds.values())
    assert all(second is not None and second > 0 for second in seconds)
    assert plan.total_seconds == pytest.approx(sum(second or 0 for second in seconds))
    assert plan.refusal is None
