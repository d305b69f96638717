"""What gpu_check measures: a client's step in fedgraft's engine, and the same step in plain Hugging Face and PEFT."""

from __future__ import annotations

import math
import statistics
import warnings
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, cast

import torch
from measuring import Clock, Memory, median, timed
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig

from fedgraft.moe.families import model_facts
from fedgraft.platform.plan import flops_per_token
from fedgraft.protocols import AdapterConfig, Method, Session, TrainResult, TrainSpec
from fedgraft.registry import METHODS
from fedgraft.seeding import derive_seed
from fedgraft.training.torch_engine import TorchEngine
from fedgraft.types import IGNORE_INDEX, PRIVATE, Batch, Params

__all__ = [
    "Client",
    "PlainGraft",
    "Setting",
    "Size",
    "choose_kernel",
    "count_flops",
    "difference",
    "measure_engine",
    "measure_plain",
]

RUN_SEED = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    """A Qwen2-MoE model, and the work of one client: ``steps`` batches of ``batch`` rows of ``length`` tokens."""

    hidden: int
    layers: int
    experts: int
    top_k: int
    expert_hidden: int
    shared_hidden: int
    heads: int
    vocabulary: int
    batch: int
    length: int
    steps: int
    rank: int = 8

    @property
    def config(self) -> Qwen2MoeConfig:
        return Qwen2MoeConfig(
            hidden_size=self.hidden,
            num_hidden_layers=self.layers,
            num_experts=self.experts,
            num_experts_per_tok=self.top_k,
            moe_intermediate_size=self.expert_hidden,
            shared_expert_intermediate_size=self.shared_hidden,
            intermediate_size=self.shared_hidden,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            vocab_size=self.vocabulary,
            max_position_embeddings=max(self.length, 128),
            initializer_range=self.hidden**-0.5,  # activations of about 1 at every size; 0.022 at a width of 2048
            tie_word_embeddings=False,
            use_cache=False,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """Where and how everything runs. ``kernel`` is transformers' name of how the experts are computed."""

    size: Size
    device: torch.device
    dtype: torch.dtype
    repeats: int
    train: TrainSpec
    kernel: str = "eager"

    def model(self) -> nn.Module:
        """Make the base with random weights on the device; the same weights every time."""
        torch.manual_seed(RUN_SEED)
        with torch.device(self.device):
            model: nn.Module = AutoModelForCausalLM.from_config(self.size.config, dtype=self.dtype)
        set_kernel(model, self.kernel)
        return model.eval().requires_grad_(False)

    def engine(self, method: Method) -> TorchEngine:
        """A base with a method's slots."""
        return TorchEngine(self.model(), method.slots(model_facts(self.size.config)), RUN_SEED)

    def batches(self, purpose: str, count: int) -> list[Batch]:
        """Random tokens, on the CPU; the second half of every row is the response."""
        generator = torch.Generator().manual_seed(derive_seed(RUN_SEED, purpose))
        made = []
        for _ in range(count):
            ids = torch.randint(self.size.vocabulary, (self.size.batch, self.size.length), generator=generator)
            labels = ids.clone()
            labels[:, : self.size.length // 2] = IGNORE_INDEX
            made.append(Batch(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels))
        return made


@dataclass(kw_only=True)
class Client:
    """One client on an engine: what FLEx's ``setup`` asks of a session, and the hosting that a replica does."""

    engine: TorchEngine
    name: str
    calibration: list[Batch]
    work: list[Batch]
    shared: tuple[str, ...]
    private: Params
    diagnostics: dict[str, Any] = field(default_factory=dict)

    def setup_seed(self, purpose: str) -> int:
        return derive_seed(RUN_SEED, f"{purpose}/{self.name}")

    def calibration_batches(self, num_examples: int) -> list[Batch]:
        return self.calibration

    def host(self) -> Params:
        """Load every slot: start values, what the server sent (here the start), the client's own; gives what was sent."""
        self.engine.load(self.engine.initial)
        self.engine.load({key: self.engine.initial[key] for key in self.shared})
        self.engine.load(self.private)
        return self.engine.read(self.shared)

    def train(self, spec: TrainSpec, clock: Clock) -> tuple[float, ...]:
        """The local steps; gives the losses."""

        def after_forward(batch: Batch, output: Any) -> dict[str, torch.Tensor]:
            clock.mark("forward")
            return {}

        result: TrainResult = self.engine.train(
            clock.around(self.work),
            spec,
            (*self.shared, *self.private),
            seed=RUN_SEED,
            terms=after_forward,
            after_backward=lambda step: clock.mark("backward"),
        )
        return result.losses

    def reply(self, start: Params) -> Params:
        """Read the delta of what is sent, and what is private, as a replica does after every client."""
        trained = self.engine.read(self.shared)
        return {key: value - start[key] for key, value in trained.items()} | self.engine.read(self.private)


class PlainGraft(nn.Module):
    """A graft as anyone would write it: M(x) + sigmoid(w.x + b) down(silu(gate(x)) * up(x)), in float32 as fedgraft's."""

    def __init__(self, block: nn.Module, hidden: int, neurons: int, device: torch.device) -> None:
        super().__init__()
        self.block = block
        self.gate_up_proj = nn.Parameter(torch.zeros(2 * neurons, hidden, device=device))
        self.down_proj = nn.Parameter(torch.zeros(hidden, neurons, device=device))
        self.gate_weight = nn.Parameter(torch.zeros(hidden, device=device))
        self.gate_bias = nn.Parameter(torch.zeros((), device=device))

    def forward(self, x_BSD: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.block(x_BSD)
        wide = x_BSD.float()
        gate, up = (wide @ self.gate_up_proj.T).chunk(2, dim=-1)
        grafted = (nn.functional.silu(gate) * up) @ self.down_proj.T
        opened = torch.sigmoid(wide @ self.gate_weight + self.gate_bias)
        return (output + opened[..., None] * grafted).to(output.dtype)


def measure_engine(setting: Setting, method: Method) -> tuple[dict[str, Any], Params, Params]:
    """Measure clients of a method in fedgraft's engine.

    Returns:
        The figures, the values that client A starts from, and those that it ends with.
    """
    engine = setting.engine(method)
    keys = {kind: tuple(ref.key for ref in engine.refs if (method.group(ref) == PRIVATE) == kind) for kind in (True, False)}
    clients = {}
    setup_ms = []
    for name in ("A", "B"):
        client = Client(
            engine=engine,
            name=name,
            calibration=setting.batches(f"calibration/{name}", 1),
            work=setting.batches(f"work/{name}", setting.size.steps),
            shared=keys[False],
            private={key: engine.initial[key].clone() for key in keys[True]},
        )
        engine.load(engine.initial)
        setup_ms.append(timed(setting.device, partial(method.setup, cast(Session, client)))[1])
        clients[name] = client
    memory = Memory(setting.device)
    steps: list[dict[str, float]] = []
    hosting_ms, reply_ms, client_ms = [], [], []
    losses: list[tuple[float, ...]] = []
    end: Params = {}
    order = ["A", *("AB"[i % 2] for i in range(setting.repeats))]  # the first one warms up: memory, choice of kernels
    for number, name in enumerate(order):
        client, clock = clients[name], Clock(setting.device)
        start, hosting = timed(setting.device, client.host)
        found, training = timed(setting.device, partial(client.train, setting.train, clock))
        _, reply = timed(setting.device, partial(client.reply, start))
        if name == "A":
            losses.append(found)
            end = end or engine.read((*keys[False], *keys[True]))
        if number:
            steps += clock.steps()
            hosting_ms.append(hosting)
            reply_ms.append(reply)
            client_ms.append(hosting + training + reply)
    tokens = setting.size.batch * setting.size.length * setting.size.steps
    figures = {
        **_of_steps(setting, steps, losses[0]),
        **memory.report(),
        "setup_ms": median(setup_ms),
        "hosting_ms": median(hosting_ms),
        "reply_ms": median(reply_ms),
        "client_ms": median(client_ms),
        "client_tokens_per_s": round(1e3 * tokens / statistics.median(client_ms), 1),
        "trains_again_to_same_bits": len(set(losses)) == 1,
        "aba": _load_a_b_a(setting, clients["A"], clients["B"]),
    }
    return figures, {key: engine.initial[key] for key in keys[False]} | clients["A"].private, end


def measure_plain(setting: Setting, start: Params, *, has_graft: bool) -> tuple[dict[str, Any], Params]:
    """Measure a plain AdamW loop over Hugging Face and PEFT on client A's batches, from ``start``.

    Returns:
        The figures, and the trained values at the end under the keys of ``start``.
    """
    size, base = setting.size, cast(Any, setting.model())
    if has_graft:
        for layer in base.model.layers:
            layer.mlp = PlainGraft(layer.mlp, size.hidden, size.expert_hidden, setting.device)
    alpha, targets = AdapterConfig(rank=size.rank).alpha, ["q_proj", "k_proj", "v_proj", "o_proj"]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # PEFT asks for it
        model = get_peft_model(base, LoraConfig(r=size.rank, lora_alpha=alpha, target_modules=targets))
    parameters = dict(model.named_parameters())
    names = {key: f"base_model.model.{key}".replace(".shared.", ".default.").replace(".graft.", ".") for key in start}
    for name in names.values():
        parameters[name].requires_grad_(True)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    assert len(trained) == len(names)
    work = setting.batches("work/A", size.steps)
    memory = Memory(setting.device)
    steps: list[dict[str, float]] = []
    losses: list[float] = []
    model.train()
    for number in range(1 + setting.repeats):
        with torch.no_grad():
            for key, name in names.items():
                parameters[name].copy_(start[key].reshape(parameters[name].shape))
        optimizer = torch.optim.AdamW(trained, lr=setting.train.learning_rate, weight_decay=setting.train.weight_decay)
        clock = Clock(setting.device)
        losses = []
        for batch in clock.around(work):
            inputs = {item.name: getattr(batch, item.name).to(setting.device) for item in fields(batch)}
            optimizer.zero_grad(set_to_none=True)
            loss = model(**inputs).loss
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            torch.nn.utils.clip_grad_norm_(trained, setting.train.max_grad_norm or math.inf)
            optimizer.step()
            losses.append(float(loss.detach()))
        optimizer.zero_grad(set_to_none=True)
        if number:
            steps += clock.steps()
    end = {key: parameters[name].detach().float().cpu().reshape(start[key].shape) for key, name in names.items()}
    return {**_of_steps(setting, steps, tuple(losses)), **memory.report()}, end


def difference(start: Params, ours: Params, theirs: Params) -> dict[str, float]:
    """||a - b|| / ||a|| of what training changed, a in fedgraft and b in the plain loop, for LoRA and graft each."""
    found = {}
    for part in ("lora", "graft"):
        keys = [key for key in start if f".{part}" in key]
        apart = sum(float((ours[key] - theirs[key]).double().square().sum()) for key in keys)
        moved = sum(float((ours[key] - start[key]).double().square().sum()) for key in keys)
        if keys:
            found[part] = math.sqrt(apart / moved) if moved else math.inf
    return found


def set_kernel(model: nn.Module, kernel: str) -> None:
    """Say how transformers computes a model's experts."""
    cast(PreTrainedModel, model).set_experts_implementation(kernel)


def choose_kernel(setting: Setting) -> tuple[str, dict[str, float]]:
    """Time a training step with each way to compute the experts, ms; gives the fastest.

    ``batched_mm`` is left out: it copies the weights of every token's experts.
    """
    engine = setting.engine(METHODS.parse({"name": "fedavg"}))
    took = {}
    for kernel in ("grouped_mm", "eager"):
        set_kernel(engine.model, kernel)
        work = setting.batches("kernel", 4)
        client = Client(engine=engine, name="kernel", calibration=[], work=work, shared=tuple(engine.initial), private={})
        clock = Clock(setting.device)
        client.host()
        client.train(setting.train, clock)
        took[kernel] = round(min(step["step"] for step in clock.steps()[1:]), 3)
    return min(took, key=lambda kernel: took[kernel]), took


def count_flops(setting: Setting, start: Params) -> dict[str, int]:
    """Count the parameters that a token passes through, and the FLOPs of a training step; see the top of the file."""
    size = setting.size
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(size.config)
    head = size.vocabulary * size.hidden
    total = sum(parameter.numel() for parameter in model.parameters())
    routed = 3 * size.layers * size.experts * size.hidden * size.expert_hidden
    body = total - 2 * head - routed + routed * size.top_k // size.experts
    trained = sum(value.numel() for value in start.values())
    tokens = size.batch * size.length
    labels = sum(batch.num_label_tokens for batch in setting.batches("work/A", 1))
    flops = tokens * (flops_per_token(body, trained, is_training=True) + 6 * size.layers * size.length * size.hidden)
    flops += labels * flops_per_token(head, 0, is_training=True)
    return {"parameters": total, "active_body": body, "trained": trained, "flops_per_step": flops}


def _load_a_b_a(setting: Setting, a: Client, b: Client) -> dict[str, bool]:
    """Host A twice, train B, host A again: are A's slots and loss the same, bit for bit?"""
    batch = a.work[0]
    inputs = {item.name: getattr(batch, item.name).to(setting.device) for item in fields(batch)}

    def hosted() -> tuple[Params, float]:
        a.host()
        with torch.inference_mode():
            loss = float(cast(PreTrainedModel, a.engine.model)(**inputs).loss)
        return a.engine.read(a.engine.initial), loss

    first, second = hosted(), hosted()
    b.host()
    b.train(setting.train, Clock(setting.device))
    last = hosted()
    return {
        "device_repeats_itself": first[1] == second[1],
        "same_slots": all(torch.equal(first[0][key], last[0][key]) for key in first[0]),
        "same_loss": first[1] == last[1],
    }


def _of_steps(setting: Setting, steps: list[dict[str, float]], losses: tuple[float, ...]) -> dict[str, Any]:
    medians = {f"{part}_ms": median([step[part] for step in steps]) for part in steps[0]}
    tokens = setting.size.batch * setting.size.length
    spread = {"step_ms_min": round(min(step["step"] for step in steps), 3), "num_steps": len(steps)}
    return {"tokens_per_s": round(1e3 * tokens / medians["step_ms"], 1), **medians, **spread, "losses": list(losses)}
