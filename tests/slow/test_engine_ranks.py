"""A replica of two ranks, in two processes, against the reference engine and worker in this one, at every ZeRO stage."""

from __future__ import annotations

import json
import os
import pickle
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.moe.base import open_base
from fedgraft.platform.worker import WorkerSpec
from fedgraft.protocols import TrainSpec
from fedgraft.training.config import EngineConfig
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import (
    AdapterSpec,
    Batch,
    Broadcast,
    ClientTask,
    ClientUpdate,
    EvaluationTask,
    GraftSpec,
    Params,
    RoundPlan,
    Slots,
    Weighted,
)

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("engine_ranks.py")
HERE = runpy.run_path(str(SCRIPT))
STAGES = (0, 1, 2, 3)
PARTS = (1, 2)
SLOTS = Slots(
    adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=24)
)
# SGD moves in proportion to the gradient, so a wrong mean shows at once; what is left are float32 sums in another order.
TIGHT = {"atol": 1e-6, "rtol": 0.0}
GRADIENTS = {"atol": 1e-6, "rtol": 1e-5}  # some are about 1
# AdamW divides by a gradient's size, so where that is near zero its rounding grows; the steps themselves are about 0.02.
CLOSE = {"atol": 1e-5, "rtol": 2e-5}


@pytest.fixture(scope="module")
def batches(random_batch: Callable[..., Batch]) -> list[Batch]:
    """Of 3, 1 and 2 rows: two ranks share them unevenly, and of the second one rank gets nothing."""
    lengths = ((9, 6, 4), (7,), (8, 5))
    return [random_batch(each, seed=seed) for seed, each in enumerate(lengths)]


@pytest.fixture(scope="module")
def many_rows(random_batch: Callable[..., Batch]) -> list[Batch]:
    """Of 5 and 4 rows: every part of every rank has one."""
    lengths = ((9, 6, 4, 8, 5), (7, 9, 4, 6))
    return [random_batch(each, seed=seed) for seed, each in enumerate(lengths)]


@pytest.fixture(scope="module")
def data_with_questions(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One client, five general examples, three questions."""
    folder = tmp_path_factory.mktemp("data")
    words = ["red", "blue", "green"]
    lines = [{"q": f"say {words[i % 3]}", "a": f"{words[i % 3]} {words[i // 3 % 3]}", "kind": "colours"} for i in range(20)]
    general = [{"q": f"word {i}", "a": words[i % 3]} for i in range(5)]
    asked = [{"subject": "a", "question": f"say {word}", "choices": words, "answer": i} for i, word in enumerate(words)]
    for name, rows in (("clients", lines), ("general", general), ("questions", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {"prompt": "q", "response": "a"}
    config = DataConfig.model_validate(
        {
            "path": folder / "clients.jsonl",
            "preset": "custom",
            "fields": fields | {"label": "kind"},
            "max_length": 48,
            "retention": {"path": folder / "general.jsonl", "preset": "custom", "fields": fields},
            "questions": {"path": folder / "questions.jsonl"},
        }
    )
    prepare(config, byte_tokenizer, 0, folder / "prepared")
    return folder / "prepared"


@pytest.fixture(scope="module")
def worker_spec(
    make_base: Callable[..., Path], data_with_questions: Path, tmp_path_factory: pytest.TempPathFactory
) -> WorkerSpec:
    return WorkerSpec(
        base_folder=make_base(),
        data_folder=data_with_questions,
        state_folder=tmp_path_factory.mktemp("state"),
        method={"name": "fedavg"},
        method_files=(),
        run_seed=7,
        batch_size=4,
        train=TrainSpec(learning_rate=0.02),
        evaluation_batch_size=2,
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def judged(worker_spec: WorkerSpec) -> tuple[list[EvaluationTask], Params, list[dict[Any, Weighted]]]:
    """What is judged: tasks, a model that has learned some of its answers, and the values of one process."""
    worker = worker_spec.build()
    params = worker.initial_params()
    plan = RoundPlan(round_idx=1, num_steps=60, learning_rate=0.02)
    task = ClientTask(client_id=0, plan=plan, keys=tuple(params), state_version=None, hashes_frozen=False)
    update, delta = worker.update(task, Broadcast(round_idx=1, params=params))
    assert isinstance(update, ClientUpdate), update
    params = {key: value + delta[key] for key, value in params.items()}
    wanted = EvaluationTask(
        round_idx=1, view="global", tasks=("client", "retention", "choice"), keys=tuple(params), client_id=0,
        metrics=("nll", "token_accuracy", "rouge_l"),
    )  # fmt: skip
    tasks = [wanted, replace(wanted, split="validation")]
    return tasks, params, HERE["evaluate_with"](worker, tasks, params)


@pytest.fixture(scope="module")
def expected(make_base: Callable[..., Path], batches: list[Batch], many_rows: list[Batch]) -> dict[str, Any]:
    """What the reference engine gives; it sees each batch as a whole."""

    def make(spec: TrainSpec, policy: Any) -> TorchEngine:
        return TorchEngine(open_base(make_base(), "cpu"), SLOTS, 3)

    found: dict[str, Any] = HERE["train_with"](make, batches, many_rows, num_parts=(1,))
    return found


@pytest.fixture(scope="module")
def started(
    make_base: Callable[..., Path], batches: list[Batch], many_rows: list[Batch],
    worker_spec: WorkerSpec, judged: tuple[list[EvaluationTask], Params, Any], tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[int]]:  # fmt: skip
    """Folder with what each of two ranks found, and how they ended; they go through all stages, since a start takes long."""
    folder = tmp_path_factory.mktemp("ranks")
    # A threshold of 0, or these small tensors would stay whole.
    zero = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    engines = [
        EngineConfig(name="deepspeed", device="cpu", stage=stage, world_size=2, deepspeed=zero if stage == 3 else None)
        for stage in STAGES
    ]
    tasks, params, _ = judged
    case = {"base": make_base(), "slots": SLOTS, "batches": batches, "many_rows": many_rows, "engines": engines}
    case |= {"worker": worker_spec, "tasks": tasks, "params": params}
    (folder / "case").write_bytes(pickle.dumps(case))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(folder / "case"), str(folder)]
    with ExitStack() as stack:
        processes = []
        for rank in range(2):
            file = stack.enter_context((folder / f"log-{rank}").open("w"))
            env = os.environ | shared | {"RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(timeout=240) for process in processes]
        finally:
            for process in processes:
                process.kill()
                process.wait()
    return folder, codes


@pytest.fixture(scope="module", params=STAGES, ids=[f"stage {stage}" for stage in STAGES])
def ranks(request: pytest.FixtureRequest, started: tuple[Path, list[int]]) -> list[dict[str, Any]]:
    """What each of two ranks found at a stage."""
    folder, codes = started
    files = [folder / f"{request.param}-{rank}.pt" for rank in range(2)]
    logs = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(2))
    assert all(file.is_file() for file in files), f"the ranks ended with {codes}\n{logs}"
    return [torch.load(file, weights_only=False) for file in files]


def assert_close(found: Params, expected: Params, **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **tolerance, msg=lambda text, key=key: f"{key}: {text}")


def distance(one: Params, other: Params) -> float:
    return max(float((one[key] - other[key]).abs().max()) for key in one)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["sgd", "constant", "mean", "hook"])
def test_a_step_of_two_ranks_is_that_of_the_whole_batch(
    name: str, parts: int, ranks: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    whole, values = expected[f"{name} 1"]
    for found in ranks:
        result, trained = found[f"{name} {parts}"]
        assert_close(trained, values, **TIGHT)
        assert result.losses == pytest.approx(whole.losses, rel=1e-5)
        assert torch.equal(result.expert_tokens, whole.expert_tokens)
        assert (result.num_examples, result.num_label_tokens) == (whole.num_examples, whole.num_label_tokens)


@pytest.mark.parametrize("parts", PARTS)
def test_a_mean_over_label_tokens_is_that_of_the_batch_where_a_rank_has_none(
    parts: int, ranks: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for found in ranks:
        assert not isinstance(found[f"mean of few {parts}"], str), found[f"mean of few {parts}"]
        assert_close(found[f"mean of few {parts}"][1], expected["mean of few 1"][1], **TIGHT)


@pytest.mark.parametrize("name", ["constant", "mean of few", "hook", "other"])
def test_what_is_compared_differs(name: str, expected: dict[str, Any]) -> None:
    """A term or a hook that did nothing would agree anyway."""
    key = f"{name} 1" if name != "other" else "other sgd"
    assert distance(expected[key][1], expected["sgd 1"][1]) > 1e-3


@pytest.mark.parametrize("parts", PARTS)
def test_hooks_read_the_whole_batchs_gradients(parts: int, ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for found in ranks:
        seen = found[f"gradients {parts}"]
        assert len(seen) == 3
        for ours, theirs in zip(seen, expected["gradients 1"], strict=True):
            assert_close(ours, theirs, **GRADIENTS)


def test_both_ranks_end_well(started: tuple[Path, list[int]]) -> None:
    assert started[1] == [0, 0]


def test_a_loss_that_is_not_finite_stops_both_ranks(ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    """Of three rows the first belongs to rank 0, the last to rank 1."""
    for found in (expected, *ranks):
        assert len(found["errors"]) == 2
        for error in found["errors"]:
            assert error.startswith("UpdateError: the loss of local step 1 is nan")


@pytest.mark.parametrize("name", ["adamw 1", "adamw 2", "some 1", "some 2", "other adamw", "continued"])
def test_adamw_clips_decays_and_continues_as_the_reference(
    name: str, ranks: list[dict[str, Any]], expected: dict[str, Any]
) -> None:
    for found in ranks:
        assert_close(found[name][1], expected[name.replace("2", "1")][1], **CLOSE)


@pytest.mark.parametrize("parts", PARTS)
def test_kept_moments_are_those_of_the_reference(parts: int, ranks: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    theirs = expected["adamw 1"][0].optimizer_state
    assert any(name.endswith("|exp_avg_sq") for name in theirs)
    for found in ranks:
        assert_close(found[f"adamw {parts}"][0].optimizer_state, theirs, **CLOSE)


@pytest.mark.parametrize("parts", PARTS)
def test_slots_outside_the_task_stay_on_both_ranks(
    parts: int, ranks: list[dict[str, Any]], expected: dict[str, Any], make_base: Callable[..., Path]
) -> None:
    engine = TorchEngine(open_base(make_base(), "cpu"), SLOTS, 3)
    begin = HERE["start"](engine, 4)
    for found in ranks:
        for ref in engine.refs[1::2]:
            assert torch.equal(found[f"some {parts}"][1][ref.key], begin[ref.key]), ref.key
    assert distance(expected["some 1"][1], begin) > 0.01


def test_what_a_client_leaves_reaches_no_rank(
    ranks: list[dict[str, Any]], assert_same_bits: Callable[[Params, Params], None]
) -> None:
    """After another client, and after the losses that were not finite."""
    for found in ranks:
        assert_same_bits(found["sgd again"][1], found["sgd 1"][1])
        (again, values), (first, expected) = found["adamw again"], found["adamw 1"]
        assert_same_bits(values, expected)
        assert_same_bits(again.optimizer_state, first.optimizer_state)


def test_both_ranks_go_on_with_the_same_bits(
    ranks: list[dict[str, Any]], assert_same_bits: Callable[[Params, Params], None]
) -> None:
    names = [name for name, value in ranks[0].items() if isinstance(value, tuple)]
    assert {"sgd 2", "mean 2", "constant 1", "hook 2", "adamw 2", "some 1", "continued"} <= set(names)
    for name in names:
        (first, ours), (second, theirs) = (found[name] for found in ranks)
        assert_same_bits(ours, theirs)
        assert first.losses == second.losses
        assert_same_bits(first.optimizer_state, second.optimizer_state)


def test_shares_are_all_items_and_their_sums_those_of_one_process(ranks: list[dict[str, Any]], request: Any) -> None:
    for count, (first, second) in zip((0, 1, 2, 5), zip(*(found["shares"] for found in ranks), strict=True), strict=True):
        items = list(range(10, 10 + count))
        for _, total in (first, second):
            assert total == Weighted(total=float(sum(items)), weight=float(count))
        if request.node.callspec.params["ranks"] == 3:
            assert first[0] == second[0] == items  # sharded weights come together only where all ranks run the same passes
        else:
            assert sorted(first[0] + second[0]) == items
            assert len(first[0]) - len(second[0]) in (0, 1)


def test_two_ranks_judge_as_one_process(ranks: list[dict[str, Any]], judged: tuple[Any, Any, list[dict[Any, Weighted]]]) -> None:
    client = {("client", metric) for metric in ("nll", "token_accuracy", "rouge_l")}
    other = {("retention", "nll"), ("retention", "token_accuracy"), ("choice", "choice_accuracy")}
    for found in ranks:
        for ours, theirs in zip(found["evaluated"], judged[2], strict=True):
            assert ours.keys() == theirs.keys() == client | other
            for name, value in theirs.items():
                assert ours[name].weight == value.weight
                assert ours[name].mean == pytest.approx(value.mean, rel=1e-5), name
    for values in judged[2]:
        assert all(value.total > 0 for value in values.values()), values  # zeros would agree however they are added up
