"""Identities of the Knapsack RL card (arXiv 2509.25849)."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from polopt.errors import ConfigError
from polopt.methods.allocation.knapsack_rl import KnapsackBudget, Record, allocate, cost, success_rate, value

RATES = torch.tensor([0.05, 0.3, 1 / 3, 0.5, 0.9], dtype=torch.float64)


def test_value_vanishes_without_mixed_results() -> None:
    assert not value(8, torch.tensor([0.0, 1.0])).any()
    assert not value(1, RATES).any()


def test_value_of_two_rollouts_and_of_many() -> None:
    assert_close(value(2, RATES), 2 * RATES.square() * (1 - RATES) ** 3)
    assert_close(value(5000, RATES), RATES * (1 - RATES).square())
    assert (value(5000, torch.linspace(0.01, 0.99, 99)) <= 4 / 27 + 1e-12).all()


def test_marginal_values_are_positive_and_fall() -> None:
    n = torch.arange(1, 40)
    for p in RATES:
        marginal = value(n, p[None]).diff()
        assert (marginal > 0).all() and (marginal.diff() < 0).all()


def test_the_harder_of_two_mirrored_prompts_is_worth_more() -> None:
    assert_close(value(8, RATES) / value(8, 1 - RATES), (1 - RATES) / RATES)


def records(*rates: float) -> list[Record]:
    return [Record(True, rate, 100) for rate in rates]


def test_budgets_sum_to_the_total_and_new_prompts_get_the_uniform_one() -> None:
    new = [Record(False, 0.0, 0)] * 4
    assert allocate(new, 32, 8).budget.tolist() == [8] * 4
    for rates in ((0.1, 0.5, 0.9, 0.0), (0.5,) * 4, (0.0,) * 4, (1.0, 0.2, 0.3, 0.0), (1.0,) * 4):
        for variant in ("exact", "reference"):
            assert allocate(records(*rates), 32, 8, variant=variant).budget.sum() == 32


def test_equal_rates_differ_by_at_most_one() -> None:
    budget = allocate(records(*[0.3] * 5), 43, 8, fallback=False).budget
    assert budget.max() - budget.min() <= 1


def test_equal_bounds_are_uniform() -> None:
    assert allocate(records(0.1, 0.5, 0.7), 24, 8, low=8, up=8).budget.tolist() == [8, 8, 8]


def test_exact_variant_is_optimal_by_exhaustive_search() -> None:
    rates = torch.tensor([0.05, 0.4, 0.8], dtype=torch.float64)
    best = max(
        value(torch.tensor(n), rates).sum().item() for n in product(range(2, 12), repeat=3) if sum(n) == 15
    )
    budget = allocate(records(*rates.tolist()), 15, 5, fallback=False).budget
    assert value(budget, rates).sum().item() == pytest.approx(best, abs=1e-15)


def test_order_of_prompts_does_not_matter() -> None:
    rates = [0.05, 0.3, 0.6, 0.9]
    plain = allocate(records(*rates), 32, 8, fallback=False).budget
    turned = allocate(records(*rates[::-1]), 32, 8, fallback=False).budget
    assert plain.tolist() == turned.tolist()[::-1]


def test_cost_of_an_even_prompt() -> None:
    assert cost(0.5, 0.9) == pytest.approx(3.3219, abs=1e-4)
    assert cost(0.2, 0.9) == pytest.approx(cost(0.8, 0.9))


def test_surplus_goes_to_solved_prompts_when_none_is_unsolved() -> None:
    assert allocate(records(0.5, 0.5, 1.0), 48, 16, variant="reference").budget.tolist() == [5, 5, 38]


def test_floors_beyond_the_total_are_refused() -> None:
    with pytest.raises(ConfigError, match="floors"):
        allocate(records(0.5, 0.5), 3, 1)


def test_unknown_prompts_have_no_record_and_minus_one_counts_as_failure() -> None:
    assert success_rate([]) == Record(False, 0.0, 0)
    assert success_rate([], min_count=0).valid
    assert success_rate([[1, -1, 1, -1] * 2]) == Record(True, 0.5, 8)


def test_budget_state_round_trips() -> None:
    part, other = KnapsackBudget(), KnapsackBudget()
    part.visits = {7: [[1.0, 0.0], [1.0]], 9: [[0.0]]}
    other.load_state_dict(part.state_dict())
    assert other.visits == part.visits
