"""A sweep on Ray Tune: what it leaves, what it shares between trials, what a resume does, and where replicas are placed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

import fedgraft
from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.testing import Double
from fedgraft.errors import ClusterError, FedgraftError
from fedgraft.platform.results import read_comparison, round_values
from fedgraft.tuning.locks import hold

pytestmark = pytest.mark.ray

Make = Callable[..., Any]


@pytest.fixture
def make_sweep(make_base: Callable[..., Path], data_folder: Path, tmp_path: Path) -> Make:
    def make(base: dict[str, Any] | None = None, *, report: bool = False, **keys: Any) -> Any:
        fields = {"prompt": "q", "response": "a"}
        tree: dict[str, Any] = {
            "model": {"path": str(make_base())},
            "data": {
                "path": str(data_folder.parent / "clients.jsonl"),
                "preset": "custom",
                "fields": fields | {"label": "kind"},
                "max_length": 32,
            },
            "training": {"learning_rate": 0.01},
            "method": {"name": "fedavg"},
            "federation": {"rounds": 2, "local_steps": 1, "batch_size": 4},
            "evaluation": {"generate": "never", "choices": "never", "at_start": False},
            "executor": {"kind": "in_process"},
            "tracking": {"enabled": False},
            "output": {"folder": str(tmp_path / "runs"), "cache": str(tmp_path / "cache"), "report": report},
        }
        return fedgraft.load_sweep({"name": "s", "base": tree | (base or {})} | keys)

    return make


def _journal(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "sweep.json").read_text())
    return found


@pytest.mark.filterwarnings("ignore:The ``noload`` loader:DeprecationWarning")  # MLflow's own
def test_a_failing_trial_does_not_end_a_sweep_and_a_resume_leaves_finished_ones_alone(make_sweep: Make, tmp_path: Path) -> None:
    space = {"federation.min_clients": [1, 100]}
    base = {"tracking": {"enabled": True}}
    result = fedgraft.sweep(make_sweep(base, space=space, seeds=[0, 1], resources={"max_restarts": 0}))
    assert result.status == "finished"
    assert [trial.status for trial in result.trials] == ["finished", "failed"]
    assert "at most 3, the number of clients" in (result.trials[1].error or "")
    folder = result.folder
    data = _journal(folder)
    assert (data["status"], data["keys"], data["seeds"]) == ("finished", list(space), [0, 1])
    assert (data["metric"], data["mode"], data["search"], data["scheduler"]) == ("personal_nll", "min", "grid", "none")
    for trial in result.of("finished"):
        comparison = read_comparison(folder / trial.folder)
        assert comparison.status == "finished"
        (runs,) = comparison.runs.values()
        assert [run.info["seed"] for run in runs] == [0, 1]
        means = [round_values(run, "validation")["personal_nll"][2] for run in runs]
        assert trial.score == pytest.approx(sum(means) / 2)
        assert means != [round_values(run)["personal_nll"][2] for run in runs]  # not the test examples
        assert trial.rounds_done == trial.rounds == 2
        assert trial.train_seconds is not None
        assert trial.train_seconds > 0
    # Two seeds of one data section: prepared twice, not four times.
    assert len(list((folder / "data").glob("*/seed-*/prepared.json"))) == 2
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'fedgraft'")
    runs_before = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id])}
    parents = [run for run in runs_before.values() if "mlflow.parentRunId" not in run.data.tags]
    assert [run.data.tags["fedgraft.kind"] for run in parents] == ["sweep"]
    children = [run for run in runs_before.values() if run not in parents]
    assert {(run.data.tags["fedgraft.trial"], run.info.status) for run in children} == {("0000", "FINISHED")}
    assert len(children) == 2
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {data["mlflow_run_id"]}

    kept = folder / "trials" / "0000" / "fedavg" / "seed-0" / "metrics.jsonl"
    before = kept.stat().st_mtime_ns
    failed = folder / "trials" / "0001" / "config.yaml"
    failed.write_text(failed.read_text().replace("min_clients: 100", "min_clients: 2"))  # the cause is mended
    with hold(folder / ".lock"), pytest.raises(FedgraftError, match="is run by another command"):
        fedgraft.sweep(resume=folder)
    again = fedgraft.sweep(resume=folder)
    assert [trial.status for trial in again.trials] == ["finished", "finished"]
    assert kept.stat().st_mtime_ns == before
    runs_after = {run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    assert len(runs_after - set(runs_before)) == 2  # the two seeds of the trial that had none


def test_a_trial_is_judged_on_all_its_seeds_and_stopped_early(make_sweep: Make) -> None:
    # The second rate is hopeless; with one trial at a time it comes to its first rung after the other one.
    space = {"training.learning_rate": [0.01, 1e-7]}
    scheduler = {"name": "asha", "min_rounds": 1, "reduction": 2}
    sweep = make_sweep(space=space, scheduler=scheduler, seeds=[0, 1], resources={"concurrency": 1}, report=True)
    notes: list[str] = []
    result = fedgraft.sweep(sweep, on_event=lambda event: notes.append(str(event.data.get("text", ""))))
    assert result.report is not None
    assert result.report.is_file()
    good, bad = result.trials
    assert (good.status, good.rungs.keys()) == ("finished", {"1", "2"})
    assert (bad.status, bad.rounds_done, bad.rounds) == ("stopped_early", 1, 2)
    assert any("stopped early after round 1 of 2" in note for note in notes)
    for seed in (0, 1):
        run = fedgraft.read_run(result.folder / "trials" / "0001" / "fedavg" / f"seed-{seed}")
        assert (list(run.metrics["round"]), run.status) == ([1], "stopped")
    # A resume has nothing to do, and does not start what was stopped early.
    assert [trial.status for trial in fedgraft.sweep(resume=result.folder).trials] == ["finished", "stopped_early"]


def test_replicas_and_ranks_take_the_bundles_of_the_trial(make_sweep: Make) -> None:
    executor = {"kind": "ray", "replicas": 2}
    result = fedgraft.sweep(
        make_sweep({"executor": executor}, space={"federation.local_steps": [1, 2]}, resources={"concurrency": 1})
    )
    assert [trial.status for trial in result.trials] == ["finished", "finished"]
    # The second trial found replicas that had imported everything.
    first, second = (trial.setup_seconds or 0.0 for trial in result.trials)
    assert second < first

    @ray.remote(num_cpus=0)
    class Outer:
        def places(self) -> list[tuple[str, str, str]]:
            pool = RayPool(PoolOptions(replicas=1, ranks=2, threads=2, in_group=True, start_timeout_s=60))
            pool.host(Double)
            (found,) = pool.call("place")
            pool.close()
            return [found]

    group = placement_group([{"CPU": 2.0}] * 2)  # all that the cluster has: a rank that is not in it finds no place
    try:
        ray.get(group.ready(), timeout=60)
        strategy = PlacementGroupSchedulingStrategy(group, placement_group_capture_child_tasks=True)
        ((rank, world_size, _),) = ray.get(Outer.options(scheduling_strategy=strategy).remote().places.remote(), timeout=200)
        assert (rank, world_size) == ("0", "2")
    finally:
        remove_placement_group(group)


def test_what_no_node_has_is_refused_at_once(make_sweep: Make) -> None:
    sweep = make_sweep({"executor": {"kind": "in_process", "threads": 200}}, space={"federation.local_steps": [1, 2]})
    with pytest.raises(ClusterError, match=r"2 of 2 trials find no place: 0000 .* wants 1 x \(200 CPU\).*the nodes have: 4 CPU"):
        fedgraft.sweep(sweep)
