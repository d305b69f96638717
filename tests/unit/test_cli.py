"""The command line through typer's runner, and its start in processes of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table
from typer.testing import CliRunner

import fedgraft
from fedgraft.cli import app
from fedgraft.errors import ClusterError, QuorumError, RunInterrupted, StorageError
from fedgraft.platform.config import RunConfig
from fedgraft.platform.doctor import Check
from fedgraft.platform.progress import Event

RUNNER = CliRunner()


@dataclass
class FakeRun:
    """Stands for ``fedgraft.run``: notes its calls, tells two events, then gives or raises what it was told to."""

    calls: list[tuple[Any, Any]] = field(default_factory=list)
    error: BaseException | None = None

    def __call__(
        self, config: RunConfig | None, *, resume: Path | None = None, address: str | None = None, on_event: Any = None
    ) -> str:
        self.calls.append((config, resume))
        on_event(Event(kind="stage", data={"text": "at work"}))
        if self.error is not None:
            raise self.error
        on_event(Event(kind="done", data={"folder": "runs/x"}))
        return "the result"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> FakeRun:
    fake = FakeRun()
    monkeypatch.setitem(vars(fedgraft), "run", fake)

    def table(result: object, at: str) -> Table:
        found = Table("method")
        found.add_row(f"{at} of {result}")
        return found

    monkeypatch.setattr("fedgraft.platform.results.summary_table", table)
    return fake


def test_run_without_a_file_runs_the_quickstart_and_shows_both_tables(run: FakeRun) -> None:
    result = RUNNER.invoke(app, ["run"])
    assert result.exit_code == 0, result.output
    ((config, resume),) = run.calls
    assert config.name == "quickstart"
    assert resume is None
    for text in ("at work", "done: runs/x", "last of the result", "best of the result"):
        assert text in result.stdout
    assert result.stderr == ""


def test_a_first_argument_with_an_equals_sign_is_an_override(run: FakeRun) -> None:
    assert RUNNER.invoke(app, ["run", "federation.rounds=2", "name=mine"]).exit_code == 0
    config = run.calls[0][0]
    assert (config.name, config.federation.rounds) == ("mine", 2)


def test_a_file_and_overrides(run: FakeRun, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("name: mine\nmethod: {name: flex}\n")
    assert RUNNER.invoke(app, ["run", str(path), "method.n_graft=2", "--quiet"]).exit_code == 0
    config = run.calls[0][0]
    assert (config.name, config.method.n_graft) == ("mine", 2)


def test_quiet_shows_the_result_only(run: FakeRun) -> None:
    result = RUNNER.invoke(app, ["run", "-q"])
    assert "at work" not in result.stdout
    assert "last of the result" in result.stdout


def test_resume_hands_over_the_folder_alone(run: FakeRun, tmp_path: Path) -> None:
    assert RUNNER.invoke(app, ["run", "--resume", str(tmp_path)]).exit_code == 0
    assert run.calls == [(None, str(tmp_path))]
    refused = RUNNER.invoke(app, ["run", "federation.rounds=3", "--resume", str(tmp_path)])
    assert refused.exit_code == 2
    assert "keeps its configuration" in refused.stderr
    assert len(run.calls) == 1


def test_a_dry_run_shows_config_and_plan_and_runs_nothing(run: FakeRun) -> None:
    result = RUNNER.invoke(app, ["run", "--dry-run", "method={name: flex, n_graft: 3}", "rate_search=null"])
    assert result.exit_code == 0, result.output
    assert "n_graft: 3" in result.stdout
    assert "replica" in result.stdout
    assert run.calls == []


def test_a_dry_run_that_cannot_fit_shows_the_plan_and_ends_with_code_2(run: FakeRun) -> None:
    result = RUNNER.invoke(app, ["run", "--dry-run", "federation.batch_size=60000", "data.max_length=1024"])
    assert result.exit_code == 2
    assert "memory of a rank" in result.output
    assert "federation.batch_size" in result.output
    assert "engine.gradient_accumulation_steps=" in result.output
    assert run.calls == []


def test_all_problems_are_shown_once_with_exit_code_2(run: FakeRun) -> None:
    result = RUNNER.invoke(app, ["run", "federation.round=3", "method.name=flxe", "seeds=[x]"])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "quickstart.yaml (packaged): 3 problems" in result.stderr
    assert "federation.round: got 3; expected a known key; did you mean 'rounds'?" in result.stderr
    assert "method.name: got 'flxe'; expected a method's name; did you mean 'flex'?" in result.stderr
    assert "seeds[0]: got 'x'; expected a whole number" in result.stderr
    assert result.stderr.count("federation.round:") == 1
    assert "Traceback" not in result.output
    assert run.calls == []


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ClusterError("cannot start Ray: [port] in use", "try again"),
            3,
            "cannot start Ray: [port] in use\n  what to do: try again",
        ),
        (QuorumError("1 of 8 answered"), 5, "1 of 8 answered"),
        (StorageError("/r/run.json cannot be written: no space is left there", "free space"), 8, "what to do: free space"),
        (
            RunInterrupted("flex stopped after round 2 of 6", "go on with: fedgraft run --resume /r"),
            130,
            "6; go on with: fedgraft",
        ),
        (KeyboardInterrupt(), 130, "start it again"),
    ],
)
def test_errors_have_their_exit_code_and_no_traceback(run: FakeRun, error: BaseException, code: int, text: str) -> None:
    run.error = error
    result = RUNNER.invoke(app, ["run"])
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.output
    if code == 130:
        assert len(result.stderr.strip().splitlines()) == 1


def test_a_bug_is_called_one_and_its_traceback_is_in_a_file(
    run: FakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run.error = ZeroDivisionError("oops")
    result = RUNNER.invoke(app, ["run"])
    assert result.exit_code == 1
    assert "this is a bug in fedgraft: ZeroDivisionError: oops" in result.stderr
    (file,) = tmp_path.glob("fedgraft-bug-*.txt")
    assert str(file) in result.stderr
    assert "Traceback" not in result.stderr
    assert "Traceback" in file.read_text()
    assert "raise self.error" in file.read_text()


def test_methods_lists_paper_and_reconstruction() -> None:
    result = RUNNER.invoke(app, ["methods"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("flex", "arXiv 2506.00965", "reconstructed here: gate form", "private_lora", "McMahan"):
        assert text in result.stdout
    found = {entry["name"]: entry for entry in json.loads(RUNNER.invoke(app, ["methods", "--json"]).stdout)}
    assert {"base", "fedavg", "flex", "local_only", "private_lora"} <= set(found)
    assert {"name", "title", "paper", "summary", "reconstructed", "advice", "options"} <= set(found["flex"])
    options = {option["path"]: option for option in found["flex"]["options"]}
    assert "Grafted experts" in options["n_graft"]["description"]
    assert options["n_graft"]["type"] == "integer >= 1, <= 8"
    assert options["adapter.rank"]["default"] == "8"
    assert options["mode"]["type"] == "additive, convex, row"


def test_methods_tells_all_about_one() -> None:
    result = RUNNER.invoke(app, ["methods", "flex"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for text in ("How it works", "What is reconstructed", "graft_layer_fraction", "private (never leaves its client)"):
        assert text in result.stdout
    wrong = RUNNER.invoke(app, ["methods", "flexx"])
    assert wrong.exit_code != 0
    assert "did you mean 'flex'" in wrong.stderr
    assert "Traceback" not in wrong.stderr


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_where_a_check_does(monkeypatch: pytest.MonkeyPatch, status: Any, code: int) -> None:
    seen: dict[str, Any] = {}

    def examine(**given: Any) -> list[Check]:
        seen.update(given)
        return [Check(name="disk [x]", status=status, found="full", advice="make room")]

    monkeypatch.setitem(vars(fedgraft), "examine", examine)
    result = RUNNER.invoke(app, ["doctor", "--full", "--runs", "there"])
    assert result.exit_code == code
    assert seen == {"full": True, "runs": Path("there")}
    for text in (status, "disk [x]", "full", "make room"):
        assert text in result.stdout


def test_report_says_where_it_lies(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Any] = []

    def rewrite(folder: Path, path: Path | None) -> Path:
        seen.append((folder, path))
        return tmp_path / "report.html"

    monkeypatch.setattr("fedgraft.platform.reporting.rewrite_report", rewrite)
    result = RUNNER.invoke(app, ["report", "a", "-o", "c.html"])
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / "report.html")
    assert seen == [(Path("a"), Path("c.html"))]


def test_report_of_a_folder_without_a_run_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "quickstart-1").mkdir()
    (tmp_path / "quickstart-1" / "comparison.json").write_text("{}")
    result = RUNNER.invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 2
    assert "holds neither sweep.json, comparison.json nor run.json" in result.stderr
    assert "quickstart-1" in result.stderr


def test_version() -> None:
    result = RUNNER.invoke(app, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("fedgraft 0.")


def test_misuse_is_exit_code_2() -> None:
    assert RUNNER.invoke(app, ["run", "--no-such-option"]).exit_code == 2
    assert RUNNER.invoke(app, ["nothing"]).exit_code == 2
    assert RUNNER.invoke(app, ["report"]).exit_code == 2


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom fedgraft.cli import app\n"
        "app(['run', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'ray', 'mlflow', 'transformers', 'pandas', 'numpy', 'yaml', 'psutil'} & set(sys.modules)\n"
        "sys.exit(','.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--dry-run" in done.stdout


@pytest.mark.slow
def test_a_wrong_file_in_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("method: {name: flex, n_grafts: 2}\nfederation: {rounds: -1}\n")
    command = [sys.executable, "-m", "fedgraft", "run", "bad.yaml", "executor.kind=rya"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "bad.yaml: 3 problems",
        "  method.n_grafts: got 2; expected a known key; did you mean 'n_graft'? (line 1)",
        "  federation.rounds: got -1; expected a whole number from 0 to 1000000 (line 2)",
        "  executor.kind: got 'rya'; expected one of ray, in_process; did you mean 'ray'? (from the command line)",
    ]
    assert sorted(each.name for each in tmp_path.iterdir()) == ["bad.yaml"], "nothing is made for a run that cannot start"


def test_a_sweep_is_planned_and_what_is_wrong_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "base: {method: {name: fedavg}, federation: {rounds: 2}, executor: {kind: in_process}}\n"
        "space: {federation.local_steps: [1, 2, 3]}\nseeds: [0, 1]\n"
    )
    planned = RUNNER.invoke(app, ["sweep", str(path), "--dry-run"])
    assert planned.exit_code == 0, planned.output
    assert "3 points, one trial each, with 2 seed(s); grid search" in planned.output
    assert "12 in all, if nothing is stopped early" in planned.output
    assert "0002" in planned.output
    assert not (tmp_path / "runs").exists()
    wrong = RUNNER.invoke(app, ["sweep", str(path), "base.federation.round=3", "seeds=[0]", "metrik=x"])
    assert wrong.exit_code == 2
    assert "did you mean 'metric'?" in wrong.output
    large = RUNNER.invoke(app, ["sweep", str(path), "base.executor.threads=200", "--dry-run"])
    assert large.exit_code == 3
    assert "3 of 3 trials find no place" in large.output
    for arguments in (["sweep"], ["sweep", "--resume", str(tmp_path), "--dry-run"], ["sweep", "seeds=[1]"]):
        assert RUNNER.invoke(app, arguments).exit_code == 2
    nowhere = RUNNER.invoke(app, ["sweep", "--resume", str(tmp_path)])
    assert nowhere.exit_code == 6
    assert "holds no sweep.json" in nowhere.output


def test_detach_needs_a_cluster_that_outlives_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    done = RUNNER.invoke(app, ["run", "--detach"])
    assert done.exit_code == 3
    assert "ray start --head" in done.stderr
    assert not (tmp_path / "runs").exists()  # refused before a folder is made
    done = RUNNER.invoke(app, ["run", "--detach", "executor.kind=in_process"])
    assert done.exit_code == 2
    assert "executor.kind: got in_process; expected ray" in done.stderr
    done = RUNNER.invoke(app, ["run", "--address", "127.0.0.1:1", "executor.kind=in_process"])
    assert done.exit_code == 2
    assert RUNNER.invoke(app, ["run", "--detach", "--dry-run"]).exit_code == 2
    for command in (["attach", "some-run"], ["stop", "some-run"], ["status"]):
        done = RUNNER.invoke(app, command)
        assert done.exit_code == 3
        assert "RAY_ADDRESS" in done.stderr
