"""Every family's table entry against the block that Hugging Face itself computes."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.families import FAMILIES, family_of, model_facts, moe_layers, unwrap


def test_these_tests_cover_the_whole_table(tiny_config: Callable[..., Any]) -> None:
    covered = ("qwen2_moe", "qwen3_moe", "olmoe", "mixtral")
    assert set(FAMILIES) == set(covered)
    for name in covered:
        assert family_of(tiny_config(name)).model_type == name


@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_the_parts_add_up_to_the_block(family: str, norm_topk_prob: bool, tiny_model: Callable[..., PreTrainedModel]) -> None:
    if family == "mixtral" and not norm_topk_prob:
        pytest.skip("Mixtral always renormalises")
    model = tiny_model(family, **({} if family == "mixtral" else {"norm_topk_prob": norm_topk_prob}))
    facts = model_facts(model.config)
    assert facts.norm_topk_prob is norm_topk_prob
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    for layer in moe_layers(model):
        with torch.no_grad():
            expected = layer.block(x[None])[0]
            weights, chosen = torch.topk(torch.softmax(layer.router_logits(x), dim=-1), facts.top_k, dim=-1)
            if norm_topk_prob:
                weights = weights / weights.sum(dim=-1, keepdim=True)
            total = torch.zeros_like(x)
            for token in range(len(x)):
                for weight, expert in zip(weights[token], chosen[token], strict=True):
                    total[token] += weight * layer.expert_output(int(expert), x[token : token + 1])[0]
            shared = layer.shared_output(x)
        assert (shared is None) == (family != "qwen2_moe")
        torch.testing.assert_close(total if shared is None else total + shared, expected, atol=1e-5, rtol=1e-5)


def test_an_expert_is_its_gate_up_and_down(
    family: str, tiny_model: Callable[..., PreTrainedModel], plain_expert: Callable[..., torch.Tensor]
) -> None:
    model = tiny_model(family)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for layer in moe_layers(model):
        for expert in range(4):
            torch.testing.assert_close(layer.expert_output(expert, x), plain_expert(layer.block, expert, x), atol=1e-5, rtol=1e-5)
            gate_up, down = layer.expert_weights(expert)
            assert gate_up.data_ptr() == layer.experts.gate_up_proj[expert].data_ptr()  # a view, not a copy
            torch.testing.assert_close(layer.expert_hidden(expert, x) @ down.T, plain_expert(layer.block, expert, x))


def test_facts_are_the_shapes_of_the_model(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model(family)
    facts = model_facts(model.config)
    block, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    assert (facts.family, facts.layers, facts.num_layers, facts.top_k) == (family, (0, 1), 2, 2)
    assert tuple(block.experts.gate_up_proj.shape) == (facts.num_experts, 2 * facts.expert_size, facts.hidden_size)
    assert tuple(block.experts.down_proj.shape) == (facts.num_experts, facts.hidden_size, facts.expert_size)
    assert tuple(attention.q_proj.weight.shape) == (facts.attention_size, facts.hidden_size)
    assert tuple(attention.k_proj.weight.shape) == (facts.num_key_value_features, facts.hidden_size)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"mlp_only_layers": [0]}, (1, 2, 3)),
        ({"mlp_only_layers": [1, 2]}, (0, 3)),
        ({"decoder_sparse_step": 2}, (1, 3)),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
    ],
)
def test_dense_layers_are_left_out(
    overrides: dict[str, Any], expected: tuple[int, ...], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model: Any = tiny_model("qwen2_moe", num_hidden_layers=4, **overrides)
    having = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert having == expected  # what HF built
    assert model_facts(model.config).layers == expected
    layers = moe_layers(model)
    assert [layer.index for layer in layers] == list(expected)
    assert all(model.get_submodule(layer.block_path) is layer.block for layer in layers)


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'llama'.*mixtral, olmoe, qwen2_moe, qwen3_moe") as caught:
        family_of(LlamaConfig())
    assert "moe/families.py" in caught.value.hint
    with pytest.raises(ModelError, match="'unknown'"):
        model_facts(SimpleNamespace())


@pytest.mark.parametrize("overrides", [{"num_experts": 0}, {"mlp_only_layers": [0, 1]}, {"decoder_sparse_step": 3}])
def test_a_model_without_experts_is_refused(overrides: dict[str, Any], tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="no MoE layer"):
        model_facts(tiny_config("qwen2_moe", **overrides))


def test_a_block_that_lacks_its_experts_is_refused(tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model("olmoe")
    del model.model.layers[1].mlp.experts
    with pytest.raises(ModelError, match="layer 1 of this olmoe model has no experts"):
        moe_layers(model)


def test_unwrap_gives_the_module_below_all_wrappers() -> None:
    inner = nn.Linear(2, 2)
    outer, between = nn.Module(), nn.Module()
    between.base_layer, outer.base_layer = inner, between
    assert unwrap(outer) is inner
    assert unwrap(inner) is inner
