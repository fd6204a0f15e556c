"""Identities of the GDPO card (arXiv 2601.05242)."""

from itertools import combinations_with_replacement, product

import pytest
import torch
from torch.testing import assert_close

from polopt.functional.groups import Groups
from polopt.methods.advantage.gdpo import batch_standardized, conditioned, decoupled_sum, token_standardized
from polopt.methods.classics.grpo import group_standardized

ONES = torch.ones(3, dtype=torch.float64)


def rewards(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(seed)
    return torch.rand(12, 3, generator=draws, dtype=torch.float64), torch.arange(12) // 4


def test_gdpo_of_one_reward_is_grpo_bit_for_bit() -> None:
    values, group = rewards()
    assert torch.equal(
        decoupled_sum(values[:, :1], group, ONES[:1], 1e-4), group_standardized(values[:, 0], group, 1e-4)
    )


def test_gdpo_is_invariant_to_scale_and_shift_of_each_reward() -> None:
    values, group = rewards()
    changed = values * torch.tensor([7.0, 0.1, 1.0]) + torch.tensor([3.0, -2.0, 100.0])
    assert_close(decoupled_sum(changed, group, ONES, 1e-300), decoupled_sum(values, group, ONES, 1e-300))


def test_gdpo_has_zero_mean_and_a_variance_that_does_not_grow_with_the_rewards() -> None:
    values, group = rewards()
    for count in (1, 2, 3):
        before = decoupled_sum(values[:, :count], group, ONES[:count])
        after = batch_standardized(before)
        assert_close(after.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0.0)
        assert_close(after.var(), (before.std() / (before.std() + 1e-4)).square())


def test_gdpo_batch_mean_is_a_no_op_for_sequences_and_not_for_tokens() -> None:
    values, group = rewards()
    before = decoupled_sum(values, group, ONES)
    assert_close(before.mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0.0)
    mask = torch.arange(5)[None] < torch.randint(1, 6, (12, 1), generator=torch.Generator().manual_seed(3))
    spread = before[:, None].expand(12, 5)[mask]
    assert spread.mean().abs() > 1e-3
    tokens = token_standardized(before, mask)
    assert_close(tokens[mask].mean(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0.0)
    assert_close(tokens[mask].var(), torch.ones((), dtype=torch.float64), rtol=1e-6, atol=0.0)
    assert not tokens[~mask].any()


def test_gdpo_of_identical_rewards_is_batch_standardised_grpo() -> None:
    values, group = rewards()
    same = values[:, :1].expand(-1, 3)
    grpo = group_standardized(values[:, 0], group, 1e-4)
    assert_close(
        batch_standardized(decoupled_sum(same, group, ONES), 1e-300), batch_standardized(grpo, 1e-300)
    )


@pytest.mark.parametrize(
    ("size", "count", "grpo", "no_std", "gdpo"),
    [(2, 2, 2, 3, 3), (3, 2, 4, 6, 6), (4, 2, 7, 10, 14), (4, 3, 14, 20, 45)],
)
def test_gdpo_tells_more_reward_combinations_apart(
    size: int, count: int, grpo: int, no_std: int, gdpo: int
) -> None:
    patterns: dict[str, set[tuple[float, ...]]] = {"grpo": set(), "no_std": set(), "gdpo": set()}
    outcomes = list(product([0.0, 1.0], repeat=count))
    for rows in combinations_with_replacement(outcomes, size):
        values, group = torch.tensor(rows, dtype=torch.float64), torch.zeros(size, dtype=torch.int64)
        found = {
            "grpo": group_standardized(values.sum(-1), group, 1e-9),
            "no_std": Groups.of(group).centre(values.sum(-1)),
            "gdpo": decoupled_sum(values, group, torch.ones(count), 1e-9),
        }
        for name, advantage in found.items():
            patterns[name].add(tuple(sorted(round(x, 6) + 0.0 for x in advantage.tolist())))
    assert [len(patterns[name]) for name in ("grpo", "no_std", "gdpo")] == [grpo, no_std, gdpo]


def test_gdpo_of_two_rollouts_and_two_binary_rewards() -> None:
    group = torch.zeros(2, dtype=torch.int64)
    one = decoupled_sum(torch.tensor([[0.0, 0.0], [1.0, 0.0]]), group, ONES[:2])
    two = decoupled_sum(torch.tensor([[0.0, 0.0], [1.0, 1.0]]), group, ONES[:2])
    assert_close(one, torch.tensor([-0.70701, 0.70701], dtype=torch.float64), atol=1e-5, rtol=0.0)
    assert_close(two, torch.tensor([-1.41401, 1.41401], dtype=torch.float64), atol=1e-5, rtol=0.0)


def test_gdpo_leaves_single_samples_at_zero_and_ignores_missing_rewards() -> None:
    values = torch.tensor([[1.0, torch.nan], [0.0, 1.0], [1.0, 0.0], [5.0, 5.0]], dtype=torch.float64)
    group = torch.tensor([0, 0, 0, 1])
    ignored = decoupled_sum(values, group, ONES[:2], nan_policy="ignore")
    assert ignored[3] == 0.0
    first = group_standardized(values[:3, 0], group[:3], 1e-4)
    assert_close(ignored[0], first[0])
    assert_close(
        decoupled_sum(values, group, ONES[:2])[:3], decoupled_sum(values.nan_to_num(), group, ONES[:2])[:3]
    )


def test_gdpo_gates_the_easy_reward_on_the_hard_one() -> None:
    values = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
    assert conditioned(values, easy=0, hard=1, threshold=1.0).tolist() == [[0.0, 0.0], [1.0, 2.0]]
