"""Identities of the COPO card (arXiv 2508.04138)."""

import math

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.methods.advantage.copo import (
    BlendedClip,
    LocalGlobal,
    Mode,
    answer_entropy,
    global_reward,
    local_weight,
    prompt_standardized,
)
from polopt.methods.classics.grpo import group_standardized
from polopt.methods.classics.ppo import PPOClip

GROUP = torch.arange(4).repeat_interleave(6)
REWARDS = torch.tensor(
    [[1, 0, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]], dtype=torch.float64
).flatten()
ANSWER = torch.tensor(
    [[0, 1, 2, 0, 3, 1], [0, 0, 0, 0, 0, 1], [1, 1, 2, 2, 1, -1], [0, 0, 0, 0, 0, 0]]
).flatten()
MODES: tuple[Mode, ...] = ("soft", "soft_forced", "hard_forced", "soft_correct_only", "global", "local")


def a_batch(
    rewards: torch.Tensor = REWARDS, answer: torch.Tensor = ANSWER, group: torch.Tensor = GROUP
) -> Batch:
    n, draws = len(group), torch.Generator().manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (n, 1), generator=draws)
    old = torch.randn(n, 5, generator=draws, dtype=torch.float64).where(mask, torch.nan)
    return Batch(
        mask=mask, old_logp=old, rewards=rewards[:, None], group=group, prompt_id=group, answer=answer,
        weights=mask.double(), batch_size=[n],
    )  # fmt: skip


def with_signals(part: LocalGlobal) -> Batch:
    batch = a_batch()
    for name, signal in part.signals(batch).items():
        batch.set_signal(name, signal)
    batch.advantages = part(batch).expand(batch.mask.shape)
    batch.loss_weight = BlendedClip().loss_weights(batch)
    return batch


def gradient(surrogate: PPOClip, batch: Batch, shift: float) -> torch.Tensor:
    noise = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp = (batch.old_logp + shift * noise).requires_grad_()
    loss = surrogate(Evaluation(logp).where(batch.mask), batch)
    return torch.autograd.grad(loss, logp)[0]


def test_copo_with_local_weight_one_is_grpo() -> None:
    batch = with_signals(LocalGlobal(mode="local"))
    grpo = group_standardized(REWARDS, GROUP, 1e-6)
    assert torch.equal(batch.advantages[:, 0], grpo)
    ppo = PPOClip(aggregation="sequence_mean", dual_clip=3.0)
    assert_close(gradient(BlendedClip(), batch, 0.5), gradient(ppo, batch, 0.5))


def test_copo_with_local_weight_zero_is_prompt_level_reinforce_with_standardised_returns() -> None:
    returns = REWARDS.view(4, 6).mean(-1)
    expected = ((returns - returns.mean()) / (returns.std() + 1e-6)).repeat_interleave(6)
    assert_close(LocalGlobal(mode="global")(a_batch())[:, 0], expected)


def test_copo_on_policy_gradient_is_that_of_the_blended_advantage_and_off_policy_is_not() -> None:
    batch, ppo = with_signals(LocalGlobal()), PPOClip(aggregation="sequence_mean")
    assert_close(gradient(BlendedClip(), batch, 0.0), gradient(ppo, batch, 0.0))
    apart = gradient(BlendedClip(), batch, 0.5) - gradient(ppo, batch, 0.5)
    assert apart.abs().max() > 1e-3


def test_copo_weight_is_one_half_at_the_threshold_or_without_steepness_and_a_step_in_the_limit() -> None:
    entropy = torch.linspace(0, 2.5, 11, dtype=torch.float64)
    zeros, half = torch.zeros_like(entropy), torch.full_like(entropy, 0.5)
    assert_close(local_weight(entropy, zeros, zeros, "soft", 0.0, 1.0), half)
    assert local_weight(entropy, zeros, zeros, "soft", 5.0, 1.0)[4] == 0.5
    step = local_weight(entropy, zeros, zeros, "soft", 1e6, 1.0)
    assert_close(step, torch.where(entropy == 1, half, (entropy > 1).double()))


def test_copo_trains_zero_variance_prompts_globally_down_if_all_wrong_and_up_if_all_right() -> None:
    found = LocalGlobal().signals(a_batch())
    local, everywhere, weight = (
        found[k].view(4, 6) for k in ("local_advantages", "global_advantages", "local_weight")
    )
    assert not local[2:].any()
    assert (everywhere[2] < 0).all() and (everywhere[3] > 0).all()
    blended = LocalGlobal()(a_batch()).view(4, 6)
    assert_close(blended[2:], ((1 - weight) * everywhere)[2:])
    assert blended[2:].all()


def test_copo_advantages_sum_to_zero_in_groups_and_over_prompts() -> None:
    found = LocalGlobal(consistency=True).signals(a_batch())
    zero = torch.zeros(4, dtype=torch.float64)
    assert_close(Groups.of(GROUP).sum(found["local_advantages"]), zero, atol=1e-12, rtol=0.0)
    per_prompt = found["global_advantages"].view(4, 6)
    assert (per_prompt == per_prompt[:, :1]).all()
    assert per_prompt[:, 0].sum().abs() < 1e-12


def test_copo_counts_each_prompt_once_whatever_its_group_size() -> None:
    group = torch.tensor([0] * 2 + [1] * 6)
    rewards = torch.tensor([1.0] * 2 + [0.0] * 6, dtype=torch.float64)
    found = LocalGlobal(mode="global")(a_batch(rewards, torch.zeros(8, dtype=torch.int64), group))[:, 0]
    level = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert_close(found, torch.tensor([level] * 2 + [-level] * 6, dtype=torch.float64))


@pytest.mark.parametrize("n", [2, 3, 6, 16])
def test_copo_consistency_factor_runs_from_one_to_one_over_n_where_all_answers_differ(n: int) -> None:
    draws = torch.Generator().manual_seed(n)
    rows = [torch.zeros(n, dtype=torch.int64), torch.arange(n)]
    rows += [torch.randint(0, n - 1, (n,), generator=draws) for _ in range(20)]
    groups = Groups.of(torch.arange(len(rows)).repeat_interleave(n))
    entropy = answer_entropy(torch.cat(rows), groups)
    factor = global_reward(torch.ones(len(rows) * n), entropy, groups, consistency=True)
    assert factor[0] == 1
    assert_close(factor[1], torch.tensor(1 / n, dtype=torch.float64))
    assert (factor[2:] > 1 / n + 1e-9).all() and (factor[2:] <= 1).all()
    if n == 2:
        assert_close(1 - factor, entropy / 2)


def test_copo_entropy_in_bits_and_weight_of_the_worked_examples() -> None:
    answer, groups = torch.tensor([4, 4, 4, 7, 7, -1, 2, 2, 2, 2, 0, 1]), Groups.of(torch.arange(12) // 6)
    entropy = answer_entropy(answer, groups)
    assert_close(entropy, torch.tensor([1.4591, 1.2516], dtype=torch.float64), atol=5e-5, rtol=0.0)
    weight = local_weight(entropy, entropy, entropy, "soft", 5.0, 1.0)
    assert_close(weight, torch.tensor([0.9085, 0.7787], dtype=torch.float64), atol=5e-5, rtol=0.0)


def test_copo_same_answer_id_in_two_prompts_does_not_merge_them() -> None:
    groups = Groups.of(torch.tensor([5, 9, 5, 9]))
    assert answer_entropy(torch.tensor([0, 0, 1, 0]), groups).tolist() == [1.0, 0.0]


def test_copo_modes_switch_the_local_loss_as_named() -> None:
    entropy = torch.full((4,), 1.5, dtype=torch.float64)
    local = torch.tensor([0.0, 1e-9, 0.5, -0.5], dtype=torch.float64)
    outcome = torch.tensor([0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    soft = torch.sigmoid(torch.tensor(2.5, dtype=torch.float64))
    on = {
        "soft": [1, 1, 1, 1], "soft_forced": [0, 0, 1, 1], "soft_correct_only": [0, 1, 1, 0],
    }  # fmt: skip
    expected = {mode: soft * torch.tensor(rows) for mode, rows in on.items()} | {
        "hard_forced": torch.tensor([0.0, 0.0, 1.0, 1.0]), "global": torch.zeros(4), "local": torch.ones(4),
    }  # fmt: skip
    for mode in MODES:
        assert_close(local_weight(entropy, local, outcome, mode, 5.0, 1.0), expected[mode].double())


def test_copo_of_a_single_prompt_equal_prompts_and_single_answers_is_defined() -> None:
    one = LocalGlobal().signals(a_batch(REWARDS[:6], ANSWER[:6], GROUP[:6]))
    assert not one["global_advantages"].any()
    assert not prompt_standardized(torch.full((3,), 0.1, dtype=torch.float64), 1e-6).any()
    rewards, alone = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64), torch.tensor([3, 4, 4])
    found = LocalGlobal(consistency=True).signals(a_batch(rewards, torch.tensor([0, 1, 1]), alone))
    assert found["local_advantages"][0] == 0.0
    level = 0.25 / (math.sqrt(0.125) + 1e-6)
    assert_close(found["global_advantages"], torch.tensor([level, -level, -level], dtype=torch.float64))


def test_copo_missing_rewards_count_zero_and_masked_decisions_nothing() -> None:
    missing = LocalGlobal()(a_batch(torch.where(REWARDS == 0, torch.nan, REWARDS)))
    assert_close(missing, LocalGlobal()(a_batch()))
    batch = with_signals(LocalGlobal())
    found = gradient(BlendedClip(), batch, 0.3)
    assert found.isfinite().all() and not found[~batch.mask].any()


def test_copo_of_an_empty_batch_is_empty() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert LocalGlobal()(a_batch(torch.zeros(0), nothing, nothing)).shape == (0, 1)
