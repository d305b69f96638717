"""``fedgraft pretrain``: from texts to a Hugging Face folder that ``fedgraft run`` takes.

<output.folder>/
    config.json  model.safetensors  tokenizer.json ...   the model, once it is trained
    pretrain.json                                        what was done: losses, held-out loss, versions, seconds
    training/                                            what a resume needs; may be deleted afterwards
        config.yaml  config.json  tokenizer/  sequences.safetensors  prepared.json
        metrics.jsonl  attempt-<k>/step-<n>/
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from fedgraft.data.tokenise import pad_token_id
from fedgraft.errors import CheckpointError, ClusterError, ConfigError, FedgraftError, Problem, RunInterrupted
from fedgraft.moe.base import num_parameters
from fedgraft.platform.config import ExecutorConfig
from fedgraft.platform.launch import cluster
from fedgraft.platform.pretraining.config import PretrainConfig, build_hf_config
from fedgraft.platform.pretraining.job import PretrainJob
from fedgraft.platform.pretraining.loading import dump_pretrain_config, load_pretrain_config
from fedgraft.platform.pretraining.ray_train import JobResult, check_resources, newest_checkpoint, read_metrics, run_job
from fedgraft.platform.pretraining.sequences import Sequences, document_texts, pack, read_documents
from fedgraft.platform.pretraining.tokenizer import take_tokenizer, train_tokenizer
from fedgraft.platform.progress import Event
from fedgraft.platform.run_folder import write_json
from fedgraft.platform.run_record import package_versions

__all__ = ["PretrainOutcome", "pretrain_model", "pretrain_table"]

_RECORD = "pretrain.json"


@dataclass(frozen=True, slots=True)
class PretrainOutcome:
    """A finished pre-training: the model's folder and what ``pretrain.json`` in it says."""

    folder: Path
    record: dict[str, Any]


def pretrain_model(
    config: PretrainConfig | None = None,
    *,
    resume: Path | str | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> PretrainOutcome:
    """Make a base model from text, or go on with one that was stopped or killed.

    Args:
        config: As ``load_pretrain_config`` gives it; ``None`` only with ``resume``.
        resume: Output folder of a pre-training that is not finished.
        on_event: Gets events, in this process.

    Returns:
        Folder and record. A finished one is not trained again.

    Raises:
        FedgraftError: With what to do next. Nothing is written where the configuration or the texts are wrong.
    """
    notify = on_event or (lambda event: None)
    if resume is not None:
        folder = Path(resume).resolve()
        config = _config_of(folder)
        if (folder / _RECORD).is_file():
            return PretrainOutcome(folder, json.loads((folder / _RECORD).read_text()))
    elif config is None:
        raise FedgraftError("nothing to do: neither a config nor a folder to resume was given")
    else:
        config = config.absolute()
        folder = config.output.folder
        _refuse_used(folder)
    how = f"go on with: fedgraft pretrain --resume {folder}"
    began = time.perf_counter()
    try:
        # Texts first: what is wrong with them shows before Ray starts.
        made = None if (folder / "training" / "prepared.json").is_file() else _prepare(config, notify)
        notify(Event(kind="stage", data={"text": "starting Ray"}))
        with cluster(ExecutorConfig(address=config.workers.address)):
            check_resources(config.workers)
            if made is not None:
                made.write(folder, config)
            result = _train(folder, config, notify)
        if not result.is_finished:
            raise RunInterrupted(f"pre-training stopped after step {result.step} of {config.training.steps}", how)
    except KeyboardInterrupt:
        if not (folder / "training" / "prepared.json").is_file():
            raise
        raise RunInterrupted("pre-training stopped at once", how) from None
    except ClusterError as error:
        is_begun = (folder / "training" / "prepared.json").is_file()
        raise ClusterError(error.message, f"{error.hint}; {how}" if is_begun else error.hint) from error
    record = _publish(folder, config, result, time.perf_counter() - began)
    notify(Event(kind="done", data={"folder": str(folder)}))
    return PretrainOutcome(folder, record)


def pretrain_table(outcome: PretrainOutcome) -> Table:
    """Summarise a pre-training for the terminal."""
    record = outcome.record
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    rows = {
        "model": f"{record['family']}, {record['num_parameters']:,} parameters, vocabulary {record['vocab_size']}",
        "texts": f"{record['num_documents']:,} documents, {record['num_train_sequences']:,} sequences of "
        f"{record['sequence_length']} tokens",
        "training": f"{record['steps']} steps, {record['num_tokens']:,} tokens, {record['training_seconds']:.0f} s",
        "loss": f"{record['losses'][0]:.3f} at first, {record['final_loss']:.3f} at last (nats a token)",
        "held out": f"{record['held_out_nll']:.3f} nats a token" if record["held_out_nll"] is not None else "nothing",
        "use it": f"fedgraft run model.path={outcome.folder}",
    }
    for name, text in rows.items():
        table.add_row(Text(name, style="bold"), Text(text, overflow="fold"))
    return table


@dataclass(frozen=True, slots=True)
class _Prepared:
    """Tokenizer, configuration and sequences, in memory."""

    tokenizer: Any
    hf_config: Any
    sequences: Sequences
    num_documents: int

    def write(self, folder: Path, config: PretrainConfig) -> None:
        """Write what workers and a resume read; ``prepared.json`` last."""
        at = folder / "training"
        at.mkdir(parents=True, exist_ok=True)
        (at / "config.yaml").write_text(dump_pretrain_config(config))
        self.hf_config.save_pretrained(at)
        self.tokenizer.save_pretrained(at / "tokenizer")
        self.sequences.save(at / "sequences.safetensors")
        facts = {
            "num_documents": self.num_documents,
            "num_train_sequences": self.sequences.num_train,
            "num_held_out_sequences": len(self.sequences.rows) - self.sequences.num_train,
            "sequence_length": self.sequences.length,
            "vocab_size": len(self.tokenizer),
        }
        write_json(facts, at / "prepared.json")


def _prepare(config: PretrainConfig, notify: Callable[[Event], None]) -> _Prepared:
    notify(Event(kind="stage", data={"text": "reading texts"}))
    documents = read_documents(config.data, config.seed)
    notify(Event(kind="stage", data={"text": f"tokenising {len(documents)} texts"}))
    if config.tokenizer.path is not None:
        tokenizer = take_tokenizer(config.tokenizer.path)
    else:
        longest = int(build_hf_config(config.model, vocab_size=1).max_position_embeddings)
        tokenizer = train_tokenizer(document_texts(documents), config.tokenizer.vocab_size, longest)
    sequences = pack(
        documents,
        tokenizer,
        length=config.training.sequence_length,
        held_out_fraction=config.data.held_out_fraction,
        seed=config.seed,
    )
    hf_config = build_hf_config(
        config.model,
        vocab_size=len(tokenizer),
        pad_token_id=pad_token_id(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    hf_config.router_aux_loss_coef = config.training.router_aux_weight
    return _Prepared(tokenizer, hf_config, sequences, len(documents))


def _train(folder: Path, config: PretrainConfig, notify: Callable[[Event], None]) -> JobResult:
    at = folder / "training"
    target = at / "model"
    shutil.rmtree(target, ignore_errors=True)
    found = newest_checkpoint(
        at,
        world_size=config.workers.count,
        zero_stage=config.training.zero_stage,
        on_refused=lambda text: notify(Event(kind="note", data={"text": f"passed over: {text}"})),
    )
    if found is not None:
        notify(Event(kind="note", data={"text": f"going on after step {found[0]} of {config.training.steps}"}))
    notify(Event(kind="stage", data={"text": f"training with {config.workers.count} workers"}))

    def on_step(row: dict[str, Any]) -> None:
        notify(Event(kind="pretrain", data={"step": row["step"], "num_steps": config.training.steps, "loss": row["loss"]}))

    stop = threading.Event()
    with _first_interrupt(stop, notify):
        return run_job(
            PretrainJob(spec=config.spec(), folder=at, target=target),
            config.workers,
            folder=at,
            checkpoint_every=config.output.checkpoint_every,
            checkpoint=found[1] if found is not None else None,
            on_step=on_step,
            stop=stop,
        )


def _publish(folder: Path, config: PretrainConfig, result: JobResult, seconds: float) -> dict[str, Any]:
    """Put the model's files into the output folder, ``config.json`` after the weights and the record last."""
    at = folder / "training"
    files = sorted((at / "model").iterdir(), key=lambda path: (path.name == "config.json", path.name))
    for path in files:
        os.replace(path, folder / path.name)
    (at / "model").rmdir()
    losses = [float(row["loss"]) for row in read_metrics(at)]
    tail = losses[-max(1, len(losses) // 20) :]
    rows = read_metrics(at)
    record = {
        "family": config.model.family,
        "num_parameters": num_parameters(str(folder)),
        **json.loads((at / "prepared.json").read_text()),
        "steps": result.step,
        "num_tokens": sum(int(row["num_tokens"]) for row in rows),
        "losses": losses,
        "final_loss": sum(tail) / len(tail),
        "held_out_nll": result.metrics.get("held_out_nll"),
        "router_balance": rows[-1]["balance"] if config.training.router_aux_weight else None,
        "training_seconds": round(sum(float(row["seconds"]) for row in rows), 2),
        "seconds": round(seconds, 1),
        "workers": config.workers.count,
        "versions": package_versions() | {"tokenizers": version("tokenizers"), "safetensors": version("safetensors")},
        "config": config.model_dump(mode="json"),
        "files": {path.name: _digest(folder / path.name) for path in files},
    }
    write_json(record, folder / _RECORD)
    for path in at.glob("attempt-*"):
        shutil.rmtree(path)  # nothing goes on from here
    return record


def _config_of(folder: Path) -> PretrainConfig:
    path = folder / "training" / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{folder} holds no training/config.yaml", "name the output folder of a pre-training")
    config = load_pretrain_config(path)
    # The folder may have been moved since; it is where it is now.
    return config.model_copy(update={"output": config.output.model_copy(update={"folder": folder})})


def _refuse_used(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        is_ours = (folder / "training" / "config.yaml").is_file()
        hint = f"go on with it: fedgraft pretrain --resume {folder}; or name another" if is_ours else "name another"
        problem = Problem(path="output.folder", value=repr(str(folder)), expected="a folder that is new or empty", hint=hint)
        raise ConfigError("configuration", (problem,))


@contextmanager
def _first_interrupt(stop: threading.Event, notify: Callable[[Event], None]) -> Iterator[None]:
    """Let the first Ctrl-C ask workers to stop after their step, and the second one end at once; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def handle(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop.set()
        notify(Event(kind="note", data={"text": "stopping after this step, with a checkpoint; Ctrl-C again stops at once"}))

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
