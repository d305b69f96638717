"""Adapters, full parts and grafts in a model: the start is the base, and every key is what it says it is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts, moe_layers
from fedgraft.moe.slots import add_slots, count_slot_elements, frozen_names, initial_params
from fedgraft.types import AdapterSpec, Batch, GraftSpec, MixtureSpec, ParamRef, Slots

PARTS = ("attention", "router", "experts")


def lora(*targets: str, name: str = "shared", rank: int = 2, **fields: Any) -> AdapterSpec:
    return AdapterSpec(name=name, rank=rank, alpha=2.0 * rank, targets=targets, **fields)


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


def load(model: Any, refs: tuple[ParamRef, ...], values: dict[str, torch.Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for ref in refs:
        if ref.key in values:
            ref.view(parameters[ref.name].data).copy_(values[ref.key])


def start(model: Any, slots: Slots, seed: int = 3) -> tuple[ParamRef, ...]:
    """Add slots and put their start values in."""
    refs = add_slots(model, slots)
    load(model, refs, initial_params(model, refs, seed))
    return refs


SUBSETS = [subset for size in (1, 2, 3) for subset in itertools.combinations(PARTS, size)]


@pytest.mark.parametrize("targets", SUBSETS, ids="+".join)
def test_lora_starts_as_the_base(
    family: str, targets: tuple[str, ...], tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    model = tiny_model(family)
    batch = random_batch()
    before = logits_of(model, batch)
    refs = start(model, Slots(adapters=(lora(*targets),)))
    assert {ref.part for ref in refs} == set(targets)
    assert {ref.adapter for ref in refs} == {"shared"}
    assert torch.equal(logits_of(model, batch), before)  # B is zero: x + 0 is x, bit for bit


@pytest.mark.parametrize("targets", [("attention",), ("router",), ("experts",)], ids="+".join)
def test_every_lora_tensor_acts_once_b_is_not_zero(
    family: str, targets: tuple[str, ...], tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    model: Any = tiny_model(family)
    refs = start(model, Slots(adapters=(lora(*targets),)))
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)
    for ref in refs:
        ref.view(parameters[ref.name].data).copy_(torch.randn(ref.shape, generator=generator) * 0.2)
    batch = random_batch((14, 12, 13))
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.square().sum().backward()
    for ref in refs:
        gradient = parameters[ref.name].grad
        assert gradient is not None, ref.key
        assert bool((ref.view(gradient) != 0).any()), f"{ref.key} gets no gradient"


@pytest.mark.parametrize(
    "slots",
    [
        Slots(adapters=(lora(*PARTS),)),
        Slots(adapters=(lora("experts"), lora("attention", name="personal", rank=3))),
        Slots(full=PARTS),
        Slots(adapters=(lora("attention"),), full=("experts",)),
        Slots(adapters=(lora("attention"),), graft=GraftSpec(num_grafts=2, layers=(1,), num_neurons=5)),
    ],
)
def test_references_cover_exactly_what_is_trainable(
    family: str, slots: Slots, tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model = tiny_model(family)
    refs = add_slots(model, slots)
    assert len({ref.key for ref in refs}) == len(refs)
    trainable = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    assert {ref.name for ref in refs} == set(trainable)
    for ref in refs:
        view = ref.view(trainable[ref.name])
        assert tuple(view.shape) == ref.shape
        assert view.numel() == ref.num_elements
        view += 1
    assert all(bool((marks == 1).all()) for marks in trainable.values())  # every value belongs to exactly one key
    frozen = set(frozen_names(model, refs))
    assert frozen == {name for name, p in model.named_parameters() if not p.requires_grad}
    for ref in refs:
        if ref.layer is not None:
            assert f"layers.{ref.layer}." in ref.key
        assert (ref.expert is not None) == (ref.part == "experts")


def every_slots(layers: tuple[int, ...]) -> list[Slots]:
    found = [Slots(adapters=(lora(*subset, rank=3),)) for subset in SUBSETS]
    found += [Slots(full=subset) for subset in SUBSETS]
    found += [
        Slots(adapters=(lora("attention", "experts", rank=1), lora("attention", name="personal", rank=4))),
        Slots(adapters=(lora("attention"),), full=("router", "experts")),
        Slots(graft=GraftSpec(num_grafts=1, layers=layers, num_neurons=24)),
        Slots(adapters=(lora("attention"),), graft=GraftSpec(num_grafts=3, layers=(1,), num_neurons=7), full=("router",)),
        Slots(),
    ]
    return found


def test_sizes_are_known_before_a_model_is_loaded(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    facts = model_facts(tiny_model(family).config)
    for slots in every_slots(facts.layers):
        expected = dict.fromkeys((*PARTS, "graft", "graft_gate", "mixture", "mixture_gate"), 0)
        for ref in add_slots(tiny_model(family), slots):
            expected[ref.part] += math.prod(ref.shape)
        assert count_slot_elements(facts, slots) == expected, slots


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0]}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("qwen2_moe", {"qkv_bias": False}),
        ("qwen3_moe", {"attention_bias": True}),
        ("olmoe", {"attention_bias": True}),
        ("deepseek_v2", {"first_k_dense_replace": 2, "q_lora_rank": 10}),
        ("deepseek_v3", {"attention_bias": True, "q_lora_rank": None}),
        ("gpt_oss", {"attention_bias": False}),
    ],
)
def test_sizes_count_moe_layers_and_biases_only_where_they_are(
    family: str, overrides: dict[str, Any], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    facts = model_facts(tiny_model(family, **overrides).config)
    for slots in (Slots(adapters=(lora(*PARTS),)), Slots(full=PARTS)):
        refs = add_slots(tiny_model(family, **overrides), slots)
        assert sum(count_slot_elements(facts, slots).values()) == sum(ref.num_elements for ref in refs)


def test_an_experts_lora_changes_only_tokens_routed_to_it(
    family: str, tiny_model: Callable[..., PreTrainedModel], run_block: Callable[..., torch.Tensor]
) -> None:
    model = tiny_model(family)
    refs = start(model, Slots(adapters=(lora("experts"),)))
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)
    values = {ref.key: torch.randn(ref.shape, generator=generator) * 0.2 for ref in refs}
    load(model, refs, values)
    x = torch.randn(40, 32, generator=generator)
    for layer in moe_layers(model):
        with torch.no_grad():
            before = run_block(layer.block, x)
            chosen = layer.router(x)[-1]
        for expert in range(4):
            routed = (chosen == expert).any(dim=-1)
            assert 0 < int(routed.sum()) < 40
            own = [ref for ref in refs if (ref.layer, ref.expert) == (layer.index, expert)]
            assert len(own) == 4  # A and B over gate_up_proj and down_proj
            for ref in own:
                view = ref.view(parameters[ref.name].data)
                view += 0.5
                with torch.no_grad():
                    changed = (run_block(layer.block, x) - before).abs().amax(dim=-1)
                assert bool((changed[routed] > 0).all()), ref.key
                assert bool((changed[~routed] == 0).all()), f"{ref.key} reaches tokens of other experts"
                view.copy_(values[ref.key])


def test_a_full_experts_slice_is_that_expert(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model = tiny_model(family)
    refs = add_slots(model, Slots(full=("experts",)))
    by_name = dict(model.named_parameters())
    for layer in moe_layers(model):
        for expert in range(4):
            parts = {ref.name.rsplit(".", 1)[1]: ref for ref in refs if (ref.layer, ref.expert) == (layer.index, expert)}
            stored = {name: value[expert] for name, value in layer.experts.named_parameters()}
            assert set(parts) == set(stored)
            assert len(stored) == (4 if family == "gpt_oss" else 2)
            for name, weight in stored.items():
                view = parts[name].view(by_name[parts[name].name])
                assert torch.equal(view[0], weight)
                assert view.data_ptr() == weight.data_ptr()


@pytest.mark.parametrize("targets", [("experts",), ("router",)], ids="+".join)
def test_lora_over_parameters_is_the_sum_of_weight_and_product(
    family: str, targets: tuple[str, ...], tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    batch = random_batch()
    model: Any = tiny_model(family)
    plain: Any = tiny_model(family)
    refs = start(model, Slots(adapters=(lora(*targets, rank=3),)))
    generator = torch.Generator().manual_seed(9)
    values = {ref.key: torch.randn(ref.shape, generator=generator) * 0.2 for ref in refs}
    load(model, refs, values)
    pairs: dict[tuple[str, int | None], dict[str, torch.Tensor]] = {}
    for ref in refs:
        stem, side = ref.name.split(".lora_")
        pairs.setdefault((stem, ref.expert), {})[side[0]] = values[ref.key]
    assert len(pairs) == 2 * (4 * 2 if targets == ("experts",) else 1)
    with torch.no_grad():
        for (stem, expert), pair in pairs.items():
            update = 2.0 * pair["B"] @ pair["A"]  # (out, in); alpha / rank is 2
            if expert is None:
                plain.get_parameter(f"{stem}.weight").add_(update)
                continue
            # PEFT nests: the wrapper inside is that of the target listed first.
            path, name = (
                (stem.removesuffix(".base_layer"), "gate_up_proj") if stem.endswith(".base_layer") else (stem, "down_proj")
            )
            weight = plain.get_parameter(f"{path}.{name}")[expert]
            weight.add_(update.T if family == "gpt_oss" else update)
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), atol=1e-4, rtol=1e-4)


def test_two_adapters_side_by_side_both_act(
    family: str, tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    batch = random_batch()
    first, second = lora("attention", rank=2), AdapterSpec(name="personal", rank=5, alpha=10.0)
    model: Any = tiny_model(family)
    plain: Any = tiny_model(family)
    refs = start(model, Slots(adapters=(first, second)))
    assert {ref.adapter for ref in refs} == {"shared", "personal"}
    generator = torch.Generator().manual_seed(9)
    values = {ref.key: torch.randn(ref.shape, generator=generator) * 0.2 for ref in refs}
    load(model, refs, values)
    # Reference: W + sum over adapters of alpha / rank * B A, put into the plain model by hand.
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            path = name.removesuffix(".weight")
            for adapter in (first, second):
                a, b = (values.get(f"{path}.lora_{side}.{adapter.name}.weight") for side in "AB")
                if a is not None and b is not None:
                    parameter += adapter.alpha / adapter.rank * (b @ a)
    torch.testing.assert_close(logits_of(model, batch), logits_of(plain, batch), atol=1e-4, rtol=1e-4)
    for adapter in ("shared", "personal"):
        full = logits_of(model, batch)
        load(model, refs, {ref.key: torch.zeros(ref.shape) for ref in refs if ref.adapter == adapter})
        assert (logits_of(model, batch) - full).abs().max() > 1e-3
        load(model, refs, values)


def test_full_parts_do_not_touch_the_mapped_base(make_base: Callable[..., Path]) -> None:
    folder = make_base()
    model, untouched = open_base(folder), open_base(folder)
    content = (folder / "model.safetensors").read_bytes()
    mapped = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    refs = add_slots(model, Slots(full=("experts", "router", "attention")))
    parameters = dict(model.named_parameters())
    for ref in refs:
        assert parameters[ref.name].data_ptr() != mapped[ref.name], f"{ref.name} is trained where the base lies"
        ref.view(parameters[ref.name].data).fill_(7.0)
    for name in frozen_names(model, refs):
        assert parameters[name].data_ptr() == mapped[name], f"{name} was copied"
    assert (folder / "model.safetensors").read_bytes() == content
    fresh = dict(open_base(folder).named_parameters())
    assert all(torch.equal(parameter, fresh[name]) for name, parameter in untouched.named_parameters())


def test_start_values_follow_from_the_seed_and_the_key_alone(tiny_model: Callable[..., PreTrainedModel]) -> None:
    def starts(seed: int, slots: Slots) -> dict[str, torch.Tensor]:
        model = tiny_model("qwen2_moe")
        return initial_params(model, add_slots(model, slots), seed)

    alone = starts(3, Slots(adapters=(lora("attention"),)))
    grafted = starts(3, Slots(adapters=(lora("attention"),), graft=GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=4)))
    other = starts(4, Slots(adapters=(lora("attention"),)))
    for key, value in alone.items():
        assert torch.equal(value, grafted[key]), key
        if ".lora_B." in key:
            assert not value.any()
        else:
            assert not torch.equal(value, other[key])
            assert value.abs().max() <= 1 / math.sqrt(value.shape[1])
            assert value.abs().max() > 0.7 / math.sqrt(value.shape[1])
    first = [value for key, value in alone.items() if ".lora_A." in key and value.shape == (2, 32)]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(first, 2))


@pytest.mark.parametrize("targets", [("experts",), ("router",), ("attention", "experts")])
def test_dropout_on_fused_parameters_is_refused(targets: tuple[str, ...], tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match=r"adapter 'shared' has dropout 0\.1 on router or experts"):
        add_slots(tiny_model("qwen2_moe"), Slots(adapters=(lora(*targets, dropout=0.1),)))
    add_slots(tiny_model("qwen2_moe"), Slots(adapters=(lora("attention", dropout=0.1),)))


@pytest.mark.parametrize("slots", [Slots(full=("heads",)), Slots(adapters=(lora("attention", "heads"),))])
def test_an_unknown_part_is_refused_with_the_known_ones(slots: Slots, tiny_model: Callable[..., PreTrainedModel]) -> None:
    with pytest.raises(ModelError, match="'heads'") as caught:
        add_slots(tiny_model("qwen2_moe"), slots)
    assert "attention, router, experts" in caught.value.hint


def test_targets_that_match_nothing_are_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model("qwen2_moe")
    for layer in model.model.layers:
        layer.self_attn = torch.nn.Identity()
    for slots in (
        Slots(adapters=(lora("attention"),)),
        Slots(adapters=(lora("router", "attention"),)),
        Slots(full=("attention",)),
    ):
        with pytest.raises(ModelError, match="target attention matches nothing in layer 0 of this qwen2_moe model") as caught:
            add_slots(model, slots)
        assert "self_attn.q_proj" in caught.value.hint


def test_a_model_with_new_slots_is_in_eval_mode(tiny_model: Callable[..., Any]) -> None:
    # Else dropout would act until the first training: a replica that was restarted would judge otherwise than an old one.
    model = tiny_model("qwen2_moe")
    mixture = MixtureSpec(num_slots=2, rank=2, alpha=4.0, dropout=0.5, targets=("q_proj",), top_k=1)
    add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, dropout=0.5),), mixture=mixture))
    assert [name for name, module in model.named_modules() if module.training] == []
