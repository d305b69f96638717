"""The phenomena benchmarks' arithmetic, on a tiny model: experts under other numbers, gradients kept, divergence of routing."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import fedgraft
from fedgraft.moe.families import moe_layers
from fedgraft.moe.surgery import permute_experts
from fedgraft.registry import METHODS
from fedgraft.types import Batch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def experts(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("phenomena_experts")


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("phenomena_rounds")


@pytest.fixture
def phenomena(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("phenomena")


# ---- a client with other numbers


@pytest.mark.parametrize("seed", range(5))
def test_no_expert_keeps_its_number(experts: ModuleType, seed: int) -> None:
    order = experts._cycle(4, seed)
    assert sorted(order) == [0, 1, 2, 3]
    assert all(place != expert for place, expert in enumerate(order))


def test_a_mixture_of_two_models_goes_from_the_one_to_the_other(
    experts: ModuleType, tiny_model: Callable[..., Any], random_batch: Callable[..., Batch]
) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    layers = moe_layers(model)
    other = tiny_model("qwen2_moe")
    permute_experts(other, {layer.index: experts._cycle(layer.num_experts, 0) for layer in layers})
    shape = (len(layers), layers[0].num_experts)

    def logits(mixed: torch.nn.Module) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = mixed(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        return found

    none, every, half = torch.zeros(shape), torch.ones(shape), torch.full(shape, 0.5)
    expected = logits(model)
    torch.testing.assert_close(logits(experts._mixed(model, other, none, none)), expected)
    torch.testing.assert_close(logits(experts._mixed(model, other, every, every)), expected)  # the same function, reordered
    assert (logits(experts._mixed(model, other, every, none)) - expected).abs().max() > 1e-3  # experts without their rows
    assert (logits(experts._mixed(model, other, half, half)) - expected).abs().max() > 1e-3


def test_the_permuted_client_is_told_from_the_others(
    experts: ModuleType, tiny_model: Callable[..., Any], random_batch: Callable[..., Batch]
) -> None:
    batches = [random_batch(), random_batch()]
    each = dict.fromkeys(range(4), batches)
    found = experts.permuted_client(tiny_model("qwen2_moe"), each, each, seed=1)
    assert found["similarity, same"] == pytest.approx(1.0)  # the same examples and experts
    assert found["similarity, permuted"] < 0.9
    assert found["left out, same"] == 0.0
    assert found["NLL averaged plainly"] != pytest.approx(found["NLL untouched"], abs=1e-4)


# ---- gradients


def test_what_a_budget_keeps_of_the_gradient(
    experts: ModuleType, tiny_model: Callable[..., Any], random_batch: Callable[..., Batch]
) -> None:
    model = tiny_model("qwen2_moe", num_experts=8)
    found = experts.gradient_kept(model, [random_batch()], seed=0)
    assert {name for name in found if name.endswith(" 8")} == {"bottleneck 8", "importance 8", "random 8", "gradient 8"}
    assert all(value == pytest.approx(1.0) for name, value in found.items() if name.endswith(" 8"))  # all experts
    assert 0 < found["random 4"] < 1
    assert all(found["gradient 4"] >= value for name, value in found.items() if name.endswith(" 4"))
    assert all(parameter.grad is None for parameter in model.parameters())


# ---- routing over rounds


def test_divergence_is_jensens_and_shannons_in_bits(rounds: ModuleType) -> None:
    apart = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert rounds.mean_divergence(apart) == pytest.approx(1.0)
    assert rounds.mean_divergence(apart[[0, 0]]) == pytest.approx(0.0)
    # Half of one and all of it: H(3/4) - H(1/2) / 2 with H(3/4) = 2 - 3/4 log2 3.
    half = np.array([[[1.0, 0.0]], [[0.5, 0.5]]])
    assert rounds.mean_divergence(half) == pytest.approx(2 - 0.75 * np.log2(3) - 0.5)
    assert rounds.mean_divergence(np.concatenate([apart, apart[:1]])) == pytest.approx(2 / 3)  # pairs 1, 0, 1


def test_the_measured_methods_are_loaded_and_train_alike(
    rounds: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS, "_classes", dict(METHODS._classes))
    arguments = argparse.Namespace(model=str(tmp_path), data="dolly.jsonl")
    config = fedgraft.load_config(None, rounds.overrides(arguments, "pathological", 3, tmp_path), checks_files=False)
    built = {label: METHODS.build(options) for label, options in config.methods().items()}
    assert list(built) == ["fedavg-experts", "fedalign-moe"]
    parts = {(method.config.lora, method.config.full) for method in built.values()}  # type: ignore[attr-defined]
    assert parts == {(("attention", "experts"), ("router",))}
    assert config.rate_search is None
    assert config.training.learning_rate == 0.01
    assert config.seeds == (3,)


# ---- what is kept


def test_phenomena_that_are_not_asked_for_stay_as_they_are(
    phenomena: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "phenomena.json"
    path.write_text(json.dumps({"benchmark": "phenomena", "measured": {"usage_cosine": "known", "gradient_kept": "old"}}))
    monkeypatch.setattr(phenomena, "measure", lambda arguments, names, seeds: dict.fromkeys(names, f"new {seeds}"))
    command = ["phenomena.py", "--model", "m", "--data", "d", "--out", str(path), "--seeds", "0", "4", "--only", "gradient_kept"]
    monkeypatch.setattr("sys.argv", command)
    phenomena.main()
    found = json.loads(path.read_text())["measured"]
    assert found == {"usage_cosine": "known", "gradient_kept": {"seeds": [0, 4], "values": "new [0, 4]"}}
