"""The loop: sums by hand, failures as values, quorum, frozen tensors, retries, cadence."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedgraft.actors.hosting import Finished, LostResult, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.aggregation.fedavg import FedAvg
from fedgraft.aggregation.flex import Flex
from fedgraft.errors import CheckpointError, FedgraftError, GroupViolation, MethodError, QuorumError, RunInterrupted
from fedgraft.platform import rounds as round_loop
from fedgraft.platform import run_folder
from fedgraft.platform.rounds import RoundLoop, usage_entropy
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.sampling import sample_cohort
from fedgraft.platform.tracking import Tracker
from fedgraft.registry import METHODS
from fedgraft.types import ClientFailure, ClientUpdate

Maker = Callable[..., Any]
FEDAVG = {"name": "fedavg", "adapter": {"rank": 2, "alpha": 4.0}}
FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}


@pytest.fixture
def use_method(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a name of the registry stand for a subclass with other hooks during one test."""

    def use(base: Any, **hooks: Any) -> None:
        monkeypatch.setitem(METHODS._classes, base.name, type("Changed", (base,), hooks))

    return use


def loop_on(job: Any, pool: Any, events: list[Any] | None = None) -> RoundLoop:
    emit = (lambda event: None) if events is None else events.append
    return RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=emit, is_stopping=lambda: False)


def test_fedavg_is_the_example_weighted_mean(make_job: Maker, run_job: Maker) -> None:
    ran = run_job(replace(make_job(FEDAVG), rounds=1))
    start = ran.pool.worker.initial_params()
    total = sum(update.num_examples for _, update, _ in ran.pool.replies)
    assert len({update.num_examples for _, update, _ in ran.pool.replies}) == 3
    for key, value in ran.state.params.items():
        mean = sum(update.num_examples / total * tensors[key].double() for _, update, tensors in ran.pool.replies)
        torch.testing.assert_close(value.double(), start[key].double() + mean, rtol=1e-6, atol=1e-8)
        assert value.dtype == start[key].dtype


def test_each_round_sends_the_state_of_the_one_before(make_job: Maker, run_job: Maker) -> None:
    job = make_job(FEDAVG)
    one = run_job(replace(job, rounds=1))
    three = run_job(make_job(FEDAVG))
    assert [task.round_idx for task, _, _ in three.pool.replies] == [1] * 3 + [2] * 3 + [3] * 3
    first = {task.client_id: tensors for task, _, tensors in three.pool.replies if task.round_idx == 1}
    for task, _, tensors in one.pool.replies:
        assert all(torch.equal(value, first[task.client_id][key]) for key, value in tensors.items())
    assert any(not torch.equal(one.state.params[key], value) for key, value in three.state.params.items())


def test_cohorts_are_the_samplers(make_job: Maker, run_job: Maker) -> None:
    job = make_job(FLEX, federation={"cohort_size": 2, "min_clients": 2})
    ran = run_job(replace(job, rounds=5))
    by_round: dict[int, list[int]] = {}
    for task, _, _ in ran.pool.replies:
        by_round.setdefault(task.round_idx, []).append(task.client_id)
    assert {r: tuple(clients) for r, clients in by_round.items()} == {r: sample_cohort(7, r, 3, 2) for r in range(1, 6)}
    assert len(set(map(tuple, by_round.values()))) > 1
    # Every task starts from the round that its client last took part in.
    last: dict[int, int] = {}
    for task, update, _ in ran.pool.replies:
        assert task.state_version == last.get(task.client_id)
        last[task.client_id] = task.round_idx
        assert update.state_version == task.round_idx
    assert [row["cohort"] for row in ran.rows("metrics")] == [list(by_round[r]) for r in range(1, 6)]


class Unreliable:
    """Hooks that fail client 1 for its first ``times`` tries of round 2."""

    def __init__(self, times: int) -> None:
        self.tries: Counter[tuple[int, int]] = Counter()
        self.times = times

    def local(self, method: Any, session: Any, train: Any) -> Any:
        key = (session.task.round_idx, session.task.client_id)
        self.tries[key] += 1
        if key == (2, 1) and self.tries[key] <= self.times:
            raise ValueError("boom")
        return train()


def test_a_client_that_fails_once_is_tried_again_to_the_same_bits(
    make_job: Maker, run_job: Maker, use_method: Callable[..., None], assert_same_bits: Maker
) -> None:
    straight = run_job(make_job(FLEX))
    flaky = Unreliable(times=2)
    use_method(Flex, local=lambda *args: flaky.local(*args))
    ran = run_job(make_job(FLEX))
    assert_same_bits(ran.state.params, straight.state.params)
    assert ran.private_files() == straight.private_files()
    assert flaky.tries[2, 1] == 3
    rows = [row for row in ran.rows("ledger") if row["round"] == 2 and row["client_id"] == 1]
    assert Counter((row["direction"], row["is_retry"]) for row in rows) == {
        ("down", False): 1,
        ("down", True): 2,
        ("up", False): 1,
    }
    assert len({row["bytes"] for row in rows}) == 1
    assert json.loads((ran.job.folder / "run.json").read_text())["failures"] == []


def test_a_client_that_keeps_failing_is_left_out_and_named(
    make_job: Maker, run_job: Maker, use_method: Callable[..., None]
) -> None:
    flaky = Unreliable(times=99)
    use_method(Flex, local=lambda *args: flaky.local(*args))
    ran = run_job(make_job(FLEX, federation={"max_failures": 2}))
    assert flaky.tries[2, 1] == 2
    cohorts = [row["cohort"] for row in ran.rows("metrics")]
    assert cohorts == [[0, 1, 2], [0, 2], [0, 1, 2]]
    failure = {"client_id": 1, "round_idx": 2, "stage": "train", "error": "ValueError: boom"}
    assert json.loads((ran.job.folder / "run.json").read_text())["failures"] == [failure]
    events = [event for event in ran.events if event.kind == "failure"]
    assert [event.data for event in events] == [{"client_id": 1, "stage": "train", "error": "ValueError: boom"}]
    # The mean of round 2 is over the two others; client 1 goes on from its state of round 1.
    third = next(task for task, _, _ in ran.pool.replies if (task.round_idx, task.client_id) == (3, 1))
    assert third.state_version == 1


def test_too_few_answers_end_the_run_resumably(
    make_job: Maker, run_job: Maker, use_method: Callable[..., None], assert_same_bits: Maker
) -> None:
    straight = run_job(make_job(FLEX))
    job = make_job(FLEX, federation={"min_clients": 3, "max_failures": 1})
    with pytest.MonkeyPatch.context() as patch:
        flaky = Unreliable(times=99)
        patch.setitem(METHODS._classes, "flex", type("Changed", (Flex,), {"local": lambda *args: flaky.local(*args)}))
        with pytest.raises(
            QuorumError, match=r"round 2 of flex: 2 of 3 clients answered.*client 1 failed at train: ValueError: boom"
        ):
            run_job(job)
    resumed = run_job(job)
    assert_same_bits(resumed.state.params, straight.state.params)
    assert resumed.private_files() == straight.private_files()
    assert [row["round"] for row in resumed.rows("metrics")] == [1, 2, 3]


def test_a_client_whose_tensors_are_not_finite_is_a_failure_and_is_not_averaged(
    make_job: Maker, run_job: Maker, use_method: Callable[..., None]
) -> None:
    def spoil(self: Any, session: Any, update: ClientUpdate) -> Any:
        return update, {"c": torch.tensor([float("nan") if session.task.client_id == 2 else 1.0])}

    use_method(FedAvg, reply=spoil)
    ran = run_job(make_job(FEDAVG))
    assert [row["cohort"] for row in ran.rows("metrics")] == [[0, 1]] * 3
    failures = RunFolder(ran.job.folder).read_info()["failures"]
    assert [(each["client_id"], each["stage"]) for each in failures] == [(2, "reply")] * 3
    assert "c has values that are not finite" in failures[0]["error"]


def test_a_frozen_tensor_that_changes_ends_the_run(make_job: Maker, run_job: Maker, use_method: Callable[..., None]) -> None:
    def spoil(self: Any, session: Any, train: Any) -> Any:
        if session.task.round_idx == 2:
            session.engine.model.get_parameter("model.norm.weight").data[0] += 1
        return train()

    use_method(FedAvg, local=spoil)
    with pytest.raises(GroupViolation, match="frozen tensors changed"):
        run_job(make_job(FEDAVG))


def test_extras_are_averaged_beside_the_delta(make_job: Maker, run_job: Maker, use_method: Callable[..., None]) -> None:
    got: list[Any] = []

    def reply(self: Any, session: Any, update: ClientUpdate) -> Any:
        return update, {"c": torch.tensor([float(session.task.client_id)])}

    def aggregate(self: Any, state: Any, reduced: Any, updates: Any) -> Any:
        got.append((reduced.extras, dict(reduced.num_contributors), [update.client_id for update in updates]))
        return replace(FedAvg.aggregate(self, state, reduced, updates), extras=reduced.extras)

    use_method(FedAvg, reply=reply, aggregate=aggregate)
    ran = run_job(replace(make_job(FEDAVG), rounds=2))
    counts = {update.client_id: update.num_examples for _, update, _ in ran.pool.replies}
    expected = sum(client * n for client, n in counts.items()) / sum(counts.values())
    for extras, contributors, clients in got:
        assert extras["c"].tolist() == pytest.approx([expected])
        assert contributors["extras/c"] == 3
        assert clients == [0, 1, 2]
    down = [row for row in ran.rows("ledger") if row["group"] == "extras" and row["direction"] == "down"]
    up = [row for row in ran.rows("ledger") if row["group"] == "extras" and row["direction"] == "up"]
    assert [(row["round"], row["bytes"]) for row in down] == [(2, 8)] * 3  # one float64 each, from round 2 on
    assert [(row["round"], row["bytes"]) for row in up] == [(1, 4)] * 3 + [(2, 4)] * 3


class LosingPool(LocalPool):
    """Loses the first result that is fetched, as when its node goes away."""

    def __init__(self, times: int = 1) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.times = times
        self.num_calls = 0

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        for finished in super().map(name, items, shared):
            self.num_calls += name == "update"
            yield finished

    def fetch(self, handle: Any) -> Any:
        if self.times:
            self.times -= 1
            raise LostResult
        return handle


def test_a_lost_result_is_made_again_to_the_same_bits(make_job: Maker, run_job: Maker, assert_same_bits: Maker) -> None:
    straight = run_job(make_job(FLEX))
    pool = LosingPool()
    job = make_job(FLEX)
    assert_same_bits(loop_on(job, pool).run().params, straight.state.params)
    assert pool.num_calls == 9 + 1
    ledger = [json.loads(line) for line in (job.folder / "ledger.jsonl").read_text().splitlines()]
    assert len([row for row in ledger if row["is_retry"]]) == 1, "what went down again is charged, marked as a retry"
    assert [row for row in ledger if not row["is_retry"]] == straight.rows("ledger")
    with pytest.raises(QuorumError, match="client 0 was lost and could not be made again"):
        loop_on(make_job(FLEX), LosingPool(times=99)).run()


class LyingPool(LocalPool):
    """Changes the first reply of client 1."""

    def __init__(self, change: Callable[[Finished], Finished]) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.change = change

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        for finished in super().map(name, items, shared):
            yield self.change(finished) if name == "update" and items[finished.index].client_id == 1 else finished


@pytest.mark.parametrize(
    ("change", "stage", "error"),
    [
        (lambda f: replace(f, value=replace(f.value, client_id=0)), "reply", "the reply is of client 0 in round 1"),
        (lambda f: replace(f, value=replace(f.value, round_idx=9)), "reply", "the reply is of client 1 in round 9"),
        (
            lambda f: replace(f, value=replace(f.value, payload=(replace(f.value.payload[0], key="stray"),))),
            "reply",
            "tensors that were not sent to this client: stray",
        ),
        (lambda f: replace(f, value=None, error="the actor died"), "replica", "the actor died"),
    ],
)
def test_replies_that_do_not_fit_their_task_are_failures(
    change: Callable[[Finished], Finished], stage: str, error: str, make_job: Maker
) -> None:
    events: list[Any] = []
    job = make_job(FEDAVG, federation={"max_failures": 1})
    loop_on(replace(job, rounds=1), LyingPool(change), events).run()
    failures = [event.data for event in events if event.kind == "failure"]
    assert len(failures) == 1
    assert (failures[0]["client_id"], failures[0]["stage"]) == (1, stage)
    assert error in failures[0]["error"]


def test_evaluations_and_checkpoints_keep_their_cadence(make_job: Maker, run_job: Maker) -> None:
    job = make_job(FLEX)
    evaluation = job.evaluation.model_copy(update={"every": 2, "at_start": True})
    ran = run_job(replace(job, rounds=5, evaluation=evaluation, checkpoint_every=2))
    assert sorted({row["round"] for row in ran.rows("evaluations")}) == [0, 2, 4, 5]
    assert sorted(path.name for path in (job.folder / "checkpoints").iterdir()) == ["round-000004", "round-000005"]
    assert [event.data["round"] for event in ran.events if event.kind == "round"] == [1, 2, 3, 4, 5]
    assert [event.data["round"] for event in ran.events if event.kind == "evaluation"] == [0, 2, 4, 5]
    personal = [
        row for row in ran.rows("evaluations") if row["round"] == 0 and row["view"] == "personal" and row["task"] == "client"
    ]
    shared = [row for row in ran.rows("evaluations") if row["round"] == 0 and row["view"] == "global" and row["task"] == "client"]
    assert [replace_view(row) for row in personal] == [replace_view(row) for row in shared]  # nobody has trained yet
    assert len(shared) == 3 * 2


def replace_view(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key != "view"}


def test_a_search_judges_on_the_validation_split_only(make_job: Maker, run_job: Maker) -> None:
    ran = run_job(replace(make_job(FLEX), purpose="search", rounds=1))
    rows = ran.rows("evaluations")
    assert {(row["split"], row["task"], row["view"]) for row in rows} == {("validation", "client", "personal")}
    assert {row["metric"] for row in rows} == {"nll", "token_accuracy"}


def test_without_a_whole_checkpoint_a_run_does_not_start_over(make_job: Maker, run_job: Maker) -> None:
    job = make_job(FEDAVG)
    run_job(replace(job, rounds=1))
    for path in (job.folder / "checkpoints").glob("*/state.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(CheckpointError):
        run_job(job)


def test_an_evaluation_that_fails_names_the_model(make_job: Maker, use_method: Callable[..., None]) -> None:
    class Failing(LocalPool):
        def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
            if name == "evaluate":
                yield Finished(index=1, error="no memory")
            else:
                yield from super().map(name, items, shared)

    with pytest.raises(FedgraftError, match="evaluation of client 1 after round 1 failed: no memory"):
        loop_on(replace(make_job(FLEX), rounds=1), Failing(PoolOptions(replicas=1))).run()


def test_usage_entropy_by_hand() -> None:
    tokens = torch.tensor([[5, 0, 0, 0], [3, 3, 3, 3], [1, 1, 2, 0], [0, 0, 0, 0]])
    log2 = torch.log(torch.tensor(2.0, dtype=torch.float64)).item()
    assert usage_entropy(tokens) == pytest.approx([0, 2 * log2, 1.5 * log2, 0])
    assert isinstance(ClientFailure(client_id=0, round_idx=1, stage="train", error=""), ClientFailure)


def test_a_resume_drops_the_lines_of_rounds_after_its_checkpoint(
    make_job: Maker, run_job: Maker, assert_same_bits: Maker
) -> None:
    straight = run_job(replace(make_job(FLEX), rounds=4, checkpoint_every=2))
    job = replace(make_job(FLEX), rounds=4, checkpoint_every=2)
    asked = iter([False, False, False, True])
    with pytest.raises(RunInterrupted):
        run_job(job, is_stopping=lambda: next(asked))  # after round 3, whose checkpoint was not due
    assert [row["round"] for row in json_lines(job, "metrics")] == [1, 2, 3]
    resumed = run_job(job)
    assert {task.round_idx for task, _, _ in resumed.pool.replies} == {3, 4}
    for record in ("metrics", "ledger", "diagnostics", "evaluations"):
        assert [row["round"] for row in resumed.rows(record)] == [row["round"] for row in straight.rows(record)]
    assert_same_bits(resumed.state.params, straight.state.params)
    assert resumed.private_files() == straight.private_files()


def json_lines(job: Any, record: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (job.folder / f"{record}.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("family", ["gpt_oss", "mixtral"])
def test_lora_on_experts_leaves_the_frozen_hash_in_every_family(
    family: str, make_job: Callable[..., Any], make_base: Callable[..., Path], run_job: Callable[..., Any]
) -> None:
    # PEFT takes fused experts out of the model and puts them back, which changes the order of GPT-OSS's parameters.
    job = make_job({"name": "fedavg", "lora": ["experts"], "adapter": {"rank": 2}})
    run_job(replace(job, rounds=1, worker=replace(job.worker, base_folder=make_base(family))))
    info = json.loads((job.folder / "run.json").read_text())
    assert info["frozen_hash_start"] == info["frozen_hash_end"]


def test_a_run_in_parts_gives_the_bits_of_a_straight_one(make_job: Maker, run_job: Maker, assert_same_bits: Any) -> None:
    straight = run_job(make_job(FLEX))
    job = replace(make_job(FLEX), checkpoint_every=100)  # so the parts have no other checkpoints than their own last rounds
    events: list[Any] = []
    for until, rounds in ((2, [1, 2]), (2, [1, 2]), (None, [1, 2, 3])):
        state = loop_on(job, LocalPool(PoolOptions(replicas=1)), events).run(until)
        lines = [json.loads(line) for line in (job.folder / "metrics.jsonl").read_text().splitlines()]
        assert [line["round"] for line in lines] == rounds
        assert ("frozen_hash_end" in RunFolder(job.folder).read_info()) == (until is None)
    assert [event.data["round"] for event in events if event.kind == "round"] == [1, 2, 3]  # none of them twice
    assert_same_bits(state.params, straight.state.params)
    assert [line["train_loss"] for line in lines] == [line["train_loss"] for line in straight.rows("metrics")]


def test_validation_examples_are_judged_beside_the_test_ones_and_change_no_summary(make_job: Maker, run_job: Maker) -> None:
    def run(is_judged: bool) -> Any:
        job = make_job(FLEX)
        return run_job(replace(job, evaluation=job.evaluation.model_copy(update={"validation": is_judged})))

    plain, both = run(False), run(True)
    rows = both.rows("evaluations")
    extra = [row for row in rows if row["split"] == "validation" and row["task"] == "client"]
    assert {(row["client_id"], row["metric"]) for row in extra} == {(i, m) for i in range(3) for m in ("nll", "token_accuracy")}
    assert {row["view"] for row in extra} == {"personal"}
    assert [row for row in rows if row not in extra] == plain.rows("evaluations")
    assert both.rows("diagnostics") == plain.rows("diagnostics")
    summaries = [[event.data["nll"] for event in ran.events if event.kind == "evaluation"] for ran in (plain, both)]
    assert summaries[0] == summaries[1]


def test_a_checkpoint_comes_after_its_rounds_lines_are_on_disk(make_job: Maker, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    save, sync = round_loop.save, run_folder.sync_file

    def saved(*given: Any, **more: Any) -> None:
        log.append("checkpoint")
        save(*given, **more)

    def synced(path: Path) -> None:
        log.append(path.stem)
        sync(path)

    monkeypatch.setattr(round_loop, "save", saved)
    monkeypatch.setattr(run_folder, "sync_file", synced)
    job = replace(make_job(FEDAVG), rounds=5, checkpoint_every=2)
    loop_on(job, LocalPool(PoolOptions(replicas=1))).run()
    records = ["diagnostics", "hashes", "ledger", "metrics"]  # nothing for a round that no checkpoint names yet
    assert log == [*records, "checkpoint", *records, "checkpoint", *sorted([*records, "evaluations"]), "checkpoint"]


def test_every_task_is_checked_also_where_only_the_last_one_is_bad(make_job: Maker, use_method: Callable[..., None]) -> None:
    def task(self: Any, state: Any, task: Any) -> Any:
        if task.client_id < 2:
            return task
        first, second = task.keys[:2]
        return replace(task, addresses={first: second})

    use_method(FedAvg, task=task)
    with pytest.raises(MethodError, match="the task of client 2 "):
        loop_on(replace(make_job(FEDAVG), rounds=1), LocalPool(PoolOptions(replicas=1))).run()
