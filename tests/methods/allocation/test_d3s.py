"""Identities of the D3S card (arXiv 2509.22115)."""

from itertools import combinations

import pytest
import torch
from torch.testing import assert_close

from polopt.methods.allocation.d3s import most_varied, schedule, select_samples, select_tokens


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 2, 3, 5, 8])
def test_selected_set_has_the_largest_variance_of_its_size(seed: int, count: int) -> None:
    values = torch.randn(9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    best = max(values[list(rows)].var(correction=0).item() for rows in combinations(range(9), count))
    kept = most_varied(values, count)
    assert kept.sum() == count
    assert values[kept].var(correction=0).item() == pytest.approx(best, abs=1e-12)


def test_two_valued_advantages_are_split_evenly() -> None:
    values = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    kept = values[most_varied(values, 6)]
    assert kept.sum() == 0
    assert_close(kept.var(correction=0), torch.ones((), dtype=torch.float64))


def test_batch_scope_prefers_unbalanced_groups_and_drops_flat_ones() -> None:
    rare = torch.tensor([2.65] + [-0.38] * 7, dtype=torch.float64)
    even = torch.tensor([1.0, -1.0] * 4, dtype=torch.float64)
    flat = torch.zeros(8, dtype=torch.float64)
    group = torch.arange(3).repeat_interleave(8)
    kept = select_samples(torch.cat([rare, even, flat]), group, 1)
    assert kept.sum() == 3 and kept[0] and not kept[16:].any()


def test_selection_ignores_sign_and_shift() -> None:
    values = torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(most_varied(values, 5), most_varied(values + 3, 5))
    assert_close(values[most_varied(values, 5)].var(), values[most_varied(-values, 5)].var())


def test_inside_a_group_rewards_and_advantages_select_the_same() -> None:
    rewards = torch.rand(8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    advantages = (rewards - rewards.mean()) / rewards.std(correction=0)
    assert torch.equal(most_varied(rewards, 4), most_varied(advantages, 4))


def test_everything_is_kept_when_everything_is_asked_for() -> None:
    group = torch.arange(2).repeat_interleave(4)
    values = torch.randn(8, dtype=torch.float64)
    assert select_samples(values, group, 4, "batch").all() and select_samples(values, group, 4, "group").all()
    pool = torch.rand(8, 5) > 0.3
    assert torch.equal(select_tokens(values[:, None], torch.rand(8, 5, dtype=torch.float64), pool, 1.0), pool)


def test_token_selection_ignores_the_scale_of_the_entropy_and_silent_tokens() -> None:
    draws = torch.Generator().manual_seed(3)
    values = torch.tensor([[1.0], [0.0], [-2.0]], dtype=torch.float64)
    entropy = torch.rand(3, 6, generator=draws, dtype=torch.float64)
    pool = torch.ones(3, 6, dtype=torch.bool)
    kept = select_tokens(values, entropy, pool, 0.5)
    assert torch.equal(kept, select_tokens(values, 7 * entropy, pool, 0.5))
    assert kept.sum() == 9 and not kept[1].any()


def test_empty_pool_selects_nothing() -> None:
    assert not select_tokens(
        torch.ones(2, 1), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool), 0.5
    ).any()


def test_schedule_is_linear_and_rounds_half_up() -> None:
    assert schedule(0.0, 2, 8, 0.2, 1.0) == (2, pytest.approx(0.2))
    assert schedule(1.0, 2, 8, 0.2, 1.0) == (8, pytest.approx(1.0))
    assert schedule(0.25, 2, 4, 0.2, 1.0)[0] == 3
