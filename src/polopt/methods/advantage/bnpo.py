r"""BNPO - Beta Normalization Policy Optimization (arXiv 2506.02864, 2025).

Success rates of the prompts of a batch are modelled by a Beta law, refitted in each iteration; the centred reward of a
prompt is divided by a second Beta density at its rate, whose parameters make the variance of the gradient smallest.
REINFORCE with baseline (alpha = beta = 1) and GRPO (3/2, up to pi/8) are two members of the family.

.. math::
    \tilde r_i = \frac{r_i - r_{min}}{r_{max} - r_{min}}, \quad p_g = \frac1{G_g}\sum_{i \in g} \tilde r_i \tag{1, 2}

.. math::
    m = \frac1P\sum_g p_g, \quad v = \frac1{P-1}\sum_g (p_g - m)^2, \quad
    \kappa = \frac{m(1-m)}{v} - 1, \quad a = \kappa m, \quad b = \kappa(1-m) \tag{3, 4}

.. math::
    \alpha = \max(1, 1 + a/3), \quad \beta = \max(1, 1 + b/3), \quad
    f(p) = \frac{p^{\alpha-1}(1-p)^{\beta-1}}{B(\alpha, \beta)} \tag{5, 6}

.. math::
    A_i = \min(1/f(p_g), w_{max})\,(\tilde r_i - p_g), \quad
    A_i = \tfrac1K \sum_k A^{(k)}_i \text{ for K rewards} \tag{7, 8}

Where the official code gives NaN (equal rates, one prompt) alpha = beta = 1; a group of one has advantage 0 and stays
out of the moments. The scale of A moves while the policy learns: learning rates are not GRPO's.

Slots: advantage. Surrogate of the recipe: PPO clip 0.2 / 0.28 with dual clip 10, token sum per sequence (run script).

Not TRL's `loss_type="bnpo"`, which is a token mean over the local micro-batch and knows no Beta law.

Use it with rewards of 0 and 1 whose success rates drift while the policy learns, many prompts a batch, several rollouts
each. Not with few prompts, where the fitted moments are noise, nor with unbounded rewards.

Pitfalls: rates of prompts that are nearly always or never solved get large weights: bound them with `weight_max`. The
variance of the rates contains their own sampling noise, which neither the paper nor its code removes.
"""

from typing import NamedTuple, Self

import torch
from jaxtyping import Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch
from polopt.errors import PoloptError
from polopt.functional.groups import Groups
from polopt.method import Method
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import Advantage
from polopt.registry import register, register_recipe
from polopt.settings import Settings

EQUAL_RATES = 1e-12
"""Variances of the success rates up to this count as 0."""


class BetaFit(NamedTuple):
    """The normaliser and what it makes of the groups."""

    alpha: Float[Tensor, ""]
    beta: Float[Tensor, ""]
    rate: Float[Tensor, " P"]
    """Success rate of each group."""
    weight: Float[Tensor, " P"]
    """min(1 / f, weight_max) of each group; 0 for a group of one."""


def beta_moment_fit(mean: Float[Tensor, ""], variance: Float[Tensor, ""]) -> tuple[Tensor, Tensor]:
    """Equation (4): the a, b of the Beta law with this mean and variance."""
    kappa = mean * (1 - mean) / variance - 1
    return kappa * mean, kappa * (1 - mean)


def log_beta_density(
    p: Float[Tensor, " P"], alpha: Float[Tensor, ""], beta: Float[Tensor, ""]
) -> Float[Tensor, " P"]:
    """Equation (6) in logs; a zero exponent times log 0 counts 0."""
    log_norm = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return torch.special.xlogy(alpha - 1, p) + torch.special.xlogy(beta - 1, 1 - p) - log_norm


def fit(rewards: Float[Tensor, " N"], groups: Groups, weight_max: float = 1e6) -> BetaFit:
    """Equations (2) to (7): the normaliser of rewards in [0, 1]."""
    rate = groups.mean(rewards)
    plural = groups.size > 1
    rates = rate[plural]
    one = torch.ones((), dtype=torch.float64)
    alpha = beta = one
    if len(rates) > 1 and (variance := rates.var()) > EQUAL_RATES:
        a, b = beta_moment_fit(rates.mean(), variance)
        alpha, beta = torch.maximum(one, 1 + a / 3), torch.maximum(one, 1 + b / 3)
    weight = (-log_beta_density(rate, alpha, beta)).exp().clamp(max=weight_max)
    return BetaFit(alpha, beta, rate, torch.where(plural, weight, 0.0))


def bnpo_advantage(
    rewards: Float[Tensor, "N K"],
    group: Int[Tensor, " N"],
    r_min: float = 0.0,
    r_max: float = 1.0,
    weight_max: float = 1e6,
) -> Float[Tensor, " N"]:
    """Equations (1) to (8), each reward by its own law.

    Args:
        rewards: [N, K] in [r_min, r_max]; NaN entries do not apply: they count as the group's mean.
        group: group ids.
        r_min: smallest value of every reward.
        r_max: largest value of every reward.
        weight_max: cap of 1 / f.

    Returns:
        [N], dimensionless, constant for the gradient.

    Raises:
        PoloptError: a reward outside the range.
    """
    scaled = (rewards.double() - r_min) / (r_max - r_min)
    known = scaled[~scaled.isnan()]
    if len(known) and not (known.min() >= 0 and known.max() <= 1):
        raise PoloptError(
            f"bnpo: rewards lie outside [r_min, r_max] = [{r_min}, {r_max}]; set the options to their range"
        )
    total = torch.zeros(len(rewards), dtype=torch.float64)
    for column in scaled.unbind(-1):
        applies = ~column.isnan()
        groups = Groups.of(group[applies])
        found = fit(column[applies], groups, weight_max)
        total[applies] += groups.broadcast(found.weight) * groups.centre(column[applies])
    return total / rewards.shape[1]


@register("bnpo")
class BetaNormalized(Advantage):
    """Beta-normalised advantage, equations (1) to (8)."""

    class Config(Settings):
        """Options of the Beta normalisation."""

        r_min: float = 0.0
        """Smallest value a reward can take."""
        r_max: float = 1.0
        """Largest value a reward can take."""
        weight_max: float = Field(1e6, gt=0)
        """Cap of a group's weight 1 / f (code: 1e6)."""

        @model_validator(mode="after")
        def _range(self) -> Self:
            if self.r_min >= self.r_max:
                raise ValueError(f"r_min = {self.r_min} must be below r_max = {self.r_max}")
            return self

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        c = self.config
        return bnpo_advantage(batch.rewards, batch.group, c.r_min, c.r_max, c.weight_max)[:, None]


@register_recipe("bnpo")
def bnpo() -> Method:
    """BNPO as in the released run script."""
    surrogate = PPOClip(clip_high=0.28, dual_clip=10, aggregation="sequence_mean_token_sum")
    return Method(advantage=BetaNormalized(), surrogate=surrogate)
