"""Statistics of held-out scores, as pure functions: means, pass@k and majority votes with 95 % intervals.

The unit of every interval is the prompt: samples of one prompt are not independent. What an interval leaves out is the
randomness of training; that needs several runs.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_ELEMENTS = 1_000_000
"""Draws that a bootstrap holds in memory at once."""


class Interval(NamedTuple):
    """An estimate and its confidence interval."""

    estimate: float
    low: float
    high: float


def normal_interval(values: Float[Tensor, " P"], confidence: float = 0.95) -> Interval:
    """Mean of P independent values with its normal interval; unbounded for a single value.

    Raises:
        ValueError: there are no values.
    """
    _require(len(values))
    mean = float(values.double().mean())
    error = float(values.double().std()) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    width = NormalDist().inv_cdf(0.5 + confidence / 2) * error
    return Interval(mean, mean - width, mean + width)


def bootstrap_interval(
    values: Float[Tensor, " P"], generator: torch.Generator, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Mean of P independent values with its percentile bootstrap interval.

    Args:
        values: one per prompt.
        generator: source of the resamples, on the CPU.
        resamples: number of resamples.
        confidence: coverage, in (0, 1).

    Raises:
        ValueError: there are no values.
    """
    _require(len(values))
    values = values.double()
    rows = max(1, _ELEMENTS // len(values))
    means = [
        values[
            torch.randint(len(values), (min(rows, resamples - done), len(values)), generator=generator)
        ].mean(-1)
        for done in range(0, resamples, rows)
    ]
    tail = (1 - confidence) / 2
    low, high = torch.cat(means).quantile(torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """A proportion of independent successes with its Wilson score interval, which stays inside [0, 1].

    Raises:
        ValueError: there are no trials.
    """
    _require(total)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, spread = successes / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    width = z / (1 + spread) * math.sqrt(share * (1 - share) / total + spread / (4 * total))
    return Interval(share, max(0.0, min(share, centre - width)), min(1.0, max(share, centre + width)))


def pass_at_k(samples: Int[Tensor, " P"], correct: Int[Tensor, " P"], k: int) -> Float[Tensor, " P"]:
    r"""Unbiased probability that one of k samples of a prompt is correct, from n samples of which c are.

    $$1 - \binom{n-c}{k} / \binom{n}{k} = 1 - \prod_{i=n-c+1}^{n} (1 - k / i)$$

    Args:
        samples: n of each prompt, at least k.
        correct: c of each prompt.
        k: samples that are allowed, at least 1.

    Raises:
        ValueError: k below 1 or above some n.

    References:
        Chen et al., Evaluating Large Language Models Trained on Code, arXiv 2107.03374, equation 1.
    """
    if k < 1 or bool((samples < k).any()):
        raise ValueError(f"pass@{k}: every prompt needs at least {max(k, 1)} samples")
    i = torch.arange(1, int(samples.max()) + 1 if len(samples) else 1, dtype=torch.float64)
    inside = (i > (samples - correct)[:, None]) & (i <= samples[:, None])
    return 1 - torch.where(inside, (1 - k / i).clamp(min=0.0), 1.0).prod(-1)


def majority_vote(correct: Bool[Tensor, " n"], answer: Int[Tensor, " n"]) -> float:
    """Whether the most frequent answer of one prompt's n samples is correct; tied answers share the vote.

    Args:
        correct: of each sample.
        answer: canonical id of each sample's answer; -1 for none, which does not vote.
    """
    voted = answer >= 0
    if not voted.any():
        return 0.0
    answers, votes = answer[voted].unique(return_counts=True)
    winners = answers[votes == votes.max()]
    return float(torch.stack([correct[answer == winner].double().mean() for winner in winners]).mean())


def score_statistics(
    rewards: Float[Tensor, "N K"],
    group: Int[Tensor, " N"],
    answer: Int[Tensor, " N"],
    names: Sequence[str],
    generator: torch.Generator | None = None,
) -> dict[str, float]:
    """Statistics of N held-out completions.

    Args:
        rewards: K rewards of each; NaN values are left out.
        group: which prompt each belongs to.
        answer: canonical id of each final answer; -1 for none.
        names: of the K rewards.
        generator: source of the bootstrap's resamples; if None, a fixed one, so that equal data give equal intervals.

    Returns:
        `score`, the mean of the first reward, and `score/NAME`, those of the others; if the first reward is 0 or 1 and
        prompts have several samples, also `pass@k` for powers of two and `majority`. Each with its 95 % interval in
        `.../low` and `.../high`. NaN where nothing was measured.
    """
    generator = generator or torch.Generator().manual_seed(0)
    found: dict[str, Interval] = {}
    for index, name in enumerate(names):
        found["score" if index == 0 else f"score/{name}"] = _mean(rewards[:, index], group, generator)
    known = ~rewards[:, 0].isnan()
    value, group, answer = rewards[known, 0], group[known], answer[known]
    if len(value) and bool(((value == 0) | (value == 1)).all()):
        found |= _repeated(value == 1, group, answer, generator)
    return {
        f"{name}{suffix}": number
        for name, interval in found.items()
        for suffix, number in zip(("", "/low", "/high"), interval, strict=True)
    }


def _mean(reward: Float[Tensor, " N"], group: Int[Tensor, " N"], generator: torch.Generator) -> Interval:
    known = ~reward.isnan()
    value, prompt = reward[known].double(), group[known].unique(return_inverse=True)[1]
    if not len(value):
        return Interval(math.nan, math.nan, math.nan)
    samples = prompt.bincount()
    if bool((samples == 1).all()) and bool(((value == 0) | (value == 1)).all()):
        return wilson_interval(int(value.sum()), len(value))
    return bootstrap_interval(prompt.bincount(weights=value) / samples, generator)


def _repeated(
    correct: Bool[Tensor, " N"],
    group: Int[Tensor, " N"],
    answer: Int[Tensor, " N"],
    generator: torch.Generator,
) -> dict[str, Interval]:
    prompt = group.unique(return_inverse=True)[1]
    samples, right = prompt.bincount(), prompt.bincount(weights=correct.double()).long()
    found, k = {}, 2
    while k <= int(samples.min()):
        found[f"pass@{k}"] = bootstrap_interval(pass_at_k(samples, right, k), generator)
        k *= 2
    if int(samples.max()) > 1:
        votes = [majority_vote(correct[prompt == p], answer[prompt == p]) for p in range(len(samples))]
        found["majority"] = bootstrap_interval(torch.tensor(votes, dtype=torch.float64), generator)
    return found


def _require(values: int) -> None:
    if not values:
        raise ValueError("an interval needs at least one value")
