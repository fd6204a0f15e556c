"""Returns and generalised advantages against a loop over each trajectory."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from polopt.batch import Batch
from polopt.functional.returns import discounted_sums, generalized_advantages, outcome_at_last, rewards_to_go
from polopt.testing import batches

FIELDS = frozenset({"step_rewards", "old_value", "last_value"})
share = st.sampled_from([0.0, 0.5, 0.9, 0.99, 1.0])


def naive_advantages(
    rewards: list[float], values: list[float], last: float, gamma: float, lam: float
) -> list[float]:
    """Equation (16) of arXiv 1506.02438, summed out."""
    following = [*values[1:], last][: len(values)]
    delta = [r + gamma * v1 - v for r, v, v1 in zip(rewards, values, following, strict=True)]
    return [sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))]


@given(batches(FIELDS), share, share)
def test_advantages_agree_with_a_sum_over_each_trajectory(batch: Batch, gamma: float, lam: float) -> None:
    found = generalized_advantages(
        batch.step_rewards, batch.old_value, batch.last_value, batch.mask, gamma, lam
    )
    assert not found[~batch.mask].any()
    for row, mask in enumerate(batch.mask):
        rewards, values = batch.step_rewards[row][mask].tolist(), batch.old_value[row][mask].tolist()
        expected = naive_advantages(rewards, values, float(batch.last_value[row]), gamma, lam)
        assert found[row][mask].tolist() == pytest.approx(expected, rel=1e-10, abs=1e-12)


@given(batches(FIELDS), share)
def test_lambda_one_is_the_return_less_the_value_and_lambda_zero_the_one_step_error(
    batch: Batch, gamma: float
) -> None:
    nothing = torch.zeros(len(batch), dtype=torch.float64)
    whole = generalized_advantages(batch.step_rewards, batch.old_value, nothing, batch.mask, gamma, 1.0)
    returns = rewards_to_go(batch.step_rewards, batch.mask, gamma)
    assert_close(whole, torch.where(batch.mask, returns - batch.old_value, 0.0))
    one = generalized_advantages(batch.step_rewards, batch.old_value, nothing, batch.mask, 0.0, 0.0)
    assert_close(one, torch.where(batch.mask, batch.step_rewards - batch.old_value, 0.0))


@given(batches(FIELDS))
def test_gaps_in_the_mask_are_as_if_they_were_not_there(batch: Batch) -> None:
    rewards, values, last = batch.step_rewards, batch.old_value, batch.last_value
    found = generalized_advantages(rewards, values, last, batch.mask, 0.9, 0.8)
    for row, mask in enumerate(batch.mask):
        if mask.any():
            r, v = rewards[row][mask][None], values[row][mask][None]
            alone = generalized_advantages(r, v, last[row][None], mask[mask][None], 0.9, 0.8)
            assert_close(found[row][mask], alone[0])


@given(batches())
def test_outcome_lies_on_the_last_decision(batch: Batch) -> None:
    outcome = batch.outcome()
    placed = outcome_at_last(outcome, batch.mask)
    for row, mask in enumerate(batch.mask):
        expected = torch.zeros(mask.shape, dtype=torch.float64)
        if mask.any():
            expected[int(mask.nonzero()[-1])] = outcome[row]
        assert torch.equal(placed[row], expected)


def test_garbage_outside_the_mask_changes_no_return() -> None:
    mask = torch.tensor([[True, False, True, False]])
    clean, dirty = torch.tensor([[1.0, 0.0, 2.0, 0.0]]), torch.tensor([[1.0, torch.nan, 2.0, torch.inf]])
    last = torch.zeros(1)
    assert torch.equal(
        generalized_advantages(dirty, dirty, last, mask, 0.9, 0.8),
        generalized_advantages(clean, clean, last, mask, 0.9, 0.8),
    )
    assert torch.equal(rewards_to_go(dirty, mask), torch.tensor([[3.0, 0.0, 2.0, 0.0]]))


@pytest.mark.parametrize("shape", [(0, 0), (0, 3), (2, 0)])
def test_nothing_has_no_advantage(shape: tuple[int, int]) -> None:
    empty: Tensor = torch.zeros(shape)
    found = generalized_advantages(empty, empty, torch.zeros(shape[0]), empty.bool(), 1.0, 1.0)
    assert found.shape == shape
    assert rewards_to_go(empty, empty.bool()).shape == shape


@pytest.mark.parametrize("width", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("discount", [0.0, 0.97, 1.0])
def test_discounted_sums_obey_their_recurrence_across_blocks(width: int, discount: float) -> None:
    values = torch.randn(3, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    sums = discounted_sums(values, discount)
    following = torch.cat([sums[:, 1:], values.new_zeros(3, min(1, width))], 1)
    assert_close(sums, values + discount * following, rtol=1e-12, atol=1e-12)
