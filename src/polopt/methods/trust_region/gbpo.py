r"""GBPO - the group form of Bounded Ratio Reinforcement Learning (BRRL, arXiv 2604.18578, 2026).

Improving the policy subject to |ratio - 1| <= epsilon has a closed-form optimum: raise the ratio of whatever is better
than a smoothed median by the whole epsilon, lower the rest. GBPO regresses the ratio of every token onto that target.

.. math::
    A_i = \frac{R_i - \mathrm{mean}_g}{\mathrm{std}_g + 10^{-6}}, \quad
    \tilde A_i = \frac{R_i - \mathrm{median}_g}{\mathrm{std}_g + 10^{-6}} \tag{B7}

.. math::
    \rho^\star_i = 1 - \epsilon_{low} + (\epsilon_{high} + \epsilon_{low})\,\sigma(\tilde A_i / \tau), \quad
    \ell_{it} = |r_{it} - \rho^\star_i|\,|A_i| \tag{B5, B7}

.. math::
    \rho^\star = c_l + (c_h - c_l)\,\sigma\big(\tilde A/\tau + \ln\tfrac{1 - c_l}{c_h - 1}\big) \tag{B8}

(B7) is the released code's target, whose value at a zero advantage is 1 only for equal widths; `exact_target` takes (B8),
which is 1 there for any widths (derived from the stated properties). Standard deviations are unbiased, the median of an
even group is the mean of its two middle values. A group of one has both signals 0; `singletons="reward"` is the official
code, which takes 0 for its mean and median and 1 for its deviation, so that both are R.

With binary rewards and a small tau the majority class of a group is anchored at ratio 1 and only the minority moves.

Use it when many epochs or wide clips make a clipped method unstable: each decision has a target and no push beyond it.
Not when rewards are binary and learning has to be fast: only half of each group moves.

Pitfalls: the temperature is in units of the normalised reward; as it falls the target becomes a step, and rewards equal to
the median keep the ratio at 1.

Slots: advantage `gbpo` (both signals), surrogate `bounded_ratio`. The form with a critic is `bpo`.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.groups import Groups
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.parts import Advantage, Surrogate
from polopt.registry import register, register_recipe
from polopt.settings import Settings

Singletons = Literal["zero", "reward"]


def group_median(values: Float[Tensor, " N"], groups: Groups) -> Float[Tensor, " P"]:
    """Median of each group, the mean of the two middle values in an even one; float64."""
    order = torch.argsort(values.double(), stable=True)
    order = order[torch.argsort(groups.index[order], stable=True)]
    ordered = values.double()[order]
    start = groups.size.cumsum(0) - groups.size
    return (ordered[start + (groups.size - 1) // 2] + ordered[start + groups.size // 2]) / 2


def mean_and_median_advantages(
    outcome: Float[Tensor, " N"],
    group: Int[Tensor, " N"],
    eps: float = 1e-6,
    norm_by_std: bool = True,
    singletons: Singletons = "zero",
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """Equation (B7): deviations from the mean and from the median of the group, in its standard deviations.

    In a group of one both are 0, or with "reward" the reward over 1 + eps.
    """
    groups = Groups.of(group)
    scale = (
        groups.broadcast(groups.std(outcome)) + eps if norm_by_std else torch.ones((), dtype=torch.float64)
    )
    from_median = outcome.double() - groups.broadcast(group_median(outcome, groups))
    from_mean = groups.centre(outcome)
    if singletons == "reward":
        alone = groups.broadcast(groups.size) == 1
        from_mean, from_median = (
            torch.where(alone, outcome.double(), signal) for signal in (from_mean, from_median)
        )
        scale = torch.where(alone & norm_by_std, 1 + eps, scale)
    return from_mean / scale, from_median / scale


def target_ratio(
    signal: Float[Tensor, "*shape"], width_low: float, width_high: float, exact: bool = False
) -> Float[Tensor, "*shape"]:
    """The optimal ratio: equation (B7) of the target advantage over its temperature, or (B8) if `exact`."""
    shift = math.log(width_low / width_high) if exact else 0.0
    return 1 - width_low + (width_high + width_low) * torch.sigmoid(signal + shift)


def bounded_ratio_loss(
    ratio: Float[Tensor, "*shape"], target: Float[Tensor, "*#shape"], advantages: Float[Tensor, "*shape"]
) -> Float[Tensor, "*shape"]:
    """Equation (B5) of each decision: distance of the ratio to its target, weighted by the size of the advantage."""
    return (ratio - target).abs() * advantages.abs()


@register("gbpo")
class MeanAndMedian(Advantage):
    """Group z-score around the mean, and around the median as the signal `target_advantages`; equation (B7)."""

    provides = frozenset({"target_advantages"})

    class Config(Settings):
        """Options of the two signals."""

        eps: float = Field(1e-6, gt=0)
        """Added to the standard deviation, in reward units."""
        norm_by_std: bool = True
        """Divide both signals by the group's standard deviation."""
        singletons: Singletons = "zero"
        """Signals of a group of one: "zero", or the "reward" itself as in the official code."""

    def forward(self, batch: Batch) -> Float[Tensor, "N 1"]:
        return mean_and_median_advantages(batch.outcome(), batch.group, **dict(self.config))[0][:, None]

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        return {
            "target_advantages": mean_and_median_advantages(
                batch.outcome(), batch.group, **dict(self.config)
            )[1]
        }


@register("bounded_ratio")
class BoundedRatio(Surrogate):
    """Advantage-weighted distance of the ratio to its bounded optimum, equations (B5), (B7)."""

    requires = frozenset({"target_advantages"})

    class Config(Surrogate.Config):
        """Options of the bounded ratio."""

        width_low: float = Field(0.3, gt=0, lt=1)
        """Largest step of the ratio below 1."""
        width_high: float = Field(0.3, gt=0)
        """Largest step of the ratio above 1."""
        tau: float = Field(1e-4, gt=0)
        """Temperature of the target, in units of the target advantage; towards 0 the target is a step."""
        exact_target: bool = False
        """Take the target (B8), which stays at 1 for a zero advantage when the widths differ."""

    def target(self, batch: Batch) -> Float[Tensor, "N 1"]:
        """The optimal ratio of each trajectory."""
        c = self.config
        signal = batch.signal("target_advantages").double()[:, None] / c.tau
        return target_ratio(signal, c.width_low, c.width_high, c.exact_target).to(batch.old_logp)

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return zero_outside(bounded_ratio_loss(ratio, self.target(batch), batch.advantages), batch.mask)

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return (ratio > 1 + self.config.width_high) | (ratio < 1 - self.config.width_low)


@register_recipe("gbpo")
def gbpo() -> Method:
    """GBPO with the repository's widths and temperature, five passes over the data."""
    return Method(
        advantage=MeanAndMedian(), surrogate=BoundedRatio(), defaults={"epochs": 5, "minibatches": 4}
    )
