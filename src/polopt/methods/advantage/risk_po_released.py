"""RiskPO's advantage as released, beside the paper's in `risk_po` (arXiv 2510.00911).

Scores are compared inside a set of bundles, the tail and the middle averaged, and each bundle's advantage credited to its
members in one of several ways.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from polopt.functional.groups import Groups

Credit = Literal["uniform", "std", "sum-mean"]
BASELINE_LEVELS = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
"""Levels of the quantiles that the released baseline integrates over."""


def released_advantage(
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    bundle: Int[Tensor, " N"],
    bundle_set: Int[Tensor, " N"],
    *,
    alpha: float,
    beta: float,
    w_mix: float | None = 1.5,
    credit: Credit = "std",
    natural_baseline: bool = True,
    norm_by_std: bool = True,
    upper_weight: float | None = None,
    quantiles: Float[Tensor, " 2"] | None = None,
    baseline_quantiles: Float[Tensor, " 19"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, " J"], Float[Tensor, " N"]]:
    """The released implementation: scores of the bundles, and the advantage credited to each trajectory.

    Args:
        outcome: rewards.
        group: group ids.
        bundle: bundle of each trajectory; -1 gets advantage 0.
        bundle_set: bundle set of each trajectory.
        alpha: level of the tail.
        beta: level above which nothing counts.
        w_mix: weight of the tail against 1 for the middle; None leaves the tail out.
        credit: the bundle's advantage to all, in deviations of the prompt's rewards, or by the reward above the mean.
        natural_baseline: add the constant a - b.
        norm_by_std: divide by the unbiased deviation of the set's scores.
        upper_weight: instead of the tail, pay for scores above b with this weight (the risk-seeking ablation).
        quantiles: tracked a and b; None takes the set's empirical ones.
        baseline_quantiles: tracked ones at `BASELINE_LEVELS`, over which the mean of the middle is subtracted; None: not.
        eps: added to denominators.
    """
    inside = bundle >= 0
    members = Groups.of(bundle[inside])
    scores = members.sum(outcome[inside])
    set_of_bundle = torch.zeros(len(scores), dtype=torch.int64).scatter_(0, members.index, bundle_set[inside])
    sets = Groups.of(set_of_bundle)
    a, b = (
        _quantiles(scores, sets, alpha, beta)
        if quantiles is None
        else quantiles.double()[:, None].expand(2, len(scores))
    )
    below, above_b = (a - scores).clamp(min=0), (scores - b).clamp(min=0)
    middle = _middle(scores, a, b, natural_baseline)
    if baseline_quantiles is not None:
        of_levels = _middle(baseline_quantiles.double()[:, None], a, b, natural_baseline)
        middle = middle - torch.trapezoid(of_levels, BASELINE_LEVELS, dim=0)
    x = middle / (beta - alpha + eps)
    if upper_weight is not None:
        x = (upper_weight * above_b / (1 - beta + eps) + x) / (upper_weight + 1)
    elif w_mix is not None:
        x = (w_mix * -below / (alpha + eps) + x) / (w_mix + 1)
    if norm_by_std:
        deviation = torch.where(sets.size > 1, sets.std(scores), 1.0)
        x = x / (sets.broadcast(deviation) + eps)
    advantage = torch.zeros(len(outcome), dtype=torch.float64)
    advantage[inside] = members.broadcast(x) * _credit(outcome, group, inside, members, credit, eps)
    return scores, advantage


def _middle(scores: Tensor, a: Tensor, b: Tensor, natural_baseline: bool) -> Tensor:
    """What scores earn between the quantiles, with the constant a - b if asked for."""
    return (scores - a).clamp(min=0) - (scores - b).clamp(min=0) + natural_baseline * (a - b)


def _quantiles(scores: Tensor, sets: Groups, alpha: float, beta: float) -> tuple[Tensor, Tensor]:
    """Empirical quantiles of each score's set, by linear interpolation."""
    order = torch.argsort(scores, stable=True)
    order = order[torch.argsort(sets.index[order], stable=True)]
    ordered, start = scores[order], sets.size.cumsum(0) - sets.size

    def at(level: float) -> Tensor:
        position = level * (sets.size - 1).double()
        low = position.floor().long()
        high = torch.minimum(low + 1, sets.size - 1)
        value = torch.lerp(ordered[start + low], ordered[start + high], position - low)
        return sets.broadcast(value)

    return at(alpha), at(beta)


def _credit(
    outcome: Tensor, group: Tensor, inside: Bool[Tensor, " N"], members: Groups, credit: Credit, eps: float
) -> Float[Tensor, " M"]:
    """What share of the bundle's advantage each of its members gets."""
    groups = Groups.of(group)
    if credit == "uniform":
        return torch.ones(int(inside.sum()), dtype=torch.float64)
    if credit == "std":
        deviation = groups.std(outcome)
        deviation = torch.where(deviation > 1e-3, deviation, 1.0)
        return 1 / (groups.broadcast(deviation)[inside] + eps)
    above = groups.centre(outcome)[inside]
    total = members.broadcast(members.sum(above))
    even = 1 / members.broadcast(members.size).double()
    return torch.where(total.abs() > 1e-6, above / torch.where(total.abs() > 1e-6, total, 1.0), even)
