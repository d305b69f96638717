"""The cached base against ``from_pretrained``, and what memory mapping promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.base import cache_base, facts_of, fingerprint_folder, num_parameters, open_base
from fedgraft.moe.families import model_facts
from fedgraft.types import Batch

Saver = Callable[[PreTrainedModel, Path], Path]


@pytest.fixture(params=["qwen2_moe", "qwen3_moe", "olmoe", "mixtral", "deepseek_v2", "deepseek_v3", "gpt_oss", "tied"])
def source(request: pytest.FixtureRequest, tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path) -> Path:
    if request.param == "tied":
        return save_model(tiny_model("qwen2_moe", tie_word_embeddings=True), tmp_path / "hf")
    return save_model(tiny_model(request.param), tmp_path / "hf")


@pytest.fixture
def qwen(tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path) -> Path:
    return save_model(tiny_model("qwen2_moe"), tmp_path / "hf")


def logits_of(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    return found


def test_an_opened_base_computes_what_from_pretrained_does(
    source: Path, random_batch: Callable[..., Batch], tmp_path: Path
) -> None:
    opened = open_base(cache_base(str(source), "float32", tmp_path / "cache"))
    expected = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    batch = random_batch()
    # Not the same bits: tensors in a file are aligned to 8 bytes, others to 64, and BLAS sums in another order then.
    torch.testing.assert_close(logits_of(opened, batch), logits_of(expected, batch), atol=1e-5, rtol=1e-5)
    assert not opened.training
    assert not any(parameter.requires_grad for parameter in opened.parameters())
    reference = dict(expected.named_parameters())
    for name, parameter in opened.named_parameters():
        assert torch.equal(parameter, reference.pop(name)), name
    assert not reference
    tables = dict(expected.named_buffers())
    assert tables
    assert all(torch.equal(buffer, tables[name]) for name, buffer in opened.named_buffers())
    assert num_parameters(str(source)) == sum(p.numel() for p in expected.parameters())
    assert facts_of(str(source)) == model_facts(expected.config)


def test_bfloat16_is_the_rounded_checkpoint(qwen: Path, tmp_path: Path) -> None:
    folders = [cache_base(str(qwen), dtype, tmp_path / "cache") for dtype in ("float32", "bfloat16")]
    assert folders[0] != folders[1]
    wide, narrow = (dict(open_base(folder).named_parameters()) for folder in folders)
    for name, parameter in narrow.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wide[name].to(torch.bfloat16)), name


def test_weights_lie_in_the_files_memory_map(qwen: Path, tmp_path: Path) -> None:
    folder = cache_base(str(qwen), "float32", tmp_path / "cache")
    model = open_base(folder)
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(folder / "model.safetensors")):
            span, mode = line.split()[:2]
            assert mode[3] == "p", f"the map is shared: {line}"
            spans.append(tuple(int(side, 16) for side in span.split("-")))
    assert spans
    for name, parameter in model.named_parameters():
        address = parameter.data_ptr()
        assert any(start <= address < stop for start, stop in spans), f"{name} is a copy"


def test_a_write_in_place_stays_in_this_model(qwen: Path, tmp_path: Path) -> None:
    folder = cache_base(str(qwen), "float32", tmp_path / "cache")
    before = (folder / "model.safetensors").read_bytes()
    first, second = open_base(folder), open_base(folder)
    name = "model.layers.0.mlp.experts.down_proj"
    old = second.get_parameter(name).clone()
    first.get_parameter(name).data.fill_(123.0)
    assert torch.equal(second.get_parameter(name), old)
    assert torch.equal(open_base(folder).get_parameter(name), old)
    assert (folder / "model.safetensors").read_bytes() == before
    assert float(first.get_parameter(name).min()) == 123.0


def test_tied_weights_are_stored_once_and_tied_again(
    tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path
) -> None:
    source = save_model(tiny_model("qwen2_moe", tie_word_embeddings=True), tmp_path / "hf")
    folder = cache_base(str(source), "float32", tmp_path / "cache")
    stored = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in stored) != ("model.embed_tokens.weight" in stored)
    model: Any = open_base(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_second_time_nothing_is_loaded(qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = tmp_path / "cache"
    first = cache_base(str(qwen), "float32", cache)
    stamp = (first / "model.safetensors").stat().st_mtime_ns

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("loaded again")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    assert cache_base(str(qwen), "float32", cache) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in cache.iterdir()) == [first.name]  # no scratch left behind


def test_other_weights_get_another_folder(qwen: Path, tmp_path: Path) -> None:
    first = cache_base(str(qwen), "float32", tmp_path / "cache")
    weights = load_file(qwen / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    before = fingerprint_folder(qwen)
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint_folder(qwen) != before
    second = cache_base(str(qwen), "float32", tmp_path / "cache")
    assert second != first
    assert torch.equal(open_base(second).get_parameter("model.norm.weight"), weights["model.norm.weight"])


@pytest.mark.parametrize("size", [0.5, 0.999])
def test_a_truncated_checkpoint_is_a_model_error(qwen: Path, size: float, tmp_path: Path) -> None:
    path = qwen / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(size * path.stat().st_size)])
    with pytest.raises(ModelError, match=r"cannot be loaded: model\.safetensors is truncated"):
        cache_base(str(qwen), "float32", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


def test_a_checkpoint_without_one_weight_is_a_model_error(qwen: Path, tmp_path: Path) -> None:
    weights = load_file(qwen / "model.safetensors")
    del weights["model.layers.1.mlp.gate.weight"]
    save_file(weights, qwen / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks .*model\.layers\.1\.mlp\.gate\.weight"):
        cache_base(str(qwen), "float32", tmp_path / "cache")


def test_a_missing_shard_is_a_model_error(qwen: Path, tmp_path: Path) -> None:
    (qwen / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot be loaded"):
        cache_base(str(qwen), "float32", tmp_path / "cache")


def test_the_bad_ones_of_several_shards_are_named(tiny_model: Callable[..., PreTrainedModel], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    tiny_model("qwen2_moe").save_pretrained(folder, max_shard_size="60KB")
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) >= 3
    (folder / shards[0]).unlink()
    (folder / shards[1]).write_bytes((folder / shards[1]).read_bytes()[:-9])
    with pytest.raises(ModelError) as caught:
        cache_base(str(folder), "float32", tmp_path / "cache")
    assert f"{shards[0]} is missing; {shards[1]} is truncated" in caught.value.message
    assert shards[2] not in caught.value.message


def test_a_folder_without_a_model_or_of_another_family_is_a_model_error(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for call in (lambda path: cache_base(path, "float32", tmp_path / "cache"), facts_of):
        with pytest.raises(ModelError, match="cannot be read"):
            call(str(empty))
        (tmp_path / "dense").mkdir(exist_ok=True)
        (tmp_path / "dense" / "config.json").write_text(json.dumps(LlamaConfig().to_dict()))
        with pytest.raises(ModelError, match="'llama' is not known"):
            call(str(tmp_path / "dense"))


def test_a_cached_base_that_lacks_a_weight_or_is_torn_is_a_model_error(qwen: Path, tmp_path: Path) -> None:
    folder = cache_base(str(qwen), "float32", tmp_path / "cache")
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    del weights["model.layers.0.mlp.experts.gate_up_proj"]
    path.unlink()
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.0\.mlp\.experts\.gate_up_proj"):
        open_base(folder)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[:-100])
    with pytest.raises(ModelError, match="delete this folder"):
        open_base(folder)


def test_a_cached_base_that_lacks_a_routers_buffer_is_a_model_error(
    tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path
) -> None:
    source = save_model(tiny_model("deepseek_v3"), tmp_path / "hf")
    folder = cache_base(str(source), "bfloat16", tmp_path / "cache")
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert weights[name].dtype == torch.float32  # narrow scores would choose other experts
    assert open_base(folder).state_dict()[name].dtype == torch.float32
    del weights[name]
    path.unlink()
    save_file(weights, path)
    with pytest.raises(ModelError, match=r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias"):
        open_base(folder)


def quantise(source: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))


def test_mxfp4_is_undone(tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path) -> None:
    """GPT-OSS as published: 4-bit floats (sign, 2 bits exponent, 1 bit fraction), low nibble first, a power of 2 each 32."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat([values, -values])
    source = save_model(tiny_model("gpt_oss", intermediate_size=32), tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    plain = num_parameters(str(source))
    generator = torch.Generator().manual_seed(0)
    expected = {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inner, outer = weights.pop(name).shape
        nibbles = torch.randint(0, 16, (experts, outer, inner), generator=generator)
        powers = torch.randint(120, 130, (experts, outer, inner // 32), generator=generator)
        expected[name] = (values[nibbles] * torch.exp2(powers - 127.0).repeat_interleave(32, dim=-1)).transpose(1, 2)
        packed = (nibbles[..., 0::2] | nibbles[..., 1::2] << 4).to(torch.uint8)
        weights[f"{name}_blocks"] = packed.reshape(experts, outer, inner // 32, 16)
        weights[f"{name}_scales"] = powers.to(torch.uint8)
    quantise(source, weights, {"quant_method": "mxfp4"})
    opened = open_base(cache_base(str(source), "float32", tmp_path / "cache"))
    assert len(expected) == 4
    for name, value in expected.items():
        assert torch.equal(opened.get_parameter(name), value), name
    assert num_parameters(str(source)) == plain


def test_fp8_is_undone(tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path) -> None:
    """DeepSeek-V3 as published: 8-bit floats with one scale a block of 128 x 128, here one block each."""
    model = tiny_model("deepseek_v3")
    source = save_model(model, tmp_path / "hf")
    weights = load_file(source / "model.safetensors")
    expected = {}
    for name in [name for name in weights if "_proj" in name]:
        scale = weights[name].abs().max() / 448
        weights[name] = (weights[name] / scale).to(torch.float8_e4m3fn)
        weights[f"{name}_scale_inv"] = scale.reshape(1, 1)
        expected[name] = weights[name].float() * scale
    quantise(source, weights, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]})
    opened = open_base(cache_base(str(source), "float32", tmp_path / "cache"))
    attention = "model.layers.0.self_attn.kv_b_proj.weight"
    assert torch.equal(opened.get_parameter(attention), expected[attention])
    stem = "model.layers.1.mlp.experts"
    gate_up = opened.get_parameter(f"{stem}.gate_up_proj")
    for expert in range(4):
        both = torch.cat([expected[f"{stem}.{expert}.{side}_proj.weight"] for side in ("gate", "up")])
        assert torch.equal(gate_up[expert], both)


def test_another_quantisation_is_refused_by_name(qwen: Path, tmp_path: Path) -> None:
    quantise(qwen, load_file(qwen / "model.safetensors"), {"quant_method": "awq", "bits": 4})
    with pytest.raises(ModelError, match="is quantised with 'awq'") as caught:
        cache_base(str(qwen), "float32", tmp_path / "cache")
    assert "fp8, mxfp4" in caught.value.hint


def test_transformers_is_asked_to_undo_a_quantisation(
    tiny_model: Callable[..., PreTrainedModel], save_model: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU it does so unasked; on a GPU with the right kernels it would keep the packed form."""
    source = save_model(tiny_model("gpt_oss", intermediate_size=32), tmp_path / "hf")
    quantise(source, load_file(source / "model.safetensors"), {"quant_method": "mxfp4"})
    asked: list[Any] = []

    def note(*args: Any, config: Any, **kwargs: Any) -> None:
        asked.append(config.quantization_config)
        raise OSError("far enough")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", note)
    with pytest.raises(ModelError, match="far enough"):
        cache_base(str(source), "float32", tmp_path / "cache")
    assert asked == [{"quant_method": "mxfp4", "dequantize": True}]
