"""A finished sweep as tables for a terminal: points by mean and spread over seeds; what was stopped early or failed apart."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from fedgraft.platform.results import read_comparison, summary
from fedgraft.tuning.journal import TrialRecord
from fedgraft.tuning.space import point_text
from fedgraft.tuning.sweep import SweepResult
from fedgraft.tuning.sweep_config import SPLIT_METRICS

__all__ = ["sweep_tables"]

_COLUMNS = (("last_personal_nll", "own NLL"), ("last_worst_client_nll", "worst client"), ("last_retention_nll", "general NLL"))


def sweep_tables(result: SweepResult) -> list[RenderableType]:
    """Draw the points that ran to their end, best first, then those that were stopped early, then those that failed."""
    sign = 1.0 if result.mode == "min" else -1.0
    finished = sorted(result.of("finished"), key=lambda trial: sign * (math.inf if trial.score is None else trial.score))
    parts: list[RenderableType] = []
    if finished:
        parts.append(_finished(result, finished))
    stopped = result.of("stopped_early")
    if stopped:
        parts.append(_stopped(result, stopped))
    failed = result.of("failed")
    if failed:
        lines = [f"{trial.trial_id} ({point_text(trial.point)}): {trial.error}" for trial in failed]
        parts.append(Text("\n".join([f"{len(failed)} of {len(result.trials)} trials failed", *lines]), style="red"))
    where = f"{result.folder}" + (f"; report {result.report}" if result.report else "")
    parts.append(Text(where))
    return parts


def _finished(result: SweepResult, trials: Sequence[TrialRecord]) -> Table:
    split = "validation" if result.metric in SPLIT_METRICS else "held-out"
    table = _table(
        f"{len(trials)} points, best first", f"mean +- deviation over seeds; score: {result.metric} on {split} examples"
    )
    frames = {trial.trial_id: summary(read_comparison(result.folder / trial.folder)).iloc[0] for trial in trials}
    columns = [(name, title) for name, title in _COLUMNS if any(pd.notna(frame[name]) for frame in frames.values())]
    for title in ("trial", "point", "rounds", "score", *(title for _, title in columns)):
        table.add_column(title, justify="left" if title in ("trial", "point") else "right")
    for place, trial in enumerate(trials):
        frame = frames[trial.trial_id]
        cells = [trial.trial_id, point_text(trial.point), str(trial.rounds_done), _number(trial.score)]
        cells += [_with_spread(frame[name], frame[f"{name}_std"]) for name, _ in columns]
        table.add_row(*(Text(cell) for cell in cells), style="bold" if place == 0 and len(trials) > 1 else "")
    return table


def _stopped(result: SweepResult, trials: Sequence[TrialRecord]) -> Table:
    table = _table(f"{len(trials)} points stopped early", "after fewer rounds: their scores do not compare with those above")
    for title in ("trial", "point", "rounds", "score then"):
        table.add_column(title, justify="left" if title in ("trial", "point") else "right")
    for trial in trials:
        cells = (trial.trial_id, point_text(trial.point), f"{trial.rounds_done} of {trial.rounds}", _number(trial.score))
        table.add_row(*(Text(cell) for cell in cells))
    return table


def _table(title: str, caption: str) -> Table:
    return Table(
        title=title,
        caption=caption,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )


def _number(value: float | None) -> str:
    return "-" if value is None or pd.isna(value) else f"{value:.4f}"


def _with_spread(mean: float, spread: float) -> str:
    return _number(mean) if pd.isna(spread) else f"{mean:.4f} +- {spread:.4f}"
