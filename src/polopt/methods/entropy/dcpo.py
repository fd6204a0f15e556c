r"""DCPO - Distribution-Centric Policy Optimization (arXiv 2601.12730, 2026).

The policy is pulled towards its own behaviour policy at another temperature, hotter when the entropy is below a set
point, colder when above: a REINFORCE term on the successful samples, re-weighted per decision by target / behaviour and
mixed into the advantage. A bang-bang controller on the measured entropy picks temperature and weight.

.. math::
    T = 1.2 \text{ if } \hat H \le H_0 \text{ else } 0.8, \quad
    \rho_{it} = \exp(\log\pi^T_{old} - \log\pi_{old}), \ \pi^T = \mathrm{softmax}(z / T) \tag{2, 3}

.. math::
    d = \min(|H_0 - \hat H|, 0.1), \quad p^+ = \mathrm{share}(R_i > 0.05), \quad \alpha = \frac{d}{d + p^+} \tag{4}

.. math::
    A_{it} = (1 - \alpha) A^{G}_i + \alpha\,1[R_i > 0.05]\,\rho_{it} \tag{5}

alpha = 0 without any success (the official code gives NaN). The entropy fed to the next iteration is minus the mean
log-probability found during the update (7); it is 0 before the first, so the first iteration always pushes up.

Not "Dynamic Clipping Policy Optimization", which shares the name.

Slots: advantage transform with state (previous entropy); needs `old_tempered_logp`. Surrogate of the recipe: PPO with
dual clip 3, no KL. Do not use it where every decision settles success: the indicator then kills the pull.

Use it when GRPO's entropy runs down and right answers leave decisions free: it then settles at the set point. Not with
unique answers written token by token.

Pitfalls: the set point is in nats per decision as measured by the sampled log-probability; too high a one costs accuracy.
The threshold is on the raw outcome, so with shaped rewards choose it. Under top-p the log-probability is not the sampler's.
"""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import masked_mean, zero_outside
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.methods.classics.ppo import PPOClip
from polopt.parts import AdvantageTransform
from polopt.registry import register, register_recipe
from polopt.settings import Settings


def mixing_weight(
    entropy: Float[Tensor, ""], target: float, success: Float[Tensor, ""], cap: float = 0.1
) -> Float[Tensor, ""]:
    """Equation (4): weight of the pull, from the measured entropy (nats) and the share of successes."""
    distance = (target - entropy).abs().clamp(max=cap)
    return torch.where(
        success > 0, distance / (distance + success).clamp(min=1e-12), torch.zeros_like(distance)
    )


def mixed_advantage(
    advantages: Float[Tensor, "N T"],
    ratio: Float[Tensor, "N T"],
    positive: Float[Tensor, " N"],
    alpha: Float[Tensor, ""],
) -> Float[Tensor, "N T"]:
    """Equation (5)."""
    return (1 - alpha) * advantages + alpha * positive[:, None] * ratio


@register("dcpo")
class DistributionCentric(AdvantageTransform):
    """Mixes a pull towards a tempered behaviour policy into any advantage, equations (2) to (5), (7)."""

    requires = frozenset({"old_tempered_logp"})
    previous_entropy: Tensor
    entropy_sum: Tensor
    entropy_count: Tensor

    class Config(Settings):
        """Options of the controller."""

        target_entropy: float = Field(0.25, ge=0)
        """H_0 in nats per decision; 0.25 was best of 0.25 to 1 (paper)."""
        temperature_high: float = Field(1.2, ge=1)
        """Temperature of the target while the entropy is at or below H_0."""
        temperature_low: float = Field(0.8, gt=0, le=1)
        """Temperature of the target while the entropy is above H_0."""
        alpha_cap: float = Field(0.1, ge=0)
        """Cap of the distance to H_0 in nats."""
        positive_threshold: float = 0.05
        """Outcomes above it are successes."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        for name in ("previous_entropy", "entropy_sum", "entropy_count"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    @property
    def temperature(self) -> float:
        """Equation (2)."""
        low = float(self.previous_entropy) <= self.config.target_entropy
        return self.config.temperature_high if low else self.config.temperature_low

    def evaluation_options(self) -> dict[str, Any]:
        return {"temperature": self.temperature}

    def forward(self, batch: Batch, advantages: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
        c = self.config
        ratio = zero_outside(
            log_ratio(batch.signal("old_tempered_logp"), batch.old_logp, batch.mask).exp(), batch.mask
        )
        positive = (batch.outcome() > c.positive_threshold).to(advantages)
        alpha = mixing_weight(self.previous_entropy, c.target_entropy, positive.mean().double(), c.alpha_cap)
        return mixed_advantage(advantages, ratio, positive, alpha.to(advantages))

    def after_step(self, evaluation: Evaluation, batch: Batch) -> None:
        self.entropy_sum -= masked_mean(evaluation.logp, batch.mask).double()
        self.entropy_count += 1

    def observe(self, batch: Batch) -> None:
        if self.entropy_count > 0:
            self.previous_entropy.copy_(self.entropy_sum / self.entropy_count)
        self.entropy_sum.zero_()
        self.entropy_count.zero_()


@register_recipe("dcpo")
def dcpo() -> Method:
    """DCPO over GRPO with a set point of 0.25 nats, four updates per rollout."""
    return Method(
        advantage=[GroupStandardized(), DistributionCentric()],
        surrogate=PPOClip(dual_clip=3),
        defaults={"minibatches": 4},
    )
