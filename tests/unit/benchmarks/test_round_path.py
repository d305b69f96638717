"""The benchmarks of the round path on tiny sizes, without Ray: what they host, compare and add up."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedgraft.data.prepared import PreparedData

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def test_data_are_what_fedgraft_reads(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    hosted = benchmark("hosted")
    folder = hosted.write_data(tmp_path, 3, 4, lambda client: np.full((4, 6), client))
    data = PreparedData.open(folder)
    assert data.num_clients == 3
    assert [len(data.split(2, name)) for name in ("train", "validation", "test")] == [4, 1, 1]
    batch = data.split(1, "train").batch([0, 3], 9)
    assert batch.input_ids.tolist() == [[1] * 6] * 2
    assert batch.num_label_tokens == 2 * 5  # all but the first token of each


def test_the_loop_ends_with_the_plain_loops_parameters(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    hosted, overhead = benchmark("hosted"), benchmark("overhead")
    data = hosted.write_data(tmp_path, 30, overhead.EXAMPLES)
    job = hosted.job_of(tmp_path / "run", data, overhead.PerceptronSpec, num_clients=30, cohort=overhead.COHORT)
    timed = hosted.Timed(job, hosted.pool_of(0))
    state, seconds = hosted.run_rounds(timed, 4)
    assert len(seconds) == len(timed.cpu) == 3
    clients = overhead.Clients()
    plain = overhead.plain_loop(clients, clients.start(), 1, 4, 30)
    apart = max(float((state.params[key] - value).abs().max()) for key, value in plain.items())
    assert apart <= 1e-6
    moved = max(float((value - clients.start()[key]).abs().max()) for key, value in plain.items())
    assert moved > 1e-3


def test_an_echo_doubles_the_parameters(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    hosted, messages = benchmark("hosted"), benchmark("message_path")
    data = hosted.write_data(tmp_path, 5, 1)
    job = hosted.job_of(tmp_path / "run", data, messages.EchoSpec, num_clients=5, cohort=5, batch_size=4000)
    state, _ = hosted.run_rounds(hosted.Timed(job, hosted.pool_of(0)), 3)
    assert len(state.params) == messages.TENSORS
    for key, value in messages.start_values(4000).items():
        assert value.numel() == 100
        assert torch.equal(state.params[key], 8 * value)


def test_private_states_count_every_clients_rounds(benchmark: Callable[[str], ModuleType], tmp_path: Path) -> None:
    hosted, many = benchmark("hosted"), benchmark("many_clients")
    data = hosted.write_data(tmp_path, 12, many.EXAMPLES)
    job = hosted.job_of(tmp_path / "12", data, many.RememberingSpec, num_clients=12, cohort=5, checkpoint_every=2)
    timed = {12: hosted.Timed(job, hosted.pool_of(0))}
    hosted.run_rounds(timed[12], 3)
    hosted.run_rounds(timed[12], 6)  # goes on from the checkpoint of round 3
    many.check_states(tmp_path, timed, {12: 6}, {12: set(range(12)) & _seen(tmp_path / "12")})
    with pytest.raises(AssertionError):
        many.check_states(tmp_path, timed, {12: 7}, {12: {0}})


def _seen(run: Path) -> set[int]:
    return {int(path.name) for path in (run / "clients").iterdir()}


def test_ratios_are_taken_turn_by_turn(benchmark: Callable[[str], ModuleType]) -> None:
    hosted = benchmark("hosted")
    values = {"ours": iter([2.0, 30.0, 4.0]), "plain": iter([1.0, 10.0, 4.0])}
    order: list[str] = []

    def part(name: str) -> float:
        order.append(name)
        return next(values[name])

    found = hosted.interleaved({name: lambda name=name: part(name) for name in values}, 3)
    assert order == ["ours", "plain"] * 3
    assert found["ours"] == {"median": 4.0, "all": [2.0, 30.0, 4.0]}
    assert hosted.ratio(found, "ours", "plain") == 2.0


def test_workload_b_sums_up_by_turn(benchmark: Callable[[str], ModuleType]) -> None:
    def turn(start_s: float, *round_s: float, pss_mib: float = 10.0) -> dict[str, Any]:
        return {"start_s": start_s, "round_s": list(round_s), "pss_mib": pss_mib}

    found = benchmark("workload_b").summary_of(
        {
            "plain": [turn(2.0, 1.0, 1.2), turn(4.0, 10.0, 10.0), turn(2.0, 1.0, 1.0)],
            "actors": [turn(4.0, 0.5, 0.6), turn(9.0, 4.0, 4.0, pss_mib=30.4), turn(4.0, 0.7, 0.7)],
        }
    )
    assert found["round_s"] == {"plain": 1.1, "actors": 0.7}
    assert found["round_over_plain"] == {"actors": 0.5}
    assert found["start_over_plain"] == {"actors": 2.0}
    assert found["pss_mib"] == {"plain": 10, "actors": 30}


def test_peers_are_started_in_their_own_environments(benchmark: Callable[[str], ModuleType]) -> None:
    peers = benchmark("peers")
    envs = Path("/envs")
    for name in ("flower", "pfl"):
        assert peers.command_of(name, envs)[0] == f"/envs/{name}/bin/python"
    assert peers.command_of("pfl-2", envs)[:2] == ["/envs/pfl/bin/torchrun", "--nproc_per_node=2"]
    for framework in peers.FRAMEWORKS:
        assert all(Path(part).is_file() for part in peers.command_of(framework, envs) if part.endswith(".py"))


def test_peers_train_the_same_client_as_fedgraft_s_overhead(benchmark: Callable[[str], ModuleType]) -> None:
    work, overhead = benchmark("peer_work"), benchmark("overhead")
    model = work.make_model("a")
    clients = overhead.Clients()
    names = {"first.weight": "0.weight", "first.bias": "0.bias", "second.weight": "2.weight", "second.bias": "2.bias"}
    slots = work.trained(model)
    clients.train(3, {key: slots[name].detach().clone() for key, name in names.items()})
    work.train("a", model, work.data_of("a", 3))
    for key, name in names.items():
        assert torch.equal(slots[name], clients.parameters[key]), key
