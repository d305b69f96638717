"""What one rank of a replica takes in memory, by formula, before anything is loaded.

All ranks of a replica take about the same. The formulas follow the engines (``fedgraft.training``): ``docs/memory.md`` derives
them, says what was measured, and what they leave out (fragmentation, other processes of the machine).

Letters: s bytes of a value of the model (4 or 2), T trained values, n ranks, D model, A width of all heads, F expert hidden,
K top-k, S tokens of the longest row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from fedgraft.platform.config import RunConfig
from fedgraft.platform.model_sizes import ModelPlan, SlotSizes
from fedgraft.training.config import REDUCE_BUCKET_SIZE, EngineConfig, deepspeed_settings

__all__ = [
    "CONTEXT_BYTES",
    "DEEPSPEED_BYTES",
    "REPLICA_BYTES",
    "RankMemory",
    "evaluation_bytes",
    "is_on_gpu",
    "rank_memory",
    "training_bytes",
]

REPLICA_BYTES = 500 * 2**20
"""What a replica's process takes beside the model: PyTorch, Transformers, PEFT and Ray (measured: 350 MB, and 100 in use)."""

DEEPSPEED_BYTES = 175 * 2**20
"""What DeepSpeed adds to it (measured: 75 MB to import, 50 to 100 for its engine)."""

CONTEXT_BYTES = 600 * 2**20
"""What CUDA takes on a GPU for each process. An assumption: no machine with a GPU was at hand to measure it."""

_HEAP = 1.0  # measured: 0.6 to 1.4 with glibc's allocator, which keeps pieces of freed activations (docs/memory.md)
_WIDE = torch.float32.itemsize
_PREFETCH = 50_000_000  # DeepSpeed's default, in values


@dataclass(frozen=True, kw_only=True, slots=True)
class RankMemory:
    """Memory of one rank, bytes.

    ``shared`` is the base where all processes of a node map one copy of it; everything else is private to the rank:

    - ``weights``: the base where it is private (on a GPU; a share of it in ZeRO 3), LoRA, and parts trained in full;
    - ``graft``: grafts and graft gates; ``gradients``: of the slots;
    - ``optimizer``: moments, and with ZeRO float32 master weights and the gradients of the step;
    - ``activations``: the larger of ``training`` (what a step keeps for its backward pass) and ``evaluation``;
    - ``heap``: what a CPU process's allocator holds beyond live tensors, as much again as the activations; 0 on a GPU;
    - ``buffers``: DeepSpeed's bucket of gradients, and in ZeRO 3 the layers whose weights are together at a time;
    - ``copies``: start values of all slots, what the server sent, the client's own state; always in the host's memory;
    - ``process``: Python, PyTorch, DeepSpeed; ``context``: CUDA's own on the GPU.

    ``on_host`` names what lies in the host's memory although there is a GPU; without one all does, and it names everything.
    """

    shared: int = 0
    weights: int = 0
    graft: int = 0
    gradients: int = 0
    optimizer: int = 0
    training: int = 0
    evaluation: int = 0
    heap: int = 0
    buffers: int = 0
    copies: int = 0
    process: int = 0
    context: int = 0
    on_host: frozenset[str] = frozenset()

    @property
    def activations(self) -> int:
        """The larger of training and evaluation: one follows the other."""
        return max(self.training, self.evaluation)

    @property
    def private(self) -> int:
        """All that no other process shares."""
        return sum(getattr(self, name) for name in PARTS)

    @property
    def host(self) -> int:
        """The private part that lies in the host's memory."""
        return sum(getattr(self, name) for name in PARTS if name in self.on_host)

    @property
    def device(self) -> int:
        """The most that lies on the GPU at a time, 0 without one."""
        return self.private - self.host

    def part(self, name: str, *, on_host: bool) -> int:
        """Bytes of a component in one of the two places."""
        return getattr(self, name) if (name in self.on_host) == on_host else 0


PARTS = ("weights", "graft", "gradients", "optimizer", "activations", "heap", "buffers", "copies", "process", "context")
_ALWAYS_ON_HOST = frozenset({"copies", "process"})
assert set(PARTS) - {"activations"} < {each.name for each in fields(RankMemory)}


def is_on_gpu(config: RunConfig, num_gpus: int) -> bool:
    """Whether a replica's model lies on a GPU, where this node has ``num_gpus``."""
    if config.engine.device == "cpu":
        return False
    in_process = config.executor.kind == "in_process" and config.engine.device == "auto" and num_gpus > 0
    return config.engine.device == "cuda" or config.executor.gpus > 0 or in_process


def rank_memory(config: RunConfig, model: ModelPlan, slots: SlotSizes, *, on_gpu: bool) -> RankMemory:
    """Work out what one rank of a replica takes.

    Args:
        config: Gives engine, optimiser, batch sizes and the longest row.
        model: The base.
        slots: The method's.
        on_gpu: Where the model lies.
    """
    engine = config.engine.resolved(has_gpu=on_gpu)
    is_deepspeed = engine.name == "deepspeed"
    stage, ranks = (engine.zero_stage, engine.world_size) if is_deepspeed else (0, 1)
    zero = _zero_settings(config, engine) if is_deepspeed else {}
    s = model.itemsize
    live = s if is_deepspeed else _WIDE  # DeepSpeed casts slots to the model's format and keeps float32 masters
    gradient = live * slots.trained_wide + s * slots.trained_full
    moments = 2 if config.training.optimizer == "adamw" else 0
    weights = live * slots.lora + s * slots.full
    graft = live * slots.graft
    optimizer = moments * gradient
    buffers = shared = 0
    if stage == 3:
        weights = _share(model.weight_bytes - s * slots.full + weights, ranks)
        graft = _share(graft, ranks)
    elif on_gpu:
        weights += model.weight_bytes - s * slots.full  # a part trained in full replaces the base's
    else:
        shared = model.weight_bytes
        if engine.expert_parallel_size is not None:
            weights += _share(s * model.facts.num_routed_values, engine.expert_parallel_size)  # copied out of the shared base
    if stage >= 1:
        optimizer = _share((2 + moments) * _WIDE * slots.trained, ranks)
        buffers = _buffer_bytes(zero, model, slots, stage=stage, ranks=ranks, on_gpu=on_gpu)
        if stage >= 2:
            gradient = _share(gradient, ranks)
    elif ranks > 1:
        buffers = gradient  # they are laid side by side to be averaged
    # Clients that train in one pass have values, gradients and moments each, stacked; the model's own slots host one at a time.
    at_once = engine.clients_at_once
    assert isinstance(at_once, int), "settled before a plan is made"
    if at_once > 1:
        gradient, optimizer = at_once * gradient, at_once * optimizer
        weights, graft = weights + at_once * live * slots.lora + at_once * s * slots.full, (1 + at_once) * graft
    copies = (2 if is_deepspeed else 1) * slots.values + 2 * slots.sent + slots.private + 2 * slots.persisted
    on_host = _ALWAYS_ON_HOST | _offloaded(zero, stage) if on_gpu else frozenset(PARTS)
    training, evaluation = training_bytes(config, engine, model, slots), evaluation_bytes(config, model, slots)
    return RankMemory(
        shared=shared,
        weights=weights,
        graft=graft,
        gradients=gradient,
        optimizer=optimizer,
        training=training,
        evaluation=evaluation,
        heap=0 if on_gpu else round(_HEAP * max(training, evaluation)),
        buffers=buffers,
        copies=_WIDE * copies,
        process=REPLICA_BYTES + (DEEPSPEED_BYTES if is_deepspeed else 0),
        context=CONTEXT_BYTES if on_gpu else 0,
        on_host=frozenset(on_host),
    )


def training_bytes(config: RunConfig, engine: EngineConfig, model: ModelPlan, slots: SlotSizes) -> int:
    """Estimate what a training step keeps for its backward pass, for the rows that one rank takes at a time.

    Rows are ceil(batch / (ranks x parts)), times the clients of a pass,
    each of ``data.max_length`` tokens, all of them labels: the most there can be.
    Added to what all layers keep is the larger of the output layer and of one layer's gradients.
    """
    rows = -(-config.federation.batch_size // (engine.world_size * engine.gradient_accumulation_steps))
    assert isinstance(engine.clients_at_once, int), "settled before a plan is made"
    rows *= engine.clients_at_once
    tokens = rows * config.data.max_length
    moe, dense = _layer_bytes(model, slots, config.data.max_length)
    num_moe = len(model.facts.layers)
    kept = num_moe * moe + (model.facts.num_layers - num_moe) * dense
    logits = model.vocabulary * (2 * _WIDE + (model.itemsize if model.itemsize < _WIDE else 0))
    # A LoRA over fused experts makes whole weights of a layer anew; those are kept, too, and one layer's gradient and product.
    merged = model.itemsize * slots.merged * (num_moe + 2) // num_moe
    return tokens * (kept + max(logits, moe, dense)) + merged


def evaluation_bytes(config: RunConfig, model: ModelPlan, slots: SlotSizes) -> int:
    """Estimate the most that judging a model takes: one layer or the logits of a batch, or decoding's keys and values.

    A batch has ``evaluation.batch_size`` rows of ``data.max_length`` tokens, whatever the number of ranks. Per value of a row
    of logits: as they come (s), those of label positions in float32 (4), their sizes (4) and two truth values (2) while they
    are checked to be finite.
    """
    s, rows, length = model.itemsize, config.evaluation.batch_size, config.data.max_length
    layer = max(_layer_bytes(model, slots, length))
    logits = model.vocabulary * (s + 2 * _WIDE + 2)
    cached = 0
    if config.evaluation.generate != "never":
        cached = rows * (length + config.evaluation.max_new_tokens) * model.facts.num_layers * model.cache_size * s
    merged = 2 * s * slots.merged // len(model.facts.layers)
    return max(rows * length * max(layer, logits), rows * length * layer + cached) + merged


def _layer_bytes(model: ModelPlan, slots: SlotSizes, length: int) -> tuple[int, int]:
    """Bytes that a token leaves in an MoE layer and in one without experts, for the backward pass.

    s (4 A + 4 D + S): queries, keys, values, attention's output, two norms and two residuals, a row of the mask of a padded
    batch. In bfloat16 4 (3 D + A) + 2 D more: the LoRA's float32 inputs and the norms'. Experts s K (D + 3 F), and
    s K (D + F) more where their own weights train; shared expert or dense layer 3 s of its width; grafts in float32 16 F each,
    and 4 D each and twice more. A mixture in float32 for each of its maps, with S slots of rank R: 4 R (3 S + 1), of each slot
    its first map's output, that times its weight, and its product with the token's; 4 R more for the shared LoRA.
    """
    facts, s = model.facts, model.itemsize
    hidden, expert = facts.hidden_size, facts.expert_size
    always = s * (4 * model.attention_size + 4 * hidden + length)
    if s < _WIDE:
        always += _WIDE * (3 * hidden + model.attention_size) + 2 * hidden
    moe = s * facts.top_k * (hidden + 3 * expert) + 3 * s * model.shared_size
    if "experts" in slots.slots.full:
        moe += s * facts.top_k * (hidden + expert)
    graft = slots.slots.graft
    if graft is not None:
        moe += _WIDE * (4 * graft.num_grafts * graft.num_neurons + (graft.num_grafts + 2) * hidden)
    mixture = slots.slots.mixture
    if mixture is not None:
        maps = [each for each in facts.attention if each.name.rpartition(".")[2] in mixture.targets]
        always += _WIDE * len(maps) * mixture.rank * (3 * mixture.num_slots + 1 + mixture.has_shared)
    return always + moe, always + 3 * s * model.dense_size if model.dense_size else 0


def _buffer_bytes(zero: dict[str, Any], model: ModelPlan, slots: SlotSizes, *, stage: int, ranks: int, on_gpu: bool) -> int:
    """DeepSpeed's bucket of gradients and, in ZeRO 3, the weights that are whole at a time.

    On a GPU the bucket is taken at its full size; on a CPU memory counts only once it is written.
    """
    bucket = int(zero.get("reduce_bucket_size", REDUCE_BUCKET_SIZE))
    is_double = zero.get("overlap_comm") if zero.get("overlap_comm") is not None else stage == 3
    values = bucket * (2 if is_double and stage < 3 else 1) if on_gpu else min(bucket, slots.trained)
    whole = 0
    if stage == 3 and (ranks > 1 or _is_offloaded(zero, "offload_param")):
        ahead = int(zero.get("stage3_prefetch_bucket_size", _PREFETCH))
        whole = min(model.weight_bytes, model.itemsize * (model.largest_layer + ahead))
    return values * (_WIDE if stage == 1 else model.itemsize) + whole


def _zero_settings(config: RunConfig, engine: EngineConfig) -> dict[str, Any]:
    settings = deepspeed_settings(
        engine,
        batch_size=config.federation.batch_size,
        dtype=config.model.dtype,
        max_grad_norm=config.training.max_grad_norm,
    )
    return dict(settings["zero_optimization"])


def _offloaded(zero: dict[str, Any], stage: int) -> frozenset[str]:
    """Components that DeepSpeed keeps in the host's memory."""
    found = set()
    if stage >= 1 and _is_offloaded(zero, "offload_optimizer"):
        found.add("optimizer")
    if stage == 3 and _is_offloaded(zero, "offload_param"):
        found |= {"weights", "graft"}
    return frozenset(found)


def _is_offloaded(zero: dict[str, Any], name: str) -> bool:
    section = zero.get(name)
    return bool(section) and section.get("device", "none") != "none"  # type: ignore[union-attr]


def _share(count: int, ranks: int) -> int:
    return -(-count // ranks)
