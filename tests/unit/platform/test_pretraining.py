"""Pre-training without Ray: configuration, texts, tokenizer, packed sequences, the order of rows, the command."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import fedgraft
from fedgraft.cli import app
from fedgraft.data.examples import Example
from fedgraft.errors import CheckpointError, ConfigError, DataError, FedgraftError, RunInterrupted
from fedgraft.moe.families import FAMILIES, model_facts
from fedgraft.platform.pretraining import command
from fedgraft.platform.pretraining.config import PretrainConfig, PretrainDataConfig, PretrainModelConfig, build_hf_config
from fedgraft.platform.pretraining.job import PretrainJob
from fedgraft.platform.pretraining.loading import dump_pretrain_config, load_pretrain_config
from fedgraft.platform.pretraining.ray_train import newest_checkpoint, read_metrics
from fedgraft.platform.pretraining.sequences import Sequences, batch_of_rows, pack, read_documents, rows_of_step
from fedgraft.platform.pretraining.tokenizer import MIN_VOCABULARY, train_tokenizer
from fedgraft.platform.progress import Event

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}


# ---- configuration


@pytest.mark.parametrize(
    ("override", "path", "text"),
    [
        ("model.sizes.hidden_size=63", "model", "hidden_size is 63, which 4 heads (sizes.num_attention_heads) do not divide"),
        ("model.sizes.num_key_value_heads=3", "model", "no multiple of sizes.num_key_value_heads, 3"),
        ("model.sizes.num_experts_per_tok=9", "model", "num_experts_per_tok is 9, but this qwen2_moe model has 8 experts"),
        ("model.sizes.num_attention_heads=0", "model", "num_attention_heads is 0"),
        ("model.sizes.hiden_size=64", "model", "hiden_size is no field of Qwen2MoeConfig; did you mean hidden_size"),
        ("model.sizes.hidden_size=wide", "model", "expected int, got str"),
        ("model.sizes.vocab_size=9", "model", "set tokenizer.vocab_size"),
        ("model.family=qwen", "model.family", "one of qwen2_moe, qwen3_moe"),
        ("tokenizer.vocab_size=261", "tokenizer.vocab_size", "from 262 to"),
        ("workers.count=3", "training.batch_size", "make it a multiple of 3"),
        ("training.accumulation_steps=16", "training.batch_size", "make it a multiple of 32"),
        ("training.sequence_length=257", "training.sequence_length", "256 positions"),
        ("training.warmup_steps=400", "training", "there are 400 steps"),
        ("training.zero_stage=4", "training.zero_stage", "0, 1, 2, 3"),
        ("training={dtype: bfloat16, zero_stage: 0}", "training", "no float32 masters"),
        ("training.step=4", "training.step", "did you mean 'steps'"),
        ("data.path=no-such.txt", "data.path", "a file or folder that exists"),
        ("data.text_field=body", "data", "no effect on the bundled corpus"),
        ("tokenizer.path=.", "tokenizer", "vocab_size has no effect beside path"),
        ("workers.gpus=2", "workers.gpus", "0, 1"),
    ],
)
def test_a_wrong_configuration_is_one_error_with_its_key(override: str, path: str, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_pretrain_config(None, [override])
    assert [problem.path for problem in caught.value.problems] == [path]
    assert text in str(caught.value)


def test_the_packaged_example_begins_with_its_command_and_survives_writing(tmp_path: Path) -> None:
    config = load_pretrain_config(None, [f"output.folder={tmp_path / 'm'}"])
    again = load_pretrain_config(yaml.safe_load(dump_pretrain_config(config.absolute())))
    assert again == config
    packaged = Path(fedgraft.__file__).parent / "platform" / "pretrain.yaml"
    assert packaged.read_text().splitlines()[0] == "# fedgraft pretrain"


def test_the_example_begins_with_its_command_and_the_docs_name_every_option_with_its_default() -> None:
    root = Path(__file__).parents[3]
    first = (root / "examples" / "pretrain.yaml").read_text().splitlines()[0]
    assert first == "# fedgraft pretrain examples/pretrain.yaml"
    assert load_pretrain_config(root / "examples" / "pretrain.yaml").model.family == "olmoe"
    listed = [
        line.split(" | ")[:2] for line in (root / "docs" / "pretrain.md").read_text().splitlines() if line.startswith("| `")
    ]
    documented = {key.strip("| `"): yaml.safe_load(default.strip("`")) for key, default in listed}

    def defaults(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= defaults(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
        return found

    assert documented == defaults(PretrainConfig().model_dump(mode="json"))


def test_relative_paths_are_those_of_the_folder_it_was_started_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("words")
    monkeypatch.chdir(tmp_path)
    config = load_pretrain_config(None, ["data.path=a.txt", "output.folder=m"]).absolute()
    assert (config.data.path, config.output.folder) == (tmp_path / "a.txt", tmp_path / "m")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_can_be_built(family: str, tiny_config: Callable[..., Any]) -> None:
    fields = tiny_config(family).to_diff_dict()
    sizes = {
        name: value
        for name, value in fields.items()
        if name.startswith(("num_", "n_", "first_k", "hidden_size", "moe_", "intermediate"))
    }
    built = build_hf_config(PretrainModelConfig(family=family, sizes=sizes), vocab_size=300, eos_token_id=2)
    assert (built.model_type, built.vocab_size, built.eos_token_id, built.pad_token_id) == (family, 300, 2, None)
    assert model_facts(built).num_experts == model_facts(tiny_config(family)).num_experts


# ---- texts


def test_texts_come_from_every_kind_of_file_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("plain\ntext")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as stream:
        stream.write('{"text": "from json"}\n{"text": "  "}\n')
    (tmp_path / "c.csv").write_text("text,split\nkept,train\nother,test\n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["from parquet"]}), tmp_path / "d.parquet")
    (tmp_path / "e.md").write_text("not read")
    found = read_documents(PretrainDataConfig(path=tmp_path), 0)
    assert found == ["plain\ntext", "from json", "kept", "from parquet"]
    assert read_documents(PretrainDataConfig(path=tmp_path / "a.txt"), 0) == ["plain\ntext"]


def test_records_with_prompt_and_response_become_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"instruction": "say", "response": "yes", "note": "n"}\n')
    assert read_documents(PretrainDataConfig(path=path), 0) == [Example(prompt="say", response="yes")]
    assert read_documents(PretrainDataConfig(path=path, text_field="note"), 0) == ["n"]


@pytest.mark.parametrize(
    ("content", "config", "text"),
    [
        ({}, {}, "holds no text"),
        ({"a.txt": ""}, {}, "is empty"),
        ({"a.jsonl": '{"text": " "}'}, {}, "there is no text"),
        ({"a.jsonl": '{"text": 3}'}, {}, "record 1: field 'text' holds int"),
        ({"a.jsonl": '{"body": "x"}'}, {"text_field": "text"}, "set data.text_field"),
        ({"a.jsonl": '{"body": "x"}'}, {}, "fit no preset"),
        ({"a.jsonl": '{"text": "x", "split": "test"}'}, {}, "no record is of split 'train'"),
    ],
)
def test_texts_that_are_not_there_are_an_error(
    tmp_path: Path, content: dict[str, str], config: dict[str, Any], text: str
) -> None:
    for name, body in content.items():
        (tmp_path / name).write_text(body)
    with pytest.raises(DataError, match=text):
        read_documents(PretrainDataConfig(path=tmp_path, **config), 0)


def test_a_limit_draws_with_the_seed_and_keeps_the_order(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"{i:03}"}) + "\n" for i in range(50)))
    drawn = [read_documents(PretrainDataConfig(path=tmp_path, max_documents=5), seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] == sorted(map(str, drawn[0]))
    assert drawn[0] != drawn[2]
    assert len(drawn[2]) == 5


# ---- tokens and sequences


def test_the_trained_tokenizer_reads_any_bytes_and_its_merges_come_from_the_texts() -> None:
    tokenizer = train_tokenizer(["banana bandana 1234 " * 20], MIN_VOCABULARY + 8, 64)
    assert len(tokenizer) == MIN_VOCABULARY + 8
    odd = "caf\u00e9 \u4e2d \n\t 42"
    assert tokenizer.decode(tokenizer(odd)["input_ids"]) == odd
    assert len(tokenizer("banana")["input_ids"]) < len(tokenizer("kwgkwg")["input_ids"]) == 6
    assert len(tokenizer("1234")["input_ids"]) == 4
    assert tokenizer.model_max_length == 64


def test_rows_are_the_documents_one_after_another_each_with_its_end(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    documents = [letter * 5 for letter in "abcdefgh"]
    found = pack(documents, byte_tokenizer, length=7, held_out_fraction=0.3, seed=0)
    text = byte_tokenizer.decode(found.rows.reshape(-1).tolist())
    *pieces, rest = text.split("<|end|>")
    assert rest == ""
    assert len(pieces) == len(set(pieces)) == 7, "6 rows of 7 tokens are 7 documents of 5 letters and an end each"
    assert set(pieces) < set(documents)
    assert pieces != documents[:7], "the order is the seed's"
    assert (found.rows.shape, found.num_train) == ((6, 7), 4)
    assert np.array_equal(pack(documents, byte_tokenizer, length=7, held_out_fraction=0.3, seed=0).rows, found.rows)
    assert pack(documents, byte_tokenizer, length=7, held_out_fraction=0.0, seed=0).num_train == 6


def test_examples_are_packed_in_the_chat_template_that_fine_tuning_uses() -> None:
    tokenizer = train_tokenizer(["say yes"], MIN_VOCABULARY, 64)
    found = pack([Example(prompt="say", response="yes")], tokenizer, length=4, held_out_fraction=0.0, seed=0)
    whole = "<|user|>\nsay\n<|assistant|>\nyes<|end|>"
    assert whole.startswith(tokenizer.decode(found.rows.reshape(-1).tolist()))
    assert found.rows.size == len(tokenizer(whole)["input_ids"]) // 4 * 4


def test_a_long_text_has_the_tokens_of_its_lines(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    text = "".join(f"line {i}\n" for i in range(20_000))  # more than is tokenised at once
    found = pack([text], byte_tokenizer, length=100, held_out_fraction=0.0, seed=0)
    assert byte_tokenizer.decode(found.rows.reshape(-1).tolist()) == text[: found.rows.size]
    assert found.rows.size == (len(text) + 1) // 100 * 100


def test_too_little_text_is_an_error(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="too few for 2 sequences of 64"):
        pack(["short " * 12], byte_tokenizer, length=64, held_out_fraction=0.1, seed=0)


def test_every_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    seen = np.concatenate([rows_of_step(step, 4, 10, 3) for step in range(1, 6)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert list(seen[:10]) != list(seen[10:])
    assert list(seen[:10]) != list(np.concatenate([rows_of_step(step, 4, 10, 4) for step in range(1, 4)])[:10])
    assert list(rows_of_step(1, 25, 10, 3)[:20]) == list(seen), "a batch may be larger than an epoch"


def test_a_job_writes_a_folder_that_transformers_reads(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    config = load_pretrain_config({"model": {"sizes": SIZES | {"tie_word_embeddings": True}}, "seed": 5})
    built = build_hf_config(config.model, vocab_size=len(byte_tokenizer), eos_token_id=1)
    built.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = np.arange(80, dtype=np.int32).reshape(8, 10)
    Sequences(rows=rows, num_train=6).save(tmp_path / "sequences.safetensors")
    job = PretrainJob(spec=config.spec(), folder=tmp_path, target=tmp_path / "model")
    job.open()
    assert {tuple(row) for row in job.batch(1).input_ids.tolist()} <= {tuple(row) for row in rows[:6].tolist()}
    assert [batch.input_ids.tolist() for batch in job.held_out()] == [rows[6:].tolist()]
    assert batch_of_rows(rows[:1]).num_label_tokens == 9

    model = job.build()
    torch.manual_seed(99)  # neither read nor moved
    again = job.build()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    trained = {name: value.detach() + 1 for name, value in model.named_parameters()}
    job.finish(trained)
    loaded = dict(AutoModelForCausalLM.from_pretrained(job.target).named_parameters())
    assert all(torch.equal(loaded[name], value) for name, value in trained.items())
    assert AutoConfig.from_pretrained(job.target).eos_token_id == 1
    assert AutoTokenizer.from_pretrained(job.target).eos_token_id == 1
    trained.pop("model.norm.weight")
    with pytest.raises(FedgraftError, match=r"lack model\.norm\.weight"):
        job.finish(trained)


# ---- the command


def test_metrics_end_before_a_torn_line(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    for attempt, step in ((1, 10), (1, 20), (2, 30)):
        folder = tmp_path / f"attempt-{attempt}" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        record = {"step": step, "world_size": 1, "zero_stage": 0, "files": {}}
        (folder / "rank-0.json").write_text(json.dumps(record))
    told: list[str] = []
    find = {"world_size": 1, "zero_stage": 0, "on_refused": told.append}
    assert newest_checkpoint(tmp_path, **find) == (30, tmp_path / "attempt-2" / "step-00000030")  # type: ignore[arg-type]
    (tmp_path / "attempt-2" / "step-00000030" / "rank-0.json").write_text("{")
    assert newest_checkpoint(tmp_path, **find) == (20, tmp_path / "attempt-1" / "step-00000020")  # type: ignore[arg-type]
    assert len(told) == 1
    assert newest_checkpoint(tmp_path / "empty", **find) is None  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="can be used"):
        newest_checkpoint(tmp_path, world_size=2, zero_stage=0, on_refused=told.append)


def test_nothing_is_written_where_texts_are_wrong_or_a_folder_is_used(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("too short")
    given = [f"data.path={tmp_path / 'a.txt'}", f"output.folder={tmp_path / 'm'}"]
    with pytest.raises(DataError, match="too few"):
        command.pretrain_model(load_pretrain_config(None, given))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt"]
    (tmp_path / "m" / "training").mkdir(parents=True)
    (tmp_path / "m" / "training" / "config.yaml").write_text("")
    with pytest.raises(ConfigError, match="--resume"):
        command.pretrain_model(load_pretrain_config(None, given))
    with pytest.raises(CheckpointError, match="holds no training"):
        command.pretrain_model(resume=tmp_path)


def test_the_command_passes_on_config_and_resume_and_shows_the_summary(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []

    def stand_in(config: PretrainConfig | None, *, resume: Path | None, on_event: Any) -> command.PretrainOutcome:
        calls.append((config, resume))
        on_event(Event(kind="pretrain", data={"step": 1, "num_steps": 2, "loss": 3.25}))
        if resume is not None:
            raise RunInterrupted("pre-training stopped after step 1 of 2", f"go on with: fedgraft pretrain --resume {resume}")
        record = {
            "family": "olmoe", "num_parameters": 1234, "vocab_size": 300, "num_documents": 7, "num_train_sequences": 5,
            "sequence_length": 8, "steps": 2, "num_tokens": 80, "training_seconds": 1.0, "losses": [5.5, 4.5],
            "final_loss": 4.5, "held_out_nll": None,
        }  # fmt: skip
        return command.PretrainOutcome(tmp_path, record)

    monkeypatch.setitem(vars(fedgraft), "pretrain_model", stand_in)
    result = CliRunner().invoke(app, ["pretrain", "training.steps=50"], env={"COLUMNS": "300"})
    assert result.exit_code == 0, result.output
    assert calls[0][0].training.steps == 50
    for text in ("step 1 of 2, loss 3.25", "1,234 parameters", f"fedgraft run model.path={tmp_path}"):
        assert text in result.stdout
    stopped = CliRunner().invoke(app, ["pretrain", "--resume", str(tmp_path)])
    assert stopped.exit_code == 130
    assert f"fedgraft pretrain --resume {tmp_path}" in stopped.stderr
    assert CliRunner().invoke(app, ["pretrain", "seed=3", "--resume", str(tmp_path)]).exit_code == 2
    assert len(calls) == 2
