"""The maths of FedAlign-MoE against closed forms, scipy, and a toy federation in which one client's experts are permuted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy

from fedgraft.aggregation.alignment import (
    agreement,
    alignment_weights,
    anchors,
    consistency_weights,
    distil_gates,
    divergence,
    fit_gate,
    reference_routing,
    routing_loss,
    semantic_similarity,
)
from fedgraft.aggregation.cohort import align_experts, examples_per_probe, remember, since_last
from fedgraft.aggregation.prototypes import Prototypes, in_common_regions, match_regions, region_middles


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shares(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.softmax(drawn(*shape, seed=seed), dim=-1)


# ---- gates


def test_agreement_is_one_minus_the_jensen_shannon_divergence_in_bits() -> None:
    p, q = shares(3, 4), shares(3, 4, seed=1)
    for a, b, found in zip(p.flatten(), q.flatten(), agreement(p, q).flatten(), strict=True):
        expected = 1 - jensenshannon([a, 1 - a], [b, 1 - b], base=2) ** 2
        assert float(found) == pytest.approx(float(expected), abs=1e-12)
    assert torch.equal(agreement(p, p), torch.ones_like(p))
    assert agreement(torch.tensor([0.0]), torch.tensor([1.0])).tolist() == [0.0]


def test_consistency_weights_follow_the_formula_and_sum_to_one() -> None:
    p, h = shares(5, 2, 4), torch.rand(5, 2, 4, generator=torch.Generator().manual_seed(3))
    found = consistency_weights(p, h, 0.4)
    score = torch.exp(-(p - p.median(dim=0).values).abs() / 0.1) * h  # T is in quarters; of an odd number the median is one
    torch.testing.assert_close(found, score / score.sum(dim=0), rtol=1e-12, atol=0)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(2, 4, dtype=torch.float64))
    # The client that routes as the others do counts more than the outlier, however small T is.
    p = torch.tensor([[[0.5, 0.5]], [[0.5, 0.5]], [[0.9, 0.1]]])
    sharp = consistency_weights(p, torch.ones(3, 1, 2), 1e-6)
    assert sharp[:, 0, 0].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize("num_experts", [4, 60])
def test_the_temperature_means_the_same_for_few_experts_and_for_many(num_experts: int) -> None:
    p = torch.full((3, 1, num_experts), 1 / num_experts, dtype=torch.float64)
    p[2, 0, :2] = torch.tensor([2.0, 0.0]).double() / num_experts  # one client uses an expert twice as much as it would by chance
    omega = consistency_weights(p, torch.ones_like(p), 1.0)[:, 0, 0]
    assert omega.tolist() == pytest.approx([1 / (2 + math.exp(-1))] * 2 + [math.exp(-1) / (2 + math.exp(-1))], rel=1e-12)


def test_equal_clients_are_equally_consistent_and_so_are_hopeless_ones() -> None:
    p = shares(1, 2, 4).expand(3, 2, 4)
    for h in (torch.ones(3, 2, 4), torch.full((3, 2, 4), 0.25), torch.zeros(3, 2, 4)):
        assert torch.equal(consistency_weights(p, h, 0.1), torch.full((3, 2, 4), 1 / 3, dtype=torch.float64))


def test_the_reference_is_the_weighted_mixture_normalised() -> None:
    p = torch.tensor([[[0.5, 0.5]], [[0.75, 0.25]]])
    omega = torch.tensor([[[1.0, 0.5]], [[0.0, 0.5]]])
    torch.testing.assert_close(reference_routing(omega, p), torch.tensor([[0.5, 0.375]]).double() / 0.875)
    # Equal clients: their own distribution.
    same = shares(1, 2, 4).expand(3, 2, 4)
    torch.testing.assert_close(reference_routing(torch.full_like(same, 1 / 3), same), same[0])


def test_divergence_is_scipys_and_zero_of_a_distribution_from_itself() -> None:
    p, q = shares(2, 5), shares(2, 5, seed=1)
    torch.testing.assert_close(divergence(p, q), torch.from_numpy(entropy(p, q, axis=1)))
    assert torch.equal(divergence(p, p), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_the_routing_loss_is_zero_where_the_batch_routes_as_the_reference(rule: str) -> None:
    logits = drawn(7, 4).float()
    if rule == "softmax":
        p = torch.softmax(logits, dim=-1)
    else:
        p = torch.sigmoid(logits) / torch.sigmoid(logits).sum(dim=-1, keepdim=True)
    assert float(routing_loss(rule, logits, p.mean(dim=0))) == pytest.approx(0, abs=1e-7)  # type: ignore[arg-type]
    other = shares(4, seed=2).float()
    expected = entropy(p.double().mean(dim=0), other.double())
    assert float(routing_loss(rule, logits, other)) == pytest.approx(float(expected), rel=1e-5)  # type: ignore[arg-type]


def test_masked_experts_are_not_pulled() -> None:
    logits = drawn(7, 4).float().requires_grad_(True)
    kept = torch.tensor([True, False, True, True])
    reference = shares(4, seed=2).float()
    loss = routing_loss("softmax", logits, reference, kept)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(logits.grad[:, 1], torch.zeros(7))
    assert bool((logits.grad[:, kept].abs().sum(dim=0) > 0).all())
    p = torch.softmax(logits.detach()[:, kept].double(), dim=-1).mean(dim=0)
    assert float(loss.detach()) == pytest.approx(float(entropy(p, reference[kept].double())), rel=1e-5)
    alone = routing_loss("softmax", logits, reference, torch.tensor([True, False, False, False]))
    assert float(alone.detach()) == 0.0


@pytest.mark.parametrize("rule", ["softmax", "sigmoid"])
def test_a_gate_is_found_again_from_its_distributions(rule: str) -> None:
    x, true, bias = drawn(200, 6), drawn(4, 6, seed=1), drawn(4, seed=2)
    score = x @ true.T + bias
    target = torch.softmax(score, dim=-1) if rule == "softmax" else score.sigmoid() / score.sigmoid().sum(-1, keepdim=True)
    start = (torch.zeros(4, 6), torch.zeros(4))
    fitted, fitted_bias = fit_gate(x, torch.ones(200), target, start, rule=rule, num_steps=500, ridge=1e-9)  # type: ignore[arg-type]
    assert fitted_bias is not None
    again = x @ fitted.T + fitted_bias
    found = torch.softmax(again, dim=-1) if rule == "softmax" else again.sigmoid() / again.sigmoid().sum(-1, keepdim=True)
    torch.testing.assert_close(found, target, atol=2e-3, rtol=0)


def test_distilling_equal_gates_gives_that_gate_and_else_comes_nearer_to_the_mixture() -> None:
    x, weights, omega = drawn(30, 5), torch.ones(30), torch.full((3, 4), 1 / 3)
    gate = drawn(4, 5, seed=1)
    same, bias = distil_gates(x, weights, [(gate, None)] * 3, omega, rule="softmax", num_steps=50, ridge=1e-3)
    torch.testing.assert_close(same, gate)
    assert bias is None
    gates = [drawn(4, 5, seed=seed) * 3 for seed in (1, 2, 3)]
    fitted, _ = distil_gates(x, weights, [(g, None) for g in gates], omega, rule="softmax", num_steps=50, ridge=1e-6)
    mixture = torch.stack([torch.softmax(x @ g.T, dim=-1) for g in gates]).mean(dim=0)

    def far(weight: torch.Tensor) -> float:
        return float(divergence(mixture, torch.softmax(x @ weight.T, dim=-1)).mean())

    assert far(fitted) < 0.7 * far(torch.stack(gates).mean(dim=0))


def test_the_ridge_holds_a_gate_at_the_average_by_rows() -> None:
    omega = torch.tensor([[0.25], [0.75]]).expand(2, 4)
    gates = [drawn(4, 5, seed=seed) for seed in (1, 2)]
    biases = [drawn(4, seed=seed) for seed in (3, 4)]
    fitted, bias = distil_gates(
        drawn(9, 5), torch.ones(9), list(zip(gates, biases, strict=True)), omega, rule="softmax", num_steps=50, ridge=1e9
    )
    assert bias is not None
    torch.testing.assert_close(fitted, 0.25 * gates[0] + 0.75 * gates[1], atol=1e-7, rtol=0)
    torch.testing.assert_close(bias, 0.25 * biases[0] + 0.75 * biases[1], atol=1e-7, rtol=0)


# ---- experts


def one_expert(counts: list[list[float]], inputs: torch.Tensor, responses: torch.Tensor) -> Prototypes:
    """Prototypes of one layer with one expert: counts by client and region, vectors (C, R, D)."""
    return Prototypes(
        counts=torch.tensor(counts)[:, None, None], inputs=inputs[:, None, None], responses=responses[:, None, None]
    )


def unit(angle: float) -> list[float]:
    return [math.cos(angle), math.sin(angle)]


def test_similarity_is_the_cosine_of_responses_in_regions_that_both_serve() -> None:
    # Regions 0 and 1; the clients' inputs agree in region 0 and are at right angles in region 1.
    inputs = torch.tensor([[unit(0), unit(0)], [unit(0.1), unit(math.pi / 2)]])
    responses = torch.tensor([[unit(0), unit(0)], [unit(math.pi / 3), unit(0)]])
    found = one_expert([[3, 1], [1, 1]], inputs, responses)
    sigma = semantic_similarity(found, 0.3)[:, :, 0, 0]
    expected = 0.5 * 0.5 + 0.0  # min(3/4, 1/2) cos 60 degrees; the second region is served by neither for the other
    torch.testing.assert_close(sigma, torch.tensor([[1.0, expected], [expected, 1.0]]).double(), atol=1e-7, rtol=0)
    wide = semantic_similarity(found, -1.0)[:, :, 0, 0]
    assert float(wide[0, 1]) == pytest.approx(expected + 0.25, abs=1e-7)


def test_similarity_with_a_client_without_tokens_is_zero() -> None:
    vectors = torch.tensor([[unit(0)], [unit(0)], [[0.0, 0.0]]])
    sigma = semantic_similarity(one_expert([[4], [2], [0]], vectors, vectors), 0.3)[:, :, 0, 0]
    assert sigma.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_alignment_weights_follow_the_formula_and_rows_sum_to_one() -> None:
    sigma = torch.tensor([[1.0, 0.5, 0.2], [0.5, 1.0, -0.4], [0.2, -0.4, 1.0]]).double()[:, :, None, None]
    counts = torch.tensor([2.0, 8.0, 6.0])[:, None, None]
    gamma = alignment_weights(sigma, counts, torch.tensor([0.3]))[:, :, 0, 0]
    torch.testing.assert_close(gamma, torch.tensor([[2 / 6, 4 / 6, 0], [1 / 9, 8 / 9, 0], [0, 0, 1]]).double())
    assert torch.equal(gamma.sum(dim=1), torch.ones(3, dtype=torch.float64))
    loose = alignment_weights(sigma, counts, torch.tensor([0.0]))[:, :, 0, 0]
    torch.testing.assert_close(loose[0], torch.tensor([2.0, 4.0, 1.2]).double() / 7.2)
    assert float(loose[1, 2]) == 0.0  # never a negative weight


def test_a_threshold_may_differ_between_layers() -> None:
    sigma = torch.tensor([[1.0, 0.5], [0.5, 1.0]]).double()[:, :, None, None].expand(2, 2, 2, 1)
    gamma = alignment_weights(sigma, torch.ones(2, 2, 1), torch.tensor([0.4, 0.6]))
    assert gamma[0, :, 0, 0].tolist() == [2 / 3, 1 / 3]
    assert gamma[0, :, 1, 0].tolist() == [1, 0]


def test_a_client_without_tokens_changes_nobodys_weight() -> None:
    inputs, responses = drawn(3, 1, 6), drawn(3, 1, 6, seed=1)
    responses = responses[:1] + 0.3 * responses
    inputs[2], responses[2] = 0, 0
    three = align_experts(one_expert([[4], [2], [0]], inputs, responses), 0.3, -0.99)
    two = align_experts(one_expert([[4], [2]], inputs[:2], responses[:2]), 0.3, -0.99)
    assert three.majority(0, 0)[:2].equal(two.majority(0, 0))
    assert float(three.majority(0, 0)[2]) == 0.0
    assert int(three.anchor) == int(two.anchor)
    assert three.outsiders(0, 0).keys() == two.outsiders(0, 0).keys()


def test_the_anchor_is_in_the_middle_then_has_most_tokens_then_comes_first() -> None:
    sigma = torch.tensor([[1.0, 0.6, 0.1], [0.6, 1.0, 0.6], [0.1, 0.6, 1.0]]).double()[:, :, None, None]
    assert int(anchors(sigma, torch.tensor([9.0, 1.0, 1.0])[:, None, None])) == 1
    pair = torch.tensor([[1.0, 0.6], [0.6, 1.0]]).double()[:, :, None, None]
    assert int(anchors(pair, torch.tensor([2.0, 5.0])[:, None, None])) == 1
    assert int(anchors(pair, torch.tensor([2.0, 2.0])[:, None, None])) == 0
    # Nobody has a token: nobody's expert is taken.
    assert int(anchors(torch.zeros(2, 2, 1, 1), torch.zeros(2, 1, 1))) == -1
    nobody = align_experts(one_expert([[0], [0]], torch.zeros(2, 1, 3), torch.zeros(2, 1, 3)), 0.3, 0.3)
    assert nobody.majority(0, 0).tolist() == [0, 0]
    assert nobody.outsiders(0, 0) == {}
    assert nobody.summary((7,)) == {"7": {"similarity": None, "aligned": None}}


def test_equal_clients_are_weighed_by_their_tokens() -> None:
    vectors, counts = drawn(1, 1, 6).expand(3, 1, 6), [[4.0], [1.0], [5.0]]
    found = align_experts(one_expert(counts, vectors, vectors), 0.3, 0.3)
    torch.testing.assert_close(found.gamma[:, :, 0, 0], torch.tensor([[0.4, 0.1, 0.5]]).double().expand(3, 3))
    assert found.summary((0,))["0"] == {"similarity": pytest.approx(1.0), "aligned": 1.0}


def test_a_client_is_weighed_by_all_its_examples_and_not_by_those_it_measured() -> None:
    """Three clients route alike; of 8 and 200 examples 4 are measured, of 2 both."""
    updates = [SimpleNamespace(num_examples=size) for size in (8, 200, 2)]
    scale = examples_per_probe(updates, 4)  # type: ignore[arg-type]
    assert scale.tolist() == [2, 50, 1]
    vectors, counts = drawn(1, 1, 6).expand(3, 1, 6), [[12.0], [12.0], [6.0]]
    found = align_experts(one_expert(counts, vectors, vectors), 0.3, 0.3, scale)
    torch.testing.assert_close(found.majority(0, 0), torch.tensor([8, 200, 2]).double() / 210, rtol=1e-12, atol=0)
    assert int(found.anchor) == 1  # equals, of which this one stands for most tokens
    same = align_experts(one_expert(counts, vectors, vectors), 0.3, 0.3)
    assert torch.equal(found.sigma, same.sigma)
    assert same.majority(0, 0).tolist() == pytest.approx([0.4, 0.4, 0.2])


# ---- a toy federation


def test_a_client_with_permuted_experts_is_left_out_where_fedavg_is_corrupted() -> None:
    """Four clients of shifted domains train the same four experts a little; at the last, experts 1 and 2 changed places."""
    hidden, width, num_clients, num_experts, num_tokens = 32, 64, 4, 4, 400
    true = [(drawn(width, hidden, seed=10 + e) / 4, drawn(hidden, width, seed=20 + e) / 4) for e in range(num_experts)]
    gate = drawn(num_experts, hidden, seed=30)
    experts, counts = [], torch.zeros(num_clients, 1, num_experts, 1)
    inputs = torch.zeros(num_clients, 1, num_experts, 1, hidden)
    responses = torch.zeros_like(inputs)
    for client in range(num_clients):
        order = [0, 2, 1, 3] if client == 3 else [0, 1, 2, 3]
        own = [
            tuple(w + 0.02 * drawn(*w.shape, seed=100 + 10 * client + e) for w in true[source]) for e, source in enumerate(order)
        ]
        experts.append(own)
        # What all hidden states have in common, and a domain's own shift.
        middle = 0.5 * drawn(1, hidden, seed=60) + 0.4 * drawn(1, hidden, seed=50 + client)
        x = drawn(num_tokens, hidden, seed=40 + client) + middle
        chosen = (x @ gate.T).topk(2, dim=-1).indices
        for e, (up, down) in enumerate(own):
            served = x[(chosen == e).any(dim=1)]
            counts[client, 0, e, 0] = len(served)
            inputs[client, 0, e, 0] = served.mean(dim=0)
            responses[client, 0, e, 0] = (torch.relu(served @ up.T) @ down.T).mean(dim=0)
    found = align_experts(Prototypes(counts=counts, inputs=inputs, responses=responses), 0.3, 0.3)
    for e in range(num_experts):
        weights = found.majority(0, e)
        assert bool((weights[:3] > 0).all()), e
        assert (float(weights[3]) == 0.0) == (e in (1, 2)), e
        aligned = sum(float(weights[c]) * experts[c][e][0] for c in range(num_clients))
        average = sum(experts[c][e][0] for c in range(num_clients)) / num_clients
        assert isinstance(aligned, torch.Tensor)
        assert isinstance(average, torch.Tensor)
        truth, size = true[e][0], float(true[e][0].norm())
        assert float((aligned - truth).norm()) < 0.1 * size
        assert (float((average - truth).norm()) > 0.3 * size) == (e in (1, 2))
    # With a threshold that rejects everyone only the anchor is left; a fixed 0.9 is of no use where domains differ.
    strict = align_experts(Prototypes(counts=counts, inputs=inputs, responses=responses), 1.0, 0.3)
    assert all(int((strict.majority(0, e) > 0).sum()) == 1 for e in range(num_experts))
    assert set(found.outsiders(0, 1)) == {3}
    assert float(found.outsiders(0, 1)[3][3]) == 1.0


# ---- regions and memory


def test_regions_of_the_clients_own_making_are_put_into_common_ones() -> None:
    # Two clients find the same two clumps, in different order.
    low, high = torch.tensor([0.0, 0.0]), torch.tensor([10.0, 0.0])
    inputs = torch.stack([torch.stack([low, high]), torch.stack([high, low])])
    found = one_expert([[3, 1], [2, 6]], inputs, inputs + 1)
    common, middles = in_common_regions(found, None)
    order = middles[0, 0, :, 0].argsort()
    torch.testing.assert_close(middles[0, 0][order], torch.stack([low, high]))
    assert common.counts[:, 0, 0][:, order].tolist() == [[3, 1], [6, 2]]
    assert common.responses is not None
    torch.testing.assert_close(common.responses[:, 0, 0][:, order].float(), torch.stack([low + 1, high + 1]).expand(2, 2, 2))
    # Both clients answer alike in both regions, though they had numbered them differently.
    assert float(semantic_similarity(common, -1)[0, 1, 0, 0]) == pytest.approx(3 / 4 + 1 / 4, abs=0.01)


def test_merging_two_regions_into_one_weighs_their_means_by_tokens() -> None:
    found = one_expert([[3, 1]], torch.tensor([[[1.0], [5.0]]]), torch.tensor([[[2.0], [6.0]]]))
    merged = match_regions(found, torch.tensor([0.0, 100.0])[None, None, :, None])
    assert merged.counts.flatten().tolist() == [4, 0]
    assert merged.inputs.flatten().tolist() == [2.0, 0.0]
    assert merged.responses is not None
    assert merged.responses.flatten().tolist() == [3.0, 0.0]


def test_known_regions_move_to_their_tokens_mean_and_stay_where_there_are_none() -> None:
    found = one_expert([[3, 0], [1, 0]], torch.tensor([[[1.0], [0.0]], [[5.0], [0.0]]]), torch.zeros(2, 2, 1))
    before = torch.tensor([0.0, 7.0])[None, None, :, None]
    assert region_middles(found, before).flatten().tolist() == [2.0, 7.0]
    same, _ = in_common_regions(found, before)
    assert same is found


def test_regions_are_made_anew_where_the_first_cohort_had_no_token() -> None:
    nobody = one_expert([[0, 0]] * 3, torch.zeros(3, 2, 1), torch.zeros(3, 2, 1))
    _, middles = in_common_regions(nobody, None)
    assert middles.flatten().tolist() == [0, 0]
    _, middles = in_common_regions(nobody, middles)
    assert middles.flatten().tolist() == [0, 0]
    # Equal centroids: every token is in the first region. Means 1 (three tokens) and 3 (one) lie together, 11 apart.
    inputs = torch.tensor([[[1.0], [0.0]], [[3.0], [0.0]], [[11.0], [0.0]]])
    _, middles = in_common_regions(one_expert([[3, 0], [1, 0], [2, 0]], inputs, inputs), middles)
    assert sorted(middles.flatten().tolist()) == [1.5, 11.0]
    # From then on Lloyd's steps: a second k-means over 0, 1 and 100 would put 0 and 1 together.
    before = middles.sort(dim=2).values
    inputs = torch.tensor([[[0.0], [100.0]], [[0.0], [1.0]]])
    moved = region_middles(one_expert([[2, 1], [0, 1]], inputs, inputs), before)
    assert moved.flatten().tolist() == [0.0, 50.5]


def test_only_experts_with_repeated_regions_are_cut_again_and_lose_none_by_it() -> None:
    before = torch.tensor([[0.0, 6.0, 6.0], [0.0, 0.0, 0.0], [1.0, 2.0, 3.0], [5.0, 5.0, 5.0]])[None, :, :, None]
    counts = torch.zeros(2, 1, 4, 3)
    inputs = torch.zeros(2, 1, 4, 3, 1)
    counts[0, 0, 0, 0], inputs[0, 0, 0, 0] = 4, 1.0  # two different regions before, and one mean: no more is known now
    counts[:, 0, 1, 0], inputs[:, 0, 1, 0, 0] = torch.tensor([1.0, 3.0]), torch.tensor([5.0, 9.0])  # one before, two means
    found = Prototypes(counts=counts, inputs=inputs, responses=None)
    moved = region_middles(found, before)[0, :, :, 0]
    assert moved[0].tolist() == [1.0, 6.0, 6.0]
    assert set(moved[1].tolist()) == {5.0, 9.0}
    assert moved[2:].tolist() == [[1.0, 2.0, 3.0], [5.0, 5.0, 5.0]]  # nobody has a token on these
    # A third mean makes the first expert's regions three.
    counts[1, 0, 0, :2], inputs[1, 0, 0, :2, 0] = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 7.0])
    assert sorted(region_middles(found, before)[0, 0, :, 0].tolist()) == [1.0, 3.0, 7.0]


def test_shares_are_remembered_by_client_and_compared_when_it_comes_back() -> None:
    first = shares(2, 1, 3).float()
    known = remember(None, (0, 2), first, 4)
    assert known.isnan().all(dim=-1).flatten().tolist() == [False, True, False, True]
    now = shares(2, 1, 3, seed=1).float()
    found = since_last(known, (1, 2), now)
    assert torch.equal(found[0], torch.ones(1, 3, dtype=torch.float64))
    torch.testing.assert_close(found[1], agreement(now[1], first[1]))
    assert bool((found[1] < 1).all())
    assert torch.equal(since_last(None, (1, 2), now), torch.ones_like(now))
    again = remember(known, (2,), now[1:], 4)
    assert torch.equal(again[0], known[0])
    assert torch.equal(again[2], now[1])
