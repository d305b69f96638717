"""One base, many clients: the frozen base lies once per node as a safetensors file, and every replica memory-maps it.

On disk most families keep one 2-D tensor per expert; in memory transformers holds fused 3-D ones. So the loaded state
dict is written once in the model's own layout, in a cache folder named by a hash of the checkpoint's files, the dtype and
the package versions. Mapping is private: pages are shared, an accidental write in place stays in its process.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedgraft.errors import ModelError
from fedgraft.moe.families import family_of, model_facts
from fedgraft.types import ModelFacts

__all__ = ["cache_base", "facts_of", "fingerprint_folder", "num_parameters", "open_base", "read_config"]

_WEIGHTS = "model.safetensors"
_DONE = "base.json"
_DEQUANTISED = ("fp8", "mxfp4")  # how DeepSeek-V3 and GPT-OSS are published


def cache_base(model: str, dtype: str, cache: Path, *, trusts_remote_code: bool = False) -> Path:
    """Write a checkpoint once in the layout that replicas map, or find it written.

    Args:
        model: A local Hugging Face folder, or a hub name (downloaded by transformers).
        dtype: ``float32`` or ``bfloat16``.
        cache: Folder that holds all bases of this node.
        trusts_remote_code: Whether Python code in the model's folder may run.

    Returns:
        The base's folder: weights, config, tokenizer.

    Raises:
        ModelError: The checkpoint is missing, truncated, of an unknown family, has no experts, or is quantised in a way that
            cannot be undone.
    """
    source = Path(model)
    config = read_config(model, trusts_remote_code=trusts_remote_code)
    _dequantise(config, model)
    identity = fingerprint_folder(source) if source.is_dir() else f"hub:{model}@{getattr(config, '_commit_hash', None)}"
    versions = f"{transformers.__version__}|{torch.__version__}|{safetensors.__version__}"
    digest = hashlib.sha256(f"{identity}|{dtype}|{versions}|2".encode()).hexdigest()[:16]
    folder = cache / f"{family_of(config).model_type}-{digest}"
    if (folder / _DONE).is_file():
        return folder
    if getattr(config, "quantization_config", None) is None and (odd := _integer_weights(source)):
        raise ModelError(
            f"model {model!r} holds {odd}, expected floating-point weights",
            "name a checkpoint that is not quantised, or one whose config.json says how (quantization_config)",
        )
    loaded, tokenizer = _load(model, config, dtype, trusts_remote_code=trusts_remote_code)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"the cache folder {cache} cannot be made: {error}", "set output.cache to a folder you can write"
        ) from error
    with tempfile.TemporaryDirectory(dir=cache, prefix=".writing-") as scratch:
        target = Path(scratch) / "base"
        target.mkdir()
        loaded.config.save_pretrained(target)
        tokenizer.save_pretrained(target)
        save_file(_untied_state(loaded), target / _WEIGHTS)
        (target / _DONE).write_text(json.dumps({"model": model, "dtype": dtype, "identity": identity}, indent=1))
        try:
            os.replace(target, folder)
        except OSError:
            # Another process of this node was quicker; what it wrote has the same hash.
            if not (folder / _DONE).is_file():
                raise
    return folder


def read_config(model: str, *, trusts_remote_code: bool = False) -> Any:
    """Read a model's HF config and check that it describes a MoE model that can be built; see ``cache_base`` for ``model``.

    Raises:
        ModelError: It cannot be read, its sizes make no model, the family is unknown, or it has no experts.
    """
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trusts_remote_code)
    except Exception as error:  # the file may hold anything, and each family checks its own fields in its own way
        raise ModelError(
            f"model {model!r} cannot be read: {_brief(error)}",
            "name a local Hugging Face folder (config.json, *.safetensors, tokenizer) or a hub name that you can reach",
        ) from error
    try:
        family_of(config)
        model_facts(config)
    except ModelError:
        raise
    except Exception as error:  # sizes that are no sizes: division by zero, texts, negative numbers
        raise ModelError(
            f"model {model!r} has a config.json whose sizes make no model: {_brief(error)}", "check the file"
        ) from error
    return config


def _load(model: str, config: Any, dtype: str, *, trusts_remote_code: bool) -> tuple[Any, Any]:
    """Load the whole checkpoint and its tokenizer, refusing what transformers would fill up or leave out."""
    try:
        with _without_noise():
            loaded, info = AutoModelForCausalLM.from_pretrained(
                model,
                config=config,
                dtype=getattr(torch, dtype),
                trust_remote_code=trusts_remote_code,
                output_loading_info=True,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are told below, by name
            )
    except Exception as error:  # torn files, indices that are none, and what a checkpoint's own code raises
        bad = _bad_shards(Path(model))
        raise ModelError(
            f"model {model!r} cannot be loaded: {'; '.join(bad) or _brief(error)}",
            "fetch these files again"
            if bad
            else "a shard may be missing or truncated, or the weights are not safetensors (pickled .bin files are refused)",
        ) from error
    if info["missing_keys"]:
        # transformers fills them with random numbers and goes on
        raise ModelError(f"model {model!r} lacks {', '.join(sorted(info['missing_keys'])[:3])}", "fetch the folder again")
    if info["mismatched_keys"]:
        name, found, expected = sorted(info["mismatched_keys"])[0]
        raise ModelError(
            f"model {model!r}: {len(info['mismatched_keys'])} weights have other shapes than config.json says; "
            f"{name} is {tuple(found)}, expected {tuple(expected)}",
            "weights and config.json are of different models; fetch the folder again",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trusts_remote_code)
        words = tokenizer("a b")["input_ids"]
    except Exception as error:  # as above
        raise ModelError(
            f"the tokenizer of model {model!r} cannot be loaded: {_brief(error)}",
            "the folder needs tokenizer.json and tokenizer_config.json; fetch them again",
        ) from error
    if not words:
        # transformers makes an empty one where the files are missing
        raise ModelError(f"model {model!r} has no tokenizer", "put tokenizer.json and tokenizer_config.json into the folder")
    if len(tokenizer) > config.vocab_size:
        raise ModelError(
            f"the tokenizer of model {model!r} has {len(tokenizer)} tokens, but the model {config.vocab_size} (vocab_size)",
            "use the tokenizer that the model was trained with, or give the model rows for the tokens that were added",
        )
    return loaded, tokenizer


def open_base(folder: Path, device: str = "cpu") -> nn.Module:
    """Build the model over the mapped weights, frozen and in eval mode; no copy is made on a CPU.

    Raises:
        ModelError: The file is torn, or a weight is missing from it.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    try:
        weights = load_file(folder / _WEIGHTS, device=device)
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelError(f"base {folder} cannot be read: {_brief(error)}", "delete this folder; it is written again") from error
    dtype = next(iter(weights.values())).dtype
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    missing = model.load_state_dict(weights, strict=False, assign=True).missing_keys
    model.tie_weights()  # type: ignore[operator]
    tied = model.state_dict()
    lost = [name for name in missing if tied[name].is_meta]
    if lost:
        raise ModelError(f"base {folder} lacks {', '.join(lost[:3])}", "delete this folder; it is written again")
    _rebuild_meta_buffers(model, config, device)
    model.requires_grad_(False)
    model.eval()
    return model


def _dequantise(config: Any, model: str) -> None:
    """Ask transformers to undo a checkpoint's quantisation: slots and scores need weights that can be read and trained."""
    quantisation = getattr(config, "quantization_config", None)
    if quantisation is None:
        return
    method = quantisation.get("quant_method") if isinstance(quantisation, dict) else quantisation
    if method not in _DEQUANTISED:
        raise ModelError(
            f"model {model!r} is quantised with {method!r} (quantization_config in its config.json)",
            f"name a checkpoint that is not quantised, or in one of {', '.join(_DEQUANTISED)}",
        )
    quantisation["dequantize"] = True


def facts_of(model: str, *, trusts_remote_code: bool = False) -> ModelFacts:
    """Read a model's sizes from its config alone; see ``cache_base`` for ``model`` and errors."""
    return model_facts(read_config(model, trusts_remote_code=trusts_remote_code))


def num_parameters(model: str, *, trusts_remote_code: bool = False) -> int:
    """Count a model's parameters from its config alone, tied ones once."""
    config = read_config(model, trusts_remote_code=trusts_remote_code)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(config)
    built.tie_weights()
    return sum(parameter.numel() for parameter in built.parameters())


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 over names and contents of a checkpoint's configuration, tokenizer and weight files."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in {".json", ".safetensors", ".jinja", ".model", ".txt"}:
            digest.update(path.name.encode())
            with path.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


@contextmanager
def _without_noise() -> Iterator[None]:
    """Keep transformers' bars and DeepSpeed's remark on the missing GPU out of a run's own progress display."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # what DeepSpeed, which transformers imports, finds out anyway
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()


def _untied_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with every storage once: safetensors refuses tied tensors, and tying is redone on opening."""
    seen: set[int] = set()
    state: dict[str, torch.Tensor] = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            seen.add(tensor.data_ptr())
            state[name] = tensor.contiguous()
    return state


def _rebuild_meta_buffers(model: nn.Module, config: Any, device: str) -> None:
    """Rotary tables are not in the state dict, so they are still on the meta device: build those modules again."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            rebuilt = type(module)(config=config).to(device)
            setattr(model.get_submodule(parent), child, rebuilt)


def _bad_shards(folder: Path) -> list[str]:
    """Name the weight files of a local folder that are missing or cannot be read, with the reason."""
    index = folder / "model.safetensors.index.json"
    names = {path.name for path in folder.glob("*.safetensors")} if folder.is_dir() else set()
    if index.is_file():
        try:
            names |= set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            return [f"{index.name} is no index of shards ({type(error).__name__})"]
    found = []
    for name in sorted(names):
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
            continue
        try:
            with safetensors.safe_open(folder / name, framework="pt"):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            found.append(f"{name} is truncated or no safetensors file ({_brief(error)})")
    return found


def _integer_weights(folder: Path) -> str:
    """Name a tensor of a local folder that holds no floating-point numbers, with its type; transformers would convert it."""
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        try:
            with safetensors.safe_open(path, framework="pt") as stream:
                for name in stream.keys():  # noqa: SIM118  (it is no mapping)
                    kind = stream.get_slice(name).get_dtype()
                    if not kind.startswith(("F", "BF")):
                        return f"{name} as {kind}"
        except (OSError, safetensors.SafetensorError):
            return ""  # loading says what is wrong with it
    return ""


def _brief(error: Exception) -> str:
    """An error of others on one line: their validators put the reason on the second."""
    text = " ".join(str(error).split())
    return (text if len(text) <= 300 else f"{text[:296]} ...") or type(error).__name__
