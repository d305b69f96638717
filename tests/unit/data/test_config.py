from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fedgraft.data.config import DataConfig
from fedgraft.data.loading import source_name


def test_default_is_the_bundled_corpus() -> None:
    config = DataConfig()
    assert config.is_bundled
    assert config.partition.name == "natural"


def test_a_path_given_over_a_hub_config_wins() -> None:
    hub = {"name": "databricks/databricks-dolly-15k", "config_name": "default", "preset": "dolly"}
    assert source_name(DataConfig(**hub)) == "databricks/databricks-dolly-15k (default)"
    config = DataConfig(**hub, path="/data/dolly.jsonl")
    assert not config.is_bundled
    assert source_name(config) == "/data/dolly.jsonl"


def test_home_is_expanded() -> None:
    assert DataConfig(path="~/x.jsonl").path == Path.home() / "x.jsonl"


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"name": "gsm8k", "config_name": "main", "partition": {"name": "dirichlet", "alpha": 0.1}, "num_clients": 4},
        {"path": "x.csv", "preset": "custom", "fields": {"prompt": "q", "response": "a"}, "test_fraction": 0.5},
        {"partition": {"name": "quantity", "sizes": "dirichlet", "alpha": 2.0}, "num_clients": 3},
        {"bundled": {"train_per_domain": 12}, "retention": {"path": "wiki.txt.gz", "max_examples": 5}},
    ],
)
def test_resolved_config_loads_again(data: dict[str, Any]) -> None:
    config = DataConfig.model_validate(data)
    assert DataConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "x.jsonl", "preset": "dolly", "fields": {"prompt": "a", "response": "b"}}, "fields has no effect"),
        ({"path": "x.jsonl", "preset": "custom"}, "needs fields"),
        ({"partition": {"name": "iid", "alpha": 0.5}, "num_clients": 4}, "Extra inputs"),
        ({"partition": {"name": "natural", "min_examples": 4}}, "Extra inputs"),
        ({"partition": {"name": "quantity", "alpha": 1.0}, "num_clients": 4}, "alpha has no effect"),
        ({"partition": {"name": "quantity", "sizes": "dirichlet", "sigma": 1.0}, "num_clients": 4}, "sigma has no effect"),
        ({"partition": {"name": "dirichlet"}}, "needs num_clients"),
        ({"partition": {"name": "sorted"}, "num_clients": 4}, "natural"),
        ({"config_name": "main"}, "config_name has no effect"),
        ({"label_field": "category"}, "label_field: no effect on the bundled corpus"),
        ({"max_examples": 10, "test_fraction": 0.3}, "max_examples, test_fraction: no effect"),
        ({"retention": {"preset": "dolly"}}, "no effect without path or name"),
        ({"retention": {"path": "a.txt.gz", "preset": "dolly"}}, "no effect on a text file"),
        ({"bundled": {"num_retention": 0}, "retention": {"max_examples": 4}}, "limit on retention has no effect"),
        ({"validation_fraction": 0.8, "test_fraction": 0.2}, "below 1"),
        (
            {
                "path": "x.csv",
                "preset": "custom",
                "label_field": "a",
                "fields": {"prompt": "q", "response": "a", "label": "b"},
            },
            "fields.label has no effect",
        ),
        ({"max_lenght": 10}, "Extra inputs"),
        ({"max_length": 7}, "greater than or equal to 8"),
        ({"partition": {"name": "dirichlet", "alpha": 0.0}, "num_clients": 4}, "greater than 0"),
    ],
)
def test_options_without_effect_or_out_of_range_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(data)


def test_config_is_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        DataConfig().max_length = 3  # type: ignore[misc]


def test_every_field_is_described() -> None:
    schema = DataConfig.model_json_schema()
    for model in (schema, *schema["$defs"].values()):
        for name, field in model["properties"].items():
            assert "description" in field or "const" in field, (model["title"], name)
