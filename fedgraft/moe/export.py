"""A model with slots as a folder that others can load, and the loader.

Every folder holds ``export.json`` (form, base, dtype) and one of three forms, chosen by what of the slots acts on the model:

adapter   only LoRA acts: ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT reads them
model     parts were trained in full, or the LoRA is to be merged: a whole Hugging Face folder
graft     grafts act: ``graft.json`` (what they are) and ``graft.safetensors`` (their tensors); LoRA, if any, in ``adapter/``, or
          a whole model with everything else merged in ``model/``. Those are folders of their own, so that no loader that does
          not know grafts takes one for the model.

No tensor is pickled. Several LoRAs become one of concatenated ranks: s1 B1 A1 + s2 B2 A2 = [s1 B1, s2 B2] [A1; A2].

Shape letters: E experts (1 where nothing is fused), R rank, I in features, O out features.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from fedgraft.errors import ModelError
from fedgraft.moe.base import open_base
from fedgraft.moe.graft import GRAFT, Graft, attach_grafts, grafts_of
from fedgraft.moe.hashing import hash_tensors
from fedgraft.moe.slots import frozen_names
from fedgraft.types import AdapterSpec, GraftSpec, ParamRef, Params, Slots

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer

__all__ = ["BaseReference", "Form", "frozen_hash", "largest_difference", "load_export", "write_export"]

Form = Literal["adapter", "model", "graft"]

_RECORD, _SPEC, _GRAFTS, _ADAPTER, _MODEL = "export.json", "graft.json", "graft.safetensors", "adapter", "model"
_FORMAT = 1
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_PEFT_NAME = "default"  # the adapter's name in a folder that PEFT loads without being told one


@dataclass(frozen=True, kw_only=True, slots=True)
class BaseReference:
    """The base of an export: ``model`` is its Hugging Face folder or hub name, ``dtype`` the number format it is opened in
    (``float32`` or ``bfloat16``), ``cached`` the mapped folder that ``cache_base`` gave for both.
    """

    model: str
    dtype: str
    cached: Path


# ---- writing


def write_export(
    model: nn.Module, refs: tuple[ParamRef, ...], slots: Slots, base: BaseReference, folder: Path, *, merges: bool = False
) -> Form:
    """Write a model whose slots are loaded.

    What does not act is left out: a LoRA whose B is zero, a graft whose gates are closed, and a zero graft that is added.

    Args:
        model: From ``open_base`` and ``add_slots``; it is not changed.
        refs: Its slots, as ``add_slots`` gave them.
        slots: What it was built with.
        base: What it was built over.
        folder: There already, and empty.
        merges: Write whole weights, LoRA merged into them, in the base's dtype.

    Returns:
        The form that was written.

    Raises:
        ModelError: Nothing acts: the model is the base.
    """
    layers = _lora_layers(model)
    adapters = tuple(adapter for adapter in slots.adapters if _acts(layers, adapter.name))
    grafted = tuple(index for index, graft in grafts_of(model).items() if not _is_idle(graft))
    is_whole = merges or bool(slots.full)
    if not (adapters or grafted or slots.full):
        raise ModelError("there is nothing to export: this model computes what its base computes", f"use {base.model}")
    form: Form = "graft" if grafted else "model" if is_whole else "adapter"
    below = {"graft": folder / (_MODEL if is_whole else _ADAPTER), "model": folder, "adapter": folder}[form]
    with _quietly():
        if is_whole:
            _write_model(_merge(model, refs, layers, adapters), base, below)
        elif adapters:
            _write_adapter(model, layers, adapters, base, below)
        if grafted:
            assert slots.graft is not None
            _write_grafts(model, replace(slots.graft, layers=grafted), folder)
    record = {"format": _FORMAT, "form": form, "base": base.model, "dtype": base.dtype, "is_whole": is_whole}
    (folder / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return form


def _lora_layers(model: nn.Module) -> dict[tuple[str, str], LoraLayer]:
    """PEFT's layers by what they adapt: the module's path without wrappers, and the parameter's name in it."""
    from peft.tuners.lora import LoraLayer  # peft takes seconds to import

    return {
        (_plain(path), getattr(module, "parameter_name", "weight")): module
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def _plain(name: str) -> str:
    """The name that a module or parameter has without PEFT's wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _acts(layers: Mapping[tuple[str, str], LoraLayer], adapter: str) -> bool:
    return any(bool(layer.lora_B[adapter].weight.any()) for layer in layers.values() if adapter in layer.lora_B)


def _is_idle(graft: Graft) -> bool:
    """Whether a graft leaves its block's output as it is, whatever comes in: it is shut, or adds an expert of zeros."""
    expert = [value for name, value in graft.named_parameters() if name not in ("gate_weight", "gate_bias")]
    return graft.is_closed or (graft.mode == "additive" and not any(bool(value.any()) for value in expert))


def _write_adapter(
    model: nn.Module,
    layers: Mapping[tuple[str, str], LoraLayer],
    adapters: Sequence[AdapterSpec],
    base: BaseReference,
    folder: Path,
) -> None:
    """Let PEFT itself build and save the adapter, over a base of its own, so that names and nesting are PEFT's."""
    from peft import LoraConfig, get_peft_model

    names = [adapter.name for adapter in adapters]
    targets = [key for key, layer in layers.items() if any(name in layer.lora_A for name in names)]
    is_parameter = {key: hasattr(layers[key], "parameter_name") for key in targets}
    # Those of the model with its grafts, which have a gate_up_proj as well: PEFT will be asked to adapt that model, too.
    modules = {_plain(name) for name, _ in model.named_modules()}
    parameters = {_plain(name) for name, _ in model.named_parameters()}
    rank = sum(adapter.rank for adapter in adapters)
    scale = adapters[0].alpha / adapters[0].rank
    config = LoraConfig(
        r=rank,
        lora_alpha=scale * rank if len(adapters) > 1 else adapters[0].alpha,
        lora_dropout=min(adapter.dropout for adapter in adapters),  # only for who trains it further
        target_modules=_shortest({key[0] for key in targets if not is_parameter[key]}, modules),
        target_parameters=_shortest({".".join(key) for key in targets if is_parameter[key]}, parameters) or None,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(devices=[]):  # PEFT draws start values that are overwritten below
        made = get_peft_model(open_base(base.cached), config)
    made.peft_config[_PEFT_NAME].base_model_name_or_path = base.model  # PEFT has put the mapped copy there
    for key, layer in _lora_layers(made).items():
        source = layers[key]
        num_experts = int(getattr(source, "num_experts", 1))
        scaling = layer.scaling[_PEFT_NAME]
        a_ERI, b_ORE = _views(layer, _PEFT_NAME, num_experts)
        with torch.no_grad():
            a_ERI.zero_()  # ranks of an adapter that leaves this module out stay zero
            b_ORE.zero_()
            start = 0
            for adapter in adapters:
                if adapter.name in source.lora_A:
                    ranks = slice(start, start + adapter.rank)
                    from_ERI, from_ORE = _views(source, adapter.name, num_experts)
                    a_ERI[:, ranks] = from_ERI
                    b_ORE[:, ranks] = from_ORE * (source.scaling[adapter.name] / scaling)
                start += adapter.rank
    made.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's template of a model card, which says nothing


def _views(layer: LoraLayer, adapter: str, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A as (E, R, I) and B as (O, R, E): in PEFT's fused layers A is expert by expert, B has the experts innermost."""
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    return a.view(num_experts, -1, a.shape[-1]), b.view(b.shape[0], -1, num_experts)


def _shortest(wanted: Set[str], known: Set[str]) -> list[str]:
    """The shortest endings of names that match these names and no other, as PEFT matches; full names where there are none."""
    for depth in (1, 2, 3):
        endings = sorted({".".join(name.split(".")[-depth:]) for name in wanted})
        if {name for name in known if any(f".{name}".endswith(f".{ending}") for ending in endings)} == wanted:
            return endings
    return sorted(wanted)


def _merge(
    model: nn.Module,
    refs: tuple[ParamRef, ...],
    layers: Mapping[tuple[str, str], LoraLayer],
    adapters: Sequence[AdapterSpec],
) -> Params:
    """Weights that differ from the base's, by their names in the base; sums in float32, results in the weight's dtype."""
    parameters = dict(model.named_parameters())
    full = {ref.name for ref in refs if ref.adapter is None and f".{GRAFT}." not in ref.name}
    merged = {_plain(name): parameters[name].detach() for name in full}
    with torch.no_grad():
        for (path, parameter), layer in layers.items():
            weight = getattr(layer.get_base_layer(), parameter)
            total = weight.float()
            for adapter in adapters:
                if adapter.name in layer.lora_A:
                    total = total + layer.get_delta_weight(adapter.name).float()
            merged[f"{path}.{parameter}"] = total.to(weight.dtype)
    return merged


def _write_model(merged: Params, base: BaseReference, folder: Path) -> None:
    """Write a whole model as transformers does, with tokenizer and generation config."""
    model: Any = open_base(base.cached)
    unexpected = model.load_state_dict(merged, strict=False, assign=True).unexpected_keys
    assert not unexpected, unexpected
    try:
        model.generation_config = GenerationConfig.from_pretrained(base.model)
    except OSError:
        model.generation_config = GenerationConfig.from_model_config(model.config)  # the base has none of its own
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base.cached, trust_remote_code=False).save_pretrained(folder)


def _write_grafts(model: nn.Module, spec: GraftSpec, folder: Path) -> None:
    parameters = dict(model.named_parameters())
    infixes = tuple(f".layers.{index}." for index in spec.layers)
    names = [name for name in parameters if f".{GRAFT}." in name and any(infix in name for infix in infixes)]
    save_file({name: parameters[name].detach().cpu().contiguous() for name in names}, folder / _GRAFTS)
    (folder / _SPEC).write_text(json.dumps({"format": _FORMAT, **asdict(spec)}, indent=1) + "\n", encoding="utf-8")


# ---- loading


def load_export(folder: Path | str, *, base: Path | str | None = None, device: str = "cpu") -> nn.Module:
    """Load what ``fedgraft export`` wrote, whatever its form.

    Args:
        folder: With ``export.json``.
        base: Folder or hub name of the base, where it is no longer what the export names; no effect on whole models.
        device: Where to put the model.

    Returns:
        The Hugging Face causal LM in eval mode, all of it frozen, with PEFT's LoRA layers and grafts inside where it has any.

    Raises:
        ModelError: The folder is no export or torn, or the base is missing or another one.
    """
    folder = Path(folder)
    record = _read_json(folder / _RECORD)
    form, is_whole = record.get("form"), bool(record.get("is_whole"))
    if record.get("format") != _FORMAT or form not in get_args(Form) or record.get("dtype") not in _DTYPES:
        raise ModelError(
            f"{folder / _RECORD}: expected format {_FORMAT}, a form and a dtype, got {record}",
            "load it with the version of fedgraft that wrote it",
        )
    below = folder if form != "graft" else folder / (_MODEL if is_whole else _ADAPTER)
    source = str(below) if is_whole else str(base or record["base"])
    with _quietly():
        model = _open(source, str(record["dtype"]), folder)
        if form == "graft":
            _load_grafts(model, folder)
        if not is_whole and (form == "adapter" or below.is_dir()):
            model = _load_adapter(model, below)
    return model.to(device).eval().requires_grad_(False)


def _open(source: str, dtype: str, folder: Path) -> nn.Module:
    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(
            source, dtype=_DTYPES[dtype], use_safetensors=True, trust_remote_code=False
        )
        return model
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"loading {folder}: its base {source} cannot be loaded: {str(error).strip().splitlines()[0]}",
            "put the base back, or name where it is now: load_export(folder, base=...)",
        ) from error


def _load_adapter(model: nn.Module, folder: Path) -> nn.Module:
    from peft import PeftModel

    path = folder / "adapter_model.safetensors"
    if not path.is_file():  # PEFT would go on to a pickled file
        raise ModelError(f"{folder} holds no {path.name}", "the export is not whole; write it again")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # counted below
            loaded: nn.Module = PeftModel.from_pretrained(model, folder).get_base_model()
        with safetensors.safe_open(path, "pt") as file:
            num_written = len(list(file.keys()))
        num_loaded = sum(".lora_" in name for name, _ in loaded.named_parameters())
        if num_loaded != num_written:
            raise ValueError(f"it has {num_written} tensors, and {num_loaded} are asked for")
    except (RuntimeError, ValueError, KeyError, safetensors.SafetensorError) as error:
        raise ModelError(
            f"the adapter in {folder} does not fit its base: {str(error).strip().splitlines()[0]}",
            "name the model card's base",
        ) from error
    return loaded


def _load_grafts(model: nn.Module, folder: Path) -> None:
    fields = _read_json(folder / _SPEC)
    try:
        if fields.pop("format") != _FORMAT:
            raise ValueError("another format")
        spec = GraftSpec(**{**fields, "layers": tuple(fields["layers"])})
        tensors = load_file(folder / _GRAFTS)
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
        raise ModelError(f"the grafts in {folder} cannot be read: {error}", "the export is not whole; write it again") from error
    attach_grafts(model, spec)
    parameters = {name: parameter for name, parameter in model.named_parameters() if f".{GRAFT}." in name}
    wrong = sorted(parameters.keys() ^ tensors.keys())
    wrong += sorted(name for name in parameters.keys() & tensors.keys() if parameters[name].shape != tensors[name].shape)
    if wrong:
        raise ModelError(f"the grafts in {folder} do not fit their base: {', '.join(wrong[:3])}", "name the model card's base")
    for name, parameter in parameters.items():
        parameter.data = tensors[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", "name a folder that fedgraft export wrote") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read: {error}", "the export is not whole; write it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} should hold a JSON object, not {type(value).__name__}", "write the export again")
    return value


# ---- checking


def frozen_hash(model: nn.Module, refs: tuple[ParamRef, ...]) -> str:
    """SHA-256 over name, shape and bytes of every tensor that is no slot, as an engine's ``frozen_hash`` gives it."""
    parameters = dict(model.named_parameters())
    return hash_tensors((name, parameters[name]) for name in frozen_names(model, refs))


def largest_difference(model: nn.Module, other: nn.Module, num_tokens: int = 32) -> tuple[float, float]:
    """Run two models over the same ``num_tokens`` tokens; give the largest difference of their logits, and the largest logit."""
    size = int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(size, (1, num_tokens), generator=generator)
    with torch.inference_mode():
        logits, others = (each(input_ids=ids, use_cache=False).logits.float() for each in (model, other))
    return float((logits - others).abs().max()), float(logits.abs().max())


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars, DeepSpeed's remark on the missing GPU, and what PEFT and transformers tell each other."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    was_shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            # PEFT asks a model for this when it wraps it, and the answer is the same.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
            yield
    finally:
        if was_shown:
            transformers_logging.enable_progress_bar()
