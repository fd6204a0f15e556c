"""Identities of the BNPO card (arXiv 2506.02864)."""

import math

import pytest
import torch
from torch.testing import assert_close

from polopt.errors import PoloptError
from polopt.functional.groups import Groups
from polopt.methods.advantage.bnpo import beta_moment_fit, bnpo_advantage, fit, log_beta_density
from polopt.methods.classics.grpo import group_standardized


def rates_to_rewards(rates: list[float], size: int) -> tuple[torch.Tensor, torch.Tensor]:
    rewards = [[1.0] * round(rate * size) + [0.0] * (size - round(rate * size)) for rate in rates]
    return torch.tensor(rewards, dtype=torch.float64).flatten(), torch.arange(len(rates)).repeat_interleave(
        size
    )


def test_bnpo_with_alpha_beta_one_is_reinforce_with_group_mean() -> None:
    rewards, group = rates_to_rewards([0.0, 0.5, 1.0], 4)
    found = fit(rewards, Groups.of(group))
    assert (found.alpha, found.beta) == (1.0, 1.0)
    assert_close(bnpo_advantage(rewards[:, None], group), Groups.of(group).centre(rewards))


def test_bnpo_with_three_halves_is_grpo_with_biased_std_times_pi_over_eight() -> None:
    rewards, group = rates_to_rewards([0.25, 0.5, 0.75], 4)
    grpo = group_standardized(rewards, group, eps=1e-300, unbiased=False)
    assert_close(bnpo_advantage(rewards[:, None], group), math.pi / 8 * grpo, rtol=1e-10, atol=0.0)


def log_beta(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)


@pytest.mark.parametrize(("a", "b"), [(1.5, 1.5), (2.0, 5.0), (0.5, 3.0)])
def test_bnpo_parameters_minimise_the_gradient_variance(a: float, b: float) -> None:
    parameters = torch.tensor([1 + a / 3, 1 + b / 3], dtype=torch.float64, requires_grad=True)
    law = torch.tensor([a, b], dtype=torch.float64)

    def variance(p: torch.Tensor) -> torch.Tensor:
        expected = log_beta(law[0] + 3 - 2 * p[0], law[1] + 3 - 2 * p[1]) - log_beta(law[0], law[1])
        return (2 * log_beta(p[0], p[1]) + expected).exp()

    best = variance(parameters)
    (gradient,) = torch.autograd.grad(best, parameters)
    assert_close(gradient, torch.zeros(2, dtype=torch.float64), atol=1e-10, rtol=0.0)
    minimum = (3 * log_beta(parameters[0], parameters[1]) - log_beta(law[0], law[1])).exp()
    assert_close(best, minimum)
    for shift in ([0.1, 0.0], [0.0, -0.1], [-0.1, 0.1]):
        assert variance(parameters.detach() + torch.tensor(shift)) > best


def test_bnpo_variance_formula_matches_samples() -> None:
    draws = torch.Generator().manual_seed(0)
    a, b, n = 2.0, 3.0, 400_000
    gamma = torch._standard_gamma(
        torch.tensor([[a, b]], dtype=torch.float64).expand(n, 2).contiguous(), generator=draws
    )
    p = gamma[:, 0] / gamma.sum(-1)
    reward = torch.bernoulli(p, generator=draws)
    alpha, beta = torch.tensor(1 + a / 3, dtype=torch.float64), torch.tensor(1 + b / 3, dtype=torch.float64)
    sampled = ((reward - p) / log_beta_density(p, alpha, beta).exp()).square()
    law = torch.tensor([a, b], dtype=torch.float64)
    exact = (3 * log_beta(alpha, beta) - log_beta(law[0], law[1])).exp()
    assert abs(sampled.mean() - exact) < 5 * sampled.std() / math.sqrt(n)
    plain = (reward - p).square()
    grpo = (math.pi / 8) ** 2 * (reward - p).square() / (p * (1 - p))
    assert sampled.mean() < plain.mean() and sampled.mean() < grpo.mean()


def test_bnpo_sums_to_zero_in_groups_and_vanishes_when_all_agree() -> None:
    rewards, group = rates_to_rewards([0.0, 0.25, 0.5, 1.0], 8)
    advantage = bnpo_advantage(rewards[:, None], group)
    assert_close(Groups.of(group).sum(advantage), torch.zeros(4, dtype=torch.float64), atol=1e-12, rtol=0.0)
    assert not advantage[(group == 0) | (group == 3)].any()


def test_beta_moment_fit_recovers_the_parameters() -> None:
    a, b = torch.tensor(2.5, dtype=torch.float64), torch.tensor(4.0, dtype=torch.float64)
    mean, variance = a / (a + b), a * b / ((a + b).square() * (a + b + 1))
    found = beta_moment_fit(mean, variance)
    assert_close(found, (a, b))


def test_bnpo_swapping_rewards_swaps_parameters_and_signs() -> None:
    rewards, group = rates_to_rewards([0.125, 0.25, 0.5], 8)
    one, other = fit(rewards, Groups.of(group)), fit(1 - rewards, Groups.of(group))
    assert_close((one.alpha, one.beta), (other.beta, other.alpha))
    assert_close(bnpo_advantage(rewards[:, None], group), -bnpo_advantage(1 - rewards[:, None], group))


def test_bnpo_is_invariant_to_order_labels_and_affine_rewards() -> None:
    rewards, group = rates_to_rewards([0.125, 0.25, 0.5], 8)
    advantage = bnpo_advantage(rewards[:, None], group)
    order = torch.randperm(len(rewards), generator=torch.Generator().manual_seed(1))
    assert_close(bnpo_advantage(rewards[order, None], 100 - 7 * group[order]), advantage[order])
    assert_close(bnpo_advantage(3 * rewards[:, None] - 1, group, -1.0, 2.0), advantage)


def test_bnpo_of_equal_rates_single_prompts_and_single_samples_is_defined() -> None:
    rewards, group = rates_to_rewards([0.5, 0.5], 4)
    assert_close(bnpo_advantage(rewards[:, None], group), Groups.of(group).centre(rewards))
    assert_close(bnpo_advantage(rewards[:4, None], group[:4]), Groups.of(group[:4]).centre(rewards[:4]))
    alone = bnpo_advantage(torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))
    assert alone.tolist() == [0.0]


def test_bnpo_of_several_rewards_is_the_mean_of_each() -> None:
    first, group = rates_to_rewards([0.25, 0.5, 0.75], 4)
    both = torch.stack([first, 1 - first.roll(3)], -1)
    mean = (bnpo_advantage(both[:, :1], group) + bnpo_advantage(both[:, 1:], group)) / 2
    assert_close(bnpo_advantage(both, group), mean)


def test_bnpo_refuses_rewards_outside_their_range() -> None:
    with pytest.raises(PoloptError, match="r_min"):
        bnpo_advantage(torch.tensor([[2.0], [0.0]]), torch.zeros(2, dtype=torch.int64))
