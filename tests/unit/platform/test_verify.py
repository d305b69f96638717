"""Two runs are the same or the first difference is named; one flipped bit is found, wherever it lies."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import fedgraft
from fedgraft.cli import app
from fedgraft.errors import CheckpointError
from fedgraft.platform.checkpoint import Checkpoint, load, save
from fedgraft.platform.state_store import ClientStateStore

Maker = Callable[..., Any]
FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"folder": tmp_path_factory.mktemp("original")}


@pytest.fixture
def pair(make_job: Maker, run_job: Maker, original: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """Two folders of the same run; made once, copied for every test."""
    if "run" not in original:
        job = make_job(FLEX, federation={"cohort_size": 2})
        ran = run_job(replace(job, evaluation=job.evaluation.model_copy(update={"every": 1})))
        ran.folder.write_info(status="finished", versions={"torch": "2"})
        original["run"] = ran.job.folder
    copies = tmp_path / "a", tmp_path / "b"
    for copy in copies:
        shutil.copytree(original["run"], copy)
    return copies


def _flip(path: Path, at: int = -1) -> None:
    """Flip the lowest bit of one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(bytes(content))


def _last_checkpoint(run: Path) -> Path:
    return sorted((run / "checkpoints").glob("round-*"))[-1]


def test_copies_are_the_same_and_everything_was_looked_at(pair: tuple[Path, Path]) -> None:
    found = fedgraft.verify(*pair)
    assert found.is_same
    (run,) = found.runs
    assert run.rounds == 4  # the start and three rounds
    slots = len(load_file(_last_checkpoint(pair[0]) / "state.safetensors"))
    assert run.tensors == 2 * 2 * slots  # two checkpoints kept by each of two runs
    assert run.private_states >= 2 * 2 * 2
    alone = fedgraft.verify(pair[0])
    assert alone.is_same
    assert alone.runs[0].tensors == 2 * slots


def test_the_same_run_made_twice_is_the_same(pair: tuple[Path, Path], make_job: Maker, run_job: Maker) -> None:
    job = make_job(FLEX, federation={"cohort_size": 2})
    again = run_job(replace(job, evaluation=job.evaluation.model_copy(update={"every": 1})), in_reverse=True)
    found = fedgraft.verify(pair[0], again.job.folder)
    assert found.differences == ()
    # The second one has no status, which is a note, not a difference.
    assert any("not finished" in note for note in found.notes)


def test_a_bit_flipped_in_a_checkpoint_is_found_and_its_tensor_named(pair: tuple[Path, Path]) -> None:
    path = _last_checkpoint(pair[1]) / "state.safetensors"
    before = {key: value.clone() for key, value in load_file(path).items()}
    _flip(path)
    wrong = [name for name, value in load_file(path).items() if not torch.equal(value, before[name])]
    assert len(wrong) == 1
    found = fedgraft.verify(*pair)
    first, *others = found.differences
    assert (first.run, first.round_idx) == (f". in {pair[1]}", 3)
    assert "state.safetensors has checksum" in first.what
    assert any(other.where == "checkpoint" and other.what.startswith(f"{wrong[0]}, element") for other in others)
    assert "(1 elements differ)" in next(other.what for other in others if other.where == "checkpoint")
    assert not fedgraft.verify(pair[1]).is_same
    assert fedgraft.verify(pair[0]).is_same


def test_a_checkpoint_made_whole_again_around_a_flipped_bit_is_found(pair: tuple[Path, Path]) -> None:
    """Checksums are written anew, as somebody would who changes a state on purpose; the round's hash tells."""
    store = ClientStateStore(pair[1] / "clients")
    checkpoint = load(_last_checkpoint(pair[1]), store)
    params = {key: value.clone() for key, value in checkpoint.state.params.items()}
    victim = sorted(params)[3]
    params[victim].reshape(-1).view(torch.int32)[0] ^= 1
    changed = replace(checkpoint.state, params=params)
    save(pair[1] / "checkpoints", Checkpoint(round_idx=3, state=changed, versions=checkpoint.versions), store=store)
    alone = fedgraft.verify(pair[1])
    assert [(d.round_idx, d.what) for d in alone.differences] == [(3, "its tensors do not have the hash of hashes.jsonl")]
    found = fedgraft.verify(*pair)
    assert any(d.what.startswith(f"params/{victim}, element 0 of") for d in found.differences)


def test_a_bit_flipped_in_a_private_state_is_found(pair: tuple[Path, Path]) -> None:
    path = sorted((pair[1] / "clients").glob("*/round-000003.safetensors"))[0]
    _flip(path)
    found = fedgraft.verify(*pair)
    assert any(f"{path.parent.name}/{path.name}" in d.what for d in found.differences)
    client = int(path.parent.name)
    assert any(d.where == f"private state of client {client}" and "element" in d.what for d in found.differences)


def test_a_private_state_written_anew_is_found_by_its_hash(pair: tuple[Path, Path]) -> None:
    run = pair[1]
    checkpoint = load(_last_checkpoint(run), ClientStateStore(run / "clients"))
    client, version = max(checkpoint.versions.items(), key=lambda item: item[1])
    path = ClientStateStore(run / "clients").path(client, version)
    tensors = load_file(path)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] + 1
    save_file(tensors, path)
    save(run / "checkpoints", checkpoint, store=ClientStateStore(run / "clients"))
    (difference,) = fedgraft.verify(run).differences
    assert (difference.round_idx, difference.what) == (version, "does not have the hash of hashes.jsonl")
    assert path.name in difference.where


@pytest.mark.parametrize(
    ("record", "field", "value"),
    [
        ("metrics", "train_loss", 1.5),
        ("ledger", "bytes", 3),
        ("evaluations", "total", 0.25),
        ("hashes", "server", "0" * 64),
    ],
)
def test_a_changed_record_is_named_with_its_round(pair: tuple[Path, Path], record: str, field: str, value: Any) -> None:
    path = pair[1] / f"{record}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    at = next(i for i, row in enumerate(rows) if row["round"] == 1)
    rows[at][field] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first = fedgraft.verify(*pair).differences[0]
    assert (first.round_idx, first.where) == (1, f"{record}.jsonl")
    assert f"{field} is" in first.what
    assert str(value)[:50] in first.what


def test_clocks_and_retries_are_no_difference(pair: tuple[Path, Path]) -> None:
    metrics = pair[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows:
        row["seconds"] *= 2
        row["client_seconds"] = dict.fromkeys(row["client_seconds"], 9.0)
        row["bytes_retried"] += 7
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (pair[1] / "ledger.jsonl").open("a") as stream:
        retry = {"round": 2, "client_id": 0, "direction": "down", "group": "shared", "bytes": 8, "is_retry": True}
        stream.write(json.dumps(retry) + "\n")
    assert fedgraft.verify(*pair).is_same
    with (pair[1] / "ledger.jsonl").open("a") as stream:
        stream.write(json.dumps(retry | {"is_retry": False}) + "\n")
    assert fedgraft.verify(*pair).differences[0].where == "ledger.jsonl"


def test_the_earliest_round_and_what_is_nearest_to_the_cause_come_first(pair: tuple[Path, Path]) -> None:
    for record, at, field in (("evaluations", 2, "total"), ("ledger", 2, "bytes"), ("metrics", 3, "train_loss")):
        path = pair[1] / f"{record}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        next(row for row in rows if row["round"] == at)[field] = 1
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(d.round_idx, d.where) for d in fedgraft.verify(*pair).differences]
    assert found == [(2, "ledger.jsonl"), (2, "evaluations.jsonl"), (3, "metrics.jsonl")]


def test_other_data_are_said_first_and_a_missing_round_too(pair: tuple[Path, Path]) -> None:
    info = json.loads((pair[1] / "run.json").read_text())
    (pair[1] / "run.json").write_text(json.dumps(info | {"data_fingerprint": "other", "versions": {"torch": "3"}}))
    lines = (pair[1] / "metrics.jsonl").read_text().splitlines()
    (pair[1] / "metrics.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    found = fedgraft.verify(*pair)
    assert found.differences[0].where == "run.json, data_fingerprint"
    assert any(d.what == "ends after round 3 and 2" for d in found.differences)
    assert ".: versions.torch was 2 and 3" in found.notes


def test_runs_of_folders_are_paired_by_place(pair: tuple[Path, Path], tmp_path: Path) -> None:
    for name in ("one", "two"):
        for label in ("fedavg", "flex"):
            shutil.copytree(pair[0], tmp_path / name / label / "seed-0")
    shutil.copytree(pair[0], tmp_path / "one" / "search" / "flex" / "seed-0" / "lr-0.1")
    found = fedgraft.verify(tmp_path / "one", tmp_path / "two")
    assert [run.name for run in found.runs] == ["fedavg/seed-0", "flex/seed-0"]
    assert found.is_same
    shutil.rmtree(tmp_path / "two" / "flex")
    (difference,) = fedgraft.verify(tmp_path / "one", tmp_path / "two").differences
    assert (difference.run, difference.what) == ("flex/seed-0", "has no such run")
    with pytest.raises(CheckpointError, match="holds no run"):
        fedgraft.verify(tmp_path / "nowhere")


def test_the_command_says_it_and_ends_with_7(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runner = CliRunner()
    same = runner.invoke(app, ["verify", *map(str, pair)])
    assert same.exit_code == 0, same.output
    assert "same bits" in same.stdout
    alone = runner.invoke(app, ["verify", str(pair[0])])
    assert alone.exit_code == 0
    assert "every tensor has the hash" in alone.stdout
    _flip(_last_checkpoint(pair[1]) / "state.safetensors")
    differs = runner.invoke(app, ["verify", *map(str, pair)])
    assert differs.exit_code == 7
    assert "state.safetensors has checksum" in differs.stderr
    missing = runner.invoke(app, ["verify", str(tmp_path / "nowhere")])
    assert missing.exit_code == 6
    assert "holds no run" in missing.stderr
