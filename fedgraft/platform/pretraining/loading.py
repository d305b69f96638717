"""From a YAML file and overrides to a ``PretrainConfig``, by the rules of ``fedgraft.platform.loading``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fedgraft.platform.draft import apply_overrides, expanded, nearest_path, read_draft, to_yaml
from fedgraft.platform.paths import look_up, unknown_homes
from fedgraft.platform.pretraining.config import PretrainConfig
from fedgraft.platform.validation import Found, key_places, show_value, validate

__all__ = ["dump_pretrain_config", "load_pretrain_config"]

_PACKAGED = "pretrain.yaml"


def load_pretrain_config(source: Path | str | Mapping[str, Any] | None = None, overrides: Sequence[str] = ()) -> PretrainConfig:
    """Read the configuration of a pre-training, apply overrides, and check all of it, files too.

    Args:
        source: A YAML file, a mapping of the same form, or ``None`` for the packaged small example.
        overrides: ``key.path=value`` each, applied in order.

    Raises:
        ConfigError: Anything is wrong; it carries every problem with its key path.
    """
    draft = read_draft(source, _PACKAGED)
    apply_overrides(draft, overrides)
    config, found = validate(PretrainConfig, draft.tree, (), key_places(PretrainConfig))
    draft.found += found
    if config is not None:
        for section in ("data", "tokenizer"):
            given = getattr(config, section).path
            if given is not None and look_up(given).kind not in ("file", "folder"):
                shown, hint = show_value(str(given)), nearest_path(given)
                draft.found.append(Found(path=(section, "path"), value=shown, expected="a file or folder that exists", hint=hint))
        reported = {each.path for each in draft.found}
        draft.found += [each for each in unknown_homes(config) if each.path not in reported]
    if draft.found or config is None:
        raise draft.error()
    return cast(PretrainConfig, expanded(config))


def dump_pretrain_config(config: PretrainConfig) -> str:
    """Write a configuration as YAML, only what was set; ``load_pretrain_config`` of it gives an equal one."""
    return to_yaml(config.model_dump(mode="json", exclude_unset=True))
