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

Plain = Callable[..., torch.Tensor]


def test_these_tests_cover_the_whole_table(all_families: tuple[str, ...], tiny_config: Callable[..., Any]) -> None:
    assert set(FAMILIES) == set(all_families)
    for name in all_families:
        assert family_of(tiny_config(name)).model_type == name


def test_the_parts_add_up_to_the_block(
    family: str,
    normalised: tuple[bool, dict[str, bool]],
    tiny_model: Callable[..., PreTrainedModel],
    run_block: Plain,
    plain_shared: Plain,
) -> None:
    wanted, overrides = normalised
    model = tiny_model(family, **overrides)
    facts = model_facts(model.config)
    assert facts.norm_topk_prob is wanted
    x = torch.randn(11, 32, generator=torch.Generator().manual_seed(1))
    layers = moe_layers(model)
    assert layers
    for layer in layers:
        assert layer.normalises is wanted
        with torch.no_grad():
            expected = run_block(layer.block, x)
            weights, chosen = layer.choose(layer.router_logits(x))
            total = torch.zeros_like(x)
            for token in range(len(x)):
                for weight, expert in zip(weights[token], chosen[token], strict=True):
                    total[token] += weight * layer.expert_output(int(expert), x[token : token + 1])[0]
            shared = layer.shared_output(x)
        assert chosen.shape == (11, facts.top_k)
        assert (shared is None) == (facts.num_shared_experts == 0) == (family not in ("qwen2_moe", "deepseek_v2", "deepseek_v3"))
        if shared is not None:
            torch.testing.assert_close(shared, plain_shared(layer.block, x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(total if shared is None else total + shared, expected, atol=1e-5, rtol=1e-5)


def test_an_expert_is_its_gate_up_and_down(
    family: str, tiny_model: Callable[..., PreTrainedModel], plain_expert: Plain, plain_neurons: Plain
) -> None:
    model = tiny_model(family)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2)) * 3  # GPT-OSS's clamps at 7 act on some
    for layer in moe_layers(model):
        for expert in range(4):
            reference = plain_expert(layer.block, expert, x)
            torch.testing.assert_close(layer.expert_output(expert, x), reference, atol=1e-5, rtol=1e-5)
            gate_up, down = layer.expert_weights(expert)
            biases = layer.expert_biases(expert)
            assert (tuple(gate_up.shape), tuple(down.shape)) == ((48, 32), (32, 24))
            assert (biases is None) == (family != "gpt_oss")
            up_bias, down_bias = biases if biases is not None else (torch.zeros(48), torch.zeros(32))
            gate, up = (x @ gate_up.T + up_bias).split(24, dim=1)
            torch.testing.assert_close(plain_neurons(layer.block, gate, up) @ down.T + down_bias, reference, atol=1e-5, rtol=1e-5)
            if family != "gpt_oss":
                assert gate_up.data_ptr() == layer.experts.gate_up_proj[expert].data_ptr()  # a view, not a copy


def test_facts_are_the_shapes_of_the_model(family: str, tiny_model: Callable[..., PreTrainedModel]) -> None:
    model: Any = tiny_model(family)
    facts = model_facts(model.config)
    having = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert (facts.family, facts.layers, facts.num_layers, facts.top_k) == (family, having, len(model.model.layers), 2)
    for layer in moe_layers(model):
        assert (layer.num_experts, layer.top_k) == (facts.num_experts, facts.top_k) == (4, 2)
        assert tuple(layer.router_rows.shape) == (4, facts.hidden_size)
        experts = layer.experts
        entry = (layer.family.is_transposed, layer.family.is_interleaved, layer.family.has_expert_bias)
        assert entry == (experts.is_transposed, not experts.is_concatenated, experts.has_bias)  # what transformers says
        assert sum(p[0].numel() for p in experts.parameters()) == facts.expert_elements
        assert {name for name, _ in experts.named_parameters()} == set(layer.family.expert_tensors)
        state = {name for name, value in unwrap(layer.router).state_dict().items()}
        assert state == set(layer.family.router_tensors)
        assert facts.has_router_bias == ("bias" in state)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("qwen2_moe", {}),
        ("qwen2_moe", {"qkv_bias": False}),
        ("qwen3_moe", {"attention_bias": True}),
        ("olmoe", {}),
        ("mixtral", {}),
        ("deepseek_v2", {}),
        ("deepseek_v2", {"q_lora_rank": 10, "attention_bias": True}),
        ("deepseek_v3", {"attention_bias": True}),
        ("deepseek_v3", {"q_lora_rank": None}),
        ("gpt_oss", {}),
        ("gpt_oss", {"attention_bias": False}),
    ],
)
def test_attention_is_listed_as_it_is_built(
    family: str, overrides: dict[str, Any], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model: Any = tiny_model(family, **overrides)
    listed = {each.name: (each.in_features, each.out_features, each.has_bias) for each in model_facts(model.config).attention}
    for layer in model.model.layers:
        built = {
            f"self_attn.{name}": (module.in_features, module.out_features, module.bias is not None)
            for name, module in layer.self_attn.named_modules()
            if isinstance(module, nn.Linear)
        }
        assert listed == built


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        ("qwen2_moe", {"mlp_only_layers": [0]}, (1, 2, 3)),
        ("qwen2_moe", {"mlp_only_layers": [1, 2]}, (0, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2}, (1, 3)),
        ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (1,)),
        ("deepseek_v2", {"first_k_dense_replace": 0}, (0, 1, 2, 3)),
        ("deepseek_v3", {"first_k_dense_replace": 3}, (3,)),
    ],
)
def test_dense_layers_are_left_out(
    family: str, overrides: dict[str, Any], expected: tuple[int, ...], tiny_model: Callable[..., PreTrainedModel]
) -> None:
    model: Any = tiny_model(family, num_hidden_layers=4, **overrides)
    having = tuple(i for i, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "experts"))
    assert having == expected  # what HF built
    assert model_facts(model.config).layers == expected
    layers = moe_layers(model)
    assert [layer.index for layer in layers] == list(expected)
    assert all(model.get_submodule(layer.block_path) is layer.block for layer in layers)


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"'llama'.*deepseek_v2, deepseek_v3, gpt_oss, mixtral, olmoe, qwen2") as caught:
        family_of(LlamaConfig())
    assert "moe/families.py" in caught.value.hint
    with pytest.raises(ModelError, match="'unknown'"):
        model_facts(SimpleNamespace())


@pytest.mark.parametrize(
    ("family", "overrides", "named"),
    [
        ("qwen2_moe", {"num_experts": 0}, "num_experts is 0"),
        ("qwen2_moe", {"mlp_only_layers": [0, 1]}, r"mlp_only_layers is \[0, 1\]"),
        ("qwen2_moe", {"decoder_sparse_step": 3}, "decoder_sparse_step is 3"),
        ("deepseek_v3", {"first_k_dense_replace": 3}, "first_k_dense_replace is 3"),
        ("deepseek_v2", {"n_routed_experts": 0}, "n_routed_experts is 0"),
        ("gpt_oss", {"num_local_experts": 0}, "num_local_experts is 0"),
    ],
)
def test_a_model_without_experts_is_refused(
    family: str, overrides: dict[str, Any], named: str, tiny_config: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=f"no MoE layer: .*{named}"):
        model_facts(tiny_config(family, **overrides))


@pytest.mark.parametrize("top_k", [0, 5])
def test_top_k_above_the_experts_is_refused(family: str, top_k: int, tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=f"num_experts_per_tok is {top_k}, but this {family} model has 4 experts"):
        model_facts(tiny_config(family, num_experts_per_tok=top_k))
    assert model_facts(tiny_config(family, num_experts_per_tok=4)).top_k == 4


def test_a_missing_top_k_and_a_layer_stride_that_transformers_ignores_are_refused(tiny_config: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match="num_experts_per_tok is None"):
        model_facts(tiny_config("deepseek_v2", num_experts_per_tok=None))
    with pytest.raises(ModelError, match="moe_layer_freq is 2"):
        model_facts(tiny_config("deepseek_v3", moe_layer_freq=2))
    assert model_facts(tiny_config("deepseek_v3", moe_layer_freq=1)).layers == (1, 2)


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
