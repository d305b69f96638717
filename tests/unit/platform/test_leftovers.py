"""What killed processes left half written goes, and nothing else does."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedgraft.platform.leftovers import remove_leftovers

LEFT = (
    "flex/seed-0/clients/000003/.round-000007.safetensors.4711",
    "flex/seed-0/checkpoints/.writing-4711/.state.json.4711",
    "flex/seed-0/checkpoints/.writing-4711/state.safetensors",
    "flex/seed-0/.run.json.1",
    "flex/seed-0/.metrics.jsonl.1",
    ".comparison.json.22",
    "data/seed-0/.tokens-ab12.safetensors.22.tmp",
)
KEPT = (
    "config.yaml",
    "comparison.json",
    "flex/seed-0/clients/000003/round-000007.safetensors",
    "flex/seed-0/checkpoints/round-000007/state.safetensors",
    "flex/seed-0/metrics.jsonl",
    ".git/HEAD.1",
    ".notes.2026",
    "exports/tokenizer.json.1",
    "thesis.tmp",
)


def test_scratch_goes_and_everything_else_stays(tmp_path: Path) -> None:
    for name in (*LEFT, *KEPT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    removed = remove_leftovers(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(KEPT)
    assert not (tmp_path / "flex/seed-0/checkpoints/.writing-4711").exists()
    assert tmp_path / "flex/seed-0/.run.json.1" in removed
    assert remove_leftovers(tmp_path) == []


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_any_is_fine(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    assert remove_leftovers(tmp_path / name) == []
