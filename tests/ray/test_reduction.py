"""Sums made in the replicas give the bits of sums made in one process, through the real loop and worker."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray

from fedgraft.actors.hosting import PoolOptions
from fedgraft.actors.pool import RayPool
from fedgraft.actors.replica import Kept
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
    # These models are small, and their updates took long for that: both kinds of places where large ones lie.
    pool = RayPool(PoolOptions(replicas=2, inline_bytes=0, keep_s_per_byte=1.0 if kind == "experts" else 0.0))
    applied: list[int] = []
    kept: list[bool] = []
    apply = pool.apply

    def counted(function: Any, items: Any, handles: Any, **how: Any) -> Any:
        applied.append(len(items))
        kept.extend(isinstance(handle, Kept) for each in handles for handle in each)
        if kind == "experts" and len(applied) == 2:
            # What this replica kept is made again by whoever is there, and the round goes on.
            os.kill(ray.get(pool._fleet.replicas[0].leader.__ray_call__.remote(lambda _: os.getpid())), signal.SIGKILL)
        return apply(function, items, handles, **how)

    monkeypatch.setattr(pool, "apply", counted)
    job = make_job(METHODS[kind], rounds=2)
    try:
        state = RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=lambda event: None, is_stopping=lambda: False).run()
    finally:
        pool.close()
    assert kept == [kind == "experts"] * len(kept)
    assert applied[:2] == [2, 2]
    assert len(applied) == 2 + (kind == "experts"), "one sum was made again"
    assert_same_bits(state.params, straight.state.params)
    assert_same_bits(state.extras, straight.state.extras)
    hashes = [json.loads(line) for line in (job.folder / "hashes.jsonl").read_text().splitlines()]
    assert hashes == straight.rows("hashes")
