"""Forms of an export on models whose slots hold random numbers: several adapters, narrow numbers, every family, torn folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fedgraft.errors import ModelError
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.export import BaseReference, frozen_hash, largest_difference, load_export, write_export
from fedgraft.moe.families import FAMILIES
from fedgraft.moe.slots import add_slots
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import AdapterSpec, GraftSpec, ParamRef, Slots

IDS = torch.tensor([[3 + 7 * i % 250 for i in range(24)]])
SHARED = AdapterSpec(name="shared", rank=4, alpha=8.0, targets=("attention", "experts"))
OWN = AdapterSpec(name="own", rank=3, alpha=5.0, targets=("attention", "experts"))


def _logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found.float()


def _distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


Built = tuple[nn.Module, tuple[ParamRef, ...], Slots, BaseReference]


@pytest.fixture
def build(tiny_model: Callable[..., Any], save_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Built]:
    """A model over a base on disk, its slots filled with random numbers."""

    def make(slots: Slots, family: str = "qwen2_moe", dtype: str = "float32") -> Built:
        source = save_model(tiny_model(family, seed=5).to(getattr(torch, dtype)), tmp_path / f"{family}-{dtype}")
        base = BaseReference(model=str(source), dtype=dtype, cached=cache_base(str(source), dtype, tmp_path / "cache"))
        model = open_base(base.cached)
        refs = add_slots(model, slots)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model, refs, slots, base

    return make


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "out"
    made.mkdir()
    return made


def test_two_adapters_become_one_of_concatenated_ranks(build: Callable[..., Built], folder: Path) -> None:
    model, refs, slots, base = build(Slots(adapters=(SHARED, OWN)))
    assert write_export(model, refs, slots, base, folder) == "adapter"
    assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4 + 3
    # The definition, W' = W + s1 B1 A1 + s2 B2 A2, for a projection and for one expert of a fused weight.
    tensors = load_file(folder / "adapter_model.safetensors")
    scale = 8.0 / 4
    stem = "model.layers.1.self_attn.q_proj"
    own = {name: value.detach() for name, value in model.named_parameters()}
    product = sum(
        s * own[f"{stem}.lora_B.{name}.weight"] @ own[f"{stem}.lora_A.{name}.weight"]
        for name, s in (("shared", 8.0 / 4), ("own", 5.0 / 3))
    )
    made = scale * tensors[f"base_model.model.{stem}.lora_B.weight"] @ tensors[f"base_model.model.{stem}.lora_A.weight"]
    assert torch.allclose(made, product, rtol=1e-5, atol=1e-6)
    assert _distance(_logits(load_export(folder)), _logits(model)) < 1e-5


def test_adapters_over_different_parts_are_padded_with_zeros(build: Callable[..., Built], folder: Path) -> None:
    router = AdapterSpec(name="router", rank=2, alpha=3.0, targets=("router", "attention"))
    experts = AdapterSpec(name="experts", rank=3, alpha=6.0, targets=("router",))
    model, refs, slots, base = build(Slots(adapters=(router, experts)))
    write_export(model, refs, slots, base, folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    found = tensors["base_model.model.model.layers.0.self_attn.v_proj.lora_A.weight"]
    assert found[:2].ne(0).all()
    assert found[2:].eq(0).all()
    assert _distance(_logits(load_export(folder)), _logits(model)) < 1e-5


EVERYWHERE = ("attention", "router", "experts")
LORA = Slots(adapters=(AdapterSpec(name="shared", rank=4, alpha=8.0, targets=EVERYWHERE),))


@pytest.mark.parametrize(
    ("slots", "merges", "tolerance"),
    [
        pytest.param(LORA, False, 0.0, id="lora"),
        pytest.param(LORA, True, 1e-4, id="merged", marks=pytest.mark.slow),  # random routers: 1e-5 where weights are trained
        pytest.param(Slots(full=EVERYWHERE), False, 0.0, id="full", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in ("qwen2_moe", "gpt_oss") else pytest.mark.slow) for kind in sorted(FAMILIES)]
)
def test_every_family_with_and_without_grafts(
    kind: str, slots: Slots, merges: bool, tolerance: float, build: Callable[..., Built], folder: Path
) -> None:
    graft = GraftSpec(num_grafts=2, layers=(1,), num_neurons=8)  # DeepSeek's first layer is dense
    model, refs, _, base = build(slots, family=kind)
    whole = merges or bool(slots.full)
    assert write_export(model, refs, slots, base, folder, merges=merges) == ("model" if whole else "adapter")
    assert _distance(_logits(load_export(folder)), _logits(model)) <= tolerance
    grafted = replace(slots, graft=graft)
    model, refs, _, base = build(grafted, family=kind)
    (folder / "grafted").mkdir()
    assert write_export(model, refs, grafted, base, folder / "grafted", merges=merges) == "graft"
    assert _distance(_logits(load_export(folder / "grafted")), _logits(model)) <= tolerance


@pytest.mark.parametrize("targets", [("attention",), ("attention", "router", "experts")])
def test_an_adapter_over_a_narrow_base_has_the_same_bits(
    targets: tuple[str, ...], build: Callable[..., Built], folder: Path
) -> None:
    adapter = AdapterSpec(name="shared", rank=4, alpha=8.0, targets=targets)
    model, refs, slots, base = build(Slots(adapters=(adapter,)), dtype="bfloat16")
    write_export(model, refs, slots, base, folder)
    assert torch.equal(_logits(load_export(folder)), _logits(model))
    assert {value.dtype for value in load_file(folder / "adapter_model.safetensors").values()} == {torch.float32}


def test_merged_weights_of_a_narrow_base_are_the_rounded_sum(build: Callable[..., Built], folder: Path) -> None:
    model, refs, slots, base = build(Slots(adapters=(AdapterSpec(name="a", rank=4, alpha=8.0),)), dtype="bfloat16")
    assert write_export(model, refs, slots, base, folder, merges=True) == "model"
    loaded = load_export(folder)
    own = {name: value.detach() for name, value in model.named_parameters()}
    stem = "model.layers.0.self_attn.k_proj"
    delta = 2.0 * own[f"{stem}.lora_B.a.weight"].double() @ own[f"{stem}.lora_A.a.weight"].double()
    expected = (own[f"{stem}.base_layer.weight"].double() + delta).to(torch.bfloat16)
    found = loaded.get_parameter(f"{stem}.weight")
    assert {value.dtype for value in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert float((found == expected).double().mean()) > 0.99  # float32 sums may round a tie the other way
    assert torch.equal(loaded.get_parameter("model.embed_tokens.weight"), own["model.embed_tokens.weight"])


@pytest.mark.parametrize("merges", [False, True])
def test_the_source_is_not_changed(merges: bool, build: Callable[..., Built], folder: Path) -> None:
    model, refs, slots, base = build(Slots(adapters=(SHARED,)))
    before = _logits(model)
    random_state = torch.get_rng_state()
    write_export(model, refs, slots, base, folder, merges=merges)
    assert torch.equal(_logits(model), before)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_model_that_is_its_base_is_refused(build: Callable[..., Built], folder: Path) -> None:
    model, refs, slots, base = build(Slots(adapters=(SHARED,), graft=GraftSpec(num_grafts=1, layers=(0,), num_neurons=4)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
            if name.endswith("gate_bias"):
                parameter.fill_(float("-inf"))
    with pytest.raises(ModelError, match="nothing to export"):
        write_export(model, refs, slots, base, folder)


def test_the_hash_is_the_engines(build: Callable[..., Built]) -> None:
    slots = Slots(adapters=(SHARED,))
    model, refs, _, base = build(slots)
    assert frozen_hash(model, refs) == TorchEngine(open_base(base.cached), slots, 0).frozen_hash()


def test_the_largest_difference_is_that_of_the_logits(build: Callable[..., Built]) -> None:
    model, _, _, base = build(Slots(adapters=(SHARED,)))
    assert largest_difference(model, model)[0] == 0.0
    other: Any = open_base(base.cached)
    other.lm_head.weight.data = other.lm_head.weight.data * 3
    found, largest = largest_difference(open_base(base.cached), other)
    assert found == pytest.approx(2 * largest, rel=1e-5)


def _rewrite(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_folders_that_cannot_be_loaded(
    build: Callable[..., Built],
    tiny_model: Callable[..., Any],
    save_model: Callable[..., Path],
    folder: Path,
    tmp_path: Path,
) -> None:
    spec = GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=4)
    model, refs, slots, base = build(Slots(adapters=(SHARED,), graft=spec))
    write_export(model, refs, slots, base, folder)
    with pytest.raises(ModelError, match=r"export\.json does not exist"):
        load_export(tmp_path)
    kept = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def refused(match: str, **options: Any) -> None:
        with pytest.raises(ModelError, match=match):
            load_export(folder, **options)
        for path, content in kept.items():
            path.write_bytes(content)
        load_export(folder)  # whole again

    _rewrite(folder / "export.json", format=99)
    refused("expected format 1")
    _rewrite(folder / "export.json", dtype="save")
    refused("expected format 1, a form and a dtype")
    (folder / "export.json").write_text("{")
    refused(r"export\.json cannot be read")
    _rewrite(folder / "graft.json", colour="red")
    refused("the grafts in .* cannot be read: .*colour")
    _rewrite(folder / "graft.json", layers=[0])
    refused("do not fit their base: model.layers.1")
    (folder / "graft.safetensors").write_bytes(b"torn")
    refused("the grafts in .* cannot be read")
    tensors = load_file(folder / "graft.safetensors")
    save_file({name: value[..., :1].contiguous() for name, value in tensors.items()}, folder / "graft.safetensors")
    refused("do not fit their base")
    (folder / "adapter" / "adapter_model.safetensors").unlink()
    (folder / "adapter" / "adapter_model.bin").write_bytes(b"a pickle")
    refused(r"holds no adapter_model\.safetensors")
    (folder / "adapter" / "adapter_model.bin").unlink()
    refused("cannot be loaded", base=tmp_path / "nowhere")
    deeper = save_model(tiny_model("qwen2_moe", num_hidden_layers=3), tmp_path / "deeper")
    refused(r"does not fit its base: it has 24 tensors, and 36 are asked for", base=deeper)
