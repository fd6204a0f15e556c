"""Identities of the DCPO card (arXiv 2601.12730)."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import polopt
from polopt.batch import Batch, Evaluation
from polopt.functional.ratio import log_ratio
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.methods.entropy.dcpo import DistributionCentric, mixed_advantage, mixing_weight
from polopt.testing import random_batch

LOGITS = torch.tensor([1.5, 0.2, -0.7, -3.0, 0.2], dtype=torch.float64)
TEMPERATURES = (1.2, 0.8)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def part_with(entropy: float, **options: Any) -> DistributionCentric:
    part = DistributionCentric(**options)
    part.previous_entropy.fill_(entropy)
    return part


def advantages(part: DistributionCentric, batch: Batch) -> Tensor:
    method = polopt.Method(advantage=[GroupStandardized(), part], surrogate=PPOClip())
    return method.prepare(batch, lambda name: torch.Generator()).advantages


def batch_at(temperature: float, seed: int = 0) -> Batch:
    return random_batch(frozenset({"old_tempered_logp"}), seed=seed, options={"temperature": temperature})


def grpo(batch: Batch) -> Tensor:
    found = GroupStandardized()(batch).expand(batch.mask.shape)
    return torch.where(batch.mask, found, 0.0)


def tempered(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """pi, pi^T and the ratio of each decision of a state."""
    pi, target = logits.softmax(-1), (logits / temperature).softmax(-1)
    mask = torch.ones(1, len(logits), dtype=torch.bool)
    return pi, target, log_ratio(target.log()[None], pi.log()[None], mask).exp()[0]


def test_entropy_at_the_set_point_gives_grpo() -> None:
    batch = batch_at(1.2)
    assert_close(advantages(part_with(0.25), batch), grpo(batch))
    assert not torch.allclose(advantages(part_with(0.3), batch), grpo(batch))


def test_no_success_gives_grpo() -> None:
    batch = batch_at(1.2)
    batch.rewards = batch.rewards / 1000
    assert mixing_weight(scalar(0.0), 0.25, scalar(0.0)) == 0
    assert_close(advantages(part_with(0.0), batch), grpo(batch))


def test_temperature_one_has_ratio_one() -> None:
    batch = batch_at(1.0)
    found = advantages(part_with(0.0, temperature_high=1.0), batch)
    share = (batch.outcome() > 0.05).double().mean()
    alpha = mixing_weight(scalar(0.0), 0.25, share)
    constant = (1 - alpha) * grpo(batch) + alpha * (batch.outcome() > 0.05)[:, None] * batch.mask
    assert_close(found, constant)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ratio_has_mean_one_under_the_behaviour_policy(temperature: float) -> None:
    pi, _, rho = tempered(LOGITS, temperature)
    assert_close((pi * rho).sum(), scalar(1.0))


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_ratio_is_a_power_of_the_probability(temperature: float) -> None:
    pi, _, rho = tempered(LOGITS, temperature)
    assert_close(rho, pi ** (1 / temperature - 1) / (pi ** (1 / temperature)).sum())
    steps = rho[pi.argsort()].diff()
    assert (steps <= 1e-12).all() if temperature > 1 else (steps >= -1e-12).all()


def test_ratio_of_a_hotter_target_has_a_floor() -> None:
    for seed in range(20):
        logits = 3 * torch.randn(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert tempered(logits, 1.2)[2].min() >= 7 ** (1 / 1.2 - 1) - 1e-12


@pytest.mark.parametrize("entropy", [0.0, 0.2, 0.26, 3.0])
@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
def test_average_pull_relative_to_grpo_is_the_capped_distance(entropy: float, share: float) -> None:
    alpha = mixing_weight(scalar(entropy), 0.25, scalar(share))
    distance = min(abs(0.25 - entropy), 0.1)
    assert_close(alpha * share / (1 - alpha), scalar(distance))
    assert 0 <= alpha <= 0.1 / (0.1 + share)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_expected_pull_on_the_logits_is_target_less_behaviour(temperature: float) -> None:
    logits = LOGITS.clone().requires_grad_()
    pi, target, rho = tempered(LOGITS, temperature)
    (gradient,) = torch.autograd.grad((pi * rho * logits.log_softmax(-1)).sum(), logits)
    assert_close(gradient, target - pi)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_pull_raises_entropy_when_hot_lowers_it_when_cold_and_leaves_uniform_policies(
    temperature: float,
) -> None:
    for seed in range(20):
        logits = 2 * torch.randn(6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pi, target, _ = tempered(logits, temperature)
        rise = -((target - pi) * pi.log()).sum()
        assert rise > 1e-6 if temperature > 1 else rise < -1e-6
    pi, target, _ = tempered(torch.full((6,), 0.3, dtype=torch.float64), temperature)
    assert (-((target - pi) * pi.log()).sum()).abs() < 1e-12


def test_solved_group_has_the_pull_alone_and_unsolved_group_nothing() -> None:
    batch = batch_at(1.2)
    batch.rewards = (batch.group == 0).double()[:, None]
    found = advantages(part_with(0.0), batch)
    solved = batch.group == 0
    alpha = mixing_weight(scalar(0.0), 0.25, solved.double().mean())
    rho = (batch.signal("old_tempered_logp") - batch.old_logp).exp()
    pull = torch.where(batch.mask, alpha * rho, 0.0)
    assert_close(found[solved], pull[solved])
    assert not found[~solved].any() and found[solved].any()


def test_affine_maps_of_a_groups_rewards_change_nothing_while_successes_stay() -> None:
    batch, moved = batch_at(1.2), batch_at(1.2)
    slope = torch.tensor([2.0, 0.5, 1.0, 7.0], dtype=torch.float64)[batch.group]
    moved.rewards = torch.where(batch.rewards > 0.05, 0.06 + 0.5 * slope[:, None], 0.03)
    before, after = advantages(part_with(0.0), batch), advantages(part_with(0.0), moved)
    assert_close(before, after, rtol=1e-4, atol=1e-4)  # up to eps beside the standard deviation
    moved.rewards = moved.rewards + 1
    assert not torch.allclose(before, advantages(part_with(0.0), moved), atol=1e-2)


def test_controller_heats_up_to_the_set_point_and_cools_above() -> None:
    for entropy, temperature in ((0.0, 1.2), (0.25, 1.2), (0.2501, 0.8)):
        assert part_with(entropy).evaluation_options() == {"temperature": temperature}


def test_entropy_is_the_mean_surprise_over_the_updates_of_the_iteration() -> None:
    part, batch = part_with(0.7), random_batch()
    for surprise in (0.2, 0.6):
        logp = torch.where(batch.mask, -surprise, torch.nan).double()
        part.after_step(Evaluation(logp), batch)
    assert part.previous_entropy == 0.7
    part.observe(batch)
    assert float(part.previous_entropy) == pytest.approx(0.4)
    part.observe(batch)
    assert float(part.previous_entropy) == pytest.approx(0.4)


def test_mixture_has_no_gradient_and_weighs_both_parts() -> None:
    found = mixed_advantage(
        torch.full((2, 3), -1.0), torch.full((2, 3), 2.0), torch.tensor([1.0, 0.0]), torch.tensor(0.25)
    )
    assert found.tolist() == [[-0.25] * 3, [-0.75] * 3]
