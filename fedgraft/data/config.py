"""The part of a run's configuration that says which examples there are and how clients share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = [
    "BundledConfig",
    "DataConfig",
    "DirichletPartition",
    "FieldMap",
    "IidPartition",
    "NaturalPartition",
    "PartitionConfig",
    "PathologicalPartition",
    "Preset",
    "QuantityPartition",
    "QuestionsConfig",
    "RetentionConfig",
    "SourceConfig",
]

Preset: TypeAlias = Literal["auto", "dolly", "alpaca", "gsm8k", "messages", "custom"]
"""How the fields of a record become an example; ``auto`` finds out from their names."""


class _Frozen(BaseModel):
    """Frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class FieldMap(_Frozen):
    """Which field of a record is what, for records that fit no preset."""

    prompt: str = Field(description="Field with the instruction or question.")
    response: str = Field(description="Field with the answer to learn.")
    context: str | None = Field(
        default=None, description="Field with text that is put under the prompt; may be empty in a record."
    )
    label: str | None = Field(default=None, description="Field that a partition goes by.")


class NaturalPartition(_Frozen):
    """One client for each value of the label; without ``num_clients`` for every value, else for the most frequent ones."""

    name: Literal["natural"] = "natural"


class DirichletPartition(_Frozen):
    """Each label's examples are split over the clients in proportions drawn from a symmetric Dirichlet distribution."""

    name: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(default=0.5, gt=0, le=1e6, description="Small: each client has few labels. Large: all are alike.")
    min_examples: int = Field(default=8, ge=1, description="Fewest examples of a client; topped up from the largest clients.")


class PathologicalPartition(_Frozen):
    """Each client holds a few labels only; a label's examples are split evenly over the clients that hold it."""

    name: Literal["pathological"] = "pathological"
    classes_per_client: int = Field(default=2, ge=1, description="Labels that a client holds.")


class QuantityPartition(_Frozen):
    """Clients differ in size, not in labels."""

    name: Literal["quantity"] = "quantity"
    sizes: Literal["lognormal", "dirichlet"] = Field(default="lognormal", description="Distribution of the clients' shares.")
    sigma: float | None = Field(default=None, gt=0, le=5, description="Spread of log sizes (lognormal only); 1.0 if not given.")
    alpha: float | None = Field(default=None, gt=0, le=1e6, description="Concentration (dirichlet only); 0.5 if not given.")
    min_examples: int = Field(default=8, ge=1, description="Fewest examples of a client; topped up from the largest clients.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        if self.sizes == "lognormal" and self.alpha is not None:
            raise ValueError("alpha has no effect with sizes: lognormal; set sigma, or sizes: dirichlet")
        if self.sizes == "dirichlet" and self.sigma is not None:
            raise ValueError("sigma has no effect with sizes: dirichlet; set alpha, or sizes: lognormal")
        return self


class IidPartition(_Frozen):
    """Clients are alike in size and labels."""

    name: Literal["iid"] = "iid"


PartitionConfig: TypeAlias = Annotated[
    NaturalPartition | DirichletPartition | PathologicalPartition | QuantityPartition | IidPartition,
    Field(discriminator="name"),
]
"""How examples are shared among clients; ``name`` picks the kind."""


class SourceConfig(_Frozen):
    """Where records come from. A ``path`` wins over a ``name``, so a local copy can be given over a config with a name."""

    path: Path | None = Field(default=None, description="File (.jsonl, .json, .csv, .parquet; also .gz) or folder.")
    name: str | None = Field(default=None, description="Data set on the Hugging Face hub, used where there is no path.")
    config_name: str | None = Field(default=None, description="Configuration of the hub's data set.")
    split: str | None = Field(
        default="train",
        description="Split of a hub's or saved data set; of a plain file, records whose field 'split' says so (if they "
        "have such a field). null: all records of a plain file.",
    )

    @field_validator("path", mode="after")
    @classmethod
    def _expand_home(cls, path: Path | None) -> Path | None:
        try:
            return path.expanduser() if path is not None else None
        except RuntimeError:
            raise ValueError("expected a path whose home folder is known") from None

    @model_validator(mode="after")
    def _config_name_has_an_effect(self) -> Self:
        if self.config_name is not None and self.name is None:
            raise ValueError("config_name has no effect without name; remove it, or set name to a data set of the hub")
        return self

    @property
    def is_given(self) -> bool:
        """Whether there is a path or a name."""
        return self.path is not None or self.name is not None


class RetentionConfig(SourceConfig):
    """The held-out general set that says what a model forgot.

    Without a path or a name: the general part of the bundled corpus if the clients' data is the bundled corpus, else none.
    A text file (.txt, .txt.gz) is cut into chunks of ``max_length`` tokens, where every token counts for the loss.
    """

    split: str | None = Field(default="test", description="As data.split.")
    preset: Preset = Field(default="auto", description="As data.preset; text files need none.")
    fields: FieldMap | None = Field(default=None, description="As data.fields.")
    max_examples: int | None = Field(default=None, ge=1, description="Examples or chunks kept, drawn with the run's seed.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        _check_fields(self.preset, self.fields)
        if not self.is_given and self.preset != "auto":
            raise ValueError(f"preset: {self.preset} has no effect without path or name")
        if self.path is not None and _is_text(self.path) and self.preset != "auto":
            raise ValueError(f"preset: {self.preset} has no effect on a text file; remove it")
        return self


class QuestionsConfig(SourceConfig):
    """Multiple choice questions: records {subject, question, choices, answer} as in MMLU.

    Without a path or a name: questions of the bundled corpus if the clients' data is the bundled corpus, else none.
    """

    split: str | None = Field(default="test", description="As data.split.")
    max_questions: int | None = Field(default=None, ge=1, description="Questions kept, drawn with the run's seed.")


class BundledConfig(_Frozen):
    """How much of the bundled corpus is generated."""

    train_per_domain: int = Field(default=240, ge=2, le=100_000, description="Examples a domain for training and validation.")
    test_per_domain: int = Field(
        default=60, ge=1, le=100_000, description="Test examples a domain, of other templates and entities."
    )
    num_retention: int = Field(default=96, ge=0, le=100_000, description="General test examples; 0: no retention set.")
    questions_per_domain: int = Field(default=8, ge=0, le=10_000, description="Multiple choice questions a domain; 0: none.")


class DataConfig(SourceConfig):
    """The examples of a run: source, fields, tokens, partition, splits. Without path and name: the bundled corpus."""

    preset: Preset = Field(default="auto", description="How a record's fields become prompt, response and label.")
    fields: FieldMap | None = Field(default=None, description="Names of the fields; with preset: custom only.")
    label_field: str | None = Field(default=None, description="Field that the partition goes by, instead of the preset's.")
    skip_invalid: bool = Field(
        default=False, description="Leave out records with an empty prompt or response instead of failing."
    )
    max_examples: int | None = Field(default=None, ge=3, description="Records kept, drawn with the run's seed.")
    max_length: int = Field(
        default=256,
        ge=8,
        le=1_048_576,
        description="Tokens of an example; the start of a longer prompt is cut, and a response only if it is too long alone.",
    )
    bundled: BundledConfig = Field(default_factory=BundledConfig, description="Size of the bundled corpus.")
    partition: PartitionConfig = Field(default_factory=NaturalPartition, description="How examples are shared among clients.")
    num_clients: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Clients; needed unless the partition is natural."
    )
    validation_fraction: float = Field(default=0.1, gt=0, lt=1, description="Share of a client's examples; at least one example.")
    test_fraction: float = Field(
        default=0.2,
        gt=0,
        lt=1,
        description="Share of a client's examples, at least one; the bundled corpus has its own test pool.",
    )
    max_train_examples: int | None = Field(default=None, ge=1, description="Most training examples of a client.")
    max_validation_examples: int | None = Field(default=None, ge=1, description="Most validation examples of a client.")
    max_test_examples: int | None = Field(default=None, ge=1, description="Most test examples of a client.")
    retention: RetentionConfig = Field(default_factory=RetentionConfig, description="Held-out general set.")
    questions: QuestionsConfig = Field(default_factory=QuestionsConfig, description="Multiple choice questions.")

    @property
    def is_bundled(self) -> bool:
        """Whether the clients' examples come from the bundled corpus."""
        return not self.is_given

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        _check_fields(self.preset, self.fields)
        if self.fields is not None and self.fields.label is not None and self.label_field is not None:
            raise ValueError("fields.label has no effect beside label_field; remove one of them")
        if self.partition.name != "natural" and self.num_clients is None:
            raise ValueError(f"partition {self.partition.name} needs num_clients; set data.num_clients")
        if self.validation_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"validation_fraction {self.validation_fraction:g} and test_fraction {self.test_fraction:g} leave nothing "
                "to train on; their sum must be below 1"
            )
        if self.is_bundled:
            self._check_bundled()
        return self

    def _check_bundled(self) -> None:
        ineffective = [
            name
            for name in ("preset", "label_field", "skip_invalid", "max_examples", "split", "test_fraction")
            if getattr(self, name) != type(self).model_fields[name].default
        ]
        if ineffective:
            raise ValueError(
                f"{', '.join(ineffective)}: no effect on the bundled corpus; set path or name, or remove "
                f"{'it' if len(ineffective) == 1 else 'them'} (sizes of the corpus are set under bundled)"
            )
        for part, count, cap in (
            ("retention", self.bundled.num_retention, self.retention.max_examples),
            ("questions", self.bundled.questions_per_domain, self.questions.max_questions),
        ):
            if cap is not None and count == 0 and not getattr(self, part).is_given:
                raise ValueError(f"a limit on {part} has no effect where the bundled corpus gives none; raise its count")


def _check_fields(preset: str, fields: FieldMap | None) -> None:
    if preset == "custom" and fields is None:
        raise ValueError("preset: custom needs fields (prompt and response at least)")
    if preset != "custom" and fields is not None:
        raise ValueError(f"fields has no effect with preset: {preset}; set preset: custom")


def _is_text(path: Path) -> bool:
    return path.name.endswith((".txt", ".txt.gz"))
