"""Laws of masking, moving, adding and removing experts, over every family."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts, moe_layers, unwrap
from fedgraft.moe.slots import add_slots
from fedgraft.moe.surgery import (
    Expert,
    add_expert,
    copy_expert,
    mask_experts,
    permute_experts,
    read_expert,
    remove_expert,
    write_expert,
)
from fedgraft.moe.trace import trace_routing
from fedgraft.types import AdapterSpec, Batch, Slots

Maker = Callable[..., PreTrainedModel]
Plain = Callable[..., torch.Tensor]
GROUPED: list[tuple[str, dict[str, Any]]] = [
    ("deepseek_v2", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy"}),
    ("deepseek_v3", {"n_routed_experts": 8, "n_group": 4, "topk_group": 2}),
]


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


def tokens(count: int = 40) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(3))


def everywhere(model: Any, experts: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return {layer.index: experts for layer in moe_layers(model)}


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_model(model: Any, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    now = model.state_dict()
    assert list(now) == list(state)
    assert all(torch.equal(now[name], value) and now[name].dtype == value.dtype for name, value in state.items())
    assert model.config.to_dict() == config


# ---- permutation


def test_permuting_experts_with_their_rows_changes_nothing(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model, batch = tiny_model(family), random_batch()
    before = logits_of(model, batch)
    orders = {layer.index: order for layer, order in zip(moe_layers(model), ([2, 0, 3, 1], [3, 2, 1, 0]), strict=True)}
    old = {layer.index: [layer.expert_output(e, tokens()) for e in range(4)] for layer in moe_layers(model)}
    rows = {layer.index: layer.router_rows.clone() for layer in moe_layers(model)}
    permute_experts(model, orders)
    torch.testing.assert_close(logits_of(model, batch), before, atol=1e-4, rtol=1e-4)
    for layer in moe_layers(model):
        for place, expert in enumerate(orders[layer.index]):
            assert torch.equal(layer.expert_output(place, tokens()), old[layer.index][expert])
            assert torch.equal(layer.router_rows[place], rows[layer.index][expert])
        router = unwrap(layer.router)
        router.weight = torch.nn.Parameter(rows[layer.index])
    assert (logits_of(model, batch) - before).abs().max() > 0.1  # the rows had to come along


@pytest.mark.parametrize(("family", "overrides"), GROUPED)
def test_groups_are_permuted_whole_or_not_at_all(
    family: str, overrides: dict[str, Any], tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model, batch = tiny_model(family, **overrides), random_batch()
    before = logits_of(model, batch)
    permute_experts(model, everywhere(model, (5, 4, 0, 1, 6, 7, 3, 2)))
    torch.testing.assert_close(logits_of(model, batch), before, atol=1e-4, rtol=1e-4)
    with pytest.raises(ModelError, match="tears the groups of 2 experts"):
        permute_experts(model, {1: (0, 2, 1, 3, 4, 5, 6, 7)})


# ---- masks


def test_masking_experts_that_a_token_did_not_choose(
    family: str,
    normalised: tuple[bool, dict[str, bool]],
    tiny_model: Maker,
    run_block: Plain,
    plain_shared: Plain,
    plain_logits: Plain,
) -> None:
    """Nothing changes where weights are normalised; where they are not, a softmax's other weights grow by 1 / (1 - p)."""
    model = tiny_model(family, **normalised[1])
    x = tokens()
    for layer in moe_layers(model):
        with torch.no_grad():
            before, shared = run_block(layer.block, x), plain_shared(layer.block, x)
            chosen, chances = layer.router(x)[-1], torch.softmax(plain_logits(layer.block, x), dim=1)
            for expert in range(4):
                spared = (chosen != expert).all(dim=1)
                assert 0 < int(spared.sum()) < len(x)
                with mask_experts(model, {layer.index: (expert,)}):
                    after = run_block(layer.block, x)
                expected = before
                if not layer.masking_is_local:
                    expected = shared + (before - shared) / (1 - chances[:, expert : expert + 1])
                torch.testing.assert_close(after[spared], expected[spared], atol=1e-4, rtol=1e-4)
                assert bool(((after - before)[~spared].abs().amax(dim=1) > 1e-5).all())
        assert layer.masking_is_local == (normalised[0] or family == "deepseek_v3")


def test_a_masked_expert_gets_no_token_and_a_removed_mask_leaves_the_same_bits(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model, batch = tiny_model(family), random_batch((14, 12, 13))
    state, config, before = bits(model), model.config.to_dict(), logits_of(model, batch)
    plain = trace_routing(model, [batch])
    mask = mask_experts(model, everywhere(model, (0, 3)))
    for index, trace in trace_routing(model, [batch]).items():
        assert plain[index].counts[[0, 3]].min() > 0
        assert trace.counts.tolist() == [0, 39, 39, 0]
    assert (logits_of(model, batch) - before).abs().max() > 1e-3
    assert_same_model(model, state, config)  # no copy, no change of any weight
    mask.remove()
    mask.remove()
    assert torch.equal(logits_of(model, batch), before)


def test_an_empty_mask_changes_no_bit(family: str, tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model(family), random_batch()
    before = logits_of(model, batch)
    with mask_experts(model, everywhere(model, ())):
        assert torch.equal(logits_of(model, batch), before)


@pytest.mark.parametrize(("family", "overrides"), GROUPED)
def test_masks_and_groups(family: str, overrides: dict[str, Any], tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model(family, **overrides), random_batch((14, 12, 13))
    with mask_experts(model, everywhere(model, (1, 2, 3))):
        for trace in trace_routing(model, [batch]).values():
            assert trace.counts[[1, 2, 3]].tolist() == [0, 0, 0]
            assert int(trace.counts.sum()) == 39 * 2
    with pytest.raises(ModelError, match="best 2 of 4 groups"):
        mask_experts(model, {1: (0, 1, 2, 3, 4, 5)})


def test_no_expert_of_a_chosen_groups_masked_half_is_taken_however_large_its_bias(tiny_model: Maker) -> None:
    model = tiny_model("deepseek_v3")
    x = tokens()
    for layer in moe_layers(model):
        layer.router.e_score_correction_bias[2] = 5.0  # type: ignore[index, operator]
        assert bool((layer.router(x)[-1] == 2).any(dim=1).all())
        with mask_experts(model, {layer.index: (2,)}):
            assert not bool((layer.router(x)[-1] == 2).any())


def test_a_mask_holds_where_scores_underflow(tiny_model: Maker) -> None:
    for family in ("olmoe", "deepseek_v2", "gpt_oss"):
        model = tiny_model(family)
        for layer, masked in itertools.product(moe_layers(model), itertools.combinations(range(4), 2)):
            with mask_experts(model, {layer.index: masked}):
                chosen = layer.router(tokens() * 1e4)[-1]  # one softmax score is 1, the others are exactly 0
                assert chosen.sort(dim=1).values.tolist() == [sorted({0, 1, 2, 3} - set(masked))] * 40


def test_training_under_a_mask_reaches_no_masked_expert(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model: Any = tiny_model(family)
    model.train().requires_grad_(True)
    batch = random_batch((14, 12, 13))
    with mask_experts(model, everywhere(model, (1,))):
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.square().mean().backward()
    for layer in moe_layers(model):
        for name, parameter in [*layer.experts.named_parameters(), *layer.router.named_parameters()]:
            assert parameter.grad is not None
            assert parameter.grad.isfinite().all()
            reached = parameter.grad.reshape(4, -1).abs().amax(dim=1) > 0
            assert reached.tolist() == [True, False, True, True], name


def test_masks_add_up_and_are_undone_in_any_order(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen3_moe", num_experts=6), random_batch()

    def counts() -> list[bool]:
        return [bool(count) for count in trace_routing(model, [batch])[0].counts]

    first, second = mask_experts(model, {0: (0,)}), mask_experts(model, {0: (0, 4)})
    both = logits_of(model, batch)
    assert counts()[0] is counts()[4] is False
    with pytest.raises(ModelError, match="only 1 of 6 experts are left"):
        mask_experts(model, {0: (1, 2, 3)})
    first.remove()
    assert torch.equal(logits_of(model, batch), both)  # the second still holds both
    second.remove()
    with mask_experts(model, {0: (4,)}), mask_experts(model, {0: (0,)}):
        assert torch.equal(logits_of(model, batch), both)
    with mask_experts(model, {0: (1, 2, 3)}):
        assert counts()[1:4] == [False] * 3
    with pytest.raises(ZeroDivisionError), mask_experts(model, {0: (1,)}):
        _ = 1 // 0
    assert all(not layer.router._forward_hooks for layer in moe_layers(model))


def test_a_mask_acts_on_what_an_adapter_makes_of_the_router(tiny_model: Maker) -> None:
    model: Any = tiny_model("qwen3_moe")
    add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("router",)),)))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    for layer in moe_layers(model):
        adapted, _, free = layer.router(tokens())
        assert (adapted - layer.router_logits(tokens())).abs().max() > 0.1
        with mask_experts(model, {layer.index: (2,)}):
            logits, _, chosen = layer.router(tokens())
        others = [0, 1, 3]
        assert torch.equal(logits[:, others], adapted[:, others])
        assert torch.equal(chosen.sort().values, torch.tensor(others)[torch.topk(adapted[:, others], 2).indices].sort().values)
        assert bool((free == 2).any())


@pytest.mark.parametrize(
    ("masked", "text"),
    [
        ({0: (0, 1, 2)}, "num_experts_per_tok is 2, but only 1 of 4 experts are left"),
        ({0: (4,)}, "layer 0 has no expert 4"),
        ({7: (0,)}, "layer 7 has no experts"),
    ],
)
def test_a_mask_that_cannot_be_is_refused_and_leaves_nothing(
    masked: dict[int, tuple[int, ...]], text: str, tiny_model: Maker
) -> None:
    model = tiny_model("mixtral")
    with pytest.raises(ModelError, match=text):
        mask_experts(model, {1: (0,)} | masked)
    assert all(not layer.router._forward_hooks for layer in moe_layers(model))


# ---- number of experts


def test_adding_and_removing_is_the_identity(family: str, tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model(family), random_batch()
    state, config, before = bits(model), copy.deepcopy(model.config.to_dict()), logits_of(model, batch)
    other = tiny_model(family, seed=8)
    added = {layer.index: read_expert(layer, 2) for layer in moe_layers(other)}
    add_expert(model, added)
    assert model_facts(model.config).num_experts == 5
    assert (logits_of(model, batch) - before).abs().max() > 1e-3
    removed = remove_expert(model, 4)
    assert_same_model(model, state, config)
    assert torch.equal(logits_of(model, batch), before)
    for index, expert in removed.items():
        for name in ("gate_up", "down", "gate_up_bias", "down_bias", "row", "row_bias", "choice_bias"):
            one, two = getattr(expert, name), getattr(added[index], name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two), name


def test_removing_and_adding_back_is_a_permutation(family: str, tiny_model: Maker) -> None:
    model = tiny_model(family)
    state, config = bits(model), copy.deepcopy(model.config.to_dict())
    add_expert(model, remove_expert(model, 1))
    permute_experts(model, everywhere(model, (0, 3, 1, 2)))
    assert_same_model(model, state, config)


def test_removing_is_masking(family: str, tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    masked, removed, batch = tiny_model(family), tiny_model(family), random_batch()
    choice = {layer.index: 1 + place for place, layer in enumerate(moe_layers(masked))}
    remove_expert(removed, choice)
    with mask_experts(masked, {index: (expert,) for index, expert in choice.items()}):
        torch.testing.assert_close(logits_of(removed, batch), logits_of(masked, batch), atol=1e-4, rtol=1e-4)


def test_a_grown_model_is_one_that_hugging_face_builds_and_reloads(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    model, batch = tiny_model(family), random_batch()
    add_expert(model, {layer.index: read_expert(layer, 2) for layer in moe_layers(tiny_model(family, seed=8))})
    expected = logits_of(model, batch)
    model.save_pretrained(tmp_path)
    reloaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert [layer.num_experts for layer in moe_layers(reloaded)] == [5, 5]
    torch.testing.assert_close(logits_of(reloaded, batch), expected, atol=1e-5, rtol=1e-5)
    model.config.output_router_logits = True
    if hasattr(model, "num_experts"):
        found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_router_logits=True)
        assert all(logits.shape[-1] == 5 for logits in found.router_logits)
        assert found.aux_loss is None or float(found.aux_loss) > 0


def test_the_number_of_experts_cannot_change_where_it_must_not(tiny_model: Maker) -> None:
    model = tiny_model("deepseek_v2")
    expert = read_expert(moe_layers(model)[0], 0)
    with pytest.raises(ModelError, match=r"given for layers \[1\], but the MoE layers are \[1, 2\]"):
        add_expert(model, {1: expert})
    with pytest.raises(ModelError, match="no router row"):
        add_expert(model, {1: expert, 2: replace(expert, row=None)})
    with pytest.raises(ModelError, match="layer 1 has no expert 4"):
        remove_expert(model, 4)
    remove_expert(model, 0)
    remove_expert(model, 0)
    with pytest.raises(ModelError, match="num_experts_per_tok is 2, but only 1 of 2 experts are left"):
        remove_expert(model, 0)
    assert model.config.n_routed_experts == 2
    with mask_experts(tiny_model("olmoe"), {}), pytest.raises(ModelError, match="is no order of the 2 experts"):
        permute_experts(model, {1: (0, 0)})
    masked = tiny_model("olmoe")
    with mask_experts(masked, {0: (1,)}):
        with pytest.raises(ModelError, match="layer 0 has masked experts"):
            remove_expert(masked, 3)
        with pytest.raises(ModelError, match="layer 0 has masked experts"):
            permute_experts(masked, {0: (1, 0, 2, 3)})
    remove_expert(masked, 3)
    for family, overrides in GROUPED:
        groups = tiny_model(family, **overrides)
        with pytest.raises(ModelError, match="4 groups of equal size"):
            remove_expert(groups, 0)


@pytest.mark.parametrize("targets", [("experts",), ("router",)])
def test_experts_under_an_adapter_are_left_alone(targets: tuple[str, ...], tiny_model: Maker) -> None:
    model = tiny_model("mixtral")
    expert = read_expert(moe_layers(model)[0], 0)
    add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=targets),)))
    layer = moe_layers(model)[0]
    assert torch.equal(read_expert(layer, 0).gate_up, expert.gate_up)
    for change in (
        lambda: write_expert(layer, 1, expert),
        lambda: remove_expert(model, 0),
        lambda: add_expert(model, {0: expert, 1: expert}),
        lambda: permute_experts(model, {0: (1, 0, 2, 3)}),
    ):
        with pytest.raises(ModelError, match="layer 0 has an adapter over its experts or router"):
            change()


# ---- reading and writing


def test_writing_what_was_read_is_the_identity(family: str, tiny_model: Maker) -> None:
    model = tiny_model(family)
    state, config = bits(model), model.config.to_dict()
    for layer in moe_layers(model):
        for expert in range(4):
            write_expert(layer, expert, read_expert(layer, expert))
    assert_same_model(model, state, config)


def test_an_expert_is_copied_between_layers_and_models(family: str, tiny_model: Maker) -> None:
    model = tiny_model(family)
    first, second = moe_layers(model)
    rows = second.router_rows.clone()
    others = [second.expert_output(e, tokens()) for e in range(4)]
    copy_expert(model, (first.index, 3), (second.index, 1), with_row=False)
    assert torch.equal(second.router_rows, rows)
    expected = [others[0], first.expert_output(3, tokens()), others[2], others[3]]
    for expert in range(4):
        assert torch.equal(second.expert_output(expert, tokens()), expected[expert])
    copy_expert(model, (first.index, 3), (second.index, 1), with_row=True)
    one, two = unwrap(first.router), unwrap(second.router)
    for name in first.family.router_tensors:
        assert torch.equal(getattr(two, name)[1], getattr(one, name)[3])
    assert torch.equal(second.router_rows[[0, 2, 3]], rows[[0, 2, 3]])


def test_surgery_writes_to_no_tensor_of_a_mapped_base(make_base: Callable[..., Path]) -> None:
    folder = make_base()
    model: Any = open_base(folder)
    old = dict(model.named_parameters())
    saved = {name: parameter.clone() for name, parameter in old.items()}
    layer = moe_layers(model)[0]
    copy_expert(model, (0, 3), (0, 1), with_row=True)
    permute_experts(model, {0: (3, 2, 1, 0)})
    add_expert(model, remove_expert(model, 2))
    changed = {"experts.gate_up_proj", "experts.down_proj", "gate.weight"}
    for name, parameter in model.named_parameters():
        is_new = any(name.endswith(f"mlp.{tail}") for tail in changed)
        assert (parameter is not old[name]) == is_new, name
        assert parameter.requires_grad is False
        assert torch.equal(old[name], saved[name]), f"{name} was written to"
    assert layer.num_experts == 4


def test_an_expert_that_does_not_fit_is_refused(tiny_model: Maker) -> None:
    qwen, gpt = tiny_model("qwen3_moe"), tiny_model("gpt_oss")
    plain, biased = read_expert(moe_layers(qwen)[0], 0), read_expert(moe_layers(gpt)[0], 0)
    with pytest.raises(ModelError, match="a gpt_oss expert needs gate_up_proj_bias"):
        write_expert(moe_layers(gpt)[0], 0, plain)
    with pytest.raises(ModelError, match=r"qwen3_moe has no place for an expert's gate_up_proj_bias, down_proj_bias"):
        write_expert(moe_layers(qwen)[0], 0, biased)
    narrow = Expert(gate_up=plain.gate_up[:20], down=plain.down[:, :10])
    with pytest.raises(ModelError, match=r"gate_up_proj of an expert has shape \(48, 32\), got \(20, 32\)"):
        write_expert(moe_layers(qwen)[0], 0, narrow)
    for expert in (-1, 4):
        with pytest.raises(ModelError, match=f"layer 0 has no expert {expert}"):
            read_expert(moe_layers(qwen)[0], expert)


def test_who_watched_the_routing_before_the_mask_came_sees_what_it_leaves(family: str, tiny_model: Maker) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = layer.watch_routing(lambda chosen, weights: seen.append((chosen, weights)))
    with mask_experts(model, {layer.index: (1,)}):
        _, weights, chosen = layer.router(tokens())
    handle.remove()
    layer.router(tokens())
    assert len(seen) == 1
    assert not bool((seen[0][0] == 1).any())
    assert torch.equal(seen[0][0], chosen)
    assert torch.equal(seen[0][1], weights)
