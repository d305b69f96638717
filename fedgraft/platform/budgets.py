"""What clients may hold and spend: the configuration's part, and how each client gets its own from the seed.

Nothing here knows a model; ``fedgraft.platform.budget_sizes`` turns bytes and FLOPs into experts.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fedgraft.errors import DataError
from fedgraft.seeding import derive_seed
from fedgraft.types import Budget

__all__ = ["BudgetsConfig", "distribution_text", "draw_budgets", "parse_bytes", "read_profile"]

Fraction = Annotated[float, Field(gt=0, le=1)]
_KINDS = ("experts_per_layer", "expert_fraction", "profile")
_OF_PROFILE = ("memory_field", "memory_share", "score_field", "flops_per_score", "round_seconds")
_UNITS = {"": 1, "b": 1, **{f"{unit}{tail}": 1024**power for power, unit in enumerate("kmgt", 1) for tail in ("", "b", "ib")}}


class BudgetsConfig(BaseModel):
    """Budgets of the clients. Exactly one way of stating them; each client draws one entry, by the run's seed and its number.

    ``memory_bytes`` and ``flops`` may stand together: entry i of both is then one kind of device. A ``profile`` is a file with
    one device a record; its defaults read the phones of the AI Benchmark ranking (``RAM`` "8GB", ``FP32_Score`` "716").
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    experts_per_layer: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="Routed experts a layer that a client may hold or train; each client draws one."
    )
    expert_fraction: tuple[Fraction, ...] | None = Field(
        None, min_length=1, description="The same as shares of a layer's experts, rounded down."
    )
    memory_bytes: tuple[Annotated[int, Field(ge=1)], ...] | None = Field(
        None, min_length=1, description="Bytes for weights, gradients and moments of what a client holds."
    )
    flops: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        None, min_length=1, description="FLOPs that a round of local training may cost a client."
    )
    profile: Path | None = Field(None, description="Device file (.jsonl, .json, .csv, also .gz; .parquet), one device a record.")
    memory_field: str = Field("RAM", description="The profile's field of memory: bytes, or text such as 8GB (GB = 2^30).")
    memory_share: float = Field(0.5, gt=0, le=1, description="Share of a device's memory that training may take: an assumption.")
    score_field: str = Field("FP32_Score", description="The profile's field of speed.")
    flops_per_score: float | None = Field(
        None, gt=0, description="FLOPs a second of one point of the score: an assumption; null: speed does not count."
    )
    round_seconds: float = Field(60.0, gt=0, description="Time that a round of local training may take a device.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        stated = [name for name in _KINDS if getattr(self, name) is not None]
        stated += [" and ".join(name for name in ("memory_bytes", "flops") if getattr(self, name) is not None)]
        ways = [name for name in stated if name]
        if len(ways) != 1:
            found = " beside ".join(ways) or "nothing"
            raise ValueError(
                f"expected one of experts_per_layer, expert_fraction, memory_bytes and/or flops, or profile; found {found}"
            )
        if self.memory_bytes is not None and self.flops is not None and len(self.memory_bytes) != len(self.flops):
            raise ValueError("memory_bytes and flops stand for the same devices: expected lists of one length")
        return self

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        given = self.model_fields_set
        idle = [name for name in _OF_PROFILE if name in given]
        if self.profile is None and idle:
            raise ValueError(f"{', '.join(idle)} has no effect without profile; remove it")
        idle = [name for name in ("score_field", "round_seconds") if name in given]
        if self.flops_per_score is None and idle:
            raise ValueError(f"{', '.join(idle)} has no effect without flops_per_score, the speed of one point; set it")
        return self

    @property
    def needs_sizes(self) -> bool:
        """Whether experts must be worked out from bytes or FLOPs."""
        return self.experts_per_layer is None and self.expert_fraction is None

    def choices(self, num_experts: int) -> tuple[Budget, ...]:
        """The entries that clients draw from, for a model with ``num_experts`` in a layer.

        Raises:
            DataError: The profile cannot be read, or a field is missing or unreadable in it.
        """
        if self.experts_per_layer is not None:
            return tuple(Budget(experts_per_layer=count) for count in self.experts_per_layer)
        if self.expert_fraction is not None:
            # The nudge: 0.29 * 100 is a little less than 29.
            return tuple(Budget(experts_per_layer=int(share * num_experts + 1e-9)) for share in self.expert_fraction)
        if self.profile is not None:
            return read_profile(self)
        sizes = self.memory_bytes or (None,) * len(self.flops or ())
        speeds = self.flops or (None,) * len(sizes)
        return tuple(Budget(memory_bytes=size, flops=speed) for size, speed in zip(sizes, speeds, strict=True))


def draw_budgets(choices: tuple[Budget, ...], run_seed: int, num_clients: int) -> tuple[Budget, ...]:
    """Give each client one of ``choices``, each as likely, by the run's seed and the client's number alone."""
    return tuple(choices[derive_seed(run_seed, "budgets", client_id=client) % len(choices)] for client in range(num_clients))


def read_profile(config: BudgetsConfig) -> tuple[Budget, ...]:
    """Read a device file: memory times ``memory_share``, score times ``flops_per_score`` times ``round_seconds``.

    Records without a memory (or, where it counts, a score) say nothing of their device and are left out.

    Raises:
        DataError: The file cannot be read, no record has the field, or a value is no size or number.
    """
    assert config.profile is not None
    path, found = config.profile, []
    from fedgraft.data.files import read_file  # it takes pyarrow, which a machine that only trains need not have

    records = read_file(path)
    names = [config.memory_field] + ([config.score_field] if config.flops_per_score is not None else [])
    for name in names:
        if not any(record.get(name) not in (None, "") for record in records):
            fields = ", ".join(sorted({str(key) for record in records[:20] for key in record})[:20])
            option = "memory_field" if name == config.memory_field else "score_field"
            raise DataError(
                f"device profile {path} has no field {name!r}", f"set federation.budgets.{option} to one of its fields: {fields}"
            )
    for number, record in enumerate(records, 1):
        if any(record.get(name) in (None, "") for name in names):
            continue
        try:
            memory = int(parse_bytes(record[config.memory_field]) * config.memory_share)
            flops = None
            if config.flops_per_score is not None:
                flops = _positive(record[config.score_field]) * config.flops_per_score * config.round_seconds
        except ValueError as error:
            raise DataError(
                f"record {number} of device profile {path}: {error}",
                "mend the record, or name other fields in federation.budgets",
            ) from None
        found.append(Budget(memory_bytes=memory, flops=flops))
    if not found:
        raise DataError(f"no record of device profile {path} has all of {', '.join(names)}", "name other fields")
    return tuple(found)


def parse_bytes(value: Any) -> int:
    """Read a size: a number of bytes, or text with a unit, where K, M, G and T are powers of 1024 as in names of memory.

    Raises:
        ValueError: It is neither, or not above 0.
    """
    matched = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", str(value))
    unit = matched.group(2).lower() if matched else ""
    if matched is None or unit not in _UNITS or not float(matched.group(1)):
        raise ValueError(f"{value!r} is no size; expected bytes, or a number with a unit such as 8GB")
    return int(float(matched.group(1)) * _UNITS[unit])


def distribution_text(counts: Iterable[int | None]) -> str:
    """Say how many clients have which number of experts a layer, e.g. ``2 experts a layer: 5 clients, 8: 3``."""
    found = sorted(Counter(count for count in counts if count is not None).items())
    if not found:
        return "in bytes or FLOPs, which are worked out only for methods that use them"
    (first, clients), *rest = found
    return ", ".join([f"{first} experts a layer: {clients} clients", *(f"{count}: {number}" for count, number in rest)])


def _positive(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"{value!r} is no speed; expected a number above 0")
    return number
