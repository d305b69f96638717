"""Active experts against blocks written out, in every family: who gets a gradient, who lends its output, what keeps its bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.moe.active import ActiveExperts, renormalised
from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.slots import add_slots
from fedgraft.types import AdapterSpec, Batch, Slots

Models = Callable[..., PreTrainedModel]
ACTIVE = (0, 2)
IDLE = (1, 3)


def choose_fixed(index: int, gate_TE: torch.Tensor, union_E: torch.Tensor) -> torch.Tensor:
    active = torch.zeros(4, dtype=torch.bool)
    active[list(ACTIVE)] = True
    return active


def tokens(size: int = 24, hidden: int = 32) -> torch.Tensor:
    return torch.randn(size, hidden, generator=torch.Generator().manual_seed(5))


def gradients(output: torch.Tensor, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a fixed random functional of the output; zeros where an input is not in the graph."""
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(9))
    found = torch.autograd.grad((output * direction).sum(), list(inputs.values()), allow_unused=True)
    pairs = zip(inputs.items(), found, strict=True)
    return {name: torch.zeros_like(value) if grad is None else grad for (name, value), grad in pairs}


def routed(layer: MoELayer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each expert's weight on each token, 0 where it was not chosen, with graph; and whether it was chosen; (T, E)."""
    _, weights, chosen = layer.router(x)
    shape = (len(x), layer.num_experts)
    return torch.zeros(shape).scatter(1, chosen, weights), torch.zeros(shape, dtype=torch.bool).scatter(1, chosen, True)


def trainable(layer: MoELayer) -> dict[str, torch.Tensor]:
    named: dict[str, torch.Tensor] = {f"router.{name}": parameter for name, parameter in layer.router.named_parameters()}
    return named | {f"experts.{name}": parameter for name, parameter in layer.experts.named_parameters()}


def written_out(layer: MoELayer, x: torch.Tensor, weights_TE: torch.Tensor, plain_expert: Any, plain_shared: Any) -> torch.Tensor:
    """The block's output from single experts, those of ``IDLE`` cut off from the graph."""
    outputs = [plain_expert(layer.block, e, x) for e in range(4)]
    parts = [weights_TE[:, e : e + 1] * (o if e in ACTIVE else o.detach()) for e, o in enumerate(outputs)]
    total: torch.Tensor = sum(parts) + plain_shared(layer.block, x)
    return total


@pytest.mark.parametrize("mode", ["detach", "drop"])
def test_outputs_and_gradients_are_those_of_the_block_written_out(
    family: str, mode: Any, tiny_model: Models, run_block: Any, plain_expert: Any, plain_shared: Any
) -> None:
    model = tiny_model(family)
    layer = moe_layers(model)[0]
    inputs = {"x": tokens()} | trainable(layer)
    for value in inputs.values():
        value.requires_grad_(True)
    x = inputs["x"]
    with ActiveExperts(model, choose_fixed, mode=mode):
        output = run_block(layer.block, x)
    found = gradients(output, inputs)
    weights_TE, is_chosen_TE = routed(layer, x)
    if mode == "drop":
        kept_TE = weights_TE * torch.tensor([1.0 if e in ACTIVE else 0.0 for e in range(4)])
        mass = kept_TE.sum(dim=1, keepdim=True)
        weights_TE = torch.where(mass > 0, kept_TE / torch.where(mass > 0, mass, 1) * weights_TE.sum(1, keepdim=True), 0)
        has_none = ~is_chosen_TE[:, list(ACTIVE)].any(dim=1)
        assert 0 < int(has_none.sum()) < len(x)  # both kinds of tokens are here
        assert torch.equal(weights_TE[has_none], torch.zeros(int(has_none.sum()), 4))
    wanted_output = written_out(layer, x, weights_TE, plain_expert, plain_shared)
    torch.testing.assert_close(output, wanted_output, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients(wanted_output, inputs).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=5e-5, msg=name)
    for name, gradient in found.items():
        if name.startswith("experts."):
            assert not gradient[list(IDLE)].any()
            assert all(gradient[e].any() for e in ACTIVE)
    assert found["router.weight"].any()
    if mode == "detach":
        torch.testing.assert_close(output, run_block(layer.block, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["detach", "drop"])
def test_adapters_over_experts_and_router_are_held_to_the_same(
    family: str, mode: Any, tiny_model: Models, run_block: Any
) -> None:
    model = tiny_model(family)
    spec = AdapterSpec(name="shared", rank=2, alpha=4.0, targets=("attention", "router", "experts"))
    refs = add_slots(model, Slots(adapters=(spec,)))
    generator = torch.Generator().manual_seed(2)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    layer = moe_layers(model)[0]
    parameters = dict(model.named_parameters())
    mine = [ref for ref in refs if ref.layer == layer.index and ref.part in ("experts", "router")]
    inputs = {"x": tokens().requires_grad_(True)} | {ref.name: parameters[ref.name] for ref in mine}
    x = inputs["x"]
    with ActiveExperts(model, choose_fixed, mode=mode):
        output = run_block(layer.block, x)
    found = gradients(output, inputs)

    # The same by other means: weights of 0 in one call for all active pairs, single slots without graph for the others.
    experts = layer.block.get_submodule(layer.family.experts)
    _, weights, chosen = layer.router(x)
    is_active = choose_fixed(0, weights, weights)[chosen]
    kept = torch.where(is_active, weights, torch.zeros_like(weights))
    if mode == "drop":
        mass = kept.sum(dim=1, keepdim=True)
        wanted_output = experts(x, chosen, kept / mass.clamp_min(1e-30) * weights.sum(dim=1, keepdim=True))
    else:
        wanted_output = experts(x, chosen, kept)
        for k in range(chosen.shape[1]):
            lent = experts(x.detach(), chosen[:, k : k + 1], torch.ones_like(weights[:, :1])).detach()
            wanted_output = wanted_output + lent * (weights * ~is_active)[:, k : k + 1]
    shared = layer.shared_output(x)
    wanted_output = wanted_output if shared is None else wanted_output + shared
    torch.testing.assert_close(output, wanted_output, rtol=1e-4, atol=1e-4)
    wanted = gradients(wanted_output, inputs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
    for ref in mine:
        gradient = ref.view(found[ref.name])
        assert bool(gradient.any()) == (ref.expert not in IDLE), ref.key


def loss_gradients(model: Any, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    output.loss.backward()
    return output.loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("has_adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_pass_whose_experts_are_all_active_keeps_its_bits(
    family: str, has_adapters: bool, tiny_model: Models, random_batch: Callable[..., Batch]
) -> None:
    model = tiny_model(family)
    targets = ("attention", "router", "experts")
    if has_adapters:
        add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=4.0, targets=targets),)))
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.data.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.01)
    else:
        add_slots(model, Slots(full=targets))
    batch = random_batch((3, 1), seed=1)
    sent: dict[int, torch.Tensor] = {}
    layers = moe_layers(model)
    watching = [layer.watch_routing(lambda chosen, _, i=layer.index: sent.update({i: chosen})) for layer in layers]  # type: ignore[misc]
    loss, wanted = loss_gradients(model, batch)
    for handle in watching:
        handle.remove()
    is_token = batch.attention_mask.reshape(-1).bool()
    unions = {index: set(chosen[is_token].reshape(-1).tolist()) for index, chosen in sent.items()}
    assert any(len(union) < 4 for union in unions.values())
    if family == "gpt_oss" and not has_adapters:  # there padding is sent to experts that no token is sent to
        assert any(set(chosen[~is_token].reshape(-1).tolist()) - unions[index] for index, chosen in sent.items())

    def choose_union(index: int, gate_TE: torch.Tensor, union_E: torch.Tensor) -> torch.Tensor:
        assert set(union_E.nonzero().squeeze(1).tolist()) == unions[index]
        return union_E

    with ActiveExperts(model, choose_union):
        same_loss, found = loss_gradients(model, batch)
    assert torch.equal(loss, same_loss)
    assert sorted(found) == sorted(wanted)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with ActiveExperts(model, choose_fixed):
        assert not all(torch.equal(value, wanted[name]) for name, value in loss_gradients(model, batch)[1].items())
    _, after = loss_gradients(model, batch)
    assert all(torch.equal(after[name], wanted[name]) for name in wanted)


def test_padding_neither_counts_nor_brings_a_gradient(tiny_model: Models, random_batch: Callable[..., Batch]) -> None:
    model = tiny_model("qwen2_moe")
    add_slots(model, Slots(full=("experts",)))
    batch = random_batch((7, 3))
    seen: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def choose(index: int, gate_TE: torch.Tensor, union_E: torch.Tensor) -> torch.Tensor:
        seen.append((index, gate_TE, union_E))
        return choose_fixed(index, gate_TE, union_E)

    other = Batch(
        input_ids=torch.where(batch.attention_mask.bool(), batch.input_ids, 200),
        attention_mask=batch.attention_mask,
        labels=batch.labels,
    )
    with ActiveExperts(model, choose):
        _, found = loss_gradients(model, batch)
        _, with_other_padding = loss_gradients(model, other)
    assert [index for index, _, _ in seen] == [0, 1, 0, 1]
    for _, gate_TE, union_E in seen:
        assert gate_TE.shape == (10, 4)
        assert not gate_TE.requires_grad
        torch.testing.assert_close(gate_TE.sum(dim=1), torch.ones(10))
        assert union_E.dtype == torch.bool
    for (_, gate_TE, union_E), (_, others_TE, others_E) in zip(seen[:2], seen[2:], strict=True):
        assert torch.equal(gate_TE, others_TE)
        assert torch.equal(union_E, others_E)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, with_other_padding[name], rtol=1e-5, atol=1e-7)
        assert not gradient[list(IDLE)].any()


@pytest.mark.parametrize("mode", ["detach", "drop"])
def test_a_layer_without_active_experts_has_gradients_of_zero(
    mode: Any, tiny_model: Models, run_block: Any, plain_shared: Any
) -> None:
    model = tiny_model("qwen2_moe")
    layer = moe_layers(model)[0]
    inputs = trainable(layer)
    for value in inputs.values():
        value.requires_grad_(True)
    x = tokens()
    with ActiveExperts(model, lambda index, gate_TE, union_E: torch.zeros_like(union_E), mode=mode):
        output = run_block(layer.block, x)
        direction = torch.ones_like(output)
        found = torch.autograd.grad((output * direction).sum(), list(inputs.values()), allow_unused=mode == "drop")
    named = dict(zip(inputs, found, strict=True))
    for name, gradient in named.items():
        if name.startswith("experts."):
            assert gradient is not None
            assert not gradient.any()
    if mode == "detach":
        assert named["router.weight"].any()
        torch.testing.assert_close(output, run_block(layer.block, x), rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(output, plain_shared(layer.block, x), rtol=1e-5, atol=1e-6)


def test_a_pass_without_graph_is_left_alone(tiny_model: Models, random_batch: Callable[..., Batch]) -> None:
    model = tiny_model("mixtral")
    batch = random_batch()
    with torch.no_grad():
        wanted = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        with ActiveExperts(model, choose_fixed, mode="drop"):
            found = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    assert torch.equal(found, wanted)


def test_renormalised_weights_sum_to_what_they_summed_to() -> None:
    weights = torch.tensor([[0.5, 0.25], [0.75, 0.25], [0.5, 0.5]], dtype=torch.float64)
    is_active = torch.tensor([[True, True], [False, True], [False, False]])
    expected = torch.tensor([[0.5, 0.25], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(renormalised(weights, is_active), expected)
