r"""CISPO - Clipped Importance Sampling Policy Optimization (MiniMax-M1, arXiv 2506.13585, 2025).

PPO's clip drops the gradient of whatever moved far, which are the rare and decisive tokens. Here the importance
weight is clipped and detached instead, and multiplies the log-probability: every decision keeps a gradient, of
bounded weight.

.. math::
    L = -\frac1{\sum_i L_i}\sum_i\sum_t \mathrm{sg}[\hat r_{it}]\,A_i \log\pi_\theta(a_{it}), \quad
    \hat r_{it} = \mathrm{clip}(r_{it}, 1-\epsilon_l, 1+\epsilon_h) \tag{4, 5}

On fresh data it is the token mean of REINFORCE. The paper leaves the lower side open and tunes the upper one alone.

RECONSTRUCTED: the upper bound, which the paper does not give; 1 + 4 is usual since (ScaleRL, arXiv 2510.13786). The
paper takes 16 updates per rollout, the recipe 4; its average over the tokens of each group is here over those of the
minibatch.

Slots: surrogate; the advantage is GRPO's.

Use it when several updates are taken per rollout and rare, decisive tokens must keep a gradient. With one update per
rollout all weights are 1 and it is the token mean of REINFORCE: not worth it there.

Pitfalls: nothing holds the policy near its data but the bounded weight, so keep the gradient clip and few updates. The
loss's value says little, since its gradient is not the gradient of what is being raised.
"""

from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.ratio import log_ratio
from polopt.method import Method
from polopt.methods.classics.grpo import GroupStandardized
from polopt.parts import Surrogate
from polopt.registry import register, register_recipe


@register("cispo")
class ClippedWeight(Surrogate):
    """Score function with a clipped, detached importance weight, equations (4) and (5)."""

    reconstructed = "clip_high (the paper gives no value)"

    class Config(Surrogate.Config):
        """Options of the clipped weight."""

        clip_low: float | None = Field(None, ge=0, le=1)
        """Weights are at least 1 - clip_low; None leaves them open below (paper)."""
        clip_high: float = Field(4.0, ge=0)
        """Weights are at most 1 + clip_high."""

    def decision_loss(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        c = self.config
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        # the weight is a constant: its own gradient is what the clip of PPO would cut off
        weight = ratio.detach().clamp(None if c.clip_low is None else 1 - c.clip_low, 1 + c.clip_high)
        return -weight * batch.advantages * evaluation.logp

    def clipped(self, evaluation: Evaluation, batch: Batch) -> Bool[Tensor, "N T"]:
        ratio = log_ratio(evaluation.logp, batch.old_logp, batch.mask).exp()
        return (ratio > 1 + self.config.clip_high) | (ratio < 1 - (self.config.clip_low or 1.0))


@register_recipe("cispo")
def cispo() -> Method:
    """CISPO on GRPO's advantages, four minibatches per rollout."""
    return Method(advantage=GroupStandardized(), surrogate=ClippedWeight(), defaults={"minibatches": 4})
