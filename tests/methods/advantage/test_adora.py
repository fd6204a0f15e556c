"""Identities of the ADORA card (arXiv 2602.10019)."""

from typing import Any, Literal

import pytest
import torch
from torch.testing import assert_close

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.methods.advantage.adora import PRESETS, Criterion, RolloutAdaptation, advantageous, group_weights
from polopt.methods.classics.grpo import group_standardized
from polopt.methods.classics.ppo import PPOClip

CRITERIA: tuple[Criterion, ...] = ("length", "difficulty", "and", "or")
GROUP = torch.arange(200) // 5
GROUPS = Groups.of(GROUP)
DRAWS = torch.Generator().manual_seed(0)
RATE = torch.rand(40, generator=DRAWS, dtype=torch.float64).repeat_interleave(5)
REWARDS = torch.bernoulli(RATE, generator=DRAWS)
LENGTH = torch.randint(1, 100, (200,), generator=DRAWS)
LIMIT = 90.0


def label(
    criterion: Criterion,
    rewards: torch.Tensor = REWARDS,
    length: torch.Tensor = LENGTH,
    groups: Groups = GROUPS,
    max_length: float | None = LIMIT,
    no_success: bool = False,
    no_failure: bool = True,
) -> torch.Tensor:
    return advantageous(
        rewards, length, groups, criterion=criterion, threshold=0.5, max_length=max_length,
        no_success=no_success, no_failure=no_failure,
    )  # fmt: skip


def a_batch(
    rewards: torch.Tensor = REWARDS, length: torch.Tensor = LENGTH, group: torch.Tensor = GROUP
) -> Batch:
    mask = torch.arange(100) < length[:, None]
    return Batch(
        mask=mask, old_logp=torch.zeros(mask.shape, dtype=torch.float64), rewards=rewards[:, None], group=group,
        prompt_id=group, weights=mask.double(), batch_size=[len(group)],
    )  # fmt: skip


def base(batch: Batch) -> torch.Tensor:
    return group_standardized(batch.outcome(), batch.group)[:, None] * batch.mask


def weights_of(batch: Batch, **options: Any) -> torch.Tensor:
    return RolloutAdaptation(**options)(batch, torch.ones(len(batch), 1, dtype=torch.float64))[:, 0]


@pytest.mark.parametrize("preset", PRESETS)
def test_adora_with_weight_one_is_the_base_estimator(preset: str) -> None:
    batch = a_batch()
    assert torch.equal(RolloutAdaptation(preset=preset, weight=1.0)(batch, base(batch)), base(batch))


@pytest.mark.parametrize("options", [{}, {"preset": "vlm", "max_length": LIMIT}])
def test_adora_keeps_zero_sums_signs_and_order_inside_groups(options: dict[str, Any]) -> None:
    batch = a_batch()
    before = base(batch)[:, 0]
    after = RolloutAdaptation(**options)(batch, base(batch))[:, 0]
    assert not torch.equal(before, after)
    assert_close(GROUPS.sum(after), torch.zeros(40, dtype=torch.float64), atol=1e-12, rtol=0.0)
    assert torch.equal(after.sign(), before.sign())
    old, new = before.view(40, 5), after.view(40, 5)
    assert torch.equal((old[:, :, None] - old[:, None]).sign(), (new[:, :, None] - new[:, None]).sign())


def test_adora_scales_the_gradient_of_each_prompt_and_keeps_its_direction() -> None:
    batch, surrogate = a_batch(), PPOClip()
    batch.loss_weight = surrogate.loss_weights(batch)
    logp = torch.randn(batch.mask.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp = (0.3 * logp).requires_grad_()
    found = []
    for advantages in (base(batch), RolloutAdaptation()(batch, base(batch))):
        batch.advantages = advantages
        found += torch.autograd.grad(surrogate(Evaluation(logp), batch), logp)
    weights = weights_of(batch)
    assert weights.unique().tolist() == [1.0, 2.0]
    assert torch.equal(GROUPS.min(weights), GROUPS.max(weights))
    assert_close(found[1], weights[:, None] * found[0])


def test_attenuating_by_w_is_w_times_amplifying_by_one_over_w() -> None:
    labels = label("and")
    down, up = group_weights(labels, "attenuate", 0.1), group_weights(labels, "amplify", 10.0)
    assert_close(down, 0.1 * up)
    assert set(down.tolist()) == {0.1, 1.0} and torch.equal(down == 1, labels)


def test_difficulty_depends_on_rewards_alone() -> None:
    other = LENGTH[torch.randperm(200, generator=torch.Generator().manual_seed(2))]
    assert torch.equal(label("difficulty"), label("difficulty", length=other, max_length=None))
    assert torch.equal(label("difficulty"), REWARDS.view(40, 5).mean(-1) <= 0.5)


def test_length_depends_on_the_two_sets_and_not_on_the_success_rate() -> None:
    rewards, length = REWARDS.view(40, 5), LENGTH.view(40, 5)
    longest = torch.where(rewards > 0.5, length, 1).max(-1, keepdim=True).values
    more_rewards = torch.cat([rewards, rewards.max(-1, keepdim=True).values.expand(-1, 2)], -1).flatten()
    more_lengths = torch.cat([length, longest.expand(-1, 2)], -1).flatten()
    groups = Groups.of(torch.arange(280) // 7)
    found = rewards.max(-1).values > 0.5
    again = {c: label(c, more_rewards, more_lengths, groups)[found] for c in CRITERIA}
    assert torch.equal(again["length"], label("length")[found])
    assert not torch.equal(again["difficulty"], label("difficulty")[found])


def test_length_is_invariant_to_scaling_all_lengths_and_the_limit() -> None:
    assert torch.equal(label("length"), label("length", length=7 * LENGTH, max_length=7 * LIMIT))


def test_longer_successes_only_turn_the_length_label_on() -> None:
    before = label("length")
    longer = torch.where(REWARDS > 0.5, 2 * LENGTH, LENGTH)
    after = label("length", length=longer)
    assert not (before & ~after).any() and (after & ~before).any()


def test_labels_of_the_criteria_are_nested() -> None:
    found = {criterion: label(criterion) for criterion in CRITERIA}
    for single in ("length", "difficulty"):
        assert not (found["and"] & ~found[single]).any() and not (found[single] & ~found["or"]).any()
    assert torch.equal(found["and"], found["length"] & found["difficulty"])
    assert torch.equal(found["or"], found["length"] | found["difficulty"])
    assert len({tuple(labels.tolist()) for labels in found.values()}) == 4


def test_adora_of_the_worked_example_doubles_the_group() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    batch = a_batch(rewards, torch.tensor([90, 40, 30, 50, 60]), torch.zeros(5, dtype=torch.int64))
    assert weights_of(batch, preset="llm_paper").tolist() == [2.0] * 5
    assert (
        weights_of(batch, preset="llm_paper", criterion="difficulty", max_success_rate=0.3).tolist()
        == [1.0] * 5
    )


def one_group(rewards: list[float], length: list[int], **conventions: Any) -> bool:
    group = Groups.of(torch.zeros(len(length), dtype=torch.int64))
    return bool(label("length", torch.tensor(rewards), torch.tensor(length), group, **conventions))


@pytest.mark.parametrize("convention", [False, True])
def test_groups_without_success_or_without_failure_follow_the_conventions(convention: bool) -> None:
    other = not convention
    found = {"no_success": convention, "no_failure": other}
    assert one_group([0.0, 0.0], [3, 5], **found) is convention
    assert one_group([0.0, 0.0], [95, 99], **found) is convention
    assert one_group([1.0, 1.0], [3, 5], **found) is other
    assert one_group([1.0, 0.0], [3, 99], **found) is other


def test_ties_are_no_advantage_and_failures_at_the_limit_are_ignored() -> None:
    assert not one_group([1.0, 0.0, 0.0], [10, 5, 15])
    assert one_group([1.0, 0.0, 0.0], [11, 5, 15])
    assert one_group([1.0, 0.0, 0.0], [10, 5, 90])
    assert not one_group([1.0, 0.0, 0.0], [10, 5, 90], max_length=None)


@pytest.mark.parametrize(
    ("preset", "all_wrong", "all_right"),
    [("vlm", 1.0, 0.1), ("llm_code", 0.1, 1.0), ("llm_paper", 1.0, 1.0)],
)
def test_presets_weigh_uniform_groups_as_released(preset: str, all_wrong: float, all_right: float) -> None:
    rewards = torch.tensor([0.0, 0.0, 3.0, 3.0], dtype=torch.float64)
    batch = a_batch(rewards, torch.tensor([3, 4, 3, 4]), torch.tensor([0, 0, 1, 1]))
    assert weights_of(batch, preset=preset).tolist() == pytest.approx([all_wrong] * 2 + [all_right] * 2)


@pytest.mark.parametrize("mode", ["attenuate", "amplify"])
def test_normalised_weights_have_mean_one(mode: Literal["attenuate", "amplify"]) -> None:
    options = {"mode": mode, "weight": 3.0}
    plain, even = weights_of(a_batch(), **options), weights_of(a_batch(), normalize=True, **options)
    assert_close(even.mean(), torch.ones((), dtype=torch.float64))
    assert_close(even, plain / plain.mean())


def test_single_answers_and_constant_groups_stay_at_zero_and_missing_rewards_are_failures() -> None:
    rewards = torch.tensor([1.0, 0.5, 0.5, 1.0, torch.nan], dtype=torch.float64)
    batch = a_batch(rewards, torch.tensor([3, 4, 5, 9, 8]), torch.tensor([0, 1, 1, 2, 2]))
    for options in ({}, {"preset": "vlm"}, {"normalize": True}):
        after = RolloutAdaptation(**options)(batch, base(batch))
        assert after.isfinite().all() and not after[:3].any() and after[3:, 0].all()
    assert weights_of(batch)[3:].tolist() == [2.0, 2.0]


def test_adora_does_not_depend_on_the_order_of_rows_and_takes_an_empty_batch() -> None:
    order = torch.randperm(200, generator=torch.Generator().manual_seed(3))
    shuffled = a_batch(REWARDS[order], LENGTH[order], 50 - GROUP[order])
    assert torch.equal(weights_of(shuffled), weights_of(a_batch())[order])
    nothing = torch.zeros(0, dtype=torch.int64)
    empty = a_batch(torch.zeros(0), nothing, nothing)
    assert RolloutAdaptation()(empty, torch.zeros(0, 100)).shape == (0, 100)
