"""The embedded default model: a small Qwen2-MoE, pre-trained once on this machine and kept in the user's cache folder.

What makes it (corpus, sizes, training settings, package versions) is hashed; the hash names the folder. The folder is an
ordinary Hugging Face one, with ``pretrain.json`` beside the weights: settings, quality, time, and a SHA-256 of every other
file, by which a torn folder is known.

    <cache>/bundled/<hash>/   config.json generation_config.json model.safetensors tokenizer*.json chat_template.jinja
                              pretrain.json
    <cache>/bundled/<hash>.lock   held while one process trains; others wait for it
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2MoeConfig
from transformers.utils import logging as transformers_logging

from fedgraft.data.corpus import CLIENT_DOMAINS, GENERAL, CorpusExample, corpus_fingerprint, generate
from fedgraft.data.examples import Example
from fedgraft.data.tokenise import TokenSequence, encode_all, pad_token_id
from fedgraft.errors import ModelError
from fedgraft.seeding import derive_seed
from fedgraft.training.evaluate import score_batches
from fedgraft.training.pretrain import PretrainSpec, pretrain
from fedgraft.types import IGNORE_INDEX, Batch

__all__ = ["BundledRecipe", "ModelSizes", "bundled_hash", "bundled_hf_config", "ensure_bundled_model"]

Progress = Callable[[int, int, float], None]

_FORMAT = 1  # goes up when the code below changes what comes out of the same settings
_NOTES = "pretrain.json"
SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] }}"
    "{{ '<|end|>\n' if m['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_POOL_BATCHES = 32  # batches whose examples are sorted by length together: large enough for little padding
_HELD_OUT_SEED = 1  # pre-training draws its examples with the recipe's seed, 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Sizes of the bundled model: as large as lets eight clients fine-tune it in minutes on two cores.

    The vocabulary is small on purpose: pre-training has few words, and one that were a token of its own would be learnt by
    heart, while clients have other words, in pieces. Rows of ``hidden_size`` and ``expert_size`` float32 values are a
    multiple of 16 bytes, as PyTorch's grouped matmul needs.
    """

    vocab_size: int = 384
    hidden_size: int = 64
    num_layers: int = 3
    num_heads: int = 4
    num_experts: int = 8
    top_k: int = 2
    expert_size: int = 64
    shared_expert_size: int = 64
    max_positions: int = 256


def _default_training() -> PretrainSpec:
    return PretrainSpec(num_steps=1600, learning_rate=6e-3, warmup_steps=60, weight_decay=0.1)


@dataclass(frozen=True, kw_only=True, slots=True)
class BundledRecipe:
    """Everything that decides on the bundled model, beside corpus and package versions.

    ``examples_per_domain`` is drawn from each client domain's pre-training part, ``general_examples`` from the general
    one's (22 % against 9.8 % a client domain: it stands for what the base knows and fine-tuning may forget). With the default
    numbers every example is seen once. ``batch_size`` counts examples.

    ``num_threads`` is part of the recipe, because sums depend on it: with one, machines with few and many cores get the
    same bits. More would gain little at this size (a fast step took 34 ms with one thread and 26 ms with two on two almost
    idle cores), and threads that wait for each other were five times slower where the cores were shared.
    """

    sizes: ModelSizes = field(default_factory=ModelSizes)
    training: PretrainSpec = field(default_factory=_default_training)
    examples_per_domain: int = 5000
    general_examples: int = 11200
    batch_size: int = 32
    held_out_examples: int = 48
    num_threads: int = 1
    seed: int = 0


def bundled_hf_config(sizes: ModelSizes | None = None) -> Qwen2MoeConfig:
    """Give the configuration of the bundled model: a Qwen2-MoE as Transformers knows it, only small."""
    chosen = sizes or ModelSizes()
    return Qwen2MoeConfig(
        vocab_size=chosen.vocab_size,
        hidden_size=chosen.hidden_size,
        intermediate_size=chosen.shared_expert_size,
        num_hidden_layers=chosen.num_layers,
        num_attention_heads=chosen.num_heads,
        num_key_value_heads=chosen.num_heads,
        moe_intermediate_size=chosen.expert_size,
        shared_expert_intermediate_size=chosen.shared_expert_size,
        num_experts=chosen.num_experts,
        num_experts_per_tok=chosen.top_k,
        norm_topk_prob=True,
        max_position_embeddings=chosen.max_positions,
        tie_word_embeddings=True,
        router_aux_loss_coef=0.01,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def bundled_hash(recipe: BundledRecipe) -> str:
    """Hash everything that decides on the bundled model: 16 hex digits."""
    parts = {
        "format": _FORMAT,
        "corpus": corpus_fingerprint(),
        "recipe": asdict(recipe),
        "config": bundled_hf_config(recipe.sizes).to_dict(),
        "template": [CHAT_TEMPLATE, *SPECIAL_TOKENS],
        "versions": _versions(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def ensure_bundled_model(cache: Path, on_progress: Progress | None = None, recipe: BundledRecipe | None = None) -> Path:
    """Find the bundled model in the cache, or pre-train it (a minute and a half on two cores).

    The folder appears whole, by one rename; a torn one (a file lacks or has other bytes than were written) is made again.
    While one process trains, others that want the same model wait for it.

    Args:
        cache: E.g. ``default_cache()``; made if it is not there.
        on_progress: Called with (step from 1, number of steps, loss in nats a token), only while it trains.
        recipe: Another model than the default one; for tests.

    Returns:
        A Hugging Face folder, for AutoModelForCausalLM and AutoTokenizer.

    Raises:
        ModelError: The cache cannot be written.
    """
    chosen = recipe or BundledRecipe()
    root = cache / "bundled"
    folder = root / bundled_hash(chosen)
    if _is_whole(folder):
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(folder.with_suffix(".lock")):
            if _is_whole(folder):
                return folder
            with tempfile.TemporaryDirectory(dir=root, prefix=".writing-") as scratch:
                made = Path(scratch) / "model"
                made.mkdir()
                _make(made, chosen, on_progress)
                _publish(made, folder, Path(scratch) / "torn")
    except OSError as error:
        raise ModelError(
            f"the bundled model cannot be written to {root}: {error}",
            "make that folder writable, free space, or name another cache in $FEDGRAFT_CACHE",
        ) from error
    return folder


def _make(folder: Path, recipe: BundledRecipe, on_progress: Progress | None) -> None:
    """Train tokenizer and model, and write the whole folder, the notes last."""
    started, started_cpu = time.perf_counter(), time.process_time()
    examples = _pretraining_examples(recipe)
    tokenizer = _train_tokenizer(examples, recipe.sizes)
    sequences = _encode(tokenizer, examples, recipe.sizes.max_positions)
    config = bundled_hf_config(recipe.sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(recipe.seed, "bundled/init"))
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    batches = _batches(sequences, recipe, pad_token_id(tokenizer))
    with _threads(recipe.num_threads):
        result = pretrain(model, batches, recipe.training, on_progress)
        quality = _held_out_nll(model, tokenizer, examples, recipe)
    with _without_progress_bars():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    notes = {
        "recipe": asdict(recipe),
        "corpus_fingerprint": corpus_fingerprint(),
        "versions": _versions(),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "num_tokens": result.num_tokens,
        "final_loss": result.final_loss,
        "held_out_response_nll": quality,
        "threads": recipe.num_threads,
        "seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
        "files": _file_hashes(folder),
    }
    (folder / _NOTES).write_text(json.dumps(notes, indent=1), encoding="ascii")


def _pretraining_examples(recipe: BundledRecipe) -> list[CorpusExample]:
    counts = {**dict.fromkeys(CLIENT_DOMAINS, recipe.examples_per_domain), GENERAL: recipe.general_examples}
    return [item for domain, count in counts.items() for item in generate(domain, "pretrain", count, recipe.seed)]


def _train_tokenizer(examples: Sequence[CorpusExample], sizes: ModelSizes) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, so that numbers are read and written digit by digit."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=sizes.vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator((text for item in examples for text in (item.prompt, item.response)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=sizes.max_positions,
    )


def _encode(tokenizer: PreTrainedTokenizerFast, examples: Sequence[CorpusExample], max_length: int) -> list[TokenSequence]:
    """Tokenise as fine-tuning does, so that the base knows the very form it is fine-tuned in."""
    return encode_all(tokenizer, [Example(prompt=item.prompt, response=item.response) for item in examples], max_length)


def _batches(sequences: Sequence[TokenSequence], recipe: BundledRecipe, pad: int) -> Iterator[Batch]:
    """Yield ``num_steps`` batches: shuffled epochs, cut into pools that are sorted by length and dealt in random order."""
    rng = np.random.default_rng(derive_seed(recipe.seed, "bundled/batches"))
    lengths = np.asarray([len(item.input_ids) for item in sequences])
    size = min(recipe.batch_size, len(sequences))
    num_left = recipe.training.num_steps
    stream = np.empty(0, dtype=np.int64)
    while num_left > 0:
        count = min(_POOL_BATCHES, num_left)
        while len(stream) < count * size:
            stream = np.concatenate([stream, rng.permutation(len(sequences))])
        pool, stream = stream[: count * size], stream[count * size :]
        pool = pool[np.argsort(lengths[pool], kind="stable")].reshape(count, size)
        for row in rng.permutation(count):
            yield _pad([sequences[index] for index in pool[row]], pad)
        num_left -= count


def _pad(sequences: Sequence[TokenSequence], pad: int) -> Batch:
    ids = torch.full((len(sequences), max(len(item.input_ids) for item in sequences)), pad)
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for row, item in enumerate(sequences):
        stop = len(item.input_ids)
        ids[row, :stop] = torch.from_numpy(item.input_ids.astype(np.int64))
        mask[row, :stop] = 1
        labels[row, item.response_start : stop] = ids[row, item.response_start : stop]
    return Batch(input_ids=ids, attention_mask=mask, labels=labels)


def _held_out_nll(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, seen: Sequence[CorpusExample], recipe: BundledRecipe
) -> dict[str, float]:
    """Response NLL (nats a token) by domain on pre-training examples whose prompts were not trained on."""
    prompts = {item.prompt for item in seen}
    pad = pad_token_id(tokenizer)
    found: dict[str, float] = {}
    for domain in (*CLIENT_DOMAINS, GENERAL):
        drawn = generate(domain, "pretrain", 8 * recipe.held_out_examples, derive_seed(_HELD_OUT_SEED, "bundled/held-out"))
        fresh = [item for item in drawn if item.prompt not in prompts][: recipe.held_out_examples]
        if fresh:  # a domain can be so small that all of it was trained on
            batch = _pad(_encode(tokenizer, fresh, recipe.sizes.max_positions), pad)
            found[domain] = round(score_batches(model, [batch])["nll"].mean, 4)
    return found


def _publish(made: Path, folder: Path, torn: Path) -> None:
    """Rename the finished folder to its place; a torn one there is moved away, a whole one stays."""
    if folder.exists() and not _is_whole(folder):
        os.replace(folder, torn)
    try:
        os.replace(made, folder)
    except OSError:
        # Where locks do not work, another process may have been quicker; what it wrote has the same hash.
        if not _is_whole(folder):
            raise


def _is_whole(folder: Path) -> bool:
    """Whether all files are there with the bytes that were written."""
    try:
        files = json.loads((folder / _NOTES).read_text(encoding="ascii"))["files"]
        return bool(files) and files == _file_hashes(folder)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let PyTorch compute with this many threads meanwhile."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar of its own for one small file."""
    was_enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            transformers_logging.enable_progress_bar()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file, waiting for it; on a file system without locks go on (the rename keeps the cache right)."""
    with path.open("a") as stream:
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield  # closing the file gives the lock back, and so does the end of a killed process


def _file_hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != _NOTES
    }


def _versions() -> dict[str, str]:
    return {
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
        "tokenizers": str(tokenizers.__version__),
    }
