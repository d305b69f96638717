"""Which report is written of a folder, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedgraft.errors import ResultsError
from fedgraft.platform.reporting import rewrite_report
from fedgraft.platform.results import ComparisonResult, RunResult


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    seen: list[tuple[Any, Path]] = []

    def write(result: Any, path: Path) -> Path:
        seen.append((result, path))
        return path

    monkeypatch.setattr("fedgraft.platform.reporting.write_report", write)
    monkeypatch.setattr("fedgraft.platform.reporting.write_sweep_report", write)
    return seen


def make_run(folder: Path, label: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"run_id": "x", "label": label, "status": "running"}))
    (folder / "evaluations.jsonl").write_text("")
    return folder


def make_comparison(folder: Path, label: str) -> Path:
    make_run(folder / label / "seed-0", label)
    (folder / "comparison.json").write_text(json.dumps({"labels": [label], "runs": {label: [f"{label}/seed-0"]}}))
    return folder


def test_a_report_stays_where_it_was(tmp_path: Path, written: list[tuple[Any, Path]]) -> None:
    run = make_run(tmp_path / "a", "flex")
    assert rewrite_report(run) == run / "report.html"
    comparison = make_comparison(tmp_path / "b", "flex")
    assert rewrite_report(comparison, tmp_path / "mine.html") == tmp_path / "mine.html"
    sweep = tmp_path / "c"
    sweep.mkdir()
    (sweep / "sweep.json").write_text("{}")
    assert rewrite_report(sweep) == sweep / "report.html"
    assert isinstance(written[0][0], RunResult)
    assert isinstance(written[1][0], ComparisonResult)
    assert written[2][0] == sweep


def test_a_folder_without_a_run_names_those_in_it(tmp_path: Path) -> None:
    make_comparison(tmp_path / "quickstart-1", "flex")
    with pytest.raises(ResultsError, match="quickstart-1"):
        rewrite_report(tmp_path)
