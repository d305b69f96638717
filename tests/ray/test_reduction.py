"""Sums made in the replicas give the bits of sums made in one process, through the real loop and worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.platform import reduction
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.tracking import Tracker

pytestmark = pytest.mark.ray
METHODS = {
    "extras": {"name": "scaffold", "adapter": {"rank": 2, "alpha": 4.0}},
    "experts": {"name": "fedavg", "lora": ["attention", "experts"], "adapter": {"rank": 2, "alpha": 4.0}},
}


@pytest.mark.parametrize("kind", sorted(METHODS))
def test_a_round_summed_in_replicas_has_the_bits_of_one_process(
    kind: str,
    make_job: Callable[..., Any],
    run_job: Callable[..., Any],
    assert_same_bits: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    straight = run_job(make_job(METHODS[kind], rounds=2))
    monkeypatch.setattr(reduction, "_MIN_BLOCK", 1)  # else three clients are one block
    pool = RayPool(PoolOptions(replicas=2))
    pool.inline_bytes = 0  # these models are small
    applied: list[int] = []
    apply = pool.apply

    def counted(function: Any, items: Any, handles: Any) -> Any:
        applied.append(len(items))
        return apply(function, items, handles)

    monkeypatch.setattr(pool, "apply", counted)
    job = make_job(METHODS[kind], rounds=2)
    try:
        state = RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=lambda event: None, is_stopping=lambda: False).run()
    finally:
        pool.close()
    assert applied == [3, 3]
    assert_same_bits(state.params, straight.state.params)
    assert_same_bits(state.extras, straight.state.extras)
    hashes = [json.loads(line) for line in (job.folder / "hashes.jsonl").read_text().splitlines()]
    assert hashes == straight.rows("hashes")
