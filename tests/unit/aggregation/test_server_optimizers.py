"""The server's rules against closed forms on plain Python numbers, and what happens to keys that nobody sent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.aggregation.fedavgm import FedAvgMConfig, FedAvgMOptions
from fedgraft.aggregation.fedopt import FedAdagradConfig, FedAdagradOptions, FedAdamConfig, FedAdamOptions, FedYogiOptions
from fedgraft.aggregation.flex import FlexConfig
from fedgraft.aggregation.server_optimizers import adaptive, momentum, server_step, sgd
from fedgraft.types import ServerState

DELTAS = (0.3, -0.02, 0.5, 0.0, -1.25)
ETA, TAU, BETA1, BETA2 = 0.25, 0.125, 0.75, 0.875


def walk(rule: Any, deltas: tuple[float, ...] = DELTAS) -> list[float]:
    """Where a scalar that starts at 2 is after each round."""
    state = ServerState(params={"x": torch.tensor([2.0], dtype=torch.float64)})
    places = []
    for delta in deltas:
        state = server_step(state, {"x": torch.tensor([delta], dtype=torch.float64)}, rule)
        places.append(float(state.params["x"]))
    return places


def closed(kind: str, *, squares: str = "delta", start: str = "zero", beta1: float = BETA1) -> list[float]:
    """Algorithm 2 of Reddi et al., unrolled: m and v as sums over all rounds so far; Yogi, whose sign needs v, step by step."""
    place, places, averages = 2.0, [], []
    v_yogi = TAU**2
    for t in range(len(DELTAS)):
        if start == "zero":
            m = sum((1 - beta1) * beta1 ** (t - s) * DELTAS[s] for s in range(t + 1))
        else:
            m = beta1**t * DELTAS[0] + sum((1 - beta1) * beta1 ** (t - s) * DELTAS[s] for s in range(1, t + 1))
        averages.append(m)
        u = [(DELTAS if squares == "delta" else averages)[s] ** 2 for s in range(t + 1)]
        if kind == "adagrad":
            v = TAU**2 + sum(u)
        elif kind == "adam":
            v = BETA2 ** (t + 1) * TAU**2 + sum((1 - BETA2) * BETA2 ** (t - s) * u[s] for s in range(t + 1))
        else:
            v_yogi += (1 - BETA2) * u[t] * ((u[t] > v_yogi) - (u[t] < v_yogi))
            v = v_yogi
        place += ETA * m / (math.sqrt(v) + TAU)
        places.append(place)
    return places


@pytest.mark.parametrize("kind", ["adagrad", "yogi", "adam"])
@pytest.mark.parametrize(
    ("squares", "start"), [("delta", "zero"), ("momentum", "zero"), ("delta", "delta"), ("momentum", "delta")]
)
def test_adaptive_rules_are_the_papers_formulas(kind: Any, squares: Any, start: Any) -> None:
    rule = adaptive(kind, rate=ETA, tau=TAU, beta1=BETA1, beta2=BETA2, second_moment=squares, momentum_start=start)
    assert walk(rule) == pytest.approx(closed(kind, squares=squares, start=start), rel=1e-13)


def test_every_switch_of_the_adaptive_rules_changes_the_walk() -> None:
    base = {"server_lr": ETA, "tau": TAU, "beta1": BETA1, "beta2": BETA2}
    other: list[dict[str, Any]] = [
        {"server_lr": 0.5},
        {"tau": 0.25},
        {"beta1": 0.5},
        {"beta2": 0.5},
        {"second_moment": "momentum"},
        {"momentum_start": "delta"},
    ]
    walks = [walk(FedAdamOptions.model_validate(base | change).rule())[-1] for change in ({}, *other)]
    walks += [walk(FedYogiOptions.model_validate(base).rule())[-1], walk(FedAdagradOptions(server_lr=ETA, tau=TAU).rule())[-1]]
    assert walks[0] == pytest.approx(closed("adam")[-1])
    assert walks[-2] == pytest.approx(closed("yogi")[-1])
    assert walks[-1] == pytest.approx(closed("adagrad", beta1=0.0)[-1])
    assert len({round(place, 9) for place in walks}) == len(walks)


def test_momentum_sums_or_averages_the_deltas() -> None:
    def unrolled(first: float, later: float) -> list[float]:
        sizes = [
            sum(BETA1 ** (t - s) * (first if s == 0 else later) * DELTAS[s] for s in range(t + 1)) for t in range(len(DELTAS))
        ]
        return [2 + ETA * sum(sizes[: t + 1]) for t in range(len(DELTAS))]

    assert walk(momentum(ETA, BETA1, form="sum")) == pytest.approx(unrolled(1, 1), rel=1e-13)
    assert walk(momentum(ETA, BETA1, form="average")) == pytest.approx(unrolled(1, 1 - BETA1), rel=1e-13)
    assert walk(momentum(ETA, 0.0, form="sum")) == walk(sgd(ETA))
    assert walk(sgd(ETA))[-1] == pytest.approx(2 + ETA * sum(DELTAS))


@pytest.mark.parametrize(
    "rule", [sgd(1.0), momentum(1.0, 0.5, form="sum"), FedAdamOptions().rule()], ids=["sgd", "momentum", "adam"]
)
def test_a_key_that_nobody_sent_keeps_value_and_moments(rule: Any, assert_same_bits: Callable[..., None]) -> None:
    params = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([3.0]), "z": torch.tensor([4.0], dtype=torch.bfloat16)}
    delta = {key: torch.full(value.shape, 0.5, dtype=torch.float64) for key, value in params.items()}
    first = server_step(ServerState(params=params, notes={"kept": 1}), delta, rule)
    second = server_step(first, {"x": delta["x"]}, rule)
    assert first.notes == second.notes == {"kept": 1}
    assert {key: value.dtype for key, value in second.params.items()} == {key: value.dtype for key, value in params.items()}
    assert all(value.dtype == torch.float64 for value in second.memory.values())
    for key in ("y", "z"):
        assert torch.equal(second.params[key], first.params[key])
    assert not torch.equal(first.params["y"], params["y"])
    quiet = {name: value for name, value in first.memory.items() if not name.endswith("/x")}
    assert_same_bits({name: second.memory[name] for name in quiet}, quiet)
    assert not torch.equal(second.params["x"], first.params["x"])
    assert torch.equal(params["x"], torch.tensor([1.0, 2.0]))  # the old state is left as it was


def test_sums_run_in_float64() -> None:
    # 1 + 2^-24 is no float32, but half of the way to the next one; two such steps would be lost in float32 sums.
    state = ServerState(params={"x": torch.tensor([1.0])})
    rule = momentum(1.0, 0.5, form="sum")
    tiny = torch.tensor([2.0**-25], dtype=torch.float64)
    for _ in range(60):
        state = server_step(state, {"x": tiny}, rule)
    assert float(state.memory["momentum/x"]) == pytest.approx(2 * 2.0**-25, rel=1e-12)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (FedAvgMOptions, {"beta": 1.0}, "beta"),
        (FedAvgMOptions, {"server_lr": 0.0}, "server_lr"),
        (FedAvgMOptions, {"beta": 0.0, "form": "average"}, "form: average has no effect with beta: 0"),
        (FedAvgMOptions, {"weighting": "tokens"}, "weighting"),
        (FedAdagradOptions, {"second_moment": "momentum"}, "second_moment: momentum has no effect with beta1: 0"),
        (FedAdagradOptions, {"beta2": 0.9}, "beta2"),
        (FedAdamOptions, {"beta1": 0.0, "momentum_start": "delta"}, "momentum_start: delta has no effect with beta1: 0"),
        (FedAdamOptions, {"tau": 0.0}, "tau"),
        (FedYogiOptions, {"beta2": 1.0}, "beta2"),
        (FedAvgMConfig, {"lora": []}, "nothing would be trained"),
        (FedAdamConfig, {"adapter": {"rank": 0}}, "adapter.rank"),
        (FlexConfig, {"server": {"name": "fedsgd"}}, "server"),
        (FlexConfig, {"server": {"name": "fedavg", "mu": 1.0}}, "server.fedavg.mu"),
        (FlexConfig, {"server": {"mu": 1.0}}, "server"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cls.model_validate(options)


def test_the_defaults_are_the_cards() -> None:
    assert (FedAdamConfig().server_lr, FedAdamConfig().tau, FedAdamConfig().beta1, FedAdamConfig().beta2) == (
        1e-3,
        1e-3,
        0.9,
        0.99,
    )
    assert (FedAdagradConfig().beta1, FedAvgMConfig().beta) == (0.0, 0.9)


@pytest.mark.parametrize("server", ["fedavg", "fedprox", "scaffold", "fedavgm", "fedadagrad", "fedyogi", "fedadam"])
def test_flex_writes_its_optimiser_down_as_it_was_stated(server: str) -> None:
    from_yaml = FlexConfig.model_validate({"name": "flex", "server": {"name": server}})
    by_hand = FlexConfig(server=type(from_yaml.server)())  # type: ignore[arg-type]
    for config in (from_yaml, by_hand):
        assert config.to_options()["server"] == {"name": server}
        assert FlexConfig.model_validate(config.to_options()) == config
