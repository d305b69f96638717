"""Writes the report of a run, an experiment or a sweep again from its folder."""

from __future__ import annotations

from pathlib import Path

from fedgraft.errors import ResultsError
from fedgraft.platform.comparison import write_sweep_report
from fedgraft.platform.comparison.entries import near_by
from fedgraft.platform.report import write_report
from fedgraft.platform.results import read_comparison, read_run

__all__ = ["rewrite_report"]


def rewrite_report(folder: Path, path: Path | None = None) -> Path:
    """Write ``report.html`` of what a folder holds; ``fedgraft.compare`` puts several side by side.

    Args:
        folder: A run's (with ``run.json``), an experiment's (``comparison.json``) or a sweep's (``sweep.json``).
        path: The file; ``None``: ``report.html`` in the folder.

    Returns:
        The file.

    Raises:
        ResultsError: The folder is none of them, or a record in it cannot be read.
        FedgraftError: The file cannot be written.
    """
    target = path or folder / "report.html"
    if (folder / "sweep.json").is_file():
        return write_sweep_report(folder, target)
    if (folder / "comparison.json").is_file():
        return write_report(read_comparison(folder), target)
    if (folder / "run.json").is_file():
        return write_report(read_run(folder), target)
    raise ResultsError(f"{folder} holds neither sweep.json, comparison.json nor run.json", near_by(folder))
