"""Identities of the BRRL card (arXiv 2604.18578) that concern the closed form and BPO."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.errors import ConfigError
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.trust_region.bpo import (
    CriticBoundedRatio,
    MedianLoss,
    bounded_ratio_optimum,
    smooth_absolute,
)
from polopt.miniature import SumModActor, SumModTask
from polopt.testing import check_method
from polopt.testing.tabular import TabularMDP

STATES, ACTIONS = 40, 6
LAMBDAS = [1e-12, 1e-3, 0.2, 1.0, 30.0]
WIDTH = 0.3
SYMMETRIC = {"c_low": 1 - WIDTH, "c_high": 1 + WIDTH}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def a_problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Policies and action values."""
    return normal(STATES, ACTIONS, seed=seed).softmax(-1), normal(STATES, ACTIONS, seed=seed + 1)


def a_batch(seed: int = 0) -> tuple[Batch, Evaluation]:
    """Ragged rows with returns, NaN below the mask, and the evaluation of a policy that has moved."""
    mask = torch.arange(4) < 1 + torch.arange(10)[:, None] % 4

    def field(place: int, size: float = 1.0) -> torch.Tensor:
        return torch.where(mask, size * normal(10, 4, seed=seed + place), torch.nan)

    batch = Batch(
        mask=mask, old_logp=field(1) - 2, rewards=torch.zeros(10, 1), group=torch.arange(10),
        prompt_id=torch.arange(10), batch_size=[10],
    )  # fmt: skip
    batch.weights, batch.advantages = mask.double(), torch.zeros(10, 4, dtype=torch.float64)
    batch.old_value = field(3).nan_to_num()
    batch.set_signal("returns", field(5, 2.0).nan_to_num())
    batch.loss_weight = CriticBoundedRatio().loss_weights(batch)
    evaluation = Evaluation(batch.old_logp + field(2, 0.3), value=field(3), median=field(4))
    leaves = {name: t.requires_grad_() for name, t in evaluation.where(mask).tensors().items()}
    return batch, Evaluation(**leaves)


def gradients(loss: torch.Tensor, evaluation: Evaluation) -> dict[str, torch.Tensor]:
    leaves = evaluation.tensors()
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


@pytest.mark.parametrize("lam", LAMBDAS)
@pytest.mark.parametrize("bounds", [(0.7, 1.3), (0.5, 2.0), (0.0, 4.0), (0.95, 1.02)])
def test_optimal_ratio_averages_one_within_its_bounds(lam: float, bounds: tuple[float, float]) -> None:
    policy, q = a_problem()
    found = bounded_ratio_optimum(policy, q, lam, *bounds)
    assert_close(found.policy.sum(-1), torch.ones(STATES, dtype=torch.float64), rtol=1e-8, atol=0.0)
    assert (found.ratio >= bounds[0]).all() and (found.ratio <= bounds[1]).all()
    if lam >= 0.2:
        assert (found.ratio > bounds[0]).all() and (found.ratio < bounds[1]).all()
    assert (found.mu >= q.amin(-1)).all() and (found.mu <= q.amax(-1)).all()
    assert_close(found.policy, policy * found.ratio)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_gain_is_the_closed_form_and_positive(lam: float) -> None:
    policy, q = a_problem()
    found = bounded_ratio_optimum(policy, q, lam, **SYMMETRIC)
    centred = q - found.mu[:, None]
    expected = WIDTH * (policy * centred * torch.tanh(centred / (2 * lam))).sum(-1)
    assert_close(found.gain, expected, rtol=1e-8, atol=1e-10)
    assert (found.gain > 0).all()


def test_gain_is_zero_exactly_where_q_is_constant_on_the_support() -> None:
    policy = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.5, 0.25]], dtype=torch.float64)
    q = torch.tensor([[1.0, 1.0, 9.0], [1.0, 1.0, 1.1]], dtype=torch.float64)
    found = bounded_ratio_optimum(policy, q, 0.1, **SYMMETRIC)
    assert found.gain[0].item() == pytest.approx(0, abs=1e-15) and found.gain[1] > 1e-4
    assert_close(found.ratio[0, :2], torch.ones(2, dtype=torch.float64))
    assert found.mu[0].item() == pytest.approx(1)


@pytest.mark.parametrize("lam", [0.01, 0.2, 5.0])
def test_smoothed_median_is_the_least_of_the_smoothed_distance(lam: float) -> None:
    policy, q = a_problem()
    mu = bounded_ratio_optimum(policy, q, lam, **SYMMETRIC).mu[:, None].requires_grad_()
    distance = (policy * smooth_absolute((q - mu) / lam)).sum(-1)
    (slope,) = torch.autograd.grad(distance.sum(), mu)
    assert slope.abs().max() < 1e-9 / lam
    for shift in (-0.1, 0.1):
        assert ((policy * smooth_absolute((q - mu - shift) / lam)).sum(-1) > distance).all()


def test_smooth_absolute_is_softplus_less_half_and_even_and_convex() -> None:
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    found = smooth_absolute(x)
    assert_close(found, torch.log1p(x.exp()) - x / 2)
    assert_close(found, smooth_absolute(-x))
    assert (found.diff().diff() > -1e-12).all() and found.min().item() == pytest.approx(math.log(2))
    assert smooth_absolute(torch.tensor([1e30])).isfinite().all()


def test_smoothed_median_tends_to_the_median_and_the_ratio_to_a_step() -> None:
    q = normal(STATES, 7, seed=3)
    found = bounded_ratio_optimum(torch.full_like(q, 1 / 7), q, 1e-9, **SYMMETRIC)
    assert_close(found.mu, q.median(-1).values, rtol=0.0, atol=1e-7)
    side = (q - q.median(-1, keepdim=True).values).sign()
    assert_close(found.ratio, 1 + WIDTH * side, rtol=0.0, atol=1e-8)


def test_smoothed_median_of_even_halves_is_half_way_however_small_lambda() -> None:
    policy = torch.full((1, 4), 0.25, dtype=torch.float64)
    q = torch.tensor([[0.0, 1.0, 3.0, 7.0]], dtype=torch.float64)
    for lam in (1e-12, 1e-3, 0.02):
        assert bounded_ratio_optimum(policy, q, lam, **SYMMETRIC).mu.item() == pytest.approx(2, abs=1e-2)


@pytest.mark.parametrize("lam", LAMBDAS)
def test_value_improvement_is_the_visited_gain_and_every_step_raises_all_values(lam: float) -> None:
    for seed in range(3):
        mdp = TabularMDP.random(seed, states=12)
        policy = torch.full_like(mdp.reward, 1 / mdp.reward.shape[1])
        for _ in range(10):
            before = mdp.evaluate(policy)
            found = bounded_ratio_optimum(policy, before.q, lam, **SYMMETRIC)
            new = found.policy / found.policy.sum(-1, keepdim=True)
            after = mdp.evaluate(new)
            predicted = mdp.visits(new) @ found.gain / (1 - mdp.gamma)
            assert_close(after.value - before.value, predicted, rtol=1e-8, atol=1e-8)
            assert (after.value >= before.value - 1e-10).all()
            policy = new


@pytest.mark.parametrize("lam", LAMBDAS)
def test_gain_of_any_policy_is_at_least_the_optimums_less_the_weighted_distance(lam: float) -> None:
    policy, q = a_problem()
    found = bounded_ratio_optimum(policy, q, lam, **SYMMETRIC)
    advantages = q - (policy * q).sum(-1, keepdim=True)
    for seed in range(20):
        ratio = normal(STATES, ACTIONS, seed=50 + seed).softmax(-1) / policy
        gain = (policy * (ratio - 1) * advantages).sum(-1)
        distance = (policy * (ratio - found.ratio).abs() * advantages.abs()).sum(-1)
        assert (gain >= found.gain - distance - 1e-10).all()


def test_ratio_ignores_a_shift_of_q_and_a_common_scale_of_q_and_lambda() -> None:
    policy, q = a_problem()
    plain = bounded_ratio_optimum(policy, q, 0.2, 0.5, 2.0)
    moved = bounded_ratio_optimum(policy, q + 10 * normal(STATES, 1, seed=9), 0.2, 0.5, 2.0)
    scaled = bounded_ratio_optimum(policy, 7 * q, 1.4, 0.5, 2.0)
    for other in (moved, scaled):
        assert_close(other.ratio, plain.ratio, rtol=1e-9, atol=1e-9)
    assert_close(scaled.gain, 7 * plain.gain, rtol=1e-9, atol=1e-9)
    assert_close(moved.gain, plain.gain, rtol=1e-9, atol=1e-9)


def test_large_lambda_keeps_the_policy_and_takes_the_mean() -> None:
    policy, q = a_problem()
    found = bounded_ratio_optimum(policy, q, 1e6, 0.5, 2.0)
    assert_close(found.ratio, torch.ones_like(q), rtol=0.0, atol=1e-5)
    assert_close(found.mu, (policy * q).sum(-1), rtol=0.0, atol=1e-4)


@pytest.mark.parametrize("elite", [1, 2, 5])
def test_without_floor_and_temperature_it_is_the_cross_entropy_method(elite: int) -> None:
    q = normal(STATES, 10, seed=4)
    found = bounded_ratio_optimum(torch.full_like(q, 0.1), q, 1e-12, 0.0, 10 / elite)
    best = q >= q.topk(elite).values.amin(-1, keepdim=True)
    assert_close(found.ratio, torch.where(best, 10 / elite, 0.0).double(), rtol=1e-8, atol=1e-8)
    assert_close(found.policy.sum(-1), torch.ones(STATES, dtype=torch.float64))


def test_cross_entropy_method_splits_the_action_at_the_edge_of_the_elite() -> None:
    policy = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    q = torch.tensor([[0.0, 2.0, 1.0]], dtype=torch.float64)
    found = bounded_ratio_optimum(policy, q, 1e-12, 0.0, 2.5)  # the best 0.4: all of 0.3 and half of 0.2
    assert_close(found.ratio, torch.tensor([[0.0, 2.5, 1.25]], dtype=torch.float64), rtol=1e-8, atol=1e-8)


def test_loss_gradient_is_the_sign_of_the_distance_times_ratio_and_weight() -> None:
    batch, evaluation = a_batch()
    part = CriticBoundedRatio(lam=0.5)
    found = gradients(part(evaluation, batch), evaluation)
    ratio = torch.where(batch.mask, evaluation.logp - batch.old_logp, 0.0).exp().detach()
    returns = batch.signal("returns")
    target = 1 + 0.3 * torch.tanh((returns - evaluation.median.detach()) / (2 * 0.5))
    weight = (returns - evaluation.value.detach()).abs()
    assert_close(part.target(evaluation, batch), target)
    expected = batch.loss_weight * (ratio - target).sign() * ratio * weight
    assert_close(found["logp"], torch.where(batch.mask, expected, 0.0))
    assert not found["value"].any() and not found["median"].any()


def test_loss_is_flat_at_its_target() -> None:
    batch, evaluation = a_batch()
    part = CriticBoundedRatio(lam=1.0)
    there = torch.where(batch.mask, batch.old_logp + part.target(evaluation, batch).log(), 0.0)
    evaluation = replace(evaluation, logp=there.requires_grad_())
    assert part(evaluation, batch).item() == pytest.approx(0, abs=1e-14)


def test_mean_variant_at_zero_temperature_has_ppos_gradient_before_its_target_and_the_opposite_after() -> (
    None
):
    batch, evaluation = a_batch()
    batch.advantages = batch.signal("returns") - evaluation.value.detach()
    sign = batch.advantages.sign()
    part = CriticBoundedRatio(lam=1e-12, use_median=False)
    for distance, side in ((0.9, 1.0), (1.1, -1.0)):
        logp = torch.where(batch.mask, batch.old_logp + (1 + distance * WIDTH * sign).log(), 0.0)
        moved = replace(evaluation, logp=logp.requires_grad_())
        bounded = gradients(part(moved, batch), moved)["logp"]
        ppo = gradients(PPOClip(clip_low=WIDTH, clip_high=WIDTH)(moved, batch), moved)["logp"]
        ascent = (
            -batch.loss_weight * batch.advantages * torch.where(batch.mask, 1 + distance * WIDTH * sign, 0.0)
        )
        assert_close(bounded, side * ascent)
        assert_close(ppo, ascent if side > 0 else torch.zeros_like(ppo))


def test_mean_variant_puts_the_value_in_place_of_the_median_and_asks_for_no_median() -> None:
    batch, evaluation = a_batch()
    part = CriticBoundedRatio(use_median=False, lam=0.7)
    assert "median" not in part.requires and "median" in CriticBoundedRatio().requires
    same = replace(evaluation, median=evaluation.value)
    assert_close(part.target(evaluation, batch), CriticBoundedRatio(lam=0.7).target(same, batch))


def test_unequal_widths_stay_at_one_for_a_zero_advantage_only_if_exact() -> None:
    batch, evaluation = a_batch()
    batch.set_signal("returns", evaluation.median.detach())
    widths = {"width_low": 0.2, "width_high": 0.6, "lam": 0.5}
    ones = torch.ones_like(evaluation.median)
    assert_close(CriticBoundedRatio(**widths, exact_target=True).target(evaluation, batch), ones)
    assert_close(CriticBoundedRatio(**widths).target(evaluation, batch), 1.2 * ones)


def test_argument_bound_keeps_the_target_off_its_edges() -> None:
    batch, evaluation = a_batch()
    found = CriticBoundedRatio(argument_bound=2.0).target(evaluation, batch)[batch.mask]
    assert_close((found - 1).abs().max().item(), 0.3 * math.tanh(1.0))


def test_median_loss_moves_the_median_alone_and_nears_the_absolute_error_as_its_scale_falls() -> None:
    batch, evaluation = a_batch()
    error = (batch.signal("returns") - evaluation.median.detach())[batch.mask]
    for scale in (1.0, 1e-6):
        found = gradients(MedianLoss(coef=2.0, scale=scale)(evaluation, batch), evaluation)
        slope = -2.0 * torch.tanh(error / (2 * scale)) / (2 * scale) / batch.mask.sum()
        assert_close(found["median"][batch.mask], slope)
        assert not found["value"].any() and not found["logp"].any()


def test_whole_objective_is_the_stated_sum() -> None:
    batch, evaluation = a_batch()
    returns, mask = batch.signal("returns"), batch.mask
    value = (returns - evaluation.value)[mask].square().mean()
    median = smooth_absolute(returns - evaluation.median)[mask].mean()
    method = polopt.recipe("bpo")
    expected = method.surrogate(evaluation, batch) + 0.5 * value + 0.5 * median
    assert_close(method.objective(evaluation, batch), expected)


def test_advantages_are_not_whitened_so_the_loss_scales_with_the_returns() -> None:
    assert not polopt.recipe("bpo").slot("advantage")[0].config.whiten
    batch, evaluation = a_batch()
    larger, scaled = (
        batch.clone(),
        replace(evaluation, value=3 * evaluation.value, median=3 * evaluation.median),
    )
    larger.set_signal("returns", 3 * batch.signal("returns"))
    part = CriticBoundedRatio(lam=1e-6)
    assert_close(part(scaled, larger), 3 * part(evaluation, batch))


def test_ratios_beyond_the_widths_are_reported() -> None:
    batch, evaluation = a_batch()
    ratio = torch.where(batch.mask, evaluation.logp - batch.old_logp, 0.0).exp()
    outside = CriticBoundedRatio(width_low=0.1, width_high=0.2).clipped(evaluation, batch)
    assert torch.equal(outside, (ratio > 1.2) | (ratio < 0.9)) and outside.any()


def test_domain_without_a_median_head_is_refused() -> None:
    task = SumModTask()
    with pytest.raises(ConfigError, match="needs 'median'"):
        polopt.Trainer(SumModActor(task), task, polopt.recipe("bpo"), polopt.TrainerConfig(minibatches=4))
    polopt.Trainer(
        SumModActor(task),
        task,
        polopt.recipe("bpo", surrogate="bpo:use_median=false", regularizers="value:coef=1"),
        polopt.TrainerConfig(minibatches=4),
    ).iterate()


def test_recipe_and_mean_variant_pass_the_battery() -> None:
    check_method("bpo")
    check_method(polopt.recipe("bpo", surrogate="bpo:use_median=false,lam=0.5", regularizers="value:coef=1"))
