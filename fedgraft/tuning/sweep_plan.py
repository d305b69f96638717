"""What a sweep will need, said before anything is started: points, trials, rounds, places, and a rough time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fedgraft.errors import ClusterError, ConfigError, Problem
from fedgraft.platform.loading import check_inputs
from fedgraft.platform.plan import MachineFacts, make_plan, this_machine
from fedgraft.tuning.placement import bundles_text, require_room
from fedgraft.tuning.space import point_text
from fedgraft.tuning.sweep_loading import PlannedTrial, Sweep

__all__ = ["SweepPlan", "plan_sweep"]

_MAX_ROWS = 40


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepPlan:
    """A sweep before it runs; print it with rich.

    Attributes:
        sweep: What is planned.
        seconds: Rough time of each trial with all its seeds by name, run to its end; ``None`` where it is not known.
        at_once: Trials that run side by side; ``None`` on a cluster that is joined, whose size is not known here.
        refusal: Why it cannot run on this machine; ``None`` where it can, or where a cluster is joined.
    """

    sweep: Sweep
    seconds: Mapping[str, float | None]
    at_once: int | None
    refusal: ConfigError | ClusterError | None

    def require_fit(self) -> None:
        """Refuse a sweep that cannot run here.

        Raises:
            ConfigError: A trial does not fit the memory.
            ClusterError: A trial wants more than the machine has.
        """
        if self.refusal is not None:
            raise self.refusal

    @property
    def total_seconds(self) -> float | None:
        """Rough time of all trials run to their ends, as many at once as there is room for."""
        known = [second for second in self.seconds.values() if second is not None]
        if len(known) < len(self.seconds) or self.at_once is None:
            return None
        config = self.sweep.config
        total = sum(known)
        if config.search.name == "optuna":
            total *= config.search.num_points / len(known)
        return total / min(self.at_once, self.num_trials)

    @property
    def num_trials(self) -> int:
        """Trials in all."""
        search = self.sweep.config.search
        return search.num_points if search.name == "optuna" else len(self.sweep.trials)

    def __rich__(self) -> RenderableType:
        """Draw it."""
        return Group(self._facts(), Text(), self._table(), self._notes())

    def _facts(self) -> Table:
        config = self.sweep.config
        shown = self.sweep.trials or self.sweep.corners
        seeds = len(shown[0].config.seeds)
        rounds = sum(trial.rounds for trial in shown) * seeds
        grid = Table.grid(padding=(0, 2))
        at_once = "as the cluster has room" if self.at_once is None else str(self.at_once)
        rows = [
            ("sweep", f"{config.name}: {', '.join(config.space)}"),
            ("trials", f"{self.num_trials} points, one trial each, with {seeds} seed(s); {config.search.name} search"),
            ("judged by", f"{config.metric} ({config.mode}), mean over seeds, on {config.split} examples"),
            ("scheduler", self._scheduler()),
            ("at once", at_once),
        ]
        if self.sweep.trials:
            rows.insert(2, ("rounds", f"{rounds} in all, if nothing is stopped early"))
        total = self.total_seconds
        rows.append(("time", f"about {_duration(total)}, to within a factor of three" if total else "not known"))
        for name, text in rows:
            grid.add_row(Text(name, style="bold"), Text(text))
        return grid

    def _scheduler(self) -> str:
        scheduler = self.sweep.config.scheduler
        if scheduler.name == "none":
            return "none: every trial runs to its end"
        longest = max((*self.sweep.trials, *self.sweep.corners), key=lambda trial: trial.rounds)
        rungs = ", ".join(str(rung) for rung in longest.rungs)
        return f"{scheduler.name}; all seeds of a trial run to a rung, then it is judged: rounds {rungs}"

    def _table(self) -> Table:
        shown: Sequence[PlannedTrial] = self.sweep.trials or self.sweep.corners
        title = "trials" if self.sweep.trials else "corners of the space, all of them valid"
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for name in ("trial", "point", "rounds", "place", "time"):
            table.add_column(name, justify="right" if name in ("rounds", "time") else "left")
        for trial in shown[:_MAX_ROWS]:
            cells = [trial.trial_id, point_text(trial.point), str(trial.rounds), bundles_text(trial.bundles)]
            table.add_row(*(Text(cell) for cell in cells), Text(_duration(self.seconds[trial.trial_id])))
        if len(shown) > _MAX_ROWS:
            table.add_row("...", Text(f"and {len(shown) - _MAX_ROWS} more"), "", "", "")
        return table

    def _notes(self) -> Text:
        return Text("place: what a trial's placement group reserves; time: of all seeds of a trial on one machine", style="dim")


def plan_sweep(sweep: Sweep) -> SweepPlan:
    """Work out what a sweep will need, without starting Ray or loading weights.

    Args:
        sweep: As ``load_sweep`` gives it.

    Raises:
        ConfigError: A file that it names is not there, or a point asks for what its model cannot give, such as a budget.
        ModelError: The model's configuration cannot be read.
    """
    shown = sweep.trials or sweep.corners
    check_inputs(shown[0].config)
    facts = this_machine()
    problems: list[Problem] = []
    address = sweep.config.resources.address or shown[0].config.executor.address
    seconds: dict[str, float | None] = {}
    known: dict[str, tuple[float | None, ConfigError | None]] = {}
    refusal: ConfigError | ClusterError | None = None
    machine: MachineFacts | None = None
    for trial in shown:
        # Neither who has what nor at which rate it is trained changes what a trial takes, and a plan takes a while.
        key = trial.config.model_dump_json(exclude={"training": {"learning_rate"}, "data": {"partition"}})
        if key not in known:
            try:
                plan = make_plan(trial.config, machine)
            except ConfigError as error:  # what only the model's sizes tell
                problems += [_at(problem, trial) for problem in error.problems]
                known[key] = (None, None)
            else:
                machine = machine or plan.machine
                known[key] = (plan.seconds, plan.refusal)
        seconds[trial.trial_id], refused = known[key]
        refusal = refusal or refused
    if problems:
        raise ConfigError(f"sweep {sweep.config.name}", tuple(problems))
    node = {"CPU": float(facts.cores), "GPU": float(facts.gpus)}
    at_once = None
    if not address:
        try:
            require_room(shown, [node])
        except ClusterError as error:
            refusal = refusal or error
        at_once = _at_once(shown, node, sweep.config.resources.concurrency)
    return SweepPlan(sweep=sweep, seconds=seconds, at_once=at_once, refusal=refusal if not address else None)


def _at(problem: Problem, trial: PlannedTrial) -> Problem:
    """A problem of a trial, with its point."""
    hint = "; ".join(part for part in (problem.hint, f"at {point_text(trial.point)}") if part)
    return replace(problem, hint=hint)


def _at_once(trials: Sequence[PlannedTrial], node: Mapping[str, float], concurrency: int | None) -> int:
    """Trials that one node runs side by side, by those that want most."""
    most = []
    for kind, has in node.items():
        wanted = max(sum(bundle.get(kind, 0.0) for bundle in trial.bundles) for trial in trials)
        if wanted:
            most.append(int(has / wanted))
    return max(1, min([*most, *([concurrency] if concurrency else [])], default=1))


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
