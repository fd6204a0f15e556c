"""Interquartile means and bootstrap intervals: known values, and coverage where the truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polopt.report.statistics import Interval, bootstrap, bootstrap_band, interquartile_mean

finite = st.floats(-1e3, 1e3)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([7.0], 7.0),
        ([0.0, 4.0], 2.0),
        ([0.0, 1.0, 2.0, 100.0], 1.5),
        ([100.0, 0.0, 1.0, 2.0, 3.0], (0.75 * 1 + 2 + 0.75 * 3) / 2.5),
        (range(8), 3.5),
    ],
)
def test_interquartile_mean_of_known_values(values: list[float], expected: float) -> None:
    assert interquartile_mean(list(values)) == pytest.approx(expected, abs=1e-12)


@given(st.lists(finite, min_size=1, max_size=30), finite, st.floats(0, 100))
def test_interquartile_mean_is_linear_under_shift_and_scale(
    values: list[float], shift: float, scale: float
) -> None:
    moved = interquartile_mean(scale * np.array(values) + shift)
    assert moved == pytest.approx(scale * float(interquartile_mean(values)) + shift, abs=1e-6)


@given(st.lists(finite, min_size=1, max_size=30))
def test_interquartile_mean_lies_between_the_quartiles(values: list[float]) -> None:
    low, high = np.quantile(values, [0.25, 0.75], method="inverted_cdf")
    assert min(values) - 1e-9 <= low - 1e-9 <= interquartile_mean(values) <= max(values) + 1e-9
    assert interquartile_mean(values) <= max(high, np.quantile(values, 0.75, method="higher")) + 1e-9


def test_outliers_in_the_outer_quarters_do_not_count() -> None:
    values = np.arange(20.0)
    changed = values.copy()
    changed[:5], changed[15:] = -1e9, 1e9
    assert interquartile_mean(changed) == interquartile_mean(values)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0)
    samples = draws.normal(3.0, 2.0, size=(300, 30))
    found = [bootstrap([sample], resamples=500) for sample in samples]
    covered = np.mean([interval.low <= 3.0 <= interval.high for interval in found])
    assert 0.88 <= covered <= 0.99


def test_strata_keep_their_sizes_in_every_resample() -> None:
    found = bootstrap([[0.0] * 5, [1.0] * 5])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    mixed = bootstrap([[0.0] * 5 + [1.0] * 5])
    assert mixed.low < 0.5 < mixed.high


def test_equal_values_have_an_interval_without_width_and_draws_repeat() -> None:
    found = bootstrap([[2.0] * 6])
    assert (found.mean, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0), abs=1e-12)
    values = [0.1, 0.5, 0.2, 0.9]
    assert bootstrap([values]) == bootstrap([values, []])


def test_no_value_is_refused() -> None:
    with pytest.raises(ValueError, match="no value"):
        bootstrap([[], []])


def test_overlap_is_symmetric_and_includes_borders() -> None:
    one, other, far = Interval(1, 0, 2), Interval(3, 2, 4), Interval(9, 8, 10)
    assert one.overlaps(other) and other.overlaps(one)
    assert not one.overlaps(far) and not far.overlaps(one)


def test_band_of_curves_agrees_with_the_mean_and_contains_it() -> None:
    curves = np.random.default_rng(1).random((7, 11))
    mean, low, high = bootstrap_band(curves)
    assert np.allclose(mean, interquartile_mean(curves.T))
    assert (low <= mean).all() and (mean <= high).all()
