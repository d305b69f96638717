"""What experts serve and answer, against the blocks' plain formulas and against weights merged by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.moe.families import moe_layers
from fedgraft.moe.regions import RouterInputs, k_means, nearest, profile_experts
from fedgraft.moe.slots import add_slots
from fedgraft.moe.surgery import mask_experts
from fedgraft.moe.trace import visit_blocks
from fedgraft.types import AdapterSpec, Batch, Slots

Model = Callable[..., PreTrainedModel]
Data = Callable[..., Batch]


def by_hand(model: Any, batches: list[Batch]) -> dict[int, tuple[torch.Tensor, ...]]:
    """By layer: all tokens (T, D), router probabilities (T, E), and chosen experts (T, K), from the plain formulas."""
    seen: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in moe_layers(model)}
    visit_blocks(model, batches, lambda layer, x, z: seen[layer.index].append(x), with_grafts=True)
    found = {}
    for layer in moe_layers(model):
        x = torch.cat(seen[layer.index])
        found[layer.index] = (x, layer.probabilities(x), layer.choose(layer.router_logits(x))[1])
    return found


def test_every_familys_experts_are_measured(family: str, tiny_model: Model, random_batch: Data) -> None:
    model: Any = tiny_model(family)
    batches = [random_batch(), random_batch(lengths=(5, 7), seed=1)]
    profile = profile_experts(model, batches)
    for at, (layer, (x, p, chosen)) in enumerate(zip(moe_layers(model), by_hand(model, batches).values(), strict=True)):
        assert len(x) == 9 + 6 + 4 + 5 + 7  # no padding
        torch.testing.assert_close(profile.marginals[at], p.mean(dim=0), rtol=1e-5, atol=1e-6)
        # Every other example, over the border between batches: tokens of rows 0, 2 and 4 against those of rows 1 and 3.
        is_second = torch.tensor([0] * 9 + [1] * 6 + [0] * 4 + [1] * 5 + [0] * 7).bool()
        for half in (0, 1):
            torch.testing.assert_close(profile.halves[half, at], p[is_second == bool(half)].mean(dim=0), rtol=1e-5, atol=1e-6)
        for expert in range(4):
            served = x[(chosen == expert).any(dim=1)]
            assert profile.counts[at, expert].tolist() == [len(served)]
            if len(served):
                torch.testing.assert_close(profile.inputs[at, expert, 0], served.mean(dim=0), rtol=1e-4, atol=1e-5)
                answers = layer.expert_output(expert, served).mean(dim=0)
                torch.testing.assert_close(profile.responses[at, expert, 0], answers, rtol=1e-4, atol=1e-5)
            else:
                assert not profile.responses[at, expert].any()
    torch.testing.assert_close(profile.marginals.sum(dim=-1), torch.ones(2))


def test_what_a_client_trained_is_in_what_is_measured(tiny_model: Model, random_batch: Data) -> None:
    adapted: Any = tiny_model("qwen2_moe")
    spec = AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("experts",))
    add_slots(adapted, Slots(adapters=(spec,), full=("router",)))
    merged: Any = tiny_model("qwen2_moe")
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if ".lora_" in name or name.endswith("mlp.gate.weight"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for mine, theirs in zip(moe_layers(adapted), moe_layers(merged), strict=True):
            theirs.router.weight.copy_(mine.router.weight)
            outer = mine.block.get_submodule("experts")
            for name, wrapper in (("down_proj", outer), ("gate_up_proj", outer.base_layer)):
                assert wrapper.parameter_name == name
                a, b = wrapper.lora_A["shared"].weight, wrapper.lora_B["shared"].weight  # (E R, in), (out, R E)
                a, b = a.view(4, 2, -1), b.view(b.shape[0], 2, 4).permute(2, 0, 1)
                getattr(theirs.experts, name).add_(2.0 * torch.einsum("eor,eri->eoi", b, a))
    batches = [random_batch()]
    found, expected, plain = (profile_experts(each, batches) for each in (adapted, merged, tiny_model("qwen2_moe")))
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.responses, expected.responses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.marginals, expected.marginals, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found.responses[0], plain.responses[0], atol=0.1)


def test_masked_experts_serve_nothing(tiny_model: Model, random_batch: Data) -> None:
    model: Any = tiny_model("qwen2_moe")
    with mask_experts(model, {0: [1]}):
        profile = profile_experts(model, [random_batch()])
    assert float(profile.counts[0, 1]) == 0.0
    assert float(profile.marginals[0, 1]) == 0.0
    assert float(profile.marginals[0].sum()) == pytest.approx(1)


def test_one_example_has_two_equal_halves(tiny_model: Model, random_batch: Data) -> None:
    profile = profile_experts(tiny_model("qwen2_moe"), [random_batch(lengths=(9,))])
    assert torch.equal(profile.halves[0], profile.halves[1])
    assert torch.equal(profile.halves[0], profile.marginals)


def test_regions_share_out_an_experts_tokens(tiny_model: Model, random_batch: Data) -> None:
    model: Any = tiny_model("qwen2_moe")
    batches = [random_batch(), random_batch(lengths=(5, 7), seed=1)]
    whole = profile_experts(model, batches)
    centroids = torch.randn(2, 4, 3, 32, generator=torch.Generator().manual_seed(4))
    for given in (centroids, None):
        profile = profile_experts(model, batches, num_regions=3, centroids=given)
        assert torch.equal(profile.counts.sum(dim=-1, keepdim=True), whole.counts)
        assert bool((profile.counts > 0).sum(dim=-1).gt(1).any())
        for name in ("inputs", "responses"):
            mean = (profile.counts[..., None] * getattr(profile, name)).sum(dim=2) / whole.counts.clamp_min(1)
            torch.testing.assert_close(mean, getattr(whole, name)[:, :, 0], rtol=1e-4, atol=1e-5)
    profile = profile_experts(model, batches, num_regions=3, centroids=centroids)
    for at, (x, _, chosen) in enumerate(by_hand(model, batches).values()):
        for expert in range(4):
            served = x[(chosen == expert).any(dim=1)]
            region = torch.cdist(served, centroids[at, expert]).argmin(dim=1)
            assert profile.counts[at, expert].tolist() == torch.bincount(region, minlength=3).tolist()


def test_k_means_finds_clumps_and_weighs_their_points() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [100.0, 0.0], [102.0, 0.0], [0.0, 50.0]])
    weights = torch.tensor([1.0, 3.0, 1.0, 1.0, 2.0])
    centres = k_means(points, weights, 3)
    assert sorted(centres.tolist()) == [[0.0, 50.0], [0.75, 0.0], [101.0, 0.0]]
    assert sorted(nearest(points, centres).bincount().tolist()) == [1, 2, 2]
    # A point of weight 0 is not there.
    without = k_means(torch.cat([points, torch.tensor([[-1e4, 0.0]])]), torch.cat([weights, torch.zeros(1)]), 3)
    assert torch.equal(without, centres)


def test_k_means_with_too_few_points_leaves_regions_empty() -> None:
    centres = k_means(torch.tensor([[1.0], [1.0], [4.0]]), torch.ones(3), 4)
    assert set(nearest(torch.tensor([[1.0], [4.0]]), centres).tolist()) == {0, 1}
    assert torch.equal(k_means(torch.empty(0, 2), torch.empty(0), 3), torch.zeros(3, 2))


def test_router_inputs_are_those_of_the_last_pass_without_their_graph(tiny_model: Model, random_batch: Data) -> None:
    model: Any = tiny_model("qwen2_moe")
    add_slots(model, Slots(full=("attention",)))
    batch = random_batch()
    with RouterInputs(model) as watch:
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        assert all(x.shape == (27, 32) and not x.requires_grad for x in watch.inputs.values())
        keep = batch.attention_mask.reshape(-1).bool()
        expected = by_hand(model, [batch])
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for index, x in watch.inputs.items():
            torch.testing.assert_close(x[keep], expected[index][0])
    assert watch.inputs == {}
    model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    assert watch.inputs == {}
