"""Identities of the BRRL card (arXiv 2604.18578) that concern GBPO and the target ratio."""

import math

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.methods.trust_region.gbpo import (
    BoundedRatio,
    MeanAndMedian,
    group_median,
    mean_and_median_advantages,
    target_ratio,
)

SIGNAL = torch.linspace(-30, 30, 601, dtype=torch.float64)
GROUP = torch.arange(24) // 6


def rewards(seed: int = 0) -> torch.Tensor:
    return torch.randn(24, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_batch(outcome: torch.Tensor, group: torch.Tensor, **options: object) -> Batch:
    """With the signals of the advantage part and the loss weights of the surrogate."""
    n, draws = len(group), torch.Generator().manual_seed(1)
    mask = torch.arange(4) < 1 + torch.arange(n)[:, None] % 4
    old = torch.where(mask, torch.randn(n, 4, generator=draws, dtype=torch.float64), torch.nan)
    batch = Batch(
        mask=mask, old_logp=old, rewards=outcome[:, None], group=group, prompt_id=group, weights=mask.double(),
        batch_size=[n],
    )  # fmt: skip
    part = MeanAndMedian(**options)
    batch.advantages = part(batch).expand(mask.shape)
    for name, signal in part.signals(batch).items():
        batch.set_signal(name, signal)
    batch.loss_weight = BoundedRatio().loss_weights(batch)
    return batch


def gradient(surrogate: BoundedRatio, batch: Batch, shift: float = 0.0) -> torch.Tensor:
    logp = (batch.old_logp + shift).requires_grad_()
    return torch.autograd.grad(surrogate(Evaluation(logp).where(batch.mask), batch), logp)[0]


def solved_target(
    q: torch.Tensor, policy: torch.Tensor, scale: float, low: float, high: float
) -> torch.Tensor:
    """The target ratio at the mu that makes its mean under `policy` 1, by bisection."""
    a, b = q.min() - 100 * scale, q.max() + 100 * scale
    for _ in range(200):
        mu = (a + b) / 2
        mean = (policy * target_ratio((q - mu) / scale, low, high, exact=True)).sum()
        a, b = (mu, b) if mean > 1 else (a, mu)
    return target_ratio((q - mu) / scale, low, high, exact=True)


def test_target_with_equal_widths_is_the_hyperbolic_tangent_in_both_forms() -> None:
    expected = 1 + 0.3 * torch.tanh(SIGNAL / 2)
    assert_close(target_ratio(SIGNAL, 0.3, 0.3), expected)
    assert_close(target_ratio(SIGNAL, 0.3, 0.3, exact=True), expected)


@pytest.mark.parametrize("exact", [False, True])
def test_target_rises_inside_its_bounds(exact: bool) -> None:
    target = target_ratio(SIGNAL, 0.2, 0.5, exact)
    assert (target > 0.8).all() and (target < 1.5).all() and (target.diff() > 0).all()
    limits = target_ratio(torch.tensor([-1e9, 1e9], dtype=torch.float64), 0.2, 0.5, exact)
    assert_close(limits, torch.tensor([0.8, 1.5], dtype=torch.float64))


@pytest.mark.parametrize(("low", "high"), [(0.3, 0.3), (0.2, 0.5), (0.9, 3.0)])
def test_target_of_a_zero_advantage_is_one_if_exact_and_off_by_half_the_width_difference_if_not(
    low: float, high: float
) -> None:
    zero = torch.zeros((), dtype=torch.float64)
    assert target_ratio(zero, low, high, exact=True).item() == pytest.approx(1)
    assert target_ratio(zero, low, high).item() == pytest.approx(1 + (high - low) / 2)


def test_exact_target_is_the_optimum_of_the_barrier_problem() -> None:
    """Stationary for the regulariser with minimum at 1 and barriers at the bounds: its slope equals the signal."""
    low, high = 0.2, 0.5
    rho = target_ratio(SIGNAL[200:401], low, high, exact=True).requires_grad_()
    below, above = rho - (1 - low), 1 + high - rho
    barrier = below * below.log() + above * above.log() - rho * math.log(low / high)
    slope = torch.autograd.grad(barrier.sum(), rho)[0]
    assert_close(slope, SIGNAL[200:401], rtol=1e-6, atol=1e-6)


def test_surrogate_gain_of_the_target_is_the_closed_form_and_not_negative() -> None:
    draws = torch.Generator().manual_seed(2)
    policy = torch.rand(7, generator=draws, dtype=torch.float64)
    policy /= policy.sum()
    for scale in (0.01, 0.3, 10.0):
        q = torch.randn(7, generator=draws, dtype=torch.float64)
        rho = solved_target(q, policy, scale, 0.3, 0.3)
        signal = torch.logit((rho - 0.7) / 0.6, eps=1e-15) * scale
        assert_close((policy * rho).sum(), torch.ones((), dtype=torch.float64))
        gain = (policy * (rho - 1) * (q - (policy * q).sum())).sum()
        assert gain > 0
        if scale > 0.01:
            assert_close(gain, 0.3 * (policy * signal * torch.tanh(signal / (2 * scale))).sum())


def test_gain_of_any_policy_is_at_least_the_targets_less_the_loss() -> None:
    draws = torch.Generator().manual_seed(3)
    for _ in range(50):
        policy, other = (torch.rand(2, 6, generator=draws, dtype=torch.float64) + 0.05).softmax(-1)
        q = torch.randn(6, generator=draws, dtype=torch.float64)
        advantage, rho = q - (policy * q).sum(), solved_target(q, policy, 0.2, 0.3, 0.3)
        ratio = other / policy
        gain, best = ((policy * (r - 1) * advantage).sum() for r in (ratio, rho))
        assert gain >= best - (policy * (ratio - rho).abs() * advantage.abs()).sum() - 1e-12


def test_ppo_is_the_hinge_version_of_the_loss() -> None:
    """Below the hard target both pull alike; beyond it PPO is silent and this loss pushes back."""
    width, ratio = 0.3, torch.linspace(0.2, 2.0, 181, dtype=torch.float64)
    for advantage in (0.7, -0.7):
        sign = math.copysign(1.0, advantage)
        target = target_ratio(torch.tensor(sign * 1e9, dtype=torch.float64), width, width)
        r = ratio.clone().requires_grad_()
        clipped = -torch.minimum(r * advantage, r.clamp(1 - width, 1 + width) * advantage)
        hinge = abs(advantage) * (sign * (target - r)).clamp(min=0) - advantage * target
        assert_close(clipped, hinge)
        ppo = torch.autograd.grad(clipped.sum(), r)[0]
        bounded = torch.autograd.grad(((r - target).abs() * abs(advantage)).sum(), r)[0]
        before, after = sign * (target - ratio) > 1e-6, sign * (target - ratio) < -1e-6
        assert_close(bounded[before], ppo[before])
        assert not ppo[after].any() and (bounded[after] == advantage).all()


def test_signals_ignore_a_constant_and_scaling_with_the_temperature_changes_nothing() -> None:
    found = mean_and_median_advantages(rewards(), GROUP, norm_by_std=False)
    shift = GROUP.double() * 100 - 7
    assert_close(mean_and_median_advantages(rewards() + shift, GROUP, norm_by_std=False), found)
    assert_close(
        mean_and_median_advantages(rewards() + shift, GROUP), mean_and_median_advantages(rewards(), GROUP)
    )
    scaled = mean_and_median_advantages(3 * rewards(), GROUP, norm_by_std=False)[1]
    assert_close(target_ratio(scaled / 0.6, 0.2, 0.4, True), target_ratio(found[1] / 0.2, 0.2, 0.4, True))
    assert_close(
        mean_and_median_advantages(3 * rewards(), GROUP, 1e-12),
        mean_and_median_advantages(rewards(), GROUP, 1e-12),
    )


def test_target_tends_to_one_and_its_threshold_to_the_mean_with_the_temperature() -> None:
    q, policy = rewards()[:6], torch.full((6,), 1 / 6, dtype=torch.float64)
    rho = solved_target(q, policy, 1e4, 0.3, 0.3)
    assert_close(rho, torch.ones(6, dtype=torch.float64), atol=1e-4, rtol=0.0)
    assert_close((rho - 1) * 2e4 / 0.3, q - q.mean(), rtol=1e-4, atol=1e-4)


def test_target_without_floor_at_small_temperature_is_the_cross_entropy_method() -> None:
    q, policy = rewards()[:8], torch.full((8,), 1 / 8, dtype=torch.float64)
    elite = q >= q.topk(2).values.min()
    rho = solved_target(q, policy, 1e-5, 1 - 1e-12, 3.0)
    assert_close(rho, torch.where(elite, 4.0, 0.0).double(), atol=1e-3, rtol=0.0)


@pytest.mark.parametrize(("right", "targets"), [(2, (1.0, 1.3)), (4, (0.7, 1.0)), (3, (0.7, 1.3))])
def test_gbpo_anchors_the_majority_of_binary_rewards(right: int, targets: tuple[float, float]) -> None:
    outcome = (torch.arange(6) < right).double()
    found = BoundedRatio().target(a_batch(outcome, torch.zeros(6, dtype=torch.int64)))[:, 0]
    wrong, good = targets
    assert_close(found, torch.where(outcome > 0, good, wrong).double())
    anchored = found[outcome == (right > 3)] if right != 3 else found[:0]
    assert (anchored == 1).all()


@pytest.mark.parametrize(("right", "anchored"), [(2, 0.0), (4, 1.0), (3, None)])
def test_gbpo_gradient_on_policy_is_the_signed_advantage_and_zero_for_the_anchored(
    right: int, anchored: float | None
) -> None:
    outcome = (torch.arange(6) < right).double()
    batch, surrogate = a_batch(outcome, torch.zeros(6, dtype=torch.int64)), BoundedRatio()
    found = gradient(surrogate, batch)
    expected = -(surrogate.target(batch) - 1).sign() * batch.advantages.abs() * batch.loss_weight
    assert_close(found, expected)
    moved = batch.mask & (outcome != (-1 if anchored is None else anchored))[:, None]
    assert torch.equal(found != 0, moved)


def test_gbpo_loss_gradient_is_ratio_times_the_size_of_the_advantage_towards_the_target() -> None:
    batch, surrogate = a_batch(rewards(), GROUP), BoundedRatio(tau=0.5)
    for shift in (-0.5, 0.05, 0.5):
        sign = (math.exp(shift) - surrogate.target(batch)).sign()
        expected = sign * math.exp(shift) * batch.advantages.abs() * batch.loss_weight
        assert_close(gradient(surrogate, batch, shift), expected)


def test_gbpo_signals_are_deviations_from_mean_and_median_in_unbiased_deviations() -> None:
    table = rewards().view(4, 6)
    scale = table.std(-1, keepdim=True) + 1e-6
    mean, median = mean_and_median_advantages(rewards(), GROUP)
    assert_close(mean.view(4, 6), (table - table.mean(-1, keepdim=True)) / scale)
    assert_close(median.view(4, 6), (table - table.quantile(0.5, -1, keepdim=True)) / scale)
    plain = mean_and_median_advantages(rewards(), GROUP, norm_by_std=False)
    assert_close(plain, (mean * scale.repeat_interleave(6), median * scale.repeat_interleave(6)))


def test_group_median_of_ragged_unordered_groups_is_the_linear_quantile() -> None:
    group = torch.tensor([7, 3, 7, 7, 3, 9, 7, 3, 3, 3])
    values = rewards()[:10]
    expected = torch.stack([values[group == g].quantile(0.5) for g in (3, 7, 9)])
    assert_close(group_median(values, Groups.of(group)), expected)


def test_gbpo_is_silent_for_constant_groups_and_single_samples() -> None:
    batch = a_batch(torch.tensor([0.1, 0.1, 0.1, 5.0], dtype=torch.float64), torch.tensor([0, 0, 0, 1]))
    assert not batch.advantages.any() and not batch.signal("target_advantages").any()
    assert not gradient(BoundedRatio(), batch, 0.4).any()


def test_gbpo_with_missing_rewards_nan_outside_the_mask_and_no_rows_is_defined() -> None:
    outcome = torch.tensor([1.0, torch.nan, 1.0, torch.nan], dtype=torch.float64)
    group = torch.zeros(4, dtype=torch.int64)
    batch = a_batch(outcome, group)
    assert_close(batch.advantages, a_batch(outcome.nan_to_num(), group).advantages)
    found = gradient(BoundedRatio(), batch)
    assert found.isfinite().all() and not found[~batch.mask].any()
    far = gradient(BoundedRatio(), batch, 1e4)
    assert far.isfinite().all()
    empty = a_batch(torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert empty.advantages.shape == (0, 4) and empty.signal("target_advantages").shape == (0,)


@pytest.mark.parametrize("norm_by_std", [True, False])
def test_official_signals_of_a_group_of_one_are_its_reward(norm_by_std: bool) -> None:
    outcome = torch.tensor([0.7, 0.0, 1.0, -2.0], dtype=torch.float64)
    group = torch.tensor([3, 1, 1, 0])
    zero, reward = (
        mean_and_median_advantages(outcome, group, norm_by_std=norm_by_std, singletons=s)
        for s in ("zero", "reward")
    )
    alone = torch.tensor([True, False, False, True])
    for off, on in zip(zero, reward, strict=True):
        assert not off[alone].any()
        assert_close(on[alone], outcome[alone] / (1 + 1e-6 * norm_by_std))
        assert torch.equal(on[~alone], off[~alone])
