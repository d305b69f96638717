"""What a sweep makes of its base for one trial, and what a trial's configuration must be like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedgraft.errors import Problem
from fedgraft.platform.config import RunConfig
from fedgraft.registry import METHODS
from fedgraft.tuning.space import Point, value_at, value_text, with_values
from fedgraft.tuning.sweep_config import SweepConfig

__all__ = ["trial_bundles", "trial_problems", "trial_tree"]


def trial_tree(config: SweepConfig, point: Point) -> dict[str, Any]:
    """The tree of a trial's configuration: the base with the point's values, and what a trial is always like.

    A trial has one method, one replica unless more are asked for (a sweep has other trials to fill the machine), no report of
    its own, and, where the metric is one of the clients' examples, an evaluation on their validation examples.
    """
    base = {key: value for key, value in config.base.items() if key != "compare"}
    tree = with_values(base, point)
    executor = value_at(tree, "executor")
    kind = executor.get("kind", "ray") if isinstance(executor, Mapping) else "ray"
    more: dict[str, Any] = {"output.report": False}
    if config.seeds is not None:
        more["seeds"] = list(config.seeds)
    if config.split == "validation" and value_at(tree, "evaluation.validation") is None:
        more["evaluation.validation"] = True
    if kind == "ray" and value_at(tree, "executor.replicas") is None:
        more["executor.replicas"] = 1
    if kind == "in_process" and not config.resources.gpus_per_trial and value_at(tree, "engine.device") in (None, "auto"):
        more["engine.device"] = "cpu"  # no trial takes a GPU that Ray has not given it
    for section in ("executor", "evaluation", "engine", "output"):
        if tree.get(section) is not None and not isinstance(tree[section], Mapping):
            more = {path: value for path, value in more.items() if not path.startswith(f"{section}.")}  # it is refused as it is
    return with_values(tree, more)


def trial_bundles(config: SweepConfig, run: RunConfig) -> tuple[dict[str, float], ...]:
    """The bundles of a trial's placement group, its own process first.

    With ``executor.kind: ray`` that process only waits, so it takes nothing (as the driver of a run), and each rank of each
    replica has a bundle. With ``in_process`` it trains, and is all there is.
    """
    executor = run.executor
    if executor.kind == "in_process":
        return (_bundle(executor.threads, config.resources.gpus_per_trial),)
    ranks = run.engine.world_size
    each = _bundle(executor.threads, executor.gpus / ranks)
    return ({}, *[dict(each) for _ in range((executor.replicas or 1) * ranks)])


def trial_problems(
    config: SweepConfig, run: RunConfig
) -> tuple[int, tuple[int, ...], tuple[dict[str, float], ...], list[Problem]]:
    """Check a trial's configuration against the sweep; also gives its rounds, its rungs and its bundles.

    Args:
        config: The sweep.
        run: The trial's, valid in itself.
    """
    (method,) = run.methods().values()
    built = METHODS.build(method)
    rounds = built.num_rounds(run.federation.rounds)
    rungs = config.scheduler.rungs(rounds)
    problems = [*_metric_problems(config, run, rungs), *_place_problems(config, run)]
    if METHODS.get(method.name).is_centralised and run.executor.kind == "ray":
        problems.append(
            Problem(
                path="executor.kind",
                value="ray",
                expected=f"in_process for {method.name}, which trains in the trial's own process",
            )
        )
    return rounds, rungs, trial_bundles(config, run), problems


def _metric_problems(config: SweepConfig, run: RunConfig, rungs: tuple[int, ...]) -> list[Problem]:
    """Whether the run will have the metric after every rung."""
    problems = []
    evaluation, metric = run.evaluation, config.metric
    late = [rung for rung in rungs[:-1] if rung % evaluation.every]
    if late:
        problems.append(
            Problem(
                path="evaluation.every",
                value=str(evaluation.every),
                expected=f"an evaluation after every rung of the scheduler ({', '.join(str(rung) for rung in rungs)})",
                hint="set it to 1, or choose other rungs",
            )
        )
    if config.split == "validation" and not evaluation.validation:
        expected = f"true: {metric} is taken on the clients' validation examples"
        problems.append(Problem(path="evaluation.validation", value="false", expected=expected))
    if metric == "retention_nll" and not _has_retention(run):
        expected = "a general set, which the metric retention_nll is taken on"
        problems.append(Problem(path="data.retention", value="nothing", expected=expected))
    if metric == "choice_accuracy":
        if not _has_questions(run):
            expected = "questions, which the metric choice_accuracy is taken on"
            problems.append(Problem(path="data.questions", value="nothing", expected=expected))
        wanted = ("always",) if len(rungs) > 1 else ("always", "end")
        if evaluation.choices not in wanted:
            expected = f"{' or '.join(wanted)}: the metric is choice_accuracy"
            problems.append(Problem(path="evaluation.choices", value=evaluation.choices, expected=expected))
    return problems


def _place_problems(config: SweepConfig, run: RunConfig) -> list[Problem]:
    """Whether what the trial needs goes with how trials are placed."""
    gpus, executor = config.resources.gpus_per_trial, run.executor
    problems = []
    for path, value in (("executor.placement", executor.placement), ("output.storage", run.output.storage)):
        if value is not None:
            expected = "nothing: a sweep's trials lie in its folder, and Ray Tune places them"
            problems.append(Problem(path=path, value=value, expected=expected, hint="it has no effect in a sweep"))
    if gpus and executor.kind == "ray":
        expected = "executor.gpus_per_replica for trials with executor.kind: ray"
        problems.append(
            Problem(path="resources.gpus_per_trial", value=value_text(gpus), expected=expected, hint="it has no effect")
        )
    if gpus and run.engine.device == "cpu":
        expected = "no GPUs with engine.device: cpu"
        problems.append(
            Problem(path="resources.gpus_per_trial", value=value_text(gpus), expected=expected, hint="it has no effect")
        )
    if executor.kind == "in_process" and run.engine.device == "cuda" and not gpus:
        problems.append(
            Problem(path="engine.device", value="cuda", expected="resources.gpus_per_trial above 0 beside it", hint="e.g. 0.5")
        )
    return problems


def _has_retention(run: RunConfig) -> bool:
    return run.data.retention.is_given or (run.data.is_bundled and run.data.bundled.num_retention > 0)


def _has_questions(run: RunConfig) -> bool:
    return run.data.questions.is_given or (run.data.is_bundled and run.data.bundled.questions_per_domain > 0)


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})
