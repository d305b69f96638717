"""The searchers and the scheduler that Ray Tune asks: they know trials by their own names, so that a sweep can be resumed.

Nothing here is read from what Tune stores: a resumed sweep gets its searcher and scheduler from ``sweep.json``. Tune keeps
copies of both with pickle; they are told to leave their content out.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from fedgraft.seeding import derive_seed
from fedgraft.tuning.journal import TrialRecord
from fedgraft.tuning.space import Dimension, Point
from fedgraft.tuning.sweep_config import SweepConfig

__all__ = ["Husk", "ListedTrials", "OptunaTrials", "RungScheduler", "make_scheduler"]


class Husk:
    """Pickles as an empty object."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class ListedTrials(Husk, Searcher):  # type: ignore[misc]
    """Gives trials that are known beforehand, in their order.

    Args:
        configs: What each trial's process gets.
    """

    def __init__(self, configs: Iterable[dict[str, Any]]) -> None:
        super().__init__(metric="score", mode="min")
        self._left: deque[dict[str, Any]] = deque(configs)

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Give the next trial."""
        return self._left.popleft() if self._left else str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing follows from a result."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to keep: see the module."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing is read back."""


class OptunaTrials(ListedTrials):
    """Gives half-finished trials first, then points that Optuna proposes, until there are as many trials as wanted.

    Args:
        config: The sweep.
        configs: What the processes of half-finished trials get.
        records: Trials of this sweep so far; Optuna learns from those that are over.
        begin: Makes a trial of what is proposed and puts it into the journal; gives what its process gets, or ``None`` where
            the point is invalid (which counts as a trial that failed).
    """

    def __init__(
        self,
        config: SweepConfig,
        configs: Iterable[dict[str, Any]],
        records: Sequence[TrialRecord],
        begin: Callable[[Point], dict[str, Any] | None],
    ) -> None:
        super().__init__(configs)
        import optuna  # the package is optional
        from ray.tune.search.optuna import OptunaSearch

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._space = config.space
        self._num_left = config.search.num_points - len(records)  # type: ignore[union-attr]
        self._begin = begin
        # A sampler begins anew with every command: with the same seed it would propose the first points again.
        seed = derive_seed(config.search.seed, "sweep/optuna", round_idx=len(records)) % 2**32  # type: ignore[union-attr]
        domains = OptunaSearch.convert_search_space({key: _domain(dim) for key, dim in config.space.items()})
        self._optuna = OptunaSearch(domains, metric="score", mode=config.mode, seed=seed)
        self._names: dict[str, str] = {}
        for record in records:
            if record.is_over and record.proposed is not None and record.score is not None:
                self._optuna.add_evaluated_point(
                    self._indices(record.proposed), record.score, pruned=record.status == "stopped_early"
                )

    def suggest(self, trial_id: str) -> dict[str, Any] | str:
        """Give the next trial."""
        if self._left:
            return self._left.popleft()
        while self._num_left > 0:
            self._num_left -= 1
            name = f"{trial_id}/{self._num_left}"  # an invalid point and the next one are two to Optuna
            found = self._optuna.suggest(name)
            values = {key: dim.values() for key, dim in self._space.items()}
            proposed = {key: each[int(found[key])] if each else float(found[key]) for key, each in values.items()}
            config = self._begin(proposed)
            if config is not None:
                self._names[trial_id] = name
                return config
            self._optuna.on_trial_complete(name, error=True)
        return str(Searcher.FINISHED)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Tell Optuna; a trial that was stopped early has no score that could stand beside the others."""
        if trial_id in self._names:
            is_over = result is not None and bool(result.get("is_last"))
            self._optuna.on_trial_complete(self._names[trial_id], result=result if is_over else None, error=error)

    def _indices(self, proposed: Mapping[str, Any]) -> dict[str, Any]:
        values = {key: dim.values() for key, dim in self._space.items()}
        return {key: each.index(proposed[key]) if each else proposed[key] for key, each in values.items()}


def _domain(dim: Dimension) -> Any:
    values = dim.values()
    if values is not None:
        # Places in the list: Optuna takes neither mappings nor lists for values.
        return tune.randint(0, len(values)) if dim.integer is not None else tune.choice(range(len(values)))
    limits = dim.uniform or dim.log_uniform
    assert limits is not None
    return tune.uniform(*limits) if dim.uniform is not None else tune.loguniform(*limits)


@dataclass(frozen=True, slots=True)
class _Entry:
    """A trial as the inner scheduler knows it: the same one whether this command ran it or an earlier one."""

    trial_id: str


class RungScheduler(Husk, FIFOScheduler):  # type: ignore[misc]
    """Judges trials by their own names, each rung once.

    Args:
        inner: Decides.
        records: Trials so far; what they reached is told to ``inner`` first, in the order of the rungs.
    """

    def __init__(self, inner: TrialScheduler, records: Iterable[TrialRecord]) -> None:
        super().__init__()
        self._inner = inner
        self._entries: dict[str, _Entry] = {}
        self._seen: set[tuple[str, int]] = set()
        known = [(int(rung), record.trial_id, score) for record in records for rung, score in record.rungs.items()]
        for rung, trial_id, score in sorted(known):
            self._tell(trial_id, {"rounds": rung, "score": score})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Say whether a trial goes on."""
        return self._tell(_own_id(trial), result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Note the last rung."""
        self._tell(_own_id(trial), result)

    def _tell(self, trial_id: str, result: dict[str, Any]) -> str:
        if trial_id not in self._entries:
            self._entries[trial_id] = _Entry(trial_id)
            self._inner.on_trial_add(None, self._entries[trial_id])
        place = (trial_id, int(result["rounds"]))
        if place in self._seen:
            return str(TrialScheduler.CONTINUE)
        self._seen.add(place)
        return str(self._inner.on_trial_result(None, self._entries[trial_id], result))


def _own_id(trial: Any) -> str:
    return str(trial.config["job"]["trial_id"])


def make_scheduler(config: SweepConfig, rounds: int, records: Iterable[TrialRecord]) -> TrialScheduler:
    """Make the scheduler of a sweep.

    Args:
        config: The sweep.
        rounds: Of the longest trial.
        records: Trials so far.
    """
    scheduler = config.scheduler
    named = {"time_attr": "rounds", "metric": "score", "mode": config.mode}
    if scheduler.name == "none":
        return FIFOScheduler()
    if scheduler.name == "asha":
        inner = AsyncHyperBandScheduler(
            max_t=rounds, grace_period=scheduler.min_rounds, reduction_factor=scheduler.reduction, **named
        )
    else:
        inner = MedianStoppingRule(
            grace_period=scheduler.min_rounds,
            min_samples_required=scheduler.min_points,
            min_time_slice=float("inf"),  # a trial whose rung cannot be judged yet goes on; it is not set aside
            **named,
        )
    return RungScheduler(inner, records)
