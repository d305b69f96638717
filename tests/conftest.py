"""Shared by all tests: tiny random MoE models of every family, a prepared data set of three clients, workers and rounds.

Nothing here comes from a hub, and every model has at most a few thousand parameters.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fedgraft.actors.hosting import Finished, PoolOptions
from fedgraft.actors.local import LocalPool
from fedgraft.data.config import DataConfig
from fedgraft.data.prepare import prepare
from fedgraft.moe.base import cache_base
from fedgraft.platform.config import EvaluationConfig, FederationConfig
from fedgraft.platform.rounds import RoundLoop
from fedgraft.platform.run_folder import RunFolder
from fedgraft.platform.run_job import RunJob
from fedgraft.platform.tracking import Tracker
from fedgraft.platform.worker import ClientWorker, WorkerSpec
from fedgraft.protocols import TrainSpec
from fedgraft.types import IGNORE_INDEX, Batch, Broadcast, ClientTask, ClientUpdate, Params, RoundPlan, ServerState

SPECIAL = ["<|pad|>", "<|end|>", "<|bos|>"]
VOCABULARY = len(SPECIAL) + 256


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_flush_to_disk() -> Iterator[None]:
    """A flush is for power cuts, which no test makes: whoever only kills a process finds what it had written.

    The hundreds of small runs in this process would wait for the disk twenty times each. Processes of their own flush as ever.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


# ---- models


def _tiny_config(family: str, **overrides: Any) -> Any:
    common: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    }
    latent: dict[str, Any] = {
        "num_hidden_layers": 3,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "intermediate_size": 40,
        "moe_intermediate_size": 24,
        "routed_scaling_factor": 1.5,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
    }
    special: dict[str, dict[str, Any]] = {
        "qwen2_moe": {
            "num_experts": 4,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 28,
        },
        "qwen3_moe": {
            "num_experts": 4,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "head_dim": 12,
            "mlp_only_layers": [],
        },
        "olmoe": {"num_experts": 4, "intermediate_size": 24},
        "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
        # A dense layer first, then two with experts; queries through a latent in V3 only.
        "deepseek_v2": latent | {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 2},
        "deepseek_v3": latent | {"q_lora_rank": 12, "n_group": 1, "topk_group": 1, "n_shared_experts": 1},
        "gpt_oss": {
            "num_local_experts": 4,
            "intermediate_size": 24,
            "head_dim": 8,
            "sliding_window": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4,
            },
        },
    }
    classes: dict[str, Any] = {
        "qwen2_moe": Qwen2MoeConfig,
        "qwen3_moe": Qwen3MoeConfig,
        "olmoe": OlmoeConfig,
        "mixtral": MixtralConfig,
        "deepseek_v2": DeepseekV2Config,
        "deepseek_v3": DeepseekV3Config,
        "gpt_oss": GptOssConfig,
    }
    return classes[family](**(common | special[family] | overrides))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., Any]:
    """HF config of a family; keyword arguments replace its fields."""
    return _tiny_config


def _tiny_model(family: str, *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    classes: dict[str, Any] = {
        "qwen2_moe": Qwen2MoeForCausalLM,
        "qwen3_moe": Qwen3MoeForCausalLM,
        "olmoe": OlmoeForCausalLM,
        "mixtral": MixtralForCausalLM,
        "deepseek_v2": DeepseekV2ForCausalLM,
        "deepseek_v3": DeepseekV3ForCausalLM,
        "gpt_oss": GptOssForCausalLM,
    }
    model = classes[family](_tiny_config(family, **overrides))
    # HF starts routers near zero, so that all experts are alike; here they must differ.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.3)
    made: PreTrainedModel = model.eval().requires_grad_(False)
    return made


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """A fresh random model of a family, in eval mode, frozen; ``seed`` decides the weights."""
    return _tiny_model


@pytest.fixture(scope="session")
def random_batch() -> Callable[..., Batch]:
    """A batch of random tokens, padded on the right to the longest; the second half of every row is the response."""

    def make(lengths: Sequence[int] = (9, 6, 4), seed: int = 0) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        shape = (len(lengths), max(lengths))
        input_ids, mask = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, length in enumerate(lengths):
            input_ids[row, :length] = torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=generator)
            mask[row, :length] = 1
            labels[row, length // 2 : length] = input_ids[row, length // 2 : length]
        return Batch(input_ids=input_ids, attention_mask=mask, labels=labels)

    return make


# ---- a base and data on disk


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=SPECIAL[0], eos_token=SPECIAL[1], bos_token=SPECIAL[2])


@pytest.fixture(scope="session")
def save_model(byte_tokenizer: PreTrainedTokenizerFast) -> Callable[[PreTrainedModel, Path], Path]:
    """Write a model with its tokenizer as a Hugging Face folder."""

    def save(model: PreTrainedModel, folder: Path) -> Path:
        model.save_pretrained(folder)
        byte_tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def make_base(
    save_model: Callable[[PreTrainedModel, Path], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Folder of a cached base; made once for the same arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "qwen2_moe", **overrides: Any) -> Path:
        key = repr((family, sorted(overrides.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp("base")
            model = _tiny_model(family, seed=5, **overrides)
            made[key] = cache_base(str(save_model(model, folder / "hf")), "float32", folder / "cache")
        return made[key]

    return make


@pytest.fixture(scope="session")
def data_folder(byte_tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three clients that speak of different things, of 8, 11 and 14 training examples; six general examples."""
    folder = tmp_path_factory.mktemp("data")
    words = {"colours": "red blue green white", "numbers": "one two three four", "beasts": "cat dog cow hen"}
    sizes = {"colours": 12, "numbers": 16, "beasts": 20}
    lines = []
    for label, text in words.items():
        pool = text.split()
        for i in range(sizes[label]):
            first, second = pool[i % 4], pool[(i // 4 + i) % 4]
            lines.append({"q": f"{label[:3]} {i}: {first}", "a": f"{second} {first}", "kind": label})
    general = [{"q": f"say {i}", "a": f"word {i}"} for i in range(6)]
    for name, rows in (("clients.jsonl", lines), ("general.jsonl", general)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig.model_validate(
        {
            "path": folder / "clients.jsonl",
            "preset": "custom",
            "fields": {"prompt": "q", "response": "a", "label": "kind"},
            "max_length": 32,
            "retention": {
                "path": folder / "general.jsonl",
                "preset": "custom",
                "fields": {"prompt": "q", "response": "a"},
            },
        }
    )
    prepare(config, byte_tokenizer, 0, folder / "prepared")
    return folder / "prepared"


# ---- clients and rounds


@dataclass
class Bench:
    """A worker, and a server of one line: tasks go in, replies come out, ``versions`` remembers private state."""

    worker: ClientWorker
    num_steps: int = 2
    learning_rate: float = 0.02
    versions: dict[int, int] = field(default_factory=dict)

    def task(self, client_id: int, round_idx: int, params: Params, **fields: Any) -> ClientTask:
        plan = RoundPlan(round_idx=round_idx, num_steps=self.num_steps, learning_rate=self.learning_rate)
        task = ClientTask(
            client_id=client_id,
            plan=plan,
            keys=tuple(params),
            state_version=self.versions.get(client_id),
            hashes_frozen=True,
        )
        return replace(task, **fields)

    def train(self, client_id: int, round_idx: int, params: Params, **fields: Any) -> tuple[ClientUpdate, Params]:
        """One client's task; its private state is current afterwards."""
        broadcast = Broadcast(round_idx=round_idx, params=params)
        update, tensors = self.worker.update(self.task(client_id, round_idx, params, **fields), broadcast)
        assert isinstance(update, ClientUpdate), update
        if update.state_version is not None:
            self.versions[client_id] = update.state_version
        return update, tensors

    def private(self, client_id: int, version: int | None = None) -> Params:
        """A client's stored state."""
        version = self.versions[client_id] if version is None else version
        return self.worker._store.read(client_id, version)


@pytest.fixture
def worker_spec(
    make_base: Callable[..., Path], data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., WorkerSpec]:
    """A worker of a method, with a fresh folder for private state; keyword arguments replace fields."""

    def make(method: dict[str, Any], **fields: Any) -> WorkerSpec:
        spec = WorkerSpec(
            base_folder=make_base(),
            data_folder=data_folder,
            state_folder=tmp_path_factory.mktemp("state"),
            method=method,
            method_files=(),
            run_seed=7,
            batch_size=4,
            train=TrainSpec(learning_rate=0.02),
        )
        return replace(spec, **fields)

    return make


@pytest.fixture
def make_bench(worker_spec: Callable[..., WorkerSpec]) -> Callable[..., Bench]:
    def make(method: dict[str, Any], *, num_steps: int = 2, learning_rate: float = 0.02, **fields: Any) -> Bench:
        return Bench(worker=worker_spec(method, **fields).build(), num_steps=num_steps, learning_rate=learning_rate)

    return make


class WatchingPool(LocalPool):
    """Keeps a copy of every reply with its tensors, and may run the calls of a map in reverse."""

    def __init__(self, *, in_reverse: bool = False) -> None:
        super().__init__(PoolOptions(replicas=1))
        self.in_reverse = in_reverse
        self.replies: list[tuple[ClientTask, ClientUpdate, Params]] = []

    @property
    def worker(self) -> ClientWorker:
        worker = self._hosted
        assert isinstance(worker, ClientWorker)
        return worker

    def map(self, name: str, items: Sequence[Any], shared: Any, **how: Any) -> Iterator[Finished]:
        order = list(range(len(items)))
        for index in reversed(order) if self.in_reverse else order:
            value, handle = getattr(self._hosted, name)(items[index], shared)
            if name == "update" and isinstance(value, ClientUpdate):
                copies = {key: tensor.clone() for key, tensor in handle.items()}
                self.replies.append((items[index], value, copies))
            yield Finished(index=index, value=value, handle=handle)


@dataclass
class Ran:
    """What a run left."""

    state: ServerState
    pool: WatchingPool
    job: RunJob
    events: list[Any]

    @property
    def folder(self) -> RunFolder:
        """The run's folder."""
        return RunFolder(self.job.folder)

    def rows(self, record: str) -> list[dict[str, Any]]:
        """Lines of one of the run folder's records."""
        path = self.job.folder / f"{record}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def private_files(self) -> dict[str, bytes]:
        """Every client's newest private state, as bytes."""
        root = self.job.worker.state_folder
        return {path.name: sorted(path.iterdir())[-1].read_bytes() for path in sorted(root.glob("*"))}


@pytest.fixture
def make_job(worker_spec: Callable[..., WorkerSpec], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunJob]:
    """A job of three clients and three rounds of two steps, judged by NLL after the last; fields may be replaced."""

    def make(method: dict[str, Any], *, federation: dict[str, Any] | None = None, **fields: Any) -> RunJob:
        folder = fields.pop("folder", None) or tmp_path_factory.mktemp("run")
        spec = worker_spec(method, state_folder=folder / "clients", **fields.pop("worker", {}))
        job = RunJob(
            label=str(method["name"]),
            purpose="run",
            folder=folder,
            worker=spec,
            learning_rate=0.02,
            rounds=3,
            num_clients=3,
            federation=FederationConfig(local_steps=2, batch_size=4, **(federation or {})),
            evaluation=EvaluationConfig(every=100, at_start=False, generate="never", choices="never"),
            checkpoint_every=1,
        )
        return replace(job, **fields)

    return make


@pytest.fixture(scope="session")
def run_job() -> Callable[..., Ran]:
    """Run a job to its end in this process; ``before`` may change the loop first."""

    def run(
        job: RunJob,
        *,
        in_reverse: bool = False,
        is_stopping: Callable[[], bool] = lambda: False,
        before: Callable[[RoundLoop], None] | None = None,
    ) -> Ran:
        pool = WatchingPool(in_reverse=in_reverse)
        events: list[Any] = []
        loop = RoundLoop(job, pool, tracker=Tracker(None, "", None), emit=events.append, is_stopping=is_stopping)
        if before is not None:
            before(loop)
        return Ran(state=loop.run(), pool=pool, job=job, events=events)

    return run


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Params, Params], None]:
    """Same keys, dtypes, shapes and bytes."""

    def check(found: Params, expected: Params) -> None:
        assert sorted(found) == sorted(expected)
        for key, value in expected.items():
            other = found[key]
            assert (other.dtype, other.shape) == (value.dtype, value.shape), key
            same = (
                other.contiguous().view(torch.uint8).equal(value.contiguous().view(torch.uint8))
                if value.dim()
                else other.equal(value)
            )
            assert same, f"{key} differs by up to {(other.double() - value.double()).abs().max()}"

    return check
