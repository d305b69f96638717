"""FLEx: personalised federated fine-tuning of MoE language models by expert grafting.

arXiv 2506.00965 (v2, October 2025). Only non-expert weights are trained together and averaged; experts and routers stay
frozen. Once, before its first round, each client copies in every MoE layer the pretrained expert that best reconstructs the
layer's output on its own data, and trains the copy P and a graft gate g beside the frozen layer: y = M(x) + g(x) P(x). Copy
and gate never leave the client.

What is shared may be optimised as in FedAvg, FedProx, SCAFFOLD, FedAvgM, FedAdagrad, FedYogi or FedAdam (``server``), the paper's
comparison set; grafts and private gates are left alone by all of them. Their defaults are the textbook forms. The paper's set, in
the form of public federated LLM code, is ``form: average`` for FedAvgM, and ``second_moment: momentum`` with ``momentum_start:
delta`` for FedYogi and FedAdam; FedAdagrad has no momentum there, as by default here.

Stated by the paper's abstract and its reviewers: what is frozen, shared and private; one expert a layer by layer-wise
reconstruction loss, greedily for more than one; joint training. Reconstructed here, because the paper's body was not available
to us: the sigmoid form and the start (w = 0, b = -4) of the gate, the details of the loss (those of layer-wise expert pruning),
the other scores and modes, ``graft_layer_fraction`` and ``graft_neuron_fraction``, and all hyper-parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal, Self, TypeAlias, cast, get_args

import torch
from pydantic import Field, model_validator
from torch import nn

from fedgraft.aggregation.fedavgm import FedAvgMOptions
from fedgraft.aggregation.federated_optimizer import FedAvgOptions, FederatedOptimizer, Optimized
from fedgraft.aggregation.fedopt import FedAdagradOptions, FedAdamOptions, FedYogiOptions
from fedgraft.aggregation.fedprox import FedProxOptions
from fedgraft.aggregation.scaffold import ScaffoldOptions
from fedgraft.errors import MethodError
from fedgraft.moe.criteria import Importance, importance
from fedgraft.moe.expert_statistics import observe_statistics
from fedgraft.moe.families import MoELayer, moe_layers
from fedgraft.moe.graft import grafts_of
from fedgraft.moe.scoring import Criterion, ExpertScores, neuron_contributions, observe_experts
from fedgraft.moe.sharding import gathered
from fedgraft.moe.trace import visit_blocks
from fedgraft.protocols import AdapterConfig, MethodConfig, Session, TrainSpec
from fedgraft.registry import METHODS
from fedgraft.types import PRIVATE, SHARED, Batch, GraftSpec, Group, ModelFacts, ParamRef, Params, Slots

__all__ = ["Flex", "FlexConfig", "num_grafted_layers"]


ServerChoice: TypeAlias = Annotated[
    FedAvgOptions | FedProxOptions | ScaffoldOptions | FedAvgMOptions | FedAdagradOptions | FedYogiOptions | FedAdamOptions,
    Field(discriminator="name"),
]


class FlexConfig(MethodConfig):
    """Options of FLEx."""

    name: Literal["flex"] = "flex"
    adapter: AdapterConfig = Field(AdapterConfig(), description="The averaged LoRA on attention.")
    n_graft: int = Field(1, ge=1, le=8, description="Grafted experts in a layer.")
    graft_layer_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of MoE layers that get a graft, lowest relative loss first; at least one."
    )
    graft_neuron_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of an expert's neurons that is grafted, largest contribution first."
    )
    score: Criterion | Importance | Literal["random"] = Field(
        "recon",
        description="How the expert to graft is chosen: lowest loss (recon and its forms), highest importance (usage, frequency, "
        "gate, ean, reap, easy_ep, wanda, max_activation), or random.",
    )
    granularity: Literal["expert", "neuron"] = Field(
        "expert", description="neuron: graft the layer's largest neurons, whichever expert they are in."
    )
    graft_init: Literal["copy", "random"] = Field("copy", description="random: a fresh expert of the same size.")
    mode: Literal["additive", "convex", "row"] = Field("additive", description="How graft and layer are mixed.")
    gate_bias: float = Field(-4.0, ge=-20, le=20, description="Start of the graft gate's bias; sigmoid(-4) = 0.018.")
    gate_closed: bool = Field(False, description="Keep every graft gate at exactly 0: then this is FedAvg.")
    graft_lr_scale: float = Field(1.0, gt=0, le=1000, description="The graft's learning rate over the shared one's.")
    gate_lr_scale: float = Field(1.0, gt=0, le=1000, description="The graft gate's learning rate over the shared one's.")
    persist_optimizer: bool = Field(False, description="Keep the optimiser's moments of graft and gate between rounds.")
    share_gate: bool = Field(False, description="Ablation: average the graft gates over the clients.")
    server: ServerChoice = Field(
        FedAvgOptions(), description="How what is shared is optimised over the clients, by name, with that method's own options."
    )
    calibration_examples: int = Field(128, ge=1, le=65_536, description="Own training examples that choose the graft.")

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Self:
        given = self.model_fields_set
        if self.granularity == "neuron" and "score" in given:
            raise ValueError("score has no effect with granularity: neuron, which ranks neurons; remove one of the two")
        if self.granularity == "neuron" and self.graft_init == "random":
            raise ValueError("granularity: neuron has no effect with graft_init: random")
        if self.graft_init == "random" and "score" in given and self.graft_layer_fraction == 1:
            raise ValueError("score has no effect with graft_init: random, which copies no expert")
        idle = sorted({"gate_bias", "mode", "graft_lr_scale", "gate_lr_scale", "persist_optimizer"} & given)
        if self.gate_closed and idle:
            raise ValueError(f"{', '.join(idle)} has no effect with gate_closed: true; remove it")
        if self.share_gate and (self.graft_layer_fraction < 1 or self.gate_closed):
            raise ValueError("share_gate needs an open gate in every layer of every client: set graft_layer_fraction to 1")
        return self


@METHODS.add
class Flex(Optimized):
    """LoRA on attention is averaged; each client's grafts and graft gates stay with it."""

    name = "flex"
    title = "FLEx"
    paper = "arXiv 2506.00965 (2025)"
    summary = "average attention LoRA; each client grafts a trained copy of its best pretrained expert beside every MoE layer"
    advice = (
        "For clients with tasks of their own that must not send, or spoil, pretrained experts. Compare with ``score: "
        "random`` and with ``private_lora``, which tell how much of a gain is the chosen expert's."
    )
    reconstructed = (
        "gate form and start, details of the reconstruction loss, other scores and modes, layer and neuron fractions, "
        "hyper-parameters (the paper's body was not available)"
    )
    config_class = FlexConfig
    config: FlexConfig

    def __init__(self, config: FlexConfig) -> None:
        super().__init__(config)
        self.needs_whole_model = METHODS.get(config.server.name).needs_whole_model  # the optimiser decides

    @property
    def optimizer(self) -> FederatedOptimizer:
        """The one of ``server``; it sees what clients receive, which no private slot is."""
        return self.config.server.build()

    def slots(self, facts: ModelFacts) -> Slots:
        """The averaged LoRA, and grafts beside every MoE layer; layers that a client leaves out keep a closed gate.

        Raises:
            MethodError: More grafts are asked for than a layer has experts.
        """
        config = self.config
        if config.n_graft > facts.num_experts:
            raise MethodError(
                f"n_graft is {config.n_graft}, but this model has {facts.num_experts} experts in a layer",
                f"set n_graft to {facts.num_experts} or less",
            )
        neurons = max(1, round(config.graft_neuron_fraction * facts.expert_size))
        graft = GraftSpec(
            num_grafts=config.n_graft,
            layers=facts.layers,
            num_neurons=neurons,
            mode=config.mode,
            gate_bias=config.gate_bias,
            is_gate_closed=config.gate_closed,
        )
        return Slots(adapters=(config.adapter.spec("shared", "attention"),), graft=graft)

    def group(self, ref: ParamRef) -> Group:
        """Grafts and gates are private; only the LoRA is shared."""
        if ref.part == "graft":
            return PRIVATE
        if ref.part == "graft_gate":
            return SHARED if self.config.share_gate else PRIVATE
        return SHARED

    def lr_scale(self, ref: ParamRef) -> float:
        """Graft and gate may learn at rates of their own."""
        return {"graft": self.config.graft_lr_scale, "graft_gate": self.config.gate_lr_scale}.get(ref.part, 1.0)

    def persists_moments(self, ref: ParamRef) -> bool:
        """Graft and gate keep their moments if asked to."""
        return self.config.persist_optimizer and self.group(ref) == PRIVATE

    def check_training(self, spec: TrainSpec) -> None:
        """Kept moments need an optimiser that has some."""
        super().check_training(spec)
        if spec.optimizer == "sgd" and self.config.persist_optimizer:
            raise ValueError("persist_optimizer has no effect with training.optimizer: sgd")

    def setup(self, session: Session) -> None:
        """Choose the experts on the client's own examples and copy them into its graft."""
        config = self.config
        model = session.engine.model
        layers = moe_layers(model)
        batches = session.calibration_batches(config.calibration_examples)
        scores, chosen, losses = self._choose(session, layers, batches)
        kept = self._layers_to_graft(scores, losses, len(layers))
        contributions = neuron_contributions(model, batches) if self._ranks_neurons() else {}
        for layer in layers:
            prefix = f"{layer.block_path}.graft."
            if layer.index not in kept:
                bias = session.private[f"{prefix}gate_bias"]
                session.private[f"{prefix}gate_bias"] = torch.full_like(bias, float("-inf"))
                continue
            with gathered(layer.experts.parameters()):
                copied = self._copy(session, layer, chosen[layer.index], contributions.get(layer.index))
            session.private.update({f"{prefix}{name}": value for name, value in copied.items()})
        # Neurons of many experts, or a fresh one, are nobody's copy; the loss then only says which layers come first.
        experts = [list(chosen[layer.index]) if layer.index in kept else [] for layer in layers]
        is_copy = config.granularity == "expert" and config.graft_init == "copy"
        session.diagnostics["graft_choice"] = ({"experts": experts} if is_copy else {}) | {
            "layers": [layer.index for layer in layers],
            "is_grafted": [layer.index in kept for layer in layers],
            "loss": [losses[layer.index] for layer in layers],
            "zero_loss": [scores.layers[layer.index].zero_loss for layer in layers],
            "rank_correlation_with_usage": [_rank_correlation(scores, layer.index) for layer in layers],
        }

    def observe(self, session: Session) -> Mapping[str, object]:
        """Mean opening of the graft gates by layer, on the client's own tokens and on general ones."""
        own = _mean_gate(session, session.calibration_batches(16))
        general = _mean_gate(session, session.retention_batches(16))
        return {
            "graft_gate": {
                "layers": list(own),
                "mean_open_own": list(own.values()),
                "mean_open_retention": list(general.values()),
            }
        }

    def _ranks_neurons(self) -> bool:
        return self.config.graft_init == "copy" and (self.config.granularity == "neuron" or self.config.graft_neuron_fraction < 1)

    def _choose(
        self, session: Session, layers: tuple[MoELayer, ...], batches: list[Batch]
    ) -> tuple[ExpertScores, dict[int, tuple[int, ...]], dict[int, list[float]]]:
        """Pick ``n_graft`` experts a layer: one after the other, each the best beside those already picked."""
        config = self.config
        model = session.engine.model
        first = observe_experts(model, batches)
        generator = torch.Generator().manual_seed(session.setup_seed("graft/random"))
        chosen: dict[int, tuple[int, ...]] = {layer.index: () for layer in layers}
        losses: dict[int, list[float]] = {layer.index: [] for layer in layers}
        scores = first
        importances = self._importances(model, layers, batches)
        for number in range(config.n_graft):
            if number:
                # With more than one, the reconstruction loss of a candidate is that of keeping it beside the others.
                scores = observe_experts(model, batches, kept=chosen)
            for layer in layers:
                found = scores.layers[layer.index]
                if config.score == "random":
                    ranking = torch.rand(found.loss.shape, generator=generator, dtype=torch.float64)
                elif importances:
                    ranking = -importances[layer.index]
                else:
                    ranking = found.criterion(cast(Criterion, config.score)).clone()
                ranking[list(chosen[layer.index])] = math.inf
                best = int(torch.argmin(ranking))
                losses[layer.index].append(float(found.loss[best]))
                chosen[layer.index] = (*chosen[layer.index], best)
        return first, chosen, losses

    def _importances(self, model: nn.Module, layers: tuple[MoELayer, ...], batches: list[Batch]) -> dict[int, torch.Tensor]:
        """Each expert's importance by layer, where ``score`` names one; else nothing."""
        score = self.config.score
        if score not in get_args(Importance):
            return {}
        seen = observe_statistics(model, batches)
        found: dict[int, torch.Tensor] = {}
        for layer in layers:
            with gathered(layer.experts.parameters()):
                found[layer.index] = importance(cast(Importance, score), seen[layer.index], layer)
        return found

    def _layers_to_graft(self, scores: ExpertScores, losses: dict[int, list[float]], num_layers: int) -> set[int]:
        """The layers with the lowest loss relative to putting out nothing; the lower index among equals."""
        count = num_grafted_layers(self.config.graft_layer_fraction, num_layers)
        relative = {index: losses[index][-1] / max(scores.layers[index].zero_loss, 1e-300) for index in losses}
        return set(sorted(relative, key=lambda index: (relative[index], index))[:count])

    def _copy(self, session: Session, layer: MoELayer, experts: tuple[int, ...], contributions: torch.Tensor | None) -> Params:
        """Weights of the grafts of one layer: ``gate_up_proj`` (G, 2F, D), ``down_proj`` (G, D, F), and biases where experts
        have them.
        """
        prefix = f"{layer.block_path}.graft."
        like_up, like_down = session.private[f"{prefix}gate_up_proj"], session.private[f"{prefix}down_proj"]
        if self.config.graft_init == "random":
            generator = torch.Generator().manual_seed(session.setup_seed(f"graft/init/{layer.index}"))
            ups, downs = layer.expert_weights(0)
            up = torch.randn(like_up.shape, generator=generator) * float(ups.float().std())
            down = torch.randn(like_down.shape, generator=generator) * float(downs.float().std())
            return {"gate_up_proj": up.to(like_up.dtype), "down_proj": down.to(like_down.dtype)}  # biases stay at zero
        size = like_down.shape[-1]
        copies = []
        for position, expert in enumerate(experts):
            if contributions is None:
                picks = [(expert, torch.arange(size))]
            elif self.config.granularity == "expert":
                picks = [(expert, torch.argsort(contributions[expert], descending=True, stable=True)[:size].sort().values)]
            else:
                picks = _largest_neurons(contributions, position * size, size)
            copies.append(_take_neurons(layer, picks))
        return {
            name: torch.stack([copy[name] for copy in copies]).to(session.private[f"{prefix}{name}"].dtype).cpu()
            for name in copies[0]
        }


def num_grafted_layers(fraction: float, num_layers: int) -> int:
    """How many of a model's MoE layers a client grafts: the share rounded up, at least one."""
    return max(1, math.ceil(fraction * num_layers - 1e-9))  # 0.07 * 100 is a little more than 7


def _largest_neurons(contributions_EF: torch.Tensor, start: int, count: int) -> list[tuple[int, torch.Tensor]]:
    """Neurons ranked ``start`` to ``start + count`` over all experts of a layer, grouped by expert."""
    order = torch.argsort(contributions_EF.reshape(-1), descending=True, stable=True)[start : start + count]
    width = contributions_EF.shape[1]
    grouped = [(expert, (order[order // width == expert] % width).sort().values) for expert in range(len(contributions_EF))]
    return [(expert, neurons) for expert, neurons in grouped if len(neurons)]


def _take_neurons(layer: MoELayer, picks: list[tuple[int, torch.Tensor]]) -> Params:
    """Copy single neurons of experts into one expert's layout: all gate rows, then all up rows; (2F, D) and (D, F).

    Where experts have biases, each neuron brings its own, and the output's bias is the mean of the experts' by neurons taken:
    of one expert, its own.
    """
    gates, ups, downs = [], [], []
    for expert, neurons in picks:
        gate_up, down = layer.expert_weights(expert)
        gate, up = gate_up.detach().chunk(2, dim=0)
        gates.append(gate[neurons])
        ups.append(up[neurons])
        downs.append(down.detach()[:, neurons])
    copied = {"gate_up_proj": torch.cat([*gates, *ups]), "down_proj": torch.cat(downs, dim=1)}
    if layer.family.has_expert_bias:
        copied |= _take_biases(layer, picks)
    return copied


def _take_biases(layer: MoELayer, picks: list[tuple[int, torch.Tensor]]) -> Params:
    gates, ups, outputs = [], [], []
    total = sum(len(neurons) for _, neurons in picks)
    for expert, neurons in picks:
        biases = layer.expert_biases(expert)
        assert biases is not None
        gate, up = biases[0].detach().chunk(2)
        gates.append(gate[neurons])
        ups.append(up[neurons])
        outputs.append(biases[1].detach() * (len(neurons) / total))
    return {"gate_up_proj_bias": torch.cat([*gates, *ups]), "down_proj_bias": torch.stack(outputs).sum(dim=0)}


def _rank_correlation(scores: ExpertScores, index: int) -> float | None:
    """Spearman correlation, over the experts of a layer, of low reconstruction loss with use; ``None`` if undefined."""
    layer = scores.layers[index]
    if len(set(layer.loss.tolist())) < 2 or len(set(layer.tokens.tolist())) < 2:
        return None
    from scipy.stats import spearmanr  # takes half a second to import, and only a client's setup needs it

    return float(spearmanr(-layer.loss.numpy(), layer.tokens.numpy()).statistic)


def _mean_gate(session: Session, batches: list[Batch]) -> dict[int, float]:
    """Mean of the graft gates over tokens and grafts, by layer; ``NaN`` is never given: no batches, no entry."""
    grafts = grafts_of(session.engine.model)
    sums = dict.fromkeys(grafts, 0.0)
    counts = dict.fromkeys(grafts, 0)

    def visit(layer: MoELayer, x_TD: torch.Tensor, z_TD: torch.Tensor) -> None:
        gate_TG = grafts[layer.index].gate(x_TD)
        sums[layer.index] += float(gate_TG.double().sum())
        counts[layer.index] += gate_TG.numel()

    visit_blocks(session.engine.model, batches, visit, with_grafts=True)
    return {index: sums[index] / counts[index] for index in grafts if counts[index]}
