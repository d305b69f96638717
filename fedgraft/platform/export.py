"""From a run folder to a model folder: the global model, or one client's, as its last checkpoint has it.

The folder's forms, and the loader of all of them, are those of ``fedgraft.moe.export``; here the model is put together as a
replica does it (start values, then the server's tensors, then the client's own), the base is checked to be the one that the run
was trained on, and a model card says where it all came from.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedgraft.errors import CheckpointError, FedgraftError, ModelError
from fedgraft.moe.base import cache_base, open_base
from fedgraft.moe.export import BaseReference, Form, frozen_hash, largest_difference, load_export, write_export
from fedgraft.moe.families import model_facts
from fedgraft.moe.slots import add_slots, initial_params
from fedgraft.platform.bundled_model import BundledRecipe, bundled_hash
from fedgraft.platform.cache_folder import default_cache
from fedgraft.platform.checkpoint import Checkpoint, load_latest
from fedgraft.platform.config import RunConfig
from fedgraft.platform.loading import load_config
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.state_store import ClientStateStore
from fedgraft.protocols import Method
from fedgraft.registry import METHODS
from fedgraft.types import PRIVATE, ParamRef, Params, Slots

__all__ = ["Export", "export", "find_run"]

_TOLERANCE = 1e-3  # of the largest logit, in float32: merged weights differ by 1e-6 of it, a wrong model by much more
_FORMS = {
    "adapter": "LoRA adapter for PEFT",
    "model": "whole Hugging Face model",
    "graft": "grafted experts beside the base's MoE layers; needs fedgraft's loader",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """What was written.

    ``form`` as in ``fedgraft.moe.export``; ``client_id`` is ``None`` for the global model; ``difference`` is the largest
    difference of logits between the run's model and the loaded folder on a few random tokens, ``largest_logit`` what to
    hold it against.
    """

    folder: Path
    form: Form
    base: str
    client_id: int | None
    round_idx: int
    difference: float
    largest_logit: float


def export(
    run: Path | str,
    *,
    client: int | None = None,
    output: Path | str | None = None,
    merge: bool = False,
    base: Path | str | None = None,
) -> Export:
    """Write the model of a run's last checkpoint as a folder that PEFT, transformers or ``load_export`` load.

    What is written is loaded again and compared with the run's model before the folder gets its name.

    Args:
        run: A run folder, or an experiment's with one run.
        client: Whose personal model; ``None``: the global one, private slots at their start.
        output: Not there yet, or empty; ``None``: ``exports/`` in the run folder.
        merge: Write whole weights, with LoRA merged into them.
        base: Where the base model is now, if no longer where the configuration says.

    Raises:
        FedgraftError: No run, no checkpoint, no such client or one that never trained, no base or another one, an output
            folder that holds something; with what to do next.
    """
    folder = find_run(Path(run))
    info = _read_info(folder)
    config, method = _read_method(folder, info)
    _check_client(folder, info, client)
    if not method.is_slots_only:
        raise FedgraftError(
            f"{folder}: a model of {method.title} is more than weights: {method.name} sets masks, gates or mixtures that neither "
            "PEFT nor transformers know",
            f"use it where it was trained: the checkpoints in {RunFolder(folder).checkpoint_folder} are safetensors",
        )
    default = folder / "exports" / (("global" if client is None else f"client-{client}") + ("-merged" if merge else ""))
    target = (default if output is None else Path(output)).absolute()
    _check_output(target)
    store = ClientStateStore(RunFolder(folder).state_folder)
    checkpoint = load_latest(RunFolder(folder).checkpoint_folder, store=store)
    if checkpoint is None:
        raise _no_checkpoint(folder, info)
    reference = _find_base(folder, config, base)
    model, refs, slots = _build(reference, method, int(info["seed"]), info)
    _load(model, refs, _personal(method, refs, checkpoint, store, folder, client))
    scratch = _make_scratch(target)
    try:
        form = write_export(model, refs, slots, reference, scratch, merges=merge)
        difference, largest = largest_difference(model, load_export(scratch, base=reference.model))
        if reference.dtype == "float32" and not difference <= _TOLERANCE * largest:
            raise ModelError(
                f"exporting {folder}: the written model's logits differ by {difference:g} (the largest is {largest:g})",
                "report this with the run's config.yaml; without --merge, or with it, the other form may do",
            )
        made = Export(
            folder=target,
            form=form,
            base=reference.model,
            client_id=client,
            round_idx=checkpoint.round_idx,
            difference=difference,
            largest_logit=largest,
        )
        (scratch / "README.md").write_text(_card(made, info, method, reference, scratch), encoding="utf-8")
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return made


def find_run(folder: Path) -> Path:
    """Give the run folder that a path means: itself, or the only run of an experiment.

    Raises:
        FedgraftError: It is neither, or the experiment has several runs; they are named.
    """
    if (folder / "run.json").is_file():
        return folder.absolute()
    runs = sorted(path.parent for path in folder.glob("*/seed-*/run.json"))
    if (folder / "comparison.json").is_file() and len(runs) == 1:
        return runs[0].absolute()
    if (folder / "comparison.json").is_file():
        names = ", ".join(str(path) for path in runs)
        hint = f"name one of them: {names}" if names else f"go on with it: fedgraft run --resume {folder}"
        raise FedgraftError(f"the experiment {folder} has {len(runs)} runs, and an export is of one", hint)
    if not folder.is_dir():
        raise FedgraftError(f"the run folder {folder} does not exist", "name a folder such as runs/NAME-DATE/LABEL/seed-0")
    known = sorted(str(path.parent) for path in folder.glob("*/comparison.json"))[-3:]
    hint = f"name one of the experiments in it: {', '.join(known)}" if known else "name runs/NAME-DATE/LABEL/seed-0"
    raise FedgraftError(f"{folder} is no run folder: it holds neither run.json nor comparison.json", hint)


# ---- what the run says


def _read_info(folder: Path) -> Mapping[str, Any]:
    try:
        info = RunFolder(folder).read_info()
    except ValueError as error:
        raise CheckpointError(f"{folder / 'run.json'} is not JSON: {error}", "the file is torn; resume the run") from error
    lacking = [key for key in ("label", "seed", "num_clients") if key not in info]
    if lacking:
        raise CheckpointError(f"{folder / 'run.json'} lacks {', '.join(lacking)}", "resume the run; it is written again")
    return info


def _read_method(folder: Path, info: Mapping[str, Any]) -> tuple[RunConfig, Method]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", "put the experiment's config.yaml there")
    config = load_config(path, checks_files=False)  # an export needs neither data nor the base's old place
    methods = config.methods()
    if info["label"] not in methods:
        raise CheckpointError(
            f"{path} has no method labelled {info['label']!r}, which run.json names; it has {', '.join(methods)}",
            "put the run's own config.yaml back",
        )
    return config, METHODS.build(methods[info["label"]])


def _check_client(folder: Path, info: Mapping[str, Any], client: int | None) -> None:
    count = int(info["num_clients"])
    if client is not None and not 0 <= client < count:
        raise FedgraftError(
            f"client {client} does not exist in {folder}: it has {count} clients", f"name one of 0 to {count - 1}"
        )
    if client is None and info.get("has_private") and not info.get("has_shared"):
        raise FedgraftError(
            f"{folder} has no global model: with {info['label']} nothing is shared", f"name a client: --client 0 to {count - 1}"
        )


def _check_output(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FedgraftError(f"the output folder {target} is there and not empty", "remove it, or name another one: --output DIR")


def _make_scratch(target: Path) -> Path:
    """A folder beside the output, so that renaming it is one step."""
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
    except OSError as error:
        raise FedgraftError(
            f"the output folder {target} cannot be made: {error}", "name one that you can write: --output DIR"
        ) from error
    return scratch


def _no_checkpoint(folder: Path, info: Mapping[str, Any]) -> CheckpointError:
    if info.get("status") == "finished" and not info.get("rounds"):
        name = info.get("model", {}).get("name", "its base")
        return CheckpointError(f"{folder} trained nothing ({info['label']} runs no round): its model is {name}", "use that")
    return CheckpointError(
        f"{folder} has no checkpoint (status: {info.get('status', 'unknown')}), and an export is of one",
        f"let the run go on: fedgraft run --resume {folder.parent.parent}; tries of learning rates keep no checkpoint",
    )


# ---- the model


def _find_base(folder: Path, config: RunConfig, moved: Path | str | None) -> BaseReference:
    """Where the base is now, as folder or hub name, and the copy of it that is mapped."""
    cache = config.output.cache or default_cache()
    if moved is not None:
        source = str(Path(moved).absolute()) if Path(moved).is_dir() else str(moved)
    elif config.model.is_bundled:
        source = str(cache / "bundled" / bundled_hash(BundledRecipe()))
    else:
        source = config.model.source
    is_folder = config.model.is_bundled or config.model.path is not None
    if moved is None and is_folder and not (Path(source) / "config.json").is_file():
        what = "the bundled model" if config.model.is_bundled else "the base model"
        hint = " (any run with the bundled model makes it again)" if config.model.is_bundled else ""
        raise ModelError(
            f"exporting {folder}: {what} is no longer in {source}", f"put it back, or say where it is now: --base FOLDER{hint}"
        )
    cached = cache_base(source, config.model.dtype, cache / "bases", trusts_remote_code=config.model.trust_remote_code)
    return BaseReference(model=source, dtype=config.model.dtype, cached=cached)


def _build(
    base: BaseReference, method: Method, seed: int, info: Mapping[str, Any]
) -> tuple[nn.Module, tuple[ParamRef, ...], Slots]:
    """The method's model with its slots at their start, over the very base that the run had."""
    model = open_base(base.cached)
    slots = method.slots(model_facts(model.config))
    refs = add_slots(model, slots)
    found, expected = frozen_hash(model, refs), info.get("frozen_hash_start", "")
    if found != expected:
        raise ModelError(
            f"the base model {base.model} is not the one that the run was trained on (hash {found[:12]}, then {expected[:12]})",
            "put the model back as it was, or say where it is now: --base FOLDER",
        )
    _load(model, refs, initial_params(model, refs, seed))
    return model, refs, slots


def _personal(
    method: Method,
    refs: tuple[ParamRef, ...],
    checkpoint: Checkpoint,
    store: ClientStateStore,
    folder: Path,
    client: int | None,
) -> Params:
    """What is loaded over the start values: the server's tensors, then the client's own."""
    known = {ref.key for ref in refs}
    params = {key: value for key, value in checkpoint.state.params.items() if key in known}
    groups = {ref.key: method.group(ref) for ref in refs}
    if client is None or not method.is_personal(groups):
        return params

    def own_of(each: int) -> Params:
        state = store.read(each, checkpoint.versions[each]) if each in checkpoint.versions else {}
        return {key: value for key, value in state.items() if groups.get(key) == PRIVATE} | method.own_values(state)

    if not (own := own_of(client)):
        trained = ", ".join(str(each) for each in sorted(checkpoint.versions) if own_of(each)) or "there is none"
        raise CheckpointError(
            f"client {client} has not trained for itself in {folder} up to round {checkpoint.round_idx}: it has no own model",
            f"name one that has: {trained}; or export the global model, without --client",
        )
    return params | own


def _load(model: nn.Module, refs: tuple[ParamRef, ...], params: Params) -> None:
    parameters = dict(model.named_parameters())
    known = {ref.key: ref for ref in refs}
    wrong = [key for key, value in params.items() if key not in known or tuple(value.shape) != known[key].shape]
    if wrong:
        raise CheckpointError(
            f"the checkpoint does not fit the method's model: {', '.join(sorted(wrong)[:3])}",
            "put back the config.yaml and the method files of the run",
        )
    with torch.no_grad():
        for key, value in params.items():
            known[key].view(parameters[known[key].name].data).copy_(value)


# ---- the card


def _card(made: Export, info: Mapping[str, Any], method: Method, base: BaseReference, written: Path) -> str:
    """README.md: front matter for the hub, where the model comes from, and code that loads it."""
    names = list(info.get("client_names") or [])
    client = made.client_id
    whose = "global model" if client is None else f"client {client}" + (f" ({names[client]})" if client < len(names) else "")
    is_shared = client is not None and not info.get("has_private")
    library = "peft" if made.form == "adapter" else "transformers"
    rows = {
        "method": f"{method.title} (`{method.name}`, label `{info['label']}`)",
        "paper": method.paper,
        "model": whose + ("; this method keeps nothing on clients, so it is the global model" if is_shared else ""),
        "run": info.get("run_id", ""),
        "seed": info["seed"],
        "round": f"{made.round_idx} of {info.get('rounds', '?')} (run: {info.get('status', 'unknown')})",
        "base": f"`{base.model}`, {base.dtype}",
        "form": _FORMS[made.form],
        "checked": f"logits differ from the run's own by at most {made.difference:.2g} (the largest is {made.largest_logit:.3g})",
        "written by": f"fedgraft {version('fedgraft')}, "
        + ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch")),
    }
    files = sorted(path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file())
    table = "\n".join(f"| {key} | {str(value).replace('|', '/')} |" for key, value in rows.items())
    return (
        f"---\nbase_model: {json.dumps(base.model)}\nlibrary_name: {library}\ntags: [fedgraft, federated-learning, moe]\n---\n\n"
        f"# {method.title}: {whose}\n\n"
        "A personalised federated fine-tuning of a Mixture-of-Experts language model, exported from a simulation.\n\n"
        f"| | |\n|---|---|\n{table}\n\n"
        f"## Load it\n\n```python\n{_snippet(made, base)}```\n\n"
        f"Files: {', '.join(files)}. `fedgraft.load_export` loads every form of export.\n"
    )


def _snippet(made: Export, base: BaseReference) -> str:
    folder, source = json.dumps(str(made.folder)), json.dumps(base.model)
    if made.form == "graft":
        return (
            "from transformers import AutoTokenizer\n\nimport fedgraft\n\n"
            f"model = fedgraft.load_export({folder})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({source})\n"
        )
    if made.form == "model":
        return (
            "import torch\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f"model = AutoModelForCausalLM.from_pretrained({folder}, dtype=torch.{base.dtype})\n"
            f"tokenizer = AutoTokenizer.from_pretrained({folder})\n"
        )
    return (
        "import torch\nfrom peft import PeftModel\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f"base = AutoModelForCausalLM.from_pretrained({source}, dtype=torch.{base.dtype})\n"
        f"model = PeftModel.from_pretrained(base, {folder})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({source})\n"
    )
