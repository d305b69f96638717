"""FedAvg, then rounds in which everybody trains alone: what is sent, what is kept, what is judged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load

from fedgraft.aggregation.fedavg_finetune import FedAvgFinetuneConfig
from fedgraft.errors import ConfigError
from fedgraft.platform.loading import load_config

Maker = Callable[..., Any]
SMALL = {"adapter": {"rank": 2, "alpha": 4.0}}
LORA = 4 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))  # bytes: rank, layers; q and o, k and v


def job_of(make_job: Maker, rounds: int, federation: dict[str, Any] | None = None, **options: Any) -> Any:
    return replace(make_job({"name": "fedavg_finetune", **SMALL, **options}, federation=federation), rounds=rounds)


def by_round(ran: Any) -> dict[tuple[int, str], int]:
    found: Counter[tuple[int, str]] = Counter()
    for row in ran.rows("ledger"):
        found[row["round"], row["direction"]] += row["bytes"]
    return dict(found)


def nll(ran: Any, view: str) -> dict[int, float]:
    rows = [row for row in ran.rows("evaluations") if row["view"] == view and row["task"] == "client" and row["metric"] == "nll"]
    last = max(row["round"] for row in rows)
    return {row["client_id"]: row["total"] / row["weight"] for row in rows if row["round"] == last}


def test_the_last_rounds_are_fedavgs_clients_training_on_alone(
    make_job: Maker, run_job: Maker, make_bench: Maker, assert_same_bits: Maker
) -> None:
    ran = run_job(job_of(make_job, 3, finetune_rounds=2))
    plain = run_job(replace(make_job({"name": "fedavg", **SMALL}), rounds=1))
    assert_same_bits(ran.state.params, plain.state.params)
    # The global model goes down once more, nothing comes up, and who has a model of its own needs nothing.
    assert by_round(ran) == {(1, "down"): 3 * LORA, (1, "up"): 3 * LORA, (2, "down"): 3 * LORA}
    # By hand: the same client trains in rounds 2 and 3, as FedAvg would have it, each time from where it was.
    bench = make_bench({"name": "fedavg", **SMALL})
    for client, state in enumerate(load(data) for data in ran.private_files().values()):
        own = plain.state.params
        for round_idx in (2, 3):
            _, delta = bench.train(client, round_idx, own)
            own = {key: value + delta[key] for key, value in own.items()}
        assert {key.removeprefix("personal/") for key in state} == set(own)
        for key, value in own.items():
            # One rounding a round more than in the slot itself: start + (end - start).
            torch.testing.assert_close(state[f"personal/{key}"], value, rtol=1e-5, atol=1e-6)
    personal, shared = nll(ran, "personal"), nll(ran, "global")
    assert shared == nll(plain, "personal")
    assert all(personal[client] != shared[client] for client in (0, 1, 2))
    assert sum(personal.values()) < sum(shared.values())


def test_a_run_without_a_round_to_average_is_refused() -> None:
    def config_of(rounds: int, **options: Any) -> Any:
        return load_config({"method": {"name": "fedavg_finetune", **options}, "federation": {"rounds": rounds}})

    for rounds, options in ((1, {}), (3, {"finetune_rounds": 3}), (3, {"finetune_rounds": 7})):
        with pytest.raises(
            ConfigError, match=rf"finetune_rounds is \d and federation.rounds is {rounds}.*set finetune_rounds lower"
        ):
            config_of(rounds, **options)
    assert config_of(2).method.finetune_rounds == 1
    assert config_of(3, finetune_rounds=2).federation.rounds == 3


def test_a_short_try_of_a_rate_averages_once_and_fine_tunes_the_rest(make_job: Maker, run_job: Maker) -> None:
    for rounds, options, local in ((1, {}, ()), (2, {}, (2,)), (2, {"finetune_rounds": 9}, (2,))):
        ran = run_job(job_of(make_job, rounds, **options))
        phases = {task.round_idx: task.plan.phase for task, _, _ in ran.pool.replies}
        assert phases == {idx: "finetune" if idx in local else "train" for idx in range(1, rounds + 1)}
        assert [bool(sent) for task, _, sent in ran.pool.replies] == [
            task.round_idx not in local for task, _, _ in ran.pool.replies
        ]


@pytest.mark.parametrize(("cohort", "count"), [("drawn", 1), ("all", 3)])
def test_the_cohort_or_everybody_fine_tunes(cohort: str, count: int, make_job: Maker, run_job: Maker) -> None:
    ran = run_job(job_of(make_job, 2, {"cohort_size": 1}, finetune_cohort=cohort))
    tuned = [task.client_id for task, _, _ in ran.pool.replies if task.round_idx == 2]
    assert len(tuned) == count
    assert {int(name) for name, data in ran.private_files().items() if load(data)} == set(tuned)
    personal, shared = nll(ran, "personal"), nll(ran, "global")
    # Who never fine-tuned is judged with the global model.
    assert [client for client in personal if personal[client] != shared[client]] == sorted(tuned)


def test_wrong_options_are_refused() -> None:
    for options, message in (
        ({"finetune_rounds": 0}, "finetune_rounds"),
        ({"finetune_cohort": "some"}, "finetune_cohort"),
        ({"lora": []}, "nothing would be trained"),
    ):
        with pytest.raises(ValidationError, match=message):
            FedAvgFinetuneConfig.model_validate(options)
