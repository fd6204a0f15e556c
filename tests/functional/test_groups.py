"""Group statistics against exact rational arithmetic: ragged, far from zero, constant, one against seven."""

from fractions import Fraction
from itertools import groupby

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from polopt.functional.groups import Groups

SEVEN_AND_ONE = [0.1] * 7 + [0.3]
OFFSETS = st.sampled_from([0.0, 1.0, -3.7, 1e4, 1e8, -1e8])


@st.composite
def grouped(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Values and group ids: ids with gaps in any order, values up to 1e8 away from zero."""
    sizes = draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    ids = draw(st.lists(st.integers(-50, 50), min_size=len(sizes), max_size=len(sizes), unique=True))
    values: list[float] = []
    for size in sizes:
        offset = draw(OFFSETS)
        each = st.one_of(st.just(0.1), st.floats(-2, 2, width=32))
        values += [offset + v for v in draw(st.lists(each, min_size=size, max_size=size))]
    order = torch.tensor(draw(st.permutations(range(len(values)))))
    group = torch.tensor([i for i, size in zip(ids, sizes, strict=True) for _ in range(size)])
    return torch.tensor(values, dtype=torch.float64)[order], group[order]


def exact_groups(values: Tensor, group: Tensor) -> dict[int, list[Fraction]]:
    """The values of each group as fractions, by ascending id."""
    pairs = sorted(zip(group.tolist(), values.tolist(), strict=True))
    return {
        key: [Fraction(v) for _, v in members] for key, members in groupby(pairs, key=lambda pair: pair[0])
    }


def mean(values: list[Fraction]) -> Fraction:
    return sum(values, Fraction()) / len(values)


def variance(values: list[Fraction], unbiased: bool) -> Fraction:
    squares = sum(((v - mean(values)) ** 2 for v in values), Fraction())
    return squares / max(1, len(values) - unbiased)


@settings(max_examples=200)
@given(grouped())
@example((torch.tensor(SEVEN_AND_ONE, dtype=torch.float64) + 1e8, torch.zeros(8, dtype=torch.int64)))
def test_statistics_agree_with_exact_arithmetic(drawn: tuple[Tensor, Tensor]) -> None:
    values, group = drawn
    groups, exact = Groups.of(group), exact_groups(values, group)
    members = list(exact.values())
    assert groups.size.tolist() == [len(m) for m in members]
    assert groups.min(values).tolist() == [float(min(m)) for m in members]
    assert groups.max(values).tolist() == [float(max(m)) for m in members]
    for unbiased in (True, False):
        for found, m in zip(groups.std(values, unbiased).tolist(), members, strict=True):
            assert Fraction(found) ** 2 == pytest.approx(float(variance(m, unbiased)), rel=1e-6, abs=1e-30)
    for found, m in zip(groups.mean(values).tolist(), members, strict=True):
        assert found == pytest.approx(float(mean(m)), rel=1e-15, abs=1e-15)
    for row, key in enumerate(group.tolist()):
        m, value = exact[key], Fraction(float(values[row]))
        spread = float(max(m) - min(m))
        assert float(groups.centre(values)[row]) == pytest.approx(float(value - mean(m)), abs=1e-14 * spread)
        others = mean(m) if len(m) == 1 else (sum(m, Fraction()) - value) / (len(m) - 1)
        assert float(groups.leave_one_out(values)[row]) == pytest.approx(
            float(value - others), abs=1e-14 * spread
        )
        assert float(groups.leave_one_out_mean(values)[row]) == pytest.approx(
            float(others), rel=1e-15, abs=1e-14 * spread
        )


@given(st.floats(-1e8, 1e8), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_equal_values_deviate_by_exactly_zero(value: float, sizes: list[int]) -> None:
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    for dtype in (torch.float32, torch.float64):
        values = torch.full((len(group),), value, dtype=dtype)
        groups = Groups.of(group)
        assert not groups.centre(values).any()
        assert not groups.leave_one_out(values).any()
        assert not groups.std(values).any()
        assert torch.equal(groups.mean(values), groups.min(values))
        assert torch.equal(groups.leave_one_out_mean(values), values.double())


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_seven_equal_and_one_different_are_no_outlier_beyond_their_own(
    offset: float, dtype: torch.dtype
) -> None:
    values = (torch.tensor(SEVEN_AND_ONE, dtype=torch.float64) * 1024 + offset).to(dtype)
    groups = Groups.of(torch.zeros(8, dtype=torch.int64))
    scores = groups.centre(values) / groups.broadcast(groups.std(values))
    assert scores.tolist() == pytest.approx([-(8**-0.5)] * 7 + [7 * 8**-0.5], rel=1e-6)


@given(grouped(), st.randoms(use_true_random=False))
def test_statistics_follow_permutations_and_new_names(
    drawn: tuple[Tensor, Tensor], random: st.DataObject
) -> None:
    values, group = drawn
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(len(values)))
    plain, moved = Groups.of(group), Groups.of(group[order] * 7 - 3)
    torch.testing.assert_close(
        moved.centre(values[order]), plain.centre(values)[order], rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(moved.std(values[order]), plain.std(values), rtol=1e-6, atol=1e-12)


def test_several_columns_are_as_many_calls() -> None:
    group = torch.tensor([3, 1, 3, 1, 1, 9])
    values = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    groups = Groups.of(group)
    for name in ("sum", "min", "max", "mean", "centre", "std", "leave_one_out", "leave_one_out_mean"):
        together = getattr(groups, name)(values)
        apart = torch.stack([getattr(groups, name)(column) for column in values.unbind(-1)], -1)
        assert torch.equal(together, apart), name


def test_no_trajectories_are_no_groups() -> None:
    groups = Groups.of(torch.zeros(0, dtype=torch.int64))
    empty = torch.zeros(0)
    assert (
        len(groups.size)
        == len(groups.mean(empty))
        == len(groups.centre(empty))
        == len(groups.std(empty))
        == 0
    )
