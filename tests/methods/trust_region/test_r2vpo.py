"""Identities of the R2VPO card (arXiv 2601.03320)."""

import torch
from torch.testing import assert_close

from polopt.methods.trust_region.r2vpo import dual_step, effective_weight, ratio_variance_loss

R = torch.linspace(0.01, 5, 100, dtype=torch.float64)


def test_r2vpo_without_multiplier_is_the_unclipped_importance_weighted_gradient() -> None:
    assert_close(ratio_variance_loss(R, torch.full_like(R, 0.7), 0.0), -0.7 * R)


def test_r2vpo_at_ratio_one_is_the_plain_policy_gradient_for_any_multiplier() -> None:
    one = torch.ones(1, dtype=torch.float64)
    for multiplier in (0.0, 0.5, 10.0):
        assert effective_weight(one, 0.3 * one, multiplier).item() == 0.3


def test_r2vpo_stationary_ratio() -> None:
    advantage, multiplier = torch.tensor(0.4, dtype=torch.float64), 0.5
    star = 1 + advantage / (2 * multiplier)
    weight = effective_weight(R, advantage.expand_as(R), multiplier)
    assert (weight[star > R] > 0).all() and (weight[star < R] < 0).all()


def test_r2vpo_gradient_is_minus_the_effective_weight() -> None:
    x = R.log().requires_grad_()
    advantage = torch.full_like(R, -0.6)
    (gradient,) = torch.autograd.grad(ratio_variance_loss(x.exp(), advantage, 0.3).sum(), x)
    assert_close(gradient, -effective_weight(R, advantage, 0.3))


def test_r2vpo_closed_form_optimum_of_a_finite_policy() -> None:
    mu = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, 0.5, -0.7], dtype=torch.float64)
    assert (mu * advantage).sum().abs() < 1e-12
    delta = 0.04
    multiplier = 0.5 * ((mu * advantage.square()).sum() / delta).sqrt()
    ratio = 1 + advantage / (2 * multiplier)
    assert_close((mu * ratio).sum(), torch.ones((), dtype=torch.float64))
    assert_close((mu * (ratio - 1).square()).sum(), torch.tensor(delta, dtype=torch.float64))
    assert_close((mu * (ratio - 1) * advantage).sum(), (delta * (mu * advantage.square()).sum()).sqrt())
    assert_close(
        effective_weight(ratio, advantage, multiplier), torch.zeros_like(ratio), atol=1e-12, rtol=0.0
    )


def test_ratio_variance_bounds_total_variation_and_kl() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(50):
        mu, pi = torch.randn(2, 6, generator=draws, dtype=torch.float64).softmax(-1)
        variance = (mu * (pi / mu - 1).square()).sum()
        assert 0.5 * (pi - mu).abs().sum() <= 0.5 * variance.sqrt() + 1e-12
        assert (pi * (pi / mu).log()).sum() <= (1 + variance).log() + 1e-12


def test_r2vpo_abandoned_decisions_stop_counting_and_exploded_ones_are_pulled_back() -> None:
    far = torch.tensor([1e-9, 1e6], dtype=torch.float64)
    weight = effective_weight(far, torch.ones_like(far), 0.1)
    assert weight[0].abs() < 1e-8 and weight[1] < -1e9


def test_r2vpo_dual_step_follows_the_violation_and_stays_non_negative() -> None:
    multiplier = torch.tensor(0.01, dtype=torch.float64)
    assert dual_step(multiplier, torch.tensor(0.1), 0.04, 0.5) > multiplier
    assert dual_step(multiplier, torch.tensor(0.04, dtype=torch.float64), 0.04, 0.5) == multiplier
    assert dual_step(multiplier, torch.tensor(0.0), 0.04, 0.5) == 0.0


def test_ratios_inside_a_clip_have_a_variance_of_at_most_its_width_squared() -> None:
    draws = torch.Generator().manual_seed(0)
    for _ in range(20):
        mu = torch.randn(6, generator=draws, dtype=torch.float64).softmax(-1)
        step = 2 * torch.rand(6, generator=draws, dtype=torch.float64) - 1
        step = step - (mu * step).sum()
        ratio = 1 + 0.2 * step / step.abs().max()
        assert_close((mu * ratio).sum(), torch.ones((), dtype=torch.float64))
        assert (mu * (ratio - 1).square()).sum() <= 0.2**2
