"""Compares runs: one object with data frames, a table, and files to write."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from rich.console import Group

from fedgraft.errors import ResultsError
from fedgraft.platform.comparison import terminal
from fedgraft.platform.comparison.charts import comparison_charts
from fedgraft.platform.comparison.entries import Sources, find_entries
from fedgraft.platform.comparison.frames import Frames, build_frames
from fedgraft.platform.comparison.keys import varying_keys
from fedgraft.platform.comparison.mlflow_query import query_entries
from fedgraft.platform.comparison.page import write_page
from fedgraft.platform.comparison.paired import choose_baseline, paired_tests
from fedgraft.platform.report.style import write_chart
from fedgraft.platform.results import QUANTITIES, Quantity

__all__ = ["METRICS", "Comparison", "compare", "write_sweep_report"]

METRICS = ("personal_nll", "token_accuracy", "rouge_l")
"""What settings may be judged by: quantities of which every client has a value."""

_PAPER_WIDTH = 6.9  # inches over both columns of a page, as most proceedings have them
_LEAST_WIDTH, _MOST_WIDTH = 4.0, 20.0


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Runs side by side. All numbers are of each run's last judged round, never of its best.

    A *setting* is a method and a point (values of ``keys``); its runs differ in the seed only.

    Attributes:
        settings: A row a setting with a finished run, indexed by its name: ``label``, ``method``, a column a key, ``data``
            (which settings have the same clients), ``num_seeds``, ``seeds``, the quantities of
            ``fedgraft.platform.results.QUANTITIES``, ``bytes_up``, ``bytes_down``, ``seconds`` and ``label_distance`` as
            means over seeds, and ``<number>_std``, the sample deviation (NaN with one seed).
        runs: A row a run, or a place for one: the same, and ``seed``, ``status``, ``is_averaged``, ``source``, ``trial``,
            ``rounds_done``, ``rounds``, ``error``, ``folder``. Only those with ``is_averaged`` are part of ``settings``.
        clients: A row a client of such a run: ``client_id``, ``client``, and its values.
        tests: Paired tests against the baseline; see ``fedgraft.platform.comparison.paired``.
        keys: Key paths by which settings differ, besides the method.
        axes: The two keys of the heatmap, where they were named.
        metric: What settings are judged by.
        baseline: Label or setting that the others are tested against; ``None``: the first setting on the same clients.
        is_baseline_named: Whether the user chose it.
        notes: What a reader should know, such as a sweep that still runs.
    """

    settings: pd.DataFrame
    runs: pd.DataFrame
    clients: pd.DataFrame
    tests: pd.DataFrame
    keys: tuple[str, ...]
    axes: tuple[str, ...]
    metric: Quantity
    baseline: str | None
    is_baseline_named: bool
    notes: tuple[str, ...] = field(default=())

    @property
    def left_out(self) -> pd.DataFrame:
        """The rows of ``runs`` that are in no average: failed, stopped, stopped early, running, pending."""
        return self.runs[~self.runs["is_averaged"]]

    def table(self) -> Group:
        """Give the tables for a terminal: settings, tests, and what was left out; ``rich`` prints them."""
        return terminal.tables(self)

    def to_csv(self, path: Path | str) -> Path:
        """Write one row a point, method, seed and client; a run that is in no average has one row without a client.

        A run's own quantities stand beside its clients' as ``run_<name>``.

        Raises:
            ResultsError: The file cannot be written.
        """
        path = Path(path)
        runs = self.runs.drop(columns=["label", "method", *self.keys, "data"])
        names = [quantity.name for quantity in QUANTITIES]
        runs = runs.rename(columns={name: f"run_{name}" for name in names})
        on = ["setting", "seed", "source", "trial"]
        heads = self.runs[[*on, "label", "method", *self.keys, "data"]]
        values = self.clients.drop(columns=["label", "method", *self.keys, "data"]).astype({"seed": "Int64"})
        table = heads.merge(values, on=on, how="left").merge(runs, on=on, how="left")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)
        except OSError as error:
            raise ResultsError(f"writing {path}: {error}", "give a path that can be written") from error
        return path

    def write_html(self, path: Path | str) -> Path:
        """Write the report: one file that loads nothing from anywhere.

        Raises:
            FedgraftError: The file cannot be written.
        """
        return write_page(self, Path(path))

    def write_figures(self, folder: Path | str, width: float = _PAPER_WIDTH) -> tuple[Path, ...]:
        """Write every figure of the report as SVG and as PNG, fit for a paper.

        Args:
            folder: Made where missing.
            width: Inches of a figure over the whole text, 4 to 20; small figures are half as wide.

        Raises:
            ResultsError: The width is out of range.
            FedgraftError: The folder cannot be written.
        """
        if not _LEAST_WIDTH <= width <= _MOST_WIDTH:
            raise ResultsError(f"width: got {width:g}; expected {_LEAST_WIDTH:g} to {_MOST_WIDTH:g} inches")
        return tuple(path for chart in comparison_charts(self) for path in write_chart(chart, Path(folder), width))


def compare(
    targets: Sequence[Path | str] = (),
    *,
    mlflow: str | None = None,
    uri: str | None = None,
    metric: str = "personal_nll",
    baseline: str | None = None,
    keys: Sequence[str] = (),
) -> Comparison:
    """Compare runs.

    Args:
        targets: Folders of runs, experiments and sweeps; what is named twice counts once.
        mlflow: Instead of folders, a query to MLflow, e.g. ``tags."fedgraft.method" = 'flex'``.
        uri: Its store; ``None``: ``MLFLOW_TRACKING_URI``, else ``runs/mlflow.db``.
        metric: One of ``METRICS``.
        baseline: A method's label, which stands for its setting on the same clients, or one setting's name. ``None``:
            ``fedavg`` if it takes part, else the first method.
        keys: The two key paths of the heatmap; ``method`` stands for the methods. Empty: chosen.

    Raises:
        ResultsError: Nothing is finished, a target is no run, or an argument does not fit; exit code 2.
    """
    if bool(targets) == (mlflow is not None):
        raise ResultsError(
            "expected either folders to compare or a query with --mlflow", "name folders under runs/, or give --mlflow QUERY"
        )
    if uri is not None and mlflow is None:
        raise ResultsError("--uri has no effect without --mlflow", "remove it, or give --mlflow QUERY")
    quantities = {quantity.name: quantity for quantity in QUANTITIES if quantity.name in METRICS}
    if metric not in quantities:
        raise ResultsError(f"--metric: got {metric!r}; expected one of: {', '.join(METRICS)}")
    with contextlib.ExitStack() as stack:
        sources = (
            find_entries([Path(target) for target in targets])
            if mlflow is None
            else stack.enter_context(query_entries(mlflow, uri))
        )
        return _build(sources, quantities[metric], baseline, tuple(keys))


def write_sweep_report(folder: Path | str, path: Path | None = None) -> Path:
    """Write the report of a sweep.

    Args:
        folder: The sweep's.
        path: The file; ``None``: ``report.html`` in the folder.

    Raises:
        ResultsError: No trial is finished, or a record cannot be read.
    """
    return compare([folder]).write_html(path or Path(folder) / "report.html")


def _build(sources: Sources, metric: Quantity, baseline: str | None, axes: tuple[str, ...]) -> Comparison:
    found = varying_keys(sources)
    frames = build_frames(sources.entries, found)
    if not frames.runs["is_averaged"].any():
        counts = frames.runs["status"].value_counts()
        what = ", ".join(f"{count} {str(status).replace('_', ' ')}" for status, count in counts.items())
        raise ResultsError(
            f"nothing to compare: none of {len(frames.runs)} runs is finished ({what})",
            "wait for the first run to finish, or resume what was stopped",
        )
    if frames.settings[metric.name].isna().all():
        raise ResultsError(f"no finished run has {metric.name}", f"choose another --metric: {', '.join(METRICS)}")
    known = ("method", *found)
    if axes and (len(axes) != 2 or len(set(axes)) != 2 or not set(axes) <= set(known)):
        raise ResultsError(f"--keys: got {', '.join(axes)}; expected two of: {', '.join(known)}")
    chosen = choose_baseline(frames.settings, baseline)
    tests = paired_tests(
        frames.settings,
        frames.runs,
        frames.clients,
        keys=found,
        metric=metric.name,
        is_lower_better=metric.is_lower_better,
        baseline=chosen,
    )
    return Comparison(
        settings=frames.settings,
        runs=frames.runs,
        clients=frames.clients,
        tests=tests,
        keys=found,
        axes=axes,
        metric=metric,
        baseline=chosen,
        is_baseline_named=baseline is not None,
        notes=(*sources.unfinished, *_notes(frames, metric)),
    )


def _notes(frames: Frames, metric: Quantity) -> list[str]:
    notes = []
    settings = frames.settings
    lacking = [str(name) for name in settings.index[settings[metric.name].isna()]]
    if lacking:
        notes.append(f"no {metric.title} (not measured, or not a number): {', '.join(lacking)}")
    gaps = frames.clients[frames.clients[metric.name].isna()]
    for name in settings.index[settings[metric.name].notna()]:
        count = int((gaps["setting"] == name).sum())
        if count:
            clients = f"{count} client{'s' if count != 1 else ''}"
            notes.append(f"{name}: {clients} without a number (counted with each seed); its means are over the others")
    if int(settings["num_seeds"].max()) == 1:
        notes.append("one seed: no spread over seeds, and what another seed would give is not known")
    elif settings["num_seeds"].nunique() > 1:
        notes.append(f"settings have {int(settings['num_seeds'].min())} to {int(settings['num_seeds'].max())} seeds")
    if settings["data"].nunique() > 1:
        notes.append("settings on different clients' data stand apart: their scores say nothing beside each other")
    return notes
