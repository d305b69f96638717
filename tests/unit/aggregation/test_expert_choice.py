"""Experts that choose clients: against brute force, against an integer solver, and against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.optimize import Bounds, LinearConstraint, milp

from fedgraft.aggregation.expert_choice import add_noise, balance_of, choose_clients, random_scores, scores_of
from fedgraft.errors import MethodError


def integer_optimum(scores: np.ndarray, per_expert: int, low: int, high: int) -> float:
    """The best value by branch and bound over binary variables."""
    experts, clients = scores.shape
    row = np.zeros((experts, experts * clients))
    column = np.zeros((clients, experts * clients))
    for j, c in itertools.product(range(experts), range(clients)):
        row[j, j * clients + c] = column[c, j * clients + c] = 1
    bounds = [LinearConstraint(row, per_expert, per_expert), LinearConstraint(column, low, high)]
    found = milp(-scores.reshape(-1), constraints=bounds, integrality=np.ones(scores.size), bounds=Bounds(0, 1))
    assert found.success
    return -float(found.fun)


@pytest.mark.parametrize(
    ("experts", "clients", "per_expert", "low", "high"), [(30, 10, 2, 2, 8), (9, 5, 3, 2, 6), (6, 3, 1, 2, 2)]
)
def test_the_relaxation_has_the_value_of_the_integer_programme(
    experts: int, clients: int, per_expert: int, low: int, high: int
) -> None:
    generator = torch.Generator().manual_seed(experts)
    for _ in range(8):
        phi, psi = torch.randn(experts, 4, generator=generator), 3 * torch.randn(clients, 4, generator=generator)
        scores = scores_of(phi, psi)
        chosen = choose_clients(scores, per_expert=per_expert, low=low, high=high)
        assert chosen.sum(dim=1).tolist() == [per_expert] * experts
        held = chosen.sum(dim=0).tolist()
        assert low <= min(held)
        assert max(held) <= high
        assert float(scores[chosen].sum()) == pytest.approx(integer_optimum(scores.numpy(), per_expert, low, high), abs=1e-9)


def test_the_choice_against_every_choice_there_is() -> None:
    pairs = list(itertools.combinations(range(3), 2))
    for seed in range(5):
        scores = random_scores(4, 3, seed)
        values = []
        for choice in itertools.product(pairs, repeat=4):
            held = [sum(client in pair for pair in choice) for client in range(3)]
            if min(held) >= 1 and max(held) <= 3:
                values.append(sum(float(scores[j, c]) for j, pair in enumerate(choice) for c in pair))
        chosen = choose_clients(scores, per_expert=2, low=1, high=3)
        assert float(scores[chosen].sum()) == pytest.approx(max(values), abs=1e-12)


def test_bounds_that_nothing_fits_are_refused() -> None:
    with pytest.raises(MethodError, match="gives the clients 9 experts in all, and the experts take 8"):
        choose_clients(random_scores(4, 3, 0), per_expert=2, low=3, high=8)


def test_scores_are_a_softmax_over_clients() -> None:
    phi, psi = torch.tensor([[2.0, 0.0], [0.0, 0.0]]), torch.tensor([[1.0, 5.0], [0.0, 7.0]])
    first = math.exp(2 / math.sqrt(2)) / (math.exp(2 / math.sqrt(2)) + 1)
    expected = torch.tensor([[first, 1 - first], [0.5, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(scores_of(phi, psi), expected)


def test_clients_that_are_alike_are_wanted_alike() -> None:
    psi = torch.randn(1, 4, generator=torch.Generator().manual_seed(0)).expand(5, 4)
    scores = scores_of(torch.randn(10, 4, generator=torch.Generator().manual_seed(1)), psi)
    torch.testing.assert_close(scores, torch.full_like(scores, 1 / 5))
    chosen = choose_clients(scores, per_expert=2, low=2, high=8)
    assert float(scores[chosen].sum()) == pytest.approx(10 * 2 / 5)  # every choice has this value


def test_balance_is_one_when_even_and_their_number_at_collapse() -> None:
    even = torch.full((8, 4), 0.25)
    chosen = torch.tensor([[0, 1], [2, 3]] * 4)
    torch.testing.assert_close(balance_of(even, chosen), torch.tensor(1.0))
    collapsed = torch.zeros(8, 4)
    collapsed[:, 2] = 1
    torch.testing.assert_close(balance_of(collapsed, torch.full((8, 1), 2)), torch.tensor(4.0))
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.7, 0.2]], requires_grad=True)
    found = balance_of(probs, torch.tensor([[0, 1], [1, 0]]))
    torch.testing.assert_close(found, torch.tensor(3 * (0.3 * 0.5 + 0.5 * 0.5)))
    found.backward()  # type: ignore[no-untyped-call]
    assert probs.grad is not None
    torch.testing.assert_close(probs.grad, torch.tensor([[0.75, 0.75, 0.0]] * 2))  # 3 f_j / T


def test_noise_is_cut_to_the_largest_clean_norm() -> None:
    clean = torch.tensor([[3.0, 4.0], [0.3, 0.4]], dtype=torch.float64)
    assert torch.equal(add_noise(clean, 0.0, torch.Generator()), clean)
    small = add_noise(clean, 1e-3, torch.Generator().manual_seed(0))
    drawn = 1e-3 * torch.randn(2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(small[1], (clean + drawn)[1])
    large = add_noise(clean, 1e4, torch.Generator().manual_seed(0))
    torch.testing.assert_close(large.norm(dim=1), torch.tensor([5.0, 5.0], dtype=torch.float64))
