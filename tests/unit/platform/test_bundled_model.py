"""The bundled model's recipe, cache and files, with a model of a few thousand parameters."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedgraft.data.corpus import CLIENT_DOMAINS, GENERAL, generate
from fedgraft.data.examples import Example
from fedgraft.data.tokenise import encode_all, render
from fedgraft.errors import ModelError
from fedgraft.moe.families import model_facts
from fedgraft.platform import bundled_model
from fedgraft.platform.bundled_model import (
    BundledRecipe,
    ModelSizes,
    bundled_hash,
    bundled_hf_config,
    ensure_bundled_model,
)
from fedgraft.platform.cache_folder import default_cache
from fedgraft.training.pretrain import PretrainSpec

TINY = BundledRecipe(
    sizes=ModelSizes(
        vocab_size=320,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_experts=4,
        expert_size=8,
        shared_expert_size=16,
        max_positions=96,
    ),
    training=PretrainSpec(num_steps=12, learning_rate=1e-2, warmup_steps=2),
    examples_per_domain=20,
    general_examples=30,
    batch_size=8,
    held_out_examples=4,
)


def weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_bundled_model(tmp_path_factory.mktemp("cache"), recipe=TINY)


def test_the_folder_is_an_ordinary_one_of_transformers(made: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(made)
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert model.config.model_type == "qwen2_moe"
    assert model_facts(model.config).num_experts == 4
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert (made / "generation_config.json").is_file()
    assert [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id] == [0, 1, 2]
    assert len(tokenizer) == model.config.vocab_size == 320
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "7 x 3 ="}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert output.shape[1] <= prompt["input_ids"].shape[1] + 3


def test_the_default_model_is_what_federated_fine_tuning_expects() -> None:
    facts = model_facts(bundled_hf_config())
    assert len(facts.layers) == facts.num_layers >= 3
    assert (facts.num_experts, facts.top_k, facts.norm_topk_prob) == (8, 2, True)
    # PyTorch's grouped matmul wants rows of a multiple of 16 bytes.
    assert facts.hidden_size * 4 % 16 == facts.expert_size * 4 % 16 == 0
    assert (facts.attention[0].out_features // bundled_hf_config().num_attention_heads) * 4 % 16 == 0


def test_the_reloaded_tokenizer_gives_the_ids_that_were_trained_on(made: Path) -> None:
    examples = [item for domain in (*CLIENT_DOMAINS, GENERAL) for item in generate(domain, "test", 5, 3)]
    trained = bundled_model._train_tokenizer(bundled_model._pretraining_examples(TINY), TINY.sizes)
    reloaded = AutoTokenizer.from_pretrained(made)
    for item in examples:
        ids = trained(item.prompt)["input_ids"]
        assert reloaded(item.prompt)["input_ids"] == ids
        assert reloaded.decode(ids) == item.prompt
    odd = "caf\u00e9 \u4e2d 3 \n\n tab\t"
    assert reloaded.decode(reloaded(odd)["input_ids"]) == odd


def test_digits_stand_alone_and_special_tokens_are_one_token(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.convert_ids_to_tokens(tokenizer("1248")["input_ids"]) == ["1", "2", "4", "8"]
    assert [tokenizer(text)["input_ids"] for text in ("<|pad|>", "<|bos|>", "<|end|>")] == [[0], [1], [2]]
    assert [len(tokenizer(text)["input_ids"]) for text in ("<|user|>", "<|assistant|>", "<|system|>")] == [1, 1, 1]


def test_chat_template_round_trip(made: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made)
    chat = [{"role": "user", "content": "Add 1 and 2."}, {"role": "assistant", "content": "It is 3."}]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert whole == "<|user|>\nAdd 1 and 2.\n<|assistant|>\nIt is 3.<|end|>\n"
    prompt = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|user|>\nAdd 1 and 2.\n<|assistant|>\n"
    example = Example(prompt="Add 1 and 2.", response="It is 3.")
    assert render(tokenizer, [example]) == ([prompt], ["It is 3.<|end|>"])
    (tokens,) = encode_all(tokenizer, [example], 96)
    assert tokenizer.decode(tokens.input_ids.tolist()) == whole.removesuffix("\n")
    assert tokens.input_ids[-1] == tokenizer.eos_token_id


def test_the_notes_say_what_was_done(made: Path) -> None:
    notes = json.loads((made / "pretrain.json").read_text())
    assert notes["recipe"]["training"]["num_steps"] == 12
    assert notes["threads"] == 1
    assert notes["seconds"] > 0
    assert notes["versions"]["torch"] == torch.__version__
    assert set(notes["held_out_response_nll"]) <= {*CLIENT_DOMAINS, GENERAL}
    assert len(notes["held_out_response_nll"]) >= 8
    assert all(0 < value < 10 for value in notes["held_out_response_nll"].values())
    assert notes["num_parameters"] == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(made).parameters())


def test_a_second_call_finds_it_and_a_second_cache_gets_the_same_bits(made: Path, tmp_path: Path) -> None:
    calls: list[int] = []

    def count(step: int, num_steps: int, loss: float) -> None:
        calls.append(step)

    before = {path: path.stat().st_mtime_ns for path in made.iterdir()}
    assert ensure_bundled_model(made.parent.parent, count, TINY) == made
    assert calls == []
    assert {path: path.stat().st_mtime_ns for path in made.iterdir()} == before

    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # the recipe's number counts, not the process's
    torch.manual_seed(123)  # neither reads nor moves the process's generator
    again = ensure_bundled_model(tmp_path, count, TINY)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    after = torch.rand(1)
    torch.manual_seed(123)
    assert torch.equal(after, torch.rand(1))
    assert calls == list(range(1, 13))
    assert again.name == made.name
    assert weights_hash(again) == weights_hash(made)
    assert (again / "tokenizer.json").read_bytes() == (made / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("damage", ["missing", "short", "flipped", "no notes", "bad notes", "empty"])
def test_a_torn_folder_is_made_again(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
    fresh: list[Path] = []

    def stand_in(folder: Path, recipe: BundledRecipe, on_progress: object) -> None:
        fresh.append(folder)
        _copy(made, folder)

    monkeypatch.setattr(bundled_model, "_make", stand_in)
    folder = tmp_path / "bundled" / made.name
    folder.mkdir(parents=True)
    weights = (made / "model.safetensors").read_bytes()
    if damage != "empty":
        _copy(made, folder)
    if damage == "missing":
        (folder / "tokenizer.json").unlink()
    elif damage == "short":
        (folder / "model.safetensors").write_bytes(weights[:-10])
    elif damage == "flipped":
        (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif damage == "no notes":
        (folder / "pretrain.json").unlink()
    elif damage == "bad notes":
        (folder / "pretrain.json").write_text('{"files": ')
    assert ensure_bundled_model(tmp_path, recipe=TINY) == folder
    assert len(fresh) == 1
    assert weights_hash(folder) == weights_hash(made)
    assert ensure_bundled_model(tmp_path, recipe=TINY) == folder
    assert len(fresh) == 1
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name, f"{folder.name}.lock"]


def test_whoever_is_second_in_a_race_takes_what_the_first_wrote(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bundled" / made.name

    def overtaken(scratch: Path, recipe: BundledRecipe, on_progress: object) -> None:
        folder.mkdir()
        _copy(made, folder)
        (scratch / "other").write_text("the loser's")

    monkeypatch.setattr(bundled_model, "_make", overtaken)
    assert ensure_bundled_model(tmp_path, recipe=TINY) == folder
    assert not (folder / "other").exists()


def test_an_interrupted_training_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(step: int, num_steps: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ensure_bundled_model(tmp_path, interrupt, TINY)
    assert [path.suffix for path in (tmp_path / "bundled").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        ensure_bundled_model(tmp_path / "file", recipe=TINY)


def test_the_hash_changes_with_everything_that_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {bundled_hash(TINY), bundled_hash(BundledRecipe())}
    hashes.add(bundled_hash(dataclasses.replace(TINY, seed=1)))
    hashes.add(bundled_hash(dataclasses.replace(TINY, general_examples=31)))
    hashes.add(bundled_hash(dataclasses.replace(TINY, sizes=dataclasses.replace(TINY.sizes, expert_size=12))))
    hashes.add(bundled_hash(dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, prompt_weight=0.2))))
    assert bundled_hash(TINY) in hashes
    monkeypatch.setattr(bundled_model, "corpus_fingerprint", lambda: "other")
    hashes.add(bundled_hash(TINY))
    monkeypatch.undo()
    monkeypatch.setattr(bundled_model.transformers, "__version__", "0")
    hashes.add(bundled_hash(TINY))
    assert len(hashes) == 8


def test_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert default_cache() == tmp_path / "own"
    monkeypatch.setenv("FEDGRAFT_CACHE", "")
    assert default_cache() == tmp_path / "xdg" / "fedgraft"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_cache() == tmp_path / "home" / ".cache" / "fedgraft"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == tmp_path / "home" / ".cache" / "fedgraft"


def test_training_batches_cover_every_example_once_an_epoch(made: Path) -> None:
    examples = bundled_model._pretraining_examples(TINY)[:40]
    tokenizer = AutoTokenizer.from_pretrained(made)
    sequences = bundled_model._encode(tokenizer, examples, 96)
    recipe = dataclasses.replace(TINY, training=dataclasses.replace(TINY.training, num_steps=10))
    rows: dict[tuple[int, ...], int] = {}
    for batch in bundled_model._batches(sequences, recipe, 0):
        assert batch.num_examples == 8
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            assert bool((ids[mask == 0] == 0).all())
            assert int(ids[labels != -100][-1]) == tokenizer.eos_token_id
            key = tuple(ids[mask == 1].tolist())
            rows[key] = rows.get(key, 0) + 1
    assert rows == {tuple(item.input_ids.tolist()): 2 for item in sequences}


def _copy(source: Path, target: Path) -> None:
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
        os.utime(target / path.name, (1, 1))
