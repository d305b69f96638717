"""What a replica does with one task: load, train, keep, refuse, reply."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from fedgraft.aggregation.fedavg import FedAvg
from fedgraft.aggregation.flex import Flex
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import GroupViolation
from fedgraft.moe.base import open_base
from fedgraft.registry import METHODS
from fedgraft.types import Broadcast, ClientFailure, ClientUpdate, EvaluationTask

Maker = Callable[..., Any]
FEDAVG = {"name": "fedavg", "adapter": {"rank": 2, "alpha": 4.0}}
FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}


@pytest.fixture
def use_method(monkeypatch: pytest.MonkeyPatch) -> Callable[[type], None]:
    """Let a name of the registry stand for another class during one test."""

    def use(cls: Any) -> None:
        monkeypatch.setitem(METHODS._classes, cls.name, cls)

    return use


def test_one_sgd_step_moves_by_the_mean_gradient(make_bench: Maker, make_base: Maker, data_folder: Any) -> None:
    # One step over all of the client's examples on a LoRA whose B is zero: dA = 0 and dB = alpha / rank * dW A^T.
    split = PreparedData.open(data_folder).split(0, "train")
    bench = make_bench(FEDAVG, num_steps=1, learning_rate=0.5, batch_size=len(split))
    train = replace(bench.worker.spec.train, optimizer="sgd", max_grad_norm=None)
    bench = make_bench(FEDAVG, num_steps=1, learning_rate=0.5, batch_size=len(split), train=train)
    params = bench.worker.initial_params()
    update, delta = bench.train(0, 1, params)
    model: Any = open_base(make_base())
    model.requires_grad_(True)
    batch = split.batch(range(len(split)), 0)
    loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    loss.backward()
    assert update.metrics["train_loss"].mean == pytest.approx(float(loss.detach()), rel=1e-5)
    assert update.metrics["label_tokens"].total == batch.num_label_tokens
    assert (update.num_examples, update.num_steps) == (len(split), 1)
    for key, value in delta.items():
        path, side = key.split(".lora_")
        if side.startswith("A"):
            assert not value.any()
        else:
            a = params[key.replace(".lora_B.", ".lora_A.")]
            expected = -0.5 * 2.0 * model.get_parameter(f"{path}.weight").grad @ a.T
            torch.testing.assert_close(value, expected, atol=1e-6, rtol=1e-3)


def test_only_the_keys_of_the_task_are_loaded_and_returned(make_bench: Maker) -> None:
    bench = make_bench(FEDAVG)
    params = {key: value + 0.1 for key, value in bench.worker.initial_params().items()}
    some = tuple(params)[:3]
    _, tensors = bench.train(0, 1, params, keys=some)
    assert tuple(tensors) == some
    nothing = replace(bench.task(0, 1, params).plan, num_steps=0)
    _, tensors = bench.train(0, 1, params, keys=some, plan=nothing)
    assert not any(value.any() for value in tensors.values())  # the delta is from what was received
    left = bench.worker.engine.read(key for key in params if key not in some)
    assert all(torch.equal(value, bench.worker.engine.initial[key]) for key, value in left.items())


def test_a_task_run_again_gives_the_same_reply_and_file(make_bench: Maker, assert_same_bits: Maker) -> None:
    bench = make_bench(FLEX)
    params = bench.worker.initial_params()
    bench.train(1, 1, params)
    task = bench.task(1, 2, params)
    replies = [bench.worker.update(task, Broadcast(round_idx=2, params=params)) for _ in range(2)]
    assert_same_bits(replies[0][1], replies[1][1])
    first = bench.private(1, 2)
    bench.worker.update(task, Broadcast(round_idx=2, params=params))
    assert_same_bits(bench.private(1, 2), first)
    assert bench.private(1, 1).keys() == first.keys()  # the version it started from is still there


def broken(base: Any, **hooks: Any) -> Any:
    return type("Broken", (base,), hooks)


def boom(*args: Any) -> Any:
    raise ValueError("boom")


@pytest.mark.parametrize(
    ("hook", "stage"),
    [("setup", "setup"), ("local", "train"), ("terms", "train"), ("after_backward", "train"), ("reply", "reply")],
)
def test_an_error_in_a_hook_is_a_failure_with_its_stage(
    hook: str, stage: str, make_bench: Maker, use_method: Callable[[type], None]
) -> None:
    use_method(broken(Flex, **{hook: boom}))
    bench = make_bench(FLEX)
    params = bench.worker.initial_params()
    outcome, tensors = bench.worker.update(bench.task(2, 4, params), Broadcast(round_idx=4, params=params))
    assert isinstance(outcome, ClientFailure)
    assert (outcome.client_id, outcome.round_idx, outcome.stage) == (2, 4, stage)
    assert "ValueError: boom" in outcome.error
    assert tensors == {}


def test_a_loss_that_is_not_finite_is_a_failure(make_bench: Maker, use_method: Callable[[type], None]) -> None:
    use_method(broken(FedAvg, terms=lambda *args: {"bad": torch.tensor(math.nan)}))
    bench = make_bench(FEDAVG)
    params = bench.worker.initial_params()
    outcome, _ = bench.worker.update(bench.task(0, 1, params), Broadcast(round_idx=1, params=params))
    assert isinstance(outcome, ClientFailure)
    assert outcome.stage == "train"
    assert "UpdateError: the loss of local step 1 is nan" in outcome.error


def test_missing_private_state_is_a_failure_of_setup(make_bench: Maker) -> None:
    bench = make_bench(FLEX)
    params = bench.worker.initial_params()
    task = bench.task(0, 5, params, state_version=4)
    outcome, _ = bench.worker.update(task, Broadcast(round_idx=5, params=params))
    assert isinstance(outcome, ClientFailure)
    assert (outcome.stage, outcome.error.split(":")[0]) == ("setup", "CheckpointError")


@pytest.mark.parametrize("where", ["extras under another name", "extras", "statistics"])
def test_private_state_is_not_let_out(where: str, make_bench: Maker, use_method: Callable[[type], None]) -> None:
    def leak(self: Any, session: Any, update: ClientUpdate) -> Any:
        key, secret = next((key, value) for key, value in session.private.items() if "down_proj" in key)
        if where == "statistics":
            return replace(update, statistics={"innocent": secret.clone()}), {}
        return update, {key if where == "extras" else "innocent": secret.clone()}

    use_method(broken(Flex, reply=leak))
    bench = make_bench(FLEX)
    params = bench.worker.initial_params()
    with pytest.raises(GroupViolation, match="carries the private 'model.*down_proj' and was about to be sent"):
        bench.worker.update(bench.task(0, 1, params), Broadcast(round_idx=1, params=params))


def test_a_frozen_tensor_is_not_let_out(make_bench: Maker, use_method: Callable[[type], None]) -> None:
    def leak(self: Any, session: Any, update: ClientUpdate) -> Any:
        return update, {"innocent": session.engine.model.get_parameter("lm_head.weight").detach().clone()}

    use_method(broken(FedAvg, reply=leak))
    bench = make_bench(FEDAVG)
    params = bench.worker.initial_params()
    with pytest.raises(GroupViolation, match="'innocent' carries the frozen 'lm_head.weight'"):
        bench.worker.update(bench.task(0, 1, params), Broadcast(round_idx=1, params=params))


def test_what_broke_down_is_neither_sent_nor_stored(make_bench: Maker, use_method: Callable[[type], None]) -> None:
    def spoil(self: Any, session: Any, update: ClientUpdate) -> Any:
        key = next(key for key in session.private if "down_proj" in key)
        session.private[key] = torch.full_like(session.private[key], math.inf)
        return update, {}

    use_method(broken(Flex, reply=spoil))
    bench = make_bench(FLEX)
    params = bench.worker.initial_params()
    outcome, tensors = bench.worker.update(bench.task(0, 1, params), Broadcast(round_idx=1, params=params))
    assert isinstance(outcome, ClientFailure)
    assert (outcome.stage, tensors) == ("reply", {})
    assert "down_proj has values that are not finite" in outcome.error
    assert not list(bench.worker.spec.state_folder.rglob("*.safetensors"))


def test_extras_and_statistics_are_counted_with_the_rest(make_bench: Maker, use_method: Callable[[type], None]) -> None:
    def reply(self: Any, session: Any, update: ClientUpdate) -> Any:
        return replace(update, statistics={"s": torch.zeros(3)}), {"c": torch.ones(5, dtype=torch.float64)}

    use_method(broken(FedAvg, reply=reply))
    bench = make_bench(FEDAVG)
    update, tensors = bench.train(0, 1, bench.worker.initial_params())
    by_group: dict[str, int] = {}
    for info in update.payload:
        by_group[info.group] = by_group.get(info.group, 0) + info.num_bytes
    assert by_group["extras"] == 40
    assert by_group["statistics"] == 12
    assert tensors["extras/c"].tolist() == [1.0] * 5
    assert update.statistics["s"].shape == (3,)


def test_a_write_into_the_base_shows_in_the_frozen_hash(make_bench: Maker, use_method: Callable[[type], None]) -> None:
    def spoil(self: Any, session: Any, train: Any) -> Any:
        session.engine.model.get_parameter("model.norm.weight").data[0] += 1
        return train()

    honest, _ = (bench := make_bench(FEDAVG)).train(0, 1, bench.worker.initial_params())
    use_method(broken(FedAvg, local=spoil))
    spoilt, _ = (bench := make_bench(FEDAVG)).train(0, 1, bench.worker.initial_params())
    assert honest.diagnostics["frozen_hash"] != spoilt.diagnostics["frozen_hash"]


def test_sessions_give_what_they_promise(make_bench: Maker, data_folder: Any, use_method: Callable[[type], None]) -> None:
    seen: dict[tuple[int, int], Any] = {}

    def watch(self: Any, session: Any, train: Any) -> Any:
        task = session.task
        calibration = session.calibration_batches(5)
        seen[task.client_id, task.round_idx] = {
            "seed": session.seed("x"),
            "setup_seed": session.setup_seed("x"),
            "calibration": torch.cat([batch.input_ids.reshape(-1) for batch in calibration]).tolist(),
            "num_calibration": sum(batch.num_examples for batch in calibration),
            "num_retention": sum(batch.num_examples for batch in session.retention_batches(4)),
            "order": [batch.input_ids.tolist() for batch in session.train_batches()],
            "num": session.num_train_examples,
        }
        return train()

    use_method(broken(FedAvg, local=watch))
    bench = make_bench(FEDAVG)
    for client, round_idx in ((0, 1), (0, 2), (1, 1)):
        bench.train(client, round_idx, bench.worker.initial_params())
    first, second, other = seen[0, 1], seen[0, 2], seen[1, 1]
    assert first["seed"] != second["seed"] != other["seed"]
    assert first["setup_seed"] == second["setup_seed"] != other["setup_seed"]
    assert first["calibration"] == second["calibration"] != other["calibration"]
    assert (first["num_calibration"], first["num_retention"]) == (5, 4)
    assert first["order"] != second["order"]
    assert len(first["order"]) == 2
    data = PreparedData.open(data_folder)
    assert [first["num"], other["num"]] == [len(data.split(client, "train")) for client in (0, 1)]


@pytest.mark.parametrize("view", ["global", "personal"])
def test_nll_is_hugging_faces_loss_of_the_model_of_that_view(
    view: str, make_bench: Maker, make_base: Maker, data_folder: Any
) -> None:
    bench = make_bench(FEDAVG)
    params = bench.worker.initial_params()
    task = EvaluationTask(
        round_idx=1, view=view, tasks=("client", "retention"), keys=tuple(params), client_id=1, split="validation"
    )
    reply, _ = bench.worker.evaluate(task, Broadcast(round_idx=1, params=params))
    rows = {(row.task, row.metric): row for row in reply.rows}
    model: Any = open_base(make_base())
    data = PreparedData.open(data_folder)
    assert data.retention is not None
    for name, split in (("client", data.split(1, "validation")), ("retention", data.retention)):
        batch = split.batch(range(len(split)), 0)
        loss = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        row = rows[name, "nll"]
        assert row.value.mean == pytest.approx(float(loss), rel=1e-5)  # B is zero: this is the base
        assert row.value.weight == batch.num_label_tokens
        assert (row.view, row.client_id, row.round_idx) == (view, 1, 1)
        assert row.split == ("validation" if name == "client" else "test")


def test_a_personal_model_has_the_clients_state_and_a_global_one_has_not(make_bench: Maker) -> None:
    bench = make_bench(FLEX | {"gate_bias": 0.0}, num_steps=4)
    params = bench.worker.initial_params()

    def nll(view: str, client: int, **fields: Any) -> float:
        task = EvaluationTask(
            round_idx=1,
            view=view,
            tasks=("client",),
            keys=tuple(params),
            client_id=client,
            **fields,  # type: ignore[arg-type]
        )
        reply, _ = bench.worker.evaluate(task, Broadcast(round_idx=1, params=params))
        return next(row.value.mean for row in reply.rows if row.metric == "nll")

    base = nll("global", 0)
    fresh = nll("personal", 0)  # never trained: its own fresh graft
    bench.train(0, 1, params)
    bench.train(1, 1, params)
    trained = nll("personal", 0, state_version=1)
    assert len({base, fresh, trained}) == 3
    assert trained < fresh
    assert nll("global", 0) == base
    assert nll("personal", 0) == fresh
