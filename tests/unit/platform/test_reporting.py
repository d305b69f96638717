"""Which runs a report is written of, and where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fedgraft.errors import FedgraftError
from fedgraft.platform.reporting import rewrite_report
from fedgraft.platform.results import ComparisonResult, RunResult


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Path]]:
    seen: list[tuple[Any, Path]] = []

    def write(result: Any, path: Path) -> Path:
        seen.append((result, path))
        return path

    monkeypatch.setattr("fedgraft.platform.reporting.write_report", write)
    return seen


def make_run(folder: Path, label: str, seed: int = 0, data: str = "same") -> Path:
    folder.mkdir(parents=True)
    info = {"run_id": "x", "label": label, "status": "running", "seed": seed, "data_fingerprint": data}
    (folder / "run.json").write_text(json.dumps(info))
    (folder / "evaluations.jsonl").write_text("")
    return folder


def make_comparison(folder: Path, *labels: str) -> Path:
    runs = {label: [f"{label}/seed-{seed}" for seed in (0, 1)] for label in labels}
    for label in labels:
        for seed in (0, 1):
            make_run(folder / label / f"seed-{seed}", label, seed, f"data {seed}")
    base = "base" if "base" in labels else None
    (folder / "comparison.json").write_text(json.dumps({"labels": labels, "runs": runs, "base": base, "seeds": [0, 1]}))
    return folder


def test_one_folder_keeps_its_report_where_it_was(tmp_path: Path, written: list[tuple[Any, Path]]) -> None:
    run = make_run(tmp_path / "a", "flex")
    assert rewrite_report([run]) == run / "report.html"
    comparison = make_comparison(tmp_path / "b", "base", "flex")
    assert rewrite_report([comparison], tmp_path / "mine.html") == tmp_path / "mine.html"
    assert isinstance(written[0][0], RunResult)
    assert isinstance(written[1][0], ComparisonResult)


def test_several_are_put_side_by_side(tmp_path: Path, written: list[tuple[Any, Path]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_comparison(tmp_path / "first", "base", "flex")
    second = make_comparison(tmp_path / "second", "flex", "fedavg")
    single = make_run(tmp_path / "third" / "local" / "seed-0", "local", 0, "data 0")
    assert rewrite_report([first, second, single]) == Path("report.html")
    ((result, _),) = written
    assert result.labels == ("base", "first flex", "second flex", "fedavg", "local")
    assert [len(result.runs[label]) for label in result.labels] == [2, 2, 2, 2, 1]
    assert result.base == "base"


def test_runs_on_other_clients_are_not_compared(tmp_path: Path, written: list[tuple[Any, Path]]) -> None:
    folders = [make_run(tmp_path / "a", "a"), make_run(tmp_path / "b", "b", data="other")]
    with pytest.raises(FedgraftError, match="not run on the same clients"):
        rewrite_report(folders)
    assert written == []


def test_a_folder_without_a_run_names_those_in_it(tmp_path: Path) -> None:
    make_comparison(tmp_path / "quickstart-1", "flex")
    with pytest.raises(FedgraftError, match="quickstart-1"):
        rewrite_report([tmp_path])
