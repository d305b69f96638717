"""FedProx, SCAFFOLD and the server optimisers: the toy optimum, reductions to FedAvg bit for bit, and what clients keep."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load

import fedgraft.aggregation  # noqa: F401  (registers the methods)
from fedgraft.aggregation.fedprox import FedProxOptions
from fedgraft.aggregation.reduce import TreeSum, leaf
from fedgraft.aggregation.scaffold import Scaffold, ScaffoldConfig
from fedgraft.errors import RunInterrupted
from fedgraft.protocols import Method, Reduced, TrainResult
from fedgraft.registry import METHODS
from fedgraft.training.config import EngineConfig
from fedgraft.types import SHARED, Batch, ClientTask, ClientUpdate, Federation, ParamRef, Params, RoundPlan, ServerState

Maker = Callable[..., Any]
SERVERS = ("fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam")
QUICK = ("fedprox", "scaffold", "fedadam")
NAMES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in SERVERS]
SMALL = {"adapter": {"rank": 2, "alpha": 4.0}}

# ---- the toy: f_i(x) = a_i (x - b_i)^2 / 2, full gradients, plain SGD, float64

A, B, ETA, STEPS = (1.0, 4.0), (0.0, 1.0), 0.05, 10
OPTIMUM = 0.8  # sum a b / sum a


class Toy(torch.nn.Module):
    """One client's loss at ``x``, as an engine whose slots are that one number."""

    refs = (ParamRef(key="x", name="x", part="attention", shape=(1,)),)

    def __init__(self, client: int) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
        self.a, self.b = A[client], B[client]

    @property
    def model(self) -> torch.nn.Module:
        return self

    def load(self, params: Params) -> None:
        for key, value in params.items():
            self.get_parameter(key).data.copy_(value)

    def read(self, keys: Sequence[str]) -> Params:
        return {key: self.get_parameter(key).detach().clone() for key in keys}

    def read_gradients(self, keys: Sequence[str]) -> Params:
        return {key: self.get_parameter(key).grad.clone() for key in keys}  # type: ignore[union-attr]

    def write_gradients(self, gradients: Params) -> None:
        for key, value in gradients.items():
            self.get_parameter(key).grad = value.clone()

    def train_steps(self, method: Method, session: ToySession, rate: float, steps: int) -> TrainResult:
        for step in range(steps):
            self.x.grad = None
            loss = (self.a * (self.x - self.b) ** 2 / 2).sum()
            total = loss + sum(method.terms(session, None, None).values())  # type: ignore[arg-type]
            total.backward()
            method.after_backward(session, step)  # type: ignore[arg-type]
            assert self.x.grad is not None
            self.x.data -= rate * self.x.grad
        return TrainResult(losses=(0.0,) * steps, num_examples=1, num_label_tokens=1, expert_tokens=torch.zeros(1, 1))


@dataclass
class ToySession:
    engine: Toy
    task: ClientTask
    private: Params
    received: Params
    received_extras: Params
    groups: Mapping[str, Any] = field(default_factory=lambda: {"x": SHARED})
    diagnostics: dict[str, Any] = field(default_factory=dict)
    scratch: dict[str, Any] = field(default_factory=dict)


class ToyServer:
    """Rounds of the toy through a method's own hooks, in the platform's order."""

    def __init__(self, method: Method, *, examples: tuple[int, ...] = (1, 1), scale: float = 1.0) -> None:
        self.method, self.scale = method, scale
        groups = {"x": SHARED}
        facts: Any = None
        method.federation = Federation(facts=facts, refs=Toy.refs, groups=groups, run_seed=0, rounds=1000, num_examples=examples)
        self.state: ServerState = method.init({"x": torch.full((1,), 0.3, dtype=torch.float64)}, len(examples))
        self.private: dict[int, Params] = {}
        self.round_idx = 0

    def play(self, rounds: int, cohorts: Sequence[Sequence[int]] = ((0, 1),)) -> float:
        for _ in range(rounds):
            self.round(cohorts[self.round_idx % len(cohorts)])
        return float(self.state.params["x"])

    def round(self, cohort: Sequence[int]) -> None:
        method, state = self.method, self.state
        self.round_idx += 1
        plan = method.plan(state, RoundPlan(round_idx=self.round_idx, num_steps=STEPS, learning_rate=ETA))
        updates, tensors = [], []
        for client in cohort:
            task = ClientTask(client_id=client, plan=plan, keys=("x",), extra_keys=tuple(state.extras))
            task = method.task(state, task)
            engine = Toy(client)
            session: Any = ToySession(
                engine=engine,
                task=task,
                private=dict(self.private.get(client, {})),
                received={key: state.params[key] for key in task.keys},
                received_extras={key: state.extras[key] for key in task.extra_keys},
            )
            engine.load(session.received)
            start = engine.read(task.keys)

            def train(engine: Toy = engine, session: Any = session, **_: Any) -> TrainResult:
                return engine.train_steps(method, session, self.scale * ETA, plan.num_steps)

            method.local(session, train)
            delta = {key: value - start[key] for key, value in engine.read(task.keys).items()}
            update = ClientUpdate(
                client_id=client,
                round_idx=self.round_idx,
                num_examples=method.federation.num_examples[client],
                num_steps=STEPS,
                expert_tokens=torch.zeros(1, 1),
                metrics={},
                payload=(),
            )
            update, extras = method.reply(session, update)
            self.private[client] = session.private
            updates.append(update)
            tensors.append(delta | {f"extras/{key}": value for key, value in extras.items()})
        weights = method.weigh(state, updates)
        tree = TreeSum(len(cohort))
        for place, sent in enumerate(tensors):
            tree.add(place, leaf(sent, {key: weights.of(key)[place] for key in sent}))
        total = tree.result()
        mean = total.mean()
        reduced = Reduced(
            delta={key: value for key, value in mean.items() if not key.startswith("extras/")},
            extras={key.removeprefix("extras/"): value for key, value in mean.items() if key.startswith("extras/")},
            num_contributors=total.count,
        )
        self.state = method.aggregate(state, reduced, updates)


def toy(name: str, **options: Any) -> Method:
    return METHODS.parse({"name": name, **options})


def fixed_point(mu: float, weights: tuple[float, float] = (1.0, 1.0)) -> float:
    """Where FedProx settles: with s = a + mu, a client moves from x to x* + (1 - eta s)^K (x - x*), x* = (a b + mu x) / s."""
    pulls = [w * (1 - (1 - ETA * (a + mu)) ** STEPS) * a / (a + mu) for a, w in zip(A, weights, strict=True)]
    return sum(pull * b for pull, b in zip(pulls, B, strict=True)) / sum(pulls)


def test_fedavg_settles_off_the_optimum() -> None:
    assert ToyServer(toy("fedavg")).play(80) == pytest.approx(0.689878, abs=1e-6)
    assert fixed_point(0.0) == pytest.approx(0.689878, abs=1e-6)
    assert ToyServer(toy("fedavg"), examples=(3, 1)).play(80) == pytest.approx(fixed_point(0.0, (3, 1)), abs=1e-9)


@pytest.mark.parametrize("mu", [0.0, 0.5, 8.0])
def test_fedprox_settles_at_its_own_fixed_point(mu: float) -> None:
    assert ToyServer(toy("fedprox", mu=mu)).play(90) == pytest.approx(fixed_point(mu), abs=1e-7)
    assert len({round(fixed_point(each), 3) for each in (0.0, 0.5, 8.0)}) == 3


@pytest.mark.parametrize(
    ("control", "weighting", "examples"),
    [("mean_gradient", "clients", (1, 1)), ("mean_gradient", "examples", (3, 1)), ("option_ii", "examples", (1, 1))],
)
def test_scaffold_reaches_the_optimum(control: str, weighting: str, examples: tuple[int, int]) -> None:
    server = ToyServer(toy("scaffold", control=control, weighting=weighting), examples=examples)
    assert server.play(60) == pytest.approx(OPTIMUM, abs=1e-7)
    # There each client's variate is its own gradient, of opposite signs, and the server's is their mean.
    for client in (0, 1):
        found = float(server.private[client]["scaffold_client/x"])
        assert found == pytest.approx(A[client] * (OPTIMUM - B[client]), abs=1e-6)
    assert float(server.state.extras["scaffold/x"]) == pytest.approx(0, abs=1e-6)


def test_scaffold_reaches_the_optimum_when_clients_take_turns() -> None:
    turns = ((0,), (1,), (1,), (0, 1), (0,), (0,), (1,))
    assert ToyServer(toy("scaffold")).play(70, turns) == pytest.approx(OPTIMUM, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_under_sgd_both_controls_are_the_same_whatever_a_slots_rate(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scaffold, "lr_scale", lambda self, ref: scale)
    servers = [ToyServer(toy("scaffold", control=control), scale=scale) for control in ("mean_gradient", "option_ii")]
    for cohort in ((0, 1), (1,), (0,), (0, 1)):
        for server in servers:
            server.round(cohort)
        assert float(servers[0].state.extras["scaffold/x"]) == pytest.approx(
            float(servers[1].state.extras["scaffold/x"]), rel=1e-12
        )
        for client in servers[0].private:
            found = [float(server.private[client]["scaffold_client/x"]) for server in servers]
            assert found[0] == pytest.approx(found[1], rel=1e-12)
            assert found[0] != 0


def test_the_server_rate_of_scaffold_scales_the_step() -> None:
    moved = [ToyServer(toy("scaffold", server_lr=rate)).play(1) - 0.3 for rate in (1.0, 0.5)]
    assert moved[1] == pytest.approx(moved[0] / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "default"), [("fedavgm", (3.0, 1.0)), ("scaffold", (3.0, 1.0)), ("fedadam", (1.0, 1.0)), ("fedyogi", (1.0, 1.0))]
)
def test_clients_are_weighed_by_examples_or_alike(name: str, default: tuple[float, ...]) -> None:
    updates = [fake_update(client, examples) for client, examples in enumerate((3, 1))]
    params = {"x": torch.zeros(1)}
    found = {}
    for options in ({}, {"weighting": "examples"}, {"weighting": "clients"}):
        method = toy(name, **options)
        weights = method.weigh(method.init(params, 2), updates)
        found[options.get("weighting", "")] = weights.default
        if name == "scaffold":
            assert weights.of("extras/scaffold/x") == (1.0, 1.0)
    assert found == {"": default, "examples": (3.0, 1.0), "clients": (1.0, 1.0)}


def fake_update(client: int, examples: int) -> ClientUpdate:
    return ClientUpdate(
        client_id=client, round_idx=1, num_examples=examples, num_steps=1, expert_tokens=torch.zeros(1, 1), metrics={}, payload=()
    )


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (FedProxOptions, {"mu": -0.1}, "mu"),
        (FedProxOptions, {"lora": ["attention"]}, "lora"),
        (ScaffoldConfig, {"control": "option_i"}, "control"),
        (ScaffoldConfig, {"server_lr": -1.0}, "server_lr"),
    ],
)
def test_wrong_options_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cls.model_validate(options)


# ---- on a model: reductions bit for bit


@pytest.fixture(scope="module")
def kept_runs() -> dict[str, Any]:
    return {}


@pytest.fixture
def ran(kept_runs: dict[str, Any], make_job: Maker, run_job: Maker) -> Callable[..., Any]:
    """Two rounds of three clients; run once for the same options."""

    def run(name: str, rounds: int = 2, **options: Any) -> Any:
        key = repr((name, rounds, sorted(options.items())))
        if key not in kept_runs:
            kept_runs[key] = run_job(replace(make_job({"name": name, **SMALL, **options}), rounds=rounds))
        return kept_runs[key]

    return run


@pytest.mark.parametrize(("name", "options"), [("fedprox", {"mu": 0.0}), ("fedavgm", {"beta": 0.0}), ("scaffold", {"rounds": 1})])
def test_it_is_fedavg_bit_for_bit(name: str, options: dict[str, Any], ran: Maker, assert_same_bits: Maker) -> None:
    plain = ran("fedavg", **({"rounds": 1} if "rounds" in options else {}))
    assert_same_bits(ran(name, **options).state.params, plain.state.params)


@pytest.mark.parametrize("name", NAMES[1:])
def test_with_default_options_it_is_not_fedavg(name: str, ran: Maker) -> None:
    plain, other = ran("fedavg").state.params, ran(name).state.params
    assert plain.keys() == other.keys()
    assert any(not torch.equal(other[key], value) for key, value in plain.items())


@pytest.mark.parametrize("name", NAMES)
def test_flex_with_closed_gates_and_an_optimiser_is_that_optimiser_on_fedavg(
    name: str, ran: Maker, assert_same_bits: Maker
) -> None:
    flex, plain = ran("flex", gate_closed=True, server={"name": name}), ran(name)
    assert_same_bits(flex.state.params, plain.state.params)
    assert_same_bits(flex.state.extras, plain.state.extras)
    assert_same_bits(flex.state.memory, plain.state.memory)
    assert bool(plain.state.memory) == (name in ("fedavgm", "fedadagrad", "fedyogi", "fedadam"))


def own_state(ran: Any) -> dict[str, Params]:
    return {client: load(data) for client, data in ran.private_files().items()}


def test_the_servers_variate_is_the_mean_of_the_clients(ran: Maker) -> None:
    done = ran("scaffold")
    states = own_state(done)
    assert len(states) == 3
    for key in done.state.params:
        mean = torch.stack([state[f"scaffold_client/{key}"].double() for state in states.values()]).mean(dim=0)
        torch.testing.assert_close(
            done.state.extras[f"scaffold/{key}"].double(), mean, rtol=1e-5, atol=2e-8
        )  # float32 sums of two or three rounds
    assert any(float(value.abs().max()) > 1e-4 for value in done.state.extras.values())


def test_the_variates_cost_as_much_as_the_parameters(ran: Maker) -> None:
    by_group: Counter[tuple[str, str]] = Counter()
    for row in ran("scaffold").rows("ledger"):
        by_group[row["direction"], row["group"]] += row["bytes"]
    lora = 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))  # rank, layers; q and o, k and v
    assert by_group == {(way, group): 4 * lora * 3 * 2 for way in ("up", "down") for group in ("shared", "extras")}


def test_who_is_absent_keeps_its_variate_and_counts_in_the_population(make_job: Maker, run_job: Maker) -> None:
    job = make_job({"name": "scaffold", **SMALL}, federation={"cohort_size": 2})
    cohorts = {1: (0, 1), 2: (1, 2), 3: (1, 2)}

    def before(loop: Any) -> None:
        loop._method.select = lambda state, plan, cohort: cohorts[plan.round_idx]

    done = run_job(job, before=before)
    folder = job.worker.state_folder
    assert [path.name for path in sorted((folder / "000000").iterdir())] == ["round-000001.safetensors"]
    first = {
        key: value
        for task, _, sent in done.pool.replies
        if (task.client_id, task.round_idx) == (0, 1)
        for key, value in sent.items()
    }
    states = own_state(done)
    for key in done.state.params:
        assert torch.equal(states["000000"][f"scaffold_client/{key}"], first[f"extras/scaffold/{key}"])
        mean = torch.stack([state[f"scaffold_client/{key}"].double() for state in states.values()]).mean(dim=0)
        torch.testing.assert_close(
            done.state.extras[f"scaffold/{key}"].double(), mean, rtol=1e-5, atol=2e-8
        )  # float32 sums of two or three rounds


def test_flex_with_scaffold_keeps_graft_and_variate_apart(ran: Maker) -> None:
    done, plain = ran("flex", server={"name": "scaffold"}, gate_bias=0.0), ran("flex", gate_bias=0.0)
    states, others = own_state(done), own_state(plain)
    variates = {f"scaffold_client/{key}" for key in done.state.params}
    for client, state in states.items():
        grafts = {key for key in state if ".graft." in key}
        assert set(state) == grafts | variates
        assert grafts == set(others[client])
        assert any(
            not torch.equal(state[key], others[client][key]) for key in grafts
        )  # the shared LoRA beside them went elsewhere
    assert set(done.state.extras) == {f"scaffold/{key}" for key in done.state.params}
    assert not any(".graft." in key for _, _, sent in done.pool.replies for key in sent)


def test_fedprox_pulls_what_is_shared_and_leaves_grafts_free(make_bench: Maker) -> None:
    moved = {}
    for mu in (0.0, 1e4):
        bench = make_bench({"name": "flex", **SMALL, "gate_bias": 0.0, "server": {"name": "fedprox", "mu": mu}}, num_steps=6)
        zero = bench.task(0, 1, bench.worker.initial_params())
        bench.train(0, 1, bench.worker.initial_params(), plan=replace(zero.plan, num_steps=0))
        start = bench.private(0)
        _, delta = bench.train(0, 2, bench.worker.initial_params())
        after = bench.private(0)
        moved[mu] = (norm(delta.values()), norm(after[key] - start[key] for key in start))
    assert moved[1e4][0] < 0.7 * moved[0.0][0]
    assert moved[1e4][1] > 0.7 * moved[0.0][1]


def norm(values: Any) -> float:
    return float(torch.cat([value.double().reshape(-1) for value in values]).norm())


def test_a_stopped_run_goes_on_with_its_moments(make_job: Maker, run_job: Maker, assert_same_bits: Maker, ran: Maker) -> None:
    options = {"server": {"name": "fedadam"}}
    straight = ran("flex", **options)
    job = replace(make_job({"name": "flex", **SMALL, **options}), rounds=2)
    asked: list[int] = []

    def is_stopping() -> bool:
        asked.append(1)
        return len(asked) > 1

    with pytest.raises(RunInterrupted):
        run_job(job, is_stopping=is_stopping)
    resumed = run_job(job)
    assert {task.round_idx for task, _, _ in resumed.pool.replies} == {2}
    assert_same_bits(resumed.state.memory, straight.state.memory)
    assert_same_bits(resumed.state.params, straight.state.params)
    assert {name.split("/")[0] for name in resumed.state.memory} == {"momentum", "second_moment"}


# ---- on the other engine


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.distributed:FutureWarning", "ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize(
    "options", [{"name": "fedprox", "mu": 30.0}, {"name": "scaffold"}, {"name": "scaffold", "control": "option_ii"}]
)
def test_deepspeed_gives_the_same_updates(options: dict[str, Any], make_bench: Maker) -> None:
    found = []
    for engine in (EngineConfig(name="torch", device="cpu"), EngineConfig(name="deepspeed", device="cpu", stage=1)):
        bench = make_bench({**options, **SMALL}, engine=engine, num_steps=4)
        params = bench.worker.initial_params()
        generator = torch.Generator().manual_seed(2)
        extras = {
            f"scaffold/{key}": 0.05 * torch.randn(value.shape, generator=generator)
            for key, value in params.items()
            if options["name"] == "scaffold"
        }
        _, sent = bench.train(1, 1, params, extras=extras, publishes=tuple(f"scaffold_client/{key}" for key in params))
        found.append(sent)
        bench.worker.end()
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=2e-5, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


def test_fedprox_on_pieces_of_a_weight_says_so() -> None:
    method = toy("fedprox")
    engine = Toy(0)
    engine.x.data = torch.zeros(0, dtype=torch.float64)  # as ZeRO stage 3 leaves a weight outside of its module
    session: Any = ToySession(engine=engine, task=None, private={}, received={"x": torch.zeros(1)}, received_extras={})  # type: ignore[arg-type]
    batch: Batch | None = None
    with pytest.raises(Exception, match="spreads x over ranks") as caught:
        method.terms(session, batch, None)  # type: ignore[arg-type]
    assert "engine.stage" in str(caught.value)
