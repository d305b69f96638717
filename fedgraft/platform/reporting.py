"""Writes reports again from run folders: of one run or comparison, or of several that are put side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedgraft.errors import FedgraftError
from fedgraft.platform.report import write_report
from fedgraft.platform.results import ComparisonResult, RunResult, read_comparison, read_run

__all__ = ["rewrite_report"]


def rewrite_report(folders: Sequence[Path], path: Path | None = None) -> Path:
    """Write ``report.html`` of what the folders hold.

    Args:
        folders: Run folders (with ``run.json``) or experiments (with ``comparison.json``). Several are compared; a label
            that two of them use gets its folder's name in front.
        path: The file; ``None``: ``report.html`` in the only folder, else in the current directory.

    Returns:
        The file.

    Raises:
        FedgraftError: A folder holds no run, or the runs were not on the same clients.
    """
    results = [_read(folder) for folder in folders]
    if len(results) == 1:
        return write_report(results[0], path or folders[0] / "report.html")
    return write_report(_together(results), path or Path("report.html"))


def _read(folder: Path) -> RunResult | ComparisonResult:
    if (folder / "comparison.json").is_file():
        return read_comparison(folder)
    if (folder / "run.json").is_file():
        return read_run(folder)
    known = sorted(each.parent.name for each in folder.glob("*/comparison.json"))[-3:]
    hint = f"name one of the folders in it: {', '.join(known)}" if known else "name a folder under runs/"
    raise FedgraftError(f"{folder} holds neither run.json nor comparison.json", hint)


def _together(results: Sequence[RunResult | ComparisonResult]) -> ComparisonResult:
    entries: list[tuple[str, str, tuple[RunResult, ...]]] = []
    for result in results:
        folder = result.folder.resolve()
        if isinstance(result, RunResult):
            place = folder.parent.parent if folder.name.startswith("seed-") else folder
            entries.append((place.name, result.label, (result,)))
        else:
            entries += [(folder.name, label, result.runs[label]) for label in result.labels]
    _check_clients([run for _, _, runs in entries for run in runs])
    used = [label for _, label, _ in entries]
    runs: dict[str, tuple[RunResult, ...]] = {}
    for where, label, found in entries:
        name = label if used.count(label) == 1 else f"{where} {label}"
        runs[name] = runs.get(name, ()) + found
    bases = [result.base for result in results if isinstance(result, ComparisonResult) and result.base in runs]
    return ComparisonResult(folder=Path.cwd(), labels=tuple(runs), base=bases[0] if bases else None, runs=runs)


def _check_clients(runs: Sequence[RunResult]) -> None:
    """Numbers of different data say nothing beside each other."""
    by_seed: dict[object, RunResult] = {}
    for run in runs:
        first = by_seed.setdefault(run.info.get("seed"), run)
        if run.info.get("data_fingerprint") != first.info.get("data_fingerprint"):
            raise FedgraftError(
                f"{first.folder} and {run.folder} were not run on the same clients' data, so they cannot be compared",
                "compare runs of one data section and the same seeds",
            )
