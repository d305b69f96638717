"""The exact checks of FLEx's card, on clients that a worker really hosts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from fedgraft.aggregation.flex import FlexConfig, num_grafted_layers
from fedgraft.aggregation.private_lora import PrivateLoraConfig, matched_rank
from fedgraft.data.prepared import PreparedData
from fedgraft.errors import ConfigError, MethodError
from fedgraft.moe.base import open_base
from fedgraft.moe.families import model_facts
from fedgraft.moe.scoring import observe_experts
from fedgraft.platform.loading import load_config
from fedgraft.types import Batch, Broadcast, EvaluationTask, Params

Maker = Callable[..., Any]
FLEX = {"name": "flex", "adapter": {"rank": 2, "alpha": 4.0}}
CLIENTS = (0, 1, 2)
STEM = "model.layers.{}.mlp.graft.{}"


def flex(**options: Any) -> dict[str, Any]:
    return FLEX | options


def play(bench: Any, params: Params, cohort: tuple[int, ...], round_idx: int) -> Params:
    """One round: the server adds the weighted mean of the deltas."""
    replies = [bench.train(client, round_idx, params) for client in cohort]
    total = sum(update.num_examples for update, _ in replies)
    return {
        key: value + sum(update.num_examples / total * delta[key] for update, delta in replies) for key, value in params.items()
    }


def set_up(bench: Any, client: int = 0) -> tuple[Params, dict[str, Any]]:
    """A client's private state at step 0, and what it noted about its choice."""
    plan = replace(bench.task(client, 1, {}).plan, num_steps=0)
    params = bench.worker.initial_params()
    update, _ = bench.train(client, 1, params, plan=plan)
    return bench.private(client), update.diagnostics["graft_choice"]


def calibration(data_folder: Path, client: int) -> Batch:
    """All of a client's training examples; they are fewer than 16, so they are one batch."""
    split = PreparedData.open(data_folder).split(client, "train")
    assert len(split) <= 16
    return split.batch(range(len(split)), 0)


def seen(model: Any, batch: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Input and output of every MoE block, padding left out."""
    found = []
    kept = batch.attention_mask.reshape(-1).bool()

    def hook(module: Any, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        found.append((args[0].reshape(-1, 32)[kept], output.reshape(-1, 32)[kept]))

    handles = [layer.mlp.register_forward_hook(hook) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    for handle in handles:
        handle.remove()
    return found


def brute_loss(block: Any, x: torch.Tensor, z: torch.Tensor, kept: tuple[int, ...]) -> float:
    """||Z - M^S(X)||_F: logits of all others minus infinity, softmax, top-2, renormalised, plus the shared expert."""
    with torch.no_grad():
        logits = x @ block.gate.weight.T
        logits[:, [e for e in range(logits.shape[1]) if e not in kept]] = float("-inf")
        weights, chosen = torch.topk(torch.softmax(logits, dim=1), 2, dim=1)
        dense = torch.zeros_like(logits).scatter(1, chosen, weights / weights.sum(dim=1, keepdim=True))
        gate, up = torch.einsum("efd,td->tef", block.experts.gate_up_proj, x).chunk(2, dim=2)
        outputs = torch.einsum("edf,tef->ted", block.experts.down_proj, torch.nn.functional.silu(gate) * up)
        shared = torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
        return float((z - shared - torch.einsum("te,ted->td", dense, outputs)).double().norm())


def brute_choice(make_base: Maker, data_folder: Path, client: int, count: int = 1) -> list[tuple[int, ...]]:
    model: Any = open_base(make_base())
    choice = []
    for layer, (x, z) in zip(model.model.layers, seen(model, calibration(data_folder, client)), strict=True):
        kept: tuple[int, ...] = ()
        for _ in range(count):
            free = [e for e in range(4) if e not in kept]
            kept = (*kept, min(free, key=lambda e: brute_loss(layer.mlp, x, z, (*kept, e))))
        choice.append(kept)
    return choice


# ---- the card's exact checks


def test_1_frozen_tensors_are_the_same_bytes_on_every_client_after_three_rounds(make_bench: Maker, make_base: Maker) -> None:
    bench = make_bench(flex(gate_bias=0.0))
    start = bench.worker.describe()["frozen_hash"]
    params = bench.worker.initial_params()
    for round_idx in (1, 2, 3):
        replies = [bench.train(client, round_idx, params) for client in CLIENTS]
        assert [update.diagnostics["frozen_hash"] for update, _ in replies] == [start] * 3
        params = {key: value + replies[0][1][key] for key, value in params.items()}
    now = {name.replace(".base_layer", ""): p for name, p in bench.worker.engine.model.named_parameters()}
    for name, parameter in open_base(make_base()).named_parameters():
        assert torch.equal(now[name], parameter), name


def test_2_only_the_shared_lora_is_sent_and_its_bytes_do_not_depend_on_experts(make_bench: Maker, make_base: Maker) -> None:
    sizes = []
    for overrides in ({}, {"num_experts": 8}, {"num_experts": 8, "moe_intermediate_size": 48}):
        bench = make_bench(flex(), base_folder=make_base(**overrides))
        update, tensors = bench.train(0, 1, bench.worker.initial_params())
        keys = {info.key for info in update.payload}
        assert keys == set(tensors) == {key for key in bench.worker.engine.initial if ".lora_" in key}
        assert {info.group for info in update.payload} == {"shared"}
        assert not any("graft" in key or "experts" in key or ".gate." in key for key in keys)
        private = bench.private(0)
        assert {key.rsplit(".", 1)[1] for key in private} == {"gate_up_proj", "down_proj", "gate_weight", "gate_bias"}
        assert all(".graft." in key for key in private)
        sizes.append(sum(info.num_bytes for info in update.payload))
    # Rank 2, float32, two layers: q and o are 32 to 32, k and v 32 to 16.
    assert sizes == [4 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))] * 3


def test_3_with_its_gate_closed_flex_is_fedavg_bit_for_bit(make_job: Maker, run_job: Maker, assert_same_bits: Maker) -> None:
    closed = run_job(make_job(flex(gate_closed=True)))
    fedavg = run_job(make_job(FLEX | {"name": "fedavg"}))
    opened = run_job(make_job(flex()))
    assert_same_bits(closed.state.params, fedavg.state.params)

    def nll(ran: Any, view: str) -> dict[int, tuple[float, float]]:
        rows = [row for row in ran.rows("evaluations") if (row["view"], row["task"], row["metric"]) == (view, "client", "nll")]
        return {row["client_id"]: (row["total"], row["weight"]) for row in rows}

    assert nll(closed, "personal") == nll(fedavg, "personal") == nll(closed, "global")
    assert len(nll(closed, "personal")) == 3
    assert nll(opened, "personal") != nll(fedavg, "personal")
    losses = [[row["client_train_loss"] for row in ran.rows("metrics")] for ran in (closed, fedavg)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3


@pytest.mark.parametrize("client", CLIENTS)
def test_4_the_choice_is_brute_forces(client: int, make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    _, choice = set_up(make_bench(flex()), client)
    expected = brute_choice(make_base, data_folder, client)
    assert choice["experts"] == [list(experts) for experts in expected]
    model: Any = open_base(make_base())
    for place, (x, z) in enumerate(seen(model, calibration(data_folder, client))):
        block = model.model.layers[place].mlp
        losses = [brute_loss(block, x, z, (e,)) for e in range(4)]
        assert choice["loss"][place] == [pytest.approx(min(losses), rel=1e-4)]
        used = torch.topk(x @ block.gate.weight.T, 2, dim=1).indices.reshape(-1).bincount(minlength=4)
        assert choice["loss"][place][0] <= losses[int(used.argmax())] * (1 + 1e-6)
        assert choice["loss"][place][0] <= sum(losses) / 4


def test_5_the_graft_starts_as_its_expert_and_only_the_graft_learns(
    make_bench: Maker, make_base: Maker, data_folder: Path
) -> None:
    base: Any = open_base(make_base())
    content = (make_base() / "model.safetensors").read_bytes()
    bench = make_bench(flex(gate_bias=0.0))
    expected = brute_choice(make_base, data_folder, 0)
    start, _ = set_up(bench)
    for layer, (expert,) in enumerate(expected):
        experts = base.model.layers[layer].mlp.experts
        assert torch.equal(start[STEM.format(layer, "gate_up_proj")][0], experts.gate_up_proj[expert])
        assert torch.equal(start[STEM.format(layer, "down_proj")][0], experts.down_proj[expert])
        assert not start[STEM.format(layer, "gate_weight")].any()
        assert start[STEM.format(layer, "gate_bias")].tolist() == [0.0]
    for round_idx in (2, 3):
        bench.train(0, round_idx, bench.worker.initial_params())
    trained = bench.private(0)
    now = dict(bench.worker.engine.model.named_parameters())
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj", "gate_weight", "gate_bias"):
            assert not torch.equal(trained[STEM.format(layer, name)], start[STEM.format(layer, name)]), name
        for name in ("gate_up_proj", "down_proj"):
            hosted = now[f"model.layers.{layer}.mlp.experts.{name}"]
            assert torch.equal(hosted, base.get_parameter(f"model.layers.{layer}.mlp.experts.{name}"))
    assert (make_base() / "model.safetensors").read_bytes() == content


def test_6_a_client_absent_for_five_rounds_resumes_with_its_old_graft_and_the_newest_parameters(
    make_bench: Maker, assert_same_bits: Maker
) -> None:
    bench = make_bench(flex(gate_bias=0.0))
    first = bench.worker.initial_params()
    params = play(bench, first, (0, 1), 1)
    kept = bench.private(0)
    for round_idx in range(2, 7):
        params = play(bench, params, (1, 2), round_idx)
    assert bench.versions == {0: 1, 1: 6, 2: 6}
    # Without a step the graft is what it was, and the delta from the newest parameters is zero.
    other = make_bench(flex(gate_bias=0.0), state_folder=copied(bench))
    other.versions[0] = 1
    _, delta = other.train(0, 7, params, plan=replace(bench.task(0, 7, params).plan, num_steps=0))
    assert_same_bits(other.private(0, 7), kept)
    assert not any(value.any() for value in delta.values())
    # With steps it is what a worker gives that never saw anyone else.
    fresh = make_bench(flex(gate_bias=0.0), state_folder=copied(bench))
    fresh.versions[0] = 1
    _, here = bench.train(0, 7, params)
    _, there = fresh.train(0, 7, params)
    assert_same_bits(here, there)
    assert_same_bits(bench.private(0), fresh.private(0))
    # Neither old parameters nor a new graft would give this.
    old = make_bench(flex(gate_bias=0.0), state_folder=copied(bench))
    old.versions[0] = 1
    _, from_old = old.train(0, 7, first)
    newcomer = make_bench(flex(gate_bias=0.0))
    _, from_new = newcomer.train(0, 7, params)
    assert all(not torch.equal(here[key], from_old[key]) for key in here)
    assert any(not torch.equal(here[key], from_new[key]) for key in here)


def copied(bench: Any) -> Path:
    """A copy of a bench's private states."""
    source: Path = bench.worker.spec.state_folder
    target = source.parent / f"{source.name}-copy-{len(list(source.parent.iterdir()))}"
    shutil.copytree(source, target)
    return target


def test_7_a_late_client_starts_from_its_own_fresh_graft(make_bench: Maker, assert_same_bits: Maker) -> None:
    early, late = make_bench(flex(score="random")), make_bench(flex(score="random"))
    start, _ = set_up(early, 2)
    params = late.worker.initial_params()
    for round_idx in (1, 2):
        params = play(late, params, (0, 1), round_idx)
    late.train(2, 3, params, plan=replace(late.task(2, 3, params).plan, num_steps=0))
    assert_same_bits(late.private(2), start)


# ---- options


def test_two_grafts_are_chosen_greedily(make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    bench = make_bench(flex(n_graft=2))
    start, choice = set_up(bench, 1)
    expected = brute_choice(make_base, data_folder, 1, count=2)
    assert choice["experts"] == [list(pair) for pair in expected]
    base: Any = open_base(make_base())
    for layer, pair in enumerate(expected):
        assert len(set(pair)) == 2
        for place, expert in enumerate(pair):
            experts = base.model.layers[layer].mlp.experts
            assert torch.equal(start[STEM.format(layer, "gate_up_proj")][place], experts.gate_up_proj[expert])
            assert torch.equal(start[STEM.format(layer, "down_proj")][place], experts.down_proj[expert])
    assert all(second <= first for first, second in choice["loss"])


@pytest.mark.parametrize("score", ["usage", "scale_free", "random"])
def test_two_grafts_are_two_experts_by_every_score(score: str, make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    for client in CLIENTS:
        _, choice = set_up(make_bench(flex(n_graft=2, score=score)), client)
        assert all(len(set(pair)) == 2 for pair in choice["experts"])
        if score != "random":
            scores = observe_experts(open_base(make_base()), [calibration(data_folder, client)])
            for layer, pair in enumerate(choice["experts"]):
                losses = scores.layers[layer].criterion(score).tolist()  # type: ignore[arg-type]
                assert pair == sorted(range(4), key=losses.__getitem__)[:2]


def test_more_grafts_than_experts_are_refused(make_bench: Maker) -> None:
    with pytest.raises(MethodError, match=r"n_graft is 5, .* 4 experts"):
        make_bench(flex(n_graft=5))
    bench = make_bench(flex(n_graft=4))
    assert all(sorted(experts) == [0, 1, 2, 3] for experts in set_up(bench)[1]["experts"])


def test_half_of_the_layers_are_those_with_the_lowest_relative_loss(
    make_bench: Maker, make_base: Maker, data_folder: Path
) -> None:
    for client in CLIENTS:
        bench = make_bench(flex(graft_layer_fraction=0.5, gate_bias=0.0))
        start, choice = set_up(bench, client)
        model: Any = open_base(make_base())
        relative = []
        for place, (x, z) in enumerate(seen(model, calibration(data_folder, client))):
            block = model.model.layers[place].mlp
            with torch.no_grad():
                routed = z - torch.sigmoid(block.shared_expert_gate(x)) * block.shared_expert(x)
            relative.append(min(brute_loss(block, x, z, (e,)) for e in range(4)) / float(routed.double().norm()))
            assert choice["zero_loss"][place] == pytest.approx(float(routed.double().norm()), rel=1e-4)
        kept = min((0, 1), key=relative.__getitem__)
        assert [bool(experts) for experts in choice["experts"]] == [layer == kept for layer in (0, 1)]
        left = 1 - kept
        assert start[STEM.format(left, "gate_bias")].tolist() == [float("-inf")]
        bench.train(client, 2, bench.worker.initial_params())
        trained = bench.private(client)
        for name in ("gate_up_proj", "down_proj", "gate_weight", "gate_bias"):
            assert torch.equal(trained[STEM.format(left, name)], start[STEM.format(left, name)])
            assert not torch.equal(trained[STEM.format(kept, name)], start[STEM.format(kept, name)])


@pytest.mark.parametrize(
    ("fraction", "num_layers", "expected"),
    [(0.07, 100, 7), (0.28, 25, 7), (0.5, 24, 12), (0.51, 24, 13), (0.001, 24, 1), (1.0, 24, 24)],
)
def test_the_share_of_layers_is_rounded_up_but_not_by_a_float(fraction: float, num_layers: int, expected: int) -> None:
    assert num_grafted_layers(fraction, num_layers) == expected


def contributions(model: Any, data_folder: Path, client: int) -> list[torch.Tensor]:
    """(E, F) a layer: mean |silu(gate) * up| times the norm of the neuron's column of down_proj."""
    found = []
    for layer, (x, _) in zip(model.model.layers, seen(model, calibration(data_folder, client)), strict=True):
        experts = layer.mlp.experts
        gate, up = torch.einsum("efd,td->tef", experts.gate_up_proj, x).chunk(2, dim=2)
        found.append((torch.nn.functional.silu(gate) * up).abs().double().mean(dim=0) * experts.down_proj.double().norm(dim=1))
    return found


def test_half_of_the_neurons_are_those_that_contribute_most(make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    start, choice = set_up(make_bench(flex(graft_neuron_fraction=0.5)))
    model: Any = open_base(make_base())
    for layer, sizes in enumerate(contributions(model, data_folder, 0)):
        (expert,) = choice["experts"][layer]
        picked = sorted(sorted(range(24), key=lambda n: -float(sizes[expert, n]))[:12])
        experts = model.model.layers[layer].mlp.experts
        gate, up = experts.gate_up_proj[expert, :24], experts.gate_up_proj[expert, 24:]
        assert torch.equal(start[STEM.format(layer, "gate_up_proj")][0], torch.cat([gate[picked], up[picked]]))
        assert torch.equal(start[STEM.format(layer, "down_proj")][0], experts.down_proj[expert][:, picked])


def test_all_neurons_are_the_whole_expert(make_bench: Maker, assert_same_bits: Maker) -> None:
    whole, _ = set_up(make_bench(flex()))
    ranked, _ = set_up(make_bench(flex(graft_neuron_fraction=0.99)))  # 23.76 of 24 is all of them, by the ranking path
    assert_same_bits(ranked, whole)


def test_neurons_may_come_from_several_experts(make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    start, _ = set_up(make_bench(flex(granularity="neuron", n_graft=2, graft_neuron_fraction=0.5)))
    model: Any = open_base(make_base())
    for layer, sizes in enumerate(contributions(model, data_folder, 0)):
        order = sorted(((e, n) for e in range(4) for n in range(24)), key=lambda en: -float(sizes[en]))
        experts = model.model.layers[layer].mlp.experts
        for place in range(2):
            expected = {tuple(experts.down_proj[e, :, n].tolist()) for e, n in order[12 * place : 12 * (place + 1)]}
            down = start[STEM.format(layer, "down_proj")][place]
            assert {tuple(column.tolist()) for column in down.T} == expected
            # Gate, up and down of a place belong to one neuron.
            gate_up = start[STEM.format(layer, "gate_up_proj")][place]
            for n in range(12):
                e, m = next(en for en in order if torch.equal(experts.down_proj[en[0], :, en[1]], down[:, n]))
                assert torch.equal(gate_up[n], experts.gate_up_proj[e, m])
                assert torch.equal(gate_up[12 + n], experts.gate_up_proj[e, 24 + m])


@pytest.mark.parametrize("score", ["recon", "router_weighted_recon", "mean_weight_recon", "scale_free", "usage"])
def test_every_score_grafts_its_own_best(score: str, make_bench: Maker, make_base: Maker, data_folder: Path) -> None:
    _, choice = set_up(make_bench(flex(score=score)), 2)
    scores = observe_experts(open_base(make_base()), [calibration(data_folder, 2)])
    expected = [[int(scores.layers[layer].criterion(score).argmin())] for layer in (0, 1)]  # type: ignore[arg-type]
    assert choice["experts"] == expected
    assert choice["loss"] == [[pytest.approx(float(scores.layers[layer].loss[expected[layer][0]]))] for layer in (0, 1)]


def test_the_random_choice_follows_from_seed_and_client(make_bench: Maker) -> None:
    chosen = {}
    for seed in range(6):
        for client in (0, 1):
            chosen[seed, client] = set_up(make_bench(flex(score="random"), run_seed=seed), client)[1]["experts"]
    assert set_up(make_bench(flex(score="random"), run_seed=3), 1)[1]["experts"] == chosen[3, 1]
    assert len({str(experts) for experts in chosen.values()}) > 6  # of 16
    assert {expert for experts in chosen.values() for (expert,) in experts} == {0, 1, 2, 3}


def test_calibration_sees_no_more_examples_than_asked_for(make_bench: Maker, data_folder: Path) -> None:
    _, few = set_up(make_bench(flex(calibration_examples=2)))
    _, all_of_them = set_up(make_bench(flex(calibration_examples=8)))
    assert few["zero_loss"][0] < 0.7 * all_of_them["zero_loss"][0]


def test_a_random_graft_is_no_expert_but_has_its_size(make_bench: Maker, make_base: Maker) -> None:
    base: Any = open_base(make_base())
    start, _ = set_up(make_bench(flex(graft_init="random")))
    again, _ = set_up(make_bench(flex(graft_init="random")))
    other, _ = set_up(make_bench(flex(graft_init="random")), 1)
    for layer in (0, 1):
        for name in ("gate_up_proj", "down_proj"):
            value, experts = start[STEM.format(layer, name)], getattr(base.model.layers[layer].mlp.experts, name)
            assert float(value.std()) == pytest.approx(float(experts.std()), rel=0.1)
            assert not any(torch.allclose(value[0], expert) for expert in experts)
            assert torch.equal(value, again[STEM.format(layer, name)])
            assert not torch.equal(value, other[STEM.format(layer, name)])


@pytest.mark.parametrize("options", [{"granularity": "neuron"}, {"graft_init": "random"}, {}], ids=str)
def test_an_expert_is_named_only_where_the_graft_is_its_copy(options: dict[str, Any], make_bench: Maker) -> None:
    _, choice = set_up(make_bench(flex(graft_layer_fraction=0.5, **options)))
    assert sorted(choice["is_grafted"]) == [False, True]
    assert ("experts" in choice) == (not options)
    if not options:
        assert [bool(experts) for experts in choice["experts"]] == choice["is_grafted"]


@pytest.mark.parametrize("server", ["fedprox", "scaffold", "fedavg"])
def test_weights_may_be_spread_over_ranks_unless_the_optimiser_reads_whole_ones(server: str) -> None:
    def config_of(stage: int) -> Any:
        method = {"name": "flex", "server": {"name": server}}
        return load_config({"method": method, "engine": {"name": "deepspeed", "stage": stage}})

    assert config_of(2).method is not None
    if server == "fedprox":
        with pytest.raises(ConfigError, match="flex looks into MoE blocks while they run, which neither ZeRO stage 3"):
            config_of(3)
    else:
        assert config_of(3).method is not None


def test_shared_gates_are_sent_and_grafts_are_not(make_bench: Maker) -> None:
    bench = make_bench(flex(share_gate=True, n_graft=2))
    params = bench.worker.initial_params()
    update, delta = bench.train(0, 1, params)
    gates = {STEM.format(layer, name) for layer in (0, 1) for name in ("gate_weight", "gate_bias")}
    assert gates == {key for key in delta if ".graft." in key}
    assert all(delta[key].any() for key in gates)
    assert {key.rsplit(".", 1)[1] for key in bench.private(0)} == {"gate_up_proj", "down_proj"}
    # Two LoRAs' worth as before, and by layer 2 grafts of 32 weights and a bias.
    lora = 4 * 2 * 2 * (2 * (32 + 32) + 2 * (32 + 16))
    assert sum(info.num_bytes for info in update.payload) == lora + 4 * 2 * 2 * (32 + 1)


def test_moments_are_kept_only_where_asked_for(make_bench: Maker, assert_same_bits: Maker) -> None:
    found = []
    for persists in (False, False, True, True):
        bench = make_bench(flex(persist_optimizer=persists, gate_bias=0.0))
        params = bench.worker.initial_params()
        for round_idx in (1, 2):
            bench.train(0, round_idx, params)
        state = bench.private(0)
        assert any(key.startswith("optimizer/") for key in state) == persists
        assert not any(".lora_" in key for key in state)
        if persists:
            steps = [float(value) for key, value in state.items() if key.endswith("|step")]
            assert steps
            assert set(steps) == {4.0}  # two rounds of two steps
        found.append(state)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[2], found[3])
    assert all(not torch.equal(value, found[2][key]) for key, value in found[0].items() if "proj" in key)


@pytest.mark.parametrize(
    ("option", "scaled"),
    [("graft_lr_scale", ("gate_up_proj", "down_proj")), ("gate_lr_scale", ("gate_weight", "gate_bias"))],
)
def test_graft_and_gate_have_rates_of_their_own(option: str, scaled: tuple[str, str], make_bench: Maker) -> None:
    moved = []
    for scale in (1.0, 10.0):
        bench = make_bench(flex(gate_bias=0.0, **{option: scale}), num_steps=1)
        start, _ = set_up(bench)
        bench.versions.clear()
        bench.train(0, 2, bench.worker.initial_params())
        after = bench.private(0)
        moved.append({key: float((after[key] - start[key]).abs().max()) for key in start})
    for key in moved[0]:
        # AdamW's first step is the rate, whatever the gradient's size.
        is_scaled = key.rsplit(".", 1)[1] in scaled
        assert moved[1][key] == pytest.approx(moved[0][key] * (10 if is_scaled else 1), rel=0.05), key


@pytest.mark.parametrize("mode", ["additive", "convex", "row"])
def test_how_far_gates_open_is_observed(mode: str, make_bench: Maker) -> None:
    bench = make_bench(flex(mode=mode, n_graft=2))
    params = bench.worker.initial_params()
    task = EvaluationTask(round_idx=1, view="personal", tasks=("client",), keys=tuple(params), client_id=0)
    reply, _ = bench.worker.evaluate(task, Broadcast(round_idx=1, params=params))
    seen_gates = reply.diagnostics["graft_gate"]
    assert seen_gates["layers"] == [0, 1]
    opened = 1 / (1 + torch.e**4)  # w = 0, b = -4
    for where in ("mean_open_own", "mean_open_retention"):
        if mode == "row":
            assert all(0 < value < 0.1 for value in seen_gates[where])
        else:
            assert seen_gates[where] == pytest.approx([opened / (2 if mode == "convex" else 1)] * 2, rel=1e-5)


def test_the_modes_differ(make_bench: Maker) -> None:
    found = []
    for mode in ("additive", "convex", "row"):
        bench = make_bench(flex(mode=mode, gate_bias=0.0))
        _, delta = bench.train(0, 1, bench.worker.initial_params())
        found.append(torch.cat([value.reshape(-1) for value in delta.values()]))
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "neuron", "score": "usage"}, "score has no effect"),
        ({"granularity": "neuron", "graft_init": "random"}, "no effect with graft_init"),
        ({"graft_init": "random", "score": "usage"}, "score has no effect"),
        ({"gate_closed": True, "gate_bias": 0.0}, "gate_bias has no effect"),
        ({"share_gate": True, "graft_layer_fraction": 0.5}, "share_gate needs an open gate"),
        ({"share_gate": True, "gate_closed": True}, "share_gate needs an open gate"),
        ({"n_graft": 0}, "n_graft"),
        ({"graft_layer_fraction": 0.0}, "graft_layer_fraction"),
        ({"graft_neuron_fraction": 1.5}, "graft_neuron_fraction"),
        ({"score": "best"}, "score"),
        ({"n_grafts": 2}, "n_grafts"),
    ],
)
def test_options_that_are_wrong_or_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FlexConfig.model_validate(flex(**options))


# ---- the control of the same size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_graft": 3},
        {"graft_neuron_fraction": 0.3},
        {"graft_layer_fraction": 0.5},
        {"graft_layer_fraction": 0.7},
        {"n_graft": 2, "graft_layer_fraction": 0.4, "graft_neuron_fraction": 0.6},
    ],
)
def test_the_private_lora_is_as_large_as_the_graft(options: dict[str, Any], make_bench: Maker) -> None:
    start, _ = set_up(make_bench(flex(**options)))
    opened = [layer for layer in (0, 1) if not torch.isneginf(start[STEM.format(layer, "gate_bias")]).any()]
    graft = sum(value.numel() for key, value in start.items() if any(f"layers.{layer}." in key for layer in opened))
    control = make_bench({"name": "private_lora", **options})
    private = [ref for ref in control.worker.engine.refs if ref.adapter == "personal"]
    size = sum(ref.num_elements for ref in private)
    rank = private[0].shape[0]
    assert abs(size - graft) <= size / rank / 2
    given = [options.get(name, 1) for name in ("n_graft", "graft_layer_fraction", "graft_neuron_fraction")]
    assert matched_rank(model_facts(control.worker.engine.model.config), *given) == rank


def test_the_private_lora_is_private_and_both_loras_have_one_scale(make_bench: Maker) -> None:
    bench = make_bench({"name": "private_lora", "private_rank": 5, "adapter": {"rank": 2, "alpha": 6.0}})
    _, delta = bench.train(0, 1, bench.worker.initial_params())
    assert delta
    assert all(".shared." in key for key in delta)
    assert bench.private(0)
    assert all(".personal." in key for key in bench.private(0))
    layer: Any = bench.worker.engine.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert dict(layer.scaling) == {"shared": 3.0, "personal": 3.0}
    for options in ({"private_rank": 3, "n_graft": 2}, {"private_rank": 0}, {"graft": 1}):
        with pytest.raises(ValidationError):
            PrivateLoraConfig.model_validate(options)
