"""Statistics of a few seeds that say what is not known: interquartile means with bootstrap intervals.

They follow "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (Agarwal et al., arXiv 2108.13264): the
interquartile mean is the mean of the middle half of the runs; its interval is that of a bootstrap that draws runs with
replacement inside each stratum (task).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 5_000
"""Resamples of an interval."""


@dataclass(frozen=True)
class Interval:
    """An interquartile mean and its 95 % interval, in the unit of the values."""

    mean: float
    low: float
    high: float

    def overlaps(self, other: "Interval") -> bool:
        """Whether the two intervals have a value in common."""
        return self.low <= other.high and other.low <= self.high


def interquartile_mean(values: ArrayLike) -> NDArray[np.float64]:
    """Mean of the middle half of the values.

    Where the quartiles fall into a value, the value counts with the share of it that is inside.

    Args:
        values: [..., n], n >= 1.

    Returns:
        [...].

    Example:
        >>> float(interquartile_mean([0.0, 1.0, 2.0, 100.0]))
        1.5
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64), axis=-1)
    n = ordered.shape[-1]
    left = np.arange(n)
    inside = np.clip(np.minimum(left + 1, 0.75 * n) - np.maximum(left, 0.25 * n), 0, None)
    return ordered @ (inside / inside.sum())


def bootstrap(
    strata: Sequence[ArrayLike], level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interquartile mean of all values, with the percentile interval of a stratified bootstrap.

    With five values or fewer the interval is rather too narrow, as every bootstrap's is.

    Args:
        strata: the values of each stratum, [n_s], n_s >= 1. Each resample draws n_s of them with replacement.
        level: share of the resamples inside the interval.
        resamples: number of resamples.
        seed: of the draws; the same values always get the same interval.

    Raises:
        ValueError: there is no value.
    """
    arrays = [array for values in strata if (array := np.asarray(values, dtype=np.float64)).size]
    if not arrays:
        raise ValueError("no value to take the mean of")
    draws = np.random.default_rng(seed)
    drawn = [array[draws.integers(array.size, size=(resamples, array.size))] for array in arrays]
    means = interquartile_mean(np.concatenate(drawn, axis=-1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(interquartile_mean(np.concatenate(arrays))), float(low), float(high))


def bootstrap_band(values: ArrayLike, level: float = 0.95, seed: int = 0) -> NDArray[np.float64]:
    """Interquartile mean and interval at each point of curves; whole curves are drawn.

    Args:
        values: [n, points], a curve for each run.
        level: share of the resamples inside the band.
        seed: of the draws.

    Returns:
        [3, points]: mean, low, high.
    """
    curves = np.asarray(values, dtype=np.float64)
    draws = np.random.default_rng(seed)
    drawn = curves[draws.integers(len(curves), size=(1_000, len(curves)))]
    means = interquartile_mean(np.moveaxis(drawn, 1, -1))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.stack([interquartile_mean(curves.T), low, high])
