"""Criteria for experts against plain computations on tiny models of every family, and sums over clients against pooled data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.criteria import (
    CRITERIA_BY_NAME,
    Importance,
    ablation_changes,
    importance,
    random_importance,
    similarity,
    wanda_scores,
)
from fedgraft.moe.expert_statistics import LayerStatistics, add_statistics, observe_statistics
from fedgraft.moe.families import moe_layers
from fedgraft.moe.scoring import CRITERIA, observe_experts
from fedgraft.training.evaluate import score_batches
from fedgraft.types import Batch

Model = Callable[..., PreTrainedModel]
Rows = Callable[..., Batch]
Plain = Callable[..., torch.Tensor]


class Tokens:
    """What happens in one layer, token by token, seen with hooks of the test's own and HF's own choice of experts."""

    def __init__(self, model: Any, index: int, batches: list[Batch], plain: dict[str, Plain]) -> None:
        self.block = model.model.layers[index].mlp
        router = self.block.router if hasattr(self.block, "router") else self.block.gate
        kept: dict[str, list[torch.Tensor]] = {"x": [], "z": [], "h": [], "chosen": [], "weights": []}

        def take(name: str, value: torch.Tensor) -> None:
            kept[name].append(value.reshape(-1, value.shape[-1])[mask])

        def see_block(block: Any, args: Any, out: Any) -> None:
            take("x", args[0])
            take("z", out[0] if isinstance(out, tuple) else out)

        def see_router(gate: Any, args: Any, out: Any) -> None:
            take("weights", out[-2])
            take("chosen", out[-1])

        norm = model.model.layers[index].post_attention_layernorm
        handles = [
            self.block.register_forward_hook(see_block),
            norm.register_forward_hook(lambda module, args, out: take("h", args[0])),
            router.register_forward_hook(see_router),
        ]
        for batch in batches:
            mask = batch.attention_mask.reshape(-1).bool()
            with torch.no_grad():
                model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        for handle in handles:
            handle.remove()
        self.x, self.z, self.h, self.weights = (torch.cat(kept[name]).double() for name in ("x", "z", "h", "weights"))
        self.chosen = torch.cat(kept["chosen"])
        self.scale = float(getattr(router, "routed_scaling_factor", 1.0))
        self.outputs = [self.scale * plain["expert"](self.block, e, self.x.float()).double() for e in range(4)]
        self.hidden = [plain["hidden"](self.block, e, self.x.float()).double() for e in range(4)]
        self.logits = plain["logits"](self.block, self.x.float()).double()

    def sent(self, expert: int) -> list[tuple[int, float]]:
        """Tokens that were sent to an expert, with their weights."""
        return [
            (token, float(self.weights[token, place]) / self.scale)
            for token in range(len(self.x))
            for place in range(2)
            if int(self.chosen[token, place]) == expert
        ]


@pytest.fixture
def plain(plain_expert: Plain, plain_hidden: Plain, plain_logits: Plain) -> dict[str, Plain]:
    return {"expert": plain_expert, "hidden": plain_hidden, "logits": plain_logits}


def test_every_importance_equals_its_formula_token_by_token(
    family: str, tiny_model: Model, random_batch: Rows, plain: dict[str, Plain]
) -> None:
    model: Any = tiny_model(family, seed=2)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    found = observe_statistics(model, batches)
    for layer in moe_layers(model):
        seen, tokens = found[layer.index], Tokens(model, layer.index, batches, plain)
        change = [1 - float(F.cosine_similarity(h, h + z, dim=0)) for h, z in zip(tokens.h, tokens.z, strict=True)]
        expected: dict[str, list[float]] = {name: [] for name in get_args(Importance)}
        for e in range(4):
            sent = tokens.sent(e)
            size = [float(f.norm()) for f in tokens.outputs[e]]
            expected["frequency"].append(len(sent) / (2 * 21))
            expected["gate"].append(math.fsum(g for _, g in sent))
            expected["ean"].append(math.fsum(size[t] for t, _ in sent))
            expected["reap"].append(math.fsum(g * size[t] for t, g in sent) / max(len(sent), 1))
            expected["easy_ep"].append(math.fsum(g * size[t] * change[t] for t, g in sent))
            expected["max_activation"].append(max((float(tokens.outputs[e][t].abs().max()) for t, _ in sent), default=0.0))
            expected["wanda"].append(weight_sum(tokens, e, sent))
        assert sum(expected["frequency"]) == pytest.approx(1)
        for name, values in expected.items():
            assert importance(name, seen, layer).tolist() == pytest.approx(values, rel=1e-4, abs=1e-7), name  # type: ignore[arg-type]


def weight_sum(tokens: Tokens, e: int, sent: list[tuple[int, float]]) -> float:
    """sum_ij |W_ij| ||g x_j|| with norms over the tokens sent to e, from the block's own tensors."""
    gates = torch.tensor([g for _, g in sent], dtype=torch.float64)[:, None]
    rows = [t for t, _ in sent]
    inner, outer = (gates * tokens.x[rows]).norm(dim=0), (gates * tokens.hidden[e][rows]).norm(dim=0)
    up, down = (weight[e].double().abs() for weight in (tokens.block.experts.gate_up_proj, tokens.block.experts.down_proj))
    if hasattr(tokens.block, "router"):
        up, down = up.T, down.T  # GPT-OSS keeps them transposed
    return float((up * inner).sum() + (down * outer).sum())


def test_the_routed_part_is_the_gated_sum_of_outputs(family: str, tiny_model: Model, random_batch: Rows) -> None:
    # An identity that ties g, f and F together: with one token, sum_e g_e f_e = F, so ||F||^2 follows from g and f.
    model: Any = tiny_model(family, seed=3)
    ids = random_batch((1,)).input_ids
    one = Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
    for seen in observe_statistics(model, [one]).values():
        total = (seen.gate[:, None] * seen.output).sum(dim=0)
        assert float(total.square().sum()) == pytest.approx(seen.scores.square_routed, rel=1e-4)


def test_similarities_equal_their_formulas(family: str, tiny_model: Model, random_batch: Rows, plain: dict[str, Plain]) -> None:
    model: Any = tiny_model(family, seed=2)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    for index, seen in observe_statistics(model, batches).items():
        tokens = Tokens(model, index, batches, plain)
        mean = torch.stack([output.mean(dim=0) for output in tokens.outputs])
        torch.testing.assert_close(similarity("hc", seen), -torch.cdist(mean, mean), rtol=1e-4, atol=1e-5)
        cosine = torch.nn.functional.normalize(tokens.logits, dim=0)
        torch.testing.assert_close(similarity("router_logit", seen), cosine.T @ cosine, rtol=1e-4, atol=1e-5)


def test_losses_are_those_that_flex_uses_and_their_importance_is_the_reverse(tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model("qwen2_moe")
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]
    plain_scores = observe_experts(model, batches)
    for index, seen in observe_statistics(model, batches).items():
        for each in fields(seen.scores):
            found, expected = getattr(seen.scores, each.name), getattr(plain_scores.layers[index], each.name)
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected)), each.name
        for name in CRITERIA:
            assert torch.equal(importance(name, seen), -plain_scores.layers[index].criterion(name))


def test_sums_over_clients_are_the_statistics_of_pooled_data(family: str, tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model(family)
    clients = [[random_batch((9, 5), seed=seed), random_batch((4,), seed=seed + 10)] for seed in range(3)]
    alone = [observe_statistics(model, batches) for batches in clients]
    pooled = observe_statistics(model, [batch for batches in clients for batch in batches])
    for index, expected in pooled.items():
        layer = next(layer for layer in moe_layers(model) if layer.index == index)
        found = add_statistics(add_statistics(alone[0][index], alone[1][index]), alone[2][index])
        assert found.num_tokens == expected.num_tokens == 3 * 18
        for each in fields(LayerStatistics):
            if each.name not in ("scores", "top_k"):
                torch.testing.assert_close(getattr(found, each.name), getattr(expected, each.name), rtol=1e-12, atol=1e-12)
        for each in fields(expected.scores):
            value = torch.as_tensor(getattr(expected.scores, each.name))
            torch.testing.assert_close(torch.as_tensor(getattr(found.scores, each.name)), value, rtol=1e-12, atol=1e-12)
        for criterion in CRITERIA_BY_NAME.values():
            if criterion.kind == "importance":
                values = [importance(criterion.name, each, layer) for each in (found, expected)]  # type: ignore[arg-type]
                torch.testing.assert_close(values[0], values[1], rtol=1e-10, atol=1e-12)
            if criterion.kind == "importance" and criterion.is_additive is False:
                largest = torch.stack([importance(criterion.name, each[index]) for each in alone]).amax(dim=0)  # type: ignore[arg-type]
                assert torch.equal(values[0], largest)


def test_padding_does_not_count(tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model("qwen2_moe")
    batch = random_batch((9, 4, 6))
    wide = Batch(
        input_ids=F.pad(batch.input_ids, (0, 5), value=77),
        attention_mask=F.pad(batch.attention_mask, (0, 5)),
        labels=F.pad(batch.labels, (0, 5), value=-100),
    )
    first, second = observe_statistics(model, [batch]), observe_statistics(model, [wide])
    for index, seen in first.items():
        for each in fields(LayerStatistics):
            if each.name not in ("scores", "top_k"):
                torch.testing.assert_close(getattr(second[index], each.name), getattr(seen, each.name), rtol=1e-4, atol=1e-5)


def test_an_expert_without_tokens_is_least_and_finite() -> None:
    seen = LayerStatistics.empty(3, 4, 5, 1)
    for criterion in CRITERIA_BY_NAME.values():
        if criterion.kind == "importance" and criterion.name != "wanda":
            assert torch.isfinite(importance(criterion.name, seen)).all(), criterion.name  # type: ignore[arg-type]
    assert torch.isfinite(similarity("hc", seen)).all()
    assert torch.isfinite(similarity("router_logit", seen)).all()
    seen.gated_norm += torch.tensor([0.0, 3.0, 8.0])
    seen.scores.tokens += torch.tensor([0.0, 1.0, 4.0])
    assert importance("reap", seen).tolist() == [0.0, 3.0, 2.0]


def test_names_and_needs() -> None:
    importances = {each.name for each in CRITERIA_BY_NAME.values() if each.kind == "importance"}
    assert importances == {*CRITERIA, *get_args(Importance)}
    assert {each.name for each in CRITERIA_BY_NAME.values() if each.kind == "similarity"} == {"hc", "router_logit"}
    assert {each.name for each in CRITERIA_BY_NAME.values() if not each.is_additive} == {"max_activation", "random", "ablation"}
    seen = LayerStatistics.empty(3, 4, 5, 1)
    with pytest.raises(ValueError, match="no importance is called 'hc'; known: recon, "):
        importance("hc", seen)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="give the layer"):
        importance("wanda", seen)
    with pytest.raises(ValueError, match="no similarity is called 'reap'"):
        similarity("reap", seen)  # type: ignore[arg-type]
    first, again, other = (random_importance(500, seed).tolist() for seed in (1, 1, 2))
    assert first == again != other
    assert 0 <= min(first) < 0.05
    assert 0.95 < max(first) < 1


def test_a_weights_score_has_the_shape_of_the_weight(tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model("qwen2_moe")
    layer = moe_layers(model)[0]
    seen = observe_statistics(model, [random_batch()])[layer.index]
    up, down = wanda_scores(layer, 1, seen)
    assert (up.shape, down.shape) == ((48, 32), (32, 24))
    assert float(up.sum() + down.sum()) == pytest.approx(float(importance("wanda", seen, layer)[1]))


# ---- the oracle


def test_ablation_is_the_loss_without_an_expert_and_leaves_the_model_alone(tiny_model: Model, random_batch: Rows) -> None:
    model: Any = tiny_model("mixtral", seed=1)
    batches = [random_batch((9, 5)), random_batch((7,), seed=1)]

    def judge() -> float:
        return score_batches(model, batches)["nll"].mean

    whole = judge()
    found = ablation_changes(model, judge)
    assert judge() == whole
    for index, changes in found.items():
        router = model.model.layers[index].mlp.gate
        for e in range(4):
            row = router.weight.data[e].clone()

            def unreachable(gate: Any, args: Any, out: Any, e: int = e) -> Any:
                # Mixtral's own rule by hand, with the expert's logit so low that it is never among the best two.
                logits = args[0].reshape(-1, 32) @ gate.weight.T
                logits[:, e] = -1e9
                weights, chosen = torch.softmax(logits, dim=1).topk(2, dim=1)
                return logits, weights / weights.sum(dim=1, keepdim=True), chosen

            handle = router.register_forward_hook(unreachable)
            assert float(changes[e]) == pytest.approx(judge() - whole, abs=1e-6)
            handle.remove()
            assert torch.equal(router.weight.data[e], row)
    assert any(float(changes.abs().max()) > 1e-4 for changes in found.values())


def test_an_expert_that_top_k_needs_cannot_be_missed(tiny_model: Model) -> None:
    with pytest.raises(ModelError, match="only 3 of 4 experts are left"):
        ablation_changes(tiny_model("qwen2_moe", num_experts_per_tok=4), lambda: 0.0)
