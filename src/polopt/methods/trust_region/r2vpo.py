r"""R2VPO - Ratio-Variance Regularized Policy Optimization (arXiv 2601.03320 and 2605.26784, 2026).

No clip: the second moment of the ratio around 1 under the behaviour policy, which is the chi-square divergence, is held
below delta by a Lagrange multiplier. The penalty is a smooth brake that lowers, and finally reverses, the push on
decisions that have moved far, so that old data stay usable.

.. math::
    \max_\theta E_\mu[r A] \text{ subject to } E_\mu[(r-1)^2] \le \delta \tag{R1}

.. math::
    L = \mathrm{agg}(-r A + \lambda (r-1)^2), \quad
    \frac{\partial L}{\partial\log\pi} = -a\,r\,(A - 2\lambda(r-1)) \tag{R3, R4}

.. math::
    \hat V = \mathrm{mean}\,(r-1)^2, \quad \lambda \leftarrow \max(0, \lambda + \eta_\lambda(\hat V - \delta)) \tag{R5, R6}

RECONSTRUCTED: the step rule (R6), delta, eta_lambda and the initial multiplier; that lambda is adapted primal-dually is
the paper's. `eta_lambda=0,lam=0.04` is the fixed multiplier of two public re-implementations. The off-policy variant
replays earlier iterations against their own behaviour log-probabilities (`replay` iterations).

Slots: surrogate with state (the multiplier).

Use it to reuse several old batches (`replay`), where a clip throws most of them away and no control collapses. Not with
delta below the variance that stale data have anyway: the multiplier then grows and learning stalls.

Pitfalls: a replayed trajectory keeps the log-probabilities of the policy that made it. While the constraint is slack the
multiplier is 0 and nothing limits a step: keep gradients clipped. Recompute `delta` when the replay gets longer.
"""

from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import masked_mean
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe


def ratio_variance_loss(
    ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], multiplier: float | Tensor
) -> Float[Tensor, "*shape"]:
    """Equation (R3) of each decision."""
    return -ratio * advantages + multiplier * (ratio - 1).square()


def effective_weight(
    ratio: Float[Tensor, "*shape"], advantages: Float[Tensor, "*shape"], multiplier: float | Tensor
) -> Float[Tensor, "*shape"]:
    """Equation (R4): what multiplies the score of each decision."""
    return ratio * (advantages - 2 * multiplier * (ratio - 1))


def dual_step(
    multiplier: Float[Tensor, ""], variance: Float[Tensor, ""], delta: float, eta: float
) -> Float[Tensor, ""]:
    """Equation (R6): projected ascent on the violation."""
    return (multiplier + eta * (variance - delta)).clamp(min=0)


@register("r2vpo")
class RatioVariance(Surrogate):
    """Importance-weighted advantage with a ratio-variance penalty, equations (R3) to (R6)."""

    reconstructed = "dual step (R6) and the constants delta, eta_lambda, lam"
    zero_advantage_is_silent = False
    multiplier: Tensor

    class Config(Surrogate.Config):
        """Options of the constraint."""

        delta: float = Field(0.04, gt=0)
        """Allowed ratio variance; 0.04 = 0.2^2 contains what a clip of 0.2 allows, 0.1 to 0.5 when replaying."""
        lam: float = Field(0.5, ge=0)
        """Multiplier at the start."""
        eta_lambda: float = Field(0.5, ge=0)
        """Step of the multiplier per update; 0 keeps it fixed."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.register_buffer("multiplier", torch.tensor(self.config.lam, dtype=torch.float64))

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return ratio_variance_loss(ratio, batch.advantages, self.multiplier.to(ratio))

    def after_step(self, evaluation: Evaluation, batch: Batch) -> None:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        variance = masked_mean((ratio - 1).square(), batch.mask).double()
        self.multiplier.copy_(dual_step(self.multiplier, variance, self.config.delta, self.config.eta_lambda))


@register_recipe("r2vpo")
def r2vpo() -> Method:
    """R2VPO on GRPO's advantages, eight updates per rollout."""
    return Method(
        advantage=GroupStandardized(), surrogate=RatioVariance(), defaults={"epochs": 2, "minibatches": 4}
    )
