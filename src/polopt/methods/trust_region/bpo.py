r"""BPO - Bounded Ratio Reinforcement Learning with a critic (BRRL, arXiv 2604.18578, 2026).

PPO's clip stands in for a trust region. Improving the policy subject to |ratio - 1| <= epsilon, under a log barrier, has a
closed-form optimum: raise the ratio of what is better than a smoothed median of the return, lower the rest. BPO regresses
the ratio onto it; a second head of the critic learns the median.

.. math::
    \max_\pi E_{\pi_0}[\rho A] - \lambda E_{\pi_0}[H(\rho)], \quad E_{\pi_0}\rho = 1, \quad
    H(\rho) = (\rho-1+\epsilon)\ln(\rho-1+\epsilon) + (1+\epsilon-\rho)\ln(1+\epsilon-\rho) \tag{B1}

.. math::
    \rho^\star = 1-\epsilon+2\epsilon\,\sigma(\tilde A/\lambda), \quad \tilde A = Q - \mu(s), \quad
    E_{\pi_0}\tanh\frac{Q-\mu}{2\lambda} = 0 \tag{B2, B3}

.. math::
    V_{\pi^\star} - V_{\pi_0} = \frac{1}{1-\gamma} E_{s\sim d_{\pi^\star}}
    \big[\epsilon\,E_{\pi_0}[\tilde A\tanh(\tilde A/2\lambda)]\big] \ge 0 \tag{B4}

.. math::
    \ell = |\rho-\rho^\star|\,|R - \mathrm{sg}V|, \quad
    \rho^\star = 1-\epsilon+2\epsilon\,\sigma(\mathrm{sg}(R-\mu)/\lambda), \quad
    L_V = (R-V)^2, \quad L_\mu = g(R-\mu), \quad g(x) = \ln(1+e^x) - \tfrac x2 \tag{B5, B6}

.. math::
    \rho^\star = c_l + (c_h-c_l)\,\sigma\Big(\frac{\tilde A}\lambda + \ln\frac{1-c_l}{c_h-1}\Big), \quad
    E_{\pi_0}\rho^\star = 1 \tag{B8}

(B8), for unequal widths, is derived from the stated properties; `exact_target` takes it, the released code's target is off 1
by half the difference of the widths at a zero advantage. As c_l = 0 and lambda goes to 0 it is the cross-entropy method
with the elite fraction 1 / c_h. The paper's median loss is g((R - mu) / lambda); the code, whose coefficients are the
defaults here, leaves the division out: `scale` of the regularizer `median`. With returns around 1 its mu lies between the
mean and the median. The weight takes the mean and the target the median, so their signs may disagree.

Use it when a critic is there and PPO's ratios drift over many epochs. Not when advantages have to be whitened: the targets
are in units of the return, and so is lambda.

Pitfalls: returns that are large scale the policy's gradient, which its clipping has to catch. `use_median=false` goes with
`--regularizer value:coef=1` alone.

Slots: surrogate `bpo`, regularizers `value` (coefficient 1 of half the squared error is the paper's 0.5) and `median`. The
group form is `gbpo`.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.masked import zero_outside
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.ppo import GAE, ValueLoss
from polopt.methods.trust_region.gbpo import bounded_ratio_loss, target_ratio
from polopt.parts import Regularizer, Surrogate
from polopt.registry import register, register_recipe

BISECTIONS = 200
"""Halvings that take any bracket to neighbouring floats, at most."""


class BoundedOptimum(NamedTuple):
    """The solution of (B1) in each state."""

    mu: Tensor
    """Smoothed median of Q [S], in reward units."""
    ratio: Tensor
    """Optimal ratio [S, A]."""
    policy: Tensor
    """Its policy [S, A]."""
    gain: Tensor
    """E_old[(ratio - 1) A] [S], reward units, at least 0."""


def bounded_ratio_optimum(
    policy: Float[Tensor, "*S A"], q: Float[Tensor, "*S A"], lam: float, c_low: float, c_high: float
) -> BoundedOptimum:
    """Equations (B2) and (B8): the best policy whose ratio to `policy` stays within (c_low, c_high).

    Args:
        policy: old probabilities, rows sum to 1.
        q: their action values.
        lam: temperature > 0 in reward units; towards 0 the ratio is a step at the median.
        c_low: lower bound, 0 <= c_low < 1.
        c_high: upper bound > 1.
    """
    policy, q = policy.double(), q.double()
    anchor, offset = _normalizer(policy, q, lam, c_low, c_high)
    ratio = target_ratio((q - anchor) / lam - offset, 1 - c_low, c_high - 1, exact=True)
    advantages = q - (policy * q).sum(-1, keepdim=True)
    gain = (policy * (ratio - 1) * advantages).sum(-1)
    return BoundedOptimum((anchor + lam * offset)[..., 0], ratio, policy * ratio, gain)


def _normalizer(policy: Tensor, q: Tensor, lam: float, c_low: float, c_high: float) -> tuple[Tensor, Tensor]:
    """Anchor and offset [S, 1] with mu = anchor + lam * offset.

    The anchor is the value at which the hard ratio changes, so that the offset keeps its digits however small lam is.
    """
    share = (1 - c_low) / (
        c_high - c_low
    )  # of the range below which the ratio 1 lies: E[sigmoid] has to be this
    shift = torch.tensor(share, dtype=torch.float64).logit()
    falling, order = q.sort(-1, descending=True)
    reached = policy.gather(-1, order).cumsum(-1) >= share - 1e-12
    anchor = falling.gather(-1, reached.to(torch.int8).argmax(-1, keepdim=True))
    distance = (q - anchor) / lam
    low = torch.where(policy > 0, distance, torch.inf).amin(-1, keepdim=True)
    high = torch.where(policy > 0, distance, -torch.inf).amax(-1, keepdim=True)
    for _ in range(BISECTIONS):
        offset = (low + high) / 2
        if bool(((offset == low) | (offset == high)).all()):
            break
        above = _mean_excess(policy, distance - offset + shift, share) > 0
        low, high = torch.where(above, offset, low), torch.where(above, high, offset)
    return anchor, (low + high) / 2


def _mean_excess(policy: Tensor, logit: Tensor, share: float) -> Tensor:
    """Sign of E[sigmoid(logit)] - share, also where the difference is far below the precision of its terms."""
    upper, log_policy = logit > 0, policy.log()
    hard = torch.where(upper, policy, 0.0).sum(-1, keepdim=True) - share
    log_tail = log_policy + torch.nn.functional.logsigmoid(-logit.abs())
    gained = torch.where(upper, -torch.inf, log_tail).logsumexp(-1, keepdim=True)
    missed = torch.where(upper, log_tail, -torch.inf).logsumexp(-1, keepdim=True)
    return torch.where(hard.abs() < 1e-12, gained - missed, hard + gained.exp() - missed.exp())


def smooth_absolute(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """g of equation (B3): softplus(x) - x / 2, an even function that is |x| / 2 far out and ln 2 at 0."""
    return torch.logaddexp(x / 2, -x / 2)


@register("bpo")
class CriticBoundedRatio(Surrogate):
    """Distance of the ratio to its bounded optimum, with return, mean and median from the critic; equations (B5, B6)."""

    zero_advantage_is_silent = False

    class Config(Surrogate.Config):
        """Options of the bounded ratio."""

        width_low: float = Field(0.3, gt=0, le=1)
        """Largest step of the ratio below 1; 0.1 to 0.3."""
        width_high: float = Field(0.3, gt=0)
        """Largest step of the ratio above 1; 0.1 to 0.3."""
        lam: float = Field(1e-3, gt=0)
        """Temperature of the target in reward units, 0.001 to 10; towards 0 the target is a step."""
        argument_bound: float | None = Field(None, gt=0)
        """Bound on (R - mu) / lam; 10 in the paper's large-scale locomotion, None for none."""
        use_median: bool = True
        """False puts the value in place of the median in the target."""
        exact_target: bool = False
        """Take the target (B8), which stays at 1 for a zero advantage when the widths differ."""

    def __init__(self, /, **options: Any) -> None:
        super().__init__(**options)
        self.requires = frozenset({"value", "returns"} | ({"median"} if self.config.use_median else set()))

    def target(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        """The optimal ratio of each decision, constant."""
        c = self.config
        centre = (evaluation.median if c.use_median else evaluation.value).detach()
        signal = (batch.signal("returns") - centre) / c.lam
        if c.argument_bound is not None:
            signal = signal.clamp(-c.argument_bound, c.argument_bound)
        return target_ratio(signal, c.width_low, c.width_high, c.exact_target)

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        weight = batch.signal("returns") - evaluation.value.detach()
        return zero_outside(bounded_ratio_loss(ratio, self.target(evaluation, batch), weight), batch.mask)

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return (ratio > 1 + self.config.width_high) | (ratio < 1 - self.config.width_low)


@register("median")
class MedianLoss(Regularizer):
    """The loss of the critic's median head, equation (B6)."""

    requires = frozenset({"median", "returns"})

    class Config(Regularizer.Config):
        """Options of the median loss."""

        coef: float = Field(0.5, ge=0)
        """Weight of the median loss."""
        scale: float = Field(1.0, gt=0)
        """What R - mu is divided by, in reward units: 1 in the code, lam in the paper; smaller is nearer the median."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        error = (batch.signal("returns") - evaluation.median) / self.config.scale
        return smooth_absolute(zero_outside(error, batch.mask))


@register_recipe("bpo", domain="control")
def bpo() -> Method:
    """BPO with a critic of mean and median: ten passes over the data in 32 minibatches."""
    return Method(
        advantage=GAE(gamma=0.99, whiten=False),
        surrogate=CriticBoundedRatio(),
        regularizers=[ValueLoss(coef=1.0), MedianLoss()],
        defaults={"prompts": 8, "rollouts": 1, "epochs": 10, "minibatches": 32},
    )
