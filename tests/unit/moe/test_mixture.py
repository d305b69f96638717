"""Mixtures of LoRA experts against their formula, written out slot by slot, and against PEFT's LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from fedgraft.aggregation.fedavg import FedAvg, FedAvgConfig
from fedgraft.errors import ModelError
from fedgraft.moe.families import model_facts
from fedgraft.moe.mixture import (
    Mixture,
    MixtureWatch,
    active_slots,
    attach_mixtures,
    example_weights,
    linear_of,
    mean_inputs,
    mixtures_of,
    set_example_weights,
    token_weights,
    without_mixtures,
)
from fedgraft.moe.slots import add_slots, count_slot_elements, initial_params
from fedgraft.training.decode import decode_greedy
from fedgraft.types import SHARED, AdapterSpec, Batch, MixtureSpec, ModelFacts, Projection, Slots, assigned

Maker = Callable[..., PreTrainedModel]
TARGETS = {"deepseek_v2": ("q_proj", "kv_b_proj"), "deepseek_v3": ("q_b_proj", "kv_b_proj")}


def spec(family: str = "qwen2_moe", **fields: Any) -> MixtureSpec:
    known: dict[str, Any] = {
        "num_slots": 3,
        "rank": 2,
        "alpha": 6.0,
        "targets": TARGETS.get(family, ("q_proj", "v_proj")),
        "top_k": 2,
    }
    return MixtureSpec(**(known | fields))


def fill(model: Any, seed: int = 1) -> dict[str, Mixture]:
    generator = torch.Generator().manual_seed(seed)
    mixtures = mixtures_of(model)
    with torch.no_grad():
        for mixture in mixtures.values():
            for parameter in mixture.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return mixtures


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


@torch.no_grad()
def plain_mixture(mixture: Mixture, x: torch.Tensor, num_active: int, top_k: int) -> torch.Tensor:
    """The formula, token by token and slot by slot."""
    scale = mixture.spec.alpha / mixture.spec.rank
    found = []
    for token in x.double():
        total = torch.zeros(mixture.out_features, dtype=torch.float64)
        if mixture.spec.has_shared:
            total += scale * mixture.shared_B.double() @ (mixture.shared_A.double() @ token)
        psi = mixture.token_projection.double() @ token
        scores = [float((mixture.lora_A[j].double() @ token) @ psi) / math.sqrt(len(psi)) for j in range(num_active)]
        shares = [math.exp(score) for score in scores]
        best = sorted(range(num_active), key=lambda j: -shares[j])[:top_k]
        for j in best:
            weight = shares[j] / sum(shares[i] for i in best)
            total += weight * scale * mixture.lora_B[j].double() @ (mixture.lora_A[j].double() @ token)
        found.append(total)
    return torch.stack(found).float()


@pytest.mark.parametrize(("num_active", "top_k", "has_shared"), [(3, 2, True), (3, 3, False), (2, 5, True), (1, 2, False)])
def test_a_token_gate_against_the_formula(num_active: int, top_k: int, has_shared: bool, tiny_model: Maker) -> None:
    model: Any = tiny_model("qwen2_moe")
    linear = model.model.layers[1].self_attn.v_proj
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(2))
    plain = linear(x)
    attach_mixtures(model, spec(top_k=top_k, has_shared=has_shared))
    mixture = fill(model)["model.layers.1.self_attn.v_proj"]
    with active_slots(model, num_active):
        found = linear(x)
    torch.testing.assert_close(found, plain + plain_mixture(mixture, x, num_active, top_k), atol=2e-5, rtol=2e-5)
    assert mixture.num_active == 3


def test_a_fresh_mixture_is_the_base_and_no_name_changes(
    family: str, tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    batch, model = random_batch(), tiny_model(family)
    before, names = logits_of(model, batch), [name for name, _ in model.named_parameters()]
    refs = add_slots(model, Slots(mixture=spec(family, has_shared=True)))
    parameters = dict(model.named_parameters())
    start = initial_params(model, refs, 7)
    for ref in refs:
        with torch.no_grad():
            ref.view(parameters[ref.name]).copy_(start[ref.key])
    assert torch.equal(logits_of(model, batch), before)
    assert [name for name in parameters if ".mixture." not in name] == names
    fill(model)
    assert not torch.allclose(logits_of(model, batch), before, atol=1e-3)
    with without_mixtures(model):
        assert torch.equal(logits_of(model, batch), before)


def test_slots_have_keys_and_starts_of_their_own(tiny_model: Maker) -> None:
    model = tiny_model("qwen2_moe")
    refs = {ref.key: ref for ref in add_slots(model, Slots(mixture=spec(has_shared=True)))}
    path = "model.layers.1.self_attn.q_proj.mixture"
    slots = [refs[f"{path}.lora_A[{j}]"] for j in range(3)]
    assert [(ref.part, ref.layer, ref.expert, ref.shape) for ref in slots] == [("mixture", 1, j, (1, 2, 32)) for j in range(3)]
    assert (refs[f"{path}.shared_B"].part, refs[f"{path}.shared_B"].expert) == ("mixture", None)
    assert refs[f"{path}.token_projection"].part == "mixture_gate"
    assert linear_of(slots[0].key) == "model.layers.1.self_attn.q_proj"
    marked = mixtures_of(model)["model.layers.1.self_attn.q_proj"].lora_A
    for j, ref in enumerate(slots):
        ref.view(marked.data).fill_(j + 1)
    assert marked[:, 0, 0].tolist() == [1, 2, 3]
    start = initial_params(model, tuple(refs.values()), 7)
    drawn = [start[ref.key] for ref in slots] + [start[f"{path}.shared_A"][None], start[f"{path}.token_projection"][None]]
    bound = 1 / math.sqrt(32)
    for number, value in enumerate(drawn):
        assert value.abs().max() <= bound
        assert value.std() > 0.4 * bound
        assert not any(torch.equal(value, other) for other in drawn[:number])
    assert not any(bool(start[f"{path}.lora_B[{j}]"].any()) for j in range(3))
    assert not start[f"{path}.shared_B"].any()
    assert FedAvg(FedAvgConfig()).group(slots[2]) == assigned(1, 2)
    assert FedAvg(FedAvgConfig()).group(refs[f"{path}.shared_A"]) == SHARED


def test_sizes_are_known_before_a_model_is_loaded(family: str, tiny_model: Maker) -> None:
    facts = model_facts(tiny_model(family).config)
    variants: tuple[dict[str, Any], ...] = ({"has_shared": True}, {"gate": "example"}, {"num_slots": 0, "has_shared": True})
    for fields in variants:
        slots = Slots(mixture=spec(family, **fields))
        counted = {"mixture": 0, "mixture_gate": 0}
        for ref in add_slots(tiny_model(family), slots):
            counted[ref.part] += math.prod(ref.shape)
        found = count_slot_elements(facts, slots)
        assert {part: found[part] for part in counted} == counted
        assert sum(found.values()) == sum(counted.values())


def test_the_bytes_of_the_papers_own_setting() -> None:
    """Llama-3.2-1B, rank 8, six domain experts and a shared one at q and v: 25.95 MB a client and direction."""
    facts = ModelFacts(
        family="llama",
        layers=(),
        num_experts=0,
        top_k=0,
        hidden_size=2048,
        expert_size=0,
        norm_topk_prob=False,
        attention=(
            Projection(name="self_attn.q_proj", in_features=2048, out_features=2048),
            Projection(name="self_attn.k_proj", in_features=2048, out_features=512),
            Projection(name="self_attn.v_proj", in_features=2048, out_features=512),
            Projection(name="self_attn.o_proj", in_features=2048, out_features=2048),
        ),
        num_layers=16,
    )
    found = count_slot_elements(facts, Slots(mixture=spec(num_slots=6, rank=8, has_shared=True)))
    assert round(found["mixture"] / 1e6, 2) == 5.96
    assert round(found["mixture_gate"] / 1e6, 2) == 0.52
    assert round(4 * sum(found.values()) / 1e6, 2) == 25.95


def test_the_order_of_slots_does_not_matter(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    attach_mixtures(model, spec(num_slots=4, has_shared=True))
    mixtures = fill(model)
    before = logits_of(model, batch)
    with torch.no_grad():
        for mixture in mixtures.values():
            for parameter in (mixture.lora_A, mixture.lora_B):
                parameter.copy_(parameter[[2, 0, 3, 1]].clone())
    torch.testing.assert_close(logits_of(model, batch), before, atol=2e-5, rtol=2e-5)
    with torch.no_grad():
        for mixture in mixtures.values():
            mixture.lora_A.copy_(mixture.lora_A[[2, 0, 3, 1]].clone())
    assert not torch.allclose(logits_of(model, batch), before, atol=1e-3)


def test_without_slots_it_is_pefts_lora_to_the_bit(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    batch = random_batch()
    found = []
    for slots in (
        Slots(mixture=spec(num_slots=0, has_shared=True, targets=("q_proj", "k_proj", "v_proj", "o_proj"), dropout=0.3)),
        Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=6.0, dropout=0.3),)),
    ):
        model = tiny_model("qwen2_moe").train()
        refs = add_slots(model, slots)
        parameters = dict(model.named_parameters())
        generator = torch.Generator().manual_seed(3)
        for ref in refs:
            parameters[ref.name].data.copy_(torch.randn(ref.shape, generator=generator) * 0.3)
        torch.manual_seed(5)
        logits = logits_of(model, batch)
        logits.square().mean().backward()  # type: ignore[no-untyped-call]
        gradients = [parameters[ref.name].grad for ref in refs]
        found.append((logits.detach(), gradients))
    assert torch.equal(found[0][0], found[1][0])
    assert len(found[0][1]) == len(found[1][1]) == 16
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*(gradients for _, gradients in found), strict=True))


def test_it_lies_below_the_wrappers_of_an_adapter(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    slots = Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=6.0),), mixture=spec(gate="example"))
    refs = add_slots(model, slots)
    assert {ref.part for ref in refs} == {"attention", "mixture"}
    assert set(mixtures_of(model)) == {f"model.layers.{i}.self_attn.{m}" for i in range(2) for m in ("q_proj", "v_proj")}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name and ".mixture." not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.3)
    adapted = logits_of(model, batch)
    fill(model)
    assert torch.equal(logits_of(model, batch), adapted)  # nobody gave weights
    with example_weights(model, torch.ones(3, 3)):
        assert not torch.allclose(logits_of(model, batch), adapted, atol=1e-3)


def test_it_finds_linear_maps_below_wrappers_that_are_there_already(
    tiny_model: Maker, random_batch: Callable[..., Batch]
) -> None:
    model = tiny_model("qwen2_moe")
    add_slots(model, Slots(adapters=(AdapterSpec(name="shared", rank=2, alpha=6.0),)))
    attach_mixtures(model, spec())
    names = [name for name, _ in model.named_parameters() if ".mixture." in name]
    assert len(names) == 12
    assert all(".base_layer.mixture." in name for name in names)
    assert set(mean_inputs(model, [random_batch()])) == set(mixtures_of(model))


def test_example_weights_act_row_by_row_and_carry_gradients(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    base = logits_of(model, batch)
    attach_mixtures(model, spec(gate="example"))
    mixtures = fill(model)
    one_hot = torch.eye(3)
    rows = []
    for slot in range(3):
        with example_weights(model, one_hot[[slot] * 3]):
            rows.append(logits_of(model, batch)[slot])
    with example_weights(model, one_hot):
        mixed = logits_of(model, batch)
        with example_weights(model, torch.zeros(3, 3)):
            torch.testing.assert_close(logits_of(model, batch), base)
        with active_slots(model, 2):
            two = logits_of(model, batch)
    torch.testing.assert_close(mixed, torch.stack(rows), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(two[2], base[2])  # row 2 had all of its weight on the slot that is not in use
    assert torch.equal(logits_of(model, batch), base)
    # A single linear map is a linear function of the weights, so the gradient has a closed form.
    linear: Any = model.get_submodule("model.layers.0.self_attn.q_proj")
    mixture = mixtures["model.layers.0.self_attn.q_proj"]
    x = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(8))
    weights = torch.full((2, 3), 0.5, requires_grad=True)
    with example_weights(model, weights):
        linear(x).sum().backward()
    expected = torch.stack([3.0 * (x @ mixture.lora_A[j].T @ mixture.lora_B[j].T).sum(dim=(1, 2)) for j in range(3)], dim=1)
    torch.testing.assert_close(weights.grad, expected, atol=1e-4, rtol=1e-4)
    with example_weights(model, torch.ones(3, 3)), pytest.raises(ModelError, match=r"weights \(3, 3\) for an input \(2, 4, 32\)"):
        linear(x)


def test_decoding_with_a_cache_keeps_each_rows_weights(tiny_model: Maker) -> None:
    model: Any = tiny_model("qwen2_moe")
    attach_mixtures(model, spec(gate="example"))
    fill(model)
    prompts, slots = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14]], [2, 0]

    def decode(asked: list[list[int]], weights: torch.Tensor) -> list[list[int]]:
        set_example_weights(model, weights)
        return decode_greedy(model, asked, max_new_tokens=6, eos_token_id=1, pad_token_id=0, batch_size=4)

    together = decode(prompts, torch.eye(3)[slots])
    assert together == [decode([prompt], torch.eye(3)[[slot]])[0] for prompt, slot in zip(prompts, slots, strict=True)]
    assert together != decode(prompts, torch.eye(3)[slots[::-1]])
    for prompt, answer, slot in zip(prompts, together, slots, strict=True):
        set_example_weights(model, torch.eye(3)[[slot]])
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]  # the whole text in one pass
        assert logits[len(prompt) - 1 : -1].argmax(dim=-1).tolist() == answer


def test_the_gate_reads_no_dropout_and_the_watch_sees_it(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    attach_mixtures(model, spec(dropout=0.9))
    fill(model)
    path = "model.layers.0.self_attn.q_proj"
    seen = []
    for is_training in (False, True):
        model.train(is_training)
        with MixtureWatch(model) as watch, active_slots(model, {path: 2, "model.layers.1.self_attn.v_proj": 0}):
            logits = logits_of(model, batch)
            assert "model.layers.1.self_attn.v_proj" not in watch.probabilities
            assert watch.probabilities["model.layers.1.self_attn.q_proj"].shape == (27, 3)
            assert watch.chosen[path].shape == (27, 2)
            seen.append((watch.probabilities[path].detach(), logits.detach()))
        assert not watch.probabilities
    # Nothing is dropped before the first map, so only the gate's own reading could differ there.
    torch.testing.assert_close(seen[0][0], seen[1][0])
    assert not torch.allclose(seen[0][1], seen[1][1], atol=1e-2)
    torch.testing.assert_close(seen[0][0].sum(dim=1), torch.ones(27))


def test_slots_out_of_use_get_no_gradient(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model, batch = tiny_model("qwen2_moe"), random_batch()
    attach_mixtures(model, spec(has_shared=True))
    mixtures = fill(model)
    with active_slots(model, 2):
        logits_of(model, batch).square().mean().backward()  # type: ignore[no-untyped-call]
    for mixture in mixtures.values():
        assert mixture.lora_A.grad is not None
        assert mixture.lora_B.grad is not None
        assert not mixture.lora_A.grad[2].any()
        assert not mixture.lora_B.grad[2].any()
        assert mixture.lora_A.grad[:2].any()
        assert mixture.token_projection.grad is not None


def test_the_weights_of_tokens() -> None:
    embedding = torch.tensor([[[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]]])
    probs, chosen, weights = token_weights(embedding, torch.tensor([[math.sqrt(2) * math.log(2), 0.0]]), 2)
    torch.testing.assert_close(probs, torch.tensor([[4.0, 1.0, 2.0]]) / 7)  # logits 2 log 2, 0, log 2
    assert chosen.tolist() == [[0, 2]]
    torch.testing.assert_close(weights, torch.tensor([[2 / 3, 0.0, 1 / 3]]))


def test_mean_inputs_leave_padding_out(tiny_model: Maker, random_batch: Callable[..., Batch]) -> None:
    model = tiny_model("qwen2_moe")
    attach_mixtures(model, spec())
    fill(model)
    batch = random_batch(lengths=(9, 4))
    found = mean_inputs(model, [batch])
    seen: list[torch.Tensor] = []
    linear: Any = model.get_submodule("model.layers.1.self_attn.v_proj")
    handle = linear.register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    for row, length in ((0, 9), (1, 4)):
        model(input_ids=batch.input_ids[row : row + 1, :length])
    handle.remove()
    torch.testing.assert_close(
        found["model.layers.1.self_attn.v_proj"].float(), torch.cat(seen).mean(dim=0), atol=1e-5, rtol=1e-5
    )
    assert len(found) == 4
    assert mean_inputs(model, []) == {}


def test_what_cannot_be_is_refused(tiny_model: Maker) -> None:
    model = tiny_model("qwen2_moe")
    with pytest.raises(ModelError, match="w_proj") as caught:
        attach_mixtures(model, spec(targets=("w_proj", "q_proj")))
    assert "k_proj, o_proj, q_proj, v_proj" in caught.value.hint
    nothing: tuple[dict[str, Any], ...] = ({"num_slots": 0}, {"top_k": 0})
    for fields in nothing:
        with pytest.raises(ModelError, match="does nothing"):
            attach_mixtures(model, spec(**fields))
    assert not mixtures_of(model)
    attach_mixtures(model, spec())
    with pytest.raises(ModelError, match="3 slots, 4 were asked"), active_slots(model, 4):
        pass
    with pytest.raises(ModelError, match="k_proj has no mixture"), active_slots(model, {"model.layers.0.self_attn.k_proj": 1}):
        pass
