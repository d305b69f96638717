"""Model folders that are wrong: whatever their files hold, one ModelError that says what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fedgraft.errors import ModelError
from fedgraft.moe.base import cache_base
from fedgraft.platform.config import ModelConfig
from fedgraft.platform.model_sizes import read_hf_config, size_model


@pytest.fixture
def folder(
    tiny_model: Callable[..., PreTrainedModel], save_model: Callable[[PreTrainedModel, Path], Path], tmp_path: Path
) -> Path:
    return save_model(tiny_model("qwen2_moe"), tmp_path / "hf")


def set_fields(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_size": -1},
        {"hidden_size": 0},
        {"hidden_size": "big"},
        {"hidden_size": 10**12},
        {"num_experts": 0},
        {"num_experts_per_tok": 9},
        {"num_attention_heads": 0},
        {"num_hidden_layers": -2},
        {"decoder_sparse_step": 0},
        {"vocab_size": 0},
        {"hidden_act": "nope"},
        {"rope_scaling": 3},
        {"dtype": "float99"},
        {"quantization_config": 3},
        {"layer_types": ["x", "y"]},
        {"model_type": "llama"},
        {"model_type": "nonsense"},
    ],
    ids=lambda fields: "-".join(f"{name}={value}" for name, value in fields.items()),
)
def test_sizes_that_make_no_model_are_one_error(folder: Path, fields: dict[str, Any]) -> None:
    set_fields(folder, **fields)
    model = ModelConfig(path=folder)
    with pytest.raises(ModelError) as caught:
        size_model(model, read_hf_config(model))
    assert len(str(caught.value)) < 700
    assert caught.value.hint


@pytest.mark.parametrize("text", [b"", b"null", b'{"model_type": "qwen2', b"\xff\xfe", b'{"a": ' + b"[" * 10_000])
def test_a_config_file_that_is_none_is_one_error(folder: Path, text: bytes) -> None:
    (folder / "config.json").write_bytes(text)
    with pytest.raises(ModelError, match="cannot be read"):
        read_hf_config(ModelConfig(path=folder))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b'{"a"', "the tokenizer of model"),
        ("tokenizer.json", b"[]", "the tokenizer of model"),
        ("tokenizer_config.json", b"[]", "the tokenizer of model"),
        ("tokenizer.json", None, "has no tokenizer"),
        ("model.safetensors", b"", "model.safetensors is truncated"),
        ("model.safetensors", b"\xff" * 4096, "model.safetensors is truncated or no safetensors file"),
        ("model.safetensors", None, "cannot be loaded"),
    ],
)
def test_a_file_that_is_missing_or_torn_is_named(
    folder: Path, tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    if content is None:
        for path in folder.glob(f"{Path(name).stem}*"):
            path.unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelError, match=said):
        cache_base(str(folder), "float32", tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*"))


@pytest.mark.parametrize(
    "index", ["{", "[]", '{"weight_map": {"a": "model-2.safetensors"}}', '{"metadata": {}, "weight_map": {"a": "../../x"}}']
)
def test_an_index_of_shards_that_is_none_is_one_error(folder: Path, tmp_path: Path, index: str) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match="no index of shards|is missing|cannot be loaded"):
        cache_base(str(folder), "float32", tmp_path / "cache")


def test_weights_of_another_shape_or_type_are_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(folder, lambda found: found | {name: found[name][:, :16].contiguous()})
    with pytest.raises(ModelError) as caught:
        cache_base(str(folder), "float32", tmp_path / "cache")
    assert f"1 weights have other shapes than config.json says; {name} is (32, 16), expected (32, 32)" in caught.value.message
    change_weights(folder, lambda found: found | {name: torch.ones(32, 32, dtype=torch.int8)})
    with pytest.raises(ModelError, match=f"{name} as I8, expected floating-point weights"):
        cache_base(str(folder), "float32", tmp_path / "cache")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(
    tiny_model: Callable[..., PreTrainedModel], save_model: Callable[[PreTrainedModel, Path], Path], tmp_path: Path
) -> None:
    folder = save_model(tiny_model("qwen2_moe", vocab_size=200), tmp_path / "hf")
    with pytest.raises(ModelError, match=r"has 259 tokens, but the model 200 \(vocab_size\)"):
        cache_base(str(folder), "float32", tmp_path / "cache")


def test_a_folder_in_the_place_of_a_file_is_one_error(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        cache_base(str(folder), "float32", tmp_path / "cache")
