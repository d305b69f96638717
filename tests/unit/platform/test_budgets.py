"""Budgets: who draws what, bytes and FLOPs turned into experts by hand, and the platform's refusals."""

from __future__ import annotations

import csv
import gzip
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from pydantic import ValidationError
from rich.console import Console

from fedgraft.aggregation.fedavg import FedAvg, PartsConfig
from fedgraft.errors import BudgetViolation, CheckpointError, ConfigError, DataError, GroupViolation, RunInterrupted
from fedgraft.platform.budget_sizes import BudgetCost, client_budgets, cost_of, resolve_budget
from fedgraft.platform.budgets import BudgetsConfig, draw_budgets, parse_bytes
from fedgraft.platform.config import ModelConfig
from fedgraft.platform.loading import dump_config, load_config
from fedgraft.platform.model_sizes import read_hf_config, size_model, size_slots
from fedgraft.platform.plan import MachineFacts, make_plan
from fedgraft.registry import METHODS
from fedgraft.types import Assignment, Budget, ModelFacts

Maker = Callable[..., Any]
Use = Callable[..., type]
PROBE = {"name": "probe", "lora": [], "full": ["experts"]}
PHONES = Path(__file__).parents[4] / "shared" / "data" / "system" / "ai_benchmark_phones.jsonl.gz"
FACTS = ModelFacts(
    family="qwen2_moe",
    layers=(0, 1),
    num_experts=10,
    top_k=2,
    hidden_size=32,
    expert_size=24,
    norm_topk_prob=True,
    attention=(),
    num_layers=2,
)


class ProbeConfig(PartsConfig):
    name: Literal["probe"] = "probe"


class Probe(FedAvg):
    name = "probe"
    config_class = ProbeConfig
    budget_use = "holds"


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Register a small method with these hooks for one test."""

    def make(base: type = Probe, **hooks: Any) -> type:
        made = type("Changed", (base,), hooks)
        monkeypatch.setitem(METHODS._classes, "probe", made)
        return made

    return make


def counts(budgets: tuple[Budget, ...]) -> Counter[int | None]:
    return Counter(budget.experts_per_layer for budget in budgets)


# ---- drawing


def test_each_client_draws_one_entry_by_seed_and_number() -> None:
    choices = BudgetsConfig(experts_per_layer=(2, 4, 8)).choices(8)
    assert [choice.experts_per_layer for choice in choices] == [2, 4, 8]
    drawn = draw_budgets(choices, 0, 3000)
    assert drawn[:10] == draw_budgets(choices, 0, 10), "who else there is does not matter"
    assert drawn != draw_budgets(choices, 1, 3000)
    found = counts(drawn)
    assert all(abs(found[count] - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for count in (2, 4, 8)), "four standard deviations"


def test_fractions_are_rounded_down() -> None:
    choices = BudgetsConfig(expert_fraction=(0.25, 0.7, 1.0)).choices(10)
    assert [choice.experts_per_layer for choice in choices] == [2, 7, 10]
    assert BudgetsConfig(expert_fraction=(0.29, 0.299)).choices(100) == (Budget(experts_per_layer=29),) * 2


def test_memory_and_flops_of_one_entry_are_one_device() -> None:
    assert BudgetsConfig(memory_bytes=(5, 7), flops=(1.0, 2.0)).choices(8) == (
        Budget(memory_bytes=5, flops=1.0),
        Budget(memory_bytes=7, flops=2.0),
    )
    assert BudgetsConfig(flops=(3.0,)).choices(8) == (Budget(flops=3.0),)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({}, "found nothing"),
        ({"experts_per_layer": (2,), "expert_fraction": (0.5,)}, "found experts_per_layer beside expert_fraction"),
        ({"experts_per_layer": (2,), "flops": (1.0,)}, "found experts_per_layer beside flops"),
        ({"profile": "x.csv", "memory_bytes": (1,), "flops": (1.0,)}, "found profile beside memory_bytes and flops"),
        ({"memory_bytes": (1, 2), "flops": (1.0,)}, "lists of one length"),
        ({"experts_per_layer": ()}, "at least 1 item"),
        ({"experts_per_layer": (0,)}, "greater than or equal to 1"),
        ({"expert_fraction": (1.5,)}, "less than or equal to 1"),
        ({"experts_per_layer": (2,), "memory_share": 0.5}, "memory_share has no effect without profile"),
        ({"profile": "x.csv", "score_field": "s"}, "score_field has no effect without flops_per_score"),
        ({"profile": "x.csv", "round_seconds": 1.0}, "round_seconds has no effect without flops_per_score"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        BudgetsConfig.model_validate(options)


# ---- profiles

DEVICES: list[dict[str, Any]] = [
    {"ram": "8GB", "score": "716", "name": "a"},
    {"ram": "512 MiB", "score": 10, "name": "b"},
    {"ram": "", "score": "5", "name": "no memory"},
    {"ram": 1000, "score": None, "name": "no score"},
]


def write_profile(path: Path) -> Path:
    if ".csv" in path.name:
        stream = StringIO()
        writer = csv.DictWriter(stream, fieldnames=["ram", "score", "name"])
        writer.writeheader()
        writer.writerows(DEVICES)
        text = stream.getvalue()
    else:
        text = "".join(json.dumps(row) + "\n" for row in DEVICES)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("name", ["d.csv", "d.csv.gz", "d.jsonl", "d.jsonl.gz"])
def test_a_profile_gives_memory_and_speed_of_its_devices(name: str, tmp_path: Path) -> None:
    path = write_profile(tmp_path / name)
    config = BudgetsConfig(
        profile=path, memory_field="ram", memory_share=0.25, score_field="score", flops_per_score=2e6, round_seconds=30
    )
    # Those without a memory or a score say nothing of their device.
    assert config.choices(8) == (
        Budget(memory_bytes=2 * 2**30, flops=716 * 2e6 * 30),
        Budget(memory_bytes=128 * 2**20, flops=10 * 2e6 * 30),
    )
    slow = BudgetsConfig(profile=path, memory_field="ram").choices(8)
    assert [(each.memory_bytes, each.flops) for each in slow] == [(4 * 2**30, None), (256 * 2**20, None), (500, None)]


def test_the_defaults_read_the_ranking_of_phones() -> None:
    if not PHONES.is_file():
        pytest.skip("the data files are not beside the repository")
    rows = [json.loads(line) for line in gzip.decompress(PHONES.read_bytes()).splitlines()]
    found = BudgetsConfig(profile=PHONES, flops_per_score=1.0).choices(8)
    assert len(found) == len(rows) == 333
    for row, budget in zip(rows, found, strict=True):
        assert budget.memory_bytes == float(row["RAM"].removesuffix("GB")) * 2**30 / 2
        assert budget.flops == 60 * int(row["FP32_Score"])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"memory_field": "RAM"}, "no field 'RAM'\n.*memory_field to one of its fields: name, ram, score"),
        ({"memory_field": "ram", "score_field": "x", "flops_per_score": 1.0}, "no field 'x'\n.*score_field to one of"),
        ({"memory_field": "name"}, "record 1 of device profile .*'a' is no size; expected bytes, or a number with a unit"),
        ({"memory_field": "ram", "score_field": "name", "flops_per_score": 1.0}, "record 1 .*'a' is no speed"),
        ({"profile": "missing.csv"}, "missing.csv"),
    ],
)
def test_a_profile_that_cannot_be_used_says_why(change: dict[str, Any], error: str, tmp_path: Path) -> None:
    path = write_profile(tmp_path / "d.jsonl")
    config = BudgetsConfig.model_validate({"profile": path} | change)
    with pytest.raises(DataError, match=f"(?s){error}"):
        config.choices(8)


def test_sizes_are_read_with_their_units() -> None:
    found = [parse_bytes(text) for text in (7, "7", "1KB", "1.5 GB", "2g", "3MiB", "0.75GB", "1tb")]
    assert found == [7, 7, 1024, 1.5 * 2**30, 2 * 2**30, 3 * 2**20, 0.75 * 2**30, 2**40]
    for wrong in ("", "GB", "-1GB", "1 XB", "0", "1,5GB"):
        with pytest.raises(ValueError, match="is no size"):
            parse_bytes(wrong)


# ---- from bytes and FLOPs to experts

COST = BudgetCost(fixed_bytes=100, expert_bytes=10, fixed_flops=1000.0, expert_flops=50.0)


@pytest.mark.parametrize(
    ("budget", "experts"),
    [
        (Budget(memory_bytes=130), 3),
        (Budget(memory_bytes=139), 3),
        (Budget(memory_bytes=140), 4),
        (Budget(memory_bytes=10**9), 10),
        (Budget(memory_bytes=99), -1),
        (Budget(flops=1249.0), 4),
        (Budget(flops=1250.0), 5),
        (Budget(memory_bytes=130, flops=1250.0), 3),
        (Budget(memory_bytes=170, flops=1250.0), 5),
        (Budget(experts_per_layer=4), 4),
        (Budget(experts_per_layer=4, memory_bytes=130), 3),
        (Budget(), 10),
    ],
)
def test_the_most_experts_that_keep_to_every_limit(budget: Budget, experts: int) -> None:
    found = resolve_budget(budget, COST, 10)
    assert found == replace(budget, experts_per_layer=experts)
    if budget.memory_bytes is not None and experts >= 0:
        assert COST.bytes_of(experts) <= budget.memory_bytes


def test_without_a_price_everything_is_held_or_nothing() -> None:
    free = replace(COST, expert_bytes=0)
    assert resolve_budget(Budget(memory_bytes=100), free, 10).experts_per_layer == 10
    assert resolve_budget(Budget(memory_bytes=99), free, 10).experts_per_layer == -1


@pytest.mark.parametrize("parts", [{"full": ["experts"]}, {"lora": ["attention", "experts"]}], ids=["full", "lora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("use_kind", ["holds", "trains"])
def test_costs_are_those_of_a_model_with_so_many_experts(
    parts: dict[str, Any], dtype: Literal["float32", "bfloat16"], use_kind: Literal["holds", "trains"], use: Use, make_base: Maker
) -> None:
    use()
    method = METHODS.parse({"name": "probe", "lora": []} | parts)
    source = ModelConfig(path=make_base().parents[1] / "hf", dtype=dtype)
    hf_config = read_hf_config(source)
    s, hidden, inner, tokens = (4 if dtype == "float32" else 2), 32, 24, 100

    def sizes(num_experts: int) -> tuple[Any, Any]:
        hf_config.num_experts = num_experts
        model = size_model(source, hf_config)
        return model, size_slots(method, hf_config, dtype, model.facts)

    model, slots = sizes(4)
    cost = cost_of(model, slots, num_moments=2, tokens=tokens, use=use_kind)
    expert = 3 * hidden * inner
    rank = 8
    lora = rank * ((hidden + 2 * inner) + (inner + hidden))
    if "full" in parts:
        gradient, kept = s * expert, s * expert
        trained = expert
    else:
        gradient, kept = 4 * lora, s * expert + 4 * lora
        trained = lora
    # In two layers. An expert that trains in some steps only keeps its two moments in all of them.
    assert cost.expert_bytes == 2 * (3 * gradient + kept if use_kind == "holds" else gradient)
    share = 2 / 4  # of tokens that come to an expert, with two of four chosen
    held = 6 * expert if "full" in parts else 4 * expert + 6 * lora
    # Who holds all saves an expert's own gradient alone: tokens pass through it, and back, all the same.
    a_value = 2 * trained if use_kind == "trains" else held
    assert cost.expert_flops == pytest.approx(tokens * 2 * share * a_value)
    # Everything with all experts is what the whole model takes.
    whole = model.weight_bytes + 4 * slots.lora + 3 * (4 * slots.trained_wide + s * slots.trained_full)
    assert cost.bytes_of(4) == whole
    own = 2 * 2 * expert if "full" in parts else 0  # two layers, two of four experts
    assert cost.flops_of(4) == pytest.approx(tokens * (4 * (model.active_parameters - own) + 6 * slots.active))
    if use_kind == "holds":
        # A model that has one expert less differs by it, and by its row of the router in each layer.
        fewer = cost_of(*sizes(3), num_moments=2, tokens=tokens, use=use_kind)
        assert cost.bytes_of(4) - fewer.bytes_of(3) == cost.expert_bytes + 2 * s * hidden
    plain = cost_of(model, slots, num_moments=0, tokens=tokens, use=use_kind)
    assert cost.bytes_of(4) - plain.bytes_of(4) == 2 * (4 * slots.trained_wide + s * slots.trained_full)


def test_a_client_without_room_for_top_k_experts_is_named() -> None:
    def budgets(**options: Any) -> tuple[Budget, ...]:
        config = BudgetsConfig.model_validate(options)
        return client_budgets(config, FACTS, use="holds", cost=COST, run_seed=0, num_clients=4, label="mine", source="run.yaml")

    assert counts(budgets(memory_bytes=[125])) == {2: 4}
    first = "run.yaml: 1 problem\n  federation.budgets: got "
    with pytest.raises(ConfigError) as caught:
        budgets(memory_bytes=[119])
    assert str(caught.value).startswith(
        f"{first}119 B for client 0: room for 1 experts a layer; expected at least 120 B, what mine"
    )
    with pytest.raises(ConfigError, match="9 B and 1 FLOPs a round for client 0: no room for any expert"):
        budgets(memory_bytes=[9], flops=[1.0])
    with pytest.raises(ConfigError, match=r"11 experts a layer for client 0; expected 2 \(experts of a token\) to 10"):
        budgets(experts_per_layer=[11])
    with pytest.raises(ConfigError, match="1 experts a layer for client 0"):
        budgets(expert_fraction=[0.15])


def test_a_method_without_budgets_keeps_what_was_drawn() -> None:
    config = BudgetsConfig(memory_bytes=(1,))
    found = client_budgets(config, FACTS, use="none", cost=None, run_seed=0, num_clients=2, label="x", source="y")
    assert found == (Budget(memory_bytes=1),) * 2


# ---- the configuration and the plan


def test_budgets_that_no_method_uses_are_refused(use: Use) -> None:
    raw: dict[str, Any] = {"method": {"name": "fedavg"}, "federation": {"budgets": {"experts_per_layer": [2]}}}
    with pytest.raises(ConfigError, match=r"federation.budgets: .*fedavg does not use budgets"):
        load_config(raw)
    use()
    both = {"compare": {"methods": {"plain": {"name": "fedavg"}, "mine": {"name": "probe"}}}}
    config = load_config(both | {"federation": raw["federation"]})
    assert config.federation.budgets == BudgetsConfig(experts_per_layer=(2,))


def test_a_profile_is_looked_for_and_its_path_made_absolute(use: Use, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use()
    write_profile(tmp_path / "d.csv")
    monkeypatch.chdir(tmp_path)
    raw = {"method": {"name": "probe"}, "federation": {"budgets": {"profile": "d.csv", "memory_field": "ram"}}}
    config = load_config(raw)
    assert dump_config(load_config(dump_raw(config))) == dump_config(config)
    assert config.federation.budgets is not None
    assert config.federation.budgets.profile == Path("d.csv")
    absolute = config.absolute().federation.budgets
    assert absolute is not None
    assert absolute.profile == tmp_path / "d.csv"
    with pytest.raises(ConfigError, match=r"federation.budgets.profile: got 'e.csv'; expected a file or folder that exists"):
        load_config(raw, ["federation.budgets.profile=e.csv"])


def dump_raw(config: Any) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(dump_config(config))
    return found


def plan_of(config: Any) -> Any:
    return make_plan(config, MachineFacts(cores=2, memory_bytes=2**40, gpus=0, gpu_bytes=None, speed=1e9))


def test_the_plan_shows_what_clients_hold_and_who_holds_everything(use: Use) -> None:
    use()
    raw = {
        "seeds": [3],
        "data": {"num_clients": 8, "partition": {"name": "dirichlet", "alpha": 1.0}},
        "compare": {"methods": {"plain": {"name": "fedavg"}, "mine": {"name": "probe"}}},
        "federation": {"budgets": {"experts_per_layer": [2, 4]}},
    }
    plan = plan_of(load_config(raw))
    plain, mine = plan.methods
    drawn = draw_budgets((Budget(experts_per_layer=2), Budget(experts_per_layer=4)), 3, 8)
    assert (plain.budget_use, mine.budget_use, mine.budgets) == ("none", "holds", drawn)
    console = Console(width=200, file=StringIO())
    console.print(plan)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "plain does not use budgets: every client holds and trains everything." in text
    number = counts(drawn)
    assert f"budgets of mine, what a client holds: 2 experts a layer: {number[2]} clients, 4: {number[4]} (first seed)." in text
    small = raw | {"federation": {"budgets": {"memory_bytes": [1000]}}}
    with pytest.raises(ConfigError, match=r"for client 0: no room for any expert; expected at least .* what mine needs with 2"):
        plan_of(load_config(small))
    without = plan_of(load_config(raw | {"federation": {}}))
    console = Console(width=200, file=StringIO())
    console.print(without)
    assert "budgets of" not in (text := console.file.getvalue())  # type: ignore[attr-defined]
    assert "use budgets" not in text


# ---- enforcement: what a client holds

TWO = (Budget(experts_per_layer=2),) * 3
FITS: dict[int, Assignment] = {client: {0: (0, 1, 2), 1: (3,)} for client in range(3)}


def held(*layers: tuple[int, ...]) -> dict[int, Assignment]:
    return {client: dict(enumerate(layers)) for client in range(3)}


@pytest.mark.parametrize(
    ("assignment", "count"),
    [
        ({}, 8),
        (held((0, 1, 2), (0, 1)), 5),
        ({client: {0: (0, 1)} for client in range(3)}, 6),
        ({0: {0: (0, 1), 1: (0, 1)}, 2: {0: (0, 1), 1: (0, 1)}}, 8),
    ],
    ids=["none", "one too many", "a layer left out", "a client left out"],
)
def test_a_client_that_would_hold_too_much_ends_the_run(
    assignment: dict[int, Assignment], count: int, make_job: Maker, run_job: Maker, use: Use
) -> None:
    use(assign=lambda self, state, plan, cohort: assignment)
    with pytest.raises(BudgetViolation, match=rf"was assigned {count} experts in 2 layers, and its budget is 2 a layer, 4 tog"):
        run_job(replace(make_job(PROBE), budgets=TWO))
    job = make_job(PROBE)
    run_job(replace(job, rounds=1))  # without budgets it is nobody's business


def test_budgets_are_means_over_layers(make_job: Maker, run_job: Maker, use: Use) -> None:
    wide = {client: {0: (0, 1, 2, 3), 1: (1, 3)} for client in range(3)}
    use(assign=lambda self, state, plan, cohort: wide)
    ran = run_job(replace(make_job(PROBE), rounds=1, budgets=(Budget(experts_per_layer=3),) * 3))
    assert all(len(tensors) == 6 * 2 for _, _, tensors in ran.pool.replies)
    info = ran.folder.read_info()
    assert info["budget_use"] == "holds"
    assert info["budgets"] == [{"experts_per_layer": 3, "memory_bytes": None, "flops": None}] * 3
    assert not [event for event in ran.events if event.kind == "note"]


def test_what_a_client_asks_for_must_be_of_experts_that_it_holds(make_bench: Maker, use: Use) -> None:
    key = "model.layers.0.mlp.experts.down_proj[3]"
    use(request=lambda self, session: {key: key})
    bench = make_bench(PROBE)
    params = bench.worker.initial_params()
    keys = tuple(name for name in params if name.endswith(("[0]", "[1]")))
    bench.train(0, 1, params, keys=keys, assignment={0: (0, 1, 3)})
    with pytest.raises(GroupViolation, match=r"down_proj\[3\] belongs to an expert that it does not hold"):
        bench.train(0, 1, params, keys=keys, assignment={0: (0, 1, 2)})


# ---- enforcement: what a step trains


def clear(*, kept: int) -> Callable[..., None]:
    """Let only the first ``kept`` experts of each layer have a gradient."""

    def after_backward(self: Any, session: Any, step: int) -> None:
        late = [key for key in session.received if int(key[-2]) >= kept]
        session.engine.write_gradients({key: torch.zeros_like(session.received[key]) for key in late})

    return after_backward


def test_a_step_that_trains_too_many_experts_ends_the_run(make_job: Maker, run_job: Maker, use: Use) -> None:
    job = replace(make_job(PROBE), rounds=1, budgets=TWO)
    use(budget_use="trains")
    with pytest.raises(
        BudgetViolation, match=r"client 0, round 1, local step 1: [34] experts of layer 0 have a gradient.*is 2 a l"
    ):
        run_job(job)
    use(budget_use="trains", after_backward=clear(kept=3))
    with pytest.raises(BudgetViolation, match="3 experts of layer 0"):
        run_job(replace(make_job(PROBE), rounds=1, budgets=TWO))
    use(budget_use="trains", after_backward=clear(kept=2))
    ran = run_job(replace(make_job(PROBE), rounds=1, budgets=TWO))
    assert {key for _, _, tensors in ran.pool.replies for key, value in tensors.items() if value.any()} == {
        key for key in ran.state.params if key[-2] in "01"
    }
    use(budget_use="trains")
    run_job(replace(make_job(PROBE), rounds=1, budgets=(Budget(experts_per_layer=4),) * 3))
    run_job(replace(make_job(PROBE), rounds=1))


# ---- methods without budgets, resumes


def test_a_method_that_uses_no_budgets_says_so_once(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(budget_use="none")
    job = replace(make_job(PROBE), budgets=TWO)
    asked = iter([False, True])
    notes: list[Any] = []
    with pytest.raises(RunInterrupted):
        run_job(job, is_stopping=lambda: next(asked), before=lambda loop: setattr(loop, "_emit", notes.append))
    ran = run_job(job)
    assert [event.data["text"] for event in (*notes, *ran.events) if event.kind == "note"] == [
        "probe does not use budgets: every client holds and trains everything"
    ]
    assert ran.folder.read_info()["budget_use"] == "none"
    assert len(ran.folder.read_info()["budgets"]) == 3


@pytest.mark.parametrize(
    ("method", "is_said"),
    [
        ({"name": "hfedmoe"}, True),
        ({"name": "hfedmoe", "drop_negative": True}, False),
        ({"name": "flex_moe"}, True),
        ({"name": "flex_moe", "experts_per_client": 3}, False),
        ({"name": "fedmoe"}, False),
        ({"name": "fedmoe", "coverage": None}, True),
        ({"name": "fedavg"}, False),
    ],
    ids=str,
)
def test_a_method_that_would_use_budgets_says_that_there_are_none(
    method: dict[str, Any], is_said: bool, make_job: Maker, run_job: Maker
) -> None:
    for purpose in ("search", "run"):
        begun: list[Any] = []
        with pytest.raises(RunInterrupted):  # before round 1: it is said at the start
            run_job(
                replace(make_job(method, folder=None), purpose=purpose),
                is_stopping=lambda: True,
                before=lambda loop, begun=begun: setattr(loop, "_emit", begun.append),
            )
        notes = [event.data["text"] for event in begun if event.kind == "note"]
        assert notes == ["no budgets are set: every client holds and trains all experts"] * (is_said and purpose == "run")


def test_a_run_does_not_go_on_with_other_budgets(make_job: Maker, run_job: Maker, use: Use) -> None:
    use(assign=lambda self, state, plan, cohort: held((0, 1), (0, 1)))
    job = replace(make_job(PROBE), budgets=TWO)
    run_job(replace(job, rounds=1))
    with pytest.raises(CheckpointError, match="probe was begun with other budgets"):
        run_job(replace(job, budgets=(*TWO[:2], Budget(experts_per_layer=3))))
    run_job(job)
