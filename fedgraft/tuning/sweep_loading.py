"""From a sweep's YAML file and overrides to its trials, with every problem of the file and of all points reported at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedgraft.errors import ConfigError, Problem
from fedgraft.platform.config import RunConfig
from fedgraft.platform.draft import Draft, apply_overrides, read_draft, to_yaml
from fedgraft.platform.loading import load_config
from fedgraft.platform.validation import validate
from fedgraft.tuning.space import Point, corners, draw_points, grid_points, point_text, value_at, value_text, with_values
from fedgraft.tuning.sweep_config import SweepConfig
from fedgraft.tuning.trial_rules import trial_problems, trial_tree

__all__ = ["PlannedTrial", "Sweep", "dump_sweep", "load_sweep", "make_trial", "trial_id"]

_PACKAGED_BASE = "quickstart.yaml"
_PATHS = (
    "model.path",
    "data.path",
    "data.retention.path",
    "data.questions.path",
    "federation.budgets.profile",
    "output.folder",
    "output.cache",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTrial:
    """One point with its method, and the configuration that it makes of the base."""

    trial_id: str
    point: Point
    label: str
    config: RunConfig
    rounds: int
    rungs: tuple[int, ...]
    bundles: tuple[dict[str, float], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sweep:
    """A valid sweep. ``trials`` are all of a grid or of draws; with Optuna the corners of the space stand for what may come."""

    config: SweepConfig
    trials: tuple[PlannedTrial, ...]
    corners: tuple[PlannedTrial, ...] = ()


def load_sweep(source: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()) -> Sweep:
    """Read a sweep, apply overrides, and check it with all of its points.

    Args:
        source: A YAML file, or a mapping of the same form.
        overrides: ``key.path=value`` each, such as ``base.federation.rounds=3`` or ``search.num_points=4``.

    Raises:
        ConfigError: Anything is wrong, with the file or with a point; it carries every problem.
    """
    draft = _read(source, overrides)
    config, found = validate(SweepConfig, draft.tree)
    draft.found += found
    if draft.found or config is None:
        raise draft.error()
    config = config.model_copy(update={"base": _absolute(config.base)})
    problems = _space_problems(config)
    if not problems:
        made, problems = _make_all(config)
    if problems:
        raise ConfigError(draft.source, tuple(problems))
    if config.search.name == "optuna":
        return Sweep(config=config, trials=(), corners=made)
    return Sweep(config=config, trials=made)


def make_trial(config: SweepConfig, number: int, point: Point) -> PlannedTrial:
    """Make the trial of a point.

    Raises:
        ConfigError: The point makes an invalid configuration.
    """
    run = load_config(trial_tree(config, point), checks_files=False).absolute()
    rounds, rungs, bundles, problems = trial_problems(config, run)
    if problems:
        raise ConfigError(point_text(point), tuple(problems))
    method = run.methods()[next(iter(run.methods()))]
    swept = {path.removeprefix("method."): value for path, value in point.items() if path.startswith("method.")}
    whole = point.get("method")
    stated = dict(whole) if isinstance(whole, Mapping) else {"name": method.name}
    label = value_text(stated | swept)
    return PlannedTrial(
        trial_id=trial_id(number), point=point, label=label, config=run, rounds=rounds, rungs=rungs, bundles=bundles
    )


def trial_id(number: int) -> str:
    """Name of the trial with this number, from 0; names sort as numbers do."""
    return f"{number:04d}"


def dump_sweep(config: SweepConfig) -> str:
    """Write a sweep as YAML, its base inlined and its paths absolute; ``load_sweep`` of it gives an equal one."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    return to_yaml({"name": config.name, **tree})


def _read(source: Path | str | Mapping[str, Any], overrides: Sequence[str]) -> Draft:
    """Read the file, then the base that it names, then apply the overrides to both."""
    draft = read_draft(source, "")
    named = [override for override in overrides if override.partition("=")[0].strip() == "base"]
    apply_overrides(draft, named)
    base = draft.tree.get("base")
    if base is None or isinstance(base, str | Path):
        draft.tree["base"] = read_draft(base, _PACKAGED_BASE).tree
    apply_overrides(draft, [override for override in overrides if override not in named])
    return draft


def _absolute(base: Mapping[str, Any]) -> dict[str, Any]:
    """The base with absolute paths, so that a sweep that is resumed elsewhere means the same."""
    found: dict[str, Any] = {path: _resolved(value) for path in _PATHS if isinstance(value := value_at(base, path), str | Path)}
    files = base.get("method_files")
    if isinstance(files, list | tuple):
        found["method_files"] = [_resolved(name) if isinstance(name, str | Path) else name for name in files]
    return with_values(base, found)


def _resolved(path: str | Path) -> str:
    return str(Path(path).expanduser().resolve())


def _space_problems(config: SweepConfig) -> list[Problem]:
    """What is wrong with the sweep before any point is made."""
    problems = _kind_problems(config)
    keys = list(config.space)
    if config.seeds is not None and "seeds" in config.base:
        problems.append(
            _problem("base.seeds", config.base["seeds"], "no seeds in the base beside those of the sweep", "remove one")
        )
    for place, key in enumerate(keys):
        for path in config.space[key].when:
            later = [other for other in keys[place:] if _overlap(path, other)]
            if later:
                what = "itself" if key in later else later[0]
                problems.append(
                    _problem(f"space.{key}.when", path, "key paths of the base or earlier in the space", f"it is of {what}")
                )
        problems += [
            _problem(f"space.{key}", other, "key paths that do not lie in each other", f"{other} sets a part of the same")
            for other in keys
            if other != key and other.startswith(f"{key}.") and not config.space[other].when
        ]
        if key.partition(".")[0] in _OWN_KEYS:
            expected = f"a key path that trials may differ in; {_OWN_KEYS[key.partition('.')[0]]}"
            problems.append(_problem(f"space.{key}", key, expected))
    if "compare" in config.base and not any(_overlap(key, "method") for key in keys):
        expected = "one method a trial"
        hint = "sweep it: space: {method: [{name: fedavg}, {name: flex}]}, or put base.method in place of base.compare"
        problems.append(_problem("base.compare", "several methods", expected, hint))
    if config.search.name == "optuna" and importlib.util.find_spec("optuna") is None:
        problems.append(_problem("search.name", "optuna", "an installed package optuna", "pip install 'fedgraft[optuna]'"))
    return problems


def _kind_problems(config: SweepConfig) -> list[Problem]:
    """Dimensions that the search cannot do with."""
    search, problems = config.search.name, []
    for key, dim in config.space.items():
        if search == "grid" and dim.values() is None:
            expected = "values, which a grid can try one by one"
            problems.append(
                _problem(f"space.{key}", dim.kind, expected, "list some, or set search: {name: random, num_points: 10}")
            )
        if search == "grid" and dim.kind == "choice":
            hint = "write grid, or set search: {name: random, num_points: 10}"
            problems.append(_problem(f"space.{key}", dim.kind, "grid: there is nothing to draw with search.name: grid", hint))
        if search == "optuna" and dim.kind == "grid":
            problems.append(_problem(f"space.{key}", dim.kind, "choice: Optuna proposes, and tries nothing in full"))
    if search == "random" and all(dim.kind == "grid" for dim in config.space.values()):
        hint = "set search.name: grid, or write choice"
        problems.append(_problem("search.name", search, "something to draw; all of the space is a grid", hint))
    return problems


_OWN_KEYS = {
    "seeds": "seeds are the sweep's own key",
    "tracking": "all trials are tracked in one place: base.tracking",
    "output": "all trials lie in the sweep's folder: base.output",
    "compare": "a trial has one method: sweep method",
    "name": "trials are named by the sweep",
}


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


@dataclass(slots=True)
class _Seen:
    """A problem, how many points have it, and the first of them."""

    problem: Problem
    first: Point
    count: int = 0


@dataclass(slots=True)
class _Problems:
    """Problems of points, each kind once."""

    by_text: dict[tuple[str, str, str], _Seen] = field(default_factory=dict)

    def add(self, error: ConfigError, point: Point) -> None:
        for problem in error.problems:
            key = (problem.path, problem.value, problem.expected)
            self.by_text.setdefault(key, _Seen(problem, point)).count += 1

    def listed(self, num_points: int, space: Sequence[str]) -> list[Problem]:
        listed = []
        for seen in self.by_text.values():
            at = next((key for key in space if _overlap(key, seen.problem.path)), None)
            where = f"space.{seen.problem.path}" if at is not None else f"base.{seen.problem.path}"
            about = f"in {seen.count} of {num_points} points, the first {point_text(seen.first)}"
            hint = "; ".join(part for part in (seen.problem.hint, "" if seen.count == num_points else about) if part)
            listed.append(Problem(path=where, value=seen.problem.value, expected=seen.problem.expected, hint=hint))
        return listed


def _make_all(config: SweepConfig) -> tuple[tuple[PlannedTrial, ...], list[Problem]]:
    """Make the trials of all points, and of the corners where not all points are known or drawn from a continuum."""
    space, base = config.space, config.base
    if config.search.name == "grid":
        points, more = grid_points(space, base), []
    elif config.search.name == "random":
        points, more = draw_points(space, base, config.search.num_points, config.search.seed), corners(space, base)
    else:
        points, more = corners(space, base), []
    problems = _Problems()
    made = []
    for number, point in enumerate([*points, *more]):
        try:
            trial = make_trial(config, number, point)
        except ConfigError as error:
            problems.add(error, point)
        else:
            made.append(trial)
    listed = problems.listed(len(points) + len(more), list(space))
    absent = [key for key in space if not any(key in point for point in [*points, *more])]
    listed += [_problem(f"space.{key}.when", dict(space[key].when), "a condition that some point meets") for key in absent]
    if not listed:
        if not made:
            return (), [_problem("space", "no point", "at least one point")]
        load_config(trial_tree(config, points[0]))  # files are looked for once; nothing else can be wrong any more
        listed = _scheduler_problems(config, made[: len(points)])
    return tuple(made[: len(points)]), listed


def _scheduler_problems(config: SweepConfig, trials: Sequence[PlannedTrial]) -> list[Problem]:
    """Options of the scheduler that would have no effect."""
    scheduler = config.scheduler
    if scheduler.name == "none":
        return []
    count = len(trials) if config.search.name != "optuna" else config.search.num_points
    longest = max(trial.rounds for trial in trials)
    problems = []
    if scheduler.min_rounds >= longest:
        expected = f"a first rung before the last round, {longest}"
        problems.append(_problem("scheduler.min_rounds", scheduler.min_rounds, expected, "there would be nothing to stop early"))
    least = scheduler.min_points + 1 if scheduler.name == "median" else 2
    if count < least:
        expected = f"at least {least} points, or scheduler: none"
        problems.append(_problem("scheduler.name", scheduler.name, expected, f"the sweep has {count}; nothing would be stopped"))
    return problems


def _problem(path: str, value: Any, expected: str, hint: str = "") -> Problem:
    return Problem(path=path, value=value_text(value), expected=expected, hint=hint)
