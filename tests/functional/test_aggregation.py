"""What each mode averages, from its definition, and that the shares of a whole batch add up to one."""

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from polopt.batch import Batch
from polopt.functional.aggregation import Aggregation, Denominator, aggregation_weights
from polopt.testing import batches

MODES, DENOMINATORS = get_args(Aggregation), get_args(Denominator)
SUMS_TO_ONE = ("token_mean", "sequence_mean", "group_mean")


def ones(batch: Batch) -> Tensor:
    return batch.mask.double()


@given(batches(), st.sampled_from(SUMS_TO_ONE), st.sampled_from(DENOMINATORS))
def test_means_of_ones_are_one(batch: Batch, mode: Aggregation, denominator: Denominator) -> None:
    share = aggregation_weights(batch.mask, ones(batch), batch.group, mode, denominator)
    assert not share[~batch.mask].any()
    assert float(share.sum()) == pytest.approx(float(batch.mask.any()), abs=1e-12)


@given(batches(), st.sampled_from(["sequence_mean_token_sum", "constant"]))
def test_sums_weigh_a_trajectory_by_its_length(batch: Batch, mode: Aggregation) -> None:
    share = aggregation_weights(batch.mask, ones(batch), batch.group, mode)
    rows = max(1, int(batch.mask.any(-1).sum()))
    divisor = rows * (max(1, int(batch.lengths.max())) if mode == "constant" else 1)
    torch.testing.assert_close(share, ones(batch) / divisor)


@given(batches(), st.sampled_from(MODES), st.sampled_from(DENOMINATORS), st.integers(0, 2**20))
def test_definitions_hold_for_any_weights(
    batch: Batch, mode: Aggregation, denominator: Denominator, seed: int
) -> None:
    drawn = torch.rand(batch.mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = torch.where(drawn < 0.4, 0.0, drawn)
    share = aggregation_weights(batch.mask, weights, batch.group, mode, denominator, constant=7.0)
    counted = batch.mask if denominator == "all" else batch.mask & (weights > 0)
    present = (counted if denominator == "selected" else batch.mask).any(-1)
    groups = {int(g) for g in batch.group[present]}
    for row in range(len(batch)):
        length, rows = max(1, int(counted[row].sum())), max(1, int(present.sum()))
        members = max(1, int((present & (batch.group == batch.group[row])).sum()))
        divisor = {
            "token_mean": max(1, int(counted.sum())),
            "sequence_mean": length * rows,
            "sequence_mean_token_sum": rows,
            "constant": 7.0 * rows,
            "group_mean": length * members * max(1, len(groups)),
        }[mode]
        expected = torch.where(batch.mask[row], weights[row], 0.0) / divisor
        torch.testing.assert_close(share[row], expected)


@given(batches(), st.sampled_from(MODES), st.sampled_from(DENOMINATORS))
def test_padding_changes_no_share(batch: Batch, mode: Aggregation, denominator: Denominator) -> None:
    rows, steps = batch.mask.shape
    share = aggregation_weights(batch.mask, ones(batch), batch.group, mode, denominator)
    mask = torch.zeros(rows + 2, steps + 3, dtype=torch.bool)
    mask[:rows, :steps] = batch.mask
    group = torch.cat([batch.group, torch.tensor([1000, 1001])])
    padded = aggregation_weights(mask, torch.ones(mask.shape, dtype=torch.float64), group, mode, denominator)
    assert torch.equal(padded[:rows, :steps], share)


def test_empty_and_fully_masked_batches_have_shares_of_zero() -> None:
    for shape in ((0, 0), (0, 4), (3, 0), (3, 4)):
        mask = torch.zeros(shape, dtype=torch.bool)
        for mode in MODES:
            share = aggregation_weights(
                mask, torch.ones(shape), torch.zeros(shape[0], dtype=torch.int64), mode
            )
            assert share.shape == shape
            assert not share.any()


def test_unknown_mode_is_named() -> None:
    mask = torch.ones(1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="aggregation: 'mean' is not one of token_mean, "):
        aggregation_weights.__wrapped__(mask, mask.double(), mask[:, 0].long(), "mean")  # type: ignore[attr-defined]
