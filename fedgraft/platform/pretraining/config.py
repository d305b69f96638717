"""The configuration of ``fedgraft pretrain``: texts, tokenizer, model, training, workers, output."""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from transformers import CONFIG_MAPPING

from fedgraft.data.config import SourceConfig
from fedgraft.errors import ModelError
from fedgraft.moe.families import FAMILIES, model_facts
from fedgraft.platform.pretraining.tokenizer import MIN_VOCABULARY
from fedgraft.training.pretrain import PretrainSpec
from fedgraft.training.sharded import ShardedSpec

__all__ = [
    "PretrainConfig",
    "PretrainDataConfig",
    "PretrainModelConfig",
    "PretrainOutputConfig",
    "PretrainTrainingConfig",
    "TokenizerConfig",
    "WorkersConfig",
    "build_hf_config",
]

_FROM_ELSEWHERE = {
    "vocab_size": "it is the tokenizer's; set tokenizer.vocab_size",
    "pad_token_id": "it is the tokenizer's",
    "bos_token_id": "it is the tokenizer's",
    "eos_token_id": "it is the tokenizer's",
    "dtype": "set training.dtype",
    "router_aux_loss_coef": "set training.router_aux_weight",
    "output_router_logits": "training asks for what it needs",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PretrainDataConfig(SourceConfig):
    """The texts: a file or folder (.txt, .jsonl, .json, .csv, .parquet, also .gz), a hub data set, or the bundled corpus."""

    path: Path | None = Field(
        default=None, description="File or folder of .txt, .jsonl, .json, .csv, .parquet, also .gz; or one that datasets saved."
    )
    text_field: str | None = Field(
        default=None,
        description="Field of a record that is a text; null: 'text' where records have it, else prompt and response in the chat "
        "template (fields as those of fedgraft run: dolly, alpaca, gsm8k, messages).",
    )
    examples_per_domain: int | None = Field(
        default=None, ge=1, le=100_000, description="Examples a domain of the bundled corpus (only there); null: 2000."
    )
    max_documents: int | None = Field(default=None, ge=2, description="Texts kept, drawn with the seed.")
    held_out_fraction: float = Field(default=0.02, ge=0, lt=0.5, description="Share of the sequences that are only judged on.")

    @property
    def is_bundled(self) -> bool:
        """Whether the texts are the bundled corpus."""
        return not self.is_given

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.is_bundled:
            for name in ("text_field", "split"):
                if name in self.model_fields_set and getattr(self, name) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} has no effect on the bundled corpus; set path or name, or remove it")
        elif self.examples_per_domain is not None:
            raise ValueError("examples_per_domain has an effect on the bundled corpus only; set max_documents, or remove it")
        return self


class TokenizerConfig(_Frozen):
    """A byte-level BPE trained on the texts, or the tokenizer of a folder."""

    vocab_size: int = Field(
        default=512,
        ge=MIN_VOCABULARY,
        le=1_000_000,
        description="Tokens of a trained one: 256 bytes, 6 special tokens, merges.",
    )
    path: Path | None = Field(default=None, description="Folder with a Hugging Face tokenizer to take as it is.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.path is not None and "vocab_size" in self.model_fields_set:
            raise ValueError("vocab_size has no effect beside path; remove one of them")
        return self


class PretrainModelConfig(_Frozen):
    """Which model: a family, and fields of its Hugging Face configuration."""

    family: str = Field(default="qwen2_moe", description=f"One of {', '.join(FAMILIES)}.")
    sizes: dict[str, Any] = Field(
        default_factory=dict, description="Fields of the family's Hugging Face configuration; what is not given is its default."
    )

    @field_validator("family")
    @classmethod
    def _is_known(cls, family: str) -> str:
        if family not in FAMILIES:
            raise ValueError(f"expected one of {', '.join(FAMILIES)}")
        return family

    @model_validator(mode="after")
    def _builds(self) -> Self:
        build_hf_config(self, vocab_size=MIN_VOCABULARY)
        return self


class PretrainTrainingConfig(_Frozen):
    """Steps, batches and the optimiser (AdamW; the rate rises linearly, then falls along a cosine)."""

    steps: int = Field(default=300, ge=1, le=100_000_000, description="Optimiser steps.")
    batch_size: int = Field(default=16, ge=1, le=1_000_000, description="Sequences of a step, over all workers.")
    sequence_length: int = Field(default=128, ge=8, le=1_048_576, description="Tokens of a sequence; texts are packed into it.")
    accumulation_steps: int = Field(
        default=1, ge=1, le=65_536, description="Passes that a worker takes its share of a batch in; more need less memory."
    )
    learning_rate: float = Field(default=3e-3, gt=0, le=10, description="Highest learning rate.")
    warmup_steps: int = Field(default=20, ge=0, description="Steps that the rate rises for.")
    final_lr_fraction: float = Field(default=0.1, ge=0, le=1, description="What is left of the rate at the end; 1: constant.")
    weight_decay: float = Field(default=0.1, ge=0, le=10, description="Decoupled weight decay of matrices.")
    max_grad_norm: float = Field(default=1.0, gt=0, description="The whole gradient's norm is clipped to it.")
    router_aux_weight: float = Field(default=0.01, ge=0, le=10, description="Weight of the router's load-balancing loss.")
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Numbers of the model; bfloat16 keeps float32 masters."
    )
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=1, description="What workers share out: nothing, optimiser state, gradients too, weights too."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.zero_stage == 0 and self.dtype == "bfloat16":
            raise ValueError("zero_stage 0 has no float32 masters, without which bfloat16 loses small steps; set zero_stage: 1")
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps is {self.warmup_steps}, but there are {self.steps} steps; lower it")
        return self


class WorkersConfig(_Frozen):
    """Workers of Ray Train; each holds one rank of DeepSpeed."""

    count: int = Field(default=1, ge=1, le=10_000, description="Workers.")
    threads: int = Field(default=1, ge=1, le=256, description="Cores and threads of a worker; sums depend on it.")
    gpus: Literal[0, 1] = Field(default=0, description="GPUs a worker; one is not shared, as its collectives need it whole.")
    address: str | None = Field(default=None, description="Ray cluster to join; null: RAY_ADDRESS, else one of its own.")
    max_failures: int = Field(default=2, ge=0, description="Lost workers after which it starts again from the last checkpoint.")


class PretrainOutputConfig(_Frozen):
    """Where the model lies, and how often it is saved."""

    folder: Path = Field(
        default=Path("models/pretrained"), description="The model's folder, new or empty; on storage all nodes share."
    )
    checkpoint_every: int = Field(default=100, ge=1, description="Steps between checkpoints; the two newest are kept.")


class PretrainConfig(_Frozen):
    """Everything a pre-training depends on."""

    seed: int = Field(default=0, ge=0, description="Start weights, order of texts and dropout come from it.")
    data: PretrainDataConfig = Field(default_factory=PretrainDataConfig, description="The texts.")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="Texts to tokens.")
    model: PretrainModelConfig = Field(default_factory=PretrainModelConfig, description="Family and sizes.")
    training: PretrainTrainingConfig = Field(default_factory=PretrainTrainingConfig, description="Steps and optimiser.")
    workers: WorkersConfig = Field(default_factory=WorkersConfig, description="Who does the work.")
    output: PretrainOutputConfig = Field(default_factory=PretrainOutputConfig, description="Folders.")

    @model_validator(mode="after")
    def _batches_are_shared_evenly(self) -> Self:
        parts = self.workers.count * self.training.accumulation_steps
        if self.training.batch_size % parts:
            raise ValueError(
                f"training.batch_size is {self.training.batch_size}, which {self.workers.count} workers (workers.count) in "
                f"{self.training.accumulation_steps} passes (training.accumulation_steps) cannot share evenly; make it a "
                f"multiple of {parts}"
            )
        return self

    @model_validator(mode="after")
    def _sequences_fit(self) -> Self:
        longest = build_hf_config(self.model, vocab_size=MIN_VOCABULARY).max_position_embeddings
        if self.training.sequence_length > longest:
            raise ValueError(
                f"training.sequence_length is {self.training.sequence_length}, but the model has "
                f"{longest} positions (model.sizes.max_position_embeddings)"
            )
        return self

    def spec(self) -> ShardedSpec:
        """What the workers are told about training."""
        given = self.training
        return ShardedSpec(
            training=PretrainSpec(
                num_steps=given.steps,
                learning_rate=given.learning_rate,
                warmup_steps=given.warmup_steps,
                final_lr_fraction=given.final_lr_fraction,
                weight_decay=given.weight_decay,
                max_grad_norm=given.max_grad_norm,
                prompt_weight=1.0,
                router_aux_weight=given.router_aux_weight,
            ),
            batch_size=given.batch_size,
            num_parts=given.accumulation_steps,
            zero_stage=given.zero_stage,
            dtype=given.dtype,
            seed=self.seed,
        )

    def absolute(self) -> PretrainConfig:
        """The same configuration with absolute paths, so that it means the same from any folder."""

        def fix(part: Any, name: str) -> Any:
            given = getattr(part, name)
            return part if given is None else part.model_copy(update={name: given.expanduser().resolve()})

        return self.model_copy(
            update={
                "data": fix(self.data, "path"),
                "tokenizer": fix(self.tokenizer, "path"),
                "output": fix(self.output, "folder"),
            }
        )


def build_hf_config(model: PretrainModelConfig, **tokens: int | None) -> Any:
    """Build the Hugging Face configuration of a model and check that it can be built.

    Args:
        model: Family and sizes.
        **tokens: ``vocab_size`` and the ids of special tokens, from the tokenizer.

    Raises:
        ValueError: A field is unknown or of the wrong type, heads do not divide the width, or there are fewer experts than
            a token takes. The message names the field.
    """
    kind = CONFIG_MAPPING[model.family]
    known = [field.name for field in dataclasses.fields(kind)]
    known += [*kind.attribute_map, *kind.attribute_map.values()]
    for name in model.sizes:
        if name in _FROM_ELSEWHERE:
            raise ValueError(f"sizes.{name} cannot be set here: {_FROM_ELSEWHERE[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "see the family's configuration in transformers"
            raise ValueError(f"sizes.{name} is no field of {kind.__name__}; {hint}")
    ids = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None} | tokens
    try:
        built = kind(**model.sizes, **ids)
    except Exception as error:  # each family's own checks raise what they like
        text = " ".join(str(error).split())
        raise ValueError(f"sizes do not make a {kind.__name__}: {text}") from None
    _check_heads(model, built)
    try:
        model_facts(built)
    except ModelError as error:
        raise ValueError(f"sizes: {error.message}") from None
    return built


def _check_heads(model: PretrainModelConfig, built: Any) -> None:
    hidden, heads = int(built.hidden_size), int(built.num_attention_heads)
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
        value = getattr(built, name, None)
        if value is not None and value < 1:
            raise ValueError(f"sizes.{name} is {value}; it must be at least 1")
    is_plain = not FAMILIES[model.family].has_latent_attention
    if is_plain and model.sizes.get("head_dim") is None and hidden % heads:
        raise ValueError(
            f"sizes.hidden_size is {hidden}, which {heads} heads (sizes.num_attention_heads) do not divide; change one of them"
        )
    pairs = int(getattr(built, "num_key_value_heads", None) or heads)
    if heads % pairs:
        raise ValueError(
            f"sizes.num_attention_heads is {heads}, no multiple of sizes.num_key_value_heads, {pairs}; change one of them"
        )
