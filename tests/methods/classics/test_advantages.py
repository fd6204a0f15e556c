"""The classics' advantages: by hand, by their identities, and 0 where nothing can be compared."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polopt import make_part, recipe
from polopt.batch import Batch
from polopt.functional.returns import rewards_to_go
from polopt.methods.classics.dapo import (
    DynamicSampling,
    OverlongPunishment,
    mixed_groups,
    overlong_punishment,
)
from polopt.methods.classics.dr_grpo import GroupCentred
from polopt.methods.classics.grpo import GroupStandardized, group_standardized
from polopt.methods.classics.kl import KLReward
from polopt.methods.classics.ppo import GAE
from polopt.methods.classics.reinforce import RewardBaseline
from polopt.methods.classics.rloo import LeaveOneOut, leave_one_out
from polopt.parts import Advantage
from polopt.testing import batches, random_batch
from polopt.testing.subject import draws

few = settings(max_examples=40)
GROUP_RELATIVE = [GroupStandardized, LeaveOneOut, GroupCentred]
CRITIC = frozenset({"old_value", "last_value", "terminated"})


def advantages(part: Advantage, batch: Batch) -> Tensor:
    return part(batch).expand(batch.mask.shape)


def two_groups() -> Batch:
    """Rewards 1, 0, 0, 1 and 3, 0 of two prompts, one decision each."""
    batch = random_batch(groups=[4, 2], steps=1)
    batch.rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0], [3.0], [0.0]], dtype=torch.float64)
    batch.group = torch.tensor([0, 0, 0, 0, 1, 1])
    return batch


def test_group_relative_advantages_by_hand() -> None:
    batch = two_groups()
    half, third = 0.5, 3 / 2
    spread, wide = (1 / 3) ** 0.5, (9 / 2) ** 0.5
    found = {part: part()(batch)[:, 0].tolist() for part in GROUP_RELATIVE}
    assert found[GroupCentred] == [half, -half, -half, half, third, -third]
    assert found[LeaveOneOut] == pytest.approx([2 / 3, -2 / 3, -2 / 3, 2 / 3, 3, -3])
    expected = [half / spread, -half / spread, -half / spread, half / spread, third / wide, -third / wide]
    assert found[GroupStandardized] == pytest.approx(expected, rel=1e-5)
    biased = GroupStandardized(unbiased=False, eps=1e-12)(batch)[:, 0].tolist()
    assert biased == pytest.approx([1, -1, -1, 1, 1, -1])


@pytest.mark.parametrize("part", GROUP_RELATIVE)
@few
@given(seed=st.integers(0, 2**20), value=st.floats(-1e8, 1e8))
def test_nothing_to_compare_with_is_exactly_zero(part: type[Advantage], seed: int, value: float) -> None:
    alone = random_batch(groups=[1] * 5, seed=seed, rewards="graded")
    assert not part()(alone).any()
    equal = random_batch(groups=[3, 1, 7], seed=seed)
    equal.rewards = torch.full_like(equal.rewards, value)
    assert not part()(equal).any()


@few
@given(batches(rewards="graded"))
def test_leave_one_out_is_the_centred_reward_times_g_over_g_minus_one(batch: Batch) -> None:
    found = leave_one_out(batch.outcome(), batch.group)
    for row in range(len(batch)):
        others = batch.group == batch.group[row]
        others[row] = False
        baseline = batch.outcome()[others].mean() if others.any() else batch.outcome()[row]
        assert_close(found[row], batch.outcome()[row] - baseline)


@few
@given(batches(rewards="graded"), st.floats(0.1, 100), st.floats(-1e6, 1e6))
def test_standardised_advantages_ignore_shift_and_scale(batch: Batch, scale: float, shift: float) -> None:
    plain = group_standardized(batch.outcome(), batch.group, eps=1e-300)
    moved = group_standardized(batch.outcome() * scale + shift, batch.group, eps=1e-300)
    assert_close(moved, plain, rtol=1e-4, atol=1e-4)


def test_reinforce_baselines_by_hand() -> None:
    batch = two_groups()
    rewards = batch.rewards[:, 0]
    assert torch.equal(RewardBaseline(baseline="none")(batch)[:, 0], rewards)
    assert_close(RewardBaseline()(batch)[:, 0], rewards - rewards.mean())
    whitened = RewardBaseline(whiten=True)(batch)[:, 0]
    assert_close(whitened, (rewards - rewards.mean()) / rewards.std(correction=0))


def test_moving_average_is_that_of_earlier_iterations() -> None:
    batch, part = two_groups(), RewardBaseline(baseline="moving_average", decay=0.75)
    rewards = batch.rewards[:, 0]
    assert torch.equal(part(batch)[:, 0], rewards)
    part.observe(batch)
    assert_close(part(batch)[:, 0], rewards - rewards.mean())
    batch.rewards = batch.rewards + 4
    assert_close(part(batch)[:, 0], rewards + 4 - rewards.mean())
    part.observe(batch)
    assert_close(part.average, rewards.mean() + 1)
    part.observe(batch[torch.zeros(6, dtype=torch.bool)])
    assert_close(part.average, rewards.mean() + 1)


@few
@given(batches(frozenset({"old_value"})))
def test_gae_with_lambda_one_and_no_values_is_the_reward_of_the_trajectory(batch: Batch) -> None:
    batch.old_value = torch.zeros_like(batch.old_value)
    found = GAE(gae_lambda=1.0, whiten=False)(batch)
    assert_close(found, torch.where(batch.mask, batch.outcome()[:, None], 0.0))


@few
@given(batches(CRITIC))
def test_only_trajectories_that_were_cut_are_bootstrapped(batch: Batch) -> None:
    part = GAE(gae_lambda=1.0, whiten=False, gamma=0.9)
    changed = batch.clone()
    changed.last_value = batch.last_value + 1
    difference = (part(changed) - part(batch)).abs().amax(-1)
    assert torch.equal(difference > 0, ~batch.terminated & batch.mask.any(-1))


@few
@given(batches(frozenset({"old_value", "step_rewards"})))
def test_returns_are_advantages_plus_values(batch: Batch) -> None:
    part = GAE(gae_lambda=1.0)
    dense = batch.step_rewards.clone()
    last = batch.mask & (batch.mask.long().cumsum(-1) == batch.lengths[:, None])
    dense = dense + torch.where(last, batch.rewards[:, :1], 0.0)
    returns = torch.where(batch.mask, part.signals(batch)["returns"], 0.0)
    assert_close(returns, rewards_to_go(dense, batch.mask))


def test_whitened_advantages_have_mean_zero_and_deviation_one() -> None:
    batch = random_batch(frozenset({"old_value"}))
    chosen = GAE()(batch)[batch.mask]
    assert float(chosen.mean()) == pytest.approx(0, abs=1e-9)
    assert float(chosen.std(correction=0)) == pytest.approx(1, abs=1e-6)


@few
@given(batches(frozenset({"ref_logp", "step_rewards"})), st.sampled_from(["k1", "k2", "k3"]))
def test_kl_in_the_reward_is_taken_off_decision_by_decision(batch: Batch, estimator: str) -> None:
    before = batch.clone()
    shaped = KLReward(coef=0.1, estimator=estimator)(batch, draws(0))
    x = batch.ref_logp - batch.old_logp
    penalty = {"k1": -x, "k2": x.square() / 2, "k3": x.exp() - 1 - x}[estimator]
    expected = torch.where(batch.mask, before.step_rewards - 0.1 * penalty, 0.0)
    assert_close(shaped.step_rewards, expected)
    assert torch.equal(batch.step_rewards, before.step_rewards)
    assert_close(shaped.outcome(), batch.rewards.sum(-1) + expected.sum(-1))


def test_kl_in_the_reward_needs_no_other_rewards_per_decision() -> None:
    batch = random_batch(frozenset({"ref_logp"}))
    shaped = make_part("shaping", "kl:coef=1.0")(batch, draws(0))
    assert_close(shaped.step_rewards, torch.where(batch.mask, batch.ref_logp - batch.old_logp, 0.0))


def test_dynamic_sampling_keeps_groups_whose_known_rewards_differ() -> None:
    nan = torch.nan
    rewards = torch.tensor([1, 1, 0, 0, 1, 0, 1, nan, 1, nan, 0, 0.5], dtype=torch.float64)[:, None]
    batch = random_batch(groups=[12])
    batch.rewards, batch.group = rewards, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6])
    kept = DynamicSampling().accepts(batch)
    assert batch.group[kept].tolist() == [2, 2, 6, 6]
    assert not mixed_groups(torch.ones(3), torch.tensor([0, 0, 1]), torch.zeros(3, dtype=torch.bool)).any()


def test_dynamic_sampling_draws_as_many_rounds_as_it_may() -> None:
    assert DynamicSampling(rounds=3).max_rounds == 3
    assert recipe("dapo").sampler.max_rounds > 1


def test_overlong_punishment_by_hand() -> None:
    lengths = torch.tensor([0, 5, 6, 7, 8, 9, 10, 11, 50])
    found = overlong_punishment(lengths, max_length=10, cache=4)
    assert found.tolist() == [0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1]


def test_overlong_punishment_is_one_more_reward() -> None:
    batch = random_batch(columns=2)
    shaped = OverlongPunishment(max_length=4, cache=2, coef=0.5)(batch, draws(0))
    assert torch.equal(shaped.rewards[:, :2], batch.rewards)
    assert_close(shaped.outcome(), batch.outcome() + 0.5 * overlong_punishment(batch.lengths, 4, 2))
    assert batch.rewards.shape[1] == 2
