r"""ETR - Outcome-Guided Elastic Trust Regions for Policy Optimization (arXiv 2601.03723, 2026).

GRPO's clip interval becomes that of the sample: wider where the outcome is informative (large |A|) and in groups whose
pass rate is near one half, narrower where the signal is weak.

.. math::
    q_g = \mathrm{clamp}\Big(\frac{4 v_g}{(b-a)^2}, 0, 1\Big), \quad v_g \text{ biased variance of the group's rewards} \tag{E1}

.. math::
    u_i = 1 + \alpha(|A_i| - 1), \quad h_g = 1 + \beta(2 q_g - 1), \quad
    s_i = \mathrm{clamp}(u_i h_g, s_{min}, s_{max}) \tag{E2, E3, E4}

.. math::
    \ell_{it} = -\min(r A, \mathrm{clip}(r, 1 - \epsilon_{low} s_i, 1 + \epsilon_{high} s_i) A) \tag{E5}

RECONSTRUCTED: the published sources fix that the width grows with |A| and with the variance of the pass rate; the form
of (E2) to (E4) and alpha, beta, s_min, s_max are the simplest with these properties that give GRPO back at alpha = beta
= 0. `form="reconstructed"` names it.

At one update per rollout (ratio 1) it is GRPO. (E2) takes |A| to be centred at 1, as z-scores are: with another
estimator set alpha = 0. Compare with a static clip of the same average width, not only with 0.2.

Slots: surrogate; the widths come from the whole iteration as the signal `clip_scale`.

Use it where GRPO takes several updates per rollout and a wider clip helps but costs entropy. With one update per rollout
it is GRPO: not worth it there.

Pitfalls: the sample part alone (beta = 0) widens the interval of rare successes, mislabelled ones too: keep beta with
noisy rewards. Compared with a static clip of 0.2 alone, part of the gain is a wider interval on average.
"""

from typing import Literal, Self

from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.aggregation import Aggregation
from polopt.functional.groups import Groups
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import clipped_surrogate, log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe


def group_quality(
    rewards: Float[Tensor, " N"], group: Int[Tensor, " N"], reward_range: tuple[float, float] = (0.0, 1.0)
) -> Float[Tensor, " N"]:
    """Equation (E1), of each sample's group: 4 p (1 - p) for binary rewards with pass rate p."""
    groups = Groups.of(group)
    variance = groups.std(rewards, unbiased=False).square()
    low, high = reward_range
    return groups.broadcast((4 * variance / (high - low) ** 2).clamp(0, 1))


def elastic_scale(
    advantages: Float[Tensor, "*#shape"],
    quality: Float[Tensor, "*#shape"],
    alpha: float,
    beta: float,
    s_min: float,
    s_max: float,
) -> Float[Tensor, "*#shape"]:
    """Equations (E2) to (E4): the factor on the clip's width."""
    micro = 1 + alpha * (advantages.abs() - 1)
    macro = 1 + beta * (2 * quality - 1)
    return (micro * macro).clamp(s_min, s_max)


@register("etr")
class ElasticClip(Surrogate):
    """PPO clip with a width of each sample's own, equations (E1) to (E5)."""

    reconstructed = "form of the width (E2-E4) and the constants alpha, beta, s_min, s_max"
    provides = frozenset({"clip_scale"})

    class Config(Surrogate.Config):
        """Options of the elastic clip."""

        aggregation: Aggregation = "sequence_mean"
        """What is averaged over what."""
        clip_low: float = Field(0.2, gt=0, lt=1)
        """Width below 1 at scale 1."""
        clip_high: float = Field(0.2, gt=0)
        """Width above 1 at scale 1."""
        form: Literal["reconstructed"] = "reconstructed"
        """Formula of the width."""
        alpha: float = Field(0.5, ge=0, le=1)
        """How much the sample's |A| counts."""
        beta: float = Field(0.5, ge=0, le=1)
        """How much the group's variance counts."""
        s_min: float = Field(0.5, gt=0)
        """Smallest scale."""
        s_max: float = Field(2.0, gt=0)
        """Largest scale."""
        reward_range: tuple[float, float] = (0.0, 1.0)
        """Smallest and largest possible outcome."""

        @model_validator(mode="after")
        def _ranges(self) -> Self:
            if self.s_min > self.s_max:
                raise ValueError(f"s_min = {self.s_min} must not exceed s_max = {self.s_max}")
            if self.clip_low * self.s_max >= 1:
                raise ValueError(f"clip_low * s_max = {self.clip_low * self.s_max} must be below 1")
            if self.reward_range[0] >= self.reward_range[1]:
                raise ValueError(f"reward_range = {self.reward_range} must be (lowest, highest)")
            return self

    def signals(self, batch: Batch) -> dict[str, Tensor]:
        c = self.config
        quality = group_quality(batch.outcome(), batch.group, c.reward_range)[:, None]
        return {
            "clip_scale": elastic_scale(batch.advantages.double(), quality, c.alpha, c.beta, c.s_min, c.s_max)
        }

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio, low, high = self._ratio_and_widths(evaluation, batch)
        return clipped_surrogate(ratio, batch.advantages, low, high)

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio, low, high = self._ratio_and_widths(evaluation, batch)
        return (ratio > 1 + high) & (batch.advantages > 0) | (ratio < 1 - low) & (batch.advantages < 0)

    def _ratio_and_widths(self, evaluation: Evaluation, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        scale = zero_outside(batch.signal("clip_scale"), batch.mask).to(ratio)
        return ratio, self.config.clip_low * scale, self.config.clip_high * scale


@register_recipe("etr")
def etr() -> Method:
    """ETR on GRPO's advantages, eight updates per rollout (it acts only through reuse)."""
    return Method(
        advantage=GroupStandardized(), surrogate=ElasticClip(), defaults={"epochs": 2, "minibatches": 4}
    )
