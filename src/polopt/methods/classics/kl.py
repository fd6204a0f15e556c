r"""KL to the reference policy, paid for in the loss or in the reward.

In the loss (GRPO, arXiv 2402.03300, eq. 3): :math:`\beta\,\hat{\mathrm{KL}}(\pi_\theta \| \pi_{ref})` of each decision,
with gradient. In the reward (RLHF practice, arXiv 1909.08593, eq. 2): each decision earns
:math:`-\beta\,\hat{\mathrm{KL}}(\pi_{old} \| \pi_{ref})`, a constant. Estimators k1, k2, k3: `functional.divergence`.

Slots: regularizer `kl`, shaping `kl`; both need `ref_logp`.

Use it when the policy must stay near its start, as with a learned reward that can be gamed. Not with verifiable rewards
and long training, where it holds learning back and costs an evaluation of the reference.

Pitfalls: k1 in the loss has no gradient in expectation on policy; in the reward it is the unbiased one. The KL in the
reward is added to the other rewards, so estimators that standardise each reward (GDPO) or filter groups by their
outcome see it; keep it in the loss there.
"""

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from polopt.batch import Batch, Evaluation
from polopt.functional.divergence import Estimator, kl_estimate
from polopt.functional.masked import zero_outside
from polopt.parts import Draw, Regularizer, Shaping
from polopt.registry import register
from polopt.settings import Settings


@register("kl")
class KLPenalty(Regularizer):
    """KL of the current policy to the reference, in the loss."""

    requires = frozenset({"ref_logp"})

    class Config(Regularizer.Config):
        """Options of the penalty."""

        coef: float = Field(0.04, ge=0)
        """Weight of the KL per nat; 0.001 to 0.04."""
        estimator: Estimator = "k3"
        """k2 and k3 have a useful gradient on policy; k1 has none in expectation."""

    def decision_penalty(self, evaluation: Evaluation, batch: Batch) -> Float[Tensor, "N T"]:
        return kl_estimate(evaluation.logp, batch.ref_logp, batch.mask, self.config.estimator)


@register("kl")
class KLReward(Shaping):
    """KL of the behaviour policy to the reference, taken off the reward of each decision."""

    requires = frozenset({"ref_logp"})

    class Config(Settings):
        """Options of the penalty."""

        coef: float = Field(0.05, ge=0)
        """Reward units per nat."""
        estimator: Estimator = "k1"
        """k1 is unbiased for the KL of the sequence; k2, k3 vary less."""

    def forward(self, batch: Batch, draw: Draw) -> Batch:
        penalty = kl_estimate(batch.old_logp, batch.ref_logp, batch.mask, self.config.estimator)
        batch = batch.clone(recurse=False)
        earned = 0.0 if batch.step_rewards is None else zero_outside(batch.step_rewards, batch.mask)
        batch.step_rewards = earned - self.config.coef * penalty
        return batch
