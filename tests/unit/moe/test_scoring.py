"""Scores of experts against brute force: each pruned block is computed token by token with masked logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.moe.families import moe_layers
from fedgraft.moe.graft import attach_grafts, grafts_of
from fedgraft.moe.scoring import CRITERIA, Criterion, LayerScores, neuron_contributions, observe_experts, pruned_output
from fedgraft.moe.slots import add_slots
from fedgraft.types import AdapterSpec, Batch, GraftSpec, Slots

Plain = Callable[..., torch.Tensor]
Inputs = Callable[[Any, Batch], dict[int, tuple[torch.Tensor, torch.Tensor]]]


def brute_loss(
    block: Any, data: list[tuple[torch.Tensor, torch.Tensor]], kept: tuple[int, ...], plain_routed: Plain, plain_shared: Plain
) -> float:
    """sum over batches ||Z - M^S(X)||_F with M^S by masked logits, softmax, top-k, renormalised."""
    total = 0.0
    for x, z in data:
        pruned = plain_routed(block, x, 2, normalise=True, kept=kept) + plain_shared(block, x)
        total += float((z.double() - pruned.double()).norm())
    return total


def by_layer(model: Any, batches: list[Batch], block_inputs: Inputs) -> dict[int, list[tuple[torch.Tensor, torch.Tensor]]]:
    seen = [block_inputs(model, batch) for batch in batches]
    return {index: [entry[index] for entry in seen] for index in seen[0]}


def test_the_expert_that_alone_makes_the_output_has_loss_zero(
    family: str, tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    for k in range(4):
        model: Any = tiny_model(family, seed=k)
        for layer in moe_layers(model):
            layer.router.forward = _always(k, layer.scale)  # type: ignore[method-assign]
        scores = observe_experts(model, [random_batch(seed=k)])
        for found in scores.layers.values():
            assert int(found.loss.argmin()) == k
            assert float(found.loss[k]) <= 1e-5 * found.zero_loss
            assert float(found.loss[[e for e in range(4) if e != k]].min()) > 0.1 * found.zero_loss
            assert float(found.criterion("scale_free")[k]) == pytest.approx(0, abs=1e-9)
            assert found.zero_loss > 0


def _always(k: int, weight: float) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        tokens = x.reshape(-1, x.shape[-1]).shape[0]
        logits = torch.zeros(tokens, 4)
        return logits, torch.full((tokens, 1), weight), torch.full((tokens, 1), k)

    return forward


@pytest.mark.parametrize("seed", range(3))
def test_the_reconstruction_loss_equals_brute_force(
    family: str,
    seed: int,
    tiny_model: Callable[..., PreTrainedModel],
    random_batch: Callable[..., Batch],
    block_inputs: Inputs,
    plain_routed: Plain,
    plain_shared: Plain,
) -> None:
    model: Any = tiny_model(family, seed=seed)
    batches = [random_batch((9, 5), seed=seed), random_batch((7,), seed=seed + 10)]
    scores = observe_experts(model, batches)
    data = by_layer(model, batches, block_inputs)
    assert sorted(scores.layers) == sorted(data)
    assert len(data) == 2
    for index, found in scores.layers.items():
        block = model.model.layers[index].mlp
        singles = [brute_loss(block, data[index], (e,), plain_routed, plain_shared) for e in range(4)]
        assert found.loss.tolist() == pytest.approx(singles, rel=1e-4)
        best = min(range(4), key=singles.__getitem__)
        assert int(found.loss.argmin()) == best
        most_used = int(found.tokens.argmax())
        assert float(found.loss[best]) <= float(found.loss[most_used])
        assert float(found.loss[best]) <= float(found.loss.mean())  # the mean over a random choice
        zero = sum(float((z - plain_shared(block, x)).double().norm()) for x, z in data[index])
        assert found.zero_loss == pytest.approx(zero, rel=1e-4)


@pytest.mark.parametrize("seed", range(3))
def test_the_greedy_second_expert_equals_brute_force(
    seed: int,
    tiny_model: Callable[..., PreTrainedModel],
    random_batch: Callable[..., Batch],
    block_inputs: Inputs,
    plain_routed: Plain,
    plain_shared: Plain,
) -> None:
    model: Any = tiny_model("qwen2_moe", seed=seed)
    batches = [random_batch((8, 6), seed=seed), random_batch((5,), seed=seed + 10)]
    first = {index: (int(found.loss.argmin()),) for index, found in observe_experts(model, batches).layers.items()}
    scores = observe_experts(model, batches, kept=first)
    data = by_layer(model, batches, block_inputs)
    for index, found in scores.layers.items():
        block = model.model.layers[index].mlp
        for expert in range(4):
            kept = tuple(sorted({*first[index], expert}))
            assert float(found.loss[expert]) == pytest.approx(
                brute_loss(block, data[index], kept, plain_routed, plain_shared), rel=1e-4
            )


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_pruned_output_of_every_subset_equals_masked_routing(
    family: str, tiny_model: Callable[..., PreTrainedModel], plain_routed: Plain
) -> None:
    model: Any = tiny_model(family)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(model):
        for size in (1, 2, 3, 4):
            for kept in itertools.combinations(range(4), size):
                expected = plain_routed(layer.block, x, 2, normalise=True, kept=kept)
                torch.testing.assert_close(pruned_output(layer, x, kept, 2), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(CRITERIA))
def test_every_criterion_equals_its_formula(
    name: Criterion,
    family: str,
    tiny_model: Callable[..., PreTrainedModel],
    random_batch: Callable[..., Batch],
    block_inputs: Inputs,
    plain_expert: Plain,
    plain_logits: Plain,
    plain_shared: Plain,
) -> None:
    model: Any = tiny_model(family, seed=4)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    scores = observe_experts(model, batches)
    for index, pairs in by_layer(model, batches, block_inputs).items():
        block = model.model.layers[index].mlp
        x = torch.cat([x for x, _ in pairs]).double()
        scale = 1.5 if "deepseek" in family else 1.0  # its routed_scaling_factor
        block64 = {e: scale * torch.cat([plain_expert(block, e, part) for part, _ in pairs]).double() for e in range(4)}
        routed = torch.cat([z - plain_shared(block, part) for part, z in pairs]).double()
        logits = plain_logits(block, x.float()).double()
        chances, ranked = torch.softmax(logits, dim=1), logits
        if family == "deepseek_v3":
            chances = torch.sigmoid(logits)
            ranked = chances + block.gate.e_score_correction_bias
            chances = chances / chances.sum(dim=1, keepdim=True)
        sizes = [len(part) for part, _ in pairs]
        expected = []
        for e in range(4):
            f = block64[e]
            if name == "recon":
                parts = zip(routed.split(sizes), f.split(sizes), strict=True)
                expected.append(sum(float((a - b).norm()) for a, b in parts))
            elif name == "router_weighted_recon":
                expected.append(float((routed - chances[:, e : e + 1] * f).norm()))
            elif name == "mean_weight_recon":
                expected.append(float((routed - chances[:, e].mean() * f).norm()))
            elif name == "scale_free":
                # the best multiple by least squares, not by the closed form
                c = torch.linalg.lstsq(f.reshape(-1, 1), routed.reshape(-1, 1)).solution
                expected.append(float((routed - c * f).square().sum() / routed.square().sum()))
            else:
                ranks = torch.topk(ranked, 2, dim=1).indices
                expected.append(-float((ranks == e).sum()))
        assert scores.layers[index].criterion(name).tolist() == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_silent_expert_is_useless_not_undefined() -> None:
    found = LayerScores.empty(2)
    found.square_routed, found.num_tokens = 4.0, 2
    found.square_norm += torch.tensor([0.0, 2.0])
    found.inner += torch.tensor([0.0, 1.0])
    assert found.criterion("scale_free").tolist() == [1.0, 1 - 1 / 8]
    nothing = LayerScores.empty(2)
    assert all(torch.isfinite(nothing.criterion(name)).all() for name in CRITERIA)


def test_padding_does_not_count(tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]) -> None:
    model: Any = tiny_model("qwen2_moe")
    batch = random_batch((9, 4, 6))
    wide = Batch(
        input_ids=torch.nn.functional.pad(batch.input_ids, (0, 5), value=77),
        attention_mask=torch.nn.functional.pad(batch.attention_mask, (0, 5)),
        labels=torch.nn.functional.pad(batch.labels, (0, 5), value=-100),
    )
    first, second = observe_experts(model, [batch]), observe_experts(model, [wide])
    for index, found in first.layers.items():
        other = second.layers[index]
        assert found.num_tokens == other.num_tokens == 19
        assert int(found.tokens.sum()) == 2 * 19
        assert torch.equal(found.tokens, other.tokens)
        torch.testing.assert_close(found.loss, other.loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.probability, other.probability, rtol=1e-5, atol=1e-6)
    for index, sizes in neuron_contributions(model, [batch]).items():
        torch.testing.assert_close(sizes, neuron_contributions(model, [wide])[index], rtol=1e-5, atol=1e-6)


def test_neuron_contributions_equal_their_formula(
    family: str,
    tiny_model: Callable[..., PreTrainedModel],
    random_batch: Callable[..., Batch],
    block_inputs: Inputs,
    plain_hidden: Plain,
) -> None:
    model: Any = tiny_model(family)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    found = neuron_contributions(model, batches)
    for index, pairs in by_layer(model, batches, block_inputs).items():
        block = model.model.layers[index].mlp
        x = torch.cat([part for part, _ in pairs])
        for e in range(4):
            activation = plain_hidden(block, e, x).abs().double().mean(dim=0)
            down = block.experts.down_proj[e].double()
            expected = activation * (down.norm(dim=1) if family == "gpt_oss" else down.norm(dim=0))
            torch.testing.assert_close(found[index][e], expected, rtol=1e-4, atol=1e-6)


def test_grafts_and_fresh_adapters_do_not_change_the_scores(
    tiny_model: Callable[..., PreTrainedModel], random_batch: Callable[..., Batch]
) -> None:
    batches = [random_batch()]
    plain = observe_experts(tiny_model("qwen2_moe"), batches)
    model: Any = tiny_model("qwen2_moe")
    add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0),)))
    # B is zero until it is loaded; a graft that is wide open is switched off while scores are taken
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.zero_()
    attach_grafts(model, GraftSpec(num_grafts=1, layers=(0, 1), num_neurons=4, gate_bias=5.0))
    for graft in grafts_of(model).values():
        graft.gate_up_proj.data.fill_(1.0)
        graft.down_proj.data.fill_(1.0)
    found = observe_experts(model, batches)
    for index, layer in plain.layers.items():
        assert torch.equal(found.layers[index].loss, layer.loss)
        assert torch.equal(found.layers[index].tokens, layer.tokens)
    assert all(graft.is_enabled for graft in grafts_of(model).values())
