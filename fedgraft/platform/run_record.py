"""What is known of a run before its first round, written into its folder: facts, versions, who has what, the configuration."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fedgraft.data.prepared import PreparedData
from fedgraft.errors import CheckpointError
from fedgraft.moe.base import facts_of, num_parameters
from fedgraft.platform.run_folder import RunFolder, write_json
from fedgraft.protocols import MethodConfig
from fedgraft.registry import METHODS

__all__ = ["begin_record", "describe_model", "package_versions"]

_PACKAGES = ("fedgraft", "torch", "transformers", "peft", "ray", "deepspeed", "datasets", "mlflow")


def begin_record(
    folder: Path,
    *,
    run_id: str,
    label: str,
    method: MethodConfig,
    seed: int,
    rate: float,
    model: Mapping[str, Any],
    data: PreparedData,
    config: Path,
) -> None:
    """Write ``run.json``, ``partition.json`` and ``config.yaml`` of a run that begins or goes on.

    Raises:
        CheckpointError: The run was begun on other data.
    """
    record = RunFolder(folder)
    known = record.read_info()
    before = known.get("data_fingerprint", data.fingerprint)
    if before != data.fingerprint:
        raise CheckpointError(
            f"{label} with seed {seed} was begun on other data (fingerprint {before[:12]}, now {data.fingerprint[:12]})",
            "put the data back as they were, or start a new run",
        )
    described = METHODS.build(method)
    record.write_info(
        run_id=run_id,
        label=label,
        method=method.name,
        method_title=described.title,
        seed=seed,
        status="running",
        num_clients=data.num_clients,
        client_names=list(data.client_names),
        num_choices=data.questions.num_choices if data.questions is not None else None,
        learning_rate=rate if described.num_rounds(1) or described.is_centralised else None,  # the base trains at no rate
        model=dict(model),
        versions=package_versions(),
        started_at=known.get("started_at") or datetime.now().isoformat(timespec="seconds"),
        data_fingerprint=data.fingerprint,
    )
    write_json(_partition(data), folder / "partition.json")
    shutil.copyfile(config, folder / "config.yaml")


def describe_model(source: str, *, name: str, trusts_remote_code: bool) -> dict[str, Any]:
    """Sizes of the base model for a run's record; ``source`` is its folder or hub name, ``name`` what to call it."""
    facts = facts_of(source, trusts_remote_code=trusts_remote_code)
    return {
        "name": name,
        "family": facts.family,
        "layers": list(facts.layers),
        "num_experts": facts.num_experts,
        "top_k": facts.top_k,
        "hidden_size": facts.hidden_size,
        "expert_size": facts.expert_size,
        "num_parameters": num_parameters(source, trusts_remote_code=trusts_remote_code),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that results may depend on."""
    return {name: version(name) for name in _PACKAGES}


def _partition(data: PreparedData) -> dict[str, Any]:
    table = data.partition_table()
    labels = table["labels"]
    clients = []
    for i, name in enumerate(data.client_names):
        splits = {
            split: {label: count for label, count in zip(labels, table[split][i], strict=True) if count}
            for split in ("train", "validation", "test")
        }
        clients.append({"client_id": i, "name": name, **splits})
    return {"labels": labels, "clients": clients}
